"""An empty page with an anywidget view on it, no JupyterLab: what the tests of the drawing canvas
use it with."""

import time
from http.server import BaseHTTPRequestHandler

SCRIPT = """
class Model {  // what anywidget hands to a view, with a kernel at the other end
  constructor(state) { this.state = state; this.handlers = {}; this.saved = 0; }
  get(name) { return this.state[name]; }
  set(name, value) {
    this.state[name] = value;
    for (const handler of this.handlers['change:' + name] ?? []) handler();
  }
  save_changes() { this.saved++; }
  send(content) {
    window.toKernel(content).then(replies => replies.forEach(reply =>
      (this.handlers['msg:custom'] ?? []).forEach(handler => handler(reply))));
  }
  on(event, handler) { (this.handlers[event] ??= []).push(handler); }
  off(event, handler) { this.handlers[event] = this.handlers[event].filter(known => known !== handler); }
}
window.start = async (source, state) => {
  const { default: widget } = await import('data:text/javascript;base64,' + source);
  window.model = new Model(state);
  window.stop = widget.render({ model, el: document.body });
};
"""


class Blank(BaseHTTPRequestHandler):
    def do_GET(self):
        page = b"<!doctype html><body data-jp-theme-light=true></body>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_):
        pass


def idle(page):
    page.wait_for_selector(".flserving-draw[data-state=idle]")


def stroke(page, *points):
    """Draw with the mouse through points in pixels of the 8 x 8 grid."""
    box = page.locator("canvas").bounding_box()
    places = [
        (box["x"] + x * box["width"] / 8, box["y"] + y * box["height"] / 8) for x, y in points
    ]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()
    idle(page)


def calls(page, wanted):
    """How often the page called; the browser tells of a call a little later than its answer is
    there."""
    end_s = time.monotonic() + 20
    while len(page.calls) < wanted and time.monotonic() < end_s:
        page.wait_for_timeout(20)
    return len(page.calls)


def shown(page):
    return page.evaluate("model.get('answer')"), page.evaluate("model.get('pixels')")
