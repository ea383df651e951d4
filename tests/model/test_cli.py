"""The command line: answers on stdout, the rest on stderr, mistakes in one line with exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from nanovlm import cli
from nanovlm.commands.generate import Printer, visible
from tests.model.helpers import tiny_model


def run(*arguments, capsys):
    """(exit code, stdout, stderr) of one command in this process."""
    try:
        code = cli.main(list(map(str, arguments)))
    except SystemExit as error:
        code = error.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize("name", ["tiny", "tiny_original_small"])
def test_a_preset_answers_offline_and_says_that_its_weights_are_random(picture_file, capsys, name):
    code, out, err = run(
        "generate",
        "--use_preset",
        name,
        "--image",
        picture_file,
        "--generations",
        2,
        "--max_new_tokens",
        5,
        capsys=capsys,
    )
    assert code == 0 and ">> Generation 1: " in out and ">> Generation 2: " in out
    assert "random weights" in err and "random" not in out


def test_json_is_one_object_and_a_seed_repeats_it(picture_file, capsys):
    line = ["generate", "--use_preset", "tiny", "--image", picture_file, picture_file]
    line += ["--generations", 2, "--json", "--max_new_tokens", 6, "--prompt", "two?"]
    first = json.loads(run(*line, capsys=capsys)[1])
    assert (
        len(first["generations"]) == 2
        and first["prompt"] == "two?"
        and first["images"] == [str(picture_file)] * 2
    )
    assert json.loads(run(*line, capsys=capsys)[1]) == first
    assert json.loads(run(*line, "--seed", 1, capsys=capsys)[1])["generations"] != first["generations"]


def test_a_checkpoint_folder_answers_and_greedy_answers_are_equal(tmp_path, picture_file, capsys):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    line = [
        "generate",
        "--checkpoint",
        tmp_path,
        "--image",
        picture_file,
        "--json",
        "--greedy",
        "--max_new_tokens",
        6,
    ]
    code, out, err = run(*line, capsys=capsys)
    answers = json.loads(out)["generations"]
    assert (code, err, len(answers), len(set(answers))) == (0, "", 5, 1)
    assert answers[0] == model.answer(str(picture_file), "What is this?", greedy=True, max_new_tokens=6)


def test_a_question_needs_no_picture(capsys):
    code, out, _ = run(
        "generate", "--use_preset", "tiny", "--generations", 1, "--max_new_tokens", 3, "--json", capsys=capsys
    )
    assert code == 0 and json.loads(out)["tiles"] == 0


@pytest.mark.parametrize("as_json", [False, True])
def test_memory_is_told_on_request_and_said_to_be_the_processs_without_cuda(capsys, as_json):
    line = ["generate", "--use_preset", "tiny", "--generations", 1, "--max_new_tokens", 2, "--device", "cpu"]
    out = run(*line, "--measure_vram", *["--json"] * as_json, capsys=capsys)[1]
    if as_json:
        peaks = [json.loads(out)["peak_memory"][stage]["resident_bytes"] for stage in ("loading", "generating")]
        assert 50e6 < peaks[0] <= peaks[1]
        assert "peak_memory" not in json.loads(run(*line, "--json", capsys=capsys)[1])
    else:
        lines = out.splitlines()[-2:]
        assert [words.partition(":")[0] for words in lines] == ["peak memory of loading", "peak memory of generating"]
        assert all("MB resident" in words and "CUDA alone" in words for words in lines)
        assert "peak memory" not in run(*line, capsys=capsys)[1]


@pytest.mark.gpu
def test_memory_of_a_device_is_what_was_allocated_there(capsys):
    line = ["generate", "--use_preset", "tiny", "--generations", 1, "--max_new_tokens", 2, "--device", "cuda"]
    memory = json.loads(run(*line, "--measure_vram", "--json", capsys=capsys)[1])["peak_memory"]
    weights = sum(p.numel() * p.element_size() for p in tiny_model().parameters())
    assert weights <= memory["loading"]["allocated_bytes"] <= memory["loading"]["reserved_bytes"]
    assert memory["generating"]["allocated_bytes"] > weights


def test_an_answer_too_long_says_what_fits_and_prints_no_title(capsys):
    line = ["generate", "--use_preset", "tiny", "--generations", 1, "--prompt", "x"]
    code, out, err = run(*line, "--max_new_tokens", 5000, capsys=capsys)
    fits = re.search(r"max_new_tokens=(\d+) still fits", err)
    assert (code, out) == (2, "") and fits
    assert run(*line, "--max_new_tokens", int(fits[1]) + 1, capsys=capsys)[0] == 2
    assert run(*line, "--max_new_tokens", fits[1], "--greedy", capsys=capsys)[0] == 0


MISTAKES = {
    "no preset 'tinny'; did you mean 'tiny'": ["--use_preset", "tinny"],
    "no such folder": ["--checkpoint", "/nowhere/at/all"],
    "/ is a folder": ["--use_preset", "tiny", "--image", "/"],
    "does not exist": ["--use_preset", "tiny", "--image", "/nowhere/cat.png"],
    "--generations 0": ["--use_preset", "tiny", "--generations", "0"],
    "--device gpu9": ["--use_preset", "tiny", "--device", "gpu9"],
    "which model?": [],
    "not allowed with": ["--use_preset", "tiny", "--checkpoint", "x"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(message, capsys):
    code, out, err = run("generate", *MISTAKES[message], capsys=capsys)
    assert code == 2 and out == "" and message in err
    assert "Traceback" not in err and len(err.strip().splitlines()[-1]) < 400


def test_a_picture_that_is_none_is_a_mistake(tmp_path, capsys):
    (tmp_path / "x.png").write_text("no")
    code, _, err = run("generate", "--use_preset", "tiny", "--image", tmp_path / "x.png", capsys=capsys)
    assert code == 2 and "no picture" in err and len(err.splitlines()) == 1


def test_help_shows_a_line_that_can_be_pasted(capsys):
    for arguments in (["--help"], ["generate", "--help"]):
        code, out, _ = run(*arguments, capsys=capsys)
        assert code == 0 and "python -m nanovlm generate --use_preset tiny" in out


def test_characters_of_several_tokens_are_printed_whole(capsys):
    tokenizer = tiny_model().tokenizer
    printer = Printer(tokenizer, "> ")
    for token in tokenizer.encode("aé🙂b"):
        printer.put([token])
        assert "\N{REPLACEMENT CHARACTER}" not in capsys.readouterr().out.replace("> ", "")
    printer.end()


def test_the_module_runs_as_a_program(picture_file):
    line = [sys.executable, "-m", "nanovlm", "generate", "--use_preset", "tiny", "--image", str(picture_file),
            "--prompt", "What is this?", "--generations", "1", "--max_new_tokens", "3"]  # fmt: skip
    shown = subprocess.run(line, capture_output=True)
    assert shown.returncode == 0 and shown.stdout.startswith(b">> Generation 1: "), shown.stderr
    wrong = subprocess.run([*line[:4], "--use_preset", "nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("nanovlm: no preset 'nothing'")


def test_control_characters_of_an_answer_are_written_out_and_not_obeyed():
    assert visible("a\x1b[2Jb\x07\x7f\x9b\n\té") == "a\\x1b[2Jb\\x07\\x7f\\x9b\n\té"


def test_every_image_flag_adds_a_picture():
    options = cli.parser().parse_args(["generate", "--image", "a.png", "--image", "b.png", "c.png"])
    assert options.image == ["a.png", "b.png", "c.png"]
