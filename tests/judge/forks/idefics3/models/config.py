from dataclasses import dataclass


@dataclass
class DocConfig:
    vit_hidden_dim: int = 64
    vit_inter_dim: int = 128
    vit_patch_size: int = 16
    vit_img_size: int = 64
    vit_n_heads: int = 4
    vit_n_blocks: int = 3
    lm_hidden_dim: int = 96
    lm_inter_dim: int = 192
    lm_n_heads: int = 4
    lm_n_kv_heads: int = 2
    lm_n_blocks: int = 3
    lm_vocab_size: int = 320
    lm_max_position_embeddings: int = 512
    lm_tokenizer: str = "example/words"
    mp_pixel_shuffle_factor: int = 2
    image_token_id: int = 16
