"""Your own table: numbers or names of pictures, and what to predict from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.augmentation import take
from utils.pictures import describe_reading, read_picture
from utils.splits import SPLIT_WORDS
from utils.tables import Table

TASKS = ("multiclass", "binary", "multilabel", "regression")
# So many different whole numbers may still be classes.
NUMBERED_CLASSES = 20


class CsvData(Dataset[Any]):
    """A CSV file: a line of column names, then a line for each sample.

    A sample is the row's numbers, float32 of shape (features,), and its target. Numbers are not scaled, because mean
    and deviation would have to come from training rows only: let the net begin with nn.BatchNorm1d. With an
    `image_column` it is an image instead, float32 of shape (channels, size, size) from 0 to 1.

    The target is the class, an int64; for regression a number, float32; for several columns, and always for
    multilabel, float32 of shape (targets,). Classes are in the order of their names. Rows for predict have no target.

    Args:
        split: Which samples: "train", "val", "test", or "predict" (rows for predict, or else the test rows).
        file: The CSV file, in UTF-8.
        target: Columns to predict. Default: the last.
        features: Columns of numbers to predict from. Default: all that have no other use.
        image_column: Column with the files of pictures, relative to the CSV file, to predict from instead.
        group_column: Column with each row's group, such as the patient; no group is divided between splits.
        split_column: Column with each row's split: train, val, test or predict.
        task: Either multiclass, binary, multilabel or regression. Default: multiclass for text and up to 20 different
            whole numbers, regression for other numbers, multilabel for several columns of 0 and 1.
        delimiter: Character between columns. Default: comma, semicolon or tab, whichever the first line has most.
        size: Height and width of images: the shorter side is resized to it, the longer one cropped.
        grayscale: Read pictures with one channel instead of three.
        augment: Crop training images at random, after padding by an eighth.
        flip: Also mirror them at random: right for photographs, wrong for digits and letters.
    """

    # All of these depend on the file.
    splits: tuple[str, ...]
    num_classes: int
    class_names: list[str]
    num_targets: int

    def __init__(
        self,
        split: Literal["train", "val", "test", "predict"],
        file: str = "datasets/table.csv",
        target: list[str] | None = None,
        features: list[str] | None = None,
        image_column: str | None = None,
        group_column: str | None = None,
        split_column: str | None = None,
        task: str | None = None,
        delimiter: str | None = None,
        size: int = 64,
        grayscale: bool = False,
        augment: bool = True,
        flip: bool = False,
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size}; give a whole number from 1")
        if task not in (None, *TASKS):
            raise ValueError(f"task={task}; give one of {', '.join(TASKS)}")
        if image_column is not None and features:
            raise ValueError(f"image_column={image_column} and features={features}; give one of them")
        self.folder, self.size, self.grayscale, self.flip = Path(file).parent, size, grayscale, flip
        self.augment = augment and split == "train"

        table = Table(Path(file), delimiter)
        special = [name for name in (image_column, group_column, split_column) if name is not None]
        free = [name for name in table.columns if name not in special]
        target = target or free[-1:]
        features = features or [name for name in free if name not in target]
        table.check_uses([*special, *target, *features])
        rows = _rows_of_splits(table, split_column)
        self.splits = tuple(rows)
        if split not in rows:
            raise ValueError(f"{file} has no rows of split {split}; it has {', '.join(rows)}")
        chosen = rows[split]

        # Every row is checked, whichever are asked for: a fault in test rows had better be found before training.
        targets = self._read_targets(table, target, task, rows)
        self.targets = None if split == "predict" and chosen is not rows.get("test") else targets[chosen]
        self.groups = None if group_column is None else [table.text(group_column)[row] for row in chosen]
        self.names = [f"row {table.lines[row]}" for row in chosen]
        self.pictures: list[str] | None = None
        if image_column is not None:
            self.sample_shape: tuple[int, ...] = (1 if grayscale else 3, size, size)
            self.preprocessing = describe_reading(size, grayscale)
            files = table.text(image_column)
            _check_files(self.folder, files)
            self.pictures = [files[row] for row in chosen]
            self.__getitems__ = None  # type: ignore[method-assign,assignment]  # pictures are read one by one
            if len(set(files)) == len(files):
                self.names = self.pictures
            elif self.groups is None:
                self.groups = self.pictures  # no picture of several rows is trained and tested on
        elif features:
            self.sample_shape = (len(features),)
            self.preprocessing = {"columns": list(features)}
            self.inputs = torch.from_numpy(table.numbers(features)[chosen]).float()
        else:
            raise ValueError(f"{file} has no column to predict {target} from; if it has, give its delimiter")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        if self.pictures is None:
            sample = self.inputs[index]
        else:
            file = self.folder / self.pictures[index]
            sample = read_picture(file, self.size, self.grayscale, self.augment, self.flip)
        return sample if self.targets is None else (sample, self.targets[index])

    def __getitems__(self, indices: list[int]) -> Any:
        inputs = take(self.inputs, indices)
        return inputs if self.targets is None else (inputs, take(self.targets, indices))

    def _read_targets(self, table: Table, target: list[str], task: str | None, rows: dict[str, list[int]]) -> Tensor:
        """The target of every row, 0 in rows for predict, which may have none. Sets the task and what goes with it."""
        labelled = sorted({row for part in rows.keys() - {"predict"} for row in rows[part]})
        values = None
        if task in ("multilabel", "regression") or table.is_numeric(target, labelled):
            values = table.numbers(target, labelled)
        self.task = task or _infer_task(values)
        if self.task in ("multiclass", "binary"):
            if len(target) > 1:
                raise ValueError(f"target={target}: {self.task} has one column; name one, or give another task")
            cells = table.text(target[0], labelled) if values is None else values[:, 0].tolist()
            classes = self._number_classes(dict(zip(labelled, cells, strict=True)), rows["train"], target[0], table)
            targets = torch.zeros(len(table.lines), dtype=torch.int64)
            targets[labelled] = torch.tensor(classes)
            return targets
        assert values is not None
        if self.task == "multilabel" and not np.isin(values, (0, 1)).all():
            raise ValueError(f"target={target}: multilabel has columns of 0 and 1 only; give another task")
        self.num_targets, self.class_names = len(target), list(target)
        targets = torch.zeros(len(table.lines), len(target))
        targets[labelled] = torch.from_numpy(values).float()
        return targets if self.task == "multilabel" or len(target) > 1 else targets[:, 0]

    def _number_classes(self, cells: dict[int, Any], training: list[int], column: str, table: Table) -> list[int]:
        """The class of every cell of the target; `cells` has them by row."""
        classes = sorted({cells[row] for row in training})
        count = len(classes)
        if self.task == "binary" and count != 2 or count < 2:
            wanted = "two" if self.task == "binary" else "two or more"
            few = ", ".join(map(str, classes[:3]))
            raise ValueError(
                f"column {column} has {count} classes in training rows ({few}); {self.task} needs {wanted}"
            )
        if count > max(NUMBERED_CLASSES, len(training) / 2):
            raise ValueError(
                f"column {column} has {count} classes in {len(training)} rows; give another target or task"
            )
        index = {key: number for number, key in enumerate(classes)}
        for row, key in cells.items():
            if key not in index:
                raise ValueError(f"{table.place(row, column)}: class {key} is in no training row")
        # Whole numbers are named without a point: class 3, not 3.0.
        self.class_names = [f"{key:.15g}" if isinstance(key, float) else key for key in classes]
        self.num_classes = count
        return [index[key] for key in cells.values()]


def _rows_of_splits(table: Table, column: str | None) -> dict[str, list[int]]:
    """The rows of each split that there is; all are for training if no column says otherwise."""
    words = ["train"] * len(table.lines) if column is None else table.text(column)
    found: dict[str, list[int]] = {}
    for row, word in enumerate(words):
        if (split := SPLIT_WORDS.get(word.lower())) is None:
            raise ValueError(f"{table.place(row, str(column))}: {word}; give train, val, test or predict")
        found.setdefault(split, []).append(row)
    if "train" not in found:
        raise ValueError(f"{table.file}: column {column} has no row for train; mark some")
    if "test" in found:
        found.setdefault("predict", found["test"])
    return found


def _infer_task(values: np.ndarray | None) -> str:
    if values is None:
        return "multiclass"
    if values.shape[1] > 1:
        return "multilabel" if np.isin(values, (0, 1)).all() else "regression"
    different = np.unique(values)
    few = len(different) <= min(NUMBERED_CLASSES, max(2, len(values) // 2))
    return "multiclass" if few and (different == different.round()).all() else "regression"


def _check_files(folder: Path, names: list[str]) -> None:
    """Check that files exist, by one look into each folder: one at each file takes minutes on network drives."""
    parents = {os.path.dirname(name) for name in names}
    held = {parent: set(os.listdir(folder / parent)) for parent in parents if (folder / parent).is_dir()}
    missing = [name for name in names if os.path.basename(name) not in held.get(os.path.dirname(name), ())]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} pictures are missing, the first is {folder / missing[0]}; file names are "
            f"relative to {folder}"
        )
