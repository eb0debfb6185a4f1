"""WHERE a run happens: a cluster starts work(rank, world) for every rank, and knows nothing of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

Work = Callable[[int, int], None]  # (rank, world size)


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Options of a cluster. None of them changes an answer."""

    kind: ClassVar[str] = ""

    def launch(self, work: Work) -> None:
        """Run work(rank, world) for every rank; returns when all have ended.

        Raises:
            whatever a rank raises.
        """
        raise NotImplementedError(type(self).__name__)
