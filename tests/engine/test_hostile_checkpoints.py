"""Any file given as a checkpoint: one line of refusal or a right run; no traceback, no hang, no code that is run.

`FUZZ=50 pytest tests/engine/test_hostile_checkpoints.py` tries fifty times as many changes, other ones each time.
"""

from __future__ import annotations

import copy
import gzip
import io
import math
import os
import random
import struct
import time
import traceback
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine import checkpoint
from engine.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from engine.loggers import CSVLogger
from injection import Hang, time_limit
from torch import Tensor
from torch.utils.data import IterableDataset
from torchmetrics import MeanSquaredError
from toy import Net, dataset, loader, same_bits, stream, trainer

FUZZ = int(os.environ.get("FUZZ", "0"))
CASES, SEED = 800 * max(FUZZ, 1), time.time_ns() if FUZZ else 1


def outcome(action: Callable[[], Any]) -> str:
    """What came of it: "done", "refused" (one line) or "explained" (an error with notes); else where it failed."""
    try:
        with time_limit(10), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except engine.MisconfigurationException as error:
        return "refused" if str(error) and "\n" not in str(error) else f"a refusal of several lines: {str(error)!r}"
    except (Exception, Hang) as error:
        if getattr(error, "__notes__", None):
            return "explained"
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}engine{os.sep}" in f.filename]
        own = [f for f in frames if "tests" not in Path(f.filename).parts]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(own[-2:]))
        return f"{type(error).__name__} at {where}"
    return "done"


