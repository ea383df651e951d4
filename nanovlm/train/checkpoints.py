"""A run's folder: checkpoints that are there whole or not at all, the best one, the last few.

    run/
      step-00000500/  config.json, model.safetensors: a model that from_pretrained loads
                      trainer.json: what was counted; train_config.json
                      optimizer.pt, or sharded/ (torch.distributed.checkpoint)
                      rank-00000.pt: random numbers and place in the data, one file a process
      last, best      links to two of these; config.json and model.safetensors link to the best one's

Unusual: a checkpoint is written under a hidden name, flushed, and renamed: its name is the commit. Whatever
ends the process, the highest ``step-*`` is whole. A folder about to be deleted loses its name first.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from nanovlm import checkpoint, hub, weights
from nanovlm.config import TrainConfig, VLMConfig
from nanovlm.errors import CheckpointError, SourceNotFound
from nanovlm.train.distributed import World
from nanovlm.vlm import VisionLanguageModel

_NOT_SHAPE = {"vlm_checkpoint_path", "hf_repo_name", "vlm_load_backbone_weights"}
NAME = re.compile(r"step-(\d{8})")
_WRITING = (OSError, RuntimeError, SafetensorError)  # how the three writers report a full disk


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. Raises CheckpointError for a folder that cannot be read."""
    try:
        return sorted(path for path in run.iterdir() if NAME.fullmatch(path.name) and path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{run} cannot be read: {error.strerror}; name another --output_dir") from None


def resolve(folder: str | os.PathLike) -> Path:
    """The folder of a model: ``folder`` itself, or the best, else the last checkpoint of the run it holds."""
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceNotFound(f"{folder}: no such folder")
    found = [folder / "best", folder, *reversed(checkpoints(folder))]
    for candidate in found:
        if (candidate / "config.json").is_file():
            return candidate
    raise SourceNotFound(f"{folder} holds neither a config.json nor a checkpoint (step-00000500, ...)")


def save(
    run: Path,
    state: Mapping[str, Any],
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    cfg: TrainConfig,
    world: World,
    data_state: Any,
    *,
    is_best: bool = False,
) -> Path:
    """Write the checkpoint of ``state["step"]``, point ``last`` (and ``best``) to it, drop the oldest.

    Every process calls it. Raises CheckpointError on all of them where one could not write; the checkpoints
    that were there are as they were.
    """
    place = run / f"step-{state['step']:08d}"
    partial = run / f".{place.name}.partial"
    if not world.of_first(place.exists()):
        problem = _attempt(_make_folder, partial) if world.first else None
        if not world.of_first(problem):
            inside = (partial, {**state, "world_size": world.size}, model, optimizer, cfg, world, data_state)
            problem = _attempt(_write, *inside)
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(world.gather(problem)) if text]
        if problems:
            if world.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"{place} could not be written: {problems[0]}. {_way_out(run)}")
    if world.first:
        if partial.exists():
            _flush(partial)
            os.replace(partial, place)
            _flush(run)
        try:
            _link(run, "last", place.name)
            if is_best or not (run / "best").exists():
                _link(run, "best", place.name)
                for name in ("config.json", hub.WEIGHTS):
                    _link(run, name, f"best/{name}")
            _prune(run, cfg.keep_checkpoints)
        except OSError as error:
            raise CheckpointError(f"{place} is whole, but {run} cannot be tidied: {error}") from None
    _meet(world)
    return place


def load_trainer(folder: Path, world: World) -> dict[str, Any]:
    """What was counted when the checkpoint was made. Raises CheckpointError."""
    try:
        state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no training to go on with ({error}); start from its weights with "
            f"--resume_from_vlm_checkpoint --vlm_checkpoint_path {folder}"
        ) from None
    if state["world_size"] != world.size:
        raise CheckpointError(
            f"{folder} was written by {state['world_size']} processes, this run has {world.size}: their places in the "
            f"data do not carry over. Start as many, or start from the weights with --resume_from_vlm_checkpoint"
        )
    return state


def check_shape(source: str | os.PathLike, stored: VLMConfig, wanted: VLMConfig) -> None:
    """Raise CheckpointError where the checkpoint's model is not the one that ``wanted`` describes."""
    ours, theirs = wanted.to_json_dict(), stored.to_json_dict()
    for name in sorted({*ours, *theirs} - _NOT_SHAPE):
        if ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{source} is of another model: {name}={theirs.get(name)!r} there, {ours.get(name)!r} asked for; "
                f"leave out the options that describe the model, or name another checkpoint"
            )


