from backbone.words import Words
from data.pairs import fixed_size


def get_tokenizer(name, extra_special_tokens=None):
    return Words(name, extra_special_tokens)


def get_image_processor(img_size):
    return fixed_size(img_size)
