"""Time `sana embed` and `sana train` from nothing to pictures, and judge every checkpoint.

It runs the command line as a user does, in an empty folder, with a config as it is. The only
difference is that it saves more checkpoints. The time of a checkpoint is when it was complete,
with embedding and every start-up included.

    python benchmarks/learning.py [--config critters] [--seeds 0 1] [--steps 3000] [--images 10000]
        [--scales 3] [--plot docs/quickstart.png] [--ship]

Earlier work in `--folder` is continued; its times are kept. `--ship` writes the last checkpoint
of the first seed, in bf16 and with its score, into the package: the weights that
`shipped:CONFIG` names.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sana_cli.judging import plots
from sana_cli.judging.judge import wilson
from sana_cli.weights import checkpoint

EVERY_STEP = ("--guidance-interval", "0", "1")
PLAIN = ("--solver", "euler", "--steps", "20", "--flow-shift", "1", *EVERY_STEP)
COMBINATIONS = ("colours", "faces")  # kinds of unseen critters that are new combinations of known things


def sana(folder: Path, *arguments: str) -> str:
    """Run `sana ...` in `folder` and return its stdout."""
    command = [sys.executable, "-m", "sana_cli", *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def judged(folder: Path, step: Path, images: int, *options: str) -> dict[str, Any]:
    """The result of `sana eval` for one checkpoint; `options` change the sampler."""
    found = json.loads(sana(folder, "eval", str(step), "--images", str(images), *options, "--json"))
    (result,) = found["results"]
    return dict(result) | {"judge": found["judge"]}


def shares(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The shares of a result, each with the name of its curve; "" is all at once, of what training has."""
    yield "", result["accuracy"]
    if len(result["attributes"]) > 1:
        yield ", one by one", result["single"]
    combinations = [part for part in result["unseen"] if part["kind"] in COMBINATIONS]
    parts = {part["kind"]: [part] for part in result["unseen"]}
    for kind, found in ({"unseen combinations": combinations} | parts).items():
        for key, name in (("accuracy", ""), ("single", ", one by one")) if found else ():
            count = sum(part[key]["images"] for part in found)
            hits = sum(part[key]["images"] * part[key]["accuracy"] for part in found)
            low, high = wilson(hits, count)
            yield f", {kind}{name}", {"accuracy": hits / count, "low": low, "high": high}


class Times:
    """When the work in a folder began, kept in `times.json` there."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "times.json"
        self._found = json.loads(self._path.read_text()) if self._path.exists() else {}

    def once(self, name: str, value: float) -> float:
        """The number of this name: the earlier one, if there is one."""
        self._found.setdefault(name, value)
        self._path.write_text(json.dumps(self._found))
        return float(self._found[name])


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="quickstart")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--steps", type=int, help="training steps (default: the config's)")
    add("--guidance-scale", type=float, help="to judge and ship with (default: the config's)")
    add("--guidance-interval", type=float, nargs=2, help="to judge and ship with (default: the config's)")
    add("--solver-steps", type=int, help="to judge and ship with (default: the config's)")
    add("--images", type=int, default=10_000)
    add("--between", type=int, default=2000, help="images for earlier checkpoints and for other samplers")
    add("--scales", type=float, nargs="*", default=[], help="also judge at these scales, at every step")
    add("--plain", action="store_true", help="also judge with 20 plain Euler steps")
    add("--every", type=int, default=400, help="steps between checkpoints")
    add("--folder", type=Path, help="work in this folder and keep it")
    add("--plot", type=Path)
    add("--ship", action="store_true")
    return parser.parse_args(arguments)


def own_way(options: argparse.Namespace) -> tuple[str, ...]:
    """The sampler's options that replace the config's."""
    given = {
        "--guidance-scale": [options.guidance_scale],
        "--guidance-interval": options.guidance_interval or [None],
        "--steps": [options.solver_steps],
    }
    return tuple(
        word for name, values in given.items() if None not in values for word in (name, *map(str, values))
    )


def trained(options: argparse.Namespace, folder: Path, seed: int) -> list[Path]:
    """The step folders of a run of this seed, which is trained if it is not there."""
    run = f"runs/seed-{seed}"
    sets = {
        "train.steps": options.steps, "train.seed": seed, "run.dir": run, "save.every": options.every,
        "save.keep": 1000,
    }  # fmt: skip
    given = [word for key, value in sets.items() if value is not None for word in ("--set", f"{key}={value}")]
    sana(folder, "train", "--config", options.config, "--resume", "auto", *given)
    return checkpoint.steps(folder / run)


def report(name: str, step: Path, seconds: float, found: dict[str, Any]) -> None:
    """Print what was found of a checkpoint."""
    parts = [
        f"{share['accuracy']:.2%}{kind or ' as prompted'} ({share['low']:.2%} to {share['high']:.2%})"
        for kind, share in shares(found)
    ]
    distance = f"Fréchet distance {found['frechet_distance']:.2f} (real {found['real_frechet_distance']:.2f})"
    diversity = "" if found["diversity"] is None else f", diversity {found['diversity']:.2f}"
    print(f"{name}, {step.name}: {seconds:4.0f} s", *parts, distance + diversity, sep="\n    ", flush=True)


def main() -> None:
    """Embed, train and judge; draw the plot and write the package's weights if asked."""
    options = options_of()
    own = own_way(options)
    ways = {"": own} | {
        f", guidance {g:g}": ("--guidance-scale", str(g), *EVERY_STEP) for g in options.scales
    }
    runs: dict[str, list[dict[str, float]]] = {}
    real = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        times, start = Times(folder), time.time()
        sana(folder, "embed", "--config", options.config)
        embedding = times.once("embedding", time.time() - start)
        print(f"embedded in {embedding:.1f} s")
        for seed in options.seeds:
            start = times.once(f"seed {seed}", time.time())
            folders = trained(options, folder, seed)
            for step in folders:
                seconds = embedding + (step / checkpoint.MANIFEST).stat().st_mtime - start
                images = options.images if step == folders[-1] else options.between
                for name, way in ways.items():
                    found = judged(folder, step, images, *way)
                    real = found["real_frechet_distance"]
                    report(f"seed {seed}{name}", step, seconds, found)
                    for kind, share in shares(found):
                        point = {
                            "seconds": seconds,
                            **{key: share[key] for key in ("accuracy", "low", "high")},
                        }
                        point |= {"distance": found["frechet_distance"]} if kind == "" else {}
                        if kind in ("", ", one by one") or kind.startswith(", unseen"):  # few curves
                            runs.setdefault(f"seed {seed}{name}{kind}", []).append(point)
                    if name == "":
                        result = found
            for scale in ("2", "2.5") if options.plain else ():
                plain = judged(folder, folders[-1], options.between, *PLAIN, "--guidance-scale", scale)
                report(f"20 plain Euler steps, guidance {scale}", folders[-1], seconds, plain)
            if options.ship and seed == options.seeds[0]:
                keys = ("frechet_distance", "real_frechet_distance", "diversity", "judge")
                score: dict[str, Any] = {
                    "accuracy": result["accuracy"]["accuracy"],
                    "images": result["images"],
                }
                score |= {key: result[key] for key in keys}
                if result["unseen"]:
                    score |= {kind.strip(", "): share["accuracy"] for kind, share in shares(result) if kind}
                target = checkpoint.shipped(options.config)
                print(checkpoint.release(folders[-1], target, result["settings"], {"score": score}))
        if options.plot:
            plots.training_curves(runs, real, options.plot)


if __name__ == "__main__":
    main()
