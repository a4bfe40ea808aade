"""Which samples are trained on, validated on and tested on, by the flags of DInterface."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data import DInterface
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset

QUICK = ("--max_epochs", "2", "--limit_train_batches", "4", "--log_every_n_steps", "1", "--model.width", "4")

NOISY = '''"""Digits with noise."""
import torch
from data.standard_data import StandardData


class {name}(StandardData):
    """Noisy digits.

    Args:
        split: Which samples.
        noise: How much.
    """

    def __init__(self, split, noise: float = {noise}) -> None:
        super().__init__(split)
        self.noise = noise
        self.images = self.images[:: {every}]
        self.targets = self.targets[:: {every}]

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        generator = torch.Generator().manual_seed(index)
        return image + self.noise * torch.randn(image.shape, generator=generator), label
'''


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def noisy(project: Path) -> Path:
    for name, noise, every in (("dim", 0.5, 2), ("dark", 2.0, 3)):
        text = NOISY.format(name=name.capitalize(), noise=noise, every=every)
        (project / "data" / f"{name}.py").write_text(text)
    return project


@pytest.mark.parametrize("sets", [["dim"], ["standard_data", "dim"], ["standard_data", "dim", "dark"]])
def test_monitors_and_metrics_work_unchanged_with_any_number_of_sets(
    sets: list[str], noisy: Path, run_in_project: Callable
) -> None:
    words = (*QUICK, "--monitor", "val_acc", "--monitor_mode", "max", "--patience", "5")
    outcome = run_in_project(*words, "--eval_datasets", *sets, "--test_datasets", *sets)
    assert outcome.code == 0, outcome.err
    metrics = outcome.metrics
    written = rows(noisy / "logs/standard_net/version_0/metrics.csv")
    events = EventAccumulator(str(noisy / "logs/standard_net/version_0"))
    events.Reload()
    sizes = {"standard_data": 269, "dim": 135, "dark": 90}
    for metric in ("test_acc", "test_f1", "test_loss"):
        each = [metrics.get(f"{metric}/{name}") for name in sets]
        if len(sets) == 1:
            assert each == [None]
            continue
        total = sum(sizes[name] for name in sets)
        mean = sum(value * sizes[name] for value, name in zip(each, sets, strict=True)) / total
        assert metrics[metric] == pytest.approx(mean, abs=1e-6)
        for name in (metric, *(f"{metric}/{s}" for s in sets)):
            assert any(row.get(name) for row in written), name
            assert name in events.Tags()["scalars"]
    header = next(line for line in outcome.out.splitlines() if line.startswith("test "))
    assert header.split()[1:] == ([*sets, "mean"] if len(sets) > 1 else ["value"])
    saved = torch.load(noisy / "logs/standard_net/version_0/checkpoints/best.ckpt", weights_only=True)
    assert saved["global_step"] in (4, 8)


def test_every_split_can_come_from_another_dataset(noisy: Path, run_in_project: Callable) -> None:
    words = ("--train_dataset", "dim", "--val_datasets", "dark", "--test_datasets", "standard_data", "dim")
    outcome = run_in_project(*QUICK, *words, "--data.noise", "0.1")
    assert outcome.code == 0, outcome.err
    assert "test_acc/standard_data" in outcome.metrics and "val_acc/dark" not in outcome.metrics
    tested = run_in_project("test", "--ckpt_path", "best")
    assert tested.metrics["test_acc/dim"] == outcome.metrics["test_acc/dim"]
    assert run_in_project("predict", "--ckpt_path", "best").code == 0
    counts = Counter(row["dataset"] for row in rows(noisy / "logs/standard_net/version_0/predictions.csv"))
    assert set(counts) == {"standard_data", "dim"}


def test_a_set_named_twice_is_refused(run: Callable) -> None:
    outcome = run("--val_datasets", "standard_data", "standard_data")
    assert outcome.code == 2 and "name each once" in outcome.err and outcome.err.count("\n") == 1


def parts(**arguments: object) -> dict[str, list[float]]:
    """What tells the samples of each split apart: their sums, since augmentation is off."""
    data = DInterface(data={"augment": False}, **arguments)
    data.setup("fit")
    return {
        s: sorted(hash(sets["standard_data"][i][0].numpy().tobytes()) for i in range(len(sets["standard_data"])))
        for s, sets in data.sets.items()
    }


def test_a_fraction_takes_validation_and_test_samples_anew_and_loses_none() -> None:
    own, anew = parts(), parts(val_fraction=0.2, test_fraction=0.3)
    counts = {split: len(samples) for split, samples in anew.items()}
    assert counts == {
        "train": pytest.approx(898, abs=6),
        "val": pytest.approx(359, abs=6),
        "test": pytest.approx(539, abs=6),
    }
    assert sorted(sum(own.values(), [])) == sorted(sum(anew.values(), []))
    assert parts(val_fraction=0.2)["test"] == own["test"]
    assert parts(val_fraction=0.2, split_seed=1)["val"] != parts(val_fraction=0.2)["val"]


def test_folds_validate_every_sample_exactly_once() -> None:
    own = parts()
    folds = [parts(num_folds=5, fold=fold) for fold in range(5)]
    everything = sorted(own["train"] + own["val"])
    assert sorted(sum((fold["val"] for fold in folds), [])) == everything
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == everything
        assert fold["test"] == own["test"]


def test_all_training_samples_of_a_fold_are_augmented_and_no_others() -> None:
    data = DInterface(num_folds=5, fold=0)
    data.setup("fit")
    train, val = data.sets["train"]["standard_data"], data.sets["val"]["standard_data"]
    last = len(train) - 1  # taken from the dataset's own validation split
    assert any(not torch.equal(train[last][0], train[last][0]) for _ in range(20))
    assert all(torch.equal(val[0][0], val[0][0]) for _ in range(20))


@pytest.mark.long
def test_cross_validation_of_the_digits(run: Callable, tmp_path: Path) -> None:
    outcome = run("--num_folds", "5", "--fold", "all", "--enable_progress_bar", "false")
    assert outcome.code == 0, outcome.err
    assert outcome.metrics["test_acc"] >= 0.97
    assert 0 < outcome.metrics["test_acc_std"] < 0.02
    folder = tmp_path / "logs/standard_net/version_0"
    table = rows(folder / "folds.csv")
    assert [row["fold"] for row in table] == ["0", "1", "2", "3", "4", "mean", "std"]
    accuracies = torch.tensor([float(row["test_acc"]) for row in table[:5]])
    assert outcome.metrics["test_acc"] == pytest.approx(float(accuracies.mean()))
    assert outcome.metrics["test_acc_std"] == pytest.approx(float(accuracies.std()), rel=1e-4)
    assert re.search(r"test_acc +0\.9\d+ ± 0\.0\d+", outcome.out)
    assert {path.name for path in folder.iterdir()} == {*(f"fold_{fold}" for fold in range(5)), "folds.csv"}
    # A fold can be tested, repeated and gone on with by itself.
    tested = run("test", "--ckpt_path", str(folder / "fold_3/checkpoints/best.ckpt"))
    assert tested.metrics["test_acc"] == pytest.approx(float(accuracies[3]))
    again = run("--config", str(folder / "fold_3/config.yaml"))
    assert again.metrics["test_acc"] == pytest.approx(float(accuracies[3]))
    longer = run("--ckpt_path", str(folder / "fold_3/checkpoints/last.ckpt"), "--max_epochs", "16")
    assert longer.code == 0 and not (tmp_path / "logs/version_0").exists()
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["standard_net"]


GROUPED = """from data.standard_data import StandardData


