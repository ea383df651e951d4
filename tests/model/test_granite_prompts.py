"""Tiles and prompts of Idefics3 checkpoints, against its processor in transformers."""

from __future__ import annotations

import pytest
import torch

from nanovlm import VisionLanguageModel, get_image_processor, get_tokenizer, preset
from nanovlm.errors import ImageTokenMismatch
from nanovlm.presets import idefics3_tokens
from nanovlm.prompts import image_string
from tests.model.idefics3 import PARTS, ROLES, asked, processor, saved
from tests.model.idefics3 import granite as granite

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
