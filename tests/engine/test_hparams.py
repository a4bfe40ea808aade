"""Hyper-parameters and `load_from_checkpoint`, in this engine and in Lightning, side by side where both can do it."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import io
import types
from collections import OrderedDict
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any

import engine
import pytest
import pytorch_lightning
import torch
import yaml
from engine import checkpoint
from engine.hparams import where_it_was
from engine.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy import QUIET, Memory, Net, loader, trainer, weights

ENGINES = [pytest.param(engine, id="engine"), pytest.param(pytorch_lightning, id="lightning")]
KINDS = ["LightningModule", "LightningDataModule"]
both = pytest.mark.parametrize("pl", ENGINES)


class Regression:
    """The steps of a linear regression, for modules of either engine."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self: Any) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@functools.cache
def plain(pl: ModuleType) -> type[Any]:
    class Plain(Regression, pl.LightningModule):
        def __init__(self, width: int = 2, lr: float = 0.1, **others: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))

    return Plain


@functools.cache
def whole(pl: ModuleType) -> type[Any]:
    class Whole(Regression, pl.LightningModule):
        def __init__(self, conf: Any, seed: int = 0) -> None:
            super().__init__()
            self.save_hyperparameters(conf)
            self.net = nn.Linear(3, conf["width"])
            self.seed = seed

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0]).sum()

    return Whole


@functools.cache
def datamodule(pl: ModuleType) -> type[Any]:
    class Data(pl.LightningDataModule):
        def __init__(self, size: int = 4, folder: str = "here") -> None:
            super().__init__()
            self.save_hyperparameters()
            self.read = 0

        def train_dataloader(self) -> Any:
            self.read += 1
            return DataLoader(TensorDataset(torch.ones(self.hparams.size, 3), torch.ones(self.hparams.size, 1)))

        def state_dict(self) -> dict[str, Any]:
            return {"read": self.read}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.read = state_dict["read"]

    return Data


def fitted(pl: ModuleType, model: Any, path: str = "a.ckpt", **options: Any) -> Any:
    """A trainer that has fitted a model for an epoch, and saved it."""
    run = pl.Trainer(**{**QUIET, **options})
    run.fit(model, datamodule=datamodule(pl)())
    run.save_checkpoint(path)
    return run


def bare(pl: ModuleType, kind: str = KINDS[0]) -> type[Any]:
    return getattr(pl, kind)  # type: ignore[no-any-return]


@both
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_are_kept_by_name_all_or_some(pl: ModuleType, kind: str) -> None:
    class Some(bare(pl, kind)):  # type: ignore[misc]
        def __init__(self, a: int, b: str = "b", *rest: int, c: float = 0.5, **others: Any) -> None:
            super().__init__()
            local = a + 1
            self.save_hyperparameters(*self.names, ignore=self.ignored)
            assert local

        names: tuple[str, ...] = ()
        ignored: Any = None

    def kept(names: tuple[str, ...], ignored: Any) -> dict[str, Any]:
        Some.names, Some.ignored = names, ignored
        return dict(Some(1, "x", 7, d=2).hparams)

    assert kept((), None) == {"a": 1, "b": "x", "c": 0.5, "d": 2}
    assert kept((), ["a", "d"]) == {"b": "x", "c": 0.5}
    assert kept(("b", "d"), None) == {"b": "x", "d": 2}
    assert kept((), "b") == {"a": 1, "c": 0.5, "d": 2}
    with pytest.raises((KeyError, engine.MisconfigurationException), match="nothing"):
        kept(("nothing",), None)


@both
def test_a_subclass_adds_its_arguments_to_those_of_its_parents(pl: ModuleType) -> None:
    class Parent(bare(pl)):  # type: ignore[misc]
        def __init__(self, lr: float, width: int = 8) -> None:
            super().__init__()
            self.keep()

        def keep(self) -> None:
            self.save_hyperparameters()

    class Child(Parent):
        def __init__(self, depth: int, **others: Any) -> None:
            super().__init__(lr=0.5, **others)

    class Again(Child):
        def __init__(self, depth: int, name: str = "n") -> None:
            super().__init__(depth + 1, width=16)
            self.save_hyperparameters(ignore="width")

    assert dict(Child(3).hparams) == {"lr": 0.5, "width": 8, "depth": 3}
    assert dict(Child(3, width=4).hparams) == {"lr": 0.5, "width": 4, "depth": 3}
    assert dict(Again(3).hparams) == {"lr": 0.5, "depth": 3, "name": "n"}


