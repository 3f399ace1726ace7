"""Widgets: a figure that answers the hand. Where no kernel runs, the same figure stands still.

``explore.py`` puts sliders over a model and a drawing; ``player.py`` plays a ``recording.py`` frame
by frame; ``draw.py`` is a canvas whose digits go to a real REST API.
"""
