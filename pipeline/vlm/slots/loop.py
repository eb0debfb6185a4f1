"""The loop of the slots engine: prompts are computed, enter free slots, decode together, and leave as answers.

    queue -> prefill of some prompts -> begun rows -> free slots -> decode steps -> answers, free slots -> ...

As many prompts are computed together as keep the machine busy, however few slots are free; rows that have begun wait
for a slot, and a slot waits for none.

Shapes: B live rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Sequence
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
from pipeline.vlm.slots.rows import BegunRow, LiveRows
from pipeline.vlm.slots.step import Step


class Choose(Protocol):
    """Gives each row its next token (pipeline.vlm.choice); a trial gives those that it knows."""

    @property
    def needs_history(self) -> bool:
        """Whether it wants to know which tokens a row has had."""
        ...

    def __call__(
        self, generations: Sequence[Generation], logits_BV: torch.Tensor, seen_BV: torch.Tensor | None, /
    ) -> torch.Tensor: ...


class SlotLoop:
    """`begin` computes prompts, `seat` gives slots to the rows that have begun, `step` decodes, `finished` takes out.

    Args:
        recorded: makes of a decoder one that records its steps (graph.py); None leaves it as it is.
        late: read a step's tokens from the device while the next one is computed. A row is then computed once more
            after its end, and the device never waits for the rules by which rows end. Of no effect where the choice
            of a token needs the one before it; what it needs it for is computed while the device is at the step.
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
        self._late = choose if late and isinstance(choose, TokenChoice) and not choose.needs_tokens else None
        self._unread: _Unread | None = None
        self._begun: deque[BegunRow] = deque()
        self._ended: list[Generation] = []  # with their first token
        self._rows: LiveRows | None = None
        self._decode: Decode | None = None

    @property
    def num_live(self) -> int:
        """Rows in slots."""
        return len(self._rows.generations) if self._rows else 0

    @property
    def num_begun(self) -> int:
        """Rows that wait for a slot."""
        return len(self._begun)

    @property
    def has_ended(self) -> bool:
        """Whether rows ended with their first token, and have not been taken out."""
        return bool(self._ended)

    def begin(self, waiting: Sequence[Waiting], generations: Sequence[Generation]) -> None:
        """Compute prompts; each row has its first token then, and has ended or waits for a slot.

        Raises:
            whatever the model raises; no row has begun then.
        """
        began, vision_seconds = time.perf_counter(), self._counts.vision_seconds
        num_computed = self._prefill.num_computed_tokens
        batch, of_sample = self._prefill(waiting)
        if self._decode is None:
            decoder = Decoder(batch.decoder)
            self._decode = self._recorded(decoder) if self._recorded else decoder
        batch = batch.of(of_sample)
        token_B = self._choose(generations, batch.logits_BV, batch.seen_BV)
        for place, row in enumerate(generations):
            if row.done:
                self._ended.append(row)
            else:
                self._begun.append(BegunRow(row, batch, place, token_B[place : place + 1]))
        self._counts.num_batches += 1
        self._counts.num_prompt_tokens += sum(one.sample.num_tokens for one in waiting)
        self._counts.num_padded_prompt_tokens += self._prefill.num_computed_tokens - num_computed
        in_vision = self._counts.vision_seconds - vision_seconds
        self._counts.prefill_seconds += time.perf_counter() - began - in_vision

    def seat(self, max_live: int) -> None:
        """Rows that have begun take slots while there are any, in their order; so many may be live.

        Raises:
            whatever the device raises; each row has begun and waits, or is in its slot.
        """
        if not self._begun or self.num_live >= max_live:
            return
        began = time.perf_counter()
        seated: list[BegunRow] = []
        slots: list[Slot] = []
        try:
            while self._begun and self.num_live + len(seated) < max_live:
                first = self._begun[0]
                slot = self._memory.enter(
                    first.batch.keys_and_values(first.place),
                    first.batch.prefixes[first.place],
                    first.generation.max_new_tokens,
                )
                if slot is None:
                    break
                seated.append(self._begun.popleft())
                slots.append(slot)
        finally:
            if seated:
                new = LiveRows.of(seated, slots)
                self._rows = new if self._rows is None else self._rows.joined(new)
                self._arrange()
            self._counts.prefill_seconds += time.perf_counter() - began

    def refuse(self) -> Generation:
        """Take out the first of the rows that wait for a slot."""
        return self._begun.popleft().generation

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
        done, self._ended = self._ended, []
        if self._rows is not None and any(row.done for row in self._rows.generations):
            done += [row for row in self._rows.generations if row.done]
            self._leave([place for place, row in enumerate(self._rows.generations) if not row.done])
        self._counts.num_generated_tokens += sum(len(row.tokens) for row in done)
        return done

    def evict(self, num_rows: int) -> list[EncodedSample]:
        """Take the last rows out of their slots, and all that wait for one, to be begun anew."""
        out = [row.generation.sample for row in self._begun]
        self._begun.clear()
        if self._rows is not None:
            keep = max(0, len(self._rows.generations) - num_rows)
            out = [row.sample for row in self._rows.generations[keep:]] + out
            self._leave(range(keep))
        return out

    def _leave(self, stay: Sequence[int]) -> None:
        rows = self._rows
        assert rows is not None
        staying = set(stay)
        for place, (slot, row) in enumerate(zip(rows.slots, rows.generations, strict=True)):
            if place not in staying:
                self._memory.release(slot, wipe=row.fault is not None)
        self._rows = rows.selected(stay) if stay else None
        if not stay:
            self._unread = None
        self._arrange()

    def _arrange(self) -> None:
        if self._rows is None:
            self._memory.step = Step()
            return
        slots = self._rows.slots
        order = sorted(range(len(slots)), key=lambda place: (slots[place].pool.num_cells, slots[place].index))
        if order != list(range(len(slots))):
            self._rows = self._rows.selected(order)
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
