"""The plan: which rows lie in which shard, under which settings. Fixed by the first start, only read afterwards.

    OUTPUT_DIR/plan.json            small: plan_id, settings and their fingerprint, counts, versions
    OUTPUT_DIR/plan/inputs.parquet  the source's files in order, with sizes and row counts (dataset.base.FILES_SCHEMA)

plan.json appears by an exclusive create: of two first starts one wins, and the other obeys its plan. The inputs follow
it and carry the hash that it names, so that whoever finds them missing may scan again and put them there. A later start
compares its settings with the plan's and reads nothing of the source to do so.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.base import Inputs
from pipeline.errors import RunFailed, SettingsChanged, UsageError
from pipeline.records import Shard
from pipeline.write.file import create_file, prove_writable, replace_file
from pipeline.write.schema import SCHEMA_VERSION
from pipeline.write.shard import published_shards, shard_files

PLAN_FILE, INPUTS_FILE = "plan.json", "plan/inputs.parquet"
# Where something lies says nothing about what it is: source and model are compared by what is in them.
SOURCE = "dataset.path"
LOCATIONS = (SOURCE, "vlm.path", "vlm.revision")
_VERSIONS = ("vlm-batch", "torch", "transformers", "accelerate", "datasets", "pillow", "pyarrow", "hydra-core", "numpy")

Settings = Mapping[str, Any]  # dotted key -> JSON value: everything that changes answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the first start decided. `settings` includes the identity of model and source."""

    plan_id: str
    fingerprint: str
    settings: Settings
    num_rows: int
    shard_rows: int
    prompt_names: tuple[str, ...]
    num_samples: int
    root: str  # where the source lies; a start that finds it elsewhere goes by what it found
    inputs_sha256: str  # of plan/inputs.parquet
    created: str  # UTC
    versions: Mapping[str, str]

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows)

    @property
    def num_records(self) -> int:
        return self.num_rows * self.records_per_row

    @property
    def records_per_row(self) -> int:
        return len(self.prompt_names) * self.num_samples

    def shard(self, number: int) -> Shard:
        start = number * self.shard_rows
        return Shard(number, start, min(start + self.shard_rows, self.num_rows))

    def shard_of(self, row_index: int) -> Shard:
        return self.shard(row_index // self.shard_rows)


def fingerprint(settings: Settings) -> str:
    """One hash over everything that changes answers."""
    meaning = {name: value for name, value in settings.items() if name not in LOCATIONS}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def source_identity(inputs: Inputs, max_rows: int | None) -> dict[str, Any]:
    """What makes a source this source: relative paths, sizes and row counts; never dates or where it is mounted."""
    digest = hashlib.sha256()
    for name in ("path", "size_bytes", "num_rows"):
        values = "\0".join(map(str, inputs.files[name].to_pylist()))
        digest.update(values.encode("utf-8", "surrogatepass"))
    total = sum(inputs.files["num_rows"].to_pylist())
    return {
        "dataset.files_sha256": digest.hexdigest(),
        "dataset.num_rows": total if max_rows is None else min(total, max_rows),
        "dataset.revision_found": inputs.revision,
    }


def read_plan(output_dir: Path) -> Plan | None:
    """The plan of an output folder; None where there is none.

    Raises:
        RunFailed: plan.json is there and is not a plan, or cannot be read.
    """
    path = output_dir / PLAN_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as problem:
        raise RunFailed(f"{path} cannot be read: {problem}.") from problem
    try:
        fields = json.loads(text)
        return Plan(**fields | {"prompt_names": tuple(fields["prompt_names"])})
    except (ValueError, TypeError, KeyError) as problem:
        raise RunFailed(
            f"{path} is not a plan of this program ({problem}). Restore it or choose another output_dir."
        ) from None


def plan_of_run(output_dir: Path) -> Plan:
    """The plan of a folder that has to hold a run.

    Raises:
        UsageError: there is no run in this folder.
    """
    plan = read_plan(output_dir)
    if plan is None:
        raise UsageError(f"{output_dir} holds no run (there is no {PLAN_FILE}). Give its folder as output_dir=...")
    return plan


def read_inputs(output_dir: Path, plan: Plan) -> Inputs:
    """The source as the plan recorded it.

    Raises:
        RunFailed: plan/inputs.parquet is missing or belongs to another plan.
    """
    path = output_dir / INPUTS_FILE
    if not path.exists() or _sha256(path) != plan.inputs_sha256:
        raise RunFailed(
            f"{path} is missing or does not belong to {output_dir / PLAN_FILE}. "
            "Restore it, or choose another output_dir."
        )
    files = pq.read_table(path)
    header = json.loads(files.schema.metadata[b"vlm_batch_inputs"])
    columns = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(header["columns"])))
    return Inputs(plan.root, files.replace_schema_metadata(None), columns, header["revision"])


