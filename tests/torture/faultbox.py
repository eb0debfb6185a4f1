"""What the tests that break a run are made of: a job with known answers, ways to start and to kill it, and the proof.

What holds always (after every kill, and in the eyes of a reader meanwhile): every visible shard is whole, carries the
plan's id, and each of its answers is the right one; no key stands in two files; nothing outside the output folder
changes. What holds at the end: as many records as keys, nothing left in work/, a further start does nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from fake_model import LOG, right_answer
from PIL import Image

from pipeline.prompt.image import open_image
from pipeline.records import ImageRef
from pipeline.write.crash_point import VARIABLE

HERE = Path(__file__).parent
PROGRAM = [sys.executable, "-c", "import fake_model; fake_model.start()"]
PROMPT = "What is it?"
NUM_BROKEN = 7  # every so many rows, one whose file is no picture
KILLED = -signal.SIGKILL


def make_pictures(folder: Path, first: int, last: int, seed: int = 0) -> None:
    """So many files: tiny pictures, some of them alike, and now and then one that is none."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng([seed, first])
    for number in range(first, last):
        path = folder / f"{number:05d}.png"
        if number % NUM_BROKEN == NUM_BROKEN - 1:
            path.write_bytes(rng.bytes(number % 40))
            continue
        encoded = io.BytesIO()
        size = (int(rng.integers(1, 9)), int(rng.integers(1, 9)), 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(encoded, "PNG")
        path.write_bytes(encoded.getvalue())


def right_records(folder: Path) -> dict[str, str | None]:
    """What a run over the folder has to answer, by id; None for an error record."""
    found: dict[str, str | None] = {}
    for path in sorted(folder.iterdir()):
        number = int(path.stem)
        broken = number % NUM_BROKEN == NUM_BROKEN - 1
        image = None if broken else open_image(ImageRef(path=str(path)), max_image_pixels=100).image
        found[path.name] = None if image is None else right_answer([image], PROMPT)
    return found


@dataclass(slots=True)
class Found:
    """What a torture came to; the table of docs/faults.md is made of these."""

    num_faults: int = 0
    num_lost: int = 0  # rows
    num_doubled: int = 0
    num_wrong: int = 0  # another answer than the right one
    num_redone: int = 0  # rows that were generated more than once
    most_redone: int = 0  # by one start
    num_forgotten: int = 0  # rows generated again though a journal had them
    seeds: list[int] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.num_lost or self.num_doubled or self.num_wrong or self.num_forgotten)


