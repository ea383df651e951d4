"""What all dialects share: a tiny config from the target's own class, a model of it, and its sizes."""

from __future__ import annotations

import functools
import inspect
import os
from json import dumps, loads  # bound now: the target may put others into the module

import torch

from .. import hub, probe
from ..protocol import NotSupported, Unaskable, theirs
from ..readings import jsonable
from .calls import Calls, TargetFault
from .configs import config_default, config_values, field_names, fitting, make_config, signature_names
from .rows import Rows

# Values that satisfy the divisibility rules of every nanoVLM layout at once; fields a config lacks are left out.
TINY = {
    "vit_hidden_dim": 32, "vit_inter_dim": 64, "vit_patch_size": 8, "vit_img_size": 32, "vit_n_heads": 2,
    "vit_n_blocks": 2, "vit_cls_flag": False,
    "lm_hidden_dim": 48, "lm_inter_dim": 96, "lm_n_heads": 4, "lm_n_kv_heads": 2, "lm_n_blocks": 2,
    "lm_max_position_embeddings": 256, "lm_max_length": 256, "lm_base_vocab_size": hub.BASE_VOCABULARY,
    "mp_pixel_shuffle_factor": 2, "mp_image_token_length": 4, "max_img_size": 64, "lm_use_tokens": False,
    "IMAGE_TOKEN_LENGTH": 4, "TOTAL_SEQUENCE_LENGTH": 256,
}  # fmt: skip
FULL_VOCABULARY_FIELDS = ("lm_vocab_size", "vocab_size")


