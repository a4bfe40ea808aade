"""torchvision's classification nets by name: all built without memory, some trained, weights from local files."""

from __future__ import annotations

import io
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from model.torchvision_net import TorchvisionNet, _for_channels
from torch import Tensor, nn
from torchvision import models
from torchvision.models.regnet import BlockParams

NAMES = models.list_models(torchvision.models)
# One of each family or so, and all of them among the long tests.
SOME_OF_THEM = [
    pytest.param(name, marks=() if number % 5 == 0 else pytest.mark.long) for number, name in enumerate(NAMES)
]


@pytest.mark.parametrize("name", SOME_OF_THEM)
def test_every_classification_net_gives_the_scores_of_the_classes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def params_on_cpu(*args: Any, **kwargs: Any) -> BlockParams:
        with torch.device("cpu"):
            return from_init_params(*args, **kwargs)

    # torchvision reads the widths of a regnet from tensors, which hold no values on the meta device.
    from_init_params = BlockParams.from_init_params
    monkeypatch.setattr(BlockParams, "from_init_params", params_on_cpu)
    with torch.device("meta"):
        net = TorchvisionNet(num_classes=7, sample_shape=(1, 224, 224), name=name)
        for mode in (True, False):
            scores = net.train(mode)(torch.empty(2, 1, 224, 224))
            assert isinstance(scores, Tensor) and scores.shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", 1),
        ("resnet18", 3),
        ("mobilenet_v3_small", 1),
        ("mobilenet_v3_small", 3),
        ("efficientnet_b0", 1),
        ("densenet121", 1),
        ("squeezenet1_0", 1),
        ("convnext_tiny", 1),
        ("regnet_y_400mf", 1),
        ("googlenet", 1),
        ("swin_t", 1),
        ("vit_b_16", 3),
    ],
)
def test_every_parameter_gets_a_gradient(name: str, channels: int) -> None:
    torch.manual_seed(0)
    net = TorchvisionNet(5, (channels, 32, 32), name)
    scores = net(torch.rand(2, channels, 32, 32))
    assert scores.shape == (2, 5)
    scores.square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_it_learns() -> None:
    torch.manual_seed(0)
    net = TorchvisionNet(2, (1, 32, 32), "resnet18")
    images, labels = torch.randn(16, 1, 32, 32), torch.arange(16) % 2
    images[labels == 1] += 1
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for _ in range(8):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"name": "resnet19"}, "name=resnet19 is no classification net.*nearest are: resnet18"),
        ({"name": "fasterrcnn_resnet50_fpn"}, "is no classification net"),
        ({"name": "quantized_resnet18"}, "is no classification net.*resnet18"),
        ({"name": "r3d_18"}, "is no classification net"),
        ({"name": "fcn_resnet50"}, "is no classification net.*resnet50"),
        ({"name": "ResNet"}, "is no classification net"),
        ({"name": "__init__"}, "is no classification net"),
        ({"name": "alexnet", "sample_shape": (1, 28, 28)}, r"alexnet cannot take images of shape \(1, 28, 28\): "),
        ({"name": "inception_v3", "sample_shape": (3, 32, 32)}, r"inception_v3 cannot take images"),
        ({"name": "vit_b_16", "sample_shape": (3, 32, 48)}, "it takes square ones only"),
        ({"name": "vit_b_16", "sample_shape": (3, 28, 28)}, "indivisible by patch size"),
        ({"name": "maxvit_t", "sample_shape": (3, 32, 32)}, "partition"),
    ],
)
def test_wrong_names_and_sizes_say_so(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        TorchvisionNet(**{"num_classes": 3, "sample_shape": (3, 64, 64)} | given)


def test_the_first_convolution_keeps_its_other_settings() -> None:
    for name in ("resnet18", "vit_b_16", "convnext_tiny"):
        ours = next(m for m in TorchvisionNet(3, (5, 64, 64), name).modules() if isinstance(m, nn.Conv2d))
        theirs = next(m for m in models.get_model(name).modules() if isinstance(m, nn.Conv2d))
        assert ours.in_channels == 5 and ours.weight.shape == (theirs.out_channels, 5, *theirs.kernel_size)
        assert str(ours).split(", kernel")[1] == str(theirs).split(", kernel")[1]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 13])
