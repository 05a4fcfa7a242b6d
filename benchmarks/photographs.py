"""JPEG files of photographs, for benchmarks of data.

Random parts of the photographs in scikit-image and scikit-learn, if one of them is installed, or
noise whose files are of about the same size, 40 to 60 KB. The longer side has 500 pixels, three in
four are landscape.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

_SIDE, _QUALITY = 500, 90
_RATIOS = (3 / 4, 2 / 3, 9 / 16, 1.0)
_SPECTRUM = 1.5  # amplitudes fall as 1 / frequency ** this
_FILES = {
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}


def installed_photographs() -> list[Image.Image]:
    """Returns the photographs of installed packages."""
    found = []
    for package, (folder, names) in _FILES.items():
        spec = importlib.util.find_spec(package)  # without importing it
        if spec is not None:
            [root] = spec.submodule_search_locations
            found += [Image.open(Path(root, folder, name)).convert("RGB") for name in names]
    return found


def natural_noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Returns coloured noise with a spectrum like that of photographs."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    frequency = np.maximum(np.hypot(rows, columns), 1 / _SIDE)[..., None]
    shape = (height, len(columns), 1)
    shade, color = (rng.normal(size=(*shape[:2], n, 2)) @ [1, 1j] for n in (1, 3))
    spectrum = (shade + 0.3 * color) / frequency**_SPECTRUM
    waves = np.fft.irfft2(spectrum, s=(height, width), axes=(0, 1))
    return Image.fromarray((118 + 55 * waves / waves.std()).clip(0, 255).astype(np.uint8))


def images(rng: np.random.Generator) -> Iterator[Image.Image]:
    """Yields images that differ, endlessly."""
    photographs = installed_photographs()
    while True:
        ratio = rng.choice(_RATIOS)
        size = (_SIDE, round(_SIDE * ratio))
        size = size if rng.random() < 0.75 else size[::-1]
        if not photographs:
            yield natural_noise(rng, *size)
            continue
        photograph = photographs[rng.integers(len(photographs))]
        scale = min(p / s for p, s in zip(photograph.size, size, strict=True))
        part = [scale * s * rng.uniform(0.7, 1.0) for s in size]
        left, top = (rng.uniform(0, p - q) for p, q in zip(photograph.size, part, strict=True))
        box = (left, top, left + part[0], top + part[1])
        yield photograph.resize(size, Image.Resampling.BICUBIC, box)


def write_jpegs(folder: Path, count: int) -> str:
    """Writes `00000.jpg` to a folder, and so on; returns what they show."""
    source = images(np.random.default_rng(0))
    for number in range(count):
        next(source).save(folder / f"{number:05d}.jpg", quality=_QUALITY)
    return "photographs" if installed_photographs() else "noise"
