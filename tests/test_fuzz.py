"""Any flags and any config: a right run, or one line of error and exit code 2; no traceback, no hang, no empty run.

`FUZZ=50 pytest tests/test_fuzz.py` tries fifty times as many examples, other ones each time.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import string
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from data import DInterface
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model import MInterface
from utils.arguments import COMMANDS, _full_parser
from utils.registry import names

# Examples may share a folder and a captured terminal: each begins by emptying them.
FUZZ = int(os.environ.get("FUZZ", "0"))
QUIET = {"enable_model_summary": "false", "enable_progress_bar": "false"}
TRY = QUIET | {"fast_dev_run": "true"}
SHORT = QUIET | {name: "1" for name in ("max_epochs", "limit_train_batches", "limit_val_batches", "limit_test_batches")}
SECONDS = 30


def examples(number: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    number = number * FUZZ if FUZZ else number
    return settings(
        deadline=None, max_examples=number, derandomize=not FUZZ, print_blob=True, suppress_health_check=checks
    )


class Hang(BaseException):
    """Not an Exception, which the code under test may catch."""


@pytest.fixture
def attempt(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict[str, str], list[str]], int]]:
    """A function that runs flags and words in an empty folder, and checks what every run must keep to."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("this machine is offline")

    def hang(*_: Any) -> None:
        raise Hang(f"not over after {SECONDS} seconds")

    # So that ../.. is still a folder of the test.
    here = tmp_path / "a" / "b" / "c"
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    previous, threads = signal.signal(signal.SIGALRM, hang), torch.get_num_threads()
    # Nets this small gain nothing from more.
    torch.set_num_threads(1)

    def attempt(flags: dict[str, str], words: list[str], files: Callable[[], None] = lambda: None) -> int:
        os.chdir(tmp_path)
        for entry in tmp_path.iterdir():
            shutil.rmtree(entry)
        here.mkdir(parents=True)
        os.chdir(here)
        files()
        there = {path for path in tmp_path.rglob("*") if path.is_dir()}
        signal.alarm(SECONDS)
        try:
            outcome = run(*words, *(f"--{name}={value}" for name, value in flags.items()))
        finally:
            signal.alarm(0)
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = False
        check(outcome)
        for folder in {path for path in tmp_path.rglob("*") if path.is_dir()} - there:
            begun = folder.name == "checkpoints" or any(folder.rglob("config.yaml"))
            # What stays is the path to it, as far as it was made before the run was refused.
            assert begun or outcome.code == 0 or not re.search(r"version_|fold_|standard_net/.", str(folder)), folder
            assert begun or outcome.code == 0 or not any(path.is_file() for path in folder.rglob("*")), folder
        return outcome.code

    yield attempt
    signal.signal(signal.SIGALRM, previous)
    torch.set_num_threads(threads)


def check(outcome: Any) -> None:
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert outcome.code in (0, 2), outcome
    assert "Traceback" not in outcome.err + outcome.out
    if outcome.code == 0:
        assert errors == []
    else:
        assert errors == lines[-1:], outcome.err
        assert lines[-1].isprintable() and 10 < len(lines[-1]) < 3500


