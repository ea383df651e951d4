"""The target's classes and functions, found by reading its code and imported in its own way."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys

from .discover import broken_files, discover, imported_from
from .protocol import Unaskable, theirs
from .stubs import NotInstalled, StandIns


class Subject:
    """The target's classes and functions, imported in its own way."""

    def __init__(self, target):
        folder = os.path.realpath(target["folder"])
        file = target["file"] and os.path.realpath(target["file"])
        if target["module"]:
            self.found = self.named(folder, target["module"], target["cls"])
        else:
            self.found = discover(folder, cls=target["cls"], file=file)
            if self.found and len(self.found.rivals) > 1:
                raise Unaskable(
                    f"{len(self.found.rivals)} classes look like the model alike: {', '.join(self.found.rivals[:8])}; "
                    f"name one instead of the folder, as FOLDER/{self.found.rivals[0]}"
                )
        if self.found is None:
            raise Unaskable(f"{not_found(target['cls'], file)}{unread(folder)}")
        if self.found.config is None:
            raise Unaskable(
                f"{self.found.model.module}:{self.found.model.name} looks like a model, but no config class with "
                f"fields such as vit_hidden_dim and lm_hidden_dim was found beside it{unread(folder)}"
            )
        root = self.found.root
        if root not in sys.path:
            sys.path.insert(0, root)
        os.chdir(root)
        self.stand_ins = StandIns(root)
        self.stand_ins.install()
        try:
            self.model_class = self.load(self.found.model)
            self.config_class = self.load(self.found.config)
        except NotInstalled as error:
            raise Unaskable(f"the target cannot be imported: it {error}") from None
        except ModuleNotFoundError as error:
            missing = [p for p in target["missing"] if p.startswith((error.name or "?").replace(".", "/"))]
            why = f"; {missing[0]} is missing from the repository's objects" if missing else ""
            raise Unaskable(f"the target cannot be imported: no module named '{error.name}'{why}") from None

    def named(self, folder, module, cls):
        """Found for an importable ``module:cls``; its config class is looked for in the same package."""
        if folder not in sys.path:
            sys.path.insert(0, folder)
        top = module.partition(".")[0]
        spec = importlib.util.find_spec(top)
        if spec is None or not (spec.submodule_search_locations or spec.origin):
            raise Unaskable(f"no module named '{top}' can be imported from {folder}")
        package = list(spec.submodule_search_locations or [os.path.dirname(spec.origin)])[0]
        root = os.path.dirname(package) if spec.submodule_search_locations else package
        path = os.path.join(root, *module.split("."))
        path = os.path.join(path, "__init__.py") if os.path.isdir(path) else path + ".py"
        if not os.path.isfile(path):
            raise Unaskable(f"no module named '{module}' can be imported from {folder}")
        around = root if root == folder else package  # of an installed package's neighbours none matters
        origin = path, cls
        for _ in range(8):  # a module may only pass on a class that another file defines
            found = origin and discover(around, cls=origin[1], file=origin[0], root=root)
            if found or origin is None:
                break
            origin = imported_from(*origin, root)
        found = found or discover(around, cls=cls, root=root)  # passed on in a way that only running it would tell
        if found is None:
            raise Unaskable(f"module {module} defines no class {cls}")
        return found

    @staticmethod
    def load(place):
        """Import a Place(module, name)."""
        with theirs():
            return getattr(importlib.import_module(place.module), place.name)

    def function(self, name):
        """The target's function of that name nearest to the model, imported; None when there is none."""
        places = self.found.functions.get(name)
        return self.load(min(places, key=self.nearness)) if places else None

    def classes(self, *names):
        """The target's classes of the first of ``names`` it defines, imported; None when there is none."""
        for name in names:
            if places := self.found.classes.get(name):
                return self.load(min(places, key=self.nearness))
        return None

    def nearness(self, place):
        """Sort key: a sibling package of the model's comes before scripts and copies elsewhere."""
        shared = os.path.commonprefix([place.module.split("."), self.found.model.module.split(".")])
        return -len(shared), place.module.count("."), place.module


def not_found(cls, file):
    """Why discovery came back with nothing, as the start of a sentence."""
    if cls:
        return f"no class {cls} is defined in {os.path.basename(file)}"
    return (
        "this folder holds no nanoVLM-style model: no class with a forward(input_ids, image or images, ...) "
        "and a generate was found"
    )


def unread(folder):
    """The files that may have held it but are no Python to this interpreter, as the end of that sentence."""
    broken = broken_files(folder)
    return f"; not readable as Python {platform.python_version()}: {'; '.join(broken[:3])}" if broken else ""
