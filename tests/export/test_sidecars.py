"""format=txt and caption: what lands beside the images, and what never does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from answered_run import FAULT, answered_run, manifest, pictures
from command_line import CHECKOUT
from small_run import tree

from pipeline.errors import RunFailed, UsageError
from pipeline.export import sidecars
from pipeline.export.formats import exported
from pipeline.export.options import Exists, ExportOptions, Format
from pipeline.export.selection import Selection
from pipeline.records import RecordKey, Row


def export(output_dir: Path, **words: Any) -> Selection:
    options = ExportOptions(**({"format": Format.txt} | words))
    return exported(output_dir, options)[0]


def texts(folder: Path, extension: str = ".txt") -> dict[str, str]:
    found = [path for path in folder.rglob(f"*{extension}") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes().decode() for path in found}


def run(tmp_path: Path, *names: str, said: Any = None, **more: Any) -> Path:
    source = pictures(tmp_path / "pictures", *names)
    kwargs = {} if said is None else {"said": said}
    answered_run(tmp_path / "run", source, **kwargs, **more)
    return tmp_path / "run"


def test_a_text_lies_beside_each_image(tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg", "deep/b c.png", "deep/er/ü.webp.png", "-d.jpeg")
    assert export(output).num_written == 4
    assert texts(tmp_path / "pictures") == {
        "a.txt": "a.jpg is a picture",
        "deep/b c.txt": "deep/b c.png is a picture",
        "deep/er/ü.webp.txt": "deep/er/ü.webp.png is a picture",
        "-d.txt": "-d.jpeg is a picture",
    }
    assert len(list((tmp_path / "pictures").rglob("*"))) == 4 + 4 + 2  # and nothing but those


def test_a_folder_of_its_own_has_the_same_names(tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg", "deep/b.png")
    before = tree(tmp_path / "pictures")
    export(output, format=Format.caption, to=str(tmp_path / "captions"))
    assert texts(tmp_path / "captions", "") == {
        "a.caption": "a.jpg is a picture",
        "deep/b.caption": "deep/b.png is a picture",
    }
    assert tree(tmp_path / "pictures") == before


def test_what_somebody_wrote_stays_unless_told_otherwise(tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "pictures/a.txt").write_text("mine")
    done = export(output)
    assert (done.num_written, done.left_out) == (1, {"files that were there already": 1})
    assert texts(tmp_path / "pictures") == {"a.txt": "mine", "b.txt": "b.jpg is a picture"}
    assert export(output, exists=Exists.overwrite).num_written == 2
    assert texts(tmp_path / "pictures")["a.txt"] == "a.jpg is a picture"


@pytest.mark.parametrize(
    ("exists", "earlier", "later"),
    [
        (Exists.append, "mine", "mine, a cat"),
        (Exists.append, "mine\n", "mine, a cat"),
        (Exists.append, "", "a cat"),
        (Exists.append, "\ufeffmine", "mine, a cat"),
        (Exists.append, "mine, a cat", "mine, a cat"),
        (Exists.append, "a cat\n", "a cat\n"),
        (Exists.append, "a cat, mine", "a cat, mine, a cat"),
        (Exists.append, "a black a cat", "a black a cat, a cat"),
        (Exists.prepend, "mine\n", "a cat, mine\n"),
        (Exists.prepend, " mine", "a cat, mine"),
        (Exists.prepend, "a cat, mine", "a cat, mine"),
        (Exists.prepend, "a cat", "a cat"),
        (Exists.prepend, "a catfish", "a cat, a catfish"),
    ],
)
def test_adding_to_what_is_there(exists: Exists, earlier: str, later: str, tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg", said=lambda row, key: "a cat")
    (tmp_path / "pictures/a.txt").write_text(earlier)
    for _ in range(3):  # a second export does not add the same words again
        done = export(output, exists=exists, separator=", ")
        assert texts(tmp_path / "pictures") == {"a.txt": later}
    assert done.left_out == {"files that have these words there already": 1}


def test_appending_where_nothing_is_writes_the_answer(tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg", said=lambda row, key: "a cat")
    assert export(output, exists=Exists.append).num_written == 1
    assert texts(tmp_path / "pictures") == {"a.txt": "a cat"}


def test_prefix_line_breaks_and_blanks(tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg", said=lambda row, key: "  A cat.\r\n\r\n  It  sits.\u2028Then\vnot. ")
    export(output, prefix="ohwx woman, ")
    assert texts(tmp_path / "pictures") == {"a.txt": "ohwx woman, A cat. It  sits. Then not."}
    export(output, prefix="ohwx woman, ", one_line=False, exists=Exists.overwrite)
    assert texts(tmp_path / "pictures") == {"a.txt": "ohwx woman, A cat.\n\n  It  sits.\u2028Then\vnot."}


def test_errors_refusals_and_empty_answers_write_nothing_and_are_counted(tmp_path: Path) -> None:
    says = {"a.jpg": FAULT, "b.jpg": "I’M SORRY, but no", "c.jpg": "Well, i cannot.", "d.jpg": " \n", "e.jpg": "A cat."}
    output = run(tmp_path, *says, said=lambda row, key: says[row.id])
    done = export(output, fail_phrases=["I cannot", "I'm sorry"], prefix="p ")
    assert texts(tmp_path / "pictures") == {"e.txt": "p A cat."}
    assert done.left_out == {
        "error decode/UnidentifiedImageError": 1,
        "with the phrase 'I cannot'": 1,
        'with the phrase "I\'m sorry"': 1,
        "empty answers": 1,
    }
    assert done.num_written == 1 and not done.failed


def test_of_several_prompts_and_samples_one_is_chosen(tmp_path: Path) -> None:
    def said(row: Row, key: RecordKey) -> str:
        return f"{key.prompt_name} {key.sample_index}"

    output = run(tmp_path, "a.jpg", said=said, prompt_names=("short", "long"), num_samples=2)
    with pytest.raises(UsageError, match=r"prompts short, long: choose one with prompt_name="):
        export(output)
    with pytest.raises(UsageError, match=r"2 samples of each: choose one with sample_index="):
        export(output, prompt_name="long")
    with pytest.raises(UsageError, match="prompts are short, long"):
        export(output, prompt_name="lang")
    with pytest.raises(UsageError, match="has 2 samples"):
        export(output, prompt_name="long", sample_index=2)
    assert texts(tmp_path / "pictures") == {}
    done = export(output, prompt_name="long", sample_index=1)
    assert texts(tmp_path / "pictures") == {"a.txt": "long 1"}
    assert done.left_out == {"of other prompts": 2, "other samples": 1}


def test_two_images_that_would_have_one_text_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    output = run(tmp_path, "deep/a.jpg", "deep/a.png", "b.jpg")
    with pytest.raises(UsageError, match=r"'deep/a.jpg' and 'deep/a.png' -> 'deep/a.txt'.*full_names=true"):
        export(output)
    assert texts(tmp_path / "pictures") == {}
    export(output, full_names=True)
    assert sorted(texts(tmp_path / "pictures")) == ["b.jpg.txt", "deep/a.jpg.txt", "deep/a.png.txt"]


def test_an_error_row_clashes_with_nobody(tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg", "a.png", said=lambda row, key: FAULT if row.id == "a.png" else "A cat.")
    export(output)
    assert texts(tmp_path / "pictures") == {"a.txt": "A cat."}


def test_a_text_never_takes_the_place_of_what_was_asked_about(tmp_path: Path) -> None:
    source = pictures(tmp_path / "pictures", "a.jpg", "a.txt")
    source.pattern = "*"
    answered_run(tmp_path / "run", source, lambda row, key: FAULT if row.id == "a.txt" else "A cat.")
    before = tree(tmp_path / "pictures")
    with pytest.raises(UsageError, match=r"name of a file that the run was asked about: 'a.jpg' -> 'a.txt'"):
        export(tmp_path / "run", exists=Exists.overwrite)
    assert tree(tmp_path / "pictures") == before
    export(tmp_path / "run", format=Format.caption)
    export(tmp_path / "run", to=str(tmp_path / "texts"))
    assert texts(tmp_path / "texts") == {"a.txt": "A cat."}


def test_names_that_differ_in_case_clash_where_the_file_system_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run(tmp_path, "a.jpg", "A.png", "e\u0301.jpg", "\u00e9.png")
    assert not sidecars._ignores_case(tmp_path)
    monkeypatch.setattr(sidecars, "_ignores_case", lambda folder: True)
    with pytest.raises(UsageError, match="2 texts would have the name of another"):
        export(output)
    monkeypatch.undo()
    assert export(output).num_written == 4


def test_ids_lead_nowhere_else(tmp_path: Path) -> None:
    """Ids of a manifest may be any text; `to` is where texts go."""
    ids = ["../up", "/etc/x", "a/../../up", "./a", "a//b", "nul\0", "line\nbreak", "a\\..\\b", "ok/v1.5", "ok/v1.PNG",
           "", "x" * 300, "y" * 251]  # fmt: skip
    source = manifest(tmp_path / "source", [{"name": name} for name in ids], id_column="name")
    answered_run(tmp_path / "run", source)
    (tmp_path / "texts").mkdir()
    before = tree(tmp_path / "source")
    done = export(tmp_path / "run", to=str(tmp_path / "texts" / "here"))
    assert sorted(texts(tmp_path / "texts")) == sorted(
        ["here/line\nbreak.txt", "here/a\\..\\b.txt", "here/ok/v1.5.txt", "here/ok/v1.txt", f"here/{'y' * 251}.txt"]
    )
    assert done.failed == {"ids that are no path inside a folder": 7, "names that are too long for the file system": 1}
    assert done.examples["ids that are no path inside a folder"] == "../up"
    assert tree(tmp_path / "source") == before and not (tmp_path / "up.txt").exists()


def test_links_are_never_followed(tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg", "b.jpg", "deep/c.jpg", "d.jpg")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("precious")
    to = tmp_path / "texts"
    to.mkdir()
    (to / "a.txt").symlink_to(outside / "precious.txt")
    (to / "b.txt").symlink_to(outside / "not there.txt")
    (to / "deep").symlink_to(outside, target_is_directory=True)
    (to / "d.txt").mkdir()
    for exists in (Exists.overwrite, Exists.append, Exists.prepend):
        done = export(output, to=str(to), exists=exists)
        assert done.failed == {
            "a link, a folder or something else in the way": 3,
            "folders that lead elsewhere by a link": 1,
        }
    assert export(output, to=str(to)).left_out == {"files that were there already": 3}
    assert texts(outside) == {"precious.txt": "precious"} and (to / "a.txt").is_symlink()


def test_a_file_that_is_no_text_gets_nothing_added(tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg")
    (tmp_path / "pictures/a.txt").write_bytes(b"\xff\xfem\x00")
    done = export(output, exists=Exists.append)
    assert done.failed == {"files that are no UTF-8 text, so that nothing can be added to them": 1}
    assert (tmp_path / "pictures/a.txt").read_bytes() == b"\xff\xfem\x00"


def test_images_that_have_moved(tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg", "deep/b.jpg")
    (tmp_path / "pictures").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"is not there\. root="):
        export(output)
    (tmp_path / "moved/deep/b.jpg").unlink()
    (tmp_path / "moved/deep").rmdir()
    done = export(output, root=str(tmp_path / "moved"))
    assert texts(tmp_path / "moved") == {"a.txt": "a.jpg is a picture"}
    assert done.failed == {"folders that are not there any more": 1}
    with pytest.raises(UsageError, match="with to= it means nothing"):
        export(output, root=str(tmp_path / "moved"), to=str(tmp_path / "texts"))


def test_beside_the_images_needs_files(tmp_path: Path) -> None:
    answered_run(tmp_path / "run", manifest(tmp_path / "source", [{"a": 1}]))
    with pytest.raises(UsageError, match=r"Give a folder for the texts: to="):
        export(tmp_path / "run")


def test_a_name_of_255_bytes_has_room_for_its_temporary_name(tmp_path: Path) -> None:
    name = "z" * 251
    output = run(tmp_path, f"{name}.jpg")
    export(output)
    assert texts(tmp_path / "pictures") == {f"{name}.txt": f"{name}.jpg is a picture"}


def test_a_folder_that_cannot_be_made_or_written(tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg")
    with pytest.raises(RunFailed, match="/proc/texts cannot be made"):
        export(output, to="/proc/texts")
    with pytest.raises(RunFailed, match="/proc cannot be written"):
        export(output, to="/proc")


def test_a_full_disk_is_named_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = run(tmp_path, "a.jpg", "b.jpg")

    def full(source: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(RunFailed, match=r"a\.txt cannot be written: .*No space left"):
        export(output)
    assert sorted(os.listdir(tmp_path / "pictures")) == ["a.jpg", "b.jpg"]


def test_a_kill_leaves_whole_files_or_none(tmp_path: Path) -> None:
    """Killed right before the second text gets its name: the first is there, and the next export writes the others."""
    output = run(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    script = f"""
