"""The page at /ui in headless Chromium: a branch opened by the keyboard, dark and light, a narrow screen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from agentspeed.server.options import ServerOptions
from tests.support.server_run import server

playwright: Any = pytest.importorskip("playwright.sync_api", reason="run by `make conformance`")
if (CHROMIUM := shutil.which("chromium") or shutil.which("google-chrome")) is None:
    pytest.skip("there is no Chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server(options=ServerOptions(port=0, drain_seconds=3.0), pages=256) as found:
        with httpx.Client(base_url=found, timeout=30) as client:
            session = client.post("/v1/sessions", json={"name": "watched"}).json()["id"]
            said = {"messages": [{"type": "user", "text": "Hi."}], "max_tokens": 4}
            assert client.post(f"/v1/sessions/{session}/generate", json=said).status_code == 200
            assert client.post(f"/v1/sessions/{session}/fork", json={"n": 2}).status_code == 200
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        made = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def test_a_branch_is_reached_and_opened_by_the_keyboard_alone(browser: Any, url: str) -> None:
    page = browser.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{url}/ui")
    first = page.locator("button.branch").first
    first.wait_for(timeout=20_000)
    assert page.locator("button.branch").count() >= 3 and "watched" in page.locator("#tree").inner_text()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('button.branch')"):
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("button.branch[aria-expanded=true]", timeout=20_000)
    assert page.locator("#pages-legend").inner_text().strip()
    assert wrong == []
    page.close()


def test_light_and_dark_are_two_looks_with_text_that_stands_out(browser: Any, url: str) -> None:
    colours = "(() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor] })()"
    found = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(f"{url}/ui")
        page.locator("button.branch").first.wait_for(timeout=20_000)
        ink, paper = (sum(map(int, text.strip("rgba()").split(",")[:3])) for text in page.evaluate(colours))
        found[scheme] = ink < paper
        assert abs(ink - paper) > 350, scheme
        page.close()
    assert found == {"light": True, "dark": False}


def test_a_narrow_screen_needs_no_sideways_scrolling(browser: Any, url: str) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 700})
    page.goto(f"{url}/ui")
    page.locator("button.branch").first.wait_for(timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()
