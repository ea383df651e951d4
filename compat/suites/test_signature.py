"""How the model is called: ids and pictures in, (logits, loss) out, masks and targets optional."""

from compat.suites.probes import forward, named

CHECK = "Forward Signature"

# Every name these arguments have gone by in nanoVLM's history.
ROLES = {
    "token ids": ("input_ids",),
    "pictures": ("images", "image", "pixel_values"),
    "targets": ("targets", "labels"),
}
POSITIONAL = ("positional_only", "positional_or_keyword")


def parameters(facts, method: str) -> dict[str, dict]:
    signatures = facts["signatures"]
    assert method in signatures, f"{facts['model_class']} has no {method} method"
    return {parameter["name"]: parameter for parameter in signatures[method] if parameter["name"] != "self"}


def needed(parameter: dict) -> bool:
    return "default" not in parameter and not parameter["kind"].lower().startswith("var_")


def test_forward_takes_ids_pictures_and_targets(facts):
    names = parameters(facts, "forward")
    missing = [
        f"{role} ({' or '.join(known)})" for role, known in ROLES.items() if not set(known) & set(names)
    ]
    assert not missing, (
        f"forward({', '.join(names)}) has no argument for {named(missing)}: existing callers break"
    )


def test_mask_and_targets_may_be_left_out(facts):
    names = parameters(facts, "forward")
    must = [name for name in ("attention_mask", *ROLES["targets"]) if name in names and needed(names[name])]
    assert not must, (
        f"forward needs {' and '.join(must)}, which callers may leave out: give it a default of None"
    )


def test_ids_come_before_pictures(facts):
    names = list(parameters(facts, "forward"))
    ids, pictures = (
        next(name for name in ROLES[role] if name in names) for role in ("token ids", "pictures")
    )
    assert names.index(ids) < names.index(pictures), (
        f"forward({', '.join(names)}): {pictures} comes before {ids}; calls without keywords would swap them"
    )


def test_generate_needs_only_ids_and_pictures(facts):
    names = parameters(facts, "generate")
    allowed = {*ROLES["token ids"], *ROLES["pictures"]}
    extra = [name for name, parameter in names.items() if needed(parameter) and name not in allowed]
    # An image grid beside the pixels is how Idefics3-style models say where tiles are.
    extra = [name for name in extra if "grid" not in name and "pixel" not in name]
    assert not extra, (
        f"generate cannot be called without {named(extra)}: give it a default, or existing scripts break"
    )


def test_logits_cover_every_text_token_and_the_whole_vocabulary(ask, facts, probes):
    rows = [probes.row(9, seed=1), probes.row(9, seed=2)]
    forward(ask, facts, rows, padding="none")


def test_without_targets_there_is_no_loss(ask, probes):
    loss = ask("forward", rows=[probes.row(9, seed=1), probes.row(9, seed=2)], padding="none")["loss"]
    assert loss is None, f"forward without targets gave a loss of {loss}: what was it computed from?"


def test_with_targets_there_is_a_loss(ask, probes):
    loss = ask("forward", rows=[probes.row(labels="all")], padding="none")["loss"]
    assert isinstance(loss, float), f"forward with targets gave {loss!r} for a loss, expected a number"
