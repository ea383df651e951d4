"""What all dialects share: a tiny config from the target's own class, calls by its own signature.

Shapes: B rows, T padded length, V vocabulary. A probe row's ``tokens`` hold -1 where an image stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect

import torch

from .. import hub, probe
from ..protocol import NotSupported, Unaskable, theirs

# Values that satisfy the divisibility rules of every nanoVLM layout at once; fields a config lacks are left out.
TINY = {
    "vit_hidden_dim": 32, "vit_inter_dim": 64, "vit_patch_size": 8, "vit_img_size": 32, "vit_n_heads": 2,
    "vit_n_blocks": 2, "vit_cls_flag": False,
    "lm_hidden_dim": 48, "lm_inter_dim": 96, "lm_n_heads": 4, "lm_n_kv_heads": 2, "lm_n_blocks": 2,
    "lm_max_position_embeddings": 256, "lm_max_length": 256, "lm_base_vocab_size": hub.BASE_VOCABULARY,
    "mp_pixel_shuffle_factor": 2, "mp_image_token_length": 4, "max_img_size": 64, "lm_use_tokens": False,
}  # fmt: skip
FULL_VOCABULARY_FIELDS = ("lm_vocab_size", "vocab_size")


class TargetFault(Exception):
    """The target answered, but not as its own interface promises."""

    _compat_raised_by_target = True


@dataclasses.dataclass
class Batch:
    """Rows as tensors. ``text`` lists, a row, where its text tokens lie in the padded sequence."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    targets: torch.Tensor | None
    pictures: list  # a row: list of (1, 3, S, S)
    text: list


