"""The page in a browser, as one who reads, types or listens has it. Skipped without chromium or playwright."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from apd import EXAMPLE_PROMPTS, APDSampler

pytestmark = pytest.mark.slow
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("no chromium", allow_module_level=True)
pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive the browser")

SHUFFLE = EXAMPLE_PROMPTS[3]
TITLES = ["Your settings", "One token per step", "By a threshold"]


class Served:
    """A server in a thread of its own.

    Attributes:
        url: its address.
        engine: its decoding loop.
    """

    def __init__(self) -> None:
        import uvicorn

        from apd.serve.app import make_app
        from apd.serve.settings import ServeSettings

        app = make_app(APDSampler.from_included(), ServeSettings(max_new_tokens=32))
        self.engine = app.state.engine
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=30)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page at 1280 × 900; an error of its script fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(error))
    page.set_default_timeout(20_000)
    page.goto(served.url)
    yield page
    context.close()
    assert not faults


def pane(page: Any, title: str) -> Any:
    return page.get_by_role("article", name=title)


def wait_for_end(page: Any) -> None:
    page.get_by_role("button", name="Play again").wait_for()


def counted(page: Any, title: str) -> dict[str, str]:
    values = {name: pane(page, title).locator(f".{name} dd").inner_text() for name in ("rate", "tokens", "forwards")}
    return values | {"text": pane(page, title).locator(".apd-tokens").inner_text()}


def test_three_answers_are_written_and_played_again(page: Any) -> None:
    assert page.get_by_label("Prompt").input_value() == SHUFFLE
    page.get_by_label("Slow motion").fill("600")
    page.get_by_role("button", name="Send").click()
    drafts = pane(page, "Your settings").locator(".apd-d")
    drafts.first.wait_for()  # what was rejected is seen between two steps
    pane(page, "One token per step").get_by_text("1.00").wait_for()
    page.get_by_label("Slow motion").fill("0")
    wait_for_end(page)
    assert drafts.count() == 0

    found = {title: counted(page, title) for title in TITLES}
    tokens = {title: int(counts["tokens"]) for title, counts in found.items()}
    forwards = {title: int(counts["forwards"]) for title, counts in found.items()}
    assert forwards["One token per step"] == tokens["One token per step"] == 8
    assert forwards["Your settings"] < 8 and forwards["By a threshold"] < 8
    for title, counts in found.items():
        assert float(counts["rate"]) == pytest.approx(tokens[title] / forwards[title], abs=0.005)
        assert sorted(json.loads(counts["text"].removesuffix("<eos>"))) == ["Carl", "Kurt", "Wim"]
        colours = (
            pane(page, title).locator(".apd-t").evaluate_all("spans => new Set(spans.map(s => s.className)).size")
        )
        assert colours == min(forwards[title], 6)

    slider = page.get_by_label("Step", exact=True)
    slider.fill("1")
    assert [int(counted(page, title)["forwards"]) for title in TITLES] == [1, 1, 1]
    assert drafts.count() > 0
    slider.fill("8")
    assert {title: counted(page, title) for title in TITLES} == found
    token = pane(page, "Your settings").locator(".apd-t").nth(1)
    assert "p_AR verifier" in token.get_attribute("title")


def test_the_knobs_are_those_of_the_first_answer(page: Any) -> None:
    page.get_by_label("Slow motion").fill("0")
    page.get_by_label("τ acceptance threshold").fill("1")
    page.get_by_label("M window size").fill("0")  # the first of the sizes: 1
    page.get_by_role("button", name="Send").click()
    wait_for_end(page)
    assert [counted(page, title)["rate"] for title in TITLES] == ["1.00"] * 3
    assert "τ = 1" in pane(page, "Your settings").inner_text()
    page.get_by_label("Strategy").fill("checked")
    assert page.get_by_label("R mixture weight").is_disabled()
    page.get_by_role("button", name="Send").click()
    page.get_by_text("canvases in these forwards").wait_for()


def test_keys_are_enough(page: Any, served: Served) -> None:
    """From the top, Tab goes through the form in reading order; Ctrl+Enter sends and Esc stops, here and on the server."""
    order: list[str] = []
    for _ in range(11):
        page.keyboard.press("Tab")
        order.append(page.locator(":focus").get_attribute("id"))
    expected = "example prompt send strategy weight tau window gamma length temperature pace"
    assert order == expected.split()
    page.get_by_label("Slow motion").fill("600")
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Control+Enter")
    pane(page, "One token per step").locator(".apd-t").first.wait_for()
    assert page.get_by_role("button", name="Stop").is_enabled()
    page.keyboard.press("Escape")
    assert page.get_by_role("status").inner_text() == "Stopped."
    assert int(counted(page, "One token per step")["tokens"]) < 8
    until = time.monotonic() + 10
    while served.engine.working and time.monotonic() < until:
        time.sleep(0.05)
    assert not served.engine.working


def test_a_screen_reader_is_told_at_the_end(page: Any) -> None:
    page.get_by_role("button", name="Send").click()
    wait_for_end(page)
    told = page.get_by_role("status").inner_text()
    assert all(f"{title}: 8 tokens in " in told for title in TITLES)
    assert page.get_by_role("status").get_attribute("aria-live") == "polite"
    tree = page.get_by_role("region", name="Answers").aria_snapshot()
    assert tree.count('paragraph: "Answer: ') == 3 or tree.count("Answer: ") == 3
    for control in page.locator("input:visible, select:visible, textarea:visible, button:visible").all():
        assert control.evaluate("e => e.labels && e.labels.length || e.textContent.trim()"), control


@pytest.mark.parametrize("width, dark", [(390, False), (390, True), (1280, True)])
def test_narrow_and_dark_pages_are_whole(browser: Any, served: Served, width: int, dark: bool) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme="dark" if dark else "light")
    page = context.new_page()
    page.goto(served.url)
    page.get_by_role("button", name="Send").click()
    wait_for_end(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = [pane(page, title).bounding_box() for title in TITLES]
    assert (boxes[1]["y"] > boxes[0]["y"]) == (width == 390)  # below each other, or side by side
    background, colour = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark, (background, colour)
    context.close()


def test_errors_are_told_on_the_page(page: Any) -> None:
    alert = page.get_by_role("alert")

    def told_when(**answer: Any) -> str:
        page.route("**/watch", lambda route: route.fulfill(**answer) if answer else route.abort("connectionrefused"))
        page.get_by_role("button", name="Send").click()
        alert.wait_for()
        text = alert.inner_text()
        page.unroute("**/watch")
        return text

    busy = json.dumps({"error": {"message": "The queue is full."}})
    assert told_when().startswith("The server does not answer.")
    assert told_when(status=429, headers={"Retry-After": "2"}, body=busy) == (
        "The server is busy; try again in 2 seconds. The queue is full."
    )
    assert told_when(body='data: {"error": {"message": "The drafter gave NaN."}}\n\n') == "The drafter gave NaN."
    assert "closed the connection" in told_when(body="")
    assert told_when(status=502, body="<html>Bad Gateway</html>") == "<html>Bad Gateway</html>"  # as text

    page.get_by_label("Prompt").fill("x " * 5000)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Shorten the prompt").wait_for()
    page.get_by_label("Prompt").fill(SHUFFLE)
    page.get_by_label("Strategy").fill("treshold:0.9")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Did you mean `threshold`?").wait_for()
    assert "No answer." in pane(page, "Your settings").inner_text()
    wait_for_end(page)  # of the two other answers


def test_the_page_asks_for_the_key(browser: Any) -> None:
    """The key is sent with each request, and kept nowhere."""
    from apd.serve.watch import page as rendered

    known = {
        **{"model": "m", "strategy": "apd", "strategies": [], "mixture_weight": 0.5, "acceptance_threshold": 0},
        **{
            "window_size": 8,
            "max_tokens": 8,
            "max_length": 64,
            "chat": True,
            "needs_key": True,
            "examples": [],
            "example": 0,
        },
    }
    html, policy = rendered(known)
    page = browser.new_page()
    sent = []

    def serve(route: Any) -> None:
        if route.request.method == "POST":
            sent.append((route.request.headers.get("authorization"), json.loads(route.request.post_data)))
            route.fulfill(status=401, body='{"error": {"message": "Incorrect API key provided."}}')
        else:
            route.fulfill(body=html, content_type="text/html", headers={"Content-Security-Policy": policy})

    page.route("**/*", serve)
    page.goto("http://server.invalid/")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("Prompt").fill("Hello")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Incorrect API key").wait_for()
    assert [key for key, _ in sent] == ["Bearer secret"] * 3
    assert all(body["chat"] and body["window_size"] is None for _, body in sent)
    assert page.get_by_label("M window size").get_attribute("aria-valuetext") == "8"
    page.close()
