"""The page in a real browser: it draws while one types, saves, and asks nobody else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers import close, sampled
from helpers.pages import drawing, pixels, student

from sana_cli.commands.play import PlayOptions, play
from sana_cli.sampling import pictures
from sana_cli.weights import checkpoint

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
DRAWN = "#picture[data-seed]"


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return student(tmp_path_factory.mktemp("student") / "transformer")


class Visit:
    """A page of a server of its own; remembers what it asks for and complains of."""

    def __init__(self, browser: "Browser", **options: object) -> None:
        self.server = play(PlayOptions(device="cpu", **options))  # type: ignore[arg-type]
        self.url = next(self.server).url
        self.page: Page = browser.new_page(viewport={"width": 1120, "height": 900}, accept_downloads=True)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(self.url)
        self.page.wait_for_selector(DRAWN)
        self.settle()

    @property
    def drawings(self) -> int:
        """How many pictures the page has asked for."""
        return sum(url.endswith("/draw") for url in self.asked)

    def settle(self) -> str:
        """Wait until nothing is drawn any more; returns the source of the picture."""
        self.page.wait_for_selector("#stage[aria-busy=false]")
        assert self.page.locator("#variations figure:not(.stale)").count() == 6
        return self.page.get_attribute("#picture", "src") or ""

    def changed(self, source: str) -> str:
        """Wait for another picture than `source`, and until all is drawn."""
        self.page.wait_for_selector(f'#picture:not([src="{source}"])')
        return self.settle()

    def saved(self) -> bytes:
        """The picture's file, as the button saves it."""
        with self.page.expect_download() as download:
            self.page.click("#save")
        return Path(download.value.path()).read_bytes()

    def end(self) -> None:
        """Close both; nothing has left the machine and nothing went wrong."""
        self.page.close()
        close(self.server)
        assert {url for url in self.asked if not url.startswith((self.url, "blob:", "data:"))} == set()
        assert self.complaints == []


@pytest.mark.parametrize("kind", ["one step", "eight steps"])
def test_the_picture_changes_while_one_types(
    kind: str, browser: "Browser", one_step: Path, tmp_path: Path
) -> None:
    few = kind == "one step"
    visit = Visit(
        browser, **{"checkpoint": one_step, "encoder": "tiny"} if few else {"checkpoint": Path("shipped")}
    )
    page, source = visit.page, visit.settle()
    if few:
        page.evaluate("steps.value = 1; steps.dispatchEvent(new Event('input'))")
        source = visit.changed(source)
    page.fill("#prompt", "fou")
    source = visit.changed(source)
    page.press("#prompt", "r")  # a key stroke
    source = visit.changed(source)
    for name, keys in (("guidance", "ArrowRight"), ("steps", "ArrowRight"), ("seed", "ArrowRight")):
        page.focus(f"#{name}")
        page.press(f"#{name}", keys)
        source = visit.changed(source)
    page.press("#prompt", "Enter")  # another seed
    source = visit.changed(source)
    assert page.input_value("#number") == "2"
    page.click("#variations figure:nth-child(3) button")
    visit.changed(source)
    assert page.input_value("#number") == "5"

    saved = visit.saved()
    (tmp_path / "saved.png").write_bytes(saved)
    record = pictures.read_record(tmp_path / "saved.png")
    (cell,) = record.cells
    assert (cell.prompt, cell.seed, record.settings["steps"]) == ("four", 5, 2 if few else 9)
    theirs = sampled(
        one_step if few else Path("shipped"),
        "four",
        seed=5,
        steps=record.settings["steps"],
        guidance_scale=record.settings["guidance_scale"],
        encoder="tiny" if few else None,
        separate=tmp_path / "theirs",
    )
    assert np.array_equal(pixels(saved), np.array(pictures.to_image(theirs.pixels[0])))
    visit.end()


def test_the_trajectory_is_there_where_there_are_steps(browser: "Browser") -> None:
    visit = Visit(browser, checkpoint=Path("shipped"))
    visit.page.wait_for_selector("#frames figure:nth-child(9):not(.stale)")
    for steps, frames in ((3, 4), (6, 7)):
        visit.page.evaluate(f"steps.value = {steps}; steps.dispatchEvent(new Event('input'))")
        visit.page.wait_for_selector(f"#frames figure:nth-child({frames}):last-child:not(.stale)")
    visit.page.evaluate("steps.value = 1; steps.dispatchEvent(new Event('input'))")
    visit.page.wait_for_selector("#way", state="hidden")
    visit.end()


def test_the_first_picture_is_that_of_sample(browser: "Browser", tmp_path: Path) -> None:
    """Drawn once, at the very guidance on record."""
    folder = shutil.copytree(checkpoint.shipped(), tmp_path / "mine")
    record = json.loads((folder / checkpoint.RECORD).read_text())
    record["sample"]["guidance_scale"] = 2.25
    (folder / checkpoint.RECORD).write_text(json.dumps(record))
    (folder / checkpoint.MANIFEST).unlink()
    checkpoint._seal(folder)
    visit = Visit(browser, checkpoint=folder)
    page = visit.page
    page.wait_for_selector("#frames figure:nth-child(9):not(.stale)")
    page.wait_for_timeout(200)
    assert visit.drawings == 1
    assert page.inner_text("#guidance-is") == "2.25"
    theirs = sampled(folder, page.input_value("#prompt"), separate=tmp_path / "theirs")
    assert np.array_equal(
        pixels(visit.saved()), np.array(pictures.to_image(torch.cat(list(theirs.pixels), dim=-1)))
    )
    page.evaluate("guidance.value = 3.14159; guidance.dispatchEvent(new Event('input'))")
    assert (page.input_value("#guidance"), page.inner_text("#guidance-is")) == ("3.14", "3.14")
    page.evaluate("guidance.value = 3; guidance.dispatchEvent(new Event('input'))")
    assert page.inner_text("#guidance-is") == "3.0"
    visit.end()


