"""`python main.py export`: a checkpoint's net as torch.export and ONNX, for places where there is no project.

What is exported is what `predict` gives: inputs to probabilities, or to values in the units of the targets.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import engine
from utils.batches import shape_of
from utils.exits import quiet
from utils.run_folder import PROJECT, remember, run_folder
from utils.run_state import writing

FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
METADATA = "metadata.json"
# Numbers of samples that the exported net is compared with.
BATCHES = (1, 2, 5)
# Of probabilities; of values relative to them.
TOLERANCE = 1e-5
# What protobuf, and so a single ONNX file, can hold.
ONNX_BYTES = 2**31
MEANINGS = {
    "multiclass": "probability of each class",
    "binary": "probability of class 1",
    "multilabel": "probability of each label",
    "regression": "values in the units of the targets",
    "sequence": "probability of each token, as the next after the last position",
}

Run = Callable[[Tensor], Tensor]
Load = Callable[[Path], Run | None]
Difference = Callable[[Run | None], float | None]


class Predictions(nn.Module):
    """What `predict` gives, as a module to export.

    Args:
        model: The MInterface, with its net and weights.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.net, self.scale = model.net, model.scale
        # No submodule: of the MInterface only what predict_step uses is exported.
        self.step = model.predict_step

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs of shape (batch, ...) to predictions of shape (batch, ...)."""
        predictions: Tensor = self.step(inputs, 0)
        return predictions


def export(model: Any, data: Any, arguments: Any) -> dict[str, float]:
    """Export the net of a checkpoint, and check that what was exported gives the same.

    Args:
        model: The MInterface, before it has a net.
        data: The DInterface, which is left alone: there may be no data.
        arguments: Those of the command line.

    Returns:
        The largest difference between the checkpoint's predictions and those of each file that was checked, by format.

    Raises:
        MisconfigurationException: The net cannot be exported, a package is missing, or the checkpoint does not say
            what its net is given.
        ArithmeticError: What was exported gives something else.
        OSError: A file cannot be written.
    """
    formats, checkpoint = _choose(arguments.formats), Path(arguments.ckpt_path)
    about = remember(model, checkpoint)
    inputs = about.get("inputs")
    if not isinstance(inputs, dict):
        raise engine.MisconfigurationException(
            f"{checkpoint} does not say what its net is given, because samples were no tensors; export such a net with "
            "torch.export.export in a script of your own"
        )
    content = _load(model, checkpoint)
    predictions = Predictions(model).eval().requires_grad_(False)
    given = [_random_inputs(predictions, inputs, count) for count in BATCHES]
    with torch.no_grad():
        expected = [predictions(batch) for batch in given]
    if odd := [value for value in expected if not isinstance(value, Tensor)]:
        raise engine.MisconfigurationException(f"predict_step gives {shape_of(odd[0])}; export takes one tensor")
    program = _trace(predictions, given[1])
    told = _describe(model, inputs, expected[0], checkpoint, content)
    run = run_folder(checkpoint)
    folder = Path(arguments.output or (run / "export" if run is not None else "export"))
    return _write_all(folder, formats, program, told, _agreement(model, given, expected))


def _choose(wanted: list[str] | None) -> list[str]:
    """The formats to write: those that were asked for, or those that packages are there for."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if not missing:
        return list(dict.fromkeys(wanted)) if wanted else [*FILES]
    advice = "pip install onnx onnxscript onnxruntime"
    if wanted and "onnx" in wanted:
        raise engine.MisconfigurationException(f"--formats onnx needs {' and '.join(missing)}; run: {advice}")
    if not wanted:
        print(f"{'onnx':<12} left out; for it: {advice}")
    return ["torch"]


def _load(model: Any, checkpoint: Path) -> dict[str, Any]:
    """Give the model its net and the weights that `test` would judge; returns what else is in the file."""
    if hasattr(engine, "checkpoint"):
        content: dict[str, Any] = engine.checkpoint.load(checkpoint, foreign=True)
    else:
        # Lightning goes by the name of engine.
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    # What is compiled cannot be exported, and the memory format is up to whoever runs it.
    model.hparams.update(compile=False, channels_last=False)
    model.configure_model()
    try:
        model.on_load_checkpoint(content)
        model.float().load_state_dict(content["state_dict"])
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise engine.MisconfigurationException(f"{checkpoint} is of another net than this one: {reason}") from error
    return content


def _random_inputs(predictions: nn.Module, inputs: dict[str, Any], count: int) -> Tensor:
    """A batch such as the checkpoint says that the net is given."""
    shape, dtype = (count, *inputs["shape"]), getattr(torch, str(inputs["dtype"]))
    if dtype.is_floating_point or dtype.is_complex:
        # Parameters are float32, whatever the run's precision was.
        return torch.rand(shape, dtype=dtype if dtype.is_complex else torch.float32)
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    tables = [part.num_embeddings for part in predictions.modules() if isinstance(part, nn.Embedding)]
    return torch.randint(min(tables, default=256 if dtype == torch.uint8 else 2), shape, dtype=dtype)


def _trace(predictions: nn.Module, batch: Tensor) -> torch.export.ExportedProgram:
    """The net as a graph, for any number of samples from 1."""
    try:
        with quiet(), torch.no_grad():
            dynamic = ({0: torch.export.Dim("batch", min=1)},)
            program = torch.export.export(predictions, (batch,), dynamic_shapes=dynamic)
    except Exception as error:
        raise engine.MisconfigurationException(f"the net cannot be exported: {_reason(error)}") from error
    for node in program.graph.nodes:
        # It would carry this machine's folders into the files.
        node.meta.pop("stack_trace", None)
    return program


