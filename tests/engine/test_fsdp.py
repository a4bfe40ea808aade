"""Parameters in parts, under a real torchrun: the results of one process, and checkpoints to which all write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from engine import checkpoint, shards
from engine.fsdp import repeated_blocks
from sharded import Stack, batches
from torch import nn
from toy import trainer

HERE = Path(__file__).parent
ROOT = Path(engine.__file__).parents[1]
Results = dict[str, list[dict[str, Any]]]


def results(folder: Path, scenarios: list[str], processes: int, launched: bool = False) -> Results:
    """Per scenario, per process, what it wrote; all in one start of Python, which is what takes the time."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable,
        *(launcher if processes > 1 or launched else []),
        str(HERE / "sharded.py"),
        ",".join(scenarios),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(ROOT), str(HERE)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [json.loads((folder / f"{name}-{processes}-{rank}.json").read_text()) for rank in range(processes)]
        for name in scenarios
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder: Path) -> Results:
    return results(folder, ["train", "layout", "evaluated", "resume", "within", "narrow", "own", "manual"], 2)


@pytest.fixture(scope="module")
def one(folder: Path, two: Results) -> Results:
    return results(folder, ["train", "own", "manual", "elsewhere", "within_elsewhere"], 1)


@pytest.fixture(scope="module")
def four(folder: Path, two: Results) -> Results:
    return results(folder, ["train", "elsewhere", "within_elsewhere", "tensor"], 4)


