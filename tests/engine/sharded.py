"""What `test_fsdp.py` runs: scenarios by name, in any number of processes; results go to files."""

from __future__ import annotations

# ruff: noqa: E402
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = sys.argv[2:4]

import engine
import torch
from engine import checkpoint
from engine.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryStatScores
from toy import dataset, same_bits, trainer

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(engine.Module):
    """Blocks between two layers of its own; remembers losses, and what validation has counted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 1)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.scores = BinaryStatScores()
        self.losses: list[float] = []
        self.seen: list[float] = []
        self.counted: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.last(x)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y.reshape(-1, 1))
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(self.all_gather(outputs["loss"]).mean()) * self.trainer.accumulate_grad_batches)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        guess = self(x)
        self.seen += y.reshape(-1).tolist()
        self.scores.update(guess[:, 0], (y.reshape(-1) > 0).int())
        self.log("val_loss", nn.functional.mse_loss(guess, y.reshape(-1, 1)), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.counted.append(self.scores.compute().tolist())
        self.scores.reset()

    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def batches(size: int, global_batch: int, shuffle: bool = False, world: int = WORLD) -> DataLoader[Any]:
    return DataLoader(dataset(size), global_batch // world, shuffle=shuffle)


def whole(module: nn.Module) -> dict[str, list[float]]:
    """Every parameter, wherever its parts are."""
    values = {n: p.detach() for n, p in module.named_parameters()}
    return {
        n: (v.full_tensor() if isinstance(v, DTensor) else v).double().flatten().tolist() for n, v in values.items()
    }


def train(
    name: str, ckpt_path: Any = None, module: Stack | None = None, world: int = WORLD, **options: Any
) -> tuple[Stack, Any]:
    saver = ModelCheckpoint(f"{name}/c", "{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    settings: dict[str, Any] = {"max_epochs": 3, "strategy": "fsdp", "precision": "64-true", "gradient_clip_val": 0.5}
    settings |= {"accumulate_grad_batches": 2, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    callbacks = [saver, *options.pop("callbacks", [])]
    run = trainer(**{**settings, **options}, callbacks=callbacks)
    module = module or Stack()
    # 6 batches of 4, and validation batches that are not equally many in all processes.
    run.fit(module, batches(24, 4, shuffle=True, world=world), DataLoader(dataset(7), 1), ckpt_path=ckpt_path)
    return module, run


def write(name: str, **values: Any) -> None:
    Path(f"{name}-{WORLD}-{RANK}.json").write_text(json.dumps(values))


def scenario_train() -> None:
    # Processes that begin with other weights take the first one's.
    engine.seed_everything(3)
    torch.manual_seed(3 if RANK == 0 else 99)
    module, run = train(f"train{WORLD}")
    [test] = run.test(module, DataLoader(dataset(5), 1), ckpt_path="best", verbose=False)
    values = {name: float(value) for name, value in run.callback_metrics.items()}
    write(
        "train",
        losses=module.losses,
        counted=module.counted,
        seen=len(module.seen),
        test=test,
        metrics=values,
        weights=whole(module),
    )


def scenario_layout() -> None:
    """What lies where, after the training step has let go of everything."""
    module, run = train(f"layout{WORLD}", max_epochs=1)
    sharded = [name for name, part in module.named_modules() if type(part).__name__.startswith("FSDP")]
    local = sum(p.to_local().numel() for p in module.parameters() if isinstance(p, DTensor))
    total = sum(p.numel() for p in module.parameters())
    states = run.optimizers[0].state_dict()["state"]
    spread = all(isinstance(state["exp_avg"], DTensor) for state in states.values())
    names = [*module.state_dict()]
    mesh = run.device_mesh
    write(
        "layout",
        sharded=sharded,
        local=local,
        total=total,
        spread=spread,
        names=names,
        mesh=[[*mesh.mesh_dim_names], [*mesh.shape]],
    )


def scenario_evaluated() -> None:
    """Where parameters are when a validation is over."""

    class Looks(Stack):
        spread: bool

        def on_validation_end(self) -> None:
            self.spread = all(isinstance(parameter, DTensor) for parameter in self.parameters())

    module: Any = Looks()
    train(f"evaluated{WORLD}", module=module, max_epochs=1)
    write("evaluated", spread=module.spread)


def everything(file: Path) -> dict[str, Any]:
    """What a checkpoint holds of weights, averages, optimizer, schedulers and running values."""
    loaded = checkpoint.load(file)
    names = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "meters", "state", "metrics")
    return {name: loaded[name] for name in names}


def scenario_resume() -> None:
    """From a checkpoint in parts: to the same bits with as many processes."""
    engine.seed_everything(3)
    name, average = f"resume{WORLD}", EMAWeightAveraging
    straight, _ = train(name, callbacks=[average(decay=0.9)])
    engine.seed_everything(77)
    again, _ = train(f"{name}/again", f"{name}/c/epoch=1.ckpt", callbacks=[average(decay=0.9)])
    ends = [everything(Path(folder, "c", "last.ckpt")) for folder in (name, f"{name}/again")]
    same = same_bits(*ends) and whole(straight) == whole(again)
    write("resume", same=same, moved=whole(straight) != whole(Stack().double()))


def scenario_within() -> None:
    """Saved within an epoch, and within a window of accumulated gradients."""

    class Save(engine.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.state.total_batches in (8, 9):
                trainer.save_checkpoint(f"within{WORLD}/{trainer.state.total_batches}.pt")

    engine.seed_everything(3)
    straight, run = train(f"within{WORLD}", callbacks=[Save()])
    far = []
    for batch in (8, 9):
        engine.seed_everything(77)
        again, other = train(f"within{WORLD}/{batch}", f"within{WORLD}/{batch}.pt", callbacks=[Save()])
        values = [float(r.callback_metrics["loss_epoch"]) for r in (run, other)]
        far.append([values[0] - values[1], whole(straight) != whole(again), again.losses == straight.losses[batch:]])
    write("within", far=far, losses=straight.losses, weights=whole(straight), loss=values[0])


def scenario_within_elsewhere() -> None:
    """The same on another number of processes."""
    engine.seed_everything(55)
    strategy = "auto" if WORLD == 1 else "fsdp"
    module, run = train(f"within_elsewhere{WORLD}", "within2/8.pt", strategy=strategy)
    values = {name: float(value) for name, value in run.callback_metrics.items()}
    write("within_elsewhere", losses=module.losses, weights=whole(module), loss=values["loss_epoch"])


def scenario_elsewhere() -> None:
    """From the checkpoint that two processes have written."""
    engine.seed_everything(55)
    strategy = "auto" if WORLD == 1 else "fsdp"
    module, _ = train(f"elsewhere{WORLD}", "train2/c/epoch=1.ckpt", strategy=strategy)
    write("elsewhere", losses=module.losses, weights=whole(module), counted=module.counted)


def scenario_narrow() -> None:
    """bfloat16 with a batch norm, whose statistics stay wide."""
    engine.seed_everything(3)

    class Normed(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))  # type: ignore[assignment]
            self.kinds: set[str] = set()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.kinds.add(str(self.blocks[0](torch.ones(1, 6)).dtype))
            self.kinds.add(str(batch[1].dtype))
            self.kinds.add(str(self.last.weight.dtype))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(3)
    average = EMAWeightAveraging(decay=0.5)
    options: dict[str, Any] = {"precision": "bf16-mixed", "max_epochs": 4, "callbacks": [average]}
    module, _ = train(f"narrow{WORLD}", module=Normed(), **options)
    stored = {str(p.dtype) for p in module.parameters()}
    write("narrow", kinds=sorted(module.kinds), stored=sorted(stored), losses=module.losses)


def scenario_own() -> None:
    """Sharded by the module itself, but for a layer."""
    from torch.distributed.fsdp import fully_shard

    class Own(Stack):
        def configure_model(self) -> None:
            if self.device_mesh is not None and not hasattr(self, "done"):
                self.done = True
                fully_shard(self.blocks[1], mesh=self.device_mesh["data_parallel"])

    engine.seed_everything(3)
    torch.manual_seed(3)
    module, _ = train(f"own{WORLD}", module=Own())
    sharded = [name for name, part in module.named_modules() if type(part).__name__.startswith("FSDP")]
    write("own", sharded=sharded, losses=module.losses)


def scenario_manual() -> None:
    class Manual(Stack):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            return loss

    engine.seed_everything(3)
    torch.manual_seed(3)
    options = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    module, _ = train(f"manual{WORLD}", module=Manual(), **options)
    write("manual", losses=module.losses, weights=whole(module))


class Parallel(Stack):
    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.blocks[0].up.weight, DTensor):
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            for block in self.blocks:
                parallelize_module(block, self.device_mesh["tensor_parallel"], plan)


def scenario_tensor() -> None:
    """Each sample on two processes, and samples on as many groups as there are."""

    class Summed(Parallel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("samples", float(len(batch[0])), reduce_fx="sum", sync_dist=True)

    engine.seed_everything(3)
    options: dict[str, Any] = {"strategy": "fsdp_tensor_parallel_2", "world": WORLD // 2}
    module, run = train(f"tensor{WORLD}", module=Summed(), **options)
    engine.seed_everything(77)
    again, _ = train(f"tensor{WORLD}/again", f"tensor{WORLD}/c/epoch=1.ckpt", module=Summed(), **options)
    placements = sorted({str(p.placements) for p in module.parameters() if isinstance(p, DTensor)})
    straight, resumed = whole(module), whole(again)
    far = max(abs(a - b) for name in straight for a, b in zip(straight[name], resumed[name], strict=True))
    samples = float(run.callback_metrics["samples"])
    write(
        "tensor",
        losses=module.losses,
        counted=module.counted,
        placements=placements,
        far=far,
        samples=samples,
        weights=whole(module),
        shape=[*run.device_mesh.shape],
    )


if __name__ == "__main__":
    for scenario in sys.argv[1].split(","):
        globals()[f"scenario_{scenario}"]()
