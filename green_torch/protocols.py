"""What stands at either end of the straight line: the protocols that meters, clocks, grids and sinks fulfil."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from green_torch.records import Domain, IntensityPoint, Item, Reading


class Meter(Protocol):
    """Reads cumulative energy. ``interval_s`` is the time it wants between readings; ``None`` leaves it to the sampler.

    ``read`` returns every domain that answers and leaves out what doesn't; it raises :class:`~green_torch.errors.MeterError` only
    where nothing answers. It may block: it is never called on the training thread while training runs.
    """

    @property
    def domains(self) -> tuple[Domain, ...]:
        """What it reads."""
        ...

    @property
    def interval_s(self) -> float | None:
        """Seconds it wants between readings."""
        ...

    def read(self) -> Reading:
        """Cumulative joules by domain, with the monotonic instants just before and after the reading."""
        ...

    def close(self) -> None:
        """Lets go of the device; safe to call twice."""
        ...


class Clock(Protocol):
    """The run's monotonic time, and what happens by itself as it passes. ``epoch_unix_ns`` is the Unix time at instant 0."""

    @property
    def epoch_unix_ns(self) -> int:
        """Unix time of instant 0, in nanoseconds."""
        ...

    def now_ns(self) -> int:
        """Nanoseconds of a monotonic clock."""
        ...

    def sleep(self, duration_s: float) -> None:
        """Lets time pass; used only when the run ends."""
        ...

    def every(self, interval_s: float, tick: Callable[[], None], name: str) -> Callable[[], None]:
        """Calls ``tick`` at once and then again and again, off the training thread; returns what stops it."""
        ...


class IntensityProvider(Protocol):
    """Grid carbon intensity. May do network: it is asked off the training thread."""

    def at(self, time_unix_ns: int) -> IntensityPoint:
        """The intensity at that time."""
        ...


class Forecaster(Protocol):
    """A grid's intensity over a stretch of time; network providers and traces have both, constants neither.

    Points come in order of their ``time_unix_ns``, and each holds until the next one. The first is in force at ``start_unix_ns``
    where the provider reaches back so far; the last may end before ``end_unix_ns`` where it does not reach further. Times are
    Unix nanoseconds. Both may do network and block for as long as its timeouts allow; both raise
    :class:`~green_torch.errors.IntensityError` where there is nothing at all.
    """

    def forecast(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """What is expected; each point is marked as estimated."""
        ...

    def history(self, start_unix_ns: int, end_unix_ns: int) -> tuple[IntensityPoint, ...]:
        """What was."""
        ...


class Sink(Protocol):
    """One destination: takes the manifest, then records (and the manifest again when more is known), then the summary."""

    def write(self, item: Item) -> None:
        """Takes one item; called off the training thread, one call at a time."""
        ...

    def close(self) -> None:
        """Flushes and lets go; safe to call twice."""
        ...
