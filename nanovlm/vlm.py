"""The whole model: vision encoder, projector, language model, and the splice between them.

Unusual: one class serves three generations of nanoVLM. Where image features go is a boolean mask over the
sequence ("slots"): the image tokens of the text, or, in v0.1, positions put in front of it. With targets,
logits are made only where a label counts, because the vocabulary is most of a small model's cost.

B rows, T text positions, N tiles, K features a tile, D width, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm import checkpoint, generate, hub, inputs, registry, weights
from nanovlm.config import VLMConfig
from nanovlm.errors import ConfigError, NoLabels, PromptTooLong
from nanovlm.layers import Linear, causal_mask
from nanovlm.loss import cross_entropy, linear_cross_entropy
from nanovlm.projector import ModalityProjector
from nanovlm.recompute import check_mode

log = logging.getLogger(__name__)
IGNORE_INDEX = -100


class VisionLanguageModel(nn.Module):
    """Pictures and text in, text out; calls, parameter names and files are upstream nanoVLM's.

    load_backbone: fill encoder and language model from the repositories that ``vit_model_type`` and
    ``lm_model_type`` name; an empty name has no published weights and keeps its random ones.
    """

    def __init__(self, cfg: VLMConfig, load_backbone: bool = True) -> None:
        super().__init__()
        self.cfg = cfg
        self.vision_encoder = registry.vision_encoder(cfg.vision_encoder)(cfg)
        self.decoder = registry.language_model(cfg.language_model)(cfg)
        self.MP = ModalityProjector(cfg)
        if load_backbone:
            _load_backbone(self.vision_encoder, cfg, "vit_model_type")
            _load_backbone(self.decoder, cfg, "lm_model_type")

    # -- forward ----------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        images: Any,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        want_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """input_ids (B, T) and their pictures -> (logits, loss).

        images: None, tiles (N, 3, S, S), a list of tiles or of stacks of them, or one such list a row.
        attention_mask (B, T): 0 at padding, on any side; where a row packs several documents, the number of
        each, 1 and up, at its own positions: no document sees another. targets (B, T): the next id of each
        position, -100 where none counts; they are shifted already, as upstream's dataset does.

        Without targets: logits (B, T, V), of the text alone even where features stand before it; and None.
        With targets: logits (n_labelled, V) in the order of ``targets[targets != -100]``, or None unless
        ``want_logits``, which costs their memory; and the mean loss.
        Raises ImageTokenMismatch, ImageError, PromptError, PromptTooLong, NoLabels.
        """
        embeds, documents, front = self.embed_prompt(input_ids, images, attention_mask)
        mask = None if documents is None else causal_mask(documents)
        hidden = self.decoder(embeds, generate.position_ids(embeds, documents), mask)[:, front:]
        if targets is None:
            return self.decoder.head(hidden), None
        inputs.check_targets(input_ids, targets)
        counts = targets != IGNORE_INDEX
        labels = targets[counts]
        if not len(labels):
            raise NoLabels(
                f"all {targets.numel()} targets are {IGNORE_INDEX}: nothing to learn; is the loss mask empty?"
            )
        inputs.check_labels(self.cfg, labels)
        head, hidden = self.decoder.head, hidden[counts]
        plain = type(head) in (Linear, nn.Linear) and not head._forward_hooks and not head._forward_pre_hooks
        if plain and not want_logits:
            return None, linear_cross_entropy(hidden, head.weight, labels)
        logits = head(hidden)
        return logits if want_logits else None, cross_entropy(logits, labels)

    def recompute_activations(self, mode: str) -> None:
        """What training makes again instead of keeping: "nothing", "elementwise" or "blocks"."""
        self.vision_encoder.recompute = self.decoder.recompute = check_mode(mode)

    def embed_prompt(
        self, input_ids: Tensor, images: Any, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, int]:
        """(embeddings with image features in their places (B, T', D), documents (B, T') or None, T' - T).

        T' is T, but for v0.1, whose features stand in front. documents: 0 at padding, None if all is one.
        """
        inputs.check_ids(self.cfg, input_ids, attention_mask)
        batch = inputs.pictures(self.cfg, images, len(input_ids))
        documents = inputs.documents(self.cfg, attention_mask, batch)
        embeds, front = self.decoder.embed(input_ids), 0
        if self.cfg.image_token_id is not None:
            slots = input_ids == self.cfg.image_token_id
        else:
            slots = inputs.slots_in_front(self.cfg, batch, len(input_ids), input_ids.device)
            front = slots.shape[1]
            if front:
                embeds = torch.cat((embeds.new_zeros(len(embeds), front, embeds.shape[2]), embeds), dim=1)
                if documents is not None or not slots.all():
                    text = torch.ones_like(input_ids) if documents is None else documents
                    documents = torch.cat((slots.long(), text), dim=1)
                slots = F.pad(slots, (0, input_ids.shape[1]))
        if embeds.shape[1] > self.cfg.lm_max_position_embeddings:
            raise PromptTooLong(
                f"a sequence of {embeds.shape[1]} positions, but lm_max_position_embeddings="
                f"{self.cfg.lm_max_position_embeddings}; shorten the text or use smaller pictures"
            )
        inputs.check_slots(slots, batch)
        if batch.pixel_values is not None:
            features = self.encode_images(batch.pixel_values)
            packed = features if isinstance(features, Tensor) else torch.cat(features)
            embeds = splice(embeds, slots, packed)
        return embeds, documents, front

    def encode_images(self, pixel_values: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Pictures of one size (N, 3, H, W) -> features in the language model's width (N, K, D).

        A list of pictures (3, H, W) of any sizes -> a list of (K, D); those of one size go through together.
        """
        if isinstance(pixel_values, Tensor):
            patch = self.cfg.vit_patch_size
            grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
            return self.MP(self.vision_encoder(pixel_values.to(self.MP.proj.weight)), grid)
        by_size: dict[torch.Size, list[int]] = {}
        for number, picture in enumerate(pixel_values):
            by_size.setdefault(picture.shape, []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in by_size.values():
            features = self.encode_images(torch.stack([pixel_values[number] for number in numbers]))
            found.update(zip(numbers, features, strict=True))
        return [found[number] for number in range(len(pixel_values))]

    # -- text -------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self):
        """The config's tokenizer, made when first asked for; no part of the state dict."""
        from nanovlm.tokenizer import get_tokenizer

        return get_tokenizer(self.cfg)

    def generate(
        self,
        input_ids: Tensor,
        images: Any,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 5,
        top_k: int = 50,
        top_p: float = 0.9,
        temperature: float = 0.5,
        greedy: bool = False,
        *,
        repetition_penalty: float = 1.0,
        stop: Sequence[int] | Sequence[Sequence[int]] = (),
        streamer: Any = None,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """New ids (B, n), n at most max_new_tokens; see nanovlm.generate. The tokenizer says what ends."""
        if eos_token_id is None and max_new_tokens:
            eos_token_id = self.tokenizer.end_token_ids
        return generate.generate(
            self,
            input_ids,
            images,
            attention_mask,
            max_new_tokens,
            eos_token_id=eos_token_id,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            greedy=greedy,
            repetition_penalty=repetition_penalty,
            stop=stop,
            streamer=streamer,
            generator=generator,
        )

    def prepare(self, image: Any, prompt: str) -> tuple[Tensor, list[Tensor]]:
        """(input_ids (1, T), tiles (n, 3, H, W) of each picture) of a question about no, one or several.

        image: None, a PIL picture, a path, or a list of these.
        """
        from nanovlm.images import get_image_processor, open_picture
        from nanovlm.prompts import question

        sources = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
        opened = [
            open_picture(source) if isinstance(source, str | os.PathLike) else source for source in sources
        ]
        processor = get_image_processor(self.cfg)
        tiles, grids = [], []
        for picture in opened:
            pixel_values, grid = processor(picture)
            tiles.append(pixel_values)
            grids.append(grid)
        device = self.MP.proj.weight.device
        ids = question(self.cfg, self.tokenizer, prompt, grids)
        return torch.tensor([ids], device=device), [stack.to(device) for stack in tiles]

    def answer(self, image: Any, prompt: str, **options: Any) -> str:
        """The answer to a question about pictures. ``options`` are generate's; 100 new tokens unless said."""
        input_ids, pixel_values = self.prepare(image, prompt)
        ids = self.generate(input_ids, pixel_values, **{"max_new_tokens": 100, **options})
        return self.tokenizer.decode(ids[0], skip_special_tokens=True)

    # -- files ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        repo_id_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> VisionLanguageModel:
        """A model from a folder or a Hub repository that holds config.json and safetensors weights.

        dtype: of the parameters, whatever the file holds; None is torch's default, as upstream does.
        Raises SourceNotFound, ConfigError, WeightsError; nothing half-loaded is returned.
        """
        revision = hub.pin(repo_id_or_path, "config.json", revision)
        config = hub.read_json(repo_id_or_path, "config.json", revision=revision)
        cfg, rules, unused = read_config(config, repo_id_or_path, revision)
        stored = checkpoint.Checkpoint(hub.weight_files(repo_id_or_path, revision=revision))
        with torch.device("meta"):
            model = cls(cfg, load_backbone=False)
        dtype = dtype or torch.get_default_dtype()
        report = weights.load(model, stored, rules, ignored=unused, dtype=dtype)
        log.info("%s: %s", stored.where, report)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write config.json and model.safetensors as upstream does, each of them whole or not at all."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        names = weights.own_names(self)
        aliases = {alias: kept for kept, tied in names.items() for alias in tied if alias != kept}
        checkpoint.write_tensors(folder / hub.WEIGHTS, {name: state[name] for name in names}, aliases)
        checkpoint.write_text(folder / "config.json", json.dumps(self.cfg.to_json_dict(), indent=4))

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload the saved folder and a model card; returns the commit's address. Raises UploadError."""
        repo_id = hub.create(repo_id, private)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            checkpoint.write_text(Path(folder, "README.md"), self.model_card(repo_id))
            return hub.upload(folder, repo_id, "Upload a nanoVLM model")

    def model_card(self, repo_id: str) -> str:
        """Markdown for the repository's front page."""
        cfg = self.cfg
        count = sum(parameter.numel() for parameter in self.parameters())
        return (
            "---\nlibrary_name: nanovlm\npipeline_tag: image-text-to-text\ntags:\n- vision-language\n---\n\n"
            f"# {repo_id.rpartition('/')[2]}\n\n"
            f"A nanoVLM of {count:,} parameters: {cfg.vit_model_type or cfg.vision_encoder} reads the "
            f"picture, {cfg.lm_model_type or cfg.language_model} writes the text. "
            f"Files are those of nanoVLM's generation {cfg.generation}.\n\n"
            "```python\nfrom nanovlm import VisionLanguageModel\n\n"
            f'model = VisionLanguageModel.from_pretrained("{repo_id}").eval()\n'
            'print(model.answer("picture.png", "What is this?"))\n```\n'
        )


def read_config(
    config: Any, source: str | os.PathLike, revision: str | None = None
) -> tuple[VLMConfig, Sequence[weights.Rule] | None, Sequence[str]]:
    """(config, rules of its weights, names in its files that are none of ours) of any config.json there is.

    source: the folder or repository it stands in. Raises ConfigError.
    """
    other = registry.checkpoint(config)
    if other is not None:
        return other.config(config, source, revision), other.RULES, other.IGNORED
    cfg, ignored = VLMConfig.from_json_dict(config)
    if ignored:
        log.warning("%s/config.json: ignored %s", source, ", ".join(ignored))
    return cfg, None, ()


def splice(embeds: Tensor, slots: Tensor, features: Tensor) -> Tensor:
    """Put image features (..., D), in order, where ``slots`` (B, T) is True in ``embeds``: a new tensor."""
    return embeds.masked_scatter(slots[..., None], features.to(embeds.dtype))


# May differ between a config and the backbone it starts from: training's choice, or handled when loading.
_FREE = {
    "vit_img_size", "vit_rope_shift", "vit_rope_jitter", "vit_rope_rescale",
    "lm_max_position_embeddings", "lm_base_vocab_size",
}  # fmt: skip


def with_hub_sizes(cfg: VLMConfig, *fields: str) -> VLMConfig:
    """``cfg`` with the sizes that the backbones of ``fields`` state in their own config.json.

    fields: of ("vit_model_type", "lm_model_type"), both when none is named. The size of pictures stays.
    Raises SourceNotFound, ConfigError.
    """
    kinds = {
        "vit_model_type": registry.vision_encoder(cfg.vision_encoder),
        "lm_model_type": registry.language_model(cfg.language_model),
    }
    sizes: dict[str, Any] = {}
    for field in fields or kinds:
        sizes.update(kinds[field].hub_fields(hub.read_json(getattr(cfg, field), "config.json")))
    return cfg.replace(**{name: value for name, value in sizes.items() if name != "vit_img_size"})


def _load_backbone(module: nn.Module, cfg: VLMConfig, field: str) -> None:
    """Fill one part from the repository that ``cfg.<field>`` names. Raises ConfigError where sizes differ."""
    source = getattr(cfg, field)
    if not source:
        return
    kind: Any = type(module)  # RULES and the like are of every backbone (registry.py), not of nn.Module
    revision = hub.pin(source, "config.json", None)
    config = hub.read_json(source, "config.json", revision=revision)
    for name, value in kind.hub_fields(config).items():
        if name not in _FREE and getattr(cfg, name) != value:
            raise ConfigError(
                f"{name}={getattr(cfg, name)!r} in the config, {value!r} in {source}; "
                "use that value, or load_backbone=False"
            )
    stored = checkpoint.Checkpoint(hub.weight_files(source, revision=revision))
    report = weights.load(module, stored, kind.RULES, prefixes=kind.PREFIXES, ignored=kind.IGNORED)
    log.info("%s: %s", source, report)
