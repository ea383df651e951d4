"""Accuracy: questions with a choice and open ones, of benchmarks and of drawings; see docs/evaluation.md."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["cli_evaluate"]


def cli_evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """What ``nanovlm evaluate`` does, from Python: upstream's ``cli_evaluate(Namespace(model=, tasks=, batch_size=))``.

    model: a folder, a repository, or a VisionLanguageModel itself. What is not given is as on the command line,
    but no file is written unless ``output`` names it. Returns the results; raises nanovlm's errors.
    """
    from nanovlm.commands.evaluate import evaluated, with_defaults

    return evaluated(with_defaults(options))
