"""What a command of `vlm-batch` is made of.

A command is a file of this folder with its name. It has

    Options             a dataclass of the words that only it knows, or None
    execute(call)       does it, and gives the exit code

and a line in pipeline.commands.COMMANDS.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.compose import Composed
    from pipeline.write.file import Place


class Keys(Enum):
    """Which keys of the configuration a command takes, beside its own words."""

    ALL = "all"
    OUTPUT_DIR = "output_dir"  # any may be given, as in the command that made the run; this one is obeyed
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Command:
    """A line of `vlm-batch --help`."""

    name: str
    doc: str
    keys: Keys

    @property
    def options(self) -> type | None:
        """The dataclass of its own words."""
        found: type | None = self._module().Options
        return found

    @property
    def execute(self) -> Callable[[Call], int]:
        found: Callable[[Call], int] = self._module().execute
        return found

    def _module(self) -> Any:
        return importlib.import_module(f"pipeline.commands.{self.name}")


@dataclass(frozen=True, slots=True)
class Call:
    """A command line taken apart: the command's own options, and what sets keys of the configuration."""

    options: Any  # an instance of `schema`, None where the command has no words of its own
    schema: type | None
    settings: Sequence[str]
    config_dir: str | None
    command_line: Sequence[str]  # the whole of it, program first

    def composed(self) -> Composed:
        """The configuration, and how it reads as YAML.

        Raises:
            UsageError: as compose().
        """
        from pipeline.compose import compose

        own = [entry.name for entry in fields(self.schema)] if self.schema else []
        return compose(self.settings, config_dir=self.config_dir, own=own)

    @property
    def output_dir(self) -> Place:
        """The folder of the run that the words mean."""
        return self.composed().config.output_path
