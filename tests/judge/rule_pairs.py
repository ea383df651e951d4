"""A pair of facts for every rule, A and B, that fires it and no other. None: the side does not hold the fact."""

from __future__ import annotations

from compat.crossing import LOADS, Crossing

SKETCH = [0.5, -0.25, 0.125, 1.0] * 4
OTHER = [0.5, -0.25, 0.125, 1.01] * 4
KEY = {"shape": [8, 8], "dtype": "float32", "persistent": True, "trainable": True, "tied_to": None}
BUFFER = KEY | {"trainable": False}
PICTURE = {"tiles": 5, "grid": [2, 2], "tile_size": [64, 64], "low": 0.0, "high": 1.0, "image_tokens": 20}
ROW = {"supervised": 6, "labels_text": "A red house.", "image_tokens": 4, "features": 4}
IDS = [[5, 6, 7, 8]]
FIELD = {"type": "int", "default": 3}

# a rule that says what another one did to the numbers cannot fire without that other one
ALONGSIDE = {"NUMERIC.not_comparable": "LOAD.key_reshaped"}


def argument(position, kind="positional_or_keyword", **default):
    return {"position": position, "kind": kind, **default}


TENSOR = {"shape": [8], "dtype": "float32"}
CALL = {"signature.forward.input_ids": argument(0), "signature.forward.images": argument(1, default=None)}
FLAG = {"default": 1, "type": "int", "action": None}
STAYS = {"script.train.py.--stays": FLAG}


def at(path, old, new, **rest):
    """One changed fact among `rest` that both hold; dots in a keyword's name are written as __."""
    held = {name.replace("__", "."): value for name, value in rest.items()}
    sides = [held | ({} if value is None else {path: value}) for value in (old, new)]
    return sides[0], sides[1]


def case(name):
    plain = {"numbers.fp32.logits": SKETCH, f"numbers.{name}.logits": SKETCH}
    return plain, plain | {f"numbers.{name}.logits": OTHER}


def one(name, value):
    """A call in A and the same with one argument changed, added or (None) gone."""
    return CALL, {path: fact for path, fact in {**CALL, name: value}.items() if fact is not None}


def tie(old, new):
    return at("state.head.weight", KEY | {"tied_to": old}, KEY | {"tied_to": new}, state__embed__weight=KEY)


