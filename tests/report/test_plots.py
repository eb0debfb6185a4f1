"""Plots: drawn where matplotlib is, in the colours of the page, and said in words beside."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from made_run import made_run, put_pictures
from page_reader import check_harmless, page_read

from pipeline.report.plots import bin_edges, histogram, scatter, steps
from pipeline.report.report import write_report


def test_a_report_has_plots_of_lengths_sizes_and_speed(tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in"))
    html = Path(str(write_report(tmp_path / "out"))).read_text()
    check_harmless(html)
    page = page_read(html)
    drawn = page.all("svg", role="img")
    titles = ["Length of answers", "Size of pictures", "Throughput", "Waiting for input"]
    assert [figure.all("h3")[0].text for figure in page.all("figure") if figure.all("h3")] == titles
    assert [(svg.attributes["aria-label"] or "").partition(":")[0] for svg in drawn] == titles
    assert "Half have at most 3, 95 % at most 3; the most is 3." in page.text
    assert "At most 22.5 % of the workers' time." in page.text


def test_a_run_without_matplotlib_says_what_draws_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_read(Path(str(write_report(tmp_path / "out"))).read_text())
    assert not page.all("svg") and "pip install 'vlm-batch[report]'" in page.text
    assert page.all("p", class_="answer")


def test_colours_are_those_of_the_page() -> None:
    plot = histogram("Lengths", np.array([1, 2, 2, 3]), "tokens", "few")
    assert plot is not None
    assert set(re.findall(r"(?:fill|stroke): *(#[0-9a-f]{6}|var\(--[a-z]+\))", plot.svg)) <= {
        "var(--ink)", "var(--quiet)", "var(--line)", "var(--accent)",
    }  # fmt: skip
    assert "var(--accent)" in plot.svg and not re.search(r"#0[0-9]0", plot.svg)


def test_every_number_is_in_a_bar() -> None:
    """Bars of one value each where there is room, whole numbers else; nothing falls out at either end."""
    for values in (np.array([5]), np.arange(100), np.array([0, 100_000]), np.array([3, 3, 3]), np.arange(7, 48)):
        edges = bin_edges(values)
        assert np.histogram(values, edges)[0].sum() == len(values)
        assert 1 < len(edges) <= 43 and edges[0] < values.min() and edges[-1] > values.max()
    assert histogram("Lengths", np.empty(0, np.int64), "tokens", "") is None


def test_titles_and_captions_are_text() -> None:
    hostile = '"><script>alert(1)</script>$\\frac{'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = [
            histogram(hostile, np.array([1, 2]), "tokens", hostile),
            scatter(hostile, np.array([1, 2]), np.array([3, 4]), ("a", "b"), hostile),
            steps(hostile, np.array([0.0, 1, 2]), np.array([3.0, 4]), ("a", "b"), [1.0], hostile),
        ]
    for plot in drawn:
        assert plot is not None and "<script" not in plot.svg and "&lt;script&gt;" in plot.svg


def test_many_sizes_are_a_bounded_number_of_dots() -> None:
    numbers = np.random.default_rng(0).integers(1, 10_000, (50_000, 2))
    plot = scatter("Sizes", numbers[:, 0], numbers[:, 1], ("width", "height"), "")
    assert plot is not None and len(plot.svg) < 400_000