def far(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    assert one.keys() == other.keys()
    return max(abs(a - b) for name in one for a, b in zip(one[name], other[name], strict=True))


@pytest.mark.parametrize("scenario", ["train", "own", "manual"])
def test_two_processes_step_as_one(one: Results, two: Results, scenario: str) -> None:
    [single], (first, second) = one[scenario], two[scenario]
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(single["losses"], rel=0, abs=1e-12)
    if "weights" in single:
        assert first["weights"] == second["weights"] and far(single["weights"], first["weights"]) < 1e-12


@pytest.mark.long
def test_four_processes_step_as_one(one: Results, four: Results) -> None:
    [single] = one["train"]
    for process in four["train"]:
        assert process["losses"] == pytest.approx(single["losses"], rel=0, abs=1e-12)
        assert far(single["weights"], process["weights"]) < 1e-12


@pytest.mark.long
def test_evaluation_counts_every_sample_once_where_batches_are_not_equally_many(
    one: Results, two: Results, four: Results
) -> None:
    [single] = one["train"]
    # Three validations of 7 samples, and a test of 5.
    assert [sum(counts[:4]) for counts in single["counted"]] == [7, 7, 7, 5]
    assert single["seen"] == 26
    for several in (two["train"], four["train"]):
        assert sum(process["seen"] for process in several) == 26
        assert len({process["seen"] for process in several}) > 1
        for process in several:
            assert process["counted"] == single["counted"]
            assert process["test"] == pytest.approx(single["test"], rel=0, abs=1e-6)
            assert process["metrics"] == pytest.approx(single["metrics"], rel=0, abs=1e-6)


def test_blocks_are_gathered_one_by_one_and_each_process_keeps_its_share(two: Results) -> None:
    for process in two["layout"]:
        assert process["sharded"] == ["", "blocks.0", "blocks.1", "blocks.2"]
        assert process["local"] < 0.6 * process["total"]
        assert process["spread"]
        assert process["mesh"] == [["data_parallel", "tensor_parallel"], [2, 1]]
    names = [*Stack().state_dict()]
    assert two["layout"][0]["names"] == names


def test_a_resumed_run_has_the_same_bits_averages_too(two: Results) -> None:
    assert two["resume"] == [{"same": True, "moved": True}] * 2


def test_a_run_goes_on_within_an_epoch_and_a_window_with_the_same_bits(two: Results) -> None:
    for process in two["within"]:
        assert process["far"] == [[0.0, False, True]] * 2


@pytest.mark.long
def test_a_run_goes_on_within_an_epoch_on_another_number_of_processes(
    one: Results, two: Results, four: Results
) -> None:
    straight = two["within"][0]
    for process in (*one["within_elsewhere"], *four["within_elsewhere"]):
        assert process["losses"] == pytest.approx(straight["losses"][8:], rel=0, abs=1e-12)
        assert far(straight["weights"], process["weights"]) < 1e-12
        assert process["loss"] == pytest.approx(straight["loss"], rel=0, abs=1e-6)


def test_files_of_any_name_keep_their_parts(folder: Path, two: Results) -> None:
    assert checkpoint.load(folder / "within2" / "8.pt")["state"]["total_batches"] == 8
    assert checkpoint.load(folder / "within2" / "9.pt")["state"]["total_batches"] == 9


@pytest.mark.long
def test_a_checkpoint_goes_on_on_another_number_of_processes(one: Results, two: Results, four: Results) -> None:
    straight = two["train"][0]
    for process in (*one["elsewhere"], *four["elsewhere"]):
        assert process["losses"] == pytest.approx(straight["losses"][-6:], rel=0, abs=1e-12)
        assert far(straight["weights"], process["weights"]) < 1e-12
        assert process["counted"] == straight["counted"][2:3]


def test_bfloat16_is_gathered_and_float32_is_kept(two: Results) -> None:
    [narrow, _] = two["narrow"]
    # Activations and gathered weights; targets.
    assert narrow["kinds"] == ["torch.bfloat16", "torch.float32"]
    assert narrow["stored"] == ["torch.float32"]
    assert sum(narrow["losses"][-6:]) < sum(narrow["losses"][:6])


def test_parameters_are_in_parts_again_when_an_evaluation_is_over(folder: Path, two: Results) -> None:
    alone = results(folder, ["evaluated"], 1, launched=True)
    assert [process["spread"] for process in (*alone["evaluated"], *two["evaluated"])] == [True, True, True]


def test_a_module_may_shard_parts_by_itself(two: Results) -> None:
    assert two["own"][0]["sharded"] == ["", "blocks.1"]


@pytest.mark.long
def test_tensor_parallel_groups_share_samples(one: Results, four: Results) -> None:
    [single] = one["train"]
    for process in four["tensor"]:
        assert process["shape"] == [2, 2]
        assert process["losses"] == pytest.approx(single["losses"], rel=0, abs=1e-12)
        assert far(single["weights"], process["weights"]) < 1e-12
        assert process["counted"] == single["counted"][:3] and process["samples"] == 7
        # A resumed run has its parts in other places of memory, where sums may round otherwise.
        assert process["far"] < 1e-12


def test_what_is_blocks() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert repeated_blocks(layers) == []
    pair = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    assert repeated_blocks(pair) == [*pair]
    different = nn.ModuleList([pair, nn.ModuleList([nn.Linear(2, 2)])])
    assert repeated_blocks(different) == [*pair]
    nested = nn.ModuleList([nn.Sequential(*pair), nn.Sequential(*pair)])
    assert repeated_blocks(nested) == [*nested]


@pytest.fixture
def saved(folder: Path, two: Results, tmp_path: Path) -> Path:
    """A copy of the checkpoints that two processes have written."""
    shutil.copytree(folder / "train2" / "c", tmp_path / "c")
    return tmp_path / "c"


def test_parts_go_with_the_checkpoints_that_name_them(saved: Path, folder: Path) -> None:
    files = sorted(file.name for file in saved.glob("*.ckpt"))
    named = {torch.load(saved / name, weights_only=True)["shards"]["folder"] for name in files}
    assert {f"shards/{part.name}" for part in (saved / "shards").iterdir()} == named
    # last.ckpt is one of the others or has a folder of its own.
    assert len(named) == 2 and "last.ckpt" in files
    (saved / "shards" / "step=0-0rphan00").mkdir()
    (saved / files[0]).unlink()
    kept = {torch.load(file, weights_only=True)["shards"]["folder"] for file in saved.glob("*.ckpt")}
    shards.tidy(saved)
    assert {f"shards/{part.name}" for part in (saved / "shards").iterdir()} == kept


def test_nothing_is_tidied_while_a_file_cannot_be_read(saved: Path) -> None:
    before = sorted((saved / "shards").iterdir())
    (saved / "epoch=0.ckpt").write_bytes(b"no checkpoint")
    shards.tidy(saved)
    assert sorted((saved / "shards").iterdir()) == before


def test_a_single_process_evaluates_a_checkpoint_in_parts(saved: Path, two: Results) -> None:
    file = Path(best_of(saved))
    model = Stack().double()
    [values] = trainer(precision="64-true").test(model, batches(5, 1, world=1), ckpt_path=file, verbose=False)
    assert values == pytest.approx(two["train"][0]["test"], rel=0, abs=1e-6)


def best_of(saved: Path) -> str:
    """The best checkpoint of the run, which its test has used."""
    newest = checkpoint.load(saved / "last.ckpt")
    [state] = [state for name, state in newest["callbacks"].items() if "ModelCheckpoint" in name]
    return str(saved / state["best_model_path"])


@pytest.mark.long
def test_one_command_makes_one_file(saved: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine.consolidate", str(saved / "last.ckpt"), str(tmp_path / "whole.ckpt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    shutil.rmtree(saved)
    loaded = checkpoint.load(tmp_path / "whole.ckpt")
    assert "shards" not in loaded
    module = Stack().double()
    checkpoint.load_weights(module, loaded["state_dict"], "whole.ckpt")
    trainer(precision="64-true", max_epochs=4, accumulate_grad_batches=2).fit(
        module, batches(24, 4, True, 1), batches(7, 1, world=1), ckpt_path=tmp_path / "whole.ckpt"
    )
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "is there already" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize("fault", ["flipped", "missing", "cut", "description", "outside", "huge"])
def test_damaged_parts_are_found_before_they_are_used(saved: Path, fault: str) -> None:
    file = saved / "last.ckpt"
    about = torch.load(file, weights_only=True)
    folder = saved / about["shards"]["folder"]
    part = max(folder.glob("__*"), key=lambda path: path.stat().st_size)
    if fault == "flipped":
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif fault == "missing":
        part.unlink()
    elif fault == "cut":
        part.write_bytes(part.read_bytes()[:-1])
    elif fault == "description":
        (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    elif fault == "outside":
        about["shards"]["folder"] = "../../elsewhere"
    else:
        about["state_dict"]["first.weight"] = torch.empty(10**9, 10**3, device="meta")
    torch.save(about, file)
    with pytest.raises(engine.MisconfigurationException, match="the parts of checkpoint .*last.ckpt are damaged"):
        checkpoint.load(file)


def test_a_description_cannot_run_code(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = saved / "last.ckpt"
    about = torch.load(file, weights_only=True)
    evil = saved / about["shards"]["folder"] / ".metadata"
    evil.write_bytes(b"cposix\nsystem\n(S'touch owned'\ntR.")
    # Its checksum is as it should be.
    about["shards"]["files"][".metadata"] = shards.checksum(evil)
    torch.save(about, file)
    with pytest.raises(engine.MisconfigurationException, match="posix.system"):
        checkpoint.load(file)
    assert not (tmp_path / "owned").exists()


def test_what_sharding_excludes_is_refused() -> None:
    for precision in ("16-mixed", "16-true"):
        with pytest.raises(engine.MisconfigurationException, match="give precision bf16-mixed, or strategy ddp"):
            trainer(strategy="fsdp", precision=precision)
    with pytest.raises(engine.MisconfigurationException, match="async_save copies whole models"):
        trainer(strategy="fsdp", async_save=True)
    with pytest.raises(engine.MisconfigurationException, match="strategy='fsdp_tensor_parallel_0' is not supported"):
        trainer(strategy="fsdp_tensor_parallel_0")


def test_one_process_without_a_launcher_keeps_its_parameters() -> None:
    model = Stack()
    trainer(strategy="fsdp", max_epochs=1).fit(model, batches(8, 4, world=1), batches(4, 2, world=1))
    assert type(model) is Stack and model.losses


def test_the_guide_shows_the_tensor_parallel_module_that_is_tested() -> None:
    guide = (HERE.parents[1] / "docs" / "scaling-up.md").read_text(encoding="utf-8")
    source = (HERE / "sharded.py").read_text(encoding="utf-8")
    [shown] = [block for block in guide.split("```") if "class Parallel(engine.Module)" in block]
    # There, it is derived from a module that has the blocks.
    assert shown[shown.index("    def configure_model") :].strip() in source
