"""One prompt through the model's own processor: chat template, tokens, image tensors. Runs in the worker processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import RowFault, RunFailed, VlmBatchError
from pipeline.records import CompactImages, Stage
from pipeline.tensors.chat import ROW_ERRORS, PlainForm, PromptForm, Turn
from pipeline.tensors.load import load_processor, missing_package
from pipeline.tensors.memo import ImageCall, ImageMemo, digest_of
from pipeline.tensors.probe import Sketch, TemplateFit, fitting_form, image_placeholder, image_tokens, question
from pipeline.tensors.shipping import CompactShipping, Shipping
from pipeline.tensors.tokens import closing_id, image_token_ids, special_pattern

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass(frozen=True, slots=True)
class ProcessorSource:
    """Where the processor comes from; small enough to be sent to every worker."""

    folder: str
    options: Mapping[str, Any] = field(default_factory=dict)  # vlm.processor: max_pixels, do_image_splitting ...
    trust_remote_code: bool = False
    plain: bool = False  # prompt.format=plain: no chat template
    chat_template: str | None = None  # text of the Jinja template to use; None = the model's own
    date: str | None = None  # what a chat template says is today, as 2026-01-31; None = today
    sketches: tuple[Sketch, ...] = (question(1), question(0), question(2))  # the first like every row, others like some
    own_text: str = ""  # what the user wrote into templates, where an image token would be a mistake
    max_tokens: int | None = None  # the model's context, in tokens
    num_reserved_tokens: int = 1  # of the context, for the answer
    shipping: Shipping = "processed"  # how images travel to the engine


@dataclass(frozen=True, slots=True)
class Encoded:
    """A processor's output for one prompt."""

    tensors: Mapping[str, np.ndarray[Any, Any]]  # input_ids [1, T] and whatever the model's forward takes
    num_prompt_tokens: int
    num_image_tokens: int | None
    warnings: tuple[str, ...]
    image_key: str | None = None  # equal for equal images; None without images
    compact: CompactImages | None = None  # image tensors that are not in `tensors`


