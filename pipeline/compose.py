"""The border to Hydra: `key=value` words in, a plain RunConfig out. Past this file nobody meets OmegaConf.

Group choices (dataset=images, experiment=ocr_pages) go through Hydra's compose(). Every other word sets one key: a text
key takes its value literally, so that `prompt.user=Describe it, briefly.` needs no quoting of Hydra's; any other key is
parsed by Hydra's grammar and checked against the type of the option.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Sweep
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from pipeline.config import RunConfig, check_ranges, refuse_secrets, register_schemas
from pipeline.errors import UsageError
from pipeline.option import doc_of
from pipeline.redaction import redacted

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the configs lie inside the package, in a checkout beside it.
CONFIG_DIR = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())
Options = TypeVar("Options")
_GROUPS = ("dataset", "prompt", "vlm", "engine", "generation", "write", "cluster", "experiment")
# In a list: a text in quotes, or what would come back otherwise than it was written, true as True and 2.50 as 2.5.
_TYPED = re.compile(
    r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|([\[,]\s*)(true|false|nan|inf|[-+]?[.\d][\w.+-]*)(?=\s*[,\]])""",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Composed:
    """A configuration on both sides of the border."""

    config: RunConfig
    yaml: str


def compose(words: Sequence[str], *, config_dir: str | None = None, own: Sequence[str] = ()) -> Composed:
    """The configuration that `key=value` words ask for.

    own: the command's own words (see `taken`), which a misspelt key is compared with as well.

    Raises:
        UsageError: an unknown key or choice (with the nearest one), a value of the wrong type, or a required key that
            is not set.
    """
    tree = _tree(words, config_dir, own)
    try:
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing:
            raise UsageError(f"{missing[0]} is not set. Give it on the command line: {missing[0]}=...")
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as problem:
        raise UsageError(_sentence(problem)) from None
    assert isinstance(config, RunConfig)
    for entry in fields(config):
        if getattr(getattr(config, entry.name), "kind", None) == "":  # the bare base class
            raise UsageError(
                f"{entry.name}: the chosen YAML file does not say which options it sets. Its first line has to be "
                f"'defaults: [CHOICE_schema, _self_]', where CHOICE is one of {', '.join(choices()[entry.name])}."
            )
    if config.output_dir == "":
        raise UsageError("output_dir= is empty: a shell's variable that is not set? Name a folder, or leave it out.")
    check_ranges(config)
    refuse_secrets(config)
    return Composed(config, redacted(OmegaConf.to_yaml(tree, resolve=True)))


def taken(words: Sequence[str], schema: type[Options]) -> tuple[Options, list[str]]:
    """A command's own options, as the dataclass `schema`, and the words that are left for compose().

    A list that is given twice holds both values.

    Raises:
        UsageError: a value of the wrong type or out of range.
    """
    tree = OmegaConf.structured(schema)
    names = list(_keys(tree))
    left: list[str] = []
    for word in words:
        key, value = _pair(word)
        if key not in names:
            left.append(word)
            continue
        earlier = tree._get_node(key)
        kept = OmegaConf.to_container(earlier) if isinstance(earlier, ListConfig) and not earlier._is_none() else []
        _set(tree, key, value)
        if kept and isinstance(latest := tree._get_node(key), ListConfig) and not latest._is_none():
            OmegaConf.update(tree, key, [*kept, *OmegaConf.to_container(latest)])  # type: ignore[misc]
    options = OmegaConf.to_object(tree)
    assert isinstance(options, schema)
    check_ranges(options)
    return options, left


def nothing_left(words: Sequence[str], schema: type, command: str) -> None:
    """Refuse words that a command without keys of the configuration does not know.

    Raises:
        UsageError: naming the nearest one that it knows.
    """
    for word in words:
        key, _ = _pair(word)
        known = [entry.name for entry in fields(schema)]
        raise UsageError(f"there is no key {key!r}.{_nearest(key, known)} See vlm-batch {command} --help.")


