"""Pages from the jinja2 templates of `templates/`: HTML, and Markdown where a template is written for both.

Whatever a template inserts is escaped, for HTML or for Markdown. All pages extend `base.html`, which has the style
sheet `style.css`; they need nothing from elsewhere and run no script unless they say so.
"""

from __future__ import annotations

import base64
import re
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jinja2 import Environment

Format = Literal["html", "markdown"]


def render(template: str, format: Format = "html", **values: Any) -> str:
    """Render a template.

    Args:
        template: file name in `templates/`.
        format: decides how inserted values are escaped; a template for both imports its macros from
            `macros.html` or `macros.markdown`, named by the variable `macros`.
        values: the template's variables; a missing one is an error.
    """
    text = _environment(format).get_template(template).render(macros=f"macros.{format}", **values)
    return text.strip() + "\n"


def data_uri(image: bytes, kind: Literal["png", "jpeg"] = "png") -> str:
    """Return an image as the address of an <img> that needs no file."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


@cache
def _environment(format: Format) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("stocktake.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_markdown if format == "markdown" else None,
    )
    environment.filters["code"] = _code
    return environment


def _markdown(value: object) -> object:
    """Escape what Markdown would read as markup, HTML or a link; collapse white space, for a table row is one line."""
    from markupsafe import Markup

    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split())
    return Markup(re.sub(r"([\\`*_\[\]<>|&~#]|:(?=//))", r"\\\1", text))  # noqa: S704 - escaped here


def _code(value: object) -> object:
    """Prepare text for a Markdown code span: a backtick would end it, and `|` ends a table cell even there."""
    from markupsafe import Markup

    text = " ".join(str(value).split()).replace("`", "'").replace("|", "¦")
    return Markup(text or " ")  # noqa: S704 - a code span shows it as it is
