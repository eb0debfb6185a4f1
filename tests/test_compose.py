"""The command line's key=value words: taken literally, typed, and never code."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from pipeline.compose import choices, compose
from pipeline.config import RunConfig, answer_settings
from pipeline.errors import UsageError
from pipeline.option import doc_of


def config(*words: str, config_dir: Path | None = None) -> RunConfig:
    return compose(words, config_dir=str(config_dir) if config_dir else None).config


def own(folder: Path, name: str, text: str) -> Path:
    """A user's YAML file below a folder of their own."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return folder


TEXTS = [
    "Describe it, briefly. What's {{ name }}?",
    " leading and trailing blanks ",
    "ümläut, 'single' and \"double\" quotes",
    "{a: b}",
    "[a, b]",
    "a=b=c",
    "${seed}",
    "${oc.env:HOME}",
    "\\${seed}",
    "\\\\${seed}\\",
    "$ and ${ and }",
    "two\nlines\twith a tab",
    "null",
    "true",
    "007",
    "# not a comment: it's text",
    "~",
    "*",
    "",
    "{% if title %}{{ title }}{% endif %}",
    "/a b/c,d/ü=1",
    "C:\\data\\${x}",
    "s3://bucket/a?b=c&d",
    "-dash",
]


def test_a_text_is_taken_literally() -> None:
    """Prompts and paths need no quotes of Hydra's, whatever is in them."""
    composed = compose([f"prompt.variants.n{number}={text}" for number, text in enumerate(TEXTS)])
    assert list(composed.config.prompt.variants.values()) == TEXTS
    assert list(answer_settings(composed.config)["prompt.variants"].values()) == TEXTS
    assert isinstance(composed.yaml, str)
    for text in TEXTS[:3] + TEXTS[6:11]:
        found = config("dataset=images", f"prompt.user={text}", f"prompt.system={text}", f"dataset.path={text}")
        assert (found.prompt.user, found.prompt.system, found.dataset.path) == (text, text, text)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("prompt.usr=x", "prompt.user"),
        ("generation.max_tokens=5", "generation.max_new_tokens"),
        ("ouput_dir=x", "output_dir"),
        ("datset=images", "dataset"),
        ("max_new_tokens=5", "generation.max_new_tokens"),
        ("dataset=image", "images"),
        ("generation=sampel", "sample"),
        ("experiment=ocr_page", "ocr_pages"),
    ],
)
def test_a_misspelt_key_or_choice_names_the_nearest(word: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean '{nearest}'"):
        config(word)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("generation.max_new_tokens=many", "generation.max_new_tokens=many: .*could not be converted to Integer"),
        ("generation.max_new_tokens=1.5", "could not be converted to Integer"),
        ("generation.max_new_tokens=null", "not Optional"),
        ("dataset.allow_urls=maybe", "not a valid bool"),
        ("vlm.dtype=float31", "expected one of .*bfloat16"),
        ("prompt.format=chatt", "expected one of"),
        ("prompt.variants=x", "prompt.variants=x"),
        ("prompt.variants={a: {b: c}}", "prompt.variants"),
        ("prompt.examples=[{usr: a}]", "usr"),
        ("prompt.variants.a[b]=x", "no key"),
        ("prompt.variants.=x", "no key"),
        ("seed=1,2", "one value at a time"),
        ("seed=range(1,3)", "one value at a time"),
        ("vlm.processor.mode=a,b", "one value at a time"),
        ("seed=${oc.env:HOME}", "seed=.*expected a value"),
        ("max_error_rate=${seed}", "max_error_rate=.*expected a value"),
        ("dataset=images,hub", "one choice at a time"),
        ("dataset=null", "no such choice"),
        ("prompt={user: x}", "no such choice"),
        ("dataset.path", "not key=value"),
        ("~prompt.system", "keys cannot be removed|not key=value"),
        ("~prompt.system=x", "prompt.system=null"),
        ("-m=1", "Multirun"),
        ("hydra.run.dir=x", "no key"),
        ("=x", "no key"),
        ("dataset.path=???", "dataset.path is not set"),
    ],
)
def test_a_word_that_makes_no_sense_is_an_error_in_a_sentence(word: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        config(word)


def test_a_required_key_is_asked_for() -> None:
    with pytest.raises(UsageError, match=r"dataset\.path is not set.*dataset\.path=\.\.\."):
        config("dataset=images")


def test_null_is_no_value_where_that_is_allowed() -> None:
    found = config("max_error_rate=null", "dataset.image_column=null", "prompt.system=null", "dataset.columns=null")
    assert (found.max_error_rate, found.dataset.image_column, found.prompt.system) == (None, None, None)
    assert found.dataset.columns is None
    assert config("experiment=null").seed == 42


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("END", ["END"]),
        ("[END,STOP]", ["END", "STOP"]),
        ("['a, b']", ["a, b"]),
        ("Well, then", ["Well, then"]),
        ("[1, 2]", ["1", "2"]),
        ("['${x}']", ["${x}"]),
        ("[]", []),
        ("", []),
    ],
)
def test_a_list_can_be_one_word(text: str, value: list[str]) -> None:
    assert config(f"generation.stop={text}").generation.stop == value


