"""What a person sees who watches a run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from heartbeats import heartbeat
from small_run import FAULT, answer, finished_run, keys_of, new_ledger, new_plan, row, work
from terminal import seen

from pipeline.plan import Plan
from pipeline.watch.observer import Observer

MANY = 12  # rows of a plan, in shards of three


def begun(folder: Path) -> Plan:
    """A run of 12 rows: a shard published, an answer and an error in the journal of the next."""
    plan = new_plan(folder, MANY)
    ledger = new_ledger(folder, plan)
    work(ledger, plan, plan.shard(0))
    first, second, _ = list(keys_of(plan, plan.shard(1)))
    work(ledger, plan, plan.shard(1), [first])
    ledger.record(answer(second, fault=FAULT))
    ledger.close()
    return plan


def look_at(folder: Path, width: int = 80, height: int = 24) -> list[str]:
    return seen(Observer(folder).look(), width, height)


def test_a_run_at_a_glance(tmp_path: Path) -> None:
    plan = begun(tmp_path)
    heartbeat(tmp_path, plan.plan_id, 0, newest_errors=[[time.time() - 3, "decode/Broken", "a.jpg: it is no picture"]])
    lines = look_at(tmp_path, 100)
    assert lines[0].startswith(str(tmp_path)) and lines[0].endswith("running, 1 min 01 s")
    assert lines[1].endswith("41.7%")
    assert lines[2:7] == [
        "rows     5 of 12 done",
        "rate     2.0 rows/s, 20 tokens/s",
        f"left     3 s, until about {time.strftime('%H:%M', time.localtime(time.time() + 3))}",
        "shards   1 of 4 published",
        "time     waiting for input 25%, decode 50%, writing 5%, other 20%",
    ]
    assert lines[7:9] == [
        "errors   1 (20.0% of the rows done)",
        "           1 x decode/UnidentifiedImageError",
    ]
    assert lines[10:13] == [
        "workers  1 at work",
        "rank  state    rows/s  rows  waiting  heard of",
        "   0  running     2.0   120      25%   0 s ago",
    ]
    assert lines[14:16] == ["newest errors", "         3 s ago  decode/Broken  a.jpg: it is no picture"]
    assert lines[23] == "q or Ctrl-C ends this look, not the run"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("height", [3, 10, 24, 60])
def test_any_size_of_terminal_shows_the_top_and_no_line_is_wrapped(tmp_path: Path, width: int, height: int) -> None:
    plan = begun(tmp_path)
    for rank in range(30):
        error = [[time.time(), "decode/Broken", "photo.jpg: " + "very long " * 40]]
        heartbeat(tmp_path, plan.plan_id, rank, host=f"node-{rank}.cluster.example.org", newest_errors=error)
    lines = look_at(tmp_path, width, height)
    assert len(lines) == height and all(len(line) <= width for line in lines)
    assert lines[1].endswith("41.7%") and lines[-1].startswith("q or Ctrl-C ends this look")
    if height >= 24 and width >= 60:
        # The title of each part is there, and what stands below it begins a line of its own.
        heads = [line.split()[0] for line in lines if line]
        assert heads[1:2] != ["41.7%"] and {"rows", "rate", "left", "shards", "time", "errors", "workers"} <= {*heads}
        assert "newest" in heads and any("…" in line for line in lines if "decode/Broken" in line)


def test_of_many_workers_the_dead_and_the_slow_come_first(tmp_path: Path) -> None:
    plan = begun(tmp_path)
    for rank in range(200):
        heartbeat(tmp_path, plan.plan_id, rank, host=f"node-{rank // 8}", started=time.time() - 3600)
    heartbeat(tmp_path, plan.plan_id, 150, host="node-18", rows_per_second=0.5)
    heartbeat(tmp_path, plan.plan_id, 31, host="node-3", updated=time.time() - 600)
    heartbeat(tmp_path, plan.plan_id, 77, host="node-9", state="failed")
    heartbeat(tmp_path, plan.plan_id, 9, host="node-1", state="done")
    lines = look_at(tmp_path, 90, 30)
    at = next(number for number, line in enumerate(lines) if line.startswith("workers"))
    assert lines[at].startswith("workers  197 at work, 1 slow, 1 lost, 1 failed; shown: the ")
    assert lines[at].endswith("worst of 200")
    assert lines[at + 1].split() == ["rank", "host", "state", "rows/s", "rows", "waiting", "heard", "of"]
    first = [line.split()[:4] for line in lines[at + 2 : at + 6]]
    assert first == [
        ["31", "node-3", "lost", "-"],
        ["77", "node-9", "failed", "-"],
        ["150", "node-18", "slow", "0.5"],
        ["0", "node-0", "running", "2.0"],
    ]
    assert lines[at + 2].endswith("10 min 00 s ago")
    assert len(lines) == 30 and lines[-1].startswith("q or")


def test_a_worker_that_was_started_again_is_not_lost(tmp_path: Path) -> None:
    plan = begun(tmp_path)
    heartbeat(tmp_path, plan.plan_id, 1, "dead", updated=time.time() - 40)
    heartbeat(tmp_path, plan.plan_id, 1, "again")
    heartbeat(tmp_path, plan.plan_id, 2, "yesterday", updated=time.time() - 86400, started=time.time() - 90000)
    lines = look_at(tmp_path)
    assert "workers  1 at work" in lines
    assert not any("lost" in line for line in lines)


def test_two_starts_of_one_rank_that_are_both_at_work_are_both_shown(tmp_path: Path) -> None:
    """As when the command is started twice, to add workers."""
    plan = begun(tmp_path)
    heartbeat(tmp_path, plan.plan_id, 0, "first")
    heartbeat(tmp_path, plan.plan_id, 0, "second", rows_per_second=1.0)
    assert "workers  2 at work" in look_at(tmp_path)


def test_text_of_rows_steers_nothing_and_is_no_markup(tmp_path: Path) -> None:
    plan = begun(tmp_path)
    message = "[bold red]x[/bold red] [/] \x1b[2J\x1b[31mred\x07\x9b1m :smile:\nworkers  0 at work\tend"
    heartbeat(
        tmp_path, plan.plan_id, 0, host="[red]\x1b]0;title\x07", newest_errors=[[time.time(), "decode/[b]", message]]
    )
    heartbeat(tmp_path, plan.plan_id, 1)
    lines = look_at(tmp_path, 150)
    error = next(line for line in lines if "decode/[b]" in line)
    assert error.endswith(
        r"decode/[b]  [bold red]x[/bold red] [/] \x1b[2J\x1b[31mred\x07\x9b1m :smile:\nworkers  0 at work end"
    )
    assert r"[red]\x1b]0;title\x…" in "\n".join(lines) or r"[red]\x1b]0;title" in "\n".join(lines)
    assert "workers  2 at work" in lines and "workers  0 at work" not in lines


def test_secrets_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    plan = begun(tmp_path)
    heartbeat(tmp_path, plan.plan_id, 0, newest_errors=[[time.time(), "read/Url", "401 for hf_abcdefghijklmnop"]])
    assert any(line.endswith("401 for ***") for line in look_at(tmp_path))


def test_the_rate_is_that_of_the_last_while(tmp_path: Path) -> None:
    """The rate since the start says 2 rows/s for ever to a worker that has stopped answering."""
    plan = begun(tmp_path)
    observer, now = Observer(tmp_path), time.time()
    for beat in range(5):
        heartbeat(tmp_path, plan.plan_id, 0, updated=now - 28 + 7 * beat, num_answered=100 + 5 * beat)
        look = observer.look()
    assert look.rate == pytest.approx(5 / 7) and look.window_seconds == pytest.approx(28)
    lines = seen(look)
    assert "rate     0.7 rows/s over the last 28 s, 2.0 since the start; 20 tokens/s" in lines
    assert any(line.startswith("left     9 s, until about ") for line in lines)
    for beat in range(20):
        heartbeat(tmp_path, plan.plan_id, 0, updated=now + 10 * beat, num_answered=120)
        look = observer.look()
    assert look.rate == 0 and "left     unknown: no row was done lately" in seen(look)


def test_a_model_that_loads_a_run_that_is_dead_and_one_that_is_done(tmp_path: Path) -> None:
    plan = begun(tmp_path)
    heartbeat(tmp_path, plan.plan_id, 0, state="loading", num_answered=0, rows_per_second=0.0, engine={})
    lines = look_at(tmp_path)
    assert lines[0].endswith("loading the model, 1 min 01 s")
    assert "left     unknown until a model is loaded" in lines
    assert not any(line.startswith(("time", "rate")) for line in lines)
    heartbeat(tmp_path, plan.plan_id, 0, num_answered=0, rows_per_second=0.0)
    assert "left     unknown: no row is done yet" in look_at(tmp_path)
    heartbeat(tmp_path, plan.plan_id, 0, updated=time.time() - 3600, started=time.time() - 7200)
    lines = look_at(tmp_path)
    assert lines[0].endswith("nobody is at work; ends in 5 min 00 s") or lines[0].endswith("ends in 4 min 59 s")
    assert "left     the same command goes on where it stopped" in lines
    assert next(line for line in lines if line.startswith("   0")).split()[:3] == ["0", "lost", "-"]
    done = tmp_path / "done"
    finished_run(done)
    lines = look_at(done)
    assert lines[0].endswith("done") and lines[1].endswith("100.0%")


def test_many_classes_of_errors_are_summed_up(tmp_path: Path) -> None:
    plan = new_plan(tmp_path, 30, shard_rows=30)
    ledger = new_ledger(tmp_path, plan)
    ledger.open(plan.shard(0))
    for key in keys_of(plan, plan.shard(0)):
        ledger.expect(row(key.row_index), [key], plan.shard(0))
    keys = list(keys_of(plan, plan.shard(0)))
    for number, key in enumerate(keys[:20]):
        kind = f"Kind{min(number, 8)}"
        ledger.record(answer(key, fault=type(FAULT)(FAULT.stage, kind, "broken")))
    ledger.close()
    lines = look_at(tmp_path)
    at = lines.index("errors   20 (100.0% of the rows done)")
    assert lines[at + 1] == "           12 x decode/Kind8" and lines[at + 6] == "           4 of 4 further kinds"


def test_a_run_that_cannot_be_read_for_a_while_is_shown_as_it_was(tmp_path: Path) -> None:
    begun(tmp_path)
    observer = Observer(tmp_path)
    look = observer.look()
    away = tmp_path.with_name("away")
    tmp_path.rename(away)
    lines = seen(observer.look_again(look), 160)
    assert any(line.startswith("problem") and line.endswith("trying again") for line in lines)
    assert "rows     5 of 12 done" in lines
    away.rename(tmp_path)
    assert not any(line.startswith("problem") for line in seen(observer.look_again(look), 160))


def test_error_rows_that_are_asked_again_are_no_end(tmp_path: Path) -> None:
    plan = finished_run(tmp_path)
    heartbeat(tmp_path, plan.plan_id, 0)
    lines = look_at(tmp_path)
    assert lines[0].endswith("running, 1 min 01 s") and lines[1].endswith("100.0%")
    assert "left     error rows are asked again, or the workers are ending" in lines


def test_the_newest_error_of_any_worker_comes_first(tmp_path: Path) -> None:
    plan, now = begun(tmp_path), time.time()
    heartbeat(tmp_path, plan.plan_id, 0, newest_errors=[[now - 50, "read/A", "a"], [now - 5, "read/B", "b"]])
    heartbeat(tmp_path, plan.plan_id, 1, newest_errors=[[now - 20, "read/C", "c"]], state="done")
    lines = look_at(tmp_path)
    at = lines.index("newest errors")
    assert [line.split("ago")[1].split() for line in lines[at + 1 : at + 4]] == [
        ["read/B", "b"],
        ["read/C", "c"],
        ["read/A", "a"],
    ]


def test_of_a_long_folder_the_end_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 20) / "captions-of-today"
    plan = begun(folder)
    heartbeat(folder, plan.plan_id, 0)
    title = look_at(folder, 60)[0]
    assert title.startswith("...") and title.endswith("/captions-of-today running, 1 min 01 s") and len(title) == 60
