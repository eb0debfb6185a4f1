"""A start that is not like the one before: settings, model, pictures, lines, versions. Answers of two never mix."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_model import right_answer
from faultbox import KILLED, PROMPT, Box, make_pictures
from PIL import Image

from pipeline import planning
from pipeline.compose import compose
from pipeline.errors import SettingsChanged
from pipeline.plan import Plan
from pipeline.run import planned
from pipeline.vlm.identity import identify

pytestmark = pytest.mark.slow  # make test has the kills, the races and the state machine

DEMO_MODEL = Path(planning.__file__).parent / "vlm/demo"
MEAN_ANSWERS = (
    "prompt.user=Who is it?", "prompt.system=Be brief.", "prompt.variants={a: What?, b: Why?}", "prompt.format=plain",
    "prompt.max_image_pixels=99", "vlm.dtype=bfloat16",
    "vlm.quantization=int8", "vlm.processor={size: {height: 99}}", "generation.max_new_tokens=9",
    "generation.stop=[END]", "generation=sample", "generation.n=2", "dataset.columns=[]", "write.keep_images=true",
    "write.prefix=x_", "write.response_column=says", "dataset.max_rows=20", "dataset.pattern=*.jpg",
)  # fmt: skip
MEAN_SPEED = (
    "engine.max_batch_rows=3", "engine.max_batch_tokens=9999", "engine.num_workers=3", "engine.parity_rows=2",
    "engine=static", "vlm.device=cpu", "vlm.attn_implementation=eager", "write.sync_seconds=9",
    "write.compression=snappy", "write.shard_rows=7", "max_error_rate=0.5", "grace_seconds=1",
)  # fmt: skip


def plan_of(box: Box, *words: str) -> Plan:
    """What a start with further words would go by."""
    config = compose([*box.words, *words], config_dir=None).config
    return planned(config, identify(config.vlm), lambda template: None)


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_one_changed_setting(tmp_path: Path) -> None:
    """Fault 26: one changed setting: refused with the difference and the ways out if answers change, else no matter."""
    box = Box(tmp_path / "box", 60, shard_rows=30)
    half_done(box)
    before, plan = files_of(box.output), plan_of(box)
    for word in MEAN_ANSWERS:
        with pytest.raises(SettingsChanged) as refusal:
            plan_of(box, word)
        said, key = str(refusal.value), word.partition("=")[0]
        assert any(line.strip().startswith(key) and "was " in line and ", now " in line for line in said.splitlines())
        for way_out in ("another output_dir", "the old ones to go on", "resume=overwrite", "Nothing was changed"):
            assert way_out in said
        assert files_of(box.output) == before, word
    for word in MEAN_SPEED:
        assert plan_of(box, word) == plan, word
    printed = box.run("prompt.user=Who is it?", code=2)
    assert f'prompt.user  was "{PROMPT}", now "Who is it?"' in printed
    assert files_of(box.output) == before


def half_done(box: Box) -> None:
    """A run that was killed when its first shard was published."""
    process = box.start(crash_at="shard_settled")
    process.communicate(timeout=60)
    assert process.returncode == KILLED


def records(box: Box) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(box.output / "data").to_pylist()}


def test_other_pictures_under_the_same_names(tmp_path: Path) -> None:
    """Fault 27: other bytes under the name of a picture: each record carries the hash of the bytes it is about."""
    box = Box(tmp_path / "box", 60, shard_rows=30)
    half_done(box)
    old = records(box)["00001.png"]
    contents = {}
    for name in ("00001.png", "00050.png"):  # one is answered already, the other is not
        contents[name] = [(box.source / name).read_bytes(), encoded((200, 1, 2))]
        (box.source / name).write_bytes(contents[name][1])
    box.run()
    found = records(box)
    assert found["00001.png"] == old
    for name, content in (("00001.png", contents["00001.png"][0]), ("00050.png", contents["00050.png"][1])):
        assert found[name]["image_sha256"] == [hashlib.sha256(content).hexdigest()]
        assert found[name]["response"] == right_answer([Image.open(io.BytesIO(content)).convert("RGB")], PROMPT)
    audited = box.run("deep=true", command="audit", code=1)
    assert "1 rows were asked about other images than are there now" in audited and "00001.png" in audited
    (box.output / "data/part-00000.parquet").unlink()  # what the audit says to do
    box.run()
    again = records(box)["00001.png"]
    assert again["image_sha256"] == [hashlib.sha256(contents["00001.png"][1]).hexdigest()]
    assert again["row_key"] != old["row_key"]
    assert again["response"] != old["response"]
    box.run("deep=true", command="audit")


def encoded(color: tuple[int, int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (5, 4), color).save(content, "PNG")
    return content.getvalue()


@pytest.mark.torture
def test_pictures_touched_removed_and_added(tmp_path: Path) -> None:
    """Fault 28: files touched, removed, added: nothing is done again, a removed one is an error row, new ones wait."""
    box = Box(tmp_path / "box", 60, shard_rows=30)
    half_done(box)
    answers = files_of(box.output / "data")
    for path in box.source.iterdir():
        os.utime(path)
    for name in ("00001.png", "00050.png"):
        (box.source / name).unlink()
    make_pictures(box.source, 60, 66)
    box.run()
    found = records(box)
    assert list(found) == [f"{number:05d}.png" for number in range(60)]
    assert found["00001.png"]["response"] == box.right["00001.png"]
    assert (found["00050.png"]["error_stage"], found["00050.png"]["error_type"]) == ("read", "FileNotFoundError")
    assert answers.items() <= files_of(box.output / "data").items()
    answers, made = files_of(box.output / "data"), box.made()
    printed = box.run("resume=extend")
    assert "files of the plan are gone; answers about them stay" in printed
    assert list(records(box))[60:] == [f"{number:05d}.png" for number in range(60, 66)]
    assert answers.items() <= files_of(box.output / "data").items()
    assert {key: number for key, number in box.made().items() if key in made} == made


@pytest.mark.torture
def test_lines_reordered_removed_and_added(tmp_path: Path) -> None:
    """Fault 28: lines of a manifest reordered, removed, added: only those behind the old ones are ever asked."""
    box = Box(tmp_path / "box", 10, shard_rows=5)
    manifest = tmp_path / "box/rows.jsonl"
    lines = [json.dumps({"image": f"pictures/{number:05d}.png", "n": number}) for number in range(10)]
    box.words = [word for word in box.words if not word.startswith("dataset")]
    box.words += ["dataset=jsonl", f"dataset.path={manifest}"]
    manifest.write_text("\n".join(lines[:8]) + "\n")
    box.run()
    answers, made = files_of(box.output / "data"), box.made()
    manifest.write_text("\n".join(reversed(lines[:8])) + "\n")
    box.run()
    assert (files_of(box.output / "data"), box.made()) == (answers, made)
    assert "rows.jsonl was edited since it was planned" in box.run("deep=true", command="audit", code=1)
    for changed in (lines[:7], [*reversed(lines[:8]), *lines[8:]]):
        manifest.write_text("\n".join(changed) + "\n")
        assert "have changed otherwise: rows.jsonl" in box.run("resume=extend", code=2)
        assert (files_of(box.output / "data"), box.made()) == (answers, made)
    manifest.write_text("\n".join(lines) + "\n")
    box.run("resume=extend")
    rows = pq.read_table(box.output / "data").to_pylist()
    assert [row["n"] for row in rows] == list(range(10))
    assert made.keys() < box.made().keys() and set(box.made().values()) == {1}


def test_a_manifest_that_lost_a_line_during_the_run(tmp_path: Path) -> None:
    """Fault 28: a line removed from a manifest that is not done: the run stops and names the file; no row shifts."""
    box = Box(tmp_path / "box", 10, shard_rows=5)
    manifest = tmp_path / "box/rows.jsonl"
    lines = [json.dumps({"image": f"pictures/{number:05d}.png"}) for number in range(10)]
    box.words = [word for word in box.words if not word.startswith("dataset")]
    box.words += ["dataset=jsonl", f"dataset.path={manifest}"]
    manifest.write_text("\n".join(lines) + "\n")
    half_done(box)
    answers = files_of(box.output / "data")
    manifest.write_text("\n".join(lines[1:]) + "\n")
    printed = box.run(code=1)
    assert f"{manifest} has " in printed.splitlines()[-1] and "when it was listed" in printed.splitlines()[-1]
    assert files_of(box.output / "data") == answers
    manifest.write_text("\n".join(lines) + "\n")
    box.run()
    assert len(pq.read_table(box.output / "data")) == 10


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja", "generation_config.json"])
def test_another_model_in_the_place_of_the_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 29: another model under the same path, by one file of the same size: refused, and no answer is reused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    box = Box(tmp_path / "box", 10, shard_rows=5)
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    box.words = [word for word in box.words if word != "vlm=demo"]
    box.words += ["vlm=auto", f"vlm.path={model}", "dataset.max_rows=5"]
    plan = plan_of(box)
    before = files_of(box.output)
    path = model / name
    content = path.read_bytes()
    place = content.index(b"\n") if name != "model.safetensors" else len(content) - 9
    path.write_bytes(content[:place] + (b" " if name != "model.safetensors" else b"\x01") + content[place + 1 :])
    assert path.stat().st_size == len(content)
    with pytest.raises(SettingsChanged, match=rf"vlm\.files\.{name}  was"):
        plan_of(box)
    assert files_of(box.output) == before
    path.write_bytes(content)
    assert plan_of(box) == plan


def test_a_run_of_another_version(tmp_path: Path) -> None:
    """Fault 30: libraries updated while a run was half done: it goes on with a warning, and its shards say so."""
    box = Box(tmp_path / "box", 60, shard_rows=30)
    half_done(box)
    path = box.output / "plan.json"
    plan = json.loads(path.read_text())
    now = plan["versions"]["transformers"]
    plan["versions"] |= {"transformers": "4.0"}
    path.write_text(json.dumps(plan))
    printed = box.run()
    assert f"other versions than when the run began: transformers {now} (was 4.0)" in printed
    manifest = json.loads((box.output / "manifest.json").read_text())
    assert manifest["versions"]["transformers"] == "4.0"
    by_version = {one.get("transformers"): one["num_shards"] for one in manifest["numerics"]}
    assert by_version == {None: 1, now: 1}


@pytest.mark.parametrize("kind", ["a field more", "a field less", "another schema"])
def test_a_plan_of_another_release(kind: str, tmp_path: Path) -> None:
    """Fault 30: a plan of another release, with other fields or another schema: refused by name, nothing touched."""
    box = Box(tmp_path / "box", 10, shard_rows=5)
    plan_of(box)
    path = box.output / "plan.json"
    plan = json.loads(path.read_text())
    if kind == "a field more":
        plan["num_moons"] = 2
    elif kind == "a field less":
        del plan["extents"]
    else:
        plan["settings"]["schema_version"] = 0
    path.write_text(json.dumps(plan))
    before = files_of(box.output)
    printed = box.run(code=2 if kind == "another schema" else 1)
    sentence = "schema_version  was 0, now 1" if kind == "another schema" else f"{path} is not a plan of this program"
    assert sentence in printed and "Traceback" not in printed
    assert files_of(box.output) == before