def open_plan(
    output_dir: Path,
    settings: Settings,
    *,
    scan: Callable[[], Inputs],
    max_rows: int | None,
    shard_rows: int,
    prompt_names: Sequence[str],
    num_samples: int,
) -> Plan:
    """The folder's plan if it has these settings, else a new one in a folder without a plan.

    settings: without the source's identity, which is taken from the plan where the source's path is unchanged.

    Raises:
        SettingsChanged: the folder was planned with other settings; nothing was touched.
        UsageError: the folder holds shards but no plan, or nothing is asked about a row; nothing was touched.
        RunFailed: the folder cannot be written.
    """
    if min(shard_rows, num_samples, len(prompt_names)) < 1:
        raise UsageError(
            f"write.shard_rows={shard_rows}, generation.n={num_samples}, {len(prompt_names)} prompts: each must be at "
            "least 1."
        )
    settings = dict(settings) | {"schema_version": SCHEMA_VERSION}
    if plan := read_plan(output_dir):
        found = refuse_changes(output_dir, plan, settings, scan, max_rows)
        if not (output_dir / INPUTS_FILE).exists():  # the first start was killed between the two files
            _place_inputs(output_dir, plan, _inputs_content(found or scan()))
        return plan if found is None else replace(plan, root=found.root)
    if next(shard_files(output_dir / "data"), None):
        raise UsageError(
            f"{output_dir} holds shards but no {PLAN_FILE}. Restore {PLAN_FILE}, or choose another output_dir."
        )
    try:
        prove_writable(output_dir)  # before a scan that may take minutes
    except OSError as problem:
        raise _unwritable(output_dir, problem) from problem
    inputs = scan()
    make_folders(output_dir)
    identity = source_identity(inputs, max_rows)
    settings |= identity
    content = _inputs_content(inputs)
    plan = Plan(
        plan_id=uuid.uuid4().hex,  # never from a clock: jobs start in the same second
        fingerprint=fingerprint(settings),
        settings=settings,
        num_rows=identity["dataset.num_rows"],
        shard_rows=shard_rows,
        prompt_names=tuple(prompt_names),
        num_samples=num_samples,
        root=inputs.root,
        inputs_sha256=hashlib.sha256(content).hexdigest(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions(),
    )
    try:
        won = create_file(
            output_dir / PLAN_FILE, json.dumps(asdict(plan), indent=1).encode(), beside=output_dir / "work"
        )
    except OSError as problem:
        raise _unwritable(output_dir, problem) from problem
    if not won:
        plan = read_plan(output_dir) or plan  # another first start was quicker: its plan holds
        refuse_changes(output_dir, plan, settings, lambda: inputs, max_rows)
        plan = replace(plan, root=inputs.root)
    _place_inputs(output_dir, plan, content)
    return plan


def refuse_changes(
    output_dir: Path, plan: Plan, settings: Settings, scan: Callable[[], Inputs], max_rows: int | None
) -> Inputs | None:
    """Compare the settings of a start with the plan's.

    Returns:
        What a scan found, if the source lies elsewhere than it did for the plan.

    Raises:
        SettingsChanged: field by field what differs, and the ways out.
    """
    now, found = dict(settings), None
    if now.get(SOURCE) == plan.settings.get(SOURCE) and not _source_is_gone(output_dir, plan):
        now |= {name: value for name, value in plan.settings.items() if name not in now and name.startswith("dataset.")}
    else:
        found = scan()
        now |= source_identity(found, max_rows)
    names = sorted(set(now) | set(plan.settings))
    changed = [name for name in names if now.get(name) != plan.settings.get(name)]
    if not set(changed) - set(LOCATIONS):
        return found
    width = max(map(len, changed))
    lines = [f"  {name:{width}}  {_difference(plan.settings.get(name), now.get(name))}" for name in changed]
    ways_out = "Choose another output_dir for the new settings, or start with the old ones to go on."
    if not _has_answers(output_dir):
        ways_out = f"It holds no answer yet: remove the folder {output_dir}, or choose another output_dir."
    raise SettingsChanged(
        f"{output_dir} was planned with other settings; answers of two settings would mix:\n"
        + "\n".join(lines)
        + f"\n{ways_out} Nothing was changed."
    )


def _has_answers(output_dir: Path) -> bool:
    journals = (path for path in (output_dir / "work").glob("*.journal") if path.stat().st_size)
    return next(shard_files(output_dir / "data"), None) is not None or next(journals, None) is not None


def make_folders(output_dir: Path) -> None:
    """Make the output folder and prove that it can be written, before any model loads.

    Raises:
        RunFailed: it cannot be made or written.
    """
    try:
        for name in ("plan", "data", "work", "stats"):
            (output_dir / name).mkdir(parents=True, exist_ok=True)
            prove_writable(output_dir / name)
    except OSError as problem:
        raise _unwritable(output_dir, problem) from problem


def versions() -> dict[str, str]:
    """Installed versions of what may change numerics; read from metadata, nothing is imported."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _inputs_content(inputs: Inputs) -> bytes:
    """The bytes of plan/inputs.parquet: the same for the same source, wherever it lies."""
    columns = base64.b64encode(inputs.columns.serialize().to_pybytes()).decode()
    header = json.dumps({"revision": inputs.revision, "columns": columns})
    sink = pa.BufferOutputStream()
    files = inputs.files.replace_schema_metadata({b"vlm_batch_inputs": header.encode()})
    pq.write_table(files, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def _place_inputs(output_dir: Path, plan: Plan, content: bytes) -> None:
    """Put plan/inputs.parquet in its place, if it is not there and is the one that the plan names."""
    path = output_dir / INPUTS_FILE
    if path.exists() or hashlib.sha256(content).hexdigest() != plan.inputs_sha256:
        return
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, content, beside=output_dir / "work")  # who else does this now has the same bytes
    except OSError as problem:
        raise _unwritable(output_dir, problem) from problem


def _source_is_gone(output_dir: Path, plan: Plan) -> bool:
    """Whether rows are still to be read from a folder that is not there any more, relative paths and moves included."""
    if "://" in plan.root or os.path.exists(plan.root):
        return False
    return len(published_shards(output_dir / "data", plan.plan_id)) < plan.num_shards


def _unwritable(output_dir: Path, problem: OSError) -> RunFailed:
    return RunFailed(f"output_dir {output_dir} cannot be written: {problem}. Choose a writable folder, or make room.")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(was: Any, now: Any) -> str:
    """Two values as JSON; long ones from shortly before the first place where they differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (was, now)]
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    start = max(0, same - 20)
    if max(map(len, texts)) > 80 and start:
        texts = ["..." + text[start:] for text in texts]
    texts = [text if len(text) <= 80 else text[:77] + "..." for text in texts]
    return "was {}, now {}".format(*texts)
