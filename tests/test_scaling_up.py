"""The pages on many processes: commands are understood, those that can run here do, and manifests fit together."""

from __future__ import annotations

import importlib
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
GUIDE, KUBERNETES = "docs/scaling-up.md", "docs/kubernetes.md"
SMALL = ("--max_epochs", "2", "--limit_train_batches", "4", "--limit_val_batches", "2", "--limit_test_batches", "2")
SMALL += ("--model.width", "4", "--accelerator", "cpu")


def blocks(page: str, language: str) -> list[str]:
    """Code of a language in a page, in the order of the page."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", PAGES[page], re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """Commands in a page, without comments."""
    lines = "".join(blocks(page, "bash")).splitlines()
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]


def the(part: str) -> list[str]:
    """The words of the first command of the guide that has this part."""
    return shlex.split(next(line for line in commands(GUIDE) if part in line))


def manifests() -> list[dict[str, Any]]:
    return [manifest for block in blocks(KUBERNETES, "yaml") for manifest in yaml.safe_load_all(block)]


def command_of(manifest: dict[str, Any]) -> list[str]:
    """What a manifest runs."""
    if manifest["kind"] == "Job":
        return manifest["spec"]["template"]["spec"]["containers"][0]["command"]
    return manifest["spec"]["trainer"]["command"] if manifest["kind"] == "TrainJob" else []


def for_main(words: list[str]) -> list[str]:
    """What a command gives to main.py, also by way of the job file."""
    return words[next(i for i, word in enumerate(words) if word in ("main.py", "slurm.sh")) + 1 :]


TRAINING = [shlex.split(line) for line in commands(GUIDE) if "main.py" in line or "slurm.sh" in line]
TRAINING += [words for manifest in manifests() if (words := command_of(manifest))]


@pytest.mark.parametrize("words", TRAINING, ids=" ".join)
def test_every_flag_is_there(words: list[str], project: Path) -> None:
    data, model = importlib.import_module("data"), importlib.import_module("model")
    parse = importlib.import_module("utils.arguments").parse
    command, arguments = parse(for_main(words), (data.DInterface, model.MInterface))
    assert command == "fit"
    engine = importlib.import_module("engine")
    assert engine.Trainer(accelerator="cpu", strategy=arguments.strategy, logger=False)


@pytest.fixture
def start(project: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts a command of a page in a project."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        launchers = {"python": (sys.executable,), "torchrun": (sys.executable, "-m", "torch.distributed.run")}
        command = [*launchers[words[0]], *words[1:]]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=project, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finished(process: subprocess.Popen[str]) -> str:
    """What a process has printed, when it is done."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out


@pytest.mark.long
def test_main_starts_two_processes_itself(start: Callable[..., subprocess.Popen[str]], project: Path) -> None:
    out = finished(start(*the("--devices 2"), *SMALL))
    assert out.count("epoch 2/2") == 1 and out.count("test_acc") == 1
    [run] = (project / "logs/standard_net").iterdir()
    # The same again, by torchrun, goes on with nothing: it is finished.
    words = [word for word in the("torchrun --nproc-per-node 2")]
    out = finished(start(*words, *SMALL, "--ckpt_path", "auto", "--run_name", run.name, "--devices", "2"))
    assert f"{run.name} is finished; nothing to do" in out


