"""HTML and SVG built from functions: every text is escaped unless it is markup already.

Names of files, reasons and configuration come from outside, so there is one door (`tag`) and it escapes by default.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable

NOTHING = "–"
"""Stands where a value is not known."""


class Html(str):
    """Markup that is finished: it goes into other markup as it is."""

    __slots__ = ()


Child = str | Iterable["Child"] | None
"""What an element may hold: text (escaped), markup, several of them, or nothing."""


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """Return the element with its children.

    Attributes lose a trailing underscore (`class_`), and other underscores become hyphens; those of None are left
    out. Values are escaped like text.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Child) -> Html:
    """Return children one after the other, text escaped."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str):
        return escape(children)
    return Html("".join(join(child) for child in children))


def escape(text: str) -> Html:
    """Return text as it may stand in an element or a quoted attribute.

    Characters that show nothing or turn the direction of writing (a file name may hold them) become U+FFFD.
    """
    if not text.isprintable():
        text = "".join("\N{REPLACEMENT CHARACTER}" if _is_hidden(c) else c for c in text)
    return Html(html.escape(text, quote=True))


def table(
    head: Iterable[Child], rows: Iterable[Iterable[Child]], *, numbers: Iterable[int] = (), class_: str = ""
) -> Html:
    """Return a table; `numbers` are the columns that are set to the right. A row's cells may be markup."""
    right = frozenset(numbers)

    def cells(name: str, row: Iterable[Child]) -> list[Html]:
        return [tag(name, cell, class_="num" if i in right else None) for i, cell in enumerate(row)]

    body = [tag("tr", cells("td", row)) for row in rows]
    whole = tag(
        "table", tag("thead", tag("tr", cells("th", head))), tag("tbody", body), class_=class_ or None
    )
    return tag("div", whole, class_="scroll")


def number(value: float | None, decimals: int = 2, unit: str = "") -> str:
    """Return a number in words, `NOTHING` where it is not known."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:,.{decimals}f}{unit}".replace("-", "−")


_VOID = frozenset({"img", "meta", "br"})
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})


def _is_hidden(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in _HIDDEN


def _plain(value: str | float) -> str:
    """Return an attribute's value; coordinates of drawings need no more than a hundredth."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"
    return str(value)
