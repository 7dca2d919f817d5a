"""The page of `clip-cid review` in a headless Chromium: what a person does there, and that nothing leaves the machine."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reviewed_run import HOSTILE, reviewed_run, squared

from clip_cid.data.balance.decisions import read_decisions

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
playwright.expect.set_options(timeout=60_000)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]
_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return reviewed_run(tmp_path_factory.mktemp("reviewed"))


@pytest.fixture(scope="module")
def served(made) -> Iterator[str]:
    """The address of the page; Ctrl-C ends the program."""
    command = [sys.executable, "-m", "clip_cid", "review", str(made)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as program:
        assert program.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{40,}/", program.stdout.readline())
        assert address is not None
        yield address.group()
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        yield chromium
        chromium.close()


class Tab:
    """The page in a tab that notes what it asks for and what goes wrong."""

    def __init__(self, browser, address: str, made: Path, *, width: int = 1200, scheme: str = "light") -> None:
        self.made, self.asked, self.wrong = made, list[str](), list[str]()
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(60_000)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.goto(address)
        self.settled()

    def _note(self, line: Any) -> None:
        refused = re.search(r"status of (400|409)", line.text)  # a refusal that the page tells in words
        if line.type == "error" and refused is None:
            self.wrong.append(line.text)

    def settled(self) -> None:
        self.page.wait_for_selector("body[data-ready]")
        self.page.wait_for_load_state("networkidle")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def waits_for(self, selector: str, text: str) -> None:
        playwright.expect(self.page.locator(selector)).to_have_text(re.compile(text))

    def keys(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    @property
    def kinds(self) -> list[str]:
        return [line.kind for line in read_decisions(self.made / "decisions.jsonl").lines]


@pytest.fixture
def tab(browser, served, made) -> Iterator[Tab]:
    (made / "decisions.jsonl").write_text("")
    tab = Tab(browser, served, made)
    yield tab
    tab.page.close()
    assert not tab.wrong


def open_set(tab: Tab, place: int = 0) -> None:
    tab.page.locator(".card").nth(place).click()
    tab.page.wait_for_selector("#set[open] .member")


def test_the_slider_moves_every_number_and_the_sets(tab):
    assert tab.text("#share") == "60.00 %"
    assert tab.text("#set-count") == "3"
    assert tab.page.locator(".card").count() == 3
    slider = tab.page.locator("#slider")
    slider.focus()
    tab.keys("Home")
    tab.waits_for("#share", r"^10\.00 %$")  # at 0 the two equal images are one set
    playwright.expect(tab.page.locator(".card")).to_have_count(1)
    tab.keys("End")
    tab.waits_for("#share", r"^70\.00 %$")
    playwright.expect(tab.page.locator(".card")).to_have_count(3)
    assert tab.page.locator("#after").is_disabled()
    tab.page.locator("#as-balanced").click()
    tab.waits_for("#share", r"^60\.00 %$")


def test_the_threshold_steps_from_pair_to_pair_and_takes_an_exact_number(tab):
    tab.page.locator("h1").click()
    tab.keys("[")
    tab.waits_for("#share", r"^50\.00 %$")
    tab.keys("]")
    tab.waits_for("#share", r"^60\.00 %$")
    tab.page.locator("#value").fill(str(squared(4.5) / 2))
    tab.page.locator("#scale").select_option("cosine")
    tab.page.locator("#value").fill(str(squared(4.5) / 2))
    tab.page.locator("#value").press("Enter")
    tab.waits_for("#share", r"^50\.00 %$")
    playwright.expect(tab.page.locator("#joined-next li").first.locator("small")).to_have_text(f"{squared(5) / 2:.4g}")
    tab.page.locator("#value").fill("3")
    tab.page.locator("#value").press("Enter")
    tab.waits_for("#message", "a cosine distance is above 0 and below 2")


def test_a_set_is_decided_about_with_the_keyboard_alone(tab):
    tab.page.locator(".card").first.focus()
    tab.keys("Enter")
    tab.page.wait_for_selector("#set[open] .member")
    assert tab.text("#set-title") == "A set of 5 images"
    assert tab.page.locator(".member .keep").count() == 1
    assert tab.page.locator("#tree path").count() == 4 + 1
    assert tab.page.locator("#merges li").count() == 4

    # The farthest image is no duplicate of the kept one.
    tab.keys("d")
    tab.waits_for("#message", "Saved: not duplicates")
    assert tab.kinds == ["not_duplicates"]
    tab.waits_for("#set-title", "A set of 2 images")
    tab.keys("k")
    tab.waits_for("#message", "Saved: keep")
    tab.waits_for("#saved", "^2 decisions")
    tab.keys("a")
    tab.waits_for("#saved", "^3 decisions")
    tab.keys("x")
    tab.waits_for("#message", "it was decided before that .* is to be kept")
    tab.keys("u", "u", "u")
    tab.waits_for("#saved", "^0 decisions")
    tab.waits_for("#set-title", "A set of 5 images")
    tab.keys("x")
    tab.waits_for("#saved", "^1 decision ")
    assert tab.kinds == ["remove_all"]
    tab.keys("J")
    tab.waits_for("#set-title", "A set of 2 images")
    tab.keys("Escape")
    assert not tab.page.locator("#set").is_visible()
    playwright.expect(tab.page.locator(".card.decided")).to_have_count(1)


def test_marked_images_are_set_apart_and_a_pair_of_a_join_is_compared(tab):
    open_set(tab)
    tab.page.locator(".member").nth(1).click()
    tab.keys("m", "ArrowRight", "m")
    assert tab.page.locator(".member.marked").count() == 2
    tab.page.locator("#merges button").first.click()
    tab.waits_for("#between", "linked directly")
    assert tab.page.locator("#compare img").count() == 2
    tab.page.locator(".member").nth(1).click()
    tab.page.locator("[data-act=apart]").click()
    tab.waits_for("#saved", "^1 decision ")


def test_a_decision_of_another_tab_is_told_and_undone_with_a_click(browser, served, tab):
    other = Tab(browser, served, tab.made)
    open_set(tab)
    open_set(other)
    other.keys("a")
    other.waits_for("#saved", "^1 decision ")
    other.page.close()

    tab.keys("x")
    tab.waits_for("#message", "it was decided before that .* is to be kept")
    tab.waits_for("#saved", "^1 decision ")
    tab.waits_for("#set-decisions", "^keep all: ")
    tab.page.locator("#message button").click()
    tab.waits_for("#saved", "^0 decisions")
    assert tab.kinds == []
    assert not other.wrong


def test_a_reload_shows_the_same_set_threshold_and_decisions(tab):
    tab.page.locator("h1").click()
    tab.keys("[")
    tab.waits_for("#share", r"^50\.00 %$")
    tab.page.locator("#order").select_option("width")
    tab.settled()
    open_set(tab)
    tab.keys("k")
    tab.waits_for("#saved", "^1 decision ")
    title = tab.text("#set-title")
    tab.page.reload()
    tab.settled()
    tab.page.wait_for_selector("#set[open] .member")
    assert (tab.text("#set-title"), tab.text("#share")) == (title, "50.00 %")
    assert tab.page.locator("#order").input_value() == "width"
    tab.waits_for("#set-decisions", "keep: ")


def test_a_reload_in_the_middle_of_a_save_leaves_a_whole_line_or_none(tab):
    open_set(tab)
    for key in ("k", "ArrowRight", "k", "ArrowRight", "k"):
        tab.keys(key)
    tab.page.reload()
    tab.settled()
    tab.page.wait_for_selector("#set[open] .member")
    tab.waits_for("#saved", f"^{len(tab.kinds)} decision")
    tab.keys("u")
    tab.waits_for("#message", "Undone|nothing to undo")


def test_search_and_filters_narrow_the_list(tab):
    tab.page.locator("h1").click()
    tab.keys("/")
    tab.page.keyboard.type("fox")
    playwright.expect(tab.page.locator(".card")).to_have_count(2)
    tab.page.locator("#least").fill("3")
    playwright.expect(tab.page.locator(".card")).to_have_count(0)
    tab.waits_for("#total", "^0 sets of 3")


def test_what_the_data_say_is_text(tab):
    tab.page.locator("#text").fill("onerror")
    playwright.expect(tab.page.locator(".card")).to_have_count(1)
    open_set(tab)
    assert HOSTILE in tab.page.locator("#members").inner_text()
    assert tab.page.locator("img[onerror]").count() == 0


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_leaves_the_machine_and_nothing_is_wider_than_the_window(browser, served, made, width, scheme):
    (made / "decisions.jsonl").write_text("")
    tab = Tab(browser, served, made, width=width, scheme=scheme)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    open_set(tab)
    tab.page.wait_for_load_state("networkidle")
    assert tab.page.evaluate("const set = document.querySelector('#set'); set.scrollWidth - set.clientWidth") <= 0
    dark = tab.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (scheme == "light")
    assert all(address.startswith(served) for address in tab.asked)
    assert not tab.wrong
    tab.page.close()
