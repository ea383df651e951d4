"""Features stand in front of the text; generation draws, and reads everything again for each token."""

import torch
from backbone.saving import Saved
from backbone.towers import Projector, Text, Vision, drawn, load, next_token_loss, write
from models.config import VLMConfig
from torch import nn


class VisionLanguageModel(Saved, nn.Module):
    config_class = VLMConfig

    def __init__(self, cfg, load_backbone=True):
        super().__init__()
        self.cfg = cfg
        self.vision_encoder, self.decoder, self.MP = Vision(cfg), Text(cfg), Projector(cfg)
        if load_backbone:
            load(self.vision_encoder, cfg.vit_model_type)
            load(self.decoder, cfg.lm_model_type)

    def _sequence(self, input_ids, image, attention_mask):
        features = self.MP(self.vision_encoder(image))
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask.new_ones(features.shape[:2]), attention_mask), 1)
        return (
            torch.cat((features, self.decoder.embed_tokens(input_ids)), 1),
            attention_mask,
            features.shape[1],
        )

    def forward(self, input_ids, image, attention_mask=None, targets=None):
        embeds, attention_mask, front = self._sequence(input_ids, image, attention_mask)
        hidden, _ = self.decoder(embeds, attention_mask)
        if targets is None:
            return hidden, None
        logits = self.decoder.head(hidden)[:, front:]
        return logits, next_token_loss(logits, targets)

    def generate(self, input_ids, image, attention_mask=None, max_new_tokens=5):
        embeds, attention_mask, _ = self._sequence(input_ids, image, attention_mask)
        return write(self.decoder, embeds, attention_mask, max_new_tokens, drawn, cached=False)
