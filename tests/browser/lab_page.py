"""A notebook open in JupyterLab, used the way a person uses it: Run All, drag a slider, see the
picture move."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Error, Locator, Page

from lab_scripts import CELLS, ENDED, IDLE, LABEL, PIXELS, READY, SAVED, SOURCE, UNNAMED, WATCH_RUN
from lab_server import LabServer

OPEN_TIMEOUT_S = 200
RUN_TIMEOUT_S = 400
CHANGE_TIMEOUT_S = 100
BUTTON_TIMEOUT_S = 5  # shorter: a button may have nothing to do where it stands
STILL_S = 0.3  # a picture that has not changed for this long is taken to be finished
FRAME_S = 1.0  # after a button: it may have started an animation, whose frames take less than this
# a picture that still changes this long after the kernel became idle moves by itself
ANIMATION_S = 1.5
PICTURES = ".widget-html img, img.widget-image, canvas, .widget-output img"
# What a person can move: ipywidgets' sliders, plain sliders, lists, ticks, buttons
CONTROLS = ".widget-slider, input[type=range], select, input[type=checkbox], button:not([disabled])"


class LabPage:
    """One notebook in one browser page. Every method that waits fails with what it saw last."""

    def __init__(self, page: Page, name: str, shots: Path | None) -> None:
        self.page, self.name, self._shots = page, name, shots
        self.page_errors: list[str] = []
        page.on("pageerror", lambda error: self.page_errors.append(str(error)))

    def wait_ready(self) -> None:
        """Return once the notebook is shown and its kernel has answered."""
        self._poll(READY, lambda path: path == self.name, "kernel ready", OPEN_TIMEOUT_S)

    def run_all(self) -> int:
        """Run All by the menu; return how many code cells have run, or fail with the first errors.

        The stored outputs are cleared first: a stored [5] looks just like a finished cell.
        """
        self.page.evaluate(
            "() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')"
        )
        self._poll(
            CELLS, lambda state: not any(c["done"] for c in state["cells"]), "outputs cleared", 10
        )
        self.page.locator(".lm-MenuBar-item", has_text="Run").first.click()
        self.page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()

        def finished(state: Any) -> bool:
            errors = any(c["error"] for c in state["cells"])
            return errors or (state["idle"] and all(c["done"] for c in state["cells"] if c["code"]))

        state = self._poll(CELLS, finished, "Run All", RUN_TIMEOUT_S)
        errors = [f"cell {i}: {c['error']}" for i, c in enumerate(state["cells"]) if c["error"]]
        assert not errors, f"{self.name}: {'; '.join(errors)}"
        return sum(c["code"] for c in state["cells"])

    def widget_cells(self) -> list[int]:
        """Positions of the cells that are tagged ``widget``."""
        return [
            i
            for i, cell in enumerate(self.page.evaluate(CELLS)["cells"])
            if "widget" in cell["tags"]
        ]

    def cell(self, index: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def run_cell(self, index: int) -> str:
        """Click beside a cell and press Ctrl-Enter; return what stands below it once it has run,
        error or not."""
        cell = self.cell(index)
        # its number, not its text: a click there would move the cursor
        cell.locator(".jp-InputPrompt").click()
        self.page.evaluate(WATCH_RUN, index)
        self.page.keyboard.press("Control+Enter")
        assert self.page.evaluate(ENDED, RUN_TIMEOUT_S), (
            f"{self.name}, cell {index}: not run in {RUN_TIMEOUT_S} s"
        )
        # its outputs are here then
        self._poll(IDLE, bool, f"kernel idle after cell {index}", RUN_TIMEOUT_S)
        outputs = cell.locator(".jp-OutputArea-output").all_inner_texts()  # without their numbers
        return " ".join(" ".join(outputs).split())

    def write(self, index: int, source: str) -> None:
        """Put the cursor into a cell and replace its whole text, as by a paste."""
        self.cell(index).locator(".cm-content").click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(source)
        written = self.source(index)
        assert written == source, f"{self.name}, cell {index}: the editor made {written!r} of it"

    def add_cell_below(self, index: int, source: str) -> int:
        """A new cell after another one, with the key B; return its position."""
        self.cell(index).locator(".jp-InputPrompt").click()
        self.page.keyboard.press("b")
        self.write(index + 1, source)
        return index + 1

    def source(self, index: int) -> str:
        return str(self.page.evaluate(SOURCE, index))

    def save(self) -> None:
        self.page.keyboard.press("Control+S")
        self._poll(SAVED, bool, "saved", CHANGE_TIMEOUT_S)

    def use_every_control(self, index: int) -> int:
        """Move each control of a widget cell and see a picture of that cell change; return the
        number of controls.

        A button may have nothing to do where it stands (a step back from the first frame), so of
        the buttons one has to change the picture; every other control has to do so by itself.
        """
        outputs = self.cell(index).locator(".jp-Cell-outputArea")
        where = f"{self.name}, cell {index}"
        outputs.locator(PICTURES).first.wait_for(timeout=CHANGE_TIMEOUT_S * 1000)
        self._check_layout(outputs, where)
        self.shot(f"cell{index:02d}_0_before", outputs)
        controls = outputs.locator(CONTROLS)
        labels, buttons, live_buttons = [], 0, 0
        for number in range(controls.count()):
            control = controls.nth(number)
            if not control.is_visible():
                continue
            label = _label(control)
            labels.append(label)
            changed = self._use(control, outputs)
            if _tag(control) == "button":
                buttons, live_buttons = buttons + 1, live_buttons + changed
            else:
                assert changed, (
                    f"{where}: {label!r} was moved to both its ends and the picture stayed as it was"
                )
            problem = outputs.locator("[role=alert]")
            assert not problem.count(), (
                f"{where}: after {label!r} the widget says {problem.first.inner_text()!r}"
            )
            self.shot(f"cell{index:02d}_{number + 1}_{label}", outputs)
        assert labels, f"{where}: tagged widget, but there is nothing to move"
        assert live_buttons or not buttons, (
            f"{where}: none of the {buttons} buttons changed the picture"
        )
        self._check_layout(outputs, where)
        return len(labels)

    def unnamed_pictures(self) -> list[str]:
        """Pictures below cells of which a screen reader can say nothing, as HTML."""
        return list(self.page.evaluate(UNNAMED))

    def shot(self, name: str, place: Locator | None = None) -> None:
        """Save what a person would see now, with ``place`` at the top if given; where no folder is
        named, nothing."""
        if self._shots is None:
            return
        if place is not None:
            place.evaluate("e => e.scrollIntoView({block: 'start'})")
        safe_name = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60]
        self.page.screenshot(path=self._shots / f"{Path(self.name).stem}_{safe_name}.png")

    def shut_down_kernel(self) -> None:
        self.page.evaluate(
            "() => window.jupyterapp.shell.currentWidget?.sessionContext?.shutdown()"
        )

    def _use(self, control: Locator, outputs: Locator) -> bool:
        """Move one control, to one end and if need be to the other; True once a picture has
        changed.

        A button that starts an animation is pressed again: the next control finds the picture at
        rest.
        """
        for far_end in (True, False):
            before = self._pixels(outputs)
            _move(self.page, control, far_end)
            button = _tag(control) == "button"
            patience = (FRAME_S, BUTTON_TIMEOUT_S) if button else (STILL_S, CHANGE_TIMEOUT_S)
            changed = self._changes(outputs, before, *patience)
            if changed == "moving" and button:
                control.click()
                stopped = self._changes(outputs, [], *patience) == "still"
                assert stopped, (
                    f"{self.name}: {_label(control)!r} does not stop when it is pressed again"
                )
            if changed != "no":
                return True
            if button:
                return False
        return False

    def _changes(
        self, outputs: Locator, before: list[str], still_s: float, timeout_s: float
    ) -> str:
        """Wait for a picture other than ``before``.

        Returns:
            "no"; "still" once it has rested for ``still_s`` and the kernel has nothing left to do;
            "moving" if it goes on changing although the kernel is idle.
        """
        end = time.monotonic() + timeout_s
        last, since, busy = before, time.monotonic(), time.monotonic()
        while (now := time.monotonic()) < end:
            seen = self._pixels(outputs)
            if not self.page.evaluate(IDLE):  # a drag queues one drawing per step
                busy = now
            if seen != last:
                last, since = seen, now
            if last != before and now - max(since, busy) > still_s:
                return "still"
            if last != before and now - busy > ANIMATION_S and now - since < still_s:
                return "moving"
            time.sleep(0.1)
        return "no" if last == before else "moving"

    def _pixels(self, outputs: Locator) -> list[str]:
        """What each picture shows; "" for one that is being replaced at this moment."""
        found = []
        for picture in outputs.locator(PICTURES).all():
            try:
                found.append(str(picture.evaluate(PIXELS)))
            except Error:
                found.append("")
        return found

    def _check_layout(self, outputs: Locator, where: str) -> None:
        """Pictures have a size and are not cut off at the right edge of the cell."""
        room = outputs.bounding_box()
        assert room is not None
        for picture in outputs.locator(PICTURES).all():
            box = picture.bounding_box()
            assert box is not None and box["width"] > 20 and box["height"] > 20, (
                f"{where}: an empty picture, {box}"
            )
            right, limit = box["x"] + box["width"], room["x"] + room["width"]
            assert right <= limit + 1, (
                f"{where}: the picture is cut off, it ends at {right:.0f} px of {limit:.0f}"
            )

    def _poll(self, script: str, accept: Callable[[Any], bool], what: str, timeout_s: float) -> Any:
        end, last = time.monotonic() + timeout_s, None
        while time.monotonic() < end:
            last = self.page.evaluate(script)
            if accept(last):
                return last
            time.sleep(0.25)
        raise AssertionError(f"{self.name}: {what}: not within {timeout_s} s, last seen {last}")


@contextlib.contextmanager
def open_notebook(
    browser: Browser, server: LabServer, name: str, shots: Path | None
) -> Iterator[LabPage]:
    """Open a notebook of the served folder in a new page; its kernel is shut down at the end."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    try:
        lab = LabPage(page, name, shots)
        page.goto(server.notebook_url(name), wait_until="domcontentloaded")
        lab.wait_ready()
        try:
            yield lab
        except Exception:
            lab.shot("failed")
            raise
        finally:
            lab.shut_down_kernel()
    finally:
        page.close()


