"""`sana distill`: the config of a run that distils a teacher. Running it is `commands/train.py`'s matter.

What a student is to be follows from its teacher: architecture, dataset, captions, guidance. The recipe is
here; any key of it can be overridden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sana_cli.config.document import Dumper
from sana_cli.config.file import RUN_CONFIG, load_config, load_run_config, parse_config
from sana_cli.config.keys import Config, SampleConfig
from sana_cli.dataset.layout import is_dataset
from sana_cli.errors import SanaError
from sana_cli.sampling.pipeline import open_pipeline
from sana_cli.text import check_same_encoder, config_fingerprint
from sana_cli.training.initial import TEACHER, find_base_model, read_teacher
from sana_cli.training.student import student_architecture
from sana_cli.weights import checkpoint
from sana_cli.weights.reader import read_weights

# keys of `train` that are those of the teacher's run
KEPT = ("seed", "precision", "activation_checkpointing", "parallel", "compile", "chunk")
GUIDANCE_EMBEDS_SCALE = 0.1  # of SANA-Sprint: 0.1 times the guidance scale is the student's input
RANGE = 1.5  # times the teacher's guidance scale: the largest that a student learns
MORE_GUIDANCE = 1.1  # times the teacher's, for pixels: the critic widens what guidance narrows
OF_PIXELS: dict[str, dict[str, Any]] = {
    "optim": {
        "lr": 1e-3,
        "schedule": "linear",
        "betas": [0.0, 0.99],
        "weight_decay": 0.0,
        "ema_decay": 0.99,
    },
    "train": {"steps": 1000, "batch_size": 32},
    "log": {"sample_every": 200, "held_out_every": 200},
    "save": {"every": 200},
}
# CAME, its rate and 16 images are SANA-Sprint's. At so low a rate new parts would hardly move: they have rates of
# their own. All of this has been run on small random models alone.
OF_LATENTS: dict[str, dict[str, Any]] = {
    "optim": {
        "optimizer": "came",
        "lr": 2e-6,
        "schedule": "constant",
        "warmup_steps": 100,
        "weight_decay": 0.0,
        "ema_decay": 0.99,
    },
    "train": {"steps": 10_000, "batch_size": 1, "accumulate": 16},
    "log": {"sample_every": 500, "held_out_every": 500},
    "save": {"every": 500},
    "distill": {"critic_rate": 50.0, "critic_warmup": 3000, "guidance_rate": 10.0},
}


@dataclass(frozen=True)
class DistillOptions:
    """What to distil, and how otherwise than by the recipe."""

    teacher: Path | None = None  # a run, a checkpoint, a pipeline; None: the newest run, or the shipped one
    config: str | None = None  # the data and text of a teacher that has no config of its own
    overrides: Sequence[str] = ()  # `section.key=value`


def distill_config(options: DistillOptions) -> Config:
    """The whole config of a distillation.

    Raises:
        SanaError: no teacher, one that cannot teach, or one whose dataset is not known.
    """
    source = find_base_model(options.teacher, TEACHER) if options.teacher else _newest_teacher()
    teacher = read_teacher(source)
    pipeline = open_pipeline(source, weights=teacher)
    base, name, config = _around(source, options)
    if pipeline.fingerprint is not None:
        way_out = "give the config that the teacher was trained with, or none"
        check_same_encoder(pipeline.fingerprint, config_fingerprint(base.text), str(source), way_out)
    recipe = OF_PIXELS if base.data.autoencoder is None else OF_LATENTS
    model = student_architecture(teacher.model, GUIDANCE_EMBEDS_SCALE)
    sample = pipeline.sample
    scale = max(1.0, sample.guidance_scale)
    more = MORE_GUIDANCE if base.data.autoencoder is None else 1.0
    plain = {
        "data": base.data.model_dump(mode="json"),
        "text": base.text.model_dump(mode="json"),
        "model": model.model_dump(mode="json") | {"dropout": 0.0},
        "objective": {"prediction_type": teacher.prediction_type, "caption_dropout": 0.0},
        "optim": recipe["optim"],
        "distill": {
            "teacher": str(options.teacher or source),
            "guidance": [1.0, round(RANGE * max(scale, 1.4), 2)],
            "guidance_interval": list(sample.guidance_interval),
            **recipe.get("distill", {}),
        },
        "train": recipe["train"] | {key: getattr(base.train, key) for key in KEPT},
        "log": recipe["log"],
        "save": recipe["save"],
        "sample": _drawn(base.sample, round(more * scale, 1)).model_dump(mode="json"),
        "run": {"dir": f"runs/{name}{checkpoint.STUDENT_SUFFIX}", "device": base.run.device},
    }
    text = yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    made = parse_config(text, f"the distillation of {name}", options.overrides, is_file=False)
    if not is_dataset(made.data.dir):
        raise SanaError(
            f"no dataset in {made.data.dir}, on which {options.teacher or source} is to be distilled",
            f"make it with: sana embed --config {config}, or name another with --set data.dir=DIR",
        )
    return made


def _newest_teacher() -> Path:
    """The newest checkpoint; if that is a student, the one that it was distilled from."""
    newest = find_base_model(checkpoint.find_checkpoint(None), TEACHER)
    if read_weights(checkpoint.transformer_path(newest)).model.guidance_embeds:
        return checkpoint.find_teacher(newest, "sana distill TEACHER")
    return newest


def _around(source: Path, options: DistillOptions) -> tuple[Config, str, str]:
    """The config that is given or that of the teacher's run, what to call the student's run, and that config's name."""
    run = source.absolute().parent.parent
    if source.absolute().parent.name == checkpoint.CHECKPOINTS and (run / RUN_CONFIG).is_file():
        if options.config is None:
            return load_run_config(run), run.name, str(source.parent.parent / RUN_CONFIG)
        return load_config(options.config), run.name, options.config
    if checkpoint.is_shipped(source):
        config = options.config or source.name
        return load_config(config), source.name, config
    if options.config is None:
        raise SanaError(
            f"{source} does not say which dataset it is to be distilled on",
            "give a config with its data and text: --config finetune-1.6b (or your own file)",
            exit_code=2,
        )
    return load_config(options.config), source.stem if source.is_file() else source.name, options.config


def _drawn(sample: SampleConfig, guidance: float) -> SampleConfig:
    """How a student's pictures are drawn: in one step, for the prompts of its teacher's run."""
    return SampleConfig(
        solver="scm",
        steps=1,
        guidance_scale=guidance,
        flow_shift=1.0,
        seed=sample.seed,
        prompts=sample.prompts,
    )
