"""nanovlm: a small vision-language model in pure PyTorch.

Names are loaded when they are first used (PEP 562): ``import nanovlm`` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "VLMConfig": "config",
    "TrainConfig": "config",
    "preset": "presets",
    "PRESETS": "presets",
    "VisionLanguageModel": "vlm",
    "get_tokenizer": "tokenizer",
    "get_image_processor": "images",
    "get_image_string": "prompts",
}
__all__ = ["PRESETS", "TrainConfig", "VLMConfig", "VisionLanguageModel", "__version__",
           "get_image_processor", "get_image_string", "get_tokenizer", "preset"]  # fmt: skip

if TYPE_CHECKING:
    from nanovlm.config import TrainConfig, VLMConfig
    from nanovlm.images import get_image_processor
    from nanovlm.presets import PRESETS, preset
    from nanovlm.prompts import get_image_string
    from nanovlm.tokenizer import get_tokenizer
    from nanovlm.vlm import VisionLanguageModel


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'nanovlm' has no attribute {name!r}")
    return getattr(import_module(f"nanovlm.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