@both
def test_arguments_are_those_of_the_moment_and_the_initial_ones_stay(pl: ModuleType) -> None:
    class Changes(bare(pl)):  # type: ignore[misc]
        def __init__(self, sizes: Any = None) -> None:
            super().__init__()
            sizes = sizes or [1, 2]
            self.save_hyperparameters()

    model = Changes()
    assert model.hparams.sizes == model.hparams["sizes"] == [1, 2]
    model.hparams.sizes.append(3)
    model.hparams.lr = 0.1
    model.hparams.update(lr=0.2)
    assert dict(model.hparams) == {"sizes": [1, 2, 3], "lr": 0.2}
    model.hparams_initial["sizes"].append(4)
    assert dict(model.hparams_initial) == {"sizes": [1, 2]}
    del model.hparams.lr
    with pytest.raises(AttributeError):
        _ = model.hparams.lr
    with pytest.raises((AttributeError, KeyError)):
        del model.hparams.lr
    assert dict(copy.deepcopy(model).hparams) == {"sizes": [1, 2, 3]}
    assert dict(bare(pl)().hparams) == dict(bare(pl)().hparams_initial) == {}


class Conf(MutableMapping[str, Any]):
    """A mapping that is no dict, with attributes, as those of OmegaConf."""

    def __init__(self, **items: Any) -> None:
        self.__dict__.update(items)

    def __getitem__(self, key: str) -> Any:
        return self.__dict__[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.__dict__[key] = value

    def __delitem__(self, key: str) -> None:
        del self.__dict__[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)


@both
@pytest.mark.parametrize("kind", [dict, OrderedDict, argparse.Namespace, Conf])
def test_a_configuration_is_kept_in_one_piece(pl: ModuleType, kind: Any) -> None:
    class Piece(bare(pl)):  # type: ignore[misc]
        def __init__(self, conf: Any) -> None:
            super().__init__()
            self.save_hyperparameters(conf)

    model = Piece(kind(lr=0.5, layers=[1, 2], nested=Conf(a=1) if kind is Conf else {"a": 1}))
    assert model.hparams.lr == model.hparams["lr"] == 0.5 and model.hparams.layers == [1, 2]
    assert model.hparams.nested["a"] == 1
    assert kind is not Conf or model.hparams.nested.a == 1
    assert model._hparams_name == "conf"


@both
def test_an_empty_configuration_leaves_nothing(pl: ModuleType) -> None:
    class Piece(bare(pl)):  # type: ignore[misc]
        def __init__(self, conf: Any) -> None:
            super().__init__()
            self.save_hyperparameters(conf)

    assert dict(Piece({}).hparams) == {}


@dataclasses.dataclass
class Settings:
    lr: float = 0.5
    sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2])


def test_a_dataclass_is_kept_in_one_piece() -> None:
    class Piece(engine.Module):
        def __init__(self, settings: Any) -> None:
            super().__init__()
            self.save_hyperparameters(settings)

    assert Piece(Settings()).hparams == {"lr": 0.5, "sizes": [1, 2]}


@both
def test_a_module_may_be_a_dataclass(pl: ModuleType) -> None:
    @dataclasses.dataclass(eq=False)
    class Declared(bare(pl)):  # type: ignore[misc]
        lr: float = 0.1
        width: int = 2
        made: int = dataclasses.field(default=0, init=False)

        def __post_init__(self) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=["width"])

    assert dict(Declared(lr=0.5).hparams) == {"lr": 0.5}


@both
def test_a_frame_may_be_given(pl: ModuleType) -> None:
    def keep(model: Any, frame: types.FrameType) -> None:
        model.save_hyperparameters(frame=frame)

    class Framed(bare(pl)):  # type: ignore[misc]
        def __init__(self, a: int) -> None:
            import inspect

            super().__init__()
            frame = inspect.currentframe()
            assert frame is not None
            keep(self, frame)

    assert dict(Framed(3).hparams) == {"a": 3}


@pytest.mark.parametrize("given", [(1.5,), ([1, 2],), ({"a": 1}, "b"), ({"a": 1}, {"b": 2})])
def test_what_cannot_be_kept_is_refused(given: Any) -> None:
    with pytest.raises(engine.MisconfigurationException, match="names of arguments, or one mapping"):
        engine.Module().save_hyperparameters(*given)


