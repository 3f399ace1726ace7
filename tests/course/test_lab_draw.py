"""The drawing canvas: its Python side on a real endpoint, and its page in a real browser that asks
the REST API."""

import base64
import contextlib
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from draw_page import SCRIPT, Blank, calls, idle, shown, stroke
from flserving import create_serving_pipeline, models
from flserving.api import serve
from flserving.api.doctor import find_chromium
from flserving.errors import ConfigError, FlservingError
from flserving.lab.widgets import draw as draw_module
from flserving.lab.widgets.draw import PIXELS, DigitCanvas, draw_digit

EXAMPLE = [(3 * pixel) % 17 for pixel in range(PIXELS)]


@pytest.fixture(scope="module")
def endpoint():
    with (
        create_serving_pipeline(models.build("digits_mlp")) as server,
        serve(server, grpc_port=None) as opened,
    ):
        yield opened


@pytest.fixture
def canvas(endpoint):
    """A canvas whose messages to the page are kept in ``canvas.sent``."""
    made = DigitCanvas(endpoint, "local", [EXAMPLE])
    made.sent = []
    made.send = lambda content, buffers=None: made.sent.append(content)
    yield made
    made.close()


def hear(canvas, **content):
    canvas._hear(canvas, {"view": "v", **content}, [])
    return canvas.sent.pop()


# -------------------------------------------------------------------------------- the kernel's side


def test_a_page_that_says_hello_is_let_in_and_gets_the_credential(canvas, endpoint):
    welcome = hear(canvas, kind="hello", origin="http://localhost:8888")
    assert welcome == {"kind": "welcome", "view": "v", "headers": endpoint.headers}
    assert (
        "http://localhost:8888" in endpoint.v2.origins and canvas.origin == "http://localhost:8888"
    )


@pytest.mark.parametrize("origin", ["null", "vscode-webview://abc", "*"])
def test_an_origin_that_cannot_be_named_gets_a_reason_and_no_credential(canvas, endpoint, origin):
    welcome = hear(canvas, kind="hello", origin=origin)
    assert (
        welcome["headers"] == {}
        and origin in welcome["refused"]
        and origin not in endpoint.v2.origins
    )


def test_the_state_that_a_notebook_may_store_does_not_hold_the_token(canvas, endpoint):
    hear(canvas, kind="hello", origin="http://localhost:8888")
    assert endpoint.token and endpoint.token not in str(canvas.get_state()) + repr(canvas)


def test_the_kernel_answers_for_a_page_as_the_server_does(canvas, endpoint):
    answer = hear(canvas, kind="infer", pixels=EXAMPLE)
    wanted = endpoint.v2.server.predict([EXAMPLE])
    assert answer["version"] == "v1.0" and answer["probabilities"] == pytest.approx(
        wanted["probabilities"][0], abs=1e-6
    )
    assert "NotFoundError" in DigitCanvas(endpoint, "nobody").ask(EXAMPLE)["error"]


@pytest.mark.parametrize("image", [[], [0] * 63, [0] * 63 + [17], [-1] + [0] * 63])
def test_an_image_that_is_none_is_refused(canvas, endpoint, image):
    with pytest.raises(ConfigError, match=f"an image of {len(image)} pixels"):
        DigitCanvas(endpoint, examples=[image])
    with pytest.raises(ConfigError, match="each from 0 to 16"):
        canvas.pixels = image


def test_the_static_switch_asks_for_every_example_and_shows_nothing(endpoint, monkeypatch):
    assert isinstance(draw_digit(endpoint, "local"), DigitCanvas)
    monkeypatch.setenv("FLSERVING_STATIC", "1")
    before = endpoint.v2.server.get_all_stats()["server"]["requests"]
    assert draw_digit(endpoint, "local", [EXAMPLE, EXAMPLE]) is None
    assert endpoint.v2.server.get_all_stats()["server"]["requests"] == before + 2
    with pytest.raises(FlservingError, match="NotFoundError"):
        draw_digit(endpoint, "nobody", [EXAMPLE])


