"""Row -> Prompt: the user's templates over the row's columns, or the row's own conversation.

In a template stand the columns by name, `row["any name"]`, `num_images`, and `image()`, which puts the next image
there; images that it does not place come first. What a column holds is data: braces or `<image>` in it stay text. A
null may be asked about (`{% if title %}`, `title is none`, `title | default("...")`); used as a value it makes the row
an error.
"""

from __future__ import annotations

import difflib
import os.path
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import jinja2

from pipeline.errors import RowFault, UsageError
from pipeline.option import option
from pipeline.prompt.conversation import Turn, cleaned, normalised, placed_turn, text_of, turn
from pipeline.prompt.null import NullUsed, guard_nulls
from pipeline.prompt.sandbox import Sandbox, TemplateLimit
from pipeline.records import ImageRef, Prompt, Row, Stage

DEFAULT_NAME = "default"
_OTHERS = "Set prompt.user, or choose another prompt: prompt=describe, caption_short, ocr or tags."
# What an expression of a template can raise on the values of one row.
RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class PromptFormat(StrEnum):
    """How turns become text. Lower-case names, because a configuration names a member, not its value."""

    chat = "chat"
    plain = "plain"


@dataclass(kw_only=True, slots=True)
class ExampleConfig:
    """A worked example shown to the model before the question. Its texts are taken literally."""

    user: str = option("", "what the user asks")
    assistant: str = option("???", "the answer to give")
    images: list[str] = option(doc="paths of the images that the example is about", factory=list)


@dataclass(kw_only=True, slots=True)
class PromptConfig:
    """What is asked about a row."""

    user: str = option("Describe this image.", "the question: a Jinja template over the row's columns")
    system: str | None = option(None, "the system turn, a template like `user`; null = none")
    variants: dict[str, str] = option(doc="{name: template}, each asked of every row in place of `user`", factory=dict)
    examples: list[ExampleConfig] = option(doc="turns shown before the question: user, assistant, images", factory=list)
    format: PromptFormat = option(PromptFormat.chat, "chat = the model's chat template, plain = the bare text")
    max_image_pixels: int = option(100_000_000, "images with more pixels become error rows, undecoded")

    def build(self, columns: Sequence[str], has_messages: bool = False) -> Template:
        """The compiled templates, checked against the columns of the dataset.

        has_messages: the rows bring their own conversations (dataset.messages_column); `user` is then not used.

        Raises:
            UsageError: a template is no Jinja or names an absent column, an example image is missing, or settings
                contradict each other.
        """
        if has_messages and (self.variants or self.examples):
            named = "prompt.variants" if self.variants else "prompt.examples"
            raise UsageError(f"{named} and dataset.messages_column cannot go together: a row is asked one or the other")
        if self.format is PromptFormat.plain and self.system:
            raise UsageError("prompt.format=plain has no system turn: put that text into prompt.user")
        if self.max_image_pixels < 1:
            raise UsageError(f"prompt.max_image_pixels is {self.max_image_pixels}; expected a positive number")
        if "" in self.variants:
            raise UsageError("a name in prompt.variants is empty")
        for number, example in enumerate(self.examples):
            for path in example.images:
                if "://" not in path and not os.path.isfile(path):
                    raise UsageError(f"prompt.examples[{number}] names the image {path!r}, which is not a file")
        return Template(self, columns, has_messages)


