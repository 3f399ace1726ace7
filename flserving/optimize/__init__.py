"""Smaller and faster versions of a version: ``methods.py`` has them all, ``export.py`` writes ONNX
graphs, and ``distil.py`` trains a student from a teacher."""

from flserving.optimize.methods import METHODS, TOLERANCES, distil, prune, quantise, to_onnx

__all__ = ["METHODS", "TOLERANCES", "distil", "prune", "quantise", "to_onnx"]
