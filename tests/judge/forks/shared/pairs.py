"""Data as the first versions had it: one question and one answer a row, as strings, until the collator."""

import torch


class VQADataset:
    def __init__(self, dataset, tokenizer, image_processor):
        self.dataset, self.tokenizer, self.image_processor = dataset, tokenizer, image_processor

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        row = self.dataset[index]
        turn = row["texts"][0]
        return {
            "image": self.image_processor(row["images"][0]),
            "text_data": f"Question: {turn['user']} Answer: ",
            "answer": turn["assistant"] + self.tokenizer.eos_token,
        }


class VQACollator:
    def __init__(self, tokenizer, max_length, mp_image_token_length=0):
        self.tokenizer, self.max_length, self.image_length = tokenizer, max_length, mp_image_token_length

    def __call__(self, rows):
        ids, labels = [], []
        for row in rows:
            prompt = getattr(self.tokenizer, "image_token", "") * self.image_length + row["text_data"]
            question, answer = self.tokenizer.encode(prompt), self.tokenizer.encode(row["answer"])
            space = self.max_length - len(question) - len(answer)
            ids.append([self.tokenizer.pad_token_id] * space + question + answer)
            labels.append([-100] * (space + len(question) - 1) + answer + [-100])
        return {
            "image": torch.stack([row["image"] for row in rows]),
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
        }


def fixed_size(size):
    """A PIL picture as (3, size, size) in [0, 1], without torchvision."""
    from numpy import asarray

    return lambda picture: torch.tensor(asarray(picture.resize((size, size)))).permute(2, 0, 1) / 255
