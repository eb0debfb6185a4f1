"""The configuration as one typed object, and which part of it changes answers.

Options stand beside the code that obeys them; this file only gathers them and registers the choices of each group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from pipeline.cluster.base import ClusterConfig
from pipeline.cluster.registry import CLUSTERS
from pipeline.dataset.base import DatasetConfig
from pipeline.dataset.registry import READERS
from pipeline.errors import UsageError
from pipeline.option import is_speed_only, option, range_problem
from pipeline.planning import Resume
from pipeline.prompt.template import DEFAULT_NAME, PromptConfig
from pipeline.redaction import is_secret_key, secret_parameter, secret_variables, without_credentials
from pipeline.tracking.registry import Track
from pipeline.vlm.constraint import schema_text
from pipeline.vlm.options import (
    AutoConfig,
    EngineConfig,
    GenerationConfig,
    GreedyConfig,
    SampleConfig,
    SlotsConfig,
    StaticConfig,
    VllmConfig,
    VlmConfig,
)
from pipeline.write.file import Place, place
from pipeline.write.schema import WriteConfig

_ADDRESSES = ("dataset.path", "dataset.root", "vlm.path")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A job."""

    dataset: DatasetConfig = MISSING
    prompt: PromptConfig = MISSING
    vlm: VlmConfig = MISSING
    engine: EngineConfig = MISSING
    generation: GenerationConfig = MISSING
    write: WriteConfig = MISSING
    cluster: ClusterConfig = MISSING
    output_dir: str | None = option(
        None, "folder of the results, or an fsspec URL (s3://...); null = outputs/ and the dataset's kind", speed=True
    )
    seed: int = option(42, "of generation=sample; each row has a seed of its own, made from this one")
    max_error_rate: float | None = option(
        0.05,
        "share of error rows that stops the run, once 200 rows are done; null = never",
        speed=True,
        least=0,
        most=1,
    )
    resume: Resume = option(
        Resume.auto,
        "extend = files that were added to the input become new shards; overwrite = a run of other settings is moved "
        "aside, into old/",
        speed=True,
    )
    grace_seconds: float = option(
        20.0, "seconds to finish what is in flight after SIGTERM, SIGUSR1 or SIGINT", speed=True, least=0
    )
    stall_seconds: float | None = option(
        None,
        "seconds without progress after which the run says what each part is at; null = never",
        speed=True,
        least=1,
    )
    wait: bool = option(
        False, "where a scheduler has the work: stay, and say how far it is, until it is done", speed=True
    )
    stall_exit: bool = option(False, "after such a report, end with exit code 75 (run again)", speed=True)
    report: bool = option(True, "write report.html at the end, a page to look at; see vlm-batch report", speed=True)
    track: Track = option(
        Track.none, "where rank 0 draws curves of the run: none, tensorboard or wandb (Weights & Biases)", speed=True
    )
    track_dir: str | None = option(
        None, "folder of the files of tensorboard or wandb; null = tracking/ in output_dir", speed=True
    )
    prometheus_file: str | None = option(
        None,
        "file ending in .prom that each worker replaces at every heartbeat, for node_exporter's textfile collector; "
        "rank 0's has this name, rank 3's NAME-3.prom",
        speed=True,
    )

    @property
    def output_path(self) -> Place:
        """Where the results lie."""
        return place(self.output_dir or f"outputs/{self.dataset.kind}")

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """The values of the column prompt_name, in order."""
        return tuple(self.prompt.variants) or (DEFAULT_NAME,)


def register_schemas() -> None:
    """Tell Hydra which options each choice of a group has; configs/GROUP/CHOICE.yaml names one of these first."""
    store = ConfigStore.instance().store
    store(name="run_schema", node=RunConfig)
    choices: dict[str, dict[str, type]] = {
        "dataset": dict(READERS),
        "prompt": {"prompt": PromptConfig},
        "vlm": {"vlm": VlmConfig},
        "engine": {
            option_class.kind or "engine": option_class
            for option_class in (EngineConfig, AutoConfig, SlotsConfig, StaticConfig, VllmConfig)
        },
        "generation": {"greedy": GreedyConfig, "sample": SampleConfig},
        "write": {"write": WriteConfig},
        "cluster": dict(CLUSTERS),
    }
    for group, schemas in choices.items():
        for name, node in schemas.items():
            store(group=group, name=f"{name}_schema", node=node)


