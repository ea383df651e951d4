"""The target's own data side: image processor, data set, collator, on fixed rows.

Unusual: nothing is rewritten to make it work. Arguments are supplied by name, and what cannot be supplied,
or needs a package that is not installed, is a skip with that reason.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools

import torch

from . import probe
from .adapters.configs import config_values, fitting
from .protocol import NotSupported, theirs

COPIES = 8  # of the rows that are packed: a packer that spreads few documents leaves each alone


def image_processor(subject, adapter):
    """A function PIL image -> (tiles (N, 3, S, S), grid or None) around the target's get_image_processor."""
    function = subject.function("get_image_processor")
    if function is None:
        raise NotSupported("the target has no get_image_processor")
    values = config_values(adapter.config)
    by_name = {
        "img_size": values.get("vit_img_size"),
        "image_size": values.get("vit_img_size"),
        "max_img_size": values.get("max_img_size"),
        "splitted_image_size": values.get("vit_img_size"),
        "resize_to_max_side_len": values.get("resize_to_max_side_len"),
        "cfg": adapter.config,
        "config": adapter.config,
        "max_img_size_or_cfg": adapter.config,
    }
    taken = inspect.signature(function).parameters.values()
    whole = [p.name for p in taken if subject.config_class.__name__ in str(p.annotation)]
    with theirs():  # by the config, where it is taken: that is how the model itself asks
        process = function(**({whole[0]: adapter.config} if whole else fitting(function, by_name)))

    def tiles_and_grid(picture):
        with theirs():
            out = process(picture)
        pixels, grid = out if isinstance(out, tuple) else (out, None)
        return (pixels[None] if pixels.dim() == 3 else pixels), grid

    return tiles_and_grid


def image_string_tokens(subject, adapter, grid):
    """Image tokens in the text the target writes for a picture of ``grid``; None when it writes none."""
    function = subject.function("get_image_string") or subject.function("image_string")
    if function is None or grid is None or adapter.image_token_id is None:
        return None
    with theirs():
        text = function(adapter.tokenizer, [tuple(grid)], adapter.tokens_per_cell)
    return text.count(adapter.tokenizer.image_token)


def run_pipeline(subject, adapter, turns, pictures, packed=False):
    """Rows through data set and collator, or several rows to a pack; see Session.ask_data."""
    read = packs if packed else collate
    dataset_class = subject.classes("VQADataset", "VLMDataset", "BaseDataset")
    collator_class = subject.classes("VQACollator", "VLMCollator", "BaseCollator")
    if dataset_class is None or collator_class is None:
        raise NotSupported("the target has no VQADataset and VQACollator")
    drawn = pictures if importlib.util.find_spec("PIL") else 0
    rows = [
        {
            "images": [probe.photograph(i, 40, 40) for i in range(drawn)],
            "texts": [{"user": t["user"], "assistant": t["assistant"]} for t in conversation],
        }
        for conversation in turns
    ]
    if adapter.tokenizer is None:
        raise NotSupported("the target has no tokenizer")
    errors = []
    for process in (pair_processor(adapter), plain_processor(adapter)):
        try:
            return read(subject, adapter, dataset_class, collator_class, rows, process)
        except (TypeError, ValueError) as error:  # the data set unpacks a pair, or does not
            errors.append(error)
        except Exception:
            if drawn == pictures:
                raise  # rows as they should be: the target's own failure
            break
    if drawn < pictures:
        raise NotSupported("needs PIL, which is not installed, to make rows with pictures")
    raise errors[0]


def collate(subject, adapter, dataset_class, collator_class, rows, process):
    """The batch of all rows, read back."""
    _, items, collator = encoded(adapter, dataset_class, collator_class, rows, process)
    with theirs():
        batch = collator(items)
    return read_back(adapter, batch, rows)


