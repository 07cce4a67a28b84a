"""Time `sana distill` from a teacher to pictures in one step, and judge every checkpoint beside the teacher.

It runs the command line as a user does. The time of a checkpoint is when it was complete, with the start-up
included. Seeds are trained one after the other, so that each has the machine for itself.

    python benchmarks/distilling.py TEACHER [--data DIR] [--seeds 0 1 2] [--images 5000] [--plot docs/fewstep.png]
        [--set KEY=VALUE] [--ship NAME]

`TEACHER` and the dataset are read where they lie. Earlier work in `--folder` is continued; its times are
kept. `--ship` writes the last checkpoint of the first seed, in bf16 and with its score, into the package.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from learning import Times, report, sana, shares

from sana_cli.judging import plots
from sana_cli.weights import checkpoint


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("teacher", help="as sana distill takes it")
    add("--data", type=Path, help="the dataset (default: that of the teacher's config, here)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add(
        "--solver-steps",
        type=int,
        nargs="+",
        default=[1, 2],
        help="to judge with; the last checkpoint at 4 too",
    )
    add("--guidance-scale", type=float, help="to judge and ship with (default: the teacher's)")
    add("--images", type=int, default=5000, help="of the last checkpoint and the teacher")
    add("--between", type=int, default=2000, help="of earlier checkpoints")
    add("--set", action="append", default=[], help="as of sana distill")
    add("--folder", type=Path, help="work in this folder and keep it")
    add("--plot", type=Path)
    add("--ship", metavar="NAME")
    return parser.parse_args(arguments)


def judged(folder: Path, what: str, data: list[str], images: int, *options: str) -> list[dict[str, Any]]:
    """The results of `sana eval`, one for each setting."""
    found = json.loads(sana(folder, "eval", what, *data, "--images", str(images), *options, "--json"))
    return [dict(result) | {"judge": found["judge"]} for result in found["results"]]


def main() -> None:
    """Distil and judge; draw the plot and write the package's weights if asked."""
    options = options_of()
    teacher = str(Path(options.teacher).absolute()) if Path(options.teacher).exists() else options.teacher
    data = [] if options.data is None else ["--data", str(options.data.absolute())]
    sets = [*options.set, *([] if options.data is None else [f"data.dir={options.data.absolute()}"])]
    scale = [] if options.guidance_scale is None else ["--guidance-scale", str(options.guidance_scale)]
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        times = Times(folder)
        (of_teacher,) = judged(folder, teacher, data, options.images)
        report("the teacher", Path(teacher), 0.0, of_teacher)
        for seed in options.seeds:
            run = f"runs/seed-{seed}"
            given = [*sets, f"train.seed={seed}", f"run.dir={run}", "save.keep=1000"]
            start = times.once(f"seed {seed}", time.time())
            sana(folder, "distill", teacher, "--resume", "auto", *(w for g in given for w in ("--set", g)))
            folders = checkpoint.steps(folder / run)
            for step in folders:
                is_last = step == folders[-1]
                seconds = (step / checkpoint.MANIFEST).stat().st_mtime - start
                counts = [*options.solver_steps, 4] if is_last else options.solver_steps
                each = [word for count in counts for word in ("--steps", str(count))]
                images = options.images if is_last else options.between
                for count, found in zip(
                    counts, judged(folder, str(step), data, images, *each, *scale), strict=True
                ):
                    name = f"seed {seed}, {count} step{'s' * (count > 1)}"
                    report(name, step, seconds, found)
                    for kind, share in shares(found):
                        point = {"seconds": seconds} | {
                            key: share[key] for key in ("accuracy", "low", "high")
                        }
                        point |= {"distance": found["frechet_distance"]} if kind == "" else {}
                        if kind in ("", ", one by one") and count in options.solver_steps:
                            runs.setdefault(f"{name}{kind}", []).append(point)
                    if is_last and count == options.solver_steps[0] and seed == options.seeds[0]:
                        result, last = found, step
        if options.ship:
            keys = ("frechet_distance", "real_frechet_distance", "diversity", "judge")
            score: dict[str, Any] = {"accuracy": result["accuracy"]["accuracy"], "images": result["images"]}
            score |= {key: result[key] for key in keys}
            if result["unseen"]:
                score |= {kind.strip(", "): share["accuracy"] for kind, share in shares(result) if kind}
            print(
                checkpoint.release(
                    last, checkpoint.shipped(options.ship), result["settings"], {"score": score}
                )
            )
        if options.plot:
            plots.training_curves(runs, result["real_frechet_distance"], options.plot, "sana distill")


if __name__ == "__main__":
    main()
