"""Idefics3 checkpoints (Granite-Docling, SmolVLM) against transformers: weights, tiles, prompts, answers."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nanovlm import VisionLanguageModel, get_image_processor, get_tokenizer, preset
from nanovlm.checkpoint import Checkpoint
from nanovlm.errors import ConfigError, ImageTokenMismatch, WeightsError
from nanovlm.granite_docling import Idefics3, save_for_transformers
from nanovlm.hub import weight_files
from nanovlm.presets import idefics3_tokens
from nanovlm.prompts import image_string
from nanovlm.weights import to_hub
from tests.model.helpers import pad, scale

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


# -- weights ----------------------------------------------------------------------------------------------


@same_positions
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tied": False},
        {"tile": 54, "patch": 2, "shuffle": 3},  # SmolVLM-2.2B's 27 patches a side
        {"tile": 52, "patch": 2},  # Idefics3-8B's 26
        {"head_dim": 32},
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(tmp_path, shape):
    theirs = reference(**shape)
    ours = VisionLanguageModel.from_pretrained(saved(theirs, tmp_path)).eval()
    side, slots = ours.cfg.vit_img_size, 2 * ours.cfg.mp_image_token_length
    ids = torch.randint(0, 250, (2, slots + 12))
    ids[:, 4 : 4 + slots] = ours.cfg.image_token_id
    pixels = torch.randn(2, 2, 3, side, side)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=pixels).logits
        got, loss = ours(ids, pixels)
        other, _ = ours(ids, -pixels)
    assert loss is None
    assert difference(got, want) <= TOLERANCE
    assert (got - other)[:, -1].abs().max() > 0.01, "the picture must count"


@same_positions
def test_a_smolvlm_checkpoint_gives_the_logits_of_transformers(tmp_path):
    config = reference().config.to_dict()
    config["vision_config"]["model_type"] = "smolvlm_vision"
    theirs = scale(transformers.SmolVLMForConditionalGeneration(
        transformers.SmolVLMConfig(**{**config, "model_type": "smolvlm"})
    ))  # fmt: skip
    ours = VisionLanguageModel.from_pretrained(saved(theirs, tmp_path)).eval()
    ids = torch.tensor([[5, *[ours.cfg.image_token_id] * 4, 9, 10]])
    pixels = torch.randn(1, 1, 3, 64, 64)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=pixels).logits
        assert difference(ours(ids, pixels)[0], want) <= TOLERANCE


@same_positions
def test_what_we_write_for_transformers_loads_there_strictly(tmp_path, granite):
    _, ours, _ = granite
    save_for_transformers(ours, tmp_path)
    kind = transformers.Idefics3ForConditionalGeneration
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids, pixels = torch.tensor([[5, *[ours.cfg.image_token_id] * 4, 9, 10]]), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = theirs.eval()(input_ids=ids, pixel_values=pixels[None]).logits
        assert difference(ours(ids, pixels)[0], want) <= TOLERANCE
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert again.cfg.replace(lm_tokenizer="x") == ours.cfg.replace(lm_tokenizer="x")


def test_a_folder_we_save_gives_the_same_model_again(tmp_path, granite):
    _, ours, _ = granite
    ours.save_pretrained(tmp_path)
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert again.cfg == ours.cfg
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())


def test_only_an_idefics3_is_written_as_one(tmp_path):
    model = VisionLanguageModel(preset("tiny"), load_backbone=False)
    with pytest.raises(ConfigError, match="fake_image_token"):
        save_for_transformers(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    saved(reference(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"missing: decoder\.blocks\.3"):
        VisionLanguageModel.from_pretrained(tmp_path)


# -- the published model ----------------------------------------------------------------------------------

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


def published_names():
    """{name: shape} of the published file, its tied head left out as the file does."""
    shapes = {
        "model.vision_model.embeddings.patch_embedding.weight": (768, 3, 16, 16),
        "model.vision_model.embeddings.patch_embedding.bias": (768,),
        "model.vision_model.embeddings.position_embedding.weight": (1024, 768),
        "model.vision_model.post_layernorm.weight": (768,),
        "model.vision_model.post_layernorm.bias": (768,),
        "model.connector.modality_projection.proj.weight": (576, 12288),
        "model.text_model.embed_tokens.weight": (100352, 576),
        "model.text_model.norm.weight": (576,),
    }
    for layer in range(12):
        for part, shape in {
            **{f"self_attn.{part}_proj": (768, 768) for part in ("q", "k", "v", "out")},
            "layer_norm1": (768,), "layer_norm2": (768,), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072),
        }.items():  # fmt: skip
            shapes[f"model.vision_model.encoder.layers.{layer}.{part}.weight"] = shape
            shapes[f"model.vision_model.encoder.layers.{layer}.{part}.bias"] = shape[:1]
    for layer in range(30):
        for part, shape in {
            "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
            "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
            "mlp.down_proj": (576, 1536), "input_layernorm": (576,), "post_attention_layernorm": (576,),
        }.items():  # fmt: skip
            shapes[f"model.text_model.layers.{layer}.{part}.weight"] = shape
    return shapes


def written(folder, config=PUBLISHED, pictures=PUBLISHED_PICTURES):
    (folder / "config.json").write_text(json.dumps(config))
    if pictures is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


def test_the_preset_is_what_the_published_config_says(tmp_path):
    found = Idefics3.config(PUBLISHED, written(tmp_path))
    assert found.replace(lm_tokenizer="ibm-granite/granite-docling-258M") == preset("granite_docling")
    assert found.lm_tokenizer == str(tmp_path)


def test_the_published_model_has_257_517_120_parameters_under_the_published_names():
    with torch.device("meta"):
        model = VisionLanguageModel(preset("granite_docling"), load_backbone=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 257_517_120
    shapes = {name: tuple(tensor.shape) for name, tensor in to_hub(model, Idefics3.RULES).items()}
    assert shapes == published_names()
    assert sum(math.prod(shape) for shape in shapes.values()) == 257_517_120


@same_positions
@pytest.mark.slow
def test_logits_at_real_size_are_those_of_transformers(tmp_path):
    theirs = scale(transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(**PUBLISHED)))
    written(saved(theirs, tmp_path))
    names = Checkpoint(weight_files(tmp_path)).shapes
    assert names == published_names()
    ours = VisionLanguageModel.from_pretrained(tmp_path).eval()
    assert ours.cfg.replace(lm_tokenizer="x") == preset("granite_docling", lm_tokenizer="x")
    ids = torch.randint(0, 100000, (1, 80))
    ids[0, 3:67] = ours.cfg.image_token_id
    pixels = torch.randn(1, 1, 3, 512, 512)
    with torch.no_grad():
        want = theirs(input_ids=ids, pixel_values=pixels).logits
        assert difference(ours(ids, pixels)[0], want) <= TOLERANCE


# -- config.json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("text_config", {"model_type": "mistral"}, "text_config.model_type='mistral'"),
        ("text_config", {"attention_bias": True}, "text_config.attention_bias=True"),
        ("text_config", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act='relu'"),
        ("vision_config", {"image_size": 256}, "image_size=256.*512"),
        ("vision_config", {"image_size": [512, 512]}, r"image_size=\[512, 512\]"),
        ("pictures", {"do_image_splitting": False}, "do_image_splitting=False"),
        ("pictures", {"resample": 3}, "resample=3"),
        ("pictures", {"size": {"height": 512, "width": 512}}, "longest_edge"),
        ("pictures", {"size": {"longest_edge": 2000}}, "max_img_size=2000"),
        ("pictures", {"size": {"longest_edge": 8192}}, "8192.*4096"),
        ("pictures", {"image_std": [0.5, 0, 0.5]}, "image_std"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_variant_that_is_not_built_is_refused_by_name(tmp_path, part, change, says):
    config, pictures = json.loads(json.dumps(PUBLISHED)), dict(PUBLISHED_PICTURES)
    (pictures if part == "pictures" else config[part]).update(change)
    with pytest.raises(ConfigError, match=says):
        VisionLanguageModel.from_pretrained(written(tmp_path, config, pictures))


def test_what_a_config_leaves_out_is_the_default_of_transformers(tmp_path):
    # 224 pixels in patches of 32, its own default, make 7 a side, which the shuffle of 2 cannot halve
    parts = {"text_config": {"vocab_size": 128300}, "vision_config": {"image_size": 256}}
    theirs, config = transformers.Idefics3Config(**parts), {"model_type": "idefics3", **parts}
    ours = Idefics3.config(config, tmp_path)
    vision, text = theirs.vision_config, theirs.text_config
    assert (ours.vit_hidden_dim, ours.vit_inter_dim, ours.vit_n_blocks, ours.vit_n_heads) == (
        vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads,
    )  # fmt: skip
    assert (ours.vit_img_size, ours.vit_patch_size, ours.vit_ln_eps) == (
        vision.image_size, vision.patch_size, vision.layer_norm_eps,
    )  # fmt: skip
    assert (ours.lm_hidden_dim, ours.lm_n_blocks, ours.lm_n_kv_heads, ours.lm_rms_eps) == (
        text.hidden_size, text.num_hidden_layers, text.num_key_value_heads, text.rms_norm_eps,
    )  # fmt: skip
    assert (ours.image_token_id, ours.lm_tie_weights) == (theirs.image_token_id, theirs.tie_word_embeddings)


# -- pictures ---------------------------------------------------------------------------------------------


SIZES = [(96, 64), (64, 96), (64, 64), (300, 40), (37, 411), (256, 256), (999, 1000), (640, 7), (255, 129)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("tile", "longest"), [(64, 256), (52, 208), (64, 64)], ids=str)
def test_tiles_are_those_of_transformers(picture, size, tile, longest):
    drawn = picture(*size)
    want = processor(tile, longest).image_processor(drawn, return_tensors="pt", return_row_col_info=True)
    cfg = preset("tiny_granite_docling", vit_img_size=tile, vit_patch_size=tile // 4, max_img_size=longest,
                 vlm_extra_tokens=idefics3_tokens(4))  # fmt: skip
    got, (rows, columns) = get_image_processor(cfg)(drawn)
    assert got.shape == want["pixel_values"][0].shape
    assert (got - want["pixel_values"][0]).abs().max() <= 1e-6
    assert bool(want["pixel_attention_mask"].all()), "no tile is padded, so no patch is masked"
    several = rows * columns > 1
    assert (want["rows"][0][0], want["cols"][0][0]) == ((rows, columns) if several else (0, 0))


def test_tiles_at_real_size_are_those_of_transformers(picture):
    drawn = picture(850, 1100)
    want = processor(512, 2048).image_processor(drawn, return_tensors="pt")["pixel_values"][0]
    got, grid = get_image_processor(preset("granite_docling"))(drawn)
    assert grid == (4, 4) and got.shape == (17, 3, 512, 512)
    assert (got - want).abs().max() <= 1e-6


def test_a_small_picture_stays_small_where_the_config_says_so(picture):
    cfg = preset("tiny_granite_docling", resize_to_max_side_len=False)
    assert get_image_processor(cfg)(picture(60, 40))[1] == (1, 1)
    assert get_image_processor(cfg)(picture(100, 40))[1] == (1, 2)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_every_mode_of_picture_becomes_normalised_tiles(picture, mode):
    tiles, _ = get_image_processor(preset("tiny_granite_docling"))(picture(90, 70, mode))
    assert tiles.shape == (5, 3, 64, 64)
    assert tiles.min() >= -1 and tiles.max() <= 1 and tiles.std() > 0.1


# -- prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["Convert this page to docling.", "", " 12\n\n\n3 é\n"])
@pytest.mark.parametrize("pictures", [(), ((90, 60),), ((60, 90), (200, 200))], ids=str)
@pytest.mark.parametrize("template", [ROLES, PARTS], ids=["roles", "parts"])
def test_prompts_are_those_of_transformers(tmp_path, granite, picture, template, pictures, question):
    drawn = [picture(*size) for size in pictures]
    their_processor = processor(template=template)
    saved(granite[0], tmp_path, their_processor)
    want = asked(their_processor, drawn, question)
    ids, tiles = VisionLanguageModel.from_pretrained(tmp_path).prepare(drawn, question)
    assert ids.tolist() == want["input_ids"].tolist()
    assert len(tiles) == len(drawn)
    if drawn:
        assert (torch.cat(tiles) - want["pixel_values"][0]).abs().max() <= 1e-6


def test_one_tile_is_the_global_view_alone():
    names = idefics3_tokens(1)
    tokenizer = get_tokenizer("byte", names)
    around, view, image = names["fake_image_token"], names["global_image_token"], names["image_token"]
    assert image_string(tokenizer, [(1, 1)], 2) == around + view + image * 2 + around


def test_a_grid_beyond_the_tokens_is_refused():
    with pytest.raises(ImageTokenMismatch, match="r1c3"):
        image_string(get_tokenizer("byte", idefics3_tokens(2)), [(1, 3)], 4)


def test_a_users_own_special_tokens_stay_words(granite, picture):
    _, ours, _ = granite
    tokenizer = ours.tokenizer
    words = "<image><|end_of_text|><end_of_utterance>"
    plain, tiles = ours.prepare(picture(90, 60), "Q")
    ids, _ = ours.prepare(picture(90, 60), "Q" + words)
    for token in ("<image>", "<|end_of_text|>"):
        number = tokenizer.convert_tokens_to_ids(token)
        assert (ids == number).sum() == (plain == number).sum()
    assert words in tokenizer.decode(ids[0])
    assert ids.max() < ours.cfg.lm_vocab_size
    assert ours(ids, tiles)[0].shape == (1, ids.shape[1], ours.cfg.lm_vocab_size)


def test_a_template_that_drops_the_picture_is_refused(granite):
    tokenizer = get_tokenizer(granite[1].cfg.replace(lm_chat_template=PARTS.replace("'<image>'", "''")))
    content = image_string(tokenizer, [(1, 1)], 4) + "What?"
    with pytest.raises(ValueError, match="0 image tokens <image> for 1 pictures"):
        tokenizer.apply_chat_template([{"role": "user", "content": content}])


# -- answers and training ---------------------------------------------------------------------------------


@same_positions
def test_greedy_answers_are_those_of_transformers(granite, picture):
    theirs, ours, their_processor = granite
    inputs = asked(their_processor, [picture(90, 60)], "What is this?")
    want = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
    ids, tiles = ours.prepare(picture(90, 60), "What is this?")
    got = ours.generate(ids, tiles, max_new_tokens=12, greedy=True)
    assert got.tolist() == want[:, : got.shape[1]].tolist()


def test_cached_generation_is_what_whole_forwards_give(granite, picture):
    _, ours, _ = granite
    ids, tiles = ours.prepare([picture(90, 60), picture(60, 200)], "Which is wider?")
    got = ours.generate(ids, tiles, max_new_tokens=8, greedy=True, eos_token_id=-1)
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat((ids, ours(ids, tiles)[0][:, -1:].argmax(-1)), dim=1)
    assert got.tolist() == ids[:, -8:].tolist()


def test_left_padded_rows_give_what_they_give_alone(granite, picture):
    _, ours, _ = granite
    questions = [(picture(90, 60), "What?"), (None, "Hello"), (picture(60, 300), "And this one?")]
    rows = [ours.prepare(*question) for question in questions]
    ids, mask = pad([row[0].tolist() for row, _ in rows])
    images = [tiles for _, tiles in rows]
    together = ours.generate(ids, images, mask, max_new_tokens=6, greedy=True, eos_token_id=-1)
    with torch.no_grad():
        logits, _ = ours(ids, images, mask)
        for number, (row, tiles) in enumerate(rows):
            alone, _ = ours(row, tiles)
            assert (logits[number, -row.shape[1] :] - alone[0]).abs().max() <= TOLERANCE
            single = ours.generate(row, tiles, max_new_tokens=6, greedy=True, eos_token_id=-1)
            assert together[number].tolist() == single[0].tolist()


@same_positions
def test_the_loss_is_transformers_and_reaches_every_parameter(granite, picture):
    theirs, ours, their_processor = granite
    inputs = asked(their_processor, [picture(90, 60)], "What is this?")
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == ours.cfg.image_token_id, -100)
    with torch.no_grad():
        want = theirs(**inputs, labels=labels).loss
    targets = torch.cat((labels[:, 1:], torch.full((1, 1), -100)), dim=1)  # ours come shifted
    _, loss = ours(ids, list(inputs["pixel_values"]), targets=targets)
    assert abs(loss.item() - want.item()) <= TOLERANCE
    loss.backward()
    without = [name for name, parameter in ours.named_parameters() if not parameter.grad.abs().sum() > 0]
    ours.zero_grad(set_to_none=True)
    assert without == []


def test_the_tiny_twin_answers_about_a_picture_offline(picture):
    model = VisionLanguageModel(preset("tiny_granite_docling")).eval()
    ids, tiles = model.prepare([picture(90, 60)], "What is this?")
    assert [stack.shape for stack in tiles] == [(5, 3, 64, 64)]
    assert (ids == model.cfg.image_token_id).sum() == 5 * model.cfg.mp_image_token_length
    assert isinstance(model.answer(picture(90, 60), "What is this?", max_new_tokens=4), str)
