"""A tokenizer of a few lines over tokenizer.json from the Hub; no transformers, so a tree starts quickly."""

import tokenizers
from huggingface_hub import hf_hub_download


class Words:
    def __init__(self, name, extra=None):
        self.raw = tokenizers.Tokenizer.from_file(hf_hub_download(name, "tokenizer.json"))
        self.raw.add_special_tokens(list((extra or {}).values()))
        for key, token in (extra or {}).items():
            setattr(self, key, token)
            setattr(self, key + "_id", self.raw.token_to_id(token))
        self.eos_token = self.pad_token = "<|im_end|>"

    eos_token_id = property(lambda self: self.raw.token_to_id(self.eos_token))
    pad_token_id = property(lambda self: self.raw.token_to_id(self.pad_token))

    def __len__(self):
        return self.raw.get_vocab_size()

    def encode(self, text):
        return self.raw.encode(text).ids

    def decode(self, ids):
        return self.raw.decode(ids, skip_special_tokens=False)

    def convert_ids_to_tokens(self, number):
        return self.raw.id_to_token(number)
