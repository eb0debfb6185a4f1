"""engine=vllm: what it refuses and how it feeds, without vLLM; whole runs in the environment of `make vllm`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers
from command_line import CHECKOUT
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import EOS, samples, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.errors import Interrupted, RunFailed, UsageError
from pipeline.records import EncodedSample, FinishReason, Stage
from pipeline.vlm import vllm_load
from pipeline.vlm.answer import Ending
from pipeline.vlm.constraint import Constraint, constraint_of
from pipeline.vlm.generation import GenerationSettings, SamplingSettings
from pipeline.vlm.options import Attention, DeviceMap, GreedyConfig, Quantization, VllmConfig, VlmConfig
from pipeline.vlm.vllm_engine import Running, VllmEngine
from pipeline.vlm.vllm_load import check_vllm
from pipeline.vlm.vllm_process import RUN_PROCESS

GREEDY = GenerationSettings()
PYTHON = CHECKOUT / ".venv-vllm" / "bin" / "python"


class EngineDeadError(Exception):
    """As vLLM's."""


class Vllm:
    """Stands for vLLM's engine: every request gets the tokens 5, 6, 7 ... one at a step, until a rule ends it.

    poison: with the row of this id the process ends; refused: the row of this id is not taken.
    """

    def __init__(self, *, poison: str | None = None, refused: str | None = None, eos: int | None = None) -> None:
        self.poison, self.refused, self.eos = poison, refused, eos
        self.live: dict[str, tuple[EncodedSample, Any, list[int]]] = {}
        self.most_in_flight = 0
        self.aborted: list[str] = []
        self.parameters: list[Any] = []
        self.engine_core = SimpleNamespace(shutdown=lambda: None)

    def add_request(self, name: str, prompt: EncodedSample, parameters: Any) -> None:
        if prompt.id == self.refused:
            raise ValueError("the prompt is\nlonger than it may be")
        self.live[name] = (prompt, parameters, [])
        self.parameters.append(parameters)
        self.most_in_flight = max(self.most_in_flight, len(self.live))

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names

    def step(self) -> list[Any]:
        if any(sample.id == self.poison for sample, _, _ in self.live.values()):
            self.live.clear()
            raise EngineDeadError
        done = []
        for name, (_, parameters, tokens) in list(self.live.items()):
            tokens.append(self.eos if self.eos and len(tokens) == 2 else 5 + len(tokens))
            full = len(tokens) == parameters.max_tokens
            if full or tokens[-1] in parameters.stop_token_ids:
                del self.live[name]
                completion = SimpleNamespace(token_ids=tokens, finish_reason="length" if full else "stop")
                done.append(SimpleNamespace(request_id=name, finished=True, outputs=[completion]))
        return done