# Numbers so large that they cannot be meant, or small ones: what lies between would be a long run, and right.
NUMBERS = ["0", "-1", "1", "2", "3", "0.5", "1.5", "-0.0", "1e-400", "1e-320", "1e308", "1e400", "-1e400"]
NUMBERS += [".nan", "nan", ".inf", "-.inf", "inf", "0x10", str(2**31), str(2**63), str(-(2**63)), "1" + "0" * 400]
YAML = ["[", "]", "{", "{}", "[]", "{a: 1}", "{1: 2}", "{null: 1}", "{[1]: 2}", "{a: {b: [1]}}", "[null]", "[1, a]"]
YAML += ["[[1]]", "[true, 1.5]", "[{}]", "&a [*a]", "&a {x: *a}", "*a", "!x y", "---", "--- 1\n--- 2", "...", "? x"]
YAML += ["!!python/object/apply:os.system [x]", "!!python/name:os.system", "!!binary aGk=", "2026-01-01", "<<: {a: 1}"]
YAML += ["{class_path: os.system}", "- a\n- b", "a: b: c", "[" * 3000, "{a: " + "[" * 300 + "]" * 300 + "}"]
WORDS = ["", " ", "\t", "\n", "é", "日本", "🙂", "\x00", "\x1b[31m", "\x07", "\ud800", "\udcff", "\u2028", "x" * 5000]
WORDS += ["os", "torch.nn", "__init__", "__class__", "_Loss", "Module", "../..", "/", ".", "/dev/null", "a/b", "None"]
WORDS += ["null", "~", "true", "false", "yes", "%s", "%(prog)s", "{0}", "'", '"', "`", "#", "@x", "a=b", "=", "-", "--"]
WORDS += ["auto", "best", "last", "all", "all_but", "DEFAULT"]
TEXT = st.text(max_size=12) | st.sampled_from(WORDS)
ANY = st.sampled_from(NUMBERS) | st.sampled_from(YAML) | TEXT


