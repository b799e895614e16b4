"""README's three pictures of the page, made by a browser: python -m tests.others.page_pictures [FOLDER, else assets]

Needs a Chromium and playwright, as tests/test_demo_page.py does.
"""

import io
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.test_demo_page import CHROMIUM, ROOT, Visitor, says

CAPTION = "a tomato between a guitar and a castle on a green ground"


def show_looks(visitor: Visitor) -> None:
    source = "document.querySelector('#heat img')"
    visitor.compose(["guitar", "tomato", "castle"], "three side by side", "green")
    visitor.wait(says(CAPTION))
    visitor.tab("Where it looks")
    visitor.wait(f"{source}?.src.length > 1000")
    visitor.page.locator("#words label").filter(has_text="guitar").click()
    visitor.wait(f"{source}?.alt === 'attention of guitar'")


def show_gates(visitor: Visitor) -> None:
    visitor.compose(["guitar", "tomato", "castle"], "three side by side", "green")
    visitor.wait(says(CAPTION))
    visitor.tab("Gates")
    visitor.wait(says(CAPTION, "#gated-caption"))
    visitor.page.locator("#close").click()
    visitor.wait("document.querySelector('#identity')?.innerText.includes('bit for bit')")


def show_few_shot(visitor: Visitor) -> None:
    visitor.tab("Few-shot")
    visitor.settled("#predictions .said")
    visitor.choose("Ready-made examples", "two invented names")
    visitor.wait("document.querySelectorAll('#examples .card').length === 2")
    visitor.settled("#predictions .said")


# How to come there, and the width of the window: two columns stand side by side from 1,000 pixels on.
PICTURES = {"looks": (show_looks, 740), "gates": (show_gates, 1000), "few_shot": (show_few_shot, 1000)}


def main(out: Path) -> None:
    command = [sys.executable, "-m", "flamingo.demo", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address = next(found[1] for line in process.stdout if (found := re.search(r"open (http://127\S+)", line)))
        with sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for name, (show, width) in PICTURES.items():
                visitor = Visitor(browser, address, viewport={"width": width, "height": width})
                show(visitor)
                visitor.page.wait_for_timeout(1500)  # until what glides into its place is there
                tabs = visitor.page.get_by_role("tablist").first.bounding_box()
                box = {"x": 0, "y": max(0, tabs["y"] - 5), "width": width, "height": width}
                taken = visitor.page.screenshot(clip=box, full_page=True)
                Image.open(io.BytesIO(taken)).convert("RGB").resize((740, 740), Image.LANCZOS).quantize(128).save(
                    out / f"page_{name}.png", optimize=True
                )
                visitor.context.close()
            browser.close()
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "assets")
