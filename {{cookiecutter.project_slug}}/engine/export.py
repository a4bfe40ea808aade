"""What leaves the engine: a module's `forward` as ONNX. `torch.export.export` takes modules as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from engine.exceptions import MisconfigurationException
from engine.hooks import move_to_device


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; every submodule gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


class ExportMixin:
    """`to_onnx`, and what became of `to_torchscript`."""

    # What the model is drawn and exported with: a tensor for `forward`, a tuple of arguments, or a dict of them.
    example_input_array: Any = None

    def to_onnx(
        self: Any, file_path: str | os.PathLike[str] | None = None, input_sample: Any = None, **kwargs: Any
    ) -> Any:
        """Export `forward` as ONNX, in evaluation mode.

        Args:
            file_path: Where to write it; None writes nothing.
            input_sample: An input: a tensor, a tuple of arguments, or a dict of them; default: `example_input_array`.
            **kwargs: Further arguments of `torch.onnx.export`.

        Returns:
            What `torch.onnx.export` does: a `torch.onnx.ONNXProgram`.

        Raises:
            MisconfigurationException: onnx or onnxscript is not installed, or there is no input.
        """
        if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
            raise MisconfigurationException(f"to_onnx needs {' and '.join(missing)}; run: pip install onnx onnxscript")
        sample = self.example_input_array if input_sample is None else input_sample
        if sample is None:
            raise MisconfigurationException("to_onnx has no input; give input_sample, or set self.example_input_array")
        sample = move_to_device(sample, self.device)
        named = sample if isinstance(sample, dict) else None
        args = () if named is not None else sample if isinstance(sample, tuple) else (sample,)
        with evaluating(self):
            return torch.onnx.export(self, args, file_path, kwargs=named, **kwargs)

    def to_torchscript(self, *args: Any, **kwargs: Any) -> None:
        """Refused: torch has given TorchScript up."""
        raise MisconfigurationException(
            "to_torchscript: TorchScript is deprecated; use torch.export.export(model, (input,)) or model.to_onnx(...)"
        )
