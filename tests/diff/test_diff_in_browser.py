"""diff.html in a real browser: rendered, searched, by keyboard, on a phone, in the dark."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Browser
from test_diff_page import HOSTILE
from two_runs import UNREADABLE, make_run, put_pictures

from pipeline.diff.command import run_diff
from pipeline.diff.options import DiffOptions
from pipeline.records import Fault, RecordKey

pytestmark = pytest.mark.slow  # a browser takes seconds to start

ESCAPE, TAB, ENTER = "\ue00c", "\ue004", "\ue007"


def say_a(key: RecordKey) -> str | Fault:
    return HOSTILE[key.row_index] if key.row_index < len(HOSTILE) else "A zebra crosses the old road. " * 12


def say_b(key: RecordKey) -> str | Fault:
    if key.row_index == 12:
        return UNREADABLE
    return say_a(key) + "?" if key.row_index < len(HOSTILE) else "A horse crosses the road. " * 12 + "x" * 3000


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff")
    num = 16
    make_run(folder / "a", say_a, num, pictures=put_pictures(folder / "in", num), prompt="".join(HOSTILE))
    make_run(folder / "b", say_b, num, pictures=put_pictures(folder / "other", num, green=200), prompt="p" * 300)
    assert run_diff(DiffOptions(a=str(folder / "a"), b=str(folder / "b"))) == 0
    return folder / "b/diff.html"


def found(browser: Browser) -> int:
    """How many records it says that it shows; as many are seen."""
    number = int(browser.find(".found").text.split()[0])
    assert len(browser.shown("[data-card]")) == number
    return number


def test_hostile_answers_are_inert_and_pictures_are_seen(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.script("return document.title") == "a against b"
    assert browser.messages == []
    assert browser.script("return document.querySelectorAll('script, .half svg, .half img, .half b').length") == 1
    browser.script("for (const image of document.images) image.loading = 'eager'")
    assert browser.script("return [...document.images].filter(i => i.src.startsWith('data:image/webp')).length") == 32
    texts = browser.script("return [...document.querySelectorAll('.half .answer')].map(e => e.textContent)")
    assert "<script>document.title='run'</script>?" in texts and "{{ 7 * 7 }}{% for x in y %}?" in texts


def test_records_are_searched_and_chosen(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert found(browser) == 16
    search = browser.find("input[type=search]")
    search.send_keys("zebra HORSE")
    assert found(browser) == 4
    search.send_keys(ESCAPE)
    choice = browser.find("[data-choice='only_a_answered']")
    assert choice.text == "Answered in a alone 1"
    choice.click()
    assert found(browser) == 1
    assert "decode/UnidentifiedImageError" in browser.shown("[data-card]")[0].text


def test_it_is_walked_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("/")
    assert browser.script("return document.activeElement.type") == "search"
    browser.press(TAB)
    browser.press(TAB)
    browser.press(ENTER)
    assert browser.script("return document.activeElement.dataset.choice") == "changed"
    assert found(browser) == 15


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_nothing_is_wider_than_the_window(width: int, browser: Browser, page: Path) -> None:
    browser.open(page, width=width)
    assert browser.script("return document.documentElement.scrollWidth") <= width
    tops = [half.rect["y"] for half in browser.shown("[data-card] .half")[:2]]
    assert (tops[0] == tops[1]) is (width > 640), "a and b are beside each other where there is room"


def test_marked_words_can_be_read_in_the_light_and_in_the_dark(browser: Browser, page: Path) -> None:
    contrast = """
const linear = (v) => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
const light = (text) => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number);
  return .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b); };
return [...document.querySelectorAll("del, ins, .gap")].map(e => { const seen = getComputedStyle(e);
  const [a, b] = [light(seen.color), light(seen.backgroundColor)];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); });
"""
    for dark in (False, True):
        browser.open(page, dark=dark)
        ratios = browser.script(contrast)
        assert len(ratios) > 30 and min(ratios) >= 4.5, min(ratios)


def test_without_its_script_everything_is_there(browser: Browser, page: Path) -> None:
    browser.open(page, javascript=False)
    assert len(browser.shown("[data-card]")) == 16
    assert not browser.shown("[data-toolbar]")
