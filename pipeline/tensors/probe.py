"""What a chat template and a processor do with prompts of a run's shape, found out before the first row.

A sketch is a conversation with sentinel texts and as many image parts as a row may have. Nothing here knows a single
architecture: sketches are rendered and encoded, and what comes out is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from pipeline.errors import RunFailed
from pipeline.tensors.chat import ROW_ERRORS, ChatForm, Turn, rendered, text_of

Sketch = tuple[Turn, ...]
# (text, number of images) -> image tokens after the processor; None where the model names no image token.
CountImageTokens = Callable[[str, int], int | None]

# Content that a template printed instead of reading it.
_REPR = re.compile(r"""\{['"](?:type|role|content)['"]: ?['"]""")
# From what most templates take to what some want: text for the system's turn, for the assistant's, for all.
_STRING_ROLES = (
    frozenset[str](),
    frozenset({"system"}),
    frozenset({"system", "assistant"}),
    frozenset({"system", "assistant", "user"}),
)
_TOKEN_NAMES = ("image_token", "boi_token")


@dataclass(frozen=True, slots=True)
class TemplateFit:
    """A chat template and how it wants its turns."""

    form: ChatForm
    mark: str | None  # the token of which it writes one for each image; None where it writes none, as for BLIP-2

    def flaw(self, turns: Sequence[Turn], text: str, roles: Collection[str] = ("system", "user")) -> str | None:
        """What a rendering lost of the turns, or printed as Python writes it; None where it is whole.

        Templates may trim a text. Some leave out what an earlier answer says between <think> and </think>, so the
        assistant's turns are compared only where the caller asks for it.
        """
        parts = [(turn["role"], part["text"]) for turn in turns for part in turn["content"] if part["type"] == "text"]
        if len(_REPR.findall(text)) > sum(len(_REPR.findall(said)) for _, said in parts):
            return "the chat template prints a turn as a Python list"
        for role, said in parts:
            if role in roles and said.strip() not in text:
                return f"the chat template loses the text of the {role} turn"
        num_images = num_images_of(turns)
        if self.mark is not None and (num_marks := text.count(self.mark)) != num_images:
            return f"the chat template writes {num_marks} times {self.mark!r} for {num_images} images"
        return None


def question(num_images: int) -> Sketch:
    """The sketch of a single question."""
    parts = [{"type": "image"} for _ in range(num_images)]
    return ({"role": "user", "content": [*parts, {"type": "text", "text": "Sketchquestion"}]},)


def num_images_of(turns: Sequence[Turn]) -> int:
    return sum(part["type"] == "image" for turn in turns for part in turn["content"])


def fitting_form(
    processor: Any,
    template: str,
    sketches: Sequence[Sketch],
    count: CountImageTokens,
    *,
    name: str,
    date: str | None,
) -> TemplateFit:
    """The first form in which the template renders the first sketch, and of these one that renders most of the others.

    The first sketch is what every row looks like; the others some rows may look like, whose error it then is. `name` is
    what messages call the template.

    Raises:
        RunFailed: no form renders it; the message says what was wrong and what to do.
    """
    _check_date(processor, template, date)
    roles = frozenset(turn["role"] for sketch in sketches for turn in sketch)
    placeholder: str | None = None
    tried: dict[str, str] = {}
    fitting: list[tuple[int, TemplateFit]] = []
    distinct: dict[frozenset[str], frozenset[str]] = {}
    for named in _STRING_ROLES:  # those that differ in roles that no sketch has are tried once
        distinct.setdefault(named & roles, named)
    for string_roles in distinct.values():
        if "user" in string_roles and any(map(num_images_of, sketches)):
            placeholder = image_placeholder(processor, count)
        form = ChatForm(processor, template, date=date, string_roles=string_roles, placeholder=placeholder or "")
        fit = TemplateFit(form, _mark(form, image_tokens(processor)))
        problem = _problem(fit, sketches[0], count)
        if problem is not None:
            tried[f"text for {', '.join(sorted(string_roles))}" if string_roles else "lists of parts"] = problem
            continue
        num_others = sum(_problem(fit, sketch, count) is None for sketch in sketches[1:])
        fitting.append((num_others, fit))
        if num_others == len(sketches) - 1:
            break
    if not fitting:
        system = " If it takes no system turn, put the text of prompt.system into prompt.user."
        raise RunFailed(
            f"{name} does not fit this run. Turns given as "
            + "; as ".join(f"{given}: {problem}" for given, problem in tried.items())
            + ". Set prompt.chat_template=FILE.jinja to use another one, or prompt.format=plain to write the whole "
            "prompt yourself." + (system if sketches[0][0]["role"] == "system" else "")
        )
    return max(fitting, key=lambda entry: entry[0])[1]


def image_placeholder(processor: Any, count: CountImageTokens, template: str | None = None) -> str | None:
    """What stands for an image in a text; "" where the processor puts images in by itself, None where neither works.

    template: a chat template to learn from what the model expects around its image token.
    """
    taken, alone = _taken(count, "Sketchquestion")
    if taken and alone is None:
        return ""
    for token in dict.fromkeys((*_written_by_template(processor, template), *image_tokens(processor), "<image>")):
        taken, found = _taken(count, f"{token}Sketchquestion")
        # One image token more than without it: the processor saw text in it, and put the image in by itself.
        if taken and (found is None or (found > 0 and (not alone or found == alone))):
            return token
    return "" if alone else None


def image_tokens(processor: Any) -> tuple[str, ...]:
    """What the processor names as its image token, or as the token before the image."""
    owners = (processor, getattr(processor, "tokenizer", None))
    found = [getattr(owner, name, None) for name in _TOKEN_NAMES for owner in owners]
    return tuple(dict.fromkeys(str(token) for token in found if token))


def _taken(count: CountImageTokens, text: str) -> tuple[bool, int | None]:
    """Whether the processor takes a text with one image, and the image tokens that it makes."""
    try:
        return True, count(text, 1)
    except ROW_ERRORS:
        return False, None


def _written_by_template(processor: Any, template: str | None) -> tuple[str, ...]:
    """What a second image adds to a rendering, with the marks around the image token."""
    if template is None:
        return ()
    form = ChatForm(processor, template)
    try:
        one, two = form.text(question(1)), form.text(question(2))
    except ROW_ERRORS:
        return ()
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
    return (two[start : len(two) - len(one) + start],) if len(two) > len(one) else ()


def _mark(form: ChatForm, tokens: Sequence[str]) -> str | None:
    try:
        text = form.text(question(1))
    except ROW_ERRORS:
        return None
    return next((token for token in tokens if text.count(token) == 1), None)


def _problem(fit: TemplateFit, sketch: Sketch, count: CountImageTokens) -> str | None:
    """What is wrong with a prompt of this shape; None where nothing is."""
    num_images = num_images_of(sketch)
    try:
        text = fit.form.text(sketch)
        if fit.form.text(sketch) != text:
            return "two renderings of the same turns differ"
        if flaw := fit.flaw(sketch, text, roles=("system", "user", "assistant")):
            return flaw
        if not _asks_for_an_answer(fit.form, sketch):
            return "add_generation_prompt=True adds nothing after the question"
        num_tokens = count(text, num_images)
    except ROW_ERRORS as problem:
        return f"{type(problem).__name__}: {problem}"
    if num_tokens is not None and num_tokens < num_images:
        return f"{num_images} images become {num_tokens} image tokens"
    return None


def _asks_for_an_answer(form: ChatForm, sketch: Sketch) -> bool:
    """Whether the prompt ends with a generation prompt, where the template knows one."""
    if sketch[-1]["role"] == "assistant" or "add_generation_prompt" not in form.template:
        return True
    last = text_of(sketch[-1])
    with_it, without = (form.rendered(sketch, add_generation_prompt=wanted) for wanted in (True, False))
    return with_it.rpartition(last)[2] != without.rpartition(last)[2]


def _check_date(processor: Any, template: str, date: str | None) -> None:
    if date is None or "strftime_now" not in template:
        return
    said = rendered(processor, "{{ strftime_now('%Y-%m-%d') }}", question(0), add_generation_prompt=True, date=date)
    if said != date:
        raise RunFailed(
            f"the chat template prints today's date, and this version of transformers does not let it be set: expected "
            f"{date}, got {said}. Set prompt.chat_template=FILE.jinja to a template without strftime_now."
        )
