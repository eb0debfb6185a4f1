"""vlm-batch report: what its page says, and what it cannot be made to do."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from made_run import jpeg, made_run, put_pictures, worker
from page_reader import Element, check_harmless, page_read

from pipeline.errors import RunFailed, UsageError
from pipeline.report import plots
from pipeline.report import sample as sample_module
from pipeline.report.report import ReportOptions, report_at_end, write_report

HOSTILE = [
    "<script>document.title='run'</script>", "<img src=x onerror=\"document.title='run'\">",
    "</script><script>document.title='run'</script>", "</textarea></title></style><svg onload=document.title='run'>",
    "\" onmouseover=\"document.title='run'", "[a](javascript:document.title='run') ![x](http://127.0.0.1/?leak)",
    "{{ 7 * 7 }}{% for x in y %}", "${7*7}<%= 7*7 %>", "<a href=\"javascript:document.title='run'\">a</a>",
    "&lt;b&gt;<b>bold</b>", "\x1b[2J\x00\x9b31m", "$\\frac{1}{$", "\u202egpj.exe", "<!--", "]]>", "a\u2028b",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second to draw; test_plots.py looks at them."""
    monkeypatch.setattr(plots, "can_draw", lambda: False)


def report(output: Path, **options: Any) -> str:
    return Path(str(write_report(output, ReportOptions(**options)))).read_text()


def group(page: Element, name: str) -> list[Element]:
    """The cards of a section."""
    return [card for section in page.all("section", data_group=name) for card in section.all("li", class_="card")]


def answers(cards: list[Element]) -> list[str]:
    return [part.text for card in cards for part in card.all("p", class_="answer")]


def fact(page: Element, name: str) -> str:
    [found] = [entry for entry in page.all("div") if entry.all("dt") and entry.all("dt")[0].text == name]
    return " ".join(found.all("dd")[0].text.split())


def test_a_page_shows_records_with_their_pictures_and_counts_them(tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in"))
    html = report(tmp_path / "out")
    page = page_read(html)
    assert fact(page, "Records") == "6"
    assert fact(page, "Errors") == "0 0.0 %"
    assert fact(page, "Generated tokens") == "18 3.0 an answer"
    assert fact(page, "Time at work") == "40 s"
    assert fact(page, "Waiting for input") == "25.0 % of the workers' time"
    cards = group(page, "random")
    assert sorted(answers(cards)) == [f"answer {number}" for number in range(6)]
    for card in cards:
        [picture] = card.all("img")
        assert picture.attributes["alt"] == f"Picture 1 of {card.all('h4')[0].text}"
        assert card.all("p", class_="prompt")[0].text == "What is it?"
        assert "stop" in card.text and "3 tokens" in card.text and "40 x 30" in card.text
    assert "num_identical" in page.text and "bfloat16" in page.text
    assert "dataset.path" in page.text
    check_harmless(html)


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in"))
    assert report(tmp_path / "out") == report(tmp_path / "out")


def test_hostile_text_is_text_wherever_it_comes_from(tmp_path: Path) -> None:
    """Fault S-8: in answers, ids, columns, error classes, messages, warnings, settings, scores, a worker's words."""
    pictures = put_pictures(tmp_path / "in", 2 * len(HOSTILE))

    def record(index: int) -> Mapping[str, Any]:
        text = HOSTILE[index % len(HOSTILE)]
        found = {"id": f"{index} {text}", "prompt": f"prompt {text}", "response": text, "warnings": [text]}
        found |= {"input.path": text, "prompt_name": text}
        if index < len(HOSTILE):
            return found
        return found | {"status": "error", "error_stage": "decode", "error_type": text, "error_message": text}

    plan = made_run(
        tmp_path / "out", pictures, record, settings={"prompt.user": "".join(HOSTILE), "vlm.path": HOSTILE[0]}
    )
    said = worker(plan, parity={text: text for text in HOSTILE}, host=HOSTILE[0])
    (tmp_path / "out/stats/worker-0-a.json").write_text(json.dumps(said))
    (tmp_path / "out/score.json").write_text(json.dumps({text: {"value": 0.5, "num_rows": text} for text in HOSTILE}))
    html = report(tmp_path / "out", examples=50)
    check_harmless(html)
    page = page_read(html)
    whole = page.text
    for text in HOSTILE:
        seen = text.encode("unicode_escape").decode() if "\x1b" in text else text
        seen = seen.replace("\u202e", "\\u202e").replace("\u2028", "\\u2028")
        assert whole.count(seen) > 5, text
    assert "49" not in "".join(answers(group(page, "random"))), "a template in an answer was rendered"
    assert len(page.all("script")) == 1 and not page.all("b") and not page.all("a", href="javascript:")
    assert not any(character in html for character in "\x00\x1b\x9b\u202e\u2028")


def test_what_cannot_be_seen_is_marked(tmp_path: Path) -> None:
    hidden = "cat\u202egnp.exe\u200bx\ufeff\U000e0041"
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 1), lambda index: {"response": hidden})
    [card] = group(page_read(report(tmp_path / "out")), "random")
    marks = card.all("p", class_="answer")[0].all("span", class_="unseen")
    assert [mark.text for mark in marks] == ["\\u202e", "\\u200b", "\\ufeff\\U000e0041"]


