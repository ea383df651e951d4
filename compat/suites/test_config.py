"""The model's config: defaults resolve to their declared types, agree with each other, and survive saving."""

import pytest

from compat.suites.probes import named
from compat.suites.typed import mismatch

CHECK = "Config Compatibility"

# (divided, divisor, why). Checked where a config has both fields; head_dim apart, which lifts the first rule.
DIVISIBLE = (
    ("lm_hidden_dim", "lm_n_heads", "each attention head gets hidden / heads dimensions"),
    ("lm_n_heads", "lm_n_kv_heads", "each key/value head serves heads / kv_heads query heads"),
    ("vit_hidden_dim", "vit_n_heads", "each attention head gets hidden / heads dimensions"),
    ("vit_img_size", "vit_patch_size", "a picture must be a whole number of patches"),
)


def defaults(facts) -> dict:
    return {name: field["default"] for name, field in facts["config"].items()}


def test_every_default_has_its_declared_type(facts):
    assert facts["config"], f"{facts['config_class']} has no fields: nothing describes the model"
    wrong = [
        f"{name}: {field['type']} = {field['default']!r}"
        for name, field in facts["config"].items()
        if mismatch(field["type"], field["default"])
    ]
    assert not wrong, f"{facts['config_class']} declares one type and defaults to another: {named(wrong)}"


def test_sizes_divide_as_the_layers_need(facts):
    values = defaults(facts)
    rules = [rule for rule in DIVISIBLE if all(isinstance(values.get(name), int) for name in rule[:2])]
    if "lm_head_dim" in values:
        rules = [rule for rule in rules if rule[:2] != ("lm_hidden_dim", "lm_n_heads")]
    if not rules:
        pytest.skip("the config has none of the fields whose sizes depend on each other")
    broken = [
        f"{big}={values[big]} is not a multiple of {small}={values[small]} ({why})"
        for big, small, why in rules
        if values[small] <= 0 or values[big] % values[small]
    ]
    assert not broken, f"the defaults contradict each other: {'; '.join(broken)}"


def test_patches_fit_the_pixel_shuffle(facts):
    values = defaults(facts)
    sizes = [values.get(name) for name in ("vit_img_size", "vit_patch_size", "mp_pixel_shuffle_factor")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        pytest.skip("the config has no vit_img_size, vit_patch_size and mp_pixel_shuffle_factor")
    side = sizes[0] // sizes[1]
    assert side % sizes[2] == 0, (
        f"vit_img_size={sizes[0]} at vit_patch_size={sizes[1]} makes {side} patches a side, "
        f"which mp_pixel_shuffle_factor={sizes[2]} does not divide; factors that do: "
        f"{named([str(n) for n in range(1, side + 1) if side % n == 0])}"
    )


def test_vocabulary_is_base_plus_extra_tokens(facts):
    values = defaults(facts)
    names = ("lm_vocab_size", "lm_base_vocab_size", "extra_token_amount")
    if not all(isinstance(values.get(name), int) for name in names):
        pytest.skip(f"the config does not have all of {', '.join(names)}")
    total, base, extra = (values[name] for name in names)
    assert total == base + extra, (
        f"lm_vocab_size={total}, but lm_base_vocab_size={base} + extra_token_amount={extra} is "
        f"{base + extra}: "
        "the embedding would be of another size than the tokenizer"
    )
    tokens = values.get("vlm_extra_tokens")
    if isinstance(tokens, dict):
        assert len(tokens) <= extra, (
            f"vlm_extra_tokens names {len(tokens)} tokens, extra_token_amount={extra} has room for fewer"
        )


def test_training_length_fits_the_positions(facts):
    values = defaults(facts)
    names = ("lm_max_length", "lm_max_position_embeddings")
    if not all(isinstance(values.get(name), int) for name in names):
        pytest.skip(f"the config does not have both {' and '.join(names)}")
    length, positions = (values[name] for name in names)
    assert 0 < length <= positions, (
        f"lm_max_length={length} does not fit lm_max_position_embeddings={positions}"
    )


def test_the_built_model_has_the_size_its_config_says(facts):
    field = facts["config"].get("lm_vocab_size")
    if field is None or not isinstance(field["value"], int):
        pytest.skip("the config has no lm_vocab_size")
    assert facts["vocab_size"] == field["value"], (
        f"the config says lm_vocab_size={field['value']}, the model answers with {facts['vocab_size']} "
        "logits: "
        "is the field read where the head is built?"
    )


def test_config_comes_back_from_json_unchanged(ask, probes):
    reply = ask("save_load", rows=[probes.row(labels="all")])
    before, after = reply["config_before"], reply["config_after"]
    lost = sorted(set(before) - set(after))
    assert not lost, (
        f"fields lost on the way through config.json: {named(lost)}. Are they written by save_pretrained?"
    )
    new = sorted(set(after) - set(before))
    assert not new, f"fields that only the reloaded config has: {named(new)}"
    changed = [
        f"{name}: {before[name]!r} -> {after[name]!r}"
        for name in before
        if not same(before[name], after[name])
    ]
    assert not changed, f"values changed on the way through config.json: {named(changed)}"


def same(a, b) -> bool:
    """Equal and of one kind: JSON keeps 1, 1.0 and true apart, and so must a config."""
    return type(a) is type(b) and a == b
