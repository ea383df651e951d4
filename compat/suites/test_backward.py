"""The backward pass: every trainable parameter is reached, and the model learns a batch by heart."""

import math

from compat.suites.probes import named

CHECK = "Backward Pass"
STEPS = 20
LEARNED = 0.25  # of the first loss


def batch(probes):
    return [probes.row(10, seed=seed, images=(seed,), labels="all") for seed in range(2)]


def gradients(ask, probes):
    reply = ask("gradients", rows=batch(probes))
    assert reply["trainable"], "no parameter is trainable: training would do nothing"
    return reply


def test_every_trainable_parameter_gets_a_gradient(ask, probes):
    reply = gradients(ask, probes)
    missing = [name for name in reply["trainable"] if reply["grads"].get(name) is None]
    assert not missing, (
        f"{len(missing)} of {len(reply['trainable'])} trainable parameters get no gradient: "
        f"{named(missing)}. "
        "Are they used in forward, or is their branch detached or under no_grad?"
    )


def test_every_gradient_is_finite(ask, probes):
    grads = gradients(ask, probes)["grads"]
    bad = [f"{name} ({norm})" for name, norm in grads.items() if norm is not None and not math.isfinite(norm)]
    assert not bad, f"{len(bad)} of {len(grads)} gradients are NaN or infinite: {named(bad)}"


def test_no_part_of_the_model_is_cut_off(ask, probes):
    reply = gradients(ask, probes)
    parts: dict[str, float] = {}
    for name in reply["trainable"]:
        part = name.partition(".")[0]
        norm = reply["grads"].get(name) or 0.0
        parts[part] = max(parts.get(part, 0.0), norm if math.isfinite(norm) else 1.0)
    dead = [part for part, norm in parts.items() if norm == 0.0]
    assert not dead, (
        f"every gradient in {named(dead)} is zero (others: {named(sorted(set(parts) - set(dead)))}): is "
        "it detached?"
    )


def test_no_matrix_has_a_gradient_of_zero(ask, probes):
    reply, keys = gradients(ask, probes), ask("state_dict")["keys"]
    # Vectors are let off: a key's bias rightly has none, since softmax does not see it.
    matrices = [name for name in reply["trainable"] if name in keys and len(keys[name]["shape"]) >= 2]
    dead = [name for name in matrices if reply["grads"].get(name) == 0.0]
    assert not dead, (
        f"{len(dead)} of {len(matrices)} weight matrices have a gradient of exactly zero: {named(dead)}. "
        "Is their output multiplied by zero, detached, or never read?"
    )


def test_frozen_parameters_get_no_gradient(ask, probes):
    reply = gradients(ask, probes)
    leaked = [name for name in reply["frozen"] if reply["grads"].get(name) is not None]
    assert not leaked, f"frozen, yet given a gradient: {named(leaked)}"


def test_loss_in_train_mode_is_a_number(ask, probes):
    loss = gradients(ask, probes)["loss"]
    assert isinstance(loss, float) and math.isfinite(loss), f"the loss to be differentiated is {loss}"


def test_twenty_steps_on_one_batch_learn_it(ask, probes, facts):
    losses = ask("train", rows=batch(probes), steps=STEPS, lr=rate(facts), optimizer="adam")["losses"]
    assert len(losses) == STEPS + 1, f"{STEPS} steps gave {len(losses)} losses, expected {STEPS + 1}"
    bad = [f"step {step}: {loss}" for step, loss in enumerate(losses) if not math.isfinite(loss)]
    assert not bad, f"the loss became NaN or infinite: {named(bad, 2)}"
    assert losses[-1] < LEARNED * losses[0], (
        f"the loss on one batch of {len(batch(probes))} rows went from {losses[0]:.4g} to "
        f"{losses[-1]:.4g} in {STEPS} steps "
        f"of Adam at {rate(facts):g}; a model that learns ends below {LEARNED * losses[0]:.4g}. "
        "Is a branch detached, a parameter frozen, or are targets and logits shifted against each other?"
    )


def rate(facts) -> float:
    """A step that a model of this size bears: a few hundred thousand parameters take far larger ones."""
    return 1e-2 if facts["parameters"] < 5_000_000 else 5e-4
