"""The matrix file: what is chosen, and what a wrong name or a wrong table is told."""

from __future__ import annotations

import pytest

from compat.combo import SCALES, UnknownCombo, choose, load


def test_without_names_the_default_combos_are_chosen():
    assert [combo.name for combo in choose(None)] == ["siglip2-smollm2"]


def test_names_are_chosen_once_and_in_the_order_given():
    names = ["siglip-smollm2", "siglip2-smollm2", "siglip-smollm2"]
    assert [combo.name for combo in choose(names)] == ["siglip-smollm2", "siglip2-smollm2"]


def test_every_combo_has_a_preset_for_every_scale():
    for combo in load().values():
        for scale in SCALES:
            asked = combo.as_dict(scale)
            assert asked == {
                "name": combo.name,
                "vision": combo.vision,
                "language": combo.language,
                "preset": combo.presets[scale],
                "scale": scale,
            }
            assert asked["preset"]


def test_an_unknown_combo_is_told_which_exist():
    with pytest.raises(
        UnknownCombo, match="no combo named 'dino'; there are: siglip2-smollm2, siglip-smollm2"
    ):
        choose(["dino"])


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (
            '[a]\nvision = "v"\nlanguage = "l"\npresets = { tiny = "t" }',
            r"\[a\] names no preset for scale full",
        ),
        ('[a]\nvision = "v"\npresets = { tiny = "t", full = "f" }', r"\[a\] .*language"),
        (
            '[a]\nvision = "v"\nlanguage = "l"\nspeed = 3\npresets = { tiny = "t", full = "f" }',
            r"\[a\] .*speed",
        ),
    ],
)
def test_a_wrong_table_is_named(tmp_path, table, complaint):
    path = tmp_path / "combos.toml"
    path.write_text(table)
    with pytest.raises(ValueError, match=complaint):
        load(path)
