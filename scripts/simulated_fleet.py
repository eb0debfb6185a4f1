"""A fleet of workers on the shards of one run, event by event.

A worker starts, looks at what is there and loads its model; does its own shards; then helps, as the protocol says, and
waits where it cannot. It may die, or be preempted, and start again. What it asks of the store is counted as it goes, or
afterwards from when each shard was claimed and published.

Simplified: a worker has one shard at a time (the program claims the next one while the last rows of one are under way);
the help claim of a helper that died holds nobody up; a look at work/ tells how far everybody is; the store answers
everything in the same time, and nothing is throttled: what is counted is demand.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from simulated_protocol import (
    BEAT,
    CLAIMED,
    CLEARED,
    HELPED,
    MET,
    MET_BY_OWNER,
    PUBLISHED,
    REFUSED,
    RELEASED,
    REPORTED,
    STARTED,
    SYNCED,
    TOO_LATE,
    Asked,
    Fleet,
    Help,
    Kind,
    Order,
    Protocol,
    Watch,
    in_line,
)
from simulated_requests import Requests

FREE, HELD, DONE = 0, 1, 2  # of a shard
NOBODY = -1


@dataclass(slots=True)
class Life:
    """One start of a worker."""

    began: float
    ready: float
    busy: float  # until then it held a claim, nearly always
    ended: float = math.inf


@dataclass(slots=True)
class Worker:
    rank: int
    rate: float
    life: Life
    version: int = 0  # what was planned for an earlier one does not happen
    next_own: int = 0  # shard
    listed: float = 0.0  # when it looked last at data/ and work/
    num_refused: int = 0  # since then
    cursor: int = NOBODY  # the shard of others where it looks next; NOBODY before it helps
    lowest: int = 0  # and where it stops
    wrapped: bool = False
    poll_seconds: float = 0.0
    shard: int = NOBODY  # that it is at, as owner or helper


@dataclass(slots=True)
class Attempt:
    """A shard in somebody's hands."""

    shard: int
    owner: int
    place: int  # in History.claimed
    began: float
    synced: float  # the owner's last sync before; the next ones follow
    rows_left: float  # at
    at: float
    owner_rate: float  # 0 once the owner is dead
    ends: float  # when it is published, as things stand
    helper: int = NOBODY
    helper_rate: float = 0.0
    help_began: float = 0.0
    lapses: float = math.inf  # its claim, where its owner is dead
    version: int = 0

    def rows_left_at(self, now: float) -> float:
        return max(0.0, self.rows_left - max(0.0, now - self.at) * (self.owner_rate + self.helper_rate))

    def may_be_taken_over(self, now: float) -> bool:
        return self.lapses <= now and self.helper == NOBODY


@dataclass(slots=True)
class History:
    """What came of it. Seconds are counted from when the first worker could start."""

    requests: Requests = field(default_factory=Requests)
    ideal_seconds: float = 0.0  # if rows could be shared out to the last: no deaths, no requests
    end_seconds: float = 0.0  # the last publication
    gone_seconds: float = 0.0  # the last worker knows of it
    ready_seconds: float = 0.0  # the last of the first starts has loaded
    helping_seconds: float = math.inf  # the first worker has done its own
    idle_seconds: float = math.inf  # the first worker finds nothing that nobody has begun
    num_published: list[int] = field(default_factory=list)  # of each shard
    num_deaths: int = 0
    num_preemptions: int = 0
    num_refused: int = 0  # claims
    num_helps: int = 0  # with rows
    rows_redone: float = 0.0
    lives: list[Life] = field(default_factory=list)
    claimed: array[float] = field(default_factory=lambda: array("d"))  # of each attempt
    synced: array[float] = field(default_factory=lambda: array("d"))  # in step with it: the worker's last sync before
    ended: array[float] = field(default_factory=lambda: array("d"))  # in step with it: published or lost
    published: array[float] = field(default_factory=lambda: array("d"))
    segments: array[float] = field(default_factory=lambda: array("d"))  # in step with it
    help_began: array[float] = field(default_factory=lambda: array("d"))
    help_ended: array[float] = field(default_factory=lambda: array("d"))

    @property
    def tail_seconds(self) -> float:
        return max(0.0, self.end_seconds - self.idle_seconds)