class Processor:
    """A loaded processor.

    Raises:
        RunFailed: the folder has no processor that can be loaded here, or its chat template does not fit the run.
    """

    def __init__(self, source: ProcessorSource) -> None:
        self._processor = load_processor(source.folder, source.options, trust_remote_code=source.trust_remote_code)
        self.source = source
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._image_token_ids = image_token_ids(self._processor, self._tokenizer)
        self._special = special_pattern(self._processor, self._tokenizer)
        self._closing_id = closing_id(self._tokenizer)
        self._memo = ImageMemo(self._processor)
        self._compact: CompactShipping | None = None
        self._fit: TemplateFit | None = None
        self._several_images: bool | None = None  # whether a prompt may have them; not known yet
        try:
            with _quiet():
                self._form: PromptForm = self._plain_form() if source.plain else self._chat_form()
        except ImportError as problem:  # what a processor asks for when it is used for the first time
            raise RunFailed(missing_package(source.folder, problem)) from problem
        except VlmBatchError:
            raise
        except Exception as problem:  # an option of a wrong kind fails in a way of its own for every picture
            raise RunFailed(
                f"the processor in {source.folder} with vlm.processor={dict(source.options)} cannot prepare a picture: "
                f"{problem.kind if isinstance(problem, RowFault) else type(problem).__name__}: "
                f"{' '.join(str(problem).split())[:300]}"
            ) from problem

        self.ship(source.shipping)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that made the prompt's tokens."""
        return self._tokenizer

    def ship(self, shipping: Shipping, *, at_once: bool = False) -> tuple[str, ...]:
        """From now on images travel this way; why some of them did not travel compact before."""
        refusals = self._compact.refusals() if self._compact else ()
        self._memo.forget()
        self._memo.substitute = None
        self._compact = None if shipping == "processed" else CompactShipping(self._memo, shipping, at_once=at_once)
        return refusals

    def encode(self, messages: Sequence[Turn], images: Sequence[Image.Image]) -> Encoded:
        """Tokens and image tensors of one conversation; the n-th image part is `images[n]`.

        Raises:
            RowFault: the prompt is longer than the model's context, or the processor refuses the row.
        """
        warnings: list[str] = []
        self._memo.used = False
        try:
            text = self.text(messages, warnings)
            batch = self._call(text, images)
            call = self._memo.last if self._memo.used else None
            if call and self._compact and not self._compact.fits(call, batch):
                batch = self._call(text, images)
                call = self._memo.last
        except (RowFault, VlmBatchError):
            raise
        except Exception as problem:  # code that came with the model may raise classes of its own
            raise RowFault(Stage.ENCODE, type(problem).__name__, str(problem)[:1000] or "no message") from problem
        if len(images) > 1 and not self._sees_all(text, images, batch["input_ids"].shape[-1]):
            message = f"the row has {len(images)} images, and this model takes one image in a prompt"
            raise RowFault(Stage.ENCODE, "ImageCount", message)
        # PaliGemma's processor gives labels, too: they are for training.
        usable = {name: tensor for name, tensor in batch.items() if hasattr(tensor, "numpy") and name != "labels"}
        compact = call.compact if call else None
        made = {name: own for name, tensor in usable.items() if call and (own := call.made(name, tensor)) is not None}
        tensors = self._open_ended(
            {
                name: call.array(made[name]) if call and name in made else tensor.numpy()
                for name, tensor in usable.items()
                if compact is None or name not in compact.shapes
            }
        )
        num_tokens = int(tensors["input_ids"].shape[-1])
        if not num_tokens:
            raise RowFault(Stage.ENCODE, "EmptyPrompt", "the prompt has no tokens; write some text into prompt.user")
        self._check_length(num_tokens)
        num_image_tokens = self._num_image_tokens(tensors["input_ids"])
        if images and num_image_tokens is not None and num_image_tokens < len(images):
            raise RowFault(
                Stage.ENCODE,
                "ImageTokens",
                f"{len(images)} images, but only {num_image_tokens} image tokens in the prompt: the model would not "
                "see them all. The chat template drops images.",
            )
        image_key = _image_key(tensors, made, call) if images else None
        return Encoded(tensors, num_tokens, num_image_tokens, tuple(warnings), image_key, compact)

    def text(self, messages: Sequence[Turn], warnings: list[str]) -> str:
        """The prompt as the model's chat template renders it, or as prompt.format=plain joins it.

        It ends with the generation prompt, or with the text of the last turn where that is the assistant's. A text part
        marked `verbatim` keeps the model's tokens that it holds; from any other they are taken (`neutral`).

        Raises:
            RowFault: the chat template loses a text or an image of this row, or prints a list as Python does.
        """
        turns = [self._cleaned(turn, warnings) for turn in messages]
        if turns[-1]["role"] == "assistant" and not any(part.get("text") for part in turns[-1]["content"]):
            turns.pop()  # an answer without a beginning
        text = self._form.text(turns)
        if self._fit is not None and (flaw := self._fit.flaw(turns, text)):
            raise RowFault(Stage.ENCODE, "ChatTemplate", flaw)
        return text

    def neutral(self, text: str, warnings: list[str]) -> str:
        """Text in which no token of the model's own can be forged: a caption that says <image> is only a caption."""
        if found := self._special.findall(text):
            text = self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
            warning = f"text cleaned: {sorted(set(found))} are tokens of the model"
            if warning not in warnings:
                warnings.append(warning)
        return text

    def _cleaned(self, turn: Turn, warnings: list[str]) -> Turn:
        content = []
        before = ""
        for part in turn["content"]:
            if part["type"] == "text":
                text = part["text"] if part.get("verbatim") else self.neutral(part["text"], warnings)
                if any(match.start() < len(before) < match.end() for match in self._special.finditer(before + text)):
                    text = f" {text}"  # two parts give a token that neither has
                part = {"type": "text", "text": text}
                before = text
            content.append(dict(part))
        return dict(turn) | {"content": content}

    def _chat_form(self) -> PromptForm:
        source = self.source
        template, name = source.chat_template, "the template in prompt.chat_template"
        if template is None:
            template = _chat_template(self._processor, self._tokenizer, source.folder)
            name = f"the chat template of {source.folder}"
        for token in image_tokens(self._processor):
            if token != "<image>" and token in source.own_text:
                raise RunFailed(
                    f"the prompt holds {token!r}, which is the model's own image token. To place an image write "
                    '"{{ image() }}"; an image that is not placed comes first.'
                )
        self._fit = fitting_form(self._processor, template, source.sketches, self._count, name=name, date=source.date)
        return self._fit.form

    def _plain_form(self) -> PromptForm:
        template = getattr(self._processor, "chat_template", None)
        known = image_placeholder(self._processor, self._count, template if isinstance(template, str) else None)
        return PlainForm(known, image_tokens(self._processor))

    def _count(self, text: str, num_images: int) -> int | None:
        """Image tokens that the processor makes of a text and as many small pictures."""
        from PIL import Image

        pictures = [Image.new("RGB", (224, 224), (40 * number, 90, 200)) for number in range(num_images)]
        input_ids = self._call(text, pictures)["input_ids"]
        found = self._num_image_tokens(input_ids)
        if found is not None and num_images and found <= num_images:
            self._learn_image_token(text, input_ids)
            found = self._num_image_tokens(input_ids)
        return found

    def _learn_image_token(self, text: str, input_ids: Any) -> None:
        """The commonest token that pictures alone bring into a text: Ovis2 names another, of which none is left."""
        without = set(self._tokenizer(text)["input_ids"])
        brought = Counter(number for number in input_ids.flatten().tolist() if number not in without)
        self._image_token_ids |= {number for number, _ in brought.most_common(1)}

    def _num_image_tokens(self, input_ids: Any) -> int | None:
        return max((int((input_ids == number).sum()) for number in self._image_token_ids), default=None)

    def _open_ended(self, tensors: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Without the separator with which BERT's tokenizer closes a text: a decoder would take it for the end."""
        input_ids = tensors["input_ids"]
        num_tokens = input_ids.shape[-1]
        if not num_tokens or input_ids[0, -1] != self._closing_id:
            return tensors
        return {name: array[:, :-1] if array.shape[:2] == (1, num_tokens) else array for name, array in tensors.items()}

    def _call(self, text: str, images: Sequence[Image.Image]) -> Mapping[str, Any]:
        arguments: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
        bos = getattr(self._tokenizer, "bos_token", None)
        if bos and text.lstrip().startswith(bos):
            arguments["add_special_tokens"] = False  # the template wrote it: a second one changes answers
        result: Mapping[str, Any]
        if not images:
            result = self._processor(**arguments)
            return result
        try:
            result = self._processor(images=[list(images)], **arguments)
        except (TypeError, ValueError) as problem:
            # One list of images for each prompt is the rule; some (GOT-OCR2) want one list of all.
            try:
                result = self._processor(images=list(images), **arguments)
            except ROW_ERRORS:
                raise problem from None
        return result

    def _sees_all(self, text: str, images: Sequence[Image.Image], num_tokens: int) -> bool:
        """Whether the second image changes a prompt. Where it does not (BLIP-2, GIT), it would be another row's."""
        if self._several_images is None:
            try:
                self._several_images = self._call(text, images[:1])["input_ids"].shape[-1] != num_tokens
            except ROW_ERRORS:  # a place in the text is left without an image
                self._several_images = True
        return self._several_images

    def _check_length(self, num_tokens: int) -> None:
        limit = self.source.max_tokens
        if limit is not None and num_tokens + self.source.num_reserved_tokens > limit:
            raise RowFault(
                Stage.ENCODE,
                "PromptTooLong",
                f"the prompt has {num_tokens} tokens; the model takes {limit}, of which the answer needs at least "
                f"{self.source.num_reserved_tokens}.",
            )


def _image_key(tensors: Mapping[str, np.ndarray[Any, Any]], made: Collection[str], call: ImageCall | None) -> str:
    """Digest of what the model gets of images.

    Where the image processor was called as usual its input is digested, which is smaller than what it makes of it.
    """
    num_tokens = tensors["input_ids"].shape[-1]
    others = {
        name: array
        for name, array in tensors.items()
        if name not in made and (array.shape[:2] != (1, num_tokens) or array.dtype.kind == "f")
    }
    if call is None or not made:
        return digest_of(others)
    return f"{call.key}{digest_of(others)}" if others else call.key


def _chat_template(processor: Any, tokenizer: Any, folder: str) -> str:
    """The text of the model's chat template; older checkpoints have it with the tokenizer."""
    found = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if isinstance(found, Mapping):
        if "default" not in found:
            raise RunFailed(
                f"{folder} has the chat templates {sorted(found)}, and none is called default. Save the one you want "
                "as a file and set prompt.chat_template=FILE.jinja."
            )
        found = found["default"]
    if not found:
        raise RunFailed(
            f"{folder} has no chat template. Set prompt.format=plain for models without one, and write the prompt in "
            "the form that the model was trained on (prompt=plain_vqa, plain_caption and others are such); or give it "
            "a template with prompt.chat_template=FILE.jinja."
        )
    return str(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what processors remark on sketches that do not suit them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
