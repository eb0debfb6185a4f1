"""What ten thousand workers ask of one object store: python scripts/simulate_cluster.py --only load

Prints the tables of docs/scaling.md's "Ten thousand workers". Nothing is measured but the sizes of plans: a fleet of
workers is simulated event by event (simulated_fleet.py) by the protocol of an output folder on an object store
(simulated_protocol.py). Every rate is an argument and assumed. No model, no network; all tables take a few minutes on
one core, and less for `--workers 1000`.

    plan    bytes of a plan, measured on plans that are made and thrown away
    start   seconds until a worker is at its first row, by what it finds
    load    requests a second, by kind and part of the run
    totals  requests in all and their price, by rows of a shard and write.sync_seconds
    tail    seconds from the first worker without work to the end, by what a worker does when its own shards are done
    search  how workers look for shards of others, and how they wait
    losses  workers that die or are preempted
    fleets  one hundred workers, one thousand, and all
"""

from __future__ import annotations

import argparse
import base64
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from bench_scaling import table
from simulated_fleet import History, Simulation
from simulated_protocol import Fleet, Help, Kind, Order, Protocol, Watch
from simulated_requests import Floats, peak

READ_LIMIT, WRITE_LIMIT = 5_500, 3_500  # GET and HEAD, PUT and DELETE a second, that S3 gives one prefix at least
READS, WRITES = (Kind.LIST, Kind.GET, Kind.HEAD), (Kind.PUT, Kind.DELETE)
SHARD_ROWS = (1_000, 10_000, 100_000)
Row = dict[str, str]


@cache
def simulated(fleet: Fleet, protocol: Protocol) -> History:
    """One run; several tables may show the same."""
    return Simulation(fleet, protocol).run()


def cut(fleet: Fleet, shard_rows: int) -> Fleet:
    """The same rows in other shards."""
    return replace(fleet, shard_rows=shard_rows, num_shards=math.ceil(fleet.num_rows / shard_rows))


def plan(fleet: Fleet, protocol: Protocol) -> Iterator[Row]:
    """Sizes of plans as the program makes them, of invented sources with random names of 32 digits."""
    for name, num_files, rows_each, marked in (
        ("image files", 1_000_000, 1, False),
        ("Parquet files of 3,846 rows", 260_000, 3_846, False),
        ("tar files of 3,846 rows", 260_000, 3_846, True),
    ):
        small = num_files // 10 if marked else num_files
        settings_bytes, inputs_bytes = plan_bytes(small, rows_each, marked=marked)
        inputs_bytes = inputs_bytes * num_files // small
        yield {
            "source": name + (", scaled from a tenth" if marked else ""),
            "files": f"{num_files:,}",
            "rows": f"{num_files * rows_each:,}",
            "plan.json, KB": f"{settings_bytes / 1e3:.1f}",
            "plan/inputs.parquet, MB": f"{inputs_bytes / 1e6:.1f}",
            "read by all workers, GB": f"{fleet.num_workers * (settings_bytes + inputs_bytes) / 1e9:,.0f}",
            "seconds of a worker": f"{(settings_bytes + inputs_bytes) / protocol.bytes_per_second:.2f}",
        }


def plan_bytes(num_files: int, rows_each: int, *, marked: bool) -> tuple[int, int]:
    """Bytes of plan.json and of plan/inputs.parquet. marked: as of tars, with an offset for every 128 rows."""
    from pipeline.dataset.base import FILES_SCHEMA, MARK_EVERY, Inputs
    from pipeline.planning import open_plan

    rng = np.random.default_rng(0)
    sizes = rng.integers(20_000, 240_000, num_files) * rows_each
    one = list(range(0, 130_000 * rows_each, 130_000 * MARK_EVERY)) if marked else None
    files = pa.table(
        [
            pa.array([f"{number // 1000:04d}/{rng.bytes(16).hex()}" for number in range(num_files)]),
            pa.array(sizes, pa.int64()),
            pa.array(np.full(num_files, rows_each), pa.int64()),
            pa.array([one and (np.array(one) + int(jump)).tolist() for jump in rng.integers(0, 9999, num_files)]),
            pa.nulls(num_files, pa.string()),
            pa.array(np.zeros(num_files), pa.int64()),
        ],
        names=FILES_SCHEMA.names,
    ).cast(FILES_SCHEMA)
    inputs = Inputs("/somewhere", files, pa.schema([pa.field("question", pa.string())]))
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        open_plan(
            Path(folder),
            {f"prompt.{number}": base64.b64encode(rng.bytes(30)).decode() for number in range(60)},
            scan=lambda: inputs,
            max_rows=None,
            shard_rows=1000,
            prompt_names=["default"],
            num_samples=1,
        )
        return os.stat(Path(folder, "plan.json")).st_size, os.stat(Path(folder, "plan/inputs.parquet")).st_size


