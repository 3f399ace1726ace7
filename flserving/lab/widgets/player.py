"""The player: a recording drawn on a canvas in the browser, with play, step and a slider. Works
offline."""

from pathlib import Path
from typing import Any

import anywidget
import traitlets

from flserving.errors import ConfigError
from flserving.lab.style import is_static
from flserving.lab.widgets.recording import Recording, draw_frame


class Player(anywidget.AnyWidget):
    """Plays a ``Recording``. ``index`` (the frame, from 0) and ``playing`` follow the buttons and
    can be set.

    Keys, once the player has the focus: space plays and pauses, arrows step, Home and End jump.
    Boxes with a key slide unless the system asks for reduced motion. Colours follow JupyterLab's
    theme.

    Cost: the recording travels to the browser once, about 50 bytes a box; a step is drawn there,
    without the kernel.
    """

    _esm = Path(__file__).with_name("player.js")
    _css = Path(__file__).with_name("player.css")
    recording = traitlets.Dict().tag(sync=True)
    index = traitlets.Int(0).tag(sync=True)
    playing = traitlets.Bool(False).tag(sync=True)
    interval_ms = traitlets.Int(700).tag(sync=True)

    def __init__(self, recording: Recording, *, interval_ms: int = 700, **traits: Any) -> None:
        if not 20 <= interval_ms <= 60_000:
            raise ConfigError(
                f"interval_ms is {interval_ms}: a frame must stay between 20 and 60,000 ms"
            )
        super().__init__(recording=recording.as_dict(), interval_ms=interval_ms, **traits)

    @traitlets.validate("index")
    def _inside(self, proposal: dict[str, Any]) -> int:
        return max(0, min(int(proposal["value"]), len(self.recording.get("frames", [0])) - 1))


def play(recording: Recording, *, interval_ms: int = 700) -> Player | None:
    """Show the player; end the cell with this call. With FLSERVING_STATIC=1 draw every frame and
    show nothing."""
    if not is_static():
        return Player(recording, interval_ms=interval_ms)
    for index in range(len(recording.frames)):
        draw_frame(recording, index)
    return None
