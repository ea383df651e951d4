import torch


class VQACollator:
    def __init__(self, tokenizer, max_length):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows):
        rows = [row for row in rows if len(row["input_ids"]) <= self.max_length]
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name, value):
            return torch.tensor([[value] * (longest - len(row[name])) + row[name] for row in rows])

        ids = padded("input_ids", self.tokenizer.pad_token_id)
        mask = torch.tensor([[0] * (longest - len(r["input_ids"])) + [1] * len(r["input_ids"]) for r in rows])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": padded("labels", -100),
            "images": [row["images"] for row in rows],
        }