def _reason(error: BaseException) -> str:
    """Why torch cannot export a net, in a line: the innermost error says it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        where = re.findall(r'File "(.+?)", line (\d+)', text)
        place = f" ({Path(where[-1][0]).name}:{where[-1][1]})" if where else ""
        return f"what it computes depends on values in the batch{place}; use torch.where there, or torch.cond"
    if fixed := re.search(r"specialized it to be a constant \((\d+)\)", text):
        return f"its code needs batches of one size ({fixed[1]} here); take sizes from the inputs"
    first = next((line for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.strip()[:300]}"


def _describe(
    model: Any, inputs: dict[str, Any], output: Tensor, checkpoint: Path, content: dict[str, Any]
) -> dict[str, Any]:
    """What stands in the files beside the net."""
    given = model.hparams
    shape = ["batch", *inputs["shape"]]
    return {
        "project": PROJECT.name,
        "net": given["model_name"],
        "task": given["task"],
        "class_names": given.get("class_names"),
        "inputs": {**inputs, "name": "inputs", "shape": shape},
        "outputs": {
            "name": output_name(given["task"]),
            "shape": ["batch", *output.shape[1:]],
            "dtype": str(output.dtype).removeprefix("torch."),
            "meaning": MEANINGS[given["task"]],
        },
        "checkpoint": checkpoint.name,
        "epoch": content.get("epoch"),
        "global_step": content.get("global_step"),
        "torch": str(torch.__version__),
    }


def output_name(task: str) -> str:
    """What an exported net's output is called."""
    return "values" if task == "regression" else "probabilities"


def _agreement(model: Any, given: list[Tensor], expected: list[Tensor]) -> Difference:
    """A function that runs a loaded file on what the checkpoint was run on, and returns the largest difference.

    It returns None where there is nothing to run the file with.
    """
    # Values of a regression may be millions, or about 0.
    deviation = model.scale.deviation if model.hparams["task"] == "regression" else None

    def difference(run: Run | None) -> float | None:
        if run is None:
            return None
        largest = []
        for batch, wanted in zip(given, expected, strict=True):
            with torch.no_grad():
                got = run(batch)
            if got.shape != wanted.shape:
                return math.inf
            apart = (got.double() - wanted.double()).abs()
            largest.append((apart if deviation is None else apart / (wanted.abs() + deviation)).max())
        # A tensor's maximum is NaN where a value is.
        return float(torch.stack(largest).max())

    return difference


def _write_all(
    folder: Path, formats: list[str], program: Any, told: dict[str, Any], difference: Difference
) -> dict[str, float]:
    """Write and check one file for each format; what fails is told when the others are done."""
    found: dict[str, float] = {}
    faults: list[Exception] = []
    for name in formats:
        path, convert, load = folder / FILES[name], CONVERT[name], LOAD[name]
        try:
            largest = _write_checked(path, convert(program, told), load, difference)
        except (engine.MisconfigurationException, ArithmeticError) as error:
            faults.append(error)
            continue
        if largest is None:
            print(f"{name:<12} {path}  (not checked: pip install onnxruntime)")
        else:
            found[name] = largest
            print(f"{name:<12} {path}  (agrees with the checkpoint to {largest:.1g})")
    if faults:
        fault: Any = type(faults[0])("; ".join(map(str, faults)))
        fault.explained = True
        raise fault
    return found


def _write_checked(path: Path, content: bytes, load: Load, difference: Difference) -> float | None:
    """Write a file and measure what is read back from it; it gets its name only if that agrees.

    Raises:
        ArithmeticError: It does not agree.
        OSError: It cannot be written.
    """
    temporary = path.with_name(f"tmp.{path.name}")
    try:
        with writing(path, "choose another folder: --output FOLDER"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            largest = difference(load(temporary))
            if largest is not None and not largest <= TOLERANCE:
                raise ArithmeticError(
                    f"{path.name} gives other predictions than the checkpoint (by {largest:.1g}, where {TOLERANCE:g} "
                    "is allowed), and was not kept"
                )
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()
        with suppress(OSError):
            # If nothing is in it.
            path.parent.rmdir()
    return largest


def _to_torch(program: Any, told: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    with quiet():
        torch.export.save(program, file, extra_files={METADATA: json.dumps(told)})
    return file.getvalue()


def _to_onnx(program: Any, told: dict[str, Any]) -> bytes:
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    if size >= ONNX_BYTES:
        raise engine.MisconfigurationException(
            f"the net takes {size / 2**30:.1f} GiB, and an ONNX file holds less than 2; give --formats torch"
        )
    outputs = [told["outputs"]["name"]]
    try:
        with quiet():
            made = torch.onnx.export(
                program, input_names=["inputs"], output_names=outputs, dynamic_shapes=({0: "batch"},), verbose=False
            )
    except Exception as error:
        raise engine.MisconfigurationException(f"the net cannot be exported to ONNX: {_reason(error)}") from error
    assert made is not None
    proto = made.model_proto
    import_module("onnx").helper.set_model_props(proto, {METADATA: json.dumps(told)})
    proto.doc_string = f"{told['net']}: {told['outputs']['meaning']}"
    return bytes(proto.SerializeToString())


def _load_torch(path: Path) -> Callable[[Tensor], Tensor]:
    with quiet():
        loaded = torch.export.load(path).module()
    return lambda batch: loaded(batch)


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor] | None:
    """None where there is nothing to run it with."""
    if find_spec("onnxruntime") is None:
        return None
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"inputs": batch.numpy()})[0])


CONVERT: dict[str, Callable[[Any, dict[str, Any]], bytes]] = {"torch": _to_torch, "onnx": _to_onnx}
LOAD: dict[str, Load] = {"torch": _load_torch, "onnx": _load_onnx}
