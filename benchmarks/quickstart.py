"""From nothing to digits, timed: `sana embed` and `sana train`, then every checkpoint judged, against the seconds since the start.

It runs the command line as a user does, in an empty folder, with the default config; saving more checkpoints than that does is the
only difference. The times are those at which checkpoints were whole, embedding and every start-up included.

    python benchmarks/quickstart.py [--seeds 0 1] [--steps 2600] [--images 10000] [--scales 3] [--plot docs/quickstart.png] [--ship]

What is in `--folder` already is gone on with. `--ship` puts the last checkpoint of the first seed, in bf16 and with its score, where
the package finds it (`sana sample` on a fresh install).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sana_cli import checkpoint, plots

SAMPLERS = {"dpm++": (), "euler 20 x 2": ("euler", "20", "2"), "euler 20 x 2.5": ("euler", "20", "2.5")}


def sana(folder: Path, *arguments: str) -> str:
    """Run `sana ...` in `folder`; what it printed to stdout."""
    command = [sys.executable, "-m", "sana_cli", *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def judged(folder: Path, step: Path, images: int, sampler: tuple[str, ...] = (), scale: float | None = None) -> dict[str, Any]:
    """The result of `sana eval` for one checkpoint, by its own sampler or another (without shift, as plain as can be)."""
    options = []
    if sampler:
        solver, steps, of_solver = sampler
        options = ["--solver", solver, "--steps", steps, "--guidance-scale", of_solver, "--flow-shift", "1"]
    if scale is not None:
        options += ["--guidance-scale", str(scale)]
    found = json.loads(sana(folder, "eval", str(step), "--images", str(images), *options, "--json"))
    (result,) = found["results"]
    return dict(result) | {"judge": found["judge"]}


def main() -> None:
    """Embed, train, judge; a table, a plot, and with `--ship` the package's weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of training, if not the config's")
    parser.add_argument("--guidance-scale", type=float, help="of the checkpoints' sampling, if not the config's")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument(
        "--between", type=int, default=2000, help="images for other checkpoints and samplers than the last one's own"
    )
    parser.add_argument("--scales", type=float, nargs="*", default=[], help="further guidance scales to judge checkpoints at")
    parser.add_argument("--every", type=int, default=400, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, help="work here, and keep what was made")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--ship", action="store_true")
    options = parser.parse_args()
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
                "train.steps": options.steps, "sample.guidance_scale": options.guidance_scale, "train.seed": seed, "run.dir": run,
                "train.save_every": options.every, "train.keep": 1000,
            }  # fmt: skip
            given = (word for key, value in sets.items() if value is not None for word in ("--set", f"{key}={value}"))
            sana(folder, "train", "--resume", "auto", *given)
            folders = checkpoint.steps(folder / run)
            for step in folders:
                seconds = embedding + (step / checkpoint.MANIFEST).stat().st_mtime - start
                images = options.images if step == folders[-1] else options.between
                for scale in (None, *options.scales):
                    found = judged(folder, step, images, scale=scale)
                    share, real = found["accuracy"], found["real_frechet_distance"]
                    guidance = found["settings"]["guidance_scale"]
                    point = {"seconds": seconds, "distance": found["frechet_distance"], "diversity": found["diversity"], **share}
                    runs.setdefault(f"seed {seed}, guidance {guidance:g}", []).append(point)
                    print(
                        f"seed {seed}, {step.name}, guidance {guidance:g}: {seconds:4.0f} s, {share['accuracy']:.2%} as prompted "
                        f"({share['low']:.2%} to {share['high']:.2%}), Fréchet distance {found['frechet_distance']:.2f} "
                        f"(real {real:.2f}), diversity {found['diversity']:.2f}",
                        flush=True,
                    )
                    if scale is None:
                        result = found
            last = folders[-1]
            for name, sampler in SAMPLERS.items():
                other = judged(folder, last, options.between, sampler) if sampler else result
                print(
                    f"  {name}: {other['accuracy']['accuracy']:.2%}, Fréchet distance {other['frechet_distance']:.2f}", flush=True
                )
            if options.ship and seed == options.seeds[0]:
                keys = ("images", "frechet_distance", "real_frechet_distance", "diversity", "judge")
                score = {"accuracy": result["accuracy"]["accuracy"], **{key: result[key] for key in keys}}
                print(checkpoint.release(last, checkpoint.shipped(), {"score": score}))
        if options.plot:
            plots.training_curves(runs, real, options.plot)


if __name__ == "__main__":
    main()
