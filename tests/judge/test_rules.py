"""Every rule has an entry, a matcher and a pair that fires it and nothing else; near misses fire nothing."""

from __future__ import annotations

import pytest

from compat.findings import SURFACES
from compat.matchers import FOLLOWS, RULES
from compat.reports.rules_page import PAGE, page
from compat.rules import UnknownRule, catalogue, compare, find_rule

from .rule_pairs import (
    ALONGSIDE,
    BUFFER,
    CALL,
    CROSSINGS,
    FIELD,
    FLAG,
    KEY,
    OTHER,
    PAIRS,
    PICTURE,
    ROW,
    SKETCH,
    argument,
    at,
)

BY_THE_ENGINE = {
    "API.error_appeared", "API.error_gone", "API.error_type", "API.support_lost", "API.support_gained",
    "API.unnamed_fact", "LOAD.keys_read", "NUMERIC.fresh_model", "API.old_calls_work",
}  # fmt: skip


def lock(facts, **more):
    question = {"schema": 1, "combo": "siglip2-smollm2", "scale": "tiny"}
    return question | {"target": "x", "environment": {}, "facts": facts} | more


def judged(a, b, crossing=None):
    sides = [lock({"config.field.same": FIELD} | side) for side in (a, b)]
    return compare(*sides, crossing=crossing)


def fired(a, b):
    return {finding.rule for finding in judged(a, b).findings}


def test_the_catalogue_the_matchers_and_the_pairs_name_the_same_rules():
    matched = {rule for rules in RULES.values() for rule in rules}
    assert len(catalogue()) >= 40
    assert matched | BY_THE_ENGINE == set(catalogue()) == set(PAIRS)
    assert set(FOLLOWS) - {"activation"} <= set(RULES)


@pytest.mark.parametrize("rule", catalogue().values(), ids=lambda rule: rule.id)
def test_a_rules_pair_fires_it_and_nothing_else(rule):
    a, b = PAIRS[rule.id]
    result = judged(a, b, CROSSINGS.get(rule.id))
    expected = {rule.id, ALONGSIDE.get(rule.id, rule.id)}
    assert {finding.rule for finding in result.findings} == expected
    (surface,) = {finding.surface for finding in result.findings if finding.rule == rule.id}
    assert rule.surface in ("any", surface)
    assert result.verdicts[surface] == rule.severity
    assert result.exit_code == (0 if rule.severity == "additive" else 1)
    if len(expected) == 1:
        assert result.verdict == rule.severity
        assert {verdict for name, verdict in result.verdicts.items() if name != surface} <= {"identical"}


@pytest.mark.parametrize("rule", catalogue().values(), ids=lambda rule: rule.id)
def test_a_side_compared_with_itself_fires_nothing(rule):
    for side in PAIRS[rule.id]:
        assert judged(side, dict(side)).verdict == "identical"


@pytest.mark.parametrize("rule", catalogue().values(), ids=lambda rule: rule.id)
def test_a_rule_says_everything_in_one_line_each(rule):
    said = (rule.what, rule.why, rule.bad, rule.good, rule.fix)
    assert all(text.strip() and "\n" not in text for text in said)
    assert rule.what.endswith(".") and rule.why.endswith(".") and rule.bad != rule.good
    assert rule.surface in {*SURFACES.values(), "model", "any"}


def test_the_page_of_rules_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), f"write it anew: python -m {page.__module__}"


def test_a_rule_is_found_by_id_in_any_case_and_by_a_name_that_one_tier_has():
    assert find_rule("load.KEY_removed").id == find_rule("key_removed").id == "LOAD.key_removed"
    with pytest.raises(UnknownRule, match="TRAIN.gradient_lost"):
        find_rule("TRAIN.gradient_l")


NOTHING = {
    "a buffer that is not saved came": at("state.cos", None, BUFFER | {"persistent": False}, state__norm=KEY),
    "an annotation spelled another way": at(
        "config.field.a", {"type": "Optional[int]", "default": 3}, {"type": "int | None", "default": 3}
    ),
    "logits that round another way": at("numbers.fp32.logits", SKETCH, [x * (1 + 1e-7) for x in SKETCH]),
    "bf16 logits one step away": at("numbers.bf16.logits", SKETCH, [x * 1.004 for x in SKETCH]),
    "bf16 that rounds the other way, as much": at("numbers.bf16.off_fp32", 0.0145, 0.0152),
    "bf16 that rounds less": at("numbers.bf16.off_fp32", 0.0145, 0.005),
    "a token chosen where two were close": at(
        "greedy.image", {"ids": [[1, 2, 3]], "decided": [[0]]}, {"ids": [[1, 4, 5]], "decided": [[0, 2]]}
    ),
    "a key bias whose gradient is rounding": at("gradient.k.bias", 3e-9, 1e-9, gradient__q__weight=1.0),
    "the same work in other operators": at("cost.flops.forward.mm", 10, None, cost__flops__forward__total=10),
    "more operators": at("cost.operators", 100, 140),
    "peak memory 1 % higher": at("cost.peak.forward", 10_000_000, 10_100_000),
    "other modules inside": at("activation.000.a", SKETCH, OTHER, numbers__fp32__logits=SKETCH),
    "fresh weights drawn anew": at("init.w", [0.001, 0.02], [-0.001, 0.0205], state__w=KEY),
    "variadic arguments renamed": (
        CALL | {"signature.forward.kwargs": argument(None, "var_keyword")},
        CALL | {"signature.forward.kw": argument(None, "var_keyword")},
    ),
}


