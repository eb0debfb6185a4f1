"""Odd names of files and folders: blanks, Unicode in two spellings, percent signs, dashes, quotes, 240 bytes, links."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from fake_model import right_answer
from fake_run import fake_run
from faultbox import PROMPT
from PIL import Image

pytestmark = pytest.mark.slow  # make test has the kills, the races and the state machine

COMPOSED, DECOMPOSED = "\u00fcml\u00e4ut", "u\u0308mla\u0308ut"
ODD = (
    "with blank", " blanks around ", "comma, colon: and = sign", COMPOSED, DECOMPOSED, "%3A%2F", "-dash", "--flag=1",
    "quote'\"`$(x)", "*?[!a]{b,c}", "new\nline", "${oc.env:HOME}", "back\\slash", "\U0001f600", "null", "[1]", "#x",
    "!tag", "a" * 240,
)  # fmt: skip
WORDS = (f"prompt.user={PROMPT}", "engine.num_workers=1", "max_error_rate=null", "dataset=images")


def put_picture(path: Path, number: int) -> str:
    """A picture of its own; what the model has to say of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image, encoded = Image.new("RGB", (3, 2), (number, 2, 3)), io.BytesIO()
    image.save(encoded, "PNG")
    path.write_bytes(encoded.getvalue())
    return right_answer([image], PROMPT)


def test_files_and_folders_with_odd_names(tmp_path: Path) -> None:
    """Fault 25: each file of odd name, in folders of odd names, is answered under exactly its name."""
    source = tmp_path / "source"
    right = {}
    for number, name in enumerate(ODD):
        for place, path in enumerate((f"{name}.png", f"{name}/deep/{name}.png")):
            right[path] = put_picture(source / path, 2 * number + place)
    (source / b"\xff.png".decode("utf-8", "surrogateescape")).write_bytes(b"never opened")
    ended = fake_run(tmp_path, f"dataset.path={source}", *WORDS)
    found = {row["id"]: row["response"] for row in ended.rows}
    assert found.pop("\\udcff.png") is None, "no UTF-8: an error row under an escaped name"
    assert found == right
    assert len(ended.rows) == len(right) + 1


def test_an_output_folder_and_a_source_with_odd_names(tmp_path: Path) -> None:
    """Fault 25: folders of odd names, relative and absolute, hold source and results; a second start finds them."""
    few = "/".join(name for name in ODD if len(name) < 200)
    check_folders(tmp_path, tmp_path, f"{tmp_path}/in/{few}", f"{tmp_path}/out/{few}")
    check_folders(tmp_path, tmp_path / "in", f"-dash/{'b' * 240}", f"-out/../ {'o' * 240}")


@pytest.mark.torture
@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_each_odd_name(name: str, tmp_path: Path) -> None:
    """Fault 25: the same, name by name."""
    check_folders(tmp_path, tmp_path, f"{tmp_path}/in/{name}", f"{tmp_path}/out/{name}")
    check_folders(tmp_path, tmp_path / "in", name, f"../{name}")


def check_folders(tmp_path: Path, folder: Path, source: str, output: str) -> None:
    """Two starts in `folder`: the first does the work where it is told to, the second knows."""
    answer = put_picture(folder / source / "a.png", 7)
    (folder / output).parent.mkdir(parents=True, exist_ok=True)
    words = (f"dataset.path={source}", f"output_dir={output}", *WORDS)
    fake_run(folder, *words)
    [shard] = (folder / output / "data").iterdir()
    before = shard.read_bytes()
    assert "All 1 rows are done already" in fake_run(folder, *words).printed
    assert shard.read_bytes() == before and answer.encode() in before
    assert sorted(path.name for path in (folder / output).iterdir()) == [
        "README.md", "data", "manifest.json", "plan", "plan.json", "stats",
    ]  # fmt: skip
    assert not (folder / "outputs").exists()


@pytest.mark.torture
def test_two_spellings_of_one_name_are_two_folders(tmp_path: Path) -> None:
    """Fault 25: names in composed and decomposed Unicode are two outputs, and neither is taken for the other."""
    for number, name in enumerate((COMPOSED, DECOMPOSED)):
        put_picture(tmp_path / name / f"{number}.png", number)
        fake_run(tmp_path, f"dataset.path={name}", f"output_dir=out {name}", *WORDS)
    assert {path.name for path in tmp_path.glob("out *")} == {f"out {COMPOSED}", f"out {DECOMPOSED}"}


def test_an_output_folder_behind_a_link(tmp_path: Path) -> None:
    """Fault 25: an output folder behind a symbolic link, and one that is moved as a whole, are the same run."""
    source, real, link = tmp_path / "source", tmp_path / "real", tmp_path / "link"
    put_picture(source / "a.png", 1)
    real.mkdir()
    link.symlink_to(real, target_is_directory=True)
    words = (f"dataset.path={source}", *WORDS)
    fake_run(tmp_path, f"output_dir={link}", *words)
    assert link.is_symlink()
    assert "All 1 rows are done already" in fake_run(tmp_path, f"output_dir={real}", *words).printed
    real.rename(tmp_path / "moved")
    assert "All 1 rows are done already" in fake_run(tmp_path, "output_dir=moved", *words).printed
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")  # dangling: nothing is made where nobody asked for it
    assert str(link) in fake_run(tmp_path, f"output_dir={link}", *words, code=1).printed
    assert not (tmp_path / "nowhere").exists()
