"""The plan: which rows lie in which shard, under which settings. Fixed by the first start, and only ever grows.

    OUTPUT_DIR/plan.json            small: plan_id, settings and their fingerprint, counts, versions
    OUTPUT_DIR/plan/inputs.parquet  the source's files in order, with sizes and row counts (dataset.base.FILES_SCHEMA)

Shards are cut by rows, from row 0 and anew from where each extension began: a shard that is finished is never re-cut.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import itertools
import json
import logging
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.base import Inputs
from pipeline.errors import RunFailed, UsageError
from pipeline.records import Shard
from pipeline.redaction import with_credentials
from pipeline.write.file import Place, open_read
from pipeline.write.goal import PLAN_FILE

log = logging.getLogger(__name__)

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
    inputs_sha256: str  # of inputs_file
    created: str  # UTC
    versions: Mapping[str, str]
    extents: tuple[int, ...]  # the number of rows at first, and after each extension
    inputs_file: str = "plan/inputs.parquet"

    @property
    def num_shards(self) -> int:
        return sum(number for _, _, number in self._parts())

    @property
    def num_records(self) -> int:
        return self.num_rows * self.records_per_row

    @property
    def records_per_row(self) -> int:
        return len(self.prompt_names) * self.num_samples

    def shard(self, number: int) -> Shard:
        first = 0
        for start, stop, num_shards in self._parts():
            if number < first + num_shards:
                start += (number - first) * self.shard_rows
                return Shard(number, start, min(start + self.shard_rows, stop))
            first += num_shards
        raise IndexError(f"shard {number} of a plan of {first}")

    def _parts(self) -> Iterator[tuple[int, int, int]]:
        """First and last row of the plan's first form and of each extension, and their number of shards."""
        for start, stop in itertools.pairwise((0, *self.extents)):
            yield start, stop, -(-(stop - start) // self.shard_rows)


def fingerprint(settings: Settings) -> str:
    """One hash over everything that changes answers."""
    meaning = {name: value for name, value in settings.items() if name not in LOCATIONS}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def source_identity(inputs: Inputs, max_rows: int | None) -> dict[str, Any]:
    """What makes a source this source: relative paths, sizes and row counts; never dates or where it is mounted."""
    digest = hashlib.sha256()
    rows = pa.TableGroupBy(inputs.files, "path").aggregate([("size_bytes", "max"), ("num_rows", "sum")])
    files = rows.select(["path", "size_bytes_max", "num_rows_sum"]).sort_by("path")  # extensions come out of order
    for name in files.column_names:
        values = "\0".join(map(str, files[name].to_pylist()))
        digest.update(values.encode("utf-8", "surrogatepass"))
    total = sum(inputs.files["num_rows"].to_pylist())
    return {
        "dataset.files_sha256": digest.hexdigest(),
        "dataset.num_rows": total if max_rows is None else min(total, max_rows),
        "dataset.revision_found": inputs.revision,
    }


def read_plan(output_dir: Place) -> Plan | None:
    """The plan of an output folder; None where there is none.

    Raises:
        RunFailed: plan.json is there and is not a plan, or cannot be read.
    """
    path = output_dir / PLAN_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as problem:
        raise RunFailed(f"{path} cannot be read: {problem}.") from problem
    try:
        fields = json.loads(text)
        return Plan(**fields | {name: tuple(fields[name]) for name in ("prompt_names", "extents")})
    except (ValueError, TypeError, KeyError) as problem:
        raise RunFailed(
            f"{path} is not a plan of this program ({problem}). Restore it or choose another output_dir."
        ) from None


def plan_of_run(output_dir: Place) -> Plan:
    """The plan of a folder that has to hold a run.

    Raises:
        UsageError: there is no run in this folder.
    """
    plan = read_plan(output_dir)
    if plan is None:
        raise UsageError(f"{output_dir} holds no run (there is no {PLAN_FILE}). Give its folder as output_dir=...")
    return plan


def read_inputs(output_dir: Place, plan: Plan, address: str = "") -> Inputs:
    """The source as the plan recorded it.

    address: of the source as it is given now: its user and password, which the plan has not.

    Raises:
        RunFailed: its file is missing or belongs to another plan.
    """
    path = output_dir / plan.inputs_file
    if not path.exists() or _sha256(path) != plan.inputs_sha256:
        raise RunFailed(
            f"{path} is missing or does not belong to {output_dir / PLAN_FILE}. "
            "Restore it, or choose another output_dir."
        )
    with open_read(path) as file:
        files = pq.read_table(file)
    header = json.loads(files.schema.metadata[b"vlm_batch_inputs"])
    columns = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(header["columns"])))
    root = with_credentials(plan.root, address)
    return Inputs(root, files.replace_schema_metadata(None), columns, header["revision"])


def versions() -> dict[str, str]:
    """Installed versions of what may change numerics; read from metadata, nothing is imported."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def changed_versions(plan: Plan) -> dict[str, str]:
    """The versions of now that are others than when the plan was made; a warning says so."""
    changed = {name: version for name, version in versions().items() if plan.versions.get(name) != version}
    if changed:
        log.warning(
            "other versions than when the run began: %s; answers may differ in the last bits, and their shards say so",
            ", ".join(f"{name} {now} (was {plan.versions.get(name, 'unknown')})" for name, now in changed.items()),
        )
    return changed


def _sha256(path: Place) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