class Grouped(StandardData):
    def __init__(self, split):
        super().__init__(split)
        start = {"train": 0, "val": 100, "test": 200, "predict": 200}[split]
        self.groups = [start + number // 40 for number in range(len(self))]
"""


def test_no_group_is_on_both_sides(project: Path, run_in_project: Callable) -> None:
    (project / "data/grouped.py").write_text(GROUPED)
    from data import DInterface
    from utils.samples import per_sample

    seen: list[str] = []
    for fold in range(4):
        data = DInterface(dataset="grouped", num_folds=4, fold=fold)
        data.setup("fit")
        sides = [set(per_sample(data.sets[split]["grouped"], "groups") or ()) for split in ("train", "val")]
        assert sides[0] and sides[1] and not sides[0] & sides[1]
        seen += sides[1]
    assert len(seen) == len(set(seen))
    assert run_in_project("--dataset", "grouped", "--num_folds", "4", "--fold", "1", *QUICK).code == 0


def test_balanced_sampling_draws_every_class_equally_often(project: Path, run_in_project: Callable) -> None:
    (project / "data/skewed.py").write_text(
        "from data.standard_data import StandardData\n\n\nclass Skewed(StandardData):\n"
        "    num_classes = 2\n\n    def __init__(self, split):\n        super().__init__(split)\n"
        "        self.targets = (self.targets == 3).long()\n"
    )
    from data import DInterface

    data = DInterface(dataset="skewed", balanced_sampling=True)
    data.setup("fit")
    drawn = torch.cat([labels for _, labels in data.train_dataloader()])
    assert len(drawn) == len(data.sets["train"]["skewed"])
    assert 0.42 < float(drawn.float().mean()) < 0.58
    words = ("--dataset", "skewed", *QUICK)
    balanced = run_in_project(*words, "--balanced_sampling", "true")
    assert balanced.code == 0, balanced.err
    assert balanced.metrics["train_loss"] != run_in_project(*words).metrics["train_loss"]


def test_a_split_file_decides(run: Callable, tmp_path: Path) -> None:
    lines = [f"{number},{('train', 'val', 'test')[number % 3]}" for number in range(300)]
    (tmp_path / "split.csv").write_text("\n".join(["sample,split", *lines]) + "\n")
    data = DInterface(split_file=str(tmp_path / "split.csv"))
    data.setup("fit")
    assert {split: len(sets["standard_data"]) for split, sets in data.sets.items()} == dict.fromkeys(
        ("train", "val", "test"), 100
    )
    assert run(*QUICK, "--split_file", "split.csv").code == 0
    (tmp_path / "split.csv").write_text("sample,split\n0,train\n1,val\n0,test\n")
    outcome = run(*QUICK, "--split_file", "split.csv")
    assert outcome.code == 2 and "0 is in train and again in test" in outcome.err


def test_slow_reading_is_left_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils import samples

    fast = DInterface()
    fast.setup("fit")
    assert fast.num_workers == 0
    monkeypatch.setattr(samples, "SLOW_BATCH_SECONDS", 0.0)
    slow = DInterface()
    slow.setup("fit")
    assert slow.num_workers and slow.train_dataloader().num_workers == slow.num_workers
    assert DInterface(num_workers=3).num_workers == 3


# Types that NumPy lacks, orders that it would not keep, and what is large.
AS_EVER = {"torch.bfloat16", "torch.complex64", "conjugated", "view", "channels last", "large"}


class AllKinds(Dataset[dict[str, Any]]):
    """Tensors of every kind that a worker may send."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = torch.arange(24).reshape(4, 6) + index
        dtypes = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.complex64]
        kinds = {str(dtype): numbers.to(dtype) for dtype in dtypes}
        kinds |= {"scalar": numbers[0, 0], "empty": numbers[:0], "view": numbers.T[1:4:2], "large": torch.ones(2**17)}
        images = torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
        imaginary = (torch.arange(3) * 1j).conj()
        kinds |= {"channels last": images, "conjugated": imaginary, "negated": imaginary.imag}
        return kinds | {"sparse": numbers.float().to_sparse(), "word": "a"}


