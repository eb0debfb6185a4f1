"""vlm-batch preview: the answers that a run will give, as they come; prompts as JSON; conversations."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_line import CommandLine
from PIL import Image
from small_run import tree

from pipeline.assembly import build_engine
from pipeline.compose import compose, taken
from pipeline.dataset.demo import DEMO_FILE
from pipeline.errors import Interrupted, RunFailed, UsageError
from pipeline.preview.chat import chat
from pipeline.preview.options import PreviewOptions
from pipeline.preview.render import render
from pipeline.preview.rows import chosen, exact_text, preview
from pipeline.preview.terminal import Terminal
from pipeline.records import Answer, EncodedSample, FinishReason, PromptFacts, RecordKey
from pipeline.shown import printable
from pipeline.tensors.batch import Batcher
from pipeline.vlm.base import OnToken
from pipeline.vlm.identity import identify
from pipeline.vlm.stream import AnswerStream, Halt

DEMO_MODEL = Path(__file__).resolve().parents[1] / "pipeline" / "vlm" / "demo"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Loading the demo model sets torch's threads; other tests shall not notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def taken_apart(words: Sequence[str]) -> tuple[Any, PreviewOptions]:
    options, settings = taken(words, PreviewOptions)
    options.check()
    return compose(settings).config, options


def shown(*words: str, code: int = 0) -> list[tuple[str, str]]:
    """What preview prints, as (label, text)."""
    out = io.StringIO()
    assert preview(*taken_apart(words), Terminal(out)) == code, out.getvalue()
    return labelled(out.getvalue())


def rendered(*words: str, code: int = 0) -> list[dict[str, Any]]:
    out = io.StringIO()
    assert render(*taken_apart(words), out) == code
    return [json.loads(line) for line in out.getvalue().splitlines()]


def conversation(*words: str, turns: str, code: int = 0) -> list[tuple[str, str]]:
    out = io.StringIO()
    assert chat(*taken_apart(["chat=true", *words]), Terminal(out), io.StringIO(turns)) == code, out.getvalue()
    return labelled(out.getvalue())


def labelled(text: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for line in filter(None, text.splitlines()):
        label, rest = line[:8].rstrip(), line[9:]
        if label:
            found.append((label, rest))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]}\n{rest}")
    return found


def texts(lines: Sequence[tuple[str, str]], label: str) -> list[str]:
    return [text for found, text in lines if found == label]


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (40 + number, 30), (80 * number, 90, 200)).save(folder / f"{number}.png")
    return folder


def test_a_preview_shows_the_answers_that_the_run_will_write(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Sampled, two prompts, two samples each, any rows in any order; a folder with other settings is no matter."""
    job = ["generation=sample", "generation.n=2", "generation.temperature=2", "generation.max_new_tokens=12",
           "generation.stop=[ 3]", "prompt.variants={first: What is the first digit?, all: Read both.}"]  # fmt: skip
    vlm_batch("run", "output_dir=answers", "dataset.max_rows=6", *job)
    before = tree(tmp_path)
    previewed = vlm_batch("preview", "output_dir=answers", "rows=[5,0,3]", *job, "seed=42")
    rows = {
        (row["id"], row["prompt_name"], row["sample_index"]): row
        for row in pq.read_table(tmp_path / "answers" / "data").to_pylist()
    }
    ids = {row["row_index"]: row["id"] for row in rows.values()}
    lines = labelled(previewed.stdout)
    assert texts(lines, "row 5") + texts(lines, "row 0") + texts(lines, "row 3") == [ids[5], ids[0], ids[3]]
    keys = [(ids[index], name, sample) for index in (5, 0, 3) for name in ("first", "all") for sample in (0, 1)]
    assert [text for label, text in lines if label.startswith("answer")] == [rows[key]["response"] for key in keys]
    ends = [text.split(", ")[:2] for text in texts(lines, "ended")]
    assert [end[0] for end in ends] == [rows[key]["finish_reason"] for key in keys]
    assert [int(end[1].split()[0]) for end in ends] == [rows[key]["num_generated_tokens"] for key in keys]
    assert tree(tmp_path) == before, "a preview writes nothing"


@pytest.mark.slow
def test_what_a_new_engine_says_does_not_break_the_answer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "preview", "rows=[2]"]
    both = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    lines = [line for line in both.splitlines() if line]
    said = next(place for place, line in enumerate(lines) if line.startswith("slots: logits agree"))
    assert [line.split()[0] for line in lines[said + 1 :]][-2:] == ["answer", "ended"], both


