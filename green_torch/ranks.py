"""What the ranks of a job tell each other, off the training thread: no collective, no new group, nobody waits for anybody.

Each rank puts its cumulative totals, as a few hundred bytes of JSON, into a clone of the process group's store (a connection of its
own to the same server); rank zero reads what is there. Rank zero in turn puts there what it leads: the run's id, and the grid's
intensity, so that a provider on the network is asked once for a job. A rank that is late or dead is simply read as it last was.
"""

from __future__ import annotations

import json
import sys
import threading
import uuid
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from green_torch.errors import GreenTorchError
from green_torch.job import all_at_it, combined
from green_torch.records import IntensityPoint, RankTotals
from green_torch.sinks.codec import parsed, plain
from green_torch.units import NS_PER_S, ns_to_s, s_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from green_torch.protocols import Clock
    from green_torch.records import JobTotals

INTERVAL_S = 0.25  # between a rank's words, and between rank zero's readings
_RANKS_PER_INTERVAL = 64  # in larger jobs rank zero reads less often
_NEWS_S = 0.02  # between looks while the end is waited for
_FAREWELL_S = 0.5  # the last word is waited for no longer
_GRACE_NS = 10 * NS_PER_S  # a rank that was never heard of for so long is said to be silent
_NO_GROUP_NS = 60 * NS_PER_S
_STORE_TIMEOUT = timedelta(seconds=2)
_RETRY_S = 1.0  # after a failure; each further pause is twice the one before
_FAILURES = 7  # in a row, over two minutes, are the end of it: each leaves a page of torch's own on stderr
_LEAD = "green_torch/lead"

T = TypeVar("T")

_left: set[str] = set()  # sessions that this process has ended: what is left of them in the store is no news


@dataclass(frozen=True, slots=True)
class Lead:
    """What rank zero tells the others. ``session`` tells one opening of its tracker from the next; ``ended`` ones get no new followers.

    ``steps_before`` are those that the run had done by the checkpoint that rank zero goes on from.
    """

    session: str
    run_id: str
    point: IntensityPoint | None = None
    point_unix_ns: int = 0  # the time for which it was asked
    ended: bool = False
    steps_before: int = 0