def test_workers_send_small_tensors_by_value_and_all_others_as_ever() -> None:
    dataset = AllKinds()
    loader = DInterface(batch_size=1, num_workers=1).loader(dataset, batch_size=None)
    for expected, given in zip(map(dataset.__getitem__, range(3)), loader, strict=True):
        assert [*given] == [*expected] and given.pop("word") == expected.pop("word")
        for name, tensor in given.items():
            same = [(one.dtype, one.shape, one.layout) for one in (tensor, expected[name])]
            assert same[0] == same[1] and torch.equal(tensor.to_dense(), expected[name].to_dense())
            if name != "sparse":
                assert tensor.is_shared() == (name in AS_EVER)
                assert tensor.stride() == expected[name].stride() or name == "negated"
                tensor.zero_()  # memory of its own


WRONG = {
    "a fold without folds": (["--fold", "1"], "num_folds=None, fold=1; give both or neither"),
    "folds without a fold": (["--num_folds", "3"], "num_folds=3, fold=None; give both or neither"),
    "a fold out of range": (["--num_folds", "3", "--fold", "3"], "fold=3; give a number from 0 to 2, or all"),
    "one fold": (["--num_folds", "1", "--fold", "all"], "num_folds=1; give 2 or more"),
    "more folds than samples": (["--num_folds", "9999", "--fold", "0"], "leaves \\d+ folds without"),
    "folds of two kinds": (
        ["--num_folds", "3", "--fold", "0", "--val_fraction", "0.1"],
        "num_folds replaces val_fraction",
    ),
    "a fraction of one": (["--val_fraction", "1"], "val_fraction=1"),
    "a fraction that is no number": (["--test_fraction", ".nan"], "test_fraction=nan"),
    "fractions of everything": (["--val_fraction", "0.5", "--test_fraction", "0.6"], "leave no samples to train on"),
    "a fraction too small": (["--val_fraction", "0.0001"], "split val is empty"),
    "a missing split file": (["--split_file", "no.csv"], "no.csv cannot be read"),
    "an unknown set among several": (["--val_datasets", "standard_data", "standart"], "no dataset of that name"),
    "all folds from a checkpoint": (
        ["--fold", "all", "--num_folds", "2", "--ckpt_path", "auto"],
        "--fold all starts anew",
    ),
    "an argument no set takes": (["--data.size", "3"], "--data.size: there is no such argument"),
    "a seed of splits below 0": (["--split_seed", "-1"], "split_seed=-1"),
    "workers below 0": (["--num_workers", "-1"], "num_workers=-1"),
    "a huge batch": (["--batch_size", "99999999999999999999"], "batch_size=99999999999999999999"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_split_gives_one_line(name: str, run: Callable, tmp_path: Path) -> None:
    words, message = WRONG[name]
    outcome = run(*words)
    assert outcome.code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", outcome.err), outcome.err
    assert not list(tmp_path.glob("logs/*/*"))


def test_a_dataset_that_ignores_its_split_is_found_out(project: Path, run_in_project: Callable) -> None:
    (project / "data/leaky.py").write_text(
        "from data.standard_data import StandardData\n\n\nclass Leaky(StandardData):\n"
        "    def __init__(self, split):\n        super().__init__('train')\n"
    )
    outcome = run_in_project("--dataset", "leaky")
    assert outcome.code == 2
    assert "split train of leaky and split val of leaky share all samples" in outcome.err


def test_classes_are_told_from_a_dataset_without_targets_too(project: Path, run_in_project: Callable) -> None:
    (project / "data/wrong.py").write_text(
        "from data.standard_data import StandardData\n\n\nclass Wrong(StandardData):\n"
        "    num_classes = 9\n\n    def __init__(self, split):\n        super().__init__(split)\n"
        "        self.hidden = self.targets\n        del self.targets\n\n"
        "    def __getitem__(self, index):\n        return self.images[index], self.hidden[index]\n"
    )
    outcome = run_in_project("--dataset", "wrong")
    assert outcome.code == 2
    assert "a batch has class 9, but there are 9 classes, from 0 to 8" in outcome.err


def test_a_subclass_knows_the_splits_of_its_files(project: Path, run_in_project: Callable) -> None:
    from torchvision.datasets.fakedata import FakeData

    for number in range(20):
        file = project / "pets" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        FakeData(20, (3, 8, 8))[number][0].save(file)
    (project / "data/pets.py").write_text(
        "from data.folder_data import FolderData\n\n\nclass Pets(FolderData):\n"
        "    def __init__(self, split, root: str = 'pets', size: int = 8) -> None:\n"
        "        super().__init__(split, root, size)\n"
    )
    outcome = run_in_project("--dataset", "pets", "--max_epochs", "1")
    assert outcome.code == 0, outcome.err


def test_a_stream_is_refused(project: Path, run_in_project: Callable) -> None:
    (project / "data/stream.py").write_text(
        "from torch.utils.data import IterableDataset\n\n\nclass Stream(IterableDataset):\n"
        "    def __init__(self, split):\n        pass\n\n    def __iter__(self):\n        return iter([])\n"
    )
    outcome = run_in_project("--dataset", "stream")
    assert outcome.code == 2 and "dataset stream has no length" in outcome.err


def test_predict_takes_the_test_samples_of_a_set_without_a_split_of_its_own(project: Path) -> None:
    (project / "data/night.py").write_text(
        "from data.standard_data import StandardData\n\n\nclass Night(StandardData):\n"
        "    splits = ('val', 'test')\n\n    def __init__(self, split):\n        super().__init__(split)\n"
    )
    from data import DInterface

    data = DInterface(test_datasets=["night"])
    data.setup("predict")
    data.setup("test")
    assert torch.equal(data.sets["predict"]["night"].images, data.sets["test"]["night"].images)


def test_groups_on_both_sides_of_splits_of_ones_own_are_refused(project: Path, run_in_project: Callable) -> None:
    (project / "data/grouped.py").write_text(GROUPED.replace("start + number // 40", "number // 40"))
    outcome = run_in_project("--dataset", "grouped")
    assert outcome.code == 2
    assert "split train of grouped and split val of grouped share 7 groups, 0 among them" in outcome.err


def test_samples_of_equal_content_are_told(project: Path, run_in_project: Callable) -> None:
    (project / "data/overlap.py").write_text(
        "from data.standard_data import StandardData\n\n\nclass Overlap(StandardData):\n"
        "    def __init__(self, split):\n        super().__init__('train' if split == 'test' else split)\n"
        "        if split == 'test':\n            self.images, self.targets = self.images[:200], self.targets[:200]\n"
    )
    outcome = run_in_project("--dataset", "overlap", *QUICK)
    assert outcome.code == 0
    assert outcome.err == (
        "warning: split train of overlap and split test of overlap share samples: 200 of the 200 of the latter are "
        "equal\n"
    )


@pytest.mark.parametrize("kind", ["list(self.targets.numpy())", "list(self.targets)", "self.targets.double()"])
def test_classes_of_any_kind_are_stratified_and_balanced(kind: str, project: Path) -> None:
    (project / "data/kinds.py").write_text(
        "from data.standard_data import StandardData\n\n\nclass Kinds(StandardData):\n"
        "    def __init__(self, split):\n        super().__init__(split)\n"
        f"        self.targets = (self.targets == 3).long()\n        self.targets = {kind}\n"
    )
    from data import DInterface
    from utils.samples import class_per_sample

    data = DInterface(dataset="kinds", val_fraction=0.2, balanced_sampling=True)
    data.setup("fit")
    shares = [float(torch.tensor(class_per_sample(data.sets[s]["kinds"])).double().mean()) for s in ("train", "val")]
    assert shares[0] == pytest.approx(shares[1], abs=0.005)
    drawn = torch.cat([targets for _, targets in data.train_dataloader()])
    assert 0.42 < float(drawn.double().mean()) < 0.58


def test_a_last_batch_of_one_sample_is_left_out(run: Callable, tmp_path: Path) -> None:
    lines = [f"{number % 3},{number % 5},{number % 2}" for number in range(100)]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,class", *lines]) + "\n")
    words = ("--dataset", "csv_data", "--data.file", "table.csv", "--model_name", "mlp", "--max_epochs", "1")
    assert run(*words, "--batch_size", "79").code == 0


def test_a_file_that_is_opened_at_the_first_sample_is_opened_by_every_reader(
    project: Path, run_in_project: Callable
) -> None:
    (project / "data/lazy.py").write_text(
        "import os\n\nfrom data.standard_data import StandardData\n\n\nclass Lazy(StandardData):\n"
        "    opened_by = None\n\n    def __getitem__(self, index):\n"
        "        if self.opened_by is None:\n            self.opened_by = os.getpid()\n"
        "        assert self.opened_by == os.getpid(), 'opened by another process'\n"
        "        return super().__getitem__(index)\n"
    )
    outcome = run_in_project("--dataset", "lazy", "--num_workers", "2", "--max_epochs", "1")
    assert outcome.code == 0, outcome.err
