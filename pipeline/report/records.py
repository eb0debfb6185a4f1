"""Records of a run as cards, with their pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.page.card import Card, Room
from pipeline.page.document import number
from pipeline.page.pictures import MOST_PICTURES, Asked, Limits, Picture, pictures_of
from pipeline.records import Stage
from pipeline.report.sample import Position, Sample, plain_text, records_at
from pipeline.results import INPUT, Results

_ROOM_CHARACTERS = 2_500_000  # of all texts on the page
_COLUMN_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Group:
    """Records that are shown together for a reason."""

    name: str
    title: str
    note: str
    cards: Sequence[Card]


def groups_of(results: Results, sample: Sample, root: str | None, is_stopped: Callable[[], bool]) -> list[Group]:
    """The sections of the gallery; those without a record are left out."""
    records = records_at(results, sample.positions)
    assert results.plan is not None
    pictures = pictures_of(results.path, results.plan, _asked(records), root=root, limits=Limits(is_stopped=is_stopped))
    room = Room(_ROOM_CHARACTERS)

    def group(name: str, title: str, note: str, positions: Sequence[Position], notes: Sequence[str] = ()) -> Group:
        cards = [
            _card(records[position], pictures, room, note)
            for position, note in zip(positions, notes or [""] * len(positions), strict=True)
            if position in records
        ]
        return Group(name, title, note, cards)

    whole = sample.num_answers
    say_so = [f"{number(one.num_records)} of {number(whole)} answers are this" for one in sample.repeated]
    repeated = [one.position for one in sample.repeated]
    found = [
        group("random", "Random", "Drawn at random from all records, errors among them.", sample.random),
        group("longest", "Longest", "The longest answers, by characters; equal ones once.", sample.longest),
        group("shortest", "Shortest", "The shortest answers; equal ones once.", sample.shortest),
        group("repeated", "Commonest", "Answers that several records give, the commonest first.", repeated, say_so),
    ]
    endings = {
        "length": ("Cut off", "Answers that reached generation.max_new_tokens (finish_reason length)."),
        "repetition": ("Runaway", "Answers that repeated themselves and were ended (finish_reason repetition)."),
    }
    found += [group(f"finish-{reason}", *endings[reason], at) for reason, at in sample.finished.items()]
    found += [
        group(f"error-{place}", kind, "Records that ended in this error.", at)
        for place, (kind, at) in enumerate(sample.errors.items())
    ]
    return [one for one in found if one.cards]


def _asked(records: Mapping[Position, Mapping[str, Any]]) -> dict[int, Asked]:
    asked = {}
    for record in records.values():
        sizes = zip(record["image_width"] or [], record["image_height"] or [], strict=True)
        longest = max((max(size) for size in sizes), default=None)
        asked[record["row_index"]] = Asked(sha256s=record["image_sha256"] or (), longest_side=longest)
    return asked


def _card(record: Mapping[str, Any], pictures: Mapping[int, list[Picture]], room: Room, note: str) -> Card:
    failed = record["status"] == "error"
    prompt, response = record["prompt"], record["response"]
    shown = [(name.removeprefix(INPUT), value) for name, value in record.items() if name.startswith(INPUT)]
    shown_pictures = pictures.get(record["row_index"], [])
    if record["error_stage"] in (Stage.READ, Stage.DECODE):
        shown_pictures = [one if one.uri else Picture(None, "no picture: the error says why") for one in shown_pictures]
    return Card(
        id=plain_text(record["id"], _COLUMN_CHARACTERS),
        pictures=shown_pictures,
        num_more_pictures=max(0, (record["num_images"] or 0) - MOST_PICTURES),
        note=note,
        prompt=room.text(prompt) if prompt else None,
        answer=room.text(response) if response else None,
        error_kind=f"{record['error_stage']}/{record['error_type']}" if failed else "",
        error=room.text(record["error_message"] or "") if failed else None,
        facts=list(_facts(record)),
        columns=[
            (name, room.text(plain_text(value, _COLUMN_CHARACTERS), _COLUMN_CHARACTERS).head) for name, value in shown
        ],
    )


def _facts(record: Mapping[str, Any]) -> list[str]:
    facts = []
    if record["prompt_name"] != "default":
        facts.append(str(record["prompt_name"]))
    if record["sample_index"]:
        facts.append(f"sample {record['sample_index']}")
    if record["finish_reason"]:
        facts.append(str(record["finish_reason"]))
    if record["num_generated_tokens"] is not None:
        facts.append(f"{number(record['num_generated_tokens'])} tokens")
    if record["num_prompt_tokens"] is not None:
        of_images = f", {number(record['num_image_tokens'])} of pictures" if record["num_image_tokens"] else ""
        facts.append(f"prompt {number(record['num_prompt_tokens'])}{of_images}")
    sizes = zip(record["image_width"] or [], record["image_height"] or [], strict=True)
    facts += [f"{width} x {height}" for width, height in list(sizes)[:MOST_PICTURES]]
    if record["attempt"] > 1:
        facts.append(f"attempt {record['attempt']}")
    return facts + [str(warning) for warning in record["warnings"] or []]
