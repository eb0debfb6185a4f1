"""The run's own engine, one sample at a time, and what is said about an answer."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

from pipeline.assembly import build_engine
from pipeline.config import RunConfig
from pipeline.preview.terminal import Terminal
from pipeline.records import Answer, EncodedSample, Fault
from pipeline.tensors.batch import Batcher
from pipeline.tensors.processor import Processor
from pipeline.vlm.identity import ModelIdentity

if TYPE_CHECKING:
    from pipeline.vlm.base import Engine
    from pipeline.vlm.stream import Halt

log = logging.getLogger(__name__)


class Speaker:
    """Loads the model when the first answer is wanted: a job whose every row fails needs none."""

    def __init__(self, config: RunConfig, identity: ModelIdentity, processor: Processor, terminal: Terminal) -> None:
        self._config, self._identity = config, identity
        self._processor, self._terminal = processor, terminal
        self._loaded: tuple[Engine, Halt] | None = None

    def answer(self, sample: EncodedSample, label: str = "answer") -> Answer:
        """Stream one answer to the terminal, then why it ended, its length and its speed.

        Raises:
            RunFailed: the model cannot be loaded, or the accelerator failed.
        """
        from pipeline.vlm.stream import AnswerStream

        engine, halt = self.load()
        stream = AnswerStream(
            engine, self._processor.tokenizer, sample, stop_strings=self._config.generation.stop, halt=halt
        )
        pieces = iter(stream)
        opening = next(pieces, "")  # an engine that is new has things to say before it comes
        self._terminal.begin(label)
        for piece in itertools.chain([opening], pieces):
            self._terminal.add(piece)
        self._terminal.end()
        answer = stream.answer
        assert answer is not None, "an engine that nobody stopped answers its sample"
        if answer.fault is not None:
            self.fault(answer.fault)
            return answer
        if stream.differs:
            self._terminal.line("written", f"{answer.response}")
        if answer.parse_ok is not None:
            self._terminal.line("parsed", answer.response_json or "no: it did not come to be what it has to be")
        num_tokens, first = answer.num_generated_tokens or 0, stream.first_token_seconds
        said = [f"{answer.finish_reason}", "1 token" if num_tokens == 1 else f"{num_tokens} tokens"]
        if first is not None:
            said.append(f"the first after {first:.2f} s")
        self._terminal.line("ended", ", ".join([*said, f"{num_tokens / max(1e-9, stream.seconds):.0f} tokens/s"]))
        return answer

    def load(self) -> tuple[Engine, Halt]:
        """The engine, and what makes it give up."""
        if self._loaded is None:
            from pipeline.vlm.stream import Halt

            log.info("loading the model ...")
            generation, engine = self._config.generation, self._config.engine
            batcher = Batcher(max_rows=1, max_tokens=engine.max_batch_tokens, max_new_tokens=generation.max_new_tokens)
            halt = Halt()
            self._loaded = build_engine(self._config, self._identity, batcher, halt), halt
        return self._loaded

    def fault(self, fault: Fault) -> None:
        """Say why there is no answer."""
        self._terminal.line("error", f"{fault.stage}/{fault.kind}: {fault.message}")
