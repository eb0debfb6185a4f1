"""Pickles run code when they are read: none is written to disk by a run, and none is read from there.

Between the main process and its own worker processes objects travel as pickles, through pipes that nobody else can
open; that is what tensors/pool.py and tensors/worker.py do, and multiprocessing where it starts a process.
"""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hostile_run import TESTS, data_uri, records, start
from safetensors.torch import load_file

from pipeline.vlm.identity import identify
from pipeline.vlm.load import load_model
from pipeline.vlm.options import VlmConfig

PIPELINE = TESTS.parent / "pipeline"
PICKLERS = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
OF_PIPES = {"tensors/pool.py", "tensors/worker.py"}
# In the main process nothing is unpickled but what pool.py takes from its pipes, and nothing pickled into a file.
NO_FILES = """
import pickle, sys
import fake_model  # first: some libraries derive classes from pickle's
from multiprocessing import forkserver, reduction
from pipeline.tensors import pool
def refused(*_, **__): raise AssertionError("a pickle of a file")
real = pickle.loads
def loads(*words, **options):
    assert sys._getframe(1).f_code.co_filename == pool.__file__, "something else was unpickled"
    return real(*words, **options)
pickle.loads = loads
pickle.load = pickle.dump = refused
pickle.Unpickler = type("Unpickler", (pickle.Unpickler,), {"__init__": refused})
pickle.Pickler = type("Pickler", (pickle.Pickler,), {"__init__": refused})
"""


@pytest.mark.slow
def test_a_run_and_its_resume_know_no_pickles(tmp_path: Path) -> None:
    """Fault S-9: a run that is killed, resumed, retried, audited: no file is unpickled, and none is a pickle."""
    lines = [json.dumps({"image": data_uri(n) if n % 5 else "absent.png"}) for n in range(1, 31)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    job = ["dataset=jsonl", "dataset.path=rows.jsonl", "write.shard_rows=10"]
    start(tmp_path, *job, prelude=NO_FILES, crash_at="shard_settled", code=-9)
    assert kinds(tmp_path / "out") == {"JSON", "Parquet", "journal", "row numbers"}
    start(tmp_path, *job, prelude=NO_FILES)
    start(tmp_path, *job, command="retry", prelude=NO_FILES)
    start(tmp_path, *job, command="audit", prelude=NO_FILES)
    assert kinds(tmp_path / "out") == {"JSON", "Parquet", "dataset card"}
    assert len(records(tmp_path)) == 30


def kinds(folder: Path) -> set[str]:
    """What the files below a folder are. None may be of another kind, which is what a pickle would be."""
    return {kind(path) for path in folder.rglob("*") if path.is_file()}


def kind(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith(b"vlmbatchj1\n"):
        return "journal"
    if content.startswith(b"PAR1") and content.endswith(b"PAR1"):
        pq.ParquetFile(path).close()
        return "Parquet"
    if path.name == "README.md" and content.startswith(b"---\n"):
        return "dataset card"
    if path.suffix == ".taken" and len(content) % 8 == 0:
        return "row numbers"
    try:
        json.loads(content)
    except ValueError:
        raise AssertionError(f"{path} is of an unknown kind: {content[:20]!r}") from None
    return "JSON"


def calls(path: Path) -> set[str]:
    """What a file calls that could read or write a pickle, as `module.function`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {name for name in names if name.split(".")[0] in PICKLERS}
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            name = f"{node.func.value.id}.{node.func.attr}"
            if name in ("torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle") or name.startswith(
                "pickle."
            ):
                found.add(name)
    return found


def test_the_program_calls_nothing_that_reads_pickles_but_at_its_own_pipes() -> None:
    """Fault S-9: no file of the program calls pickle, torch.load, numpy.load or joblib, two ends of a pipe aside."""
    used = {path.relative_to(PIPELINE).as_posix(): calls(path) for path in PIPELINE.rglob("*.py")}
    assert len(used) > 80
    assert {name for name, found in used.items() if found} == OF_PIPES
    for name in OF_PIPES:
        assert used[name] <= {"pickle", "pickle.dumps", "pickle.loads"}, "no file: bytes of a pipe alone"


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "names",
    [
        ["plan.json"],
        ["plan/inputs.parquet"],
        ["data/part-00000.parquet", "work/part-00001.x.journal", "work/part-00001.x.taken", "work/part-00001.claim",
         "work/part-00000.g1.parquet", "stats/worker-0-0.json", "manifest.json", "state.pkl"],
    ],
    ids=["plan", "inputs", "others"],
)  # fmt: skip
def test_a_pickle_in_the_place_of_a_file_of_a_run_is_not_read(names: list[str], tmp_path: Path) -> None:
    """Fault S-9: whoever may write into the output folder has nothing run by the next start, status or audit."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"image": data_uri(n)}) for n in range(1, 5)))
    job = ["dataset=jsonl", "dataset.path=rows.jsonl", "write.shard_rows=2"]
    start(tmp_path, *job, crash_at="shard_settled:2", code=-9)
    for name in names:
        path = tmp_path / "out" / name
        path.unlink(missing_ok=True)
        path.write_bytes(pickle.dumps(Canary(tmp_path / "touched")))
    for command in ("status", "run", "audit"):
        printed = start(tmp_path, *job, command=command, code=None)
        assert "Traceback" not in printed
    assert not (tmp_path / "touched").exists()
    if "manifest.json" in names:
        assert [row["status"] for row in records(tmp_path)] == ["ok"] * 4


def test_weights_in_a_pickle_are_read_as_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault S-9: vlm.allow_pickle=true reads *.bin files with torch.load(weights_only=True), whatever they hold."""
    folder = tmp_path / "model"
    shutil.copytree(PIPELINE / "vlm" / "demo", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked: list[Any] = []
    real = torch.load

    def load(*words: Any, **options: Any) -> Any:
        asked.append(options.get("weights_only"))
        return real(*words, **options)

    monkeypatch.setattr(torch, "load", load)
    config = VlmConfig(path=str(folder), device="cpu", allow_pickle=True)
    before = torch.get_num_threads()
    load_model(config, identify(config), num_threads=1)
    torch.set_num_threads(before)
    assert asked
    assert set(asked) == {True}
