"""The pictures of the page on photos: `docs/page.png`, and its answers alone, `docs/photos.png`.

    python -m tools.pictures            # needs the photo base (`lcl-adapter base build photo`) and Chromium; a minute on two cores

It serves `lcl-adapter demo photo --adapter lcl=photo-lcl` on a free port, opens the page's own example, saves it, has its new
photos classified, and takes both pictures.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import Page, expect, sync_playwright

DOCS = Path(__file__).parent.parent / "docs"
WIDTH = 900  # pixels: what a page of text shows without scaling
STARTED = 120  # seconds in which the server must answer
ANSWERED = 120_000  # milliseconds for all new photos, by adapter and base


@contextmanager
def demo() -> Iterator[str]:
    """The address of a demo on the photo base. Raises RuntimeError where it ends or does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-m", "lcl_adapter", "demo", "photo", "--adapter", "lcl=photo-lcl", "--port", str(port), "--store", store]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + STARTED
            while not _ready(url):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no page at {url}; `{' '.join(command[1:])}` says why")
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait(30)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def classify_the_example(page: Page) -> None:
    """Open the example's labelled photos, save them as a set, and classify its new ones."""
    page.set_default_timeout(ANSWERED)
    expect.set_options(timeout=ANSWERED)
    page.get_by_role("tab").first.wait_for()
    page.get_by_role("button", name="Try the example", exact=True).click()
    expect(page.locator("#lcl-group-0 img")).not_to_have_count(0)
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_role("status").filter(has_text="Saved ")).to_be_visible()
    page.get_by_role("tab", name="Ask").click()
    photos = page.locator("#lcl-queries img")
    expect(photos).not_to_have_count(0)
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.locator("#lcl-answer section")).to_have_count(photos.count())


def main() -> None:
    chromium = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if chromium is None:
        sys.exit("no Chromium; `apt install chromium` installs it")
    with demo() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(locale="en-US", viewport={"width": WIDTH, "height": 900})
        page.goto(url)
        classify_the_example(page)
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # until nothing fades any more
        page.screenshot(path=DOCS / "page.png", full_page=True)
        page.locator("#lcl-answer").screenshot(path=DOCS / "photos.png")
        browser.close()
    print(DOCS / "page.png", DOCS / "photos.png")


if __name__ == "__main__":
    main()
