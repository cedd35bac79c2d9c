"""The page of the endpoint, in headless Chromium."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bam_ray.serving import AppOptions, DecodeEngine, Scheduler, create_app
from bam_ray.settings.api_keys import ApiKey, hash_api_key
from tests.support.http_server import running_server

CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
KEY = "a-key-for-the-page"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: make browser"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Yield an empty page, and fail if a script on it fails."""
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert errors == []


def send(page: Any, prompt: str) -> None:
    """Send a prompt and wait for the end of the response."""
    page.fill("#prompt", prompt)
    page.click("#send")
    page.wait_for_selector("#stop[disabled]")


def test_tokens_are_colored_by_their_experts(
    page: Any, models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = DecodeEngine(models_by_family["bam"], tokenizer, slots=3, max_length=64)
    with running_server(create_app(Scheduler(engine), "tiny")) as url:
        page.goto(url)
        page.locator("#model", has_text="tiny").wait_for()
        assert page.locator("#legend div").all_inner_texts() == ["0", "1", "2"]
        page.select_option("#mode", "completion")
        page.fill("#max_tokens", "7")
        page.fill("#temperature", "0")
        send(page, "<b>the</b>")
        assert page.locator(".token").count() == 7
        prompt, _ = page.locator(".turn .text").all_inner_texts()
        assert prompt == "<b>the</b>", "a prompt is text, not HTML"
        assert {token.get_attribute("data-expert") for token in page.locator(".token").all()} <= {"0", "1", "2"}
        before = page.locator(".token").first.get_attribute("style")
        page.locator(".token").first.hover()
        assert page.locator("#details .layer").count() == 4
        page.select_option("#color", "attention:1")
        assert page.locator(".token").first.get_attribute("style") != before
        page.locator("#status", has_text="of 3 slots").wait_for()
        page.select_option("#mode", "chat")
        for _ in range(2):
            send(page, "a")
        assert page.locator(".turn").count() == 6


def test_a_dense_model_has_no_colors_and_errors_are_shown(page: Any, engine: DecodeEngine) -> None:
    with running_server(create_app(Scheduler(engine), "tiny")) as url:
        page.goto(url)
        page.locator("#note", has_text="A dense model").wait_for()
        page.fill("#max_tokens", "5")
        send(page, "the")
        assert page.locator(".token").count() == 0
        page.fill("#max_tokens", "500")
        send(page, "the")
        assert "at most 64 tokens" in page.locator(".error").inner_text()


def test_the_page_asks_for_a_key(page: Any, engine: DecodeEngine) -> None:
    options = AppOptions(api_keys=[ApiKey(name="alice", sha256=hash_api_key(KEY.encode()))])
    with running_server(create_app(Scheduler(engine), "tiny", options)) as url:
        page.goto(url)
        page.locator("#note", has_text="API key").wait_for()
        page.fill("#key", KEY)
        page.press("#key", "Tab")
        page.locator("#model", has_text="tiny").wait_for()
