from dataclasses import dataclass


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
    lm_vocab_size: int = 320
    lm_max_position_embeddings: int = 512
    lm_max_length: int = 96
    lm_model_type: str = "example/language-base"
    lm_tokenizer: str = "example/words"
    mp_pixel_shuffle_factor: int = 2


@dataclass
class TrainConfig:
    lr_mp: float = 2e-3
    lr_backbones: float = 1e-4
    batch_size: int = 16
    epochs: int = 5
    compile: bool = False
