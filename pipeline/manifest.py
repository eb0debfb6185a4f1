"""manifest.json: what a finished run was made with and what came out, for whoever finds the folder later."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from contextlib import suppress

from pipeline.card import write_card
from pipeline.errors import RunFailed
from pipeline.status import Status, read_status
from pipeline.write.claim import Claims
from pipeline.write.crash_point import crash_point
from pipeline.write.file import Place, replace_file
from pipeline.write.retry import strays


def conclude(output_dir: Place, *, is_retry: bool) -> None:
    """Write the manifest, unless another rank is just at it: each would read what all have done.

    is_retry: of a run that need not be whole.

    Raises:
        RunFailed: it could not be written, or something else lies under the name of a shard.
    """
    with Claims(output_dir / "work", uuid.uuid4().hex[:12]) as claims:
        if not claims.take("manifest"):
            return
        status = read_status(output_dir, ended=True)
        if not write_manifest(output_dir, status) and not is_retry:
            left = status.plan.num_shards - status.num_shards_done
            raise RunFailed(
                f"{left} files in {output_dir / 'data'} have names of shards and are none of this run, or went away "
                "meanwhile. The same command with one worker (cluster=local) makes those shards."
            )


def write_manifest(output_dir: Place, status: Status) -> bool:
    """Write the manifest and clear away work/ once every shard is published; False while some are not.

    Raises:
        RunFailed: the manifest could not be written.
    """
    if not status.complete:
        return False
    plan, errors = status.plan, status.errors
    numerics = Counter(json.dumps(dict(summary.numerics), sort_keys=True) for summary in status.shards.values())
    content = {
        "plan_id": plan.plan_id,
        "fingerprint": plan.fingerprint,
        "created": plan.created,
        "settings": plan.settings,
        "versions": plan.versions,
        "numerics": [{"num_shards": number} | json.loads(kind) for kind, number in numerics.most_common()],
        "parity": [worker["parity"] for worker in status.workers if "parity" in worker],
        "num_rows": plan.num_rows,
        "num_records": plan.num_records,
        "num_shards": plan.num_shards,
        "num_errors": sum(errors.values()),
        "errors": errors,
        "num_generated_tokens": sum(summary.num_generated_tokens for summary in status.shards.values()),
    }
    path, work_dir = output_dir / "manifest.json", output_dir / "work"
    text = json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "replace")
    crash_point("manifest_ready")
    try:
        if not _holds(path, text):
            replace_file(path, text, beside=work_dir)
    except OSError as problem:
        if not _holds(path, text):  # else another worker wrote the same and cleared work/ away under our hands
            raise RunFailed(f"{path} cannot be written: {problem}.") from problem
    crash_point("manifest_written")
    write_card(output_dir, status)
    for stray in strays(work_dir, {plan.shard(number).name: one.generation for number, one in status.shards.items()}):
        stray.unlink(missing_ok=True)
        crash_point("stray_removed")
    with suppress(OSError):  # another worker may still be closing, or somebody keeps notes there
        work_dir.rmdir()
    return True


def _holds(path: Place, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
