"""A stand-in for the Hub: small files in the cache of the real ``huggingface_hub`` client.

Unusual: no client is patched. The child's HF_HOME is empty and offline, so a file a fork asks for is found
exactly when it was put here, and ``transformers`` treats it as it would treat the real one: including
every way in which a new ``transformers`` breaks old code.
"""

from __future__ import annotations

import json
import os

from .kinds import KINDS

REVISION = "0" * 40
BASE_VOCABULARY = 320
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
           "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
           "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"]  # fmt: skip
MERGES = """Ċ Ċ|Ġ Ġ|ĉ ĉ|Ġ Ċ|ĠĠ Ġ|t h|Ġ t|h e|Ġt he|a n|i n|e r|o n|r e|Ġ a|Ġ w|a t|i s|o r|e n|Ġ o|i t|o u|Ġ s|e s|Ġ c
Ġ b|Ġ f|i ng|n g|Ġ i|Ġo f|an d|Ġ m|Ġ p|Ġ d|in g|Ġi s|Ġ h|l l|e d|a s|Ġ I|a r|s t|Ġi n|Ġt o|m a|g e|Ġan d""".replace(
    "\n", "|"
).split("|")

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
          "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}  # fmt: skip
LANGUAGE = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": 2, "vocab_size": BASE_VOCABULARY, "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5, "rope_theta": 100000, "tie_word_embeddings": True}  # fmt: skip


def add_repository(name, role):
    """Put repository ``name`` into the cache: config, tokenizer and, for "vision" or "language", weights.

    Returns the snapshot's folder. A repository that is there already is left alone.
    """
    home = os.environ["HF_HOME"]
    base = os.path.join(home, "hub", "models--" + name.replace("/", "--"))
    snapshot = os.path.join(base, "snapshots", REVISION)
    if os.path.isdir(snapshot):
        return snapshot
    os.makedirs(os.path.join(base, "refs"), exist_ok=True)
    os.makedirs(snapshot)
    with open(os.path.join(base, "refs", "main"), "w") as stream:
        stream.write(REVISION)
    files = dict(tokenizer_files())
    files["config.json"], shapes = backbone(name, role)
    for file, content in files.items():
        with open(os.path.join(snapshot, file), "w", encoding="utf-8") as stream:
            stream.write(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False))
    if role in ("vision", "language"):
        from safetensors.torch import save_file

        save_file(draw_all(name, shapes), os.path.join(snapshot, "model.safetensors"), metadata={"format": "pt"})
    return snapshot


def backbone(name, role):
    """(config.json, {key: shape}) of repository ``name``: its kind of KINDS, else a tiny SigLIP or Llama."""
    kind = name.rpartition("/")[2]
    if name == f"compat/{kind}" and kind in KINDS:
        return KINDS[kind](BASE_VOCABULARY)
    return (vision_config(), vision_shapes()) if role == "vision" else (language_config(), language_shapes())


def draw_all(repository, shapes):
    """Random tensors for ``shapes``, seeded by repository and key."""
    from .probe import draw

    return {key: draw(f"{repository} {key}", shape) for key, shape in shapes.items()}


def vision_config():
    """config.json of a tiny SigLIP as the Hub writes it."""
    return {"architectures": ["SiglipModel"], "model_type": "siglip",
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "text_config": {"model_type": "siglip_text_model", "vocab_size": 64, "hidden_size": 32,
                            "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}}  # fmt: skip


def language_config():
    """config.json of a tiny Llama as SmolLM2's repositories have it (rope_theta at the top level)."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 2, "attention_bias": False, "attention_dropout": 0.0,
            "mlp_bias": False, "rope_scaling": None, "torch_dtype": "float32", **LANGUAGE}  # fmt: skip


def vision_shapes():
    """{key: shape} of the Hub's SigLIP vision file."""
    d, inner, patch = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    shapes = {
        "vision_model.embeddings.patch_embedding.weight": (d, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (d,),
        "vision_model.embeddings.position_embedding.weight": ((VISION["image_size"] // patch) ** 2, d),
        "vision_model.post_layernorm.weight": (d,),
        "vision_model.post_layernorm.bias": (d,),
    }
    for layer in range(VISION["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{at}self_attn.{part}.weight"], shapes[f"{at}self_attn.{part}.bias"] = (d, d), (d,)
        for part in ("layer_norm1", "layer_norm2"):
            shapes[f"{at}{part}.weight"] = shapes[f"{at}{part}.bias"] = (d,)
        shapes[f"{at}mlp.fc1.weight"], shapes[f"{at}mlp.fc1.bias"] = (inner, d), (inner,)
        shapes[f"{at}mlp.fc2.weight"], shapes[f"{at}mlp.fc2.bias"] = (d, inner), (d,)
    return shapes


def language_shapes():
    """{key: shape} of the Hub's SmolLM2 file."""
    d, inner = LANGUAGE["hidden_size"], LANGUAGE["intermediate_size"]
    kv = d // LANGUAGE["num_attention_heads"] * LANGUAGE["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (BASE_VOCABULARY, d), "model.norm.weight": (d,)}
    for layer in range(LANGUAGE["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes[at + "self_attn.q_proj.weight"] = shapes[at + "self_attn.o_proj.weight"] = (d, d)
        shapes[at + "self_attn.k_proj.weight"] = shapes[at + "self_attn.v_proj.weight"] = (kv, d)
        shapes[at + "mlp.gate_proj.weight"] = shapes[at + "mlp.up_proj.weight"] = (inner, d)
        shapes[at + "mlp.down_proj.weight"] = (d, inner)
        shapes[at + "input_layernorm.weight"] = shapes[at + "post_attention_layernorm.weight"] = (d,)
    return shapes


def tokenizer_files():
    """SmolLM2's tokenizer files in small: the same kinds of tokens, classes and pre-tokenizers."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL)}
    for symbol in byte_symbols():
        vocabulary[symbol] = len(vocabulary)
    merges = []
    for merge in MERGES:
        left, right = merge.split()
        if len(vocabulary) < BASE_VOCABULARY and left in vocabulary and right in vocabulary:
            vocabulary.setdefault(left + right, len(vocabulary))
            merges.append(merge)
    while len(vocabulary) < BASE_VOCABULARY:
        vocabulary[f"<unused_{len(vocabulary)}>"] = len(vocabulary)
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, t in enumerate(SPECIAL)]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence",
                              "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
            "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": "<|endoftext|>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
                      "merges": merges},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "clean_up_tokenization_spaces": False,
            "model_max_length": 8192, "chat_template": CHAT_TEMPLATE,
            "added_tokens_decoder": {
                str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added
            },
        },
        "special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
                                    "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"},
        "vocab.json": vocabulary,
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
    }  # fmt: skip


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_symbols():
    """The 256 printable symbols byte-level BPE writes bytes as, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbols = {b: chr(b) for b in printable}
    symbols.update({b: chr(256 + i) for i, b in enumerate(others)})
    return [symbols[b] for b in range(256)]