def test_the_files_need_nothing_from_the_network():
    script, style = str(DigitCanvas._esm), str(DigitCanvas._css)
    assert "export default" in script and ".flserving-draw" in style
    assert "://" not in script + style


# ---------------------------------------------------------------------------------- the page's side


@pytest.fixture(scope="module")
def chromium():
    if find_chromium() is None:
        pytest.skip("no chromium: install it (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def origin():
    """Where an empty page is served, as JupyterLab would serve its own: another origin than the
    endpoint's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Blank) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def opened(chromium, origin, canvas):
    """``opened(address)``: the canvas on a page of that origin; ``page.calls`` are its requests to
    the endpoint."""
    folder, errors = Path(draw_module.__file__).parent, []
    with contextlib.ExitStack() as stack:

        def open_page(address=origin, touch=False):
            context = chromium.new_context(viewport={"width": 900, "height": 600}, has_touch=touch)
            stack.callback(context.close)
            page = context.new_page()
            page.calls = []
            page.on("request", lambda r: r.method == "POST" and page.calls.append(r))
            page.on("pageerror", lambda error: errors.append(str(error)))
            if address != origin:
                page.route(
                    f"{address}/",
                    lambda route: route.fulfill(body="<!doctype html>", content_type="text/html"),
                )
            page.goto(f"{address}/")

            def to_kernel(content):
                canvas._hear(canvas, content, [])
                return [canvas.sent.pop()]

            page.expose_function("toKernel", to_kernel)
            page.add_style_tag(content=(folder / "draw.css").read_text())
            page.evaluate(SCRIPT + "null")
            source = base64.b64encode((folder / "draw.js").read_bytes()).decode()
            state = {
                name: canvas.get_state()[name] for name in ("url", "examples", "pixels", "answer")
            }
            page.evaluate("([source, state]) => start(source, state)", [source, state])
            idle(page)
            return page

        yield open_page
    assert not errors


@pytest.mark.browser
def test_a_stroke_is_answered_by_the_rest_api_itself(opened, endpoint):
    page = opened()
    assert page.get_by_role("status").inner_text().startswith("Draw a digit") and not page.calls
    before = endpoint.v2.server.get_all_stats()["server"]["requests"]
    stroke(page, (4, 1), (4, 7))
    answer, pixels = shown(page)
    assert (
        endpoint.v2.server.get_all_stats()["server"]["requests"] - before == answer["requests"] > 0
    )
    assert calls(page, answer["requests"]) == answer["requests"]
    assert page.calls[-1].headers["authorization"] == endpoint.headers["Authorization"]
    wanted = endpoint.v2.server.predict([pixels])
    assert answer["way"] == "browser" and answer["version"] == "v1.0"
    assert answer["prediction"] == wanted["predictions"][0]
    assert answer["probabilities"] == pytest.approx(wanted["probabilities"][0], abs=1e-6)
    assert (
        f"{answer['prediction']}, says version v1.0. Request"
        in page.get_by_role("status").inner_text()
    )
    bar = page.locator(".flserving-draw-best")
    assert bar.count() == 1 and bar.inner_text().split()[0] == str(answer["prediction"])


@pytest.mark.browser
def test_a_pixel_counts_the_ink_below_a_round_pen(opened):
    page = opened()
    stroke(page, (3.5, 1.5), (3.5, 6.5))
    _, pixels = shown(page)
    image = [pixels[8 * row : 8 * row + 8] for row in range(8)]
    assert all(row[3] == 16 for row in image[1:7]) and all(
        0 < row[2] < 16 and 0 < row[4] < 16 for row in image[1:7]
    )
    assert not any(sum(row[:2]) + sum(row[5:]) for row in image) and set(map(type, pixels)) == {int}
    stroke(page, (-1, 4), (12, 4))  # a stroke over the edge ends at the edge
    assert all(0 <= value <= 16 for value in shown(page)[1])


@pytest.mark.browser
def test_the_keyboard_draws_and_erases(opened):
    page = opened()
    page.evaluate("window.leaked = 0; document.addEventListener('keydown', () => window.leaked++)")
    page.get_by_role("application").focus()
    page.keyboard.press(" ")
    idle(page)
    assert shown(page)[1][3 * 8 + 3] == 16
    for key in ("ArrowRight", "Shift+ArrowDown", "ArrowLeft", "Delete"):
        page.keyboard.press(key)
    idle(page)
    pixels = shown(page)[1]
    assert pixels[3 * 8 + 4] == pixels[4 * 8 + 4] == 16 and pixels[4 * 8 + 3] == 0
    for _ in range(20):
        page.keyboard.press("ArrowUp")
    page.keyboard.press(" ")
    idle(page)
    assert shown(page)[1][3] == 16  # at the edge the cursor stops
    # the Shift key alone: a notebook's shortcuts never see the others
    assert page.evaluate("window.leaked") == 1


@pytest.mark.browser
def test_examples_and_clear_and_pixels_from_python(opened):
    page = opened()
    page.get_by_role("button", name="Example").click()
    idle(page)
    answer, pixels = shown(page)
    assert pixels == EXAMPLE and answer["probabilities"]
    page.get_by_role("button", name="Clear").click()
    idle(page)
    assert shown(page) == ({}, [0] * 64) and calls(page, 1) == 1  # nothing to ask
    page.evaluate("model.set('pixels', Array(64).fill(5))")
    idle(page)
    assert shown(page)[1] == [5] * 64 and calls(page, 2) == 2


@pytest.mark.browser
@pytest.mark.parametrize("broken", ["abort", "refuse"])
def test_a_page_that_cannot_reach_the_endpoint_asks_the_kernel_and_says_so(
    opened, endpoint, broken
):
    page = opened()
    page.route(
        "**/v2/models/**",
        lambda route: route.abort() if broken == "abort" else route.fulfill(status=502),
    )
    stroke(page, (2, 2), (6, 6))
    answer, pixels = shown(page)
    assert answer["way"] == "kernel"
    assert answer["probabilities"] == pytest.approx(
        endpoint.v2.server.predict([pixels])["probabilities"][0], abs=1e-6
    )
    assert "the kernel asked for your browser" in page.get_by_role("status").inner_text()
    assert page.get_by_text("Your browser got no answer from 127.0.0.1").is_visible()
    page.unroute("**/v2/models/**")
    page.get_by_role("button", name="By the browser").click()
    idle(page)
    assert (
        shown(page)[0]["way"] == "browser"
        and not page.get_by_text("Your browser got no answer").is_visible()
    )


@pytest.mark.browser
@pytest.mark.parametrize("address", ["https://hub.example.org", "http://hub.example.org"])
def test_a_page_from_elsewhere_does_not_send_the_token_to_its_own_computer(opened, address):
    page = opened(address)
    page.get_by_role("button", name="Example").click()
    idle(page)
    assert shown(page)[0]["way"] == "kernel" and not page.calls
    assert page.get_by_text(
        "This page comes from hub.example.org, and the endpoint listens only"
    ).is_visible()


@pytest.mark.browser
def test_a_finger_draws_and_does_not_scroll(opened):
    page = opened(touch=True)
    box = page.locator("canvas").bounding_box()
    page.touchscreen.tap(box["x"] + 100, box["y"] + 100)
    idle(page)
    assert sum(shown(page)[1]) > 0
    assert (
        page.locator("canvas").evaluate("canvas => getComputedStyle(canvas).touchAction") == "none"
    )


@pytest.mark.browser
def test_an_error_of_the_server_is_shown_and_no_answer_beside_it(opened):
    page = opened()
    page.route(
        "**/infer", lambda route: route.fulfill(status=429, json={"error": "the queue is full"})
    )
    page.get_by_role("button", name="Example").click()
    idle(page)
    assert page.get_by_role("alert").inner_text() == "The server answered 429: the queue is full"
    assert page.locator(".flserving-draw-best").count() == 0 and shown(page)[0] == {}


@pytest.mark.browser
def test_a_closed_view_leaves_nothing_behind(opened):
    page = opened()
    page.evaluate("stop()")
    assert page.evaluate("Object.values(model.handlers).flat().length") == 0