def check_ranges(node: Any, prefix: str = "") -> None:
    """Compare every number with the range of its option.

    Raises:
        UsageError: one lies outside.
    """
    for entry in fields(node):
        value = getattr(node, entry.name)
        if is_dataclass(value):
            check_ranges(value, f"{prefix}{entry.name}.")
        elif problem := range_problem(entry, value):
            raise UsageError(f"{prefix}{entry.name}={value}: {problem}.")


def refuse_secrets(config: RunConfig) -> None:
    """Refuse what would put a secret where the output keeps it: settings are written into the plan.

    User and password of dataset.path and dataset.root are no such thing; they are left out where those are written.

    Raises:
        UsageError: a setting is called like a secret, holds one of the environment's, or an address has one in its
            parameters, which are part of a file's name.
    """
    variables = secret_variables()
    for key, value in _texts("", config):
        if any(map(is_secret_key, key.split(".")[2:])):
            raise UsageError(
                f"{key}: a secret does not belong into the settings, which are written into the output folder. Set it "
                "in the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY ...) or in the login file of its service."
            )
        if key in _ADDRESSES and (name := secret_parameter(value)):
            raise UsageError(
                f"{key}: the address has a secret in its parameter {name!r}, and names of files are written into the "
                "output folder. Give the secret in the environment, as scheme://user:password@host, or copy the files."
            )
        said = without_credentials(value) if key in _ADDRESSES else value
        if held := [name for name, secret in variables.items() if secret in said]:
            raise UsageError(
                f"{key} holds the value of {held[0]} from the environment, and settings are written into the output "
                "folder. Leave it out; if it is no secret, give the variable another name."
            )


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text of the configuration by its dotted key, names in dictionaries included."""
    if is_dataclass(value):
        value = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, dict):
        for name, entry in value.items():
            inner = f"{key}.{name}" if key else str(name)
            yield inner, str(name)
            yield from _texts(inner, entry)
    elif isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            yield from _texts(f"{key}[{number}]", entry)
    elif isinstance(value, str):
        yield key, value


def answer_settings(config: RunConfig) -> dict[str, Any]:
    """Every option that changes answers, by dotted key, as JSON values: what the fingerprint is made of.

    A group's choice is named by its registered kind, never by a Python class. Generation without sampling has no seed.
    """
    settings = {name: _as_written(name, value) for name, value in _flat("", config)}
    settings["dataset.kind"] = config.dataset.kind
    settings["generation.kind"] = config.generation.kind
    settings["prompt.chat_template"] = config.prompt.chat_template_text()
    settings["generation.json_schema"] = schema_text(config.generation)
    if not isinstance(config.generation, SampleConfig):
        del settings["seed"]
    return settings


def _flat(prefix: str, node: Any) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for entry in fields(node):
        if is_speed_only(entry):
            continue
        value = getattr(node, entry.name)
        if is_dataclass(value):
            found += _flat(f"{prefix}{entry.name}.", value)
        else:
            found.append((f"{prefix}{entry.name}", _plain(value)))
    return found


def _as_written(name: str, value: Any) -> Any:
    """A setting as the plan holds it: user and password of an address change no answer, and are kept nowhere."""
    if name == "prompt.examples":
        images = [[without_credentials(path) for path in example["images"]] for example in value]
        return [example | {"images": paths} for example, paths in zip(value, images, strict=True)]
    return without_credentials(value) if name in _ADDRESSES and value is not None else value


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if is_dataclass(value):
        return dict(_flat("", value))
    return value
