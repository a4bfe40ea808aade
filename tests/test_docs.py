"""The documentation: links lead somewhere, code is code, commands are understood, and translations say the same."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "{{cookiecutter.project_slug}}"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md")])
LANGUAGES = ["ja", "zh-CN", "zh-TW"]
# Pages whose blocks are run by tests of this file that take a page, by language; and those that another test sees to.
RUN = {"python": ["README.md", "docs/how-to.md"], "bash": ["README.md", "docs/how-to.md", "docs/scaling-up.md"]}
ELSEWHERE = {
    ("docs/tutorial.md", "python"): "test_the_tutorial_from_nothing",
    ("docs/tutorial.md", "bash"): "test_the_tutorial_from_nothing",
    ("docs/scaling-up.md", "python"): "tests/test_scaling_up.py",
    ("docs/coming-from-lightning.md", "python"): "tests/test_exit_to_lightning.py",
}
for page, language in (("tutorial", "python"), ("tutorial", "bash"), ("README", "bash")):
    # A translation has the code of the English page, which is run.
    ELSEWHERE |= {(f"docs/{name}/{page}.md", language): "test_a_translation_has_the_code" for name in LANGUAGES}
# What a line of a Dockerfile begins with.
INSTRUCTIONS = set(
    "ADD ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK LABEL RUN SHELL STOPSIGNAL USER VOLUME".split()
)
INSTRUCTIONS |= {"ONBUILD", "WORKDIR"}
BLOCK = re.compile(r"(?:(?P<before>[^\n]+)\n+)?^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S)
# Above a block that cannot be run here: the reason, and which lines that is, by words in them; default: all.
MARK = re.compile(r"<!-- not run \((?P<reason>[^)]+)\)(?:: (?P<words>.*))? -->")


class Block(NamedTuple):
    """A block.

    Attributes:
        language: What stands behind the first three quotes.
        text: What stands between.
        skipped: Words in lines that nobody can run here, from a comment above it; None where that is all of them.
        file: Where the reader is told to save it.
    """

    language: str
    text: str
    skipped: tuple[str, ...] | None
    file: str | None


def blocks(path: Path) -> list[Block]:
    """All blocks of a file, in order."""
    found = []
    for match in BLOCK.finditer(path.read_text(encoding="utf-8")):
        before = match["before"] or ""
        mark, file = MARK.search(before), re.search(r"`([\w/]+\.\w+)`(?:[:：]| として保存します。)$", before)
        words = () if mark is None else None if mark["words"] is None else tuple(mark["words"].split(", "))
        found.append(Block(match["language"], match["text"], words, None if file is None else file[1]))
    return found


def commands(block: Block, all_of_them: bool = True) -> list[str]:
    """The commands of a shell block, without comments; all, or those that can be run here."""
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in block.text.replace("\\\n", " ").splitlines()]
    skipped = () if all_of_them else ("",) if block.skipped is None else block.skipped
    return [line for line in lines if line and not any(word in line for word in skipped)]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = page if not file else page.parent / file
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    missing = [page for page in pages if f"({page})" not in index and not page.endswith("README.md")]
    assert missing == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_the_code_of_the_english_text(language: str) -> None:
    english, other = blocks(ROOT / "docs/tutorial.md"), blocks(ROOT / "docs" / language / "tutorial.md")
    assert [(b.language, b.text) for b in other] == [(b.language, b.text) for b in english]
    assert [b.file for b in other] == [b.file for b in english]
    first_screen = blocks(ROOT / "README.md")[:3]
    translated = blocks(ROOT / "docs" / language / "README.md")
    assert [(b.language, b.text) for b in translated] == [(b.language, b.text) for b in first_screen]


@pytest.mark.parametrize("language", ["", *LANGUAGES])
def test_every_language_leads_to_the_others(language: str) -> None:
    folder = ROOT / "docs" / language
    for page in (folder / "tutorial.md", folder / "README.md" if language else ROOT / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert all(f"{other}/{page.name}" in text for other in LANGUAGES if other != language), page
        back = "../tutorial.md" if page.stem == "tutorial" else "../../README.md"
        assert not language or f"[English]({back})" in text, page


def check_code(block: Block, name: str, folder: Path) -> None:
    """Fail unless a block can be read as what it says it is."""
    assert block.language in ("", "bash", "dockerfile", "python", "yaml"), block
    if block.language == "python":
        compile(block.text, name, "exec")
    elif block.language == "yaml":
        assert [*yaml.safe_load_all(block.text)]
    elif block.language == "bash":
        script = folder / "block.sh"
        script.write_text(block.text, encoding="utf-8")
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, (block.text, done.stderr)
    elif block.language == "dockerfile":
        lines = [line.split() for line in commands(block)]
        assert lines and all(words[0] in INSTRUCTIONS and words[1:] for words in lines), block


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_is_code(page: Path, tmp_path: Path) -> None:
    found = blocks(page)
    # Each fence opens or closes a block that was found.
    assert len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.M)) == 2 * len(found)
    for block in found:
        check_code(block, name_of(page), tmp_path)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("ruby", "puts 1"),
        ("python", "if"),
        ("yaml", "a: ["),
        ("bash", "if"),
        ("dockerfile", "FORM x"),
        ("dockerfile", "RUN"),
    ],
)
def test_what_is_not_code_is_found(language: str, text: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, SyntaxError, yaml.YAMLError)):
        check_code(Block(language, f"{text}\n", (), None), "page.md", tmp_path)


def test_every_block_is_run_by_some_test() -> None:
    """Or marked, with a reason."""
    there = {
        (name_of(page), block.language)
        for page in PAGES
        for block in blocks(page)
        if block.language in RUN and block.skipped is not None
    }
    seen_to = {(page, language) for language, pages in RUN.items() for page in pages} | ELSEWHERE.keys()
    assert there - seen_to == set() and seen_to - there == set()


def understood(block: Block) -> list[list[str]]:
    """The words of every `python main.py` in a block, also under a launcher."""
    found = []
    for command in commands(block):
        words = shlex.split(command)
        if "main.py" in words and words[0] in ("python", "torchrun", "srun"):
            found.append(words[words.index("main.py") + 1 :])
    return found


@pytest.fixture
def prepared(project: Path) -> Path:
    """A project with what the recipes speak of."""
    generator = torch.Generator().manual_seed(0)
    rows = [",".join(f"{x:.3f}" for x in row) for row in torch.rand(120, 4, generator=generator).tolist()]
    for file in ("houses.csv", "new.csv", "datasets/houses.csv"):
        (project / file).parent.mkdir(exist_ok=True)
        (project / file).write_text("\n".join(["a,b,c,price", *rows]) + "\n", encoding="utf-8")
    for number in range(4):
        (project / "holiday").mkdir(exist_ok=True)
        Image.new("L", (9, 9), 60 * number).save(project / f"holiday/{number}.png")
    (project / "configs/mine.yaml").write_text("max_epochs: 3\n", encoding="utf-8")
    for name in ("day", "night", "rain", "my_data"):
        text = (project / "data/standard_data.py").read_text(encoding="utf-8")
        text = text.replace("StandardData", name.title().replace("_", ""))
        (project / "data" / f"{name}.py").write_text(text, encoding="utf-8")
    net = (project / "model/standard_net.py").read_text(encoding="utf-8").replace("StandardNet", "MyNet")
    (project / "model/my_net.py").write_text(net, encoding="utf-8")
    return project


@pytest.mark.parametrize("page", ["README.md", "docs/how-to.md"])
def test_flags_of_commands_are_understood(page: str, prepared: Path) -> None:
    from data import DInterface
    from model import MInterface
    from utils.arguments import parse

    seen = 0
    for block in blocks(ROOT / page):
        for words in understood(block) if block.language == "bash" else ():
            # These read a checkpoint first, which lies in nobody's logs yet.
            if "--help" in words or "best" in words or "last" in words or "logs" in " ".join(words):
                continue
            parse(words, (DInterface, MInterface))
            seen += 1
    assert seen >= 10


def test_recipes_name_methods_that_there_are(prepared: Path) -> None:
    import engine
    from model import MInterface

    text = (ROOT / "docs/how-to.md").read_text(encoding="utf-8")
    for method in re.findall(r"def (\w+)\(self", text):
        assert hasattr(MInterface, method) or hasattr(engine.Callback, method), method


def test_python_of_pages_runs(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block where it belongs: in a net's file, in MInterface, among the callbacks, or by itself."""
    import engine
    from data import DInterface
    from model import MInterface

    short = {"limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1, "logger": False}
    short |= {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = engine.Trainer
    seen = []
    for page in RUN["python"]:
        for block in (block for block in blocks(ROOT / page) if block.language == "python"):
            data, model = DInterface(), MInterface()
            names = {"nn": torch.nn, "model": model, "data": data, "engine": engine}
            monkeypatch.setattr(engine, "Trainer", lambda **given: trainer(**{**given, **short}))
            exec(compile(block.text, page, "exec"), names)
            made = [value for name, value in names.items() if f"class {name}(" in block.text]
            if made and issubclass(made[0], torch.nn.Module):
                made[0]()
                seen.append("net")
            elif made:
                run = trainer(**short, callbacks=[made[0]()])
                run.fit(model, datamodule=data)
                assert run.callback_metrics["seconds"] > 0
                seen.append("callback")
            elif "configure_loss" in names:
                own = type("Own", (MInterface,), {"configure_loss": names["configure_loss"]})()
                trainer(**short).fit(own, datamodule=data)
                assert own.loss.label_smoothing == 0.1
                seen.append("loss")
            else:
                assert names["trainer"].state.global_step > 0
                seen.append("run")
    assert seen == ["net", "run", "loss", "callback"]


def test_the_engine_page_names_files_that_there_are() -> None:
    text = (ROOT / "docs/engine.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(\w+\.py)\b", text)) - {"main.py"}
    assert len(named) > 25
    assert [name for name in sorted(named) if not (TEMPLATE / "engine" / name).is_file()] == []


def test_the_drawing_of_the_engine_names_functions_where_they_are() -> None:
    text = (ROOT / "docs/engine.md").read_text(encoding="utf-8")
    drawing = text[text.index("```") : text.index("```\n\n")]
    drawn = re.findall(r"^[^\w\n]*(?:trainer\.)?([\w.]+)(?:\([^)\n]*\))? {2,}(\w+\.py)", drawing, re.M)
    assert len(drawn) == 5, drawn
    for name, file in drawn:
        code = (TEMPLATE / "engine" / file).read_text(encoding="utf-8")
        for owner, defined in zip(["", *name.split(".")], name.split("."), strict=False):
            code = code[code.index(f"class {owner}") :] if owner else code
            assert re.search(rf"^ *(?:def|class) {defined}\b", code, re.M), (name, file)


def test_a_block_is_read_as_it_stands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Save this as `a/b.py`:\n\n```python\nx = 1\n```\n\n"
        "<!-- not run (takes a cluster): sbatch -->\n```bash\nsbatch x  # now\npython y\n```\n"
        "<!-- not run (takes an hour) -->\n```bash\nmake all\n```\n"
    )
    first, second, third = blocks(page)
    assert first == Block("python", "x = 1\n", (), "a/b.py")
    assert commands(second) == ["sbatch x", "python y"] and commands(second, all_of_them=False) == ["python y"]
    assert commands(third) == ["make all"] and commands(third, all_of_them=False) == []


