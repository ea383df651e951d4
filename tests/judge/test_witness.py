"""A's checkpoint in B: loaded, used, and where keys differ proved by a shim whose logits are the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compat import cli
from compat.shim import FUSED, SPLIT, TRANSPOSED, Shim, suspects

from .trees import MODEL, make_tree

TOWERS, SAVING = "backbone/towers.py", "backbone/saving.py"
QUERY = {TOWERS: [("q_proj", "query")]}
FUSE = [
    (
        "        self.q_proj = nn.Linear(width, width, bias)\n"
        "        self.k_proj = nn.Linear(width, kv_heads * self.size, bias)\n"
        "        self.v_proj = nn.Linear(width, kv_heads * self.size, bias)\n",
        "        self.sizes = [width, kv_heads * self.size, kv_heads * self.size]\n"
        "        self.qkv = nn.Linear(width, sum(self.sizes), bias)\n",
    ),
    (
        "            p(x).unflatten(-1, (-1, self.size)).transpose(1, 2)\n"
        "            for p in (self.q_proj, self.k_proj, self.v_proj)\n",
        "            p.unflatten(-1, (-1, self.size)).transpose(1, 2)\n"
        "            for p in self.qkv(x).split(self.sizes, -1)\n",
    ),
]
HOOK = (
    "        self.out_proj = nn.Linear(width, width, bias)\n",
    "        self.out_proj = nn.Linear(width, width, bias)\n\n"
    "    def _load_from_state_dict(self, state, prefix, *rest):\n"
    '        for kind in ("weight", "bias"):\n'
    '            names = [f"{prefix}{part}_proj.{kind}" for part in "qkv"]\n'
    "            if names[0] in state:\n"
    '                state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(name) for name in names])\n'
    "        super()._load_from_state_dict(state, prefix, *rest)\n",
)


def fact(*shape, trainable=True, tied_to=None):
    return {"shape": list(shape), "persistent": True, "trainable": trainable, "tied_to": tied_to}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("before"), "main")


@pytest.fixture
def compared(before, tmp_path, capsys):
    """A function: the changes of a tree -> (exit code, the comparison as JSON)."""

    def run(changes: dict, *options: str, **more):
        after = make_tree(tmp_path, "main", changes, **more)
        code = cli.main(["compare", str(before), str(after), "--json", str(tmp_path / "out.json"), *options])
        capsys.readouterr()
        return code, json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))

    return run


def rules(found: dict) -> set[str]:
    return {finding["rule"] for finding in found["findings"] if not finding["rule"].startswith("API.error_")}


def proof(found: dict, rule: str) -> str:
    return next(f["proof"] for f in found["findings"] if f["rule"] == rule)


# -- suspects: by names and shapes alone -------------------------------------------------------------------------


def test_a_rename_over_layers_is_one_line_that_re_sub_understands():
    stored = {f"blocks.{layer}.attn.q_proj.weight": (8, 8) for layer in range(12)}
    [shim, *_] = suspects(stored, {name.replace("q_proj", "query"): fact(8, 8) for name in stored})
    [(pattern, instead)] = shim.key_mapping().items()
    assert {re.sub(pattern, instead, name) for name in stored} == {name.replace("q_proj", "query") for name in stored}
    assert len(shim.told()) == 3


def test_fusion_split_and_transposition_are_suspected_by_shape():
    parts = {"a.q_proj.weight": (8, 4), "a.k_proj.weight": (2, 4), "a.v_proj.weight": (2, 4)}
    whole = {"a.qkv.weight": (12, 4)}
    for stored, wanted, kind in ((parts, whole, FUSED), (whole, parts, SPLIT)):
        shim = suspects(stored, {name: fact(*shape) for name, shape in wanted.items()})[0]
        assert shim.kinds == [kind]
        names = (*shim.moves[0].sources, *shim.moves[0].targets)
        assert [name for name in names if "qkv" not in name] == list(parts), "q, k and v in their usual order"
    turned = suspects({"a.c.weight": (8, 4)}, {"a.c.weight": fact(4, 8)})[0]
    assert turned.kinds == [TRANSPOSED]


def test_names_of_one_shape_are_tried_in_every_order():
    stored = {"mlp.gate_proj.weight": (8, 4), "mlp.up_proj.weight": (8, 4)}
    ways = suspects(stored, {"mlp.w1.weight": fact(8, 4), "mlp.w3.weight": fact(8, 4)})
    assert {tuple(move.targets[0] for move in way.moves) for way in ways} == {
        ("mlp.w1.weight", "mlp.w3.weight"), ("mlp.w3.weight", "mlp.w1.weight"),
    }  # fmt: skip


def test_a_new_tensor_that_nothing_explains_leaves_no_suspicion():
    assert suspects({"a.weight": (4, 4)}, {"a.weight": fact(4, 4), "scale": fact(4)}) == []


def test_a_tensor_of_two_names_is_in_the_file_under_either():
    state = {"embed.weight": fact(9, 4), "head.weight": fact(9, 4, tied_to="embed.weight"), "new.weight": fact(4)}
    for kept in ("embed.weight", "head.weight"):
        (shim,) = suspects({kept: (9, 4), "old.weight": (4,)}, state)
        assert shim.key_mapping() == {r"^old\.weight$": "new.weight"} and not shim.dropped
    assert not suspects({"old.weight": (4,)}, state)


def test_ties_and_computed_buffers_need_nothing_from_the_file():
    state = {"embed.weight": fact(9, 4), "head.weight": fact(9, 4, tied_to="embed.weight"), "n.weight": fact(4)}
    state["rope.inv_freq"] = fact(2, trainable=None)
    [shim, *_] = suspects({"embed.weight": (9, 4), "norm.weight": (4,)}, state)
    assert [move.targets for move in shim.moves] == [("n.weight",)] and isinstance(shim, Shim)


# -- proofs: both sides asked ------------------------------------------------------------------------------------


def test_a_rename_is_proved_and_its_mapping_ready_to_paste(compared):
    code, found = compared({TOWERS: [("self.up_proj", "self.w1"), ("self.gate_proj", "self.w3")]})
    assert code == 1 and "NUMERIC.not_comparable" not in rules(found)
    told = proof(found, "LOAD.key_renamed")
    assert told.startswith("rename, shim verified")
    scope: dict = {}
    exec("\n".join(told.splitlines()[1:]), scope)
    mapped = [
        re.sub(pattern, new, "decoder.layers.1.gate_proj.weight")
        for pattern, new in scope["key_mapping"].items()
        if re.search(pattern, "decoder.layers.1.gate_proj.weight")
    ]
    assert mapped == ["decoder.layers.1.w3.weight"], "w1 and w3 are of one shape, only logits tell which is which"
    named = [finding for finding in found["findings"] if finding["path"].endswith("gate_proj.weight")]
    assert named[0]["new"] == "decoder.layers.{0..1}.w3.weight"


@pytest.mark.slow
def test_what_only_looked_like_a_rename_is_said_to_differ(compared):
    code, found = compared({TOWERS: [*QUERY[TOWERS], ('approximate="tanh"', 'approximate="none"')]})
    assert code == 1 and "looked like a rename, numbers differ" in proof(found, "LOAD.key_renamed")
    assert "NUMERIC.not_comparable" in rules(found)


@pytest.mark.slow
def test_a_fusion_is_proved(compared):
    _, found = compared({TOWERS: FUSE})
    assert "fusion, shim verified" in proof(found, "LOAD.key_removed")


@pytest.mark.slow
def test_keys_that_a_load_hook_maps_are_additive(compared):
    _, found = compared({TOWERS: [*FUSE, HOOK]})
    assert found["verdicts"]["checkpoint"] == "additive"
    assert "LOAD.keys_read" in rules(found) and "LOAD.key_removed" not in rules(found)


@pytest.mark.slow
def test_a_load_that_is_not_strict_is_found_by_what_it_leaves(compared):
    loose = ('"model.safetensors"))\n        return', '"model.safetensors"), strict=False)\n        return')
    fc2 = "        self.fc2 = nn.Linear"
    quiet = (fc2, f"        self.extra = nn.Parameter(torch.ones(3))\n{fc2}")
    _, found = compared({SAVING: [loose], TOWERS: [quiet]})
    assert found["verdicts"]["checkpoint"] == "breaking"
    said = [f for f in found["findings"] if "crossing.checkpoint" in (f["path"], *f["also"])]
    assert said, "B's own from_pretrained raises nothing"


@pytest.mark.slow
def test_a_call_that_the_old_signature_allows_is_made(compared):
    strict = (
        "def forward(self, input_ids, images, attention_mask=None, targets=None):",
        "def forward(self, input_ids, images, attention_mask=None, targets=None):\n"
        "        if targets is None and attention_mask is None:\n            raise ValueError('a mask is needed now')",
    )
    _, found = compared({MODEL: [strict]})
    failed = [f["path"] for f in found["findings"] if f["rule"] == "API.old_call_fails"]
    assert failed == ["crossing.call.forward.least"]


@pytest.mark.slow
def test_a_numeric_finding_leaves_a_script_that_runs_without_the_judge(compared, tmp_path, before):
    folder = tmp_path / "scripts"
    code, found = compared({TOWERS: [('approximate="tanh"', 'approximate="none"')]}, "--reproduce", str(folder))
    assert code == 1 and rules(found) == {"NUMERIC.logits"}
    [script] = folder.glob("*.py")
    assert "compat" not in script.read_text(encoding="utf-8").replace("compat-", "").split("TOLD =")[0]
    command = [sys.executable, "-I", str(script)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert shown.returncode == 1 and "largest difference" in shown.stdout, shown.stderr
    command += [str(before), str(before)]
    same = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert same.returncode == 0, same.stdout + same.stderr


@pytest.mark.slow
def test_an_unchanged_tree_crosses_without_a_finding(compared):
    code, found = compared({}, "--both-ways")
    assert (code, found["verdict"], found["findings"]) == (0, "identical", [])


@pytest.mark.slow
def test_one_tree_under_two_interpreters_is_compared(compared, before, capsys):
    python = sys.executable
    assert cli.main(["compare", str(before), str(before), "--python", python, "--python", python]) == 0
    assert capsys.readouterr().out.startswith("IDENTICAL")


@pytest.mark.parametrize(("options", "why"), [
    (["--python", "a", "--python", "b", "--python", "c"], "twice"),
    (["--reproduce", "x"], "no lock file"),
    (["--both-ways"], "no lock file"),
])  # fmt: skip
def test_options_that_make_no_sense_end_with_2(options, why, capsys):
    assert cli.main(["compare", "a.json", "b.json", *options]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.slow
def test_both_ways_makes_it_a_promise_that_new_files_load_in_the_old_version(compared):
    last = "    vlm_load_backbone_weights: bool = True\n"
    grown = (last, f"{last}    pooling: str = ''\n")
    _, found = compared({"models/config.py": [grown]}, "--both-ways")
    broken = [f for f in found["findings"] if f["rule"] == "LOAD.promise_broken"]
    assert [f["severity"] for f in broken] == ["breaking"] and "pooling" in broken[0]["new"]


def test_the_scripts_template_is_python():
    text = Path(__file__).parents[2].joinpath("compat/reports/templates/reproduce.py.txt").read_text(encoding="utf-8")
    compile(text.replace("@@TOLD@@", "'{}'"), "reproduce.py", "exec")
