"""Lets torchvision's CUDA build be imported beside a torch without CUDA.

torchvision's published wheels link against CUDA. On a CPU build of torch their operators cannot be loaded, and the
import stops at the module that describes two of them. `make vllm` puts this file into site-packages, with a .pth file
that imports it, so that it holds in every process that vLLM starts. Nothing is done before torchvision is imported. The
operators are declared without a body: calling one is still an error.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_OPERATORS = ("nms", "qnms")


class DeclareOperators:
    """A finder that finds nothing: torchvision has just tried to load its operators when it asks for this module."""

    def __init__(self) -> None:
        self.library: object = None  # a declaration lasts as long as its library

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision._meta_registrations":
            import torch

            library_of: Any = torch.library.Library
            missing = [name for name in _OPERATORS if not hasattr(torch.ops.torchvision, name)]
            if missing:
                self.library = library = library_of("torchvision", "FRAGMENT")
                for operator in missing:
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, DeclareOperators())
