from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_models import family


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny kernels: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def fresh_models() -> Iterator[None]:
    """The slots put faster layers into a model, and a later file may look at what it is made of."""
    yield
    family.cache_clear()
