"""No file that somebody may have downloaded runs code, and none ends in a traceback: pickles, configs, names.

`FUZZ=50 pytest tests/test_hostile_files.py` tries fifty times as many configs, other ones each time.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
import yaml
from data import DInterface
from engine import checkpoint
from model import MInterface
from utils.arguments import parse
from utils.fine_tuning import load_pretrained

FUZZ = int(os.environ.get("FUZZ", "0"))
CASES, SEED = 1200 * max(FUZZ, 1), time.time_ns() if FUZZ else 1
SECONDS = 10
# Memory that refusing a file may take, and what a mistake in doing so is cut off at.
MEBIBYTES, CUT_OFF = 700, 8 * 2**30


class Hang(BaseException):
    """Not an Exception, which the code under test may catch."""


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[Callable[[], None]]:
    """Every test ends; a call gives it more time."""

    def hang(*_: Any) -> None:
        raise Hang(f"not over after {SECONDS} seconds")

    def more() -> None:
        signal.alarm(SECONDS)

    previous = signal.signal(signal.SIGALRM, hang)
    more()
    yield more
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def outcome(action: Callable[[], Any]) -> str:
    """ "done", "refused" (one line, exit code 2), or the error."""
    try:
        action()
    except engine.MisconfigurationException as error:
        return "refused" if str(error) and "\n" not in str(error) else f"several lines: {str(error)!r}"
    except SystemExit as error:
        return {"0": "done", "2": "refused"}.get(str(error.code), f"exit code {error.code}")
    except (Exception, Hang) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "done"


def packed(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return file.getvalue()


def archive_of(raw: bytes) -> bytes:
    """What torch.save writes, with right checksums, around another pickle."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4)}, buffer)
    with zipfile.ZipFile(buffer) as file:
        return packed({name: file.read(name) for name in file.namelist()} | {"archive/data.pkl": raw})


class Call:
    """Pickles as the call of a function, and as items that are set in what it gives."""

    def __init__(self, function: Any, *arguments: Any, items: list[Any] | None = None) -> None:
        self.call = (function, arguments, None, None, items and iter(items))

    def __reduce__(self) -> Any:
        return self.call


TOUCH = "__import__('pathlib').Path('executed').touch()"
CALLS: dict[str, Any] = {
    "system": Call(os.system, "touch executed"),
    "eval": Call(eval, TOUCH),
    "exec": Call(exec, TOUCH),
    "popen": Call(subprocess.Popen, ["touch", "executed"]),
    "open": Call(open, "executed", "w"),
    "path": Call(Path.touch, Path("executed")),
    "getattr": Call(getattr, Call(importlib.import_module, "os"), "system"),
    "load": Call(torch.load, "evil.pt", None, None),
    "partial": functools.partial(eval, TOUCH),
}
PLACES: dict[str, Callable[[Any], Any]] = {
    "alone": lambda call: call,
    "format": lambda call: {"format": call},
    "deep": lambda call: {"format": 2, "state_dict": {"a": [({"b": call},)]}, "hyper_parameters": {}},
    "key": lambda call: {"format": 2, "state_dict": {}, "hyper_parameters": OrderedDict({("a", call): 1})},
}


