"""`sana eval` of checkpoints and folders, and what it refuses."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import child, embedded, invoke, sampled, small_config, trained
from helpers.folders import metadata_folder
from helpers.steps import small_judge
from PIL import Image

from sana_cli.choices import JudgedBy
from sana_cli.cli.eval import _judge_in_words, _print_swaps
from sana_cli.commands import eval as evaluating
from sana_cli.commands.eval import EvalOptions, EvalSummary, evaluate, record
from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.judging import judge, retrieval
from sana_cli.judging.asked import judged_attributes, prompts_of, values_of
from sana_cli.judging.judge import Judge, Share
from sana_cli.judging.verdict import Reading, Swap, Verdict
from sana_cli.sources import DIGIT_WORDS


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
