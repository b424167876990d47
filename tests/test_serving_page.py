"""The page for people, in a real Chromium: by mouse, by keyboard, on a phone, without a network.

Needs Chromium (Debian: `apt-get install chromium`; or `playwright install chromium`), else skips.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from mmray.serving import answers, app
from mmray.serving.settings import ServeConfig, token_of

SHOTS = os.environ.get("SCREENSHOTS")  # a folder to look at afterwards


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        except Error as error:
            pytest.skip(f"no Chromium here: {error.message.splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> served.Local:
    return served.Local(tiny.bundle(str(tmp_path_factory.mktemp("page") / "b")), ServeConfig())


class Serving:
    """uvicorn in a thread over a backend; ends with the block."""

    def __init__(self, backend: Any, cfg: ServeConfig) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        made = app.build(backend, cfg, token_of(cfg))
        self._server = uvicorn.Server(uvicorn.Config(made, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, args=([listener],))

    def __enter__(self) -> str:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)
        return self.url

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()


def opened(browser: Browser, url: str, **context: Any) -> Page:
    """A page that fails the test for an error in its console or a request to another server."""
    page = browser.new_context(**context).new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: wrong.append(m.text) if "Content Security" in m.text else None)
    page.on("request", lambda r: None if _own(r.url, url) else wrong.append(r.url))
    page.wrong = wrong  # type: ignore[attr-defined]
    page.goto(url)
    return page


def _own(asked: str, url: str) -> bool:
    return asked.startswith((url, "data:", "blob:"))


def shot(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


def picture(tmp_path: Path, seed: int = 3) -> Path:
    path = tmp_path / "picture.jpg"
    path.write_bytes(tiny.jpeg(seed, 200))
    return path


def test_a_picture_and_a_caption_give_bars_with_the_label(
    browser: Browser, local: served.Local, tmp_path: Path
) -> None:
    with Serving(local, ServeConfig()) as url:
        page = opened(browser, url)
        expect(page.locator("#about")).to_contain_text("calm, wild")
        page.get_by_label("Picture", exact=True).set_input_files(picture(tmp_path))
        expect(page.get_by_role("img", name="Chosen picture, picture.jpg")).to_be_visible()
        page.get_by_label("Caption").fill("a quiet sea")
        page.get_by_role("button", name="Score").click()
        expect(page.locator(".verdict")).to_have_text("calm")
        bars = page.get_by_role("meter")
        expect(bars).to_have_count(2)
        assert "calm: 5" in (bars.first.get_attribute("aria-label") or "")
        expect(page.locator("#results .note")).to_contain_text("ms")
        shot(page, "scored")
        page.get_by_role("button", name="Remove the picture").click()
        expect(page.get_by_text("Choose a picture")).to_be_visible()
        page.get_by_role("button", name="Score").click()
        expect(page.get_by_role("status")).to_have_text("no image")
        expect(bars).to_have_count(0)
        shot(page, "refused")
        assert page.wrong == []  # type: ignore[attr-defined]


def test_an_example_is_one_click_and_the_keyboard_does_it_all(
    browser: Browser, local: served.Local
) -> None:
    with Serving(local, ServeConfig()) as url:
        page = opened(browser, url)
        examples = page.get_by_role("button", name="Example")
        expect(examples).to_have_count(4)
        examples.first.focus()
        page.keyboard.press("Enter")
        expect(page.locator(".verdict")).to_be_visible()
        assert page.get_by_label("Caption").input_value()
        page.get_by_label("Caption").focus()
        page.keyboard.type(" and more")
        before = page.locator("#results").inner_text()
        page.keyboard.press("Control+Enter")
        expect(page.locator("#results")).not_to_have_text(before)
        order = []
        page.get_by_label("Picture", exact=True).focus()
        for _ in range(4):
            order.append(page.evaluate("document.activeElement.id"))
            page.keyboard.press("Tab")
        assert order == ["file", "clear", "caption", "go"]
        assert page.wrong == []  # type: ignore[attr-defined]


def test_a_picture_may_be_pasted_or_dropped(browser: Browser, local: served.Local) -> None:
    script = """([kind, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "shot.png", {type: "image/png"}));
        const event = kind === "paste" ? new ClipboardEvent("paste", {clipboardData: data})
                                       : new DragEvent("drop", {dataTransfer: data});
        document.dispatchEvent(event);
    }"""
    with Serving(local, ServeConfig()) as url:
        for kind in ("paste", "drop"):
            page = opened(browser, url)
            page.evaluate(script, [kind, list(tiny.jpeg(2))])
            expect(page.get_by_role("img", name="Chosen picture, shot.png")).to_be_visible()


def test_a_picture_that_no_browser_shows_is_named_until_it_is_removed(
    browser: Browser, local: served.Local, tmp_path: Path
) -> None:
    path = tmp_path / "scan.tif"
    Image.new("RGB", (8, 8)).save(path)
    with Serving(local, ServeConfig()) as url:
        page = opened(browser, url)
        page.get_by_label("Picture", exact=True).set_input_files(path)
        expect(page.get_by_text("scan.tif: this browser cannot show it")).to_be_visible()
        shot(page, "unshown")
        page.get_by_role("button", name="Remove the picture").click()
        expect(page.get_by_text("cannot show it")).to_be_hidden()
        expect(page.get_by_text("Choose a picture")).to_be_visible()


def test_it_shows_what_each_half_says_where_the_model_takes_halves(
    browser: Browser, tmp_path: Path
) -> None:
    halves = served.Local(tiny.bundle(str(tmp_path / "b"), missing=True), ServeConfig())
    assert halves.card["inputs"] == {"image": "optional", "caption": "optional"}
    with Serving(halves, ServeConfig()) as url:
        page = opened(browser, url)
        page.get_by_role("button", name="Example 1").click()
        expect(page.get_by_role("heading", name="Without the picture")).to_be_visible()
        expect(page.get_by_role("heading", name="Without the caption")).to_be_visible()
        expect(page.get_by_role("meter")).to_have_count(6)
        shot(page, "halves")


def test_every_label_that_is_given_stands_out_where_a_pair_may_have_several(
    browser: Browser, local: served.Local, tmp_path: Path
) -> None:
    class Several:
        def __init__(self) -> None:
            self.card = {**local.card, "task": "multilabel"}
            self.examples: tuple[()] = ()

        async def score(self, samples: Any) -> list[answers.Outcome]:
            found = {"label": "a,b", "p_a": 0.9, "p_b": 0.6, "p_c": 0.2}
            return [answers.Result(found, "f" * 64, 0.0) for _ in samples]

    with Serving(Several(), ServeConfig()) as url:
        page = opened(browser, url)
        page.get_by_label("Picture", exact=True).set_input_files(picture(tmp_path))
        page.get_by_role("button", name="Score").click()
        expect(page.locator(".verdict")).to_have_text("a,b")
        expect(page.locator(".best")).to_have_text(["a90.0 %", "b60.0 %"])
        shot(page, "several")


def test_on_a_phone_in_the_dark_nothing_is_cut_off(browser: Browser, local: served.Local) -> None:
    with Serving(local, ServeConfig()) as url:
        page = opened(
            browser,
            url,
            viewport={"width": 320, "height": 640},
            color_scheme="dark",
            has_touch=True,
            is_mobile=True,
        )
        page.get_by_role("button", name="Example 1").tap()
        expect(page.locator(".verdict")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        for button in page.locator("button").all():
            box = button.bounding_box()
            assert box is None or box["height"] >= 44, "too small for a thumb"
        shot(page, "phone")
        page.goto(f"{url}/docs")
        expect(page.get_by_role("heading", name="POST /v1/score", exact=True)).to_be_visible()
        shot(page, "docs")


def test_a_token_is_asked_for_where_the_server_wants_one(
    browser: Browser, local: served.Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_TOKEN", "s3cret")
    with Serving(local, ServeConfig(token_env="A_TOKEN")) as url:
        page = opened(browser, url)
        expect(page.locator("#about")).to_contain_text("access token")
        page.get_by_label("Access token").fill("s3cret")
        page.get_by_label("Access token").press("Tab")
        expect(page.locator("#about")).to_contain_text("calm, wild")
        expect(page.get_by_role("button", name="Example")).to_have_count(4)
