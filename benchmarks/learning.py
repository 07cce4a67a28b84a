"""Time `sana embed` and `sana train` from nothing to digits, and judge every checkpoint.

It runs the command line as a user does: in an empty folder, with the default config. The only
difference is that it saves more checkpoints. The time of a checkpoint is when it was complete,
with embedding and every start-up included.

    python benchmarks/quickstart.py [--seeds 0 1] [--steps 3000] [--images 10000] [--scales 3]
        [--plot docs/quickstart.png] [--ship]

Earlier work in `--folder` is continued. `--ship` writes the last checkpoint of the first seed,
in bf16 and with its score, into the package: the weights of `sana sample` on a fresh install.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sana_cli.judging import plots
from sana_cli.weights import checkpoint

EVERY_STEP = ("--guidance-interval", "0", "1")
PLAIN = ("--solver", "euler", "--steps", "20", "--flow-shift", "1", *EVERY_STEP)


def sana(folder: Path, *arguments: str) -> str:
    """Run `sana ...` in `folder` and return its stdout."""
    command = [sys.executable, "-m", "sana_cli", *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def judged(folder: Path, step: Path, images: int, *options: str) -> dict[str, Any]:
    """The result of `sana eval` for one checkpoint; `options` change the sampler."""
    found = json.loads(sana(folder, "eval", str(step), "--images", str(images), *options, "--json"))
    (result,) = found["results"]
    return dict(result) | {"judge": found["judge"]}


def main() -> None:
    """Embed, train and judge; draw the plot and write the package's weights if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="training steps (default: the config's)")
    parser.add_argument("--guidance-scale", type=float, help="to judge and ship with (default: the config's)")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument(
        "--between",
        type=int,
        default=2000,
        help="images for earlier checkpoints and for other samplers",
    )
    parser.add_argument(
        "--scales",
        type=float,
        nargs="*",
        default=[],
        help="also judge at these guidance scales, applied at every step",
    )
    parser.add_argument("--every", type=int, default=400, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, help="work in this folder and keep it")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--ship", action="store_true")
    options = parser.parse_args()
    own = () if options.guidance_scale is None else ("--guidance-scale", str(options.guidance_scale))
    ways = {"": own} | {
        f", guidance {g:g}": ("--guidance-scale", str(g), *EVERY_STEP) for g in options.scales
    }
    runs: dict[str, list[dict[str, float]]] = {}
    real = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        start = time.time()
        sana(folder, "embed")
        embedding = time.time() - start
        print(f"embedded in {embedding:.1f} s")
        for seed in options.seeds:
            run, start = f"runs/seed-{seed}", time.time()
            sets = {
                "train.steps": options.steps, "train.seed": seed, "run.dir": run,
                "save.every": options.every, "save.keep": 1000,
            }  # fmt: skip
            given = (
                word
                for key, value in sets.items()
                if value is not None
                for word in ("--set", f"{key}={value}")
            )
            sana(folder, "train", "--resume", "auto", *given)
            folders = checkpoint.steps(folder / run)
            for step in folders:
                made = (step / checkpoint.MANIFEST).stat().st_mtime
                seconds = embedding + made - start if made > start else math.nan  # from an earlier call
                images = options.images if step == folders[-1] else options.between
                for name, way in ways.items():
                    found = judged(folder, step, images, *way)
                    share, real = found["accuracy"], found["real_frechet_distance"]
                    point = {
                        "seconds": seconds,
                        "distance": found["frechet_distance"],
                        "diversity": found["diversity"],
                        **share,
                    }
                    runs.setdefault(f"seed {seed}{name}", []).append(point)
                    print(
                        f"seed {seed}{name}, {step.name}: {seconds:4.0f} s, {share['accuracy']:.2%} as prompted "
                        f"({share['low']:.2%} to {share['high']:.2%}), Fréchet distance {found['frechet_distance']:.2f} "
                        f"(real {real:.2f}), diversity {found['diversity']:.2f}",
                        flush=True,
                    )
                    if name == "":
                        result = found
            last = folders[-1]
            for scale in ("2", "2.5"):
                plain = judged(folder, last, options.between, *PLAIN, "--guidance-scale", scale)
                share, distance = plain["accuracy"]["accuracy"], plain["frechet_distance"]
                print(
                    f"  20 plain Euler steps, guidance {scale}: {share:.2%}, Fréchet distance {distance:.2f}",
                    flush=True,
                )
            if options.ship and seed == options.seeds[0]:
                keys = ("images", "frechet_distance", "real_frechet_distance", "diversity", "judge")
                score = {"accuracy": result["accuracy"]["accuracy"], **{key: result[key] for key in keys}}
                print(checkpoint.release(last, checkpoint.shipped(), result["settings"], {"score": score}))
        if options.plot:
            plots.training_curves(runs, real, options.plot)


if __name__ == "__main__":
    main()
