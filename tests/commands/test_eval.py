"""`sana eval` of checkpoints and folders, and what it refuses."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pytest
from helpers import again, child, embedded, invoke, sampled, small_config, trained
from helpers.folders import metadata_folder
from helpers.steps import perturb, small_judge
from PIL import Image

from sana_cli.choices import JudgedBy
from sana_cli.cli.eval import _judge_in_words, _points, _print_comparison, _print_swaps
from sana_cli.commands import eval as evaluating
from sana_cli.commands.eval import Comparison, EvalOptions, EvalResult, EvalSummary, evaluate, record
from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.judging import judge, plots, retrieval
from sana_cli.judging.asked import judged_attributes, prompts_of, values_of
from sana_cli.judging.judge import Judge, Share
from sana_cli.judging.verdict import Reading, Swap, Verdict, difference_interval
from sana_cli.play.studio import Studio
from sana_cli.sampling.opened import open_checkpoint
from sana_cli.sources import DIGIT_WORDS
from sana_cli.weights import checkpoint


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Judge]:
    return small_judge(tmp_path, monkeypatch)


def test_eval_of_a_checkpoint_and_of_a_folder(
    judged: tuple[Config, Judge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = judged
    trained(config)
    run = config.run.dir
    options = EvalOptions(
        run,
        images=40,
        steps=(1, 2),
        guidance_scale=(1.0, 2.0),
        out=tmp_path / "e.json",
        plot=tmp_path / "e.png",
    )
    *_, summary = evaluate(options)
    assert isinstance(summary, EvalSummary)
    found = [(r.settings.steps, r.settings.guidance_scale, r.images) for r in summary.results if r.settings]
    assert found == [(1, 1.0, 40), (1, 2.0, 40), (2, 1.0, 40), (2, 2.0, 40)]
    assert json.loads((tmp_path / "e.json").read_text()) == record(summary)
    with Image.open(tmp_path / "e.png") as image:
        assert image.width > 1000
    monkeypatch.setattr(evaluating, "SWEEP_STEPS", (1,))
    monkeypatch.setattr(evaluating, "SWEEP_GUIDANCE", (1.0,))
    # the patched settings, and the checkpoint's own: 2 steps, guidance 2.5
    *_, swept = evaluate(EvalOptions(run, images=40, sweep=True))
    assert isinstance(swept, EvalSummary)
    found = [(r.settings.steps, r.settings.guidance_scale, r.images) for r in swept.results if r.settings]
    assert found == [(1, 1.0, 40), (1, 2.5, 40), (2, 1.0, 40), (2, 2.5, 40)]
    dataset = Dataset(config.data.dir)
    labels = values_of(dataset, judged_attributes(dataset)[0])[:, 0]
    # as frequent as in the dataset, where a digit's two names have half of its images each
    for share in summary.results[0].verdict.captions:
        meant = int(share.name) if share.name.isdigit() else [*DIGIT_WORDS].index(share.name)
        assert abs(share.count - 40 * int((labels == meant).sum()) / len(labels) / 2) < 1
    assert (
        record(summary)["results"][0]["real_frechet_distance"] == summary.results[0].verdict.real_distance > 0
    )

    # the same pictures, from a folder of PNG files that record their prompts
    captions = [share.name for share in summary.results[-1].verdict.captions for _ in range(share.count)]
    sampled(run, " ".join(captions), steps=2, guidance_scale=2.0, separate=tmp_path / "s")
    *_, again = evaluate(EvalOptions(tmp_path / "s", data=config.data.dir))
    assert isinstance(again, EvalSummary)
    assert again.results[0].verdict == summary.results[-1].verdict
    Image.new("L", (32, 32)).save(tmp_path / "s" / "odd.png")
    with pytest.raises(SanaError, match="its caption is None, which is none of"):
        list(evaluate(EvalOptions(tmp_path / "s", data=config.data.dir)))


def student_of(config: Config, *overrides: str) -> Config:
    """The config of a student of a config's run, which is trained."""
    student = again(
        config,
        "data.image_size=32",
        "train.steps=2",
        "log.sample_every=2",
        "sample.prompts=null",
        f"run.dir={config.run.dir.with_name('student')}",
        f"distill.teacher={config.run.dir}",
        "distill.critic=false",
        "distill.guidance=[1.0, 2.2]",
        "model.guidance_embeds=true",
        "model.timestep_scale=0.001",
        "sample.solver=scm",
        "sample.steps=1",
        "sample.flow_shift=1.0",
        "sample.guidance_scale=1.5",
        *overrides,
    )
    trained(student)
    return student