def test_other_channels_answer_grey_images_as_three_colours_did(channels: int) -> None:
    weight, grey = torch.randn(8, 3, 5, 5), torch.randn(2, 1, 16, 16)
    spread = _for_channels(weight, channels)
    expected = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight)
    answer = nn.functional.conv2d(grey.expand(-1, channels, -1, -1), spread)
    assert torch.allclose(answer, expected, atol=1e-4)
    assert channels != 3 or torch.equal(spread, weight)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's folder of downloads, empty; nothing can be fetched."""

    def no_network(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    return tmp_path / "hub" / "checkpoints"


def publish(hub: Path, name: str) -> dict[str, Tensor]:
    """Weights of a new net of ImageNet's classes, in the file that torchvision would have downloaded."""
    torch.manual_seed(1)
    state = models.get_model(name, weights=None, num_classes=1000).state_dict()
    hub.mkdir(parents=True, exist_ok=True)
    torch.save(state, hub / Path(models.get_model_weights(name)["DEFAULT"].url).name)
    return state


def test_pretrained_weights_have_the_names_of_the_net(hub: Path) -> None:
    published = publish(hub, "resnet18")
    net = TorchvisionNet(1000, (3, 64, 64), "resnet18")
    for name in ("DEFAULT", "IMAGENET1K_V1"):
        weights = net.pretrained_weights(name)
        net.load_state_dict(weights)
        assert all(torch.equal(net.net.state_dict()[key], value) for key, value in published.items())


def test_all_but_the_head_fits_a_net_for_other_classes_and_channels(hub: Path) -> None:
    published = publish(hub, "resnet18")
    net = TorchvisionNet(5, (1, 64, 64), "resnet18")
    weights = net.pretrained_weights("DEFAULT")
    own = net.state_dict()
    assert [key for key in own if weights[key].shape != own[key].shape] == ["net.fc.weight", "net.fc.bias"]
    expected = published["conv1.weight"].sum(dim=1, keepdim=True)
    assert torch.allclose(weights["net.conv1.weight"], expected, atol=1e-6)


def test_positions_of_a_vision_transformer_fit_the_image_size(hub: Path) -> None:
    publish(hub, "vit_b_32")
    net = TorchvisionNet(1000, (3, 64, 64), "vit_b_32")
    weights = net.pretrained_weights("DEFAULT")
    net.load_state_dict(weights)
    assert weights["net.encoder.pos_embedding"].shape == (1, 5, 768)


def test_unknown_weights_name_those_there_are(hub: Path) -> None:
    net = TorchvisionNet(5, (3, 64, 64), "resnet50")
    for name in ("IMAGENET", "resnet50", "__members__"):
        with pytest.raises(ValueError, match=f"no weights {name}; there are: IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"):
            net.pretrained_weights(name)


def test_without_a_network_the_address_and_the_folder_are_named(hub: Path) -> None:
    with pytest.raises(
        ValueError, match="resnet18: https://download.pytorch.org/.*pth .*checkpoints: .*not known"
    ) as e:
        TorchvisionNet(5, (3, 64, 64), "resnet18").pretrained_weights("DEFAULT")
    assert str(hub) in str(e.value) and "\n" not in str(e.value)


def test_a_download_with_other_bytes_is_refused(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "urlopen", lambda *args, **kwargs: Response(b"not the weights"))
    with pytest.raises(ValueError, match="invalid hash value"):
        TorchvisionNet(5, (3, 64, 64), "resnet18").pretrained_weights("DEFAULT")
    assert list(hub.glob("*.pth")) == []


class Response(io.BytesIO):
    """What urlopen returns."""

    def info(self) -> Any:
        return self

    def get_all(self, name: str) -> list[str]:
        return [str(len(self.getvalue()))]
