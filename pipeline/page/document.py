"""A page from its template: everything that it shows is escaped, and the browser is told to load and run nothing else.

A template extends base.html and fills its blocks; parts.html has macros for what pages have in common. An expression
that prints text goes through visible(), so that no template can forget it; in an attribute write {{ text|attribute }}.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.meter import duration
from pipeline.page.visible import attribute, visible

HERE = Path(__file__).parent


def rendered(template: Path, **values: Any) -> str:
    """The HTML of a page.

    template: a file that extends base.html. values: what it names.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printed,
    )
    environment.filters |= {"attribute": attribute, "number": number, "share": share, "percent": percent}
    environment.filters |= {"duration": duration}
    script = (HERE / "filter.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The hash is of this one script: a row's text that became a script element would not run. No address is ever asked.
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    style = (HERE / "style.css").read_text()
    return environment.get_template(template.name).render(
        policy=policy, style=Markup(style), script=Markup(script), **values
    )


def number(value: float) -> str:
    """A number as people read it: 12,345 or 12.3."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    """A part in percent: 12.3 %; of nothing it is nothing."""
    return percent(part / whole if whole else 0.0)


def percent(value: float) -> str:
    """A share from 0 to 1 in percent: 12.3 %."""
    return f"{value:.1%}".replace("%", " %")


def _printed(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
