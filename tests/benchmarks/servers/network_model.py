"""The model that every server of the benchmark answers with."""

from itertools import pairwise

import torch
from torch import nn


def build(sizes: list[int]) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval().requires_grad_(False)
