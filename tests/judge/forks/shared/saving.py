"""save_pretrained and from_pretrained of every tree: config.json and model.safetensors in a folder."""

import dataclasses
import json
import os

from safetensors.torch import load_model, save_model


class Saved:
    config_class = None

    def save_pretrained(self, folder):
        os.makedirs(folder, exist_ok=True)
        values = dataclasses.asdict(self.cfg) if dataclasses.is_dataclass(self.cfg) else vars(self.cfg)
        with open(os.path.join(folder, "config.json"), "w") as stream:
            json.dump(values, stream)
        save_model(self, os.path.join(folder, "model.safetensors"))

    @classmethod
    def from_pretrained(cls, folder):
        with open(os.path.join(folder, "config.json")) as stream:
            model = cls(cls.config_class(**json.load(stream)), load_backbone=False)
        load_model(model, os.path.join(folder, "model.safetensors"))
        return model
