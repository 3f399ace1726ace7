"""Notebook 05 in the real JupyterLab: a stroke on the canvas is answered by the REST API, which the browser calls."""

import re
import time

import pytest

pytestmark = pytest.mark.browser
NOTEBOOK = "05_rest_and_grpc.ipynb"
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


def stroke(lab, drawing):
    """A one, drawn with the mouse from top to bottom; returns once its answer is shown."""
    box = drawing.bounding_box()
    x, top, height = box["x"] + 0.5 * box["width"], box["y"], box["height"]
    lab.page.mouse.move(x, top + 0.1 * height)
    lab.page.mouse.down()
    lab.page.mouse.move(x, top + 0.95 * height, steps=8)
    lab.page.mouse.up()
    lab.page.wait_for_selector(".flserving-draw[data-state=idle]")


def test_the_browser_itself_asks_the_rest_api_and_else_the_kernel_does(open_in_lab, served_folder):
    with open_in_lab(NOTEBOOK) as lab:
        lab.run_all()
        calls = []
        lab.page.on("request", lambda request: request.url.endswith("/infer") and calls.append(request.method))
        widget = lab.page.locator(".flserving-draw")
        drawing, status = widget.locator("canvas"), widget.get_by_role("status")
        drawing.scroll_into_view_if_needed()
        before = int(lab.page.evaluate(ASK_KERNEL, "print(server.get_all_stats()['server']['requests'])"))

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
        says = lab.page.evaluate(ASK_KERNEL, "print(server.predict(canvas.pixels)['predictions'][0])").strip()
        assert re.match(rf"{says}, says version \d+\. Request {requests}: your browser asked", status.inner_text())
        assert widget.locator(".flserving-draw-best").inner_text().split()[0] == says
        lab.shot("draw_browser", widget)

        token = lab.page.evaluate(ASK_KERNEL, "print(endpoint.token)").strip()
        lab.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        lab.page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")
        saved = (served_folder / NOTEBOOK).read_text()
        assert 'execution_count": 5' in saved and len(token) > 30 and token not in saved

        lab.page.route("**/infer", lambda route: route.abort())
        widget.get_by_role("button", name="Clear").click()
        stroke(lab, drawing)
        answer = lab.page.evaluate(ASK_KERNEL, "print(canvas.answer['way'], canvas.answer['prediction'])").split()
        says = lab.page.evaluate(ASK_KERNEL, "print(server.predict(canvas.pixels)['predictions'][0])").strip()
        assert answer == ["kernel", says]
        assert "the kernel asked for your browser" in status.inner_text()
        assert widget.get_by_text("Your browser got no answer from 127.0.0.1").is_visible()
        lab.shot("draw_kernel", widget)
        assert not lab.page_errors
