"""Where files come from: a folder, or a repository on the Hub through its cache; and how a folder goes there.

Unusual: what exists as a folder is a folder; what looks like a path and does not exist is an error and is
never asked for on the Hub. Offline mode (HF_HUB_OFFLINE) and the cache are huggingface_hub's own. A branch
may move between two downloads, so whoever reads several files of a repository pins its commit first.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from nanovlm.errors import SourceNotFound, UploadError, WeightsError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
MAX_JSON_BYTES = 100_000_000  # an index of a thousand layers has a tenth of that
_PICKLED = "a pickle, which may run any code when it is read. Make safetensors of its tensors"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


class Missing(NamedTuple):
    """A file that is not there; ``known`` is False where the Hub might have it but could not be asked."""

    reason: str
    known: bool = True


# -- reading ----------------------------------------------------------------------------------------------


def fetch(source: str | os.PathLike, filename: str, *, revision: str | None = None) -> Path:
    """The path of a file of ``source``. Raises SourceNotFound with the reason."""
    found = _look(source, filename, revision)
    if isinstance(found, Missing):
        raise SourceNotFound(found.reason)
    return found


def find(source: str | os.PathLike, filename: str, *, revision: str | None = None) -> Path | None:
    """As fetch, but None for a file that the folder or repository does not have, or not in the cache."""
    found = _look(source, filename, revision)
    return None if isinstance(found, Missing) else found


def pin(source: str | os.PathLike, filename: str, revision: str | None) -> str | None:
    """The commit that ``revision`` of a repository names now; of a folder ``revision`` itself.

    filename: one that the repository must have. Raises SourceNotFound.
    """
    path = fetch(source, filename, revision=revision)
    # the cache keeps a file at .../snapshots/COMMIT/FILENAME
    return revision if os.path.isdir(source) else path.parents[filename.count("/")].name


def read_json(source: str | os.PathLike, filename: str, *, revision: str | None = None) -> Any:
    """The content of a JSON file of ``source``. Raises SourceNotFound, WeightsError."""
    return parse_json(fetch(source, filename, revision=revision))


def parse_json(path: Path) -> Any:
    """The content of a JSON file. Raises WeightsError."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise WeightsError(f"{path} has {size:,} bytes; at most {MAX_JSON_BYTES:,} of JSON are read")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a number without end
        raise WeightsError(f"{path} is no JSON: {error}") from None


def weight_files(source: str | os.PathLike, *, revision: str | None = None) -> list[Path]:
    """The safetensors files of ``source``: one, or the shards its index names. Raises WeightsError."""
    single = _look(source, WEIGHTS, revision)
    if isinstance(single, Path):
        return [single]
    index = _look(source, INDEX, revision)
    if isinstance(index, Missing):
        for missing in (single, index):
            if not missing.known:
                raise SourceNotFound(missing.reason)
        _refuse_pickles(source, revision)
        raise SourceNotFound(f"{source}{_at(revision)} has neither {WEIGHTS} nor {INDEX}")
    content = parse_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise WeightsError(f"{index}: no weight_map from tensor to file")
    paths = []
    for name in sorted(set(names.values())):
        if re.search(r"[/\\\0]", name) or not name.endswith(".safetensors"):
            raise WeightsError(f"{index} names the shard {name!r}; expected a safetensors file in the same folder")
        shard = _look(source, name, revision)
        if isinstance(shard, Missing):
            raise SourceNotFound(f"{index} names the shard {name}, but {shard.reason}")
        paths.append(shard)
    return paths


def _look(source: str | os.PathLike, filename: str, revision: str | None) -> Path | Missing:
    """A file of a folder or repository. Raises SourceNotFound where there is no such source."""
    text = os.fspath(source)
    if os.path.isdir(text):
        path = Path(text, filename)
        return path if path.is_file() else Missing(f"{text} has no {filename}")
    if os.path.exists(text):
        if text.endswith(PICKLES):
            raise WeightsError(f"{text} is {_PICKLED}: nanovlm convert {shlex.quote(text)} FOLDER")
        raise SourceNotFound(f"{text} is a file; give the folder that holds config.json and {WEIGHTS}")
    if not _REPOSITORY.fullmatch(text) or text.endswith(PICKLES):
        raise SourceNotFound(f"no folder {text!r}, and no repository on the Hub can have that name")
    return _download(text, filename, revision)


