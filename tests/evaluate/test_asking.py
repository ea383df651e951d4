"""Likelihoods of answers are what forward says they are, for every kind of model."""

from __future__ import annotations

import pytest
import torch

from nanovlm import VisionLanguageModel, preset, prompts
from nanovlm.evaluate.asking import batch_of, log_likelihoods, say
from tests.model.helpers import scale, tiny_model

TEXTS = ["What colour?", "What shape is it, please?"]
ANSWERS = [["red", "a blue one"], ["circle", "x", "square thing"]]


def loss_sums(model, batch, row, answers):
    """-(sum of the label's losses) of each answer to one question, by forward alone."""
    pictures = prompts.image_string(model.tokenizer, batch.grids[row], model.cfg.tokens_per_cell)
    for answer in answers:
        ids, taught = prompts.conversation(model.tokenizer, [(TEXTS[row], answer)], pictures)
        labels = [number if counts else -100 for number, counts in zip(ids, taught, strict=True)]
        targets = torch.tensor([[*labels[1:], -100]])
        with torch.no_grad():
            _, loss = model(torch.tensor([ids]), [batch.images[row]], targets=targets)
        yield -float(loss) * int((targets != -100).sum())


@pytest.mark.parametrize(
    "name", ["tiny", "tiny_siglip2_gemma", "tiny_original_small", "tiny_dinov2_smollm", "tiny_granite_docling"]
)
def test_a_likelihood_is_what_training_would_call_the_loss(name, picture):
    model = scale(VisionLanguageModel(preset(name), load_backbone=False))
    batch = batch_of(model, TEXTS, [[picture(90, 60)], [picture(60, 90, seed=1)]])
    found = log_likelihoods(model, batch, ANSWERS)
    for row, answers in enumerate(ANSWERS):
        wanted = list(loss_sums(model, batch, row, answers))
        assert [score for score, _ in found[row]] == pytest.approx(wanted, abs=2e-3)


def test_what_greedy_says_is_the_likeliest_at_every_token(picture):
    model = tiny_model()
    ids, taught = prompts.conversation(model.tokenizer, [("", "")])
    end = [number for number, counts in zip(ids, taught, strict=True) if counts][-1]
    batch = batch_of(model, ["What?"], [[picture()]])
    for loudest in ("x", "y"):
        (letter,) = model.tokenizer.encode(loudest, add_special_tokens=False)

        def shout(module, given, logits, letter=letter):
            """The letter first, the end after it."""
            louder = torch.zeros_like(logits)
            louder[..., end] = 50
            louder[..., letter] = 100 if logits.dim() == 2 else 0
            return logits + louder

        handle = model.decoder.head.register_forward_hook(shout)
        (found,) = log_likelihoods(model, batch, [["x", "y", "xx"]])
        handle.remove()
        assert [greedy for _, greedy in found] == [loudest == "x", loudest == "y", False]


def test_batches_do_not_change_answers(picture):
    model = tiny_model()
    pictures = [[picture(90, 60)], [picture(200, 90, seed=1)]]
    together = say(model, batch_of(model, TEXTS, pictures), 4)
    alone = [say(model, batch_of(model, [t], [p]), 4)[0] for t, p in zip(TEXTS, pictures, strict=True)]
    assert together == alone
