"""vlm-batch diff, from its words to its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.diff.comparison import Comparison, PairBlock, compare
from pipeline.diff.lines import summary_lines
from pipeline.diff.options import DiffOptions
from pipeline.diff.page import diff_page
from pipeline.diff.pairs import Pairs, paired
from pipeline.diff.rows import changed_rows_file, identity_columns
from pipeline.diff.scores import Scores
from pipeline.diff.side import Side, open_side
from pipeline.diff.similarity import require_rapidfuzz
from pipeline.diff.summary import summary
from pipeline.errors import RunFailed, UsageError
from pipeline.shown import shown
from pipeline.write.file import Place, place, prove_writable, replace_file
from pipeline.write.object_store import ObjectPath


def run_diff(options: DiffOptions) -> int:
    """Compare, say what was found, and write it down.

    Returns:
        0; 1 where fewer records than options.min_same asks for are the same.

    Raises:
        UsageError: what is asked for cannot be: see open_side(), paired(), compare().
        RunFailed: a file cannot be read or written.
    """
    require_rapidfuzz()
    if bool(options.metric) != bool(options.reference):
        raise UsageError("reference=COLUMN and metric=[...] belong together; one of them is missing.")
    a = open_side("a", options.a, prompt=options.a_prompt, response=options.a_response)
    b = open_side("b", options.b, prompt=options.b_prompt, response=options.b_response)
    json_path = _output(b, "diff.json", "diff_output", options.diff_output)
    html_path = _output(b, "diff.html", "html", options.html)
    pairs = paired(a, b, options.key)
    scores = Scores(a, b, pairs, options) if options.reference is not None else None
    comparison = _compared(a, b, pairs, options, scores)
    found = summary(a, b, comparison, scores, seed=options.seed)
    _write(json_path, json.dumps(found, indent=1, ensure_ascii=False))
    for line in summary_lines(found):
        print(shown(line))
    print(shown(f"counts    {json_path}"))
    if options.changed_rows is not None:
        print(shown(f"rows      {options.changed_rows}"))
    if options.html_rows:
        page = diff_page(a, b, comparison, found, scores, most=options.html_rows, seed=options.seed, root=options.root)
        _write(html_path, page)
        print(shown(f"page      {html_path}"))
    return _exit_code(found, options.min_same)


def _compared(a: Side, b: Side, pairs: Pairs, options: DiffOptions, scores: Scores | None) -> Comparison:
    columns = scores.columns if scores else ([], [])
    file: Any = nullcontext()
    if options.changed_rows is not None:
        for side, key, more in zip((a, b), pairs.key_columns, columns, strict=True):
            more += identity_columns(side, key)
        file = changed_rows_file(place(options.changed_rows), a, b, pairs)
    with file as write:
        seen: list[Callable[[PairBlock], None]] = [write] if write is not None else []
        if scores is not None:
            seen.append(scores.add)

        def see(block: PairBlock) -> None:
            for one in seen:
                one(block)

        return compare(a, b, pairs, by=options.by, a_columns=columns[0], b_columns=columns[1], see=see)


def _output(b: Side, name: str, word: str, given: str | None) -> Place:
    """Where a file of this name goes: as the words say, else into the folder of the run b, else into this folder.

    Raises:
        UsageError: nothing can be written there.
    """
    folder = b.results.path if b.results.plan is not None else Path()
    path = place(given) if given is not None else folder / name
    try:
        prove_writable(path.parent)
    except OSError as problem:
        raise UsageError(
            f"{path} cannot be written: {problem.strerror or problem}. Say where it may be: {word}=FILE."
        ) from None
    return path


def _write(path: Place, text: str) -> None:
    content = text.encode("utf-8", "replace")
    try:
        if isinstance(path, ObjectPath):
            path.replace(content)
        else:
            replace_file(path, content, beside=path.parent)
    except OSError as problem:
        raise RunFailed(f"{path} cannot be written: {problem.strerror or problem}.") from problem


def _exit_code(found: Mapping[str, Any], min_same: float | None) -> int:
    if min_same is None or found["share_same"] >= min_same:
        return 0
    print(
        f"FAILED    {found['share_same']:.4%} of {found['num_records']:,} records are the same; min_same={min_same:g}"
    )
    return 1
