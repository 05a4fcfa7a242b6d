"""The page in headless Chromium: ask, open the experts, change the layer, with the keyboard.

The command runs in a process of its own, as it does for users.
"""

import importlib.util
import shutil
import subprocess
import sys
import time

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium")
PASSWORD = "open sesame"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="needs gradio"),
    pytest.mark.skipif(not CHROMIUM, reason="needs the browser chromium"),
]


@pytest.fixture(scope="module")
def address(tiny_models):
    """The page with a student, the same model to compare, and a dense teacher."""
    models = ("--model", tiny_models["sparse"], "--compare", tiny_models["sparse"])
    models += ("--teacher", tiny_models["teacher"])
    others = ("--port", "0", "--password", PASSWORD, "--max_new_tokens", "4")
    process = subprocess.Popen(
        [sys.executable, "-m", "moddistill.explore", *map(str, models), *others],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        line = process.stdout.readline()
        assert line.startswith("explore: http://127.0.0.1:")
        yield line.split()[1]
        process.terminate()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        flags = ["--no-sandbox", "--disable-gpu"]
        with running.chromium.launch(executable_path=CHROMIUM, args=flags) as found:
            yield found


@pytest.fixture(scope="module")
def cookies(browser, address):
    """Those of a login, before which a wrong password was refused."""
    with browser.new_context() as context:
        page = context.new_page()
        for password in ("wrong", PASSWORD):
            page.goto(address)
            page.get_by_label("username").fill("anyone")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if password == "wrong":
                page.get_by_text("Incorrect Credentials").wait_for()
        page.get_by_role("textbox", name="Ask about an image").wait_for()
        return context.storage_state()


@pytest.fixture
def visit(browser, address, cookies):
    """`visit(width)`: the page, which by the end of the test requested nothing of other hosts."""
    requests, contexts = [], []

    def opened(width=1280):
        size = {"width": width, "height": 800}
        contexts.append(browser.new_context(viewport=size, storage_state=cookies))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    foreign = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert requests and not foreign


def ask(page, question, file=None):
    box = page.get_by_role("textbox", name="Ask about an image")
    box.wait_for()
    if file:
        page.locator("#question input[type=file]").set_input_files(file)
        page.locator("#question .thumbnail-item").first.wait_for()
    box.fill(question)
    box.press("Enter")


@pytest.mark.parametrize("width", [1280, 360])
def test_an_image_is_asked_about_and_its_experts_are_shown_by_layer(visit, image, width):
    page = visit(width)
    begun = time.monotonic()
    ask(page, "is {{it}} <b> ${1}?", image(0))
    answers = page.locator(".answer:not([aria-busy]) .token")
    answers.first.wait_for()
    assert time.monotonic() - begun < 10
    page.locator(".panel .overlay").last.wait_for()
    assert page.locator(".question p").inner_text() == "is {{it}} <b> ${1}?"
    assert "%" in answers.first.get_attribute("title")
    assert page.get_by_text("None to show for “teacher:").is_visible()
    assert page.get_by_text("100.0 % of the patches and 100.0 % of the words").is_visible()

    before = page.locator(".panel").first.inner_html()
    page.get_by_role("slider").press("ArrowRight")
    page.get_by_text("Layer 2 of the decoder").first.wait_for()
    assert page.locator(".panel").first.inner_html() != before
    page.get_by_role("radio", name="Router entropy").press("Space")
    page.get_by_text("even over 4 experts").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_load_of_an_expert_points_at_its_patches(visit, image):
    page = visit()
    ask(page, "what is in it?", image(0))
    page.locator(".panel .overlay").first.wait_for()
    opacities = "nodes => nodes.map(node => +getComputedStyle(node).opacity)"
    page.locator(".load-1").first.focus()
    assert all(x == 1 for x in page.locator(".mark.expert-1").evaluate_all(opacities))
    others = page.locator(".mark:not(.expert-1)").evaluate_all(opacities)
    assert others and all(x < 0.5 for x in others)


def test_what_is_wrong_is_a_sentence_and_the_conversation_goes_on(visit, image, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    page = visit()
    ask(page, "what is in it?", tmp_path / "bad.png")
    alert = page.get_by_role("alert")
    alert.get_by_text("bad.png: expected a readable image").wait_for()
    page.get_by_role("button", name="New conversation").click()
    alert.wait_for(state="detached")
    ask(page, " ")
    alert.get_by_text("prompt: expected a text or an image, got ''").wait_for()
    ask(page, "<image> and <image>?")
    alert.get_by_text("number of <image>: expected 0, one per image, got 2").wait_for()
    ask(page, "what is in it?", image(0))
    page.locator(".panel .overlay").first.wait_for()
    assert not alert.is_visible() and page.locator(".turn").count() == 1


def test_a_new_conversation_ends_the_answer_of_the_old_one(visit):
    page = visit()
    ask(page, "what is it, " * 20)  # of a length that is compiled first, which takes seconds
    page.locator(".turn").wait_for()
    with page.expect_response("**/cancel"):
        page.get_by_role("button", name="New conversation").click()
    page.locator(".turn").wait_for(state="detached")
    ask(page, "and this?")
    page.locator(".answer:not([aria-busy])").first.wait_for()
    page.wait_for_timeout(5000)
    assert page.locator(".question p").all_inner_texts() == ["and this?"]
