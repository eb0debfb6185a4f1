"""How fast a run was over time, from the series in its workers' heartbeats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.report.throughput import throughput


def start(began: float, seconds: float, answered: list[float], **changes: Any) -> dict[str, Any]:
    """A worker that said how far it was at equal steps."""
    times = list(np.linspace(0, seconds, len(answered)))
    return {
        "started": began, "seconds": seconds, "loading_seconds": 0.0, "num_answered": answered[-1],
        "waiting_for_input_seconds": 0.0,
        "series": {
            "seconds": times, "num_answered": answered, "waiting_for_input_seconds": [0.0] * len(times),
        },
    } | changes  # fmt: skip


def test_workers_add_up() -> None:
    found = throughput([start(1000, 100, [0, 500, 1000]), start(1000, 100, [0, 0, 1000])])
    assert found is not None
    middle = (found.edges_seconds[:-1] + found.edges_seconds[1:]) / 2
    assert found.rows_per_second[middle < 49] == pytest.approx(10)
    assert found.rows_per_second[middle > 51] == pytest.approx(30)
    assert (found.rows_per_second * np.diff(found.edges_seconds)).sum() == pytest.approx(2000), "no row is lost"


def test_time_in_which_nobody_was_at_work_is_left_out() -> None:
    found = throughput([start(1000, 100, [0, 1000]), start(90_000, 50, [0, 1000]), start(90_160, 50, [0, 500])])
    assert found is not None
    assert found.edges_seconds[-1] == pytest.approx(200)
    assert found.breaks_seconds == pytest.approx((100, 150))
    assert (found.rows_per_second * np.diff(found.edges_seconds)).sum() == pytest.approx(2500)
    assert found.rows_per_second[-1] == pytest.approx(10) and found.rows_per_second[0] == pytest.approx(10)


def test_waiting_is_a_share_of_the_time_of_those_who_were_there() -> None:
    waited = {"seconds": [0, 50, 100], "num_answered": [0, 1, 2], "waiting_for_input_seconds": [0.0, 50.0, 50.0]}
    found = throughput([start(0, 100, [0, 2], series=waited), start(0, 100, [0, 2])])
    assert found is not None
    assert found.waiting_share[0] == pytest.approx(0.5) and found.waiting_share[-1] == pytest.approx(0)


def test_workers_of_an_older_version_have_no_series() -> None:
    old = start(0, 100, [0, 1000], loading_seconds=20.0)
    del old["series"]
    found = throughput([old])
    assert found is not None
    assert found.rows_per_second[0] == 0 and found.rows_per_second[-1] == pytest.approx(12.5)


def test_nothing_answered_has_no_throughput() -> None:
    assert throughput([]) is None
    assert throughput([start(0, 100, [0, 0])]) is None
