"""Every notebook, opened in the real JupyterLab: Run All, move every control of every widget, see
its picture change.

One notebook: ``python -m pytest tests/browser -k 03``. Screenshots of every step: set
FLSERVING_SHOTS to a folder.
"""

import re
import time

import pytest

from conftest import NOTEBOOKS
from sample_notebook import write_samples

pytestmark = pytest.mark.browser
CANVAS = "05_rest_and_grpc.ipynb"  # its canvas is drawn on, too
ASK_KERNEL = """async code => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const done = kernel.requestExecute({ code, store_history: false });
  let text = '';
  done.onIOPub = message => {
    text += message.content.text ?? message.content.data?.['text/plain'] ?? message.content.evalue ?? '';
  };
  await done.done;
  return text;
}"""


@pytest.mark.parametrize(
    "name", sorted({path.name for path in NOTEBOOKS.glob("*.ipynb")} - {CANVAS})
)
def test_every_widget_of_the_notebook_moves_its_picture(open_in_lab, name):
    with open_in_lab(name) as page:
        page.shot("0_open")
        assert page.run_all() > 0
        page.shot("1_run_all")
        for index in page.widget_cells():
            page.use_every_control(index)
        assert not page.unnamed_pictures()
        assert not page.page_errors


def stroke(lab, drawing):
    """A one, drawn with the mouse from top to bottom; returns once its answer is shown."""
    box = drawing.bounding_box()
    x, top, height = box["x"] + 0.5 * box["width"], box["y"], box["height"]
    lab.page.mouse.move(x, top + 0.1 * height)
    lab.page.mouse.down()
    lab.page.mouse.move(x, top + 0.95 * height, steps=8)
    lab.page.mouse.up()
    lab.page.wait_for_selector(".flserving-draw[data-state=idle]")


def test_a_drawn_digit_is_sent_by_the_browser_itself_and_else_by_the_kernel(
    open_in_lab, served_folder
):
    """Notebook 05: a stroke on the canvas is answered by the REST API, which the browser calls."""
    with open_in_lab(CANVAS) as lab:
        lab.run_all()
        calls = []
        lab.page.on(
            "request",
            lambda request: request.url.endswith("/infer") and calls.append(request.method),
        )
        widget = lab.page.locator(".flserving-draw")
        drawing, status = widget.locator("canvas"), widget.get_by_role("status")
        drawing.scroll_into_view_if_needed()
        before = int(
            lab.page.evaluate(ASK_KERNEL, "print(server.get_all_stats()['server']['requests'])")
        )

        stroke(lab, drawing)
        told = "print(server.get_all_stats()['server']['requests'], canvas.answer['way'], canvas.answer['requests'])"
        end = time.monotonic() + 20
        while True:  # the browser shows an answer before the kernel has heard of it
            after, way, requests = lab.page.evaluate(ASK_KERNEL, told).split()
            if int(after) - before == int(requests) or time.monotonic() > end:
                break
            lab.page.wait_for_timeout(50)
        assert way == "browser" and int(after) - before == int(requests) >= 1
        end = time.monotonic() + 20
        while (
            calls.count("POST") < int(requests) and time.monotonic() < end
        ):  # the browser tells of them a little later
            lab.page.wait_for_timeout(50)
        assert calls.count("POST") == int(requests)
        says = lab.page.evaluate(
            ASK_KERNEL, "print(server.predict(canvas.pixels)['predictions'][0])"
        ).strip()
        assert re.match(
            rf"{says}, says version \d+\. Request {requests}: your browser asked",
            status.inner_text(),
        )
        assert widget.locator(".flserving-draw-best").inner_text().split()[0] == says
        lab.shot("draw_browser", widget)

        token = lab.page.evaluate(ASK_KERNEL, "print(endpoint.token)").strip()
        lab.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        lab.page.wait_for_function(
            "() => !window.jupyterapp.shell.currentWidget.context.model.dirty"
        )
        saved = (served_folder / CANVAS).read_text()
        assert 'execution_count": 5' in saved and len(token) > 30 and token not in saved

        lab.page.route("**/infer", lambda route: route.abort())
        widget.get_by_role("button", name="Clear").click()
        stroke(lab, drawing)
        answer = lab.page.evaluate(
            ASK_KERNEL, "print(canvas.answer['way'], canvas.answer['prediction'])"
        ).split()
        says = lab.page.evaluate(
            ASK_KERNEL, "print(server.predict(canvas.pixels)['predictions'][0])"
        ).strip()
        assert answer == ["kernel", says]
        assert "the kernel asked for your browser" in status.inner_text()
        assert widget.get_by_text("Your browser got no answer from 127.0.0.1").is_visible()
        lab.shot("draw_kernel", widget)
        lab.page.unroute("**/infer")
        for index in lab.widget_cells():
            lab.use_every_control(index)
        assert not lab.unnamed_pictures()
        assert not lab.page_errors


@pytest.fixture(scope="module")
def samples(served_folder):
    write_samples(served_folder)


def test_the_harness_moves_sliders_lists_ticks_and_an_animated_canvas(open_in_lab, samples):
    with open_in_lab("working.ipynb") as page:
        assert page.run_all() == 3
        image, canvas = page.widget_cells()
        assert page.use_every_control(image) == 3
        assert page.use_every_control(canvas) == 4
        assert [picture[:4] for picture in page.unnamed_pictures()] == [
            "<img",
            "<can",
        ]  # they say nothing of themselves
        assert not page.page_errors


def test_the_harness_sees_what_is_broken(open_in_lab, samples, monkeypatch):
    monkeypatch.setattr("lab_page.CHANGE_TIMEOUT_S", 2)
    with open_in_lab("broken.ipynb") as page:
        with pytest.raises(AssertionError, match=r"broken\.ipynb: cell 7: ZeroDivisionError"):
            page.run_all()
        dead_slider, dead_button, no_control, cut_off, alert, _ = page.widget_cells()
        with pytest.raises(
            AssertionError, match="'dead' was moved to both its ends and the picture stayed"
        ):
            page.use_every_control(dead_slider)
        with pytest.raises(AssertionError, match="none of the 1 buttons changed the picture"):
            page.use_every_control(dead_button)
        with pytest.raises(AssertionError, match="nothing to move"):
            page.use_every_control(no_control)
        with pytest.raises(AssertionError, match="the picture is cut off"):
            page.use_every_control(cut_off)
        with pytest.raises(
            AssertionError, match="the widget says 'ZeroDivisionError: at the end of the slider'"
        ):
            page.use_every_control(alert)
