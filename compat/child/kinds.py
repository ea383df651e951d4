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


def dinov2(vocabulary):
    """A tiny DINOv2 in the form of facebook/dinov2-small: CLS and mask token, a table of positions."""
    d, patch, image = 32, 8, 32
    config = {
        "architectures": ["Dinov2Model"], "model_type": "dinov2", "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": d,
        "image_size": image, "layer_norm_eps": 1e-6, "layerscale_value": 1.0, "mlp_ratio": 2,
        "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 2, "patch_size": patch,
        "qkv_bias": True, "torch_dtype": "float32", "use_swiglu_ffn": False,
    }  # fmt: skip
    shapes = {
        "embeddings.cls_token": (1, 1, d),
        "embeddings.mask_token": (1, d),
        "embeddings.position_embeddings": (1, 1 + (image // patch) ** 2, d),
        "embeddings.patch_embeddings.projection.weight": (d, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (d,),
        "layernorm.weight": (d,),
        "layernorm.bias": (d,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        for part in ("attention.query", "attention.key", "attention.value", "output.dense"):
            shapes[f"{at}attention.{part}.weight"], shapes[f"{at}attention.{part}.bias"] = (d, d), (d,)
        for number in (1, 2):
            shapes[f"{at}norm{number}.weight"] = shapes[f"{at}norm{number}.bias"] = (d,)
            shapes[f"{at}layer_scale{number}.lambda1"] = (d,)
        shapes[f"{at}mlp.fc1.weight"], shapes[f"{at}mlp.fc1.bias"] = (2 * d, d), (2 * d,)
        shapes[f"{at}mlp.fc2.weight"], shapes[f"{at}mlp.fc2.bias"] = (d, 2 * d), (d,)
    return config, shapes


def dinov3(vocabulary):
    """A tiny DINOv3 in the form of facebook/dinov3-vits16plus-pretrain-lvd1689m: registers, a gated MLP."""
    d, inner, patch = 32, 48, 8
    config = {
        "architectures": ["DINOv3ViTModel"], "model_type": "dinov3_vit", "attention_dropout": 0.0,
        "drop_path_rate": 0.0, "hidden_act": "silu", "hidden_size": d, "image_size": 32,
        "intermediate_size": inner, "key_bias": False, "layer_norm_eps": 1e-5, "layerscale_value": 1.0,
        "mlp_bias": True, "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 2,
        "num_register_tokens": 4, "patch_size": patch, "pos_embed_jitter": None, "pos_embed_rescale": 2.0,
        "pos_embed_shift": None, "proj_bias": True, "query_bias": True, "rope_theta": 100.0,
        "torch_dtype": "float32", "use_gated_mlp": True, "value_bias": True,
    }  # fmt: skip
    shapes = {
        "embeddings.cls_token": (1, 1, d),
        "embeddings.mask_token": (1, 1, d),
        "embeddings.register_tokens": (1, 4, d),
        "embeddings.patch_embeddings.weight": (d, 3, patch, patch),
        "embeddings.patch_embeddings.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"layer.{layer}."
        for part in "qkvo":
            shapes[f"{at}attention.{part}_proj.weight"] = (d, d)
            if part != "k":
                shapes[f"{at}attention.{part}_proj.bias"] = (d,)
        for number in (1, 2):
            shapes[f"{at}norm{number}.weight"] = shapes[f"{at}norm{number}.bias"] = (d,)
            shapes[f"{at}layer_scale{number}.lambda1"] = (d,)
        for part in ("gate", "up"):
            shapes[f"{at}mlp.{part}_proj.weight"], shapes[f"{at}mlp.{part}_proj.bias"] = (inner, d), (inner,)
        shapes[f"{at}mlp.down_proj.weight"], shapes[f"{at}mlp.down_proj.bias"] = (d, inner), (d,)
    return config, shapes


KINDS = {"gemma": gemma, "dinov2": dinov2, "dinov3": dinov3}
