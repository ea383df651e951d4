"""Idefics3 models, processors and config files as transformers makes them, for the tests of ours."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nanovlm import VisionLanguageModel
from nanovlm.presets import idefics3_tokens
from tests.model.helpers import scale

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-5  # fp32, outputs of order 1

# Granite-Docling's way to write a chat, for contents in one piece or in parts.
ROLES = (
    "{% for turn in messages %}<|start_of_role|>{{ turn.role }}<|end_of_role|>{% if turn.content is string %}"
    "{{ turn.content }}{% else %}{% for part in turn.content %}"
    "{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{% endif %}<|end_of_text|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
# SmolVLM's: contents must come in parts, and the first one decides about a space.
PARTS = (
    "<|start_of_role|>{% for turn in messages %}{{ turn['role'] | capitalize }}"
    "{{ ':' if turn['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in turn['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SPECIALS = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", *idefics3_tokens(4).values()]


def byte_tokenizer():
    """Bytes, "\\n\\n" as one token, and the special tokens of Granite-Docling inside the vocabulary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "ĊĊ", *SPECIALS]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return made


VOCABULARY = byte_tokenizer().get_vocab_size()


def positions_are_plain() -> bool:
    """Whether this transformers gives patch n of a full picture row n of the position table."""
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    config = transformers.Idefics3Config(vision_config={"hidden_size": 4, "image_size": 64, "patch_size": 16})
    embeddings = Idefics3VisionEmbeddings(config.vision_config)
    with torch.no_grad():
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(16.0)[:, None].expand(16, 4))
        found = embeddings(torch.zeros(1, 3, 64, 64), torch.ones(1, 4, 4, dtype=torch.bool))
    return found[0, :, 0].tolist() == list(range(16))


same_positions = pytest.mark.skipif(
    not positions_are_plain(),
    reason="this transformers (4.56 and 4.57 do) reads positions one row and column too low: 0, 0, 1, 2, ...",
)


def processor(tile=64, longest=128, tokens=4, template=ROLES):
    try:
        from transformers.models.idefics3 import image_processing_pil_idefics3 as images

        kind = images.Idefics3ImageProcessorPil
    except ImportError:  # transformers 4
        kind = transformers.Idefics3ImageProcessor
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), eos_token=SPECIALS[0], pad_token=SPECIALS[0], bos_token=SPECIALS[1]
    )
    pictures = kind(size={"longest_edge": longest}, max_image_size={"longest_edge": tile})
    return transformers.Idefics3Processor(pictures, words, image_seq_len=tokens, chat_template=template)


def reference(tile=64, patch=16, shuffle=2, tied=True, **text):
    """A tiny Idefics3ForConditionalGeneration with outputs of order 1."""
    return scale(transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": tile, "patch_size": patch,
        },
        text_config={
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
            "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
            "tie_word_embeddings": tied, "bos_token_id": 1, "pad_token_id": 0,
            "eos_token_id": byte_tokenizer().token_to_id(SPECIALS[0]), **text,
        },
        scale_factor=shuffle, tie_word_embeddings=tied,
        image_token_id=byte_tokenizer().token_to_id("<image>"),
    )))  # fmt: skip


def saved(model, folder, with_processor=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        if with_processor is not None:
            with_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    """(transformers' model, ours, transformers' processor) of one folder that transformers wrote."""
    theirs, their_processor = reference(), processor()
    folder = saved(theirs, tmp_path_factory.mktemp("granite"), their_processor)
    return theirs, VisionLanguageModel.from_pretrained(folder).eval(), their_processor


def asked(their_processor, pictures, question):
    """What transformers makes of a question about pictures."""
    parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    text = their_processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = their_processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
    inputs.pop("token_type_ids", None)  # transformers 4's tokenizer makes what its model refuses
    return inputs


def difference(ours, theirs):
    assert 0.2 < theirs.std() < 20, "the comparison needs outputs of order 1"
    return (ours - theirs).abs().max().item()


# What the published files say.
PUBLISHED = {
    "architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3", "scale_factor": 4,
    "image_token_id": 100270, "tie_word_embeddings": True, "vocab_size": 100352,
    "text_config": {
        "model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_act": "silu",
        "mlp_bias": False, "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192,
        "vocab_size": 100352,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "idefics3_vision", "hidden_act": "gelu_pytorch_tanh", "hidden_size": 768,
        "intermediate_size": 3072, "patch_size": 16, "layer_norm_eps": 1e-06, "num_attention_heads": 12,
        "num_channels": 3, "num_hidden_layers": 12, "image_size": 512, "size": {"longest_edge": 512},
    },
}  # fmt: skip
PUBLISHED_PICTURES = {
    "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "resample": 1, "rescale_factor": 0.00392156862745098,
    "max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048},
}  # fmt: skip


def written(folder, config=PUBLISHED, pictures=PUBLISHED_PICTURES):
    (folder / "config.json").write_text(json.dumps(config))
    if pictures is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder
