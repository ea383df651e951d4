"""Small fork trees on disk: one for each dialect, and changes to them.

Unusual: the parts every tree shares lie in forks/shared and are copied into each, so a tree is a whole
checkout that knows nothing of this project.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

FORKS = Path(__file__).parent / "forks"
COMBO = {
    "name": "siglip2-smollm2",
    "vision": "siglip2",
    "language": "smollm2",
    "preset": "tiny",
    "scale": "tiny",
}
MODEL = "models/vision_language_model.py"
CONFIG = "models/config.py"


def make_tree(
    folder: Path, name: str, replace: dict | None = None, add: dict[str, str] | None = None
) -> Path:
    """The tree ``name`` below ``folder``. replace: {file: [(old, new), ...]}; add: {file: text}.

    ``old`` must be in the file, so that a change that changes nothing is an error here.
    """
    tree = folder / name
    shutil.copytree(FORKS / name, tree)
    for file in ("towers", "saving", "words"):
        put(tree / f"backbone/{file}.py", (FORKS / f"shared/{file}.py").read_text(encoding="utf-8"))
    if name in ("v01", "v02"):
        put(tree / "data/pairs.py", (FORKS / "shared/pairs.py").read_text(encoding="utf-8"))
    for file, changes in (replace or {}).items():
        text = (tree / file).read_text(encoding="utf-8")
        for old, new in changes:
            assert old in text, f"{name}/{file} holds no {old!r}"
            text = text.replace(old, new)
        put(tree / file, text)
    for file, text in (add or {}).items():
        put(tree / file, text)
    return tree


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def fingerprint(folder: Path) -> dict[str, str]:
    """{path: hash of its bytes, or where it links to} of everything below ``folder``; nothing is left out."""
    found = {}
    for here, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(here) / name
            key = str(path.relative_to(folder))
            if path.is_symlink():
                found[key] = os.readlink(path)
            else:
                found[key] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


NESTED = """flat = [picture for row in images for picture in row]
        return torch.cat(flat) if flat else None"""

# v0.1 once it had a key/value cache: greedy and cached generation on request.
CACHED_V01 = {
    MODEL: [
        ("drawn, load,", "drawn, likeliest, load,"),
        ("max_new_tokens=5):", "max_new_tokens=5, greedy=False, use_kv_cache=True):"),
        (
            "max_new_tokens, drawn, cached=False)",
            "max_new_tokens, likeliest if greedy else drawn, use_kv_cache)",
        ),
    ]
}

# Pictures as one tensor, labels, a dict of outputs, files beside the code, .item() while building, a frozen
# config under another place and name, tools imported that are not there.
ODD = {
    MODEL: [
        (
            "from models.config import VLMConfig",
            "import einops\nimport wandb\nfrom configs.config import ModelSettings\n"
            "from torchvision import transforms\n\nSIDE = open('notes/scale.txt').read().strip()\n"
            "AUGMENT = transforms.RandomHorizontalFlip",
        ),
        ("config_class = VLMConfig", "config_class = ModelSettings"),
        ("cfg: VLMConfig", "cfg: ModelSettings"),
        (
            "        if load_backbone:",
            "        self.span = self.decoder.embed_tokens.weight.std().item()\n        if load_backbone:",
        ),
        (
            "flat = [picture for row in images for picture in row]\n"
            "        return torch.cat(flat) if flat else None",
            "return images if images is None or len(images) else None",
        ),
        ("targets", "labels"),
        ("return hidden, None", 'return {"logits": self.decoder.head(hidden), "loss": None}'),
        (
            "return logits, next_token_loss(logits, labels)",
            'return {"logits": logits, "loss": next_token_loss(logits, labels)}',
        ),
    ]
}


def make_odd(folder: Path) -> Path:
    """The main tree as ODD describes it."""
    tree = make_tree(folder, "main", ODD, {"notes/scale.txt": "3\n"})
    text = (tree / CONFIG).read_text(encoding="utf-8").replace("VLMConfig", "ModelSettings")
    put(tree / "configs/config.py", text.replace("@dataclass\n", "@dataclass(frozen=True)\n", 1))
    (tree / CONFIG).unlink()
    return tree


PLAIN_CONFIG = '''
class Config:
    """No dataclass: fields are set while the object is made."""

    def __init__(self, vit_hidden_dim=64, vit_inter_dim=128, vit_patch_size=16, vit_img_size=64,
                 vit_n_heads=4, vit_n_blocks=3, lm_hidden_dim=96, lm_inter_dim=192, lm_n_heads=4,
                 lm_n_kv_heads=2, lm_n_blocks=3, lm_vocab_size=338, extra_token_amount=18,
                 mp_pixel_shuffle_factor=2, **more):
        self.vit_hidden_dim, self.vit_inter_dim = vit_hidden_dim, vit_inter_dim
        self.vit_patch_size = vit_patch_size
        self.vit_img_size, self.vit_n_heads, self.vit_n_blocks = vit_img_size, vit_n_heads, vit_n_blocks
        self.lm_hidden_dim, self.lm_inter_dim, self.lm_n_heads = lm_hidden_dim, lm_inter_dim, lm_n_heads
        self.lm_n_kv_heads, self.lm_n_blocks, self.lm_vocab_size = lm_n_kv_heads, lm_n_blocks, lm_vocab_size
        self.extra_token_amount, self.mp_pixel_shuffle_factor = extra_token_amount, mp_pixel_shuffle_factor
        self.lm_max_position_embeddings = 256
        self.lm_tokenizer = "example/words"
        self.vlm_extra_tokens = {"image_token": "<|image|>", "global_image_token": "<|global_image|>"}
        self.lm_chat_template = "<|im_start|>{role}\\n{content}<|im_end|>\\n"
        self.__dict__.update(more)
'''


def make_package(folder: Path) -> Path:
    """The main tree as a package with relative imports, three folders down, beside unrelated code.

    Its config is no dataclass, its pictures are a list of 3-D tensors, its answer a pair (loss, logits).
    """
    top = folder / "monorepo"
    make_tree(
        top / "research" / "vlm",
        "main",
        {
            MODEL: [
                ("from backbone.", "from ..backbone."),
                ("from data.", "from ..data."),
                ("from models.config import VLMConfig", "from .config import Config as VLMConfig"),
                (
                    "flat = [picture for row in images for picture in row]\n"
                    "        return torch.cat(flat) if flat else None",
                    "return torch.stack(list(images)) if images else None",
                ),
                (
                    "return logits, next_token_loss(logits, targets)",
                    "return next_token_loss(logits, targets), logits",
                ),
            ],
            "backbone/saving.py": [("import dataclasses", "import dataclasses  # and plain objects")],
            "data/processors.py": [("from backbone.", "from ..backbone.")],
            "data/datasets.py": [("from data.", "from .")],
        },
        {CONFIG: PLAIN_CONFIG},
    )
    package = top / "research" / "vlm" / "main"
    package = package.rename(package.with_name("smallvlm"))
    for place in (package, *(package / part for part in ("models", "data", "backbone"))):
        put(place / "__init__.py", "")
    put(top / "server" / "app.py", "def forward(request):\n    return request\n")
    put(top / "README.md", "A repository with a model somewhere in it.\n")
    return top
