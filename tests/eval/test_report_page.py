"""The report in a headless Chromium, from disk: filters, images, keyboard, phone, paper; hostile texts stay texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report_runs import CATEGORIES, answered, circular_question, thumbnail, write_run, yes_no_question

from eval.__main__ import main
from eval.records import Record
from lift.common.files import read_json, write_json, write_jsonl

ATTACK = "</script><script>window.owned=1</script><img src=x onerror=window.owned=1><!-- <b>\u2028 &amp;"
GROUPS = 40


def _answers(records: list[Record], place: int) -> list[Record]:
    """Every third group is wrong in its second pass."""
    return [answered(record, record.rotation != 1 or int(record.group) % 3 != place) for record in records]


def _training(folder: Path, loss: float) -> Path:
    write_jsonl(folder / "metrics.jsonl", [{"step": step, "loss": loss / step} for step in range(1, 9)])
    write_json(folder / "finished.json", {"steps": 8, "samples": 64, "dropped": {}, "seconds": 4.5})
    (folder / "config.yaml").write_text(f"objective: lift  # {ATTACK}\n")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A page over 40 groups of MMBench and 30 rows of POPE, whose every text is an attack; A and B miss every third in turn."""
    folder = tmp_path_factory.mktemp("page")
    pictures = dict(thumbnail(seed) for seed in range(5))
    images = list(pictures)
    records: list[Record] = []
    for number in range(GROUPS):
        names = CATEGORIES[number % 8]
        names = (names[0], names[1], names[2] + (ATTACK if number % 8 == 7 else ""))
        records += circular_question(number, names, [images[number % 5]], f"Which word fits {number}? {ATTACK}")
    rows = [yes_no_question(number, [images[number % 5]], f"Is it there, {number}? {ATTACK}") for number in range(30)]
    a, b = (
        write_run(
            folder / side,
            [
                *_answers(records, place),
                *(answered(row, int(row.key) % 4 != place) for row in rows),
            ],
            pictures,
        )
        for place, side in enumerate("ab")
    )
    training = [f"--training_{side}=[{_training(folder / f'pretrain_{side}', 5.0)}]" for side in "ab"]
    out = folder / "report.html"
    arguments = ["report", str(a), str(b), "--out", str(out), "--resamples", "200", *training]
    assert main([*arguments, "--name_a", f"LIFT {ATTACK[:40]}", "--print_cards", "3"]) == 0
    return SimpleNamespace(path=out, numbers=read_json(out.with_suffix(".json")))


def _open(browser: Any, path: Path, **options: Any) -> SimpleNamespace:
    """The page, with `faults` that collects console messages, errors and whatever is asked of any machine."""
    faults: list[str] = []
    tab = browser.new_page(**options)
    tab.set_default_timeout(30_000)
    tab.on("console", lambda message: faults.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: faults.append(f"error: {error}"))

    def route(request: Any) -> None:
        faults.append(f"request: {request.request.url}")
        request.abort()

    tab.route(re.compile("^(?!file:|data:)"), route)
    tab.goto(path.as_uri())
    tab.wait_for_selector(".card")
    return SimpleNamespace(tab=tab, faults=faults)


