"""Backbones the stand-in Hub publishes beside SigLIP and SmolLM2: config.json and tensor shapes.

Unusual: a repository's name says its kind: ``compat/gemma`` holds a tiny Gemma 3. Adding a kind is one
function here that returns (config.json, {key: shape}), and one row in KINDS.
"""

from __future__ import annotations


def gemma(vocabulary):
    """A tiny Gemma 3 in the form of google/gemma-3-270m-it: heads wider than width over heads, both layers."""
    d, inner, heads, kv, head = 48, 96, 4, 1, 16
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    config = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
        "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1,
        "final_logit_softcapping": None, "head_dim": head, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": d, "intermediate_size": inner, "layer_types": layers, "max_position_embeddings": 256,
        "num_attention_heads": heads, "num_hidden_layers": len(layers), "num_key_value_heads": kv,
        "query_pre_attn_scalar": head, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000.0,
        "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 8, "torch_dtype": "bfloat16",
        "use_bidirectional_attention": False, "vocab_size": vocabulary,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (vocabulary, d), "model.norm.weight": (d,)}
    for layer in range(len(layers)):
        at = f"model.layers.{layer}."
        shapes[at + "self_attn.q_proj.weight"] = (heads * head, d)
        shapes[at + "self_attn.o_proj.weight"] = (d, heads * head)
        shapes[at + "self_attn.k_proj.weight"] = shapes[at + "self_attn.v_proj.weight"] = (kv * head, d)
        shapes[at + "self_attn.q_norm.weight"] = shapes[at + "self_attn.k_norm.weight"] = (head,)
        shapes[at + "mlp.gate_proj.weight"] = shapes[at + "mlp.up_proj.weight"] = (inner, d)
        shapes[at + "mlp.down_proj.weight"] = (d, inner)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{at}{norm}_layernorm.weight"] = (d,)
    return config, shapes


KINDS = {"gemma": gemma}
