"""Train the demo model from nothing: python scripts/train_demo_model.py --output pipeline/vlm/demo

A SmolVLM-shaped network (Idefics3ForConditionalGeneration: vision encoder, connector, Llama decoder) of 1.35 million
parameters with its own tokenizer, processor and chat template, taught to answer questions about pictures of real
handwritten digits. It takes ten to twenty minutes on one CPU core. Prints loss and accuracy; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_digits import TASKS, Digits, Example, another, conversation, example, load_digits, pictures_of
from make_demo_data import test_examples
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

IMAGE_SIDE = 32
PIXEL_MEAN, PIXEL_SPREAD = 0.21, 0.25  # of 0..1; no grey value is exactly the mean: all-zero images count as padding
PATCH_SIDE = 8
SCALE_FACTOR = 1
IMAGE_TOKENS = (IMAGE_SIDE // PATCH_SIDE // SCALE_FACTOR) ** 2
HIDDEN = 128
LAYERS = 3
HEADS = 4

PAD, START, END = "<pad>", "<|im_start|>", "<end_of_utterance>"
IMAGE_MARKS = ("<image>", "<fake_token_around_image>", "<global-img>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<image>
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<end_of_utterance>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
PART_ROWS = 16
EASY_TASKS = ("read", "read", "read", "count", "first", "last")
EASY_SHARE = 0.25  # of the steps: it learns to see before it learns to talk
SECOND_QUESTION_ODDS = 0.3
SYSTEM_ODDS = 0.15
SYSTEM_TEXTS = ("You read handwritten digits.", "You are a helpful assistant.", "Answer briefly.")


MODEL_CARD = """\
---
pipeline_tag: image-text-to-text
library_name: transformers
license: apache-2.0
language: en
---

# Demo: a toy that reads handwritten digits

A vision-language model of {num_parameters:,} parameters that answers questions about small pictures of handwritten
digits: which digits they show, how many, the first, the last, the largest, a short or a long description, and which of
two pictures shows more. It is there so that a pipeline can be tried and tested without a download, with answers that
are right or wrong. It knows nothing else, and it is not meant to read anybody's real handwriting.

- Architecture: `Idefics3ForConditionalGeneration` (that of SmolVLM): a vision encoder of {layers} layers, a Llama
  decoder of {layers}, width {hidden}. Pictures are resized to {side}x{side} pixels and become {image_tokens} tokens.
- Tokenizer: byte-level BPE of {num_tokens} tokens made for these sentences; it takes any other text too.
- Weights: float16 on disk, {weights_bytes:,} bytes, safetensors. Load them in float32.
- Training: from nothing, {steps:,} steps of {batch_rows} conversations (seed {seed}), {minutes:.0f} minutes on a CPU,
  by `scripts/train_demo_model.py`. Every picture is composed anew.
- Accuracy: {accuracy:.1%} of {test_rows:,} questions answered exactly (float32, greedy), on pictures composed of digits
  that were kept out of training. By task: {by_task}.

