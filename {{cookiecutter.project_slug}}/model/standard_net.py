"""Your net. As it stands, it is a small convolutional network for small images."""

from __future__ import annotations

from torch import Tensor, nn


class StandardNet(nn.Module):
    """Two stages of convolutions, averaging over the image, and a linear layer.

    Args:
        num_classes: Number of scores to give for an image.
        sample_shape: Channels, height and width of an image.
        width: Channels of the first stage; the second has twice as many.
        dropout: Share of features dropped before the last layer, when training.
    """

    # FILL IN: your layers. Every argument with a type becomes a flag: --model.width 64
    def __init__(
        self,
        num_classes: int,
        sample_shape: tuple[int, int, int],
        width: int = 32,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(sample_shape[0], width),
            *_convolution(width, width),
            nn.MaxPool2d(2),
            *_convolution(width, 2 * width),
            *_convolution(2 * width, 2 * width),
        )
        self.classify = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images of shape (batch, channels, height, width) to scores of shape (batch, num_classes)."""
        # FILL IN: what your net computes.
        scores: Tensor = self.classify(self.features(images))
        return scores


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]
