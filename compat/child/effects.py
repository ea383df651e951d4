"""Which fields of a config do anything: each is changed a little, and what can be seen is looked at again.

Unusual: looks are compared bit by bit, as digests, because the same sums on one machine give the same bits; a
look that differs from itself says nothing and is left out. A field is done at the first look that differs. What
was made before a field is first read cannot tell it, and is not made again.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib

import torch

from . import hub, probe
from .adapters.configs import config_values, field_names, make_config, noted_reads
from .data import image_processor, image_string_tokens
from .lock import chat_ids
from .protocol import NotSupported
from .stubs import NotInstalled
from .variants import literals

CHANGES, NOTHING, REFUSED, NOT_TRIED = "changes", "nothing", "refused", "not tried"
RAISES = "raises "
PROCESSOR_FIELDS = ("max_img_size", "resize_to_max_side_len", "vit_img_size")
ABSENT = "compat/absent"  # a repository that the stand-in Hub does not have
PICTURES = ((170, 90), (20, 20))  # larger and smaller than what a tiny model makes of them
LOOKS = ("state", "logits", "loss", "training", "tokenizer", "processor", "generation", "long row")
WITH_WEIGHTS = ("logits", "loss", "training", "generation", "long row")
NEW_TOKENS = 4
INSTEAD_OF_NONE = (("int", [1]), ("float", [0.25, 2.0]), ("bool", [True]), ("str", ["x"]))


class Refused(Exception):
    """The config or the model does not take the value."""


class Seen:
    """One config, and what is seen of its model: digests, made when first asked for."""

    def __init__(self, adapter, values, rows, long_row):
        self.tokens = " ".join(map(str, (config_values(adapter.config).get("vlm_extra_tokens") or {}).values()))
        self.adapter = copy.copy(adapter)
        self.adapter.supply_hub_files = lambda config: None  # an absent repository stays absent
        self.rows, self.long_row, self.digests, self.filled = rows, long_row, {}, False
        self.read = set()  # names of fields, once it was looked at from all sides
        try:
            self.adapter.config = make_config(type(adapter.config), values)
        except Exception as error:  # of any type: it is the target's way to say no
            raise Refused from error

    def built(self):
        """Itself, with a model."""
        probe.seed(0)
        try:
            self.adapter.model = self.adapter.build_model(self.adapter.config).to(self.adapter.device).eval()
        except Exception as error:  # of any type: it is the target's way to say no
            raise Refused from error
        return self

    def look(self, what):
        """The digest of one look, or the name of what it raised; "state" before those that need weights."""
        if what not in self.digests:
            if what in WITH_WEIGHTS and not self.filled:
                self.filled = True
                probe.fill(self.adapter.model)
            probe.seed(0)  # whatever was looked at before
            self.digests[what] = outcome(getattr(self, "look_at_" + what.replace(" ", "_")))
        return self.digests[what]

    def only(self, name, other):
        """Whether this config and another Seen's differ in one field at most."""
        with contextlib.suppress(Exception):  # of the target: values that cannot be compared
            mine, others = vars(self.adapter.config), vars(other.adapter.config)
            return mine.keys() == others.keys() and all(v == others[n] for n, v in mine.items() if n != name)
        return False

    def look_at_state(self):
        return state_digest(self.adapter.model)

    def look_at_logits(self):
        with torch.no_grad():
            return digest(self.adapter.logits(self.adapter.batch(self.rows)))

    def look_at_loss(self):
        with torch.no_grad():
            return digest([self.adapter.loss(self.adapter.batch(self.rows))])

    def look_at_training(self):
        model = self.adapter.model.train()
        kept = [buffer.clone() for buffer in model.buffers()]
        try:
            return self.look_at_loss()
        finally:
            model.eval()
            for buffer, before in zip(model.buffers(), kept):  # running means, for one: later looks may be left out
                buffer.data = before

    def look_at_tokenizer(self):
        tokenizer = self.adapter.tokenizer = self.adapter.find_tokenizer()
        if tokenizer is None:
            return "none"
        seen = [len(tokenizer), getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "image_token_id", None)]
        seen.append(outcome(lambda: tokenizer.encode(self.tokens)))  # of the unchanged config
        if hasattr(tokenizer, "apply_chat_template"):
            words = [{"role": "user", "content": "What is this?"}]
            seen.append(outcome(lambda: chat_ids(tokenizer, words)))
        return repr(seen)

    def look_at_processor(self):
        process, seen = image_processor(self.adapter.subject, self.adapter), []
        for number, size in enumerate(PICTURES):
            tiles, grid = process(probe.photograph(number, *size))
            text = outcome(lambda grid=grid: image_string_tokens(self.adapter.subject, self.adapter, grid))
            seen.append((digest([tiles]), grid, text))
        return repr(seen)

    def look_at_generation(self):
        return repr(self.adapter.generate(self.adapter.batch(self.rows), NEW_TOKENS))

    def look_at_long_row(self):
        with torch.no_grad():
            return digest(self.adapter.logits(self.adapter.batch([self.long_row], "none")))


