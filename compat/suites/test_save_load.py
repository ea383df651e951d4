"""Saving and loading: what comes back is the model that was saved, with nothing missing or left over."""

import numpy as np

from compat.suites.probes import EXACT, assert_same, named

CHECK = "Save Load Methods"


def saved(ask, probes):
    return ask("save_load", rows=[probes.row(labels="all")])


def test_the_folder_holds_a_config_and_weights(ask, probes):
    files = saved(ask, probes)["files"]
    assert any(name.endswith(".json") for name in files), (
        f"no .json config among the saved files ({named(files) or 'none'})"
    )
    weights = [name for name in files if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    assert weights, f"no weights among the saved files ({named(files)})"


def test_loading_finds_every_tensor(ask, probes):
    missing = saved(ask, probes)["missing"]
    assert not missing, (
        f"{len(missing)} tensors of the model are not in the saved file: {named(missing)}. "
        "They would come back freshly initialised."
    )


def test_saving_leaves_nothing_the_model_does_not_know(ask, probes):
    unexpected = saved(ask, probes)["unexpected"]
    assert not unexpected, f"{len(unexpected)} saved tensors have no place in the model: {named(unexpected)}"


def test_the_loaded_model_gives_the_same_logits(ask, probes):
    reply = saved(ask, probes)
    before, after = (np.asarray(reply[f"{when}.0"], dtype=np.float64) for when in ("before", "after"))
    assert np.isfinite(before).all() and before.std() > 0, (
        "the model's logits before saving are not usable numbers"
    )
    assert_same(
        after,
        before,
        "logits before saving and after loading",
        "Is a buffer or a tied weight lost, or a dtype or default changed on the way?",
        EXACT,
    )


def test_saved_names_are_the_model_s_own(ask, probes):
    known = set(ask("state_dict")["keys"])
    strange = [name for name in saved(ask, probes)["keys"] if name not in known]
    assert not strange, f"tensors are saved under names that state_dict() does not have: {named(strange)}"


def test_loading_keeps_ties_and_what_is_trained(ask, probes):
    reply = saved(ask, probes)
    before, after = reply["ties_before"], reply["ties_after"]
    assert before == after, (
        f"one tensor under several names before saving: {before or 'none'}; after loading: {after or 'none'}. "
        "Weights that were one drift apart in training (or the other way round): tie them again after loading"
    )
    was, now = reply["trainable_before"], reply["trainable_after"]
    changed = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    other = [f"{name} ({was.get(name)} -> {now.get(name)})" for name in changed]
    assert not other, f"requires_grad of {len(other)} parameters is another after loading: {named(other)}"
