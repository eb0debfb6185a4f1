"""vLLM's offline engine as one side of the benchmark: encoded images in, a closed Parquet file of answers out.

    .venv-vllm/bin/python scripts/bench_vllm.py --model DIR --rows ROWS.parquet --output ANSWERS.parquet --num-rows 512

Nothing of this project is imported. ROWS.parquet has the columns id, images (a list of {bytes, path}), question and
max_new_tokens; every answer is exactly as long as its row says, so that all sides of the benchmark do equal work.
vLLM gets all requests at once and batches them its own way: continuous batching, chunked prefill, prefix caching and
its cache of processed images as it ships, torch.compile included. On a CPU it gets what its own installation guide
recommends: Intel's OpenMP and, where installed, tcmalloc preloaded, and every core for its threads (its default keeps
one core free, which on two cores is half of them; --threads-bind auto measures that).

The last line is a JSON object: loading_seconds (start of the process's work to a first answer, compilation included),
work_seconds (from the rows' encoded bytes to the closed file), num_rows, num_generated_tokens, and the settings.
"""

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--rows", required=True, type=Path, help="Parquet file of the rows")
    parser.add_argument("--output", required=True, type=Path, help="Parquet file to write: id, response, tokens")
    parser.add_argument("--num-rows", type=int, default=None, help="of the file's first rows; all by default")
    parser.add_argument("--max-num-seqs", type=int, default=None, help="requests decoded at once; vLLM's own default")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-model-len", type=int, default=None, help="tokens of prompt and answer; the model's own")
    parser.add_argument("--num-images", type=int, default=1, help="images in a row at most")
    parser.add_argument("--kv-cache-gib", type=int, default=4, help="memory for keys and values on a CPU, in GiB")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="share of a GPU's memory")
    parser.add_argument("--threads-bind", default="all", help="cores of vLLM's threads on a CPU: all, auto, or a list")
    parser.add_argument("--prefill-tokens", type=int, default=None, help="tokens of a step at most; vLLM's own default")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    options = parser.parse_args()
    prepare_environment(options)

    started = time.monotonic()
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    def request(row: dict[str, Any]) -> dict[str, Any]:
        images = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in row["images"]]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": row["question"]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        data = {"image": images[0] if len(images) == 1 else images}
        return {"prompt": text} | ({"multi_modal_data": data} if images else {})

    def params(max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=True)

    processor = AutoProcessor.from_pretrained(options.model)
    limits = {
        "max_num_seqs": options.max_num_seqs,
        "max_model_len": options.max_model_len,
        "max_num_batched_tokens": options.prefill_tokens,
    }
    llm = LLM(
        options.model,
        dtype=options.dtype,
        limit_mm_per_prompt={"image": options.num_images},
        gpu_memory_utilization=options.gpu_memory_utilization,
        enforce_eager=options.eager,
        **{name: value for name, value in limits.items() if value is not None},
    )
    rows = pq.read_table(options.rows).slice(0, options.num_rows).to_pylist()
    llm.generate([request(rows[0])], params(4), use_tqdm=False)
    loading_seconds, loaded_at = time.monotonic() - started, time.time()

    started = time.monotonic()
    outputs = llm.generate(
        [request(row) for row in rows], [params(row["max_new_tokens"]) for row in rows], use_tqdm=False
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    answers = {
        "id": [row["id"] for row in rows],
        "response": [output.outputs[0].text for output in outputs],
        "tokens": tokens,
    }
    pq.write_table(pa.table(answers), options.output, compression="zstd")
    work_seconds = time.monotonic() - started

    import vllm

    result = {
        "loading_seconds": round(loading_seconds, 3),
        "work_seconds": round(work_seconds, 3),
        "loaded_at": loaded_at,
        "num_rows": len(rows),
        "num_generated_tokens": sum(map(len, tokens)),
        "num_prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "vllm": vllm.__version__,
        "dtype": options.dtype,
        "max_num_seqs": llm.llm_engine.vllm_config.scheduler_config.max_num_seqs,
        "threads_bind": os.environ.get("VLLM_CPU_OMP_THREADS_BIND"),
    }
    del llm
    print(json.dumps(result), flush=True)


def prepare_environment(options: argparse.Namespace) -> None:
    """What vLLM reads from the environment; a library to be loaded first needs a fresh process."""
    if "LD_PRELOAD" not in os.environ:
        folders = (Path(sys.prefix) / "lib", Path("/usr/lib/x86_64-linux-gnu"))
        found = [next(iter(sorted(folder.glob(name))), None) for folder in folders for name in _PRELOADED]
        if libraries := [str(path) for path in found if path is not None]:
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": ":".join(libraries)})
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores if options.threads_bind == "all" else options.threads_bind
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options.kv_cache_gib)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


_PRELOADED = ("libtcmalloc_minimal.so.4", "libiomp5.so")

if __name__ == "__main__":
    main()
