"""Tables as CSV files, as people and their spreadsheets write them."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import MisconfigurationException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import default_collate
from utils.registry import build


def csv_data(file: Path, split: str = "train", **arguments: Any) -> Any:
    return build("data", "csv_data", {"split": split, "file": str(file), **arguments})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


def refuses(text: str, file: Path, content: str | bytes | None = None, split: str = "train", **arguments: Any) -> None:
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(MisconfigurationException, match=re.escape(text)) as error:
        csv_data(file, split, **arguments)
    assert "\n" not in str(error.value)


def rows(*targets: Any) -> str:
    """A table with these targets in its last column."""
    return "width,height,kind\n" + "".join(f"{index}.5,{-index},{target}\n" for index, target in enumerate(targets))


def test_text_in_the_last_column_is_the_class(table: Path) -> None:
    table.write_text(rows("owl", "cat", "owl"))
    data = csv_data(table)
    assert data.task == "multiclass" and data.class_names == ["cat", "owl"] and data.num_classes == 2
    assert data.targets.tolist() == [1, 0, 1] and data.splits == ("train",) and data.groups is None
    assert data.names == ["row 2", "row 3", "row 4"] and data.sample_shape == (2,)
    features, targets = default_collate([data[index] for index in range(len(data))])
    assert features.dtype == torch.float32 and features.tolist() == [[0.5, 0], [1.5, -1], [2.5, -2]]
    assert targets.dtype == torch.int64
    assert not hasattr(data, "num_targets")
    refuses("has no rows of split val; it has train", table, split="val")


@pytest.mark.parametrize(
    ("targets", "task", "names"),
    [
        ([3, 10, 3, 10], "multiclass", ["3", "10"]),
        (["1.0", "0.0", "1", "0"], "multiclass", ["0", "1"]),
        (["1", "2", "x", "x"], "multiclass", ["1", "2", "x"]),
        (["None", "NA", "None", "NA"], "multiclass", ["NA", "None"]),
        ([123456789, 123456788] * 2, "multiclass", ["123456788", "123456789"]),
        ([1, 2, 3, 4], "regression", ["kind"]),
        ([0.5, 1, 0.5, 1], "regression", ["kind"]),
        ([*range(21)] * 3, "regression", ["kind"]),
        ([*range(20)] * 3, "multiclass", [str(number) for number in range(20)]),
    ],
)
def test_the_task_is_seen_from_the_target(table: Path, targets: list[Any], task: str, names: list[str]) -> None:
    table.write_text(rows(*targets))
    data = csv_data(table)
    assert data.task == task and data.class_names == names
    if task == "regression":
        assert data.num_targets == 1 and data.targets.dtype == torch.float32
        assert data.targets.tolist() == [float(target) for target in targets]
        assert default_collate([data[0], data[1]])[1].shape == (2,)
    else:
        assert [names[target] for target in data.targets] == [str(t).removesuffix(".0") for t in targets]


def test_several_targets(table: Path) -> None:
    table.write_text("a,b,c\n0.5,0,1\n1.5,1,1\n2,1,0\n")
    labels = csv_data(table, target=["b", "c"])
    assert labels.task == "multilabel" and labels.num_targets == 2 and labels.sample_shape == (1,)
    assert labels[2][1].tolist() == [1, 0] and not hasattr(labels, "num_classes")
    numbers = csv_data(table, target=["c", "a"])
    assert numbers.task == "regression" and numbers[0][1].tolist() == [1, 0.5]
    assert csv_data(table, target=["c"], task="multilabel").targets.shape == (3, 1)
    refuses("multilabel has columns of 0 and 1 only", table, target=["a", "b"], task="multilabel")
    refuses("multiclass has one column", table, target=["b", "c"], task="multiclass")


def test_the_task_can_be_given(table: Path) -> None:
    table.write_text(rows(1, 0, 1, 0))
    assert csv_data(table, task="regression").targets.tolist() == [1, 0, 1, 0]
    binary = csv_data(table, task="binary")
    assert binary.num_classes == 2 and binary.targets.tolist() == [1, 0, 1, 0]
    refuses("task=ranking; give one of multiclass, binary, multilabel, regression", table, task="ranking")
    refuses("has 3 classes in training rows (a, b, c); binary needs two", table, rows("a", "b", "c"), task="binary")
    refuses("line 2, column kind: a is no number", table, task="regression")


def test_features_can_be_chosen_and_text_may_stay_beside_them(table: Path) -> None:
    table.write_text("name,x,y,kind\nAnn,1,2,a\nBob,3,4,b\n")
    assert csv_data(table, features=["y", "x"]).inputs.tolist() == [[2, 1], [4, 3]]
    refuses("line 2, column name: Ann is no number; mend it, or name features", table)
    refuses("column kind is used twice", table, features=["kind", "x"])
    refuses("column x is used twice", table, features=["x", "x"])


SPLITS = "x,kind,part\n1,a,train\n2,b,Training\n3,a,valid\n4,b,test\n5,b,train\n"


def test_a_column_gives_splits_of_its_own(table: Path) -> None:
    table.write_text(SPLITS)
    sets = {split: csv_data(table, split, split_column="part") for split in ("train", "val", "test", "predict")}
    assert {split: data.inputs.flatten().tolist() for split, data in sets.items()} == {
        "train": [1, 2, 5],
        "val": [3],
        "test": [4],
        "predict": [4],
    }
    for data in sets.values():
        assert set(data.splits) == set(sets) and data.class_names == ["a", "b"]
    assert sets["train"].targets.tolist() == [0, 1, 1] and sets["predict"].targets.tolist() == [1]
    assert sets["train"].names == ["row 2", "row 3", "row 6"]


def test_rows_for_predict_need_no_target(table: Path) -> None:
    table.write_text(SPLITS + "6,,predict\n7,new,predict\n")
    data = csv_data(table, "predict", split_column="part")
    assert data.targets is None and torch.stack([data[0], data[1]]).tolist() == [[6], [7]]
    assert csv_data(table, split_column="part").class_names == ["a", "b"]


def test_what_is_wrong_with_splits_is_one_line(table: Path) -> None:
    refuses("line 2, column part: hold-out; give train", table, "x,kind,part\n1,a,hold-out\n", split_column="part")
    refuses("line 2, column part: the cell is empty", table, "x,kind,part\n1,a,\n", split_column="part")
    refuses("column part has no row for train", table, "x,kind,part\n1,a,val\n", split_column="part")
    refuses(
        "line 4, column kind: class c is in no training row", table, SPLITS.replace("3,a", "3,c"), split_column="part"
    )
    # A fault in test rows is found when the training rows are read.
    refuses("line 5, column x: four is no number", table, SPLITS.replace("4,b", "four,b"), split_column="part")
    refuses("no rows of split val; it has train, test, predict", table, SPLITS.replace("valid", "train"), "val",
            split_column="part")  # fmt: skip


def test_groups(table: Path) -> None:
    table.write_text("x,patient,part,kind\n1,p1,train,a\n2,p2,test,a\n3,p1,train,b\n")
    data = csv_data(table, group_column="patient", split_column="part")
    assert data.groups == ["p1", "p1"] and data.sample_shape == (1,)
    refuses(
        "line 3, column patient: the cell is empty", table, "x,patient,kind\n1,p1,a\n2,,b\n", group_column="patient"
    )


@pytest.fixture
def pictures(table: Path) -> Path:
    for index in range(4):
        file = table.parent / "images" / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((6, 8), 51 * index, np.uint8)).save(file)
    table.write_text("file,age,kind\n" + "".join(f"images/{i}.png,{i}.5,{'ab'[i % 2]}\n" for i in range(4)))
    return table


def test_pictures_named_in_a_column(pictures: Path) -> None:
    data = csv_data(pictures, image_column="file", size=8, grayscale=True)
    assert data.augment and data.sample_shape == (1, 8, 8) and data.groups is None
    assert data.names == [f"images/{index}.png" for index in range(4)]
    data.augment = False
    image, target = data[1]
    assert image.shape == (1, 8, 8) and image.mean().item() == pytest.approx(0.2) and target == 1
    ages = csv_data(pictures, image_column="file", target=["age"])
    assert ages.task == "regression" and ages[0][0].shape == (3, 64, 64)


def test_a_picture_of_several_rows_is_a_group(pictures: Path) -> None:
    with pictures.open("a") as file:
        file.write("images/0.png,7,a\n")
    data = csv_data(pictures, image_column="file")
    assert len(set(data.names)) == 5 and data.groups == [f"images/{index}.png" for index in (0, 1, 2, 3, 0)]


def test_missing_pictures_are_counted_and_the_first_is_named(pictures: Path) -> None:
    for index in (1, 3):
        (pictures.parent / "images" / f"{index}.png").unlink()
    refuses(f"2 of 4 pictures are missing, the first is {pictures.parent}/images/1.png", pictures, image_column="file")
    refuses("4 of 4 pictures", pictures, pictures.read_text().replace("images/", "img/"), image_column="file")
    refuses("image_column=file and features=['age']", pictures, image_column="file", features=["age"])


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfx,y,kind\r\n1,2,a\r\n3,4,b\r\n",
        b"x;y;kind\n1;2;a\n3;4;b\n",
        b"x\ty\tkind\n1\t2\ta\n3\t4\tb",
        b"x,y,kind\r1,2,a\r3,4,b\r",
        b' x , "y", "kind"\n 1 , 2 , a \n\n3,"4","b"\n,,\n',
        b'x,y,kind\n1e0,+2,"a"\n3.,4,b\n\n\n',
    ],
)
def test_tables_as_programs_write_them(table: Path, content: bytes) -> None:
    table.write_bytes(content)
    data = csv_data(table)
    assert data.inputs.tolist() == [[1, 2], [3, 4]] and data.class_names == ["a", "b"]


def test_a_delimiter_can_be_given(table: Path) -> None:
    table.write_text("x|y,z|kind\n1|2|a\n3|4|b\n")
    assert csv_data(table, delimiter="|", features=["y,z"]).inputs.tolist() == [[2], [4]]
    refuses("delimiter", table, delimiter="||")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", "is empty; it needs a line of column names"),
        ("x,kind\n", "is empty"),
        ("kind\na\nb\n", "has no column to predict"),
        ("x,x,kind\n1,2,a\n", "the first line names x twice"),
        ("5.1,3.5,setosa\n4.9,3.0,virginica\n", "the first line holds numbers; it must name each column"),
        (",x,kind\n0,1,a\n", "column 1 has no name"),
        ("x,kind\n1,a\n2,b,c\n", "line 3: there are 3 cells for 2 columns"),
        ("x,kind\n1,a\n2\n", "line 3: there are 1 cells for 2 columns"),
        ('x,kind\n1,"a\n2,b\n', "mend its quotes"),
        ("x,kind\n1,a\nabc,b\n", "line 3, column x: abc is no number"),
        ("x,kind\n1,a\n,b\n", "line 3, column x: the value is missing"),
        ("x,kind\n1,a\nNaN,b\n", "line 3, column x: the value is missing"),
        ("x,kind\n1,a\ninf,b\n", "line 3, column x: inf is no number"),
        ("x,kind\n1,a\n1e39,b\n", "line 3, column x: 1e39 is no number"),
        ('x,kind\n1,a\n"2,5",b\n', "line 3, column x: 2,5 is no number"),
        ("x,kind\n1,a\n2,\n", "line 3, column kind: the cell is empty"),
        ("x,kind\n1,0.5\n2,NA\n", "line 3, column kind: the value is missing"),
        ("x,kind\n1,a\n2,a\n", "column kind has 1 classes in training rows (a); multiclass needs two or more"),
        (rows(*[f"id{i}" for i in range(50)]), "column kind has 50 classes in 50 rows; give another target or task"),
        (b"x,kind\n1,a\n2,caf\xe9\n", "line 3: this is not UTF-8"),
        ("x,kind\n1,a\n".encode("utf-16"), "line 1: this is not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(table: Path, content: str | bytes, error: str) -> None:
    refuses(error, table, content)


def test_what_is_wrong_with_names_is_one_line(table: Path) -> None:
    refuses("table.csv cannot be read: No such file", table)
    refuses("cannot be read: Is a directory", table.parent)
    table.write_text(rows("a", "b"))
    refuses("has no column hight; did you mean height? it has width, height, kind", table, target=["hight"])
    refuses("has no column part; it has", table, split_column="part")
    refuses("size=0", table, size=0)


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda word: word == word.strip())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(NUMBERS, min_size=n, max_size=n), min_size=2)),
    classes=st.lists(WORDS.filter(lambda word: not word[0].isdigit()), min_size=2, max_size=5, unique=True),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_any_table_comes_back(table: Path, cells: list, classes: list[str], delimiter: str, end: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    writer.writerow([*(f"c{column}" for column in range(len(cells[0]))), "kind"])
    kinds = [classes[row % len(classes)] for row in range(len(cells))]
    writer.writerows([*row, kind] for row, kind in zip(cells, kinds, strict=True))
    table.write_bytes(text.getvalue().encode())
    data = csv_data(table, task="multiclass")
    assert data.inputs.tolist() == cells
    assert data.class_names == sorted(set(kinds)) and [data.class_names[t] for t in data.targets] == kinds


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=60), st.text('ab,;\n"01.- ', max_size=60).map(str.encode)))
def test_any_bytes_are_read_or_refused_in_one_line(table: Path, content: bytes) -> None:
    table.write_bytes(content)
    try:
        data = csv_data(table)
    except MisconfigurationException as error:
        assert "\n" not in str(error) and str(table) in str(error) or "column" in str(error)
        assert isinstance(error.__cause__, ValueError)
    else:
        assert torch.isfinite(data.inputs).all() and len(data) == len(data.targets)
