"""How `sana embed` and the start of `sana train` grow with the number of images.

Tiny images are embedded by the real command with the `tiny` encoder, each number of them in a process of its own:
once with a caption of its own for each, once with a thousand captions for all. Then a tiny model begins to train on
each dataset. `--computed` measures what else a hundred million images need, without making them: their order, their
index, and the numbering of their captions.

    python benchmarks/growth.py [--thousands 1000,2000,4000,8000] [--captions distinct,few] [--computed]

Datasets lie below `--folder`, one at a time: 0.9 GB for a million images with captions of their own. Seconds are the
processor's, since others may use it too; in brackets the clock's. Memory is the peak of what a process allocated;
what it has mapped of files comes on top, and the system takes that back when it needs it.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sana_cli.commands.embed import EmbedOptions, EmbedSummary, embed
from sana_cli.commands.train import TrainOptions, TrainStep, train
from sana_cli.config.file import parse_config
from sana_cli.config.keys import Config, DataConfig
from sana_cli.dataset.captions import CaptionIds
from sana_cli.dataset.layout import INDEX
from sana_cli.dataset.order import Shuffle
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import BLOCK, SingleDataset
from sana_cli.runtime import files
from sana_cli.sources import SOURCES
from sana_cli.sources.entry import Entry

CONFIG = """
data: {source: idx, image_size: 8, held_out_split: null}
model: {in_channels: 1, patch_size: 8, num_layers: 1, num_attention_heads: 2, attention_head_dim: 8,
        num_cross_attention_heads: 2, cross_attention_head_dim: 8}
train: {steps: 1000, batch_size: 64, precision: fp32}
run: {device: cpu}
"""
FEW = 1000  # captions, where there are few
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "wa", "xi")
HUNDRED_MILLION = 10**8
SHARDS = 25_000  # that hold a hundred million images
WORDS = tuple(
    a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES
)  # 4,096: sixteen million pairs


class Tiny:
    """A source of images of 8 x 8 pixels, made as they are read. Captions are two words."""

    images, captions = 0, 0  # of the process

    def __init__(self, _: DataConfig) -> None:
        pass

    def count(self) -> int:
        """The number of images."""
        return self.images

    def fingerprint(self) -> dict[str, Any]:
        """What there is to know."""
        return {"source": "tiny", "images": self.images, "captions": self.captions}

    def __iter__(self) -> Iterator[Entry]:
        for number in range(self.images):
            first, second = divmod(number % self.captions, len(WORDS))
            pixels = np.full((8, 8), number % 256, dtype=np.uint8)
            yield Entry(f"{number:09d}", pixels, (f"{WORDS[first]} {WORDS[second]}",))


class Allocated:
    """The peak of the memory that this process allocated, files that it has mapped left out."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, status("RssAnon"))
            time.sleep(0.05)


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not say {name}: the measurement needs Linux")


def cpu() -> float:
    """Seconds that this process and its workers have computed."""
    both = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(one.ru_utime + one.ru_stime for one in both)


def the_config(folder: Path, images: int, captions: int) -> Config:
    """The config of a tiny dataset in `folder`, whose source is what it says from here on."""
    Tiny.images, Tiny.captions = images, captions
    SOURCES["idx"] = Tiny
    places = (f"data.dir={folder / 'data'}", f"data.path={folder}", f"run.dir={folder / 'run'}")
    return parse_config(CONFIG, "growth", places)


def part_embed(folder: Path, images: int, captions: int) -> dict[str, float]:
    """Embed, and say what it took."""
    allocated, begin, before = Allocated(), time.perf_counter(), cpu()
    *_, summary = embed(EmbedOptions(the_config(folder, images, captions)))
    assert isinstance(summary, EmbedSummary)
    assert summary.images == images
    return {
        "cpu": cpu() - before,
        "clock": time.perf_counter() - begin,
        "allocated": allocated.peak,
        "peak": status("VmHWM"),
        "bytes": summary.bytes,
        "index": (folder / "data" / INDEX).stat().st_size,
    }


