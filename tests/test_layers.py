"""Imports point one way, and heavy packages stay where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

PIPELINE = Path(__file__).resolve().parents[1] / "pipeline"
# From the words of the program up to its command line; a module imports from lower layers, a stage from itself too.
LAYERS = [
    {"records", "redaction", "option"},
    {"errors", "tally", "shown", "pace"},
    {"ranks", "ending"},
    {"cluster", "dataset", "prompt", "tensors", "vlm", "write", "interruption"},
    {"overwrite", "preparation", "kernel_choices", "worker_stats"},
    {"plan", "tracking", "other_workers"},
    {"meter", "draft"},
    {"planning", "results", "kept_images"},
    {"source_images"},
    {"agenda", "feed", "intake", "config", "status", "score", "deep_audit", "watchdog", "page"},
    {"assembly", "audit", "report", "card"},
    {"manifest"},
    {"compose", "run"},
    {"preview", "diff", "ray_data", "export", "watch", "forecast"},
    {"commands"},
    {"__main__"},
]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, in a function or at the top."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unit(module: str) -> str:
    return module.split(".")[1]


def test_imports_point_one_way() -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    checked = 0
    for path in PIPELINE.rglob("*.py"):
        own = path.relative_to(PIPELINE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in layer, f"{own} has no layer: give it one in this test"
        for module in imported(path):
            if not module.startswith("pipeline.") or unit(module) in ("__version__", own):
                continue
            checked += 1
            low, high = unit(module), own
            assert layer[low] < layer[high], f"{path} imports {module}: {high} is not above {low}"
    assert checked > 50


def test_torch_is_imported_in_tensors_and_vlm_alone() -> None:
    for path in PIPELINE.rglob("*.py"):
        stage = path.relative_to(PIPELINE).parts[0]
        heavy = {module.split(".")[0] for module in imported(path)} & {"torch", "transformers"}
        assert not heavy or stage in ("tensors", "vlm"), f"{path} imports {heavy}"


def test_options_for_the_command_line_need_no_torch() -> None:
    for name in ("vlm/options.py", "vlm/identity.py", "vlm/base.py", "tensors/pool.py", "tensors/worker.py"):
        tree = ast.parse((PIPELINE / name).read_text())
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        assert not top & {"torch", "transformers"}, name
