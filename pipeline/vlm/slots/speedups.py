"""What makes a model faster in the slots: kernels chosen by time, the same at every start of a run.

Each can be given up, the most dispensable first: leaving out what nothing looks at of the vision tower, the reuse of
encoded images, recorded steps, attention to prompts, and then the products.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from pipeline import __version__
from pipeline.vlm.base import Settle
from pipeline.vlm.device import machine_name
from pipeline.vlm.failure import free_bytes
from pipeline.vlm.options import DecodeAttention, SlotsConfig
from pipeline.vlm.slots.decode_kernel import Kernel, fastest, kernels
from pipeline.vlm.slots.features import ImageFeatures
from pipeline.vlm.slots.graph import recorder
from pipeline.vlm.slots.prefill import num_prefill_tokens
from pipeline.vlm.slots.projection import Choice, Projections, probed
from pipeline.vlm.slots.prompt_attention import TORCH, WAYS, Way, fastest_way

log = logging.getLogger(__name__)

T = TypeVar("T")

_TRIED_TOKENS = 2048  # of a prompt, to see how fast it is attended to
_WORTH_PACKING = 20_000_000  # parameters; below that calls cost more than their products


class Speedups:
    """Of one model. What is None is not used.

    features: encoded images that are used again.
    record: how decode steps are recorded.
    way: of attention to prompts.
    kernel: of attention in decode steps.
    """

    def __init__(
        self, model: Any, device: torch.device, features: ImageFeatures | None, options: SlotsConfig, settle: Settle
    ) -> None:
        self._model, self._device, self._options, self._settle = model, device, options, settle
        self._machine = f"{machine_name(device)}, torch {torch.__version__}, vlm-batch {__version__}"
        self._text = model.config.get_text_config(decoder=True)
        self.features = features
        self.record = recorder(device) if options.cuda_graphs else None
        self.way: Way | None = None
        self._projections: Projections | None = None
        self._kernels = kernels(device)
        wanted = options.decode_attention
        self.kernel: Kernel = self._kernels["sdpa" if wanted is DecodeAttention.auto else wanted.value]

    @property
    def numerics(self) -> Mapping[str, str]:
        """What may differ in the last bits between two runs."""
        return {
            "decode_attention": self.kernel.name,
            "prompt_attention": TORCH if self.way is None else self.way.name,
            "products": "plain" if self._projections is None else str(self._projections.choice),
        } | ({} if self.record is None else {"decode_steps": "recorded"})

    def find(self, num_tokens: int) -> None:
        """Faster products, and faster attention to prompts of so many tokens. The model is changed by this.

        Raises:
            RunFailed: what an earlier start chose cannot be read.
        """
        options = self._options
        if self._projections is None and (options.fused_projections or options.packed_weights):
            self._projections = Projections(
                self._model,
                fuse=options.fused_projections,
                pack=options.packed_weights and self._model.num_parameters() >= _WORTH_PACKING,
                free_bytes=free_bytes(self._device) // 2,
                choose=lambda weights_NK: self._settled("products", lambda: str(probed(weights_NK)), Choice.parse),
            )
        if self._device.type != "cpu" or self._text._attn_implementation != "sdpa":
            return
        self.way = self._settled(
            "attention to prompts",
            lambda: self._fastest_way(min(num_tokens, _TRIED_TOKENS)),
            lambda name: None if name == TORCH else WAYS[name],
        )
        if self.way is not None:
            log.info("slots: prompts are attended to some queries at a time, by %s", self.way.doc)

    def _fastest_way(self, num_tokens: int) -> str:
        """To attend to prompts of so many tokens, as many of them as are computed at a time."""
        num_rows = max(1, num_prefill_tokens(self._model, self._device) // num_tokens)
        return fastest_way(self._text, self._model.dtype, num_rows=num_rows, num_tokens=num_tokens)

    def fastest_kernel(self, like_HTD: torch.Tensor, num_cells: int) -> Kernel:
        """Of attention in decode steps; what was asked for, if something was.

        like_HTD, num_cells: keys of the model, and about how many tokens a row holds.

        Raises:
            RuntimeError: none works.
            RunFailed: what an earlier start chose cannot be read.
        """
        if self._options.decode_attention is not DecodeAttention.auto:
            return self.kernel
        return self._settled(
            "attention in decode steps",
            lambda: fastest(
                like_HTD,
                num_rows=self._options.max_batch_rows,
                num_heads=self._text.num_attention_heads,
                num_cells=num_cells,
            ),
            self._kernels.__getitem__,
        )

    def give_up(self, difference: str) -> bool:
        """Do without one more of them; False where nothing is left.

        difference: what was found wrong, for the log.
        """
        if self.features is not None and self.features.stop_leaving_out():
            log.info("slots: all layers of the vision tower are computed, as otherwise %s", difference)
        elif self.features is not None:
            self.features = None
            log.info("slots: images are encoded with their prompts, as otherwise %s", difference)
        elif self.record is not None:
            self.record = None
            log.info("slots: decode steps are not recorded, as otherwise %s", difference)
        elif self.way is not None:
            self.way = None
            log.info("slots: prompts are attended to by torch's kernel, as otherwise %s", difference)
        elif self._projections is not None:
            self._projections.restore()
            self._projections = None
            log.info("slots: projections are left as they are, as otherwise %s", difference)
        else:
            return False
        return True

    def _settled(self, what: str, choose: Callable[[], str], read: Callable[[str], T]) -> T:
        """What the first start on a machine like this one chose."""
        return self._settle(f"{what}: {self._machine}", choose, read)
