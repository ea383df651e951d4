from data.processors import get_image_string


class VQADataset:
    def __init__(self, dataset, tokenizer, image_processor, mp_image_token_length):
        self.dataset, self.tokenizer, self.image_processor = dataset, tokenizer, image_processor
        self.mp_image_token_length = mp_image_token_length

    def __getitem__(self, index):
        row = self.dataset[index]
        pairs = [self.image_processor(picture) for picture in row["images"]]
        words = get_image_string(self.tokenizer, [grid for _, grid in pairs], self.mp_image_token_length)
        ids, labels = [], []
        for turn in row["texts"]:
            user, assistant, opening = self.tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": words + turn["user"]},
                    {"role": "assistant", "content": turn["assistant"]},
                    {"role": "assistant", "content": ""},
                ]
            )
            words = ""
            front = len(opening) - len(self.tokenizer.encode("<|im_end|>\n"))
            ids += user + assistant
            labels += [-100] * (len(user) + front) + assistant[front:]
        return {"images": [tiles for tiles, _ in pairs], "input_ids": ids, "labels": [*labels[1:], -100]}
