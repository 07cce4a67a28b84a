"""Keys: each is described, and no default contradicts a given key."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY, invoke

from sana_cli.config.file import parse_config
from sana_cli.config.keys import Config, SampleConfig
from sana_cli.errors import SanaError


def test_every_key_is_described() -> None:
    for section in Config.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name


def test_home_is_home_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    text = (
        "data: {path: ~/in, dir: ~/data, autoencoder: ~/dc-ae, image_size: 256}\ntext: {encoder: ~/gemma}\n"
    )
    text += "train: {init_from: ~/w.pth}\nrun: {dir: ~/run}\n"
    config = parse_config(text, "c.yaml")
    found = (
        config.data.path,
        config.data.dir,
        config.data.autoencoder,
        config.text.encoder,
        config.train.init_from,
        config.run.dir,
    )
    assert [str(path).rpartition("/")[0] for path in found] == ["/home/somebody"] * 6
    assert parse_config("", "c.yaml", ["data.path=~"]).data.path == Path("/home/somebody")
    assert parse_config("", "c.yaml", ["run.dir=./~"]).run.dir == Path("~")


@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0), (2, 0), (12, 1), (100, 10), (499, 49), (500, 50), (3000, 50)]
)
def test_the_default_warm_up_follows_from_the_steps(steps: int, warmup: int) -> None:
    assert parse_config("", "c.yaml", [f"train.steps={steps}"]).optim.warmup(steps) == warmup
    assert (
        parse_config("", "c.yaml", [f"train.steps={steps}", "optim.warmup_steps=0"]).optim.warmup(steps) == 0
    )


@pytest.mark.parametrize(
    ("size", "patch"), [("32", 8), ("28", 4), ("[24, 36]", 4), ("30", 2), ("31", 1), ("64", 8)]
)
def test_the_default_patch_divides_the_images(size: str, patch: int) -> None:
    assert parse_config("", "c.yaml", [f"data.image_size={size}"]).model.patch_size == patch
    assert (
        parse_config(f"data: {{image_size: {size}}}", "c.yaml", ["model.patch_size=1"]).model.patch_size == 1
    )


def test_a_given_patch_is_not_mended() -> None:
    with pytest.raises(SanaError, match=r"model\.patch_size: 8 does not divide data\.image_size 28x28"):
        parse_config("", "c.yaml", ["data.image_size=28", "model.patch_size=8"])


def test_a_run_has_a_directory_of_its_own() -> None:
    with pytest.raises(SanaError, match=r"run\.dir: data/quickstart is data\.dir as well"):
        parse_config("", "c.yaml", ["run.dir=data/quickstart"])


def test_config_strings_survive(config: Config) -> None:
    assert SampleConfig.model_validate(config.to_dict()["sample"]) == config.sample


def test_attributes_may_be_in_any_field_or_in_none() -> None:
    assert parse_config("", "c.yaml").data.attribute_field == "attributes"
    for value in ("facts", None):
        config = parse_config("", "c.yaml", (f"data.attribute_field={'null' if value is None else value}",))
        assert config.data.attribute_field == value
        assert parse_config(config.to_yaml(), "again.yaml") == config
    with pytest.raises(
        SanaError, match=r"c\.yaml:1: data\.attribute_field string should have at least 1 character"
    ):
        parse_config("data: {attribute_field: ''}", "c.yaml")


def test_the_schema_is_that_of_the_configs() -> None:
    import jsonschema

    schema = json.loads(invoke("inspect", "--schema").stdout)
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"train": {"lrr": 1}}, schema)


@pytest.mark.parametrize(
    ("size", "channels", "width", "patch"),
    [
        (32, 1, 128, 8),
        (64, 3, 128, 4),
        (64, 3, 256, 8),
        (64, 32, 128, 2),
        (30, 1, 128, 2),
        (31, 3, 128, 1),
        (64, 4, 2, 1),
    ],
)
def test_a_patch_that_is_not_given_divides_the_image_and_fits_the_width(
    size: int, channels: int, width: int, patch: int
) -> None:
    text = f"data: {{image_size: {size}}}\nmodel: {{in_channels: {channels}, num_attention_heads: 1, attention_head_dim: {width}}}"
    assert parse_config(text, "c.yaml").model.patch_size == patch
