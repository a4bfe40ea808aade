"""Your net. As it stands, it is a small residual network for the rows of a table."""

from __future__ import annotations

from torch import Tensor, nn


class StandardNet(nn.Module):
    """Columns brought to one scale, residual blocks, and a linear layer (Gorishniy et al. 2021, ResNet for tables).

    Args:
        num_classes: Number of values to predict for a row.
        sample_shape: Number of columns.
        width: Features between blocks; within a block there are twice as many.
        depth: Number of blocks.
        dropout: Share of features dropped within a block, when training.
    """

    # FILL IN: your layers. Every argument with a type becomes a flag: --model.width 64
    def __init__(
        self, num_classes: int, sample_shape: tuple[int], width: int = 64, depth: int = 2, dropout: float = 0.2
    ) -> None:
        super().__init__()
        # A batch norm without parameters: mean and spread of the columns, over all training batches so far.
        self.scale = nn.BatchNorm1d(sample_shape[0], affine=False, momentum=None)
        self.enter = nn.Linear(sample_shape[0], width)
        self.blocks = nn.ModuleList(_block(width, dropout) for _ in range(depth))
        self.predict = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, num_classes))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows of shape (batch, columns) to values of shape (batch, num_classes)."""
        # FILL IN: what your net computes.
        features: Tensor = self.enter(self.scale(rows))
        for block in self.blocks:
            features = features + block(features)
        values: Tensor = self.predict(features)
        return values


def _block(width: int, dropout: float) -> nn.Module:
    wide = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(dropout))
    return nn.Sequential(*wide, nn.Linear(2 * width, width))
