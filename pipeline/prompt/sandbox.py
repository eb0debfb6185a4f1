"""The Jinja in which prompts are written: sandboxed, strict about what is missing, bounded in time and memory.

Jinja's own sandbox keeps a template away from Python's insides. It stops neither nested loops nor "a" * 300000000, so
every loop step, call, filter and piece of text is charged against one budget for each rendering, before it is made
where its size can be known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sized
from functools import wraps
from itertools import groupby
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.filters import FILTERS, do_indent, do_round, make_attrgetter
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from pipeline.prompt.null import Null, NullUsed

MAX_TEXT = 2_000_000  # characters of one rendered text
MAX_WORK = 20_000_000  # characters made and values walked over while rendering one text
STEP = 400  # what a loop step, a call or a filter costs beside the text it makes: 50,000 of them exhaust MAX_WORK

# What makes much out of little (center, batch), out of nothing (random) or HTML out of text (escape, urlize) is left
# out; join, replace, indent, format, round and tojson are our own, bounded.
PLAIN_FILTERS = """
    abs attr capitalize count d default dictsort first float groupby int items last length list lower map
    max min reject rejectattr reverse select selectattr sort string striptags sum title trim truncate unique
    upper urlencode wordcount
"""
TEXT_METHODS = """
    capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower
    isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(TEXT_METHODS.split()),
    bytes: frozenset(("decode", "hex")),
    int: frozenset(("bit_length",)),
    float: frozenset(("is_integer",)),
}


