"""The loop of the slots engine: free slots are filled with prompts, all live slots decode together, answers leave.

    queue -> prefill of a few prompts -> slots -> decode step over all of them -> tokens -> answers, free slots -> ...

Shapes: B live rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipeline.records import EncodedSample
from pipeline.vlm.answer import Generation
from pipeline.vlm.base import EngineCounts
from pipeline.vlm.choice import TokenChoice
from pipeline.vlm.slots.attention import NAME
from pipeline.vlm.slots.graph import Decode
from pipeline.vlm.slots.memory import Slot, SlotMemory
from pipeline.vlm.slots.prefill import Prefill
from pipeline.vlm.slots.queue import Waiting


class Choose(Protocol):
    """Gives each row its next token (pipeline.vlm.choice); a trial gives those that it knows."""

    @property
    def needs_history(self) -> bool:
        """Whether it wants to know which tokens a row has had."""
        ...

    def __call__(
        self, generations: Sequence[Generation], logits_BV: torch.Tensor, seen_BV: torch.Tensor | None, /
    ) -> torch.Tensor: ...


@dataclass(slots=True)
class LiveRows:
    """What the next decode step is given; all in one order, that of pools and their slots."""

    generations: list[Generation]
    slots: list[Slot]
    token_B: torch.Tensor
    position: torch.Tensor  # [..., B, 1]
    length_B: torch.Tensor  # tokens that the slot holds
    seen_BV: torch.Tensor | None


class SlotLoop:
    """Rows in slots. `admit` and `step` are the two moves; what is done leaves with the next `arrange`.

    Args:
        recorded: makes of a decoder one that records its steps (graph.py); None leaves it as it is.
        late: read a step's tokens from the device while the next one is computed. A row is then computed once more
            after its end, and the device never waits for the rules by which rows end.
    """

    def __init__(
        self,
        prefill: Prefill,
        memory: SlotMemory,
        choose: Choose,
        counts: EngineCounts,
        recorded: Callable[[Decode], Decode] | None = None,
        *,
        late: bool = False,
    ) -> None:
        self._prefill, self._memory = prefill, memory
        self._choose, self._counts = choose, counts
        self._recorded = recorded
        self._late = choose if late and isinstance(choose, TokenChoice) else None
        self._unread: _Unread | None = None
        self._rows: LiveRows | None = None
        self._decode: Decode | None = None

    @property
    def num_live(self) -> int:
        return len(self._rows.generations) if self._rows else 0

    @property
    def generations(self) -> list[Generation]:
        """Those in slots."""
        return list(self._rows.generations) if self._rows else []

    def admit(self, waiting: Sequence[Waiting], generations: Sequence[Generation], slots: Sequence[Slot]) -> None:
        """Prefill prompts and put them into slots with their first token.

        Raises:
            whatever the model raises; no row is in its slot then.
        """
        began, vision_seconds = time.perf_counter(), self._counts.vision_seconds
        num_computed = self._prefill.num_computed_tokens
        whole, of_sample = self._prefill(waiting)
        if self._decode is None:
            decoder = Decoder(whole.decoder)
            self._decode = self._recorded(decoder) if self._recorded else decoder
        found = whole.of(of_sample)
        for slot, row, spans in zip(slots, found.rows, found.spans, strict=True):
            self._memory.insert(slot, found.layers, row, spans)
        token_B = self._choose(generations, found.logits_BV, found.seen_BV)
        self._counts.num_batches += 1
        self._counts.num_prompt_tokens += sum(one.sample.num_tokens for one in waiting)
        self._counts.num_padded_prompt_tokens += self._prefill.num_computed_tokens - num_computed
        new = LiveRows(
            list(generations),
            list(slots),
            token_B,
            found.position + 1,
            torch.tensor([slot.num_tokens for slot in slots], device=token_B.device),
            found.seen_BV,
        )
        self._rows = new if self._rows is None else _joined(self._rows, new)
        self._arrange()
        in_vision = self._counts.vision_seconds - vision_seconds
        self._counts.prefill_seconds += time.perf_counter() - began - in_vision

    @torch.inference_mode()
    def step(self) -> None:
        """One token more for each live row."""
        rows = self._rows
        assert rows is not None and self._decode is not None
        began = time.perf_counter()
        self._memory.begin_step(rows.slots)
        logits_BV = self._decode(rows.token_B, rows.position, self._memory.cache)
        for slot in rows.slots:
            slot.num_tokens += 1
        rows.length_B += 1
        rows.position = rows.position + 1
        self._counts.num_decode_steps += 1
        self._counts.num_decode_rows += len(rows.slots)
        if self._late is None:
            rows.token_B = self._choose(rows.generations, logits_BV, rows.seen_BV)
        else:
            rows.token_B = self._drawn(self._late, rows, logits_BV)
        self._counts.decode_seconds += time.perf_counter() - began

    def _drawn(self, choose: TokenChoice, rows: LiveRows, logits_BV: torch.Tensor) -> torch.Tensor:
        """The next tokens [B], which nobody has read yet; those of the step before are read."""
        before = self._unread
        unread = {id(row) for row in before.generations} if before else set()
        steps = [len(row.tokens) + (id(row) in unread) for row in rows.generations]
        token_B, finite_B = choose.draw(rows.generations, steps, logits_BV, rows.seen_BV)
        kept = any(row.logits_SV is not None for row in rows.generations)
        self._unread = _Unread(list(rows.generations), token_B, finite_B, logits_BV if kept else None)
        if before is not None:
            choose.note(before.generations, *before.read(), before.logits_BV)
        return token_B

    def finished(self) -> list[Generation]:
        """The rows that have ended since; their slots are free."""
        if self._rows is None:
            return []
        done = [row for row in self._rows.generations if row.done]
        if done:
            self._leave([place for place, row in enumerate(self._rows.generations) if not row.done])
            self._counts.num_generated_tokens += sum(len(row.tokens) for row in done)
        return done

    def evict(self, num_rows: int) -> list[EncodedSample]:
        """Take the last rows out of their slots, to be begun anew."""
        if self._rows is None:
            return []
        keep = max(0, len(self._rows.generations) - num_rows)
        out = [row.sample for row in self._rows.generations[keep:]]
        self._leave(list(range(keep)))
        return out

    def _leave(self, stay: Sequence[int]) -> None:
        rows = self._rows
        assert rows is not None
        staying = set(stay)
        for place, (slot, row) in enumerate(zip(rows.slots, rows.generations, strict=True)):
            if place not in staying:
                self._memory.release(slot, wipe=row.fault is not None)
        self._rows = _selected(rows, stay) if stay else None
        if not stay:
            self._unread = None
        self._arrange()

    def _arrange(self) -> None:
        if self._rows is None:
            self._memory.shares = []
            return
        slots = self._rows.slots
        order = sorted(range(len(slots)), key=lambda place: (slots[place].pool.num_cells, slots[place].index))
        if order != list(range(len(slots))):
            self._rows = _selected(self._rows, order)
        self._memory.arrange(self._rows.slots, self._rows.length_B)


class _Unread:
    """A step's tokens on their way to the host."""

    def __init__(
        self,
        generations: Sequence[Generation],
        token_B: torch.Tensor,
        finite_B: torch.Tensor,
        logits_BV: torch.Tensor | None,
    ) -> None:
        self.generations, self.logits_BV = generations, logits_BV
        both_2B = torch.stack([token_B, finite_B.to(token_B.dtype)])
        self._both_2B, self._arrived = both_2B, None
        if both_2B.is_cuda:
            self._both_2B = torch.empty(both_2B.shape, dtype=both_2B.dtype, pin_memory=True)
            self._both_2B.copy_(both_2B, non_blocking=True)
            self._arrived = torch.cuda.current_stream(both_2B.device).record_event()

    def read(self) -> tuple[list[int], list[bool]]:
        """Tokens, and whether a row's logits were finite."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens, finite = self._both_2B.tolist()
        return tokens, [bool(one) for one in finite]


class Decoder:
    """A model's forward for one token of each row, with our attention function in its language model.

    Vision towers and prompts keep transformers' own function.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._config = model.config.get_text_config(decoder=True)
        known = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def __call__(self, token_B: torch.Tensor, position: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits [B, V]. position: [..., B, 1]."""
        before = self._config._attn_implementation
        try:
            self._config._attn_implementation = {"": NAME}  # and nothing for the configurations within this one
            logits_B1V: torch.Tensor = self._model(
                input_ids=token_B[:, None],
                position_ids=position,
                attention_mask=None,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                **self._last_only,
            ).logits
            return logits_B1V[:, -1]
        finally:
            self._config._attn_implementation = {"": before}


def _selected(rows: LiveRows, places: Sequence[int]) -> LiveRows:
    index = torch.tensor(places, device=rows.token_B.device)
    return LiveRows(
        [rows.generations[place] for place in places],
        [rows.slots[place] for place in places],
        rows.token_B[index],
        rows.position[..., index, :],
        rows.length_B[index],
        None if rows.seen_BV is None else rows.seen_BV[index],
    )


def _joined(one: LiveRows, other: LiveRows) -> LiveRows:
    return LiveRows(
        one.generations + other.generations,
        one.slots + other.slots,
        torch.cat([one.token_B, other.token_B]),
        torch.cat([one.position, other.position], dim=-2),
        torch.cat([one.length_B, other.length_B]),
        None if one.seen_BV is None or other.seen_BV is None else torch.cat([one.seen_BV, other.seen_BV]),
    )
