"""Images: copies of the published ones, and flipped and shifted variants of train images."""

import random
import shutil
from pathlib import Path

from PIL import Image, ImageChops, ImageOps

MAX_SHIFT = 12  # pixels of the 64


def image_name(image: int, variant: int) -> str:
    """Returns the name of a train image (variant 0) or of one of its augmented variants."""
    return f"augmented/{image}_{variant}.png" if variant else f"train/{image}.png"


def flip_and_shift(image: Image.Image, rng: random.Random) -> Image.Image:
    """Mirrors with probability 0.5 and shifts by up to MAX_SHIFT pixels along both axes.

    The background is the most common colour; the shape stays inside of the image.
    """
    background = max(image.getcolors(image.width * image.height))[1]
    canvas = Image.new(image.mode, image.size, background)
    moved = ImageOps.mirror(image) if rng.random() < 0.5 else image
    box = ImageChops.difference(moved, canvas).getbbox()
    if box is None:
        return moved
    left, top, right, bottom = box
    x = rng.randint(max(-MAX_SHIFT, -left), min(MAX_SHIFT, image.width - right))
    y = rng.randint(max(-MAX_SHIFT, -top), min(MAX_SHIFT, image.height - bottom))
    canvas.paste(moved.crop(box), (left + x, top + y))
    return canvas


def write_images(
    published: Path, out: Path, augmentations: int, rng: random.Random
) -> dict[str, int]:
    """Copies both splits and writes variants of the train images; returns files by folder."""
    for split in ("train", "test"):
        shutil.copytree(published / split / "images", out / split)
    (out / "augmented").mkdir()
    train = sorted((out / "train").glob("*.png"), key=lambda path: int(path.stem))
    for path in train:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        for variant in range(1, augmentations + 1):
            flip_and_shift(image, rng).save(out / image_name(int(path.stem), variant))
    return {
        f"images/{folder.name}": len(list(folder.iterdir())) for folder in sorted(out.iterdir())
    }