def part_train(folder: Path, images: int, captions: int) -> dict[str, float]:
    """Begin to train, to the end of the first step; then compute the order of some images."""
    config = the_config(folder, images, captions)
    allocated, begin, before = Allocated(), time.perf_counter(), cpu()
    steps = train(TrainOptions(config))
    next(step for step in steps if isinstance(step, TrainStep) and step.step == 1)
    found = {
        "cpu": cpu() - before,
        "clock": time.perf_counter() - begin,
        "allocated": allocated.peak,
        "peak": status("VmHWM"),
    }
    train_set = SingleDataset(Dataset(config.data.dir), seed=0)
    before = time.process_time()
    for block in range(50):
        train_set.rows(len(train_set) // 51 * block, BLOCK)
    return found | {"order": (time.process_time() - before) / 50 / BLOCK * 1e6}


def part_order(_: Path, images: int, __: int) -> dict[str, float]:
    """The order of so many images, here and there in an epoch."""
    begin = time.process_time()
    for block in range(50):
        Shuffle(images, (0, 0))(np.arange(BLOCK) + images // 51 * block)
    return {"microseconds an image": (time.process_time() - begin) / 50 / BLOCK * 1e6}


def part_index(folder: Path, _: int, __: int) -> dict[str, float]:
    """Open a dataset of SHARDS shards of each kind, each a link to a small one, and begin to train on it."""
    small = part_embed(folder, BLOCK, BLOCK)
    where = folder / "data"
    index = files.read_sealed_json(where / INDEX)
    for kind in ("captions", "images"):
        (entry,) = index[kind]
        names = [f"{kind}-{number:05d}.safetensors" for number in range(SHARDS)]
        for name in names[1:]:
            os.link(where / entry["file"], where / name)
        index[kind] = [entry | {"file": name} for name in names]
        index["counts"][kind] *= SHARDS
    del index["sha256"], small["index"]
    (where / INDEX).unlink()
    files.write_sealed_json(where / INDEX, index)
    begin, before = time.process_time(), status("RssAnon")
    Dataset(where)
    found = {"seconds to open": time.process_time() - begin, "bytes allocated": status("RssAnon") - before}
    found["bytes of the index"] = (where / INDEX).stat().st_size
    return found | {f"train, {key}": value for key, value in part_train(folder, BLOCK, BLOCK).items()}


def part_captions(folder: Path, count: int, _: int) -> dict[str, float]:
    """Number so many captions."""
    ids, allocated, begin = CaptionIds(folder), Allocated(), time.process_time()
    for first in range(0, count, BLOCK):
        ids.number([f"caption {number}" for number in range(first, min(first + BLOCK, count))])
    assert len(ids) == count
    seconds = time.process_time() - begin
    return {"microseconds a caption": seconds / count * 1e6, "allocated": allocated.peak}


PARTS = {
    "embed": part_embed, "train": part_train, "order": part_order, "index": part_index, "captions": part_captions,
}  # fmt: skip


def measured(part: str, folder: Path, images: int, captions: int) -> dict[str, float]:
    """What a part says, from a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--part",
        part,
        "--folder",
        folder,
        "--sizes",
        f"{images},{captions}",
    ]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def grow(folder: Path, thousands: list[int], kinds: list[str]) -> None:
    """Embed and begin to train, and print a line for each number of images."""
    columns = ("images", "captions", "embed", "us/image", "MB", "with files", "disk", "train", "MB", "order")
    print(" ".join(f"{column:>14}" for column in columns), flush=True)
    for kind in kinds:
        for images in (1000 * thousand for thousand in thousands):
            captions = min(FEW, images) if kind == "few" else images
            with tempfile.TemporaryDirectory(dir=folder) as inside:
                made = measured("embed", Path(inside), images, captions)
                begun = measured("train", Path(inside), images, captions)
            cells = (
                f"{images:,}", f"{captions:,}", f"{made['cpu']:.0f} s ({made['clock']:.0f})",
                f"{made['cpu'] / images * 1e6:.1f}", f"{made['allocated'] / 1e6:.0f}", f"{made['peak'] / 1e6:.0f}",
                f"{made['bytes'] / 1e6:,.0f} MB", f"{begun['cpu']:.1f} s ({begun['clock']:.1f})",
                f"{begun['allocated'] / 1e6:.0f}", f"{begun['order']:.2f} us",
            )  # fmt: skip
            print(" ".join(f"{cell:>14}" for cell in cells), flush=True)


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--thousands", default="1000,2000,4000,8000", help="of images")
    parser.add_argument("--captions", default="distinct,few")
    parser.add_argument("--computed", action="store_true", help="measure only what needs no images")
    parser.add_argument("--numbered", type=int, default=32_000_000, help="captions that are numbered")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", default="0,0", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        images, captions = map(int, options.sizes.split(","))
        print(json.dumps(PARTS[options.part](options.folder, images, captions)), flush=True)
        os._exit(0)  # leaves the run that has begun
    if not options.computed:
        grow(options.folder, [int(one) for one in options.thousands.split(",")], options.captions.split(","))
        return
    for part, count in (("order", HUNDRED_MILLION), ("index", 0), ("captions", options.numbered)):
        inside = Path(tempfile.mkdtemp(dir=options.folder))
        found = measured(part, inside, count, 0)
        shutil.rmtree(inside)
        print(
            f"{part}, {count or SHARDS:,}:",
            *(f"{key} {value:,.2f};" for key, value in found.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
