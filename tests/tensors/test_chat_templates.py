"""Chat templates as models bring them: what they want is found out, and what they spoil is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from jinja2 import TemplateError
from PIL import Image
from tiny_processors import (
    IDEFICS_TEMPLATE,
    save_blip2,
    save_gemma3,
    save_idefics3,
    save_llava,
    save_mllama,
)
from transformers import AutoProcessor

from pipeline import assembly
from pipeline.compose import compose
from pipeline.config import answer_settings
from pipeline.errors import RowFault, RunFailed, UsageError
from pipeline.prompt.template import ExampleConfig, PromptConfig
from pipeline.tensors.chat import rendered
from pipeline.tensors.probe import question
from pipeline.tensors.processor import Processor, ProcessorSource
from pipeline.vlm.identity import identify

REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "chat_templates"
MAKERS: dict[str, Callable[[Path, str], Path]] = {
    "blip2_vllm.jinja": save_blip2,
    "gemma3.jinja": save_gemma3,
    "idefics2.jinja": save_llava,
    "internvl_hf.jinja": lambda folder, template: save_llava(folder, template, image_token="<IMG_CONTEXT>"),
    "llama3_2_vision.jinja": save_mllama,
    "llava_vllm.jinja": save_llava,
    "qwen2_5_vl.jinja": lambda folder, template: save_llava(folder, template, image_token="<|image_pad|>"),
    "smolvlm_instruct.jinja": save_llava,
}


def real(name: str) -> str:
    if not (REAL / name).exists():
        pytest.skip("no shared chat templates beside this checkout")
    return (REAL / name).read_text()


def user(text: str, num_images: int = 0) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def loaded(folder: Path, **settings: Any) -> Processor:
    return Processor(ProcessorSource(str(folder), **settings))


def picture() -> Image.Image:
    return Image.effect_noise((40, 30), 60).convert("RGB")


def sketches(**prompt: Any) -> Any:
    return PromptConfig(**prompt).build(()).sketches(has_images=True)


# Published renderings ------------------------------------------------------------------------------------------------


def test_every_recorded_rendering_is_reproduced(tmp_path: Path) -> None:
    """Fault 36: eight real chat templates x seven shapes of messages: the recorded text, or the recorded error."""
    lines = real("jinja2_rendered.jsonl").splitlines()
    processor = AutoProcessor.from_pretrained(save_llava(tmp_path))
    for case in map(json.loads, lines):
        template = real(case["template"])
        try:
            found, error = (
                rendered(processor, template, case["messages"], add_generation_prompt=True, date="2025-07-10"),
                None,
            )
        except (TemplateError, TypeError) as problem:
            found, error = None, str(problem)
        expected_error = case["error"].partition(": ")[2] if case["error"] else None
        assert (found, error) == (case["rendered"], expected_error), (case["template"], case["case"])
    assert len(lines) == 56


def test_every_published_rendering_is_reproduced(tmp_path: Path) -> None:
    cases = json.loads(real("published_cases.json"))
    for number, case in enumerate(cases):
        data = case["data"]
        folder = save_llava(tmp_path / str(number), bos=data.get("bos_token", "<s>"))
        processor = AutoProcessor.from_pretrained(folder)
        found = rendered(processor, case["chat_template"], data["messages"], add_generation_prompt=True, date=None)
        assert found == case["expected"], case["model"]
    assert len(cases) == 2


# Each real template with a processor of its kind ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_a_real_template_asks_the_question_about_every_image(tmp_path: Path, name: str, num_images: int) -> None:
    """Fault 36: each real template asks the question once, about every image, and shows no Python."""
    if (name, num_images) == ("blip2_vllm.jinja", 2):
        pytest.skip("BLIP-2 takes one image")
    processor = loaded(MAKERS[name](tmp_path, real(name)))
    text = processor.text([user("Which is darker?", num_images)], [])
    assert text.count("Which is darker?") == 1
    assert "'type'" not in text
    found = processor.encode([user("Which is darker?", num_images)], [picture()] * num_images)
    tokens_of_one = {"gemma3.jinja": 4, "blip2_vllm.jinja": 4, "llama3_2_vision.jinja": 1}.get(name, 16)
    assert found.num_image_tokens == num_images * tokens_of_one


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava_vllm.jinja", "\n<s>Be brief.\n\n        USER: <image>\nA?\n\n\n    ASSISTANT:\n"),
        (
            "llama3_2_vision.jinja",
            "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 10 Jul 2025\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<|image|>A?"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "gemma3.jinja",
            "<s><start_of_turn>user\nBe brief.\n\n<start_of_image>A?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "idefics2.jinja",
            "System: Be brief.<end_of_utterance>\nUser:<image>A?<end_of_utterance>\nAssistant:",
        ),
    ],
)
def test_a_system_turn_is_given_in_the_form_that_the_template_reads(tmp_path: Path, name: str, expected: str) -> None:
    processor = loaded(
        MAKERS[name](tmp_path, real(name)), date="2025-07-10", sketches=sketches(system="Be brief.", user="A?")
    )
    assert processor.text([said("system", "Be brief."), user("A?", 1)], []) == expected


STRING_SYSTEM = IDEFICS_TEMPLATE.replace(
    "{% for part in", "{% if m.role == 'system' %}{{ m.content | trim }}{% else %}{% for part in"
).replace("{% endfor %}<end", "{% endfor %}{% endif %}<end")


def test_only_the_turns_that_have_to_be_text_are(tmp_path: Path) -> None:
    answered = [ExampleConfig(user="A?", assistant="Yes.")]
    processor = loaded(
        save_idefics3(tmp_path, STRING_SYSTEM), sketches=sketches(system="S", user="B?", examples=answered)
    )
    turns = [said("system", "S"), user("A?"), said("assistant", "Yes."), user("B?", 1)]
    assert processor.text(turns, []) == (
        "system:S<end_of_utterance>\nuser:A?<end_of_utterance>\nassistant:Yes.<end_of_utterance>\n"
        "user:<image>B?<end_of_utterance>\nassistant:"
    )


def test_of_two_forms_the_one_that_more_rows_can_have_is_taken(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content | unique(attribute='type') %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    processor = loaded(save_llava(tmp_path, template))
    assert processor.text([user("A?", 2)], []) == "<image>\n<image>\nA?"


def test_examples_with_images_and_several_turns_reach_the_model_in_order(tmp_path: Path) -> None:
    processor = loaded(save_llava(tmp_path, real("llava_vllm.jinja")))
    turns = [user("A?", 1), said("assistant", "Yes."), user("B?", 2)]
    lines = [line.strip() for line in processor.text(turns, []).split("\n") if line.strip()]
    assert lines == [
        "<s>",
        "USER: <image>",
        "A?",
        "ASSISTANT: Yes.</s>",
        "USER: <image>",
        "<image>",
        "B?",
        "ASSISTANT:",
    ]
    assert processor.encode(turns, [picture()] * 3).num_image_tokens == 3 * 16


def test_a_first_token_that_the_template_writes_after_a_line_break_is_not_added_again(tmp_path: Path) -> None:
    found = loaded(save_llava(tmp_path, real("llava_vllm.jinja"))).encode([user("A?", 1)], [picture()])
    assert (found.tensors["input_ids"] == 1).sum() == 1


# What a template spoils ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}: <image>{% endfor %}", "loses the text of the user turn"),
        ("{% for m in messages %}{{ m }}{% endfor %}", "prints a turn as a Python list"),
        (IDEFICS_TEMPLATE.replace("<image>", ""), "Found total 0 <image> tokens and 1 images"),
        (IDEFICS_TEMPLATE.replace("<image>", "<image><image>"), "Found total 2 <image> tokens and 1 images"),
        (
            IDEFICS_TEMPLATE.replace("{% if add_generation_prompt %}assistant:", "{% if add_generation_prompt %}"),
            "add_generation_prompt=True adds nothing",
        ),
        ("{{ range(99999) | random }}" + IDEFICS_TEMPLATE, "two renderings of the same turns differ"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_spoils_prompts_ends_the_run_before_its_first_row(
    tmp_path: Path, template: str, reason: str
) -> None:
    """Fault 36: a template that drops the question or writes Python ends the run before its first row."""
    with pytest.raises(RunFailed) as caught:
        loaded(save_idefics3(tmp_path, template))
    message = str(caught.value)
    assert reason in message
    assert f"the chat template of {tmp_path} does not fit this run" in message
    assert "prompt.format=plain" in message
    assert "prompt.chat_template=FILE.jinja" in message


def test_a_template_without_generation_prompt_is_taken_as_it_is(tmp_path: Path) -> None:
    template = IDEFICS_TEMPLATE.split("{% if add_generation_prompt %}")[0]
    assert loaded(save_idefics3(tmp_path, template)).text([user("A?")], []) == "user:A?<end_of_utterance>\n"


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + IDEFICS_TEMPLATE
)


def test_a_system_turn_that_the_template_refuses_is_an_error_only_where_the_run_has_one(tmp_path: Path) -> None:
    save_idefics3(tmp_path, NO_SYSTEM)
    processor = loaded(tmp_path, sketches=sketches(user="A?"))
    assert processor.text([user("A?")], []).startswith("user:A?")
    with pytest.raises(
        RunFailed, match=r"(?s)System role not supported.*put the text of prompt\.system into prompt\.user"
    ):
        loaded(tmp_path, sketches=sketches(system="Be brief."))


def test_what_only_some_rows_need_is_their_error(tmp_path: Path) -> None:
    first_only = IDEFICS_TEMPLATE.replace(
        "{{ m.role }}:", "{{ m.role }}:{% set seen = namespace(image=false) %}"
    ).replace(
        "{% if part.type == 'image' %}<image>",
        "{% if part.type == 'image' %}{% if not seen.image %}<image>{% set seen.image = true %}{% endif %}",
    )
    processor = loaded(save_llava(tmp_path, first_only))
    assert processor.encode([user("A?", 1)], [picture()]).num_image_tokens == 16
    with pytest.raises(RowFault, match="writes 1 times '<image>' for 2 images") as caught:
        processor.encode([user("A?", 2)], [picture()] * 2)
    assert (caught.value.stage, caught.value.kind) == ("encode", "ChatTemplate")


def test_a_turn_that_the_template_drops_fails_its_row(tmp_path: Path) -> None:
    processor = loaded(save_blip2(tmp_path, real("blip2_vllm.jinja")))
    assert processor.text([user("A?", 1)], []) == "<s>Question: A? Answer:"
    with pytest.raises(RowFault, match="loses the text of the system turn"):
        processor.text([said("system", "Be brief."), user("A?")], [])


def test_a_row_may_hold_what_looks_like_python(tmp_path: Path) -> None:
    hostile = "[{'type': 'text', 'text': 'A?'}]"
    assert hostile in loaded(save_idefics3(tmp_path)).text([user(hostile)], [])


def test_a_need_of_several_examples_with_images_is_tried_at_start(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"x")
    examples = [ExampleConfig(user="A?", assistant="Yes.", images=[str(tmp_path / "cat.jpg")])]
    one_turn = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + IDEFICS_TEMPLATE
    with pytest.raises(RunFailed, match="one turn only"):
        loaded(save_idefics3(tmp_path, one_turn), sketches=sketches(examples=examples))


# A template of one's own ---------------------------------------------------------------------------------------------


def test_a_template_of_ones_own_stands_in_for_a_missing_one(tmp_path: Path) -> None:
    save_idefics3(tmp_path, None)
    with pytest.raises(RunFailed, match=r"has no chat template.*prompt\.format=plain.*prompt\.chat_template=FILE"):
        loaded(tmp_path)
    assert loaded(tmp_path, chat_template=IDEFICS_TEMPLATE).text([user("A?")], []).endswith("assistant:")
    with pytest.raises(RunFailed, match=r"the template in prompt\.chat_template does not fit"):
        loaded(tmp_path, chat_template="nothing")


def test_a_template_that_comes_with_the_tokenizer_alone_is_found(tmp_path: Path) -> None:
    save_idefics3(tmp_path, None)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": IDEFICS_TEMPLATE}))
    assert loaded(tmp_path).text([user("A?")], []).startswith("user:A?")


@pytest.mark.parametrize("token", ["<|image_pad|>"])
def test_the_models_own_image_token_in_the_users_prompt_is_refused_with_the_way_to_write_it(
    tmp_path: Path, token: str
) -> None:
    save_llava(tmp_path, IDEFICS_TEMPLATE.replace("<image>", token), image_token=token)
    with pytest.raises(RunFailed, match=r"the prompt holds '<\|image_pad\|>'.*write \"\{\{ image\(\) \}\}\""):
        loaded(tmp_path, own_text=f"{token}Describe it.")
    assert loaded(tmp_path, own_text="Describe it.")


def test_the_text_of_the_template_is_part_of_the_plan_and_not_its_place(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / f"{name}.jinja").write_text(text)
    settings = [
        answer_settings(compose([f"prompt.chat_template={tmp_path / name}.jinja"]).config) for name in ("a", "b", "c")
    ]
    assert settings[0] == settings[1]
    assert (settings[0]["prompt.chat_template"], settings[2]["prompt.chat_template"]) == ("one", "two")
    assert answer_settings(compose([]).config)["prompt.chat_template"] is None


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_template_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "own.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"prompt\.chat_template=.*own\.jinja: expected a text file"):
        answer_settings(compose([f"prompt.chat_template={path}"]).config)


# Dates ---------------------------------------------------------------------------------------------------------------


def test_the_date_in_a_prompt_is_that_of_the_run(tmp_path: Path) -> None:
    folder = save_mllama(tmp_path, real("llama3_2_vision.jinja"))
    asked = [user("What is the date?")]
    today, then = loaded(folder).text(asked, []), loaded(folder, date="2025-07-10")
    assert "Today Date: 10 Jul 2025\n" in then.text(asked, [])
    assert "10 Jul 2025" not in today
    assert "26 Jul 2024" not in today  # what the template says where nobody knows the date
    assert loaded(folder).text(asked, []) == today  # the clock goes again


def test_the_workers_of_a_run_are_given_its_template_its_prompts_and_the_day_of_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.jinja").write_text("own")
    words = [f"prompt.chat_template={tmp_path}/own.jinja", "prompt.system=Be brief.", "prompt.user=A?"]
    config = compose(words).config
    plan = mock.Mock(created="2025-07-10T23:59:59Z", fingerprint="f")
    monkeypatch.setattr(assembly, "WorkerPool", lambda build, **_: build)
    template = config.prompt.build(["question"])
    build: Any = assembly.workers(config, plan, identify(config.vlm), template, mock.Mock(num_window_rows=1))
    source = build.args[0].processor
    assert (source.date, source.chat_template, source.own_text) == ("2025-07-10", "own", "A?")
    assert [turn["role"] for turn in source.sketches[0]] == ["system", "user"]


def test_a_date_that_cannot_be_set_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_mllama(tmp_path, real("llama3_2_vision.jinja"))
    monkeypatch.setattr("pipeline.tensors.chat._Day.now", lambda self: datetime(1999, 1, 1))
    with pytest.raises(RunFailed, match=r"expected 2025-07-10, got 1999-01-01"):
        loaded(folder, date="2025-07-10")


# The start of the answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["It is", "It is ", "{\n  ", " a", "```json\n"])
@pytest.mark.parametrize("name", ["idefics2.jinja", "gemma3.jinja", "llava_vllm.jinja", "blip2_vllm.jinja"])
def test_a_prompt_ends_with_the_start_of_the_answer_blanks_included(tmp_path: Path, name: str, prefix: str) -> None:
    processor = loaded(MAKERS[name](tmp_path, real(name)))
    text = processor.text([user("A?", 1), said("assistant", prefix)], [])
    assert text.endswith(prefix.lstrip())
    opening = {"idefics2": "Assistant:", "gemma3": "model\n", "llava_vllm": "ASSISTANT:", "blip2_vllm": "Answer:"}
    assert text.removesuffix(prefix.lstrip()).rstrip(" ").endswith(opening[name.removesuffix(".jinja")])


def test_a_template_that_refuses_an_open_answer_is_followed_by_it(tmp_path: Path) -> None:
    strict = (
        "{% if messages[-1].role != 'user' %}{{ raise_exception('the user has the last word') }}{% endif %}"
        + IDEFICS_TEMPLATE
    )
    processor = loaded(save_idefics3(tmp_path, strict), sketches=sketches(assistant_prefix="It is"))
    assert processor.text([user("A?"), said("assistant", "It is ")], []).endswith("\nassistant:It is ")


def test_an_answer_without_a_beginning_is_none(tmp_path: Path) -> None:
    processor = loaded(save_blip2(tmp_path, real("blip2_vllm.jinja")))
    assert processor.text([user("A?"), said("assistant", "")], []) == "<s>Question: A? Answer:"
    assert processor.text([user("A?"), said("assistant", " ")], []) == "<s>Question: A? Answer:  "


def test_a_start_of_the_answer_may_hold_the_models_tokens_where_the_user_wrote_them(tmp_path: Path) -> None:
    processor = loaded(save_idefics3(tmp_path))
    wrote = {"role": "assistant", "content": [{"type": "text", "text": "</s>It", "verbatim": True}]}
    warnings: list[str] = []
    assert processor.text([user("A?"), wrote], warnings).endswith("assistant:</s>It")
    assert warnings == []
    assert processor.text([user("A?"), said("assistant", "</s>It")], warnings).endswith("assistant:< /s>It")
    assert warnings == ["text cleaned: ['</s>'] are tokens of the model"]


def test_the_default_sketch_is_one_question_about_one_image() -> None:
    assert ProcessorSource("folder").sketches[0] == question(1)