def values(hint: Any) -> st.SearchStrategy[str]:
    """What may be given for a flag of a type: near to it, and far from it."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return st.sampled_from([str(part) for part in parts]) | ANY
    if kind in (list, tuple):
        return st.lists(values(parts[0]), max_size=4).map(lambda items: f"[{', '.join(items)}]") | ANY
    if kind is dict or hint is dict:
        keys = st.sampled_from(["features", "acc", "gamma", "betas", "reduction", "class_path", "1", "''", "null"])
        pairs = st.dictionaries(keys, ANY, max_size=3)
        return pairs.map(lambda items: f"{{{', '.join(f'{k}: {v}' for k, v in items.items())}}}") | ANY
    if parts:
        return st.one_of([values(part) for part in parts])
    return st.sampled_from(NUMBERS) | ANY if hint in (int, float) else ANY


@cache
def flags_of(net: str, dataset: str) -> dict[str, Any]:
    """The types of all flags, by name."""
    parser = _full_parser(net, [dataset], (DInterface, MInterface))
    hints = {a.dest: getattr(a, "_typehint", None) for a in parser._actions if a.dest != "help"}
    return {name: str if hint is None else hint for name, hint in hints.items()}


COMMON = flags_of("standard_net", "standard_data")
NETS, DATASETS = [(net, "standard_data") for net in names("model")], [("standard_net", data) for data in names("data")]
CASES = [("standard_net", "standard_data", name) for name in COMMON]
CASES += [(*both, name) for both in (*NETS, *DATASETS) for name in flags_of(*both) if name not in COMMON]


@pytest.mark.parametrize(("net", "dataset", "flag"), CASES, ids=lambda word: word)
@examples(3)
@given(draw=st.data())
def test_any_value_of_any_flag(net: str, dataset: str, flag: str, draw: st.DataObject, attempt: Callable) -> None:
    value = draw.draw(values(flags_of(net, dataset)[flag]))
    flags = {"model_name": net, "dataset": dataset} | ({"model.width": "2"} if net != "torchvision_net" else {})
    # Folders and their names come to use in a run that writes some.
    writes = flag in ("log_dir", "experiment", "run_name", "fast_dev_run", "monitor", "patience") and value[:1] != "/"
    if flag == "num_workers" and re.fullmatch(r"[2-9]|0x10", value):
        return  # right, and slow
    attempt((SHORT if writes else TRY) | flags | {flag: value}, [])


TABLE = "a,b,group,y\n" + "".join(f"{n % 7},{n},{n % 30},{'xyz'[n % 3]}\n" for n in range(90))
FILES = {
    "split.csv": "sample,split\n" + "".join(f"{n},{('train', 'val', 'test')[n % 3]}\n" for n in range(60)),
    "half.csv": "sample,split\n1,train\n2,val\n",
    "empty.csv": "",
    "wrong.csv": "a,b\n1,2\n",
    "binary.csv": bytes(range(256)),
}
SHARES = ["0", "1", "0.1", "0.5", "0.9999", "1e-9", "1e-400"]
SETS = ["standard_data", "csv_data", "[standard_data, csv_data]", "[standard_data, standard_data]", "[]", "[null]"]
# Flags that have to do with each other, with values that are right, or nearly so.
RELATED: list[dict[str, list[str]]] = [
    {
        "lr_schedule": ["constant", "cosine", "step", "multistep", "exponential", "onecycle", "plateau"],
        "lr_schedule_args": [
            *["{step_size: 1}", "{step_size: 0}", "{step_size: .nan}", "{gamma: 0.5}", "{gamma: 1e308}", "{gamma: -1}"],
            *["{milestones: [1, 2]}", "{milestones: 3}", "{milestones: [a]}", "{final: 0.1}", "{pct_start: 0}"],
            *["{div_factor: 1e-320}", "{factor: 0.5, patience: 0}", "{patience: a}", "{mode: max}", "{gamma: null}"],
            *["{step_size: 1, gamma: 1e308}", "{eps: x, factor: 0.1}", "{min_lr: [1, 2]}", "{steps: 3}"],
        ],
        "warmup_steps": ["0", "1", "2", "100", "-1", str(2**63)],
        "max_epochs": ["0", "1", "3", "-1"],
        "max_steps": ["0", "1", "3"],
        "min_epochs": ["0", "3"],
        "limit_train_batches": ["0", "1", "3", "0.0", "1e-9", str(2**63)],
        "limit_val_batches": ["0", "1", "0.0", "0.5", "1e-9"],
        "accumulate_grad_batches": ["1", "2", "100"],
        "monitor": ["val_loss", "val_acc", "train_loss", "test_loss", "nope", ""],
        "check_val_every_n_epoch": ["1", "2", "100"],
        "patience": ["1", "2"],
    },
    {
        "num_folds": ["1", "2", "3", "1000", str(2**31), str(2**63)],
        "fold": ["0", "1", "2", "-1", "all"],
        "val_fraction": SHARES,
        "test_fraction": SHARES,
        "split_file": ["split.csv", "half.csv", "empty.csv", "wrong.csv", "binary.csv", ".", "/dev/null"],
        "dataset": ["standard_data", "csv_data", "folder_data", "torchvision_data"],
        "train_dataset": ["standard_data", "csv_data"],
        "val_datasets": SETS,
        "test_datasets": SETS,
        "model_name": ["standard_net", "mlp"],
        "balanced_sampling": ["true"],
        "batch_size": ["1", "5000", str(2**31 - 1)],
        "run_name": ["a", "a/fold_1", "fold_1", ".", "-"],
        "fast_dev_run": ["true", "2", "0"],
    },
    {
        "task": ["multiclass", "binary", "multilabel", "regression", "sequence"],
        "loss": [
            *["CrossEntropyLoss", "MSELoss", "NLLLoss", "CTCLoss", "[CrossEntropyLoss, MultiMarginLoss]", "[]"],
            *["GaussianNLLLoss", "KLDivLoss", "AdaptiveLogSoftmaxWithLoss", "_Loss", "BCELoss", "HuberLoss"],
        ],
        "loss_args": [
            *["{reduction: sum}", "{reduction: none}", "{reduction: [1]}", "{weight: [1, 2]}", "{weight: a}", "{p: 3}"],
            *["{CrossEntropyLoss: 3}", "{label_smoothing: 2}", "{ignore_index: 3}", "{delta: -1}", "{margin: a}"],
        ],
        "loss_weights": ["[1]", "[1, 2]", "[0, 0]", "[.nan]", "[1e308, 1e308]", "[]"],
        "mixup": ["0.2", "1e-320", "999999"],
        "cutmix": ["1", "1e-320"],
        "label_smoothing": ["0.1", "0.9999"],
        "metrics": [
            *["acc", "f1", "auroc", "mae", "r2", "[]", "[acc, acc]", "[acc, Accuracy]", "ConfusionMatrix", "ROC"],
            *["WorstClassAccuracy", "Metric", "CalibrationError", "HingeLoss", "GroupFairness", "KLDivergence"],
        ],
        "metric_args": [
            *["{acc: {top_k: 2}}", "{acc: {top_k: 20}}", "{acc: {average: none}}", "{acc: 3}", "{acc: [1]}"],
            *["{acc: {task: binary}}", "{acc: {num_classes: 3}}", "{auroc: {thresholds: 5}}", "{acc: {self: 1}}"],
        ],
        "model.num_classes": ["0", "1", "3", "10", "20"],
        "model.sample_shape": ["[1, 8, 8]", "[3, 8, 8]", "[0, 0, 0]"],
        "precision": ["bf16-mixed", "16-mixed"],
    },
    {
        "optimizer": ["SGD", "Adam", "Adafactor", "Muon", "LBFGS", "Rprop", "RMSprop", "SparseAdam", "ASGD", "Adamax"],
        "optimizer_args": [
            *[
                "{momentum: 0.9}",
                "{momentum: a}",
                "{nesterov: true}",
                "{betas: [2, 3]}",
                "{betas: 3}",
                "{betas: [a, b]}",
            ],
            *[
                "{eps: 0}",
                "{eps: a}",
                "{fused: true}",
                "{foreach: true}",
                "{capturable: true}",
                "{differentiable: true}",
            ],
            *[
                "{params: 1}",
                "{lr: 1}",
                "{self: 1}",
                "{net: 1}",
                "{alpha: .nan}",
                "{ns_steps: a}",
                "{etas: [0.5, 1.2]}",
            ],
        ],
        "lr": ["1e-3", "3", "1e-320", "1e30", "1e307", "1e308"],
        "weight_decay": ["0", "0.5", "1e308"],
        "lr_scales": ["{features: 0.1}", "{features: 1e308}", "{features: 0}", "{x: 1}", "{'': 1}", "{1: 2}"],
        "freeze": ["features", "[features, classify]", "all_but", "[all_but, classify]", "x", "''", "null", "[]"],
        "gradient_clip_val": ["0", "0.5", "1e-320", ".inf", ".nan", "-1"],
        "gradient_clip_algorithm": ["norm", "value"],
        "precision": ["bf16-mixed", "16-mixed"],
        "deterministic": ["true"],
    },
]


def few_of(related: dict[str, list[str]]) -> st.SearchStrategy[dict[str, str]]:
    chosen = st.lists(st.sampled_from(list(related)), min_size=2, max_size=4, unique=True)
    return chosen.flatmap(lambda flags: st.fixed_dictionaries({f: st.sampled_from(related[f]) for f in flags}))


def write_files() -> None:
    (folder := Path("datasets")).mkdir()
    (folder / "table.csv").write_text(TABLE)
    for name, content in FILES.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("related", RELATED, ids=["schedules", "splits", "losses and metrics", "optimizers"])
@examples(30)
@given(draw=st.data())
def test_flags_that_have_to_do_with_each_other(
    related: dict[str, list[str]], draw: st.DataObject, attempt: Callable
) -> None:
    flags = draw.draw(few_of(related))
    base = (TRY if draw.draw(st.booleans()) else SHORT) | {"model.width": "2", "max_steps": "2"}
    attempt(base | flags, [], write_files)


KEYS = st.sampled_from([*COMMON, "model", "data", "config", "repeats", "logger", "callbacks"]) | st.text(max_size=5)
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([2**31, 2**70, 10**400, "1e3", float("nan")])
LEAVES |= st.text(max_size=5) | st.dates() | st.datetimes() | st.binary(max_size=3) | st.sampled_from(WORDS[:6])
CONTENT = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | LEAVES, inner, max_size=3), max_leaves=8
)
MAPPING = st.dictionaries(KEYS | st.integers() | st.none() | st.booleans(), CONTENT, max_size=3)
RAW = [
    b"",
    b"\xff\xfe",
    b"\xef\xbb\xbflr: 0.1\n",
    b"\xef\xbb\xbf",
    b"lr: 0.1\r\nmodel:\r\n  width: 2\r\n",
    b"\0",
    b"lr",
]
RAW += [
    b"lr: 0.1\nlr: 0.2\n",
    b"{lr: 0.1",
    b"lr:\t0.1\n\tx",
    b"--- {lr: 1}\n--- {lr: 2}",
    b"%YAML 9.9\n---\nlr: 1",
    b"[]",
]
RAW += [b"lr: &a 0.1\nweight_decay: *a\n", b"x: &a [*a]", b"data: &a {x: *a}", b"<<: {lr: 0.1}", b"? [1]\n: 2", b"{}"]
RAW += [b"model: [1]", b"data: 3", b"model:\n  width: &w 2\n  x: *w", b"config: a.yaml", b"lr: !!float x", b"{" * 5000]
RAW += [b"val_datasets: &a [*a]", b"model: {1: 2}", b"data: {null: 1}", b"model: {width: {width: 2}}", b"model: null"]
RAW += [b"optimizer_args: {a: {class_path: os.system}}", b"lr: 2026-01-01", b"lr: 12:30:00", b"eval_datasets: [1]"]
# A few lines that stand for a billion values.
RAW += [
    b"optimizer_args:\n  a: &a [1]\n"
    + b"".join(b"  %c: &%c [%s*%c]\n" % (n, n, b"*%c, " % (n - 1) * 9, n - 1) for n in b"bcdefghij")
]


@examples(100)
@given(
    contents=st.lists(
        MAPPING.map(lambda m: yaml.safe_dump(m, allow_unicode=True).encode("utf-8", "surrogatepass"))
        | st.sampled_from(RAW)
        | st.binary(max_size=20),
        min_size=1,
        max_size=2,
    ),
    flags=st.sampled_from([{}, {"lr": "0.1"}, {"model.width": "3"}]),
)
def test_any_config(contents: list[bytes], flags: dict[str, str], attempt: Callable) -> None:
    def write() -> None:
        for number, content in enumerate(contents):
            Path(f"{number}.yaml").write_bytes(content)

    words = [word for number in range(len(contents)) for word in ("--config", f"{number}.yaml")]
    attempt(TRY | {"num_workers": "0"} | flags, words, write)


VOCABULARY = [*COMMANDS, "export", "-h", "--help", "-", "--", "---", "-1", "--lr", "--lr=", "--lr=0.1", "0.1", "--lr 1"]
VOCABULARY += [
    "--config",
    "--config=",
    "a.yaml",
    "--ckpt_path",
    "best",
    "last",
    "--model.width",
    "4",
    "--model",
    "--=1",
]
VOCABULARY += ["--val_datasets", "--eval_datasets", "standard_data", "--freeze", "--loss", "--max_epoch", "--max_ep=1"]
VOCABULARY += ["--lr+", "--loss+=MSELoss", "--optimizer_args.momentum=1", "--optimizer_args.a.b=1", "--data.augment"]
VOCABULARY += ["--print_config", "--data.split=val", "--logger=true", "--callbacks=[]", "@a", "é", "", " ", "\ud800"]


@examples(80)
@given(words=st.lists(st.sampled_from(VOCABULARY) | st.text(string.printable, max_size=6), max_size=6))
def test_any_words(words: list[str], attempt: Callable) -> None:
    attempt(TRY, words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `logs` of a short run."""
    import main

    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    main.main([f"--{name}={value}" for name, value in (SHORT | {"model.width": "2"}).items()])
    os.chdir(before)
    return folder / "logs"


