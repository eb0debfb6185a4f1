"""A plan before it is written: of a source as it is now, or grown by what was added to the source since.

`run` writes it (pipeline/planning.py); `vlm-batch plan` only looks at it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset.base import Inputs
from pipeline.errors import UsageError
from pipeline.plan import LOCATIONS, Plan, Settings, fingerprint, source_identity, versions
from pipeline.write.schema import SCHEMA_VERSION

_MAX_ROWS = "dataset.max_rows"


def refuse_nothing_asked(shard_rows: int, num_samples: int, prompt_names: Sequence[str]) -> None:
    """Refuse a plan without records.

    Raises:
        UsageError: nothing is asked about a row, or a shard has no rows.
    """
    if min(shard_rows, num_samples, len(prompt_names)) < 1:
        raise UsageError(
            f"write.shard_rows={shard_rows}, generation.n={num_samples}, {len(prompt_names)} prompts: each must be at "
            "least 1."
        )


def versioned(settings: Settings) -> dict[str, object]:
    """Settings with the version of what a run writes."""
    return dict(settings) | {"schema_version": SCHEMA_VERSION}


def drafted(
    inputs: Inputs,
    settings: Settings,
    *,
    max_rows: int | None,
    shard_rows: int,
    prompt_names: Sequence[str],
    num_samples: int,
) -> tuple[Plan, bytes]:
    """The first plan of a source, and the content of its inputs file.

    settings: without the source's identity.
    """
    identity = source_identity(inputs, max_rows)
    settings = dict(settings) | identity
    content = inputs_content(inputs)
    plan = Plan(
        plan_id=uuid.uuid4().hex,  # never from a clock: jobs start in the same second
        fingerprint=fingerprint(settings),
        settings=settings,
        num_rows=identity["dataset.num_rows"],
        extents=(identity["dataset.num_rows"],),
        shard_rows=shard_rows,
        prompt_names=tuple(prompt_names),
        num_samples=num_samples,
        root=inputs.root,
        inputs_sha256=hashlib.sha256(content).hexdigest(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions(),
    )
    return plan, content


def may_grow(plan: Plan, settings: Settings) -> bool:
    """Whether settings differ from a plan's in nothing but the source's extent, and where things lie."""
    may_differ = (*LOCATIONS, _MAX_ROWS)
    return all(settings[name] == plan.settings.get(name) for name in settings if name not in may_differ)


def grown_plan(plan: Plan, inputs: Inputs, settings: Settings, max_rows: int | None) -> tuple[Plan, bytes] | None:
    """A plan with what was added behind what it has, and the content of its inputs file; None where that is nothing.

    inputs: what is planned and what was added (dataset.extend.extended_inputs).
    """
    identity = source_identity(inputs, max_rows)
    num_rows = identity["dataset.num_rows"]
    same_limit = settings.get(_MAX_ROWS) == plan.settings.get(_MAX_ROWS)
    if num_rows < plan.num_rows or (num_rows == plan.num_rows and same_limit):
        return None
    content = inputs_content(inputs)
    sha256 = hashlib.sha256(content).hexdigest()
    grown = replace(
        plan,
        settings=dict(plan.settings) | identity | {_MAX_ROWS: settings.get(_MAX_ROWS)},
        num_rows=num_rows,
        extents=(*plan.extents, num_rows) if num_rows > plan.num_rows else plan.extents,
        inputs_file=f"plan/inputs-{sha256[:12]}.parquet",  # the one that the plan names stays until then
        inputs_sha256=sha256,
    )
    return grown, content


def inputs_content(inputs: Inputs) -> bytes:
    """The bytes of plan/inputs.parquet: the same for the same source, wherever it lies."""
    columns = base64.b64encode(inputs.columns.serialize().to_pybytes()).decode()
    header = json.dumps({"revision": inputs.revision, "columns": columns})
    sink = pa.BufferOutputStream()
    files = inputs.files.replace_schema_metadata({b"vlm_batch_inputs": header.encode()})
    pq.write_table(files, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())
