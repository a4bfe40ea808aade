"""DataModule: where the data comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from engine.hooks import DataHooks
from engine.hparams import HyperparametersMixin
from engine.older import refuse_arguments

if TYPE_CHECKING:
    from engine.trainer import Trainer


class DataModule(HyperparametersMixin, DataHooks):
    """Where the data comes from: override the loaders, `prepare_data` and `setup`."""

    trainer: Trainer | None = None

    def __init__(self, **older: Any) -> None:
        refuse_arguments(DataModule, older)

    def setup(self, stage: str) -> None:
        """Build the datasets for "fit", "validate", "test" or "predict", in every process."""

    def teardown(self, stage: str) -> None:
        """A stage is over, also after an error."""

    def on_exception(self, exception: BaseException) -> None:
        """The run ends with an error or with Ctrl-C."""

    def state_dict(self) -> dict[str, Any]:
        """What to save in checkpoints, as primitives and tensors."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Dataset[Any] | Sequence[Dataset[Any]] | Mapping[str, Dataset[Any]] | None = None,
        val_dataset: Dataset[Any] | Sequence[Dataset[Any]] | Mapping[str, Dataset[Any]] | None = None,
        test_dataset: Dataset[Any] | Sequence[Dataset[Any]] | Mapping[str, Dataset[Any]] | None = None,
        predict_dataset: Dataset[Any] | Sequence[Dataset[Any]] | Mapping[str, Dataset[Any]] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> Self:
        """A data module around datasets: one for training, and one, several or named ones for everything else.

        Args:
            train_dataset: What to train on, in random order.
            val_dataset: What to validate on.
            test_dataset: What to test on.
            predict_dataset: What to predict.
            batch_size: Samples in a batch.
            num_workers: Processes that read each of them.
            **datamodule_kwargs: Arguments of the constructor.
        """

        def loaders(given: Any, shuffle: bool) -> Any:
            if isinstance(given, Mapping):
                return {name: loaders(dataset, shuffle) for name, dataset in given.items()}
            if isinstance(given, Sequence):
                return [loaders(dataset, shuffle) for dataset in given]
            shuffle = shuffle and not isinstance(given, IterableDataset)
            pinned = torch.cuda.is_available()
            return DataLoader(given, batch_size, shuffle=shuffle, num_workers=num_workers, pin_memory=pinned)

        made: Any = cls(**datamodule_kwargs)
        given = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        for kind, datasets in given.items():
            if datasets is not None:
                setattr(made, f"{kind}_dataloader", partial(loaders, datasets, shuffle=kind == "train"))
        return made  # type: ignore[no-any-return]
