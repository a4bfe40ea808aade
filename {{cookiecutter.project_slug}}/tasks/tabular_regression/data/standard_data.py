"""Your dataset. As it stands, it holds 442 patients with diabetes, in a table beside this file (`diabetes.md`)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

TARGET = "progression"


class StandardData(Dataset[tuple[Tensor, Tensor]]):
    """Ten measurements of a patient, and how far the disease had come a year later.

    A sample is a row of numbers, float32 of shape (10,), and its target, float32 of shape (). Both are as they were
    measured: the net brings columns to one scale, and MInterface the targets.

    Args:
        split: Which samples: "train", "val", "test", or "predict" (the test rows).
        noise: Random error added to each number of a training row, in standard deviations of its column.
    """

    # FILL IN: what is learned; nets that ask for sample_shape get it.
    task = "regression"
    num_targets = 1
    sample_shape = (10,)
    class_names = [TARGET]

    def __init__(self, split: Literal["train", "val", "test", "predict"], noise: float = 0.05) -> None:
        # FILL IN: read your own file. csv_data does so for most tables, without a line of code.
        with open(Path(__file__).with_name("diabetes.csv"), newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == ("test" if split == "predict" else split)]
        columns = [name for name in rows[0] if name not in (TARGET, "split")]
        self.rows = torch.tensor([[float(row[name]) for name in columns] for row in rows])
        self.targets = torch.tensor([float(row[TARGET]) for row in rows])
        # Saved in checkpoints, for whoever uses the net elsewhere.
        self.preprocessing = {"columns": columns}
        self.noise = noise * self.rows.std(dim=0)
        # Looked at when reading, because validation samples that are taken out of training data get it switched off.
        self.augment = split == "train"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # FILL IN: return one sample, changed at random only if self.augment.
        row = self.rows[index]
        if self.augment:
            row = row + self.noise * torch.randn(len(row))
        return row, self.targets[index]