def test_a_list_given_again_replaces_the_one_before() -> None:
    assert config("generation.stop=[a,b]", "generation.stop=c").generation.stop == ["c"]


def test_variants_are_given_at_once_or_one_by_one() -> None:
    assert config('prompt.variants={a: "What, is it?", b: why}').prompt.variants == {"a": "What, is it?", "b": "why"}
    found = config("prompt.variants.short=In a word, {what} = ${it}?", "prompt.variants.a-b c=1")
    assert found.prompt.variants == {"short": "In a word, {what} = ${it}?", "a-b c": "1"}
    assert found.prompt_names == ("short", "a-b c")


def test_examples_are_given_on_the_command_line_too() -> None:
    (example,) = config('prompt.examples=[{user: "Is it, ${x}?", assistant: Yes, images: [a.jpg]}]').prompt.examples
    assert (example.user, example.assistant, example.images) == ("Is it, ${x}?", "Yes", ["a.jpg"])


def test_open_options_take_values_of_any_type() -> None:
    found = config("vlm.processor={max_pixels: 1003520}", "vlm.processor.size={height: 4}", "vlm.processor.mode='a, b'")
    assert found.vlm.processor == {"max_pixels": 1003520, "size": {"height": 4}, "mode": "a, b"}


def test_the_last_of_two_words_holds() -> None:
    assert config("seed=1", "seed=2").seed == 2
    assert config("prompt.user=mine", "prompt=ocr").prompt.user == "mine", "a key is above the choice of its group"


@pytest.mark.parametrize("name", ["plain", "a, b", "it's", 'ü "{x}"', "[b]=${x}%41"])
def test_a_folder_of_ones_own_adds_choices_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    folder = own(tmp_path / name, "prompt/mine.yaml", "defaults: [prompt_schema, _self_]\nuser: Mine, {{ name }}\n")
    assert config("prompt=mine", config_dir=folder).prompt.user == "Mine, {{ name }}"
    assert "mine" in choices(str(folder))["prompt"]
    with pytest.raises(UsageError, match="no such choice"):
        config("prompt=mine")


def test_an_experiment_of_ones_own_sets_several_groups(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /dataset: images\ndataset: {path: /photos}\nseed: 7\n"
    found = config("experiment=mine", "dataset.max_rows=3", config_dir=own(tmp_path, "experiment/mine.yaml", text))
    assert (found.dataset.kind, found.dataset.path, found.dataset.max_rows, found.seed) == ("images", "/photos", 3, 7)


def test_a_relative_folder_of_ones_own_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path / "conf", "prompt/mine.yaml", "defaults: [prompt_schema, _self_]\nuser: Mine\n")
    monkeypatch.chdir(tmp_path)
    assert config("prompt=mine", config_dir=Path("conf")).prompt.user == "Mine"
    with pytest.raises(UsageError, match="no such folder"):
        config(config_dir=Path("cnf"))


