"""Which kernels a run computes with: timed by its first start, kept with its plan, and the same at every later start.

    OUTPUT_DIR/plan/kernels-NNNNNNNNNNNN.json    one choice on one kind of machine: what was chosen, and for what

Kernels that are as good as each other differ in the last bits of a product. If each start took what it timed as the
fastest, a resumed run could give other answers than an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import RunFailed
from pipeline.write.file import Place, create_file

Read = TypeVar("Read")


class KernelChoices:
    """Of the run in a folder (pipeline.vlm.base.Settle). Of two starts that choose at once, one is obeyed by both."""

    def __init__(self, output_dir: Place) -> None:
        self._folder, self._work_dir = output_dir / "plan", output_dir / "work"

    def __call__(self, name: str, choose: Callable[[], str], read: Callable[[str], Read]) -> Read:
        """See Settle.

        Raises:
            RunFailed: the choice cannot be kept, or what was kept cannot be read.
            whatever `choose` raises.
        """
        path = self._folder / f"kernels-{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"
        if not path.exists():
            content = json.dumps({"for": name, "chosen": choose()}, indent=2).encode()
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                create_file(path, content, beside=self._work_dir)
            except OSError as problem:
                raise RunFailed(
                    f"{path} cannot be written: {problem}. Run again when it can: nothing is lost."
                ) from problem
        try:
            return read(json.loads(path.read_bytes())["chosen"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise RunFailed(
                f"{path} should say what was chosen for {name} ({type(problem).__name__}: {problem}). Restore it; or "
                "remove it, and kernels are timed anew, whose answers may differ in near ties."
            ) from problem
