"""One Jinja template over the columns of a row: compiled and checked once, rendered for each row."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from pipeline.errors import RowFault, UsageError
from pipeline.prompt.null import NullUsed, guard_nulls
from pipeline.prompt.sandbox import Sandbox, TemplateLimit
from pipeline.records import Row, Stage

_OTHERS = "Set prompt.user, or choose another prompt: prompt=describe, caption_short, ocr or tags."
# What an expression of a template can raise on the values of one row.
RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class ColumnTemplate:
    """A template that knows the columns it reads.

    Args:
        key: the option that holds the template, for messages.
        images: whether it may place images.
        image_literal: text that places one, as image() does.

    Raises:
        UsageError: it is no Jinja, names an absent column, or places an image where none may be.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        key: str,
        source: str,
        columns: Sequence[str],
        *,
        images: bool = False,
        image_literal: str | None = None,
    ) -> None:
        self._sandbox = sandbox
        self.has_text = bool(source.strip())
        try:
            self._code, read, unknown = sandbox.template(source, image_literal)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"{key}, line {error.lineno}: {error.message}") from None
        if "_image" in unknown and not images:
            raise UsageError(f"{key} uses image(), which has a place in prompt.user and prompt.variants only")
        for name in sorted(unknown - set(columns) - {"_image", "row", "num_images"}):
            others = f" {_OTHERS}" if key == "prompt.user" else ""
            raise UsageError(f"{key} uses {name!r}, which is not a column.{_hint(name, columns)}{others}")
        self._columns = tuple(name for name in columns if name in read)
        self._uses_row = "row" in read and "row" not in columns

    def text(
        self,
        row: Row,
        label: str,
        *,
        image: Callable[[], str] | None = None,
        data: Callable[[str], str] | None = None,
    ) -> str:
        """The text for a row. `image` gives what stands for the next image, `data` is applied to what columns print.

        Raises:
            RowFault: NullColumn, TemplateLimit, or what the template raised on this row; the message begins with
                `label`.
        """
        variables: dict[str, Any] = {"num_images": len(row.images), "_image": image}
        if self._uses_row:
            variables["row"] = {name: guard_nulls(value, name) for name, value in row.columns.items()}
        for name in self._columns:
            variables[name] = guard_nulls(row.columns.get(name), name)
        try:
            return self._sandbox.render(self._code, variables, data)
        except NullUsed as error:
            raise RowFault(Stage.TEMPLATE, "NullColumn", f"{label}: {error.message}") from None
        except TemplateLimit as error:
            raise RowFault(Stage.TEMPLATE, "TemplateLimit", f"{label}: {error.message}") from None
        except RENDER_ERRORS as error:
            raise RowFault(Stage.TEMPLATE, type(error).__name__, f"{label}: {error}") from None


def _hint(name: str, columns: Sequence[str]) -> str:
    if name == "image":
        return ' To place an image write "{{ image() }}".'
    nearest = difflib.get_close_matches(name, columns, n=1)
    meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{meant} Columns: {', '.join(columns) or 'none'}."
