"""Find the model in a folder by reading its code: which class is the model, which the config.

Unusual: nothing is imported and no name of a project counts. Classes are scored by what they define
(methods, arguments, fields), so a model in a sub-folder, under another name or beside variants is found.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import sys
from collections import namedtuple

MAX_FILES = 3000
MAX_BYTES = 1_000_000
MAX_DEPTH = 6
SKIPPED = {
    "node_modules",
    "site-packages",
    "build",
    "dist",
    "tests",
    "test",
    "wandb",
    "checkpoints",
    "__pycache__",
}

IMAGE_NAMES = ("images", "image", "pixel_values")
CONFIG_FIELDS = {
    "vit_hidden_dim", "vit_inter_dim", "vit_patch_size", "vit_img_size", "vit_n_heads", "vit_n_blocks",
    "lm_hidden_dim", "lm_inter_dim", "lm_n_heads", "lm_n_kv_heads", "lm_n_blocks", "lm_vocab_size",
    "mp_pixel_shuffle_factor", "lm_max_length", "lm_tokenizer", "vision_config", "text_config", "image_token_id",
}  # fmt: skip
TRAIN_FIELDS = {"batch_size", "lr_mp", "lr_backbones", "gradient_accumulation_steps", "epochs", "max_training_steps",
                "train_dataset_path", "compile", "learning_rate", "lr"}  # fmt: skip

Class = namedtuple("Class", "file name methods fields attributes bases")
Found = namedtuple("Found", "root model config train_config functions classes others rivals")
Place = namedtuple("Place", "module name")


def discover(folder, cls=None, file=None, root=None):
    """Found(...) for the best model class below ``folder``, or None when there is none.

    cls, file: only a class of that name, only in that file. root: where imports start, when that is known.
    root: the folder to put on sys.path. model, config, train_config: Place(module, name) or None.
    functions, classes: {name: [Place]} of what the data side defines. others: files with lesser candidates.
    rivals: where several classes look like the model alike, and lie as deep, all of them: ["file.py:Class"].
    """
    classes, functions = [], []
    for path in dict.fromkeys([*([file] if file else []), *python_files(folder)]):
        tree = parse(path)
        if tree is not None:
            classes += read_classes(path, tree)
            functions += [(path, name) for name in function_names(tree)]
    models = sorted(
        (
            (score_model(c), c)
            for c in classes
            if (score_model(c) >= 5 if cls is None else c.name == cls) and file in (None, c.file)
        ),
        key=lambda pair: (-pair[0], pair[1].file.count(os.sep), len(pair[1].file), pair[1].name),
    )
    if not models:
        return None
    model = models[0][1]
    root = root or import_root(model.file, folder)
    near = [c for c in classes if c.file.startswith(root + os.sep)]
    config = best(near, lambda c: len(CONFIG_FIELDS & set(c.fields)), 4, model.file)
    train = best(near, lambda c: len(TRAIN_FIELDS & set(c.fields)), 3, model.file)

    def place(c):
        return Place(module_name(c.file, root), c.name) if c else None

    by_name = {}
    for path, name in functions:
        if path.startswith(root + os.sep):
            by_name.setdefault(name, []).append(Place(module_name(path, root), name))
    class_places = {}
    for c in near:
        class_places.setdefault(c.name, []).append(place(c))
    others = sorted({f"{os.path.relpath(c.file, folder)}:{c.name}" for _, c in models[1:]})
    rivals = [c for score, c in models if (score, c.file.count(os.sep)) == (models[0][0], model.file.count(os.sep))]
    names = {c.name for c in rivals}
    rivals = [c for c in rivals if not names & {base.rpartition(".")[2] for base in c.bases}]  # no variant of another
    rivals = sorted({f"{os.path.relpath(c.file, folder)}:{c.name}" for c in rivals})
    return Found(root, place(model), place(config), place(train), by_name, class_places, others, rivals)


def python_files(folder):
    """Python files below ``folder``, nearest first; hidden, vendored and test folders are skipped."""
    found = []
    for here, folders, files in os.walk(folder):
        depth = os.path.relpath(here, folder).count(os.sep)
        folders[:] = sorted(
            f for f in folders
            if f not in SKIPPED and not f.startswith(".") and depth < MAX_DEPTH
            and not os.path.exists(os.path.join(here, f, "pyvenv.cfg"))
        )  # fmt: skip
        found += [os.path.join(here, f) for f in sorted(files) if f.endswith(".py") and not f.startswith("test_")]
        if len(found) >= MAX_FILES:
            break
    return found[:MAX_FILES]


def parse(path):
    """The module's AST, or None when the file cannot be read as Python here."""
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        if os.path.isfile(path) and os.path.getsize(path) <= MAX_BYTES:  # a pipe named x.py would never end
            with open(path, "rb") as stream:
                return parsed(stream.read())
    return None


@functools.lru_cache(maxsize=None)  # by content: a fork of this process has most files parsed already
def parsed(source):
    """The AST of a module's bytes; nobody may change it."""
    return ast.parse(source)