def test_super_of_python_two_and_assignment_work_as_in_old_tutorials() -> None:
    class Old(engine.Module):
        def __init__(self, hparams: Any, lr: float = 0.1) -> None:
            super(Old, self).__init__()  # noqa: UP008
            self.hparams = hparams

    class Older(engine.Module):
        def __init__(self, lr: float = 0.1) -> None:
            engine.Module.__init__(self)
            self.save_hyperparameters()

    assert Old(argparse.Namespace(width=3)).hparams == {"width": 3} and Old({"width": 3})._hparams_name == "hparams"
    assert Older().hparams == {"lr": 0.1}


def test_a_module_within_a_module_keeps_its_own_arguments_only() -> None:
    class Inner(engine.Module):
        def __init__(self, a: int) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Outer(engine.Module):
        def __init__(self, b: int) -> None:
            super().__init__()
            self.inner = Inner(1)
            self.save_hyperparameters()

    assert Outer(2).hparams == {"b": 2} and Outer(2).inner.hparams == {"a": 1}


class Odd:
    """No plain data."""


def test_what_is_no_plain_data_is_kept_but_not_saved() -> None:
    class Keeps(Regression, engine.Module):
        def __init__(self, head: nn.Module, lr: float, make: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net, self.made = head, self.hparams.make()

    with pytest.warns(UserWarning, match=r"head is a Linear.*Silence this with .*ignore=\['head'\]"):
        model = Keeps(head := nn.Linear(3, 1), 0.5, make=Odd)
    assert model.hparams.head is head and model.hparams_initial.head is head and isinstance(model.made, Odd)
    with pytest.warns(UserWarning, match="make is a type"):
        fitted(engine, model)
    assert torch.load("a.ckpt", weights_only=True)["hyper_parameters"] == {"lr": 0.5}
    with pytest.raises(engine.MisconfigurationException, match="does not hold head, make, .* give what they were"):
        Keeps.load_from_checkpoint("a.ckpt")
    with pytest.warns(UserWarning, match="head is a Linear"):
        again = Keeps.load_from_checkpoint("a.ckpt", head=nn.Linear(3, 1), make=Odd)
    assert again.hparams.lr == 0.5 and weights(again).equal(weights(model))


@both
def test_loggers_get_what_was_kept_at_first(pl: ModuleType) -> None:
    logger = Memory()
    model = plain(pl)(lr=0.5)
    model.hparams["later"] = 1
    fitted(pl, model, logger=logger)
    assert logger.hparams == {"width": 2, "lr": 0.5, "size": 4, "folder": "here"}


@both
def test_hyper_parameters_can_be_kept_from_loggers(pl: ModuleType) -> None:
    class Silent(plain(pl)):  # type: ignore[misc]
        def __init__(self, secret: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters(logger=False)

    logger = Memory()
    fitted(pl, Silent(), logger=logger)
    assert logger.hparams == {"size": 4, "folder": "here"}


@both
def test_model_and_data_must_agree_on_what_they_share(pl: ModuleType) -> None:
    fitted(pl, plain(pl)(folder="here"), logger=Memory())
    with pytest.raises((RuntimeError, engine.MisconfigurationException), match="folder.*different values"):
        fitted(pl, plain(pl)(folder="there"), logger=Memory())


@both
@pytest.mark.parametrize("writer", ENGINES)
def test_a_module_is_built_again_from_a_file_of_either_engine(pl: ModuleType, writer: ModuleType) -> None:
    run = fitted(writer, plain(writer)(width=5, lr=0.5, note="x"))
    model = plain(pl).load_from_checkpoint("a.ckpt")
    assert dict(model.hparams) == {"width": 5, "lr": 0.5, "note": "x"}
    assert weights(model).equal(weights(run.lightning_module)) and model.device.type == "cpu"
    again = plain(pl).load_from_checkpoint("a.ckpt", map_location=lambda storage, location: storage, lr=0.25, more=1)
    assert dict(again.hparams) == {"width": 5, "lr": 0.25, "note": "x", "more": 1}
    for where in ("cpu", torch.device("cpu"), {"cuda:0": "cpu"}):
        assert weights(plain(pl).load_from_checkpoint("a.ckpt", map_location=where)).equal(weights(model))


@pytest.mark.parametrize(
    ("location", "there"),
    [
        ("cpu", True),
        ("cuda:0", True),
        ("cuda:1", True),
        ("cuda:2", False),
        ("cuda", True),
        ("mps", False),
        ("xla:0", False),
    ],
)
def test_weights_go_where_they_were_or_to_the_cpu(location: str, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    storage = torch.UntypedStorage(1)
    # For `torch.load`, None stands for the place that the file names.
    assert where_it_was(storage, location) is (None if there else storage)


@both
@pytest.mark.parametrize("writer", ENGINES)
@pytest.mark.parametrize("kind", [dict, Conf])
def test_a_configuration_in_one_piece_comes_back(pl: ModuleType, writer: ModuleType, kind: Any) -> None:
    conf = {"width": 5, "lr": 0.5, "nested": {"a": [1, {"b": 2}]}}
    if writer is pytorch_lightning and kind is Conf:
        conf = {"width": 5, "lr": 0.5, "nested": {"a": 1}}
    run = fitted(writer, whole(writer)(kind(**conf), seed=3))
    model = whole(pl).load_from_checkpoint("a.ckpt")
    assert dict(model.hparams) == conf and weights(model).equal(weights(run.lightning_module))
    other = whole(pl).load_from_checkpoint("a.ckpt", lr=0.25, seed=4)
    assert other.hparams.lr == 0.25 and other.seed == 4
    assert pl is not engine or (model.hparams.nested["a"] == conf["nested"]["a"])  # type: ignore[index]


@both
@pytest.mark.parametrize("writer", ENGINES)
def test_a_data_module_is_built_again_from_a_file_of_either_engine(pl: ModuleType, writer: ModuleType) -> None:
    run = pl_fit = writer.Trainer(**QUIET)
    pl_fit.fit(plain(writer)(), datamodule=datamodule(writer)(size=2))
    run.save_checkpoint("a.ckpt")
    data = datamodule(pl).load_from_checkpoint("a.ckpt", folder="there")
    assert dict(data.hparams) == {"size": 2, "folder": "there"}
    # What only one of the engines knows is where the other keeps the state.
    assert data.read == (1 if pl is engine or writer is pl else 0)


@both
@pytest.mark.parametrize("writer", ENGINES)
def test_a_file_of_either_engine_can_be_tested_by_either(pl: ModuleType, writer: ModuleType) -> None:
    class Tested(plain(pl)):  # type: ignore[misc]
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    run = fitted(writer, plain(writer)(lr=0.5))
    x, y = next(iter(loader(8, 8)))
    with torch.no_grad():
        expected = run.lightning_module.net(x)
    again = pl.Trainer(**QUIET)
    results = again.test(Tested(), loader(8, 8), ckpt_path="a.ckpt", verbose=False)
    assert results[0]["loss"] == pytest.approx(nn.functional.mse_loss(expected, y).item())
    assert again.predict(Tested(), loader(8, 8), ckpt_path="a.ckpt")[0].equal(expected)


def test_a_file_of_lightning_cannot_be_resumed_from() -> None:
    fitted(pytorch_lightning, plain(pytorch_lightning)())
    refused = "a.ckpt is not a checkpoint of this engine .* take its weights by"
    with pytest.raises(engine.MisconfigurationException, match=refused):
        trainer(max_epochs=2).fit(plain(engine)(), datamodule=datamodule(engine)(), ckpt_path="a.ckpt")


@both
def test_hyper_parameters_may_come_from_a_yaml_file(pl: ModuleType) -> None:
    logger = CSVLogger(".", "n", "v")
    fitted(engine, plain(engine)(width=5, lr=0.5, sizes=(1, 2), text="ä: 'b'"), logger=logger)
    file = Path("n/v/hparams.yaml")
    saved = {"width": 5, "lr": 0.5, "sizes": (1, 2), "text": "ä: 'b'", "size": 4, "folder": "here"}
    assert yaml.full_load(file.read_text()) == saved
    file.write_text(file.read_text().replace("lr: 0.5", "lr: 0.75"))
    model = plain(pl).load_from_checkpoint("a.ckpt", hparams_file=str(file), text="c")
    assert dict(model.hparams) == {**saved, "lr": 0.75, "text": "c"}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "No such file"),
        ("a: [", "cannot be read"),
        ("- a", "is no mapping"),
        ("a: !!python/object:x.Y {}", "cannot be read"),
    ],
)
def test_a_yaml_file_that_is_no_good_is_refused(text: str | None, fault: str) -> None:
    fitted(engine, plain(engine)())
    if text is not None:
        Path("h.yaml").write_text(text)
    with pytest.raises(engine.MisconfigurationException, match=fault):
        plain(engine).load_from_checkpoint("a.ckpt", hparams_file="h.yaml")


@functools.cache
def grown(pl: ModuleType, declared: bool | None = None) -> type[Any]:
    class Grown(plain(pl)):  # type: ignore[misc]
        def __init__(self, width: int = 2, **others: Any) -> None:
            super().__init__(width)
            self.head = nn.Linear(1, 1)
            if declared is not None:
                self.strict_loading = declared

    return Grown


@both
def test_weights_that_do_not_fit_are_refused_unless_told_otherwise(pl: ModuleType) -> None:
    run = fitted(pl, plain(pl)())
    for declared, strict in ((None, None), (True, None), (None, True), (True, True)):
        with pytest.raises((RuntimeError, engine.MisconfigurationException), match="head"):
            grown(pl, declared).load_from_checkpoint("a.ckpt", strict=strict)
    for declared, strict in ((None, False), (False, None), (False, False)):
        with pytest.warns(UserWarning, match="head"):
            model = grown(pl, declared).load_from_checkpoint("a.ckpt", strict=strict)
        assert weights(model.net).equal(weights(run.lightning_module.net))
    for declared, strict in ((True, False), (False, True)):
        with pytest.raises((ValueError, engine.MisconfigurationException), match="strict_loading"):
            grown(pl, declared).load_from_checkpoint("a.ckpt", strict=strict)
    with pytest.raises((RuntimeError, engine.MisconfigurationException)):
        plain(pl).load_from_checkpoint("a.ckpt", strict=False, width=3)