def test_a_row_is_shown_with_image_sizes_prompt_and_counts(tmp_path: Path) -> None:
    """Everything one wants to see before paying for a long run."""
    folder = pictures(tmp_path / "pictures")
    lines = shown("dataset=images", f"dataset.path={folder}", "prompt.user=Count\nthem.", "rows=1")
    assert lines[0] == ("row 1", "1.png")
    assert texts(lines, "image") == [f"41 x 30 pixels, {folder / '1.png'}"]
    assert texts(lines, "prompt") == ["Count\nthem."]
    assert "16 of them image tokens" in texts(lines, "tokens")[0]
    assert texts(lines, "tensor") == ["pixel_values 1 x 1 x 3 x 32 x 32"]
    assert texts(lines, "exactly") == []
    assert len(texts(lines, "answer")) == 1 and "tokens/s" in texts(lines, "ended")[0]


def test_show_prompt_gives_the_text_that_the_model_reads() -> None:
    """With special tokens, and image tokens as many as there are."""
    lines = shown("rows=0", "show_prompt=true", "prompt.user=What is {{ 6 * 7 }}?", "prompt.system=Be brief.")
    (text,) = texts(lines, "exactly")
    image = "<fake_token_around_image><global-img><image> x 16 <fake_token_around_image>"
    assert text.startswith("<|im_start|>system\nBe brief.<end_of_utterance>\n<|im_start|>user\n")
    assert f"{image}{image}What is 42?<end_of_utterance>\n<|im_start|>assistant" in text
    assert texts(lines, "note") == ["TOKEN x 64 stands for 64 of that token in a row"]


def test_the_exact_text_keeps_what_is_no_run_of_special_tokens() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    for text, wanted in [
        ("<image><image> aaaa", ("<image><image> aaaa", False)),
        ("a<image><image><image>b", ("a<image> x 3 b", True)),
    ]:
        assert exact_text(tokenizer, np.array(tokenizer(text)["input_ids"])) == wanted


def test_tokens_are_seen_before_the_answer_is_whole(engine_and_samples: Any) -> None:
    """The engine waits at its fourth token until the reader has seen the first word: only real streaming ends."""
    engine, tokenizer, samples = engine_and_samples
    seen = threading.Event()
    gate = _Gated(engine, seen, at=4)
    stream = AnswerStream(gate, tokenizer, samples[0], stop_strings=[], halt=Halt())
    pieces = []
    for piece in stream:
        pieces.append(piece)
        seen.set()
    assert gate.in_time, "nothing was seen before the fourth token"
    assert stream.answer is not None and stream.answer.response == "".join(pieces) and len(pieces) > 2
    assert stream.first_token_seconds is not None and stream.first_token_seconds < stream.seconds
    assert not stream.differs


class _Gated:
    """An engine whose n-th token waits for an event."""

    def __init__(self, engine: Any, event: threading.Event, at: int) -> None:
        self.on_token: OnToken | None = None
        self.in_time = False
        self._engine, self._event, self._left = engine, event, at

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        self._engine.on_token = self._gated
        return self._engine.answers(samples)  # type: ignore[no-any-return]

    def _gated(self, sample: EncodedSample, token: int) -> None:
        self._left -= 1
        if self._left == 0:
            self.in_time = self._event.wait(30)
        assert self.on_token is not None
        self.on_token(sample, token)


@pytest.fixture(scope="module")
def engine_and_samples() -> Any:
    """The demo model, and the samples of rows 0 and 1."""
    config, options = taken_apart(["rows=[0,1]"])
    identity = identify(config.vlm)
    tasks, preparation = chosen(config, options, identity)
    samples = [item for task in tasks for item in preparation(task)]
    batcher = Batcher(max_rows=1, max_tokens=10_000, max_new_tokens=64)
    return build_engine(config, identity, batcher, Halt()), preparation.processor.tokenizer, samples


class _Scripted:
    """An engine that says given tokens, then a given answer, and a tokenizer of which a token is a character."""

    def __init__(self, said: str, answer: Answer | None = None, problem: BaseException | None = None) -> None:
        self.on_token: OnToken | None = None
        self._said, self._answer, self._problem = said, answer, problem

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        for sample in samples:
            for character in self._said:
                assert self.on_token is not None
                self.on_token(sample, ord(character))
            if self._problem is not None:
                raise self._problem
            assert self._answer is not None
            yield self._answer

    def decode(self, tokens: Sequence[int], **_: object) -> str:
        return "".join(map(chr, tokens))


KEY = RecordKey(0, "default", 0)
SAMPLE = EncodedSample(KEY, "a", {"input_ids": np.zeros((1, 3), np.int64)}, PromptFacts())


