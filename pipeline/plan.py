"""The plan: which rows lie in which shard, under which settings. Fixed by the first start, only read afterwards.

    OUTPUT_DIR/plan.json            small: plan_id, settings and their fingerprint, counts, versions
    OUTPUT_DIR/plan/inputs.parquet  the source's files in order, with sizes and row counts (dataset.base.FILES_SCHEMA)

plan.json appears by an exclusive create: of two first starts one wins, and the other obeys its plan. A later start
compares its settings with the plan's and reads nothing of the source to do so.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.base import Inputs
from pipeline.errors import RunFailed, SettingsChanged, UsageError
from pipeline.records import Shard
from pipeline.write.schema import SCHEMA_VERSION
from pipeline.write.shard import shard_files

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
    inputs_sha256: str  # of plan/inputs.parquet
    created: str  # UTC
    versions: Mapping[str, str]
    schema_version: int = SCHEMA_VERSION

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
        RunFailed: plan.json is there and is not a plan.
    """
    path = output_dir / PLAN_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fields = json.loads(text)
        return Plan(**fields | {"prompt_names": tuple(fields["prompt_names"])})
    except (ValueError, TypeError, KeyError) as problem:
        raise RunFailed(
            f"{path} is not a plan of this program ({problem}). Restore it or choose another output_dir."
        ) from None


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
    return Inputs(header["root"], files.replace_schema_metadata(None), columns, header["revision"])


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
        UsageError: the folder holds shards but no plan.
        RunFailed: the folder cannot be written.
    """
    if plan := read_plan(output_dir):
        refuse_changes(output_dir, plan, settings, scan, max_rows)
        return plan
    if next(shard_files(output_dir / "data"), None):
        raise UsageError(
            f"{output_dir} holds shards but no {PLAN_FILE}. Restore {PLAN_FILE}, or choose another output_dir."
        )
    make_folders(output_dir)
    inputs = scan()
    identity = source_identity(inputs, max_rows)
    settings = dict(settings) | identity
    inputs_sha256 = _write_inputs(output_dir, inputs)
    plan = Plan(
        plan_id=uuid.uuid4().hex,  # never from a clock: jobs start in the same second
        fingerprint=fingerprint(settings),
        settings=settings,
        num_rows=identity["dataset.num_rows"],
        shard_rows=shard_rows,
        prompt_names=tuple(prompt_names),
        num_samples=num_samples,
        inputs_sha256=inputs_sha256,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions(),
    )
    if not _create(output_dir / PLAN_FILE, json.dumps(asdict(plan), indent=1).encode()):
        plan = read_plan(output_dir) or plan  # another first start was quicker: its plan holds
        refuse_changes(output_dir, plan, settings, scan, max_rows)
    return plan


def refuse_changes(
    output_dir: Path, plan: Plan, settings: Settings, scan: Callable[[], Inputs], max_rows: int | None
) -> None:
    """Compare the settings of a start with the plan's.

    Raises:
        SettingsChanged: field by field what differs, and the ways out.
    """
    now = dict(settings)
    if now.get(SOURCE) == plan.settings.get(SOURCE):
        now |= {name: value for name, value in plan.settings.items() if name not in now and name.startswith("dataset.")}
    else:
        now |= source_identity(scan(), max_rows)
    names = sorted(set(now) | set(plan.settings))
    changed = [name for name in names if now.get(name) != plan.settings.get(name)]
    if not set(changed) - set(LOCATIONS):
        return
    width = max(map(len, changed))
    lines = [
        f"  {name:{width}}  was {_shown(plan.settings.get(name))}, now {_shown(now.get(name))}" for name in changed
    ]
    raise SettingsChanged(
        f"{output_dir} was planned with other settings; answers of two settings would mix:\n"
        + "\n".join(lines)
        + "\nChoose another output_dir for the new settings, or start with the old ones to go on. Nothing was changed."
    )


def make_folders(output_dir: Path) -> None:
    """Make the output folder and prove that it can be written, before any model loads.

    Raises:
        RunFailed: it cannot be made or written.
    """
    try:
        for folder in (output_dir, output_dir / "plan", output_dir / "data", output_dir / "work", output_dir / "stats"):
            folder.mkdir(parents=True, exist_ok=True)
        for name in ("plan", "data", "work", "stats"):
            probe = output_dir / name / f".probe-{uuid.uuid4().hex}"
            probe.touch(exist_ok=False)
            probe.unlink()
    except OSError as problem:
        raise RunFailed(f"output_dir {output_dir} cannot be written: {problem}. Choose a writable folder.") from problem


def versions() -> dict[str, str]:
    """Installed versions of what may change numerics; read from metadata, nothing is imported."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write_inputs(output_dir: Path, inputs: Inputs) -> str:
    columns = base64.b64encode(inputs.columns.serialize().to_pybytes()).decode()
    header = json.dumps({"root": inputs.root, "revision": inputs.revision, "columns": columns})
    files = inputs.files.replace_schema_metadata({b"vlm_batch_inputs": header.encode()})
    final = output_dir / INPUTS_FILE
    beside = final.with_name(f"inputs.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "xb") as file:
            pq.write_table(files, file, compression="zstd", write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        digest = _sha256(beside)
        # Without a plan.json what lies here is a start that was killed, or one that races us with the same source: the
        # plan names the hash of its inputs, so a mix of two starts is refused and never read.
        if not final.exists() or _sha256(final) != digest:
            os.replace(beside, final)
        return digest
    except OSError as problem:
        raise RunFailed(f"{final} cannot be written: {problem}.") from problem
    finally:
        beside.unlink(missing_ok=True)


def _create(path: Path, content: bytes) -> bool:
    """Publish a small file under a name that must not exist; False if another process was quicker."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(beside, path)
        return True
    except FileExistsError:
        return False
    except OSError as problem:
        raise RunFailed(f"{path} cannot be written: {problem}.") from problem
    finally:
        beside.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
