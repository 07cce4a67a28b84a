"""Compare `sana embed` with the lesson's way: captions/s, images/s, bytes on disk, peak memory.

The lesson encodes one caption at a time in float32, padded to 300 tokens, and stores a padded
array for every image. Both ways use the same random Gemma 2 and the same random images and
captions. They take turns, each in its own process; the table shows medians.

    python benchmarks/embed.py [--images 400] [--width 256] [--layers 4] [--repeats 3]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sana_cli.commands.embed import EmbedOptions, EmbedSummary, embed
from sana_cli.config.file import parse_config
from sana_cli.runtime.device import peak_memory

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
THINGS = (
    "cube",
    "ball",
    "house",
    "cat sleeping on a windowsill",
    "street at night in the rain",
    "mountain lake at dawn",
)


def make(folder: Path, images: int, width: int, layers: int) -> None:
    """Make a random Gemma 2 with a byte-level tokenizer, and images with distinct captions."""
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", *letters])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    fast.save_pretrained(folder / "gemma")
    torch.manual_seed(0)
    shape = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "head_dim": 32,
    }
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": max(1, width // 64)}
    Gemma2Model(Gemma2Config(vocab_size=len(fast), **shape, **heads)).save_pretrained(folder / "gemma")
    rng, lines = np.random.default_rng(0), []
    (folder / "images").mkdir()
    for number in range(images):
        name = f"{number:05d}.jpg"
        Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(folder / "images" / name)
        text = f"{number} {COLORS[number % len(COLORS)]} {THINGS[number % len(THINGS)]}"
        lines.append(json.dumps({"file_name": name, "text": text}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))


def ours(folder: Path) -> dict[str, float]:
    """Run `sana embed` on that folder."""
    overrides = (
        "data.source=folder",
        f"data.path={folder / 'images'}",
        f"data.dir={folder / 'ours'}",
        "data.image_size=64",
    )
    config = parse_config(
        "", "benchmark", (*overrides, f"text.encoder={folder / 'gemma'}", "model.in_channels=3")
    )
    *_, summary = embed(EmbedOptions(config, overwrite=True))
    assert isinstance(summary, EmbedSummary)
    return {"seconds": summary.seconds, "bytes": summary.bytes, "memory": summary.peak_memory}


def lesson_encoder(folder: Path) -> tuple[Callable[[str], tuple[np.ndarray, np.ndarray]], int]:
    """The lesson's encoder, caption -> states (300, width) and mask (300,); and its width."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "gemma")
    model = AutoModel.from_pretrained(folder / "gemma").eval()
    tokenizer.padding_side = "right"

    @torch.no_grad()
    def encode(caption: str) -> tuple[np.ndarray, np.ndarray]:
        tokens = tokenizer(
            caption, padding="max_length", max_length=300, truncation=True, return_tensors="pt"
        )
        return model(**tokens).last_hidden_state[0].numpy(), tokens["attention_mask"][0].numpy()

    return encode, model.config.hidden_size


def lesson(folder: Path) -> dict[str, float]:
    """Embed as the lesson did: one caption at a time, padded, an array for each image."""
    from PIL import Image
    from transformers import AutoModel  # noqa: F401  # imported before the clock starts

    start = time.perf_counter()
    encode, width = lesson_encoder(folder)
    rows = [json.loads(line) for line in (folder / "images" / "metadata.jsonl").read_text().splitlines()]
    out = folder / "lesson"
    out.mkdir(exist_ok=True)
    shape = (len(rows), 300, width)
    states = np.lib.format.open_memmap(out / "states.npy", mode="w+", dtype=np.float32, shape=shape)
    masks = np.lib.format.open_memmap(out / "masks.npy", mode="w+", dtype=np.int64, shape=shape[:2])
    images = np.lib.format.open_memmap(
        out / "images.npy", mode="w+", dtype=np.float32, shape=(len(rows), 3, 64, 64)
    )
    for index, row in enumerate(rows):
        states[index], masks[index] = encode(row["text"])
        with Image.open(folder / "images" / row["file_name"]) as image:
            images[index] = np.asarray(image.resize((64, 64))).transpose(2, 0, 1) / 255.0
    for array in (states, masks, images):
        array.flush()
    size = sum(path.stat().st_size for path in out.iterdir())
    return {"seconds": time.perf_counter() - start, "bytes": size, "memory": peak_memory(torch.device("cpu"))}


def main() -> None:
    """Run both ways in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("images", 400), ("width", 256), ("layers", 4), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--way", choices=["ours", "lesson"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps((ours if options.way == "ours" else lesson)(options.folder)))
        return
    results: dict[str, list[dict[str, float]]] = {"ours": [], "lesson": []}
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), options.images, options.width, options.layers)
        for _ in range(options.repeats):
            for way, runs in results.items():
                command = [sys.executable, __file__, "--way", way, "--folder", name]
                answer = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append(json.loads(answer.stdout.splitlines()[-1]))
    middle = {
        way: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "bytes", "memory")}
        for way, runs in results.items()
    }
    threads = os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))
    print(
        f"{options.images} images, as many captions; Gemma 2 of {options.layers} layers of {options.width}, float32"
    )
    print(
        f"torch {torch.__version__}, {threads} threads, {platform.machine()}, medians of {options.repeats}, start-up included"
    )
    print(f"{'':22}{'lesson':>14}{'sana embed':>14}{'ratio':>9}")
    for key, unit in (("seconds", "s"), ("bytes", "B"), ("memory", "B")):
        old, new = middle["lesson"][key], middle["ours"][key]
        print(f"{key + ', ' + unit:22}{old:>14,.1f}{new:>14,.1f}{old / new:>8.1f}x")
    rate = {way: options.images / figures["seconds"] for way, figures in middle.items()}
    print(
        f"{'captions and images/s':22}{rate['lesson']:>14,.1f}{rate['ours']:>14,.1f}{rate['ours'] / rate['lesson']:>8.1f}x"
    )


if __name__ == "__main__":
    main()
