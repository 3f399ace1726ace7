"""A canvas to draw a digit on: the browser itself asks the REST API, as any web client would. Works
offline."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from flserving.api.client import Client
from flserving.api.endpoint import Endpoint
from flserving.errors import ConfigError, FlservingError
from flserving.lab.style import is_static

PIXELS = 64  # an image of the digits data set: 8 x 8 pixels of 0 to 16
FULL = 16


class DigitCanvas(anywidget.AnyWidget):
    """Shows what a model of the endpoint says to the drawing, while it is drawn.

    The page tells its origin, the endpoint is told to let pages of this origin call (CORS), and the
    page gets the credential: by a message, never as state, which a notebook may store. From then on
    the page calls the endpoint without the kernel. Where it cannot reach it, it says why and asks
    the kernel to call.

    ``pixels`` is the drawing (64 whole numbers from 0 to 16; set it to show another one),
    ``answer`` what came back, ``origin`` the page's.
    """

    _esm = Path(__file__).with_name("draw.js")
    _css = Path(__file__).with_name("draw.css")
    url = traitlets.Unicode().tag(sync=True)
    examples = traitlets.List(traitlets.List()).tag(sync=True)
    pixels = traitlets.List([0] * PIXELS).tag(sync=True)
    answer = traitlets.Dict().tag(sync=True)
    origin = traitlets.Unicode("")

    def __init__(
        self, endpoint: Endpoint, model: str = "digits", examples: Iterable[Sequence[float]] = ()
    ) -> None:
        self.endpoint = endpoint
        self.model_name = model
        self._client = Client(endpoint.url, endpoint.token, ca=endpoint.options.certificate)
        images = [_checked(image) for image in examples]
        super().__init__(url=f"{endpoint.url}/v2/models/{model}/infer", examples=images)
        self.on_msg(self._hear)

    @traitlets.validate("pixels")
    def _whole(self, proposal: dict[str, Any]) -> list[int]:
        return _checked(proposal["value"])

    def ask(self, pixels: Sequence[float]) -> dict[str, Any]:
        """What the kernel answers a page that cannot call by itself: version and probabilities, or
        the error's text."""
        try:
            answer = self._client.predict([pixels], model=self.model_name)
        except FlservingError as error:
            return {"error": f"The kernel asked, and got {type(error).__name__}: {error}"}
        return {"version": answer["model_version"], "probabilities": answer["probabilities"][0]}

    def _hear(self, _: object, said: dict[str, Any], __: object) -> None:
        if said["kind"] == "hello":
            welcome = self._welcome(said["origin"])
            self.send({"kind": "welcome", "view": said["view"], **welcome})
        elif said["kind"] == "infer":
            answer = self.ask(said["pixels"])
            self.send({"kind": "answer", "view": said["view"], **answer})

    def _welcome(self, origin: str) -> dict[str, Any]:
        self.origin = origin
        try:
            self.endpoint.allow_origin(origin)
        except (
            ConfigError
        ):  # "null", vscode-webview://...: a program that shows notebooks, not a page of the web
            return {
                "headers": {},
                "refused": f"Pages of the origin {origin!r} cannot be named, and so not be let in.",
            }
        return {"headers": self.endpoint.headers}

    def close(self) -> None:
        """Take the widget off its pages and let go of the connection; the endpoint stays open."""
        self._client.close()
        super().close()


def draw_digit(
    endpoint: Endpoint, model: str = "digits", examples: Iterable[Sequence[float]] = ()
) -> DigitCanvas | None:
    """Show the canvas; end the cell with this call. With FLSERVING_STATIC=1 ask for the examples
    and show nothing."""
    canvas = DigitCanvas(endpoint, model, examples)
    if not is_static():
        return canvas
    told = [canvas.ask(image) for image in canvas.examples]
    canvas.close()
    for answer in told:
        if "error" in answer:
            raise FlservingError(answer["error"])
    return None


def _checked(image: Sequence[float]) -> list[int]:
    pixels = [round(float(value)) for value in image]
    if len(pixels) != PIXELS or not all(0 <= value <= FULL for value in pixels):
        raise ConfigError(
            f"an image of {len(pixels)} pixels from {min(pixels, default=0)} to {max(pixels, default=0)}: "
            f"it has {PIXELS}, each from 0 to {FULL}"
        )
    return pixels
