"""How far each way of batching is from the loop, in float32: logits and tokens, over the first rows of a workload.

    python bench_logits.py --model DIR --rows FILE --num-rows 24 --side NAME=WORDS ...

The reference is generate() at batch 1 of plain transformers. WORDS are settings of `vlm-batch run`, with blanks between
them; NAME=padded is generate() over padded batches. The last line is JSON: for each side the largest difference of
logits as a share of the largest logit, up to and with the first token that differs, and how many answers are the same;
or why there is none.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from pipeline.assembly import build_engine, preparation_options
from pipeline.compose import compose
from pipeline.config import RunConfig
from pipeline.errors import VlmBatchError
from pipeline.preparation import Preparation, Task
from pipeline.records import EncodedSample, RecordKey
from pipeline.run import checked
from pipeline.tensors.batch import Batcher
from pipeline.vlm.identity import identify


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer's tokens, and the logits [S, V] each was chosen from."""

    tokens: tuple[int, ...]
    logits_SV: torch.Tensor


class NeverStop:
    """Nobody asks the engine to stop."""

    requested = expired = False


def configured(words: Sequence[str]) -> RunConfig:
    """Settings of `vlm-batch run`.

    Raises:
        UsageError: there is no such choice or key.
    """
    return compose(list(words)).config


def prepared(config: RunConfig, num_rows: int, max_new_tokens: int) -> list[EncodedSample]:
    """The first rows as samples."""
    identity = identify(config.vlm)
    inputs = config.dataset.scan()
    template, _ = checked(config, inputs)
    preparation = Preparation(preparation_options(config, identity, template, fingerprint=""))
    samples = []
    for row in config.dataset.open(inputs).rows(0, num_rows):
        (sample,) = preparation(Task(row, (RecordKey(row.index, "default", 0),)))
        if not isinstance(sample, EncodedSample):
            raise RuntimeError(f"{row.id} could not be prepared: {sample.fault}")
        samples.append(replace(sample, max_new_tokens=min(max_new_tokens, sample.max_new_tokens or max_new_tokens)))
    return samples


def generated(model: Any, samples: Sequence[EncodedSample], batcher: Batcher) -> list[Answered]:
    """generate() over one padded batch."""
    caps = [sample.max_new_tokens or 1 for sample in samples]
    found = model.generate(
        **batcher.collate(samples),
        max_new_tokens=max(caps),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits_BSV = torch.stack(found.logits, dim=1)
    tokens_BS = found.sequences[:, -logits_BSV.shape[1] :]
    return [
        Answered(tuple(tokens_BS[place, :cap].tolist()), logits_BSV[place, :cap].clone())
        for place, cap in enumerate(caps)
    ]


def traced(config: RunConfig, samples: Sequence[EncodedSample]) -> list[Answered | None]:
    """What an engine of ours answers."""
    batcher = Batcher(
        max_rows=config.engine.max_batch_rows,
        max_tokens=config.engine.max_batch_tokens,
        max_new_tokens=config.generation.max_new_tokens,
    )
    engine = build_engine(config, identify(config.vlm), batcher, NeverStop())
    return [
        Answered(trace.tokens, torch.stack(trace.logits_SV)) if trace and trace.logits_SV else None
        for trace in engine.trace(samples)
    ]


def compared(reference: Sequence[Answered], found: Sequence[Answered | None]) -> dict[str, Any]:
    """Against the reference."""
    pairs = [(one, other) for one, other in zip(reference, found, strict=True) if other is not None]
    errors = [_error(one, other) for one, other in pairs]
    return {
        "num_rows": len(pairs),
        "num_identical": sum(one.tokens == other.tokens for one, other in pairs),
        "logit_error": max(errors, default=None),
    }


def _error(one: Answered, other: Answered) -> float:
    pairs = enumerate(zip(one.tokens, other.tokens, strict=False))
    apart = [step for step, (a, b) in pairs if a != b]
    stop = apart[0] + 1 if apart else min(len(one.tokens), len(other.tokens))
    difference_SV = one.logits_SV[:stop].float() - other.logits_SV[:stop].float()
    return float(difference_SV.abs().max() / one.logits_SV[:stop].abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=[], help="of `vlm-batch run`, the same for all sides")
    parser.add_argument("--num-rows", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch-rows", type=int, default=16, help="of the padded batches")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--side", nargs="*", default=[], help="NAME=WORDS")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    config = configured(args.settings)
    samples = prepared(config, args.num_rows, args.max_new_tokens)
    model = transformers.AutoModelForImageTextToText.from_pretrained(config.vlm.path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    batcher = Batcher(
        max_rows=1, max_tokens=1 << 30, max_new_tokens=args.max_new_tokens, pad_id=model.generation_config.pad_token_id
    )
    with torch.inference_mode():
        reference = [generated(model, [sample], batcher)[0] for sample in samples]
        groups = [samples[place : place + args.batch_rows] for place in range(0, len(samples), args.batch_rows)]
        padded = [answer for group in groups for answer in generated(model, group, batcher)]
    del model
    report: dict[str, Any] = {"padded": compared(reference, padded)}
    for side in args.side:
        name, _, words = side.partition("=")
        try:
            report[name] = compared(reference, traced(configured([*args.settings, *words.split()]), samples))
        except VlmBatchError as problem:  # an engine that is not there, say: the others are worth having
            report[name] = {"absent": str(problem).split("\n")[0]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
