"""cluster=ray: actors answer what one process answers, whoever of them dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import crews
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import CHECKOUT, CommandLine, wait_for_journal

from pipeline.cluster import ray_worker
from pipeline.cluster.base import Job
from pipeline.cluster.ray import Demand, RayConfig, num_fitting, refuse_version
from pipeline.cluster.ray_crew import RayCrew, Signals
from pipeline.cluster.ray_worker import Task, enter
from pipeline.errors import Interrupted, RunFailed, UsageError
from pipeline.ranks import Ranks

JOB = ("run", "dataset.max_rows=300", "write.shard_rows=20", "write.sync_seconds=0.1", "engine.max_batch_rows=4")
TIMELESS = ["id", "row_index", "row_key", "status", "prompt", "response", "finish_reason", "num_generated_tokens"]
GPU_NODE = {"CPU": 64.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("config", "nodes", "wanted"),
    [
        (RayConfig(), [GPU_NODE, GPU_NODE, {"CPU": 4.0}], Demand(16, 1, 1, None)),
        (RayConfig(gpus=2), [GPU_NODE, {"GPU": 1.0, "CPU": 4.0}], Demand(4, 2, 1, None)),
        (RayConfig(gpus=0.5, cpus=4), [GPU_NODE], Demand(16, 0.5, 4, 4)),
        (RayConfig(gpus=0, workers=3), [GPU_NODE], Demand(3, 0, 8, 8)),
        (RayConfig(), [{"CPU": 2.0}], Demand(1, 0, 2, 2)),
        (RayConfig(workers=2), [{"CPU": 2.0}], Demand(2, 0, 1, 1)),
        (RayConfig(), [{"CPU": 64.0}, {"CPU": 16.0}, {"memory": 1.0}], Demand(10, 0, 8, 8)),
        (RayConfig(gpus=4), [{"CPU": 2.0}], Demand(1, 4, 1, None)),
    ],
)
def test_what_is_asked_of_a_cluster(config: RayConfig, nodes: list[dict[str, float]], wanted: Demand) -> None:
    assert config.demand(nodes) == wanted


def test_a_worker_lies_on_one_node() -> None:
    assert num_fitting([{"GPU": 1.0, "CPU": 9.0}, {"GPU": 3.0, "CPU": 9.0}], 2, 1) == 1
    assert num_fitting([{"GPU": 8.0, "CPU": 2.0}], 1, 1) == 2
    assert num_fitting([{"GPU": 1.0, "CPU": 9.0}], 0.1, 0) == 10
    with pytest.raises(UsageError, match=r"cluster\.gpus=1\.5: expected a whole number"):
        RayConfig(gpus=1.5).demand([GPU_NODE])


def test_unsafe_and_missing_versions_are_refused() -> None:
    refuse_version("2.55.0")
    refuse_version("3.0.0rc1")
    with pytest.raises(UsageError, match=r"Ray 2\.9\.3 is installed, and before 2\.55 it runs code"):
        refuse_version("2.9.3")
    with pytest.raises(UsageError, match=r"pip install 'vlm-batch\[ray\]'"):
        refuse_version(None)


def test_an_address_that_is_none_of_the_cluster_is_refused(vlm_batch: CommandLine) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    said = vlm_batch(*JOB, "cluster=ray", "cluster.address=ray://head:10001", code=2).stderr
    assert "expected HOST:PORT or auto" in said and "ray job submit" in said


def test_a_node_that_does_not_see_the_folders_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_worker, "_SHARED_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text("mine")
    task = partial(Task, lambda *_: None, num_threads=None, max_cores=None)
    enter(task("out", str(tmp_path), b"mine"))
    with pytest.raises(UsageError, match=f"{socket.gethostname()} does not see the run that was begun there"):
        enter(task("out", str(tmp_path), b"another"))
    with pytest.raises(UsageError, match=r"has no folder .*elsewhere, where the command was started"):
        enter(task("out", str(tmp_path / "elsewhere"), b"mine"))


def test_a_worker_takes_no_more_cores_than_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    task = partial(Task, lambda *_: None, "out", ".", None, None)
    assert task(4.0).bounded(Ranks(3, 4, 1, 2)) == Ranks(3, 4, 1, 16)
    assert task(None).bounded(Ranks(3, 4, 1, 2)) == Ranks(3, 4, 1, 2)
    assert task(40.0).bounded(Ranks(3, 4, 1, 2)) == Ranks(3, 4, 1, 2)


# With a cluster of two nodes, both on this host ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with one CPU each."""
    pytest.importorskip("ray", reason="Ray is not installed")
    os.environ |= {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    made = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    made.add_node(**node)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture
def crew(cluster: Any, tmp_path: Path) -> Iterator[Callable[..., RayCrew]]:
    """Makes crews that do what a function of crews.py does."""
    import ray

    # What a process imports beside the program has to be known to the actors.
    paths = {"env_vars": {"PYTHONPATH": f"{CHECKOUT}:{Path(crews.__file__).parent}"}}
    ray.init(address=cluster.address, logging_level="ERROR", runtime_env=paths)

    def made(
        work: Callable[[Path, int, int], None],
        signals: Signals | None = None,
        *,
        num_workers: int = 2,
        cpus: float = 0.5,
        max_restarts: int = 16,
    ) -> RayCrew:
        job = Job(lambda: True, partial(work, tmp_path), str(tmp_path))
        return RayCrew(job, Demand(num_workers, 0, cpus, None), max_restarts, signals or Signals())

    yield made
    ray.shutdown()


@pytest.mark.slow
def test_each_actor_knows_its_rank_and_who_is_beside_it(
    crew: Callable[..., RayCrew], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.ray_crew._GATHER_SECONDS", 120.0)  # a busy machine starts them slowly
    crew(crews.tells, num_workers=3).run()
    told = [(tmp_path / f"{rank}.told").read_text().split() for rank in range(3)]
    assert [words[:2] + words[-1:] for words in told] == [[str(rank), "3", f"{rank}/3"] for rank in range(3)]
    assert sorted(words[2] for words in told) == ["0", "1", "2"] and {words[3] for words in told} == {"3"}


@pytest.mark.slow
def test_an_actor_that_is_killed_is_started_again(
    crew: Callable[..., RayCrew], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crew(crews.is_killed_once).run()
    assert (tmp_path / "0.started").stat().st_size == 2
    assert "worker 0 died: its worker process has died; it is started again (1 of 16 times)" in caplog.text
    with pytest.raises(RunFailed, match="its worker process has died, and is not started again"):
        crew(crews.always_killed, max_restarts=1).run()


@pytest.mark.slow
def test_the_reasons_of_actors_arrive_as_sentences(
    crew: Callable[..., RayCrew], caplog: pytest.LogCaptureFixture
) -> None:
    crew(crews.one_fails).run()
    with pytest.raises(UsageError, match=r"^no such key$"):
        crew(crews.all_misused).run()
    with pytest.raises(RunFailed) as failed:
        crew(crews.all_fail).run()
    assert "worker 0 ended with exit code 2 (no such key)" in str(failed.value)
    assert "worker 1 ended with exit code 1 (the disk of rank 1 is full)" in str(failed.value)
    with pytest.raises(RunFailed, match=r"^ZeroDivisionError: a bug$"):
        crew(crews.has_a_bug, num_workers=1).run()
    assert "in has_a_bug" in caplog.text, "a bug is said with its stack"


@pytest.mark.slow
def test_actors_are_asked_to_stop_as_by_a_signal(crew: Callable[..., RayCrew], tmp_path: Path) -> None:
    signals = Signals()

    def stop() -> None:
        while not all((tmp_path / f"{rank}.started").exists() for rank in (0, 1)):
            time.sleep(0.05)
        signals.stop = True

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Interrupted):
        crew(crews.waits, signals).run()
    assert [(tmp_path / f"{rank}.signals").stat().st_size for rank in (0, 1)] == [1, 1]
    assert all((tmp_path / f"{rank}.stopped").exists() for rank in (0, 1))


@pytest.mark.slow
def test_who_has_no_room_is_told_what_there_is(
    crew: Callable[..., RayCrew], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    signals = Signals()

    def stop() -> None:
        while "wait for room" not in caplog.text:
            time.sleep(0.05)
        signals.stop = True

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Interrupted):
        crew(crews.tells, signals, cpus=4).run()
    assert "2 of 2 workers with 0 GPUs and 4 CPUs each wait for room; nothing is done until then" in caplog.text
    assert "CPUs: 2, of which 2 free" in caplog.text
    caplog.clear()
    crew(crews.tells, num_workers=3, cpus=1).run()
    assert (tmp_path / "0.told").exists(), "those who have room begin"


@pytest.mark.slow
def test_this_host_alone_has_too_little_and_says_so_at_once(vlm_batch: CommandLine) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    said = vlm_batch(*JOB, "cluster=ray", "cluster.gpus=4", "cluster.workers=2", code=2).stderr
    assert "no room for 2 workers with 4 GPUs and 1 CPUs each: this host has " in said
    assert "Traceback" not in said


# Runs on that cluster -----------------------------------------------------------------------------------------------


def answers(output_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output_dir / "data", columns=TIMELESS).to_pylist()
    return rows


def on(cluster: Any) -> tuple[str, ...]:
    """Two actors, one on each node."""
    return "cluster=ray", f"cluster.address={cluster.address}", "cluster.workers=2", "cluster.cpus=1"


@pytest.mark.slow
def test_two_actors_answer_what_one_process_answers(cluster: Any, vlm_batch: CommandLine, tmp_path: Path) -> None:
    """With the demo model; the other runs here have one that is quick to load."""
    vlm_batch(*JOB, "output_dir=one")
    done = vlm_batch(*JOB, *on(cluster), "output_dir=two")
    assert answers(tmp_path / "two") == answers(tmp_path / "one")
    assert done.stdout.count("rows     300 of 300 done") == 1 and ", 2 workers" in done.stdout
    assert "(worker 0 pid=" in done.stderr and "(worker 1 pid=" not in done.stderr, "what both do alike is said by one"
    assert "no model was loaded" in vlm_batch(*JOB, *on(cluster), "output_dir=two").stdout


RUN = [sys.executable, str(Path(__file__).parent / "ray_run.py"), *JOB]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process answers."""
    folder = tmp_path_factory.mktemp("one")
    subprocess.run([*RUN, "output_dir=one"], cwd=folder, check=True, timeout=120)
    return answers(folder / "one")


@contextmanager
def begun(cluster: Any, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A run by two actors that has its first answers."""
    words = [*RUN, *on(cluster), "output_dir=two"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_journal(folder / "two", process)
        deadline = time.monotonic() + 60
        while len(pids(folder)) < 2:
            assert process.poll() is None and time.monotonic() < deadline, "two were to begin"
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def pids(folder: Path) -> dict[int, int]:
    """The processes of the ranks."""
    stats = [json.loads(path.read_text()) for path in (folder / "two" / "stats").glob("worker-*.json")]
    return {one["rank"]: one["pid"] for one in stats}


def states(folder: Path) -> set[str]:
    """How the workers ended, by their own account."""
    return {json.loads(path.read_text())["state"] for path in (folder / "two" / "stats").iterdir()}


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.1)


@pytest.mark.slow
def test_the_shards_of_a_killed_actor_are_done_in_the_same_run(
    cluster: Any, wanted: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Fault 16: Ray, kill -9 of an actor in the middle: it is started again, and the run ends with all rows."""
    with begun(cluster, tmp_path) as process:
        os.kill(pids(tmp_path)[1], signal.SIGKILL)
        printed, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "worker 1 died: its worker process has died; it is started again (1 of 16 times)" in said
    assert printed.count("rows     300 of 300 done") == 1
    assert answers(tmp_path / "two") == wanted
    assert "Traceback" not in said
    assert "(raylet)" not in printed, "what Ray says is no output of the command"


@pytest.mark.slow
def test_a_lost_node_leaves_its_shards_to_the_others(
    cluster: Any, wanted: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Fault 16: Ray, kill -9 of a whole node: its worker waits for room, another one does the rest."""
    (node,) = cluster.worker_nodes
    with begun(cluster, tmp_path) as process:
        actors = pids(tmp_path)
        cluster.remove_node(node, allow_graceful=False)
        try:
            printed, said = process.communicate(timeout=200)
        finally:
            cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
            cluster.wait_for_nodes()
    assert process.returncode == 0, said
    assert re.search("died: (its node has died|it cannot be reached); it is started again", said)
    assert printed.count("rows     300 of 300 done") == 1
    assert answers(tmp_path / "two") == wanted
    for pid in actors.values():
        wait_for_end(pid)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_without_ray(
    number: signal.Signals, cluster: Any, wanted: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Fault 16, 17: Ray, the command itself is stopped or killed: no actor stays, and one process does the rest."""
    with begun(cluster, tmp_path) as process:
        actors = pids(tmp_path)
        process.send_signal(number)
        _, said = process.communicate(timeout=100)
        for pid in actors.values():
            wait_for_end(pid)
    if number == signal.SIGTERM:
        assert process.returncode == 75 and said.count("Run the same command again") == 1, said
        assert states(tmp_path) == {"interrupted"}
    assert len(list((tmp_path / "two" / "data").iterdir())) < 15, "it was stopped in the middle"
    subprocess.run([*RUN, "output_dir=two"], cwd=tmp_path, check=True, timeout=120)
    assert answers(tmp_path / "two") == wanted


# As a stage of Ray Data ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stage_of_ray_data_answers_as_a_run_does(cluster: Any, vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Fault 38: Ray Data, an image that is none has its error in its row, and its neighbours have their answers."""
    table = pq.read_table(CHECKOUT / "pipeline" / "dataset" / "demo.parquet").slice(0, 6)
    cells = table["images"].to_pylist()
    cells[1] = [{"bytes": b"no image", "path": None}]
    place = table.schema.get_field_index("images")
    images = pa.array(cells, table.schema.field("images").type)
    pq.write_table(table.set_column(place, "images", images), tmp_path / "rows.parquet")
    words = [sys.executable, str(Path(__file__).parent / "ray_data_job.py"), cluster.address, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    rows = {row["id"]: row for row in json.loads((tmp_path / "answers.json").read_text())}
    vlm_batch("run", "dataset.max_rows=6", "output_dir=one")
    by_run = pq.read_table(tmp_path / "one" / "data").to_pylist()
    assert set(rows) == {row["id"] for row in by_run}
    bad = rows.pop(table["id"][1].as_py())
    assert (bad["status"], bad["error_stage"], bad["response"]) == ("error", "decode", None)
    assert rows == {row["id"]: {name: row[name] for name in bad} for row in by_run if row["id"] in rows}


def test_a_batch_of_arrays_comes_back_as_arrays() -> None:
    from pipeline.ray_data import Answers

    stage = Answers(["dataset.image_column=image"])
    arrays = {"image": np.array([b"no image", None], dtype=object), "question": np.array(["a", "b"], dtype=object)}
    found = stage(arrays)
    assert isinstance(found, dict) and list(found["status"]) == ["error", "error"]
    assert list(found["error_type"]) == ["UnidentifiedImageError", "NullImage"]
    with pytest.raises(UsageError, match=r"image uint8\[1, 2, 2, 3\].* is no table .*Images are expected encoded"):
        stage({"image": np.zeros((1, 2, 2, 3), np.uint8)})
    with pytest.raises(UsageError, match=r"dataset\.image_column=image: batch has no such column"):
        stage({"picture": np.array([b""], dtype=object)})
    stage.close()