def described_options(schema: type) -> Iterator[tuple[str, str, str]]:
    """A command's own options with their values and sentences, for --help."""
    tree = OmegaConf.structured(schema)
    docs = _docs(tree)
    for key in _keys(tree):
        yield key, _shown(OmegaConf.select(tree, key)), docs[key]


def described(words: Sequence[str], *, config_dir: str | None = None) -> Iterator[tuple[str, str, str]]:
    """Every key of a configuration with its value and its sentence, for --help."""
    tree = _tree(words, config_dir)
    docs = _docs(tree)
    for key in _keys(tree):
        node = OmegaConf.select(tree, key, throw_on_missing=False)
        missing = OmegaConf.is_missing(*_parent(tree, key))
        yield key, "(required)" if missing else _shown(node), docs.get(key, "")


def choices(config_dir: str | None = None) -> Mapping[str, list[str]]:
    """The choices of every group."""
    with _hydra(config_dir):
        return {group: _options(group) for group in _GROUPS}


def _tree(words: Sequence[str], config_dir: str | None, own: Sequence[str] = ()) -> DictConfig:
    pairs = [_pair(word) for word in words]
    with _hydra(config_dir):
        groups = []
        for key, value in pairs:
            if key in _GROUPS and (key, value) != ("experiment", "null"):
                _check_choice(key, value, config_dir)
                groups.append(f"{key}={value}")
        try:
            tree = hydra_compose("run", overrides=groups)
        except (HydraException, OmegaConfBaseException, YAMLError) as problem:
            raise UsageError(_sentence(problem)) from None
    for key, value in pairs:
        if key not in _GROUPS:
            _set(tree, key, value, own)
    return tree


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if key in ("-m", "--multirun"):
        raise UsageError("Multirun is not supported: one command is one dataset. Start one run for each value.")
    if not equals:
        raise UsageError(f"{word!r} is not key=value. See vlm-batch --help.")
    if key.startswith("~"):
        raise UsageError(f"{word!r}: keys cannot be removed; set {key[1:]}=null instead.")
    return key.lstrip("+"), value


def _options(group: str) -> list[str]:
    found = GlobalHydra.instance().config_loader().get_group_options(group)
    return sorted(name for name in found if not name.endswith("_schema"))


def _check_choice(group: str, value: str, config_dir: str | None) -> None:
    if "," in value:
        raise UsageError(f"{group}={value}: one choice at a time; multirun is not supported.")
    found = _options(group)
    if value not in found:
        raise UsageError(
            f"{group}={value}: there is no such choice.{_nearest(value, found)} Choices: {', '.join(found)}."
        )
    file = f"{group}/{value}.yaml"
    if config_dir is not None and (CONFIG_DIR / file).exists() and (own := Path(config_dir, file)).exists():
        raise UsageError(f"{own} has the name of a choice that comes with the program; give it another name.")


def _set(tree: DictConfig, key: str, text: str, own: Sequence[str] = ()) -> None:
    known = list(_keys(tree))
    parent, name = _parent(tree, key)
    open_ended = isinstance(parent, DictConfig) and not is_dataclass(OmegaConf.get_type(parent))
    new_entry = open_ended and key.rpartition(".")[0] in known and re.fullmatch(r"[^\[\]]+", name) is not None
    if key not in known and not new_entry:
        raise UsageError(f"there is no key {key!r}.{_nearest(key, [*known, *_GROUPS, *own])} See vlm-batch run --help.")
    try:
        value = _value(parent, name, key, text)
        # A list is merged, which replaces it and makes records of its entries; a dict would keep entries of before.
        OmegaConf.update(tree, key, value, merge=isinstance(value, list), force_add=open_ended)
    except OmegaConfBaseException as problem:
        raise UsageError(f"{key}={text}: {_sentence(problem)}") from None


