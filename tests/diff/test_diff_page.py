"""diff.html: changed records side by side, and what the page cannot be made to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from page_reader import Element, check_harmless, page_read
from small_run import COLUMNS
from two_runs import UNREADABLE, make_run, parquet, put_pictures

from pipeline.diff.command import run_diff
from pipeline.diff.options import DiffOptions
from pipeline.diff.selection import quotas

HOSTILE = [
    "<script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "</script><script>document.title='run'</script>",
    "</del></ins><svg onload=document.title='run'>",
    "\" onmouseover=\"document.title='run'",
    "[a](javascript:document.title='run') ![x](http://127.0.0.1/?leak)",
    "{{ 7 * 7 }}{% for x in y %}",
    "&lt;b&gt;<b>bold</b>",
    "\x1b[2J\x009b31m",
    "\u202egpj.exe",
    "<!--",
]


def diff_html(tmp_path: Path, a: str = "a", b: str = "b", **options: Any) -> str:
    html = tmp_path / "diff.html"
    asked: dict[str, Any] = {"html": str(html), "diff_output": str(tmp_path / "diff.json")} | options
    assert run_diff(DiffOptions(a=str(tmp_path / a), b=str(tmp_path / b), **asked)) == 0
    text = html.read_text(encoding="utf-8")
    check_harmless(text)
    return text


def sections(page: Element) -> dict[str, list[Element]]:
    """The cards of each section by its name, in the order of the page."""
    return {
        str(one.attributes["data-group"]): one.all("li", data_card="") or one.all("li") for one in page.all("section")
    }


def titles(cards: list[Element]) -> list[str]:
    return [card.all("h4")[0].text for card in cards]


def halves(card: Element) -> list[str]:
    """What a and b have on a card."""
    return [" ".join(half.text.split()) for half in card.all("div", class_="half")]


def test_changed_answers_stand_side_by_side_with_their_words_marked(tmp_path: Path) -> None:
    b = ["a cat sits here", "no", "a dog sits here", "a cat sits here", "a cat  sits here", "a cat sits here"]
    make_run(tmp_path / "a", lambda key: "a cat sits here")
    make_run(tmp_path / "b", lambda key: b[key.row_index])
    page = page_read(diff_html(tmp_path))
    found = sections(page)
    assert list(found) == ["changed", "same_normalized"]
    assert titles(found["changed"]) == ["00001.jpg", "00002.jpg"]  # the least alike first
    card = found["changed"][1]
    assert [mark.text for mark in card.all("del")] == ["cat"]
    assert [mark.text for mark in card.all("ins")] == ["dog"]
    assert halves(card) == ["a a cat sits here stop 15 tokens", "b a dog sits here stop 15 tokens"]
    assert "What is it?" in card.text
    assert page.all("h1")[0].text == "a against b"


def test_errors_and_records_of_one_side_have_sections_of_their_own(tmp_path: Path) -> None:
    make_run(tmp_path / "a", lambda key: UNREADABLE if key.row_index == 0 else "a cat", 6)
    make_run(tmp_path / "b", lambda key: UNREADABLE if key.row_index == 1 else "a cat", 9)
    found = sections(page_read(diff_html(tmp_path)))
    assert {name: titles(cards) for name, cards in found.items()} == {
        "only_a_answered": ["00001.jpg"],
        "only_b_answered": ["00000.jpg"],
        "only_in_b": ["00006.jpg", "00007.jpg", "00008.jpg"],
    }
    assert halves(found["only_a_answered"][0])[1] == "b decode/UnidentifiedImageError it is no picture"
    assert halves(found["only_in_b"][0]) == ["a has no such record", "b a cat stop 5 tokens"]


def test_two_equal_runs_have_an_empty_page(tmp_path: Path) -> None:
    make_run(tmp_path / "a", lambda key: "a cat")
    page = page_read(diff_html(tmp_path, "a", "a"))
    assert sections(page) == {}
    assert "Every record is the same in both." in page.text


def test_nothing_that_a_row_says_is_markup(tmp_path: Path) -> None:
    columns = pa.schema([*COLUMNS, pa.field("kind", pa.string())])
    num = len(HOSTILE)
    more: dict[str, Any] = {
        "columns": columns,
        "more": lambda index: {"kind": HOSTILE[index]},
        "ids": lambda index: HOSTILE[index],
    }
    make_run(tmp_path / "a", lambda key: HOSTILE[key.row_index], num, prompt=HOSTILE[0], **more)
    make_run(tmp_path / "b", lambda key: HOSTILE[key.row_index] + "?", num, prompt=HOSTILE[1], **more)
    html = diff_html(tmp_path, by=["kind"], reference="kind", metric=["exact_match"])
    page = page_read(html)
    assert not page.all("b") and not page.all("svg") and not page.all("a", href="javascript:document.title='run'")
    cards = [card for found in sections(page).values() for card in found]
    assert len(cards) == num
    said = {card.all("div", class_="half")[1].all("p", class_="answer")[0].text for card in cards}
    assert HOSTILE[0] + "?" in said and HOSTILE[6] + "?" in said
    assert "\\u202e" in page.text and "\u202e" not in html and "\x1b" not in html


def test_a_secret_is_hidden_also_where_marks_would_part_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_abc-def.ghi/jkl-mno"
    monkeypatch.setenv("HF_TOKEN", secret)
    make_run(tmp_path / "a", lambda key: f"it is {secret}", 1)
    make_run(tmp_path / "b", lambda key: f"it is {secret.replace('ghi', 'xyz')} or {secret}", 1)
    text = page_read(diff_html(tmp_path)).text
    assert "ghi" not in text and "it is ***" in text


def test_a_secret_is_hidden_where_a_prompt_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_abcdefghijklmno"
    monkeypatch.setenv("HF_TOKEN", secret)
    make_run(tmp_path / "a", lambda key: "a cat", 1, prompt="x" * 590 + secret)
    make_run(tmp_path / "b", lambda key: "a dog", 1, prompt="x" * 590 + secret)
    assert "hf_" not in diff_html(tmp_path)


def test_pictures_are_those_that_both_were_asked_about(tmp_path: Path) -> None:
    pictures = put_pictures(tmp_path / "in")
    make_run(tmp_path / "a", lambda key: "a cat", pictures=pictures)
    make_run(tmp_path / "b", lambda key: "a dog" if key.row_index < 3 else "a cat", pictures=pictures)
    (pictures / "00001.png").write_bytes((pictures / "00000.png").read_bytes())
    (pictures / "00002.png").unlink()
    cards = sections(page_read(diff_html(tmp_path)))["changed"]
    images = [card.all("img") for card in cards]
    assert [len(found) for found in images] == [1, 0, 0]
    assert images[0][0].attributes["alt"] == "Picture 1 of 00000.png"
    assert "changed since" in cards[1].text and "not shown: " in cards[2].text


def test_other_pictures_in_b_are_shown_beside_those_of_a(tmp_path: Path) -> None:
    make_run(tmp_path / "a", lambda key: "a cat", pictures=put_pictures(tmp_path / "in"))
    make_run(tmp_path / "b", lambda key: "a dog", pictures=put_pictures(tmp_path / "other", green=200))
    page = page_read(diff_html(tmp_path))
    card = sections(page)["changed"][0]
    assert len({image.attributes["src"] for image in card.all("img")}) == 2
    assert "a was asked about" in card.text and "b was asked about" in card.text
    assert "6 of 6 records are about other pictures in b than in a" in " ".join(page.text.split())


def test_a_file_beside_a_run_is_shown_with_the_pictures_of_the_run(tmp_path: Path) -> None:
    make_run(tmp_path / "a", lambda key: "a cat", pictures=put_pictures(tmp_path / "in"))
    parquet(tmp_path / "b.parquet", id=["00003.png", "elsewhere"], response=["a dog", "a fox"])
    found = sections(page_read(diff_html(tmp_path, "a", "b.parquet")))
    assert len(found["changed"][0].all("img")) == 1
    assert not found["only_in_b"][0].all("img")
    found = sections(page_read(diff_html(tmp_path, "b.parquet", "a")))
    assert len(found["changed"][0].all("img")) == 1


def test_of_many_changes_the_least_alike_and_some_others_are_shown(tmp_path: Path) -> None:
    make_run(tmp_path / "a", lambda key: "a" * 50, 40, shard_rows=20)
    make_run(tmp_path / "b", lambda key: "b" * key.row_index + "a" * (50 - key.row_index), 40, shard_rows=7)
    page = page_read(diff_html(tmp_path, html_rows=10))
    shown = titles(sections(page)["changed"])
    assert shown[:5] == [f"{index:05d}.jpg" for index in (39, 38, 37, 36, 35)]
    assert len(shown) == 10 and shown == sorted(shown, reverse=True)
    assert "the 5 least alike, and 5 of the others, drawn at random from 39" in page.text
    assert titles(sections(page_read(diff_html(tmp_path, html_rows=10)))["changed"]) == shown
    assert titles(sections(page_read(diff_html(tmp_path, html_rows=10, seed=7)))["changed"]) != shown


def test_rare_outcomes_are_all_shown() -> None:
    assert quotas({"changed": 1000, "only_a_answered": 3, "same_normalized": 80}, 100) == {
        "changed": 49,
        "only_a_answered": 3,
        "same_normalized": 48,
    }
    assert quotas({"changed": 5}, 100) == {"changed": 5}
    assert quotas({"changed": 5, "only_in_a": 5}, 1) == {"changed": 0, "only_in_a": 1}


def test_with_scores_better_and_worse_answers_are_told_apart(tmp_path: Path) -> None:
    columns = pa.schema([*COLUMNS, pa.field("answer", pa.string())])
    more: dict[str, Any] = {"columns": columns, "more": lambda index: {"answer": None if index == 5 else "cat"}}
    a, b = ["cat", "dog", "dog", "cat", "cat", "cat"], ["dog", "cat", "fox", "cat", "ox", "fox"]
    make_run(tmp_path / "a", lambda key: a[key.row_index], **more)
    make_run(tmp_path / "b", lambda key: b[key.row_index], **more)
    page = page_read(diff_html(tmp_path, reference="answer", metric=["exact_match"]))
    found = sections(page)
    assert {name: titles(cards) for name, cards in found.items()} == {
        "worse": ["00000.jpg", "00004.jpg"],
        "better": ["00001.jpg"],
        "changed": ["00005.jpg", "00002.jpg"],
    }
    assert halves(found["better"][0]) == ["a dog stop 3 tokens exact_match 0", "b cat stop 3 tokens exact_match 1"]
    assert "Reference: cat" in found["worse"][0].text
    assert "Reference" not in found["changed"][0].text


def test_several_prompts_and_samples_are_named(tmp_path: Path) -> None:
    make_run(tmp_path / "a", lambda key: "a cat", 1, prompt_names=("x", "y"), num_samples=2)
    make_run(tmp_path / "b", lambda key: "a dog", 1, prompt_names=("x", "y"), num_samples=2)
    cards = sections(page_read(diff_html(tmp_path)))["changed"]
    facts = [[span.text for span in card.all("p", class_="meta")[0].all("span")][:-1] for card in cards]
    assert facts == [["prompt x"], ["prompt x", "sample 1"], ["prompt y"], ["prompt y", "sample 1"]]


def test_long_answers_show_what_changed_and_the_page_stays_small(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(12_000))
    make_run(tmp_path / "a", lambda key: text + " cat", 20, shard_rows=20)
    make_run(tmp_path / "b", lambda key: text + " dog" if key.row_index else "x " * 50_000, 20, shard_rows=20)
    html = diff_html(tmp_path)
    assert len(html) < 200_000
    cards = sections(page_read(html))["changed"]
    assert [mark.text for mark in cards[1].all("del")] == ["cat"]
    assert "characters" in cards[1].all("span", class_="gap")[0].text


def test_an_unfinished_run_says_so_on_top(tmp_path: Path) -> None:
    make_run(tmp_path / "a", lambda key: "a cat", 9)
    make_run(tmp_path / "b", lambda key: "a dog", 9, num_shards=1)
    page = page_read(diff_html(tmp_path))
    assert "b is not finished: 3 of 9 records are published." in page.all("p", class_="banner")[0].text


def test_no_page_is_written_where_none_is_asked_for(tmp_path: Path) -> None:
    make_run(tmp_path / "a", lambda key: "a cat")
    assert run_diff(DiffOptions(a=str(tmp_path / "a"), b=str(tmp_path / "a"), html_rows=0)) == 0
    assert not (tmp_path / "a/diff.html").exists()
