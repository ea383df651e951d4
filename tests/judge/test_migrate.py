"""compat migrate: an old checkpoint under new keys, proved by equal logits, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compat import cli
from compat.lock import Asker
from compat.process import Child
from compat.target import resolve

from .trees import COMBO, make_tree

TOWERS = "backbone/towers.py"
SWAPPED = {TOWERS: [("self.up_proj", "self.w1"), ("self.gate_proj", "self.w3")]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(the tree that saved it, its checkpoint)."""
    place = tmp_path_factory.mktemp("old")
    tree = make_tree(place, "main")
    with Child(resolve(str(tree))) as child:
        Asker(child, COMBO).ask("save", folder=str(place / "checkpoint"))
    return tree, place / "checkpoint"


@pytest.mark.slow
def test_a_checkpoint_is_converted_with_the_proof_beside_it(saved, tmp_path, capsys):
    from safetensors.numpy import load_file

    tree, checkpoint = saved
    new, made = make_tree(tmp_path, "main", SWAPPED), tmp_path / "made"
    options = ["migrate", str(checkpoint), "--to", str(new), "-o", str(made)]
    assert cli.main(options) == 1, "two names of one shape: only logits tell them apart"
    assert "--from" in capsys.readouterr().err and not made.exists()
    assert cli.main([*options, "--from", str(tree)]) == 0
    assert "key_mapping = {" in capsys.readouterr().out
    before, after = load_file(checkpoint / "model.safetensors"), load_file(made / "model.safetensors")
    assert (after["decoder.layers.0.w3.weight"] == before["decoder.layers.0.gate_proj.weight"]).all()
    proof = json.loads((made / "migration.json").read_text(encoding="utf-8"))
    assert proof["logits"]["after"]["logits"] == pytest.approx(proof["logits"]["before"]["logits"], rel=1e-5)
    assert set(proof["made"]) == {"config.json", "model.safetensors"}
    assert cli.main(["migrate", str(made), "--to", str(new)]) == 0
    assert "as it is; nothing was written" in capsys.readouterr().out
    assert cli.main(options) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tensor_that_nothing_explains_is_an_error_and_nothing_is_written(saved, tmp_path, capsys):
    fc2 = "        self.fc2 = nn.Linear"
    new = make_tree(tmp_path, "main", {TOWERS: [(fc2, f"        self.extra = nn.Parameter(torch.ones(3))\n{fc2}")]})
    assert cli.main(["migrate", str(saved[1]), "--to", str(new), "-o", str(tmp_path / "made")]) == 1
    assert "nothing to come from; nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.glob("*made*"))


@pytest.mark.parametrize(("checkpoint", "options", "why"), [
    ("nowhere", [], "is no checkpoint"),
    ("held", ["-o", "held"], "is there already"),
    ("held", ["-o", "a/b"], "there is no folder a"),
    ("held", ["--to", "nothing"], "'nothing' is no target"),
])  # fmt: skip
def test_wrong_arguments_end_with_2_and_one_line(tmp_path, monkeypatch, capsys, checkpoint, options, why):
    monkeypatch.chdir(tmp_path)
    Path("held").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("held", name).write_text("{}", encoding="utf-8")
    assert cli.main(["migrate", checkpoint, "--to", ".", *options]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert why in said
