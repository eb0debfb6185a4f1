"""README.md: the dataset card of a finished run, by which people and load_dataset() know what lies there.

Its front matter names the files, so that `datasets.load_dataset(FOLDER)` reads the answers and nothing else. A card
that somebody has edited, or written himself, is not touched: ours carries a hash of its own text.

A card is published: of the paths of this machine it says the last part alone.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]

from pipeline.plan import Plan
from pipeline.redaction import redacted
from pipeline.shown import printable
from pipeline.status import Status
from pipeline.write.file import Place, replace_file
from pipeline.write.object_store import ObjectPath

log = logging.getLogger(__name__)

NAME = "README.md"
_MARK = re.compile(r"<!-- vlm-batch card ([0-9a-f]{64}): [^\n]* -->\n")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"),
          (1e8, "10M<n<100M"), (1e9, "100M<n<1B"), (1e10, "1B<n<10B"))  # fmt: skip
_MARKUP = re.compile(r"[|`*_~\[\]$!@:\\]|(?<=www)\.")  # what Markdown would take for more than text
_PATHS = ("dataset.path", "dataset.root", "vlm.path")
# Said elsewhere in the card, or hashes that nobody reads.
_NOT_SETTINGS = re.compile(
    r"vlm\.files\..*|vlm\.path|vlm\.revision.*|prompt\.(user|system|variants|examples|chat_template)|schema_version|"
    r"dataset\.(files_sha256|num_rows|revision_found)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card says of records beside their plan."""

    num_records: int
    errors: Mapping[str, int]  # records by "stage/type"
    numerics: tuple[Mapping[str, str], ...] = ()  # of the shards, the commonest first
    license: str = "unknown"
    note: str = ""  # a sentence: which records these are, if not all


def write_card(output_dir: Place, status: Status) -> None:
    """Write the card of a finished run, unless there is a README.md that is not ours.

    One that cannot be written is a warning.
    """
    path = output_dir / NAME
    text = card_text(status.plan, facts_of(status))
    try:
        found = path.read_bytes() if path.exists() else None
        if found == text.encode() or (found is not None and not is_ours(found)):
            return
        if not isinstance(path, ObjectPath) and path.is_symlink():
            return
        replace_file(path, text.encode(), beside=output_dir / "work")
    except OSError as problem:
        log.warning("%s, the dataset card, cannot be written: %s", path, problem)


def facts_of(status: Status, *, license: str = "unknown") -> CardFacts:
    """What a finished run says of itself."""
    numerics = Counter(json.dumps(dict(summary.numerics), sort_keys=True) for summary in status.shards.values())
    return CardFacts(
        num_records=status.num_published,
        errors=status.errors,
        numerics=tuple(json.loads(kind) for kind, _ in numerics.most_common()),
        license=license,
    )


def is_ours(card: bytes) -> bool:
    """Whether a card is as we wrote it."""
    text = card.decode("utf-8", "replace")
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text[: found.start()] + text[found.end() :])