class Box:
    """One job in a folder of its own.

    Args:
        words: further settings of the job.
    """

    def __init__(self, folder: Path, num_rows: int, *words: str, shard_rows: int = 50, seed: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.source, self.output = folder, folder / "pictures", folder / "out"
        self.log = folder / "log"
        self.num_rows, self.shard_rows = num_rows, shard_rows
        make_pictures(self.source, 0, num_rows, seed)
        self.right = right_records(self.source)
        self.response_column = "response"
        self.environment: dict[str, str] = {}  # what every start has besides
        self.mended: dict[str, str] = {}  # what error rows may say once they were asked again
        self._outside = self._all_but_output()
        self.words = [
            "dataset=images", f"dataset.path={self.source}", f"output_dir={self.output}",
            f"prompt.user={PROMPT}", f"write.shard_rows={shard_rows}", "write.sync_seconds=0.05", "vlm=demo",
            "write.response_column=response", "max_error_rate=null", "engine.num_workers=1",
            "engine.parity_rows=0", "report=false", *words,
        ]  # fmt: skip

    def mend(self) -> None:
        """Put a picture in the place of every other file that is none, as people do before a retry."""
        for path in sorted(self.source.iterdir())[NUM_BROKEN - 1 :: 2 * NUM_BROKEN]:
            encoded = io.BytesIO()
            Image.new("RGB", (3, 2), (int(path.stem) % 256, 1, 2)).save(encoded, "PNG")
            path.write_bytes(encoded.getvalue())
            image = open_image(ImageRef(path=str(path)), max_image_pixels=100).image
            self.mended[path.name] = right_answer([image], PROMPT)
        self.look_again()

    def grow(self, num_rows: int) -> None:
        """More pictures behind those that are there; what is there fills its shards."""
        assert self.num_rows % self.shard_rows == 0
        make_pictures(self.source, self.num_rows, self.num_rows + num_rows)
        self.num_rows += num_rows
        self.right = right_records(self.source)
        self.look_again()

    def look_again(self) -> None:
        """What lies outside the output folder was changed on purpose."""
        self._outside = self._all_but_output()

    def start(self, *words: str, crash_at: str = "", command: str = "run") -> subprocess.Popen[str]:
        """The job's command, once, in a process group of its own."""
        environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}", LOG: str(self.log)}
        environment |= self.environment
        environment.pop(VARIABLE, None)
        if crash_at:
            environment[VARIABLE] = crash_at
        return subprocess.Popen(
            [*PROGRAM, command, *self.words, *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, crash_at: str = "", command: str = "run", code: int = 0, timeout: float = 120) -> str:
        """The job's command to its end; what it printed."""
        process = self.start(*words, crash_at=crash_at, command=command)
        printed, _ = process.communicate(timeout=timeout)
        assert process.returncode == code, f"exit code {process.returncode}, expected {code}\n{printed}"
        return printed

    def made(self) -> Counter[str]:
        """How often each key was generated."""
        return Counter(key for what, key in self._log() if what == "made")

    def began(self) -> list[str]:
        """The attempts of workers that found something to do."""
        return [attempt for what, attempt in self._log() if what == "began"]

    def check_always(self) -> None:
        """What a reader may see at any moment."""
        plan_path = self.output / "plan.json"
        shards = sorted((self.output / "data").glob("*")) if (self.output / "data").exists() else []
        assert plan_path.exists() or not shards
        plan_id = json.loads(plan_path.read_text())["plan_id"] if shards else None
        seen: set[str] = set()
        for path in shards:
            assert path.suffix == ".parquet", f"{path} is in data/"
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                rows = file.read().to_pylist()
            assert {row["run_id"] for row in rows} == {plan_id}
            start = int(path.stem.partition("-")[2]) * self.shard_rows
            assert [row["row_index"] for row in rows] == list(range(start, min(start + self.shard_rows, self.num_rows)))
            for row in rows:
                assert row["id"] not in seen, f"{row['id']} stands in two shards"
                seen.add(row["id"])
                right = self.mended.get(row["id"]) if row["attempt"] > 1 else self.right[row["id"]]
                answer = row[self.response_column]
                assert answer == right, f"{row['id']}: a wrong answer"
                assert (row["status"] == "error") == (answer is None)
        assert self._all_but_output() == self._outside, "something outside the output folder changed"

    def finish(self, found: Found, command: str = "run") -> Found:
        """Run until the job is done, prove that nothing is lost, and count what was done again."""
        self.run(command=command)
        self.check_always()
        rows = pq.read_table(self.output / "data").select(["id", "row_index"]).to_pylist()
        counts = Counter(row["id"] for row in rows)
        found.num_lost += len(self.right.keys() - counts.keys())
        found.num_doubled += sum(number - 1 for number in counts.values())
        made = self.made()
        found.num_redone += sum(number - 1 for number in made.values())
        found.num_forgotten += len(self._forgotten())
        assert not (self.output / "work").exists(), "work/ is left"
        before = {path: path.read_bytes() for path in (self.output / "data").iterdir()}
        self.run()
        assert self.made() == made, "a run that was done has generated again"
        assert {path: path.read_bytes() for path in (self.output / "data").iterdir()} == before
        return found

    def _forgotten(self) -> set[str]:
        """Keys that were generated again after a journal had them on disk."""
        kept: set[str] = set()
        forgotten = set()
        for what, key in self._log():
            if what == "kept":
                kept.add(key)
            elif key in kept:
                forgotten.add(key)
        return forgotten

    def _log(self) -> list[tuple[str, str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(what, key) for what, _, key in (line.partition(" ") for line in lines)]

    def _all_but_output(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, folders, names in os.walk(self.folder):
            # not into the output folder: its files and folders go away while a run is at work
            folders[:] = [name for name in folders if Path(folder, name) != self.output]
            for path in (Path(folder, name) for name in names):
                if path.is_file() and path != self.log:
                    found[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns)
        return found


class Watcher:
    """A reader that looks at the output the whole time, as a dashboard would."""

    def __init__(self, box: Box) -> None:
        self._box, self._ended = box, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.num_looks = 0
        self.problem: BaseException | None = None

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self.problem is not None:
            raise self.problem

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            try:
                self._box.check_always()
            except BaseException as problem:
                self.problem = problem
                return
            self.num_looks += 1


def kill_at_random(box: Box, rng: random.Random, *, seconds: tuple[float, float], num_processes: int = 1) -> bool:
    """Start the job, and kill all of it after a random time; False where it was done before."""
    processes = [box.start() for _ in range(num_processes)]
    time.sleep(rng.uniform(*seconds))
    done = all(process.poll() == 0 for process in processes)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return not done
