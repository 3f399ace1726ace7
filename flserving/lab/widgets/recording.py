"""What a player plays: coloured boxes in lanes on one axis, frame by frame. Plain values; no
widget, no notebook.

A ``Recording`` has two kinds of boxes. Boxes of the *recording* lie on a time axis and are drawn as
far as ``frame.now``: a timeline that grows. Boxes of a *frame* are drawn whole, in that frame only:
a cache as it stands after request 7. A box with the same ``key`` in two consecutive frames slides
from its old place to its new one.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flserving.errors import ConfigError
from flserving.lab import style
from flserving.lab.queueing.simulate import BatchTrace

MAX_BOXES = 20_000  # a notebook and a canvas bear about a megabyte of boxes
MAX_FRAMES = 2_000


@dataclass(frozen=True, slots=True)
class Box:
    """A box in ``lane`` from ``start`` to ``end`` on the axis (equal: a tick); ``kind`` picks its
    colour."""

    lane: str
    start: float
    end: float
    label: str = ""
    kind: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """One moment: what it is called, its own boxes, and up to where the recording's boxes are drawn
    (None: whole)."""

    caption: str
    boxes: tuple[Box, ...] = ()
    now: float | None = None


@dataclass(frozen=True)
class Recording:
    """Frames over one set of lanes and one axis.

    Args:
        lanes: Names, top to bottom.
        frames: At least one.
        x_label: Axis label with its unit.
        boxes: Boxes that all frames share.
        x_range: Both ends of the axis; None takes them from the boxes.
        kinds: Order of the kinds, and so of their colours; kinds that are not named follow as they
            appear.

    Raises:
        ConfigError: No frame, a lane twice, a box in an unknown lane or with a broken extent, or
            too many of them.
    """

    lanes: tuple[str, ...]
    frames: tuple[Frame, ...]
    x_label: str
    boxes: tuple[Box, ...] = ()
    x_range: tuple[float, float] | None = None
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        everything = self._everything()
        if not self.frames or not self.lanes or len(set(self.lanes)) != len(self.lanes):
            raise ConfigError(
                f"{len(self.frames)} frames over lanes {self.lanes}: give at least one of each, no lane twice"
            )
        if len(everything) > MAX_BOXES or len(self.frames) > MAX_FRAMES:
            raise ConfigError(
                f"{len(everything)} boxes in {len(self.frames)} frames is too much: at most {MAX_BOXES} in {MAX_FRAMES}"
            )
        for box in everything:
            if box.lane not in self.lanes:
                raise ConfigError(f"{box} lies in no lane: the lanes are {self.lanes}")
            finite = math.isfinite(box.start) and math.isfinite(box.end)
            if not finite or box.start > box.end:
                raise ConfigError(f"{box} has no extent: it needs finite start <= end")

    def _everything(self) -> list[Box]:
        boxes = list(self.boxes)
        for frame in self.frames:
            boxes += frame.boxes
        return boxes

    def colours(self) -> dict[str, str]:
        """Colour of each kind, ``#rrggbb``."""
        appearing = [box.kind for box in self._everything()]
        kinds = dict.fromkeys([*self.kinds, *appearing])
        return dict(zip(kinds, itertools.cycle(style.COLOURS), strict=False))

    def extent(self) -> tuple[float, float]:
        """Both ends of the axis; never equal."""
        if self.x_range is not None:
            low, high = self.x_range
        else:
            boxes = self._everything()
            low = min((box.start for box in boxes), default=0.0)
            high = max((box.end for box in boxes), default=1.0)
        if high <= low:
            high = low + 1
        return low, high

    def visible(self, index: int) -> list[Box]:
        """The boxes of one frame, those of the recording cut at its ``now``."""
        frame = self.frames[index]
        now = math.inf
        if frame.now is not None:
            now = frame.now
        shared = []
        for box in self.boxes:
            if box.start <= now:
                end = min(box.end, now)
                shared.append(replace(box, end=end))
        return [*shared, *frame.boxes]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: boxes as [lane number, start, end, label, kind number, key]."""
        colours = self.colours()
        lane_number = {lane: number for number, lane in enumerate(self.lanes)}
        kind_number = {kind: number for number, kind in enumerate(colours)}

        def packed(boxes: Iterable[Box]) -> list[list[Any]]:
            found = []
            for box in boxes:
                lane = lane_number[box.lane]
                kind = kind_number[box.kind]
                found.append([lane, box.start, box.end, box.label, kind, box.key])
            return found

        frames = []
        for frame in self.frames:
            shown = {"caption": frame.caption, "now": frame.now}
            frames.append({**shown, "boxes": packed(frame.boxes)})
        return {
            "lanes": list(self.lanes),
            "kinds": [[kind, colour] for kind, colour in colours.items()],
            "x_label": self.x_label,
            "x_range": list(self.extent()),
            "boxes": packed(self.boxes),
            "frames": frames,
        }


def draw_frame(recording: Recording, index: int = -1) -> Figure:
    """One frame as a figure: what the page shows where no kernel runs. Index -1 is the last
    frame."""
    fig, (ax,) = style.figure(height_in=1.3 + 0.42 * len(recording.lanes))
    with style.styled():
        low, high = recording.extent()
        colours = recording.colours()
        for box in recording.visible(index):
            row = recording.lanes.index(box.lane)
            width = max(box.end - box.start, (high - low) / 400)
            colour = colours[box.kind]
            ax.barh(
                row,
                width,
                left=box.start,
                height=0.72,
                color=colour,
                edgecolor="white",
                linewidth=0.8,
            )
            characters = int(width / (high - low) * 85)  # of the axis' width, at this font size
            if box.label and characters >= 1:
                text = box.label
                if len(text) > characters:
                    text = text[: characters - 1] + "…"
                shade = "black" if _lightness(colour) > 0.45 else "white"
                middle = box.start + width / 2
                ax.text(middle, row, text, ha="center", va="center", fontsize=9, color=shade)
        now = recording.frames[index].now
        if now is not None:
            ax.axvline(now, color="#333333", linewidth=1)
        ax.set_yticks(range(len(recording.lanes)), recording.lanes)
        ax.set(xlim=(low, high), ylim=(len(recording.lanes) - 0.5, -0.5), xlabel=recording.x_label)
        ax.set_title(recording.frames[index].caption)
        ax.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10], integer=high - low >= 3))
        ax.grid(axis="y", visible=False)
        named = [kind for kind in colours if kind]
        if named:
            handles: list[Any] = [ax.barh(0, 0, color=colours[kind]) for kind in named]
            fig.legend(handles, named, loc="outside upper right", ncols=len(named))
    return fig


def cache_recording(steps: Sequence[tuple[str, bool, Sequence[str]]], capacity: int) -> Recording:
    """A cache as it fills and evicts.

    Args:
        steps: For each request the key asked for, whether it was a hit, and the keys held
            afterwards, coldest first.
        capacity: Places in the cache.
    """
    frames = [Frame("before the first request: the cache is empty")]
    before = set[str]()
    places = capacity
    for number, (asked, hit, held) in enumerate(steps, start=1):
        gone = sorted(before - set(held))
        boxes = []
        for place, key in enumerate(held):
            kind = "kept"
            if key == asked:
                kind = "hit" if hit else "loaded"
            boxes.append(Box("in memory", place, place + 1, key, kind, key))
        for place, key in enumerate(gone):
            boxes.append(Box("evicted", place, place + 1, key, "evicted", key))
        news = "a hit"
        if not hit:
            news = "a miss, loaded"
            if gone:
                news += f"; {', '.join(gone)} evicted"
        frames.append(Frame(f"request {number}: {asked} is {news}", tuple(boxes)))
        before = set(held)
        places = max(places, len(held))
    return Recording(
        lanes=("in memory", "evicted"),
        frames=tuple(frames),
        x_label="place in the cache, coldest first",
        x_range=(0, places),
        kinds=("kept", "evicted", "hit", "loaded"),
    )


def batch_recording(trace: BatchTrace, max_batch_size: int) -> Recording:
    """The timeline of batches: a tick per arrival, a box per batch with its size, a frame per
    event. Axis in ms."""
    workers = int(trace.worker.max(initial=0)) + 1
    arrival_ms = 1e3 * trace.arrival_s
    start_ms = 1e3 * trace.batch_start_s
    end_ms = 1e3 * trace.batch_end_s
    boxes = [Box("arrivals", at, at, "", "arrival") for at in arrival_ms.tolist()]
    for worker, start, end, size in zip(
        trace.worker, start_ms, end_ms, trace.batch_size, strict=True
    ):
        kind = "full batch" if size >= max_batch_size else "part-filled batch"
        boxes.append(Box(f"worker {worker}", float(start), float(end), str(size), kind))
    frames = []
    moments = {*arrival_ms.tolist(), *start_ms.tolist(), *end_ms.tolist()}
    begun_ms = start_ms[trace.batch]
    for now in sorted(moments or {0.0}):
        waits = (arrival_ms <= now) & (begun_ms > now)
        runs = (start_ms <= now) & (end_ms > now)
        waiting = int(waits.sum())
        busy = int(runs.sum())
        frames.append(
            Frame(f"{now:.1f} ms: {waiting} waiting, {busy} of {workers} workers busy", now=now)
        )
    lanes = ("arrivals", *(f"worker {worker}" for worker in range(workers)))
    kinds = ("arrival", "part-filled batch", "full batch")
    return Recording(lanes, tuple(frames), "time (ms)", tuple(boxes), kinds=kinds)


def _lightness(colour: str) -> float:
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue
