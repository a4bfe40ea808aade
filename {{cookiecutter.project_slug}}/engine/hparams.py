"""Hyper-parameters: arguments of modules and data modules, kept in checkpoints so that these can be built again."""

from __future__ import annotations

import inspect
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import torch
import yaml
from torch import Tensor, nn

from engine import checkpoint as checkpoints
from engine.distributed import rank_zero_warn
from engine.exceptions import MisconfigurationException

if TYPE_CHECKING:
    class_only = classmethod
else:

    class class_only(classmethod):  # noqa: N801
        """A class method that cannot be called on an object, where its result would be overlooked."""

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            """The method of the class; of an object, a function that refuses."""
            bound = super().__get__(None, type(instance) if owner is None else owner)
            return bound if instance is None else lambda *args, **kwargs: _refuse(type(instance), bound.__name__)


def _refuse(cls: type, name: str) -> None:
    raise MisconfigurationException(
        f"{name} was called on an object, which it would leave as it is; write model = {cls.__name__}.{name}(...)"
    )


class Hyperparameters(dict[str, Any]):
    """A dict whose items can also be read, set and deleted as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyper-parameter {name!r}; there are: {', '.join(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        self.__getattr__(name)
        del self[name]


class HyperparametersMixin:
    """`save_hyperparameters`, `hparams` and `load_from_checkpoint`, for modules and data modules."""

    _log_hyperparams: bool = False
    # Which argument of `__init__` they were given as, in one piece; "kwargs" for arguments by name.
    _hparams_name: str | None = None

    @property
    def hparams(self) -> Hyperparameters:
        """What `save_hyperparameters` has kept, and what was changed since; it is saved in every checkpoint."""
        hparams: Hyperparameters = self.__dict__.setdefault("_hparams", Hyperparameters())
        return hparams

    @hparams.setter
    def hparams(self, given: Any) -> None:
        # As it was written until Lightning 1.2.
        self.save_hyperparameters(given, frame=inspect.currentframe())

    @property
    def hparams_initial(self) -> Hyperparameters:
        """A copy of what `save_hyperparameters` has kept, as it was then; this is what loggers get."""
        return _snapshot(self.__dict__.get("_hparams_initial", {}))

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: str | Sequence[str] | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep arguments of `__init__` in `hparams`; those of a subclass go before those of its parents.

        What is no plain data (primitives, tensors, containers of them) is kept, but not saved.

        Args:
            *args: Names of arguments; or one mapping, Namespace or dataclass with everything; default: all arguments.
            ignore: Names to leave out, and to forget if a parent class has kept them.
            frame: Where to look for `__init__`; default: the caller.
            logger: Hand them to the loggers.

        Raises:
            MisconfigurationException: There is no such argument, or nothing can be kept of what was given.
        """
        self._log_hyperparams = logger
        if len(args) == 1 and not args[0]:
            return
        here = inspect.currentframe()
        assert here is not None
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        arguments = {n: v for n, v in _arguments(self, frame or here.f_back).items() if n not in ignored}
        if all(isinstance(name, str) for name in args):
            if missing := [name for name in args if name not in arguments]:
                raise MisconfigurationException(
                    f"save_hyperparameters({missing[0]!r}): __init__ has no such argument, but {', '.join(arguments)}"
                )
            given, self._hparams_name = {name: arguments[name] for name in args or arguments}, "kwargs"
        else:
            given = _mapping(args)
            same = [n for n, v in arguments.items() if v is args[0] or (type(v) is type(args[0]) and v == args[0])]
            self._hparams_name = next(iter(same), None)
        self.hparams.update(given)
        for name in ignored & self.hparams.keys():
            del self.hparams[name]
        plain_hparams(self.hparams)
        self.__dict__["_hparams_initial"] = _snapshot(self.hparams)

    @class_only
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = None,
        hparams_file: str | os.PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build a module or data module from the hyper-parameters in a checkpoint, and load its weights or state.

        Args:
            checkpoint_path: A file that a trainer saved, this one or Lightning's.
            map_location: Device for the weights, as in `torch.load`; default: the one they were on, if it is there.
            hparams_file: A YAML file with the hyper-parameters to use instead.
            strict: Whether names of weights must be the same; default: the module's `strict_loading`.
            weights_only: Files are read as plain data in any case, so False is refused.
            **kwargs: Arguments of `__init__` that replace the saved ones.

        Raises:
            MisconfigurationException: The file is missing, damaged or of another model, or arguments do not fit.
        """
        if weights_only is False:
            raise MisconfigurationException(
                "load_from_checkpoint(weights_only=False) would run code of the file; leave it out, and give arguments "
                "that are no plain data by name"
            )
        if not isinstance(checkpoint_path, str | os.PathLike):
            raise MisconfigurationException(
                f"load_from_checkpoint takes a path, not a {type(checkpoint_path).__name__}"
            )
        path = Path(checkpoint_path)
        on_device = isinstance(map_location, str | torch.device)
        loaded = checkpoints.load(path, "cpu" if on_device else map_location or where_it_was, foreign=True)
        built: Self = _build(cls, path, loaded, hparams_file, kwargs)
        if issubclass(cls, nn.Module):
            _load_weights(built, path, loaded, strict, map_location if on_device else None)
        elif strict is not None:
            raise MisconfigurationException(f"strict={strict} is for weights, and a {cls.__name__} has none")
        else:
            with checkpoints.fitting(path, "datamodule"):
                if state := loaded.get("datamodule") or loaded.get(cls.__qualname__):
                    built.load_state_dict(state)  # type: ignore[attr-defined]
        return built


def plain_hparams(
    hparams: Mapping[str, Any], advice: str = "Silence this with save_hyperparameters(ignore=['{name}'])"
) -> dict[str, Any]:
    """What of hyper-parameters is plain data; warns of the rest, with an advice."""
    kept = {}
    for name, value in hparams.items():
        try:
            kept[name] = checkpoints.plain(value, name)
        except MisconfigurationException as error:
            rank_zero_warn(f"hyper-parameter {error}. {advice.format(name=name)}")
    return kept


def where_it_was(storage: Any, location: str) -> Any:
    """For `torch.load`: None, which stands for the device that tensors were on, or the CPU if there is none such."""
    kind, _, index = location.partition(":")
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    return None if int(index or 0) < there.get(kind, 0) else storage


class _YamlLoader(yaml.SafeLoader):
    """Reads what Lightning's loggers write, too."""


