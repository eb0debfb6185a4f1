"""Turns of a conversation: content is always a list of parts, and the n-th image part is the n-th image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import RowFault
from pipeline.records import Stage

ROLES = ("system", "user", "assistant")
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")

Part = dict[str, Any]  # {"type": "image"} or {"type": "text", "text": str}, the latter perhaps with "verbatim": True
Turn = dict[str, Any]  # {"role": str, "content": list[Part]}


def turn(role: str, text: str, num_images: int = 0) -> Turn:
    """A turn with its images before its text."""
    parts: list[Part] = [{"type": "image"} for _ in range(num_images)]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}] if text else parts}


def placed_turn(rendered: str, marker: str, num_images: int) -> Turn:
    """A user turn from a rendered template in which `marker` stands where an image goes.

    Images that the template does not place come first, so that the order of the images never changes.
    """
    texts = rendered.split(marker)
    parts: list[Part] = [{"type": "image"} for _ in range(num_images - (len(texts) - 1))]
    for number, text in enumerate(texts):
        if number:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return {"role": "user", "content": parts}


def verbatim(entry: Turn) -> Turn:
    """A turn whose text holds the model's own tokens only where the user wrote them."""
    parts = [part | {"verbatim": True} if part["type"] == "text" else part for part in entry["content"]]
    return {"role": entry["role"], "content": parts}


def text_of(turns: Sequence[Turn]) -> str:
    """The text of the last user turn, image places left out; "" where no user speaks."""
    spoken = [entry for entry in turns if entry["role"] == "user"]
    return "".join(part["text"] for part in spoken[-1]["content"] if part["type"] == "text") if spoken else ""


def normalised(messages: Sequence[Mapping[str, Any]], num_images: int) -> list[Turn]:
    """A ready-made conversation in our form. The row's images fill its image parts in order, whatever those name.

    Raises:
        RowFault: a role or part that nobody knows, nobody asks anything, or as many image parts as images are missing.
    """
    turns = [_turn(message, number) for number, message in enumerate(messages)]
    asked = [entry for entry in turns if entry["role"] == "user"]
    if not asked:
        raise RowFault(Stage.TEMPLATE, "NoUserTurn", f"the conversation has {len(turns)} turns, none of role 'user'")
    num_slots = sum(part["type"] == "image" for entry in turns for part in entry["content"])
    if num_slots == 0:
        asked[0]["content"][:0] = [{"type": "image"} for _ in range(num_images)]
    elif num_slots != num_images:
        message = f"the conversation has {num_slots} image parts, the row has {num_images} images"
        raise RowFault(Stage.TEMPLATE, "ImageCount", message)
    return turns


def cleaned(text: str) -> tuple[str, str | None]:
    """Text that a tokenizer and Parquet accept, and what was done to it (null where nothing was)."""
    notes = []
    num_nul = text.count("\0")
    if num_nul:
        text = text.replace("\0", "")
        notes.append(f"{num_nul} NUL removed")
    try:
        text.encode()
    except UnicodeEncodeError:
        num_surrogates = sum("\ud800" <= character <= "\udfff" for character in text)
        # Two halves of one character find each other again; a lone half becomes U+FFFD.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        notes.append(f"{num_surrogates} surrogates replaced")
    return text, f"text cleaned: {', '.join(notes)}" if notes else None


def _turn(message: Any, number: int) -> Turn:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        detail = f"turn {number} has the role {role!r}; expected one of {', '.join(ROLES)}"
        raise RowFault(Stage.TEMPLATE, "UnknownRole", detail)
    content = message.get("content")
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list | tuple):
        detail = f"the content of turn {number} is {type(content).__name__}; expected a text or a list of parts"
        raise RowFault(Stage.TEMPLATE, "UnknownPart", detail)
    return {"role": role, "content": [_part(part, number) for part in content]}


def _part(part: Any, number: int) -> Part:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in IMAGE_PARTS:
        return {"type": "image"}
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    shown = f"a part of type {kind!r}" if kind not in TEXT_PARTS else "a text part without a text"
    detail = f"turn {number} has {shown}; expected text or image parts ({', '.join(TEXT_PARTS + IMAGE_PARTS)})"
    raise RowFault(Stage.TEMPLATE, "UnknownPart", detail)
