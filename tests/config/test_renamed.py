"""Renamed keys: refused in a user's config, read in sana's own old files."""

from pathlib import Path

import pytest
import yaml
from helpers import in_old_names

from sana_cli.config.file import RUN_CONFIG, load_run_config, parse_config
from sana_cli.config.keys import Config
from sana_cli.config.renamed import RENAMED, in_new_names
from sana_cli.errors import SanaError


@pytest.mark.parametrize(("old", "new"), RENAMED.items(), ids=list(RENAMED))
def test_an_old_key_is_refused_with_its_new_name_and_its_line(old: str, new: str) -> None:
    section, key = old.split(".")
    with pytest.raises(SanaError) as caught:
        parse_config(f"# mine\n{section}:\n  {key}: 1\n", "c.yaml")
    assert (str(caught.value), caught.value.exit_code) == (f"c.yaml:3: {old} is called {new} now", 2)
    with pytest.raises(SanaError) as caught:
        parse_config("", "c.yaml", [f"{old}=1"])
    assert (str(caught.value), caught.value.exit_code) == (f"--set {old}=1: {old} is called {new} now", 2)


@pytest.mark.parametrize(("old", "new"), RENAMED.items(), ids=list(RENAMED))
def test_a_new_name_is_a_key_and_an_old_one_is_none(old: str, new: str) -> None:
    keys = {section: set(type(getattr(Config(), section)).model_fields) for section in Config.model_fields}
    section, key = new.split(".")
    assert key in keys[section]
    section, key = old.split(".")
    assert key not in keys[section]


def test_no_two_old_keys_have_one_new_name() -> None:
    assert len(set(RENAMED.values())) == len(RENAMED)


def test_a_runs_config_is_read_by_its_old_keys(tmp_path: Path) -> None:
    sections = (
        "objective: {prediction_type: sample, flow_shift: 3.5, sigma_density: uniform}\n"
        "optim: {optimizer: muon, lr: 0.01, ema_decay: 0.9}\n"
        "log: {every: 7, sample_every: 9}\nsave: {every: 11, keep: 3}\n"
    )
    config = parse_config(sections, "c.yaml", ["run.dir=elsewhere"])
    old = in_old_names(config.to_dict())
    assert {"objective", "log", "save"}.isdisjoint(old)
    assert set(old["optim"]) == {"ema_device"}, "newer than the new names"
    assert (old["model"]["prediction_type"], old["train"]["save_every"], old["train"]["keep"]) == (
        "sample",
        11,
        3,
    )
    assert in_new_names(old) == config.to_dict()
    run = tmp_path / "run"
    run.mkdir()
    (run / RUN_CONFIG).write_text(yaml.safe_dump(old))
    assert load_run_config(run) == config


@pytest.mark.parametrize(
    ("text", "lr"),
    [("train: {lr: 0.5}\noptim:", 0.5), ("optim:\ntrain: {lr: 0.5}", 0.5), ("optim: {lr: 0.5}\ntrain:", 0.5)],
)
def test_an_emptied_section_of_a_recorded_config_loses_nothing(text: str, lr: float) -> None:
    assert parse_config(text, "c.yaml", recorded=True).optim.lr == lr


@pytest.mark.parametrize(
    "text", ["optim: 3\ntrain: {lr: 0.1}", "train: {lr: 0.1}\noptim: 3", "optim: [1]\ntrain: {lr: 1}"]
)
def test_a_recorded_section_that_is_no_mapping_is_one_message(text: str) -> None:
    with pytest.raises(SanaError, match="optim needs keys below it"):
        parse_config(text, "c.yaml", recorded=True)
