"""Image classification nets of torchvision, by name: resnet18, efficientnet_b0, vit_b_16 and the like."""

from __future__ import annotations

import difflib
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings


class TorchvisionNet(nn.Module):
    """One of torchvision's classification nets, for images of any size and number of channels that it can take.

    Args:
        num_classes: Number of scores to give for an image.
        sample_shape: Channels, height and width of an image.
        name: Name of the net in torchvision.models.
    """

    def __init__(self, num_classes: int, sample_shape: tuple[int, int, int], name: str = "resnet18") -> None:
        super().__init__()
        known = models.list_models(torchvision.models)
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 3) or known
            raise ValueError(
                f"name={name} is no classification net of torchvision.models; the nearest are: {', '.join(nearest)}"
            )
        self.name, self.sample_shape = name, tuple(sample_shape)
        channels, height, width = sample_shape
        try:
            self.net = models.get_model(name, num_classes=num_classes, **_arguments(name, height, width))
            first = _first_convolution(self.net)
            first.weight = nn.Parameter(_for_channels(first.weight.detach(), channels))
            first.in_channels = channels
            self._try()
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{name} cannot take images of shape {self.sample_shape}: {reason}") from error

    def forward(self, images: Tensor) -> Tensor:
        """Images of shape (batch, channels, height, width) to scores of shape (batch, num_classes)."""
        scores: Tensor = self.net(images)
        return scores

    def pretrained_weights(self, weights: str) -> dict[str, Tensor]:
        """Weights that torchvision offers for this net, under the names in this net's `state_dict`.

        They are fetched once, into torch.hub's folder. The first convolution is adapted to the number of channels, and
        the positions of a vision transformer to the image size; the last layer is as trained, with its own classes.

        Args:
            weights: "DEFAULT", or another name that torchvision has for them, such as "IMAGENET1K_V1".

        Raises:
            ValueError: There are none of that name, or they cannot be fetched.
        """
        offered = models.get_model_weights(self.name)
        if weights not in offered.__members__:
            raise ValueError(f"{self.name} has no weights {weights}; there are: {', '.join(offered.__members__)}")
        chosen = offered[weights]
        try:
            state: dict[str, Tensor] = chosen.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"weights {weights} of {self.name}: {chosen.url} cannot be read or fetched into "
                f"{torch.hub.get_dir()}/checkpoints: {reason}"
            ) from error
        if isinstance(self.net, models.VisionTransformer):
            state = interpolate_embeddings(self.net.image_size, self.net.patch_size, state)
        first = _first_convolution(self.net)
        key = next(name for name, module in self.net.named_modules() if module is first) + ".weight"
        state[key] = _for_channels(state[key], first.in_channels)
        return {f"net.{name}": value for name, value in state.items()}

    def _try(self) -> None:
        """Find out, without computing anything, whether the net can take such images."""
        state = [*self.named_parameters(), *self.named_buffers()]
        shapes = {name: torch.empty_like(value, device="meta") for name, value in state}
        self.eval()
        torch.func.functional_call(self, shapes, (torch.empty(1, *self.sample_shape, device="meta"),))
        self.train()


def _arguments(name: str, height: int, width: int) -> dict[str, Any]:
    """What some nets must be told to take such images, and to give one tensor."""
    if name.startswith("vit"):
        if height != width:
            raise ValueError("it takes square ones only")
        return {"image_size": height}
    if name.startswith("maxvit"):
        return {"input_size": (height, width)}
    if name in ("inception_v3", "googlenet"):
        return {"aux_logits": False, "init_weights": True}
    return {}


def _first_convolution(net: nn.Module) -> nn.Conv2d:
    return next(module for module in net.modules() if isinstance(module, nn.Conv2d))


def _for_channels(weight: Tensor, channels: int) -> Tensor:
    """Weights of a convolution of 3 colours, spread over other channels.

    The colours go round, and each is shared evenly by its channels: so an image with the same values in all channels
    gives what it gave with 3. A single channel gets the sum of the colours.

    Args:
        weight: Shape (channels out, 3, height, width).
        channels: Number of channels to spread them over.

    Returns:
        Shape (channels out, channels, height, width).
    """
    colours = weight.shape[1]
    channel, colour = torch.arange(channels)[:, None], torch.arange(colours)
    goes = (channel % colours == colour % channels).to(weight)
    return torch.einsum("ck,okhw->ochw", goes / goes.sum(dim=0), weight).contiguous()
