"""The templates: ours, and a folder of somebody's own that goes before them, in a sandbox."""

from __future__ import annotations

from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from compat.reports import history
from compat.reports.marks import MARK
from compat.reports.text import code, link, printable, prose, visible, word

FOLDER = Path(__file__).with_name("templates")
NAMES = tuple(sorted(path.name for path in FOLDER.glob("*.j2")))


class TemplateBroken(ValueError):
    """A template cannot be read or rendered; the message names the file, the line and the reason."""


class Templates:
    """``render(name, **values)``. folder: its files replace ours of the same name."""

    def __init__(self, folder: Path | str | None = None):
        self.folder = Path(folder) if folder else None
        if self.folder and not self.folder.is_dir():
            raise TemplateBroken(f"--template {self.folder} is no folder; it may hold: {', '.join(NAMES)}")
        self.environments = {kind: self._environment(kind == "html") for kind in ("md", "html")}

    def _environment(self, escapes: bool) -> jinja2.Environment:
        found = ImmutableSandboxedEnvironment(
            loader=jinja2.FileSystemLoader([*([self.folder] if self.folder else []), FOLDER], encoding="utf-8"),
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=jinja2.StrictUndefined,
            autoescape=escapes,  # markdown instead: `code`, `link` and `word` make values harmless
        )
        found.filters |= {"code": code, "word": word, "link": link, "prose": prose, "change": history.change}
        found.filters["shown"] = lambda delta: history.shown(delta.metric, delta.new)
        found.globals |= {"MARK": MARK, "by_tier": history.by_tier}
        return found

    def check(self) -> None:
        """Read every template of the folder, before anything long is begun. Raises TemplateBroken."""
        if not self.folder:
            return
        mine = sorted(path.name for path in self.folder.iterdir() if path.name.endswith(".j2"))
        for name in mine:
            if name not in NAMES:
                raise TemplateBroken(f"{self.folder / name} replaces no template; there are: {', '.join(NAMES)}")
            self._read(name)

    def _read(self, name: str) -> jinja2.Template:
        try:
            return self.environments["html" if ".html" in name else "md"].get_template(name)
        except jinja2.TemplateSyntaxError as error:
            where = f"{error.filename or name}, line {error.lineno}"
            raise TemplateBroken(f"the template {where}: {error.message}") from None
        except (jinja2.TemplateError, UnicodeDecodeError, OSError) as error:
            raise TemplateBroken(f"the template {name} cannot be read: {error}") from None

    def render(self, name: str, **values) -> str:
        """Raises TemplateBroken, whatever the template does."""
        template = self._read(name)
        try:
            text = template.render(**values)
        except Exception as error:  # of any type: a template calls and calculates
            line = next((at for file, at in frames(error) if file.endswith(name)), "?")
            raise TemplateBroken(
                f"the template {template.filename}, line {line}: {type(error).__name__}: {error}"
            ) from None
        return visible(text) if name.endswith(".html.j2") else marked(text)


def marked(text: str) -> str:
    """Printable text that keeps the variation selector of ⚠️."""
    return "\ufe0f".join(printable(part) for part in text.split("\ufe0f"))


def frames(error: BaseException) -> list[tuple[str, int]]:
    """(file, line) of each frame, innermost first; jinja2 rewrites those of templates to the template's lines."""
    found, traceback = [], error.__traceback__
    while traceback:
        found.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return found[::-1]
