"""The built site in a browser: nothing is missing, nothing is from elsewhere, and a newcomer finds the way.

``make test-docs`` builds it first. The browser is Debian's Chromium, or the one that ``CHROMIUM`` names.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
PHONE, DESKTOP = (390, 844), (1280, 900)
PAGES = ("index.html", "gallery.html", "api/attention.html", "benchmarks.html", "verification.html", "gpu_kernels.html")


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site and prints nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """As above."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the site is served."""
    assert (SITE / "index.html").is_file(), "make docs"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, without a window."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert program, "apt-get install chromium"
    with sync_playwright() as playwright:
        # Root has no sandbox, in a container above all; the pages are ours.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A page that fails the test where it has an error, or asks for what is missing or elsewhere."""
    context = browser.new_context(base_url=address)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: None if is_left(request) else wrong.append(f"failed: {request.url}"))
    page.on("response", lambda response: wrong.append(f"missing: {response.url}") if response.status >= 400 else None)
    page.on("request", lambda request: None if is_ours(request.url, address) else wrong.append(request.url))
    yield page
    context.close()
    assert wrong == []


def is_ours(url: str, address: str) -> bool:
    """Whether a page needs no other server for it."""
    return url.startswith((f"{address}/", "data:"))


def is_left(request: Request) -> bool:
    """Whether the test has left the page before an answer came."""
    return request.failure == "net::ERR_ABORTED"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("path", PAGES)
def test_page_is_whole_and_no_wider_than_the_screen(page: Page, path: str, size: tuple[int, int], scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.goto(f"/{path}", wait_until="load")
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    pictures = "[...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src)"
    assert page.evaluate(pictures) == []
    # Text can be told from what is behind it: a page that has no style for one of both schemes has no contrast there.
    lightness = (
        "of => getComputedStyle(document.body)[of].match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 765"
    )
    contrast = page.evaluate(f"({lightness})('color')") - page.evaluate(f"({lightness})('backgroundColor')")
    assert contrast > 0.5 if scheme == "dark" else contrast < -0.5


@pytest.mark.parametrize("found", ["Gallery", "Port from Transformers", "Masks of the literature"])
def test_search_finds_the_sliding_window(page: Page, found: str) -> None:
    page.goto("/search.html?q=sliding+window")
    results = page.locator("#search-results ul.search li > a")
    expect(results.filter(has_text=found).first).to_be_visible()


def test_search_finds_a_name_of_the_reference(page: Page) -> None:
    page.goto("/search.html?q=SlidingWindow")
    results = page.locator("#search-results ul.search li > a")
    expect(results.filter(has_text="jaxmask.SlidingWindow").first).to_be_visible()


def test_gallery_shows_the_kind_that_is_chosen(page: Page) -> None:
    page.goto("/gallery.html")
    cards = page.locator(".gallery .card:visible")
    everything = cards.count()
    assert page.locator(".gallery .card svg").count() >= everything
    page.get_by_text("images and video", exact=True).click()
    chosen = cards.count()
    assert 5 < chosen < everything
    assert page.locator(".gallery .card.vision:visible").count() == chosen


@pytest.mark.parametrize(
    ("link", "path", "shows"),
    [
        ("create_causal_mask", "/howto/port.html", "create_causal_mask"),
        ("train on packed documents", "/howto/packed_training.html", "packed"),
        ("divide a sequence over devices", "/howto/sharding.html", "sharding"),
        ("what runs on a GPU", "/implementations.html", "pallas"),
        ("what the compiler makes of it", "/gpu_kernels.html", "H100"),
    ],
)
def test_a_newcomer_gets_there_by_one_click(page: Page, link: str, path: str, shows: str) -> None:
    page.goto("/index.html")
    page.locator("article").get_by_role("link", name=link).first.click()
    page.wait_for_url(f"**{path}")
    assert shows in page.locator("article").inner_text()


def test_a_signature_leads_to_its_source(page: Page) -> None:
    page.goto("/api/attention.html")
    page.locator("dt#jaxmask\\.explain .viewcode-link").click()
    page.wait_for_url("**/_modules/jaxmask/explanation.html*")
    assert "def explain(" in page.locator("article").inner_text()


def test_signatures_are_as_they_are_written(page: Page) -> None:
    page.goto("/api/masks.html")
    signature = page.locator("dt#jaxmask\\.Padding").inner_text().replace("\n", "")
    assert "valid: Bool[Array | ndarray, 'batch kv'] | Integer[Array | ndarray, 'batch kv']" in signature
    for path in ("masks", "attention", "flax", "zoo", "transformers"):
        page.goto(f"/api/{path}.html")
        text = " ".join(page.locator("dt.sig").all_inner_texts())
        assert "jaxtyping" not in text
        assert "object at 0x" not in text
