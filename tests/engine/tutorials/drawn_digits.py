"""Digits of a kind, 8 by 8: ten patterns, and noise."""

import torch
from torch.utils.data import TensorDataset


def digits(n, seed=0):
    patterns = torch.rand(10, 8, 8, generator=torch.Generator().manual_seed(1)).round()
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (n,), generator=g)
    return TensorDataset(patterns[y] + 0.3 * torch.randn(n, 8, 8, generator=g), y)