class _YamlDumper(yaml.SafeDumper):
    """Tells tuples from lists."""


TUPLE = "tag:yaml.org,2002:python/tuple"
_YamlLoader.add_constructor(TUPLE, lambda loader, node: tuple(loader.construct_sequence(node, deep=True)))  # type: ignore[arg-type]
_YamlDumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence(TUPLE, value))


def save_hparams_to_yaml(path: Path, hparams: Mapping[str, Any]) -> None:
    """Write `hparams.yaml`; tensors and objects are left out."""
    lines = []
    for name, value in hparams.items():
        try:
            lines.append(yaml.dump({name: checkpoints.plain(value, name)}, Dumper=_YamlDumper, allow_unicode=True))
        except (yaml.YAMLError, MisconfigurationException):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(lines) or "{}\n", encoding="utf-8")
    os.replace(temporary, path)


def load_hparams_from_yaml(path: Path) -> dict[str, Any]:
    """Read `hparams.yaml`.

    Raises:
        MisconfigurationException: It is missing, or no mapping of plain values.
    """
    try:
        hparams = yaml.load(path.read_text(encoding="utf-8"), Loader=_YamlLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MisconfigurationException(f"hparams_file {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(hparams, dict):
        raise MisconfigurationException(f"hparams_file {path} is no mapping of names to values")
    return hparams


def _arguments(owner: Any, frame: FrameType | None) -> dict[str, Any]:
    """Arguments of the `__init__` of an object that is running, and of those of its subclasses."""
    if is_dataclass(owner):
        return {field.name: getattr(owner, field.name) for field in fields(owner) if field.init}
    found: dict[str, Any] = {}
    inside = False
    while frame is not None:
        names, _, kwargs, values = inspect.getargvalues(frame)
        own = frame.f_code.co_name == "__init__" and bool(names) and values.get(names[0]) is owner
        if inside and not own:
            break
        if own:
            inside = True
            found |= {name: values[name] for name in names[1:] if name in values}
            found |= values[kwargs] if kwargs else {}
        frame = frame.f_back
    return found


def _mapping(args: tuple[Any, ...]) -> dict[str, Any]:
    """The one object that was given, as a dict."""
    given = args[0]
    if len(args) == 1 and isinstance(given, Namespace):
        return vars(given)
    if len(args) == 1 and is_dataclass(given) and not isinstance(given, type):
        return asdict(given)
    if len(args) == 1 and isinstance(given, Mapping):
        return given if isinstance(given, dict) else _attributes(given)
    raise MisconfigurationException(
        f"save_hyperparameters({', '.join(type(arg).__name__ for arg in args)}): give names of arguments, or one "
        "mapping, Namespace or dataclass"
    )


def _attributes(value: Any) -> Any:
    """Mappings, within each other, with items that can be read as attributes; other sequences as lists."""
    if isinstance(value, Mapping):
        return Hyperparameters({key: _attributes(item) for key, item in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return (tuple if isinstance(value, tuple) else list)(_attributes(item) for item in value)
    return value


def _snapshot(hparams: Mapping[str, Any]) -> Hyperparameters:
    """A copy that later changes do not reach; objects that are no plain data are shared."""
    copied = Hyperparameters(hparams)
    for name, value in hparams.items():
        try:
            checkpoints.plain(value, name)
        except MisconfigurationException:
            continue
        copied[name] = deepcopy(value)
    return copied


def _build(cls: type[Any], path: Path, loaded: dict[str, Any], hparams_file: Any, kwargs: dict[str, Any]) -> Any:
    """An object of a class, from the hyper-parameters in a checkpoint, those of a file, and those given by name."""
    prefix = "" if issubclass(cls, nn.Module) else "datamodule_"
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    with checkpoints.fitting(path, f"{prefix}hyper_parameters"):
        saved = dict(loaded.get(f"{prefix}hyper_parameters") or {})
        if hparams_file is not None:
            saved = load_hparams_from_yaml(Path(hparams_file))
        if unknown := [n for n in kwargs if n not in {*accepted, *saved} and not takes_any]:
            raise MisconfigurationException(
                f"{cls.__name__} has no argument {unknown[0]!r}; it has {', '.join(sorted(accepted))}"
            )
        left_out = loaded.get(f"{prefix}hparams_left_out") or []
        if missing := [n for n in left_out if n in accepted and n not in {**kwargs, **saved}]:
            raise MisconfigurationException(
                f"checkpoint {path} does not hold {', '.join(missing)}, which were no plain data; give what they were: "
                f"load_from_checkpoint(..., {missing[0]}=...)"
            )
        advice = f"It is not taken from {path}; give it by name: load_from_checkpoint(..., {{name}}=...)"
        saved = plain_hparams({name: value for name, value in saved.items() if name not in kwargs}, advice) | kwargs
        loaded[f"{prefix}hyper_parameters"], name = saved, loaded.get(f"{prefix}hparams_name")
        arguments = {name: _attributes(saved), **kwargs} if name in accepted else saved
        arguments = {n: v for n, v in arguments.items() if (n in accepted or takes_any) and n != "self"}
        built = cls(**arguments)
        # Others than arguments of `__init__` were kept, too.
        built.hparams.update({n: v for n, v in saved.items() if n not in built.hparams})
    return built


def _load_weights(module: Any, path: Path, loaded: dict[str, Any], strict: bool | None, device: Any) -> None:
    set_so = vars(module).get("strict_loading", strict)
    if strict is not None and set_so != strict:
        raise MisconfigurationException(f"strict={strict}, but {type(module).__name__} sets strict_loading={set_so}")
    with checkpoints.fitting(path, "content"):
        module.configure_model()
        module.on_load_checkpoint(loaded)
    checkpoints.load_weights(module, loaded["state_dict"], path, module.strict_loading if strict is None else strict)
    weights = (value for value in loaded["state_dict"].values() if isinstance(value, Tensor))
    module.to(next((weight.device for weight in weights), None) if device is None else device)