@pytest.mark.long
def test_two_machines_meet(start: Callable[..., subprocess.Popen[str]], project: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = " ".join(the("torchrun --nnodes 2")).replace("HOST:29500", f"127.0.0.1:{port}")
    words = line.replace("--nproc-per-node 4", "--nproc-per-node 1").replace("--devices 4", "--devices 1").split()
    assert "1" in words and str(port) in line
    first, second = start(*words, *SMALL), start(*words, *SMALL)
    outs = [finished(first), finished(second)]
    # One of the two has rank 0, and talks.
    assert sorted("epoch 2/2" in out for out in outs) == [False, True]
    assert len(list((project / "logs/standard_net").iterdir())) == 1


@pytest.mark.long
def test_a_sharded_checkpoint_becomes_one_file(start: Callable[..., subprocess.Popen[str]], project: Path) -> None:
    words = [word if word != "8" else "2" for word in the("--strategy fsdp")]
    finished(start(*words, *SMALL))
    best = project / "logs/standard_net/version_0/checkpoints/best.ckpt"
    assert best.is_file() and (best.parent / "shards").is_dir()
    finished(start(*the("engine.consolidate")))
    torch = importlib.import_module("torch")
    whole = torch.load(project / "logs/standard_net/version_0/checkpoints/whole.ckpt", weights_only=True)
    assert whole["state_dict"] and all(type(value) is torch.Tensor for value in whole["state_dict"].values())


def test_python_in_the_guide_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = importlib.import_module("engine")
    for block in blocks(GUIDE, "python"):
        exec(compile(block, GUIDE, "exec"), {"engine": engine})


def test_every_link_leads_to_a_file() -> None:
    found = 0
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), (page, target)
            found += 1
    assert found >= 6


def pod_of(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod of a manifest, and what it may use."""
    if manifest["kind"] == "Job":
        pod = manifest["spec"]["template"]["spec"]
        return pod, pod["containers"][0]["resources"]["limits"]
    [patch] = manifest["spec"]["runtimePatches"]
    [job] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == "node"
    return job["template"]["spec"]["template"]["spec"], manifest["spec"]["trainer"]["resourcesPerNode"]["limits"]


def test_manifests_have_what_their_kinds_need() -> None:
    kinds = [(manifest["apiVersion"], manifest["kind"]) for manifest in manifests()]
    job, trainjob = ("batch/v1", "Job"), ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert kinds == [job, ("v1", "PersistentVolumeClaim"), ("v1", "Service"), job, trainjob]
    claims = [manifest["metadata"]["name"] for manifest in manifests() if manifest["kind"] == "PersistentVolumeClaim"]
    for manifest in manifests():
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
        if manifest["kind"] in ("PersistentVolumeClaim", "Service"):
            continue
        pod, limits = pod_of(manifest)
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        # What is asked for all of them: logs that outlive the pod where --log_dir points, and room for workers.
        words = " ".join(command_of(manifest)).replace("=", " ").split()
        assert words[words.index("--ckpt_path") + 1] == "auto"
        assert mounts[words[words.index("--log_dir") + 1]]["persistentVolumeClaim"]["claimName"] in claims
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        numbers = {"--devices", "--nproc-per-node"} & set(words)
        assert all(int(words[words.index(name) + 1]) == limits["nvidia.com/gpu"] for name in numbers)
        if manifest["kind"] == "Job":
            assert pod["restartPolicy"] == "OnFailure" and pod["terminationGracePeriodSeconds"] > 30
            assert manifest["spec"]["backoffLimit"] >= 10


def test_the_pods_of_an_indexed_job_find_each_other() -> None:
    [service] = [manifest for manifest in manifests() if manifest["kind"] == "Service"]
    [job] = [manifest for manifest in manifests() if manifest["spec"].get("completionMode") == "Indexed"]
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    # Pods are named <job>-<index>.<subdomain>, and the subdomain is the Service.
    assert pod["subdomain"] == service["metadata"]["name"]
    words = " ".join(command_of(job)).replace("=", " ").split()
    assert words[words.index("--rdzv-endpoint") + 1] == f"{name}-0.{pod['subdomain']}:29500"
    nodes = {words[words.index(flag) + 1] for flag in ("--nnodes", "--num_nodes")}
    assert nodes == {str(job["spec"]["completions"])} == {str(job["spec"]["parallelism"])}
    # torchrun's patience ends before that of Kubernetes.
    patience = {variable["name"]: int(variable["value"]) for variable in pod["containers"][0]["env"]}
    assert 30 < patience["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] < pod["terminationGracePeriodSeconds"]
