"""Ask a model about a picture, step by step. `python -m nanovlm generate` does the same with more options.

    python examples/inference.py --image cat.png --checkpoint DIR_OR_REPO --prompt "What is this?"

Without --checkpoint it builds the preset `tiny`, whose random weights answer nonsense but need no download;
without --image it draws a picture.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image, ImageDraw

from nanovlm import VisionLanguageModel, get_image_processor, get_tokenizer, preset
from nanovlm.images import open_picture
from nanovlm.prompts import question


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a model about a picture.")
    add = parser.add_argument
    add("--checkpoint", help="folder or repository on the Hub (default: random weights)")
    add("--image", help="a picture file (default: a drawn one)")
    add("--prompt", default="What is this?", help="the question (default: %(default)s)")
    add("--generations", type=int, default=3, help="how many answers (default: %(default)s)")
    add("--max_new_tokens", type=int, default=30, help="longest answer in tokens (default: %(default)s)")
    return parser.parse_args()


def draw() -> Image.Image:
    """A red disc on blue."""
    picture = Image.new("RGB", (320, 240), "royalblue")
    ImageDraw.Draw(picture).ellipse((100, 60, 220, 180), fill="crimson")
    return picture


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    if args.checkpoint:
        model = VisionLanguageModel.from_pretrained(args.checkpoint)
    else:
        model = VisionLanguageModel(preset("tiny"), load_backbone=False)
    model = model.to(device).eval()

    # The config says which generation of nanoVLM this is: one square or tiles, with or without a template.
    tokenizer = get_tokenizer(model.cfg)
    image_processor = get_image_processor(model.cfg)

    image = open_picture(args.image) if args.image else draw()
    pixel_values, grid = image_processor(image)
    input_ids = torch.tensor([question(model.cfg, tokenizer, args.prompt, [grid])], device=device)
    rows, columns = grid
    print(f"{image.width}x{image.height} pixels, a grid of {rows}x{columns}, {input_ids.shape[1]} tokens")
    print(f"Question: {args.prompt}")
    for number in range(1, args.generations + 1):
        ids = model.generate(input_ids, pixel_values.to(device), max_new_tokens=args.max_new_tokens)
        print(f"Answer {number}: {tokenizer.batch_decode(ids, skip_special_tokens=True)[0]!r}")


if __name__ == "__main__":
    main()
