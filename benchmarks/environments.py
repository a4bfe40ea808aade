"""Environments of the peers, below `build/peers/`: each installs one peer, and reads everything else from `.venv`.

So all of them run the same torch, and no peer has to agree with another about anything. They are made once.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

PEERS = Path(__file__).parents[1] / "build" / "peers"
# What each environment installs, and which of it is named beside the results.
PACKAGES: dict[str, list[str]] = {
    "lightning": ["lightning"],
    "accelerate": ["accelerate"],
    "ignite": ["pytorch-ignite"],
    "huggingface": ["transformers", "accelerate"],
}


def python_of(environment: str | None) -> Path:
    """The interpreter of a peer's environment; None stands for the one that runs this."""
    return Path(sys.executable) if environment is None else PEERS / environment / "bin" / "python"


def is_ready(environment: str | None) -> bool:
    """Whether an environment was made to the end."""
    return environment is None or (PEERS / environment / ".installed").is_file()


def make(environment: str) -> None:
    """Make a peer's environment, unless it is there.

    Raises:
        subprocess.CalledProcessError: pip has failed, and has said why.
    """
    if is_ready(environment):
        return
    folder, packages = PEERS / environment, PACKAGES[environment]
    print(f"setting up {folder.relative_to(PEERS.parents[1])}: {', '.join(packages)}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    # Packages of a folder that is named in a .pth file count as installed, for pip, too.
    [site] = folder.glob("lib/python*/site-packages")
    shared = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    command = [str(python_of(environment)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *packages], check=True)
    (folder / ".installed").touch()


def versions() -> dict[str, str]:
    """Versions of the peers that are installed, by package."""
    found: dict[str, str] = {}
    for environment, packages in PACKAGES.items():
        sites = [str(site) for site in (PEERS / environment).glob("lib/python*/site-packages")]
        for package in importlib.metadata.distributions(path=sites):
            if is_ready(environment) and package.name in packages:
                found[package.name] = package.version
    return dict(sorted(found.items()))


def main() -> None:
    """Make all, and name the versions."""
    for environment in PACKAGES:
        make(environment)
    print(", ".join(f"{name} {version}" for name, version in versions().items()))


if __name__ == "__main__":
    main()