class Counting(IterableDataset[Any]):
    """The samples of `dataset(size)`, with a state."""

    def __init__(self, size: int = 4) -> None:
        self.size, self.position = size, 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < self.size:
            self.position += 1
            yield dataset(self.size)[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not 0 <= int(state["position"]) <= self.size:
            raise ValueError("position")
        self.position = int(state["position"])


class Full(Net):
    """Uses everything that a checkpoint keeps."""

    def __init__(self, lr: float = 0.1, names: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.error, self.train_error = MeanSquaredError(), MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.train_error(self(batch[0]).float().detach(), batch[1])
        self.log("train_error", self.train_error, on_step=True, on_epoch=True)
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.error.update(self(batch[0]).float(), batch[1])
        self.log("val_error", self.error, on_step=False, on_epoch=True)
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, amsgrad=True)
        schedulers = torch.optim.lr_scheduler
        warmup = schedulers.LinearLR(optimizer, total_iters=2)
        chain = schedulers.SequentialLR(optimizer, [warmup, schedulers.StepLR(optimizer, 2)], [2])
        plateau = {"scheduler": schedulers.ReduceLROnPlateau(optimizer, patience=1), "monitor": "val_loss"}
        return [optimizer], [{"scheduler": chain, "interval": "step"}, plateau]


class Strict(Full):
    """Computes with its argument when it is built."""

    def __init__(self, lr: float = 0.1, **others: Any) -> None:
        super().__init__(float(lr))


class SaveWithin(engine.Callback):
    """Keeps the state within an epoch and a window of accumulated gradients."""

    def on_train_batch_end(self, t: engine.Trainer, *args: Any) -> None:
        if t.current_epoch == 1 and args[3] == 2:
            t.save_checkpoint("within.ckpt")


def data(kind: str) -> Any:
    return torch.utils.data.DataLoader(Counting()) if kind == "within" else loader(4)


def resume(kind: str, path: str | None, epochs: int = 3) -> engine.Trainer:
    watch: list[engine.Callback] = [EarlyStopping("val_loss", patience=50), EMAWeightAveraging(decay=0.5), SaveWithin()]
    best = ModelCheckpoint("files", monitor="val_loss", save_top_k=2, every_n_epochs=epochs + (path is None))
    options = {"precision": "16-mixed", "accumulate_grad_batches": 2} if kind == "within" else {}
    logs = [CSVLogger(".", "logs", kind)]
    checkpoints = {"enable_checkpointing": True, "log_every_n_steps": 1, "callbacks": [*watch, best], "logger": logs}
    run = trainer(max_epochs=epochs, **checkpoints, **options)
    run.fit(Full(), data(kind), loader(2), ckpt_path=path)
    return run


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What is in checkpoints of the end of an epoch and from within one."""
    before, contents = os.getcwd(), {}
    os.chdir(tmp_path_factory.mktemp("good"))
    resume("end", None, 2).save_checkpoint("end.ckpt")
    resume("within", None, 2)
    for kind in ("end", "within"):
        contents[kind] = torch.load(f"{kind}.ckpt", weights_only=True)
    os.chdir(before)
    return contents


def tensors() -> list[Tensor]:
    index = torch.tensor([[0], [0]])
    return [
        *[torch.zeros(0), torch.tensor(math.nan), torch.zeros(2, 2), torch.full((1, 3), math.nan), torch.tensor(3)],
        *[torch.ones(1, 3, dtype=kind) for kind in (torch.complex64, torch.bool, torch.int64, torch.float16)],
        torch.sparse_coo_tensor(index, torch.ones(1), (1, 3)),
        torch.quantize_per_tensor(torch.ones(1, 3), 0.1, 0, torch.qint8),
        *[torch.empty(1, 3, device="meta"), torch.ones(1).expand(10**6), torch.ones(5056, dtype=torch.uint8)],
        *[torch.ones(1, 1, 3), torch.tensor(math.inf, dtype=torch.float64), torch.nn.Parameter(torch.ones(1, 3))],
    ]


VALUES: list[Any] = [None, "", "a", "\0", "a\nb", "../x", "x" * 9999, -1, 0, 1, 2, 3, 2**31, 2**62, 2**63, 2**70]
VALUES += [-(2**70), 10**400, 1.5, math.nan, math.inf, -math.inf, 1e-320, 1j, True, False, b"x", [], {}, (), set()]
VALUES += [[1], [None], ["a", "b"], [[]], [{}], {"a": 1}, {1: 2}, {None: None}, {"params": []}, (1, 2), {1, "a"}]
VALUES += [OrderedDict(a=1), Counter("ab"), torch.float32, torch.Size([1]), torch.device("cuda:7"), *tensors()]
RETYPED: list[Callable[[Any], Any]] = [str, list, tuple, set, dict, bool, int, float, complex, repr, torch.tensor]
RETYPED += [lambda v: [v], lambda v: {"a": v}, lambda v: -v, lambda v: v + v, lambda v: v * 2**40, lambda v: v[:-1]]
RETYPED += [lambda v: v.unsqueeze(0), lambda v: v.to(torch.complex64), lambda v: v.bool(), lambda v: v.long()]
RETYPED += [lambda v: v * math.nan, lambda v: v.to_sparse(), lambda v: v.to("meta"), lambda v: v.tolist()]
RETYPED += [lambda v: v.reshape(-1).repeat(2), lambda v: {str(k): v for k, v in v.items()}, lambda v: sorted(v)[::-1]]
DEEPER = 0.8


def change(content: dict[str, Any], key: str, dice: random.Random) -> str:
    """Change one place below `key`, and say what was done."""
    owner, place, path = content, key, repr(key)
    while isinstance(owner[place], dict | list) and owner[place] and dice.random() < DEEPER:
        owner = owner[place]
        place = dice.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        path += f"[{place!r}]"
    what = dice.choice(["replace", "replace", "replace", "retype", "retype", "delete", "extra", "swap"])
    if what == "delete":
        del owner[place]
    elif what == "extra":
        new = dice.choice(VALUES)
        if isinstance(owner, dict):
            owner[dice.choice(["x", 7, None, "net.weight", (1, 2)])] = new
        else:
            owner.insert(dice.choice([0, len(owner)]), new)
        path += f" beside {new!r}"
    elif what == "swap":
        other = dice.choice(list(content))
        owner[place] = copy.deepcopy(content[other])
        path += f" by {other}"
    else:
        new = dice.choice(VALUES)
        if what == "retype":
            try:
                new = dice.choice(RETYPED)(owner[place])
            except Exception:
                new = dice.choice(VALUES)
        owner[place] = new
        path += f" = {new!r}"[:120].replace("\n", " ")
    return f"{what} {path}"


USES: dict[str, Callable[[str], Any]] = {
    "resume": lambda kind: resume(kind, "a.ckpt"),
    "test": lambda kind: trainer().test(Full(), loader(2), ckpt_path="a.ckpt", verbose=False),
    "build": lambda kind: Full.load_from_checkpoint("a.ckpt"),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["end", "within"])
def test_a_checkpoint_that_was_changed_anywhere_is_refused_or_fits(
    kind: str, good: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every case writes files, and none must survive a power cut.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    dice, counts, bugs = random.Random(SEED), Counter[str](), OrderedDict[str, list[str]]()
    keys = list(good[kind])
    assert {"current_model_state", "optimizer_states", "metrics", "rng"} <= set(keys)
    assert good["within"]["gradients"] and good["within"]["precision"] and good["within"]["loaders"][0]
    for number in range(CASES):
        content, key = copy.deepcopy(good[kind]), keys[number % len(keys)]
        done = change(content, key, dice)
        torch.save(content, "a.ckpt")
        everywhere = key in ("state_dict", "hyper_parameters", "format") or dice.random() < 0.05
        for use in USES if everywhere else ["resume"]:
            came = outcome(lambda use=use: USES[use](kind))
            known = came in ("done", "refused", "explained")
            counts[f"{use}: {came if known else 'bug'}"] += 1
            if not known:
                bugs.setdefault(f"{use}: {came}", []).append(done)
    print(kind, dict(counts))
    told = [f"{bug}\n    {len(causes)} times, e.g. {'; '.join(causes[:3])}" for bug, causes in bugs.items()]
    assert not bugs, f"{len(bugs)} kinds (seed {SEED}):\n" + "\n".join(told)
    assert all(counts[f"{use}: {came}"] for use in USES for came in ("done", "refused"))


@pytest.mark.parametrize("batches", [10**6, 2**62, 2**70])
def test_a_position_beyond_every_epoch_ends(batches: int, tmp_path: Path) -> None:
    # A loader without length and state is read again from the start.
    run = trainer(max_epochs=1)
    run.fit(Net(), stream())
    run.save_checkpoint("a.ckpt")
    content = torch.load("a.ckpt", weights_only=True)
    content["state"] |= {"batches_done": batches, "epoch": 0}
    torch.save(content, "a.ckpt")
    came = outcome(lambda: trainer().fit(Net(), stream(), ckpt_path="a.ckpt"))
    assert came in ("done", "refused", "explained"), came


OTHER_NAMES = [["__init__"], ["trainer", "x y"]]
OTHER_NAMES += [pytest.param(names, marks=pytest.mark.long) for names in (["lr"], ["optimizer"], ["self"], [7], [None])]


@pytest.mark.parametrize("names", OTHER_NAMES)
def test_hyper_parameters_of_other_names_and_types_are_refused_or_left(
    names: list[Any], good: dict[str, dict[str, Any]]
) -> None:
    counts, wrong = Counter[str](), []
    attacks = [{"class_path": "os.system", "init_args": {"command": "touch executed"}}, "os.system", "../../x"]
    for value in [*VALUES, *attacks, "__import__('os').system('touch executed')", {"_target_": "os.system"}]:
        for base in ({}, {"lr": 0.1}):
            content = copy.deepcopy(good["end"]) | {"hyper_parameters": {**base, **dict.fromkeys(names, value)}}
            torch.save(content, "a.ckpt")
            for kind in (Full, Strict):
                came = outcome(lambda kind=kind: kind.load_from_checkpoint("a.ckpt"))
                wrong += [f"{kind.__name__} {value!r}: {came}"] if came not in ("done", "refused") else []
                counts[came] += 1
    print(names, dict(counts))
    assert not wrong, f"{len(wrong)}: {wrong[:4]}"
    assert counts["done"] and not Path("executed").exists()


def identical(a: Any, b: Any) -> bool:
    """Whether two structures hold the same, types and order included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return same_bits(a, b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def records(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def packed(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, part in parts.items():
            archive.writestr(name, part)
    return file.getvalue()


def damage(content: bytes, dice: random.Random) -> tuple[str, bytes]:
    """The file with some bytes changed, and what was done."""
    how = dice.choice(["flip", "flip", "insert", "delete", "repeat", "zero", "cut", "append", "swap", "pack", "rename"])
    at, size, parts = dice.randrange(len(content)), dice.choice([1, 2, 8, 64, 512]), records(content)
    start, here, end = content[:at], content[at : at + size], content[at + size :]
    if how in ("swap", "rename", "pack"):
        one, other = dice.sample(list(parts), 2)
        changed = {**parts, one: parts[other], other: parts[one]}
        if how == "rename":
            changed = {name.replace(one, dice.choice([other, f"{one}x", "../x", "a"])): p for name, p in parts.items()}
        if how == "pack":
            kept = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
            return how, packed(parts, dice.choice(kept))
        return f"{how} {one} {other}", packed(changed)
    flipped = bytes([here[0] ^ 1 << dice.randrange(8)]) + here[1:]
    ways = {"flip": start + flipped + end, "insert": start + dice.randbytes(size) + here + end, "delete": start + end}
    ways |= {"repeat": start + here * 2 + end, "zero": start + bytes(len(here)) + end, "cut": start}
    return f"{how} {size} at {at}", (ways | {"append": content + dice.randbytes(size)})[how]


def test_damaged_bytes_are_refused_or_read_as_they_were(tmp_path: Path, good: dict[str, dict[str, Any]]) -> None:
    path, dice, counts = tmp_path / "a.ckpt", random.Random(SEED), Counter[str]()
    torch.save(good["within"], path)
    content, wrong = path.read_bytes(), []
    for _ in range(CASES):
        how, changed = damage(content, dice)
        path.write_bytes(changed)
        loaded: list[Any] = []
        came = outcome(lambda loaded=loaded: loaded.append(checkpoint.load(path)))
        if came == "done" and not identical(loaded[0], good["within"]):
            came = "other content"
        wrong += [f"{how}: {came}"] if came not in ("done", "refused") else []
        counts[came] += 1
    print(dict(counts))
    assert not wrong, wrong[:20]
    assert counts["refused"] > CASES / 3 and counts["done"] > CASES / 50


@pytest.mark.parametrize("kind", ["folder", "empty", "text", "gzip", "legacy", "safetensors", "fifo", "zip of zip"])
def test_files_of_other_kinds_are_refused(kind: str, tmp_path: Path, good: dict[str, dict[str, Any]]) -> None:
    path, buffer = tmp_path / "a.ckpt", io.BytesIO()
    torch.save(good["end"], buffer, _use_new_zipfile_serialization=kind != "legacy")
    header = b'{"net.weight":{"dtype":"F32","shape":[1,3],"data_offsets":[0,12]}}'
    contents = {"empty": b"", "text": b"a,b\n1,2\n", "gzip": gzip.compress(buffer.getvalue())}
    contents |= {"legacy": buffer.getvalue(), "safetensors": struct.pack("<Q", len(header)) + header + bytes(12)}
    contents |= {"zip of zip": packed({"archive/data.pkl": buffer.getvalue(), "archive/version": b"3"})}
    if kind in contents:
        path.write_bytes(contents[kind])
    else:
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    assert outcome(lambda: checkpoint.load(path)) == "refused"
    assert outcome(lambda: trainer().test(Net(), loader(2), ckpt_path=path)) == "refused"
