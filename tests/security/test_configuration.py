"""Configurations of somebody else: nothing in them is called, whatever Hydra could make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from hostile_run import TESTS
from packaging.requirements import Requirement

from pipeline.compose import compose
from pipeline.errors import UsageError
from pipeline.vlm.generation import effective_settings

# Words of a command line, and YAML files of --config-dir, that have Hydra call something where it instantiates.
CALLS = {
    "os.system": "command: touch CANARY",
    "builtins.open": "file: CANARY\nmode: w",
    "builtins.exec": '_args_: [\'open("CANARY", "w")\']',
    "pathlib.Path.unlink": "_args_: ['KEPT']",
    "pathlib.Path.touch": "_args_: ['CANARY']",
    "subprocess.run": "args: [touch, CANARY]",
    "shutil.rmtree": "path: KEPT",
    "urllib.request.urlopen": "url: file:///etc/passwd",
    "pickle.loads": "data: x",
    "hydra.utils.call": "config: {_target_: os.system, command: touch CANARY}",
}
# The first three take any names; the others know theirs.
PLACES = {
    "vlm/mine.yaml": "defaults: [vlm_schema, _self_]\npath: demo\nprocessor:\n{}",
    "generation/mine.yaml": "defaults: [greedy_schema, _self_]\nextra:\n{}",
    "prompt/mine.yaml": "defaults: [prompt_schema, _self_]\nvariants:\n{}",
    "dataset/mine.yaml": "defaults: [images_schema, _self_]\npath: x\nid_column:\n{}",
    "experiment/mine.yaml": "# @package _global_\nwrite:\n{}",
    "cluster/mine.yaml": "defaults: [local_schema, _self_]\n_mine_:\n{}",
}
# Settings of Hydra itself; the first lets whoever writes it empty the list of names that Hydra refuses to call.
OF_HYDRA = [
    "_target_: hydra._internal.instantiate._instantiate2.set_blocklist\n_args_: [[]]\n",
    "hydra: {instantiate: {blocklist: []}}\n_target_: os.system\ncommand: touch CANARY\n",
    "hydra: {job_logging: {version: 1, formatters: {x: {(): os.system, command: touch CANARY}}}}\n",
    "hydra: {hydra_logging: {version: 1, handlers: {x: {class: subprocess.Popen, args: [touch, CANARY]}}}}\n",
    "hydra: {callbacks: {x: {_target_: os.system, command: touch CANARY}}}\n",
    "hydra: {sweeper: {_target_: os.system, command: touch CANARY}, mode: MULTIRUN}\n",
    "hydra: {launcher: {_target_: os.system, command: touch CANARY}}\n",
    "hydra: {job: {env_set: {LD_PRELOAD: CANARY}}, run: {dir: CANARY}}\n",
    "hydra: {searchpath: ['pkg://os', 'file:///etc']}\n",
    "defaults: [{override /hydra/launcher: ray}]\n",
]
# Composes every file in --config-dir, and says what Python did meanwhile that it does for no sound configuration.
AUDITED = """
import json, os, sys
from pipeline.compose import compose
from pipeline.errors import UsageError
words = ["dataset.path=x", "vlm.path=x", "output_dir=x"]
compose(words)  # imports whatever a sound configuration needs
seen, refused = [], 0
names = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.remove", "os.rename", "os.mkdir",
         "os.putenv", "shutil.rmtree", "socket.connect", "urllib.Request", "pickle.find_class")
def hook(event, arguments):
    if event in names or event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append([event, repr(arguments)[:200]])
sys.addaudithook(hook)
for choice in json.loads(sys.argv[2]):
    try:
        compose([choice, *words], config_dir=sys.argv[1])
    except UsageError as problem:
        refused += 1