def load_optimizer(folder: Path, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, sharded: bool) -> None:
    """Give the optimizer its state back; of a sharded run, each process its share of the weights, too."""
    if (folder / "sharded").exists() != sharded:
        with_it, way_out = ("with", "add --shard") if not sharded else ("without", "leave out --shard")
        raise CheckpointError(f"{folder} was written {with_it} --shard: {way_out}")
    if sharded:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        parts: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(parts, checkpoint_id=folder / "sharded")
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        return
    stored = _load_torch(folder / "optimizer.pt")
    ours = dict(_trained(model))
    foreign = sorted(set(stored) - set(ours))
    if foreign:
        raise CheckpointError(
            f"{folder}/optimizer.pt has state of {foreign[0]}, which is frozen or missing here; leave the learning "
            f"rates that are 0 as they were, or start from the weights with --resume_from_vlm_checkpoint"
        )
    for name, state in stored.items():
        optimizer.state[ours[name]] = {
            key: value if key == "step" else value.to(ours[name].device) for key, value in state.items()
        }


def load_place(folder: Path, world: World) -> Any:
    """Set this process's random numbers as they were; the state of its data loader."""
    state = _load_torch(folder / f"rank-{world.rank:05d}.pt")
    set_random_state(state["random"])
    return state["data"]


def random_state() -> dict[str, Any]:
    """Every generator that training draws from."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo what was drawn since ``random_state``."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _attempt(action: Callable[..., None], *arguments: Any) -> str | None:
    """What kept ``action`` from writing; None when it did."""
    try:
        action(*arguments)
    except _WRITING as error:
        return str(error).splitlines()[0] or type(error).__name__
    return None


def _make_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)  # of a process that was ended while it wrote
    folder.mkdir(parents=True)


def _write(
    folder: Path,
    state: Mapping[str, Any],
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    cfg: TrainConfig,
    world: World,
    data_state: Any,
) -> None:
    _save_torch(folder / f"rank-{world.rank:05d}.pt", {"random": random_state(), "data": data_state})
    if cfg.shard:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        try:
            dcp.save(parts, checkpoint_id=folder / "sharded")
        except dcp.CheckpointException as error:  # no Exception, and raised on every process
            raise RuntimeError(str(error)) from None
        in_one_piece = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole: dict[str, Any] = get_model_state_dict(model, options=in_one_piece)
    if not world.first:
        return
    if cfg.shard:
        names = weights.own_names(model)
        aliases = {alias: kept for kept, tied in names.items() for alias in tied if alias != kept}
        checkpoint.write_tensors(folder / hub.WEIGHTS, {name: whole[name] for name in names}, aliases)
        checkpoint.write_text(folder / "config.json", json.dumps(model.cfg.to_json_dict(), indent=4))
    else:
        model.save_pretrained(folder)
        states = {name: dict(optimizer.state[p]) for name, p in _trained(model) if p in optimizer.state}
        _save_torch(folder / "optimizer.pt", states)
    checkpoint.write_text(folder / "trainer.json", json.dumps(state))
    checkpoint.write_text(folder / "train_config.json", json.dumps(cfg.to_json_dict(), indent=4))


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _save_torch(path: Path, value: Any) -> None:
    with open(path, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def _load_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except Exception as error:  # torch's readers raise what they like for a damaged file
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _meet(world: World) -> None:
    world.gather(None)


def _flush(folder: Path) -> None:
    """Bring the names in a folder, and in those below it, to the disk."""
    for where, _, _ in os.walk(folder):
        handle = os.open(where, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _link(run: Path, name: str, target: str) -> None:
    fresh = run / f".{name}.link"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, run / name)


def _prune(run: Path, keep: int) -> None:
    best = os.path.realpath(run / "best")
    doomed = [path for path in checkpoints(run)[:-keep] if os.path.realpath(path) != best]
    for path in doomed:
        os.replace(path, run / f".{path.name}.removed")
    for path in run.glob(".step-*"):  # also what an earlier process left behind
        shutil.rmtree(path, ignore_errors=True)


def _way_out(run: Path) -> str:
    try:
        free = shutil.disk_usage(run if run.exists() else run.parent).free
    except OSError:
        return "Earlier checkpoints are whole"
    return (
        f"{free / 1e9:.1f} GB are free there. Earlier checkpoints are whole; make room, lower --keep_checkpoints, "
        f"or choose another --output_dir"
    )