def effects(subject, adapter, rows, long_row):
    """{field: "changes", "raises TYPE" where it only does that, "nothing", "refused" or "not tried"} of every field."""
    values = config_values(adapter.config)
    first, second = (Seen(adapter, values, rows, long_row) for _ in range(2))
    with noted_reads(type(adapter.config)) as read:
        first.built()
        reads = {what: set(read) for what in LOOKS if first.look(what)}  # by the end of each look
        first.read = set(read)
    second.built()
    looks = {what: reads[what] for what in LOOKS if first.look(what) == second.look(what)}
    unseen = first.look("processor") == "unsupported"
    found = {}
    for name in field_names(type(adapter.config)):
        if name not in values:
            found[name] = NOT_TRIED
            continue
        found[name] = effect(adapter, name, values, first, looks)
        if found[name] == NOTHING and is_repository(name, values[name]) and loading_reads(adapter, name):
            found[name] = CHANGES
        if found[name] == NOTHING and fresh_tokenizer_shows(adapter, name, values, first):
            found[name] = CHANGES
        if found[name] == NOTHING and name in PROCESSOR_FIELDS and unseen:
            found[name] = NOT_TRIED
    return found


def effect(adapter, name, values, first, looks):
    """The word for one field. looks: {look: names read by its end}."""
    kind = type(adapter.config)
    tried = [value for value in literals(kind).get(name, ()) if value != values[name]]
    tried = tried or changed_values(name, values[name], getattr(kind, "__annotations__", {}).get(name))
    word = REFUSED if tried else NOT_TRIED
    for value in tried:
        try:
            seen = Seen(adapter, {**values, name: value}, first.rows, first.long_row)
            alone = seen.only(name, first)
            if not alone or name in first.read:
                seen.built()
        except Refused:
            continue
        word = NOTHING if word in (REFUSED, NOTHING) else word
        whole = isinstance(value, int) and not isinstance(value, bool)  # only a count can bound a row's length
        for what, read in looks.items():
            if what == "long row" and not whole:
                continue
            if alone and name not in read:
                continue
            now = seen.look(what)
            if now != first.look(what):
                if not now.startswith(RAISES):
                    return CHANGES
                word = now  # unless another value, or another look, shows more than a failure
    return word


def changed_values(name, value, annotation):
    """Values near ``value`` in the order they are tried; [] when none can be thought of."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):  # twice and half keep to the rules of divisibility that one more breaks
        return [v for v in (value + 1, 2 * value, value // 2) if v not in (value, 0)]
    if isinstance(value, float):
        return [2 * value, value / 2] if value else [0.25]
    if isinstance(value, str):
        return [ABSENT] if is_repository(name, value) else [value + "x"]
    if isinstance(value, dict) and value and all(isinstance(v, str) for v in value.values()):
        last = list(value)[-1]
        return [{**value, last: value[last] + "x"}]
    if value is None:
        return next((values for kind, values in INSTEAD_OF_NONE if kind in str(annotation)), [])
    return []


def is_repository(name, value):
    """Whether a field names something on the Hub; where it is empty, its name has to tell."""
    if not isinstance(value, str):
        return False
    named = value.count("/") == 1 and " " not in value and not value.startswith(("/", "."))
    return named or (not value and name.endswith(("_model_type", "_tokenizer", "_name_or_path")))


def loading_reads(adapter, name):
    """Whether building with pretrained backbones notices that the repository of this field is not there."""
    base = adapter.backbone_config()
    other = copy.copy(adapter)
    other.supply_hub_files(base)
    other.supply_hub_files = lambda config: None

    def built(values):
        config = make_config(type(base), values)
        return state_digest(other.build_model(config, load_backbone=True))

    values = config_values(base)
    return outcome(lambda: built(values)) != outcome(lambda: built({**values, name: ABSENT}))


def fresh_tokenizer_shows(adapter, name, values, first):
    """Whether a text or table tells in a tokenizer that no earlier one was kept for: some keep one for each name."""
    tokenizers = [field for field, value in values.items() if "tokenizer" in field and is_repository(field, value)]
    if name in tokenizers or len(tokenizers) != 1 or not isinstance(values[name], (str, dict)) or not values[name]:
        return False
    texts = []
    for number, value in enumerate((values[name], *changed_values(name, values[name], None))):
        repository = f"compat/fresh-{name}-{number}".replace("_", "-")
        hub.add_repository(repository, "tokenizer")
        try:
            seen = Seen(adapter, {**values, name: value, tokenizers[0]: repository}, first.rows, first.long_row).built()
        except Refused:
            return True
        texts.append(seen.look("tokenizer"))
    return len(set(texts)) > 1


def outcome(function):
    """What a function gives as text, or the type it raises."""
    try:
        return str(function())
    except (NotSupported, NotInstalled):
        return "unsupported"
    except Exception as error:  # of any type: another error is a change that can be seen
        return RAISES + type(error).__name__


def state_digest(model):
    """Names, shapes, flags and fresh values of everything in a model."""
    state = model.state_dict(keep_vars=True)
    listed = [(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in state.items()]
    listed += [(name, tuple(t.shape), str(t.dtype)) for name, t in model.named_buffers()]
    return f"{listed} {digest([*state.values(), *model.buffers()])}"


def digest(tensors):
    """A short text that is equal for tensors equal in shape and in every bit."""
    seen = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        seen.update(repr((tuple(plain.shape), str(plain.dtype))).encode())
        if plain.numel():
            seen.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()
