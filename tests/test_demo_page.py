"""The page as a user meets it: started by its command, driven with a real browser.

Skipped where there is no Chromium (`apt install chromium`) or no playwright (requirements-dev.txt).
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs requirements-demo.txt")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright of requirements-dev.txt")

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: install the system's (chromium)")
SLOW = 60_000  # milliseconds to wait for something to appear


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page, started while its port is in use."""
    log = tmp_path_factory.mktemp("page") / "log"
    with socket.socket() as taken, open(log, "w") as out:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "flamingo.demo", "--port", str(port), "--device", "cpu"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        try:
            while not (found := re.search(r"open (http://127\.0\.0\.1:(\d+))", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            assert f"port {port} is in use: taking {found[2]}" in log.read_text() and int(found[2]) > port
            yield found[1]
        finally:
            process.terminate()
            process.wait()
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visitor:
    """A browser's window of its own, with what it asked the network for."""

    def __init__(self, browser, address: str, **window):
        self.context = browser.new_context(**window)
        self.page = self.context.new_page()
        self.page.set_default_timeout(SLOW)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.settled("#steps .step")

    def settled(self, selector: str) -> None:
        self.page.locator(selector).first.wait_for()

    def tab(self, name: str) -> None:
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if not tab.count():  # a narrow window has a menu for the rest
            self.page.get_by_label("More tabs").click()
            tab = self.page.locator(".overflow-dropdown button", has_text=name)
        tab.click()

    def button(self, name: str) -> None:
        begins = re.compile(rf"^\s*{re.escape(name)}")  # an accordion's has an arrow behind it
        self.page.get_by_role("button").filter(has_text=begins, visible=True).first.click()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text().strip()

    def wait(self, condition: str) -> None:
        """Until this JavaScript is true."""
        self.page.wait_for_function(condition)

    def choose(self, label: str, *values: str) -> None:
        """In a dropdown."""
        box = self.page.get_by_label(label, exact=True).filter(visible=True)
        for value in values:
            box.click()
            box.fill(value)
            self.page.get_by_role("option", name=re.compile(f"^{re.escape(value)}")).first.click()

    def compose(self, things: list[str], layout: str, ground: str) -> None:
        if not self.page.get_by_label("Ground").is_visible():
            self.button("Compose a scene")
        self.page.get_by_title("Clear").click()
        self.choose("Things", *things)
        self.page.keyboard.press("Escape")
        self.choose("Layout", layout)
        self.choose("Ground", ground)
        self.button("Draw it")


@pytest.fixture
def visitor(browser, address):
    made = Visitor(browser, address, viewport={"width": 1200, "height": 900})
    yield made
    left = [url for url in made.requests if not url.startswith((address, "data:", "blob:"))]
    made.context.close()
    assert left == [] and made.errors == []


def says(caption: str, where: str = "#caption .said") -> str:
    return f"document.querySelector({where!r})?.innerText.trim() === {caption!r}"


def test_a_scene_is_composed_captioned_looked_at_and_its_gates_closed(visitor):
    # A scene that the model never got wrong in 300: what is tested is the page.
    visitor.compose(["guitar", "tomato", "castle"], "three side by side", "green")
    caption = "a tomato between a guitar and a castle on a green ground"
    visitor.wait(says(caption))
    visitor.settled("#steps .step")
    visitor.tab("Where it looks")
    source = "document.querySelector('#heat img')?.src"
    visitor.wait(f"{source}?.length > 1000")
    words = "[...document.querySelectorAll('#words label')].map(label => label.innerText.trim()).join(' ')"
    visitor.wait(f"{words} === {caption!r}")
    before = visitor.page.evaluate(source)
    second = "guitar"  # the thing named first is looked at from the beginning
    visitor.page.locator("#words label").filter(has_text=second).click()
    visitor.wait(f"{source} !== {before!r} && document.querySelector('#heat img').alt === 'attention of {second}'")
    clicked = visitor.page.evaluate(source)
    visitor.choose("Cross-attention", "before layer 0")
    visitor.wait(f"{source} !== {clicked!r}")

    visitor.tab("Gates")
    visitor.wait(says(caption, "#gated-caption"))
    seeing, blind = (float(visitor.text(each)) for each in ("#seeing", "#blind"))
    assert seeing < 0.5 < blind
    visitor.page.locator("#close").click()
    visitor.wait("document.querySelector('#identity')?.innerText.includes('bit for bit')")
    assert visitor.text("#seeing") == visitor.text("#blind") and visitor.text("#gated-caption") != caption
    visitor.page.locator("#open").click()
    visitor.wait(says(caption, "#gated-caption"))


def test_the_style_follows_two_added_examples(visitor):
    visitor.tab("Few-shot")
    visitor.settled("#predictions .said")
    visitor.page.locator("#clear-examples").click()
    visitor.wait("document.querySelector('#examples').innerText.includes('no example yet')")
    for style, begins in (("telegram", None), ("story", "once upon a time")):
        if begins:
            visitor.page.locator("#clear-examples").click()
            visitor.wait("document.querySelector('#examples').innerText.includes('no example yet')")
            visitor.choose("Style", style)
        for count in (1, 2):
            visitor.page.locator("#add-example").click()
            visitor.wait(f"document.querySelectorAll('#examples .card').length === {count}")
        said = "document.querySelector('#predictions .said')?.innerText"
        visitor.wait(f"{said}?.startsWith('once upon a time')" if begins else f"{said}?.includes(' stop')")


def test_the_mask_follows_the_text_and_a_mistake_is_a_sentence(visitor):
    visitor.tab("Who sees what")
    visitor.settled("#mask td.on")
    visitor.page.locator("#text textarea").fill("<image> a <image> b <image>")
    visitor.page.locator("#read").click()
    visitor.page.get_by_text("text 0 has 3 <image> tags but 2 pictures").wait_for()
    visitor.page.locator("#text textarea").fill("<image> a cat<|endofchunk|><image> As a list:")
    visitor.page.locator("#read").click()
    visitor.wait("document.querySelectorAll('#mask tr').length === 11")
    said = visitor.text("#continued .said")
    visitor.button("Swap them")
    visitor.wait(f"!({says(said, '#continued .said')})")
    visitor.button("Take the last away")
    visitor.wait("document.querySelectorAll('#mask th img').length === 1")


def test_a_run_tells_its_story_and_a_broken_one_is_a_sentence(visitor, tmp_path):
    visitor.tab("A run's story")
    score = json.loads((ROOT / "assets" / "classroom" / "flamingo" / "evaluation.json").read_text())["exact_match"]
    visitor.wait(f"document.querySelector('#scores')?.innerText.includes('{score:.3f}')")
    visitor.page.locator("#run input").fill(str(tmp_path))
    visitor.page.keyboard.press("Enter")
    visitor.page.get_by_text("is no run folder").wait_for()
    visitor.tab("Caption")
    visitor.button("Surprise me")
    visitor.settled("#steps .step")


def test_a_file_that_is_no_picture_is_a_sentence_and_a_picture_is_captioned(visitor, tmp_path):
    (tmp_path / "none.png").write_text("no picture")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "huge.png")
    Image.effect_noise((200, 150), 60).save(tmp_path / "noise.png")
    visitor.button("Your own picture")
    upload = visitor.page.locator("input[type=file]").first
    for name, reason in (("none.png", "cannot be read as a picture"), ("huge.png", "pixels")):
        upload.set_input_files(tmp_path / name)
        visitor.page.get_by_text(re.compile(f"the picture .*{reason}")).first.wait_for()
        visitor.page.get_by_label("Remove Image").or_(visitor.page.get_by_label("Clear")).first.click()
    visitor.page.locator("input[type=file]").first.set_input_files(tmp_path / "noise.png")
    visitor.wait("document.querySelector('#picture img')?.naturalWidth > document.querySelector('#picture img')"
                 "?.naturalHeight")  # fmt: skip
    visitor.settled("#steps .step")


def test_it_fits_a_phone(browser, address):
    phone = Visitor(browser, address, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    for name in ("Caption", "Where it looks", "Gates"):
        phone.tab(name)
        phone.wait("document.documentElement.scrollWidth <= window.innerWidth")
    phone.wait("document.querySelector('#gated-caption')?.innerText.length > 5")
    phone.page.locator("#close").click()
    phone.wait("document.querySelector('#identity')?.innerText.includes('bit for bit')")
    phone.context.close()


def test_two_visitors_who_click_at_once_keep_their_own_pictures(browser, address):
    """Ten clicks in each of two windows, all before the first answer can be there."""
    visitors = {ground: Visitor(browser, address) for ground in ("pink", "gray")}
    for ground, visitor in visitors.items():
        visitor.compose(["guitar"], "one thing", ground)
        visitor.wait(says(f"a guitar on a {ground} ground"))
    for _ in range(10):
        for visitor in visitors.values():
            visitor.button("Caption")
    for ground, visitor in visitors.items():
        time.sleep(1)
        visitor.wait(says(f"a guitar on a {ground} ground"))
        visitor.tab("Gates")
        visitor.wait(says(f"a guitar on a {ground} ground", "#gated-caption"))
    visitors["pink"].page.locator("#close").click()
    visitors["pink"].wait("document.querySelector('#identity')?.innerText.includes('bit for bit')")
    visitors["gray"].tab("Caption")
    visitors["gray"].button("Caption")
    visitors["gray"].wait(says("a guitar on a gray ground"))
    for visitor in visitors.values():
        visitor.context.close()


def test_what_is_served_forbids_the_browser_to_load_anything_from_elsewhere(address):
    from urllib.request import urlopen

    with urlopen(address) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert not re.search(rb"(?:src|href)=\"https?://", answer.read())