def test_bf16_that_rounds_more_is_told_though_its_logits_pass_for_the_same():
    found = judged(*at("numbers.bf16_longest.off_fp32", 0.0145, 0.0165, numbers__bf16_longest__logits=SKETCH))
    assert [(f.rule, f.path) for f in found.findings] == [("NUMERIC.bf16", "numbers.bf16_longest.off_fp32")]


@pytest.mark.parametrize("facts", NOTHING.values(), ids=NOTHING)
def test_noise_is_identical(facts):
    assert judged(*facts).verdict == "identical"


def test_one_cause_is_told_once_and_lists_what_follows_from_it():
    def facts(sketch, gradient):
        return {
            "numbers.fp32.logits": sketch, "numbers.left_padded.logits": sketch, "numbers.fp32.loss": gradient,
            "gradient.w": gradient, "loss_curve": [gradient, 1.0],
            "numbers.left_padded.loss": gradient, "greedy.image.margin": gradient,
        }  # fmt: skip

    [finding] = judged(facts(SKETCH, 2.0), facts(OTHER, 2.5)).findings
    assert finding.rule == "NUMERIC.logits"
    assert set(finding.also) == {
        "numbers.left_padded.logits", "numbers.left_padded.loss", "numbers.fp32.loss", "gradient.w", "loss_curve",
    }  # fmt: skip


def test_a_removed_key_is_not_told_again_of_its_file_gradient_and_start():
    rest = {"saved.w": {"shape": [8, 8], "dtype": "float32"}, "gradient.w": 0.5, "init.w": [0, 1], "state.w": KEY}
    [finding] = judged({"state.v": KEY, **rest}, {"state.v": KEY}).findings
    assert finding.rule == "LOAD.key_removed" and set(finding.also) == {"saved.w", "gradient.w", "init.w"}


def test_ids_that_only_follow_a_moved_special_token_are_not_told_again():
    a = {"tokenizer.special.image": ["<image>", 7], "tokenizer.chat.0": [1, 7, 7, 2]}
    assert fired(a, {"tokenizer.special.image": ["<image>", 9], "tokenizer.chat.0": [1, 9, 9, 2]}) == {
        "DATA.special_token_moved"
    }
    assert fired(a, {"tokenizer.special.image": ["<image>", 9], "tokenizer.chat.0": [1, 9, 2]}) == {
        "DATA.special_token_moved", "DATA.template",
    }  # fmt: skip


def test_what_a_cause_explains_is_told_even_where_the_cause_itself_has_no_fact():
    """Keys differ and only the padded numbers do: the plain ones, which would tell, agree."""
    a = {"state.w": KEY, "numbers.fp32.logits": SKETCH, "numbers.left_padded.logits": SKETCH}
    b = {"numbers.fp32.logits": SKETCH, "numbers.left_padded.logits": OTHER}
    assert fired(a, b) == {"LOAD.key_removed", "NUMERIC.not_comparable"}


@pytest.mark.parametrize(("what", "grown", "rules"), [
    ("picture", PICTURE | {"rotated": True}, {"API.unnamed_fact"}),
    ("row", ROW | {"weight": 2}, {"API.unnamed_fact"}),
    ("flag", FLAG | {"required": True}, {"API.unnamed_fact"}),
    ("key", KEY | {"device": "meta"}, {"API.unnamed_fact"}),
])  # fmt: skip
def test_a_change_that_no_rule_names_is_still_told(what, grown, rules):
    path, value = {
        "picture": ("processor.64x64", PICTURE), "row": ("data.0", ROW), "flag": ("script.train.py.--lr", FLAG),
        "key": ("state.w", KEY),
    }[what]  # fmt: skip
    assert fired({path: value}, {path: grown}) == rules


def test_a_pack_of_rows_that_teach_nothing_is_told_where_the_rows_are():
    row = {"supervised": 4, "labels_text": "red", "shift": 1, "image_tokens": 4, "features": 4}
    silent = row | {"supervised": 0, "labels_text": "", "shift": None}
    pack = {"supervised": 4, "documents": [[1, 9]]}
    found = judged(
        {"data.0": row, "packed.0": pack}, {"data.0": silent, "packed.0": pack | {"supervised": 0}}
    ).findings
    assert [finding.rule for finding in found] == ["DATA.no_labels"]
    assert "packed.0" in found[0].also
