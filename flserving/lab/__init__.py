"""What the notebooks see. May import everything; nothing imports it.

Figures: ``plots.py`` in the look of ``style.py``, in words by ``alt.py``; ``widgets`` move.
Commands: ``opening.py`` opens the course, ``exercises.py`` writes students' copies,
``report_card.py`` their report, ``pages`` books and slides. The student's answers and parts are in
the ``workbook``; ``checks`` judge exercises, ``quizzes`` ask. Experiments: ``queueing`` in theory,
``measuring`` for real, over a ``network``, with ``federated`` clients, and with ``releases``.
"""

from flserving.extras import of_extra

with of_extra("course"):
    from flserving.lab.measuring.load import (
        closed_loop,
        closed_loop_async,
        open_loop,
        open_loop_async,
    )
    from flserving.lab.measuring.report import LoadReport
    from flserving.lab.queueing.arrivals import Bursty, Poisson, Zipf
    from flserving.lab.queueing.simulate import BatchTrace, simulate_batching
    from flserving.lab.style import COLOURS, figure, label, use_style
    from flserving.lab.widgets.explore import Explorer, explore
    from flserving.lab.widgets.player import Player, play
    from flserving.lab.widgets.recording import (
        Box,
        Frame,
        Recording,
        batch_recording,
        cache_recording,
        draw_frame,
    )
    from flserving.lab.workbook import sentences
    from flserving.lab.workbook.answers import guess, quiz, reveal
    from flserving.lab.workbook.sources import show
    from flserving.lab.workbook.stack import keep, kept

    sentences.install()

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
    "guess",
    "keep",
    "kept",
    "label",
    "open_loop",
    "open_loop_async",
    "play",
    "quiz",
    "reveal",
    "show",
    "simulate_batching",
    "use_style",
]
