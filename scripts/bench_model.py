"""A model of a given shape with random weights, saved as from_pretrained reads it, its processor beside it.

    python bench_model.py --shape mid|tiny --output DIR [--renamed DIR]

Nothing is downloaded: configuration, weights, tokenizer and chat template are made here. Weights are kept in bfloat16,
so that a run in float32 computes with the same numbers.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
PATCH = 14
# A CLIP-shaped tower under a Llama-shaped decoder. mid: 121 million parameters, 256 image tokens.
SHAPES: dict[str, dict[str, Any]] = {
    "mid": {
        "vision": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
        "image_size": 224,
        "text": {
            "vocab_size": 4096,
            "hidden_size": 768,
            "intermediate_size": 2304,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
        },
    },
    "tiny": {
        "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "image_size": 56,
        "text": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    },
}
_TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }} : "
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def words(vocab_size: int) -> list[str]:
    """The vocabulary in the order of its numbers: special tokens, words of the template, w8, w9 ..."""
    first = [PAD, BOS, EOS, UNKNOWN, IMAGE, "USER", "ASSISTANT", ":"]
    return first + [f"w{number}" for number in range(len(first), vocab_size)]


def processor(shape: dict[str, Any]) -> Any:
    """CLIP's image processor and a tokenizer that knows one word for each number."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(words(shape["text"]["vocab_size"]))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    size = shape["image_size"]
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=True
    )
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy takes away again
        chat_template=_TEMPLATE,
    )


def config(shape: dict[str, Any]) -> Any:
    """A LlavaConfig of this shape."""
    import transformers

    size = shape["image_size"]
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **shape["vision"], image_size=size, patch_size=PATCH, projection_dim=shape["vision"]["hidden_size"]
        ),
        text_config=transformers.LlamaConfig(
            **shape["text"], max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2
        ),
        image_token_id=words(8).index(IMAGE),
        image_token_index=words(8).index(IMAGE),
        vision_feature_select_strategy="default",
        image_seq_length=(size // PATCH) ** 2,
        tie_word_embeddings=False,
    )


def save(name: str, folder: Path) -> None:
    """Write the model of a shape: always the same weights."""
    import torch
    import transformers

    shape = SHAPES[name]
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config(shape)).to(torch.bfloat16)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    processor(shape).save_pretrained(folder)


def rename(folder: Path, renamed: Path) -> None:
    """Copy a model folder, its weights under the names of transformers 4, which vLLM expects of a LLaVA."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(folder, renamed, ignore=shutil.ignore_patterns("*.safetensors"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {_older_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    save_file(weights, renamed / "model.safetensors", metadata={"format": "pt"})


def _older_name(name: str) -> str:
    tower, inner = "vision_tower.", "vision_tower.vision_model."
    return inner + name.removeprefix(tower) if name.startswith(tower) and not name.startswith(inner) else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--renamed", type=Path, help="folder to write as well, with the names of weights of vLLM")
    args = parser.parse_args()
    save(args.shape, args.output)
    if args.renamed:
        rename(args.output, args.renamed)


if __name__ == "__main__":
    main()
