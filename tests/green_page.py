"""The Green tab in a real browser, for its tests and its benchmark."""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Frame, Page

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Changes the address and lets the page take notice.
FOLLOW = """hash => new Promise(done => {
    if (location.hash === hash) return done();
    addEventListener("hashchange", () => setTimeout(done, 0), { once: true });
    location.hash = hash;
})"""
# What each view has once it is drawn.
DRAWN = {
    "compare": ".comparison tbody tr",
    "savings": ".elsewhere tbody tr",
    "timeline": ".lines svg .line",
    "frontier": ".lines svg .line",
    "phases": ".phases tbody tr",
}
NAMES = {"compare": "Compare", "savings": "Savings", "timeline": "Timeline", "frontier": "Loss vs energy", "phases": "Phases"}


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium; ends with the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Tab:
    """The Green tab of an open page: what the page asked for, what it complained of, and its frame."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and self.complaints.append(f"{said.text} {said.location['url']}"))

    def open(self, wanted: str = "", **settings: str) -> Tab:
        """Goes to the tab with these settings in the address, and waits for ``wanted`` (a selector)."""
        fragment = "#green" + "".join(f"&green.{key}={quote(value, safe='')}" for key, value in settings.items())
        if self.page.url.startswith(self.address):
            self.page.evaluate(FOLLOW, fragment)
        else:
            self.page.goto(f"{self.address}/{fragment}")
        return self.wait(wanted or ".comparison tbody tr")

    def follow(self, link: str) -> Tab:
        """Opens a link in the same window, loading everything again."""
        self.page.goto("about:blank")
        self.page.goto(link)
        return self

    def wait(self, selector: str) -> Tab:
        """Waits for an element of the tab."""
        self.frame.wait_for_selector(selector, state="attached", timeout=15_000)
        return self

    def wait_until(self, expression: str, timeout_s: float = 10.0) -> Tab:
        """Waits until something is true in the tab."""
        self.frame.wait_for_function(expression, timeout=timeout_s * 1000)
        return self

    @property
    def frame(self) -> Frame:
        """Our frame within TensorBoard's page."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            for frame in self.page.frames:
                if "plugin_entry.html?name=green" in frame.url:
                    return frame
            self.page.wait_for_timeout(50)
        raise AssertionError("TensorBoard opened no frame for the tab")

    def texts(self, selector: str) -> list[str]:
        """Text of all such elements, in one look."""
        found: list[str] = self.frame.evaluate("s => [...document.querySelectorAll(s)].map(e => e.innerText.trim())", selector)
        return found

    def row(self, run: str) -> dict[str, str]:
        """A run's cells in the comparison, by column."""
        found: dict[str, str] = self.frame.evaluate(
            """run => Object.fromEntries([...document.querySelectorAll(`.comparison tr[data-run="${run}"] > *`)]
                .map(e => [e.className.replace("col-", ""), e.innerText.trim().replace(/\\s*\\n\\s*/g, "\\n")]))""",
            run,
        )
        return found

    def table(self, selector: str) -> dict[str, list[str]]:
        """The cells of each row, by the name of the run that begins it."""
        found: dict[str, list[str]] = self.frame.evaluate(
            """s => Object.fromEntries([...document.querySelectorAll(`${s} tbody tr`)].map(e =>
                [e.querySelector(".name")?.innerText ?? "", [...e.querySelectorAll("td")].map(d => d.innerText.trim())]))""",
            selector,
        )
        return found

    def run_js(self, body: str, argument: Any = None) -> Any:
        """The value of a function of the page's modules: ``body`` sees ``data``, ``stats``, ``format``, ``charts`` and ``x``."""
        return self.frame.evaluate(
            f"""async x => {{
                const [data, stats, format, charts] = await Promise.all(["data", "stats", "format", "charts"].map(
                    name => import(new URL(`plugin/green/${{name}}.js`, location.href.replace(/plugin_entry.*/, "")).href)));
                {body}
            }}""",
            argument,
        )
