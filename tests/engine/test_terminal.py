"""What the terminal shows, on a terminal and where there is none."""

from __future__ import annotations

import re
from typing import Any

import pytest
from engine.callbacks import ModelSummary, RichProgressBar
from torch import nn
from toy import Net, Steps, fit, loader, stream, trainer

BAR = {"enable_progress_bar": True}


def step(model: Net, batch: Any, batch_idx: int) -> Any:
    model.log("train_acc", 0.25, prog_bar=True, on_step=False, on_epoch=True)
    model.log("hidden", 9.0)
    return model.loss(batch)


def check(model: Net, batch: Any, batch_idx: int) -> None:
    model.log("val_acc", 0.5, prog_bar=True)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich believes that it writes to a terminal."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "CI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich sees that it writes to a file."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_terminal_every_epoch_is_one_plain_line(plain: None, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Steps(step, check), None, loader(), max_epochs=2, num_sanity_val_steps=2, **BAR)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line]
    pattern = r"epoch {}/2   train_acc 0.2500   val_acc 0.5000   \d+\.\d s"
    assert len(lines) == 2
    assert all(re.fullmatch(pattern.format(n), line) for n, line in enumerate(lines, start=1)), lines
    assert "\x1b" not in out


def test_without_a_terminal_a_long_epoch_prints_lines_in_between(
    plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Net(), callbacks=RichProgressBar(line_every=0), **BAR)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [f"epoch 1/1   batch {n}/4" for n in (1, 2, 3, 4)]


def test_on_a_terminal_a_bar_shows_batches_and_values(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Steps(step, check), None, loader(), max_epochs=2, callbacks=RichProgressBar(1e6), **BAR)
    out = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "4/4" in out and "train_acc 0.2500   val_acc 0.5000" in out
    # The bar of the second epoch shows the values of the first.
    assert re.search(r"epoch 2/2 .*/4 .*val_acc 0\.5000", out)


def test_on_a_terminal_the_cursor_comes_back_after_an_error(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(model: Net, batch: Any, batch_idx: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(Steps(fail), callbacks=RichProgressBar(), **BAR)
    out = capsys.readouterr().out
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_has_a_bar_of_its_own(stage: str, terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(trainer(callbacks=RichProgressBar(1e6), **BAR), stage)(Net(), [loader(2), loader(4)])
    out = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert stage in out and "3/3" in out


def test_a_loader_without_length_has_a_bar_too(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Net(), stream(), callbacks=RichProgressBar(1e6), max_epochs=None, max_steps=4, **BAR)
    out = capsys.readouterr().out
    assert "epoch 1\x1b" in out and "4/?" in out


def test_names_with_brackets_are_shown_as_they_are(plain: None, capsys: pytest.CaptureFixture[str]) -> None:
    def logs(model: Net, batch: Any, batch_idx: int) -> Any:
        model.log("acc[bold]", 1.0, prog_bar=True, on_step=False, on_epoch=True)
        return model.loss(batch)

    fit(Steps(logs), **BAR)
    trainer().validate(Steps(validation=logs), loader())
    out = capsys.readouterr().out
    assert "acc[bold] 1.0000" in out and re.search(r"acc\[bold\] +1\.0000\n", out)


def test_the_summary_counts_parameters(plain: None, capsys: pytest.CaptureFixture[str]) -> None:
    model = Net()
    model.net = nn.Sequential(nn.Linear(3, 100), nn.Linear(100, 1))
    model.net[0].requires_grad_(False)
    fit(model, enable_model_summary=True)
    out = capsys.readouterr().out
    assert re.search(r"net +Sequential +501", out)
    assert "501 parameters, 400 of them frozen, on cpu, 32-true" in out


@pytest.mark.parametrize(("depth", "rows"), [(1, ["net"]), (2, ["net", "net.0", "net.1"]), (-1, ["net", "net.1.0"])])
def test_the_summary_goes_as_deep_as_told(
    depth: int, rows: list[str], plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Net()
    model.net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 1)))
    fit(model, callbacks=ModelSummary(max_depth=depth))
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:] if line]
    assert set(rows) <= set(shown) and ("net.1.0" in shown) == (depth == -1)


def test_results_are_a_table_with_a_column_per_loader(plain: None, capsys: pytest.CaptureFixture[str]) -> None:
    trainer().test(Net(), [loader(2), loader(4)])
    out = capsys.readouterr().out
    assert "loader 0" in out and "loader 1" in out and len(re.findall(r"\d\.\d{4}", out)) == 2
    trainer().test(Net(), loader(2), verbose=False)
    assert capsys.readouterr().out == ""