PAIRS = {
    "LOAD.key_removed": at("state.norm.weight", KEY, None, state__embed__weight=KEY),
    "LOAD.key_renamed": ({"state.blocks.0.q_proj.weight": KEY}, {"state.blocks.0.query.weight": KEY}),
    "LOAD.key_required": at("state.norm.weight", None, KEY, state__embed__weight=KEY),
    "LOAD.tied_key_added": at("state.head.weight", None, KEY | {"tied_to": "embed.weight"}, state__embed__weight=KEY),
    "LOAD.key_reshaped": at("state.norm.weight", KEY, KEY | {"shape": [9, 8]}),
    "LOAD.dtype": at("state.norm.weight", KEY, KEY | {"dtype": "bfloat16"}),
    "LOAD.persistence": at("state.inv_freq", BUFFER, BUFFER | {"persistent": False}),
    "LOAD.tie_broken": tie("embed.weight", None),
    "LOAD.tie_made": tie(None, "embed.weight"),
    "LOAD.tie_moved": tie("embed.weight", "other.weight"),
    "LOAD.saved_key_removed": at("saved.norm.weight", TENSOR, None, state__norm__weight=KEY),
    "LOAD.saved_key_added": at("saved.norm.weight", None, TENSOR, state__norm__weight=KEY),
    "LOAD.saved_tensor": at("saved.norm.weight", TENSOR, TENSOR | {"dtype": "float16"}),
    "LOAD.saved_alias": at("saved_alias.embed.weight", "head.weight", "lm_head.weight"),
    "LOAD.config_field_removed": at("config.field.depth", FIELD, None, config__field__width=FIELD),
    "LOAD.config_field_required": at("config.field.depth", FIELD, {"type": "int"}),
    "LOAD.value_refused": at("config.effect.depth", "changes", "refused"),
    "LOAD.value_accepted": at("config.effect.depth", "refused", "changes"),
    "LOAD.backbone_missing": at(
        "backbones", {"loaded": 9, "missing": []}, {"loaded": 8, "missing": ["vision.norm.weight"]}
    ),
    "LOAD.backbone_found": at(
        "backbones", {"loaded": 8, "missing": ["vision.norm.weight"]}, {"loaded": 9, "missing": []}
    ),
    "LOAD.backbone_weights": at("backbone_weights.vision.norm.weight", SKETCH, OTHER),
    "NUMERIC.logits": at("numbers.fp32.logits", SKETCH, OTHER),
    "NUMERIC.bf16": at("numbers.bf16.logits", SKETCH, [2 * x for x in SKETCH], numbers__fp32__logits=SKETCH),
    "NUMERIC.padding": case("left_padded"),
    "NUMERIC.text_only": case("text_only"),
    "NUMERIC.images": case("two_images"),
    "NUMERIC.small_values": case("small_embeddings"),
    "NUMERIC.train_mode": case("train_mode"),
    "NUMERIC.long_sequences": case("past_longest"),
    "NUMERIC.packing": case("packed"),
    "NUMERIC.choices": case("choice pool=pool_max"),
    "NUMERIC.wide_pictures": case("wide_picture"),
    "NUMERIC.loss": at("numbers.fp32.loss", 2.5, 2.6, numbers__fp32__logits=SKETCH),
    "NUMERIC.greedy": at(
        "greedy.image", {"ids": IDS, "decided": [[0, 2]]}, {"ids": [[5, 6, 9, 8]], "decided": [[0, 2]]}
    ),
    "NUMERIC.decoding": at("greedy.image.steps", SKETCH, OTHER, numbers__fp32__logits=SKETCH),
    "NUMERIC.sampling": at("sampling.top_p.support", 12, 13, numbers__fp32__logits=SKETCH),
    "NUMERIC.loss_precision": at("numbers.bf16.loss_dtype", "float32", "bfloat16"),
    "NUMERIC.not_comparable": (
        {"state.w": KEY, "numbers.fp32.logits": SKETCH},
        {"state.w": KEY | {"shape": [9, 8]}, "numbers.fp32.logits": OTHER},
    ),
    "API.refusal": at("refusals.generate.negative_length", "PromptError", "accepted"),
    "API.config_field_added": at("config.field.depth", None, FIELD, config__field__width=FIELD),
    "API.config_default": at("config.field.depth", FIELD, FIELD | {"default": 4}),
    "API.config_type": at("config.field.depth", FIELD, FIELD | {"type": "str"}),
    "API.derived_removed": at("config.derived.head_dim", 64, None, config__derived__width=8),
    "API.derived_value": at("config.derived.head_dim", 64, 32),
    "API.field_stopped_acting": at("config.effect.depth", "changes", "nothing"),
    "API.field_acts": at("config.effect.depth", "nothing", "changes"),
    "API.value_fails": at("config.effect.depth", "changes", "raises TypeError"),
    "API.field_unread": at("config.effect.depth", None, "nothing", config__effect__width="changes"),
    "API.script_removed": at("script.generate.py.--device", FLAG, None, **{"script__train__py__--lr": FLAG}),
    "API.flag_removed": ({**STAYS, "script.train.py.--lr": FLAG}, STAYS),
    "API.flag_added": (STAYS, {**STAYS, "script.train.py.--lr": FLAG}),
    "API.flag_default": at("script.train.py.--lr", FLAG, FLAG | {"default": 2}),
    "API.flag_type": at("script.train.py.--lr", FLAG, FLAG | {"type": "float"}),
    "API.method_removed": at("signature.push_to_hub.repo", argument(0), None, signature__generate__ids=argument(0)),
    "API.method_added": at("signature.push_to_hub.repo", None, argument(0), signature__generate__ids=argument(0)),
    "API.argument_removed": one("signature.forward.images", None),
    "API.argument_renamed": (
        CALL,
        {"signature.forward.input_ids": argument(0), "signature.forward.pixel_values": argument(1, default=None)},
    ),
    "API.argument_required": one("signature.forward.grid", argument(2)),
    "API.argument_inserted": (
        CALL,
        {
            "signature.forward.input_ids": argument(0),
            "signature.forward.grid": argument(1, default=None),
            "signature.forward.images": argument(2, default=None),
        },
    ),
    "API.argument_moved": (
        CALL,
        {"signature.forward.images": argument(0, default=None), "signature.forward.input_ids": argument(1)},
    ),
    "API.argument_added": one("signature.forward.grid", argument(2, default=None)),
    "API.argument_kind": one("signature.forward.images", argument(None, "keyword_only", default=None)),
    "API.argument_default": one("signature.forward.images", argument(1, default=0)),
    "API.returns_removed": at("returns.forward", {"type": "tuple", "items": []}, None, numbers__fp32__loss=1.0),
    "API.returns_arity": at("returns.forward", {"type": "tuple", "items": [1, 2]}, {"type": "tuple", "items": [1]}),
    "API.returns_type": at("returns.forward", {"type": "tuple", "items": [1]}, {"type": "list", "items": [1]}),
    "API.returns_shape": at(
        "returns.generate", {"type": "Tensor", "shape": ["B", "N"]}, {"type": "Tensor", "shape": ["B", "K+T"]}
    ),
    "API.error_appeared": (
        {"numbers.past_longest.logits": SKETCH, "numbers.past_longest.loss": 2.0},
        {"numbers.past_longest.error": "IndexError"},
    ),
    "API.error_gone": at("processor.64x64", {"error": "TypeError", "message": "no size"}, PICTURE),
    "API.error_type": at("numbers.past_longest.error", "ValueError", "IndexError"),
    "API.support_lost": (
        {"saved.norm.weight": TENSOR},
        {"saved": {"unsupported": "has no save_pretrained"}},
    ),
    "API.support_gained": at("greedy.uncached", {"unsupported": "no switch"}, {"ids": IDS, "decided": [[0]]}),
    "API.unnamed_fact": at("weather.today", "dry", "wet"),
    "DATA.special_token_removed": at("tokenizer.special.image_token", ["<image>", 7], None, data__0=ROW),
    "DATA.special_token_added": at("tokenizer.special.image_token", None, ["<image>", 7], data__0=ROW),
    "DATA.special_token_moved": at("tokenizer.special.image_token", ["<image>", 7], ["<image>", 8]),
    "DATA.special_token_text": at("tokenizer.special.image_token", ["<image>", 7], ["<|image|>", 7]),
    "DATA.tokenization": at("tokenizer.text.1", [1, 2, 3], [1, 23]),
    "DATA.template": at("tokenizer.chat.0", [1, 2, 3], [1, 2, 4]),
    "DATA.tiles": at("processor.97x60", PICTURE, PICTURE | {"grid": [4, 1], "image_tokens": 24}),
    "DATA.tile_size": at("processor.97x60", PICTURE, PICTURE | {"tile_size": [32, 32]}),
    "DATA.pixel_range": at("processor.97x60", PICTURE, PICTURE | {"low": -1.0}),
    "DATA.pixels": at("processor.97x60.pixels", SKETCH, OTHER, processor__97x60=PICTURE),
    "DATA.image_string": at("processor.97x60", PICTURE, PICTURE | {"image_tokens": 21}),
    "DATA.no_labels": at("data.0", ROW, ROW | {"supervised": 0, "labels_text": ""}),
    "DATA.labels": at("data.0", ROW, ROW | {"labels_text": "red house.", "supervised": 5}),
    "DATA.packing": at("packed.0", {"documents": [[1, 9], [2, 8]]}, {"documents": [[1, 17]]}, data__0=ROW),
    "DATA.features_mismatch": at("data.0", ROW, ROW | {"image_tokens": 5}),
    "DATA.image_tokens": at("data.0", ROW, ROW | {"image_tokens": 16, "features": 16}),
    "TRAIN.field_removed": at("train_config.field.lr", FIELD, None, train_config__field__steps=FIELD),
    "TRAIN.field_required": at("train_config.field.lr", FIELD, {"type": "int"}),
    "TRAIN.field_added": at("train_config.field.lr", None, FIELD, train_config__field__steps=FIELD),
    "TRAIN.field_type": at("train_config.field.lr", FIELD, FIELD | {"type": "str"}),
    "TRAIN.default": at("train_config.field.lr", FIELD, FIELD | {"default": 4}),
    "TRAIN.trainable": at("state.norm.weight", KEY, KEY | {"trainable": False}),
    "TRAIN.init": at("init.norm.weight", [0.0, 0.02], [0.0, 1.0], state__norm__weight=KEY),
    "TRAIN.gradient_lost": at("gradient.norm.weight", 0.5, 0.0, gradient__embed__weight=2.0),
    "TRAIN.gradient_found": at("gradient.norm.weight", 0.0, 0.5, gradient__embed__weight=2.0),
    "TRAIN.gradient": at("gradient.norm.weight", 0.5, 0.6, gradient__embed__weight=2.0),
    "TRAIN.dropout": at("dropout.lm_dropout.train.decoder.blocks.0.mlp", 0.9, 1.3),
    "TRAIN.derived": at("train_config.derived.learning_rates", {"MP": 0.005}, {"MP": 0.05}),
    "TRAIN.loss_curve": at("loss_curve", [3.0, 2.5, 2.1], [3.0, 2.6, 2.3], numbers__fp32__loss=3.0),
    "COST.parameters": at("cost.parameters", 1000, 1001),
    "COST.fewer_parameters": at("cost.parameters", 1000, 999),
    "COST.flops": at("cost.flops.forward.total", 1000, 1001),
    "COST.fewer_flops": at("cost.flops.forward.total", 1000, 999),
    "COST.peak": at("cost.peak.train", 10_000_000, 10_300_000),
    "COST.lower_peak": at("cost.peak.train", 10_000_000, 9_700_000),
    "LOAD.keys_read": ({"state.q.weight": KEY, "crossing.checkpoint": LOADS}, {"crossing.checkpoint": LOADS}),
    "LOAD.checkpoint_refused": at("crossing.checkpoint", LOADS, "refused: OSError: no optimizer.bin"),
    "LOAD.checkpoint_partial": at("crossing.checkpoint", LOADS, "not from the file: norm.weight"),
    "LOAD.config_refused": at("crossing.config", "read", "refused: ValueError: vit_ln_eps"),
    "LOAD.config_value": at("crossing.config.vit_ln_eps", 1e-6, 1e-5),
    "LOAD.back_refused": at("crossing.back.checkpoint", LOADS, "refused: TypeError: 'new_field'"),
    "LOAD.promise_broken": at("crossing.back.checkpoint", LOADS, "refused: TypeError: 'new_field'"),
    "NUMERIC.fresh_model": at("numbers.fp32.logits", SKETCH, OTHER),
    "API.old_call_fails": at("crossing.call.forward.least", "works", "TypeError: a mask is needed"),
    "API.old_calls_work": (
        CALL | {"crossing.call.forward.keywords": "works"},
        {"signature.forward.input_ids": argument(0), "crossing.call.forward.keywords": "works"},
    ),
}
# what a crossing settles: {rule: the crossing beside its pair}
CROSSINGS = {
    "LOAD.keys_read": Crossing({"crossing.checkpoint": LOADS}, {"crossing.checkpoint": LOADS}),
    "LOAD.promise_broken": Crossing({}, {}, promised=True),
    "NUMERIC.fresh_model": Crossing({}, {}, measured={"numbers.fp32.logits": SKETCH}),
    "API.old_calls_work": Crossing(
        {"crossing.call.forward.keywords": "works"}, {"crossing.call.forward.keywords": "works"}
    ),
}