class Simulation:
    """One run of a fleet, from the first start until everybody knows that all is done."""

    def __init__(self, fleet: Fleet, protocol: Protocol) -> None:
        self._fleet, self._protocol = fleet, protocol
        self._rng = np.random.default_rng(fleet.seed)
        rates = fleet.rows_per_second * np.exp(fleet.speed_sigma * self._rng.standard_normal(fleet.num_workers))
        rates[self._rng.random(fleet.num_workers) < fleet.straggler_share] /= fleet.straggler_factor
        self._workers = [Worker(rank, float(rate), Life(0, 0, 0)) for rank, rate in enumerate(rates)]
        num_done = int(fleet.share_done * fleet.num_shards)
        self._num_left = fleet.num_shards - num_done
        self._states = bytearray([DONE]) * num_done + bytearray([FREE]) * self._num_left
        self._claimed_at = np.full(fleet.num_shards, -1.0)
        self._published_at = np.full(fleet.num_shards, -1.0)
        self._rows_left: dict[int, float] = {}  # of shards that an earlier attempt began, the rest is in journals
        self._attempts: dict[int, Attempt] = {}
        self._orphans: set[int] = set()  # shards whose owner is dead
        self._longest: list[tuple[float, int, int]] | None = None  # (-end, shard, version), once somebody is idle
        self._events: list[tuple[float, int, Callable[[Any, float], None], Worker | Attempt, int]] = []
        self._num_events = 0
        self._asked: dict[int, tuple[Asked, array[float], array[float]]] = {}
        self._history = History(num_published=[0] * fleet.num_shards)

    def run(self) -> History:
        """All of it.

        Raises:
            RuntimeError: nobody is left who would go on.
        """
        history = self._history
        starts = np.sort(self._rng.random(self._fleet.num_workers)) * self._fleet.start_seconds
        for worker, start in zip(self._workers, starts.tolist(), strict=True):
            self._start(worker, start)
        history.ready_seconds = max(life.ready for life in history.lives)
        history.ideal_seconds = self._ideal()
        while self._events:
            now, _, happen, subject, version = heapq.heappop(self._events)
            if subject.version == version:
                happen(subject, now)
        if self._num_left:
            raise RuntimeError(f"nobody is left, and {self._num_left:,} shards are not published")
        history.gone_seconds = max(life.ended for life in history.lives)
        self._count()
        return history

    def _on(self, moment: float, happen: Callable[[Any, float], None], subject: Worker | Attempt) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (moment, self._num_events, happen, subject, subject.version))

    # Requests

    def _after(self, asked: Asked, now: float, times: int = 1) -> float:
        """Ask for it all, so many times; when it is answered."""
        _, moments, number = self._asked.setdefault(id(asked), (asked, array("d"), array("d")))
        moments.append(now)
        number.append(times)
        return now + times * in_line(asked) * self._protocol.request_seconds

    def _one_by_one(self, kind: Kind, now: float, number: int) -> float:
        over = now + number * self._protocol.request_seconds
        self._history.requests.span(kind, now, over, number)
        return over

    def _look(self, now: float) -> float:
        """LIST data/ and work/; when it is over."""
        names = len(self._states) - self._num_left, 2 * len(self._attempts)  # a shard, a claim, about one segment
        return self._one_by_one(Kind.LIST, now, sum(map(self._protocol.pages, names)))

    def _count(self) -> None:
        """What follows from when shards were claimed and published."""
        history, protocol = self._history, self._protocol
        requests = history.requests
        for asked, moments, number in self._asked.values():
            requests.at(asked, np.array(moments), np.array(number))
        claimed, published = np.array(history.claimed), np.array(history.published)
        requests.at(CLAIMED, claimed)
        requests.at(PUBLISHED, published)
        requests.at(CLEARED, published)
        for moment, num_segments in zip(history.published, history.segments, strict=True):
            requests.span(Kind.DELETE, moment, moment + num_segments * protocol.request_seconds, int(num_segments))
        if protocol.sync_seconds:
            requests.every(SYNCED, np.array(history.synced), np.array(history.ended), protocol.sync_seconds)
            helps = np.array(history.help_began), np.array(history.help_ended)
            requests.every(MET, *helps, protocol.sync_seconds)
            requests.every(MET_BY_OWNER, *helps, protocol.sync_seconds)
        began, ready, busy, ended = np.array(
            [(life.began, life.ready, life.busy, life.ended) for life in history.lives]
        ).T
        requests.every(BEAT, ready, busy, protocol.beat_seconds)
        requests.every(REPORTED, began, ended, protocol.stats_seconds)

    def _ideal(self) -> float:
        rates = np.array([worker.rate for worker in self._workers])
        ready = np.array([worker.life.ready for worker in self._workers])
        low, high = 0.0, float(ready.max()) + self._num_left * self._fleet.shard_rows / float(rates.sum())
        for _ in range(60):
            middle = (low + high) / 2
            done = float((rates * np.maximum(0.0, middle - ready)).sum())
            low, high = (middle, high) if done < self._num_left * self._fleet.shard_rows else (low, middle)
        return high

    # A worker

    def _start(self, worker: Worker, now: float) -> None:
        if not self._num_left:
            return
        protocol, fleet = self._protocol, self._fleet
        worker.version += 1
        worker.next_own, worker.cursor = worker.rank, NOBODY
        over = self._after(STARTED, now) + protocol.plan_bytes / protocol.bytes_per_second
        over = self._one_by_one(Kind.LIST, over, protocol.pages(len(self._states) - self._num_left))
        if own := self._states[worker.rank :: fleet.num_workers].count(DONE):
            over = self._one_by_one(Kind.GET, over, own)
        worker.listed, ready = over, over + protocol.loading_seconds
        worker.life = Life(now, ready, ready)
        self._history.lives.append(worker.life)
        self._on(ready, self._next, worker)
        for hours, lose in ((fleet.hours_between_deaths, self._die), (fleet.hours_between_preemptions, self._preempt)):
            if hours < math.inf:
                self._on(now + 3600 * hours * float(self._rng.standard_exponential()), lose, worker)

    def _next(self, worker: Worker, now: float) -> None:
        """The next of its own shards, or one of others."""
        worker.shard = NOBODY
        while worker.next_own < len(self._states):
            shard = worker.next_own
            worker.next_own += self._fleet.num_workers
            state = self._states[shard]
            if state == FREE or (state == HELD and self._attempts[shard].may_be_taken_over(now)):
                return self._claim(worker, shard, now)
            if state == HELD or self._published_at[shard] > worker.listed:
                self._history.num_refused += 1
                return self._on(self._after(REFUSED if state == HELD else TOO_LATE, now), self._next, worker)
        if worker.cursor != NOBODY:
            return self._others(worker, now)
        self._history.helping_seconds = min(now, self._history.helping_seconds)
        self._on(self._look(now), self._looked, worker)

    def _looked(self, worker: Worker, now: float) -> None:
        """It knows data/ and work/ as they are now."""
        if not self._num_left:
            return self._leave(worker, now)
        worker.listed, worker.num_refused = now, 0
        worker.cursor, worker.lowest, worker.wrapped = len(self._states) - 1, 0, True
        if self._protocol.order is Order.scattered:
            worker.cursor, worker.wrapped = int(self._rng.integers(len(self._states))), False
        self._others(worker, now)

    def _others(self, worker: Worker, now: float) -> None:
        """A shard of others that nobody has begun, as far as the worker knows; it tries one after the other."""
        if self._protocol.help is Help.none:
            return self._idle(worker, now)
        found = self._states.rfind(FREE, worker.lowest, worker.cursor + 1)
        above = slice(max(found + 1, worker.lowest), worker.cursor + 1)
        tried = self._claimed_at[above] > worker.listed
        room = self._protocol.refusals_before_look - worker.num_refused
        if (number := int(np.count_nonzero(tried))) > 0:
            in_vain = np.flatnonzero(tried)[::-1][:room]
            held = int(np.count_nonzero(self._published_at[above][in_vain] < 0))
            self._history.num_refused += len(in_vain)
            worker.num_refused += len(in_vain)
            over = self._after(TOO_LATE, self._after(REFUSED, now, held), len(in_vain) - held)
            if number >= room:
                return self._on(over, self._look_again, worker)
            worker.cursor = max(found, worker.lowest - 1)
            return self._on(over, self._others, worker)
        if found != NOBODY:
            worker.cursor = found - 1
            return self._claim(worker, found, now)
        if not worker.wrapped:
            worker.lowest, worker.cursor, worker.wrapped = worker.cursor + 1, len(self._states) - 1, True
            return self._others(worker, now)
        self._idle(worker, now)

    def _look_again(self, worker: Worker, now: float) -> None:
        self._on(self._look(now), self._looked, worker)

    def _idle(self, worker: Worker, now: float) -> None:
        """Nothing is left to begin."""
        self._history.idle_seconds = min(now, self._history.idle_seconds)
        for shard in sorted(self._orphans):
            own = shard % self._fleet.num_workers == worker.rank
            if (own or self._protocol.help is not Help.none) and self._attempts[shard].may_be_taken_over(now):
                return self._claim(worker, shard, now)
        if self._protocol.help is Help.rows and self._help(worker, now):
            return
        first, last = self._protocol.first_poll_seconds, self._protocol.last_poll_seconds
        worker.poll_seconds = min(max(first, 2 * worker.poll_seconds), last)
        self._on(now + worker.poll_seconds, self._poll, worker)

    def _poll(self, worker: Worker, now: float) -> None:
        if self._protocol.watch is Watch.listing:
            self._look_again(worker, now)
            return
        over = self._one_by_one(Kind.HEAD, now, 1)
        if not self._num_left:
            return self._leave(worker, over)
        self._on(self._one_by_one(Kind.LIST, over, self._protocol.pages(2 * len(self._attempts))), self._idle, worker)

    def _leave(self, worker: Worker, now: float) -> None:
        """All is done, and it knows."""
        worker.life.ended = now
        worker.version += 1

    def _die(self, worker: Worker, now: float) -> None:
        """Without a word: its claim holds until the lease is over, and what was not synced is lost."""
        if self._num_left:
            self._history.num_deaths += 1
            self._lose(worker, now, self._rng.random() * self._protocol.sync_seconds * worker.rate)

    def _preempt(self, worker: Worker, now: float) -> None:
        """In good order: its answers are in the journal, its claim is given up."""
        if self._num_left:
            self._history.num_preemptions += 1
            self._lose(worker, now, None)

    def _lose(self, worker: Worker, now: float, rows_lost: float | None) -> None:
        worker.version += 1
        worker.life.ended, worker.life.busy = now, min(now, worker.life.busy)
        shard, worker.shard = worker.shard, NOBODY
        if shard != NOBODY:
            worker.life.busy = now
            attempt = self._attempts[shard]
            attempt.rows_left, attempt.at = attempt.rows_left_at(now), max(now, attempt.at)
            if attempt.owner != worker.rank:
                self._part(attempt, now)
            elif rows_lost is not None or attempt.helper != NOBODY:
                rows_lost = min(rows_lost or 0.0, self._fleet.shard_rows - attempt.rows_left)
                attempt.rows_left += rows_lost
                self._history.rows_redone += rows_lost
                attempt.owner_rate, attempt.lapses = 0.0, now + self._protocol.lease_seconds
                self._orphans.add(shard)
            else:
                self._after(RELEASED, now)
                self._forget(attempt, now)
                self._states[shard] = FREE
                self._claimed_at[shard] = -1.0
            if shard in self._attempts:
                self._expect(attempt)
        if self._fleet.away_seconds < math.inf:
            self._on(now + self._fleet.away_seconds, self._start, worker)

    # A shard

    def _claim(self, worker: Worker, shard: int, now: float) -> None:
        if shard in self._attempts:  # of somebody who died
            self._forget(self._attempts[shard], now)
        history, protocol = self._history, self._protocol
        self._states[shard] = HELD
        self._claimed_at[shard] = now
        worker.shard, worker.poll_seconds = shard, 0.0
        rows = self._rows_left.pop(shard, float(self._fleet.shard_rows))
        at = now + in_line(CLAIMED) * protocol.request_seconds
        synced = now - ((now - worker.life.ready) % protocol.sync_seconds if protocol.sync_seconds else 0.0)
        attempt = Attempt(shard, worker.rank, len(history.claimed), now, synced, rows, at, worker.rate, math.inf)
        history.claimed.append(now)
        history.synced.append(synced)
        history.ended.append(math.inf)
        self._attempts[shard] = attempt
        self._expect(attempt)

    def _expect(self, attempt: Attempt, waiting: float = 0.0) -> None:
        """When it will be published, as things stand. waiting: until two that met know it."""
        attempt.version += 1
        rate = attempt.owner_rate + attempt.helper_rate
        attempt.ends = math.inf
        if rate:
            work = attempt.rows_left / rate + waiting
            attempt.ends = attempt.at + work + in_line(PUBLISHED) * self._protocol.request_seconds
            self._on(attempt.ends, self._publish, attempt)
        if self._longest is not None:
            heapq.heappush(self._longest, (-attempt.ends, attempt.shard, attempt.version))

    def _publish(self, attempt: Attempt, now: float) -> None:
        history, protocol = self._history, self._protocol
        shard = attempt.shard
        self._states[shard] = DONE
        self._published_at[shard] = now
        self._num_left -= 1
        history.num_published[shard] += 1
        history.end_seconds = now
        num_segments = protocol.num_segments(now - attempt.synced)
        history.published.append(now)
        history.segments.append(num_segments)
        cleared = now + (in_line(CLEARED) + num_segments) * protocol.request_seconds
        helper = attempt.helper
        self._part(attempt, now)
        self._forget(attempt, now)
        for rank in (attempt.owner if attempt.owner_rate else NOBODY, helper):
            if rank != NOBODY:
                self._workers[rank].life.busy = cleared
                self._on(cleared, self._next, self._workers[rank])
                self._workers[rank].shard = NOBODY

    def _forget(self, attempt: Attempt, now: float) -> None:
        """It ends here, whatever became of the shard."""
        attempt.version += 1
        self._rows_left[attempt.shard] = attempt.rows_left
        if self._states[attempt.shard] == DONE:
            del self._rows_left[attempt.shard]
        self._history.ended[attempt.place] = now
        self._orphans.discard(attempt.shard)
        del self._attempts[attempt.shard]

    def _help(self, worker: Worker, now: float) -> bool:
        """Take the last rows of the shard that would take longest; False where no help would make one end sooner."""
        if self._longest is None:
            self._longest = [(-attempt.ends, shard, attempt.version) for shard, attempt in self._attempts.items()]
            heapq.heapify(self._longest)
        protocol = self._protocol
        while self._longest:
            _, shard, version = self._longest[0]
            attempt = self._attempts.get(shard)
            if attempt is None or attempt.version != version or attempt.helper != NOBODY:
                heapq.heappop(self._longest)
                continue
            begin = max(attempt.at, now + 3 * protocol.request_seconds)  # help.claim, journals: HELPED
            left = attempt.rows_left_at(begin)
            alone = left / attempt.owner_rate if attempt.owner_rate else math.inf
            together = left / (attempt.owner_rate + worker.rate)
            waiting = protocol.sync_seconds if attempt.owner_rate else 0.0
            if together + 2 / 3 * waiting >= alone:
                return False
            heapq.heappop(self._longest)
            # Each writes and reads at its own syncs: the second one after they met knows all.
            waiting = min(alone - together, waiting * float(self._rng.random(2).max()))
            attempt.rows_left, attempt.at = left, begin
            attempt.helper, attempt.helper_rate, attempt.help_began = worker.rank, worker.rate, now
            self._history.num_helps += 1
            self._history.rows_redone += waiting * (attempt.owner_rate + worker.rate)
            self._after(HELPED, now)
            self._expect(attempt, waiting)
            worker.shard, worker.poll_seconds = shard, 0.0
            return True
        return False

    def _part(self, attempt: Attempt, now: float) -> None:
        """The helper is at it no longer."""
        if attempt.helper != NOBODY:
            self._history.help_began.append(attempt.help_began)
            self._history.help_ended.append(now)
            attempt.helper, attempt.helper_rate = NOBODY, 0.0