print(json.dumps([seen, refused]))
"""


def test_nothing_that_a_configuration_names_is_called(tmp_path: Path) -> None:
    """Fault S-1: _target_ at every place, Hydra's blocklist edited, callables for its logging: nothing is called."""
    calls = []
    for target, arguments in CALLS.items():
        calls.append("\n".join(f"    {line}" for line in (f"_target_: {target}", *arguments.splitlines())))
    everything = "\n".join(f"  call{number}:\n{call}" for number, call in enumerate(calls))
    texts = {
        place: text.format(everything if place[:3] in ("vlm", "gen") else calls[0]) for place, text in PLACES.items()
    }
    choices = [config_file(tmp_path / "conf", place, text) for place, text in texts.items()]
    for number, text in enumerate(OF_HYDRA):
        name = f"experiment/hydra{number}.yaml"
        choices.append(config_file(tmp_path / "conf", name, f"# @package _global_\n{text}"))
    (tmp_path / "KEPT").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    program = [sys.executable, "-c", AUDITED, "conf", json.dumps(choices)]
    environment = {"PYTHONPATH": str(TESTS.parent), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home")}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen, refused = json.loads(done.stdout)
    assert seen == []
    assert sorted(tmp_path.rglob("*")) == before
    assert refused == len(choices) - 7, (
        "three dictionaries take any name; four settings of hydra's own say nothing to us"
    )


def config_file(folder: Path, name: str, text: str) -> str:
    """A file of one's own; the word that chooses it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return f"{path.parent.name}={path.stem}"


@pytest.mark.parametrize(
    "word",
    [
        "_target_=os.system",
        "+_target_=os.system",
        "++vlm._target_=os.system",
        "prompt._target_=os.system",
        "hydra.job_logging.formatters.x={(): os.system}",
        "hydra/job_logging=none",
        "hydra/launcher=ray",
        "hydra.run.dir=CANARY",
        "generation.extra.custom_generate=/tmp/code",
        "generation.extra.assistant_model=/tmp/model",
        "dataset=hub,images",
        "--multirun=1",
    ],
)
def test_a_word_of_the_command_line_sets_a_known_key_or_is_refused(word: str) -> None:
    """Fault S-1: keys of Hydra's own, and settings under which libraries look for code, are no keys of ours."""
    with pytest.raises(UsageError):
        effective_settings(compose(["dataset=images", "dataset.path=photos", word]).config.generation, {})


def test_a_value_that_looks_like_a_call_stays_text(tmp_path: Path) -> None:
    """Fault S-1: what a key of text is given is text: no resolver, no interpolation, no grammar."""
    for text in (
        "${oc.env:HOME}",
        "${hydra:runtime.cwd}",
        "!!python/object/apply:os.system [a]",
        "glob(*)",
        "{_target_: a}",
    ):
        assert compose([f"prompt.user={text}"]).config.prompt.user == text
    with pytest.raises(UsageError, match="names of other keys are not looked up"):
        compose(["seed=${oc.env:HOME}"])


def test_a_chat_template_file_that_never_ends_is_refused(tmp_path: Path) -> None:
    """Fault S-1: a file that a setting names is opened only where it is a regular file of sane size."""
    os.mkfifo(tmp_path / "pipe")  # first: reading it would only wait, until this test's time is over
    for path in (str(tmp_path / "pipe"), "/dev/zero", str(tmp_path)):
        with pytest.raises(UsageError, match=r"prompt\.chat_template=.*expected a text file"):
            compose([f"prompt.chat_template={path}"]).config.prompt.chat_template_text()


# The lowest versions without a hole that is known: faults of configuration, model folder, template, Parquet and image.
FLOORS = {
    "hydra-core": "1.3.7", "transformers": "5.5.0", "torch": "2.6", "pyarrow": "14.0.1", "pillow": "12.3.0",
    "jinja2": "3.1.6", "ray": "2.55.0",
}  # fmt: skip


def test_versions_with_known_holes_are_not_installed() -> None:
    """Fault S-1, S-3, S-4, P-4: a version in which the fault was found elsewhere does not satisfy our requirements."""
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    required = {line.name.lower(): line for line in map(Requirement, [*extras, *project["dependencies"]])}
    assert required.keys() >= FLOORS.keys() - {"ray"}
    for name, floor in FLOORS.items():
        if name in required:
            lower = ".".join([*floor.split(".")[:-1], str(int(floor.split(".")[-1]) - 1)])
            assert not required[name].specifier.contains(lower), f"{name} {lower} is taken; expected >= {floor}"
            assert required[name].specifier.contains(metadata.version(name))