def shell_of_a_newcomer(script: str, folder: Path, home: Path) -> None:
    """Run a script with an empty home, without git's identity, and answer every question with Enter."""
    home.mkdir()
    paths = [str(Path(sys.base_prefix, "bin")), "/usr/local/bin", "/usr/bin", "/bin"]
    # Where packages come from, and no other setting.
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))}
    environment = {**kept, "HOME": str(home), "PATH": ":".join(paths), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, input="\n" * 20, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.long
def test_the_tutorial_from_nothing(template: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "мои проекты 計画").mkdir()
    # `gh:` stands for a server: the template lies here instead.
    source = shlex.quote(str(shutil.copytree(template, tmp_path / "the template")))
    # One shell, as a reader has one: its environment and working folder stay from block to block.
    script = ["set -eu"]
    for block in blocks(ROOT / "docs/tutorial.md"):
        if block.file is not None:
            script.append(f"cat > {block.file} <<'END_OF_FILE'\n{block.text}END_OF_FILE")
        elif block.language == "python":
            script.append(f"python - <<'END_OF_FILE'\n{block.text}END_OF_FILE")
        elif block.language == "bash":
            script.append(block.text.replace("gh:org/cookiecutter-torch-trainer", source))
    assert len(script) >= 10
    shell_of_a_newcomer("\n".join(script), folder, tmp_path / "home")
    logs = folder / "odd-or-even/logs"
    assert (logs / "standard_net/version_0/report/report.html").is_file()
    assert (logs / "my_net/version_0/predictions.csv").is_file()


@pytest.mark.long
@pytest.mark.parametrize("page", RUN["bash"])
def test_commands_of_a_page_run(page: str, prepared: Path) -> None:
    python = Path(sys.executable)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    ran, skipped = 0, ("git clone", "make ", "pip install", "cookiecutter ", "cd ")
    for block in blocks(ROOT / page):
        for command in commands(block, all_of_them=False) if block.language == "bash" else ():
            # The first screen is followed by a test of its own.
            if not command.startswith(skipped):
                done = subprocess.run(
                    ["bash", "-c", command], cwd=prepared, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, (command, done.stdout[-500:], done.stderr[-1500:])
                ran += 1
    assert ran >= 5


@pytest.mark.long
def test_the_first_screen_from_nothing(template: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(template, tmp_path / "the template"))
    git = ["git", "-C", str(source), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    first, second, _ = blocks(ROOT / "README.md")[:3]
    place = shlex.quote(str(source))
    script = ["set -eu", *commands(first, all_of_them=False), "cd .. && python3 -m venv v && . v/bin/activate"]
    script += commands(second)
    text = "\n".join(script).replace("https://github.com/org/cookiecutter-torch-trainer", place)
    text = text.replace("gh:org/cookiecutter-torch-trainer", place)
    text = text.replace("cd cookiecutter-torch-trainer", "cd 'the template'")
    (folder := tmp_path / "мои проекты 計画").mkdir()
    shell_of_a_newcomer(text, folder, tmp_path / "home")
    assert (folder / "my-project/logs/standard_net/version_0/report/report.html").is_file()
