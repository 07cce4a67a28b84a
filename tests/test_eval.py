"""`sana eval`: its formulas against closed forms, its judge on pictures whose answer is known, and the command itself."""

import json
import math
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import child, embedded, small_config
from PIL import Image

from sana_cli.commands import eval as evaluating
from sana_cli.commands.eval import EvalOptions, EvalSummary, evaluate, record
from sana_cli.commands.sample import SampleOptions, sample
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.judging import judge
from sana_cli.judging.judge import Judge, Moments, frechet_distance, scatter, wilson


def test_frechet_distance_of_gaussians() -> None:
    """With covariances that commute it is |m_a - m_b|^2 + sum (sqrt a_i - sqrt b_i)^2, in any basis; of one with itself, 0."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    a, b = (torch.rand(6, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    a[0] = 0  # a feature that never moves
    mean_a, mean_b = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    first = Moments(mean_a, basis @ a.diag() @ basis.T)
    second = Moments(mean_b, basis @ b.diag() @ basis.T)
    expected = float((mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_covariances_do_not_commute() -> None:
    """tr (A B)^(1/2) from the eigenvalues of A B, which is not how it is computed."""
    generator = torch.Generator().manual_seed(1)
    roots = [torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    a, b = (root @ root.T for root in roots)
    cross = torch.linalg.eigvals(a @ b).real.sqrt().sum()
    mean = torch.zeros(5, dtype=torch.float64)
    assert frechet_distance(Moments(mean, a), Moments(mean, b)) == pytest.approx(
        float(a.trace() + b.trace() - 2 * cross), rel=1e-8
    )


def test_moments_and_scatter() -> None:
    features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 7.0]])
    moments = Moments.of(features)
    assert torch.allclose(moments.covariance, torch.from_numpy(np.cov(features.numpy().T)))
    assert moments.mean.tolist() == [2, 3]
    assert scatter(features) == pytest.approx(4 + 12)


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (3, 10), (990, 1000)])
def test_wilson_is_where_the_share_is_z_deviations_away(hits: int, count: int) -> None:
    """Its ends solve |p - share| = z sqrt(p (1 - p) / count), the definition, which the formula does not show."""
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(end - hits / count) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count), rel=1e-9)


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Judge]:
    """A config whose dataset has 400 digits, and the judge that learned them in two short epochs."""
    monkeypatch.setattr(judge, "EPOCHS", 6)
    monkeypatch.setattr(judge, "BATCH", 32)
    config = small_config(tmp_path, "data.image_size=32", "train.steps=2", "train.sample_every=2", "sample.prompts=null")
    embedded(config, limit=600)
    *_, found = judge.obtain(Dataset(config.data.dir), None, torch.device("cpu"))
    assert isinstance(found, Judge)
    return config, found


def test_a_judge_reads_what_it_was_not_trained_on(judged: tuple[Config, Judge], monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = judged
    dataset = Dataset(config.data.dir)
    meaning = judge.labels_of_captions(dataset)
    assert meaning == {name: digit for digit in range(10) for name in (str(digit), judge_word(digit))}
    assert len(found.real) == 60  # every tenth image
    assert found.accuracy > 0.6  # of 60 images, after 540: by chance it would be 0.1
    labels = dataset.labels()
    assert labels is not None
    rows = np.arange(600)
    pixels, captions = dataset.pixels(rows), [str(int(label)) for label in labels[:600]]
    right = judge.give(found, pixels, captions, meaning)
    wrong = judge.give(found, pixels, [str((int(label) + 1) % 10) for label in labels[:600]], meaning)
    assert right.total.accuracy > 0.8
    assert wrong.total.accuracy < 0.1
    assert right.distance < 1 < 10 < judge.give(found, 255 - pixels, captions, meaning).distance
    assert right.diversity == pytest.approx(1, abs=0.15)
    same = pixels[:1].repeat(20, 1, 1, 1)
    assert judge.give(found, same, captions[:1] * 20, meaning).diversity == pytest.approx(0, abs=1e-6)
    assert sum(share.hits for share in right.captions) == sum(share.hits for share in right.labels) == right.total.hits

    # kept beside the dataset, and read again; another dataset's is not taken
    path = judge.judge_path(config.data.dir)
    monkeypatch.setattr(judge, "_train", None)
    (again,) = judge.obtain(dataset, None, torch.device("cpu"))
    assert isinstance(again, Judge)
    assert judge.give(again, pixels, captions, meaning) == right
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TypeError):  # damaged, so it would be trained again
        list(judge.obtain(dataset, None, torch.device("cpu")))


def judge_word(digit: int) -> str:
    from sana_cli.sources import DIGIT_WORDS

    return DIGIT_WORDS[digit]


def test_eval_of_a_checkpoint_and_of_a_folder(
    judged: tuple[Config, Judge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = judged
    *_, _trained = train(TrainOptions(config))
    run = config.run.dir
    options = EvalOptions(
        run, images=40, steps=(1, 2), guidance_scale=(1.0, 2.0), out=tmp_path / "e.json", plot=tmp_path / "e.png"
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
    *_, swept = evaluate(EvalOptions(run, images=40, sweep=True))  # the usual settings, and the checkpoint's own, 2 and 2.5
    assert isinstance(swept, EvalSummary)
    found = [(r.settings.steps, r.settings.guidance_scale, r.images) for r in swept.results if r.settings]
    assert found == [(1, 1.0, 40), (1, 2.5, 40), (2, 1.0, 40), (2, 2.5, 40)]
    labels = Dataset(config.data.dir).labels()
    assert labels is not None
    for share in summary.results[0].verdict.captions:  # as frequent as in the dataset, where half of a digit's have either name
        meant = int(share.name) if share.name.isdigit() else [judge_word(digit) for digit in range(10)].index(share.name)
        assert abs(share.count - 40 * int((labels == meant).sum()) / len(labels) / 2) < 1
    assert record(summary)["results"][0]["real_frechet_distance"] == summary.results[0].verdict.real_distance > 0

    # the same pictures, from a folder of PNG files that say their prompts
    captions = [share.name for share in summary.results[-1].verdict.captions for _ in range(share.count)]
    *_, _drawn = sample(
        SampleOptions((" ".join(captions),), run, steps=2, guidance_scale=2.0, separate=tmp_path / "s", device="cpu")
    )
    *_, again = evaluate(EvalOptions(tmp_path / "s", data=config.data.dir))
    assert isinstance(again, EvalSummary)
    assert again.results[0].verdict == summary.results[-1].verdict
    Image.new("L", (32, 32)).save(tmp_path / "s" / "odd.png")
    with pytest.raises(SanaError, match="its caption is None, which is none of"):
        list(evaluate(EvalOptions(tmp_path / "s", data=config.data.dir)))


def test_a_killed_sweep_leaves_what_it_had_found(judged: tuple[Config, Judge], tmp_path: Path) -> None:
    config, _ = judged
    *_, trained = train(TrainOptions(config))
    out = tmp_path / "e.json"
    options = EvalOptions(trained.checkpoint, data=config.data.dir, images=40, steps=tuple(range(1, 400)), out=out, device="cpu")

    *_, summary = evaluate(replace(options, steps=(1,)))
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


def test_what_eval_cannot_do_is_said(
    config: Config, tmp_path: Path, sana: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    *_, _trained = train(TrainOptions(config))
    with pytest.raises(SanaError, match="smaller than|no dataset"):
        list(evaluate(EvalOptions(config.run.dir, data=tmp_path / "nowhere")))
    with pytest.raises(SanaError, match=r"--plot: .*plot\.txt: \.txt is not one of \.png, \.svg, \.pdf"):
        list(evaluate(EvalOptions(config.run.dir, plot=tmp_path / "plot.txt")))
    folder = tmp_path / "photos"
    for name in ("a", "b"):
        folder.mkdir(exist_ok=True)
        Image.new("L", (16, 16)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a picture of {name}")
    other = small_config(tmp_path / "other", "data.source=folder", f"data.path={folder}")
    embedded(other, limit=2)
    with pytest.raises(SanaError, match="has no labels, so nothing says what a picture should show\nsana eval needs a dataset"):
        judge.labels_of_captions(Dataset(other.data.dir))
    answer = sana("eval", "runs/nowhere")
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: no checkpoint at runs/nowhere")