def broken_files(folder):
    """["file: error (line n)"] of the files below ``folder`` that this interpreter cannot read as Python."""
    found = []
    for path in python_files(folder):
        if not os.path.isfile(path) or parse(path) is not None:
            continue
        name = os.path.relpath(path, folder)
        try:
            if os.path.getsize(path) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes")
            with open(path, "rb") as stream:
                ast.parse(stream.read())
        except SyntaxError as error:
            found.append(f"{name} line {error.lineno} ({error.msg})")
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            found.append(f"{name} ({error})")
    return found


def function_names(tree):
    """Names of a module's functions, second names (``old = new``) included."""
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in names:
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names


def read_classes(path, tree):
    """A Class for each top-level class of the module."""
    return [Class(path, *rest) for rest in classes_of(tree)] if tree is not None else []


@functools.lru_cache(maxsize=None)  # of a tree that `parsed` keeps
def classes_of(tree):
    """(name, methods, fields, attributes, bases) of each top-level class; nobody may change them."""
    found = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        methods, fields, attributes = {}, [], set()
        for item in node.body:
            if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names = [a.arg for a in item.args.posonlyargs + item.args.args + item.args.kwonlyargs]
                methods[item.name] = names
                attributes |= assigned_attributes(item)
            elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                fields.append(item.target.id)
            elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
                fields.append(item.targets[0].id)
        if "forward" not in methods:
            fields += sorted(attributes)  # a plain config class sets its fields in __init__
        bases = [ast.unparse(base) for base in node.bases] if hasattr(ast, "unparse") else []
        found.append((node.name, methods, fields, attributes, bases))
    return found


def assigned_attributes(function):
    """Names of the attributes a method sets on self, one at a time, several at once, or annotated."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            targets = [node.target]
        else:
            continue
        for target in targets:
            for part in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                    found.add(part.attr)
    return found


def score_model(c):
    """How much a class looks like a whole vision-language model; 5 and more counts."""
    forward = c.methods.get("forward")
    if forward is None or "Module" not in " ".join(c.bases) + " PreTrainedModel" * bool(c.bases):
        return 0
    score = 3 * bool(set(forward) & set(IMAGE_NAMES)) + 2 * ("input_ids" in forward)
    score += 3 * ("generate" in c.methods)
    score += len({"vision_encoder", "decoder", "MP", "projector", "language_model", "vision_model"} & c.attributes)
    score += len({"from_pretrained", "save_pretrained"} & set(c.methods))
    # Without both a picture and ids it is a part of a model, whatever else it has.
    return score if set(forward) & set(IMAGE_NAMES) and {"input_ids", "generate"} & {*forward, *c.methods} else 0


def best(classes, score, least, near):
    """The class with the highest score of at least ``least``; the nearest to ``near`` wins a tie."""

    def distance(c):
        return len(os.path.relpath(c.file, os.path.dirname(near)).split(os.sep))

    ranked = sorted((c for c in classes if score(c) >= least), key=lambda c: (-score(c), distance(c), c.file))
    return ranked[0] if ranked else None


def import_root(file, top):
    """The folder that must be on sys.path for ``file`` to be imported the way its project does.

    The ancestor under which most of the module's own absolute imports resolve; a package that uses
    relative imports is imported from above its top package.
    """
    tree = parse(file)
    wanted, relative = set(), 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            relative = max(relative, node.level)
            if not node.level and node.module:
                wanted.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            wanted |= {alias.name.split(".")[0] for alias in node.names}
    wanted -= set(getattr(sys, "stdlib_module_names", ()))
    ancestors, here = [], os.path.dirname(file)
    for _ in range(relative):  # a package's own folder can never be the root of a relative import
        here = os.path.dirname(here)
    while here.startswith(top) and here not in ancestors:
        ancestors.append(here)
        here = os.path.dirname(here)

    def resolved(folder):
        return sum(
            os.path.isdir(os.path.join(folder, name)) or os.path.isfile(os.path.join(folder, name + ".py"))
            for name in wanted
        )

    if not ancestors:
        return top
    count = max(map(resolved, ancestors))
    if count:
        return next(folder for folder in ancestors if resolved(folder) == count)
    packages = [a for a in ancestors if not os.path.exists(os.path.join(a, "__init__.py"))]
    return packages[0] if packages else top


def imported_from(path, name, root):
    """(file, name there) of what the file at ``path`` imports as ``name`` from below ``root``, or None."""
    tree = parse(path)
    for node in ast.walk(tree) if tree is not None else ():
        if not isinstance(node, ast.ImportFrom):
            continue
        base = root
        if node.level:
            base = os.path.dirname(path)
            for _ in range(node.level - 1):
                base = os.path.dirname(base)
        place = os.path.join(base, *(node.module or "").split("."))
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                files = [place + ".py", os.path.join(place, "__init__.py")]
                return next(((file, alias.name) for file in files if os.path.isfile(file)), None)
    return None


def module_name(file, root):
    """``root``/a/b.py -> "a.b"."""
    parts = os.path.relpath(file, root)[: -len(".py")].split(os.sep)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