def _tag(control: Locator) -> str:
    return str(control.evaluate("e => e.tagName.toLowerCase()"))


def _label(control: Locator) -> str:
    """The words beside a control, or what it is."""
    return str(control.evaluate(LABEL))


def _move(page: Page, control: Locator, far_end: bool) -> None:
    """Move a control away from where it stands: a slider to its far (or near) end, a list to its
    last (first) entry."""
    control.scroll_into_view_if_needed()
    tag = _tag(control)
    if tag == "select":
        options = control.locator("option").count()
        chosen = int(control.evaluate("e => e.selectedIndex"))
        control.select_option(index=options - 1 if (chosen < options - 1) == far_end else 0)
    elif tag == "button" or control.get_attribute("type") == "checkbox":
        control.click()
    else:
        _drag(page, control, far_end)


def _drag(page: Page, slider: Locator, far_end: bool) -> None:
    plain = _tag(slider) == "input"
    track = slider if plain else slider.locator(".noUi-base")
    box = track.bounding_box()
    assert box is not None
    if plain:
        share = float(slider.evaluate("e => (e.value - e.min) / ((e.max - e.min) || 1)"))
        x, y = box["x"] + 8 + share * (box["width"] - 16), box["y"] + box["height"] / 2
    else:
        handle = slider.locator(".noUi-handle").first.bounding_box()
        assert handle is not None
        x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
        share = (x - box["x"]) / box["width"]
    target = 0.95 if (share < 0.5) == far_end else 0.05
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(box["x"] + target * box["width"], y, steps=2)
    page.mouse.up()
