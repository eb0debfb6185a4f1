"""What is simulated: a fleet of workers, and what each of them asks of the store at every step.

The protocol is that of an output folder on an object store. It is written down here and nowhere else in the simulation:
a step that asks for something more is a number more in one of these dictionaries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """A request to an object store."""

    LIST = "LIST"
    GET = "GET"
    HEAD = "HEAD"
    PUT = "PUT"
    DELETE = "DELETE"


class Help(StrEnum):
    """What a worker does when it has done its own shards."""

    none = "none"  # waits
    shards = "shards"  # takes those of others that nobody has begun
    rows = "rows"  # and then the last rows of those that a slower worker is at


class Order(StrEnum):
    """Where a worker looks first among the shards of others."""

    end = "end"  # at the last one
    scattered = "scattered"  # at one of its own choice, then down from there


class Watch(StrEnum):
    """How a worker that has nothing to do learns that all is done."""

    listing = "listing"  # a LIST of data/ and of work/
    mark = "mark"  # a HEAD of something that is there when all is done, and a LIST of work/


Asked = dict[Kind, int]

PRICES = {Kind.LIST: 0.005, Kind.PUT: 0.005, Kind.GET: 0.0004, Kind.HEAD: 0.0004, Kind.DELETE: 0.0}  # per 1,000

STARTED: Asked = {Kind.GET: 2, Kind.PUT: 1}  # plan.json, plan/inputs.parquet; stats. data/ and footers come on top
CLAIMED: Asked = {Kind.PUT: 1, Kind.LIST: 1, Kind.GET: 1}  # the claim; journals of earlier attempts; is it published
SYNCED: Asked = {Kind.PUT: 1, Kind.HEAD: 1}  # a journal segment; does anybody help
PUBLISHED: Asked = {Kind.GET: 2, Kind.PUT: 2}  # last segment; plan.json; the shard, and its footer again
CLEARED: Asked = {Kind.LIST: 1, Kind.GET: 1, Kind.DELETE: 1}  # the claim; a DELETE for each segment comes on top
REFUSED: Asked = {Kind.PUT: 1, Kind.GET: 1}  # a claim that somebody has, and whose it is
TOO_LATE: Asked = {Kind.PUT: 1, Kind.LIST: 1, Kind.GET: 2, Kind.DELETE: 1}  # claimed, found published, released
RELEASED: Asked = {Kind.GET: 1, Kind.DELETE: 1}  # a claim, by a worker that was told to end
BEAT: Asked = {Kind.GET: 1, Kind.PUT: 1}  # of a claim
REPORTED: Asked = {Kind.PUT: 1}  # stats
HELPED: Asked = {Kind.PUT: 1, Kind.LIST: 1, Kind.GET: 1, Kind.DELETE: 1}  # help.claim, and the journals of the shard
MET: Asked = {Kind.PUT: 1, Kind.LIST: 1, Kind.GET: 1}  # a sync of a helper: a segment; what the other has by now
MET_BY_OWNER: Asked = {Kind.LIST: 1, Kind.GET: 1}  # the same of the owner, on top of SYNCED


def in_line(asked: Asked) -> int:
    """Requests that one after the other take their time."""
    return sum(asked.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """When it is asked, and how long it takes.

    Journals are written and claims renewed beside the work. What is asked when a shard is taken and published holds the
    worker up, request by request.
    """

    request_seconds: float = 0.05
    page_names: int = 1000  # of a LIST
    bytes_per_second: float = 100e6  # of one worker's downloads
    plan_bytes: float = 0.0  # plan.json and plan/inputs.parquet
    loading_seconds: float = 120.0  # libraries, weights, first answer
    sync_seconds: float = 30.0
    stats_seconds: float = 30.0
    lease_seconds: float = 300.0
    beats_a_lease: int = 6
    first_poll_seconds: float = 1.0  # doubles up to
    last_poll_seconds: float = 30.0
    help: Help = Help.rows
    order: Order = Order.end
    refusals_before_look: int = 16  # of claims, until a worker looks at data/ and work/ again
    watch: Watch = Watch.listing

    @property
    def beat_seconds(self) -> float:
        return self.lease_seconds / self.beats_a_lease

    def pages(self, num_names: float) -> int:
        """LIST requests for so many names."""
        return max(1, math.ceil(num_names / self.page_names))

    def num_segments(self, seconds: float) -> int:
        """Journal segments that are written in so long, the last one at the end of it."""
        return max(1, math.ceil(seconds / self.sync_seconds - 1e-9)) if self.sync_seconds else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """Who works, at what, and what befalls them."""

    num_workers: int = 10_000
    num_shards: int = 1_000_000
    shard_rows: int = 1_000
    rows_per_second: float = 50.0  # the median worker
    speed_sigma: float = 0.1  # of the logarithm of the rate
    straggler_share: float = 0.001
    straggler_factor: float = 10.0  # slower
    start_seconds: float = 300.0  # the starts lie within, evenly
    share_done: float = 0.0  # published by an earlier start: the first shards
    hours_between_deaths: float = 1_000.0  # of one worker, without a word
    hours_between_preemptions: float = math.inf  # of one worker, in good order
    away_seconds: float = 300.0  # until one that was lost starts again
    seed: int = 0

    @property
    def num_rows(self) -> int:
        return self.num_shards * self.shard_rows