RUN = "logs/standard_net/version_0"
CHECKPOINT = f"{RUN}/checkpoints/best.ckpt"
DAMAGED = [b"", b"x", b"{", b"[]", b"null", b"lr: a", b"model_name: x", b"model: 3", b"\xff", b'{"versions": 3}', None]
PATHS = ["best", "last", CHECKPOINT, RUN, f"{RUN}/config.yaml", "none.ckpt", "/dev/null", "/", "", "x" * 300, "../x"]
PATHS += [f"{'y' * 300}/checkpoints/best.ckpt", f"{CHECKPOINT}/x", "folder/checkpoints/best.ckpt", "\ud800", "a\0b"]


@pytest.mark.long
@examples(90)
@given(
    command=st.sampled_from(COMMANDS),
    path=st.sampled_from(PATHS),
    damage=st.sampled_from(["config.yaml", "environment.json", "metrics.csv", "checkpoints/best.ckpt"]),
    content=st.sampled_from(["as it was", "cut", *DAMAGED]),
    flags=st.sampled_from([{}, {"model.width": "3"}, {"dataset": "csv_data"}, {"config": f"{RUN}/config.yaml"}]),
)
def test_any_checkpoint_in_any_state(
    command: str, path: str, damage: str, content: bytes | str | None, flags: dict, attempt: Callable, trained: Path
) -> None:
    def write() -> None:
        shutil.copytree(trained, "logs")
        write_files()
        file = Path(RUN, damage)
        if content is None:
            file.unlink()
        elif content != "as it was":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content == "cut" else content)

    attempt(SHORT | {"max_epochs": "2", "ckpt_path": path} | flags, [command], write)