def streamed(said: str, response: str, stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    engine = _Scripted(said, Answer(KEY, "a", PromptFacts(), response, FinishReason.STOP, len(said)))
    stream = AnswerStream(engine, engine, SAMPLE, stop_strings=stop, halt=Halt())  # type: ignore[arg-type]
    return list(stream), stream.differs


def test_ctrl_c_as_generation_begins_asks_its_thread_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process would else end under a thread that computes, and be aborted."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    halt = Halt()
    engine = _Scripted("one", Answer(KEY, "a", PromptFacts(), "one", FinishReason.STOP, 3))
    stream = AnswerStream(engine, engine, SAMPLE, stop_strings=(), halt=halt)  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert halt.expired
    assert not any(thread.name == "generate" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("said", "response", "stop"),
    [
        ("  one two three \n ", "one two three", []),
        ("one two STOP", "one two", ["STOP"]),
        ("one two ST and STOP", "one two ST and", ["STOP"]),
        ("one two END OF three", "one two", ["END OF"]),  # in two pieces
        ("one END", "one END", ["END OF"]),  # the end came before the stop string was whole
        ("a b\n\nc d", "a b", ["\n\n"]),
        ("a b </s> c d", "a b", ["</s>", "d"]),
        ("", "", []),
        ("\n\n", "", []),
    ],
)
def test_the_pieces_are_the_response_without_stop_strings_and_blanks_around_it(
    said: str, response: str, stop: list[str]
) -> None:
    pieces, differs = streamed(said, response, stop)
    assert "".join(pieces) == response
    assert not differs


def test_an_answer_that_comes_all_at_once_is_shown_all_the_same() -> None:
    """A search over beams knows its tokens only at the end."""
    assert streamed("", "one two") == (["one two"], False)


def test_an_answer_that_reads_otherwise_as_a_whole_is_told_apart() -> None:
    """Piecewise decoding may lose a blank: the response is what counts."""
    assert streamed("one  two three", "one two three")[1]


def test_what_the_engine_raises_is_raised_where_the_answer_is_read() -> None:
    engine = _Scripted("one two ", problem=RunFailed("the accelerator failed"))
    stream = AnswerStream(engine, engine, SAMPLE, stop_strings=[], halt=Halt())  # type: ignore[arg-type]
    with pytest.raises(RunFailed, match="the accelerator failed"):
        list(stream)


class _Endless(_Scripted):
    """An engine that talks until it is halted."""

    def __init__(self, halt: Halt) -> None:
        super().__init__("")
        self.halt, self.gave_up = halt, False

    def answers(self, samples: Iterator[EncodedSample]) -> Iterator[Answer]:
        for sample in samples:
            while not self.halt.expired:
                assert self.on_token is not None
                self.on_token(sample, ord(" " if self._said else "a"))
                self._said = "" if self._said else "a"
                time.sleep(0.001)
            self.gave_up = True
            raise Interrupted("the grace period ended")
            yield


def test_a_reader_that_leaves_stops_the_generation() -> None:
    """As Ctrl-C does: `halt` is set, and the thread has ended when the reader goes on."""
    halt = Halt()
    engine = _Endless(halt)
    pieces = iter(AnswerStream(engine, engine, SAMPLE, stop_strings=[], halt=halt))  # type: ignore[arg-type]
    assert next(pieces) == "a"
    pieces.close()  # type: ignore[attr-defined]
    assert engine.gave_up
    assert "generate" not in {thread.name for thread in threading.enumerate()}


def test_a_fault_of_a_row_is_shown_and_the_preview_goes_on(tmp_path: Path) -> None:
    """Exit code 1 only if no row was answered; then no model is loaded either."""
    folder = pictures(tmp_path / "pictures")
    (folder / "0.png").write_bytes(b"no picture")
    job = ["dataset=images", f"dataset.path={folder}", "prompt=describe"]
    lines = shown(*job)
    assert [label for label, _ in lines if label.startswith("row")] == ["row 0", "row 1", "row 2"]
    assert "decode/UnidentifiedImageError" in texts(lines, "error")[0]
    assert len(texts(lines, "answer")) == 2
    assert len(texts(shown(*job, "rows=0", "vlm.device=nowhere", code=1), "error")) == 1


def test_rows_that_are_not_there_and_words_that_contradict_each_other_are_refused() -> None:
    for words, sentence in [
        (["rows=[0,7]", "dataset.max_rows=7"], "there is no row 7; the last one is 6"),
        (["rows=-1"], "counted from 0"),
        (["rows=[]"], "counted from 0"),
        (["rows=first"], "rows=first"),
        (["row=1"], "Did you mean 'rows'"),
        (["show_promt=true"], "Did you mean 'show_prompt'"),
        (["image=a.png"], "chat=true"),
        (["chat=true", "rows=1"], "cannot go together"),
        (["chat=true", "render_only=true"], "cannot go together"),
        (["render_only=true", "show_prompt=true"], "Choose one"),
    ]:
        with pytest.raises(UsageError) as refused:
            _preview_of(words)
        assert sentence in str(refused.value), words


def _preview_of(words: Sequence[str]) -> None:
    options, settings = taken(words, PreviewOptions)
    options.check()
    own = [entry.name for entry in fields(PreviewOptions)]
    preview(compose(settings, own=own).config, options, Terminal(io.StringIO()))


def test_render_only_prints_json_and_nothing_else(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Of a folder without weights, because none are loaded."""
    shutil.copytree(DEMO_MODEL, tmp_path / "processor", ignore=shutil.ignore_patterns("*.safetensors"))
    before = tree(tmp_path)
    done = vlm_batch("preview", "render_only=true", "vlm=auto", "vlm.path=processor", "rows=[1,0]", "generation.n=3")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == {
        "id": "digits-00001",
        "prompt_name": "default",
        "text": "<|im_start|>user\n<image>What is the last digit?<end_of_utterance>\n<|im_start|>assistant\n",
        "num_prompt_tokens": 33,
        "num_image_tokens": 16,
    }
    assert second["text"].count("<image>") == 2 and second["num_image_tokens"] == 32
    assert tree(tmp_path) == before


def test_a_prompt_that_cannot_be_rendered_is_an_object_with_its_error(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    (folder / "1.png").write_bytes(b"no picture")
    job = ["render_only=true", "dataset=images", f"dataset.path={folder}"]
    good, bad, _ = rendered(*job, "prompt.user=Ümläut \x1b[2J?")
    assert "Ümläut \x1b[2J?" in good["text"]
    assert bad.pop("error_message")
    assert bad == {"id": "1.png", "prompt_name": "default", "error_stage": "decode",
                   "error_type": "UnidentifiedImageError"}  # fmt: skip
    assert len(rendered(*job, "prompt=describe", "rows=1", code=1)) == 1
    names = [prompt["prompt_name"] for prompt in rendered(*job, "rows=0", "prompt.variants={a: A?, b: B?}")]
    assert names == ["a", "b"]


def test_a_conversation_keeps_its_turns_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt holds what was said before; /image adds a picture, /reset forgets all, a bad image costs nothing."""
    folder = pictures(tmp_path / "my pictures")
    first, second = folder / "0.png", folder / "1.png"
    asked = _asked(monkeypatch)
    lines = conversation(
        f"image={first}", "prompt.system=Be brief.", "generation.max_new_tokens=5",
        turns=f"One?\n\n/image {tmp_path}/none.png\n/image {second}\nTwo?\n/rest\n/reset\nThree?\n/quit\nFour?\n",
    )  # fmt: skip
    answers = texts(lines, "answer")
    assert len(answers) == 3
    system = ("system", ["Be brief."])
    image = "image"
    assert asked == [
        [system, ("user", [image, "One?"])],
        [system, ("user", [image, "One?"]), ("assistant", [answers[0]]), ("user", [image, "Two?"])],
        [system, ("user", ["Three?"])],
    ]
    assert texts(lines, "image") == [f"41 x 30 pixels, {second}"]
    no_image, no_word = texts(lines, "error")
    assert "none.png" in no_image and "there is no /rest" in no_word


def _asked(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, list[str]]]]:
    """The conversations that reach the model's processor."""
    from pipeline.tensors.processor import Processor

    found: list[list[tuple[str, list[str]]]] = []
    encode: Callable[..., Any] = Processor.encode

    def noted(self: Processor, messages: Any, images: Any) -> Any:
        found.append([(t["role"], [part.get("text", part["type"]) for part in t["content"]]) for t in messages])
        return encode(self, messages, images)

    monkeypatch.setattr(Processor, "encode", noted)
    return found


