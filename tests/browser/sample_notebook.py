"""Throw-away notebooks that try the harness itself: one in which everything works, one in which
nothing does."""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

SETUP = """
import ipywidgets as widgets

def drawing(number):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="120" height="120">'
            f'<text x="20" y="70" font-size="40">{number}</text></svg>').encode()

def picture(*controls, draw=lambda *values: drawing(sum(values)), **layout):
    image = widgets.Image(format="svg+xml", value=draw(*(c.value for c in controls)), layout=layout)
    def redraw(change):
        image.value = draw(*(c.value for c in controls))
    for control in controls:
        control.observe(redraw, names="value")
    return widgets.VBox([*controls, image])
"""

IMAGE_WIDGET = """
picture(widgets.IntSlider(value=3, max=50, description="slider"),
        widgets.Dropdown(options=[100, 200, 300], description="list"),
        widgets.Checkbox(description="tick"))
"""

CANVAS_WIDGET = """
import anywidget

class Canvas(anywidget.AnyWidget):
    _esm = '''
    function render({ el }) {
      const canvas = document.createElement("canvas"), slider = document.createElement("input");
      const [play, back, step] = [0, 1, 2].map(() => document.createElement("button"));
      canvas.width = 200; canvas.height = 100;
      slider.type = "range"; slider.max = 10; slider.value = 0; slider.title = "frame";
      play.textContent = "play"; back.textContent = "back"; step.textContent = "step";
      let timer = null;
      function draw() {
        const pen = canvas.getContext("2d");
        pen.clearRect(0, 0, 200, 100);
        pen.fillRect(0, 20, 20 * Number(slider.value), 60);
      }
      slider.addEventListener("input", draw);
      back.addEventListener("click", () => { slider.value = 0; draw(); });
      step.addEventListener("click", () => { slider.value = Number(slider.value) + 1; draw(); });
      play.addEventListener("click", () => {
        if (timer) { clearInterval(timer); timer = null; return; }
        timer = setInterval(() => { slider.value = (Number(slider.value) + 1) % 11; draw(); }, 700);
      });
      el.append(slider, play, back, step, canvas);
      draw();
    }
    export default { render };
    '''

Canvas()
"""

DEAD_SLIDER = (
    'picture(widgets.IntSlider(description="dead"), draw=lambda value: drawing("always the same"))'
)
DEAD_BUTTON = 'widgets.VBox([widgets.Button(description="dead"), widgets.Image(format="svg+xml", value=drawing(1))])'
NO_CONTROL = 'widgets.Image(format="svg+xml", value=drawing(7))'
CUT_OFF = 'picture(widgets.IntSlider(), min_width="3000px")'
ALERT = """
message = widgets.HTML()
slider = widgets.IntSlider()
image = widgets.Image(format="svg+xml", value=drawing(0))
def complain(change):
    image.value = drawing(change.new)
    message.value = '<div role="alert">ZeroDivisionError: at the end of the slider</div>'
slider.observe(complain, names="value")
widgets.VBox([slider, message, image])
"""


def _write(path: Path, *sources: str) -> None:
    cells = [new_markdown_cell("# A sample"), new_code_cell(SETUP)]
    cells += [new_code_cell(source.strip(), metadata={"tags": ["widget"]}) for source in sources]
    # without a kernelspec JupyterLab asks "Select Kernel" and waits
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def write_samples(folder: Path) -> None:
    """Write working.ipynb and broken.ipynb; the broken one's last cell raises."""
    _write(folder / "working.ipynb", IMAGE_WIDGET, CANVAS_WIDGET)
    _write(folder / "broken.ipynb", DEAD_SLIDER, DEAD_BUTTON, NO_CONTROL, CUT_OFF, ALERT, "1 / 0")