def packs(subject, adapter, dataset_class, collator_class, rows, process):
    """Packs of all rows, read back: of the collator's ``packed``, else of the data set that makes them."""
    dataset, items, collator = encoded(adapter, dataset_class, collator_class, rows * COPIES, process)
    items = items[: len(rows)]
    if hasattr(collator, "packed"):
        with theirs():
            return read_back(adapter, collator.packed([items]), rows)
    packing = subject.classes("ConstantLengthDataset", "PackedDataset")
    if packing is None:
        raise NotSupported("the target has no ConstantLengthDataset, and its collator no packed()")
    length = sum(len(item["input_ids"]) + 1 for item in items)
    limits = {"infinite": False, "max_sample_length": length, "seq_length": length, "num_of_sequences": COPIES}
    with theirs():
        packs_of = packing(**fitting(packing.__init__, {"dataset": dataset, **limits}))
        made = list(itertools.islice(packs_of, len(rows) * COPIES + 1))
    if len(made) > len(rows) * COPIES:
        raise NotSupported("its packs never end")
    # each kind of pack once, in one order: some shuffle them by no seed of ours
    kinds = {tuple(int(token) for token in pack["input_ids"]): pack for pack in made}
    made = [kinds[ids] for ids in sorted(kinds)]
    batch = {name: [pack[name] for pack in made] for name in ("input_ids", "labels", "attention_mask", "images")}
    return read_back(adapter, batch, rows)


def encoded(adapter, dataset_class, collator_class, rows, process):
    """(the target's data set of the rows, its items, its collator)."""
    values = config_values(adapter.config)
    by_name = {
        "dataset": rows,
        "tokenizer": adapter.tokenizer,
        "image_processor": process,
        "cfg": adapter.config,
        "mp_image_token_length": adapter.image_tokens,
        "max_length": values.get("lm_max_length") or adapter.max_positions,
    }
    with theirs():
        dataset = dataset_class(**fitting(dataset_class.__init__, by_name))
        items = [dataset[i] for i in range(len(rows))]
        return dataset, items, collator_class(**fitting(collator_class.__init__, by_name))


def read_back(adapter, batch, rows):
    """What a batch of the target holds, a list entry a row."""
    ids, labels = batch["input_ids"], batch["labels"]
    if isinstance(ids, list) and not ids:
        raise NotSupported("the collator dropped every row")
    images = batch.get("images", batch.get("image"))
    mask = batch.get("attention_mask")
    text = [adapter.tokenizer.decode([int(t) for t in row if int(t) != -100]) for row in labels]
    image_id = adapter.image_token_id
    return {
        "rows": len(ids),
        "supervised": [int((row != -100).sum()) for row in labels],
        "labels_text": text,
        "shift": [shift(ids_row, labels_row) for ids_row, labels_row in zip(ids, labels)],
        "image_tokens": [int((row == image_id).sum()) if image_id is not None else 0 for row in ids],
        "features": [count_features(images, i, adapter) if image_id is not None else 0 for i in range(len(ids))],
        "batch_keys": sorted(batch),
        "ids": [[int(t) for t in row] for row in ids],
        "labels": [[int(t) for t in row] for row in labels],
        "attention_mask": None if mask is None else [[int(t) for t in row] for row in mask],
        "pad_id": adapter.pad_id,
        "pictures": len(rows[0]["images"]),
    }


def shift(ids, labels, most=3):
    """How many places ahead a row's labels lie in its ids; None where they are other ids at any distance."""
    ids, labels = [int(i) for i in ids], [int(i) for i in labels]
    taught = [place for place, label in enumerate(labels) if label != -100]
    for ahead in range(most):
        if taught and all(place + ahead < len(ids) and ids[place + ahead] == labels[place] for place in taught):
            return ahead
    return None


def count_features(images, row, adapter):
    """Features the vision side makes of a collated row's pictures."""
    if isinstance(images, torch.Tensor):
        return adapter.image_tokens
    of_row = images[row]
    of_row = of_row if isinstance(of_row, (list, tuple)) else [of_row]
    if not all(isinstance(p, torch.Tensor) for p in of_row):  # a pair went through whole: this version wants no grid
        raise TypeError(f"row {row} of the batch holds {type(of_row[0]).__name__} where pixels belong")
    return sum((1 if p.dim() == 3 else p.shape[0]) for p in of_row) * adapter.image_tokens


def pair_processor(adapter):
    """A processor that needs no torchvision: one tile and its grid, as versions with tiles return them."""
    size = adapter.image_size

    def process(picture):
        return probe.picture(picture.width, size)[None], (1, 1)

    return process


def plain_processor(adapter):
    """The same as versions before tiles return it: one (3, S, S) tensor."""
    return lambda picture: pair_processor(adapter)(picture)[0][0]
