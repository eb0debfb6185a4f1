"""The generation settings that hold: the checkpoint's generation_config.json, overridden by generation.*. No torch.

They are the only ones: engines hand them to transformers in place of the checkpoint's, and they are in the fingerprint.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import RunFailed, UsageError
from pipeline.vlm.constraint import constraint_of
from pipeline.vlm.options import GenerationConfig, SampleConfig

log = logging.getLogger(__name__)

# Arguments of transformers' generate() of which it makes logits processors, each blind to the other rows of a batch.
PROCESSORS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "sequence_bias",
    "suppress_tokens",
)
WARPERS = ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")  # of generation=sample
SEARCH = ("num_beams", "length_penalty", "early_stopping")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_list(value: Any, is_entry: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_entry, value))


def _are_tokens(value: Any) -> bool:
    return _is_list(value, _is_whole)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


# What a value has to be, and in words: a wrong one would make every row an error.
_WHOLE = (_is_whole, "a whole number")
_SHARE = (_is_share, "a number of 0 or more, below 1")
_NGRAM = (lambda value: _is_whole(value) and value != 1, "0 (off) or 2 and more: 1 would ban every word of the prompt")
_TOKENS = (_are_tokens, "a list of token numbers")
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bad_words_ids": (lambda value: _is_list(value, _are_tokens), "a list of lists of token numbers"),
    "begin_suppress_tokens": _TOKENS,
    "early_stopping": (lambda value: value in (True, False, "never"), "true, false or never"),
    "encoder_no_repeat_ngram_size": _NGRAM,
    "epsilon_cutoff": _SHARE,
    "eta_cutoff": _SHARE,
    "exponential_decay_length_penalty": (
        lambda value: _is_list(value, _is_number) and len(value) == 2,
        "[number of tokens, factor]",
    ),
    "forced_bos_token_id": _WHOLE,
    "length_penalty": (_is_number, "a number"),
    "min_new_tokens": _WHOLE,
    "min_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "no_repeat_ngram_size": _NGRAM,
    "num_beams": (lambda value: _is_whole(value) and value > 0, "a whole number of 1 or more"),
    "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "sequence_bias": (
        lambda value: _is_list(value, lambda entry: _is_list(entry, bool) and _are_tokens(entry[0])),
        "a list of [list of token numbers, bias]",
    ),
    "suppress_tokens": _TOKENS,
    "temperature": (lambda value: _is_number(value) and value >= 0, "a number of 0 or more"),
    "top_k": _WHOLE,
    "top_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "typical_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0, up to 1"),
}
# Of the checkpoint, ignored: the count of a padded prompt, or the batch's longest cap, would enter the answers
# (min_length, forced_eos_token_id); or the method needs more than the model's logits.
_NOT_APPLIED = (
    "diversity_penalty",
    "encoder_repetition_penalty",
    "guidance_scale",
    "min_length",
    "num_beam_groups",
    "penalty_alpha",
    "top_h",
    "watermarking_config",
)
_NEUTRAL = (None, False, 0, 0.0, 1, 1.0)
_OFF = {"epsilon_cutoff": 0, "eta_cutoff": 0, "min_p": 0, "typical_p": 1}
_OWN_KEYS = {
    "do_sample": "generation=sample",
    "eos_token_id": "generation.stop, which also takes special tokens",
    "max_length": "generation.max_new_tokens",
    "max_new_tokens": "generation.max_new_tokens",
    "min_length": "generation.extra.min_new_tokens",
    "num_return_sequences": "generation.n",
    "repetition_penalty": "generation.repetition_penalty",
    "stop_strings": "generation.stop",
    "temperature": "generation=sample generation.temperature",
    "top_k": "generation=sample generation.top_k",
    "top_p": "generation=sample generation.top_p",
}
_REFUSED = (
    "assistant_model",
    "attention_mask",
    "cache_config",
    "cache_implementation",
    "custom_generate",
    "forced_eos_token_id",
    "generation_config",
    "input_ids",
    "inputs_embeds",
    "labels",
    "logits_processor",
    "past_key_values",
    "pixel_values",
    "position_ids",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "return_dict_in_generate",
    "stopping_criteria",
    "streamer",
    "use_cache",
)


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """What our own sampler does to the logits."""

    do_sample: bool
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    repetition_penalty: float = 1.0
    warpers: Mapping[str, float] = field(default_factory=dict)  # of WARPERS


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Everything that decides which tokens an answer has, but for its length and its ends."""

    sampling: SamplingSettings = field(default_factory=lambda: SamplingSettings(do_sample=False))
    processors: Mapping[str, Any] = field(default_factory=dict)  # of PROCESSORS, and of SEARCH where it searches
    forward: Mapping[str, Any] = field(default_factory=dict)  # arguments of the model's own forward

    @property
    def num_beams(self) -> int:
        return int(self.processors.get("num_beams", 1))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """By configuration key, for the plan: what holds in place of what was asked for."""
        sampling = self.sampling
        found: dict[str, Any] = {
            "generation.repetition_penalty": sampling.repetition_penalty,
            "generation.extra": dict(sampling.warpers) | dict(self.processors) | dict(self.forward),
        }
        if sampling.do_sample:
            found |= {f"generation.{name}": getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
        return found


def effective_settings(options: GenerationConfig, checkpoint: Mapping[str, Any]) -> GenerationSettings:
    """What holds for this run; a value that neither side names has no effect.

    checkpoint: generation_config.json.

    Raises:
        UsageError: generation.extra names what another key sets, what no engine can honour, or a value of a wrong kind;
            or answers have to be of several forms, or of one over which no beams are searched.
        RunFailed: generation_config.json has such a value.
    """
    _check_extra(options)
    constraint = constraint_of(options)
    if "" in options.stop:
        raise UsageError("generation.stop holds an empty text, with which every answer would end at once.")
    extra = options.extra
    samples = isinstance(options, SampleConfig)

    def of_checkpoint(name: str) -> Any:
        entry = checkpoint.get(name)
        if entry in (None, []):
            return None
        if not _VALUES[name][0](entry):
            raise RunFailed(f"generation_config.json of the model: {name}={entry!r}; expected {_VALUES[name][1]}.")
        return entry

    def value(name: str, neutral: float) -> Any:
        chosen = getattr(options, name, None)
        chosen = of_checkpoint(name) if chosen is None else chosen
        return neutral if chosen is None else chosen

    def given(names: tuple[str, ...]) -> dict[str, Any]:
        found = {name: extra[name] if name in extra else of_checkpoint(name) for name in names}
        return {name: value for name, value in found.items() if value is not None and value != _OFF.get(name)}

    processors = given(PROCESSORS)
    if not samples and (search := given(SEARCH)).get("num_beams", 1) > 1:
        if constraint is not None:
            raise UsageError(
                f"{constraint.key} is obeyed token by token, and a search over beams (num_beams={search['num_beams']}) "
                "is transformers' own. Set generation.extra.num_beams=1, or leave the key out."
            )
        processors |= search
    if constraint is not None and "forced_bos_token_id" in processors:
        raise UsageError(
            f"{constraint.key} says how an answer begins, and so does "
            f"forced_bos_token_id={processors['forced_bos_token_id']} (of generation.extra, or of the checkpoint's "
            "generation_config.json). Set generation.extra.forced_bos_token_id=null to go without the latter."
        )
    penalty = float(value("repetition_penalty", 1.0))
    if samples:
        sampling = SamplingSettings(
            do_sample=True,
            temperature=float(value("temperature", 1.0)),
            top_p=float(value("top_p", 1.0)),
            top_k=int(value("top_k", 0)),
            repetition_penalty=penalty,
            warpers=given(WARPERS),
        )
    else:
        sampling = SamplingSettings(do_sample=False, repetition_penalty=penalty)
    known = {*PROCESSORS, *WARPERS, *SEARCH}
    return GenerationSettings(sampling, processors, {name: entry for name, entry in extra.items() if name not in known})


def slots_obstacle(settings: GenerationSettings, *, is_encoder_decoder: bool = False) -> str | None:
    """Why the slots engine cannot generate with these settings; None where it can."""
    if is_encoder_decoder:
        return "an encoder-decoder has no prompt to go on from"
    if settings.processors:
        return f"the slots do not know {', '.join(sorted(settings.processors))}"
    if settings.forward:
        return f"the slots do not pass on {', '.join(sorted(settings.forward))}"
    return None


def log_settings(settings: GenerationSettings, checkpoint: Mapping[str, Any]) -> None:
    """Say what of the checkpoint holds although nobody asked for it, and what of it does not."""
    ignored = {name: checkpoint[name] for name in _NOT_APPLIED if checkpoint.get(name) not in _NEUTRAL}
    if ignored:
        log.warning("the checkpoint's generation_config.json sets %s, which is not applied here", ignored)
    if settings.processors:
        log.info("generation settings in effect: %s", dict(settings.processors))


def _check_extra(options: GenerationConfig) -> None:
    for name, entry in options.extra.items():
        if name in _OWN_KEYS:
            raise UsageError(f"generation.extra.{name} has a key of its own: {_OWN_KEYS[name]}.")
        if name in _REFUSED:
            near = ", ".join(sorted({*PROCESSORS, *WARPERS, *SEARCH}))
            raise UsageError(f"generation.extra.{name} cannot be set: the engine decides it. Expected one of {near}.")
        if name in WARPERS and not isinstance(options, SampleConfig):
            raise UsageError(f"generation.extra.{name} filters what is drawn at random: it needs generation=sample.")
        if name in SEARCH and isinstance(options, SampleConfig):
            raise UsageError(f"generation.extra.{name} is a beam search's: it needs generation=greedy.")
        near_names = difflib.get_close_matches(name, [*PROCESSORS, *WARPERS, *SEARCH, *_OWN_KEYS], n=1, cutoff=0.8)
        if near_names and name not in (*PROCESSORS, *WARPERS, *SEARCH):
            raise UsageError(f"generation.extra.{name}: there is no such setting. Did you mean {near_names[0]!r}?")
        if entry is not None and name in _VALUES and not _VALUES[name][0](entry):
            raise UsageError(f"generation.extra.{name}={entry!r}: expected {_VALUES[name][1]}.")