class Template:
    """The prompts of a row. Pickles as its settings and compiles again where it arrives; one thread at a time."""

    def __init__(self, config: PromptConfig, columns: Sequence[str], has_messages: bool = False) -> None:
        self._made_from = (config, tuple(columns), has_messages)
        self._has_messages = has_messages
        self._sandbox = Sandbox()
        # Nothing in a dataset can contain it, so a text of the dataset places no image.
        self._marker = f"<image {secrets.token_hex(16)}>"
        self._system = self._compiled("prompt.system", config.system, image=False) if config.system else None
        sources = {} if has_messages else config.variants or {DEFAULT_NAME: config.user}
        self._users = {
            name: self._compiled(f"prompt.variants.{name}" if config.variants else "prompt.user", source, image=True)
            for name, source in sources.items()
        }
        self._example_images = tuple(ImageRef(path=path) for example in config.examples for path in example.images)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the prompts that every row is asked, in order."""
        return tuple(self._users) or (DEFAULT_NAME,)

    def prompts(self, row: Row) -> list[Prompt]:
        """All prompts of a row, in the order of `names`; they share one tuple of images.

        Raises:
            RowFault: the row arrived with a fault, or one of its prompts cannot be rendered (see `prompt`).
        """
        images = self._example_images + row.images
        return [self._prompt(row, name, images) for name in self.names]

    def prompt(self, row: Row, name: str) -> Prompt:
        """One prompt of a row, so that a row can fail in one variant and be asked the others.

        Raises:
            RowFault: NullColumn, ImageCount, TemplateLimit, what the template raised on this row, or, for a ready-made
                conversation, UnknownRole, UnknownPart, NoUserTurn.
        """
        return self._prompt(row, name, self._example_images + row.images)

    def __reduce__(self) -> tuple[type[Template], tuple[PromptConfig, tuple[str, ...], bool]]:
        return (Template, self._made_from)

    def _prompt(self, row: Row, name: str, images: tuple[ImageRef, ...]) -> Prompt:
        if row.fault is not None:
            raise RowFault(row.fault.stage, row.fault.kind, row.fault.message)
        asked = self._conversation(row) if self._has_messages else [*self._examples(), self._question(row, name)]
        if self._system is not None and asked[0]["role"] != "system":
            asked.insert(0, turn("system", self._render("prompt.system", self._system, row, _no_image)))
        warnings = []
        for entry in asked:
            for part in entry["content"]:
                if part["type"] == "text":
                    part["text"], note = cleaned(part["text"])
                    if note and note not in warnings:
                        warnings.append(note)
        text = text_of(asked)
        if not text.strip():
            if not images:
                raise RowFault(Stage.TEMPLATE, "EmptyPrompt", f"prompt {name!r} has neither text nor image")
            if self._has_messages or self._users[name].asks:
                warnings.append("the question is empty")
        return Prompt(
            row_index=row.index,
            id=row.id,
            prompt_name=name,
            text=text,
            messages=tuple(asked),
            images=images,
            warnings=tuple(warnings),
        )

    def _examples(self) -> list[Turn]:
        turns = []
        for example in self._made_from[0].examples:
            turns += [turn("user", example.user, len(example.images)), turn("assistant", example.assistant)]
        return turns

    def _conversation(self, row: Row) -> list[Turn]:
        if row.messages is None:
            raise RowFault(Stage.TEMPLATE, "NullColumn", "the row has no conversation in dataset.messages_column")
        return normalised(row.messages, len(row.images))

    def _question(self, row: Row, name: str) -> Turn:
        num_placed = 0

        def image() -> str:
            nonlocal num_placed
            num_placed += 1
            if num_placed > len(row.images):
                message = f"prompt {name!r} places image {num_placed}, the row has {len(row.images)}"
                raise RowFault(Stage.TEMPLATE, "ImageCount", message)
            return self._marker

        text = self._render(f"prompt {name!r}", self._users[name], row, image)
        if text.count(self._marker) != num_placed:
            message = f"prompt {name!r} changes or drops what image() gives: print it as it is"
            raise RowFault(Stage.TEMPLATE, "ImageCount", message)
        return placed_turn(text, self._marker, len(row.images))

    def _render(self, label: str, template: _Compiled, row: Row, image: Callable[[], str]) -> str:
        variables: dict[str, Any] = {"num_images": len(row.images)}
        if template.uses_row:
            variables["row"] = {name: guard_nulls(value, name) for name, value in row.columns.items()}
        for name in template.columns:
            variables[name] = guard_nulls(row.columns.get(name), name)
        variables["_image"] = image
        try:
            return self._sandbox.render(template.code, variables)
        except NullUsed as error:
            raise RowFault(Stage.TEMPLATE, "NullColumn", f"{label}: {error.message}") from None
        except TemplateLimit as error:
            raise RowFault(Stage.TEMPLATE, "TemplateLimit", f"{label}: {error.message}") from None
        except RENDER_ERRORS as error:
            raise RowFault(Stage.TEMPLATE, type(error).__name__, f"{label}: {error}") from None

    def _compiled(self, key: str, source: str, *, image: bool) -> _Compiled:
        columns = self._made_from[1]
        try:
            code, read, unknown = self._sandbox.template(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"{key}, line {error.lineno}: {error.message}") from None
        if "_image" in unknown and not image:
            raise UsageError(f"{key} uses image(), which has a place in prompt.user and prompt.variants only")
        for name in sorted(unknown - set(columns) - {"_image", "row", "num_images"}):
            raise UsageError(f"{key} uses {name!r}, which is not a column.{_hint(name, columns)} {_OTHERS}")
        used = tuple(name for name in columns if name in read)
        return _Compiled(code, used, "row" in read and "row" not in columns, bool(source.strip()))


@dataclass(frozen=True, slots=True)
class _Compiled:
    code: jinja2.Template
    columns: tuple[str, ...]  # those that it reads
    uses_row: bool
    asks: bool  # whether it has any text


def _hint(name: str, columns: Sequence[str]) -> str:
    if name == "image":
        return ' To place an image write "{{ image() }}".'
    nearest = difflib.get_close_matches(name, columns, n=1)
    meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{meant} Columns: {', '.join(columns) or 'none'}."


def _no_image() -> str:
    raise AssertionError("image() in prompt.system is refused when it is compiled")
