"""The report in a real browser: rendered, searched, by keyboard, on a phone, in the dark, without its script."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from made_run import jpeg, made_run, put_pictures
from test_report import HOSTILE

from pipeline.report.report import ReportOptions, write_report

pytestmark = pytest.mark.slow  # a browser takes seconds to start

TAB, ESCAPE, ENTER = "\ue004", "\ue00c", "\ue007"
BRIGHTNESS = """
const seen = getComputedStyle(document.querySelector(arguments[0]))[arguments[1]];
const [r, g, b] = seen.match(/[\\d.]+/g).map(Number);
return (299 * r + 587 * g + 114 * b) / 1000;
"""
# The worst contrast of the texts of each kind of element, by WCAG 2's formula.
CONTRASTS = """
const linear = (v) => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const colour = numbers(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const worst = {};
for (const e of document.querySelectorAll("body *")) {
  const hasText = [...e.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  if (!hasText || !e.checkVisibility() || e.closest("svg")) continue;
  const [a, b] = [light(numbers(getComputedStyle(e).color)), light(ground(e))];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  const name = e.tagName + "." + e.className;
  worst[name] = Math.min(worst[name] ?? 99, ratio);
}
return worst;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with answers of all kinds, and everything hostile that there is."""
    folder = tmp_path_factory.mktemp("page")
    pictures = put_pictures(folder / "in", 40)
    for number in range(5):
        (pictures / f"{number:05d}.png").write_bytes(jpeg(900, 300 + 200 * number))

    def record(index: int) -> Mapping[str, Any]:
        text = HOSTILE[index % len(HOSTILE)]
        sizes = {"image_width": [900], "image_height": [300 + 200 * index]} if index < 5 else {}
        if index < 16:
            return sizes | {"id": f"{index} {text}", "prompt": text, "response": text, "input.path": text}
        if index < 24:
            return {"response": "A zebra crosses the road. " * (index - 15) * 8}
        if index < 32:
            return {"response": "x" * 3000, "id": "y" * 300, "finish_reason": "length"}
        return {"status": "error", "error_stage": "decode", "error_type": "Torn", "error_message": text}

    made_run(folder / "out", pictures, record, shard_rows=10, settings={"prompt.user": "".join(HOSTILE)})
    return Path(str(write_report(folder / "out", ReportOptions(examples=20))))


def found(browser: Browser) -> int:
    """How many records it says that it shows; as many are seen."""
    number = int(browser.find(".found").text.split()[0].replace(",", ""))
    assert len(browser.shown("[data-card]")) == number
    return number


def focus(browser: Browser) -> str:
    return str(browser.script("const e = document.activeElement; return e.dataset.choice || e.className || e.tagName"))


def test_hostile_rows_are_inert(browser: Browser, page: Path) -> None:
    """Fault S-8: no title was changed, no element made, no address asked, and the policy had nothing to refuse."""
    browser.open(page)
    assert browser.script("return document.title") == "Report: out"
    assert browser.messages == []
    assert browser.script("return document.querySelectorAll('script').length") == 1
    assert (
        browser.script(
            "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
        )
        == 0
    )
    images = "return [...document.images].filter(i => i.src.startsWith('data:image/webp'))"
    assert browser.script(f"{images}.length") == browser.script("return document.images.length") > 30
    browser.script("for (const image of document.images) image.loading = 'eager'")
    assert browser.script(f"{images}.every(i => i.decode && true)")
    texts = browser.script("return [...document.querySelectorAll('.answer')].map(e => e.textContent)")
    assert "{{ 7 * 7 }}{% for x in y %}" in texts and "<script>document.title='run'</script>" in texts


def test_a_script_that_came_in_with_a_row_would_not_run(browser: Browser, page: Path, tmp_path: Path) -> None:
    """The second line of defence: markup that got through to the page is refused by its policy."""
    hostile = "<script>document.title='run'</script><img src='data:,' onerror=\"document.title='run'\"><img src='http://127.0.0.1:9/x'>"
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace('<ul class="cards">', f'<ul class="cards">{hostile}', 1))
    browser.open(broken)
    assert browser.script("return document.title") == "Report: out"
    refused = "\n".join(browser.messages)
    assert refused.count("Content Security Policy") >= 3 and "127.0.0.1" in refused


def test_words_typed_find_records(browser: Browser, page: Path) -> None:
    browser.open(page)
    whole = found(browser)
    search = browser.find("input[type=search]")
    search.send_keys("ZEBRA road")
    assert 0 < found(browser) < whole
    assert all("zebra" in card.text.lower() for card in browser.shown("[data-card]"))
    search.send_keys(" nowhere")
    assert found(browser) == 0 and not browser.shown("[data-group] h3")
    search.send_keys(ESCAPE)
    assert found(browser) == whole and search.get_attribute("value") == ""
    search.send_keys("onerror=")
    assert found(browser) > 0, "hostile answers are found as what they are"


def test_choices_clicked_show_one_kind(browser: Browser, page: Path) -> None:
    browser.open(page)
    whole = found(browser)
    choice = browser.find("[data-choice='error-0']")
    assert choice.text == "decode/Torn 8"
    choice.click()
    assert found(browser) == 8 and choice.get_attribute("aria-pressed") == "true"
    browser.find("input[type=search]").send_keys("onerror")
    assert found(browser) == 1, "both are obeyed"
    browser.find("[data-choice='']").click()
    browser.find("input[type=search]").send_keys(ESCAPE)
    assert found(browser) == whole


def test_it_is_walked_by_keyboard(browser: Browser, page: Path) -> None:
    """Skip link, tables that scroll, search, choices: in this order, each with a visible focus; / goes to search."""
    browser.open(page)
    browser.press(TAB)
    assert focus(browser) == "skip"
    assert browser.find(".skip").rect["x"] >= 0, "seen as soon as it has the focus"
    browser.press(ENTER)
    walked = []
    for _ in range(6):
        browser.press(TAB)
        walked.append(focus(browser))
    assert walked == ["scroll", "INPUT", "BUTTON", "random", "longest", "shortest"]
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.script(outline) == "solid"
    browser.press(ENTER)
    assert found(browser) < 60 and browser.find("[data-choice='shortest']").get_attribute("aria-pressed") == "true"
    browser.press(ESCAPE)
    assert browser.find("[data-choice='']").get_attribute("aria-pressed") == "true"
    browser.press("/")
    assert focus(browser) == "INPUT" and browser.find("input[type=search]").get_attribute("value") == ""


@pytest.mark.parametrize("width", [320, 380, 768, 1280, 2000])
def test_nothing_is_wider_than_the_window(width: int, browser: Browser, page: Path) -> None:
    browser.open(page, width=width)
    assert browser.script("return document.documentElement.scrollWidth") <= width
    for details in browser.script("return [...document.querySelectorAll('details')]"):
        browser.script("arguments[0].open = true", details)
    assert browser.script("return document.documentElement.scrollWidth") <= width
    cards = browser.script(
        "return [...document.querySelectorAll('.card')].map(e => Math.round(e.getBoundingClientRect().width))"
    )
    assert max(cards) - min(cards) <= 1, "equal cells"
    assert max(cards) <= width - 24


def test_it_is_dark_where_the_system_is(browser: Browser, page: Path) -> None:
    for dark in (False, True):
        browser.open(page, dark=dark)
        ground = browser.script(BRIGHTNESS, "body", "backgroundColor")
        ink = browser.script(BRIGHTNESS, "body", "color")
        assert (ground < 60 and ink > 200) if dark else (ground > 230 and ink < 60)


def test_texts_have_contrast(browser: Browser, page: Path) -> None:
    """WCAG AA: 4.5 to 1, for every colour that texts have, on the ground that they stand on."""
    for dark in (False, True):
        browser.open(page, dark=dark)
        ratios = browser.script(CONTRASTS)
        assert len(ratios) > 15
        assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_without_its_script_all_of_it_is_there(browser: Browser, page: Path) -> None:
    browser.open(page, javascript=False)
    try:
        assert not browser.shown("[data-toolbar]")
        cards = browser.driver.find_elements("css selector", "[data-card]")
        assert len(cards) > 60 and all(card.is_displayed() for card in cards)
    finally:
        browser.open(page)


def test_every_picture_has_words(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.script("return [...document.images].filter(i => !i.alt).length") == 0
    assert (
        browser.script("return [...document.querySelectorAll('svg')].filter(s => !s.getAttribute('aria-label')).length")
        == 0
    )
    levels = browser.script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= before + 1 for before, later in itertools.pairwise(levels)), "no level is skipped"
