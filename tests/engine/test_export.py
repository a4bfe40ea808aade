"""Getting a trained model out: ONNX, `torch.export`, and what became of TorchScript."""

from __future__ import annotations

import copy
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engine
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy import Net, fit

onnx_only = pytest.mark.skipif(
    find_spec("onnx") is None or find_spec("onnxscript") is None, reason="onnx and onnxscript are not installed"
)


class Noisy(Net):
    """Behaves otherwise in training, and has a part that never trains."""

    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.frozen = nn.BatchNorm1d(1).eval()
        self.example_input_array = example

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.frozen(self.net(x))
        return y if scale is None else y * scale


def expected(model: engine.Module, x: Tensor) -> Tensor:
    evaluating: engine.Module = copy.deepcopy(model).eval()
    with torch.no_grad():
        return evaluating(x)


@pytest.mark.parametrize("fitted", [False, True], ids=["new", "after fit"])
def test_torch_export_takes_a_module_as_it_is(fitted: bool) -> None:
    model, x = Noisy(), torch.randn(4, 3)
    if fitted:
        fit(model)
        assert model.trainer.lightning_module is model
    model.eval()
    program = torch.export.export(model, (x,))
    torch.export.save(program, "model.pt2")
    assert torch.export.load("model.pt2").module()(x).equal(expected(model, x))
    assert not fitted or model.trainer.global_step == 4


def test_a_module_can_be_pickled_and_copied_after_fit() -> None:
    fit(model := Net())
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert again(torch.ones(1, 3)).equal(model(torch.ones(1, 3))) and again._trainer is None
    torch.save(model.state_dict(), "weights.pt")
    Net().load_state_dict(torch.load("weights.pt", weights_only=True))


@onnx_only
@pytest.mark.parametrize("sample", ["given", "example", "tuple", "dict"])
def test_onnx_gives_the_same_numbers(sample: str) -> None:
    x = torch.randn(4, 3)
    examples = {"tuple": (x, torch.tensor(2.0)), "dict": {"x": x, "scale": torch.tensor(2.0)}, "example": x}
    model = Noisy(examples.get(sample))
    fit(model)
    modes = [part.training for part in model.modules()]
    program = model.to_onnx("model.onnx", x if sample == "given" else None, dynamo=True)
    assert [part.training for part in model.modules()] == modes and True in modes and False in modes
    scale = 2 if sample in ("tuple", "dict") else 1
    inputs = [value.numpy() for value in ((x, torch.tensor(2.0)) if scale == 2 else (x,))]
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load("model.onnx"))
    (output,) = evaluator.run(None, dict(zip(evaluator.input_names, inputs, strict=True)))
    np.testing.assert_allclose(output, scale * expected(model, x).numpy(), rtol=1e-4, atol=1e-6)
    assert type(program).__name__ == "ONNXProgram"


@onnx_only
def test_onnx_without_a_file_or_without_an_input() -> None:
    assert Net().to_onnx(input_sample=torch.ones(1, 3)) is not None and not list(Path().iterdir())
    with pytest.raises(engine.MisconfigurationException, match="no input; give input_sample, or set self.example"):
        Net().to_onnx("model.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # None there is how Python notes a module that cannot be imported; a spec is then missing, too.
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr("engine.export.find_spec", lambda name: None if name == package else find_spec("torch"))
    with pytest.raises(engine.MisconfigurationException, match=f"to_onnx needs {package}; run: pip install"):
        Net().to_onnx("model.onnx", torch.ones(1, 3))


def test_torchscript_is_refused_with_what_came_after_it() -> None:
    with pytest.raises(engine.MisconfigurationException, match=r"deprecated; use torch.export.export\(model"):
        Net().to_torchscript("model.pt", method="trace")
