"""The questions a lock asks: one per section, each answered with facts by their path below the section.

Unusual: one question asks for little, one case or one text, so that whatever the target does to it costs that
fact and no other.
"""

from __future__ import annotations

import functools
import inspect
import os
import struct
import tempfile
from json import loads  # bound now: the target may put another one into the module

from .described import arguments_of, described, fields
from .protocol import NotSupported, theirs
from .sketch import first_tensor, sketch
from .variants import VariantQuestions

DECISIVE = 1e-3  # top-2 margin, of the logits' RMS, from which a greedy token says something
MODEL_METHODS = ("__init__", "forward", "generate", "from_pretrained", "save_pretrained", "push_to_hub")
FUNCTIONS = ("get_tokenizer", "get_image_processor", "get_image_string")
CLASSES = ("VQADataset", "VQACollator")
CACHE_FLAGS = ("use_kv_cache", "use_cache")
SPECIAL = ("eos_token", "bos_token", "pad_token", "image_token", "global_image_token")
SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
               "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip


class LockQuestions(VariantQuestions):
    """``ask_lock_*`` of a Session. Every answer is {"facts": {path: value}}."""

    # -- without a model ----------------------------------------------------------------------------------

    def ask_lock_train_config(self):
        """Types and defaults of the training config."""
        from .adapters.configs import blank

        if self.subject.found.train_config is None:
            raise NotSupported("no training config class was found")
        cls = self.subject.load(self.subject.found.train_config)
        config = blank(cls)  # a config that cannot be made with its defaults raises here
        facts = {f"field.{name}": value for name, value in fields(cls).items()}
        return {"facts": {**facts, **properties(config)}}

    def ask_lock_scripts(self):
        """Flags of the target's scripts, read from their source."""
        from .scripts import flags

        package = self.subject.found.model.module.partition(".")[0]
        found = flags(os.path.realpath(self.target["folder"]), package)
        if not found:
            raise NotSupported("no script with flags was found")
        return {"facts": found}

    # -- config -------------------------------------------------------------------------------------------

    def ask_lock_config(self, adapter):
        """Fields as declared, and what the default config derives from them."""
        from .adapters.configs import blank, config_values, field_names
        from .readings import jsonable

        cls = type(adapter.config)
        facts = {f"field.{name}": value for name, value in fields(cls).items()}
        config = blank(cls)
        values = config_values(config)
        for name in field_names(cls):
            if name in values and jsonable(values[name]) != facts[f"field.{name}"].get("default"):
                facts[f"derived.{name}"] = jsonable(values[name])
        return {"facts": {**facts, **properties(config)}}

    def ask_lock_effects(self, adapter, rows, long_row):
        """{field: whether a small change of it changes anything that can be seen}."""
        from .effects import effects

        if adapter.combo["scale"] != "tiny":
            raise NotSupported("fields are tried at tiny scale only: each try builds a model")
        return {"facts": effects(self.subject, adapter, rows, long_row)}

    # -- checkpoint ---------------------------------------------------------------------------------------

    def ask_lock_saved(self, adapter):
        """Tensors of the safetensors files that save_pretrained writes, and the names that share them."""
        if not hasattr(adapter.model, "save_pretrained"):
            raise NotSupported(f"{type(adapter.model).__name__} has no save_pretrained")
        facts = {}
        with tempfile.TemporaryDirectory() as folder:
            with theirs():
                adapter.model.save_pretrained(folder)
            files = sorted(os.path.relpath(os.path.join(at, f), folder) for at, _, fs in os.walk(folder) for f in fs)
            for file in files:
                if file.endswith(".safetensors"):
                    header = safetensors_header(os.path.join(folder, file))
                    for name, other in header.pop("__metadata__", {}).items():
                        if other in header:  # "format": "pt" is no alias
                            facts[f"saved_alias.{name}"] = other
                    for name, entry in header.items():
                        dtype = SAFETENSORS.get(entry["dtype"], entry["dtype"])
                        facts[f"saved.{name}"] = {"shape": entry["shape"], "dtype": dtype}
        if not facts:
            raise NotSupported(f"save_pretrained wrote no safetensors file (it wrote: {', '.join(files) or 'nothing'})")
        return {"facts": facts}

    def ask_lock_init(self, adapter):
        """Mean and standard deviation of every freshly initialised tensor, one seed."""
        from . import probe

        probe.seed(0)
        with theirs():
            state = adapter.build_model(adapter.config).state_dict()
        return {
            "facts": {
                name: [float(tensor.double().mean()), float(tensor.double().std(unbiased=False))]
                for name, tensor in state.items()
                if tensor.is_floating_point() and tensor.numel()
            }
        }

    # -- calls --------------------------------------------------------------------------------------------

    def ask_lock_signatures(self, adapter):
        """Arguments of the config, of the model's public methods and of the functions beside it."""
        functions = {"config": type(adapter.config)}
        cls = self.subject.model_class
        functions.update({name: getattr(cls, name) for name in MODEL_METHODS if hasattr(cls, name)})
        for name in FUNCTIONS:
            function = self.subject.function(name)
            if function is not None:
                functions[name] = function
        for name in CLASSES:
            made = self.subject.classes(name)
            if made is not None:
                functions[name] = made.__init__
        facts = {}
        for name, function in functions.items():
            for argument, value in arguments_of(function).items():
                facts[f"{name}.{argument}"] = value
        return {"facts": facts}

    def ask_lock_returns(self, adapter, rows, method, max_new_tokens=3):
        """What a call gives back: type, and shapes in the letters B, T, V (L labels, K image tokens, N new)."""
        import torch

        from .models import patched

        batch = adapter.batch(rows)
        seen = {}
        if method == "generate":
            real = adapter.model.generate
            with patched(adapter.model, "generate", lambda **k: seen.setdefault("out", real(**k))):
                adapter.generate(batch, max_new_tokens)
        else:
            hook = adapter.model.register_forward_hook(lambda module, args, out: seen.setdefault("out", out))
            try:
                with torch.no_grad():
                    adapter.call(batch, batch.targets if method == "forward_with_targets" else None)
            finally:
                hook.remove()
        B, T = batch.input_ids.shape
        L = int((batch.targets != -100).sum()) if batch.targets is not None else -1
        K = adapter.image_tokens
        letters = {max_new_tokens: "N", L: "L", K + T: "K+T", adapter.vocab_size: "V", T: "T", B: "B"}
        return {"facts": {method: described(seen.get("out"), letters)}}

    # -- data ---------------------------------------------------------------------------------------------

    def ask_lock_special(self, adapter):
        """[token, id] of the special tokens, the config's extra ones among them."""
        from .adapters.configs import config_values
        from .readings import need

        tokenizer = need(adapter.tokenizer, "the model has no tokenizer and no get_tokenizer")
        found = {}
        for name in SPECIAL:
            token, number = getattr(tokenizer, name, None), getattr(tokenizer, name + "_id", None)
            if token is not None and number is not None:
                found[name] = [str(token), int(number)]
        for name, token in (config_values(adapter.config).get("vlm_extra_tokens") or {}).items():
            with theirs():
                number = tokenizer.convert_tokens_to_ids(token) if hasattr(tokenizer, "convert_tokens_to_ids") else None
            if isinstance(number, int):
                found[name] = [token, number]
        if not found:
            raise NotSupported("the tokenizer names no special token")
        return {"facts": found}

    def ask_lock_text(self, adapter, text):
        """Ids of one text."""
        from .readings import encode, need

        tokenizer = need(adapter.tokenizer, "the model has no tokenizer and no get_tokenizer")
        with theirs():
            return {"facts": {"ids": [int(i) for i in encode(tokenizer, text)]}}

    def ask_lock_chat(self, adapter, messages):
        """Ids of one conversation through the chat template, ready for the answer."""
        from .readings import need

        tokenizer = need(adapter.tokenizer, "the model has no tokenizer and no get_tokenizer")
        if not hasattr(tokenizer, "apply_chat_template"):
            raise NotSupported("the tokenizer has no apply_chat_template")
        with theirs():
            return {"facts": {"ids": chat_ids(tokenizer, messages)}}

    def ask_lock_picture(self, adapter, number, size):
        """Tiles, grid, range and pixels that the target's processor makes of one picture (w, h)."""
        import importlib.util

        from . import probe
        from .data import image_processor, image_string_tokens

        process = image_processor(self.subject, adapter)
        if importlib.util.find_spec("PIL") is None:
            raise NotSupported("needs PIL, which is not installed, to make pictures")
        tiles, grid = process(probe.photograph(number, *size))
        shape = {
            "tiles": int(tiles.shape[0]),
            "grid": list(grid) if grid else None,
            "tile_size": list(tiles.shape[-2:]),
            "low": float(tiles.min()),
            "high": float(tiles.max()),
            "image_tokens": image_string_tokens(self.subject, adapter, grid),
        }
        return {"facts": {"": shape, ".pixels": sketch(tiles)}}

    # -- numbers ------------------------------------------------------------------------------------------

    def ask_lock_numbers(self, adapter, rows, padding="none", change=None):
        """Logits and loss of one batch; change: None, "bf16", "larger", "packed", "small_embeddings" or "train_mode".

        "packed": all rows behind one another as one, their positions numbered by document in the attention mask.
        """
        import torch

        from . import probe
        from .models import flat_logits, in_bf16, larger, rms, shrink_embeddings

        full = None
        if change == "bf16":
            full = flat_logits(adapter, adapter.batch(rows, padding))
            adapter = in_bf16(adapter)
        elif change == "larger":
            adapter = larger(adapter)
        elif change == "small_embeddings":
            shrink_embeddings(adapter.model)
        batch = adapter.in_one_row(rows) if change == "packed" else adapter.batch(rows, padding)
        if change == "bf16":
            batch.pictures = [[picture.bfloat16() for picture in row] for row in batch.pictures]
        adapter.model.train(change == "train_mode")
        logits = flat_logits(adapter, batch)
        with torch.no_grad():
            probe.seed(0)
            loss = adapter.loss(batch)
        facts = {"logits": sketch(logits), "rms": rms(logits), "loss": float(loss)}
        if full is not None:
            facts["off_fp32"] = rms(logits - full) / rms(full)
            facts["loss_dtype"] = str(loss.dtype).replace("torch.", "")
        return {"facts": facts}

    def ask_lock_greedy(self, adapter, rows, max_new_tokens, cached=True, padding="left"):
        """Greedy tokens a row, the places where they are beyond doubt, the smallest margin, and the steps' logits."""
        import torch

        from .models import outputs_of_head, patched, top_two_margins

        flag = adapter.parameter_of("generate", CACHE_FLAGS)
        if not cached and flag is None:
            raise NotSupported("generate has no switch for its cache")
        real = adapter.model.generate
        call = functools.partial(real, **{flag: cached}) if flag else real
        with patched(adapter.model, "generate", call), outputs_of_head(adapter) as steps:
            ids = adapter.generate(adapter.batch(rows, padding), max_new_tokens)
        margins = [top_two_margins(adapter, row, new) for row, new in zip(rows, ids)]
        decided = [[place for place, value in enumerate(row) if value > DECISIVE] for row in margins]
        known = [value for row in margins for value in row]
        facts = {"": {"ids": ids, "decided": decided}}
        if steps:
            facts[".steps"] = sketch(torch.stack(steps[: len(ids[0])]))
        if known:
            facts[".margin"] = min(known)
        return {"facts": facts}

    def ask_lock_activations(self, adapter, rows):
        """A sketch of every module's first output, in the order the modules return."""
        import torch

        seen, hooks = {}, []

        def keep(name):
            def hook(module, args, out):
                tensor = first_tensor(out)
                if name not in seen and tensor is not None:
                    seen[name] = sketch(tensor)

            return hook

        for name, module in adapter.model.named_modules():
            hooks.append(module.register_forward_hook(keep(name or "model")))
        try:
            with torch.no_grad():
                adapter.call(adapter.batch(rows, "none"))
        finally:
            for hook in hooks:
                hook.remove()
        width = max(3, len(str(len(seen))))
        return {"facts": {f"{order:0{width}}.{name}": value for order, (name, value) in enumerate(seen.items())}}

    def ask_lock_flops(self, adapter, rows):
        """FLOPs by operator class, forward and backward, and how many operators a forward pass takes."""
        from .cost import flops

        return {"facts": flops(adapter, adapter.batch(rows))}

    def ask_lock_generation_flops(self, adapter, rows, max_new_tokens):
        """FLOPs by operator class of a greedy generation of so many tokens, whatever ends it earlier."""
        from .cost import generation_flops

        return {"facts": generation_flops(adapter, adapter.batch(rows), max_new_tokens)}


