"""A small real loader with the contract of nanovlm.data, and a run on it: a row is a tile, a few words, an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nanovlm import TrainConfig, VisionLanguageModel, preset
from nanovlm.train import Result, train
from nanovlm.train.distributed import World
from tests.model.helpers import scale

CPU = World(torch.device("cpu"))
POISON = 251  # a word that no row has
PLAIN = {
    "batch_size": 2, "gradient_accumulation_steps": 2, "max_training_steps": 4, "lr_mp": 1e-3, "lr_backbones": 1e-3,
    "eval_interval": 1000, "validation_steps": 1000, "save_checkpoint_steps": 1000, "num_workers": 0,
    "train_dataset_path": "synthetic", "warmup_ratio": 0.0, "console_log_interval": 1,
}  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**PLAIN, **changes})


def make_model(seed: int = 0, **changes: Any) -> VisionLanguageModel:
    """A smaller tiny model, in training mode, whose logits are of order 1."""
    sizes = {"lm_n_blocks": 1, "vit_n_blocks": 1, "max_img_size": 64}
    model = VisionLanguageModel(preset("tiny", **{**sizes, **changes}), load_backbone=False)
    return scale(model, seed).train()


def poisoned(model: VisionLanguageModel) -> VisionLanguageModel:
    """The model, with NaN for the embedding of POISON."""
    model.decoder.token_embedding.register_forward_hook(
        lambda module, given, out: out.masked_fill((given[0] == POISON)[..., None], torch.nan)
    )
    return model


class Rows:
    """Rows ``rank``, ``rank + size``, ... of an endless list, collated ``batch_size`` at a time on the left.

    Row ``n`` has 5 to 9 words and 1 to 4 labels. ``without``: what to leave out of some rows, by number.
    """

    def __init__(self, cfg, batch_size: int = 2, rank: int = 0, size: int = 1, without: dict[int, str] | None = None):
        self.cfg, self.batch_size, self.rank, self.size = cfg, batch_size, rank, size
        self.without, self.at, self.stats = without or {}, 0, {"rows": 0, "skipped": {"broken": 1}, "utilisation": 0.5}

    def row(self, number: int) -> tuple[list[int], list[int], list[torch.Tensor]]:
        dice = torch.Generator().manual_seed(number)
        length, taught = (int(torch.randint(*span, (1,), generator=dice)) for span in ((5, 10), (1, 5)))
        words = torch.randint(3, 250, (length,), generator=dice).tolist()
        missing = self.without.get(number, "")
        images = [] if missing == "image" else [torch.rand(1, 3, 64, 64, generator=dice)]
        if missing == "sense":
            words[0] = POISON
        ids = [self.cfg.image_token_id] * (self.cfg.mp_image_token_length * len(images)) + words
        labels = [-100] * len(ids)
        if missing != "labels":
            labels[-taught - 1 : -1] = ids[-taught:]
        return ids, labels, images

    def __next__(self) -> dict[str, Any]:
        numbers = [(self.at * self.size + self.rank) * self.batch_size + row for row in range(self.batch_size)]
        self.at += 1
        self.stats["rows"] += len(numbers)
        return self.collate(numbers)

    def collate(self, numbers: list[int]) -> dict[str, Any]:
        rows = [self.row(number) for number in numbers]
        longest = max(len(ids) for ids, _, _ in rows)

        def padded(values: list[int], fill: int) -> list[int]:
            return [fill] * (longest - len(values)) + values

        return {
            "input_ids": torch.tensor([padded(ids, 2) for ids, _, _ in rows]),
            "labels": torch.tensor([padded(labels, -100) for _, labels, _ in rows]),
            "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _, _ in rows]),
            "images": [images for _, _, images in rows],
            "ids": [[f"row {number}"] for number in numbers],
        }

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Held:
    """A finite loader over ``count`` batches of rows that training does not reach."""

    def __init__(self, cfg, count: int = 2, first: int = 10_000, rank: int = 0, size: int = 1):
        self.rows, self.numbers = Rows(cfg), range(first + rank, first + count, size)

    def __iter__(self):
        return (self.rows.collate([number]) for number in self.numbers)


def run(
    folder: Path,
    cfg: TrainConfig | None = None,
    model: VisionLanguageModel | None = None,
    world: World = CPU,
    resume: Path | None = None,
    **loader: Any,
) -> Result:
    """Train on Rows, validate on Held."""
    cfg, model = cfg or config(), model or make_model()
    rows = Rows(model.cfg, cfg.batch_size, world.rank, world.size, **loader)
    return train(model, cfg, world, folder, (rows, Held(model.cfg, rank=world.rank, size=world.size)), resume=resume)
