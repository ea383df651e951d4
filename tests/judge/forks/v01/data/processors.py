from backbone.words import Words
from data.pairs import fixed_size


def get_tokenizer(name):
    return Words(name)


def get_image_processor(img_size):
    return fixed_size(img_size)