def start(fleet: Fleet, protocol: Protocol) -> Iterator[Row]:
    """A worker's way to its first row, by shards and how many of them are published; computed."""
    for shard_rows in SHARD_ROWS:
        of = cut(fleet, shard_rows)
        for share in (0.0, 0.5, 0.99):
            pages = protocol.pages(share * of.num_shards)
            footers = round(share * of.num_shards / of.num_workers)
            seconds = [protocol.request_seconds * number for number in (3, pages, footers)]
            yield {
                "write.shard_rows": f"{shard_rows:,}",
                "published": f"{share:.0%}",
                "plan, s": f"{seconds[0] + protocol.plan_bytes / protocol.bytes_per_second:.2f}",
                "LIST data/, pages": f"{pages:,}",
                "LIST data/, s": f"{seconds[1]:.1f}",
                "own footers": f"{footers:,}",
                "own footers, s": f"{seconds[2]:.1f}",
                "loading, s": f"{protocol.loading_seconds:.0f}",
                "in all, s": f"{sum(seconds) + protocol.loading_seconds:.0f}",
                "LIST requests of all": f"{of.num_workers * pages:,}",
            }


def load(fleet: Fleet, protocol: Protocol) -> Iterator[Row]:
    """Requests a second in the parts of a run: mean / most over 10 s / most in one."""
    for shard_rows in SHARD_ROWS[:2]:
        history = simulated(cut(fleet, shard_rows), protocol)
        for name, first, last in parts(history):
            row = {"write.shard_rows": f"{shard_rows:,}", "part": name, "seconds": f"{first:,.0f} to {last:,.0f}"}
            for kind in Kind:
                found = history.requests.by_second(kind)[int(first) : int(last) + 1]
                mean = found.sum() / max(1.0, last - first)
                row[kind] = f"{mean:,.0f} / {peak(found, 10):,.0f} / {peak(found, 1):,.0f}"
            yield row


def parts(history: History) -> list[tuple[str, float, float]]:
    """Start, middle, help and tail, with their first and last second."""
    helping = max(history.ready_seconds, min(history.helping_seconds, history.end_seconds))
    idle = max(helping, min(history.idle_seconds, history.end_seconds))
    return [
        ("start", 0.0, history.ready_seconds),
        ("middle", history.ready_seconds, helping),
        ("helping", helping, idle),
        ("tail", idle, history.gone_seconds),
    ]


def totals(fleet: Fleet, protocol: Protocol) -> Iterator[Row]:
    """Requests in all, and their price."""
    for shard_rows in SHARD_ROWS:
        for sync_seconds in (5.0, 30.0, 60.0):
            yield _summary(
                {"write.shard_rows": f"{shard_rows:,}", "write.sync_seconds": f"{sync_seconds:g}"},
                simulated(cut(fleet, shard_rows), replace(protocol, sync_seconds=sync_seconds)),
            )


def _summary(head: Row, history: History) -> Row:
    requests = history.requests
    writes, reads = requests.by_second(*WRITES), requests.by_second(*READS)
    return (
        head
        | {f"{kind}, M": f"{requests.total(kind) / 1e6:,.2f}" for kind in Kind}
        | {
            "price": f"{requests.price:,.0f}",
            "writes/s, middle": _in_the_middle(history, writes),
            "writes/s, most": f"{peak(writes, 10):,.0f}",
            "reads/s, middle": _in_the_middle(history, reads),
            "reads/s, most": f"{peak(reads, 10):,.0f}",
            "end / ideal": f"{history.end_seconds / history.ideal_seconds:.3f}",
        }
    )


def _in_the_middle(history: History, by_second: Floats) -> str:
    _, (_, first, last), *_ = parts(history)
    found = by_second[int(first) : int(last) + 1]
    return f"{found.mean():,.0f}" if last - first > 1 else "-"


def tail(fleet: Fleet, protocol: Protocol) -> Iterator[Row]:
    """How it ends, by what a worker does when its own are done."""
    for shard_rows in SHARD_ROWS:
        for help_ in Help:
            of = replace(protocol, help=help_)
            if help_ is Help.none:  # or waiting for a straggler's whole share would be most of what is simulated
                of = replace(of, last_poll_seconds=1800.0)
            history = simulated(cut(fleet, shard_rows), of)
            yield {
                "write.shard_rows": f"{shard_rows:,}",
                "help": {
                    Help.none: "none",
                    Help.shards: "with shards nobody has begun",
                    Help.rows: "and with the rows of those begun",
                }[help_],
                "ideal, s": f"{history.ideal_seconds:,.0f}",
                "end, s": f"{history.end_seconds:,.0f}",
                "end / ideal": f"{history.end_seconds / history.ideal_seconds:.2f}",
                "tail, s": f"{history.tail_seconds:,.0f}",
                "shards helped with rows": f"{history.num_helps:,}",
                "rows done twice": f"{history.rows_redone:,.0f}",
            }


