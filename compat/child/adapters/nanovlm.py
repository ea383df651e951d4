"""This project's own model: presets, a frozen config, a tokenizer that is no part of the model.

Recognised by a ``preset`` function beside the config class, not by name.
"""

from .. import hub
from ..protocol import NotSupported, theirs
from .base import TINY, offers
from .base import Adapter as Base
from .configs import config_values, signature_names


class Adapter(Base):
    dialect = "nanovlm"

    @classmethod
    def speaks(cls, subject):
        return "images" in signature_names(subject.model_class.forward) and subject.function("preset") is not None

    def check_combo(self):
        if not self.combo.get("preset"):
            raise NotSupported(f"{self.combo['name']} has no preset at {self.combo['scale']} scale")

    def build_config(self):
        """The preset; where other dialects offer the combo too, at their tiny sizes, so that both can be compared."""
        with theirs():
            config = self.subject.function("preset")(self.combo["preset"])
            if self.combo["scale"] != "tiny" or not offers(self.combo):
                return config
            sizes = {name: value for name, value in TINY.items() if name in config_values(config)}
            if config.max_img_size == config.vit_img_size:  # one square picture, not tiles
                sizes["max_img_size"] = sizes["vit_img_size"]
            return config.replace(**sizes, lm_tokenizer="compat/stand-in")

    def changed_config(self, changes):
        """The config with other values; the count of image tokens and what else hangs on them follow."""
        with theirs():
            return self.config.replace(**changes)

    def read_config(self, folder):
        with theirs():
            return self.subject.config_class.from_json_dict(self.config_json(folder))[0]

    def backbone_config(self):
        """The preset at the sizes of the stand-in's backbones, under names it answers to."""
        vision, language = self.config.vision_encoder, self.config.language_model
        names = {"vit_model_type": f"compat/{vision}", "lm_model_type": f"compat/{language}"}
        eyes, _ = hub.backbone(names["vit_model_type"], "vision")
        words, _ = hub.backbone(names["lm_model_type"], "language")
        with theirs():
            files = {
                **self.subject.function("vision_encoder")(vision).hub_fields(eyes),
                **self.subject.function("language_model")(language).hub_fields(words),
                **names,
            }
            return self.config.replace(**files, max_img_size=files["vit_img_size"])

    def hub_readers(self):
        """[(role, function of a backbone's config.json, the stand-in's)]."""
        kinds = ("vision", "vision_encoder"), ("language", "language_model")
        names = [(role, kind, getattr(self.config, kind)) for role, kind in kinds]
        given = {role: own_part(hub.backbone(f"compat/{name}", role)[0], role) for role, _, name in names}
        return [(role, self.subject.function(kind)(name).hub_fields, given[role]) for role, kind, name in names]

    @property
    def tokens_per_cell(self):
        return self.config.tokens_per_cell

    def file_tokenizer(self):
        hub.add_repository("compat/stand-in", "tokenizer")
        with theirs():
            return self.subject.function("get_tokenizer")("compat/stand-in")


def own_part(config, role):
    """What a config.json says of one backbone, where it speaks of two."""
    return config.get(f"{role}_config", config)
