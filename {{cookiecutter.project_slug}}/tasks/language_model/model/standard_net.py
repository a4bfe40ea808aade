"""Your net. As it stands, it is a small transformer that tells the next letter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StandardNet(nn.Module):
    """A decoder: letters and places as vectors, blocks of attention to what came before, and a score for each letter.

    Blocks are normed first, as in GPT-2 (Radford et al. 2019).

    Args:
        num_classes: Number of different letters.
        width: Features of a letter.
        depth: Number of blocks.
        heads: Attention heads of a block; each has width / heads features.
        longest: Letters of the longest piece that is read.
        dropout: Share of features dropped after attention and layers, when training.
    """

    # FILL IN: your layers. Every argument with a type becomes a flag: --model.width 128
    def __init__(
        self,
        num_classes: int,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        longest: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width}, heads={heads}: give a width that the heads can share evenly")
        self.letters, self.places = nn.Embedding(num_classes, width), nn.Embedding(longest, width)
        self.blocks = nn.Sequential(*[Block(width, heads, dropout) for _ in range(depth)])
        self.tell = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))

    def forward(self, codes: Tensor) -> Tensor:
        """Letters of shape (batch, length) to scores of the next ones, of shape (batch, length, num_classes)."""
        # FILL IN: what your net computes.
        if codes.shape[1] > self.places.num_embeddings:
            raise ValueError(
                f"pieces have {codes.shape[1]} letters; give --model.longest {codes.shape[1]}, or shorter ones"
            )
        features = self.letters(codes) + self.places(torch.arange(codes.shape[1], device=codes.device))
        scores: Tensor = self.tell(self.blocks(features))
        return scores


class Block(nn.Module):
    """Attention to a letter and those before it, then two layers for each letter; both are added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.ask, self.merge = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        layers = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        self.layers, self.drop = nn.Sequential(*layers), nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Features of shape (batch, length, width), and back."""
        parts = self.ask(self.before(features)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True).transpose(1, 2).flatten(2)
        features = features + self.drop(self.merge(seen))
        return features + self.drop(self.layers(features))
