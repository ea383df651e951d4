"""A Child without a process: a tiny language model in numpy that answers every question rightly.

It is the unit-test double for what a fork may do wrong. `fault` breaks the model itself (its cache, its
mask, its loss); `changes` rewrites single replies: {question: function(reply, parameters) -> reply}.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

VOCAB, WIDTH = 40, 16
PAD, EOS, IMAGE_ID, BOS = range(4)
TEXT_IDS = list(range(6, 34))
IMAGE_TOKENS, MAX_POSITIONS, SIDE = 4, 64, 32
TOKENS = {"<|im_end|>": EOS, "<|image|>": IMAGE_ID}

_draw = np.random.default_rng(0)
EMBED = _draw.normal(size=(VOCAB, WIDTH))
PICTURES = _draw.normal(size=(8, WIDTH))
MIX = _draw.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5
HEAD = _draw.normal(size=(WIDTH, VOCAB)) / WIDTH**0.5


def field(type_: str, default, value="as default"):
    return {"type": type_, "default": default, "value": default if value == "as default" else value}


def config() -> dict:
    return {
        "lm_hidden_dim": field("int", 960, 16),
        "lm_n_heads": field("int", 15, 4),
        "lm_n_kv_heads": field("int", 5, 2),
        "lm_n_blocks": field("int", 32, 2),
        "vit_n_blocks": field("int", 12, 3),
        "vit_hidden_dim": field("int", 768, 16),
        "vit_n_heads": field("int", 12, 2),
        "vit_img_size": field("int", 512, 32),
        "vit_patch_size": field("int", 16, 8),
        "mp_pixel_shuffle_factor": field("int", 4, 2),
        "lm_base_vocab_size": field("int", 49152, 30),
        "extra_token_amount": field("int", 10),
        "lm_vocab_size": field("int", 49162, VOCAB),
        "lm_max_length": field("int", 4096, 64),
        "lm_max_position_embeddings": field("int", 8192, 64),
        "lm_tie_weights": field("bool", True),
        "lm_rms_eps": field("float", 1e-5),
        "vlm_extra_tokens": field("dict[str, str]", {"image_token": "<|image|>"}),
        "lm_tokenizer": field("str", "a/b"),
    }


def describe() -> dict:
    positional = "positional_or_keyword"
    ids = {"name": "input_ids", "kind": positional}
    images = {"name": "images", "kind": positional}
    mask = {"name": "attention_mask", "kind": positional, "default": None}
    targets = {"name": "targets", "kind": positional, "default": None}
    return {
        "dialect": "fake",
        "model_class": "VisionLanguageModel",
        "config_class": "VLMConfig",
        "train_config_class": "TrainConfig",
        "config": config(),
        "signatures": {"forward": [ids, images, mask, targets], "generate": [ids, images, mask]},
        "vocab_size": VOCAB,
        "text_ids": TEXT_IDS,
        "special_ids": [PAD, EOS, IMAGE_ID, BOS],
        "image_tokens": IMAGE_TOKENS,
        "max_positions": MAX_POSITIONS,
        "image_size": SIDE,
        "parameters": 1000,
        "layout": "in_text",
        "takes": {
            "no_image": True,
            "several_images": True,
            "greedy": True,
            "attention_mask": True,
            "eos": True,
        },
        "notes": ["answered by a double"],
    }


def state_dict() -> dict:
    def tensor(*shape, tied_to=None):
        return {
            "shape": list(shape),
            "dtype": "float32",
            "persistent": True,
            "trainable": True,
            "tied_to": tied_to,
            "finite": True,
        }

    keys = {"decoder.token_embedding.weight": tensor(VOCAB, WIDTH), "MP.proj.weight": tensor(WIDTH, WIDTH)}
    keys |= {f"decoder.blocks.{n}.attn.weight": tensor(WIDTH, WIDTH) for n in range(2)}
    keys |= {f"vision_encoder.blocks.{n}.attn.weight": tensor(WIDTH, WIDTH) for n in range(3)}
    keys["decoder.head.weight"] = tensor(VOCAB, WIDTH, tied_to="decoder.token_embedding.weight")
    return {"keys": keys}


class FakeChild:
    """Has ask, hello, output, target and close, as Child has."""

    target = SimpleNamespace(folder=Path("fork"))

    def __init__(self, fault: str = "", changes: dict | None = None):
        self.fault, self.changes = fault, changes or {}
        self.hello = {
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "device": "cpu",
            "gpu": None,
        }
        self.output = "hello from the target\n"
        self.calls: list[str] = []
        self.closed = False
        self.drift = 0.0

    def close(self):
        self.closed = True

    def ask(self, question: str, combo=None, **parameters) -> dict:
        self.calls.append(question)
        reply = getattr(self, "answer_" + question)(**parameters)
        return self.changes[question](reply, parameters) if question in self.changes else reply

    # --- the model ----------------------------------------------------------------------------------------

    def logits(self, row: dict, padding: int = 0, neighbour: float = 0.0) -> np.ndarray:
        """(T_text, V): each position sees itself and, ever more faintly, what came before."""
        state, out, pictures = np.zeros(WIDTH), [], list(row["images"])
        if self.fault == "picture order is lost":
            pictures.sort()
        if self.fault == "the first picture stands for all":
            pictures = pictures[:1] * len(pictures)
        if self.fault == "the last picture stands for all":
            pictures = pictures[-1:] * len(pictures)
        if self.fault == "pictures go to the places in reverse":
            pictures.reverse()
        past: list[np.ndarray] = []
        text = [token for token in row["tokens"] if token != -1]
        for token in row["tokens"]:
            seen = (
                PICTURES[pictures.pop(0)] * (self.fault != "pictures are ignored")
                if token == -1
                else EMBED[token]
            )
            if token != -1 and self.fault == "ids are ignored":
                seen = EMBED[0] * len(out)
            state = 0.7 * state + seen
            past = [*past, seen][-(32 if self.fault == "only a window is seen" else MAX_POSITIONS * 2) :]
            shown = state + 0.05 * sum(past) + neighbour + self.drift
            if self.fault == "the future is seen":
                shown = shown + 0.01 * EMBED[text[-1]]
            if self.fault == "padding leaks":
                shown = shown + 0.01 * padding
            if self.fault == "padding leaks a lot":
                shown = shown + padding * EMBED[5]
            if token != -1:
                out.append(np.tanh(shown @ MIX) @ HEAD)
        if self.fault == "dropout in eval":
            self.drift += 1e-3
        values = np.array(out, dtype=np.float32)
        values[:, [PAD, IMAGE_ID, BOS]] = -4.0
        return values

    def answer_lock_flops(self, rows):
        return {"facts": {"flops.forward.total": 2_000_000, "flops.backward.total": 4_000_000}}

    def answer_speed(self, rows, new_tokens):
        return {"tokens_per_s": 500.0}

    def answer_lock_special(self):
        return {"facts": {"eos_token": ["<|im_end|>", 2]}}

    def answer_loading_fields(self):
        return {"fields": {"lm_hidden_dim": [960, "shapes"], "vit_patch_size": [16, "refused"]}}

    def answer_forward(self, rows, padding="left", train=False):
        longest = max(len(row["tokens"]) for row in rows)
        reply, total, count = {"loss": None, "finite": True}, 0.0, 0
        for number, row in enumerate(rows):
            leak = 0.01 * number if self.fault == "rows leak" else 0.0
            logits = self.logits(row, longest - len(row["tokens"]), leak)
            reply[f"logits.{number}"] = logits
            if "labels" in row:
                labels = [
                    label for label, token in zip(row["labels"], row["tokens"], strict=True) if token != -1
                ]
                for place, label in enumerate(labels):
                    count += self.fault == "masked labels count" and label == -100
                    if label != -100:
                        total -= float(
                            logits[place][label] - np.log(np.exp(logits[place].astype(float)).sum())
                        )
                        count += 1
        if count:
            reply["loss"] = total / count
        return reply

    def answer_generate(self, rows, max_new_tokens, greedy=True, seed=0, eos=None, padding="left", train=False):
        if self.fault == "sampling is not seeded":
            seed += len(self.calls)
        eos = EOS if eos is None else eos
        draw, longest, out = np.random.default_rng(seed), max(len(row["tokens"]) for row in rows), []
        for row in rows:
            ids: list[int] = []
            while len(ids) < max_new_tokens:
                tokens = [*row["tokens"], *ids]
                if self.fault == "the cache is off by one" and len(ids) > 1:
                    tokens.pop(-2)
                if self.fault == "the cache forgets late" and len(ids) > 16:
                    tokens = tokens[:8]
                shown = self.logits({**row, "tokens": tokens}, longest - len(row["tokens"]))[-1].astype(float)
                weight = np.exp(3 * (shown - shown.max()))
                token = int(shown.argmax()) if greedy else int(draw.choice(VOCAB, p=weight / weight.sum()))
                ids.append(token)
                if token == eos and self.fault != "the end is ignored":
                    break
            out.append(ids)
        if self.fault == "generate changes the model":
            self.drift += 0.01
        if self.fault == "the first end ends all":
            out = [ids[: min(map(len, out))] for ids in out]
        return {"ids": out, "changed": [], "mode_kept": True}

    # --- the rest, scripted -------------------------------------------------------------------------------

    def answer_describe(self):
        return describe()

    def answer_state_dict(self):
        return state_dict()

    def answer_gradients(self, rows):
        names = list(state_dict()["keys"])
        return {"loss": 3.6, "grads": {name: 0.5 for name in names}, "trainable": names, "frozen": []}

    def answer_train(self, rows, steps=20, lr=0.01, optimizer="adam"):
        return {"losses": [4.0 * 0.8**step for step in range(steps + 1)]}

    def answer_save_load(self, rows):
        values = {name: entry["value"] for name, entry in config().items()}
        logits = {
            f"{when}.{n}": self.logits(row) for when in ("before", "after") for n, row in enumerate(rows)
        }
        return {
            "files": ["config.json", "model.safetensors"],
            "keys": list(state_dict()["keys"]),
            "missing": [],
            "unexpected": [],
            "ties_before": [["decoder.head.weight", "decoder.token_embedding.weight"]],
            "ties_after": [["decoder.head.weight", "decoder.token_embedding.weight"]],
            "trainable_before": {name: True for name in state_dict()["keys"]},
            "trainable_after": {name: True for name in state_dict()["keys"]},
            "config_before": values,
            "config_after": dict(values),
            **logits,
        }

    def answer_backbones(self):
        return {"loaded": True, "total": 12, "found": 12, "missing": []}

    def answer_tokenize(self, texts, of="model"):
        ids = [
            [TOKENS[text]] if text in TOKENS else [TEXT_IDS[ord(c) % len(TEXT_IDS)] for c in text]
            for text in texts
        ]
        special = {"eos_token": ["<|im_end|>", EOS], "image_token": ["<|image|>", IMAGE_ID]}
        return {
            "ids": ids,
            "reference_ids": [list(row) for row in ids],
            "decoded": list(texts),
            "special": special,
            "length": VOCAB,
            "model_vocab_size": VOCAB,
            "class": "FakeTokenizer",
        }

    def answer_process_image(self, sizes):
        pictures = []
        for width, height in sizes:
            grid = [height // SIDE, width // SIDE]
            tiles = grid[0] * grid[1] + (grid != [1, 1])
            pictures.append(
                {
                    "tiles": tiles,
                    "grid": grid,
                    "tile_size": [SIDE, SIDE],
                    "image_tokens": tiles * IMAGE_TOKENS,
                    "features": tiles * IMAGE_TOKENS,
                }
            )
        return {"pictures": pictures}

    def answer_data(self, turns, pictures):
        text = ["\n".join(turn["assistant"] + "<|im_end|>" for turn in row) for row in turns]
        return {
            "rows": len(turns),
            "pictures": pictures,
            "supervised": [len(t) for t in text],
            "labels_text": text,
            "image_tokens": [IMAGE_TOKENS * pictures] * len(turns),
            "features": [IMAGE_TOKENS * pictures] * len(turns),
            "batch_keys": ["input_ids", "labels", "images", "attention_mask"],
            "ids": [[PAD, PAD, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15]],
            "labels": [[-100, -100, -100, 8, 9, -100], [-100, -100, 13, 14, 15, -100]],
            "attention_mask": [[0, 0, 1, 1, 1, 1], [1] * 6],
            "pad_id": PAD,
        }

    def answer_train_config(self):
        return {
            "fields": {
                "lr_mp": field("float", 0.005),
                "lr_backbones": field("float", 5e-5),
                "batch_size": field("int", 2),
                "compile": field("bool", False),
                "train_dataset_name": field("tuple[str, ...]", ["all"]),
            }
        }

    def answer_memory(self, rows, step="forward"):
        work = 1000 * len(rows) * (2 if step == "train" else 1)
        return {"peak_bytes": 4000 + work, "parameters_bytes": 4000, "how": "counted by the double"}
