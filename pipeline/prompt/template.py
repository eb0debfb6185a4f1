"""Row -> Prompt: the user's templates over the row's columns, or the row's own conversation.

In a template stand the columns by name, `row["any name"]`, `num_images`, and `image()`, which puts the next image
there; images that it does not place come first. In a chat, <image> in the template's own text means the same. With
prompt.format=plain that text reaches the processor as it is, the model's own tokens included: <OD>, <grounding>.

What a column holds is data: braces or `<image>` in it stay text. A null may be asked about (`{% if title %}`,
`title is none`, `title | default("...")`); used as a value it makes the row an error.
"""

from __future__ import annotations

import os.path
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pipeline.errors import RowFault, UsageError
from pipeline.option import option
from pipeline.prompt.column_template import ColumnTemplate
from pipeline.prompt.conversation import Turn, cleaned, normalised, placed_turn, text_of, turn, verbatim
from pipeline.prompt.sandbox import Sandbox
from pipeline.records import ImageRef, Prompt, Row, Stage

DEFAULT_NAME = "default"
IMAGE_LITERAL = "<image>"  # how users of LLaVA write image()
# (text, warnings) -> text without the model's own tokens; what it did goes into `warnings`.
Neutral = Callable[[str, list[str]], str]


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
    assistant_prefix: str | None = option(
        None, "start of the answer, a template like `user`; the response is what the model adds to it; null = none"
    )
    format: PromptFormat = option(PromptFormat.chat, "chat = the model's chat template, plain = the bare text")
    chat_template: str | None = option(None, "file with the chat template (Jinja) to use; null = the model's own")
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
        if self.format is PromptFormat.plain and self.chat_template is not None:
            raise UsageError("prompt.format=plain uses no chat template: set prompt.chat_template=null or format=chat")
        if self.max_image_pixels < 1:
            raise UsageError(f"prompt.max_image_pixels is {self.max_image_pixels}; expected a positive number")
        if "" in self.variants:
            raise UsageError("a name in prompt.variants is empty")
        for number, example in enumerate(self.examples):
            for path in example.images:
                if "://" not in path and not os.path.isfile(path):
                    raise UsageError(f"prompt.examples[{number}] names the image {path!r}, which is not a file")
            num_places = example.user.count(IMAGE_LITERAL) if self.format is PromptFormat.chat else 0
            if num_places > len(example.images):
                raise UsageError(
                    f"prompt.examples[{number}].user has {num_places} times {IMAGE_LITERAL}, but names "
                    f"{len(example.images)} images"
                )
        return Template(self, columns, has_messages)

    def chat_template_text(self) -> str | None:
        """The chat template of one's own; None where the model's is used.

        Raises:
            UsageError: the file cannot be read.
        """
        if self.chat_template is None:
            return None
        path = Path(self.chat_template).expanduser()
        try:
            if path.exists() and not path.is_file():  # a device has no end, a pipe perhaps no beginning
                raise OSError("it is no regular file")
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise UsageError(
                f"prompt.chat_template={self.chat_template}: expected a text file with a Jinja template ({problem})"
            ) from None


