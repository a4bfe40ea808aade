"""What the README promises is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tree_names_files_of_a_generated_project(generated: Path) -> None:
    tree = re.search(r"```\nmy-project/\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    folder, found = generated, 0
    for line in tree[1].splitlines():
        entry = re.match(r"(│   )?[├└]── (.*?)(?:  |$)", line)
        assert entry is not None, line
        for name in entry[2].split(" · "):
            folder = generated / name if name.endswith("/") else folder
            path = folder / name if entry[1] else generated / name
            assert path.exists(), path
            found += 1
    assert found >= 15


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_make_has_every_target_that_is_named(target: str, generated: Path) -> None:
    makefiles = [(folder / "Makefile").read_text() for folder in (ROOT, generated)]
    assert any(re.search(rf"^{target}:", makefile, re.MULTILINE) for makefile in makefiles)


def test_every_picture_is_there_and_shows_a_run_that_met_its_goal() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    drawn = [picture for picture in pictures if picture.endswith(".svg")]
    assert drawn and all((ROOT / picture).stat().st_size > 5000 for picture in pictures)
    for picture in drawn:
        text = re.sub(r"<[^>]*>|&#160;", " ", (ROOT / picture).read_text(encoding="utf-8"))
        accuracy = re.search(r"test_acc\s+(0\.\d+)", text)
        assert accuracy is not None and float(accuracy[1]) >= 0.97