## Data

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998
(https://doi.org/10.24432/C50P49), licence CC BY 4.0, in the copy of 1,797 images that comes with scikit-learn. Changed:
enlarged, turned by a few degrees, placed on a background, their contrast varied. Training and test digits are split in
blocks of ten before pictures are composed; both come from the same group of writers.
"""

Lesson = tuple[tuple[Image.Image, ...], list[dict[str, Any]]]  # pictures and messages


def make_processor(digits: Digits, seed: int) -> Idefics3Processor:
    """A byte-level BPE tokenizer that has every word of the demo as one token, and takes any other text too."""
    rng = np.random.default_rng(seed)
    texts = [*SYSTEM_TEXTS, *(question for task in TASKS.values() for question in task.questions)]
    for task in TASKS.values():
        texts += [task.answer(pictures_of(digits, task.num_images, rng)[1]) for _ in range(200)]
    texts += [f"{role}\n" for role in ("user", "assistant", "system")] * 50
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[PAD, START, END, *IMAGE_MARKS],
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        additional_special_tokens=list(IMAGE_MARKS),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    pictures = Idefics3ImageProcessorPil(
        do_resize=False,  # only the second resize is needed: straight to max_image_size
        do_image_splitting=False,
        size={"longest_edge": IMAGE_SIDE},
        max_image_size={"longest_edge": IMAGE_SIDE},
        resample=Image.Resampling.BICUBIC,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_SPREAD] * 3,
    )
    return Idefics3Processor(pictures, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def make_model(processor: Idefics3Processor) -> Idefics3ForConditionalGeneration:
    tokenizer = processor.tokenizer
    spread = HIDDEN**-0.5  # the usual 0.02 is meant for networks ten times as wide
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        scale_factor=SCALE_FACTOR,
        vision_config={
            "hidden_size": HIDDEN,
            "initializer_range": spread,
            "intermediate_size": 4 * HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "image_size": IMAGE_SIDE,
            "patch_size": PATCH_SIDE,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "initializer_range": spread,
            "intermediate_size": 3 * HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Idefics3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.vision_model.embeddings.position_embedding.weight, std=0.5)  # order matters early
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def lesson(digits: Digits, rng: np.random.Generator, easy: bool = False) -> Lesson:
    """A conversation to learn from: mostly one question, sometimes two about the same pictures, or a system turn.

    easy: short questions about one picture only.
    """
    tasks = EASY_TASKS if easy else tuple(TASKS)
    start = example(digits, rng, tasks[rng.integers(len(tasks))], distort=True)
    if easy:
        return start.images, conversation(start.images, start.question, start.answer)
    exchanges = [start]
    if rng.random() < SECOND_QUESTION_ODDS:
        exchanges.append(another(start, rng))
    turns = [text for exchange in exchanges for text in (exchange.question, exchange.answer)]
    system = str(rng.choice(SYSTEM_TEXTS)) if rng.random() < SYSTEM_ODDS else None
    return start.images, conversation(start.images, *turns, system=system)


def num_characters(one: Lesson) -> int:
    """For sorting: a batch is run in parts of similar length, because padding costs as much as text."""
    images, messages = one
    return len(images) * 4 * IMAGE_TOKENS + sum(
        len(part.get("text", "")) for turn in messages for part in turn["content"]
    )


def batch_of(processor: Idefics3Processor, lessons: Sequence[Lesson]) -> dict[str, torch.Tensor]:
    """What the processor makes of these lessons, many times faster: the tokenizer and Pillow called directly."""
    marks = f"{IMAGE_MARKS[1]}{IMAGE_MARKS[2]}{IMAGE_MARKS[0] * IMAGE_TOKENS}{IMAGE_MARKS[1]}"
    texts = [processor.apply_chat_template(messages, tokenize=False) for _, messages in lessons]
    tokens = processor.tokenizer([text.replace("<image>", marks) for text in texts], padding=True, return_tensors="pt")
    most = max(len(images) for images, _ in lessons)
    pixels = torch.zeros(len(lessons), most, 3, IMAGE_SIDE, IMAGE_SIDE)
    mask = torch.zeros(len(lessons), most, IMAGE_SIDE, IMAGE_SIDE, dtype=torch.long)
    for row, (images, _) in enumerate(lessons):
        for place, image in enumerate(images):
            small = image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
            grey = np.asarray(small, dtype=np.float32) / 255
            pixels[row, place] = torch.from_numpy((grey - PIXEL_MEAN) / PIXEL_SPREAD)
            mask[row, place] = 1
    return {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
    }


def check_batch_of(processor: Idefics3Processor, digits: Digits) -> None:
    """The fast way must give what the processor gives, or the model would be trained on other inputs than it meets."""
    rng = np.random.default_rng(0)
    lessons = [lesson(digits, rng) for _ in range(32)]
    texts = [processor.apply_chat_template(messages, tokenize=False) for _, messages in lessons]
    true = processor(text=texts, images=[list(images) for images, _ in lessons], padding=True, return_tensors="pt")
    fast = batch_of(processor, lessons)
    if set(true) != set(fast):
        raise AssertionError(f"the processor gives {sorted(true)}, training would use {sorted(fast)}")
    for name, tensor in fast.items():
        torch.testing.assert_close(tensor, true[name])


def spoken(input_ids: torch.Tensor, processor: Idefics3Processor) -> torch.Tensor:
    """True where the token is one the model must say: inside an assistant turn, its end token included. [B, T] bool."""
    tokenizer = processor.tokenizer
    header = tokenizer(f"{START}assistant\n")["input_ids"]
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, ids in enumerate(input_ids.tolist()):
        speaking = False
        for place, token in enumerate(ids):
            mask[row, place] = speaking
            if token == tokenizer.eos_token_id:
                speaking = False
            elif ids[place - len(header) + 1 : place + 1] == header:
                speaking = True
    return mask


def train(
    model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, digits: Digits, args: argparse.Namespace
) -> None:
    rng = np.random.default_rng(args.seed)
    # Muon for the matrices inside the layers gets there in far fewer steps than AdamW alone, which keeps the rest.
    inner = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "layers." in name]
    outer = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "layers." not in name]
    optimizers = [
        torch.optim.Muon(inner, lr=args.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]

    def pace(step: int) -> float:
        warm = min(1.0, (step + 1) / 100)
        return warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / args.steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, pace) for optimizer in optimizers]
    begin = time.perf_counter()
    model.train()
    recent: list[float] = []
    for step in range(args.steps):
        easy = step < EASY_SHARE * args.steps
        lessons = sorted((lesson(digits, rng, easy) for _ in range(args.batch_rows)), key=num_characters)
        parts = [
            batch_of(processor, part)
            for part in (lessons[start : start + PART_ROWS] for start in range(0, len(lessons), PART_ROWS))
        ]
        masks = [spoken(part["input_ids"], processor)[:, 1:] for part in parts]
        num_spoken = sum(int(mask.sum()) for mask in masks)
        model.zero_grad()
        recent.append(0.0)
        for part, mask in zip(parts, masks, strict=True):
            logits = model(**part, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits[mask], part["input_ids"][:, 1:][mask], reduction="sum") / num_spoken
            loss.backward()  # type: ignore[no-untyped-call]
            recent[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - begin
            print(f"step {step + 1:5d} of {args.steps}  loss {np.mean(recent):.4f}  {seconds:.0f} s", flush=True)
            recent.clear()
    model.eval()


@torch.inference_mode()
def answers(
    model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, examples: list[Example], batch_rows: int = 64
) -> list[str]:
    """Greedy answers through the processor, the chat template and generate(), in left-padded batches."""
    found: list[str] = []
    for start in range(0, len(examples), batch_rows):
        part = examples[start : start + batch_rows]
        texts = [
            processor.apply_chat_template(
                conversation(one.images, one.question), add_generation_prompt=True, tokenize=False
            )
            for one in part
        ]
        batch = processor(text=texts, images=[list(one.images) for one in part], padding=True, return_tensors="pt")
        tokens = model.generate(**batch, max_new_tokens=96)
        found += processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def accuracy(found: list[str], examples: list[Example]) -> dict[str, float]:
    """Share of exactly right answers: in all, and by task."""
    right: dict[str, list[bool]] = {"all": []}
    for text, one in zip(found, examples, strict=True):
        right["all"].append(text == one.answer)
        right.setdefault(one.task, []).append(text == one.answer)
    return {task: round(sum(marks) / len(marks), 4) for task, marks in right.items()}


def save(model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, folder: Path) -> None:
    """Half precision on disk; config.json says so."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-rows", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    digits, test_digits = load_digits()
    processor = make_processor(digits, args.seed)
    processor.tokenizer.padding_side = "left"
    check_batch_of(processor, digits)
    model = make_model(processor)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{num_parameters:,} parameters, {len(processor.tokenizer)} tokens, {len(digits.labels)} training digits")
    begin = time.perf_counter()
    train(model, processor, digits, args)
    seconds = time.perf_counter() - begin
    save(model, processor, args.output)
    model = AutoModelForImageTextToText.from_pretrained(args.output, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.output)
    examples = test_examples(test_digits)
    scores = accuracy(answers(model, processor, examples), examples)
    for task, score in scores.items():
        print(f"{task:16s}{score:.4f}")
    facts = {
        "accuracy": scores["all"],
        "train_seconds": round(seconds, 1),
        "steps": args.steps,
        "num_parameters": num_parameters,
        "weights_bytes": (args.output / "model.safetensors").stat().st_size,
        "test_rows": len(examples),
    }
    card = MODEL_CARD.format(
        **facts,
        minutes=seconds / 60,
        batch_rows=args.batch_rows,
        seed=args.seed,
        layers=LAYERS,
        hidden=HIDDEN,
        side=IMAGE_SIDE,
        image_tokens=IMAGE_TOKENS,
        num_tokens=len(processor.tokenizer),
        by_task=", ".join(f"{task} {scores[task]:.1%}" for task in TASKS),
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
