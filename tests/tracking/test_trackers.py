"""Figures of a run where people look at curves: TensorBoard, Weights & Biases, Prometheus."""

from __future__ import annotations

import json
import logging
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine

from pipeline.errors import UsageError
from pipeline.meter import Meter
from pipeline.records import Answer, Fault, RecordKey, Stage
from pipeline.tally import Tally
from pipeline.tracking import prometheus, relay
from pipeline.tracking.base import Figures, RunFigures, TrackedRun
from pipeline.tracking.prometheus import PrometheusFile, exposition
from pipeline.tracking.registry import Track, refuse_trackers, relays
from pipeline.tracking.relay import Relay, close_all
from pipeline.tracking.tensorboard import TensorboardTracker
from pipeline.write.object_store import ObjectPath

WORKER = {
    "rank": 0,
    "host": "node-1",
    "state": "running",
    "updated": 1_700_000_000.5,
    "num_answered": 1200,
    "num_errors": 7,
    "num_generated_tokens": 34_000,
    "waiting_for_input_seconds": 2.5,
    "writing_seconds": 0.25,
    "seconds": 61.0,
    "loading_seconds": 1.0,
    "memory_bytes": 3 << 30,
}
RUN = RunFigures(
    rows_done=5000, errors=9, workers=4, rows_per_second=81.5, tokens_per_second=900.0, waiting_share=0.125,
    memory_bytes=12 << 30,
)  # fmt: skip
FIGURES = Figures(WORKER, 100_000, RUN)


class Notebook:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Figures] = []
        self.closed = False

    def log(self, figures: Figures) -> None:
        self.told.append(figures)

    def close(self) -> None:
        self.closed = True


def answer(row_index: int, fault: Fault | None = None) -> Answer:
    return Answer(RecordKey(row_index, "default", 0), f"row {row_index}", fault=fault, num_generated_tokens=3)


def wait_until(happened: threading.Event) -> None:
    assert happened.wait(20), "it did not happen within 20 s"


# Relays


def test_a_tracker_is_told_each_heartbeat_and_the_last_word(tmp_path: Path) -> None:
    book, tally = Notebook(), Tally(100)
    tally.resume(10, {"decode/Broken": 2})
    own = Relay("notebook", lambda: book)
    meter = Meter(tally, tmp_path, rank=0, plan_id="p", relays=[own])
    with meter:
        meter.loaded()
        tally.add(answer(0))
        tally.add(answer(1, Fault(Stage.DECODE, "Broken", "broken")))
        meter.end("done", {})
    assert book.closed and book.told[-1].worker["state"] == "done"
    run = book.told[-1].run
    assert run is not None and (run.rows_done, run.errors, run.workers) == (12, 3, 0)
    assert run.memory_bytes == book.told[-1].worker["memory_bytes"] > 1 << 20
    assert book.told[-1].num_records == 100


def test_rank_0_tells_what_all_do_and_another_rank_what_it_does_itself(tmp_path: Path) -> None:
    other, book = Notebook(), Notebook()
    tally = Tally(100)
    of_rank_0 = Meter(Tally(100), tmp_path, rank=0, plan_id="p", relays=[Relay("book", lambda: book)])
    of_rank_3 = Meter(tally, tmp_path, rank=3, plan_id="p", relays=[Relay("other", lambda: other)])
    of_rank_3.loaded()
    for number in range(20):
        tally.add(answer(number))
    of_rank_3.beat()
    of_rank_0.end("done", {})
    of_rank_3.end("done", {})
    run = book.told[-1].run
    assert run is not None and (run.rows_done, run.workers) == (20, 1)
    assert [figures.run for figures in other.told] == [None] * len(other.told)
    assert other.told[-1].worker["num_answered"] == 20


def test_a_tracker_that_fails_warns_once_and_is_told_again(caplog: pytest.LogCaptureFixture) -> None:
    class Moody(Notebook):
        def log(self, figures: Figures) -> None:
            super().log(figures)
            told.set()
            if len(self.told) < 3:
                raise OSError(28, "No space left on device")

    tracker, told = Moody(), threading.Event()
    own = Relay("prometheus_file=x.prom", lambda: tracker)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            told.clear()
            own.tell(FIGURES)
            wait_until(told)
        close_all([own])
    assert len(tracker.told) == 4 and tracker.closed
    said = [record.getMessage() for record in caplog.records]
    assert said == ["prometheus_file=x.prom: OSError: [Errno 28] No space left on device; the run goes on without it"]


def test_a_tracker_that_cannot_be_opened_warns_once_and_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    def no_tracker() -> Notebook:
        raise RuntimeError("no server")

    own = Relay("track=wandb", no_tracker)
    with caplog.at_level(logging.WARNING):
        own.tell(FIGURES)
        own.tell(FIGURES)
        close_all([own])
    assert [record.getMessage() for record in caplog.records] == [
        "track=wandb: RuntimeError: no server; the run goes on without it"
    ]