def search(fleet: Fleet, protocol: Protocol) -> Iterator[Row]:
    """How workers find what is left, and how they wait for the end."""
    for shard_rows in SHARD_ROWS[:2]:
        for order in Order:
            for watch in Watch:
                history = simulated(cut(fleet, shard_rows), replace(protocol, order=order, watch=watch))
                lists = history.requests.by_second(Kind.LIST)
                yield {
                    "write.shard_rows": f"{shard_rows:,}",
                    "begins": {Order.end: "at the end", Order.scattered: "anywhere"}[order],
                    "waits by": {Watch.listing: "LIST data/", Watch.mark: "HEAD of a mark"}[watch],
                    "claims refused": f"{history.num_refused:,}",
                    "LIST, M": f"{history.requests.total(Kind.LIST) / 1e6:,.2f}",
                    "LIST/s, most": f"{peak(lists, 10):,.0f}",
                    "end / ideal": f"{history.end_seconds / history.ideal_seconds:.3f}",
                    "all know it, s after the end": f"{history.gone_seconds - history.end_seconds:,.0f}",
                }


def losses(fleet: Fleet, protocol: Protocol) -> Iterator[Row]:
    """Deaths and preemptions."""
    for shard_rows in SHARD_ROWS:
        for name, deaths, preemptions in (
            ("none", math.inf, math.inf),
            (f"one death in {fleet.hours_between_deaths:,.0f} h", fleet.hours_between_deaths, math.inf),
            ("and one preemption in 2 h", fleet.hours_between_deaths, 2.0),
        ):
            of = replace(cut(fleet, shard_rows), hours_between_deaths=deaths, hours_between_preemptions=preemptions)
            history = simulated(of, protocol)
            yield {
                "write.shard_rows": f"{shard_rows:,}",
                "of each worker": name,
                "deaths": f"{history.num_deaths:,}",
                "preemptions": f"{history.num_preemptions:,}",
                "starts": f"{len(history.lives):,}",
                "rows done twice": f"{history.rows_redone:,.0f}",
                "LIST, M": f"{history.requests.total(Kind.LIST) / 1e6:,.2f}",
                "end / ideal": f"{history.end_seconds / history.ideal_seconds:.3f}",
            }


def fleets(fleet: Fleet, protocol: Protocol) -> Iterator[Row]:
    """The same share of rows for each worker of smaller fleets."""
    for num_workers in sorted({max(1, fleet.num_workers // 100), max(1, fleet.num_workers // 10), fleet.num_workers}):
        of = replace(fleet, num_workers=num_workers, num_shards=fleet.num_shards * num_workers // fleet.num_workers)
        for shard_rows, sync_seconds in ((1_000, 5.0), (1_000, 30.0), (10_000, 30.0), (100_000, 60.0)):
            yield _summary(
                {
                    "workers": f"{num_workers:,}",
                    "rows": f"{of.num_rows:,}",
                    "write.shard_rows": f"{shard_rows:,}",
                    "write.sync_seconds": f"{sync_seconds:g}",
                },
                simulated(cut(of, shard_rows), replace(protocol, sync_seconds=sync_seconds)),
            )


TABLES: dict[str, Callable[[Fleet, Protocol], Iterator[Row]]] = {
    "plan": plan,
    "start": start,
    "load": load,
    "totals": totals,
    "tail": tail,
    "search": search,
    "losses": losses,
    "fleets": fleets,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TABLES), action="append", help="only this table; may be given again")
    fleet, protocol = Fleet(), Protocol()
    for name, default, what in (
        ("workers", fleet.num_workers, ""),
        ("rows", fleet.num_rows, "of the run"),
        ("rows-per-second", fleet.rows_per_second, "of the median worker"),
        ("speed-sigma", fleet.speed_sigma, "spread of the logarithm of the rates"),
        ("straggler-share", fleet.straggler_share, "of the workers"),
        ("straggler-factor", fleet.straggler_factor, "by which they are slower"),
        ("start-seconds", fleet.start_seconds, "within which the workers start"),
        ("hours-between-deaths", fleet.hours_between_deaths, "of one worker"),
        ("away-seconds", fleet.away_seconds, "until a lost worker starts again"),
        ("request-seconds", protocol.request_seconds, "for the store to answer one"),
        ("loading-seconds", protocol.loading_seconds, "libraries and weights"),
        ("sync-seconds", protocol.sync_seconds, "write.sync_seconds, where a table does not say"),
        ("plan-bytes", protocol.plan_bytes, "that each worker reads at its start"),
        ("seed", fleet.seed, ""),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{what} (default: {default:g})")
    args = parser.parse_args(argv)
    fleet = Fleet(
        num_workers=args.workers,
        num_shards=math.ceil(args.rows / fleet.shard_rows),
        rows_per_second=args.rows_per_second,
        speed_sigma=args.speed_sigma,
        straggler_share=args.straggler_share,
        straggler_factor=args.straggler_factor,
        start_seconds=args.start_seconds,
        hours_between_deaths=args.hours_between_deaths,
        away_seconds=args.away_seconds,
        seed=args.seed,
    )
    protocol = Protocol(
        request_seconds=args.request_seconds,
        loading_seconds=args.loading_seconds,
        sync_seconds=args.sync_seconds,
        plan_bytes=args.plan_bytes,
    )
    for name in args.only or TABLES:
        print(f"{name}: {(TABLES[name].__doc__ or '').strip()}\n")
        print(table(list(TABLES[name](fleet, protocol))), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
