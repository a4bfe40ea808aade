"""A net for tables."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """A multilayer perceptron: columns brought to one scale, then layers of equal width.

    Args:
        num_classes: Number of values to give for a row: scores of classes, or what a regression predicts.
        sample_shape: Number of columns.
        width: Features of each hidden layer.
        depth: Number of hidden layers.
        dropout: Share of features dropped after each hidden layer, when training.
    """

    def __init__(
        self, num_classes: int, sample_shape: tuple[int], width: int = 128, depth: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        # A batch norm without parameters: mean and spread of the columns, over all training batches so far.
        layers: list[nn.Module] = [nn.BatchNorm1d(sample_shape[0], affine=False, momentum=None)]
        sizes = [sample_shape[0], *[width] * depth]
        for size, following in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(size, following), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows of shape (batch, columns) to values of shape (batch, num_classes)."""
        values: Tensor = self.layers(rows)
        return values