class Ranks:
    """One process's end of the exchange.

    Args:
        clock: ticks, and ages.
        rank: this process's.
        world_size: processes of the job.
        own: this rank's totals so far; asked off the training thread.
        lead: on rank zero, what it leads in this session.
        follow: on the others, takes what rank zero leads.
        warn: says once what is missing.
    """

    def __init__(
        self,
        clock: Clock,
        rank: int,
        world_size: int,
        *,
        own: Callable[[], RankTotals],
        lead: Callable[[str], Lead],
        follow: Callable[[Lead], None],
        warn: Callable[..., None],
    ) -> None:
        self._clock = clock
        self._rank = rank
        self._world_size = world_size
        self._own = own
        self._lead = lead
        self._follow = follow
        self._warn = warn
        self._busy = threading.Lock()
        self._server: Any = None  # keeps the store alive where this process serves it and the group is destroyed early
        self._store: Any = None
        self._over = False  # no exchange, or none any more
        self._failures = 0  # in a row
        self._why = ""  # the last of them
        self._retry_ns = 0
        self._opened_ns = clock.now_ns()
        self._connected_ns: int | None = None
        self._session = uuid.uuid4().hex if rank == 0 else ""
        self._heard: dict[int, tuple[int, RankTotals]] = {}  # rank -> when it was last seen to have got on, and its last word
        self._last: RankTotals | None = None  # this rank's, once its run has ended
        self._told = False
        self._halt = clock.every(INTERVAL_S * max(1.0, world_size / _RANKS_PER_INTERVAL), self.tick, "ranks")

    def tick(self) -> None:
        """One exchange. A failure is met with further tries, and their end with a warning; every rank's own files go on."""
        if self._over or self._clock.now_ns() < self._retry_ns or not self._busy.acquire(blocking=False):
            return
        try:
            if self._failures and self._store is not None:
                self._store = self._store.clone()  # a connection that has failed is of no more use
            if self._store is None and not self._connect():
                return
            if self._rank == 0:
                self._store.set(_LEAD, _written(replace(self._lead(self._session), ended=self._last is not None)))
                self._gather()
            else:
                self._listen()
                self._tell()
            self._failures = 0
        except Exception as error:  # the server lives in a process that may be gone: rule 9
            self._retry_ns = self._clock.now_ns() + s_to_ns(_RETRY_S * 2**self._failures)
            self._failures += 1
            self._why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), ''):.200}"
            if self._failures >= _FAILURES:
                self._over = True
                self._failed()
        finally:
            self._busy.release()

    def _failed(self) -> None:
        """Says once what the sums on rank zero are without."""
        whose = "the other ranks have" if self._rank == 0 else "this rank has"
        self._warn(
            f"the ranks' totals are exchanged no more ({self._why}): rank zero's are without what {whose} done since, and each rank's own "
            "file stays whole",
            key="exchange",
        )

    def job(self, own: Callable[[], RankTotals], *, ended: bool = False) -> JobTotals | None:
        """All ranks together, ``own`` telling this one's totals; ``None`` on ranks but the first, and where there is no exchange."""
        if self._rank != 0 or self._connected_ns is None:
            return None
        now_ns = self._clock.now_ns()
        heard = dict(self._heard)
        ages = {rank: ns_to_s(now_ns - seen_ns) for rank, (seen_ns, _) in heard.items()}
        ranks = [own(), *(totals for _, totals in heard.values())]
        job = combined(ranks, ages, self._world_size, ended=ended, complete=now_ns - self._connected_ns > _GRACE_NS)
        if job.sharing:
            self._warn(
                f"ranks {_some(job.sharing)} are on GPUs that other ranks meter as well: their joules are counted once. Give each rank a "
                "GPU of its own",
                key="sharing",
            )
        return job

    @property
    def awaited(self) -> bool:
        """Whether rank zero's steps, to be shown as the job's, want ranks that have yet to tell of theirs, and may be about to."""
        if self._rank != 0 or self._over:
            return False
        if self._connected_ns is None:
            return _group() is not None
        others = [totals for _, totals in tuple(self._heard.values())]  # another thread listens
        return not (all_at_it(others, self._world_size - 1) or self._clock.now_ns() - self._connected_ns > _GRACE_NS)

    def finish(self, own: RankTotals, deadline_ns: int) -> None:
        """Tells the last totals, and on rank zero waits for those of the others, no longer than to the deadline; says what is missing."""
        self._last = own
        if self._connected_ns is None and not self._over and not self._failures and _group() is None:
            self._no_group()
        elif not self._over:
            self._retry_ns = 0  # one more try
            if self._session and self._rank != 0:
                deadline_ns = min(deadline_ns, self._clock.now_ns() + s_to_ns(_FAREWELL_S))
            halt = self._clock.every(_NEWS_S, self.tick, "ranks at the end")
            while not (self._over or self._complete) and self._clock.now_ns() < deadline_ns:
                self._clock.sleep(_NEWS_S / 4)
            halt()
        if self._failures and not self._complete:
            self._failed()
        if self._connected_ns is not None or self._failures:
            self._missing()
        self._over = True
        self._halt()
        if self._session:
            _left.add(self._session)

    @property
    def _complete(self) -> bool:
        """Whether no more is to be waited for: this rank has told its last word, or rank zero has those of all that ever spoke."""
        if self._rank != 0:
            return self._told
        if self._connected_ns is None or any(totals.status == "running" for _, totals in self._heard.values()):
            return False
        all_heard = len(self._heard) == self._world_size - 1
        return all_heard or self._clock.now_ns() - self._connected_ns > _GRACE_NS

    def _connect(self) -> bool:
        """Clones the process group's store, once there is a group; the group itself is not used."""
        distributed = _group()
        if distributed is None:
            if self._clock.now_ns() - self._opened_ns > _NO_GROUP_NS:
                self._no_group()
            return False
        place = distributed.get_rank(), distributed.get_world_size()
        if place != (self._rank, self._world_size):
            self._over = True
            self._warn(
                f"the process group calls this rank {place[0]} of {place[1]}, but the run was opened as rank {self._rank} of "
                f"{self._world_size}: no totals of the job. Open it after torch.distributed.init_process_group(), or start with torchrun"
            )
            return False
        server = distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - it has no public name
        store = server.clone()
        store.set_timeout(_STORE_TIMEOUT)
        self._server, self._store = server, store
        self._connected_ns = self._clock.now_ns()
        return True

    def _no_group(self) -> None:
        self._over = True
        if self._rank != 0:
            return
        self._warn(
            f"WORLD_SIZE is {self._world_size}, but there is no process group to exchange totals over: rank zero's are its own, and each "
            "rank's are in its own file",
            key="exchange",
        )

    def _listen(self) -> None:
        """Takes what rank zero leads, if anything."""
        if not self._store.check([_LEAD]):
            return
        lead = self._read(Lead, self._store.get(_LEAD), 0)
        if lead is None:
            return
        if lead.session != self._session and (self._session or lead.ended or lead.session in _left):
            return  # another run than this one, of which one of the two is not there yet, or is no more
        self._session = lead.session
        self._follow(lead)

    def _tell(self) -> None:
        """Puts this rank's totals where rank zero looks for them."""
        if not self._session:
            return
        last = self._last
        self._store.set(self._key(self._rank), _written(last or self._own()))
        self._told = last is not None

    def _gather(self) -> None:
        """Reads what the others told last."""
        others = range(1, self._world_size)
        there = [rank for rank in others if rank in self._heard or self._store.check([self._key(rank)])]
        keys = [self._key(rank) for rank in there]
        words = self._store.multi_get(keys) if self._store.has_extended_api() else map(self._store.get, keys)
        now_ns = self._clock.now_ns()
        for rank, text in zip(there, words, strict=True):
            totals = self._read(RankTotals, text, rank)
            if totals is None:
                continue
            seen_ns, before = self._heard.get(rank, (now_ns, totals))
            self._heard[rank] = seen_ns if _done(before) == _done(totals) else now_ns, totals
        if len(there) < len(others) and self._connected_ns is not None and now_ns - self._connected_ns > _GRACE_NS:
            self._missing()

    def _missing(self) -> None:
        """Says, once each, which ranks were never heard of, and at the end which did not end."""
        if self._rank != 0:
            return
        silent = [rank for rank in range(1, self._world_size) if rank not in self._heard]
        if silent:
            self._warn(
                f"nothing was heard of {len(silent)} of {self._world_size} ranks ({_some(silent)}): the job's totals are without them. Open "
                "a tracker on every rank",
                key="silent ranks",
            )
        if self._last is None:
            return
        now_ns = self._clock.now_ns()
        for rank, (seen_ns, totals) in sorted(self._heard.items()):
            if totals.status == "running":
                self._warn(
                    f"rank {rank} had not ended when rank zero did: its totals are those of {ns_to_s(now_ns - seen_ns):.3g} s before; its "
                    "own file may hold more",
                    key=f"rank {rank}",
                )

    def _read(self, kind: type[T], text: bytes, rank: int) -> T | None:
        """What a rank has told; ``None``, with a warning, where it can't be read: what it told before stands."""
        try:
            return parsed(kind, json.loads(text))
        except (ValueError, GreenTorchError) as error:
            self._warn(
                f"what rank {rank} tells can't be read ({error}): it is left out. Install one version of green-torch for all ranks",
                key=f"word of rank {rank}",
            )
            return None

    def _key(self, rank: int) -> str:
        return f"green_torch/{self._session}/{rank}"


def _done(totals: RankTotals) -> tuple[str, int | None, float | None]:
    """What changes with every record of a rank, and not with its every word: one that hangs goes on telling the same."""
    return totals.status, totals.last_step, totals.energy_j


def _group() -> Any:
    """``torch.distributed``, where there is a process group."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed if distributed is not None and distributed.is_available() and distributed.is_initialized() else None


def _written(item: Any) -> str:
    return json.dumps(plain(item), separators=(",", ":"), allow_nan=False)


def _some(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
