"""Stand-ins for third-party packages that are not installed.

Unusual: a stand-in exists only for code of the target. ``import torchvision`` in the checkout gives a
module whose names can be mentioned but not used to compute: calling one raises NotInstalled, which the
judge reports as a skip naming the package. transformers, torch and everybody else still see the truth.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types

from .protocol import NotSupported

# A missing package of the target's own is an error; these are tools around a model, or preprocessing.
OPTIONAL = {
    "torchvision", "einops", "wandb", "peft", "datasets", "lmms_eval", "accelerate", "matplotlib", "tqdm", "PIL",
    "pandas", "tensorboard", "tensorboardX", "bitsandbytes", "trl", "hf_transfer", "evaluate", "sklearn", "cv2",
    "deepspeed", "flash_attn", "xformers", "loguru", "rich", "timm", "trackio", "nltk", "scipy", "seaborn", "psutil",
    "dotenv", "gymnasium", "minigrid", "imageio", "decord", "requests", "yaml", "omegaconf", "hydra", "liger_kernel",
    "torchao", "fire", "typer", "click", "gradio", "streamlit", "lightning", "pytorch_lightning", "torchmetrics",
}  # fmt: skip


class NotInstalled(NotSupported):
    """The target needs a package that is not installed to compute this."""


class Missing:
    """A name out of a package that is not installed. It can be passed around, but not called."""

    def __init__(self, name):
        self.__dict__["_name"] = name

    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")

    def __call__(self, *args, **kwargs):
        raise NotInstalled(f"needs {self._name.split('.')[0]}, which is not installed ({self._name} was called)")

    def __mro_entries__(self, bases):
        return (object,)

    def __or__(self, other):  # annotations such as X | None
        return self

    __ror__ = __or__

    def __getitem__(self, key):
        return self

    def __repr__(self):
        return f"<{self._name}, not installed>"


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on sys.meta_path: answers imports of OPTIONAL packages that come from the target's files."""

    def __init__(self, folder):
        self.folder = os.path.realpath(folder) + os.sep
        self.used = []

    def install(self):
        sys.meta_path.append(self)
        real = importlib.util.find_spec

        def find_spec(name, package=None):
            # Whoever asks whether a package is there means the package: the target's own fallback as well.
            return None if name.partition(".")[0] in self.used else real(name, package)

        importlib.util.find_spec = find_spec

    def find_spec(self, fullname, path=None, target=None):
        top = fullname.partition(".")[0]
        if top not in OPTIONAL or not (top in self.used or self._asked_by_target()):
            return None
        if top not in self.used and top != fullname:
            return None  # the package is there, and lacks this part of it
        if top not in self.used:
            settle_transformers()
            self.used.append(top)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        module.__path__ = []

    def _asked_by_target(self):
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if not name.startswith("<frozen importlib") and "importlib" not in os.path.basename(os.path.dirname(name)):
                return os.path.realpath(name).startswith(self.folder) and not guarded(name, frame.f_lineno)
            frame = frame.f_back
        return False


def guarded(file, line):
    """Whether an import stands in a try that catches its failure: such code knows how to do without."""
    try:
        with open(file, "rb") as stream:
            tree = ast.parse(stream.read())
    except (OSError, SyntaxError, ValueError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and node.body[0].lineno <= line <= (node.body[-1].end_lineno or line):
            caught = {name.id for handler in node.handlers if handler.type for name in ast.walk(handler.type)
                      if isinstance(name, ast.Name)}  # fmt: skip
            bare = any(handler.type is None for handler in node.handlers)
            if bare or caught & {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}:
                return True
    return False


def settle_transformers():
    """Let transformers decide which packages it has, before any stand-in could be taken for one."""
    if importlib.util.find_spec("transformers") is None:
        return
    import transformers.utils.import_utils as checks

    for name in dir(checks):
        if name.startswith("is_") and name.endswith("_available"):
            try:
                getattr(checks, name)()
            except (TypeError, ImportError, RuntimeError, AttributeError, OSError):
                continue
