"""Configs: every problem in one message with its place, the shipped files, and what is written back."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_cli.config import Config, find_config, load_config, packaged_configs, parse_config
from sana_cli.errors import SanaError

WRONG = """\
train:
  lrr: 1e-4
  lr: -1
  steps: "5"
  seed: 1
  seed: 2
model:
  patch_size: 5
batch_size: 3
tran: 4
text: {instruction: a, template: chat}
run: {device: gpu}
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(SanaError) as caught:
        parse_config(text, "c.yaml", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def test_all_problems_at_once_each_with_its_place() -> None:
    found = problems(WRONG, "train.foo=3", "sample.steps=0")
    assert set(found) == {
        "c.yaml:6: train.seed is given twice; keep one",
        "c.yaml:2: unknown key train.lrr; did you mean train.lr?",
        "c.yaml:3: train.lr must be greater than 0, not -1",
        "c.yaml:4: train.steps must be a valid integer, not '5'",
        "c.yaml:8: model.patch_size: 5 does not divide data.image_size 32x32",
        "c.yaml:9: unknown key batch_size; did you mean train.batch_size?",
        "c.yaml:10: unknown key tran; did you mean train?",
        "c.yaml:11: text.instruction: and text.template exclude each other; keep one",
        "c.yaml:12: run.device must be auto, cpu, mps, cuda or cuda:N, not 'gpu'",
        "--set train.foo=3: unknown key train.foo; `sana inspect CONFIG --yaml` prints every key there is",
        "--set sample.steps=0: sample.steps must be greater than 0, not 0",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "c.yaml:1: not YAML: "),
        ("- a", "c.yaml:1: expected keys such as `train:`, found a list"),
        ("data: &x {}\ntext: *x", "c.yaml:2: YAML aliases are not used in configs"),
        ("train: !!python/object:os.system {}", "c.yaml:1: "),
        ("train: {lr: .nan}", "c.yaml:1: train.lr must be a finite number, not nan"),
        ("train: 3", "c.yaml:1: train needs keys below it, not 3"),
        ("data: {image_size: [32]}", "c.yaml:1: data.image_size must be a number of pixels, or [height, width], not [32]"),
        ("data: {dir: 3}", "c.yaml:1: data.dir must be a path, not 3"),
        ("? [1, 2]\n: 3", "c.yaml:1: a key must be a word"),
        ("train: {precision: fp16}", "c.yaml:1: train.precision cannot be fp16: it overflows in the sums of linear attention"),
        ("train: {steps: 5}", "c.yaml:1: train.warmup_steps: 50 leaves none of train.steps 5"),
    ],
)
def test_each_mistake(text: str, message: str) -> None:
    assert any(line.startswith(message) for line in problems(text)), problems(text)


def test_overrides_win_and_are_checked() -> None:
    config = parse_config("train: {lr: 0.5}", "c.yaml", ["train.lr=1e-4", "train.lr=2e-4", "data.image_size=[16, 24]"])
    assert config.train.lr == 2e-4
    assert config.data.size == (16, 24)
    assert problems("", "train.lr") == ["--set train.lr: expected section.key=value, for example --set train.lr=1e-3"]


def test_emptied_sections_are_defaults() -> None:
    assert parse_config("train:\n  # nothing\n", "c.yaml") == Config()
    assert parse_config("", "c.yaml") == Config()


@pytest.mark.parametrize("path", sorted(packaged_configs().glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_say_how_they_are_run(path: Path) -> None:
    config = load_config(str(path))
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(header) >= 4
    assert any("sana train" in line for line in header)
    assert parse_config(config.to_yaml(), "dumped") == config
    assert parse_config(config.to_commented_yaml(), "commented") == config


def test_quickstart_is_the_default() -> None:
    assert load_config(None) == load_config("quickstart")
    own = {  # all else are the defaults
        "model": {"prediction_type": "sample"},
        "train": {"schedule": "linear"},
        "sample": {"guidance_scale": 2.7, "guidance_interval": (0.7, 1.0)},
    }
    assert load_config("quickstart") == Config.model_validate(own)


def test_every_key_is_described() -> None:
    for section in Config.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name


def test_a_config_here_comes_before_the_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == packaged_configs() / "quickstart.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("train: {steps: 77}")
    assert load_config("quickstart").train.steps == 77
    with pytest.raises(SanaError, match=r"no config 'quikstart'; did you mean quickstart\?"):
        find_config("quikstart")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.from_regex(r"(data|train|model|zoo): \{[a-z_]{1,9}: [-0-9a-z.\[\]]{1,9}\}", fullmatch=True))
def test_any_text_loads_or_is_refused_with_a_message(text: str) -> None:
    try:
        config = parse_config(text, "c.yaml")
    except SanaError as error:
        assert error.exit_code == 2
        assert all(line.startswith(("c.yaml:", "c.yaml: ")) for line in str(error).splitlines())
    else:
        assert parse_config(config.to_yaml(), "again") == config
