"""Any number of pictures a row, in tiles, their features where the text holds image tokens."""

import torch
from backbone.saving import Saved
from backbone.towers import Projector, Text, Vision, after_end, drawn, likeliest, load, next_token_loss, write
from data.processors import get_tokenizer
from models.config import VLMConfig
from torch import nn


class VisionLanguageModel(Saved, nn.Module):
    config_class = VLMConfig

    def __init__(self, cfg: VLMConfig, load_backbone=True):
        super().__init__()
        self.cfg = cfg
        self.vision_encoder, self.decoder, self.MP = Vision(cfg), Text(cfg), Projector(cfg)
        if load_backbone:
            load(self.vision_encoder, cfg.vit_model_type)
            load(self.decoder, cfg.lm_model_type)
        self.tokenizer = get_tokenizer(cfg.lm_tokenizer, cfg.vlm_extra_tokens, cfg.lm_chat_template)

    def _pictures(self, images):
        flat = [picture for row in images for picture in row]
        return torch.cat(flat) if flat else None

    def _embeds(self, input_ids, images):
        embeds, pictures = self.decoder.embed_tokens(input_ids), self._pictures(images)
        if pictures is None:
            return embeds
        embeds = embeds.clone()
        embeds[input_ids == self.tokenizer.image_token_id] = self.MP(self.vision_encoder(pictures)).flatten(
            0, 1
        )
        return embeds

    def forward(self, input_ids, images, attention_mask=None, targets=None):
        hidden, _ = self.decoder(self._embeds(input_ids, images), attention_mask)
        if targets is None:
            return hidden, None
        logits = self.decoder.head(hidden)
        return logits, next_token_loss(logits, targets)

    def generate(self, input_ids, images, attention_mask=None, max_new_tokens=5, greedy=False):
        pick = likeliest if greedy else drawn
        ids = write(self.decoder, self._embeds(input_ids, images), attention_mask, max_new_tokens, pick)
        return after_end(ids, self.tokenizer.eos_token_id)
