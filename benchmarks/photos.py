"""How fast photos become samples, beside what a user would write: images a second, and seconds of a core for each.

Photos of 12 megapixels, as a phone makes them, are drawn once. Then each way decodes and fits them to squares of
some sizes, in turns: all of the picture first, as `sana` did before; `sana embed`'s own loader; torchvision's
`ImageFolder` and the `datasets` library with the same resizing, where they are installed. The share of the
memory's own speed says how near a limit that is: what a copy of the decoded pictures would take.

    python benchmarks/photos.py [--photos 8] [--sizes 32,256,512,1024] [--repeats 3] [--json FILE]
"""

import argparse
import importlib
import importlib.util
import io
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from sana_cli.sources.images import Fitted, Fitting, decode_all, decode_image, fit_image

HEIGHT, WIDTH = 3024, 4032
Way = Callable[[Path, int], np.ndarray]  # of a file and a size: pixels (3, size, size)


def photo(seed: int) -> bytes:
    """A JPEG of 12 megapixels, about as large as a phone's: colours at every scale, and grain."""
    draws = np.random.default_rng(seed)
    total = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
    for octave in range(2, 11):
        small = draws.normal(size=(3, 2**octave, 2**octave)).astype(np.float32)
        for channel, layer in enumerate(small):
            large = Image.fromarray(layer).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(large) * 0.6**octave
    total += draws.normal(scale=0.02 * total.std(), size=total.shape[:2]).astype(np.float32)[..., None]
    levels = (128 + 80 * total / total.std()).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=90)
    return file.getvalue()


def whole(path: Path, size: int) -> np.ndarray:
    """All of the picture, then its resizing."""
    return fit_image(decode_image(path), (size, size), 3)


def scaled(path: Path, size: int) -> np.ndarray:
    """As `sana embed` does."""
    (found,) = decode_all([path], Fitting((size, size), 3))
    assert isinstance(found, Fitted)
    return found.pixels


def by_torchvision(path: Path, size: int) -> np.ndarray:
    """What a user of torchvision writes."""
    pil_loader = importlib.import_module("torchvision.datasets.folder").pil_loader
    v2 = importlib.import_module("torchvision.transforms.v2")
    steps = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])
    pixels: np.ndarray = steps(pil_loader(path)).numpy()
    return pixels


def by_datasets(path: Path, size: int) -> np.ndarray:
    """What a user of the `datasets` library writes: its image feature, then Pillow."""
    from datasets import Image as Feature

    image = Feature().decode_example({"path": str(path), "bytes": None}).convert("RGB")
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


WAYS: dict[str, Way] = {
    "all of the picture": whole,
    "sana": scaled,
    "torchvision": by_torchvision,
    "datasets": by_datasets,
}


def core_seconds(way: Way, paths: Sequence[Path], size: int) -> float:
    """Seconds of one core for an image."""
    start = time.process_time()
    for path in paths:
        way(path, size)
    return (time.process_time() - start) / len(paths)


def a_second(pool: ProcessPoolExecutor, way: Way, paths: Sequence[Path], size: int) -> float:
    """Images a second with all processes of a pool."""
    start = time.perf_counter()
    list(pool.map(way, paths, itertools.repeat(size)))
    return len(paths) / (time.perf_counter() - start)


def copied_a_second() -> float:
    """Bytes that this machine copies in a second."""
    source = np.ones(2**28, dtype=np.uint8)
    target = np.empty_like(source)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return len(source) / min(times)


def main() -> None:
    """Measure all ways in turns and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--sizes", default="32,256,512,1024")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    names = [
        name for name in WAYS if name not in ("torchvision", "datasets") or importlib.util.find_spec(name)
    ]
    cores = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(cores) as pool:
        paths = [Path(folder) / f"{number}.jpg" for number in range(options.photos)]
        for number, path in enumerate(paths):
            path.write_bytes(photo(number))
        megabytes = statistics.fmean(path.stat().st_size for path in paths) / 1e6
        found = {}
        for size in sizes:
            times: dict[str, list[float]] = {name: [] for name in names}
            rates: dict[str, list[float]] = {name: [] for name in names}
            for name in names:
                WAYS[name](paths[0], size)  # what it imports
                list(pool.map(WAYS[name], paths[: 2 * (cores or 1)], itertools.repeat(size)))
            for _ in range(options.repeats):
                for name in names:
                    times[name].append(core_seconds(WAYS[name], paths, size))
                    rates[name].append(a_second(pool, WAYS[name], paths, size))
            differing = [np.abs(whole(path, size).astype(int) - scaled(path, size)).mean() for path in paths]
            found[size] = {
                "core_seconds": {name: statistics.median(times[name]) for name in names},
                "images_a_second": {name: statistics.median(rates[name]) for name in names},
                "mean_difference": statistics.fmean(differing),
            }
    copied = copied_a_second()
    print(
        f"{options.photos} photos of {WIDTH} x {HEIGHT}, {megabytes:.1f} MB each; {cores} processes; Pillow {PIL.__version__}, "
        f"{platform.machine()}, medians of {options.repeats}"
    )
    print(
        f"this machine copies {copied / 1e9:.1f} GB/s: {copied / (3 * HEIGHT * WIDTH):.0f} such pictures a second"
    )
    for title, key, unit in (
        ("ms of a core", "core_seconds", 1e3),
        ("images a second", "images_a_second", 1),
    ):
        print(f"\n{title:18}" + "".join(f"{name:>20}" for name in names) + f"{'mean difference':>18}")
        for size in sizes:
            figures = found[size][key]
            assert isinstance(figures, dict)
            print(
                f"to {size:<15}"
                + "".join(f"{unit * figures[name]:>20.1f}" for name in names)
                + f"{found[size]['mean_difference']:>18.2f}"
            )
    if options.json:
        options.json.write_text(json.dumps({"copied_a_second": copied, "sizes": found}, indent=1))


if __name__ == "__main__":
    main()
