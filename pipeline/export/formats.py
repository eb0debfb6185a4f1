"""The formats. Each is a module of this folder that has

OBEYED              names of the options that it obeys
ERRORS              what becomes of error records where `errors` is not given
export(selection, options, output_dir)   writes them, and says where, as a phrase behind "1,210 records"
"""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.errors import UsageError
from pipeline.export.options import Errors, ExportOptions, Format, refuse_idle_words
from pipeline.export.selection import Selection
from pipeline.results import results_of_run
from pipeline.write.file import Place

_MODULES = {Format.txt: "sidecars", Format.caption: "sidecars"}  # the others: as the format


def exported(output_dir: Place, options: ExportOptions) -> tuple[Selection, str]:
    """Export a run: what was written and what was not, and where it is, as a phrase.

    Raises:
        UsageError: a word is missing, unknown or means nothing here, the run is not finished, or something is there
            already. Nothing was written.
        RunFailed: something cannot be read or written.
    """
    if options.format is None:
        raise UsageError(f"format= is not given. Formats: {', '.join(Format)}. See vlm-batch export --help.")
    module: Any = importlib.import_module(f"pipeline.export.{_MODULES.get(options.format, options.format)}")
    refuse_idle_words(options, module.OBEYED)
    results = results_of_run(output_dir)
    if not results.complete and not options.partial:
        assert results.plan is not None
        raise UsageError(
            f"{output_dir} is not finished: {results.num_records:,} of {results.plan.num_records:,} records are "
            "published. Run it to its end, or take what is there with partial=true."
        )
    errors: Errors = options.errors or module.ERRORS
    selection = Selection(results, options, with_errors=errors is Errors.include)
    return selection, module.export(selection, options, output_dir)


def export_lines(selection: Selection, where: str, options: ExportOptions) -> list[str]:
    """What was written and what was not, as people read it."""
    number = selection.num_written
    lines = [f"written  {number:,} record{'' if number == 1 else 's'} as {options.format}, {where}"]
    if selection.left_out:
        lines.append(f"left out {selection.left_out.total():,}")
        lines += [f"           {number:,} x {why}" for why, number in selection.left_out.most_common()]
    if selection.failed:
        lines.append(f"failed   {selection.failed.total():,}")
        lines += [
            f"           {number:,} x {why}, e.g. {selection.examples[why]!r}"
            for why, number in selection.failed.most_common()
        ]
    return lines
