"""`sana train` on the command line."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_cli.cli.options import ConfigOptions, DryRunOption, PrintOptions, grouped, home
from sana_cli.cli.process import console, load_torch, user_errors
from sana_cli.interrupts import Stop
from sana_cli.runtime.launch import launch
from sana_cli.units import human_bytes, human_time

if TYPE_CHECKING:
    from sana_cli.commands.train import TrainStart, TrainStep, TrainSummary
    from sana_cli.config.keys import AdapterConfig, Config
    from sana_cli.training.plan import TrainPlan


ResumeOption = Annotated[
    str,
    typer.Option(
        metavar="auto|PATH|none",
        callback=home,
        help="Continue: from the newest whole checkpoint, or a given one.",
    ),
]


@grouped
def train(
    context: typer.Context,
    config: ConfigOptions,
    *,
    resume: ResumeOption = "none",
    dry_run: DryRunOption = False,
    printing: PrintOptions,
) -> None:
    """Train on a pre-embedded dataset.

    Ctrl-C saves the last whole step. --resume auto continues from it, to the bit.

    \b
    Examples:
      sana train
      sana train --config sana --resume auto
      sana train --set train.steps=500 --set run.dir=runs/short
    """
    with user_errors(context, printing.quiet, distributed=True) as work:
        loaded = config.load()
        load_torch(work)
        return run_config(loaded, resume, dry_run, printing)


def run_config(config: "Config", resume: str, dry_run: bool, printing: PrintOptions) -> None:
    """Train by a config, or print what that would be."""
    from sana_cli.commands.train import TrainOptions, plan
    from sana_cli.commands.train import train as run

    if dry_run:
        found = plan(TrainOptions(config, resume))
        return console.print_json(found) if printing.json else console.facts(_plan_facts(found, config))
    stop = Stop(
        lambda: console.note("finishing this micro-batch, then saving (once more quits now)"),
        launch().by_torchrun,
    )
    summary = console.watch(
        stop.during(run(TrainOptions(config, resume, stop))),
        lambda step: _progress(step, config, quiet=printing.json),
        quiet=printing.json,
    )
    return console.print_json(summary) if printing.json else _print_summary(summary)


def _progress(step: object, config: "Config", quiet: bool) -> "console.Line | None":
    from sana_cli.commands.train import TrainNote, TrainStart, TrainStep

    if isinstance(step, TrainStart) and not quiet:
        _print_start(step, config)
    if isinstance(step, TrainNote) and not quiet:
        console.note(step.text)
    return _line(step) if isinstance(step, TrainStep) else None


def _print_start(start: "TrainStart", config: "Config") -> None:
    console.facts(_plan_facts(start.plan, config), console.err)
    for text in start.notes:
        console.note(text)
    if start.checkpoint is not None and start.step < start.plan.steps:
        console.note(f"going on after step {start.step:,}, from {start.checkpoint}")


def _line(step: "TrainStep") -> "console.Line":
    events = [f"step {step.step}: checkpoint {step.saved}"] if step.saved else []
    events += [f"step {step.step}: samples {step.sampled}"] if step.sampled else []
    events += [f"warning: {step.warning}"] if step.warning else []
    info, left = "", ""
    if step.loss == step.loss:  # NaN before the first step of this process
        held_out = "" if step.held_out_loss is None else f"  held out {step.held_out_loss:.4f}"
        moved = "" if step.movement is None else f"  moved {step.movement:.2%}"
        wait = f"  data {step.data_wait:.0%}" if step.data_wait >= 0.005 else ""
        info = (
            f"loss {step.loss:.4f}{held_out}{moved}  lr {step.lr:.1e}  grad {step.grad_norm:.2f}  "
            f"{step.samples_per_second:.0f} img/s{wait}  {human_bytes(step.memory)}"
        )
        left = f"{human_time(step.seconds_left)} left" if step.step < step.steps else ""
    return console.Line("train", step.step, step.steps, info, "\n".join(events), step.loss, left)


def _plan_facts(plan: "TrainPlan", config: "Config") -> dict[str, Any]:
    cut = "" if plan.batch == plan.micro_batch else f" ({plan.micro_batches} x {plan.micro_batch}"
    cut += f" x {plan.processes} processes)" if cut and plan.processes > 1 else ")" if cut else ""
    facts = {
        "parameters": plan.parameters,
        **({} if not config.adapter.on else {"trained": _adapters_in_words(plan, config.adapter)}),
        **({} if not config.distill.on else {"distils": str(config.distill.teacher)}),
        "dataset": f"{' + '.join(map(str, [plan.dataset, *config.data.also]))}, {plan.images:,} images",
        "held out": f"{plan.held_out}, {plan.held_out_images:,} images" if plan.held_out else "none",
        "steps": f"{plan.steps:,} of {plan.batch} images{cut}, {plan.epochs:.2f} epochs",
        "precision": f"{plan.precision} ({plan.precision_reason}), on {plan.device}",
        "checkpoint": f"{human_bytes(plan.checkpoint_bytes)} each, {config.save.keep} kept, in {plan.run}",
    }
    if plan.memory is not None:
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.memory.parts.items() if size)
        facts["memory"] = f"about {human_bytes(plan.memory.total)}: {parts}"
        if plan.memory.advice is not None:
            facts["fits"] = plan.memory.advice
        facts["disk"] = (
            f"{human_bytes(plan.disk_bytes)} at most, while one more is written; "
            f"{human_bytes(plan.disk_free)} are free"
        )
    return facts


def _adapters_in_words(plan: "TrainPlan", adapter: "AdapterConfig") -> str:
    kind = "DoRA" if adapter.kind == "dora" else "LoRA"
    return f"{plan.trained:,} in adapters ({kind}, rank {adapter.rank}); the rest is frozen"


def _print_summary(summary: "TrainSummary") -> None:
    if summary.first_step == summary.steps:
        console.note(
            f"{summary.run} is finished at step {summary.steps}; nothing to do (a larger train.steps goes on)"
        )
    else:
        console.note(
            f"trained steps {summary.first_step + 1} to {summary.steps} in {human_time(summary.seconds)}, "
            f"peak memory {human_bytes(summary.peak_memory)}"
        )
    if summary.report is not None:
        console.note(f"report: {summary.report}")
    console.result(str(summary.checkpoint))