@both
def test_what_a_module_leaves_out_on_purpose_is_not_missed_in_a_run(pl: ModuleType) -> None:
    class Frozen(plain(pl)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = False
            self.backbone = nn.Linear(3, 3)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {n: v for n, v in super().state_dict(*args, **kwargs).items() if "backbone" not in n}

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    fitted(pl, model := Frozen())
    assert not [name for name in torch.load("a.ckpt", weights_only=True)["state_dict"] if "backbone" in name]
    pl.Trainer(**QUIET).validate(again := Frozen(), loader(2), ckpt_path="a.ckpt", verbose=False)
    assert weights(again.net).equal(weights(model.net))


@both
def test_hooks_see_the_file_before_weights_are_loaded(pl: ModuleType) -> None:
    class Built(Regression, pl.LightningModule):  # type: ignore[misc]
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net: Any = None
            self.order: list[str] = []

        def configure_model(self) -> None:
            self.order.append("configure_model")
            self.net = self.net or nn.Linear(3, 1)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["own"] = 7

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.order.append(f"on_load_checkpoint {checkpoint['own']} {checkpoint['hyper_parameters']['lr']}")

    run = fitted(pl, Built())
    model = Built.load_from_checkpoint("a.ckpt", lr=0.5)
    assert model.order == ["configure_model", "on_load_checkpoint 7 0.5"]
    assert weights(model).equal(weights(run.lightning_module))


@both
def test_it_cannot_be_called_on_an_object(pl: ModuleType) -> None:
    fitted(pl, plain(pl)())
    with pytest.raises(
        (TypeError, engine.MisconfigurationException), match="load_from_checkpoint.*on an (instance|object)"
    ):
        plain(pl)().load_from_checkpoint("a.ckpt")


class AttributeDict(dict[str, Any]):
    """As in old versions of Lightning."""


def test_python_objects_in_a_file_of_lightning_are_left_out_and_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    AttributeDict.__module__ = "pytorch_lightning.utilities.parsing"
    monkeypatch.setattr(pytorch_lightning.utilities.parsing, "AttributeDict", AttributeDict)
    hparams = {
        "width": 3,
        "lr": 0.5,
        "loss": nn.MSELoss(),
        "act": nn.ReLU,
        "path": Path("x"),
        "conf": AttributeDict(a=1),
    }
    run = fitted(pytorch_lightning, plain(pytorch_lightning)(width=3))
    content = torch.load("a.ckpt", weights_only=True)
    content |= {"hyper_parameters": AttributeDict(hparams), "callbacks": {Odd: {"x": Odd()}}}
    torch.save(content, "b.ckpt")
    with pytest.warns(UserWarning) as warned:
        model = plain(engine).load_from_checkpoint("b.ckpt", path="y")
    assert model.hparams == {"width": 3, "lr": 0.5, "path": "y", "conf": {"a": 1}}
    assert weights(model).equal(weights(run.lightning_module))
    texts = " ".join(str(warning.message) for warning in warned)
    assert "loss" in texts and "act" in texts and "load_from_checkpoint(..., loss=...)" in texts and "path" not in texts


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("open('executed', 'w')",))


