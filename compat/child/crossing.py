"""Checkpoints that go from one version to another: saved here, loaded there, converted on the way, and used.

Unusual: a combo may name a folder. ``checkpoint`` is loaded by the target's own from_pretrained and stands for the
weights drawn by name; ``config_from`` gives the config alone, so that a model of that size can be filled by a shim.
"""

from __future__ import annotations

import os
import shutil

from .described import described
from .protocol import NotSupported, theirs
from .readings import contains, jsonable
from .sketch import sketch

WEIGHTS = "model.safetensors"


class CrossingQuestions:
    """``ask_save`` and what follows a checkpoint, of a Session."""

    def ask_save(self, adapter, folder):
        """Write config.json and weights as the target does. {"files": names, "config": what config.json says}."""
        adapter.save_model(folder)
        files = sorted(os.listdir(folder))
        if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
            raise NotSupported(f"saving wrote no config.json with safetensors (it wrote: {', '.join(files)})")
        return {"files": files, "config": config_json(folder)}

    def ask_arrived(self, adapter, folder):
        """Of a model loaded from ``folder``: its config, its tensors that no file holds, the file's it took none of."""
        from .adapters.configs import config_values

        held = {name: tensor for name, tensor in adapter.model.state_dict().items() if tensor.numel() > 1}
        stored = {name: tensor for name, tensor in tensors(folder).items() if tensor.numel() > 1}
        same = {name: stored[name] for name in held if name in stored and same_numbers(held[name], stored[name])}


        def unmatched(these, those):
            def held_by(tensor):
                return any(contains(tensor, other) or contains(other, tensor) for other in those.values())

            return sorted(name for name, tensor in these.items() if name not in same and not held_by(tensor))

        left, unread = unmatched(held, stored), unmatched(stored, held)
        return {"config": jsonable(config_values(adapter.config)), "left": left, "unread": unread}

    def ask_config_reads(self, adapter, folder):
        """The config of a saved folder, read by the target's config class."""
        from .adapters.configs import config_values

        with theirs():
            return {"config": jsonable(config_values(adapter.read_config(folder)))}

    def ask_try_shims(self, adapter, folder, shims, rows):
        """A sketch of the logits with each shim, {"error"} where it does not fit; see compat.shim for its form."""
        import torch

        stored, answers = tensors(folder), []
        batch = adapter.batch(rows)
        for shim in shims:
            try:
                adapter.model.load_state_dict(through(stored, shim, adapter.model), strict=True)
            except (RuntimeError, KeyError, ValueError) as error:
                answers.append({"error": " ".join(str(error).split())[:300]})
                continue
            adapter.model.eval()
            with torch.no_grad():
                logits = torch.cat([row.reshape(-1) for row in adapter.logits(batch)])
            answers.append({"logits": sketch(logits), "rms": float(logits.double().pow(2).mean().sqrt())})
        return {"answers": answers}

    def ask_convert(self, adapter, folder, shim, to):
        """Fill the model of the folder's config through a shim and save it as the target does."""
        adapter.model.load_state_dict(through(tensors(folder), shim, adapter.model), strict=True)
        adapter.save_model(to)
        return {"files": sorted(os.listdir(to)), "config": config_json(to)}

    def ask_old_call(self, adapter, rows, method, arguments, how, image_form=None):
        """What a call returns that is made as the signature of another version allows.

        arguments: [[name, {"kind", "default" if any}]] of that version, in its order. how: "positional", all that
        can be supplied by place; "keywords", all by name; "least", only what must be given.
        """
        import torch

        from .described import is_plain

        batch = adapter.batch(rows)
        pictures = adapter.images(batch.pictures, image_form)
        known = {
            "input_ids": batch.input_ids, "images": pictures, "image": pictures, "pixel_values": pictures,
            "attention_mask": batch.attention_mask, "targets": batch.targets, "labels": batch.targets,
            "max_new_tokens": 3,
        }  # fmt: skip
        places, names = [], {}
        for name, said in arguments:
            if said["kind"].startswith("var"):
                break
            optional = "default" in said
            if name in known and not (how == "least" and optional and known[name] is not pictures):
                value = known[name]
            elif optional and is_plain(said["default"]):
                value = said["default"]
            elif optional:
                break
            else:
                raise NotSupported(f"nothing can be given for {name}")
            if how == "least" and optional and name not in ("images", "image", "pixel_values"):
                continue
            by_place = said["kind"].startswith("positional") and how != "keywords"
            if by_place and not names:
                places.append(value)
            else:
                names[name] = value
        torch.manual_seed(0)
        with torch.no_grad(), theirs():
            call = adapter.model if method == "forward" else getattr(adapter.model, method)
            out = call(*places, **names)
        B, T = batch.input_ids.shape
        letters = {3: "N", int((batch.targets != -100).sum()): "L", adapter.vocab_size: "V", T: "T", B: "B"}
        return {"returns": described(out, letters)}

    def ask_pack(self, adapter, rows, padding, folder):
        """Write one batch as tensors, and say how the target is to be called with it; for a stand-alone script."""
        from safetensors.torch import save_file

        os.makedirs(folder, exist_ok=True)
        batch = adapter.batch(rows, padding)
        flat = [picture for row in batch.pictures for picture in row]
        held = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "targets": batch.targets}
        held = {name: tensor.cpu().contiguous() for name, tensor in held.items() if tensor is not None}
        held.update({f"picture.{number}": picture.cpu().contiguous() for number, picture in enumerate(flat)})
        save_file(held, os.path.join(folder, "inputs.safetensors"))
        home = os.path.join(os.environ["HF_HOME"], "hub")
        if os.path.isdir(home):
            shutil.copytree(home, os.path.join(folder, "hub"), dirs_exist_ok=True, symlinks=False)
        found = self.subject.found
        return {
            "root": found.root,
            "model": [found.model.module, found.model.name],
            "missing": sorted(self.subject.stand_ins.used),
            "image_argument": adapter.parameter_of("forward", adapter.IMAGE_NAMES),
            "label_argument": adapter.parameter_of("forward", adapter.LABEL_NAMES),
            "mask_argument": adapter.parameter_of("forward", ("attention_mask",)),
            "greedy_argument": adapter.parameter_of("generate", ("greedy",)),
            "image_form": adapter.image_form,
            "vocabulary": adapter.vocab_size,
            "image_tokens": adapter.image_tokens,
            "rows": [len(row) for row in batch.pictures],
            "text": batch.text,
        }