def test_a_tracker_that_hangs_holds_up_neither_heartbeats_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(relay, "_LAST_SECONDS", 0.2)
    hangs, let_go = threading.Event(), threading.Event()

    class Hanging(Notebook):
        def log(self, figures: Figures) -> None:
            hangs.set()
            let_go.wait(60)

    meter = Meter(Tally(10), tmp_path, rank=0, plan_id="p", relays=[Relay("slow", Hanging)])
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        meter.beat()
        wait_until(hangs)
        meter.beat()
        meter.end("done", {})
    assert time.monotonic() - began < 20
    assert json.loads(next(tmp_path.glob("worker-*.json")).read_text())["state"] == "done"
    assert "slow: it did not take its last figures within 0.2 s" in caplog.text
    let_go.set()


def test_figures_that_a_tracker_is_too_slow_for_are_left_out() -> None:
    at_first, go_on = threading.Event(), threading.Event()

    class Slow(Notebook):
        def log(self, figures: Figures) -> None:
            super().log(figures)
            at_first.set()
            assert go_on.wait(20)

    tracker = Slow()
    own = Relay("slow", lambda: tracker)
    for number in range(5):
        own.tell(replace(FIGURES, num_records=number))
        wait_until(at_first)
    go_on.set()
    close_all([own])
    assert [figures.num_records for figures in tracker.told] == [0, 4]


def test_a_secret_in_what_a_tracker_says_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.shown import shown

    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    assert shown("401 for 0123456789abcdef0123456789abcdef01234567") == "401 for ***"


# Prometheus