def card_text(plan: Plan, facts: CardFacts) -> str:
    """The card: front matter in YAML, then Markdown."""
    front = yaml.safe_dump(_front_matter(plan, facts), sort_keys=False, allow_unicode=True)
    body = redacted("\n\n".join(part for part in _body(plan, facts) if part)) + "\n"
    head = f"---\n{front}---\n"
    mark = f"<!-- vlm-batch card {_digest(head + body)}: written by vlm-batch; one that is edited is left alone -->\n"
    return head + mark + body


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _front_matter(plan: Plan, facts: CardFacts) -> dict[str, Any]:
    has_images = plan.settings.get("dataset.image_column") is not None
    size = next((name for most, name in _SIZES if facts.num_records < most), "n>1T")
    return {
        "license": facts.license,
        "task_categories": ["image-text-to-text" if has_images else "text-generation"],
        "size_categories": [size],
        "tags": ["vlm-batch", "synthetic"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }


def _body(plan: Plan, facts: CardFacts) -> list[str]:
    settings = plan.settings
    model, revision = _model(settings)
    num_errors = sum(facts.errors.values())
    response = str(settings.get("write.prefix", "")) + str(settings.get("write.response_column", "response"))
    status = str(settings.get("write.prefix", "")) + "status"
    asked = "images" if settings.get("dataset.image_column") is not None else "rows"
    counts = {
        "rows": plan.num_rows,
        "prompts for each row": len(plan.prompt_names),
        "samples of each": plan.num_samples,
        "records": facts.num_records,
        "answers": facts.num_records - num_errors,
        "errors": num_errors,
    }
    about = (
        f"Answers of the model {_code(model)} about {asked} of {_code(_last(str(settings.get('dataset.path'))))}, "
        f"one row for each: column {_code(response)} where {_code(status)} is `ok`. Made with vlm-batch "
        f"{plan.versions.get('vlm-batch', '')}, begun {plan.created}."
    )
    errors = [f"- {number:,} x {_code(kind)}" for kind, number in facts.errors.items()]
    return [
        f"# Answers of {_code(model)}",
        about,
        facts.note,
        _table("what", "how many", counts),
        "## Prompts",
        *_prompts(settings),
        "## Model",
        _table(
            "model", "", {"name": model, "revision": revision, **(dict(facts.numerics[0]) if facts.numerics else {})}
        ),
        f"{len(facts.numerics)} kinds of hardware or versions took part; manifest.json has all."
        if len(facts.numerics) > 1
        else "",
        "## Errors" if errors else "",
        "Rows without an answer are here, too, and say why: `error_stage`, `error_type`, `error_message`."
        if errors
        else "",
        "\n".join(errors),
        "## Load it",
        "In this folder; from elsewhere `datasets.load_dataset` takes its path, or its name on the hub.",
        _loading(response, status),
        "## Settings",
        _fenced(yaml.safe_dump(_shown_settings(settings), sort_keys=True, allow_unicode=True), "yaml"),
        "## Versions",
        _table("package", "version", dict(plan.versions)),
    ]


def _model(settings: Mapping[str, Any]) -> tuple[str, str]:
    path = str(settings.get("vlm.path", "unknown"))
    revision = settings.get("vlm.revision_found") or settings.get("vlm.revision")
    return _last(path), str(revision or "none: a folder, known by the hashes of its files in plan.json")


def _last(path: str) -> str:
    """A hub's name whole; of a path or URL the last part."""
    if _HUB_NAME.fullmatch(path) and not path.startswith("."):
        return path
    return path.rstrip("/").rpartition("/")[2] or path


def _prompts(settings: Mapping[str, Any]) -> list[str]:
    variants: Mapping[str, str] = settings.get("prompt.variants") or {"default": settings.get("prompt.user") or ""}
    parts = []
    if system := settings.get("prompt.system"):
        parts += ["System:", _fenced(str(system))]
    if examples := settings.get("prompt.examples"):
        parts.append(f"{len(examples)} worked examples come first.")
    for name, template in variants.items():
        parts += [f"{_code(name)}:", _fenced(template)]
    return parts


def _shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in settings.items() if not _NOT_SETTINGS.fullmatch(name)}
    return {name: _last(value) if name in _PATHS and isinstance(value, str) else value for name, value in found.items()}


def _loading(response: str, status: str) -> str:
    column, where = json.dumps(response), json.dumps(status)
    ours = '"' + status.replace('"', '""') + '"'
    return _fenced(
        f"""\
import datasets

rows = datasets.load_dataset("parquet", data_files="data/*.parquet", split="train")
print(rows[0][{column}])

import pandas

frame = pandas.read_parquet("data")
print(frame[frame[{where}] == "ok"][{column}].head())

import polars

print(polars.scan_parquet("data/*.parquet").select({column}).head().collect())

import duckdb

print(duckdb.sql(\"\"\"select {ours}, count(*) from 'data/*.parquet' group by all\"\"\"))
""",
        "python",
    )


def _fenced(text: str, language: str = "") -> str:
    """Text as it is, behind a fence that nothing in it can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text).rstrip()}\n{fence}"


def _code(text: object) -> str:
    """Text in a line of Markdown: nothing in it is markup."""
    if not re.search("[`|\\s\\x00-\\x1f]", str(text).replace(" ", "")) and str(text).strip():
        return f"`{printable(str(text))}`"
    escaped = html.escape(printable(str(text)).replace("\n", "\\n").replace("\t", "\\t"))
    return f"<code>{_MARKUP.sub(lambda match: f'&#{ord(match[0])};', escaped)}</code>"


def _table(first: str, second: str, rows: Mapping[str, object]) -> str:
    lines = [f"| {first} | {second} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {_cell(value)} |" for name, value in rows.items())])


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else _code(value)
