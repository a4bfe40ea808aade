"""Run a command in a terminal of a given size and save what it finally shows as an SVG picture.

    python tools/screenshot.py --columns 100 --title "make demo" docs/images/demo.svg -- make demo

The command sees a real terminal, so progress bars and colours appear as a user sees them; what scrolls away
is kept. The exit status is that of the command.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

HISTORY = 100_000  # lines


def record(command: list[str], columns: int, rows: int) -> tuple[bytes, int]:
    """Run a command under a pseudo terminal, showing its output as it comes.

    Args:
        command: Program and arguments.
        columns: Width of the terminal, characters.
        rows: Height of the terminal, lines.

    Returns:
        All bytes written to the terminal, and the exit status.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in {"COLUMNS", "LINES", "NO_COLOR"}}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = bytearray()
    try:
        while chunk := read(ours):
            output += chunk
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    finally:
        os.close(ours)  # a command that still runs is hung up on, as when a window is closed
    return bytes(output), process.wait()


def read(terminal: int) -> bytes:
    """Return the next output of a terminal, or nothing when its last user is gone."""
    try:
        return os.read(terminal, 65536)
    except OSError as error:
        if error.errno == errno.EIO:  # how Linux says end of file here
            return b""
        raise


def emulate(output: bytes, columns: int, rows: int) -> Text:
    """Return what a terminal shows after all of the output, with the lines that scrolled away."""
    screen = pyte.HistoryScreen(columns, rows, history=HISTORY)
    pyte.ByteStream(screen).feed(output)
    cells = [*screen.history.top, *(screen.buffer[row] for row in range(rows))]
    lines = [draw(line, columns) for line in cells]
    while lines and not lines[-1].plain:
        lines.pop()
    return Text("\n").join(lines)


def draw(line: Mapping[int, pyte.screens.Char], columns: int) -> Text:
    """Return one line of the terminal as text with styles."""
    text = Text()
    for style, cells in groupby((line[column] for column in range(columns)), key=style_of):
        text.append("".join(cell.data for cell in cells), style)
    text.rstrip()
    return text


def style_of(cell: pyte.screens.Char) -> Style:
    """Translate pyte's attributes of a character into a style of rich."""
    return Style(
        color=color(cell.fg),
        bgcolor=color(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        strike=cell.strikethrough,
        reverse=cell.reverse,
    )


def color(name: str) -> str | None:
    """Translate pyte's name of a colour into rich's."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return name.replace("brown", "yellow").replace("bright", "bright_")


def save(text: Text, path: Path, columns: int, title: str) -> None:
    """Write the picture. It loads nothing from the network and depends on the text alone."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(text, no_wrap=True, overflow="ignore", crop=False)
    console.print()  # the picture cuts into its last line
    svg = console.export_svg(title=title, unique_id="terminal")
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg, encoding="utf-8")


def main() -> int:
    """Read the arguments, run the command, save the picture, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=100, help="width of the terminal (default: 100)")
    parser.add_argument("--rows", type=int, default=40, help="height of the terminal (default: 40)")
    parser.add_argument("--title", default="", help="title of the window (default: none)")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    parser.add_argument("command", nargs="+", help="the command to run, after --")
    args = parser.parse_args()
    output, status = record(args.command, args.columns, args.rows)
    save(emulate(output, args.columns, args.rows), args.picture, args.columns, args.title)
    print(f"exit status: {status}")
    return status


if __name__ == "__main__":
    sys.exit(main())