def test_what_is_written_for_prometheus_is_what_its_parser_reads(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    path = tmp_path / "vlm.prom"
    odd = 's3://bucket/a "b"\\c\nd/ü'
    tracker = PrometheusFile(str(path), odd, rank=0)
    tracker.log(FIGURES)
    families = {family.name: family for family in parser.text_string_to_metric_families(path.read_text())}
    (rows,) = families["vlm_batch_worker_rows"].samples  # the parser takes _total away, which a counter has to have
    assert families["vlm_batch_worker_rows"].type == "counter" and rows.name == "vlm_batch_worker_rows_total"
    assert (rows.value, rows.labels) == (1200, {"run": odd, "rank": "0", "host": "node-1"})
    assert families["vlm_batch_worker_running"].samples[0].value == 1
    assert families["vlm_batch_worker_heartbeat_timestamp_seconds"].samples[0].value == 1_700_000_000.5
    assert families["vlm_batch_rows"].samples[0].value == 100_000
    assert families["vlm_batch_rows_per_second"].samples[0].value == 81.5
    assert all(family.documentation and family.type in ("counter", "gauge") for family in families.values())
    assert all(sample.timestamp is None for family in families.values() for sample in family.samples)
    tracker.log(Figures(WORKER | {"state": "done"}, 100_000, replace(RUN, workers=0)))
    families = {family.name: family for family in parser.text_string_to_metric_families(path.read_text())}
    assert families["vlm_batch_worker_running"].samples[0].value == 0
    assert families["vlm_batch_rows_per_second"].samples[0].value == 0, "a run that ended would go on for ever"
    assert list(tmp_path.iterdir()) == [path]


def test_each_rank_has_a_file_and_only_rank_0_speaks_for_the_run(tmp_path: Path) -> None:
    given = tmp_path / "vlm.prom"
    PrometheusFile(str(given), "run", rank=3).log(Figures(WORKER | {"rank": 3}, 10, None))
    assert [path.name for path in tmp_path.iterdir()] == ["vlm-3.prom"]
    text = (tmp_path / "vlm-3.prom").read_text()
    assert 'vlm_batch_worker_errors_total{run="run",rank="3",host="node-1"} 7.0' in text
    assert "vlm_batch_rows_done" not in text


def test_a_file_for_prometheus_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector reads whenever it likes, and takes half a file for an error."""
    replaced = []
    monkeypatch.setattr(prometheus, "replace_file", lambda path, content, **more: replaced.append((path, more)))
    PrometheusFile(str(tmp_path / "vlm.prom"), "run", rank=0).log(FIGURES)
    assert replaced == [(tmp_path / "vlm.prom", {"beside": tmp_path, "durable": False})]


def test_escaping_follows_the_text_format() -> None:
    assert exposition({"run": 'a"b\\c\nd'}, [("x_total", "counter", 'say "hi"\\\n', 1.5)]) == (
        '# HELP x_total say "hi"\\\\\\n\n# TYPE x_total counter\nx_total{run="a\\"b\\\\c\\nd"} 1.5\n'
    )


# TensorBoard


def test_tensorboard_reads_the_curves_back_and_a_resumed_run_goes_on_with_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = TrackedRun("/data/run", "run", "p", str(tmp_path / "tracking"), {})
    for start in (0, 1):
        tracker = TensorboardTracker(run)
        for beat in (0, 1):
            done = 1000 * (2 * start + beat)
            tracker.log(Figures(WORKER | {"updated": 1_700_000_000.0 + done}, 5000, replace(RUN, rows_done=done)))
        tracker.log(Figures(WORKER, 5000, None))
        tracker.close()
        time.sleep(1.1)  # a file is called by the second in which it was begun
    events = reader.EventAccumulator(str(tmp_path / "tracking"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {field.name for field in fields(RunFigures)}
    points = events.Scalars("rows_done")
    assert [(point.step, point.value) for point in points] == [(number, number) for number in (0, 1000, 2000, 3000)]
    assert points[3].wall_time == 1_700_003_000.0
    assert [point.value for point in events.Scalars("waiting_share")] == [0.125] * 4


# Weights & Biases


def wandb_records(path: Path) -> Iterator[Any]:
    """What a file of W&B holds: a log of LevelDB's form (blocks of 32 KiB, each record whole or in pieces)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = path.read_bytes(), 7, b""  # behind its own mark
    while at < len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield Record.FromString(record)
            record = b""


def test_weights_and_biases_keeps_the_figures_in_files_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    wandb.teardown()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    (own,) = relays(
        Track.wandb, None, None, output_dir=tmp_path / "captions", plan_id="0123abcd",
        settings={"prompt.user": "What is it?", "seed": 42}, rank=0,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        own.tell(FIGURES)
        own.close()
        assert own.ended(60)
    (path,) = (tmp_path / "captions/tracking/wandb").glob("offline-run-*/run-0123abcd.wandb")
    assert f"track=wandb: {path.parent} until `wandb sync`" in caplog.text
    history, config, name = {}, {}, ""
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            history |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            name = f"{record.run.project}/{record.run.display_name}"
    assert history["rows_done"] == 5000 and history["rows_per_second"] == 81.5
    assert config["prompt.user"] == "What is it?" and name == "vlm-batch/captions"


def test_weights_and_biases_without_a_key_is_refused_before_a_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would ask for one at the terminal, in the middle of the run."""
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    wandb.teardown()  # what another test told it of its mode
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="WANDB_MODE=offline"):
        refuse_trackers(Track.wandb, None, None, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UsageError, match=r"track=wandb: .*40"):
        refuse_trackers(Track.wandb, None, None, tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    refuse_trackers(Track.wandb, None, None, tmp_path)


# What is refused


@pytest.mark.parametrize(("track", "package"), [(Track.tensorboard, "tensorboardX"), (Track.wandb, "wandb")])
def test_a_tracker_whose_package_is_missing_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, track: Track, package: str
) -> None:
    (tmp_path / package).mkdir()  # as a run of wandb leaves it in the folder where it was started
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, package, raising=False)
    with pytest.raises(UsageError, match=rf"pip install 'vlm-batch\[{track.value}\]'"):
        refuse_trackers(track, None, None, tmp_path)


def test_paths_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for path in ("/x/vlm.txt", "s3://bucket/vlm.prom"):
        with pytest.raises(UsageError, match=r"expected a local path that ends in \.prom"):
            refuse_trackers(Track.none, None, path, tmp_path)
    with pytest.raises(UsageError, match="expected a folder of this host"):
        refuse_trackers(Track.none, "s3://bucket/tracking", None, tmp_path)
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    with pytest.raises(UsageError, match="give track_dir=FOLDER"):
        refuse_trackers(Track.tensorboard, None, None, ObjectPath("memory://run"))
    refuse_trackers(Track.tensorboard, str(tmp_path), None, ObjectPath("memory://run"))


def test_only_rank_0_has_a_tracker_of_the_run_and_nothing_is_opened_before_figures_come(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    path = str(tmp_path / "vlm.prom")
    for rank, number in ((0, 2), (1, 1)):
        found = relays(
            Track.tensorboard, None, path, output_dir=tmp_path / "run", plan_id="p", settings={}, rank=rank
        )  # fmt: skip
        assert len(found) == number
        close_all(found)
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_trackers(tmp_path: Path, vlm_batch: CommandLine) -> None:
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    words = ["dataset.max_rows=20", "output_dir=run", "track=tensorboard", "prometheus_file=vlm.prom"]
    vlm_batch("run", *words)
    text = (tmp_path / "vlm.prom").read_text()
    assert f'vlm_batch_rows_done{{run="{tmp_path}/run",rank="0",' in text and "} 20\n" in text
    (events,) = (tmp_path / "run/tracking").iterdir()
    assert events.stat().st_size > 0
    refused = vlm_batch("run", "output_dir=other", "prometheus_file=vlm.txt", code=2)
    assert "ends in .prom" in refused.stderr and not (tmp_path / "other").exists()
