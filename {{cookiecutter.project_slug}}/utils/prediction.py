"""`python main.py predict`: what a net says of test data, or of pictures, tables and arrays that lie anywhere."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import engine
from utils.arguments import constructor_arguments
from utils.run_folder import run_folder
from utils.run_state import write_whole
from utils.samples import per_sample


def predict(model: Any, data: Any, arguments: Any) -> dict[str, float]:
    """Write predictions, and say where.

    Args:
        model: The MInterface.
        data: The DInterface.
        arguments: Those of the command line.

    Returns:
        Nothing: predictions have no metrics.
    """
    path = Path(arguments.ckpt_path)
    trainer = engine.Trainer(**constructor_arguments(engine.Trainer, arguments), logger=False)
    batches = trainer.predict(model, datamodule=data, ckpt_path=path) or []
    print(f"predictions  {write_predictions(run_folder(path) or Path(), data, batches, model.hparams['task'])}")
    print(f"checkpoint   {path}")
    return {}


def write_predictions(folder: Path, data: Any, batches: list[Any], task: str) -> Path:
    """Write `predictions.csv`: a row for each sample, in the datasets' order.

    Args:
        folder: Where to write.
        data: The DInterface whose sets were predicted.
        batches: Predictions of the batches, tensors of shape (batch,) or (batch, outputs); a list of them for each set
            where there are several.
        task: What was learned: probabilities follow a class, values of a regression stand alone.
    """
    sets, class_names = data.sets["predict"], data.tell("class_names")
    rows = {
        name: [row.reshape(-1).tolist() for batch in part for row in batch]
        for name, part in zip(sets, batches if len(sets) > 1 else [batches], strict=True)
    }
    width = max((len(row) for part in rows.values() for row in part), default=0)
    labels = class_names if class_names and len(class_names) == width else [str(number) for number in range(width)]
    kind, single = "value" if task == "regression" else "probability", task in ("multiclass", "sequence")
    names = {name: per_sample(dataset, "names") for name, dataset in sets.items()}
    about = ["dataset"] * (len(sets) > 1) + ["index"] + ["name"] * any(names.values()) + ["class"] * single
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*about, *([f"{kind}_{label}" for label in labels] if width > 1 else [kind])])
    for dataset, part in rows.items():
        for index, row in enumerate(part):
            told = {"dataset": dataset, "index": index, "name": (names[dataset] or {index: ""})[index]}
            if single:
                told["class"] = labels[max(range(width), key=row.__getitem__)]
            writer.writerow([*(told[column] for column in about), *(f"{value:.6g}" for value in row)])
    return write_whole(folder / "predictions.csv", text.getvalue())