def test_a_turn_without_an_answer_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question longer than the model's context is an error; its image waits for the next one."""
    folder = pictures(tmp_path / "pictures")
    asked = _asked(monkeypatch)
    too_long = "digit " * 3000
    lines = conversation(
        f"image={folder / '0.png'}", "generation.max_new_tokens=5",
        turns=f"One?\n/image {folder / '1.png'}\n{too_long}\nTwo?\n",
    )  # fmt: skip
    assert "PromptTooLong" in texts(lines, "error")[0]
    one = texts(lines, "answer")[0]
    assert asked[-1] == [("user", ["image", "One?"]), ("assistant", [one]), ("user", ["image", "Two?"])]
    assert len(texts(conversation(turns=f"{too_long}\n", code=1), "error")) == 1
    assert conversation(turns="") == [lines[0]]


def test_an_image_that_cannot_be_opened_is_told_before_the_model_loads(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.png: No such file"):
        conversation(f"image={tmp_path}/none.png", "vlm.device=nowhere", turns="One?\n")


def test_a_piped_conversation_is_read_to_its_end(tmp_path: Path) -> None:
    """No dataset, no terminal: lines in, labelled text out, images by name or as a list."""
    folder = pictures(tmp_path / "it's, my pictures")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "preview", "chat=true",
         f"image={folder / '0.png'}", f"image={folder / '1.png'}"],
        input=b"What is the first digit?\nNot UTF-8: \xff\n", capture_output=True, cwd=tmp_path, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = labelled(done.stdout.decode())
    assert texts(lines, "user") == ["What is the first digit?", "Not UTF-8: \ufffd"]
    assert len(texts(lines, "answer")) == 2
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_control_characters_reach_no_terminal(tmp_path: Path) -> None:
    """Escape sequences of a dataset are shown as text; a text cannot forge a line of ours."""
    assert printable("\x1b[2J\x07 \x9b31m \x7f \r\n\ttab ü 漢 \ud800") == (
        "\\x1b[2J\\x07 \\x9b31m \\x7f \\r\n\ttab ü 漢 \\ud800"
    )
    table = pq.read_table(DEMO_FILE).slice(0, 1).to_pylist()[0]
    evil = "x\x1b]0;title\x07\nended    stop, 7 tokens"
    pq.write_table(pa.Table.from_pylist([table | {"id": evil, "question": evil}]), tmp_path / "evil.parquet")
    out = io.StringIO()
    words = ["dataset=parquet", f"dataset.path={tmp_path / 'evil.parquet'}", "dataset.image_column=images",
             "dataset.id_column=id", "show_prompt=true"]  # fmt: skip
    assert preview(*taken_apart(words), Terminal(out)) == 0
    assert not set(out.getvalue()) & {"\x1b", "\x07"}
    assert "\\x1b]0;title\\x07" in out.getvalue()
    assert len(texts(labelled(out.getvalue()), "ended")) == 1