class Adapter(Calls, Rows):
    """Builds one model of the target and speaks to it. A dialect overrides what differs."""

    dialect = ""

    @classmethod
    def speaks(cls, subject) -> bool:
        raise NotImplementedError

    def __init__(self, subject, combo, device):
        self.subject, self.combo, self.device = subject, combo, device
        self.notes = []
        if combo["scale"] == "tiny" and device == "cpu":
            torch.set_num_threads(
                1
            )  # threads of a busy machine wait for each other 30 times longer than tiny sums take
        self.check_combo()
        self.config, self.checkpoint, self.loaded = None, combo.get("checkpoint"), None
        try:
            with theirs():
                self.model = self.first_model().to(device).eval()
        except Exception as error:
            if asks_hub(error):
                raise Unaskable(
                    "the model cannot be built without the Hub: its constructor asks for files that the offline "
                    f"stand-in does not have ({' '.join(str(error).split())[:200]})"
                ) from None
            raise
        self.not_finite = [
            name for name, tensor in self.model.state_dict().items()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        ]  # fmt: skip
        self.tokenizer = self.find_tokenizer()
        self.reset()
        self.image_form = self.find_image_form()

    def reset(self):
        """The model as every question meets it: its own weights, evaluation mode, its hub files in place."""
        self.supply_hub_files(self.config)
        self.fill(self.model)
        self.model.eval()
        probe.seed(0)

    @torch.no_grad()
    def fill(self, model):
        """Give a model of this adapter's config the weights drawn by name, or those of the checkpoint it came from."""
        if self.loaded is None:
            probe.fill(model)
            return
        for name, tensor in model.state_dict().items():
            tensor.copy_(self.loaded[name])
        for parameter in model.parameters():
            parameter.grad = None

    def check_combo(self):
        """Refuse a combo of backbones that the target does not offer."""
        if not offers(self.combo):
            raise NotSupported(f"this model has no {self.combo['vision']} + {self.combo['language']} to choose")

    # -- building ---------------------------------------------------------------------------------------

    def first_model(self):
        """The model of the tiny config, or the one that the combo's checkpoint holds."""
        if not self.checkpoint:
            folder = self.combo.get("config_from")
            self.config = self.read_config(folder) if folder else self.build_config()
            return self.build_model(self.config)
        model = self.load_model(self.checkpoint)
        self.config = config_of(model)
        self.loaded = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return model

    def load_model(self, folder):
        """The model of a saved folder: through the target's from_pretrained, else its config and a strict load."""
        self.supply_hub_names(self.config_json(folder))
        cls = self.subject.model_class
        if hasattr(cls, "from_pretrained"):
            return cls.from_pretrained(folder)
        from safetensors.torch import load_model

        model = self.build_model(self.read_config(folder))
        load_model(model, os.path.join(folder, "model.safetensors"), strict=True)
        return model

    def read_config(self, folder):
        """The config of a saved folder, as upstream reads it: every field is an argument."""
        return self.subject.config_class(**self.config_json(folder))

    @staticmethod
    def config_json(folder):
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as stream:
            return loads(stream.read())

    def save_model(self, folder):
        """Write the model as the target saves it: its save_pretrained, else config.json and its state dict."""
        if hasattr(self.model, "save_pretrained"):
            with theirs():
                self.model.save_pretrained(folder)
            return
        from safetensors.torch import save_model

        os.makedirs(folder, exist_ok=True)
        save_model(self.model, os.path.join(folder, "model.safetensors"))
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as stream:
            stream.write(dumps(jsonable(config_values(self.config))))

    def build_config(self):
        """The target's own config class: its defaults at full scale, else small values for the fields it has."""
        cls = self.subject.config_class
        names = field_names(cls)
        values = {}
        if self.combo["scale"] == "tiny":
            values = {name: value for name, value in TINY.items() if name in names}
            extra = len(config_default(cls, "vlm_extra_tokens") or {})
            if "extra_token_amount" in names:
                values["extra_token_amount"] = max(extra, config_default(cls, "extra_token_amount") or 0)
                extra = values["extra_token_amount"]
            for name in FULL_VOCABULARY_FIELDS:
                if name in names:
                    values[name] = hub.BASE_VOCABULARY + extra
            values.update(self.tiny_values(names))
        if "vlm_load_backbone_weights" in names:
            values["vlm_load_backbone_weights"] = False
        with theirs():
            return make_config(cls, values)

    def changed_config(self, changes):
        """The config with other values."""
        return make_config(type(self.config), {**config_values(self.config), **changes})

    def tiny_values(self, names):
        """More small values, for fields only this dialect has."""
        return {}

    def build_model(self, config, load_backbone=False):
        """The model from ``config``; flags that would load pretrained weights are set to ``load_backbone``."""
        self.supply_hub_files(config)
        parameters = inspect.signature(self.subject.model_class.__init__).parameters
        flags = {
            name: load_backbone for name, p in parameters.items()
            if isinstance(p.default, bool) and any(word in name for word in ("load", "pretrained", "backbone"))
        }  # fmt: skip
        return self.subject.model_class(config, **flags)

    def backbone_config(self):
        """A config whose backbones are on the (stand-in) Hub, for a build with load_backbone=True."""
        return self.build_config()

    def supply_hub_files(self, config):
        """Put what the config names on the Hub into the cache, where it is not there already."""
        self.supply_hub_names(config_values(config))

    def supply_hub_names(self, values):
        for name, role in self.names_on_hub(values):
            hub.add_repository(name, role)

    def hub_names(self, config):
        """[(repository, role)] of everything the config names on the Hub."""
        return self.names_on_hub(config_values(config))

    def names_on_hub(self, values):
        found = {}
        for name, value in values.items():
            if (
                isinstance(value, str)
                and value.count("/") == 1
                and " " not in value
                and not value.startswith(("/", "."))
            ):
                role = (
                    "vision"
                    if name.startswith(("vit", "vision"))
                    else "tokenizer"
                    if "tokenizer" in name
                    else "language"
                )
                if role in ("vision", "language") and "model" not in name and "backbone" not in name:
                    continue
                if found.get(value) in (None, "tokenizer"):
                    found[value] = role
        return sorted(found.items())

    def find_tokenizer(self):
        """The tokenizer the model holds, or the one its get_tokenizer makes; None when there is neither."""
        held = getattr(self.model, "tokenizer", None)
        if held is not None:
            return held
        function = self.subject.function("get_tokenizer")
        if function is None:
            return None
        known = config_values(self.config)
        by_name = {
            "name": known.get("lm_tokenizer"), "extra_special_tokens": known.get("vlm_extra_tokens"),
            "chat_template": known.get("lm_chat_template"), "cfg": self.config, "config": self.config,
            "tokenizer_name": known.get("lm_tokenizer"), "name_or_path": known.get("lm_tokenizer"),
        }  # fmt: skip
        with theirs():
            return function(**fitting(function, by_name))

    def file_tokenizer(self):
        """The target's tokenizer as it makes one from the stand-in's tokenizer.json."""
        return self.tokenizer

    # -- facts ------------------------------------------------------------------------------------------

    @property
    def image_token_id(self):
        """The id that stands for an image in the text, or None when features stand in front of it."""
        value = getattr(self.tokenizer, "image_token_id", None)
        if value is None:
            value = config_values(self.config).get("image_token_id")
        return value

    @property
    def layout(self):
        return "in_front" if self.image_token_id is None else "in_text"

    @property
    def image_size(self):
        return int(config_values(self.config)["vit_img_size"])

    @property
    def image_tokens(self):
        """Features of one picture of one tile in the language model's sequence."""
        values = config_values(self.config)
        grid = values["vit_img_size"] // values["vit_patch_size"]
        return int(values.get("mp_image_token_length") or (grid // values.get("mp_pixel_shuffle_factor", 1)) ** 2)

    @property
    def tokens_per_cell(self):
        """Image tokens of one cell of the grid that the image processor gives."""
        return self.image_tokens

    @property
    def max_positions(self):
        return int(config_values(self.config)["lm_max_position_embeddings"])

    @property
    def vocab_size(self):
        values = config_values(self.config)
        return int(next(values[name] for name in FULL_VOCABULARY_FIELDS if name in values))

    def parameter_of(self, method, names):
        """The first of ``names`` that ``method`` takes, or None."""
        taken = signature_names(getattr(self.subject.model_class, method))
        return next((name for name in names if name in taken), None)

    @functools.cached_property  # reads source, and every batch asks
    def takes(self):
        source = inspect.getsource(self.subject.model_class)
        return {
            "no_image": self.dialect not in ("single_image",),
            "several_images": self.dialect not in ("single_image",),
            "greedy": self.parameter_of("generate", ("greedy", "do_sample")) is not None,
            "attention_mask": self.parameter_of("forward", ("attention_mask",)) is not None,
            # A model that holds a tokenizer knows where an answer ends, whatever its code makes of it.
            "eos": self.dialect != "single_image" or "eos" in source,
        }


def offers(combo):
    """Whether the backbones of a combo are those that every dialect has."""
    return combo["vision"].startswith("siglip") and combo["language"].startswith(("smollm", "llama"))


def config_of(model):
    """The config a model holds."""
    for name in ("cfg", "config"):
        if hasattr(model, name):
            return getattr(model, name)
    raise TargetFault("the loaded model holds no cfg and no config")


def asks_hub(error):
    """Whether an exception came about because a file was not in the offline cache."""
    while error is not None:
        if any(cls.__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled") for cls in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False
