"""Inserted values are text, whoever wrote them, in HTML and in Markdown."""

from __future__ import annotations

import html
import re

import pytest
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from stocktake.evaluation.pages import _environment, render

ATTACKS = (
    "<script>alert(1)</script>",
    "[x](javascript:alert(2))",
    "![y](http://evil.example/z.png)",
    "<http://evil.example>",
    "`code` **bold** _it_ ~~gone~~",
    "a | b",
    "&lt;b&gt; \\<b>",
    "# heading",
)
TEMPLATE = "{% from macros import table, code %}{{ value }}\n\n{{ code(value) }}\n\n{{ table(['x'], [[value]]) }}"


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_inserted_is_text(attack: str) -> None:
    values = {"value": attack, "macros": "macros.markdown"}
    source = _environment("markdown").from_string(TEMPLATE).render(values)
    shown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(source)
    tags = re.findall(r"<(/?\w+)", shown)
    assert set(tags) <= {"p", "/p", "code", "/code", "table", "/table", "thead", "/thead", "tbody", "/tbody"} | {
        *("tr", "/tr", "th", "/th", "td", "/td")
    }
    assert html.unescape(shown.split("</p>")[0]) == f"<p>{attack}"
    assert html.unescape(re.findall("<td>(.*)</td>", shown)[0]) == attack
    page = _environment("html").from_string(TEMPLATE).render({**values, "macros": "macros.html"})
    assert page.startswith(html.escape(attack, quote=False).replace('"', "&#34;"))


def test_a_value_is_one_line_of_markdown() -> None:
    values = {"value": "a\n# b", "macros": "macros.markdown"}
    assert _environment("markdown").from_string("{{ value }}").render(values) == r"a \# b"


def test_a_missing_variable_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render("eda.html")
