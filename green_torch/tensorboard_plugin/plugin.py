"""The tab's server side: static files, and what TensorBoard has read of each run as plain JSON.

Everything comes through TensorBoard's data provider, so it works with either data loader and with whatever the log directory is.

| path | answer |
|---|---|
| ``/runs?have=DIGEST,…`` | each run's newest snapshot, with the blocks that a comparison measured; what the page has comes as its digest alone |
| ``/tags?run=R&run=…`` | names of the scalar tags, by run |
| ``/scalars?run=R&run=…&tag=T&tag=…`` | series by run and tag: steps, Unix seconds, values |
| ``…&points=N&last=S`` | of at most so many points, and of those the last share (0.05: the last twentieth, at least one) |
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard import errors, plugin_util  # type: ignore[import-untyped]  # tensorboard ships no types
from tensorboard.backend import http_util  # type: ignore[import-untyped]
from tensorboard.data import provider  # type: ignore[import-untyped]
from tensorboard.plugins import base_plugin  # type: ignore[import-untyped]
from werkzeug import wrappers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PLUGIN_NAME = "green"
SNAPSHOT_TAG = "green/snapshot"
COMPARISON_TAG = "green/comparison"
STATIC = Path(__file__).resolve().parent / "static"

_SCALARS = "scalars"  # TensorBoard's own plugin
_MAX_POINTS = 2000
_MAX_TAGS = 64  # of one request
_MAX_RUNS = 256  # the same
_MAX_SNAPSHOT_BYTES = 1_000_000
_DIGEST_BYTES = 8
_MIME = {
    ".js": "application/javascript",
    ".css": "text/css",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


class GreenPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # its base has no types either
    """Answers the page's requests."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider

    def is_active(self) -> bool:
        """False: TensorBoard asks the data provider first, which knows whether a run has a snapshot."""
        return False

    def frontend_metadata(self) -> Any:
        """Where the page's code is."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Green")

    def data_plugin_names(self) -> tuple[str, ...]:
        """Whose data make the tab active."""
        return (PLUGIN_NAME,)

    def get_plugin_apps(self) -> Mapping[str, Callable[..., Any]]:
        """Every path that is answered; each static file is one, so no other file can be asked for."""
        apps: dict[str, Callable[..., Any]] = {
            f"/{path.name}": _static(path) for path in sorted(STATIC.iterdir()) if path.suffix in _MIME
        }
        for name, answer in (
            ("runs", self._runs),
            ("tags", self._tags),
            ("scalars", self._scalars),
        ):
            apps[f"/{name}"] = _json(answer)
        return apps

    def _runs(self, request: wrappers.Request) -> str:
        """Each run's last snapshot as it was written, put together without decoding it again."""
        ctx, experiment = _place(request)
        have = frozenset(request.args.get("have", "").split(","))
        read = self._provider.read_tensors(
            ctx,
            experiment_id=experiment,
            plugin_name=PLUGIN_NAME,
            downsample=1,  # the most recent is always kept
            run_tag_filter=provider.RunTagFilter(tags=[SNAPSHOT_TAG, COMPARISON_TAG]),
        )
        rows = []
        for run, tags in sorted(read.items()):
            if not (points := tags.get(SNAPSHOT_TAG)):
                continue
            digest, content = _checked(_bytes(points[-1].numpy))
            if measured := tags.get(COMPARISON_TAG):
                more, blocks = _checked(_bytes(measured[-1].numpy), "comparison")
                if blocks.startswith('"comparison"'):  # a damaged one is left out
                    digest, content = digest + more, f"{content},{blocks}"
            head = _dumps({"run": run, "digest": digest, "wall_s": _finite(points[-1].wall_time)})
            rows.append(head if digest in have else f"{head[:-1]},{content}}}")
        n_runs = len(self._provider.list_runs(ctx, experiment_id=experiment))
        return f'{{"n_runs":{n_runs},"runs":[{",".join(rows)}]}}'

    def _tags(self, request: wrappers.Request) -> str:
        ctx, experiment = _place(request)
        found = self._provider.list_scalars(
            ctx,
            experiment_id=experiment,
            plugin_name=_SCALARS,
            run_tag_filter=provider.RunTagFilter(runs=request.args.getlist("run") or None),
        )
        return _dumps({run: sorted(tags) for run, tags in found.items()})

    def _scalars(self, request: wrappers.Request) -> str:
        runs, tags = request.args.getlist("run"), request.args.getlist("tag")
        for what, n, most in (("runs", len(runs), _MAX_RUNS), ("tags", len(tags), _MAX_TAGS)):
            if not 0 < n <= most:
                raise errors.InvalidArgumentError(f"ask for 1 to {most} {what}, not {n}")
        n_points = _number(request, "points", 1, _MAX_POINTS)
        share = _number(request, "last", 0, 1)
        ctx, experiment = _place(request)
        read = self._provider.read_scalars(
            ctx,
            experiment_id=experiment,
            plugin_name=_SCALARS,
            downsample=int(n_points),
            run_tag_filter=provider.RunTagFilter(runs=runs, tags=tags),
        )
        found = (
            (
                run,
                ",".join(
                    f"{_dumps(tag)}:{_series(points[-_window(len(points), share) :])}" for tag, points in tags.items() if points
                ),
            )
            for run, tags in read.items()
        )
        return f"{{{','.join(f'{_dumps(run)}:{{{series}}}' for run, series in found)}}}"


