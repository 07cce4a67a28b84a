"""Micro-batches: every draw depends only on the seed and the number of the image."""

import numpy as np
import pytest
import torch
from helpers import HELD_OUT, again, embedded, rectified_flow, train_set, wait_until

from sana_cli.config.keys import Config
from sana_cli.dataset.layout import held_out_dir
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import SingleDataset, TrainSet
from sana_cli.runtime.distributed import World
from sana_cli.sources import DIGIT_WORDS
from sana_cli.training import batches
from sana_cli.training.objective import MicroBatch, Objective


def assert_same_batch(one: MicroBatch, two: MicroBatch) -> None:
    assert np.array_equal(one.rows, two.rows)
    for name in ("x_0", "noise", "sigma", "states", "mask", "caption_index"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_draws_depend_on_the_seed_and_the_number_of_the_image_alone(config: Config) -> None:
    data, objective = train_set(config), rectified_flow(config)
    whole = batches.training_batch(data, objective, 0, np.arange(10, 16))
    part = batches.training_batch(data, objective, 0, np.arange(13, 16))
    assert torch.equal(whole.noise[3:], part.noise)
    assert torch.equal(whole.sigma[3:], part.sigma)
    assert torch.equal(whole.x_0[3:], part.x_0)
    scattered = batches.training_batch(data, objective, 0, np.array([15, 10, 12]))
    assert torch.equal(whole.noise[[5, 0, 2]], scattered.noise)
    assert torch.equal(whole.x_0[[5, 0, 2]], scattered.x_0)
    other = batches.training_batch(train_set(config, seed=1), objective, 1, np.arange(10, 16))
    assert not torch.equal(whole.noise, other.noise)


def test_draws_are_what_the_config_says(config: Config) -> None:
    data, dataset = train_set(config), Dataset(config.data.dir)
    objective = rectified_flow(config, caption_dropout=0.25, flow_shift=3.0, logit_mean=0.0)
    batch = batches.training_batch(data, objective, 0, np.arange(4000))
    assert float(batch.noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(batch.noise.std()) == pytest.approx(1, abs=0.01)
    assert float(batch.sigma.median()) == pytest.approx(0.75, abs=0.02)
    null = dataset.states([dataset.index.null_caption])[0]
    states, mask = batch.states[batch.caption_index], batch.mask[batch.caption_index]
    dropped = mask.sum(1) == len(null)
    assert len(batch.states) == 21  # each distinct caption once
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    row = int(dropped.nonzero()[0])
    assert torch.equal(states[row, : len(null)], null)  # with the null caption's own mask
    labels = [int(dataset.attributes["label"][number]) for number in dataset.attribute_ids()[:, 0]]
    bytes_of = {
        dataset.states([i])[0].float().numpy().tobytes(): text for i, text in enumerate(dataset.texts())
    }
    kept = [
        (bytes_of[states[i, : int(mask[i].sum())].float().numpy().tobytes()], labels[r])
        for i, r in enumerate(batch.rows)
        if not dropped[i]
    ]
    assert all(text in (str(label), DIGIT_WORDS[label]) for text, label in kept)
    spelled = sum(len(text) > 1 for text, _ in kept) / len(kept)
    assert spelled == pytest.approx(0.5, abs=0.03)  # "4" and "four" are equally frequent


def test_any_run_of_images_sees_all_noise_levels() -> None:
    """Each tenth of the density gets n / 10 of n successive images, within two."""
    for first, count in ((0, 64), (12345, 64), (10**9, 640)):
        drawn = batches.quantiles(np.arange(first, first + count), seed=3)
        assert (drawn > 0).all()
        assert (drawn < 1).all()
        counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
        assert abs(counts - count / 10).max() <= 2
    assert np.array_equal(batches.quantiles(np.arange(5, 8), 0), batches.quantiles(np.arange(8), 0)[5:])
    assert not np.isclose(batches.quantiles(np.arange(1), 0), batches.quantiles(np.arange(1), 1))


def test_held_out_noise_levels_are_the_quantiles_of_the_training_density(config: Config) -> None:
    watched = again(config, *HELD_OUT)
    embedded(watched)
    held_out = SingleDataset(Dataset(held_out_dir(watched.data.dir, "test")), seed=0)
    objective = rectified_flow(watched, logit_mean=0.5, logit_std=0.7, flow_shift=2.0)
    count = 400
    sigma = np.sort(batches.held_out_batch(held_out, objective, 0, np.arange(count), count).sigma.numpy())
    logits = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count) * 0.7 + 0.5
    plain = torch.sigmoid(logits).numpy()
    assert np.allclose(sigma, 2 * plain / (1 + plain), atol=1e-6)
    batch = batches.held_out_batch(held_out, objective, 0, np.arange(3, 5), 9)
    whole = batches.held_out_batch(held_out, objective, 0, np.arange(9), 9)
    assert torch.equal(batch.noise, whole.noise[3:5])
    assert torch.equal(batch.sigma, whole.sigma[3:5])
    assert not torch.equal(whole.noise, batches.training_batch(held_out, objective, 0, np.arange(9)).noise)
    assert whole.mask.sum(1).min() > 1  # no caption is dropped


@pytest.mark.parametrize("shapes", [1, 3])
@pytest.mark.parametrize(
    ("images", "size", "processes"), [(12, 3, 2), (64, 64, 1), (13, 4, 3), (5, 4, 4), (1, 8, 2)]
)
def test_a_step_is_cut_into_micro_batches_of_one_shape(
    images: int, size: int, processes: int, shapes: int
) -> None:
    """Every image is in exactly one, and all processes have the same number of them."""
    numbers = np.arange(images) % shapes
    shares = [batches.cut(numbers, size, World(rank, processes)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    rounds = [share[m] for m in range(len(shares[0])) for share in shares]  # run number m * processes + rank
    covered = np.concatenate([part.numbers for part in rounds if not part.padding])
    assert covered.tolist() == sorted(range(images), key=lambda image: (image % shapes, image))
    assert all(1 <= len(part.numbers) <= size for part in rounds)
    assert all(len(set(numbers[part.numbers])) == 1 for part in rounds)


def test_batches_come_in_order_and_the_next_is_made_beforehand(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, objective = train_set(config), rectified_flow(config)
    honest, made = batches.training_batch, list[list[int]]()

    def recorded(
        data: TrainSet, objective: Objective, seed: int, numbers: np.ndarray, step: int
    ) -> MicroBatch:
        made.append(numbers.tolist())
        return honest(data, objective, seed, numbers, step)

    monkeypatch.setattr(batches, "training_batch", recorded)
    reader = batches.StepBatches(data, objective, seed=0, images=6, batch_size=4, world=World())
    steps = {0: [range(4), range(4, 6)], 1: [range(6, 10), range(10, 12)], 7: [range(42, 46), range(46, 48)]}
    # prefetched; once started, a batch of a step that does not follow is still made
    following = {0: range(6, 10), 1: range(12, 16), 7: None}
    for step, parts in steps.items():
        found = reader.of_step(step, is_last=step == 7)
        for m, numbers in enumerate(parts):
            part, batch = next(found)
            assert (part.numbers + step * 6).tolist() == list(numbers)
            assert_same_batch(batch, honest(data, objective, 0, np.array(numbers)))
            ahead = parts[m + 1] if m + 1 < len(parts) else following[step]
            wait_until(lambda ahead=ahead: ahead is None or list(ahead) in made)  # type: ignore[misc]
        assert next(found, None) is None
    reader.close()
    assert sorted(made) == [list(part) for part in (*steps[0], *steps[1], range(12, 16), *steps[7])]
    assert reader.waited > 0


def test_captions_are_drawn_by_their_weights() -> None:
    draws = np.random.default_rng(0).random(40_000)
    counts = np.bincount([batches.pick(which, [3.0, 0.5, 0.5], 3) for which in draws]) / len(draws)
    assert counts == pytest.approx([0.75, 0.125, 0.125], abs=0.01)
    assert [batches.pick(which, None, 4) for which in (0.0, 0.26, 0.9999)] == [0, 1, 3]
    assert {batches.pick(which, [1.0, 2.0], 2) for which in (0.0, 0.34, 0.999999)} == {0, 1}
