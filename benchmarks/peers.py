"""The peers that are raced, each in a virtual environment of its own, which shares torch with ours."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "build" / "peers"
PACKAGES = {
    "lightning": ["lightning"],
    "accelerate": ["accelerate"],
    "ignite": ["pytorch-ignite"],
    "huggingface": ["transformers", "accelerate"],
}


def python_of(peer: str) -> Path:
    """The Python of a peer's environment, which is made at the first call and takes up to a minute."""
    folder = FOLDER / peer
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        print(f"setting up {peer}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # Behind the peer's own packages: all contenders run the same torch, torchmetrics and TensorBoard.
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        shared = folder / "lib" / version / "site-packages" / "shared.pth"
        shared.write_text(sysconfig.get_path("purelib"), encoding="utf-8")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[peer]], check=True)
        stamp.touch()
    return python


def versions() -> str:
    """Name and version of each peer that is installed."""
    told = []
    for peer, (package, *_) in PACKAGES.items():
        if (FOLDER / peer / ".installed").exists():
            ask = f"from importlib.metadata import version; print(version('{package}'))"
            found = subprocess.run([python_of(peer), "-c", ask], check=True, capture_output=True, text=True)
            told.append(f"{package} {found.stdout.strip()}")
    return ", ".join(told)


if __name__ == "__main__":
    for name in PACKAGES:
        python_of(name)
    print(versions())
