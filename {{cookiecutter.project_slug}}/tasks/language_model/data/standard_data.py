"""Your dataset. As it stands, it is a text that every Python brings: what `help()` knows of the language itself."""

from __future__ import annotations

import re
import string
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

# Of the text that is there from the start: enough to learn from in a minute.
LETTERS = 200_000
# Shares of the text, from its beginning: pieces of different splits do not overlap.
SPLITS = {"train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0), "predict": (0.95, 1.0)}


class StandardData(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of a text, letter by letter; what follows each letter is to be told.

    A sample is a piece, int64 of shape (length,) from 0 to 95, and the same piece one letter later.

    Args:
        split: Which part of the text: "train", "val", "test", or "predict" (the part to test on).
        file: A text in UTF-8. Default: a part of what Python's `help()` says of the language.
        length: Letters of a piece.
    """

    # FILL IN: your alphabet, or your tokens; nets that ask for num_classes get their number.
    task = "sequence"
    letters = sorted({*string.printable} - {*"\t\r\v\f"})
    num_classes = len(letters)
    # As they are shown, in a table of predictions, say.
    class_names = [{" ": "blank", "\n": "newline"}.get(letter, letter) for letter in letters]

    def __init__(
        self, split: Literal["train", "val", "test", "predict"], file: str | None = None, length: int = 64
    ) -> None:
        # FILL IN: read your own text.
        text = _text_of_python() if file is None else Path(file).read_text(encoding="utf-8")
        begin, end = (int(share * len(text)) for share in SPLITS[split])
        self.codes, self.length = self.encode(text[begin:end]), length
        if len(self) < 1:
            known = f"{len(self.codes)} letters of the alphabet in its part for {split}"
            raise ValueError(f"{file or 'the text'} has {known}, too few for pieces of {length}")
        # Nets that ask for it get it, and `predict --input` what a sample looks like.
        self.sample_shape = (length,)
        # Saved in checkpoints, for whoever uses the net elsewhere.
        self.preprocessing = {"letters": "".join(self.letters)}

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # FILL IN: return one sample.
        piece = self.codes[index * self.length : (index + 1) * self.length + 1]
        return piece[:-1], piece[1:]

    @classmethod
    def encode(cls, text: str) -> Tensor:
        """The number of each letter, int64; letters that are not in the alphabet are left out."""
        number = {letter: index for index, letter in enumerate(cls.letters)}
        return torch.tensor([number[letter] for letter in text if letter in number], dtype=torch.int64)

    @classmethod
    def read_file(cls, file: Path, shape: tuple[int, ...]) -> Tensor:
        """The end of a text as a sample, for `predict --input`."""
        codes = cls.encode(file.read_text(encoding="utf-8"))[-shape[0] :]
        if len(codes) < shape[0]:
            raise ValueError(f"has {len(codes)} letters of the alphabet, and the net takes {shape[0]}")
        return codes


def _text_of_python() -> str:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ValueError("this Python has come without its help texts; give a text: --data.file my.txt") from error
    text = "\n".join(topics[name] for name in sorted(topics))
    # Lines of tables and under headings would be the same in several splits.
    return re.sub(r"([^\w\s])\1{3,}|( ) {3,}", lambda match: 3 * (match[1] or match[2]), text)[:LETTERS]
