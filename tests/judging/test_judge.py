"""The judge: its formulas against closed forms, and pictures with known answers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.steps import small_judge

from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.judging import judge
from sana_cli.judging.judge import Judge, Moments, frechet_distance, scatter, wilson
from sana_cli.sources import DIGIT_WORDS


def test_frechet_distance_of_gaussians() -> None:
    """For commuting covariances: |m_a - m_b|^2 + sum (sqrt a_i - sqrt b_i)^2, in any basis."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    a, b = (torch.rand(6, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    a[0] = 0  # a constant feature
    mean_a, mean_b = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    first = Moments(mean_a, basis @ a.diag() @ basis.T)
    second = Moments(mean_b, basis @ b.diag() @ basis.T)
    expected = float((mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_covariances_do_not_commute() -> None:
    """Against tr (A B)^(1/2) from the eigenvalues of A B, unlike the implementation."""
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
    """By definition, its ends solve |p - share| = z sqrt(p (1 - p) / count)."""
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(end - hits / count) == pytest.approx(
                1.96 * math.sqrt(end * (1 - end) / count), rel=1e-9
            )


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, Judge]:
    return small_judge(tmp_path, monkeypatch)


def test_a_judge_reads_what_it_was_not_trained_on(
    judged: tuple[Config, Judge], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = judged
    dataset = Dataset(config.data.dir)
    meaning = judge.labels_of_captions(dataset)
    assert meaning == {name: digit for digit in range(10) for name in (str(digit), DIGIT_WORDS[digit])}
    assert len(found.real) == 60  # every tenth image
    assert found.accuracy > 0.6  # on 60 images, trained on 540; chance is 0.1
    labels = dataset.labels()
    assert labels is not None
    rows = np.arange(600)
    pixels, captions = dataset.pixels(rows), [str(int(label)) for label in labels[:600]]
    right = judge.verdict_on(found, pixels, captions, meaning)
    wrong = judge.verdict_on(found, pixels, [str((int(label) + 1) % 10) for label in labels[:600]], meaning)
    assert right.total.accuracy > 0.8
    assert wrong.total.accuracy < 0.1
    assert right.distance < 1 < 10 < judge.verdict_on(found, 255 - pixels, captions, meaning).distance
    assert right.diversity == pytest.approx(1, abs=0.15)
    same = pixels[:1].repeat(20, 1, 1, 1)
    assert judge.verdict_on(found, same, captions[:1] * 20, meaning).diversity == pytest.approx(0, abs=1e-6)
    assert (
        sum(share.hits for share in right.captions)
        == sum(share.hits for share in right.labels)
        == right.total.hits
    )

    # saved beside the dataset and loaded again; a damaged one is not used
    path = judge.judge_path(config.data.dir)
    monkeypatch.setattr(judge, "_train", None)
    (again,) = judge.load_or_train(dataset, None, torch.device("cpu"))
    assert isinstance(again, Judge)
    assert judge.verdict_on(again, pixels, captions, meaning) == right
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TypeError):  # it would be trained again
        list(judge.load_or_train(dataset, None, torch.device("cpu")))