class Adapter:
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
        self.config = self.build_config()
        try:
            with theirs():
                self.model = self.build_model(self.config).to(device).eval()
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
        """The model as every question meets it: weights drawn by name, evaluation mode, its hub files in place."""
        self.supply_hub_files(self.config)
        probe.fill(self.model)
        self.model.eval()
        torch.manual_seed(0)

    def check_combo(self):
        """Refuse a combo of backbones that the target does not offer."""
        vision, language = self.combo["vision"], self.combo["language"]
        if not vision.startswith("siglip") or not language.startswith(("smollm", "llama")):
            raise NotSupported(f"this model has no {vision} + {language} to choose")

    # -- building ---------------------------------------------------------------------------------------

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
        for name, role in self.hub_names(config):
            hub.add_repository(name, role)

    def hub_names(self, config):
        """[(repository, role)] of everything the config names on the Hub."""
        found = {}
        for name, value in config_values(config).items():
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

    @property
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

    # -- batches ----------------------------------------------------------------------------------------

    def batch(self, rows, padding="left"):
        """Rows to a Batch on the model's device, padded on the side asked for."""
        expanded = [self.expand(row) for row in rows]
        longest = max(len(ids) for ids, _, _ in expanded)
        needs = any(len(ids) < longest for ids, _, _ in expanded)
        pad = self.pad_id
        ids_rows, label_rows, mask_rows, text = [], [], [], []
        for ids, labels, where in expanded:
            gap = longest - len(ids)
            left, right = (0, gap) if padding == "right" else (gap, 0)
            ids_rows.append([pad] * left + ids + [pad] * right)
            label_rows.append([-100] * left + labels + [-100] * right)
            mask_rows.append([0] * left + [1] * len(ids) + [0] * right)
            text.append([left + i for i in where])
        labelled = any(label != -100 for row in label_rows for label in row)
        # Rows of one length need no mask; a model that takes one gets it all the same, as training gives it.
        masked = needs or (padding != "none" and self.takes["attention_mask"])
        mask = torch.tensor(mask_rows, device=self.device) if masked else None
        return Batch(
            torch.tensor(ids_rows, device=self.device),
            mask,
            torch.tensor(label_rows, device=self.device) if labelled else None,
            [[probe.picture(k, self.image_size)[None].to(self.device) for k in row.get("images", ())] for row in rows],
            text,
        )

    def expand(self, row):
        """(ids, labels, positions of the text tokens) of one probe row in this layout."""
        tokens, labels = row["tokens"], row.get("labels") or [-100] * len(row["tokens"])
        if tokens.count(-1) != len(row.get("images", ())):
            raise ValueError(f"a row with {tokens.count(-1)} image places and {len(row.get('images', ()))} images")
        ids, targets, where = [], [], []
        for token, label in zip(tokens, labels):
            if token == -1:
                count = 0 if self.layout == "in_front" else self.image_tokens
                ids += [self.image_token_id] * count
                targets += [-100] * count
            else:
                where.append(len(ids))
                ids.append(token)
                targets.append(label)
        return ids, targets, where

    @property
    def pad_id(self):
        value = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if value is None else int(value)

    def images(self, pictures, form=None):
        """Pictures a row, in the form this target takes them."""
        flat = [picture for row in pictures for picture in row]
        form = form or self.image_form
        if form == "nested lists":
            return pictures
        if form == "list of 4-D tensors":
            return flat
        if form == "list of 3-D tensors":
            return [picture[0] for picture in flat]
        return torch.cat(flat) if flat else None

    FORMS = ("nested lists", "list of 4-D tensors", "one tensor", "list of 3-D tensors")

    def find_image_form(self):
        """The first form of pictures that a forward pass accepts; the dialect's own when none does."""
        ids = [i for i in range(8)][:3]
        batch = self.batch([{"tokens": [-1, *ids], "images": [0]}], "none")
        for form in self.FORMS:
            try:
                with torch.no_grad():
                    self.call(batch, form=form)
                return form
            except Exception:  # the target's; the checks that follow report it with its own words
                continue
        return self.FORMS[0]

    # -- calls ------------------------------------------------------------------------------------------

    IMAGE_NAMES = ("images", "image", "pixel_values")
    LABEL_NAMES = ("targets", "labels")

    def arguments(self, batch, method, form=None):
        """Keyword arguments for ``forward`` or ``generate`` by the target's own names."""
        taken = signature_names(getattr(self.subject.model_class, method))
        arguments = {
            "input_ids": batch.input_ids,
            self.parameter_of(method, self.IMAGE_NAMES): self.images(batch.pictures, form),
        }
        if batch.attention_mask is not None:
            if "attention_mask" not in taken:
                raise NotSupported(
                    f"{method} takes no attention_mask, so rows of different length cannot share a batch"
                )
            arguments["attention_mask"] = batch.attention_mask
        return arguments

    def call(self, batch, targets=None, form=None):
        """(logits or hidden states, loss) of one forward call."""
        arguments = self.arguments(batch, "forward", form)
        if targets is not None:
            name = self.parameter_of("forward", self.LABEL_NAMES)
            if name is None:
                raise NotSupported("forward takes neither targets nor labels")
            arguments[name] = targets
        with theirs():
            out = self.model(**arguments)
        return unpack(out)

    def logits(self, batch):
        """[(T_text, V) float32] a row: logits at the row's own text tokens."""
        out, _ = self.call(batch)
        if out.shape[-1] != self.vocab_size:
            out = self.head()(out)
        if out.dim() != 3 or out.shape[0] != batch.input_ids.shape[0]:
            raise TargetFault(
                f"forward without targets gave {tuple(out.shape)} for input_ids {tuple(batch.input_ids.shape)}"
            )
        offset = out.shape[1] - batch.input_ids.shape[1]
        if offset not in (0, self.image_tokens):
            raise TargetFault(f"forward gave {out.shape[1]} positions for {batch.input_ids.shape[1]} ids")
        return [out[i, [offset + t for t in where]].float() for i, where in enumerate(batch.text)]

    def head(self):
        """The module that turns hidden states into logits."""
        for name, module in self.model.named_modules():
            if name.split(".")[-1] in ("head", "lm_head") and isinstance(module, torch.nn.Linear):
                return module
        raise TargetFault(f"no output layer 'head' of {self.vocab_size} rows turns hidden states into logits")

    def loss(self, batch):
        """The loss of a batch with targets, as a scalar tensor with its graph."""
        _, loss = self.call(batch, batch.targets)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise TargetFault(f"forward with targets returned {type(loss).__name__} instead of a scalar loss")
        return loss

    def generate(self, batch, max_new_tokens, greedy=True, seed=0, eos=None):
        """[[new ids]] a row."""
        arguments = self.arguments(batch, "generate")
        taken = signature_names(self.subject.model_class.generate)
        if not {"max_new_tokens", "kwargs"} & set(taken):
            raise NotSupported("generate takes no max_new_tokens")
        arguments["max_new_tokens"] = max_new_tokens
        choose_greedily = contextlib.nullcontext()
        if "greedy" in taken:
            arguments["greedy"] = greedy
        elif "do_sample" in taken:
            arguments["do_sample"] = not greedy
        elif greedy:  # early versions only sample: the likeliest draw is the greedy choice
            choose_greedily = likeliest_draw()
        if eos is not None and "eos_token_id" in taken:
            arguments["eos_token_id"], eos = eos, None
        torch.manual_seed(seed)
        with self.ending_at(eos), choose_greedily, theirs():
            out = self.model.generate(**arguments)
        return self.new_tokens(out, batch, max_new_tokens)

    def new_tokens(self, out, batch, max_new_tokens):
        """Strip a repeated prompt; a list of lists of ids."""
        if not isinstance(out, torch.Tensor) or out.dim() != 2 or out.shape[0] != batch.input_ids.shape[0]:
            shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise TargetFault(f"generate returned {shape} instead of ids of shape ({batch.input_ids.shape[0]}, new)")
        prompt = batch.input_ids.shape[1]
        if out.shape[1] > max_new_tokens and torch.equal(out[:, :prompt], batch.input_ids):
            out = out[:, prompt:]
        return out.tolist()

    @contextlib.contextmanager
    def ending_at(self, eos):
        """Make ``eos`` the end-of-sequence id inside the block."""
        if eos is None:
            yield
            return
        if not self.takes["eos"]:
            raise NotSupported("generate of this version knows no end-of-sequence token")
        if self.tokenizer is None or getattr(self.model, "tokenizer", None) is not self.tokenizer:
            raise NotSupported("the model holds no tokenizer to set an end-of-sequence token on")
        if not hasattr(self.tokenizer, "eos_token"):
            raise NotSupported("the model's tokenizer has no eos_token to set")
        before, token = self.tokenizer.eos_token, self.tokenizer.convert_ids_to_tokens(eos)
        if token is None:
            raise NotSupported(f"the tokenizer has no token for id {eos}, so it cannot be the end of a text")
        self.tokenizer.eos_token = token
        try:
            yield
        finally:
            self.tokenizer.eos_token = before


