"""``nanovlm evaluate``: accuracy on MMStar, A-OKVQA and drawings, what an answer costs, and how long it takes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nanovlm.commands import add_slim_flags, device_of, slimming
from nanovlm.errors import ConfigError

EXAMPLE = "example: python -m nanovlm evaluate --use_preset tiny --tasks synthetic --max-samples 8"


def add(commands: argparse._SubParsersAction) -> None:
    """Describe the arguments."""
    command = commands.add_parser("evaluate", help="accuracy on benchmarks, and what an answer costs", epilog=EXAMPLE)
    command.set_defaults(run=run)
    add_arguments(command)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command, without the command."""
    source = command.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR|REPO", help="a checkpoint, the folder of a run, or a repository")
    source.add_argument("--use_preset", metavar="NAME", help="random weights: to see that it runs")
    add_slim_flags(command)
    add = command.add_argument
    add("--tasks", default="aokvqa", metavar="A,B", help="mmstar, aokvqa, synthetic; or lmms-eval's (default: aokvqa)")
    add("--split", metavar="NAME", help="another split than the task's own")
    add("--data", action="append", default=[], metavar="TASK=DIR", help="read a task from a folder or repository")
    add("--max-samples", "--max_samples", "--limit", type=int, metavar="N", help="questions of each task at most")
    add("--mode", choices=("mcq", "oa", "both"), default="both", help="multiple choice, open answers (default: both)")
    add("--no-letters", "--no_letters", action="store_true", help="choices by likelihood alone; generate no letters")
    add("--batch_size", "--batch-size", type=int, default=8, metavar="N", help="questions at once (default: 8)")
    add("--int8", action="store_true", help="language model in int8 weights; needs nanovlm[quantize]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--output", metavar="FILE", help="where results go (default: results/results_res{RESOLUTION}.json)")
    add("--seed", type=int, default=0, help="of random weights (default: 0)")
    add("--json", action="store_true", help="print the JSON instead of a table")


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """``options`` with what the command line would add; ``model`` may be a model. No output unless it is named."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    known = vars(parser.parse_args([]))
    strange = sorted(set(vars(options)) - set(known))
    if strange:
        raise ConfigError(f"cli_evaluate has no option {strange[0]!r}; there are: {', '.join(known)}")
    return argparse.Namespace(**{**known, "output": "", **vars(options)})


def run(options: argparse.Namespace) -> int:
    """``nanovlm evaluate``."""
    results = evaluated(options, shown=True)
    print(json.dumps(results, indent=2) if options.json else table(results))
    return 0


def evaluated(options: argparse.Namespace, shown: bool = False) -> dict[str, Any]:
    """The results of an evaluation, which are also in ``options.output``; "" writes none."""
    from nanovlm.evaluate.questions import TASKS

    if options.model is None and options.use_preset is None:
        raise ConfigError("which model? Give --model DIR or REPO, or --use_preset NAME")
    tasks = tuple(name for name in options.tasks.replace(" ", ",").split(",") if name)
    foreign = [name for name in tasks if name not in TASKS]
    if foreign:
        return _by_lmms_eval(options, tasks, foreign)
    from nanovlm.evaluate.run import Settings, evaluate, write_results

    settings = Settings(
        tasks, options.split, options.max_samples, options.mode, options.batch_size, not options.no_letters,
        data=dict(_pair(text) for text in options.data),
    )  # fmt: skip
    model, name = load(options)
    if options.int8:
        from nanovlm.quantize import quantize_int8

        quantize_int8(model)
    output = options.output
    if output is None:
        output = f"results/results_res{model.cfg.vit_img_size}.json"
    journal = Path(f"{output}.partial") if output else None
    try:
        results = evaluate(model, settings, name=name, journal=journal, shown=shown)
        if options.int8:
            results["quantization"] = "int8"
        if output:
            write_results(results, Path(output))
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error.strerror or error}") from None
    if journal:
        journal.unlink(missing_ok=True)
        print(f"nanovlm: wrote {output}", file=sys.stderr)
    return results


def load(options: argparse.Namespace) -> tuple[Any, str]:
    """(the model, ready to answer, its name) of --model or --use_preset, slimmed as the options say."""
    import os

    import torch

    from nanovlm.presets import preset
    from nanovlm.slimming import slim
    from nanovlm.train.checkpoints import resolve
    from nanovlm.vlm import VisionLanguageModel

    device = device_of(options.device)
    torch.manual_seed(options.seed)
    if isinstance(options.model, torch.nn.Module):
        model: Any = options.model
        return slim(model, **slimming(options)).to(device).eval(), type(model).__name__
    if options.use_preset:
        print(f"nanovlm: {options.use_preset} has random weights: its score means nothing", file=sys.stderr)
        model = VisionLanguageModel(preset(options.use_preset).slimmed(**slimming(options)), load_backbone=False)
    else:
        source = resolve(options.model) if os.path.isdir(options.model) else options.model
        model = slim(VisionLanguageModel.from_pretrained(source), **slimming(options))
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        if sum(parameter.numel() for parameter in model.parameters()) < 5_000_000:
            torch.set_num_threads(1)  # waking a second thread costs a tiny model more than half of its work
    return model.to(device).eval(), options.use_preset or str(options.model)


def table(results: dict[str, Any]) -> str:
    """Scores of each task and of all, and what an answer costs."""
    lines = [f"{'task':<12}{'samples':>8}{'mcq':>8}{'letter':>8}{'open':>8}"]

    def share(found: dict[str, Any], name: str) -> str:
        return f"{100 * found[name]:>7.1f}%" if name in found else f"{'-':>8}"

    for task, found in [*results["tasks"].items(), ("all", results)]:
        names = ("mcq_accuracy", "mcq_letter_accuracy", "oa_accuracy")
        lines.append(f"{task:<12}{found['samples']:>8}" + "".join(share(found, name) for name in names))
    lines.append(
        f"{results['total_tflops']:.6g} TFLOPs a question ({results['vit_manual_tflops']:.6g} of them vision), "
        f"{results['image_tokens_per_tile']} image tokens a tile of {results['resolution']} pixels"
    )
    return "\n".join(lines)


def _pair(text: str) -> tuple[str, str]:
    task, equals, folder = text.partition("=")
    if not equals or not task or not folder:
        raise ConfigError(f"--data {text}: expected TASK=FOLDER, such as mmstar=data/mmstar")
    return task, folder


def _by_lmms_eval(options: argparse.Namespace, tasks: tuple[str, ...], foreign: list[str]) -> dict[str, Any]:
    from nanovlm.evaluate import lmms
    from nanovlm.evaluate.questions import TASKS
    from nanovlm.evaluate.run import write_results

    if not lmms.installed():
        raise ConfigError(
            f"no task {foreign[0]!r}; there are: {', '.join(TASKS)}. Others are lmms-eval's: pip install lmms-eval"
        )
    model, name = load(options)
    scores = lmms.scores(model, tasks, options.max_samples, options.batch_size)
    results = {"model": name, "harness": "lmms-eval", "lmms_eval": scores}
    if options.output:
        write_results(results, Path(options.output))
    return results