def properties(config):
    """{"derived.NAME": value} of a config's public properties."""
    from .readings import jsonable

    found = {}
    for name, _ in inspect.getmembers(type(config), lambda member: isinstance(member, property)):
        if not name.startswith("_"):
            try:
                found[f"derived.{name}"] = jsonable(getattr(config, name))
            except Exception as error:  # of the target: a property that the default config does not have
                found[f"derived.{name}"] = {"error": type(error).__name__}
    return found


# -- files and texts --------------------------------------------------------------------------------------


def safetensors_header(path):
    """The JSON header of a safetensors file."""
    with open(path, "rb") as stream:
        return loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))


def chat_ids(tokenizer, messages):
    """Ids of a conversation through the tokenizer's own template, by whichever of the arguments it takes."""
    from .readings import encode

    taken = inspect.signature(tokenizer.apply_chat_template).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    wanted = {"tokenize": False, "add_generation_prompt": True}
    out = tokenizer.apply_chat_template(messages, **{k: v for k, v in wanted.items() if free or k in taken})
    if isinstance(out, str):
        out = encode(tokenizer, out)
    elif not isinstance(out, (list, tuple)):  # a mapping, as transformers 5 returns one
        out = out["input_ids"]
    flat = [i for part in out for i in (part if isinstance(part, (list, tuple)) else [part])]
    return [int(i) for i in flat]
