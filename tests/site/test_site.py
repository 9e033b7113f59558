"""The built site: links and anchors, nothing from elsewhere, every public name; and in a browser.

Run by `make docs`, after it has built the site in out/site; nothing here builds it.
"""

from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import importlib
import os
from pathlib import Path
import re
import shutil
import threading
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(__file__).parents[2] / "out" / "site"
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
WIDTHS = (400, 1400)
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
PUBLIC = "jax_bn", "jax_bn.linen", "jax_bn.nnx", "jax_bn.torch"
NAMED = {  # public in modules that have no list of names
    "jax_bn.reference": ["batch_norm"],
    "jax_bn.recalibrate": ["recalibrate_linen", "recalibrate_nnx"],
    "jax_bn.fold": ["fold_linen", "fold_nnx"],
}


def pages() -> list[Path]:
    return sorted(p for p in SITE.rglob("*.html") if "_static" not in p.relative_to(SITE).parts)


def pytest_generate_tests(metafunc):
    if "page" in metafunc.fixturenames:
        found = pages()
        if not found:
            pytest.fail("there is no site in out/site: build it by `make docs`", pytrace=False)
        metafunc.parametrize("page", found, ids=lambda p: p.relative_to(SITE).as_posix())


@pytest.fixture(scope="session")
def address():
    """Where the site is served while the tests run."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):  # pyright: ignore
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    """Chromium, found on the PATH or named by CHROMIUM; the tests that need it skip without."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(
            f"no browser: none of {', '.join(BROWSERS)} is on the PATH, and CHROMIUM names none"
        )
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        # Without its sandbox Chromium also runs as root, in containers; it sees our pages alone.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Elements(HTMLParser):
    """Every link, every anchor, and everything that a browser loads by itself."""

    def __init__(self):
        super().__init__()
        self.links, self.anchors, self.loaded = [], set(), []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes.get("id"), attributes.get("name")} - {None}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        # Of links only those that are fetched: not rel="next", "search" and the like.
        rel = set((attributes.get("rel") or "").split())
        fetched = tag != "link" or rel & {"stylesheet", "icon", "preload"}
        if tag in LOADED and fetched and attributes.get(LOADED[tag]):
            self.loaded.append(attributes[LOADED[tag]])


@cache
def elements(page: Path) -> Elements:
    parser = Elements()
    parser.feed(page.read_text())
    return parser


def test_links_and_anchors_resolve(page):
    broken = []
    for link in elements(page).links + elements(page).loaded:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if target.is_dir():
            target = target / "index.html"
        if not target.is_file():
            broken.append(link)
        elif parts.fragment and target.suffix == ".html":
            if unquote(parts.fragment) not in elements(target).anchors:
                broken.append(link)
    assert not broken


def test_nothing_is_loaded_from_another_host(page):
    assert [v for v in elements(page).loaded if urlsplit(v).netloc] == []


def test_style_sheets_load_nothing_from_another_host():
    sheets = list(SITE.rglob("*.css"))
    assert sheets
    foreign = re.compile(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)'\"]*")
    found = {sheet.name: foreign.findall(sheet.read_text()) for sheet in sheets}
    assert {name: urls for name, urls in found.items() if urls} == {}


def test_every_public_name_is_documented():
    names = [f"{module}.{name}" for module, listed in NAMED.items() for name in listed]
    for module in PUBLIC:
        for name, value in vars(importlib.import_module(module)).items():
            if not name.startswith("_") and callable(value):
                names.append(f"{module}.{name}")
    assert len(names) > 20
    assert [n for n in names if n not in elements(SITE / "api.html").anchors] == []


def test_formulas_of_the_derivation_are_on_its_page():
    text = (SITE / "notebooks" / "01_derivation.html").read_text()
    assert [k for k in range(1, 18) if not re.search(rf"<h3>D{k}: ", text)] == []


def test_in_a_browser(page, address, browser):
    """No error, nothing asked of another host, formulas set, no scrolling from side to side."""
    problems = []

    def of_another_host(request):
        if not request.url.startswith((address, "data:")):
            problems.append(f"asks for {request.url}")

    def of_the_console(message):
        if message.type in ("error", "warning"):
            problems.append(f"{message.text} ({message.location['url']})")

    tab = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
    tab.set_default_timeout(30_000)
    tab.on("console", of_the_console)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", of_another_host)
    tab.on("requestfailed", lambda request: problems.append(f"did not get {request.url}"))
    try:
        tab.goto(f"{address}/{page.relative_to(SITE).as_posix()}")
        tab.wait_for_load_state("networkidle")
        formulas = tab.locator(".math").count()
        if formulas:
            tab.wait_for_function("window.MathJax?.startup?.promise")
            tab.evaluate("window.MathJax.startup.promise")
            assert tab.locator(".math mjx-container").count() >= formulas
            assert tab.locator("mjx-merror, [data-mjx-error]").count() == 0
        for width in WIDTHS:
            tab.set_viewport_size({"width": width, "height": 900})
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        images = "[...document.images].filter(i => !i.loading || i.loading == 'eager')"
        assert tab.evaluate(f"{images}.filter(i => !i.naturalWidth).map(i => i.src)") == []
        assert problems == []
    finally:
        tab.close()
