"""Tokenizer, tiles and the text that stands for them."""

import torch
import torch.nn.functional as F
from backbone.words import Words
from numpy import asarray


class ChatWords(Words):
    def __init__(self, name, extra, template):
        super().__init__(name, extra)
        self.template = template

    def apply_chat_template(self, messages):
        return [self.encode(self.template.format(**message)) for message in messages]


def get_tokenizer(name, extra_special_tokens=None, chat_template=None):
    return ChatWords(name, extra_special_tokens, chat_template)


def get_image_processor(max_img_size, splitted_image_size):
    side = splitted_image_size

    def process(picture):
        """PIL picture -> tiles (N, 3, side, side), the whole first if several, and (rows, columns)."""
        rows = max(1, min(picture.height, max_img_size) // side)
        columns = max(1, min(picture.width, max_img_size) // side)
        pixels = torch.tensor(asarray(picture)).permute(2, 0, 1)[None] / 255
        large = F.interpolate(pixels, (rows * side, columns * side), mode="bilinear")
        tiles = (
            large[0]
            .unflatten(2, (columns, side))
            .unflatten(1, (rows, side))
            .permute(1, 3, 0, 2, 4)
            .flatten(0, 1)
        )
        whole = F.interpolate(pixels, (side, side), mode="bilinear")
        return (tiles if rows * columns == 1 else torch.cat((whole, tiles))), (rows, columns)

    return process


def get_image_string(tokenizer, splitted_image_counts, mp_image_token_length):
    text, tile = "", tokenizer.image_token * mp_image_token_length
    for rows, columns in splitted_image_counts:
        text += tokenizer.global_image_token + tile
        if rows * columns > 1:
            text += "".join(
                getattr(tokenizer, f"r{r + 1}c{c + 1}") + tile for r in range(rows) for c in range(columns)
            )
    return text
