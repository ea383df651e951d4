"""A language model whose matrices are int8, by torchao: a quarter of float32's bytes, for answering alone.

Unusual: weights alone are quantized, a scale for each row; sums are computed as before. What is tied to the
embedding stays as it is, because a word is looked up in it. The step that reads weights itself (language/llama.py)
gives way to the modules.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nanovlm.errors import ConfigError
from nanovlm.vlm import VisionLanguageModel


def quantize_int8(model: VisionLanguageModel) -> VisionLanguageModel:
    """``model`` itself, in place; it neither learns nor saves any more. Raises ConfigError without torchao."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ConfigError("int8 weights need the package torchao: pip install 'nanovlm[quantize]'") from None
    decoder = model.decoder.requires_grad_(False)
    tied = {id(module.weight) for module in decoder.modules() if isinstance(module, nn.Embedding)}
    chosen = [name for name, m in decoder.named_modules() if isinstance(m, nn.Linear) and id(m.weight) not in tied]
    for name in chosen:
        decoder.set_submodule(name, _plain(decoder.get_submodule(name)))
    quantize_(decoder, Int8WeightOnlyConfig(version=2), filter_fn=lambda module, name: name in set(chosen))
    return model


def stored_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, of a quantized one its numbers and scales; tied ones once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: Any) -> int:
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor.numel() * tensor.element_size()
    inner, _ = tensor.__tensor_flatten__()  # torchao's subclass says which tensors it is made of
    return sum(_bytes(getattr(tensor, name)) for name in inner)


def _plain(linear: Any) -> nn.Linear:
    """The same weights in torch's own Linear: layers.Linear views them in pieces, which int8 ones do not allow."""
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    plain.weight, plain.bias = linear.weight, linear.bias
    return plain.train(linear.training)
