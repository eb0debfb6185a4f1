"""vlm-batch audit: the proof that every row of the plan has exactly one record."""

from __future__ import annotations

from pipeline.audit import AuditOptions, audit, audit_lines
from pipeline.commands.base import Call
from pipeline.shown import shown

Options = AuditOptions


def execute(call: Call) -> int:
    output_dir = call.output_dir
    found = audit(output_dir, call.options)
    for line in audit_lines(output_dir, found):
        print(shown(line))
    return 0 if found.passed else 1