def test_secrets_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    made_run(
        tmp_path / "out", put_pictures(tmp_path / "in", 1), lambda index: {"response": "it says hf_abcdefghijklmnop"}
    )
    html = report(tmp_path / "out")
    assert "hf_abcdefghijklmnop" not in html and "it says ***" in html


def test_long_texts_are_folded_and_very_long_ones_cut(tmp_path: Path) -> None:
    long = " ".join(f"word{number}" for number in range(100))
    texts = ["short", long, "x" * 50_000]
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3), lambda index: {"response": texts[index]})
    cards = {card.all("h4")[0].text: card for card in group(page_read(report(tmp_path / "out")), "random")}
    assert not cards["00000.png"].all("details", class_="rest")
    [rest] = cards["00001.png"].all("details", class_="rest")
    head, tail = (part.text for part in cards["00001.png"].all("p", class_="answer"))
    assert head.removesuffix(" ...") + tail == long and 200 < len(head) < 300
    assert f"{len(long)} characters" in rest.text
    assert "40,000 more characters are in the Parquet files" in cards["00002.png"].text


def test_records_are_grouped_by_what_is_worth_a_look(tmp_path: Path) -> None:
    def record(index: int) -> Mapping[str, Any]:
        if index < 20:
            return {"response": "yes"}
        if index < 30:
            return {"response": "no"}
        if index == 30:
            return {"response": "word " * 200, "finish_reason": "length"}
        if index == 31:
            return {"response": "la " * 60, "finish_reason": "repetition"}
        if index == 32:
            return {"response": ""}
        if index < 35:
            return {"status": "error", "error_stage": "decode", "error_type": "OSError", "error_message": "torn"}
        return {"status": "error", "error_stage": "read", "error_type": "Gone", "error_message": "no such file"}

    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 36), record, shard_rows=10)
    page = page_read(report(tmp_path / "out", examples=3))
    assert len(group(page, "random")) == 6
    assert answers(group(page, "longest"))[0].split()[0] == "word"
    assert answers(group(page, "shortest")) == ["(empty)", "no", "yes"], "equal answers once"
    commonest = group(page, "repeated")
    assert answers(commonest) == ["yes", "no"]
    assert [card.all("p", class_="note")[0].text for card in commonest] == [
        "20 of 33 answers are this", "10 of 33 answers are this",
    ]  # fmt: skip
    assert len(group(page, "finish-length")) == len(group(page, "finish-repetition")) == 1
    assert [len(group(page, f"error-{number}")) for number in range(2)] == [2, 1], "the commonest class first"
    assert "decode/OSError" in group(page, "error-0")[0].text and "torn" in group(page, "error-0")[0].text
    assert fact(page, "Errors") == "3 8.3 %"
    bars = {
        row.all("th")[0].text: row.all("td")[-1].text
        for table in page.all("table", class_="bars")
        for row in table.all("tr")
    }
    assert bars["stop"] == "31 (93.9 %)" and bars["decode/OSError"] == "2 (5.6 %)"


def test_a_picture_that_is_another_one_by_now_is_not_shown(tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3))
    (tmp_path / "in/00001.png").write_bytes((tmp_path / "in/00002.png").read_bytes())
    (tmp_path / "in/00002.png").unlink()
    cards = {card.all("h4")[0].text: card for card in group(page_read(report(tmp_path / "out")), "random")}
    assert cards["00000.png"].all("img")
    assert not cards["00001.png"].all("img") and "changed since" in cards["00001.png"].text
    assert not cards["00002.png"].all("img") and "No such file or directory" in cards["00002.png"].text


def test_a_source_that_moved_is_found_by_root(tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3))
    (tmp_path / "in").rename(tmp_path / "moved")
    assert not page_read(report(tmp_path / "out")).all("img")
    assert page_read(report(tmp_path / "out", root=str(tmp_path / "moved"))).all("img")


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_pictures_that_the_run_kept_are_shown_whatever_became_of_the_source(what: str, tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 5), settings={"write.keep_images": True})
    before = page_read(report(tmp_path / "out")).all("img")
    for path in (tmp_path / "in").iterdir():
        path.unlink() if what == "gone" else path.write_bytes(jpeg(9, 9))
    after = page_read(report(tmp_path / "out"))
    assert len(after.all("img")) == len(before) > 0
    assert [one.attributes["src"] for one in after.all("img")] == [one.attributes["src"] for one in before]
    assert "changed since" not in after.text