def judge_of(options: EvalOptions) -> EvalSummary:
    *_, summary = evaluate(options)
    assert isinstance(summary, EvalSummary)
    return summary


def test_rows_of_other_checkpoints_are_those_of_evaluations_of_their_own(
    judged: tuple[Config, Judge], tmp_path: Path
) -> None:
    """Same prompts, same seeds; settings given are for the target alone."""
    config, _ = judged
    teacher = trained(config).checkpoint
    student = student_of(config)
    options = EvalOptions(student.run.dir, images=40, seed=7)
    beside = replace(
        options,
        beside=(Path("teacher"), Path("shipped")),
        steps=(1, 2),
        out=tmp_path / "e.json",
        plot=tmp_path / "e.png",
    )
    together = judge_of(beside)
    own = judge_of(replace(options, steps=(1, 2)))
    of_teacher = judge_of(replace(options, target=config.run.dir))
    shipped = judge_of(replace(options, target=Path("shipped"), data=config.data.dir))
    wanted = [*own.results, *of_teacher.results, *shipped.results]
    assert [replace(one, seconds=0) for one in together.results] == [
        replace(one, seconds=0) for one in wanted
    ]
    assert own.comparison is None
    assert together.comparison == Comparison(together.results[0], together.results[2])

    found = record(together)
    assert json.loads((tmp_path / "e.json").read_text()) == found
    assert found["teacher"] == str(teacher) == found["results"][2]["checkpoint"]
    assert [one["name"] for one in found["results"]] == [
        "student",
        "student",
        "run",
        "shipped:quickstart",
    ]
    assert [one["settings"]["solver"] for one in found["results"]] == [
        "scm",
        "scm",
        "dpm++",
        "dpm++",
    ]
    assert (tmp_path / "e.png").stat().st_size > 0
    assert not judge_of(replace(options, beside=(Path("shipped"),))).comparison


def test_the_table_of_a_student_and_its_teacher(judged: tuple[Config, Judge]) -> None:
    config, _ = judged
    trained(config)
    student = student_of(config)
    answer = invoke("eval", str(student.run.dir), "--images", "40", "--beside", "teacher", columns=200)
    assert answer.exit_code == 0, answer.output
    header, _, *rows = [line for line in answer.stdout.splitlines() if line]
    assert header.split()[-1] == "checkpoint"
    assert [row.split()[-1] for row in rows] == ["student", "run"]
    assert "student (scm 1 x 1.5) minus teacher: as prompted " in answer.stderr
    assert max(map(len, map(str.rstrip, answer.stdout.splitlines()))) <= 80


def test_a_sweep_of_a_few_step_model(judged: tuple[Config, Judge]) -> None:
    """One to four steps, and the guidance scales that it learned; the teacher as it is."""
    config, _ = judged
    trained(config)
    student = student_of(config, "sample.guidance_scale=1.4")
    summary = judge_of(EvalOptions(student.run.dir, images=20, sweep=True, beside=(Path("teacher"),)))
    found = [(r.settings.steps, r.settings.guidance_scale) for r in summary.results if r.settings]
    assert found[:-1] == [(steps, scale) for steps in (1, 2, 3, 4) for scale in (1.0, 1.4, 1.5, 2.0)]
    assert found[-1] == (2, 2.5)
    assert summary.comparison is not None
    assert summary.comparison.student.settings is not None
    assert summary.comparison.student.settings.guidance_scale == 1.4  # its own


def test_what_a_student_learned_goes_with_its_folder(judged: tuple[Config, Judge], tmp_path: Path) -> None:
    """Also in a copy, and without training/; the page's slider ends there."""
    config, _ = judged
    teacher = trained(config).checkpoint
    step, _ = checkpoint.newest_step(student_of(config).run.dir)
    assert teacher is not None
    assert step is not None
    copied = shutil.copytree(step, tmp_path / "copied")
    released = checkpoint.release(step, tmp_path / "released", {}, {})
    for folder in (step, copied, released, copied / "transformer"):
        assert checkpoint.learned_guidance(folder) == (1.0, 2.2)
    shipped = checkpoint.learned_guidance(checkpoint.shipped("quickstart-distilled"))
    assert shipped is not None
    assert shipped[0] == 1 < shipped[1]
    for none in (teacher, checkpoint.shipped(), tmp_path):
        assert checkpoint.learned_guidance(none) is None
    about = Studio(open_checkpoint(copied, device="cpu")).about()
    assert (about["least_guidance"], about["guidance_scale"], about["most_guidance"]) == (1.0, 1.5, 2.2)


