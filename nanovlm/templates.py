"""Chat templates, run in jinja's sandbox with limits on loops, time, numbers and text.

Unusual: a template comes with a checkpoint and is somebody else's program. Besides what jinja's own sandbox
refuses (attributes of the interpreter, changing what it is given), every loop is counted, and whatever could
make much out of little, such as ``'x' * 10**9``, is measured before it is done. Compiled templates are kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from nanovlm.errors import PromptError

MAX_TEMPLATE_CHARS = 200_000
MAX_TEXT_CHARS = 8_000_000
MAX_NUMBER = 1_000_000
MAX_STEPS = 200_000
MAX_SECONDS = 5.0

# Methods of text that real templates use; what is left out formats to widths or expands tabs.
TEXT_METHODS = {
    "capitalize", "count", "endswith", "find", "index", "isalpha", "isdigit", "islower", "isspace", "isupper",
    "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rpartition",
    "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
}  # fmt: skip
WIDE_FILTERS = ("center", "format", "indent", "urlize", "wordwrap", "xmlattr", "batch", "slice", "pprint")
_METER = "meter of this rendering"  # its key among the variables; no template can spell it


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text a template makes. Raises PromptError with the template's own words or the limit it passed."""
    meter = Meter()
    try:
        pieces, size = [], 0
        for piece in _compiled(template).generate(**variables, **{_METER: meter}):
            meter.step()
            size += len(piece)
            meter.text(size)
            pieces.append(piece)
        return "".join(pieces)
    except PromptError:
        raise
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        raise PromptError(f"the chat template fails: {type(error).__name__}: {error}") from None


class Meter:
    """Counts what one rendering does, and stops it."""

    def __init__(self) -> None:
        self.steps = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        """One iteration, call or operation."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise PromptError(f"the chat template takes more than {MAX_STEPS:,} steps")
        if self.steps % 256 == 0 and time.monotonic() > self.deadline:
            raise PromptError(f"the chat template runs for more than {MAX_SECONDS:g} s")

    @staticmethod
    def text(length: int) -> None:
        """A text or list of this length."""
        if length > MAX_TEXT_CHARS:
            raise PromptError(
                f"the chat template makes a text of {length:,} characters; at most {MAX_TEXT_CHARS:,}"
            )

    @staticmethod
    def number(value: Any) -> None:
        """A number that something is done with."""
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise PromptError(f"the chat template computes with {value:.3g}; at most {MAX_NUMBER:,}")


class Environment(ImmutableSandboxedEnvironment):
    """Measures operators and calls before it does them."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _meter(context)
        meter.step()
        sizes = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
        counts = [value for value in (left, right) if isinstance(value, int)]
        if operator == "%" and isinstance(left, str):
            raise PromptError("the chat template formats text with %, which can make any width")
        if operator == "*" and sizes and counts:
            meter.text(sizes[0] * counts[0])
        if operator == "+" and sizes:
            meter.text(sum(sizes))
        if operator == "**" and isinstance(right, int | float) and abs(right) > 64:
            raise PromptError(f"the chat template raises to the power of {right}")
        result = super().call_binop(context, operator, left, right)
        meter.number(result)
        return result

    def call(self, context: Context, function: Any, *arguments: Any, **named: Any) -> Any:
        meter = _meter(context)
        meter.step()
        for value in (*arguments, *named.values()):
            meter.number(value)
        text, method = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if method.startswith("format") or isinstance(text, str) and method not in TEXT_METHODS:
            # str.format arrives wrapped by jinja, without its text
            raise PromptError(f"the chat template calls {method} on text, which is not allowed")
        if isinstance(text, str):
            if method == "replace" and len(arguments) > 1:
                meter.text(text.count(arguments[0]) * len(arguments[1]))
            if method == "join" and arguments:
                arguments = (_joinable(meter, text, arguments[0]), *arguments[1:])
        return super().call(context, function, *arguments, **named)


class _Measured(NodeTransformer):
    """Send the iterable of every loop, and every concatenation, through a filter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "measured", [], [], None, None, lineno=node.lineno)


def _meter(context: Context) -> Meter:
    return context.parent[_METER]


@pass_context
def _counted(context: Context, values: Iterable) -> Iterator:
    meter = _meter(context)
    for value in values:
        meter.step()
        yield value


@pass_context
def _measured(context: Context, text: str) -> str:
    _meter(context).step()
    _meter(context).text(len(text))
    return text


@pass_context
def _join(context: Context, values: Iterable, separator: str = "", attribute: str | None = None) -> str:
    picked = (value[attribute] if isinstance(value, Mapping) and attribute else value for value in values)
    return str(separator).join(map(str, _joinable(_meter(context), str(separator), picked)))


@pass_context
def _replace(context: Context, text: str, old: str, new: str, count: int = -1) -> str:
    _meter(context).text(str(text).count(old) * len(new))
    return str(text).replace(old, new, count)


def _joinable(meter: Meter, separator: str, values: Iterable) -> list:
    """The values, if what joins them is not too long."""
    kept, size = [], 0
    for value in values:
        meter.step()
        size += len(separator) + len(str(value))
        meter.text(size)
        kept.append(value)
    return kept


def _refuse(message: str) -> None:
    raise PromptError(f"the chat template refuses these messages: {message}")


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja's own escapes HTML


@lru_cache(maxsize=1)
def _environment() -> Environment:
    # trim_blocks, lstrip_blocks and loopcontrols: what the Hub's templates are written for
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters.update(
        counted=_counted, measured=_measured, join=_join, replace=_replace, tojson=_to_json
    )
    for name in WIDE_FILTERS:
        del environment.filters[name]
    environment.globals.update(raise_exception=_refuse, strftime_now=time.strftime)
    return environment


@lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    if len(template) > MAX_TEMPLATE_CHARS:
        raise PromptError(f"a chat template of {len(template):,} characters; at most {MAX_TEMPLATE_CHARS:,}")
    environment = _environment()
    return environment.from_string(_Measured().visit(environment.parse(template)))
