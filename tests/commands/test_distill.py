"""`sana distill`: the config that it makes of a teacher, and its command line."""

from pathlib import Path

import pytest
from helpers import embedded, invoke, metrics_lines, small_config, trained

from sana_cli.commands.distill import DistillOptions, distill_config
from sana_cli.config.file import load_config
from sana_cli.config.keys import Config
from sana_cli.errors import SanaError
from sana_cli.weights import checkpoint

SHORT = (
    "train.steps=2", "train.batch_size=4", "train.precision=fp32", "optim.warmup_steps=1",
    "log.every=1", "log.sample_every=100", "save.every=1", "run.device=cpu",
)  # fmt: skip


def to_set(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of two steps at runs/teacher of the working directory."""
    monkeypatch.chdir(tmp_path)
    config = small_config(
        tmp_path, "train.steps=2", "objective.prediction_type=sample", "train.seed=3",
        f"run.dir={tmp_path / 'runs' / 'teacher'}", "sample.guidance_scale=3", "sample.guidance_interval=[0.1, 0.9]",
        "sample.seed=5",
    )  # fmt: skip
    embedded(config)
    trained(config)
    return config


def test_the_config_follows_from_the_teacher(teacher: Config) -> None:
    """From its run, from a step folder of it, and from the newest run: only the teacher's name differs."""
    run = Path("runs/teacher")
    found = distill_config(DistillOptions(run))
    assert (found.data, found.text) == (teacher.data, teacher.text)
    theirs = teacher.model.model_dump() | {"dropout": 0.0}
    own = found.model.model_dump()
    changed = {key for key, value in own.items() if value != theirs[key]}
    assert {"guidance_embeds", "timestep_scale"} <= changed
    assert changed <= {
        "guidance_embeds",
        "guidance_embeds_scale",
        "timestep_scale",
        "sample_size",
        "caption_channels",
    }
    assert found.model.guidance_embeds
    assert found.model.timestep_scale == 0.001
    assert found.objective.prediction_type == "sample"
    assert found.objective.caption_dropout == 0
    assert found.train.seed == 3
    assert found.train.init_from is None
    assert found.distill.teacher == run
    assert list(found.distill.guidance) == [1, 4.5]
    assert found.distill.guidance_interval == (0.1, 0.9)
    assert (found.sample.solver, found.sample.steps, found.sample.flow_shift) == ("scm", 1, 1.0)
    assert (found.sample.guidance_scale, found.sample.seed, found.sample.prompts) == (3.3, 5, ("4 two",))
    assert found.run.dir == Path("runs/teacher-distilled")
    step = checkpoint.steps(run)[-1]
    for options in (DistillOptions(step), DistillOptions()):
        other = distill_config(options)
        assert other.distill.teacher is not None
        assert other.distill.teacher.resolve() == step.resolve()
        same = other.model_copy(update={"distill": other.distill.model_copy(update={"teacher": run})})
        assert same == found
    assert found == Config.model_validate(found.to_dict()), "its YAML loads back to itself"


def test_any_key_can_be_overridden(teacher: Config) -> None:
    found = distill_config(
        DistillOptions(Path("runs/teacher"), None, ("distill.largest=0.25", "run.dir=here"))
    )
    assert (found.distill.largest, found.run.dir) == (0.25, Path("here"))
    with pytest.raises(SanaError, match=r"--set distill.larges=1: unknown key distill.larges") as caught:
        distill_config(DistillOptions(Path("runs/teacher"), None, ("distill.larges=1",)))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["quickstart", "critters"])
def test_the_config_of_a_shipped_teacher(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SanaError, match=rf"no dataset in data/{name}.*\n.*sana embed --config {name}"):
        distill_config(DistillOptions(Path(f"shipped:{name}")))
    monkeypatch.setattr("sana_cli.commands.distill.is_dataset", lambda _directory: True)
    found, own = distill_config(DistillOptions(Path(f"shipped:{name}"))), load_config(name)
    assert (found.data, found.text) == (own.data, own.text)
    assert found.distill.teacher == Path(f"shipped:{name}")
    assert found.run.dir == Path(f"runs/{name}-distilled")
    moved = distill_config(DistillOptions(Path(f"shipped:{name}"), None, (f"data.dir={tmp_path}",)))
    assert moved.data.dir == tmp_path


def test_a_shipped_teacher_is_distilled_on_a_dataset_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = f"data.dir={tmp_path / 'few'}"
    embedded(load_config("quickstart", [few, "data.held_out_split=null"]), 12)
    keys = to_set(*SHORT, few, "data.held_out_split=null", "train.steps=1", "optim.warmup_steps=0")
    result = invoke("distill", "shipped:quickstart", *keys, columns=200)
    assert result.exit_code == 0, result.output
    assert "distils" in result.output
    assert checkpoint.steps(Path("runs/quickstart-distilled"))


def test_the_command_distils_and_goes_on(teacher: Config, tmp_path: Path) -> None:
    said = invoke("distill", "runs/teacher", "--dry-run", *to_set(*SHORT), columns=200)
    assert said.exit_code == 0, said.output
    assert "distils" in said.output
    assert "runs/teacher" in said.output
    assert "teacher" in next(line for line in said.output.splitlines() if line.startswith("memory"))
    assert not Path("runs/teacher-distilled").exists()
    first = invoke("distill", *to_set(*SHORT), columns=200)
    assert first.exit_code == 0, first.output
    assert "the student begins as" in first.output
    assert {"adversarial", "critic", "loss"} <= {*metrics_lines(Path("runs/teacher-distilled"))[0]}
    longer = to_set(*SHORT, "train.steps=4")
    again = invoke("distill", "runs/teacher", "--resume", "auto", *longer, columns=200)
    assert again.exit_code == 0, again.output
    assert "going on after step 2" in again.output
    assert "the student begins as" not in again.output
    steps = checkpoint.steps(Path("runs/teacher-distilled"))
    assert steps[-1].name == "step-000004"
    drawn = invoke("sample", "4 two", "--out", str(tmp_path / "out.png"), columns=200)
    assert drawn.exit_code == 0, drawn.output
    assert "scm" in drawn.output or (tmp_path / "out.png").is_file()
    taught = invoke("distill", "runs/teacher-distilled", columns=200)
    assert taught.exit_code == 1
    assert "is itself a few-step model" in taught.output


def test_resume_finds_the_teacher_of_the_first_command(teacher: Config) -> None:
    assert invoke("distill", *to_set(*SHORT)).exit_code == 0
    again = invoke("distill", "--resume", "auto", *to_set(*SHORT, "train.steps=3"))
    assert again.exit_code == 0, again.output
    assert checkpoint.steps(Path("runs/teacher-distilled"))[-1].name == "step-000003"


def test_a_teacher_without_a_dataset_is_asked_for_one(teacher: Config, tmp_path: Path) -> None:
    alone = tmp_path / "mine"
    checkpoint.steps(Path("runs/teacher"))[-1].rename(alone)
    result = invoke("distill", "mine", columns=200)
    assert result.exit_code == 2
    assert "mine does not say which dataset it is to be distilled on" in result.output
    assert "--config" in result.output
    path = tmp_path / "own.yaml"
    path.write_text(teacher.to_yaml())
    found = distill_config(DistillOptions(Path("mine"), str(path)))
    assert (found.data, found.run.dir) == (teacher.data, Path("runs/mine-distilled"))


def test_teachers_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("distill", "runs/nowhere", columns=200)
    assert result.exit_code in (1, 2)
    assert "distill.teacher: " in result.output
    assert "runs/nowhere" in result.output
    assert "Traceback" not in result.output
