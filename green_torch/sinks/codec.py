"""Records as plain JSON dictionaries and back: the one place that knows how a record looks in a file.

A dictionary carries its ``"type"`` (manifest, record or summary) and the record's own field names. A number that is not finite
becomes ``null`` (JSON has no NaN). On reading, unknown keys are ignored, since a newer minor version may add some; a newer
``schema_version`` is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from numbers import Integral, Real
from operator import attrgetter
from types import NoneType
from typing import Any, cast, get_args, get_origin, get_type_hints

from green_torch.errors import LedgerError
from green_torch.records import SCHEMA_VERSION, Item, Manifest, RunSummary, StepRecord

_CLASSES: Mapping[str, Any] = {"manifest": Manifest, "record": StepRecord, "summary": RunSummary}
_NAMES: Mapping[Any, str] = {cls: name for name, cls in _CLASSES.items()}
_AS_IS = frozenset({int, str, bool, NoneType})


def to_dict(item: Item) -> dict[str, Any]:
    """The item as JSON knows it: dictionaries, lists, strings, finite numbers, booleans and ``None``.

    Raises:
        TypeError: A field holds something that none of these can stand for.
    """
    return {"type": _NAMES[type(item)], **plain(item)}


def from_dict(data: Mapping[str, Any]) -> Item:
    """The item that :func:`to_dict` made this of; a ``null`` in a field that must be a number reads NaN.

    Raises:
        LedgerError: An unknown type, a missing or wrongly typed field, or a newer schema version.
    """
    cls = _CLASSES.get(str(data.get("type")))
    if cls is None:
        raise LedgerError(
            f'unknown type {data.get("type")!r:.60}; one of {", ".join(_CLASSES)} was expected under the key "type"'
        )
    item: Item = _decoder(cls)(data)
    return item


def plain(value: Any) -> Any:
    """Any record, or part of one, without its ``"type"``."""
    kind = type(value)
    if kind is float:
        return value if math.isfinite(value) else None
    if kind in _AS_IS:
        return value
    if kind is tuple or kind is list:
        return [plain(one) for one in value]
    if is_dataclass(kind):
        names, values = _getter(kind)
        return dict(zip(names, map(plain, values(value)), strict=True))
    return _plain_rare(value)


def _plain_rare(value: Any) -> Any:
    """What is none of the usual types but stands for one: an enum's member, a NumPy number, a mapping."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return plain(float(value))
    raise TypeError(f"a record holds a {type(value).__name__}, which JSON can't carry; convert it to a number or a string")


@cache
def _getter(cls: type) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    names = tuple(field.name for field in fields(cls))
    return names, attrgetter(*names)


_Decoder = Callable[[Any], Any]


@cache
def _decoder(hint: Any) -> _Decoder:
    """What turns plain JSON into a value of the annotated type; it raises LedgerError for anything else."""
    origin, arguments = get_origin(hint), get_args(hint)
    if NoneType in arguments:
        inner = _decoder(next(argument for argument in arguments if argument is not NoneType))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        element = _decoder(arguments[0])
        return lambda value: tuple(element(one) for one in _checked(value, list, "a list"))
    if origin is Mapping:
        element = _decoder(arguments[1])
        return lambda value: {key: element(one) for key, one in _checked(value, dict, "an object").items()}
    if is_dataclass(hint):
        return _object_decoder(cast("type", hint))
    if issubclass(hint, Enum):
        return lambda value: _member(hint, value)
    scalars: Mapping[type, _Decoder] = {
        float: _number,
        int: lambda value: _checked(value, int, "a whole number"),
        str: lambda value: _checked(value, str, "a string"),
        bool: lambda value: _checked(value, bool, "true or false"),
    }
    return scalars[hint]


def _object_decoder(cls: type) -> _Decoder:
    hints = get_type_hints(cls)
    plan = [
        (
            field.name,
            _decoder(hints[field.name]),
            NoneType in get_args(hints[field.name]),
            field.default is not MISSING or field.default_factory is not MISSING,
        )
        for field in fields(cls)
    ]

    def decode(data: Any) -> Any:
        _checked(data, dict, "an object")
        if cls is Manifest:
            _check_version(data.get("schema_version"))
        values: dict[str, Any] = {}
        for name, decoder, optional, defaulted in plan:
            if name in data:
                try:
                    values[name] = decoder(data[name])
                except LedgerError as error:
                    raise LedgerError(f"{name}: {error}") from None
            elif not defaulted:
                if not optional:
                    raise LedgerError(f"{name}: missing from a {cls.__name__}")
                values[name] = None
        return cls(**values)

    return decode


def _check_version(version: Any) -> None:
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise LedgerError(
            f"schema version {version} is newer than this green_torch reads ({SCHEMA_VERSION}); pip install --upgrade green-torch"
        )


def _checked(value: Any, kind: type, words: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise LedgerError(f"expected {words}, found {value!r:.60}")
    return value


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LedgerError(f"expected a number, found {value!r:.60}")
    try:
        return float(value)
    except OverflowError:
        raise LedgerError("expected a number, found one over 1e308") from None


def _member(cls: type[Enum], value: Any) -> Enum:
    try:
        return cls(value)
    except ValueError:
        raise LedgerError(f"{value!r:.60} is not one of {', '.join(str(member.value) for member in cls)}") from None