PROMPT = "defaults: [prompt_schema, _self_]\n"


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("prompt/mine.yaml", PROMPT + "usr: x\n", "'usr' not in"),
        ("prompt/mine.yaml", PROMPT + "user: [\n", "expected the node content"),
        ("prompt/mine.yaml", PROMPT + "user: ${nowhere}\n", "nowhere"),
        ("prompt/mine.yaml", PROMPT + "user: ${oc.env:NOT_SET_AT_ALL}\n", "NOT_SET_AT_ALL"),
        ("prompt/mine.yaml", PROMPT + "user: 'half ${a'\n", "no viable alternative"),
        ("prompt/mine.yaml", "defaults: [prompt_shema, _self_]\n", "prompt_shema"),
        ("prompt/mine.yaml", "- a\n", "list"),
        ("prompt/ocr.yaml", PROMPT + "user: mine\n", "comes with the program"),
        ("dataset/mine.yaml", "path: /photos\n", r"dataset: .*CHOICE_schema.*images"),
        ("generation/mine.yaml", "max_new_tokens: 5\n", r"generation: .*greedy, sample"),
    ],
)
def test_a_faulty_file_of_ones_own_is_an_error_in_a_sentence(
    tmp_path: Path, file: str, text: str, sentence: str
) -> None:
    group, name = Path(file).parent, Path(file).stem
    with pytest.raises(UsageError, match=sentence):
        config(f"{group}={name}", config_dir=own(tmp_path, file, text))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("prompt/mine.yaml", PROMPT + "_target_: os.system\ncommand: touch CANARY\n"),
        ("prompt/mine.yaml", PROMPT + "variants: {_target_: os.system, command: touch CANARY}\n"),
        ("prompt/mine.yaml", PROMPT + "examples: [{_target_: os.system, assistant: touch CANARY}]\n"),
        ("vlm/mine.yaml", "defaults: [vlm_schema, _self_]\npath: x\nprocessor: {_target_: pathlib.Path.touch}\n"),
        ("dataset/mine.yaml", "defaults: [images_schema, _self_]\npath: x\n_target_: os.system\n"),
        (
            "experiment/mine.yaml",
            "# @package _global_\nhydra:\n  job_logging:\n    formatters: {x: {(): os.system, command: touch CANARY}}\n"
            "  callbacks: {x: {_target_: os.system, command: touch CANARY}}\n",
        ),
        ("prompt/mine.yaml", PROMPT + "user: !!python/object/apply:os.system ['touch CANARY']\n"),
    ],
)
def test_nothing_in_a_configuration_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str
) -> None:
    """Fault S-1: what Hydra would call is refused, or it stays the text that it is."""
    monkeypatch.chdir(tmp_path)
    folder = own(tmp_path / "conf", file, text)
    before = sorted(tmp_path.rglob("*"))
    try:
        found = config(f"{Path(file).parent}={Path(file).stem}", config_dir=folder)
    except UsageError:
        found = None
    assert sorted(tmp_path.rglob("*")) == before

    def plain(node: Any) -> None:
        if is_dataclass(node):
            assert type(node).__module__.startswith("pipeline.")
            for entry in fields(node):
                plain(getattr(node, entry.name))
        elif isinstance(node, dict):
            plain(list(node.values()))
        elif isinstance(node, list):
            for part in node:
                plain(part)
        else:
            assert node is None or isinstance(node, (str, int, float, Enum))

    plain(found)


def test_every_option_of_every_choice_has_a_sentence_and_slots() -> None:
    groups = dict(choices())
    seen = 0

    def check(node: Any) -> None:
        nonlocal seen
        assert not hasattr(node, "__dict__"), f"{type(node).__name__} needs slots=True"
        for entry in fields(node):
            value = getattr(node, entry.name)
            if is_dataclass(value):
                check(value)
            else:
                seen += 1
                assert len(doc_of(entry)) > 5, f"{type(node).__name__}.{entry.name} has no sentence for --help"

    del groups["experiment"]
    groups["vlm"] = groups["vlm"][:1]  # presets: other values of the same options
    for number in range(max(map(len, groups.values()))):
        words = [f"{group}={names[number % len(names)]}" for group, names in groups.items()]
        check(config(*words, "dataset.path=x", "vlm.path=x", "output_dir=x"))
    assert seen > 100


def test_composing_leaves_no_trace_of_the_one_before(tmp_path: Path) -> None:
    folder = own(tmp_path, "prompt/mine.yaml", PROMPT + "user: Mine\n")
    assert config("prompt=mine", "seed=1", config_dir=folder).seed == 1
    assert config().seed == 42
    assert "mine" not in choices()["prompt"]


@pytest.mark.parametrize(
    "word",
    [
        "write.shard_rows=0",
        "write.sync_seconds=0",
        "write.sync_seconds=nan",
        "engine.max_batch_rows=-3",
        "max_error_rate=2",
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_key(word: str) -> None:
    with pytest.raises(UsageError, match=f"{word.partition('=')[0]}=.*expected at"):
        compose([word])


def test_an_empty_output_folder_is_no_default() -> None:
    with pytest.raises(UsageError, match="output_dir= is empty"):
        compose(["output_dir="])


def test_text_that_needs_quotes_is_told_so() -> None:
    with pytest.raises(UsageError, match=r"generation.choices=\[ja,größe\]: .* Put quotes around texts"):
        compose(["generation.choices=[ja,größe]"])
    assert config('generation.choices=[ja,"größe"]').generation.choices == ["ja", "größe"]


def test_a_folder_of_images_has_a_prompt_that_needs_no_column() -> None:
    """The default question is a column, and files have none; who chooses a prompt has that one."""
    described = config("dataset=images", "dataset.path=photos").prompt.user
    assert described.startswith("Describe this image")
    assert config("dataset=images", "dataset.path=photos", "prompt=tags").prompt.user.startswith("List 5 to 20 tags")
    assert config("dataset=images", "dataset.path=photos", "prompt.user=Why?").prompt.user == "Why?"
    ocr = config("experiment=ocr_pages", "dataset.path=scans", "vlm.path=m").prompt.user
    assert ocr.startswith("Transcribe all text")
    assert config().prompt.user == "{{ question }}"


def test_a_command_without_a_configuration_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.__main__ import main

    assert main(["score", "--cfg"]) == 2
    assert "score has no configuration to print" in capsys.readouterr().err
