"""Every notebook, opened in the real JupyterLab: Run All, move every control of every widget, see its picture change.

One notebook: ``python -m pytest tests/browser -k 03``. Screenshots of every step: set FLSERVING_SHOTS to a folder.
"""

import pytest

from conftest import NOTEBOOKS
from sample_notebook import write_samples

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_every_widget_of_the_notebook_moves_its_picture(open_in_lab, name):
    with open_in_lab(name) as page:
        page.shot("0_open")
        assert page.run_all() > 0
        page.shot("1_run_all")
        for index in page.widget_cells():
            page.use_every_control(index)
        assert not page.page_errors


@pytest.fixture(scope="module")
def samples(served_folder):
    write_samples(served_folder)


def test_the_harness_moves_sliders_lists_ticks_and_an_animated_canvas(open_in_lab, samples):
    with open_in_lab("working.ipynb") as page:
        assert page.run_all() == 3
        image, canvas = page.widget_cells()
        assert page.use_every_control(image) == 3
        assert page.use_every_control(canvas) == 4
        assert not page.page_errors


def test_the_harness_sees_what_is_broken(open_in_lab, samples, monkeypatch):
    monkeypatch.setattr("lab_page.CHANGE_TIMEOUT_S", 2)
    with open_in_lab("broken.ipynb") as page:
        with pytest.raises(AssertionError, match=r"broken\.ipynb: cell 7: ZeroDivisionError"):
            page.run_all()
        dead_slider, dead_button, no_control, cut_off, alert, _ = page.widget_cells()
        with pytest.raises(AssertionError, match="'dead' was moved to both its ends and the picture stayed"):
            page.use_every_control(dead_slider)
        with pytest.raises(AssertionError, match="none of the 1 buttons changed the picture"):
            page.use_every_control(dead_button)
        with pytest.raises(AssertionError, match="nothing to move"):
            page.use_every_control(no_control)
        with pytest.raises(AssertionError, match="the picture is cut off"):
            page.use_every_control(cut_off)
        with pytest.raises(AssertionError, match="the widget says 'ZeroDivisionError: at the end of the slider'"):
            page.use_every_control(alert)
