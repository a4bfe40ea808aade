"""DInterface: loaders for whichever datasets were named, and the splits that they train and are judged on."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

import engine
from utils import samples
from utils.registry import accepts, build_dataset, load_class, own_splits
from utils.samples import class_per_sample, innermost, same_randomness
from utils.splits import carve, check_options

# fit builds the test sets, too: a fault in them had better be found before training.
NEEDED = {"fit": ("train", "val", "test"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class DInterface(engine.DataModule):
    """Loads datasets of `data/` by name, in the splits "train", "val", "test" and "predict".

    Args:
        dataset: Dataset for everything: a file in data/. Default: standard_data.
        train_dataset: Dataset to train on instead.
        val_datasets: Datasets to validate on instead; also as --eval_datasets.
        test_datasets: Datasets to test on instead.
        batch_size: Samples in a batch.
        num_workers: Processes that read data. Default: none if that is fast enough, else one for each CPU, at most 8.
        on_device: Keep the datasets in the device's memory, and make batches there: for sets that fit into it.
        val_fraction: Share of the samples to validate on. Default: the dataset's own split, or 0.1 if it has none.
        test_fraction: The same for testing.
        split_file: CSV file with columns sample and split (train, val or test), instead of all other splits.
        split_seed: Seed of splits by shares or folds.
        num_folds: Number of folds for cross-validation: training and validation samples are split anew.
        fold: Fold to validate on, from 0; all trains once for each.
        balanced_sampling: Draw every class equally often in training.
        data: Arguments of the datasets; each gets those that it takes.
    """

    def __init__(
        self,
        dataset: str | None = None,
        train_dataset: str | None = None,
        val_datasets: list[str] | None = None,
        test_datasets: list[str] | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        on_device: bool = False,
        val_fraction: float | None = None,
        test_fraction: float | None = None,
        split_file: str | None = None,
        split_seed: int = 0,
        num_folds: int | None = None,
        fold: int | Literal["all"] | None = None,
        balanced_sampling: bool = False,
        data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        data = {name: value for name, value in (data or {}).items() if value is not None}
        self.save_hyperparameters()
        self.data = data
        default = dataset or train_dataset or "standard_data"
        self.train_name = train_dataset or default
        tests = test_datasets or [default]
        for listed in (val_datasets, test_datasets, [default, self.train_name]):
            if not isinstance(listed, list | None) or not all(isinstance(name, str) for name in listed or ()):
                raise engine.MisconfigurationException(f"datasets {listed!r:.50}: give a list of names")
        self.names = {"train": [self.train_name], "val": val_datasets or [default], "test": tests, "predict": tests}
        self.sets: dict[str, dict[str, Dataset[Any]]] = {}
        self.num_workers = num_workers
        self._carved: dict[str, Dataset[Any]] = {}
        self._moved: dict[Any, Any] = {}
        most_workers = max(64, 4 * samples.cpus())
        if not 0 < batch_size < 2**31 or not 0 <= (num_workers or 0) <= most_workers:
            raise engine.MisconfigurationException(
                f"batch_size={batch_size}, num_workers={num_workers}; give a batch_size from 1, and num_workers from 0 "
                f"to {most_workers} (there are {samples.cpus()} CPUs)"
            )
        if on_device and num_workers:
            raise engine.MisconfigurationException(
                f"on_device=True, num_workers={num_workers}: batches are made on the device; leave out num_workers"
            )
        named = [name for names in self.names.values() for name in names]
        if unknown := [argument for argument in self.data if not any(accepts(name, argument) for name in named)]:
            raise engine.MisconfigurationException(f"data has {unknown[0]!r}, which none of {', '.join(named)} takes")
        check_options(self.hparams, self.names)

    def prepare_data(self) -> None:
        """Download what is not there yet, on one process of each machine."""
        if self.data.get("download"):
            for name in {name for names in self.names.values() for name in names if accepts(name, "download")}:
                for split in getattr(load_class("data", name), "splits", ("train", "val", "test")):
                    build_dataset(name, split, self.data)

    def setup(self, stage: str) -> None:
        """Build the splits that the stage needs, and check that they share no samples."""
        missing = [split for split in NEEDED[stage] if split not in self.sets]
        for split in missing:
            self.sets[split] = {name: self._split(name, split) for name in self.names[split]}
        # Looking at samples must not change what is drawn at random afterwards.
        with same_randomness():
            if missing:
                samples.check_sets(self.sets)
                if self.hparams["on_device"]:
                    samples.check_on_device(self.sets)
            if self.num_workers is None and not self.hparams["on_device"]:
                first = next(iter(self.sets[NEEDED[stage][0]].values()))
                self.num_workers = samples.workers_for(first, self.hparams["batch_size"])

    def tell(self, attribute: str) -> Any:
        """What the first set says of itself, such as `num_classes`; None if nothing."""
        first = next((dataset for sets in self.sets.values() for dataset in sets.values()), None)
        return None if first is None else getattr(innermost(first), attribute, None)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in random order."""
        dataset, size = self.sets["train"][self.train_name], self.hparams["batch_size"]
        share = len(dataset) // int(os.environ.get("WORLD_SIZE", 1))  # type: ignore[arg-type]
        # A batch norm cannot learn from one sample: an epoch that would end with it leaves it out.
        alone = share > size and share % size == 1
        if not self.hparams["balanced_sampling"]:
            return self._named("train", shuffle=True, drop_last=alone)[self.train_name]
        classes = class_per_sample(dataset)
        if classes is None:
            raise engine.MisconfigurationException(
                f"--balanced_sampling: {self.train_name} does not tell its classes; give it an attribute targets with "
                "the class of every sample"
            )
        labels = torch.tensor(classes)
        weights = (1 / torch.bincount(labels).double())[labels]
        sampler = WeightedRandomSampler(weights.tolist(), len(classes))
        return self._named("train", sampler=sampler, drop_last=alone)[self.train_name]

    def val_dataloader(self) -> dict[str, DataLoader[Any]]:
        """Batches in the datasets' order, by name."""
        return self._named("val")

    def test_dataloader(self) -> dict[str, DataLoader[Any]]:
        """Batches in the datasets' order, by name."""
        return self._named("test")

    def predict_dataloader(self) -> dict[str, DataLoader[Any]]:
        """Batches in the datasets' order, by name."""
        return self._named("predict")

    def loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        """Batches of any dataset, in its order unless the options of DataLoader say otherwise."""
        size = self.hparams["batch_size"]
        if "num_workers" not in options:
            # Of a dataset that can only be read from its start, every process would read all.
            several = not isinstance(dataset, IterableDataset)
            if self.num_workers is None and several:
                # A single batch would only wait for processes to start.
                self.num_workers = samples.workers_for(dataset, size) if len(dataset) > size else 0  # type: ignore[arg-type]
            options["num_workers"] = self.num_workers or 0 if several else 0
        if options["num_workers"]:
            # Lightning would have workers seeded by a function that it puts in the same place.
            by_value = None if os.environ.get("PL_SEED_WORKERS") == "1" else samples.send_small_tensors
            options = {"persistent_workers": True, "prefetch_factor": 4, "worker_init_fn": by_value, **options}
        if samples.makes_batches(dataset):
            options["collate_fn"] = samples.as_batch
        return DataLoader(dataset, **{"batch_size": size, "pin_memory": torch.cuda.is_available(), **options})

    def _named(self, split: str, **options: Any) -> dict[str, DataLoader[Any]]:
        """The loaders of a split by name; with `on_device`, of copies that lie there."""
        if not self.hparams["on_device"]:
            return {name: self.loader(dataset, **options) for name, dataset in self.sets[split].items()}
        # Without a trainer it is the CPU; Lightning's has its device elsewhere.
        trainer: Any = self.trainer
        device = torch.device("cpu") if trainer is None else getattr(trainer, "device", None)
        device = device or trainer.strategy.root_device
        there = {name: samples.on_device(dataset, device, self._moved) for name, dataset in self.sets[split].items()}
        options |= {"num_workers": 0, "pin_memory": False}
        return {name: self.loader(dataset, **options) for name, dataset in there.items()}

    def _split(self, name: str, split: str) -> Dataset[Any]:
        """The samples of one dataset that belong to one split."""
        # By now prepare_data has downloaded them, in one process.
        given = {**self.data, "download": False} if "download" in self.data else self.data
        own, wanted = own_splits(name, given), self.hparams
        by_file = wanted["split_file"] is not None
        anew = {
            "val": by_file or wanted["val_fraction"] or wanted["num_folds"],
            "test": by_file or wanted["test_fraction"],
        }
        carved = [part for part in anew if (anew[part] or part not in own) and name in self.names[part]]
        if name != self.train_name:
            carved = []
        if split == "predict" and ("test" in carved or split not in own):
            split = "test"
        if split in carved or (split == "train" and carved):
            if not self._carved:
                pool = [build_dataset(name, part, given) for part in ("train", *carved) if part in own]
                self._carved = carve(pool, carved, wanted)
            return self._carved[split]
        # What is only judged on, and has no such split of its own, is used whole.
        return build_dataset(name, split, given) if split in own else samples.plain(build_dataset(name, "train", given))