def test_an_encoding_that_lacks_a_character_shows_its_escape_and_each_piece_is_flushed() -> None:
    """The reader of a pipe sees a piece at once, although the writer's buffer is not full."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="ascii", newline="") as out:
        terminal = Terminal(out)
        terminal.begin("answer")
        terminal.add("é ")
        assert os.read(reader, 100) == b"answer   \\xe9 "
    os.close(reader)


def test_ctrl_c_ends_a_preview_in_good_order(tmp_path: Path) -> None:
    """While an answer streams: exit code 75, as of an interrupted run, and no traceback."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "preview", "generation.ignore_eos=true", "generation.max_new_tokens=1900",
         "rows=[0,1,2,3,4,5,6,7,8]"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    assert process.stdout is not None
    read = b""
    while b"answer   first: " not in read and (piece := os.read(process.stdout.fileno(), 4096)):
        read += piece
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert b"Stopped; nothing was written." in said and b"Traceback" not in said
    assert b"row 8" not in read + rest
    assert list(tmp_path.iterdir()) == []


def test_a_list_is_given_as_one_value_as_a_list_or_by_repetition() -> None:
    """And what is none of preview's words is left for the configuration."""
    options, left = taken(["rows=5", "seed=7", "image=a.jpg", "image=it's, ${b}.jpg"], PreviewOptions)
    assert (options.rows, options.image, left) == ([5], ["a.jpg", "it's, ${b}.jpg"], ["seed=7"])
    options, left = taken(["rows=[5, 0]", "image=[a.jpg, b c.jpg]", "rows=null"], PreviewOptions)
    assert (options.rows, options.image, left) == (None, ["a.jpg", "b c.jpg"], [])


def test_help_lists_the_words_of_preview_first(vlm_batch: CommandLine, tmp_path: Path) -> None:
    """Without torch, as for every --help; the usual keys follow."""
    program = (
        "import sys\nfrom pipeline.__main__ import main\nmain(sys.argv[1:])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    words = [sys.executable, "-c", program, "preview", "--help"]
    told = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    places = [
        told.index(f"  {name}=") for name in ("rows", "show_prompt", "render_only", "chat", "image", "prompt.user")
    ]
    assert places == sorted(places)
    assert "vlm-batch preview" in vlm_batch("--help").stdout
    assert "Did you mean 'rows'" in vlm_batch("preview", "row=1", code=2).stderr
