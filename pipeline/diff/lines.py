"""A comparison as people read it on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.diff.change import UNCHANGED, Change
from pipeline.redaction import redacted

_MOST_LINES = 12  # of each list; diff.json has all
_MAX_CHARACTERS = 100  # of a value


def summary_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of what summary() found."""
    for name in "ab":
        yield _side_line(name, found[name])
    yield f"compared  {found['num_compared']:,} records, joined by {found['joined_by']}"
    yield from _change_lines(found)
    yield from _similarity_lines(found)
    yield from _length_lines(found["num_generated_tokens"])
    for title, key in (("endings", "finish_reasons"), ("errors", "errors")):
        yield from _crossed_lines(title, found[key])
    for title, key, what in (
        ("images", "images", "were other ones"),
        ("prompts", "prompts", "were asked in other words"),
    ):
        if found[key]["num_different"]:
            yield f"{title:9} {found[key]['num_different']:,} of {found[key]['num_records']:,} {what}"
    for key in ("settings", "versions", "numerics"):
        yield from _difference_lines(key, found[key])
    yield from _score_lines(found["scores"])
    for column, groups in found["by"].items():
        yield from _group_lines(column, groups)


def _side_line(name: str, side: Mapping[str, Any]) -> str:
    planned, published = side["num_planned"], side["num_published"]
    unfinished = f", UNFINISHED: {published:,} of {planned:,} are published" if planned not in (None, published) else ""
    model = "".join(f", {model}" for model in side["models"][:3])
    prompts = f", prompt {', '.join(side['prompt_names'][:6])}" if side["prompt_names"] else ""
    return f"{name:9} {side['path']}: {side['num_records']:,} records{unfinished}{prompts}{model}"


def _change_lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    total = max(1, found["num_records"])
    for change in Change:
        number = found["changes"][change.word]
        if number or change in (Change.SAME, Change.CHANGED):
            yield f"  {change.word:16} {number:>12,} {number / total:>7.1%}  {change.doc}"
    yield ""


def _similarity_lines(found: Mapping[str, Any]) -> Iterator[str]:
    alike = found["similarity"]
    if alike["mean"] is not None:
        yield (
            f"alike     mean {alike['mean']:.4f}, median {alike['median']:.4f}, p5 {alike['p5']:.4f}, "
            f"lowest {alike['lowest']:.4f} (1 = equal)"
        )


def _length_lines(lengths: Mapping[str, Any] | None) -> Iterator[str]:
    if lengths is None:
        return
    a, b = lengths["a"], lengths["b"]
    parts = [f"{name} {a[name]:,.1f} -> {b[name]:,.1f}" for name in ("mean", "median", "p95")]
    yield f"tokens    {', '.join(parts)}, most {a['most']:,} -> {b['most']:,}, total {a['total']:,} -> {b['total']:,}"
    yield (
        f"          {lengths['num_longer_in_b']:,} answers are longer in b, {lengths['num_shorter_in_b']:,} are shorter"
    )


def _crossed_lines(title: str, counts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [f"{entry['num_records']:>9,}  {entry['a'] or 'answered'} -> {entry['b'] or 'answered'}" for entry in counts]
    yield from _titled(title, rows)


def _difference_lines(title: str, differences: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = []
    for entry in differences:
        rows.append(f"{entry['name']}\n              a  {_short(entry['a'])}\n              b  {_short(entry['b'])}")
    yield from _titled(title, rows)


def _score_lines(scores: Mapping[str, Any]) -> Iterator[str]:
    rows = [f"{name:24} {_score(entry)}, {entry['num_rows']:,} records" for name, entry in scores.items()]
    yield from _titled("scores", rows)


def _group_lines(column: str, found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each value, with one metric behind it, or several below it."""
    groups: Sequence[Mapping[str, Any]] = found["values"]
    names = ["null" if group["value"] is None else _short(group["value"], 28) for group in groups[:_MOST_LINES]]
    width = max(map(len, names), default=0)
    rows = []
    for name, group in zip(names, groups, strict=False):
        alike, scores = group["similarity"]["mean"], group["scores"]
        text = f"{name:{width}} {group['num_records']:>9,}  same {share_same(group):>6.1%}"
        text += f"  alike {alike:.4f}" if alike is not None else ""
        if len(scores) == 1:
            text += "".join(f"  {metric} {_score(entry)}" for metric, entry in scores.items())
        rows.append(text)
        rows += [f"  {metric:24} {_score(entry)}" for metric, entry in scores.items() if len(scores) > 1]
    yield f"by {column}"
    yield from (f"          {row}" for row in rows)
    if found["num_values"] > len(names):
        yield f"          and {found['num_values'] - len(names):,} more values, see diff.json"


def share_same(group: Mapping[str, Any]) -> float:
    """Of the records of a group, those with the same outcome."""
    same: int = sum(group["changes"][change.word] for change in UNCHANGED)
    return same / max(1, int(group["num_records"]))


def _score(entry: Mapping[str, Any]) -> str:
    if entry["difference"] is None:
        return f"not defined on {entry['num_rows']:,} records"
    text = f"{figure(entry['a'])} -> {figure(entry['b'])}"
    if entry["low"] == entry["high"] == 0:
        return text
    text += f", {signed(entry['difference'])}"
    if entry["low"] is not None:
        text += (
            f" [{signed(entry['low'])}, {signed(entry['high'])}]{', more than chance' if beyond_chance(entry) else ''}"
        )
    return text


def figure(value: float) -> str:
    """The value of a metric as people read it: the best is 1, 10 or 100."""
    return f"{value:.4f}" if abs(value) < 2 else f"{value:.2f}"


def signed(value: float) -> str:
    """A difference of two such values."""
    return f"{value:+.4f}" if abs(value) < 2 else f"{value:+.2f}"


def beyond_chance(entry: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference leaves out 0."""
    return entry["low"] is not None and not entry["low"] <= 0 <= entry["high"]


def _titled(title: str, rows: Sequence[str]) -> Iterator[str]:
    if not rows:
        return
    yield title
    yield from (f"          {row}" for row in rows[:_MOST_LINES])
    if len(rows) > _MOST_LINES:
        yield f"          and {len(rows) - _MOST_LINES:,} more, see diff.json"


def _short(value: Any, most: int = _MAX_CHARACTERS) -> str:
    text = value if isinstance(value, str) else "not set" if value is None else json.dumps(value, ensure_ascii=False)
    text = " ".join(redacted(text).split())  # before it is cut: half a secret would not be known for one
    return text if len(text) <= most else text[: most - 3] + "..."
