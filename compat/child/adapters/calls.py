"""Calls of a target's model by its own signature, and what they give as logits, loss and ids.

Shapes: B rows, T padded length, V vocabulary.
"""

from __future__ import annotations

import contextlib

import torch

from .. import probe
from ..protocol import NotSupported, theirs
from .configs import signature_names


class TargetFault(Exception):
    """The target answered, but not as its own interface promises."""

    _compat_raised_by_target = True


class Calls:
    """The part of an Adapter that runs its model."""

    IMAGE_NAMES = ("images", "image", "pixel_values")
    LABEL_NAMES = ("targets", "labels")

    def arguments(self, batch, method, form=None):
        """Keyword arguments for ``forward`` or ``generate`` by the target's own names."""
        taken = signature_names(getattr(self.subject.model_class, method))
        arguments = {
            "input_ids": batch.input_ids,
            self.parameter_of(method, self.IMAGE_NAMES): self.images(batch.pictures, form),
        }
        # a mask of ones alone says nothing: early versions generate without one
        if batch.attention_mask is not None and ("attention_mask" in taken or not bool(batch.attention_mask.all())):
            if "attention_mask" not in taken:
                raise NotSupported(
                    f"{method} takes no attention_mask, so rows of different length cannot share a batch"
                )
            arguments["attention_mask"] = batch.attention_mask
        return arguments

    def call(self, batch, targets=None, form=None):
        """(logits or hidden states, loss) of one forward call."""
        arguments = self.arguments(batch, "forward", form)
        if targets is not None:
            name = self.parameter_of("forward", self.LABEL_NAMES)
            if name is None:
                raise NotSupported("forward takes neither targets nor labels")
            arguments[name] = targets
        with theirs():
            out = self.model(**arguments)
        return unpack(out)

    def logits(self, batch):
        """[(T_text, V) float32] a row: logits at the row's own text tokens."""
        out, _ = self.call(batch)
        if not isinstance(out, torch.Tensor):
            raise TargetFault(f"forward without targets gave {type(out).__name__} where logits belong")
        if out.shape[-1] != self.vocab_size:
            out = self.head()(out)
        if out.dim() != 3 or out.shape[0] != batch.input_ids.shape[0]:
            raise TargetFault(
                f"forward without targets gave {tuple(out.shape)} for input_ids {tuple(batch.input_ids.shape)}"
            )
        offset = out.shape[1] - batch.input_ids.shape[1]
        if offset not in (0, self.image_tokens):
            raise TargetFault(f"forward gave {out.shape[1]} positions for {batch.input_ids.shape[1]} ids")
        return [out[i, [offset + t for t in where]].float() for i, where in enumerate(batch.text)]

    def head(self):
        """The module that turns hidden states into logits."""
        for name, module in self.model.named_modules():
            if name.split(".")[-1] in ("head", "lm_head") and isinstance(module, torch.nn.Linear):
                return module
        raise TargetFault(f"no output layer 'head' of {self.vocab_size} rows turns hidden states into logits")

    def loss(self, batch):
        """The loss of a batch with targets, as a scalar tensor with its graph."""
        _, loss = self.call(batch, batch.targets)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise TargetFault(f"forward with targets returned {type(loss).__name__} instead of a scalar loss")
        return loss

    def generate(self, batch, max_new_tokens, greedy=True, seed=0, eos=None):
        """[[new ids]] a row."""
        arguments = self.arguments(batch, "generate")
        taken = signature_names(self.subject.model_class.generate)
        if not {"max_new_tokens", "kwargs"} & set(taken):
            raise NotSupported("generate takes no max_new_tokens")
        arguments["max_new_tokens"] = max_new_tokens
        choose_greedily = contextlib.nullcontext()
        if "greedy" in taken:
            arguments["greedy"] = greedy
        elif "do_sample" in taken:
            arguments["do_sample"] = not greedy
        elif greedy:  # early versions only sample: the likeliest draw is the greedy choice
            choose_greedily = likeliest_draw()
        if eos is not None and "eos_token_id" in taken:
            arguments["eos_token_id"], eos = eos, None
        probe.seed(seed)
        with self.ending_at(eos), choose_greedily, theirs():
            out = self.model.generate(**arguments)
        return self.new_tokens(out, batch, max_new_tokens)

    def new_tokens(self, out, batch, max_new_tokens):
        """Strip a repeated prompt; a list of lists of ids."""
        if not isinstance(out, torch.Tensor) or out.dim() != 2 or out.shape[0] != batch.input_ids.shape[0]:
            shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise TargetFault(f"generate returned {shape} instead of ids of shape ({batch.input_ids.shape[0]}, new)")
        prompt = batch.input_ids.shape[1]
        if out.shape[1] > max_new_tokens and torch.equal(out[:, :prompt], batch.input_ids):
            out = out[:, prompt:]
        return out.tolist()

    @contextlib.contextmanager
    def ending_at(self, eos):
        """Make ``eos`` the end-of-sequence id inside the block."""
        if eos is None:
            yield
            return
        if not self.takes["eos"]:
            raise NotSupported("generate of this version knows no end-of-sequence token")
        if self.tokenizer is None or getattr(self.model, "tokenizer", None) is not self.tokenizer:
            raise NotSupported("the model holds no tokenizer to set an end-of-sequence token on")
        if not hasattr(self.tokenizer, "eos_token"):
            raise NotSupported("the model's tokenizer has no eos_token to set")
        before, token = self.tokenizer.eos_token, self.tokenizer.convert_ids_to_tokens(eos)
        if token is None:
            raise NotSupported(f"the tokenizer has no token for id {eos}, so it cannot be the end of a text")
        self.tokenizer.eos_token = token
        try:
            yield
        finally:
            self.tokenizer.eos_token = before


@contextlib.contextmanager
def likeliest_draw():
    """Replace random draws by the likeliest index."""
    real = torch.multinomial
    torch.multinomial = lambda probabilities, *a, **k: probabilities.argmax(-1, keepdim=True)
    try:
        yield
    finally:
        torch.multinomial = real


def unpack(out):
    """(first output, loss) of a tuple, dict, ModelOutput or tensor."""
    if isinstance(out, torch.Tensor):
        return out, None
    if isinstance(out, dict) or hasattr(out, "logits"):
        get = out.get if isinstance(out, dict) else lambda name: getattr(out, name, None)
        return get("logits"), get("loss")
    if isinstance(out, (tuple, list)) and out:
        pair = list(out[:2]) + [None]
        if isinstance(pair[0], torch.Tensor) and pair[0].dim() == 0:  # (loss, logits)
            pair[0], pair[1] = pair[1], pair[0]
        return pair[0], pair[1]
    raise TargetFault(f"forward returned {type(out).__name__}")
