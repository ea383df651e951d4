from dataclasses import dataclass, field


@dataclass
class VLMConfig:
    vit_hidden_dim: int = 64
    vit_inter_dim: int = 128
    vit_patch_size: int = 16
    vit_img_size: int = 64
    vit_n_heads: int = 4
    vit_n_blocks: int = 3
    vit_model_type: str = "example/vision-base"
    lm_hidden_dim: int = 96
    lm_inter_dim: int = 192
    lm_n_heads: int = 4
    lm_n_kv_heads: int = 2
    lm_n_blocks: int = 3
    lm_base_vocab_size: int = 320
    extra_token_amount: int = 1
    lm_vocab_size: int = lm_base_vocab_size + extra_token_amount
    lm_max_position_embeddings: int = 512
    lm_max_length: int = 96
    lm_model_type: str = "example/language-base"
    lm_tokenizer: str = "example/words"
    mp_pixel_shuffle_factor: int = 2
    mp_image_token_length: int = 4
    vlm_extra_tokens: dict[str, str] = field(default_factory=lambda: {"image_token": "<|image|>"})
