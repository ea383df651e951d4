"""How to train: one frozen table of choices, checked when it is made. Read as ``nanovlm.config.TrainConfig``.

Upstream main's field names; what upstream keeps as numbers inside its loop (warm-up, floor of the learning
rate, weight decay) are fields here. Upload and wandb are off until asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovlm.checks import check_types
from nanovlm.errors import ConfigError

CHOICES = {
    "autocast": ("auto", "bfloat16", "float32"),
    "activation_checkpointing": ("nothing", "elementwise", "blocks"),
}
_FROM_ZERO = ("num_workers", "seed", "val_size")


@dataclass(frozen=True)
class TrainConfig:
    """Everything the training loop is told, but the model and the device.

    A learning rate of 0 freezes its part; None means ``lr_backbones``. Counts are of optimizer steps where
    nothing else is said. Raises ConfigError for a value of the wrong type or out of bounds.
    """

    lr_mp: float = 0.00512
    lr_backbones: float = 5e-05
    lr_vision_backbone: float | None = None
    lr_language_backbone: float | None = None
    freeze_vision_encoder: bool = False
    val_size: int = 50000
    val_ratio: float = 0.025
    batch_size: int = 2
    gradient_accumulation_steps: int = 32
    max_grad_norm: float = 1.0
    eval_in_epochs: bool = True
    eval_interval: int = 500
    validation_steps: int = 500
    save_checkpoint_steps: int = 500
    console_log_interval: int = 10
    stats_log_interval: int = 100
    max_training_steps: int = 40000
    max_images_per_example: int = 4
    max_images_per_knapsack: int = 18
    max_sample_length: int = 4096
    num_workers: int = 2
    max_threads: int = 4
    compile: bool = False
    seed: int = 0
    resume_from_vlm_checkpoint: bool = False
    train_dataset_path: str = "HuggingFaceM4/FineVision_concat_shuffled_2"
    train_dataset_name: tuple[str, ...] = ("default",)
    stream_dataset: bool = True
    relevance_min_rating: int = 1
    image_correspondence_min_rating: int = 1
    visual_dependency_min_rating: int = 1
    formatting_min_rating: int = 1
    run_name: str | None = None
    hf_repo_name: str | None = None
    log_wandb: bool = False
    wandb_entity: str | None = None
    use_lmms_eval: bool = False
    lmms_eval_tasks: str = "mmstar,mmmu_val,ocrbench,textvqa_val,docvqa_val,scienceqa,mme,infovqa_val,chartqa"
    lmms_eval_limit: float | None = None
    lmms_eval_batch_size: int = 64

    # -- data, not in upstream's config ---------------------------------------------------------------------
    task: str | None = None  # "aokvqa-mcq": rows of A-OKVQA become multiple choice
    pack: bool = True  # fill rows of lm_max_length with several documents

    # -- not in upstream's config ---------------------------------------------------------------------------
    resume: bool = False  # go on with the run's own last checkpoint
    output_dir: str = "checkpoints"  # a run is the folder output_dir/run_name
    keep_checkpoints: int = 3  # of the last ones; the best stays besides
    warmup_ratio: float = 0.03  # upstream's numbers, as are the next two
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.01
    adam_beta2: float = 0.999  # torch's own
    autocast: str = "auto"  # bfloat16 where the device has it; or "bfloat16", "float32"
    activation_checkpointing: str = "nothing"  # what is computed again: "nothing", "elementwise", "blocks"
    shard: bool = False
    validation_batches: int = 64
    max_nonfinite_steps: int = 5  # in a row

    def __post_init__(self) -> None:
        check_types(self)
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type in ("float", "float | None") and value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{f.name}={value}: expected a number from 0 up")
            if f.type == "int" and value < (0 if f.name in _FROM_ZERO else 1):
                raise ConfigError(f"{f.name}={value}: expected a positive count")
        if self.val_ratio >= 1:
            raise ConfigError(f"val_ratio={self.val_ratio} leaves nothing to train on; use less than 1")
        for name in ("warmup_ratio", "min_lr_ratio"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a share from 0 to 1")
        if self.adam_beta2 >= 1:
            raise ConfigError(f"adam_beta2={self.adam_beta2}: expected less than 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {', '.join(choices)}")
        if not any(self.learning_rates.values()):
            raise ConfigError("every learning rate is 0: all parts are frozen, so nothing would be trained")

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each part by its attribute name on the model; 0 where a part is frozen."""
        vision = self.lr_backbones if self.lr_vision_backbone is None else self.lr_vision_backbone
        language = self.lr_backbones if self.lr_language_backbone is None else self.lr_language_backbone
        return {
            "MP": self.lr_mp,
            "vision_encoder": 0.0 if self.freeze_vision_encoder else vision,
            "decoder": language,
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A config of named values, as a file has them. Raises ConfigError for a name there is no field of."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"TrainConfig has no field {unknown[0]!r}{hint}")
        return cls(**values)

    def to_json_dict(self) -> dict[str, Any]:
        """The fields as train_config.json holds them."""
        return dataclasses.asdict(self)