def test_an_unfinished_run_has_a_report_that_says_so(tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 9), num_shards=2)
    page = page_read(report(tmp_path / "out"))
    assert fact(page, "Records") == "6 of 9 planned"
    assert "2 of 3 shards are published" in page.text
    made_run(tmp_path / "none", tmp_path / "in", num_shards=0)
    with pytest.raises(UsageError, match="none of the 3 shards is published"):
        report(tmp_path / "none")


def test_of_a_large_run_a_sample_is_read_and_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(index: int) -> Mapping[str, Any]:
        rare = {"status": "error", "error_stage": "encode", "error_type": "Rare", "error_message": "once in a run"}
        return rare if index in (0, 59) else {}

    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 60), record, shard_rows=2)
    monkeypatch.setattr(sample_module, "MOST_RECORDS", 10)
    page = page_read(report(tmp_path / "out"))
    assert "10 records in 5 of 30 shards" in page.text
    assert (fact(page, "Records"), fact(page, "Errors")) == ("60", "2 3.3 %"), "counted in all shards"
    assert len(group(page, "random")) == 10
    assert len(group(page, "error-0")) == 2, "looked for in other shards"


def test_a_damaged_shard_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 6))
    path = tmp_path / "out/data/part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    page = page_read(report(tmp_path / "out"))
    assert "part-00001.parquet" in page.text and "could not be read" in page.text
    assert len(group(page, "random")) == 3


def test_scores_are_shown_where_there_are_some(tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3))
    scores = {"exact_match": {"value": 0.75, "low": 0.5, "high": 0.91, "num_rows": 3}, "note": "no metric"}
    (tmp_path / "out/score.json").write_text(json.dumps(scores))
    page = page_read(report(tmp_path / "out"))
    [row] = [row for row in page.all("tr") if row.all("th") and row.all("th")[0].text == "exact_match"]
    assert [cell.text for cell in row.all("td")] == ["0.7500", "0.5000 to 0.9100", "3"]
    assert "earlier state" not in page.text
    for count in ({"num_records": 2}, {"num_error_records": 1}):
        (tmp_path / "out/score.json").write_text(json.dumps({"exact_match": scores["exact_match"] | count}))
        assert "The scores are of an earlier state of the run" in page_read(report(tmp_path / "out")).text
    (tmp_path / "out/score.json").write_text("{")
    assert "score.json cannot be read" in page_read(report(tmp_path / "out")).text


def test_columns_have_the_names_that_the_run_gave_them(tmp_path: Path) -> None:
    settings = {"write.prefix": "vlm_", "write.response_column": "caption"}
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3), settings=settings)
    cards = group(page_read(report(tmp_path / "out")), "random")
    assert sorted(answers(cards)) == ["answer 0", "answer 1", "answer 2"]
    assert all(card.all("img") for card in cards)
    assert [entry.text for entry in cards[0].all("details", class_="columns")[0].all("dt")] == ["path"]


def test_a_report_goes_where_it_is_told(tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3))
    report(tmp_path / "out", html=str(tmp_path / "elsewhere/page.html"))
    assert (tmp_path / "elsewhere/page.html").exists() and not (tmp_path / "out/report.html").exists()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["page.html"]


def test_at_the_end_of_a_run_what_goes_wrong_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 3))
    (tmp_path / "out/report.html").mkdir()
    with pytest.raises(RunFailed, match=r"report\.html cannot be written"):
        write_report(tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        report_at_end(tmp_path / "out", lambda: False)
    assert "report.html is not written" in caplog.text and "vlm-batch report" in caplog.text
    assert not list((tmp_path / "out/stats").glob("*.tmp"))


def test_a_run_that_is_stopped_does_not_wait_for_pictures(tmp_path: Path) -> None:
    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 30), shard_rows=30)
    write_report(tmp_path / "out", is_stopped=lambda: True)
    page = page_read((tmp_path / "out/report.html").read_text())
    assert len(page.all("img")) <= 5 and "there was no time" in page.text
    assert len(group(page, "random")) == 24


def test_a_page_is_bounded_whatever_is_in_the_rows(tmp_path: Path) -> None:
    """Ten thousand invisible characters in each of hundreds of answers, every picture different."""
    text = "a\u202e&" * 20_000

    def record(index: int) -> Mapping[str, Any]:
        return {"response": f"{index}{text}", "prompt": text, "input.path": text, "num_image_tokens": None}

    made_run(tmp_path / "out", put_pictures(tmp_path / "in", 120), record, shard_rows=40, hashed=False)
    html = report(tmp_path / "out", examples=50)
    assert len(html.encode()) < 10_000_000
    assert len(group(page_read(html), "random")) == 100