def test_a_few_step_model_has_no_shift_and_no_interval(judged: tuple[Config, Judge]) -> None:
    """As `sana sample` says."""
    config, _ = judged
    trained(config)
    student = student_of(config).run.dir
    for name, text in (("flow_shift", "3"), ("guidance_interval", "0 0.5")):
        flag, values = "--" + name.replace("_", "-"), text.split()
        printed = invoke("eval", str(student), "--images", "20", flag, *values)
        assert printed.exit_code == 2
        assert printed.stderr.startswith(f"error: {flag}: ")
        assert invoke("sample", "4", "--checkpoint", str(student), flag, *values).stderr == printed.stderr


def test_a_checkpoint_that_is_named_twice_is_judged_once(judged: tuple[Config, Judge]) -> None:
    """The target too, and by any of its names."""
    config, _ = judged
    teacher = trained(config).checkpoint
    assert teacher is not None
    student = student_of(config).run.dir
    beside = (Path("teacher"), config.run.dir, teacher / "transformer", student)
    summary = judge_of(EvalOptions(student, images=20, beside=beside))
    places = [result.checkpoint for result in summary.results]
    assert places == [student / "checkpoints" / "step-000002", teacher]
    assert summary.notes == (
        *(2 * [f"{teacher} is named twice, and judged once"]),
        f"{places[0]} is named twice, and judged once",
    )
    by_weights = judge_of(EvalOptions(teacher / "transformer", images=20))
    assert by_weights.target == teacher


def test_the_interval_of_a_difference() -> None:
    """The example of Newcombe (1998), table II, method 10: 0.0524 to 0.3339."""
    assert _points(Share("", 56, 70), Share("", 48, 80)) == "+20.0 points (+5.2 to +33.4)"


def test_the_interval_between_all_and_none() -> None:
    """Wilson's of none of n ends at z^2 / (n + z^2), and that of all of n mirrors it."""
    n, z = 30, NormalDist().inv_cdf(0.975)
    off = math.sqrt(2) * z**2 / (n + z**2)
    assert difference_interval(Share("", n, n), Share("", 0, n)) == pytest.approx((1 - off, 1), abs=1e-4)
    assert difference_interval(Share("", 0, n), Share("", n, n)) == pytest.approx((-1, off - 1), abs=1e-4)


def test_what_is_concluded(capsys: pytest.CaptureFixture[str]) -> None:
    """A difference beyond chance, and a warning of a collapse whatever the accuracy."""

    def result(hits: int, diversity: float, count: int = 1000) -> EvalResult:
        reading = Reading("seen", Share("all", hits, count), Share("single", hits, count), (), ())
        return EvalResult(None, None, 0.0, count, Verdict(reading, (), (), (), 4.0, 0.3, 1.0, diversity))

    _print_comparison(Comparison(result(999, 0.4), result(990, 0.9)))
    said = capsys.readouterr().err
    assert "as prompted +0.9 points (+0.2 to +1.7), Fréchet +0.00 ± 0.42, diversity -0.50" in said
    assert "warning: the student's diversity is 0.40, and its teacher's 0.90" in said
    _print_comparison(Comparison(result(990, 0.85), result(990, 0.9)))
    assert "warning" not in capsys.readouterr().err
    assert Comparison(result(500, 0.7), result(500, 0.9)).collapsed
    assert not Comparison(result(500, 0.75), result(500, 0.9)).collapsed
    assert not Comparison(result(20, 0.7, 40), result(20, 0.9, 40)).collapsed  # 40 pictures do not tell
    assert Comparison(result(20, 0.1, 40), result(20, 0.9, 40)).collapsed
    assert not Comparison(result(20, math.nan), result(20, math.nan)).collapsed  # by captions
    _print_comparison(Comparison(result(20, math.nan), result(20, math.nan)))
    assert "diversity" not in capsys.readouterr().err


