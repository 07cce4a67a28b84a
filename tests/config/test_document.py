"""YAML: any text survives writing and reading, and wrong tags are mistakes."""

import pytest

from sana_cli.config.file import parse_config
from sana_cli.config.keys import Config
from sana_cli.errors import SanaError


@pytest.mark.parametrize(
    "text",
    [
        "a\x85b",
        "a\u2028 b # c",
        "\u2029",
        "x\ny\x85",
        "été",
        "a: b",
        "08",
        "09",
        "1e5",
        ".5",
        "0x1f",
        "1_0",
        "+1.",
        "true",
    ],
)
def test_odd_texts_are_written_so_that_they_are_read(text: str) -> None:
    config = parse_config("", "c.yaml", [f"text.instruction={text}", f"data.caption_template={text}"])
    assert parse_config(config.to_yaml(), "dumped") == config
    assert parse_config(config.to_commented_yaml(), "commented") == config


@pytest.mark.parametrize(
    "text", ["!!bool abc", "!!timestamp x", "!!int x", "!!float x", "!!binary \u00e9", "!!null 5x"]
)
def test_tags_that_do_not_fit_are_mistakes(text: str) -> None:
    def by_set() -> Config:
        return parse_config("", "c.yaml", [f"train.steps={text}"])

    def in_a_file() -> Config:
        return parse_config(f"train: {{steps: {text}}}", "c.yaml")

    for read in (by_set, in_a_file):
        with pytest.raises(SanaError, match=r"c\.yaml:1: |--set train\.steps") as caught:
            read()
        assert caught.value.exit_code == 2
