"""The order of rows in a run."""

from sana_cli.dataset.trainset import shuffled_rows


def test_each_epoch_is_a_permutation_and_batches_run_on() -> None:
    rows = shuffled_rows(0, 30, 10, seed=3)
    for epoch in range(3):
        assert sorted(rows[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert rows[:10].tolist() != rows[10:20].tolist()
    assert shuffled_rows(7, 9, 10, seed=3).tolist() == rows[7:16].tolist()
    assert shuffled_rows(0, 10, 10, seed=4).tolist() != rows[:10].tolist()