def test_code_in_a_file_is_never_run() -> None:
    fitted(pytorch_lightning, plain(pytorch_lightning)())
    content = torch.load("a.ckpt", weights_only=True)
    torch.save({**content, "x": Evil()}, "b.ckpt")
    plain(engine).load_from_checkpoint("b.ckpt")
    torch.save({**content, "hyper_parameters": {"lr": Evil()}}, "c.ckpt")
    with pytest.warns(UserWarning, match="not taken from c.ckpt"):
        assert plain(engine).load_from_checkpoint("c.ckpt").hparams.lr == 0.1
    torch.save({**content, "state_dict": Evil()}, "d.ckpt")
    with pytest.raises(engine.MisconfigurationException, match="holds Python objects"):
        plain(engine).load_from_checkpoint("d.ckpt")
    assert not Path("executed").exists()


def test_a_file_of_this_engine_with_python_objects_is_refused() -> None:
    fitted(engine, plain(engine)())
    torch.save({**torch.load("a.ckpt", weights_only=True), "x": Odd()}, "b.ckpt")
    with pytest.raises(engine.MisconfigurationException, match="holds Python objects"):
        plain(engine).load_from_checkpoint("b.ckpt")


def test_wrong_use_is_refused() -> None:
    fitted(engine, plain(engine)())

    class Narrow(Regression, engine.Module):
        def __init__(self, width: int = 2, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))

    cases: list[tuple[type[Any], Any, dict[str, Any], str]] = [
        (Narrow, "a.ckpt", {"widht": 3}, "no argument 'widht'; it has lr, width"),
        (Narrow, "a.ckpt", {"weights_only": False}, "would run code"),
        (Narrow, io.BytesIO(), {}, "takes a path, not a BytesIO"),
        (Narrow, "none.ckpt", {}, "does not exist"),
        (datamodule(engine), "a.ckpt", {"strict": True}, "a Data has none"),
    ]
    for cls, path, options, fault in cases:
        with pytest.raises(engine.MisconfigurationException, match=fault):
            cls.load_from_checkpoint(path, **options)
    torch.save({"state_dict": {}}, "plain.ckpt")
    with pytest.raises(engine.MisconfigurationException, match="not a checkpoint of this engine"):
        Narrow.load_from_checkpoint("plain.ckpt")


def test_files_of_before_hyper_parameters_had_a_name_still_work() -> None:
    run = fitted(engine, plain(engine)(width=3))
    content = torch.load("a.ckpt", weights_only=True)
    for key in ("hparams_name", "datamodule_hparams_name", "pytorch-lightning_version"):
        del content[key]
    checkpoint.save(content, Path("b.ckpt"))
    assert weights(plain(engine).load_from_checkpoint("b.ckpt")).equal(weights(run.module))
    trainer(max_epochs=2).fit(plain(engine)(width=3), datamodule=datamodule(engine)(), ckpt_path="b.ckpt")


def test_hyper_parameters_that_a_file_cannot_hold_have_to_be_given() -> None:
    class Chosen(Net):
        def __init__(self, activation: Any = torch.nn.ReLU) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.activation = activation()

    with pytest.warns(UserWarning, match="activation"):
        run = trainer()
        run.fit(Chosen(torch.nn.Tanh), loader())
        run.save_checkpoint("chosen.ckpt")
    with pytest.raises(engine.MisconfigurationException, match=r"does not hold activation.*\(..., activation=...\)"):
        Chosen.load_from_checkpoint("chosen.ckpt")
    loaded = Chosen.load_from_checkpoint("chosen.ckpt", activation=torch.nn.Tanh)
    assert isinstance(loaded.activation, torch.nn.Tanh)
