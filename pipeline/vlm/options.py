"""Options of the model, the engine and generation. No torch here: the command line reads this file for --help."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from pipeline.option import option


class Dtype(Enum):
    """What the weights are computed in; auto is what the checkpoint says."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Attention(Enum):
    """The attention kernel; auto is flash attention where it is installed and fits, else sdpa, else eager."""

    auto = "auto"
    flash_attention_2 = "flash_attention_2"
    flash_attention_3 = "flash_attention_3"
    flash_attention_4 = "flash_attention_4"
    sdpa = "sdpa"
    eager = "eager"


class ImageTransfer(Enum):
    """How far worker processes take an image; the rest of its processing runs beside the model, with the same bits."""

    auto = "auto"
    processed = "processed"
    resized = "resized"
    decoded = "decoded"


class DecodeAttention(Enum):
    """What attends to the slots; auto is the faster on this machine."""

    auto = "auto"
    matmul = "matmul"
    embedding_bag = "embedding_bag"
    sdpa = "sdpa"
    flash = "flash"


class Quantization(Enum):
    """What the weights of the language model are stored in; none leaves them in vlm.dtype."""

    none = "none"
    int8 = "int8"
    int4 = "int4"
    float8 = "float8"


class QuantizationBackend(Enum):
    """The package that quantizes. bitsandbytes knows int8 (LLM.int8) and int4 (nf4)."""

    quanto = "quanto"
    bitsandbytes = "bitsandbytes"


class DeviceMap(Enum):
    """How a model is spread over devices."""

    auto = "auto"


@dataclass(kw_only=True, slots=True)
class VlmConfig:
    """Which model, and in what arithmetic."""

    path: str = option("???", "folder of a model saved by save_pretrained, or its name on the hub")
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    dtype: Dtype = option(Dtype.auto, "arithmetic of the weights: auto, float32, bfloat16, float16")
    attn_implementation: Attention = option(
        Attention.auto, "attention kernel: auto, flash_attention_2, sdpa, eager ...", speed=True
    )
    quantization: Quantization = option(
        Quantization.none, "weights of the language model in none, int8, int4 or float8: less memory, not more speed"
    )
    quantization_backend: QuantizationBackend = option(
        QuantizationBackend.quanto, "package that quantizes: quanto, or bitsandbytes (int8 and int4 alone)"
    )
    quantize_vision: bool = option(False, "quantize the vision tower and the projector as well")
    device: str = option("auto", "auto, cpu, cuda, cuda:n or mps", speed=True)
    device_map: DeviceMap | None = option(
        None, "auto spreads a model over all GPUs that is larger than one; null = one device", speed=True
    )
    processor: dict[str, Any] = option(doc="options of the model's processor, e.g. {max_pixels: 1003520}", factory=dict)
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    allow_pickle: bool = option(False, "accept weights in *.bin files where there are no *.safetensors", speed=True)


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How samples are batched. Nothing here changes an answer."""

    kind: ClassVar[str] = ""

    max_batch_rows: int = option(64, "rows in a batch", speed=True, least=1)
    max_batch_tokens: int = option(
        65_536, "padded prompt tokens plus max_new_tokens, over a batch", speed=True, least=1
    )
    parity_rows: int = option(
        8, "rows answered alone and as a batch before a long run, and compared; 0 = none", speed=True, least=0
    )
    image_transfer: ImageTransfer = option(
        ImageTransfer.auto,
        "what workers send of an image: processed, resized or decoded pixels; auto = decoded for a GPU, else processed",
        speed=True,
    )
    num_workers: int | None = option(
        None, "processes that open and encode images; null = from the cores", speed=True, least=1
    )
    worker_memory_bytes: int = option(
        2 << 30, "memory a worker may take above its own baseline, in bytes", speed=True, least=1
    )
    worker_timeout_seconds: float = option(
        120.0, "seconds; a row that takes a worker longer becomes an error row", speed=True, least=0.1
    )


@dataclass(kw_only=True, slots=True)
class StaticConfig(EngineConfig):
    """Padded batches from which finished rows leave."""

    kind: ClassVar[str] = "static"


@dataclass(kw_only=True, slots=True)
class SlotsConfig(EngineConfig):
    """Continuous batching: a finished answer's slot takes the next row. Padded batches for models that do not fit."""

    kind: ClassVar[str] = "slots"

    max_slot_tokens: int | None = option(
        None, "tokens that all slots hold together; null = what free memory allows", speed=True, least=1
    )
    reuse_images: bool = option(True, "encode an image once for all the rows that show it", speed=True)
    reuse_prefixes: bool = option(True, "compute once what several prompts about one image begin with", speed=True)
    decode_attention: DecodeAttention = option(
        DecodeAttention.auto,
        "kernel of decode steps: auto (the fastest, tried at start), matmul, sdpa, embedding_bag (CPU) or flash (CUDA)",
        speed=True,
    )
    fused_projections: bool = option(True, "compute q, k and v, and gate and up, as one product each", speed=True)
    cuda_graphs: bool = option(True, "on a CUDA device, record decode steps and replay them", speed=True)
    packed_weights: bool = option(
        True, "on a CPU, keep copies of weights in the layout that is fastest there, if memory allows", speed=True
    )


