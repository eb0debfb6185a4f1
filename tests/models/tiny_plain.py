"""Families without a chat template, and what stands for an image in them."""

from __future__ import annotations

import transformers
from tiny_parts import BOS, EOS, NUM_TOKENS, PAD, SQUARE, TEXT, VISION, Built, tokenizer_with

_QFORMER = VISION | {"encoder_hidden_size": 32, "vocab_size": NUM_TOKENS}
_OPT = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "word_embed_proj_dim": 32,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def blip_2() -> Built:
    processor = transformers.Blip2Processor(
        transformers.BlipImageProcessorPil(size=SQUARE), tokenizer_with("<image>", adds_bos=True), num_query_tokens=4
    )
    settings = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=_QFORMER,
        text_config=transformers.OPTConfig(**_OPT),
        num_query_tokens=4,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Built(processor, processor.tokenizer, transformers.Blip2ForConditionalGeneration(settings))


def instructblip() -> Built:
    qformer_tokenizer = tokenizer_with(adds_bos=True, adds_eos=True)
    processor = transformers.InstructBlipProcessor(
        transformers.BlipImageProcessorPil(size=SQUARE),
        tokenizer_with("<image>", adds_bos=True),
        qformer_tokenizer,
        num_query_tokens=4,
    )
    settings = transformers.InstructBlipConfig(
        vision_config=VISION,
        qformer_config=_QFORMER,
        text_config=transformers.LlamaConfig(**TEXT),
        num_query_tokens=4,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Built(processor, processor.tokenizer, transformers.InstructBlipForConditionalGeneration(settings))


def florence2() -> Built:
    images = transformers.CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_center_crop=False)
    images.image_seq_length = 50
    processor = transformers.Florence2Processor(images, tokenizer_with(named={"image_token": "<image>"}))
    vision = {"embed_dim": [32], "num_heads": [4], "num_groups": [4], "depths": [1], "window_size": 2}
    vision |= {"patch_size": [7], "patch_stride": [4], "patch_padding": [3], "patch_prenorm": [False]}
    text = {
        "model_type": "bart",
        "vocab_size": NUM_TOKENS,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
    }
    settings = transformers.Florence2Config(
        vision_config=vision | {"projection_dim": 32, "max_position_embeddings": 50},
        text_config=text,
        image_token_id=processor.image_token_id,
    )
    return Built(processor, processor.tokenizer, transformers.Florence2ForConditionalGeneration(settings))


def git() -> Built:
    processor = transformers.GitProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE),
        tokenizer_with(adds_bos=True),
    )
    settings = transformers.GitConfig(
        vision_config=VISION,
        **{key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
    )
    return Built(processor, processor.tokenizer, transformers.GitForCausalLM(settings))


def kosmos_2() -> Built:
    processor = transformers.Kosmos2Processor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE),
        tokenizer_with(),
        num_patch_index_tokens=16,
    )
    text = {
        "vocab_size": 512,
        "embed_dim": 32,
        "ffn_dim": 64,
        "layers": 2,
        "attention_heads": 4,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    settings = transformers.Kosmos2Config(vision_config=VISION, text_config=text, latent_query_num=64)
    return Built(processor, processor.tokenizer, transformers.Kosmos2ForConditionalGeneration(settings))