def test_a_plot_of_pictures_that_are_all_as_prompted(tmp_path: Path) -> None:
    """Wilson's interval of 6 of 6 ends a last bit below 1."""
    share = Share("4", 6, 6)
    reading = Reading("seen", share, share, (), ())
    result = EvalResult(None, None, 0.0, 6, Verdict(reading, (), (share,), (), 4.0, 0.3, 1.0, 1.0))
    summary = EvalSummary(tmp_path, tmp_path, "attributes", (reading,), (), (result,), ())
    plots.evaluation(record(summary), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_names_of_checkpoints_tell_them_apart() -> None:
    one, later, other = (
        Path(run, "checkpoints", step)
        for run, step in (("runs/a", "step-000001"), ("runs/a", "step-000002"), ("old/a", "step-000001"))
    )
    assert evaluating._names([one]) == {one: "a"}
    assert evaluating._names([one, later]) == {one: "a/step-000001", later: "a/step-000002"}
    assert evaluating._names([one, other]) == {one: str(one), other: str(other)}


def test_mistakes_about_other_checkpoints(
    judged: tuple[Config, Judge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = judged
    teacher = trained(config).checkpoint
    assert teacher is not None
    student = student_of(config).run.dir

    def refused(target: Path, beside: str | Path) -> str:
        with pytest.raises(SanaError) as caught:
            list(evaluate(EvalOptions(target, images=20, beside=(Path(beside),))))
        return str(caught.value)

    monkeypatch.chdir(tmp_path)
    assert refused(student, "nowhere").startswith("`beside`: no checkpoint at nowhere: there is no such file")
    assert refused(student, config.data.dir).startswith(f"`beside`: no checkpoint in {config.data.dir}")
    assert refused(config.run.dir, "teacher").startswith(
        f"`beside`: {teacher} has no teacher: it was not distilled"
    )
    assert refused(student, "shipped:critters").splitlines()[0].endswith(f"{config.data.dir} has (1, 32, 32)")
    assert "judge " in refused(student, "shipped:critters").splitlines()[1]
    other = again(
        config, "data.image_size=32", "train.steps=2", "text.max_length=7", f"data.dir={tmp_path / 'other'}",
        f"run.dir={tmp_path / 'of other'}", "log.sample_every=2", "sample.prompts=null",
    )  # fmt: skip
    embedded(other)
    trained(other)
    first, todo = refused(student, other.run.dir).splitlines()
    assert first.startswith(f"`beside`: text.max_length: {config.data.dir} has 300, not 7")
    assert todo.startswith(f"all rows are judged by one dataset: judge {other.run.dir}")

    (tmp_path / "photos").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "photos" / "4.png")
    for beside in ("teacher", str(student)):
        said = refused(tmp_path / "photos", beside)
        assert said.startswith(
            f"`beside`: all rows have the same prompts, and the pictures in {tmp_path / 'photos'}"
        )
    assert refused(student, tmp_path / "photos").startswith("`beside`: no checkpoint in")
    answer = invoke("eval", str(student), "--beside", "nowhere")
    assert (answer.exit_code, answer.stderr.splitlines()[0][:37]) == (
        1,
        "error: --beside: no checkpoint at now",
    )
    with pytest.raises(SanaError, match="`beside` and `out` are the same file"):
        list(evaluate(EvalOptions(student, beside=(tmp_path / "e.json",), out=tmp_path / "e.json")))

    perturb(teacher)
    first, todo = refused(student, "teacher").splitlines()
    assert first.startswith(f"`beside`: {teacher} is not the model that {student}")
    assert "was distilled from: its tensors have the sha256" in first
    assert judge_of(EvalOptions(student, images=20, beside=(teacher,))).comparison is None
    config.run.dir.rename(tmp_path / "moved")
    first, todo, what = refused(student, "teacher").splitlines()
    assert "was distilled, and its teacher, " in first
    assert first.endswith(f" is not at {config.run.dir}")
    assert todo == "put it there, or say where it is: `beside` PATH"
    assert what.startswith("it is a model of diffusers format, whose tensors have the sha256")


def test_a_killed_sweep_leaves_what_it_had_found(judged: tuple[Config, Judge], tmp_path: Path) -> None:
    config, _ = judged
    step = trained(config).checkpoint
    out = tmp_path / "e.json"
    options = EvalOptions(
        step, data=config.data.dir, images=40, steps=tuple(range(1, 400)), out=out, device="cpu"
    )

    *_, summary = evaluate(replace(options, steps=(1,)))
    assert isinstance(summary, EvalSummary)
    whole = out.read_text()
    assert json.loads(whole) == record(replace(summary, saved=()))
    unfinished = tmp_path / "e.json.unfinished"
    for wanted in (1, 2, 4):
        unfinished.unlink(missing_ok=True)
        process = child(lambda: list(evaluate(options)))
        while process.is_alive() and not unfinished.exists():
            pass
        while process.is_alive() and len(json.loads(unfinished.read_text())["results"]) < wanted:
            pass
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = json.loads(unfinished.read_text())["results"]
        assert len(found) >= wanted
        assert [result["settings"]["steps"] for result in found] == list(range(1, len(found) + 1))
        assert out.read_text() == whole
    list(evaluate(replace(options, steps=(2,))))
    assert [result["settings"]["steps"] for result in json.loads(out.read_text())["results"]] == [2]
    assert not unfinished.exists()


def attributes_folder(folder: Path, *, unseen: bool) -> Path:
    """Pictures with two attributes that share values; `unseen` ones have a kind too."""
    rows = []
    for number in range(48):
        first, second = ("red", "blue", "green")[number % 3], ("blue", "red")[number // 3 % 2]
        kind = ("pairs", "words")[number % 2]
        shown = {"body": first, "head": second} | ({"unseen": kind} if unseen else {})
        text = f"{kind} {first} {second}" if unseen else f"{first} {second}"
        rows.append({"file_name": f"{number:02d}.png", "text": text, "attributes": shown})
    return metadata_folder(folder, rows)


def test_eval_by_attributes_and_by_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen captions and each unseen kind are judged apart, and printed beside real pictures."""
    monkeypatch.setattr(judge, "LARGE_IMAGES", 200)
    monkeypatch.setattr(retrieval, "STEPS", 3)
    for split in ("train", "test"):
        attributes_folder(tmp_path / "source" / split, unseen=split == "test")
    sets = (
        "data.source=folder",
        f"data.path={tmp_path / 'source'}",
        "data.workers=0",
        "data.held_out_split=test",
    )
    config = small_config(tmp_path, *sets, "model.in_channels=3", "train.steps=2", "log.sample_every=2")
    embedded(config, limit=None)
    step = trained(config).checkpoint
    *_, summary = evaluate(EvalOptions(step, images=41, out=tmp_path / "e.json", plot=tmp_path / "e.png"))
    assert isinstance(summary, EvalSummary)
    found = record(summary)
    assert json.loads((tmp_path / "e.json").read_text()) == found
    assert [reading["kind"] for reading in found["real"]] == ["seen", "pairs", "words"]
    assert [reading["accuracy"]["images"] for reading in found["real"]] == [4, 24, 24]
    assert found["judge"]["real_images"] == 52
    (result,) = found["results"]
    assert result["images"] == 41
    assert result["accuracy"]["images"] == 21  # half are of unseen captions, as many of each kind
    assert [(one["kind"], one["accuracy"]["images"]) for one in result["unseen"]] == [
        ("pairs", 10),
        ("words", 10),
    ]
    assert [share["name"] for share in result["attributes"]] == ["body", "head"]
    assert result["single"]["images"] == 21
    assert [(swap["first"], swap["second"]) for swap in result["swaps"]] == [
        ("body", "head"),
        ("head", "body"),
    ]
    assert sum(share["images"] for share in result["captions"]) == 21
    assert all(share["name"].split()[0] in ("red", "blue", "green") for share in result["captions"])
    *_, more = evaluate(EvalOptions(step, images=41, steps=(1, 2), plot=tmp_path / "sweep.png"))
    assert isinstance(more, EvalSummary)
    assert more.results[1].verdict == summary.results[0].verdict

    answer = invoke("eval", str(step), "--images", "41")
    assert answer.exit_code == 0, answer.output
    assert max(map(len, map(str.rstrip, answer.stdout.splitlines()))) <= 80
    for text in (
        "seen",
        "pairs",
        "words",
        "real",
        "one by one",
        "all at once",
        "head is the body's",
    ):
        assert text in answer.stdout

    # the same pictures from a folder, where each goes to the kind that has its caption
    captions = ("red blue", "blue red", "pairs red blue", "words red red")
    sampled(step, *captions, separate=tmp_path / "s")
    *_, again = evaluate(EvalOptions(tmp_path / "s", data=config.data.dir))
    assert isinstance(again, EvalSummary)
    assert again.results[0].verdict.seen.total.count == 2
    shutil.rmtree(tmp_path / "s")
    sampled(step, *captions[2:], separate=tmp_path / "s")  # and none of the dataset's own
    *_, again = evaluate(EvalOptions(tmp_path / "s", data=config.data.dir))
    assert isinstance(again, EvalSummary)
    assert [reading.total.count for reading in again.results[0].verdict.unseen] == [1, 1]
    assert again.results[0].verdict.seen.total.count == 0

    *_, matched = evaluate(EvalOptions(step, images=20, by="captions"))
    assert isinstance(matched, EvalSummary)
    found = record(matched)
    assert (found["by"], found["results"][0]["accuracy"]["name"]) == ("captions", "R-precision")
    assert found["judge"]["real_images"] == 4  # of the dataset, as the captions are
    assert found["results"][0]["diversity"] is None
    assert found["results"][0]["frechet_distance"] > 0
    answer = invoke("eval", str(step), "--images", "20", "--by", "captions")
    assert "R-precision" in answer.stdout
    assert "first among 6\n" in answer.stderr + answer.stdout


def test_pictures_whose_captions_ask_for_no_attribute(tmp_path: Path) -> None:
    rows = [
        {
            "file_name": f"{number}.png",
            "text": [f"cat {number // 2}", f"cat {number // 2} in style {'AB'[number % 2]}"],
            "attributes": {"style": "AB"[number % 2]},
            "caption_attributes": [[], ["style"]],
        }
        for number in range(12)
    ]
    source = metadata_folder(tmp_path / "source", rows)
    config = small_config(
        tmp_path, "data.source=folder", f"data.path={source}", "data.workers=0", "model.in_channels=3"
    )
    embedded(config, limit=None)
    dataset = Dataset(config.data.dir)
    prompts = prompts_of(dataset, None, judged_attributes(dataset)[0])
    (tmp_path / "pictures" / "cat 1").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / "cat 1" / "a.png")
    with pytest.raises(SanaError, match=r"caption 'cat 1' asks for no attribute\n.*`by` captions"):
        list(evaluating._read(tmp_path / "pictures", prompts))


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def reading(*shares: int) -> Reading:
        swaps = [
            Swap(f"{number}", "", Share(f"leak {number}", hits, 100), Share("", 0, 0))
            for number, hits in enumerate(shares)
        ]
        return Reading("seen", Share("all", 0, 0), Share("single", 0, 0), (), tuple(swaps))

    few, real = reading(*range(12)), reading(*range(12, 0, -1))
    verdict = Verdict(few, (), (), (), 0.0, 0.0, 0.0, 0.0)
    _print_swaps(verdict, real)
    found = capsys.readouterr()
    names = [line for line in (found.out + found.err).splitlines() if "leak" in line]
    assert [line.split()[1] for line in names] == [str(number) for number in range(11, 1, -1)]
    assert _judge_in_words([real], real) == "was tested on no real images"


def test_the_dataset_of_a_shipped_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of the config of its name."""
    monkeypatch.chdir(tmp_path)
    for name, wanted in (("shipped", "quickstart"), ("shipped:critters", "critters")):
        with pytest.raises(SanaError, match=f"no dataset in data/{wanted}: the judge"):
            list(evaluate(EvalOptions(Path(name))))


def test_what_eval_cannot_do_is_said(config: Config, tmp_path: Path) -> None:
    trained(config)
    with pytest.raises(SanaError, match="smaller than|no dataset"):
        list(evaluate(EvalOptions(config.run.dir, data=tmp_path / "nowhere")))
    with pytest.raises(SanaError, match=r"`plot`: .*plot\.txt: \.txt is not one of \.png, \.svg, \.pdf"):
        list(evaluate(EvalOptions(config.run.dir, plot=tmp_path / "plot.txt")))
    folder = tmp_path / "photos"
    for name in ("a", "b"):
        folder.mkdir(exist_ok=True)
        Image.new("L", (16, 16)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a picture of {name}")
    other = small_config(tmp_path / "other", "data.source=folder", f"data.path={folder}")
    embedded(other, limit=2)
    trained(other)
    with pytest.raises(
        SanaError,
        match="has no attributes, so nothing says what a picture should show\nsana eval needs a dataset",
    ):
        list(evaluate(EvalOptions(other.run.dir, by="attributes")))
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("the same picture")
    other = small_config(
        tmp_path / "other", "data.source=folder", f"data.path={folder}", f"data.dir={tmp_path / 'same'}"
    )
    embedded(other, limit=2)
    missing: tuple[tuple[JudgedBy, str], ...] = (
        ("auto", "attributes, nor captions that differ"),
        ("captions", "captions that differ"),
    )
    for by, lacks in missing:
        with pytest.raises(SanaError, match=f"has no {lacks}, so nothing says"):
            list(evaluate(EvalOptions(other.run.dir, data=other.data.dir, by=by)))
    answer = invoke("eval", "runs/nowhere")
    assert answer.exit_code == 1
    assert answer.stderr.startswith("error: no checkpoint at runs/nowhere")
