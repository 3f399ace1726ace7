"""Replayed traces against an oracle."""

import cachetools
import numpy as np
import pytest

from flserving.lab.measuring import caching
from flserving.lab.queueing.arrivals import Zipf
from flserving.serving.cache import ModelCache


@pytest.mark.parametrize("seed", range(5))
def test_replay_hits_where_cachetools_hits(seed):
    rng = np.random.default_rng(seed)
    trace, size = Zipf(12, 0.8).draw(rng, 300).tolist(), int(rng.integers(1, 8))
    oracle, expected = cachetools.LRUCache(size), []
    for key in trace:
        expected.append(key in oracle)
        oracle[key] = oracle.get(key, 0)
    assert caching.replay(ModelCache(size), trace).tolist() == expected


def test_replay_of_nothing_is_an_empty_array_of_bools():
    hits = caching.replay(ModelCache(2), [])
    assert hits.shape == (0,) and hits.dtype == np.bool_