import os, signal
from pathlib import Path
link, calls = os.link, []
def killed(*names):
    calls.append(names)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    link(*names)
os.link = killed
from pipeline.export.formats import exported
from pipeline.export.options import ExportOptions, Format
exported(Path({str(output)!r}), ExportOptions(format=Format.txt))
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, timeout=60)
    assert killed.returncode == -9
    assert texts(tmp_path / "pictures") == {"a.txt": "a.jpg is a picture"}
    assert export(output).num_written == 2
    assert len(texts(tmp_path / "pictures")) == 3


def test_texts_in_an_object_store(tmp_path: Path) -> None:
    import fsspec

    output = run(tmp_path, "a.jpg", "deep/b.png", said=lambda row, key: "a cat")
    to = f"memory://{tmp_path.name}"
    assert export(output, to=to).num_written == 2
    assert export(output, to=to).left_out == {"files that were there already": 2}
    files = fsspec.filesystem("memory")
    files.pipe_file(f"/{tmp_path.name}/deep/b.txt", b"mine")
    assert export(output, to=to, exists=Exists.append).num_written == 1
    assert {path: files.cat_file(path) for path in files.find(f"/{tmp_path.name}")} == {
        f"/{tmp_path.name}/a.txt": b"a cat",
        f"/{tmp_path.name}/deep/b.txt": b"mine a cat",
    }


def test_texts_do_not_go_among_the_files_of_the_run(tmp_path: Path) -> None:
    output = run(tmp_path, "a.jpg")
    before = tree(output)
    (tmp_path / "link").symlink_to(output, target_is_directory=True)
    for to in (output, output / "data", output / "plan/x", tmp_path / "link/data", output / "export/../data"):
        with pytest.raises(UsageError, match="lies among the files of the run"):
            export(output, to=str(to))
    assert tree(output) == before
    assert export(output, to=str(output / "export/texts")).num_written == 1
