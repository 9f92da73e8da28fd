"""Records as plain JSON dictionaries and back: the one place that knows how a record looks in a file.

A dictionary carries its ``"type"`` (manifest, record or summary) and the record's own field names. A number that is not finite
becomes ``null`` (JSON has no NaN). On reading, unknown keys are ignored, since a newer minor version may add some; a newer
``schema_version`` is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from math import isfinite, nan
from numbers import Integral, Real
from operator import attrgetter, itemgetter
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from green_torch.errors import LedgerError
from green_torch.records import SCHEMA_VERSION, Item, Manifest, RunSummary, StepRecord

_CLASSES: Mapping[str, Any] = {"manifest": Manifest, "record": StepRecord, "summary": RunSummary}
_NAMES: Mapping[Any, str] = {cls: name for name, cls in _CLASSES.items()}
_AS_IS = frozenset({int, str, bool, NoneType})
T = TypeVar("T")


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


def parsed(cls: type[T], data: Any) -> T:
    """The record, or part of one, that :func:`plain` made this of.

    Raises:
        LedgerError: as in :func:`from_dict`.
    """
    item: T = _decoder(cast("Any", cls))(data)
    return item


def plain(value: Any) -> Any:
    """Any record, or part of one, without its ``"type"``."""
    kind = type(value)
    if kind is float:
        return value if isfinite(value) else None
    return value if kind in _AS_IS else _encoder(cast("type", kind))(value)


_Encoder = Callable[[Any], Any]


@cache
def _encoder(kind: type) -> _Encoder:
    """What turns a value of this type into plain JSON."""
    if is_dataclass(kind):
        return _object_encoder(kind)
    if issubclass(kind, tuple | list):
        return lambda value: [plain(one) for one in value]
    if issubclass(kind, Mapping):
        return lambda value: {str(key): plain(one) for key, one in value.items()}
    for base, number in ((Integral, int), (Real, lambda value: plain(float(value))), (str, str)):  # NumPy's; StrEnum's members
        if issubclass(kind, base):
            return cast("_Encoder", number)
    raise TypeError(f"a record holds a {kind.__name__}, which JSON can't carry; convert it to a number or a string")


def _object_encoder(cls: type) -> _Encoder:
    names = tuple(field.name for field in fields(cls))
    values = attrgetter(*names)

    def encode(record: Any) -> dict[str, Any]:
        data = dict(zip(names, values(record), strict=True))
        for name, value in data.items():
            kind = type(value)
            if kind is float:
                if not isfinite(value):
                    data[name] = None
            elif kind not in _AS_IS:
                data[name] = _encoder(cast("type", kind))(value)
        return data

    return encode


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
        return lambda value: tuple(map(element, _checked(value, list, "a list")))
    if origin is Mapping:
        element = _decoder(arguments[1])
        return lambda value: {key: element(one) for key, one in _checked(value, dict, "an object").items()}
    if is_dataclass(hint):
        return _object_decoder(cast("type", hint))
    if issubclass(hint, Enum):
        members = {member.value: member for member in hint}  # twice as fast as hint(value)
        return lambda value: (members.get(value) if type(value) is str else None) or _member(hint, value)
    scalars: Mapping[type, _Decoder] = {
        float: _number,
        int: lambda value: _checked(value, int, "a whole number"),
        str: lambda value: _checked(value, str, "a string"),
        bool: lambda value: _checked(value, bool, "true or false"),
    }
    return scalars[hint]


@dataclass(frozen=True, slots=True)
class _Slot:
    """How one field is read: ``ready`` types are taken as they are, others decoded; whether it may be ``None``, or be missing."""

    name: str
    ready: frozenset[type]
    decode: _Decoder
    optional: bool
    defaulted: bool


def _object_decoder(cls: type) -> _Decoder:
    hints = get_type_hints(cls)
    plan = [
        _Slot(
            field.name,
            _ready(hints[field.name]),
            _decoder(hints[field.name]),
            NoneType in get_args(hints[field.name]),
            field.default is not MISSING or field.default_factory is not MISSING,
        )
        for field in fields(cls)
    ]
    in_order = itemgetter(*(slot.name for slot in plan))
    work: dict[tuple[type, ...], list[tuple[int, _Decoder]]] = {}  # types of the values -> those to decode

    def decode(data: Any) -> Any:
        if cls is Manifest and type(data) is dict:
            _check_version(data.get("schema_version"))
        try:  # as this version writes it
            values = list(in_order(data))
            kinds = tuple(map(type, values))
            if kinds not in work:
                work[kinds] = [(at, slot.decode) for at, slot in enumerate(plan) if kinds[at] not in slot.ready]
            for at, decoder in work[kinds]:
                values[at] = decoder(values[at])
            return cls(*values)
        except (KeyError, TypeError, LedgerError):
            return cls(**_patiently(cls, plan, data))

    return decode


def _patiently(cls: type, plan: Sequence[_Slot], data: Any) -> dict[str, Any]:
    """An object field by field: one of another version, or with an error, whose place is named."""
    _checked(data, dict, "an object")
    values: dict[str, Any] = {}
    for slot in plan:
        if slot.name in data:
            try:
                values[slot.name] = data[slot.name] if type(data[slot.name]) in slot.ready else slot.decode(data[slot.name])
            except LedgerError as error:
                raise LedgerError(f"{slot.name}: {error}") from None
        elif not slot.defaulted:
            if not slot.optional:
                raise LedgerError(f"{slot.name}: missing from a {cls.__name__}")
            values[slot.name] = None
    return values


def _ready(hint: Any) -> frozenset[type]:
    """The types of values that JSON holds just as the field wants them: of most numbers and strings."""
    either = get_args(hint) if NoneType in get_args(hint) else (hint,)
    return frozenset({float, int, str, bool, NoneType}.intersection(either))


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
        return nan
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
