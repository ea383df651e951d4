"""Small wrong changes of Python source, one at a time: what a slip of the hand or a bad merge would make of it.

Unusual: a mutant is a stretch of the source replaced by other text, so that its diff is a line or two and line
numbers stay. Left alone are what computes nothing: docstrings, annotations, what an error says, ``__repr__``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,), ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,), ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,),
}  # fmt: skip
COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
SILENT = {"__repr__", "__str__", "extra_repr"}


@dataclass(frozen=True)
class Mutant:
    """file: below the target's folder. line: the first that changed. old, new: the lines of the source there."""

    file: str
    line: int
    kind: str
    old: str
    new: str
    source: str

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    def diff(self) -> list[str]:
        return [*(f"- {line}" for line in self.old.splitlines()), *(f"+ {line}" for line in self.new.splitlines())]


def mutants(file: str, source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines. Raises SyntaxError."""
    tree = ast.parse(source)
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found, original = {}, source.encode()
    for node, kind, text in changes(tree):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        changed = original[:begin] + text.encode() + original[end:]
        first, last = node.lineno - 1, node.end_lineno
        after = changed[starts[first] : starts[last] + len(changed) - len(original)].decode()
        if changed == original or not valid(changed):
            continue
        before = b"".join(lines[first:last]).decode()
        old, new, skipped = trimmed(before, after)
        found.setdefault(changed, Mutant(file, node.lineno + skipped, kind, old, new, changed.decode()))
    return sorted(found.values(), key=lambda one: (one.line, one.kind, one.new))


def trimmed(before: str, after: str) -> tuple[str, str, int]:
    """The lines of two texts without those alike at both ends, and how many were cut in front."""
    old, new, skipped = before.splitlines(), after.splitlines(), 0
    while old and new and old[0] == new[0]:
        old, new, skipped = old[1:], new[1:], skipped + 1
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return "\n".join(old), "\n".join(new), skipped


def valid(source: bytes) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    """(node, kind, text to stand in its place)."""
    for node in computing(tree):
        yield from of_expression(node)
        yield from of_statement(node)


def computing(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below ``node`` that decide what is computed."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_params", "decorator_list") or isinstance(node, ast.Raise):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or is_text(child) or type_checking(child):
                continue
            if isinstance(child, ast.FunctionDef) and child.name in SILENT:
                continue
            yield child
            yield from computing(child)


def is_text(node: ast.AST) -> bool:
    """A docstring, or what an f-string is made of."""
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def of_expression(node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    if isinstance(node, ast.BinOp):
        for other in OPERATORS.get(type(node.op), ()):
            yield node, "operator", f"({ast.unparse(ast.BinOp(node.left, other(), node.right))})"
    elif isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            for other in COMPARISONS.get(type(op), ()):
                ops = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                yield node, "comparison", ast.unparse(ast.Compare(node.left, ops, node.comparators))
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield node, "operator", f"({ast.unparse(ast.BoolOp(other, node.values))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node, "operator", f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant):
        yield from ((node, "constant", text) for text in other_constants(node.value))
    elif isinstance(node, ast.IfExp):
        yield node.test, "condition", f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.Call):
        yield from of_call(node)


def other_constants(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int):
        return [f"({value + 1})"] if value < 1 else [str(value + 1), str(value - 1)]
    return [repr(value * 2) if value else "0.5"] if isinstance(value, float) else []


def of_call(node: ast.Call) -> Iterator[tuple[ast.AST, str, str]]:
    """One argument dropped, two neighbours swapped."""
    for place in range(len(node.args)):
        kept = [*node.args[:place], *node.args[place + 1 :]]
        yield node, "argument", ast.unparse(ast.Call(node.func, kept, node.keywords))
        if place and not any(isinstance(arg, ast.Starred) for arg in node.args[place - 1 : place + 1]):
            swapped = [*node.args[: place - 1], node.args[place], node.args[place - 1], *node.args[place + 1 :]]
            yield node, "argument", ast.unparse(ast.Call(node.func, swapped, node.keywords))
    for place in range(len(node.keywords)):
        kept = [*node.keywords[:place], *node.keywords[place + 1 :]]
        yield node, "argument", ast.unparse(ast.Call(node.func, node.args, kept))


def of_statement(node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    if isinstance(node, ast.Assign | ast.AugAssign | ast.Expr):
        yield node, "statement", "pass"
    elif isinstance(node, ast.If | ast.While):
        yield node.test, "condition", f"not ({ast.unparse(node.test)})"