def asks_hub(error):
    """Whether an exception came about because a file was not in the offline cache."""
    while error is not None:
        if any(cls.__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled") for cls in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def likeliest_draw():
    """Replace random draws by the likeliest index."""
    real = torch.multinomial
    torch.multinomial = lambda probabilities, *a, **k: probabilities.argmax(-1, keepdim=True)
    try:
        yield
    finally:
        torch.multinomial = real


def unpack(out):
    """(first output, loss) of a tuple, dict, ModelOutput or tensor."""
    if isinstance(out, torch.Tensor):
        return out, None
    if isinstance(out, dict) or hasattr(out, "logits"):
        get = out.get if isinstance(out, dict) else lambda name: getattr(out, name, None)
        return get("logits"), get("loss")
    if isinstance(out, (tuple, list)) and out:
        pair = list(out[:2]) + [None]
        if isinstance(pair[0], torch.Tensor) and pair[0].dim() == 0:  # (loss, logits)
            pair[0], pair[1] = pair[1], pair[0]
        return pair[0], pair[1]
    raise TargetFault(f"forward returned {type(out).__name__}")


def signature_names(function):
    """Names of the parameters a method takes, without self."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


def fitting(function, by_name):
    """The entries of ``by_name`` that ``function`` takes. Raises NotSupported for a required one it lacks."""
    chosen = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name == "self":
            continue
        if by_name.get(name) is not None:
            chosen[name] = by_name[name]
        elif parameter.default is parameter.empty:
            raise NotSupported(
                f"{getattr(function, '__qualname__', function)} wants '{name}', which no probe can supply"
            )
    return chosen


def field_names(cls):
    """Field names of a config class: dataclass fields, else constructor arguments and class attributes."""
    if dataclasses.is_dataclass(cls):
        return [f.name for f in dataclasses.fields(cls)]
    names = [n for n in inspect.signature(cls.__init__).parameters if n not in ("self", "args", "kwargs")]
    plain = [n for n, v in vars(cls).items() if not n.startswith("_") and not callable(v)]
    return list(dict.fromkeys(names + plain + list(vars(blank(cls)))))


def blank(cls):
    """An instance with all defaults."""
    with theirs():
        return cls()


def config_default(cls, name):
    """A field's default, or None when it has none."""
    if dataclasses.is_dataclass(cls):
        for f in dataclasses.fields(cls):
            if f.name == name:
                return (
                    f.default_factory()
                    if f.default_factory is not dataclasses.MISSING
                    else (None if f.default is dataclasses.MISSING else f.default)
                )
        return None
    return getattr(blank(cls), name, None)


def make_config(cls, values):
    """An instance of ``cls`` with ``values``: through its constructor where it takes them, else by attribute."""
    taken = inspect.signature(cls.__init__).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    config = cls(**{name: value for name, value in values.items() if free or name in taken})
    for name, value in values.items():
        if getattr(config, name, None) != value:
            setattr(config, name, value)
    return config


def config_values(config):
    """{field: value} of a config instance."""
    if dataclasses.is_dataclass(config):
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {name: getattr(config, name) for name in field_names(type(config)) if hasattr(config, name)}
