"""What the notebooks see: plots, widgets, load, theory, exercise checks. May import everything; nothing imports it."""

from flserving.extras import of_extra

with of_extra("course"):
    from flserving.lab.arrivals import Bursty, Poisson, Zipf
    from flserving.lab.explore import Explorer, explore
    from flserving.lab.load import closed_loop, closed_loop_async, open_loop, open_loop_async
    from flserving.lab.player import Player, play
    from flserving.lab.recording import Box, Frame, Recording, batch_recording, cache_recording, draw_frame
    from flserving.lab.report import LoadReport
    from flserving.lab.simulate import BatchTrace, simulate_batching
    from flserving.lab.style import COLOURS, figure, label, use_style

__all__ = [
    "COLOURS",
    "BatchTrace",
    "Box",
    "Bursty",
    "Explorer",
    "Frame",
    "LoadReport",
    "Player",
    "Poisson",
    "Recording",
    "Zipf",
    "batch_recording",
    "cache_recording",
    "closed_loop",
    "closed_loop_async",
    "draw_frame",
    "explore",
    "figure",
    "label",
    "open_loop",
    "open_loop_async",
    "play",
    "simulate_batching",
    "use_style",
]