@pytest.mark.parametrize("flag", ["optimizer_args", "loss_args", "metric_args", "lr_schedule_args"])
@pytest.mark.parametrize("where", ["{%s}", "{a: {%s}}", "{a: [{%s, init_args: {x: 1}}]}"])
def test_a_class_that_is_named_is_not_imported(
    flag: str, where: str, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stranger.py").write_text("from pathlib import Path\nPath('hacked').touch()\n\n\nclass A:\n    pass\n")
    value = where % "class_path: stranger.A"
    (tmp_path / "a.yaml").write_text(f"{flag}: {value}\n")
    for words in ([f"--{flag}", value], ["--config", "a.yaml"]):
        assert run("--fast_dev_run", "true", *words).code == 2
        assert not (tmp_path / "hacked").exists() and "stranger" not in sys.modules


SAID = {
    "a list in one word": (["--loss=NoLoss"], "--loss NoLoss: there is none of that name"),
    "a list of the wrong kind": (["--loss_weights", "a"], r"--loss_weights \['a'\]: give a list such as \[0.1, 0.2"),
    "several types": (["--patience", "1e308"], "--patience 1e308: give a whole number or null$"),
    "nothing": (["--seed="], "--seed '': give a whole number"),
    "null in a config": (["--config", "null.yaml"], "seed is null; give a whole number"),
    "a folder for a checkpoint": (["--ckpt_path", "."], r"--ckpt_path '\.' is no file; give best, last"),
    "more workers than CPUs": (["--num_workers", "1000"], r"num_workers=1000; .* from 0 to \d+ \(there are \d+ CPUs\)"),
    "a number beyond any": (["--lr", "1" + "0" * 400], "0\\.\\.\\.: a number is too large"),
    "a terminal's control characters": (["--seed", "\x1b[31m"], r"--seed \\x1b\[31m: give a whole number"),
    "endless aliases": (["--config", "endless.yaml"], "lists or mappings lie more than 20 deep"),
    "no classes": (["--model.num_classes", "0"], "--model.num_classes 0: give a whole number from 1"),
    "more folds than memory": (["--num_folds", str(2**40), "--fold", "0"], "leaves \\d+ folds without samples"),
    "an argument refused in the first step": (
        ["--optimizer_args", "{capturable: true}"],
        "--optimizer AdamW fails with .*capturable",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_the_line_says_what_to_do(name: str, run: Callable, tmp_path: Path) -> None:
    (tmp_path / "null.yaml").write_text("seed: null\n")
    (tmp_path / "endless.yaml").write_text("data: &a {x: *a}\n")
    words, message = SAID[name]
    outcome = run(*words)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert re.search(f"^error: .*{message}", outcome.err), outcome.err
    assert not list(tmp_path.glob("logs/*/*"))
