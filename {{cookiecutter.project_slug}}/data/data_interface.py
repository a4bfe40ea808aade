"""DInterface: loaders for whichever dataset was named."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import engine
from utils.registry import build


class DInterface(engine.DataModule):
    """Loads a dataset of `data/` by name, in the splits "train", "val", "test" and "predict".

    Args:
        dataset: Name of the dataset: a file in data/.
        batch_size: Samples in a batch.
        num_workers: Processes that read data; 0 reads in the main process, best for data that lies in memory.
        data: Arguments of the dataset, but `split`.
    """

    def __init__(
        self,
        dataset: str = "standard_data",
        batch_size: int = 64,
        num_workers: int = 0,
        data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise engine.MisconfigurationException(
                f"batch_size={batch_size}, num_workers={num_workers}; give a batch_size from 1, num_workers from 0"
            )
        self.data = dict(data or {})
        self.save_hyperparameters("dataset", "batch_size", "num_workers")
        self.hparams["data"] = self.data
        self.datasets: dict[str, Dataset[Any]] = {}

    def prepare_data(self) -> None:
        """Download what is not there yet, on one process of each machine."""
        if self.data.get("download"):
            for split in ("train", "test"):
                build("data", self.hparams["dataset"], {**self.data, "split": split})

    def setup(self, stage: str) -> None:
        """Build the splits that the stage needs."""
        # By now it is downloaded, and several processes must not try again.
        arguments = {**self.data, "download": False} if "download" in self.data else self.data
        splits = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}
        for split in splits[stage]:
            if split not in self.datasets:
                self.datasets[split] = build("data", self.hparams["dataset"], {**arguments, "split": split})

    @property
    def num_classes(self) -> int | None:
        """Number of classes, if the dataset tells."""
        return self._tell("num_classes")

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample, if the dataset tells."""
        return self._tell("sample_shape")

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in random order."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches in the dataset's order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches in the dataset's order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches in the dataset's order."""
        return self._loader("predict")

    def _tell(self, name: str) -> Any:
        return next((getattr(dataset, name, None) for dataset in self.datasets.values()), None)

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            self.datasets[split],
            batch_size=self.hparams["batch_size"],
            shuffle=shuffle,
            num_workers=self.hparams["num_workers"],
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.hparams["num_workers"] > 0,
        )
