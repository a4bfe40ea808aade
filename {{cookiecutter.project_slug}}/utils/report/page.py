"""A page of HTML that needs nothing but itself: headings, numbers, tables, and figures as part of the text."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

# Pixels across: figures up to here stand side by side, and fit on a phone.
SMALL = 500


class Page:
    """A page that is filled from top to bottom.

    Args:
        title: The page's name.
        subtitle: A line below it.

    Attributes:
        figures: PNG files by name, in their order.
    """

    def __init__(self, title: str, subtitle: str) -> None:
        self.title, self.subtitle = title, subtitle
        self.figures: dict[str, bytes] = {}
        self._parts: list[str] = []

    def heading(self, text: str, below: str = "") -> None:
        """A heading, and a paragraph that says how to read what follows."""
        self._parts.append(f"<h2>{escape(text)}</h2>" + (f"<p>{escape(below)}</p>" if below else ""))

    def paragraph(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def figure(self, name: str, png: bytes, alternative: str) -> None:
        """A figure.

        Args:
            name: Of its file, without an ending.
            png: The file's content.
            alternative: What it shows, for those who do not see it.
        """
        self.figures[name] = png
        # Drawn for 150 dots an inch, and shown at 96: sharp also on screens with small dots.
        width, height = (int.from_bytes(png[at : at + 4], "big") * 96 // 150 for at in (16, 20))
        kind = "" if width <= SMALL else ' class="large"'
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        size = f'width="{width}" height="{height}"{kind}'
        image = f'<img src="{source}" alt="{escape(alternative)}" title="{escape(name)}.png" {size}>'
        # Small ones stand side by side.
        joined = width <= SMALL and self._parts and self._parts[-1].startswith('<div class="box"><img')
        before = self._parts.pop().removesuffix("</div>") if joined else '<div class="box">'
        self._parts.append(f"{before}{image}</div>")

    def numbers(self, values: Mapping[str, str]) -> None:
        """A few numbers, large, each with its name."""
        items = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in values.items())
        self._parts.append(f'<div class="numbers">{"".join(items)}</div>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], folded: str = "") -> None:
        """A table; numbers stand to the right.

        Args:
            columns: Names of the columns.
            rows: Cells of the rows.
            folded: If given, the table is folded away behind this text.
        """
        numeric = [all(isinstance(row[n], int | float) for row in rows) for n in range(len(columns))]
        kinds = [' class="number"' if number else "" for number in numeric]
        head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
        lines = (
            "<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
            for row in rows
        )
        table = f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        self._parts.append(f"<details><summary>{escape(folded)}</summary>{table}</details>" if folded else table)

    def render(self) -> bytes:
        """The page as HTML in UTF-8."""
        template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
        content = "\n".join(self._parts)
        page = template.substitute(title=escape(self.title), subtitle=escape(self.subtitle), content=content)
        # Names of files may hold what no encoding has.
        return page.encode("utf-8", "replace")


def as_text(value: float) -> str:
    """A number with four digits or so."""
    if value != value:
        return "–"
    if 1e3 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.3g}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return as_text(value)
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
