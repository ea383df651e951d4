"""The state dict: sizes and layer counts follow the config, ties are real, fresh weights are numbers."""

import math
import re
from collections import Counter

import pytest

from compat.suites.probes import count_bad, forward, named

CHECK = "State Dict Keys"


def keys(ask):
    found = ask("state_dict")["keys"]
    assert found, "state_dict() is empty: a checkpoint of this model would hold nothing"
    return found


def value(facts, name):
    found = facts["config"].get(name, {}).get("value")
    return found if isinstance(found, int) else None


def test_no_tensor_is_empty(ask):
    empty = [
        f"{name} {entry['shape']}" for name, entry in keys(ask).items() if math.prod(entry["shape"]) == 0
    ]
    assert not empty, f"tensors without a single number: {named(empty)}"


def test_the_embedding_has_the_vocabulary_s_size(ask, facts):
    rows, width = value(facts, "lm_vocab_size") or facts["vocab_size"], value(facts, "lm_hidden_dim")
    tables = {name: tuple(entry["shape"]) for name, entry in keys(ask).items() if len(entry["shape"]) == 2}
    fitting = [name for name, shape in tables.items() if shape[0] == rows and width in (None, shape[1])]
    largest = max(tables, key=lambda name: tables[name][0], default="none")
    assert fitting, (
        f"no tensor has the shape of a token embedding ({rows} tokens, width {width}); the largest table is "
        f"{largest} {tables.get(largest)}. Did lm_vocab_size change without the embedding?"
    )


@pytest.mark.parametrize("field", ["lm_n_blocks", "vit_n_blocks"])
def test_there_are_as_many_layers_as_the_config_says(ask, facts, field):
    count = value(facts, field)
    if count is None:
        pytest.skip(f"the config has no {field}")
    stacks: dict[str, set[int]] = {}
    for name in keys(ask):
        for match in re.finditer(r"\.(\d+)\.", name):
            stacks.setdefault(name[: match.start()], set()).add(int(match[1]))
    same = [f for f in ("lm_n_blocks", "vit_n_blocks") if value(facts, f) == count]
    fitting = [stack for stack, numbers in stacks.items() if numbers == set(range(count))]
    seen = named(
        [
            f"{stack} ({len(numbers)})"
            for stack, numbers in sorted(stacks.items())
            if "." in stack or len(numbers) > 1
        ]
    )
    assert len(fitting) >= len(same), (
        f"{field}={count}, but {len(fitting)} stacks have the layers 0 to {count - 1}, expected "
        f"{len(same)}; there are: {seen}"
    )


def test_ties_are_real(ask, facts):
    found = keys(ask)
    for name, entry in found.items():
        other = entry["tied_to"]
        if other is None:
            continue
        assert other in found, f"{name} is tied to {other}, which the state dict does not have"
        assert found[other]["shape"] == entry["shape"], (
            f"{name} {entry['shape']} is tied to {other} {found[other]['shape']}: one storage cannot "
            "have both shapes"
        )
    wanted = facts["config"].get("lm_tie_weights", {}).get("value")
    if wanted is None:
        return
    tied = [name for name, entry in found.items() if entry["tied_to"]]
    tables = Counter(
        tuple(e["shape"])
        for e in found.values()
        if len(e["shape"]) == 2 and e["shape"][0] == facts["vocab_size"]
    )
    if wanted and max(tables.values(), default=0) > 1:
        assert tied, (
            "lm_tie_weights is true, but embedding and head have storages of their own: they drift apart "
            "in training"
        )
    if not wanted:
        head = [name for name in tied if found[name]["shape"][:1] == [facts["vocab_size"]]]
        assert not head, f"lm_tie_weights is false, but {named(head)} shares its storage"


def test_fresh_weights_are_numbers(ask, facts, probes):
    bad = [name for name, entry in keys(ask).items() if entry.get("finite") is False]
    assert not bad, f"NaN or infinite right after construction: {named(bad)}. Is memory left uninitialised?"
    for logits in forward(ask, facts, [probes.row(labels="all", images=(0,))], padding="none"):
        assert abs(logits).max() < 1e4, (
            f"fresh weights give logits up to {abs(logits).max():.3g} ({count_bad(logits)} not finite)"
        )


def test_parameters_are_floating_point(ask):
    odd = [
        f"{name} ({e['dtype']})"
        for name, e in keys(ask).items()
        if e["trainable"] and not re.search("float|bf16|fp", e["dtype"])
    ]
    assert not odd, f"trainable parameters of a type that has no gradient: {named(odd)}"
