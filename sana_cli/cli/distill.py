"""`sana distill` on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import typer

from sana_cli.cli.options import DryRunOption, PrintOptions, argument, grouped, option
from sana_cli.cli.process import load_torch, user_errors
from sana_cli.cli.train import ResumeOption, run_config


@dataclass(frozen=True)
class DistilledOptions:
    """The teacher, and overrides of the recipe."""

    HEADING: ClassVar = None

    teacher: Path | None = argument(
        "A run, a step folder, a diffusers folder, or `shipped:NAME`. Default: the newest checkpoint under runs/ (of a "
        "student, its teacher), else the shipped digits.",
        path=True,
        metavar="TEACHER",
    )
    config: str | None = option(
        "Data and text of a teacher that has no config of its own: a YAML file, or the name of a shipped config.",
        path="FILE|NAME",
    )
    set_: list[str] | None = option(
        "Override a key of the recipe, as in --set train.steps=2000. Repeatable.",
        flag="--set",
        metavar="KEY=VALUE",
    )


@grouped
def distill(
    context: typer.Context,
    of: DistilledOptions,
    *,
    resume: ResumeOption = "none",
    dry_run: DryRunOption = False,
    printing: PrintOptions,
) -> None:
    """Distil a checkpoint into a model that draws in one to four steps.

    The student begins as its teacher and learns on the teacher's dataset. It has the teacher's size,
    with the guidance scale as an input, and is a run like any other: Ctrl-C saves it, --resume auto
    goes on, sana sample draws with it. `sana inspect RUN --yaml` prints its whole recipe.

    \b
    Examples:
      sana distill
      sana distill runs/quickstart --set train.steps=2000
      sana distill shipped:critters --resume auto
      sana distill models/sana-1.6b --config finetune-1.6b --set data.dir=data/mine --dry-run
    """
    with user_errors(context, printing.quiet, distributed=True) as work:
        load_torch(work)
        from sana_cli.commands.distill import DistillOptions, distill_config

        config = distill_config(DistillOptions(of.teacher, of.config, tuple(of.set_ or ())))
        return run_config(config, resume, dry_run, printing)