def _download(repository: str, filename: str, revision: str | None) -> Path | Missing:
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    at = _at(revision)
    try:
        return Path(hf_hub_download(repository, filename, revision=revision))
    except errors.LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError that has asked nobody
        kept = try_to_load_from_cache(repository, filename, revision=revision)
        if kept is not None and not isinstance(kept, str):  # the cache notes files that a commit lacks
            return Missing(f"{repository}{at} has no {filename}")
        return Missing(
            f"{filename} of {repository}{at} is not in the cache, and {_why_unreachable(error)}. "
            f"Download it once with network: hf download {repository}",
            known=False,
        )
    except errors.EntryNotFoundError:
        return Missing(f"{repository}{at} has no {filename}")
    except errors.HFValidationError as error:
        raise SourceNotFound(
            f"no folder {repository!r}, and no repository on the Hub can have that name: {error}"
        ) from None
    except errors.GatedRepoError:
        raise SourceNotFound(
            f"{repository} is gated: accept its terms on the Hub, then log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceNotFound(f"{repository} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise SourceNotFound(
            f"no folder {repository!r} here, and no such repository on the Hub{at} (or it is private)"
        ) from None
    except _transport_errors() as error:
        raise SourceNotFound(f"{filename} of {repository}{at} cannot be fetched: {_line(error)}") from None


def _refuse_pickles(source: str | os.PathLike, revision: str | None) -> None:
    """Raise WeightsError if the weights of ``source`` are there, but pickled."""
    from huggingface_hub import list_repo_files

    text = os.fspath(source)
    try:
        there = os.listdir(text) if os.path.isdir(text) else list_repo_files(text, revision=revision)
    except _transport_errors():  # then nothing is known of other files
        return
    pickles = [name for name in there if name.endswith(PICKLES)]
    if pickles:
        # optimizers and arguments are pickled too, beside the model
        name = min(pickles, key=lambda name: ("model" not in name, name))
        download = "" if os.path.isdir(text) else f"hf download {text} --local-dir FOLDER; "
        folder = text if os.path.isdir(text) else "FOLDER"
        command = shlex.join(["nanovlm", "convert", os.path.join(folder, name), folder])
        raise WeightsError(f"{text} holds {name}, {_PICKLED}: {download}{command}")


# -- writing ----------------------------------------------------------------------------------------------


def create(repository: str, private: bool) -> str:
    """Make a repository unless it exists; its full name. Raises UploadError."""
    from huggingface_hub import create_repo, errors

    refusals: tuple[type[Exception], ...] = (errors.HFValidationError, *_transport_errors())
    try:
        return create_repo(repository, private=private, exist_ok=True).repo_id
    except refusals as error:
        raise UploadError(_of_upload(repository, error)) from None


def upload(folder: str | os.PathLike, repository: str, message: str) -> str:
    """Commit all files of a folder to a repository; the commit's address. Raises UploadError."""
    from huggingface_hub import upload_folder

    try:
        return str(upload_folder(repo_id=repository, folder_path=Path(folder), commit_message=message))
    except _transport_errors() as error:
        raise UploadError(_of_upload(repository, error)) from None


def _of_upload(repository: str, error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    way_out = (
        "unset HF_HUB_OFFLINE"
        if HF_HUB_OFFLINE
        else "check the name, and log in with `hf auth login` as somebody who may write there"
    )
    return f"{repository} cannot be written on the Hub: {_line(error)}; {way_out}"


# -- words ------------------------------------------------------------------------------------------------


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a request can end with: errors of the HTTP library, which is another one in each major version."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def _why_unreachable(error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"the Hub cannot be reached: {_line(error.__cause__ or error)}"


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision {revision!r}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
