"""A lock says everything about a model, the same way each time, and no target can keep it from being made.

Unusual: locks are made of whole trees in real children; the few that are made are shared by all tests here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compat import lock
from compat.cli import main
from compat.combo import load
from compat.process import Child
from compat.rules import compare
from compat.target import resolve
from tests.house.tree import ROOT
from tests.judge.trees import CONFIG, MODEL, make_tree

COMBO = load()["siglip2-smollm2"]
HEAD = {name: None for name in lock.HEADER} | {"schema": lock.SCHEMA, "environment": {}}


def made_of(folder: Path, replace: dict | None = None, name: str = "main", **options) -> dict:
    tree = make_tree(folder, name, replace)
    with Child(resolve(str(tree)), **options) as child:
        return lock.make(child, COMBO)


@pytest.fixture(scope="module")
def ours() -> dict:
    with Child(resolve(str(ROOT))) as child:
        return lock.make(child, COMBO)


@pytest.fixture(scope="module")
def fork(tmp_path_factory) -> dict:
    return made_of(tmp_path_factory.mktemp("fork"))


# Faults in places that do not meet: exits while saving, raises while generating, another eps in one module.
FAULTS = {
    "backbone/saving.py": [("os.makedirs(folder, exist_ok=True)", "os._exit(7)")],
    MODEL: [
        ("pick = likeliest if greedy else drawn", "raise LookupError('no words at ' + __file__ + repr(object()))"),
    ],
    "backbone/towers.py": [("self.post_layernorm = nn.LayerNorm(cfg.vit_hidden_dim)",
                            "self.post_layernorm = nn.LayerNorm(cfg.vit_hidden_dim, eps=0.3)")],
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> dict:
    return made_of(tmp_path_factory.mktemp("faulty"), FAULTS)


def under(made: dict, prefix: str) -> dict:
    return {path: value for path, value in made["facts"].items() if path == prefix or path.startswith(prefix + ".")}


def is_answer(value) -> bool:
    return not (isinstance(value, dict) and {"error", "unsupported"} & set(value))


# -- the file ---------------------------------------------------------------------------------------------


def test_facts_are_sorted_and_each_is_one_line(ours):
    lines = lock.dumps(ours).splitlines()
    start = lines.index('"facts": {') + 1
    facts = lines[start : lines.index("}", start)]
    paths = [next(iter(json.loads("{" + line.rstrip(",") + "}"))) for line in facts]
    assert paths == sorted(paths) == sorted(ours["facts"])


def test_a_lock_comes_back_from_its_file_as_it_was(ours, tmp_path):
    lock.write(tmp_path / "a.json", ours)
    assert lock.read(tmp_path / "a.json") == ours


def test_a_lock_that_cannot_be_written_leaves_the_one_before(ours, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("before")

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        lock.write(path, ours)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting"),
        ("[]", "no facts"),
        ('{"facts": []}', "no facts"),
        (json.dumps(HEAD | {"schema": 99, "facts": {}}), "schema 99, this compat reads 1"),
        ('{"schema": 1, "combo": "x", "facts": {}}', "does not say scale, target"),
        ("\udcff", "no lock"),
    ],
)
def test_a_file_that_is_no_lock_is_named_with_the_reason(tmp_path, text, why):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(lock.NotALock, match=why) as raised:
        lock.read(path)
    assert str(path) in str(raised.value)


# -- stability --------------------------------------------------------------------------------------------


def test_two_locks_of_one_tree_have_the_same_bytes(ours):
    command = [sys.executable, "-m", "compat", "lock", ".", "--combo", COMBO.name]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert again.stdout.split('"facts": {')[1] == lock.dumps(ours).split('"facts": {')[1]


def test_a_lock_holds_no_path_address_or_endless_digits(faulty):
    text = lock.dumps(faulty)
    assert str(ROOT) not in text and "compat-home" not in text and not re.search(r"0x[0-9a-f]{4}", text)
    assert faulty["facts"]["greedy.image"]["message"].startswith("no words at ./models/vision_language_model.py<object")
    assert max(len(number.replace(".", "")) for number in re.findall(r"\d+\.\d+", text.partition('"facts"')[2])) <= 16
    assert lock.tidy([1 / 3, math.nan, -math.inf, {"a": (2.5e-7 / 3,)}], "/x") == [
        0.333333333, "nan", "-inf", {"a": [8.33333333e-08]},
    ]  # fmt: skip


# -- what it says -----------------------------------------------------------------------------------------

SECTIONS = (
    "config.field", "config.effect", "config.derived", "train_config.field", "script", "state", "saved", "saved_alias",
    "init", "signature", "returns", "tokenizer.special", "tokenizer.text", "tokenizer.chat", "processor", "numbers",
    "greedy", "sampling", "dropout.vit_dropout", "dropout.lm_dropout", "gradient", "loss_curve", "activation",
    "backbones", "backbone_weights", "backbone_weights_resized", "data", "train_config.derived", "cost.flops.forward",
    "cost.flops.backward", "cost.flops.generate", "cost.peak",
)  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_of_our_model_has_answers(ours, section):
    assert any(is_answer(value) for value in under(ours, section).values())


def test_the_data_section_of_a_fork_has_its_rows(fork):
    rows = under(fork, "data")
    assert set(rows) == {"data.0", "data.1"}
    assert all(row["supervised"] > 0 and row["image_tokens"] == row["features"] == 4 for row in rows.values())
    assert "A small red house." in rows["data.0"]["labels_text"]


def test_only_what_our_model_refuses_or_lacks_is_no_answer(ours):
    paths = {path for path, value in ours["facts"].items() if not is_answer(value)}
    assert paths <= {"greedy.uncached"}
    errors = {path: value for path, value in ours["facts"].items() if path.endswith(".error")}
    chosen = {errors.pop(path) for path in list(errors) if path.startswith("numbers.choice ")}
    assert chosen <= {"ConfigError"}
    assert errors == {"numbers.past_longest.error": "PromptTooLong", "numbers.wide_picture.error": "ImageError"}
    refused = {path: value for path, value in ours["facts"].items() if path.startswith("refusals.")}
    assert len(refused) == 4 and "accepted" not in refused.values(), refused


def test_numbers_are_those_of_equal_tensors_only(ours):
    facts = ours["facts"]
    same, other = facts["numbers.left_padded.logits"], facts["numbers.fp32.logits"]
    assert same == pytest.approx(facts["numbers.right_padded.logits"], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(same, other, strict=True)) > 0.1
    spread = math.sqrt(sum(value * value for value in other) / len(other))
    assert 0.4 < spread / facts["numbers.fp32.rms"] < 2.5, "a projection is of the size of the tensor's RMS"


def test_an_epsilon_shows_in_small_embeddings_more_than_elsewhere(tmp_path, fork):
    changed = [("self.norm = nn.RMSNorm(cfg.lm_hidden_dim, eps=1e-5)", "self.norm = nn.RMSNorm(cfg.lm_hidden_dim)"),
               ("eps=1e-5)\n        self.self_attn", "eps=1e-6)\n        self.self_attn")]  # fmt: skip
    tree = make_tree(tmp_path, "main", {"backbone/towers.py": changed})
    with Child(resolve(str(tree))) as child:
        asker = lock.Asker(child, COMBO.as_dict())
        asker.model = child.ask("describe", combo=asker.combo)
        for case, change in (("fp32", None), ("small_embeddings", "small_embeddings")):
            asker.number(case, asker.ask("lock_numbers", rows=[asker.row()], change=change))

    def off(case):
        a, b = fork["facts"][f"numbers.{case}.logits"], asker.facts[f"numbers.{case}.logits"]
        return max(abs(x - y) for x, y in zip(a, b, strict=True)) / fork["facts"][f"numbers.{case}.rms"]

    assert off("small_embeddings") > max(0.05, 5 * off("fp32"))


def test_a_field_has_an_effect_exactly_if_something_changes_with_it(ours, fork, tmp_path_factory):
    effects = {path.rpartition(".")[2]: value for path, value in under(ours, "config.effect").items()}
    for name in ("vit_hidden_dim", "lm_rms_eps", "lm_re_base", "vit_dropout", "lm_tie_weights", "lm_chat_template",
                 "vlm_extra_tokens", "max_img_size", "resize_to_max_side_len",
                 "vit_model_type", "lm_model_type"):  # fmt: skip
        assert effects[name] == "changes", name
    assert effects["lm_max_position_embeddings"] == "raises PromptTooLong"
    assert effects["vlm_checkpoint_path"] == effects["hf_repo_name"] == "nothing"
    assert effects["vision_encoder"] == effects["lm_vocab_size"] == "refused"
    assert effects["image_mean"] == "not tried"
    assert fork["facts"]["config.effect.lm_max_position_embeddings"] == "nothing", "the tree's towers never read it"


def test_a_stopped_text_and_what_its_streamer_was_given_are_facts(ours):
    stopped, streamed = (ours["facts"][f"greedy.stopped{name}"]["ids"] for name in ("", ".streamed"))
    assert streamed == [[*row, -1] for row in stopped], "every id, and the end once"
    plain = ours["facts"]["greedy.left_padded"]["ids"]
    assert stopped[-1][:2] == plain[-1][:2] and len(set(stopped[-1][2:])) == 1, "a text that ended repeats its end"
    assert len(stopped[0]) < len(plain[0]) and stopped[0] == plain[0][: len(stopped[0])], "the other one ended later"


def test_what_a_config_on_the_hub_leaves_out_is_a_fact(ours):
    without = under(ours, "config.derived.without")
    assert without["config.derived.without.language.tie_word_embeddings"] == {"lm_tie_weights": False}
    assert without["config.derived.without.language.num_hidden_layers"] == {"lm_n_blocks": 32}


def test_a_draw_is_described_by_what_it_is_made_from(ours):
    facts = ours["facts"]
    assert facts["sampling.top_k.support"] == len(facts["sampling.top_k.probabilities"]) == 5
    assert sum(facts["sampling.top_k.probabilities"]) == pytest.approx(1, abs=1e-5)
    assert facts["sampling.top_p.support"] < facts["sampling.temperature.support"] == 50
    hot, mild = (facts[f"sampling.{case}.probabilities"] for case in ("temperature", "top_k"))
    assert max(hot) / min(hot) < max(mild) / min(mild), "a temperature of 2 flattens"


def test_dropout_shows_in_training_and_nowhere_else(ours):
    facts = ours["facts"]
    towers = {"vit_dropout": ("vision_encoder", "decoder"), "lm_dropout": ("decoder", "vision_encoder")}
    for field, (tower, other) in towers.items():
        assert facts[f"dropout.{field}.eval"] == pytest.approx(facts["numbers.fp32.logits"], rel=1e-5)
        assert facts[f"dropout.{field}.train.{tower}.blocks.0.attn"] > 0.5
        assert not [path for path in facts if path.startswith(f"dropout.{field}.train.{other}")]


def test_greedy_probes_say_something_else_than_one_token_again_and_again(ours, fork):
    for made in (ours, fork):
        facts = {path: fact for path, fact in under(made, "greedy").items() if "stopped" not in path}
        rows = [row for fact in facts.values() if isinstance(fact, dict) for row in fact.get("ids", ())]
        assert sum(len(set(row)) > 3 for row in rows) >= len(rows) / 2


def test_labels_lie_one_place_ahead_of_the_ids(ours):
    assert {row["shift"] for row in under(ours, "data").values()} == {1}


def test_the_first_module_that_diverges_is_the_one_that_changed(fork, faulty):
    a, b = under(fork, "activation"), under(faulty, "activation")
    assert list(a) == sorted(a) and set(a) == set(b)
    apart = [path for path in a if max(abs(x - y) for x, y in zip(a[path], b[path], strict=True)) > 1e-6]
    assert apart[0].endswith(".vision_encoder.post_layernorm")
    assert apart[-1].endswith(".model"), "the whole model returns last"


def test_saved_ties_are_aliases_and_shapes_are_the_state_s(ours):
    facts = ours["facts"]
    alias = under(ours, "saved_alias")
    assert alias == {"saved_alias.decoder.token_embedding.weight": "decoder.head.weight"}
    for path, value in under(ours, "saved").items():
        assert value["shape"] == facts["state." + path.partition(".")[2]]["shape"]


def test_returns_name_the_sizes_they_depend_on(ours, fork):
    tensors = ours["facts"]["returns.forward"]["items"]
    assert (tensors[0]["shape"], tensors[1]["type"]) == (["B", "T", "V"], "NoneType")
    assert ours["facts"]["returns.forward_with_targets"]["items"][0]["shape"] == ["L", "V"]
    assert ours["facts"]["returns.generate"] == {"type": "Tensor", "shape": ["B", "N"], "dtype": "int64"}
    assert fork["facts"]["returns.forward"]["items"][0]["shape"] == ["B", "T", 48], "hidden states, not logits"


def test_a_field_that_must_be_given_has_no_default():
    from compat.child.described import fields

    made = dataclasses.make_dataclass("Config", [("width", int), ("depth", int, dataclasses.field(default=2))])
    assert fields(made) == {"width": {"type": "int"}, "depth": {"type": "int", "default": 2}}


# -- targets that misbehave -------------------------------------------------------------------------------


def test_a_model_that_cannot_be_built_says_so_wherever_one_is_needed(tmp_path):
    facts = made_of(
        tmp_path, {CONFIG: [("    vit_hidden_dim: int = 64\n", "    width: int\n    vit_hidden_dim: int = 64\n")]}
    )["facts"]
    for path in ("config", "config.effect", "state", "saved", "returns.forward", "tokenizer.text.0", "cost.flops"):
        assert facts[path]["error"] == "TypeError" and "width" in facts[path]["message"], path
    assert facts["numbers.fp32.error"] == "TypeError"
    assert facts["train_config.field.batch_size"] == {"type": "int", "default": 2}


def test_a_crash_costs_its_section_alone(faulty):
    facts = faulty["facts"]
    assert facts["saved"]["error"] == "ChildFailed" and "exit code 7" in facts["saved"]["message"]
    assert is_answer(facts["numbers.fp32.logits"]) and under(faulty, "init")


def test_what_the_target_raises_is_named_where_the_answer_would_be(faulty):
    for path in ("greedy.image", "greedy.left_padded", "returns.generate"):
        assert faulty["facts"][path]["error"] == "LookupError"
    assert is_answer(faulty["facts"]["returns.forward"])


def test_what_a_layout_does_not_have_is_a_fact(tmp_path):
    facts = made_of(tmp_path, name="v01")["facts"]
    assert facts["numbers.two_images"] == {"unsupported": "this layout takes exactly one image a row"}
    assert facts["script"] == {"unsupported": "no script with flags was found"}
    assert is_answer(facts["numbers.left_padded.logits"]) and facts["data.0"]["supervised"] > 0


def test_a_folder_without_a_model_makes_no_lock(tmp_path, capsys):
    (tmp_path / "a.py").write_text("x = 1\n")
    assert main(["lock", str(tmp_path), "-o", str(tmp_path / "a.json")]) == 3
    assert "no nanoVLM-style model" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_an_error_of_the_judge_makes_no_lock(tmp_path, monkeypatch):
    class Broken(Child):
        def ask(self, question, **parameters):
            raise lock.WorkerError("KeyError: 'x'\nTraceback ...")

    with pytest.raises(lock.LockFailed, match="^the judge itself failed at 'lock_train_config', .*: KeyError: 'x'$"):
        lock.make(Broken(resolve(str(tmp_path))), COMBO)


def test_a_run_out_of_time_makes_no_lock_instead_of_facts_about_the_target(tmp_path):
    with Child(resolve(str(make_tree(tmp_path, "main")))) as child:
        child.ask("describe", combo=COMBO.as_dict())
        child.run_timeout_s, child._deadline = 0.1, time.monotonic() + 0.1
        with pytest.raises(lock.LockFailed, match="no lock was made: .*--timeout gives it more time"):
            lock.make(child, COMBO)
    assert lock.limit_s(60, "tiny") == 600 < lock.limit_s(60, "full")


# -- the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--combo", "nothing"], "no combo named 'nothing'"),
        (["-o", "no/such/place.json"], "there is no folder no/such"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_asked(capsys, arguments, said):
    assert main(["lock", str(ROOT), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_command_says_what_it_wrote(tmp_path, capsys, monkeypatch, fork):
    monkeypatch.setattr(lock, "make", lambda child, combo, scale: fork)
    path = tmp_path / "a.json"
    assert main(["lock", str(tmp_path), "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: {lock.summary(fork)}\n"
    assert lock.read(path) == fork and str(len(fork["facts"])) in lock.summary(fork)


def test_there_is_a_baseline_of_every_combo_and_it_is_of_this_schema():
    found = {path.stem: lock.read(path) for path in (ROOT / "compat/baselines").glob("*.json")}
    assert set(found) == set(load())
    for name, made in found.items():
        assert made["combo"] == name and made["scale"] == "tiny" and made["target"] == "."
        assert lock.dumps(made) == (ROOT / f"compat/baselines/{name}.json").read_text(encoding="utf-8")


def assert_baseline_holds(name: str, made: dict) -> None:
    found = compare(lock.read(ROOT / f"compat/baselines/{name}.json"), made)
    assert found.verdict == "identical", "\n".join(map(str, found.findings)) + (
        f"\nmeant? python -m compat lock . --combo {name} -o compat/baselines/{name}.json"
    )


def test_the_default_combo_s_baseline_is_what_a_fresh_lock_says(ours):
    assert_baseline_holds(COMBO.name, ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", load())
def test_every_combo_of_our_model_is_locked_without_an_error_and_as_its_baseline(name):
    with Child(resolve(str(ROOT))) as child:
        made = lock.make(child, load()[name])
    assert not [path for path, value in made["facts"].items() if isinstance(value, dict) and "error" in value]
    assert len(made["facts"]) > 600
    assert_baseline_holds(name, made)


# -- what the child counts and reads ----------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_counted_whichever_way_it_is_written(torch, groups, causal):
    from torch.nn.functional import scaled_dot_product_attention as attention

    from compat.child.cost import Counter

    def tensors():
        sizes = (2, 4, 6, 8), (2, groups, 6, 8), (2, groups, 6, 8)
        return [torch.randn(size, requires_grad=True) for size in sizes]

    def plain(q, k, v):
        k, v = (x.repeat_interleave(4 // groups, 1) for x in (k, v))
        return (q @ k.mT / 8**0.5).softmax(-1) @ v

    def total(function):
        with Counter() as forward:
            out = function(*tensors())
        with Counter() as backward:
            out.sum().backward()
        assert not forward.uncounted | backward.uncounted
        return [sum(counter.flops.values()) for counter in (forward, backward)]

    products = 2 * 2 * 4 * 6 * 6 * 8  # of one of the two matrix products, in FLOPs
    fused = total(lambda q, k, v: attention(q, k, v, is_causal=causal, enable_gqa=True))
    assert fused[0] == total(plain)[0] == 2 * products
    assert total(plain)[1] == 4 * products and fused[1] in (4 * products, 5 * products), "fused kernels recompute one"


def test_inference_mode_counts_the_same(torch):
    from compat.child.cost import Counter

    layer, x = torch.nn.Linear(8, 5), torch.randn(3, 8)
    with torch.inference_mode(), Counter() as counted:
        layer(x)
    assert counted.flops == {"matmul": 2 * 3 * 8 * 5}


def test_attention_without_a_formula_is_not_passed_over(torch):
    from compat.child.cost import Counter

    with torch.library._scoped_library("compat_test", "DEF") as library:
        library.define("my_attention(Tensor x) -> Tensor")
        library.impl("my_attention", lambda x: x.clone(), "CompositeExplicitAutograd")
        with Counter() as counted:
            torch.ops.compat_test.my_attention(torch.ones(2))
    assert [name for name in counted.uncounted if "my_attention" in name]


def test_a_sketch_tells_a_single_changed_number_and_not_the_shape_alone(torch):
    from compat.child.sketch import sketch

    x = torch.linspace(-1, 1, 60).reshape(3, 20)
    y = x.clone()
    y[2, 5] += 0.01
    assert sketch(x) == sketch(x.clone()) and len(sketch(x)) == 16
    assert all(abs(a - b) == pytest.approx(0.01 / 60**0.5, rel=1e-4) for a, b in zip(sketch(x), sketch(y), strict=True))
    assert sketch(x) != sketch(x.reshape(60)) and sketch(x[:0]) == []
    assert all(math.isnan(value) for value in sketch(x * math.nan))


SCRIPT = """
import argparse
LR = 1e-3
parser = argparse.ArgumentParser()
parser.add_argument("--lr", "-l", type=float, default=LR)
parser.add_argument("path")
commands = parser.add_subparsers()
run = commands.add_parser("run")
run.add_argument("--lr", action="store_true", default=2 * LR)
parser.add_argument(*names)
"""


def test_flags_are_read_without_running_the_script(tmp_path):
    from compat.child.scripts import flags

    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/part.py").write_text(SCRIPT)
    (tmp_path / "tools/tool.py").write_text(SCRIPT + 'if __name__ == "__main__":\n    raise SystemExit\n')
    (tmp_path / "broken.py").write_text("add_argument(")
    found = flags(str(tmp_path), "models")
    assert {path.partition(".py.")[0] for path in found} == {"train", "tools/tool"}
    assert {path.partition(".py.")[2]: value for path, value in found.items() if path.startswith("train")} == {
        "--lr": {"default": 1e-3, "type": "float", "action": None},
        "path": {"default": None, "type": None, "action": None},
        "run --lr": {"default": "2 * LR", "type": None, "action": "store_true"},
    }


@pytest.mark.parametrize(
    ("annotation", "name"),
    [(int, "int"), ("int", "int"), (dict[str, str], "dict[str, str]"), ("typing.Optional[float]", "float | None"),
     ("Dict[str, int]", "dict[str, int]"), (int | None, "int | None")],
)  # fmt: skip
def test_a_type_is_named_alike_however_it_is_spelled(annotation, name):
    from compat.child.described import type_name

    assert type_name(annotation) == name