@dataclass(kw_only=True, slots=True)
class AutoConfig(SlotsConfig):
    """Slots where the model and the settings fit them, else padded batches."""

    kind: ClassVar[str] = "auto"


@dataclass(kw_only=True, slots=True)
class VllmConfig(EngineConfig):
    """vLLM's own scheduler and kernels, for the models it knows. max_batch_tokens is its business and ignored."""

    kind: ClassVar[str] = "vllm"

    tensor_parallel_size: int = option(1, "GPUs that share each layer of the model", speed=True, least=1)
    gpu_memory_utilization: float | None = option(
        None, "share of a GPU's memory that vLLM takes; null = vLLM's own", speed=True, least=0.01, most=1
    )
    kv_cache_memory_bytes: int | None = option(
        None, "memory for keys and values, in bytes; null = what is left (CPU: 4 GiB at most)", speed=True, least=1
    )
    max_model_len: int | None = option(
        None, "tokens of a prompt and its answer; a longer prompt is an error row; null = all", speed=True, least=2
    )
    enforce_eager: bool = option(False, "no compilation and no CUDA graphs: starts sooner, runs slower", speed=True)


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """How tokens are chosen. Null means what the checkpoint's generation_config.json says."""

    kind: ClassVar[str] = ""

    max_new_tokens: int = option(256, "tokens of an answer at most", least=1)
    max_new_tokens_column: str | None = option(None, "column with a row's own cap (never above max_new_tokens)")
    ignore_eos: bool = option(False, "go on to max_new_tokens whatever the model says (benchmarks)")
    stop: list[str] = option(doc="strings that end an answer; they are not part of it", factory=list)
    max_repeats: int | None = option(
        None, "an answer that ends in the same words or signs so many times over ends there (repetition)", least=2
    )
    repetition_penalty: float | None = option(None, "above 1 makes tokens of prompt and answer less likely", least=0.01)
    n: int = option(1, "answers per prompt", least=1)
    json_schema: str | None = option(
        None, "JSON Schema that every answer fulfils: a JSON object, or the path of a .json file"
    )
    choices: list[str] | None = option(None, "texts, one of which every answer is, e.g. [yes, no, unclear]")
    choices_column: str | None = option(None, "column with a row's own choices: a list of texts, or a JSON list")
    regex: str | None = option(None, "regular expression that every answer matches as a whole")
    extra: dict[str, Any] = option(
        doc="further arguments of generate(), e.g. {no_repeat_ngram_size: 3} or {num_beams: 4}", factory=dict
    )


@dataclass(kw_only=True, slots=True)
class GreedyConfig(GenerationConfig):
    """The likeliest token at each step."""

    kind: ClassVar[str] = "greedy"


@dataclass(kw_only=True, slots=True)
class SampleConfig(GenerationConfig):
    """Tokens drawn at random, from a seed of the row's own: the same answer in any batch."""

    kind: ClassVar[str] = "sample"

    temperature: float | None = option(None, "1 = as trained, lower = nearer to greedy", least=0)
    top_p: float | None = option(
        None, "draw from the likeliest tokens that hold this share of the probability", least=0, most=1
    )
    top_k: int | None = option(None, "draw from this many likeliest tokens; 0 = all", least=0)