class TemplateLimit(jinja2.TemplateRuntimeError):
    """A rendering asked for more text or more steps than any prompt needs."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one set of templates. It renders one text at a time: not for several threads."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        self.spent = 0
        super().__init__(
            autoescape=False,
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
            trim_blocks=True,  # as transformers does: a line that holds only a {% tag %} leaves no empty line behind
            lstrip_blocks=True,
            optimized=False,  # nothing is computed before there is a budget
            finalize=self._printed,
        )
        del self.globals["lipsum"]  # random words
        self.filters = {name: self._charged(FILTERS[name]) for name in PLAIN_FILTERS.split()}
        self.filters |= {"join": self._join, "replace": self._replace, "indent": self._indent, "format": self._format}
        self.filters |= {"round": self._round, "tojson": self._tojson, "_walk": self._walk}
        self.tests["none"] = lambda value: value is None or isinstance(value, Null)

    def template(self, source: str, image_literal: str | None = None) -> tuple[jinja2.Template, set[str], set[str]]:
        """Compile a template: the template, all names that it reads, those that it does not define itself.

        A call of image() reads the name _image, so that a column may be called image. `image_literal`, where it stands
        in the template's own text, is such a call, too.

        Raises:
            jinja2.TemplateSyntaxError: with the line in `lineno`.
        """
        try:
            tree = self.parse(source)
            for node in tree.find_all((nodes.Extends, nodes.FromImport, nodes.Import, nodes.Include)):
                raise jinja2.TemplateSyntaxError("a prompt cannot use other files", node.lineno)
            tree = _Bounded(image_literal).visit(tree)
            tree.set_environment(self)
            compiled = self.from_string(tree)
        except (RecursionError, SyntaxError) as error:  # what Python makes of hundreds of nested brackets or loops
            raise jinja2.TemplateSyntaxError(f"nested too deeply ({type(error).__name__})", 1) from None
        read = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
        assigned = {
            node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"
        }  # perhaps in one branch only
        return compiled, read, meta.find_undeclared_variables(tree) - assigned

    def render(
        self, template: jinja2.Template, variables: Mapping[str, Any], neutral: Callable[[str], str] | None = None
    ) -> str:
        """The text of a template.

        neutral: applied to what its expressions print, not to its own text; to what several print without any text of
            the template between them as a whole, so that two columns cannot give a word that neither has.

        Raises:
            TemplateLimit, NullUsed, or whatever the expressions of the template raise.
        """
        self.spent = 0
        texts: list[str] = []
        for printed, pieces in groupby(
            _bounded(template.generate(variables)), lambda piece: isinstance(piece, _Printed)
        ):
            text = "".join(pieces)
            texts.append(neutral(text) if printed and neutral is not None else text)
        return "".join(texts)

    def charge(self, work: int) -> None:
        self.spent += work
        if self.spent > MAX_WORK:
            raise TemplateLimit("the template does too much work (endless loops, or text multiplied)")

    # What follows is called by the code that Jinja generates.

    def _printed(self, value: Any) -> Any:
        if value is None:
            raise NullUsed("an expression that the template prints is null")
        if not isinstance(value, Undefined) and (callable(value) or isinstance(value, bytes | bytearray)):
            what = "bytes" if isinstance(value, bytes | bytearray) else "a function, not its value"
            raise jinja2.TemplateRuntimeError(f"an expression prints {what}")
        text = str(value)
        self.charge(len(text))
        return _Printed(text)

    def _walk(self, values: Any, literal: int) -> Iterator[Any]:
        """The values of a for loop; `literal` is the length of the loop's own text."""
        for value in values:
            self.charge(STEP + literal)
            yield value

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.charge(STEP)
        text = getattr(function, "__self__", None)
        if isinstance(text, str) and function.__name__ == "join" and args:
            return self._join(args[0], text)
        if isinstance(text, str) and function.__name__ == "replace":
            return self._replace(text, *args, **kwargs)
        result = super().call(context, function, *args, **kwargs)
        self.charge(_size(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.charge(_growth(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in METHODS.items():
            if isinstance(obj, kind):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        return None  # str.format is not among METHODS: a width in it makes any length of text

    def _charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # before the value comes Jinja's context

        @wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            self.charge(STEP + _size(args[first]))
            result = function(*args, **kwargs)
            self.charge(_size(result))
            return result

        return filtered

    def _join(self, values: Any, d: str = "", attribute: str | int | None = None) -> str:
        pick = make_attrgetter(self, attribute) if attribute is not None else None
        texts = [str(pick(value) if pick else value) for value in values]
        self.charge(STEP + sum(map(len, texts)) + len(d) * len(texts))
        return str(d).join(texts)

    def _replace(self, text: Any, old: Any, new: Any, count: int = -1) -> str:
        whole, searched, instead = str(text), str(old), str(new)
        self.charge(STEP + len(whole) + len(instead) * whole.count(searched))
        return whole.replace(searched, instead, count)

    def _indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = str(text)
        size = len(width) if isinstance(width, str) else abs(width)
        self.charge(STEP + len(text) + size * (text.count("\n") + 2))
        return do_indent(text, width, first, blank)

    def _format(self, pattern: Any, *args: Any, **kwargs: Any) -> str:
        pattern = str(pattern)
        _refuse_width(pattern)
        self.charge(STEP + sum(map(_size, (pattern, *args, *kwargs.values()))))
        return str(pattern % (kwargs or args))

    def _round(self, value: float, precision: int = 0, method: Any = "common") -> float:
        if abs(precision) > 100:
            raise TemplateLimit(f"round to {precision} digits")
        return do_round(value, precision, method)

    def _tojson(self, value: Any, indent: int | None = None) -> str:
        """JSON as a person writes it, umlauts and apostrophes kept (Jinja's own escapes them for HTML)."""
        text = json.dumps(value, ensure_ascii=False, indent=min(indent, 8) if indent else None, default=_plain)
        self.charge(STEP + len(text))
        return text


class _Printed(str):
    """What an expression of a template printed, as long as it has not become part of another value."""

    __slots__ = ()

    def __str__(self) -> str:
        return self  # the code that Jinja generates calls str() on it


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    num_characters = 0
    for piece in pieces:
        num_characters += len(piece)
        if num_characters > MAX_TEXT:
            raise TemplateLimit(f"the text has more than {MAX_TEXT:,} characters; shorten it with [:1000]")
        yield piece


class _Bounded(NodeTransformer):
    """Sends what Jinja compiles to bare Python (loops, `~`) through the budget, and image() to a name of its own."""

    def __init__(self, image_literal: str | None) -> None:
        self._image_literal = image_literal

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        if self._image_literal is not None:
            node.nodes = [piece for child in node.nodes for piece in self._pieces(child)]
        return self.generic_visit(node)

    def _pieces(self, child: nodes.Expr) -> list[nodes.Expr]:
        if not isinstance(child, nodes.TemplateData):
            return [child]
        assert self._image_literal is not None
        pieces: list[nodes.Expr] = []
        for number, text in enumerate(child.data.split(self._image_literal)):
            if number:
                called = nodes.Name("_image", "load", lineno=child.lineno)
                pieces.append(nodes.Call(called, [], [], None, None, lineno=child.lineno))
            if text:
                pieces.append(nodes.TemplateData(text, lineno=child.lineno))
        return pieces

    def visit_For(self, node: nodes.For) -> nodes.Node:
        literal = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.iter = nodes.Filter(node.iter, "_walk", [nodes.Const(literal)], [], None, None, lineno=node.lineno)
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        pieces = nodes.List(node.nodes, lineno=node.lineno)
        return self.generic_visit(nodes.Filter(pieces, "join", [], [], None, None, lineno=node.lineno))

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        if isinstance(node.node, nodes.Name) and node.node.name == "image":
            node.node.name = "_image"
        return self.generic_visit(node)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, Sized) and not isinstance(value, Undefined) else 1


def _growth(operator: str, left: Any, right: Any) -> int:
    """An upper bound of what an operation makes, in characters, items or bits."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > 10_000:
            raise TemplateLimit("a number with more than 3,000 digits")
        return bits
    if operator == "*" and isinstance(right, int):
        return _size(left) * max(right, 0)
    if operator == "*" and isinstance(left, int):
        return _size(right) * max(left, 0)
    if operator == "%" and isinstance(left, str):
        _refuse_width(left)
    return _size(left) + _size(right)


def _refuse_width(pattern: str) -> None:
    if re.search(r"\*|\d{4}", pattern):
        raise TemplateLimit(f"a width in the format {pattern[:80]!r}")


def _plain(value: Any) -> Any:
    return None if isinstance(value, Null) else str(value)