def readers(path: Path) -> dict[str, Callable[[], Any]]:
    """All ways in which a file's content comes in."""
    return {
        "load": lambda: checkpoint.load(path),
        "build": lambda: MInterface.load_from_checkpoint(path),
        "pretrained": lambda: load_pretrained(torch.nn.Linear(3, 1), str(path)),
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", CALLS)
def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(
    call: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, path = PLACES[place](CALLS[call]), tmp_path / "a.ckpt"
    Path("evil.pt").write_bytes(pickle.dumps(CALLS["system"]))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        raw, legacy = pickle.dumps(content, protocol), io.BytesIO()
        if protocol >= 2:
            torch.save(content, legacy, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        for written in (raw, archive_of(raw), legacy.getvalue()):
            path.write_bytes(written)
            came = {name: outcome(read) for name, read in readers(path).items()}
            assert set(came.values()) == {"refused"}, came
    assert not Path("executed").exists()
    if call in ("system", "eval") and place == "alone":
        # It is as dangerous as it looks where nothing guards.
        pickle.loads(pickle.dumps(content))
        assert Path("executed").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(3, 1), torch.ones(1, 3)).save(str(tmp_path / "a.ckpt"))
    assert {name: outcome(read) for name, read in readers(tmp_path / "a.ckpt").items()} == dict.fromkeys(
        readers(tmp_path), "refused"
    )


def nested(depth: int, make: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = make(value)
    return value


def cycle() -> list[Any]:
    endless: list[Any] = [1]
    endless.append(endless)
    return endless


BOMBS: dict[str, Callable[[], Any]] = {
    "deep lists": lambda: nested(300, lambda v: [v]),
    "deep mappings": lambda: nested(300, lambda v: {"a": v}),
    "shared lists": lambda: nested(40, lambda v: [v, v]),
    "shared tuples": lambda: nested(40, lambda v: (v, v)),
    # Hashing it looks at every item of every tuple.
    "a key of shared tuples": lambda: Call(OrderedDict, items=[(nested(45, lambda v: (v, v)), 1)]),
    "a key within a key": lambda: Call(OrderedDict, items=[((cycle(), 1), 1)]),
    "endless lists": cycle,
    "a view": lambda: torch.empty(1).expand(10**12),
    "many views": lambda: [torch.empty(1).expand(2 * 10**7) for _ in range(100)],
    "a sparse tensor": lambda: torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (10**12,)),
    "a tensor without data": lambda: torch.empty(10**12, device="meta"),
    "zeros": lambda: Call(bytearray, 3 * 10**9),
    "many zeros": lambda: [Call(bytearray, 10**8) for _ in range(30)],
    "too many zeros": lambda: Call(bytearray, 10**17),
    "storage": lambda: Call(torch.FloatStorage, 10**9),
}


def cost(action: Callable[[], Any]) -> tuple[str, float, float]:
    """What came of it in a process of its own, its seconds, and the MiB by which its memory grew."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(0)
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + CUT_OFF, used + CUT_OFF))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        came = outcome(action)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(writing, json.dumps([came, time.monotonic() - begin, grown]).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return tuple(json.loads(text)) if text else ("ended by a signal", float(SECONDS), 0.0)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory as Linux does")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["hyper_parameters", "rng"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_that_stands_for_a_huge_one_is_refused_at_once(
    bomb: str, where: str, tmp_path: Path, time_limit: Callable[[], None]
) -> None:
    path, content = tmp_path / "a.ckpt", {"format": checkpoint.FORMAT, "state_dict": {}, "hyper_parameters": {}}
    value = BOMBS[bomb]()
    torch.save({**content, where: {"a": value} if where in content else value}, path)
    assert path.stat().st_size < 2**16
    ways = readers(path) if where in content else {"load": readers(path)["load"]}
    for name, read in ways.items():
        time_limit()
        came, seconds, grown = cost(read)
        assert came == "refused", (name, came)
        assert seconds < 4 and grown < MEBIBYTES, (name, seconds, grown)


def test_a_compressed_bomb_is_refused(tmp_path: Path, time_limit: Callable[[], None]) -> None:
    (path := tmp_path / "a.ckpt").write_bytes(
        packed({"archive/data.pkl": b"x", "archive/data/0": bytes(10**9)}, zipfile.ZIP_DEFLATED)
    )
    # Making one takes longer than refusing it.
    time_limit()
    for name, read in readers(path).items():
        came, seconds, grown = cost(read)
        assert (came, seconds < 4, grown < MEBIBYTES) == ("refused", True, True), (name, came, seconds, grown)


GOOD = """lr: 0.01
optimizer: SGD
optimizer_args: {momentum: 0.9}
max_epochs: 2
val_datasets: [standard_data]
loss: [CrossEntropyLoss]
freeze: null
model:
  width: 8
data:
  augment: false
"""
TAGS = ["!!python/object/apply:os.system ['touch executed']", "!!python/object/new:os.system ['touch executed']"]
TAGS += ["!!python/object/apply:subprocess.Popen [[touch, executed]]", "!!python/object/apply:eval ['1']", "!!set {a}"]
TAGS += ["!!python/name:os.system", "!!python/module:os", "!!python/object:pathlib.Path {}", "!!python/tuple [1, 2]"]
TAGS += ["!!python/object/apply:builtins.exec [\"open('executed', 'w')\"]", "!!binary aGVsbG8=", "!include /etc/passwd"]
TAGS += ["!ENV ${HOME}", "!!timestamp 2026-01-01", "!!omap [a: 1]", "!<tag:yaml.org,2002:python/name:os.system> ''"]
TAGS += ["{class_path: os.system, init_args: {command: touch executed}}", "{_target_: os.system}", "!evil x", "!!int x"]
ODD = [
    "null",
    "~",
    "[]",
    "{}",
    "''",
    "1e400",
    "-.inf",
    ".nan",
    "9" * 5000,
    "0x" + "f" * 300,
    "1_000",
    "0o17",
    "1:30:00",
]
ODD += ["&a [*a]", "*b", '"\\0"', '"\\e[31m"', '"\\ud800"', "[" * 90 + "]" * 90, "{a: " * 30 + "1" + "}" * 30]
ODD += ["|\n  a\n  b", "yes", "2026-13-45", "a: b", "'../../x'", "é" * 300, "[1, [2, {a: b}]]", "{1: 2, null: 3}", "@x"]
FLAGS = ["lr", "model_name", "dataset", "val_datasets", "model", "data", "loss", "metrics", "optimizer", "seed", "fold"]
FLAGS += [
    "optimizer_args",
    "config",
    "ckpt_path",
    "log_dir",
    "experiment",
    "run_name",
    "callbacks",
    "devices",
    "freeze",
]


def mutated(dice: random.Random) -> bytes:
    """The content of a config, changed."""
    lines = GOOD.splitlines()
    how = dice.choice(["value", "value", "tag", "tag", "bytes", "random", "repeat", "order", "encoding", "cut", "bomb"])
    at = dice.randrange(len(lines))
    if how in ("value", "tag"):
        key = dice.choice([*FLAGS, lines[at].split(":")[0]])
        lines = [line for line in lines if not line.startswith(f"{key}:") or key in ("model", "data")]
        value = dice.choice(TAGS if how == "tag" else ODD)
        # Some of them alone, so that nothing else is refused first.
        return "\n".join([*(lines if dice.random() < 0.5 else []), f"{key}: {value}", ""]).encode("utf-8", "replace")
    text = bytearray(GOOD.encode())
    for _ in range(dice.choice([1, 3])):
        text[dice.randrange(len(text))] = dice.randrange(256)
    deep = "".join(f"{' ' * n}a:\n" for n in range(dice.choice([15, 25, 500])))
    many = "a0: &a0 [1, 1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}, *a{n}]\n" for n in range(14))
    ways: dict[str, Any] = {"bytes": bytes(text), "random": dice.randbytes(dice.randrange(80)), "cut": text[: at * 9]}
    ways |= {
        "repeat": GOOD + GOOD,
        "order": "\n".join(dice.sample(lines, len(lines))),
        "bomb": dice.choice([deep, many]),
    }
    ways["encoding"] = GOOD.encode(dice.choice(["utf-16", "utf-8-sig", "utf-32", "utf-16-be", "utf-7"]))
    return ways[how].encode() if isinstance(ways[how], str) else bytes(ways[how])


@pytest.mark.long
def test_any_config_is_refused_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], time_limit: Callable[[], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    dice, counts, wrong = random.Random(SEED), Counter[str](), OrderedDict[str, list[bytes]]()
    main = importlib.import_module("main").main
    for number in range(CASES):
        (file := Path("a.yaml")).write_bytes(content := mutated(dice))
        time_limit()
        words = ["--config", "a.yaml", "--fast_dev_run=true", "--enable_model_summary=false", "--num_workers=0"]
        # Most of them only as far as the arguments; what a run makes of those costs a hundred times as much.
        whole = number % 40 == 0
        came = outcome(lambda w=words, r=whole: main(w) if r else parse(w, (DInterface, MInterface)))
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        came = f"{len(said)} lines of error" if came == "refused" and whole and len(said) != 1 else came
        counts[f"{'run' if whole else 'parse'}: {came}"] += 1
        if came not in ("done", "refused"):
            wrong.setdefault(came, []).append(content)
        assert not Path("executed").exists(), file.read_bytes()
    print(dict(counts))
    assert not wrong, {came: contents[:2] for came, contents in wrong.items()}
    assert min(counts[f"{how}: {came}"] for how in ("run", "parse") for came in ("done", "refused")) > 0


NAMES = [
    "../../x",
    "../evil",
    "/etc/passwd",
    "os",
    "os.path",
    "__init__",
    "__builtins__",
    "__main__",
    "model_interface",
]
NAMES += ["data_interface", "a.b.C", "torch.nn.Linear", "torch.nn.functional", "x;y", "evil", "evil.Evil", "sub.evil"]
NAMES += ["sub/evil", "./standard_net", "standard_net.py", "ѕtandard_net", "ｓtandard_net", "", " ", "x" * 9999, "a\0b"]
NAMES += ["..", "~", "$HOME", "%s", "{0}", "*", "-", "Module", "Optimizer", "_Loss", "Metric", "nn", "functional"]
EVIL = "from pathlib import Path\nPath({!r}).touch()\n\n\nclass Evil:\n    pass\n"
NAMING = ["model_name", "dataset", "train_dataset", "val_datasets", "test_datasets", "loss", "metrics", "optimizer"]


@pytest.fixture
def marker(project: Path) -> Path:
    """A project with files that tell of being imported: beside it, in it, and in folders of model/ and data/."""
    marker = project.parent / "imported"
    for folder in ("..", ".", "model/sub", "data/sub", "model/__evil", "utils"):
        (project / folder).mkdir(exist_ok=True)
        (project / folder / "evil.py").write_text(EVIL.format(str(marker)))
    sys.modules.pop("evil", None)
    return marker


@pytest.mark.long
@pytest.mark.parametrize("flag", NAMING)
def test_no_name_leads_out_of_the_folders(
    flag: str, marker: Path, run_in_project: Callable[..., Any], time_limit: Callable[[], None]
) -> None:
    dry = ["--fast_dev_run=true", "--enable_model_summary=false", "--enable_progress_bar=false"]
    for name in NAMES:
        for given in (name, [name]) if flag.endswith("s") else (name,):
            time_limit()
            Path("a.yaml").write_text(yaml.safe_dump({flag: given}, allow_unicode=True), encoding="utf-8")
            for words in ([f"--{flag}={name}"], ["--config", "a.yaml"]):
                result = run_in_project(*dry, *words)
                empty = name.strip() in ("", "~") and result.code == 0
                assert empty or result.code == 2, (words, name[:50], result)
                assert empty or (result.err.count("\n"), result.err[:7]) == (1, "error: "), (name[:50], result.err)
                assert not marker.exists(), (words, name)
    # It would tell.
    importlib.import_module("evil")
    assert marker.exists()


@pytest.fixture
def trained(marker: Path, run_in_project: Callable[..., Any]) -> Path:
    """The folder of a run in a project of one's own."""
    short = ["--max_epochs=1", "--limit_train_batches=1", "--limit_val_batches=1", "--limit_test_batches=1"]
    quiet = ["--enable_model_summary=false", "--enable_progress_bar=false", "--num_workers=0"]
    assert run_in_project(*short, *quiet, "--run_name=a").code == 0
    return Path("logs/standard_net/a")


def test_a_run_folder_that_was_tampered_with_names_nothing_else(
    trained: Path, marker: Path, run_in_project: Callable[..., Any], time_limit: Callable[[], None]
) -> None:
    good, dice, counts = trained / "config.yaml", random.Random(SEED), Counter[str]()
    config, environment, spoilt = good.read_text(), (trained / "environment.json").read_text(), list[bytes]()
    spoilt += [yaml.safe_dump({**yaml.safe_load(config), flag: name}).encode() for flag in NAMING for name in NAMES[:3]]
    spoilt += [f"{config}\n{flag}: {value}\n".encode() for flag in FLAGS[:7] for value in dice.sample(TAGS + ODD, 2)]
    spoilt += [b"", b"\0", b"[]", b"lr: &a [*a]", config.encode("utf-16"), config.replace("lr", "l\x1br").encode()]
    others = [
        b"",
        b"[]",
        b"{",
        b'{"versions": 3}',
        b"[" * 100_000,
        b'{"finished": {"a": 1}, "job": [[]], "data": {"a": 1}}',
    ]
    commands = (
        ["--ckpt_path=last", "--max_epochs=2"],
        ["--ckpt_path=auto", "--run_name=a"],
        ["test", "--ckpt_path=best"],
    )
    for number, content in enumerate([*spoilt, *others]):
        is_config = number < len(spoilt)
        for words in (commands[number % 3],) if is_config else commands:
            time_limit()
            good.write_bytes(content if is_config else config.encode())
            (trained / "environment.json").write_bytes(environment.encode() if is_config else content)
            kept = shutil.copytree("logs", "kept", dirs_exist_ok=True)
            result = run_in_project(*words)
            errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
            assert result.code in (0, 2) and len(errors) == (result.code == 2), (words, content[-90:], result)
            assert "Traceback" not in result.err and not marker.exists() and not Path("executed").exists(), content
            counts[f"{'config' if is_config else 'environment'} {words[0]}: {result.code}"] += 1
            shutil.rmtree("logs")
            shutil.move(kept, "logs")
    print(dict(counts))
    assert {name[-1] for name in counts if name.startswith("config")} == {"0", "2"}


@pytest.mark.parametrize("flag", [*NAMING, "loss_args", "metric_args", "optimizer_args", "model", "task", "pretrained"])
def test_hyper_parameters_of_a_checkpoint_name_nothing_else(
    flag: str, trained: Path, marker: Path, time_limit: Callable[[], None]
) -> None:
    net, data = importlib.import_module("model").MInterface, importlib.import_module("data").DInterface
    own = importlib.import_module("engine").MisconfigurationException
    content = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)
    section, kind = ("datamodule_hyper_parameters", data) if "dataset" in flag else ("hyper_parameters", net)
    values: list[Any] = [*NAMES, 7, -1, None, [], {}, [[]], [None], {"class_path": "os.system"}, 2**70, 1j, b"x", True]
    counts, wrong = Counter[str](), []
    for value in values:
        time_limit()
        torch.save({**content, section: {**content[section], flag: value}}, "a.ckpt")
        try:
            net.load_from_checkpoint("a.ckpt") if kind is net else kind(**{**content[section], flag: value}).setup(
                "fit"
            )
            counts["done"] += 1
        except own as error:
            wrong += [f"{value!r}: {error}"] if "\n" in str(error) else []
            counts["refused"] += 1
        except Exception as error:
            wrong.append(f"{value!r:.60}: {type(error).__name__}: {error}")
        assert not marker.exists(), value
    assert not wrong, f"{len(wrong)} of {len(values)}: {wrong[:12]}"
    assert counts["refused"] + counts["done"] == len(values) and not Path("executed").exists()