def config_json(folder):
    from json import loads

    with open(os.path.join(folder, "config.json"), encoding="utf-8") as stream:
        return loads(stream.read())


def tensors(folder):
    """{name: tensor} of all safetensors files of a folder."""
    from safetensors.torch import load_file

    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            found.update(load_file(os.path.join(folder, name)))
    if not found:
        raise NotSupported(f"no safetensors file lies in {folder}")
    return found


def same_numbers(one, other):
    import torch

    return one.shape == other.shape and bool(torch.equal(one.cpu(), other.to(one.dtype).cpu()))


def through(stored, shim, model):
    """The state dict for ``model`` that a shim makes of a file's tensors; tied names and computed buffers filled in.

    shim: {"moves": [{"sources", "targets", "transposed"}], "dropped": [...]}; sources are stacked along their first
    dimension and cut into the targets. Names the shim does not speak of stay as they are.
    """
    import torch

    own = model.state_dict()
    left = {name: tensor for name, tensor in stored.items() if name not in shim["dropped"]}
    made = {}
    for move in shim["moves"]:
        parts = [left.pop(name) for name in move["sources"]]
        if move["transposed"]:
            parts = [part.t() for part in parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(move["targets"]) == 1:
            made[move["targets"][0]] = whole.contiguous()
            continue
        sizes = [own[name].shape[0] for name in move["targets"]]
        if sum(sizes) != whole.shape[0]:
            raise ValueError(f"{move['targets']} hold {sum(sizes)} rows, {move['sources']} {whole.shape[0]}")
        made.update({name: part.contiguous() for name, part in zip(move["targets"], whole.split(sizes))})
    state = {**left, **made}
    by_storage = {}
    for name, tensor in own.items():
        by_storage.setdefault((tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else name, []).append(name)
    buffers = {name for name, _ in model.named_buffers()}
    for names in by_storage.values():
        there = [name for name in names if name in state]
        for name in names:
            if name not in state and (there or name in buffers):  # a tie, or what the model computes itself
                state[name] = state[there[0]] if there else own[name]
    return state
