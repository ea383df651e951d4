"""nox offers one compat session a combo, tagged by its backbones."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import pytest

from tests.house.tree import ROOT

COMBOS = tomllib.loads((ROOT / "compat" / "combos.toml").read_text())
pytest.importorskip("nox", reason="nox comes with the dev extra")


def listed(*arguments: str) -> dict[str, dict]:
    """Session name -> what nox says of it, for those a command would run."""
    command = [sys.executable, "-m", "nox", "--list", "--json", "-f", str(ROOT / "noxfile.py"), *arguments]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    return {row["session"]: row for row in json.loads(shown.stdout)}


def test_each_combo_is_a_session_tagged_by_encoder_and_language_model():
    sessions = listed("-s", "compat")
    assert set(sessions) == {f"compat({name})" for name in COMBOS}
    for name, row in COMBOS.items():
        assert set(sessions[f"compat({name})"]["tags"]) == {row["vision"], row["language"]}


def test_one_combo_can_be_named_and_a_tag_picks_its_combos():
    name, row = next(iter(COMBOS.items()))
    assert set(listed("-s", f"compat({name})")) == {f"compat({name})"}
    wanted = {f"compat({other})" for other in COMBOS if COMBOS[other]["vision"] == row["vision"]}
    assert set(listed("-t", row["vision"])) == wanted


def test_sessions_that_need_other_versions_run_only_when_named():
    plain = set(listed())
    assert {"tests", "parity", "lint", "types", "gpu"} <= plain
    assert not {"minimums", "transformers-4"} & plain
    assert set(listed("-s", "minimums", "transformers-4")) == {"minimums", "transformers-4"}