def _number(request: wrappers.Request, name: str, least: float, most: float) -> float:
    """A parameter of the request between its limits; ``most`` where it is not given."""
    try:
        value = float(request.args.get(name, most))
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise errors.InvalidArgumentError(f"{name} must be a number from {least:g} to {most:g}")
    return value


def _window(n: int, share: float) -> int:
    """How many of ``n`` points are the last ``share`` of them; at least one."""
    return max(1, math.ceil(share * n))


def _series(points: Sequence[Any]) -> str:
    """Points as JSON; nine digits, which is what a float32 has. TensorBoard keeps them by step, in order of time."""
    return (
        f'{{"step":[{",".join(str(point.step) for point in points)}],'
        f'"wall_s":[{",".join(_text(point.wall_time, ".3f") for point in points)}],'
        f'"value":[{",".join(_text(point.value, ".9g") for point in points)}]}}'
    )


def _text(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "null"


def _place(request: wrappers.Request) -> tuple[Any, str]:
    """The request's context and experiment, as TensorBoard's own plugins find them."""
    return plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)


def _static(path: Path) -> Callable[..., Any]:
    """Serves one file of ours."""

    @wrappers.Request.application
    def serve(request: wrappers.Request) -> Any:
        return http_util.Respond(request, path.read_bytes(), _MIME[path.suffix])

    return serve


def _json(answer: Callable[[wrappers.Request], str]) -> Callable[..., Any]:
    """Serves what a method answers; TensorBoard compresses it where the browser can take that."""

    @wrappers.Request.application
    def serve(request: wrappers.Request) -> Any:
        try:
            return http_util.Respond(request, answer(request), "application/json")
        except errors.NotFoundError:  # an experiment without data yet
            return http_util.Respond(request, "{}", "application/json")

    return serve


def _bytes(value: Any) -> bytes:
    """The string of a one-element tensor; empty where the tensor is something else."""
    try:
        item = value.item()
    except (AttributeError, ValueError):
        return b""
    return item if isinstance(item, bytes) else str(item).encode("utf-8", "replace")


@lru_cache(maxsize=512)
def _checked(raw: bytes, name: str = "snapshot") -> tuple[str, str]:
    """A digest of a snapshot, and the member of a JSON object that holds it: ``"snapshot": …`` (``name``), or ``"problem": "…"``."""
    digest = hashlib.blake2b(raw, digest_size=_DIGEST_BYTES).hexdigest()
    if len(raw) > _MAX_SNAPSHOT_BYTES:
        return digest, f'"problem":{_dumps(f"its snapshot has {len(raw)} bytes, more than green_torch writes")}'
    constants: list[str] = []
    try:
        text = raw.decode("utf-8")
        snapshot = json.loads(text, parse_constant=constants.append)  # NaN and infinities read null
    except (ValueError, RecursionError):
        return digest, '"problem":"its snapshot is no JSON: another program may have written it, or the event file is damaged"'
    if not isinstance(snapshot, dict):
        return digest, '"problem":"its snapshot is not one of green_torch"'
    return digest, f'"{name}":{_dumps(snapshot) if constants else text}'


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
