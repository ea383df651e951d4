"""Pictures as (B, N, 3, S, S), short rows filled up with empty ones, and a grid for each real picture."""

from dataclasses import dataclass

import torch
from backbone.saving import Saved
from backbone.towers import Projector, Text, Vision, after_end, drawn, likeliest, next_token_loss, write
from backbone.words import Words
from models.config import DocConfig
from torch import nn


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


def get_tokenizer(name_or_path):
    return Words(name_or_path)


class DocForConditionalGeneration(Saved, nn.Module):
    config_class = DocConfig

    def __init__(self, config: DocConfig, load_backbone: bool = False):
        super().__init__()
        self.cfg = self.config = config
        self.vision_model, self.text_model, self.connector = Vision(config), Text(config), Projector(config)
        self.end = get_tokenizer(config.lm_tokenizer).eos_token_id

    def _embeds(self, input_ids, pixel_values, image_grid):
        embeds = self.text_model.embed_tokens(input_ids)
        if pixel_values is None:
            return embeds
        flat = pixel_values.flatten(0, 1)
        shown = flat[flat.flatten(1).any(1)]
        if image_grid is not None and int(image_grid.prod(1).sum()) != len(shown):
            raise ValueError(
                f"image_grid speaks of {int(image_grid.prod(1).sum())} tiles, pixel_values hold {len(shown)}"
            )
        features = self.connector(self.vision_model(shown)).flatten(0, 1)
        return embeds.masked_scatter((input_ids == self.config.image_token_id)[..., None], features)

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, image_grid=None, labels=None):
        hidden, _ = self.text_model(self._embeds(input_ids, pixel_values, image_grid), attention_mask)
        logits = self.text_model.head(hidden)
        return Output(None if labels is None else next_token_loss(logits, labels), logits)

    def generate(
        self,
        input_ids,
        pixel_values=None,
        attention_mask=None,
        image_grid=None,
        max_new_tokens=20,
        do_sample=False,
    ):
        """Prompt and answer together, as transformers gives them back."""
        embeds = self._embeds(input_ids, pixel_values, image_grid)
        ids = write(
            self.text_model, embeds, attention_mask, max_new_tokens, drawn if do_sample else likeliest
        )
        return torch.cat((input_ids, after_end(ids, self.end)), 1)