def _value(parent: Any, name: str, key: str, text: str) -> Any:
    kind, optional = _type(parent, name)
    if text == "null" and optional:
        return None
    if kind is str:
        return _literal(text)
    if getattr(kind, "__origin__", kind) is list and text != "null" and not text.lstrip().startswith("["):
        return [_literal(text)] if text else []  # stop=END means stop=[END]
    if getattr(kind, "__args__", None) == (str,):
        text = _TYPED.sub(lambda found: found[1] or f"{found[2]}'{found[3]}'", text)
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}").value()
    except HydraException as problem:
        said = _sentence(problem)
        remedy = " Put quotes around texts with such signs in a list or mapping." if "token recognition" in said else ""
        raise UsageError(f"{key}={text}: not a value this key can take ({said}).{remedy}") from None
    if isinstance(parsed, (Sweep, Glob)):
        raise UsageError(f"{key}={text}: one value at a time. Put quotes around text with a comma: '\"{text}\"'.")
    if isinstance(parsed, str) and "${" in parsed and kind is not Any:
        raise UsageError(f"{key}={text}: expected a value; names of other keys are not looked up.")
    return _literal_leaves(parsed)


def _type(parent: Any, name: str) -> tuple[Any, bool]:
    """The declared type of a key, without Optional, and whether null is allowed."""
    node = parent._get_node(name, validate_access=False) if isinstance(parent, DictConfig) else None
    if isinstance(node, Node):
        return node._metadata.ref_type, node._metadata.optional
    kind = parent._metadata.element_type  # a new entry of prompt.variants, vlm.processor ...
    return kind, kind is Any


def _literal(text: str) -> str:
    """Text that OmegaConf gives back unchanged: ${ in it is no interpolation."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def _literal_leaves(value: Any) -> Any:
    if isinstance(value, str):
        return _literal(str(value))
    if isinstance(value, dict):
        return {str(name): _literal_leaves(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_literal_leaves(entry) for entry in value]
    return value


def _parent(tree: DictConfig, key: str) -> tuple[Any, str]:
    path, _, name = key.rpartition(".")
    parent = OmegaConf.select(tree, path) if path else tree
    return parent, name


def _keys(tree: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in tree:
        key = f"{prefix}{name!s}"
        node = tree._get_node(name)
        if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)) and not node._is_none():
            yield from _keys(node, f"{key}.")
        else:
            yield key


def _docs(tree: DictConfig, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in fields(OmegaConf.get_type(tree)):  # type: ignore[arg-type]
        node = tree._get_node(entry.name)
        if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)) and not node._is_none():
            found |= _docs(node, f"{prefix}{entry.name}.")
        else:
            found[f"{prefix}{entry.name}"] = doc_of(entry)
    return found


def _shown(value: Any) -> str:
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value)
    return "null" if value is None else redacted(str(getattr(value, "name", value)))


def _nearest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    # A misspelt last part of a long key: compare the last parts alone.
    if not found:
        last = {key.rpartition(".")[2]: key for key in known}
        found = [
            last[match] for match in difflib.get_close_matches(name.rpartition(".")[2], list(last), n=1, cutoff=0.6)
        ]
    return f" Did you mean {found[0]!r}?" if found else ""


def _sentence(problem: Exception) -> str:
    # Hydra wraps what OmegaConf's grammar says into an exception without words.
    text = str(problem) or f"{problem.__cause__ or problem.__context__ or type(problem).__name__}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference_type")))


@contextmanager
def _hydra(config_dir: str | None) -> Iterator[None]:
    """Hydra's global state for the length of a block, with our configs and the user's."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UsageError(f"--config-dir {config_dir}: no such folder.")
    GlobalHydra.instance().clear()
    register_schemas()
    Plugins.instance().register(_UserConfigs)
    _UserConfigs.folder = config_dir
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        yield


class _UserConfigs(SearchPathPlugin):
    """Adds the folder of --config-dir. Not hydra.searchpath: that is unknown when the choices are listed."""

    folder: ClassVar[str | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.append("config-dir", f"file://{Path(self.folder).resolve()}")