@pytest.fixture(scope="module")
def desk(browser: Any, report: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """One tab for all tests; each leaves the filters as they were."""
    opened = _open(browser, report.path, viewport={"width": 1280, "height": 900})
    yield opened
    opened.tab.close()


@pytest.fixture
def tab(desk: SimpleNamespace) -> Iterator[Any]:
    yield desk.tab
    assert desk.faults == [] and desk.tab.evaluate("window.owned") is None


def _until(tab: Any, expression: str, wanted: Any) -> None:
    """Waits for a value. Playwright's own wait evaluates strings in the page, which the page's policy forbids."""
    for _ in range(300):
        if (found := tab.evaluate(expression)) == wanted:
            return
        tab.wait_for_timeout(100)
    raise AssertionError(f"{expression}: expected {wanted}, found {found}")


def _count(tab: Any) -> int:
    text = tab.locator("#count").text_content()
    return int(re.findall(r"of (\d+)", text)[0]) if "of" in text else 0


def test_plots_are_drawn_and_follow_the_choice(tab: Any, report: SimpleNamespace) -> None:
    levels = {row["level"] for row in report.numbers["comparison"]["rows"] if row["task"] == "mmbench"}
    assert tab.locator("#view-levels input").count() == len(levels - {"overall"})
    assert tab.locator("input[name=level]:checked").get_attribute("value") == "l2"
    names = {row["name"] for row in report.numbers["comparison"]["rows"] if row["level"] == "l2"}
    assert tab.locator("#forest .ytick").count() == tab.locator("#bars .ytick").count() == len(names) + 1
    drawn = tab.evaluate("document.getElementById('forest').data.flatMap(t => t.x).filter(x => x !== null)")
    wanted = [r for r in report.numbers["comparison"]["rows"] if r["primary"] and r["task"] == "mmbench"]
    assert sorted(drawn) == pytest.approx(sorted(100 * r["difference"] for r in wanted if r["level"] in ("overall", "l2")))
    tab.select_option("#view-task", "pope")
    assert tab.locator("#forest .ytick").count() == 4 and tab.locator("#view-levels input").count() == 1
    tab.select_option("#view-task", "")
    assert tab.locator("#forest .ytick").count() == 2
    assert tab.locator("#loss-0 .scatterlayer .js-line").count() == 2
    tab.select_option("#view-task", "mmbench")


def test_filters(tab: Any, report: SimpleNamespace) -> None:
    counts = report.numbers["flips"]
    assert _count(tab) == counts["total"] == counts["embedded"] > 24
    assert tab.locator(".card").count() == 24
    tab.click("#more")
    assert tab.locator(".card").count() == min(48, counts["total"])
    tab.check("input[name=direction][value=b]")
    assert _count(tab) == counts["total_b"] and tab.locator(".card.a").count() == 0
    tab.select_option("#filter-task", "pope")
    in_pope = _count(tab)
    assert 0 < in_pope < counts["total_b"]
    options = tab.locator("#filter-category option").all_text_contents()
    assert re.findall(r"\d+", options[0]) == [str(in_pope)] and len(options) == 1 + 3
    tab.select_option("#filter-category", index=1)
    assert _count(tab) == int(re.findall(r"\((\d+)\)", options[1])[0]) == tab.locator(".card").count()
    tab.select_option("#filter-task", "")
    tab.select_option("#filter-category", "")
    tab.check("input[name=direction][value='']")
    tab.fill("#filter-text", "fits 21?")
    _until(tab, "document.querySelectorAll('.card').length", 1)
    assert "Which word fits 21?" in tab.locator(".card").text_content()
    tab.fill("#filter-text", "no such words")
    tab.get_by_text("No question matches.").wait_for()
    tab.fill("#filter-text", "")
    _until(tab, "document.querySelectorAll('.card').length", 24)


def test_images_show_and_attacks_are_text(tab: Any) -> None:
    first = tab.locator(".card").first
    first.scroll_into_view_if_needed()
    _until(tab, "document.querySelector('.card img').naturalWidth", 48)
    assert first.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [48, 36]
    assert "<script>window.owned=1</script>" in first.locator(".question").text_content()
    assert tab.locator("main script, main iframe, main a[href^=javascript], main img:not(.card img)").count() == 0
    assert "<script>" in tab.locator("#recipe pre").first.text_content()
    assert "</script>" in tab.locator("h1").text_content() and tab.locator("#forest script, #bars script").count() == 0
    scripts = tab.locator("script").count()
    assert scripts == 3, "the data, plotly and the page's own"


def test_keyboard_walks_through_the_questions(tab: Any, report: SimpleNamespace) -> None:
    total = report.numbers["flips"]["total"]
    position = tab.locator("#position")
    tab.locator(".card button").nth(1).focus()
    tab.keyboard.press("Enter")
    assert position.text_content() == f"2 of {total}" and tab.locator("#viewer").get_attribute("open") is not None
    tab.keyboard.press("j")
    tab.keyboard.press("ArrowRight")
    assert position.text_content() == f"4 of {total}"
    tab.keyboard.press("k")
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    assert position.text_content() == f"1 of {total}" and tab.locator("#previous").is_disabled()
    for _ in range(26):
        tab.keyboard.press("j")
    _until(tab, "document.querySelector('#viewed img').naturalWidth", 48)
    tab.keyboard.press("Escape")
    assert tab.locator("#viewer").get_attribute("open") is None
    focused = tab.evaluate("[...document.querySelectorAll('.card button')].indexOf(document.activeElement)")
    assert focused == 26, "closing leads back to the card that was open"
    tab.fill("#filter-text", "j")  # a letter in the search box is text
    assert tab.locator("#viewer").get_attribute("open") is None
    tab.fill("#filter-text", "")
    _until(tab, "document.querySelectorAll('.card').length", 24)


def test_every_pass_is_shown_with_both_answers(tab: Any) -> None:
    tab.fill("#filter-text", "fits 21?")
    _until(tab, "document.querySelectorAll('.card').length", 1)
    tab.locator(".card button").click()
    rows = tab.locator("#viewed .answers tbody tr")
    assert rows.count() == 4
    # A misses group 21 in its second pass: options rotated by one, so that "green" is A and "red" is D
    assert rows.nth(1).locator("td").all_text_contents() == ["A. green", "✗ B. blue", "✓ A. green"]
    tab.click("#close")
    tab.fill("#filter-text", "")
    _until(tab, "document.querySelectorAll('.card').length", 24)


def test_names_and_captions_for_those_who_listen(tab: Any) -> None:
    assert tab.locator("table:not(.answers)").count() == tab.locator("table:not(.answers) > caption").count() > 3
    assert tab.locator("img:not([alt])").count() == 0
    unnamed = """() => [...document.querySelectorAll('select, input, button')].filter(
        e => !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim()).length"""
    assert tab.evaluate(unnamed) == 0
    levels = tab.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_phone_paper_and_dark(browser: Any, report: SimpleNamespace, tmp_path: Path) -> None:
    opened = _open(browser, report.path, viewport={"width": 390, "height": 844}, color_scheme="dark")
    tab = opened.tab
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.locator(".card button").first.click()
    box = tab.locator("#viewer").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    tab.keyboard.press("Escape")
    colour = "document.getElementById('bars').data.find(t => t.meta.side === 'a').marker.color"
    assert tab.evaluate(colour) == "#56b4e9"
    tab.emulate_media(color_scheme="light")
    _until(tab, colour, "#0072b2")
    tab.emulate_media(media="print")
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert (
        tab.locator(".card").count() == 3 and not tab.locator("#filters").is_visible() and not tab.locator("#more").is_visible()
    )
    tab.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert tab.locator(".card").count() == 24
    assert opened.faults == []
    tab.close()


def test_thousands_of_questions_stay_usable(browser: Any, tmp_path: Path) -> None:
    """3,000 flips over 1,000 pictures, each about as large as a run's thumbnails are."""
    pictures = dict(thumbnail(seed, side=256, quality=95) for seed in range(1000))
    images = list(pictures)
    rows = [yes_no_question(number, [images[number % 1000]], f"Is it there, {number}?") for number in range(3000)]
    a = write_run(tmp_path / "a", [answered(row, int(row.key) % 2 == 0) for row in rows], pictures)
    b = write_run(tmp_path / "b", [answered(row, int(row.key) % 2 == 1) for row in rows], pictures)
    out = tmp_path / "report.html"
    assert main(["report", str(a), str(b), "--out", str(out), "--resamples", "100"]) == 0
    assert out.stat().st_size <= 30e6
    assert read_json(out.with_suffix(".json"))["flips"]["embedded"] == 3000
    opened = _open(browser, out, viewport={"width": 1280, "height": 900})
    opened.tab.locator(".card").first.scroll_into_view_if_needed()
    _until(opened.tab, "document.querySelector('.card img').naturalWidth", 256)
    assert opened.tab.locator(".card").count() == 24, "cards are made when they are asked for"
    opened.tab.fill("#filter-text", "there, 2999?")
    _until(opened.tab, "document.querySelectorAll('.card').length", 1)
    assert opened.faults == []
    opened.tab.close()
