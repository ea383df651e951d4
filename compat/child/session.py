"""What the child knows of its target, and the questions it answers.

Each ``ask_*`` method is one question of the protocol; its docstring is the contract. Models are built at
the first question about a combo and kept; every question starts from the same weights.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import platform
import tempfile
from json import dumps  # bound now: the target may put others into the module

from .crossing import CrossingQuestions
from .figures import FigureQuestions
from .lock import LockQuestions
from .protocol import VERSION, NotSupported, Unaskable, theirs
from .readings import (
    contains,
    encode,
    fingerprints,
    jsonable,
    need,
    same_vocabulary,
    saved_keys,
    shared_storage,
    signatures,
    special_ids,
    version,
)
from .subject import Subject

WITHOUT_MODEL = ("train_config", "lock_train_config", "lock_scripts")


class Session(LockQuestions, FigureQuestions, CrossingQuestions):
    """Answers questions about one target."""

    def __init__(self, target, device):
        self.target, self.device = target, device
        self.adapters = {}
        self.subject = Subject(target)
        from . import adapters

        self.place = os.getcwd(), dict(os.environ), tempfile.gettempdir()
        self.adapter_class = adapters.choose(self.subject)
        if self.adapter_class is None:
            taken = list(inspect.signature(self.subject.model_class.forward).parameters)
            raise Unaskable(f"no dialect speaks forward({', '.join(taken)}) of {self.subject.found.model.name}")

    def hello(self):
        """Who answers: versions, device, dialect, what was found and what stands in."""
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        if self.device == "cuda" and gpu is None:
            raise Unaskable("--device cuda was asked for, but this interpreter's torch sees no CUDA device")
        return {
            "protocol": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "numpy": version("numpy"),
            "cuda": torch.version.cuda,
            "device": self.device,
            "gpu": gpu,
            "platform": platform.platform(),
            "dialect": self.adapter_class.dialect,
            **self.places(),
            "notes": self.notes(),
        }

    def places(self):
        """module:Class of model, config and train config."""
        found = self.subject.found
        return {
            "model_class": f"{found.model.module}:{found.model.name}",
            "config_class": f"{found.config.module}:{found.config.name}",
            "train_config_class": f"{found.train_config.module}:{found.train_config.name}"
            if found.train_config
            else None,
        }

    def notes(self):
        """What a reader of the results should know of how they came about."""
        notes = [f"judged {self.places()['model_class']}, config {self.places()['config_class']}"]
        if self.subject.stand_ins.used:
            notes.append(
                "not installed, only mentioned by the target: " + ", ".join(sorted(self.subject.stand_ins.used))
            )
        if self.subject.found.others:
            notes.append("other candidates in this folder, not judged: " + ", ".join(self.subject.found.others[:5]))
        if self.target["missing"]:
            notes.append("files missing from the repository's objects: " + ", ".join(self.target["missing"][:5]))
        return notes

    def adapter(self, combo):
        """The Adapter of a combo, its weights as drawn."""
        key = dumps(combo, sort_keys=True)
        if key not in self.adapters:
            self.adapters.clear()  # one model at a time: full-size ones are large
            self.adapters[key] = self.adapter_class(self.subject, combo, self.device)
        return self.adapters[key]

    def tidy(self):
        """Folder, environment and temporary folder as they were after the import, whatever an answer did to them."""
        folder, environment, temporary = self.place
        os.makedirs(temporary, exist_ok=True)
        os.chdir(folder)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)

    def answer(self, question, combo, parameters):
        """The answer dict of a question; numpy arrays among its values travel as arrays."""
        method = getattr(self, "ask_" + question, None)
        if method is None:
            raise NotSupported(f"this worker knows no question '{question}'")
        self.tidy()
        if question in WITHOUT_MODEL:
            return method()
        adapter = self.adapter(combo)
        adapter.reset()
        return method(adapter, **parameters)

    # -- questions --------------------------------------------------------------------------------------

    def ask_describe(self, adapter):
        """Fields, signatures and sizes of the model."""
        from .adapters.configs import config_default, config_values, field_names

        cls = type(adapter.config)
        values = config_values(adapter.config)
        types = {f.name: str(f.type) for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        config = {
            name: {
                "type": types.get(name, type(values.get(name)).__name__),
                "default": jsonable(config_default(cls, name)),
                "value": jsonable(values.get(name)),
            }
            for name in field_names(cls)
        }
        special = special_ids(adapter.tokenizer)
        return {
            **self.places(),
            "dialect": adapter.dialect,
            "config": config,
            "signatures": signatures(self.subject.model_class),
            "vocab_size": adapter.vocab_size,
            "text_ids": [
                i for i in range(adapter.vocab_size) if i not in special and i != adapter.image_token_id and i > 16
            ][:200],
            "special_ids": sorted(i for i in special if i < adapter.vocab_size),
            "image_tokens": adapter.image_tokens,
            "max_positions": adapter.max_positions,
            "image_size": adapter.image_size,
            "image_form": adapter.image_form,
            "layout": adapter.layout,
            "takes": adapter.takes,
            "parameters": sum(p.numel() for p in adapter.model.parameters()),
            "notes": [*self.notes(), *adapter.notes, f"pictures are passed as {adapter.image_form}"],
        }

    def ask_state_dict(self, adapter):
        """Every key with shape, dtype, persistence, ties, and whether it is trained."""
        model = adapter.model
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        saved = model.state_dict()
        first, keys = {}, {}
        for name, tensor in {**parameters, **buffers}.items():
            owner = first.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else name, name)
            keys[name] = {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).replace("torch.", ""),
                "persistent": name in saved,
                "trainable": tensor.requires_grad if name in parameters else None,
                "tied_to": owner if owner != name else None,
                "finite": name not in adapter.not_finite,
            }
        return {"keys": keys}

    def ask_forward(self, adapter, rows, padding="left", train=False):
        """Logits a row at its text tokens, and the loss when labels are given."""
        import torch

        adapter.model.train(train)
        batch = adapter.batch(rows, padding)
        with torch.no_grad():
            logits = adapter.logits(batch)
            loss = float(adapter.loss(batch)) if batch.targets is not None else None
        return {
            "loss": loss,
            "finite": all(bool(torch.isfinite(row).all()) for row in logits),
            **{f"logits.{i}": row.cpu().numpy() for i, row in enumerate(logits)},
        }

    def ask_gradients(self, adapter, rows):
        """Norm of the gradient of each parameter; None where none arrived."""
        adapter.model.train()
        adapter.model.zero_grad(set_to_none=True)
        loss = adapter.loss(adapter.batch(rows))
        with theirs():
            loss.backward()
        named = list(adapter.model.named_parameters())
        return {
            "loss": loss.item(),
            "grads": {n: None if p.grad is None else float(p.grad.norm()) for n, p in named if p.requires_grad},
            "trainable": [n for n, p in named if p.requires_grad],
            "frozen": [n for n, p in named if not p.requires_grad],
        }

    def ask_train(self, adapter, rows, steps=20, lr=1e-2, optimizer="adam"):
        """Losses before each of ``steps`` steps on one batch, and after the last."""
        import torch

        from . import optim

        adapter.model.train()
        trained = [p for p in adapter.model.parameters() if p.requires_grad]
        step = {"adam": optim.adam, "sgd": optim.sgd}[optimizer]
        batch, state, losses = adapter.batch(rows), {}, []
        for _ in range(steps):
            loss = adapter.loss(batch)
            losses.append(loss.item())
            adapter.model.zero_grad(set_to_none=True)
            with theirs():
                loss.backward()
            step(trained, state, lr)
        with torch.no_grad():
            losses.append(adapter.loss(batch).item())
        return {"losses": losses}

    def ask_generate(self, adapter, rows, max_new_tokens, greedy=True, seed=0, eos=None, padding="left", train=False):
        """New ids a row, and what generating changed: names in the state dict, the mode of any module.

        Buffers outside the state dict are not compared: a cache may rightly be kept in one.
        """
        model = adapter.model.train(train)
        before, modes = fingerprints(model), [module.training for module in model.modules()]
        ids = adapter.generate(adapter.batch(rows, padding), max_new_tokens, greedy, seed, eos)
        after = fingerprints(model)
        return {
            "ids": ids,
            "changed": sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)),
            "mode_kept": modes == [module.training for module in model.modules()],
        }

    def ask_save_load(self, adapter, rows):
        """Save, load, and compare keys, config and logits."""
        import torch

        from .adapters.configs import config_values

        cls = self.subject.model_class
        for method in ("save_pretrained", "from_pretrained"):
            if not hasattr(cls, method):
                raise NotSupported(f"{cls.__name__} has no {method}")
        batch = adapter.batch(rows)
        with torch.no_grad():
            before = adapter.logits(batch)
        with tempfile.TemporaryDirectory() as folder:
            with theirs():
                adapter.model.save_pretrained(folder)
                again = cls.from_pretrained(folder)
            files = sorted(os.path.relpath(os.path.join(at, f), folder) for at, _, fs in os.walk(folder) for f in fs)
            keys, aliases = saved_keys(folder, files)
        names = set(adapter.model.state_dict())
        ties = [shared_storage(model) for model in (adapter.model, again)]
        trained = [{n: p.requires_grad for n, p in model.named_parameters()} for model in (adapter.model, again)]
        first, adapter.model = adapter.model, again.to(self.device).eval()
        try:
            with torch.no_grad():
                after = adapter.logits(batch)
        finally:
            adapter.model = first
        present = set(keys) | set(aliases)
        return {
            "files": files,
            "keys": sorted(keys),
            "missing": sorted(names - present),
            "unexpected": sorted(set(keys) - names),
            "ties_before": ties[0],
            "ties_after": ties[1],
            "trainable_before": trained[0],
            "trainable_after": trained[1],
            "config_before": jsonable(config_values(adapter.config)),
            "config_after": jsonable(config_values(getattr(again, "cfg", getattr(again, "config", adapter.config)))),
            **{f"before.{i}": row.cpu().numpy() for i, row in enumerate(before)},
            **{f"after.{i}": row.cpu().numpy() for i, row in enumerate(after)},
        }

    def ask_backbones(self, adapter):
        """Build with pretrained backbones (small files in the cache) and look for the files' numbers in the model."""
        from safetensors.torch import load_file

        from . import hub

        config = adapter.backbone_config()
        repositories = [(name, role) for name, role in adapter.hub_names(config) if role != "tokenizer"]
        if not repositories:
            raise NotSupported("the config names no backbone repositories")
        with theirs():
            model = adapter.build_model(config, load_backbone=True)
        tensors = list(model.state_dict().values())
        missing, total = [], 0
        for name, role in repositories:
            file = load_file(os.path.join(hub.add_repository(name, role), "model.safetensors"))
            for key, tensor in file.items():
                total += 1
                if not any(contains(held, tensor) for held in tensors):
                    missing.append(f"{name}: {key}")
        return {"loaded": True, "total": total, "found": total - len(missing), "missing": missing}

    def ask_tokenize(self, adapter, texts, of="model"):
        """Ids of texts, beside those of the tokenizer.json the tokenizer was made from.

        of: "file" for the target's tokenizer made from the stand-in's files, "model" for the model's own.
        """
        from . import hub

        tokenizer = need(adapter.tokenizer, "the model has no tokenizer and no get_tokenizer")
        reference, encoder = None, tokenizer if of == "model" else adapter.file_tokenizer()
        if importlib.util.find_spec("tokenizers") is not None:
            import tokenizers

            reference = tokenizers.Tokenizer.from_str(dumps(hub.tokenizer_files()["tokenizer.json"]))
            if not same_vocabulary(encoder, reference, texts):
                reference = None
        ids = [list(map(int, encode(encoder, text))) for text in texts]
        special = {
            name: [str(getattr(tokenizer, name)), int(getattr(tokenizer, name + "_id"))]
            for name in ("eos_token", "bos_token", "pad_token", "image_token", "global_image_token")
            if getattr(tokenizer, name, None) is not None and getattr(tokenizer, name + "_id", None) is not None
        }
        return {
            "ids": ids,
            "reference_ids": [reference.encode(t).ids for t in texts] if reference else None,
            "decoded": [encoder.decode(row) for row in ids],
            "special": special,
            "length": len(tokenizer),
            "model_vocab_size": adapter.vocab_size,
            "class": type(tokenizer).__name__,
        }

    def ask_process_image(self, adapter, sizes):
        """Tiles, grid and tokens the target's own image processor makes of pictures of these (w, h)."""
        from . import probe
        from .data import image_processor, image_string_tokens

        process = image_processor(self.subject, adapter)
        if importlib.util.find_spec("PIL") is None:
            raise NotSupported("needs PIL, which is not installed, to make pictures")
        results = []
        for number, (width, height) in enumerate(sizes):
            tiles, grid = process(probe.photograph(number, width, height))
            results.append(
                {
                    "tiles": int(tiles.shape[0]),
                    "grid": list(grid) if grid else None,
                    "tile_size": list(tiles.shape[-2:]),
                    "image_tokens": image_string_tokens(self.subject, adapter, grid),
                    "features": int(tiles.shape[0]) * adapter.image_tokens,
                    "low": float(tiles.min()),
                    "high": float(tiles.max()),
                }
            )
        return {"pictures": results}

    def ask_data(self, adapter, turns, pictures=1, packed=False):
        """The target's own data set and collator on fixed rows; packed: all in one row, if they fit."""
        from .data import run_pipeline

        return run_pipeline(self.subject, adapter, turns, pictures, packed)

    def ask_train_config(self):
        """Fields and defaults of the training config."""
        from .adapters.configs import blank, config_default, field_names

        if self.subject.found.train_config is None:
            raise NotSupported("no training config class was found")
        cls = self.subject.load(self.subject.found.train_config)
        blank(cls)  # a config that cannot be made with its defaults raises here
        types = {f.name: str(f.type) for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        return {
            "fields": {
                name: {
                    "type": types.get(name, type(config_default(cls, name)).__name__),
                    "default": jsonable(config_default(cls, name)),
                }
                for name in field_names(cls)
            }
        }

    def ask_memory(self, adapter, rows, step="forward"):
        """Bytes at the peak of a forward pass or a training step, parameters included."""
        from .memory import peak

        batch = adapter.batch(rows)
        peak_bytes, how = peak(adapter, batch, step)
        size = sum(p.numel() * p.element_size() for p in adapter.model.parameters())
        return {"peak_bytes": int(peak_bytes), "how": how, "parameters_bytes": int(size)}
