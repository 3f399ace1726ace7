"""Traces of requests, replayed on the real ``ModelCache`` or on a student's."""

from collections.abc import Hashable, Iterable

import numpy as np
import numpy.typing as npt

from flserving.serving.cache import ModelCache

_MODEL = np.zeros(0)  # stands in for a model where only the order of requests matters


def replay(cache: ModelCache, requests: Iterable[Hashable]) -> npt.NDArray[np.bool_]:
    """Ask ``cache`` for each key, and put it where it is missing; which requests were hits, bool
    [N]. 3 us each."""
    hits = []
    for key in requests:
        hit = cache.get(key) is not None
        if not hit:
            cache.put(key, _MODEL)
        hits.append(hit)
    return np.array(hits, np.bool_)