def test_what_stands_beside_a_picture_is_of_that_picture(browser: "Browser") -> None:
    """During a preview and after an error nothing can be saved."""
    visit = Visit(browser, checkpoint=Path("shipped"))
    page = visit.page
    page.evaluate("""() => take(
      {}, { ...settings(), prompt: "other" }, { kind: "step", done: 1, total: 2, bytes: 1 }, new Uint8Array(1)
    )""")
    assert (page.is_visible("#save"), page.inner_text("#took")) == (False, "")
    assert page.get_attribute("#picture", "alt") == "other"
    page.fill("#prompt", "4")
    page.wait_for_selector("#save:not([hidden])")
    assert page.inner_text("#took").startswith("drawn in")
    page.fill("#prompt", "1 2 3 4 5 6 7 8 9")
    page.wait_for_selector("#said.wrong")
    assert (page.is_visible("#save"), page.inner_text("#took")) == (False, "")
    page.evaluate("failed(new SyntaxError('odd'))")
    page.wait_for_selector("#said:text('SyntaxError: odd')")
    visit.end()


def test_pictures_that_are_gone_are_forgotten(browser: "Browser") -> None:
    visit = Visit(browser, checkpoint=Path("shipped"))
    page = visit.page
    page.wait_for_selector("#frames figure:nth-child(9):not(.stale)")
    page.evaluate("""() => {
      window.revoked = 0;
      const revoke = URL.revokeObjectURL;
      URL.revokeObjectURL = url => { window.revoked++; revoke.call(URL, url); };
    }""")
    page.fill("#prompt", "")
    page.wait_for_selector("#picture", state="hidden")
    assert page.evaluate("window.revoked") == 6 + 9
    visit.end()


def test_notes_are_announced_after_typing(browser: "Browser") -> None:
    visit = Visit(browser, checkpoint=Path("shipped"))
    said = visit.page.evaluate("""async () => {
      const said = [], box = $("prompt");
      new MutationObserver(() => said.push($("said").textContent)).observe($("said"), { childList: true });
      for (let end = 1; end <= 6; end++) {
        box.value = "banana".slice(0, end);
        box.dispatchEvent(new Event("input"));
        await new Promise(resolve => setTimeout(resolve, 100));
      }
      while (!said.length) await new Promise(resolve => setTimeout(resolve, 10));
      return said;
    }""")
    assert said == ["words that this checkpoint was never trained on: banana"]
    visit.end()


def test_other_seeds_are_drawn_while_they_are_open(browser: "Browser") -> None:
    """They begin folded up where the first picture took long."""
    visit = Visit(browser, checkpoint=Path("shipped"))
    page = visit.page
    page.evaluate("""() => {
      first = true;
      take({}, settings(), { kind: "picture", seed: 0, seconds: 2.1, notes: [] }, new Uint8Array(1));
    }""")
    assert page.locator("#seeds[open]").count() == 0
    with page.expect_request("**/draw") as asked:
        page.press("#prompt", "1")
    assert json.loads(asked.value.post_data or "")["variations"] == 0
    page.wait_for_selector("#stage[aria-busy=false]")
    with page.expect_request("**/draw") as asked:
        page.click("#seeds summary")
    assert json.loads(asked.value.post_data or "")["variations"] == 6
    page.wait_for_selector("#variations figure:nth-child(6):not(.stale)")
    visit.end()


def test_an_empty_prompt_and_too_many_words_are_said(browser: "Browser") -> None:
    visit = Visit(browser, checkpoint=Path("shipped"))
    page = visit.page
    page.fill("#prompt", "")
    page.wait_for_selector("#said:text('Type a prompt.')")
    assert not page.is_visible("#picture")
    page.fill("#prompt", "1 2 3 4 5 6 7 8 9")
    page.wait_for_selector("#said.wrong:text('9 words; each is a picture, and there is room for 8')")
    page.fill("#prompt", "banana")
    page.wait_for_selector("#said:text('never trained on: banana')")
    page.fill("#number", "123456789")
    page.wait_for_selector("#picture[data-seed='123456789']")
    visit.end()


def test_a_request_that_a_late_one_replaced_is_made_again(browser: "Browser") -> None:
    """Requests of a tab may arrive in another order than they were sent in."""
    visit = Visit(browser, checkpoint=Path("shipped"))
    page, port = visit.page, int(visit.url.rstrip("/").rpartition(":")[2])
    tab = page.evaluate("tab")
    for seed in ("11", "12", "13"):
        page.fill("#number", seed)
        drawing(port, tab=tab)
        page.wait_for_selector(f"#picture[data-seed='{seed}']")
        visit.settle()
    visit.end()


def test_a_server_that_has_gone_is_said(browser: "Browser") -> None:
    visit = Visit(browser, checkpoint=Path("shipped"))
    close(visit.server)
    visit.page.press("#prompt", "1")
    visit.page.wait_for_selector(
        "#said.wrong:text('The server does not answer. Is sana play still running?')"
    )
    visit.page.close()


def test_everything_has_a_name_and_fits_a_phone(browser: "Browser") -> None:
    visit = Visit(browser, checkpoint=Path("shipped:critters"))
    page = visit.page
    names = [
        ("textbox", "Prompt"), ("slider", "Seed"), ("slider", "Guidance"), ("slider", "Steps"),
        ("spinbutton", "Seed, any number"), ("button", "Another seed (Enter)"), ("button", "seed 3"),
    ]  # fmt: skip
    for role, name in names:
        assert page.get_by_role(role, name=name, exact=True).count() == 1, name  # type: ignore[arg-type]
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    visit.end()
