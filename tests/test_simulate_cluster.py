"""The simulated fleet: what can be computed by hand comes out, and every shard is published exactly once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(autouse=True)
def _scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def fleet(**changed: Any) -> Any:
    """Workers of one speed, 50 rows a second, that start at once and live for ever."""
    from simulated_protocol import Fleet

    even = {"speed_sigma": 0.0, "straggler_share": 0.0, "start_seconds": 0.0, "hours_between_deaths": math.inf}
    return Fleet(**even | changed)


def protocol(**changed: Any) -> Any:
    """A store that answers at once, workers that load nothing, and no journals before the last."""
    from simulated_protocol import Protocol

    return Protocol(**{"request_seconds": 0.0, "loading_seconds": 0.0, "sync_seconds": 1000.0} | changed)


def simulated(fleet: Any, protocol: Any, rates: dict[int, float] | None = None) -> Any:
    """rates: rows/s of some workers that have another one."""
    from simulated_fleet import Simulation

    simulation = Simulation(fleet, protocol)
    for rank, rate in (rates or {}).items():
        simulation._workers[rank].rate = rate
    return simulation.run()


def test_one_worker_and_one_shard_ask_what_the_protocol_says() -> None:
    from simulated_protocol import Kind

    one = fleet(num_workers=1, num_shards=1)  # 20 s
    history = simulated(one, protocol(sync_seconds=6.0, stats_seconds=8.0, lease_seconds=30.0))
    assert history.end_seconds == 20.0 == pytest.approx(history.ideal_seconds)
    # data/ at the start; journals before and after; when its own is done, data/ and work/.
    assert history.requests.total(Kind.LIST) == 1 + 2 + 2
    # plan.json, inputs; is it published; beats at 5, 10 and 15 s; plan.json, the footer; the claim.
    assert history.requests.total(Kind.GET) == 2 + 1 + 3 + 2 + 1
    assert history.requests.total(Kind.HEAD) == 3  # at syncs: 6, 12 and 18 s
    # stats, again at 8 and 16 s; the claim and its beats; segments at the syncs and the last; the shard.
    assert history.requests.total(Kind.PUT) == 3 + 1 + 3 + 3 + 1 + 1
    assert history.requests.total(Kind.DELETE) == 4 + 1  # segments, claim
    assert history.requests.price == pytest.approx((5 + 12) * 0.005e-3 + (9 + 3) * 0.0004e-3)


def test_two_workers_share_three_shards() -> None:
    history = simulated(fleet(num_workers=2, num_shards=3), protocol())
    assert list(history.published) == [20.0, 20.0, 40.0]
    assert history.helping_seconds == history.idle_seconds == 20.0  # the second worker: the third shard has begun
    assert history.ideal_seconds == pytest.approx(30.0)
    assert history.tail_seconds == 20.0


def test_requests_hold_a_worker_up_and_journals_do_not() -> None:
    one = fleet(num_workers=1, num_shards=1)
    history = simulated(one, protocol(request_seconds=0.1, sync_seconds=1.0))
    # 3 for the plan and stats, a LIST; 3 for the claim; 20 s of work; 4 until the shard is read again.
    assert history.end_seconds == pytest.approx(0.4 + 0.3 + 20.0 + 0.4)


def test_a_worker_that_is_done_takes_what_nobody_has_begun_from_the_end() -> None:
    from simulated_protocol import Help

    slow = fleet(num_workers=2, num_shards=8)
    alone = simulated(slow, protocol(help=Help.none), {1: 10.0})  # 100 s a shard
    assert alone.end_seconds == 400.0
    helped = simulated(slow, protocol(help=Help.shards), {1: 10.0})
    # 0, 2, 4 and 6, then 7 and 5; the slow one is at 1 until 100 s, finds 3 that nobody has begun, and has it till 200.
    assert list(helped.published) == [20.0, 40.0, 60.0, 80.0, 100.0, 100.0, 120.0, 200.0]
    assert helped.idle_seconds == 120.0
    assert helped.num_published == [1] * 8


def test_help_with_rows_halves_the_tail() -> None:
    from simulated_protocol import Help

    two = fleet(num_workers=2, num_shards=3)  # from 20 s on one has the last shard and the other nothing
    history = simulated(two, protocol(help=Help.rows, sync_seconds=0.0))
    assert history.end_seconds == 30.0  # the ideal
    assert history.tail_seconds == 10.0
    assert history.num_helps == 1
    assert history.num_published == [1, 1, 1]


def test_two_that_met_know_it_at_a_sync_and_not_before() -> None:
    from simulated_protocol import Help

    two = fleet(num_workers=2, num_shards=3)
    history = simulated(two, protocol(help=Help.rows, sync_seconds=3.0))
    assert 30.0 < history.end_seconds < 33.0
    assert 0 < history.rows_redone < 3.0 * 100
    none = simulated(two, protocol(help=Help.rows, sync_seconds=15.0))  # they would meet sooner than they would know
    assert none.num_helps == 0
    assert none.end_seconds == 40.0


def test_the_shard_of_a_worker_that_died_is_done_by_another() -> None:
    from simulated_protocol import Help

    mortal = fleet(num_workers=20, num_shards=400, hours_between_deaths=0.2, away_seconds=1e9, seed=3)
    for helping in (Help.shards, Help.rows):
        history = simulated(mortal, protocol(help=helping, lease_seconds=30.0))
        assert history.num_deaths > 5
        assert history.num_published == [1] * 400
        assert len(history.lives) == 20


def test_nobody_left_is_said() -> None:
    short = fleet(num_workers=2, num_shards=400, hours_between_deaths=0.01, away_seconds=math.inf)
    with pytest.raises(RuntimeError, match="nobody is left"):
        simulated(short, protocol())


@pytest.mark.parametrize("order", ["end", "scattered"])
@pytest.mark.parametrize("helping", ["none", "shards", "rows"])
def test_every_shard_is_published_exactly_once_whatever_befalls_the_workers(helping: str, order: str) -> None:
    from simulated_protocol import Fleet, Help, Kind, Order, Protocol, Watch

    many = Fleet(
        num_workers=50, num_shards=1_000, straggler_share=0.1, hours_between_deaths=0.3, hours_between_preemptions=0.3,
        away_seconds=60.0, share_done=0.1, seed=7,
    )  # fmt: skip
    for watch in Watch:
        history = simulated(many, Protocol(help=Help(helping), order=Order(order), watch=watch, sync_seconds=5.0))
        assert history.num_published == [0] * 100 + [1] * 900
        assert history.num_deaths and history.num_preemptions
        assert len(history.published) == 900
        assert history.end_seconds >= history.ideal_seconds
        for kind in Kind:
            assert history.requests.by_second(kind).sum() == pytest.approx(history.requests.total(kind))


def test_a_span_counts_in_each_second_as_far_as_it_lies_in_it() -> None:
    from simulated_protocol import Kind
    from simulated_requests import Requests, peak

    requests = Requests()
    requests.span(Kind.LIST, 0.5, 2.5, 20)
    requests.span(Kind.LIST, 3.25, 3.75, 2)
    assert requests.by_second(Kind.LIST).tolist()[:4] == pytest.approx([5, 10, 5, 2])
    assert peak(requests.by_second(Kind.LIST), 1) == 10
    assert peak(requests.by_second(Kind.LIST), 2) == 7.5


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from simulate_cluster import TABLES, main

    main(
        ["--workers", "100", "--rows", "10000000"]
        + [word for name in TABLES if name != "plan" for word in ("--only", name)]
    )
    printed = capsys.readouterr().out
    for name in TABLES:
        assert f"{name}: " in printed or name == "plan"
    assert "| 10,000 | with shards nobody has begun |" in printed


def test_a_plan_is_made_to_be_measured() -> None:
    from simulate_cluster import plan_bytes

    settings_bytes, few = plan_bytes(1_000, 1, marked=False)
    _, more = plan_bytes(10_000, 1, marked=False)
    assert settings_bytes > 1_000
    assert few < more < 12 * few