class Template:
    """The prompts of a row. Pickles as its settings and compiles again where it arrives; one thread at a time."""

    def __init__(self, config: PromptConfig, columns: Sequence[str], has_messages: bool = False) -> None:
        self._made_from = (config, tuple(columns), has_messages)
        self._has_messages = has_messages
        # Nothing in a dataset can contain it, so a text of the dataset places no image.
        self._marker = f"<image {secrets.token_hex(16)}>"
        self._plain = config.format is PromptFormat.plain
        sandbox = Sandbox()

        def compiled(key: str, source: str | None) -> ColumnTemplate | None:
            return ColumnTemplate(sandbox, key, source, columns) if source else None

        self._system = compiled("prompt.system", config.system)
        self._prefix = compiled("prompt.assistant_prefix", config.assistant_prefix)
        sources = {} if has_messages else config.variants or {DEFAULT_NAME: config.user}
        literal = None if self._plain else IMAGE_LITERAL
        self._users = {
            name: ColumnTemplate(
                sandbox,
                f"prompt.variants.{name}" if config.variants else "prompt.user",
                source,
                columns,
                images=True,
                image_literal=literal,
            )
            for name, source in sources.items()
        }
        self._example_images = tuple(ImageRef(path=path) for example in config.examples for path in example.images)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the prompts that every row is asked, in order."""
        return tuple(self._users) or (DEFAULT_NAME,)

    @property
    def own_text(self) -> str:
        """What the user wrote into the templates of the question, columns not filled in."""
        config = self._made_from[0]
        return "\n".join(config.variants.values() if config.variants else [config.user])

    def sketches(self, *, has_images: bool) -> tuple[tuple[Turn, ...], ...]:
        """Conversations of the shape of this run's prompts, with other texts, to try a model's chat template on.

        has_images: rows have images. The first is what every row looks like, the others what some may look like.
        """
        usual = 1 if has_images else 0
        others = [number for number in (0, 1, 2) if number != usual] if has_images else []
        found = [tuple(self._sketch(number)) for number in (usual, *others)]
        if self._has_messages:
            asked = turn("user", "Sketchquestion", usual)
            told = [turn("system", "Sketchsystem"), turn("user", "Sketchbefore"), turn("assistant", "Sketchanswer")]
            found += [(*told[1:], asked), (*told, asked)]
        return tuple(found)

    def _sketch(self, num_images: int) -> Iterator[Turn]:
        if self._system is not None:
            yield turn("system", "Sketchsystem")
        for number, example in enumerate(self._made_from[0].examples):
            yield turn("user", f"Sketchexample{number}" if example.user else "", len(example.images))
            yield turn("assistant", f"Sketchanswer{number}")
        yield turn("user", "Sketchquestion", num_images)
        if self._prefix is not None:
            yield turn("assistant", "Sketchprefix")

    def prompts(self, row: Row, neutral: Neutral | None = None) -> list[Prompt]:
        """All prompts of a row, in the order of `names`; they share one tuple of images.

        Raises:
            RowFault: the row arrived with a fault, or one of its prompts cannot be rendered (see `prompt`).
        """
        images = self._example_images + row.images
        return [self._prompt(row, name, images, neutral) for name in self.names]

    def prompt(self, row: Row, name: str, neutral: Neutral | None = None) -> Prompt:
        """One prompt of a row, so that a row can fail in one variant and be asked the others.

        neutral: takes the model's own tokens out of data. With it, text in which the user may write such tokens (all of
        a plain prompt, the assistant's prefix) is neutral in what comes from columns, and its parts are marked
        `verbatim`: the processor is to leave them alone.

        Raises:
            RowFault: NullColumn, ImageCount, TemplateLimit, what the template raised on this row, or, for a ready-made
                conversation, UnknownRole, UnknownPart, NoUserTurn.
        """
        return self._prompt(row, name, self._example_images + row.images, neutral)

    def __reduce__(self) -> tuple[type[Template], tuple[PromptConfig, tuple[str, ...], bool]]:
        return (Template, self._made_from)

    def _prompt(self, row: Row, name: str, images: tuple[ImageRef, ...], neutral: Neutral | None) -> Prompt:
        if row.fault is not None:
            raise RowFault(row.fault.stage, row.fault.kind, row.fault.message)
        warnings: list[str] = []
        data = self._data_filter(neutral, warnings)
        if self._has_messages:
            asked = self._conversation(row)
        else:
            asked = [*self._examples(), self._question(row, name, data if self._plain else None)]
            if self._plain and data is not None:
                asked = [verbatim(entry) for entry in asked]
        if self._system is not None and asked[0]["role"] != "system":
            asked.insert(0, turn("system", self._system.text(row, "prompt.system")))
        if self._prefix is not None and asked[-1]["role"] != "assistant":
            prefix = self._prefix.text(row, "prompt.assistant_prefix", data=data)
            if prefix:
                started = turn("assistant", prefix)
                asked.append(started if data is None else verbatim(started))
        for entry in asked:
            for part in entry["content"]:
                if part["type"] == "text":
                    part["text"] = _noted(part["text"], warnings)
        text = text_of(asked)
        if not text.strip():
            if not images:
                raise RowFault(Stage.TEMPLATE, "EmptyPrompt", f"prompt {name!r} has neither text nor image")
            if self._has_messages or self._users[name].has_text:
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

    def _data_filter(self, neutral: Neutral | None, warnings: list[str]) -> Callable[[str], str] | None:
        """What is done to the text that an expression prints; the places of images in it are kept."""
        if neutral is None:
            return None

        def filtered(text: str) -> str:
            text = _noted(text, warnings)  # first: a NUL hides a token
            return self._marker.join(neutral(piece, warnings) for piece in text.split(self._marker))

        return filtered

    def _examples(self) -> list[Turn]:
        turns = []
        for example in self._made_from[0].examples:
            if self._plain:
                turns.append(turn("user", example.user, len(example.images)))
            else:
                turns.append(placed_turn(example.user, IMAGE_LITERAL, len(example.images)))
            turns.append(turn("assistant", example.assistant))
        return turns

    def _conversation(self, row: Row) -> list[Turn]:
        if row.messages is None:
            raise RowFault(Stage.TEMPLATE, "NullColumn", "the row has no conversation in dataset.messages_column")
        return normalised(row.messages, len(row.images))

    def _question(self, row: Row, name: str, data: Callable[[str], str] | None) -> Turn:
        num_placed = 0

        def image() -> str:
            nonlocal num_placed
            num_placed += 1
            if num_placed > len(row.images):
                message = f"prompt {name!r} places image {num_placed}, the row has {len(row.images)}"
                raise RowFault(Stage.TEMPLATE, "ImageCount", message)
            return self._marker

        text = self._users[name].text(row, f"prompt {name!r}", image=image, data=data)
        if text.count(self._marker) != num_placed:
            message = f"prompt {name!r} changes or drops what image() gives: print it as it is"
            raise RowFault(Stage.TEMPLATE, "ImageCount", message)
        return placed_turn(text, self._marker, len(row.images))


def _noted(text: str, warnings: list[str]) -> str:
    """Text that a tokenizer and Parquet accept; what was done to it goes into `warnings`, once."""
    text, note = cleaned(text)
    if note and note not in warnings:
        warnings.append(note)
    return text