@pytest.fixture(autouse=True)
def vllm_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three names of vLLM that the engine uses."""
    kinds = SimpleNamespace(DELTA="delta", FINAL_ONLY="final")
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {"RequestOutputKind": kinds, "StructuredOutputsParams": SimpleNamespace},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


def engine_around(
    llm: Vllm,
    *,
    starts: list[Vllm] | None = None,
    settings: GenerationSettings = GREEDY,
    stop: Any = None,
    rows: int = 2,
    stop_strings: tuple[str, ...] = (),
    constraint: Constraint | None = None,
) -> VllmEngine:
    running = [Running(each, SimpleNamespace(of=lambda sample: sample)) for each in [llm, *(starts or [])]]  # type: ignore[arg-type]
    return VllmEngine(
        running[0],
        iter(running[1:]).__next__,
        Ending(tokenizer(), eos_ids=[EOS], stop=stop_strings, ignore_eos=False),
        settings=settings,
        stop_strings=stop_strings,
        seed=1,
        max_new_tokens=4,
        max_batch_rows=rows,
        stop=stop or SimpleNamespace(requested=False, expired=False),
        numerics={"engine": "vllm", "dtype": "float32"},
        constraint=constraint,
    )


def test_what_vllm_cannot_honour_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_load.importlib.util, "find_spec", lambda name: object())
    fine = VlmConfig(path="x")
    check_vllm(VllmConfig(), fine, GenerationSettings(processors={"min_new_tokens": 2}))
    cases: list[tuple[VlmConfig, GenerationSettings, str]] = [
        (fine, GenerationSettings(processors={"num_beams": 4}), "beams"),
        (fine, GenerationSettings(processors={"no_repeat_ngram_size": 3}), "no_repeat_ngram_size"),
        (fine, GenerationSettings(SamplingSettings(True, warpers={"typical_p": 0.5})), "typical_p"),
        (fine, GenerationSettings(forward={"visual_token_id": 3}), "visual_token_id"),
        (VlmConfig(path="x", quantization=Quantization.int8), GREEDY, "vlm.quantization=int8"),
        (VlmConfig(path="x", attn_implementation=Attention.eager), GREEDY, "vlm.attn_implementation=eager"),
        (VlmConfig(path="x", device_map=DeviceMap.auto), GREEDY, "tensor_parallel_size"),
        (VlmConfig(path="x", device="cuda:1"), GREEDY, "CUDA_VISIBLE_DEVICES"),
    ]
    for vlm, settings, said in cases:
        with pytest.raises(UsageError, match=said):
            check_vllm(VllmConfig(), vlm, settings)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"vlm-batch\[vllm\]"):
        check_vllm(VllmConfig(), VlmConfig(path="x"), GREEDY)


def test_requests_are_fed_ahead_but_only_so_far() -> None:
    llm = Vllm()
    taken = 0

    def stream() -> Iterator[EncodedSample]:
        nonlocal taken
        for sample in samples("llava", 30):
            taken += 1
            yield sample

    answers = engine_around(llm, rows=2).answers(stream())
    next(answers)
    assert taken == 4
    assert len(list(answers)) == 29
    assert llm.most_in_flight == 4


def test_an_answer_ends_at_its_cap_at_the_end_token_or_at_a_stop_string() -> None:
    (capped,) = engine_around(Vllm()).answers(iter(samples("llava", 1, cap=3)))
    assert (capped.response, capped.finish_reason, capped.num_generated_tokens) == (
        "w5 w6 w7",
        FinishReason.LENGTH,
        3,
    )
    (ended,) = engine_around(Vllm(eos=EOS)).answers(iter(samples("llava", 1)))
    assert (ended.response, ended.finish_reason, ended.num_generated_tokens) == ("w5 w6", FinishReason.STOP, 3)
    (stopped,) = engine_around(Vllm(), stop_strings=("w7",)).answers(iter(samples("llava", 1)))
    assert (stopped.response, stopped.finish_reason, stopped.num_generated_tokens) == ("w5 w6", FinishReason.STOP, 3)


def test_each_row_is_drawn_with_a_seed_of_its_own_that_vllm_can_hold() -> None:
    llm = Vllm()
    settings = GenerationSettings(SamplingSettings(True, temperature=0.7, top_p=0.0, top_k=5, warpers={"min_p": 0.1}))
    assert len(list(engine_around(llm, settings=settings).answers(iter(samples("llava", 6))))) == 6
    seeds = {parameters.seed for parameters in llm.parameters}
    assert len(seeds) == 6 and all(0 <= seed < 1 << 63 for seed in seeds)
    first = llm.parameters[0]
    assert (first.temperature, first.top_k, first.min_p) == (0.7, 5, 0.1) and 0 < first.top_p < 1e-3


def test_a_row_that_vllm_refuses_is_an_error_row_and_the_others_are_answered() -> None:
    answers = {answer.id: answer for answer in engine_around(Vllm(refused="row 2")).answers(iter(samples("llava", 5)))}
    fault = answers.pop("row 2").fault
    assert fault is not None
    assert (fault.stage, fault.kind) == (Stage.GENERATE, "ValueError")
    assert fault.message == "the prompt is longer than it may be"
    assert len(answers) == 4 and all(answer.fault is None for answer in answers.values())


def test_a_row_with_which_vllm_ends_is_found_and_its_neighbours_are_answered() -> None:
    starts = [Vllm(poison="row 3") for _ in range(3)]
    engine = engine_around(Vllm(poison="row 3"), starts=starts)
    answers = {answer.id: answer for answer in engine.answers(iter(samples("llava", 9)))}
    assert len(answers) == 9
    assert [name for name, answer in answers.items() if answer.fault] == ["row 3"]


def test_a_vllm_that_ends_with_every_row_ends_the_run() -> None:
    class Broken(Vllm):
        def step(self) -> list[Any]:
            raise EngineDeadError

    with pytest.raises(RunFailed, match="times in a row"):
        list(engine_around(Broken(), starts=[Broken() for _ in range(9)]).answers(iter(samples("llava", 9))))


def test_a_killed_process_is_noticed_though_vllm_would_wait_forever() -> None:
    llm, next_llm = Vllm(), Vllm()
    llm.engine_core = SimpleNamespace(
        outputs_queue=Queue(), resources=SimpleNamespace(engine_dead=True), shutdown=lambda: None
    )
    assert len(list(engine_around(llm, starts=[next_llm]).answers(iter(samples("llava", 3))))) == 3


def test_a_request_carries_the_rule_of_its_rows_answer() -> None:
    llm = Vllm()
    constraint = constraint_of(GreedyConfig(choices_column="options"))
    given = [replace(one, choices=(f"w{number}", "w1")) for number, one in enumerate(samples("llava", 2))]
    list(engine_around(llm, constraint=constraint).answers(iter(given)))
    assert [one.structured_outputs.grammar for one in llm.parameters] == [
        "start: / ?(?:w0|w1)/",
        "start: / ?(?:w1|w1)/",
    ]
    free = Vllm()
    list(engine_around(free).answers(iter(given)))
    assert not any(hasattr(one, "structured_outputs") for one in free.parameters)


def test_after_a_stop_request_what_is_in_flight_is_finished_and_nothing_more_is_begun() -> None:
    stop = SimpleNamespace(requested=False, expired=False)
    answers = engine_around(Vllm(), stop=stop, rows=2).answers(iter(samples("llava", 12)))
    next(answers)
    stop.requested = True
    assert len(list(answers)) == 3


def test_the_end_of_the_grace_period_gives_up_what_is_in_flight() -> None:
    llm, stop = Vllm(), SimpleNamespace(requested=False, expired=False)
    answers = engine_around(llm, stop=stop).answers(iter([*samples("llava", 1, cap=1), *samples("llava", 3)]))
    next(answers)
    stop.requested = stop.expired = True
    with pytest.raises(Interrupted):
        list(answers)
    assert len(llm.aborted) == 3


def test_a_trace_has_tokens_and_leaves_the_counts_alone() -> None:
    engine = engine_around(Vllm(refused="row 1"))
    traces = engine.trace(samples("llava", 3))
    assert traces[1] is None
    assert traces[0] is not None and traces[0].tokens == (5, 6, 7, 8) and traces[0].logits_SV == []
    assert engine.counts.num_generated_tokens == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent death signal is Linux's")
def test_vllms_processes_end_with_a_run_that_is_killed() -> None:
    child = (
        "import time; from pipeline.vlm.vllm_process import end_with_parent; end_with_parent(); print('up', flush=1)"
    )
    run = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child + '; import time; time.sleep(60)'!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", run], env=os.environ | {RUN_PROCESS: "12345"}, cwd=CHECKOUT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
        assert process.stdout.read() == b""  # the last who could write is gone


# What follows runs in the environment of `make vllm`.


def in_vllm(*words: str, code: int = 0) -> None:
    if not PYTHON.exists():
        pytest.skip("vLLM is not installed: make vllm")
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_CI_ENV": "1"}
    done = subprocess.run(
        [str(PYTHON), "-m", "pipeline", *words],
        cwd=CHECKOUT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"


def save_llava(folder: Path, *, of_bytes: bool = False) -> Path:
    """A LLaVA of random weights, under the names of weights that vLLM knows (those of transformers 4).

    of_bytes: its tokens are bytes, not words.
    """
    vision = transformers.CLIPVisionConfig(
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 28, "patch_size": 14, "projection_dim": 32},
    )
    text = transformers.LlamaConfig(
        **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
    )
    settings = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, image_seq_length=4)
    transformers.set_seed(0)
    transformers.LlavaForConditionalGeneration(settings).save_pretrained(folder)
    weights = folder / "model.safetensors"
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in load_file(weights).items()}
    save_file(renamed, weights, metadata={"format": "pt"})
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": 4} | {f"w{n}": n for n in range(5, 300)}
    splitter = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if of_bytes:
        special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": 4}
        letters = {letter: 5 + n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        splitter = Tokenizer(models.BPE(vocab=special | letters, merges=[]))
        splitter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splitter.decoder = decoders.ByteLevel()
    splitter.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>", "<image>"])
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=splitter, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    template = (
        "{% for turn in messages %}{% for part in turn['content'] %}{% if part['type'] == 'image' %}<image> "
        "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    transformers.LlavaProcessor(
        *(images, own),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def rows_of(output_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output_dir / "data" / "part-00000.parquet").to_pylist()
    return rows


@pytest.mark.slow
def test_choices_are_obeyed_by_vllm_as_by_static(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip("vLLM is not installed: make vllm")
    random = np.random.default_rng(0)
    lines = ["picture,question"]
    for number in range(8):
        Image.fromarray(random.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{' '.join(f'w{word}' for word in random.integers(5, 300, 2))}")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    common = (
        *("run", "vlm=auto", f"vlm.path={save_llava(tmp_path / 'model', of_bytes=True)}", "dataset=jsonl"),
        *(f"dataset.path={tmp_path / 'rows.csv'}", "dataset.image_column=picture", "prompt.user={{question}}"),
        *(
            "generation.max_new_tokens=6",
            "engine.num_workers=1",
            f"generation.choices={[f'w{n}' for n in range(20, 60)]}",
        ),
    )
    in_vllm(*common, f"output_dir={tmp_path / 'static'}", "engine=static")
    in_vllm(*common, f"output_dir={tmp_path / 'vllm'}", "engine=vllm", "engine.enforce_eager=true")
    rows, expected = rows_of(tmp_path / "vllm"), rows_of(tmp_path / "static")
    assert all(row["parse_ok"] and row["finish_reason"] == "stop" for row in rows)
    for row, other in zip(rows, expected, strict=True):  # vLLM takes the end token
        assert {name for name in row if row[name] != other[name]} <= {"run_id", "num_generated_tokens"}
    assert len({row["response"] for row in rows}) > 2


@pytest.mark.slow
def test_a_run_through_vllm_accounts_for_every_row_and_says_what_static_says(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip("vLLM is not installed: make vllm")
    random = np.random.default_rng(0)
    lines = ["picture,question"]
    for number in range(12):
        size = (int(random.integers(20, 90)), int(random.integers(20, 90)))
        noise = random.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(tmp_path / f"{number}.png")
        question = " ".join(f"w{word}" for word in random.integers(5, 300, 60 if number == 5 else 3 + number % 4))
        lines.append(f"{number}.png,{question}")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    model = save_llava(tmp_path / "model")
    common = (
        *("run", "vlm=auto", f"vlm.path={model}", "dataset=jsonl", f"dataset.path={tmp_path / 'rows.csv'}"),
        *("dataset.image_column=picture", "prompt.user={{question}}", "generation.max_new_tokens=6"),
        *("generation.repetition_penalty=1.3", "engine.num_workers=1", "engine.max_batch_rows=4"),
    )
    in_vllm(*common, f"output_dir={tmp_path / 'static'}", "engine=static")
    by_vllm = tmp_path / "vllm"
    in_vllm(*common, f"output_dir={by_vllm}", "engine=vllm", "engine.enforce_eager=true", "engine.max_model_len=48")
    in_vllm("audit", f"output_dir={by_vllm}")
    rows, expected = rows_of(by_vllm), rows_of(tmp_path / "static")
    assert [row["status"] for row in rows] == ["error" if number == 5 else "ok" for number in range(12)]
    assert rows[5]["error_stage"] == "generate" and "longer than the maximum model length" in rows[5]["error_message"]
    for row, other in zip(rows, expected, strict=True):
        if row["status"] == "ok":
            assert {name for name in row if row[name] != other[name]} <= {"run_id"}
    assert len({row["response"] for row in rows}) > 6  # pictures and questions matter
