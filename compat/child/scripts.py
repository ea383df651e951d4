"""Flags of the target's command lines, read from the source: importing a training script would start it."""

from __future__ import annotations

import ast
import functools
import os

from .discover import MAX_BYTES, parse, python_files


def flags(folder, package):
    """{"FILE.FLAG": {"default", "type", "action"}} of every add_argument in a script below ``folder``.

    A script is a file in the folder itself, in the model's own ``package``, or one that runs as a program. A flag
    of a subcommand is named with it: ``run --device``. What is no literal is given as its source.
    """
    found = {}
    for path in python_files(folder):
        tree = parse(path) if mentions(path, b"add_argument") else None
        file = os.path.relpath(path, folder).replace(os.sep, "/")
        if tree is None or not ("/" not in file or file.startswith(package + "/") or runs(tree)):
            continue
        for flag, value in flags_of(tree):
            name, number = f"{file}.{flag}", 1
            while found.get(name, value) != value:  # one flag of two parsers that nothing tells apart
                number += 1
                name = f"{file}.{flag}#{number}"
            found[name] = value
    return found


def mentions(path, word):
    """Whether a file holds a word: reading is a hundred times faster than parsing."""
    try:
        if not os.path.isfile(path):  # a pipe named x.py would never end
            return False
        with open(path, "rb") as stream:
            return word in stream.read(MAX_BYTES)
    except OSError:
        return False


def runs(tree):
    """Whether a module ends in ``if __name__ == "__main__"``."""
    return any(isinstance(node, ast.If) and "__main__" in ast.dump(node.test) for node in tree.body)


@functools.lru_cache(maxsize=None)  # of a tree that `parsed` keeps
def flags_of(tree):
    """[(flag, value)] of a module's add_argument calls, in the order of the source; nobody may change it."""
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    commands = subcommands(tree)
    found = []
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if not (called and node.func.attr == "add_argument" and node.args):
            continue
        names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if not names:
            continue
        flag = next((name for name in names if name.startswith("--")), names[0])
        command = commands.get(ast.unparse(node.func.value))
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        value = {
            "default": literal(given.get("default"), constants),
            "type": ast.unparse(given["type"]) if "type" in given else None,
            "action": literal(given.get("action"), constants),
        }
        found.append((node.lineno, f"{command} {flag}" if command else flag, value))
    return [(flag, value) for _, flag, value in sorted(found, key=lambda entry: entry[0])]


def subcommands(tree):
    """{variable: subcommand} for ``variable = parsers.add_parser("subcommand")``."""
    found = {}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        call = node.value
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_parser" and call.args:
            if isinstance(call.args[0], ast.Constant):
                found[ast.unparse(node.targets[0])] = str(call.args[0].value)
    return found


def literal(node, constants):
    """A node's value, through one name of the module; its source where it is no literal; None without a node."""
    if node is None:
        return None
    value = constants.get(node.id, node) if isinstance(node, ast.Name) else node
    try:
        value = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ast.unparse(node)
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)
