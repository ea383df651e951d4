"""Idefics3-style models: ``pixel_values`` (B, N, 3, S, S), padded with empty pictures, a grid beside them."""

import torch

from .base import Adapter as Base
from .configs import signature_names


class Adapter(Base):
    dialect = "idefics3"
    FORMS = ("5-D tensor",)

    @classmethod
    def speaks(cls, subject):
        return "pixel_values" in signature_names(subject.model_class.forward)

    def images(self, pictures, form=None):
        most = max((len(row) for row in pictures), default=0)
        if not most:
            return None
        empty = torch.zeros(1, 3, self.image_size, self.image_size, device=self.device)
        return torch.stack([torch.cat(row + [empty] * (most - len(row))) for row in pictures])

    def arguments(self, batch, method, form=None):
        arguments = super().arguments(batch, method, form)
        taken = signature_names(getattr(self.subject.model_class, method))
        most = max((len(row) for row in batch.pictures), default=0)
        shown = torch.tensor([[i < len(row) for i in range(most)] for row in batch.pictures], device=self.device)
        if most and "pixel_attention_mask" in taken:
            arguments["pixel_attention_mask"] = shown[:, :, None, None].expand(-1, -1, self.image_size, self.image_size)
        grid = self.parameter_of(method, ("image_grid_thw", "image_grid_hws", "image_grid", "grid"))
        if most and grid:
            cell = torch.tensor([1, 1, 1] if grid == "image_grid_thw" else [1, 1], device=self.device)
            arguments[grid] = cell.expand(sum(len(row) for row in batch.pictures), -1)
        return arguments
