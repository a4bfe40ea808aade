"""Make `data/digits.npz` of the template from the handwritten digits that scikit-learn carries.

Run it from anywhere: `python tools/make_digits.py`. The same input gives the same file, byte for byte
(where zlib is the same; the arrays are the same in any case).
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

TARGET = Path(__file__).parents[1] / "{{cookiecutter.project_slug}}" / "data" / "digits.npz"
SPLITS = ("train", "val", "test")  # the codes 0, 1 and 2
VAL_SHARE, TEST_SHARE = 0.15, 0.15
SEED = 0


def assign_splits(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Deal the samples of each class out to train, val and test.

    Args:
        labels: Class of each sample, shape [N].

    Returns:
        Index into SPLITS for each sample, shape [N].
    """
    # RandomState is frozen by numpy's own promise: it draws the same numbers in every version.
    random = np.random.RandomState(SEED)
    split = np.zeros(len(labels), dtype=np.uint8)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        val, test = round(VAL_SHARE * len(members)), round(TEST_SHARE * len(members))
        split[members[:val]] = SPLITS.index("val")
        split[members[val : val + test]] = SPLITS.index("test")
    return split


def write_npz(path: Path, arrays: dict[str, NDArray[np.uint8]]) -> None:
    """Write a compressed npz file with a fixed time stamp, which `np.savez_compressed` cannot do."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # otherwise Windows writes other bytes
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, buffer.getvalue(), compresslevel=9)


def main(path: Path = TARGET) -> None:
    """Write the file and print how many samples each split has."""
    digits = load_digits()
    labels = digits.target.astype(np.uint8)
    split = assign_splits(labels)
    write_npz(path, {"images": digits.images.astype(np.uint8), "labels": labels, "split": split})
    counts = np.bincount(split)
    print(f"{path.name}:", ", ".join(f"{count} {name}" for name, count in zip(SPLITS, counts, strict=True)))


if __name__ == "__main__":
    main()
