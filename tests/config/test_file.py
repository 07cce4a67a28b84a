"""Configs: one message with every problem and its place, the shipped files, writing back."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_cli.config.file import find_config, load_config, packaged_configs, parse_config
from sana_cli.config.keys import Config
from sana_cli.errors import SanaError

WRONG = """\
train:
  stepz: 4
  lr: 1e-3
  steps: "5"
  seed: 1
  seed: 2
model:
  patch_size: 5
batch_size: 3
tran: 4
text: {instruction: a, template: chat}
run: {device: gpu}
optim: {lrr: 1e-4, lr: -1}
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
        "c.yaml:2: unknown key train.stepz; did you mean train.steps?",
        "c.yaml:3: train.lr is called optim.lr now",
        "c.yaml:4: train.steps must be a valid integer, not '5'",
        "c.yaml:8: model.patch_size: 5 does not divide data.image_size 32x32",
        "c.yaml:9: unknown key batch_size; did you mean train.batch_size?",
        "c.yaml:10: unknown key tran; did you mean train?",
        "c.yaml:11: text.instruction: and text.template exclude each other; keep one",
        "c.yaml:12: run.device must be auto, cpu, mps, cuda or cuda:N, not 'gpu'",
        "c.yaml:13: unknown key optim.lrr; did you mean optim.lr?",
        "c.yaml:13: optim.lr must be greater than 0, not -1",
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
        ("optim: {lr: .nan}", "c.yaml:1: optim.lr must be a finite number, not nan"),
        ("train: 3", "c.yaml:1: train needs keys below it, not 3"),
        (
            "data: {image_size: [32]}",
            "c.yaml:1: data.image_size must be a number of pixels, or [height, width], not [32]",
        ),
        ("data: {dir: 3}", "c.yaml:1: data.dir must be a path, not 3"),
        ("? [1, 2]\n: 3", "c.yaml:1: a key must be a word"),
        (
            "train: {precision: fp16}",
            "c.yaml:1: train.precision cannot be fp16: it overflows in the sums of linear attention",
        ),
        (
            "{train: {steps: 5}, optim: {warmup_steps: 5}}",
            "c.yaml:1: optim.warmup_steps: 5 leaves none of train.steps 5",
        ),
    ],
)
def test_each_mistake(text: str, message: str) -> None:
    assert any(line.startswith(message) for line in problems(text)), problems(text)


def test_overrides_win_and_are_checked() -> None:
    config = parse_config(
        "optim: {lr: 0.5}", "c.yaml", ["optim.lr=1e-4", "optim.lr=2e-4", "data.image_size=[16, 24]"]
    )
    assert config.optim.lr == 2e-4
    assert config.data.size == (16, 24)
    assert problems("", "optim.lr") == [
        "--set optim.lr: expected section.key=value, for example --set optim.lr=1e-3"
    ]


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
    own = {  # every other key has its default
        "objective": {"prediction_type": "sample"},
        "optim": {"schedule": "linear"},
        "train": {"steps": 2000},
        "sample": {"guidance_scale": 3.3, "guidance_interval": (0.7, 1.0)},
    }
    assert load_config("quickstart") == Config.model_validate(own)


def test_a_config_here_comes_before_the_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == packaged_configs() / "quickstart.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("train: {steps: 77}")
    assert load_config("quickstart").train.steps == 77
    with pytest.raises(SanaError, match=r"no config 'quikstart'; did you mean quickstart\?"):
        find_config("quikstart")


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=60)
    | st.from_regex(r"(data|train|model|zoo): \{[a-z_]{1,9}: [-0-9a-z.\[\]]{1,9}\}", fullmatch=True)
)
def test_any_text_loads_or_is_refused_with_a_message(text: str) -> None:
    try:
        config = parse_config(text, "c.yaml")
    except SanaError as error:
        assert error.exit_code == 2
        assert all(line.startswith(("c.yaml:", "c.yaml: ")) for line in str(error).splitlines())
    else:
        assert parse_config(config.to_yaml(), "again") == config


@pytest.mark.parametrize(
    "text",
    ["{}", "a {} on #3", "a: b # c", "[x", "- x", "'", '"quoted"', "&x", "*", "!t x", "%", "@", "|", ">",
    "? x", "x\ny", " x ",
     "null or not", "true", "1e3", "~x", "=", "a=b", "\t", "---", "\u2028", "été"],
)  # fmt: skip
def test_a_text_behind_set_is_taken_whole(text: str) -> None:
    assert parse_config("", "c.yaml", [f"data.caption_template={text}"]).data.caption_template == text
    assert parse_config("", "c.yaml", [f"text.instruction={text}"]).text.instruction == text


@given(st.text(max_size=20))
def test_any_text_behind_set_is_taken_whole(text: str) -> None:
    assert parse_config("", "c.yaml", [f"data.caption_template={text}"]).data.caption_template == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.path=null", None), ("data.path=", None), ("data.held_out_split=null", None),
        ("optim.grad_clip=null", None),
        ("data.class_names=[no, 'a # b', \"c, d\"]", None), ("data.image_size=[16, 32]", (16, 32)),
        ("optim.lr=1e-3", 1e-3),
        ("train.steps=010", 10), ("train.steps=08", 8), ("train.steps=1_000", 1000), ("train.steps=0x10", 16),
        ("optim.lr=.5", 0.5), ("data.caption_field=2001-01-01", "2001-01-01"), ("data.caption_field=on",
        "on"),
        ('sample.prompts=["4 #two", six]', ("4 #two", "six")), ("log.tensorboard=true", True),
    ],
)  # fmt: skip
def test_other_values_are_yamls(override: str, value: object) -> None:
    section, key = override.partition("=")[0].split(".")
    if "no, " in override:  # YAML 1.1 reads this word as a boolean, not as a name
        with pytest.raises(SanaError, match=r"data\.class_names must be a valid string, not"):
            parse_config("", "c.yaml", [override])
        return
    assert getattr(getattr(parse_config("", "c.yaml", [override]), section), key) == value


@pytest.mark.parametrize(
    "override",
    ["train.steps=5 # five", "train.steps=5\nkeep: 1", "optim.lr=1 2", "train.steps=1:30", "optim.lr=1:30.5",
    "sample.prompts=[4] # x",
     "sample.prompts=[4 #, 5]", "train.steps=--- 5", "train.steps=5 ...", "train.steps='5'"],
)  # fmt: skip
def test_half_a_value_is_none(override: str) -> None:
    with pytest.raises(SanaError, match="not a YAML value|must be a valid"):
        parse_config("", "c.yaml", [override])


def test_files_are_read_as_people_save_them(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for mark, end in ((b"\xef\xbb\xbf", "\r\n"), (b"", "\r"), (b"", "\n")):
        path.write_bytes(
            mark
            + end.join(
                ["train: {steps: 010}  # ten", "optim:", "  lr: 1e-3", "data: {caption_field: 2001-01-01}"]
            ).encode()
        )
        config = load_config(str(path))
        assert (config.train.steps, config.optim.lr, config.data.caption_field) == (10, 1e-3, "2001-01-01")
    path.write_text("train: {steps: 1:30}")
    with pytest.raises(SanaError, match=r"c\.yaml:1: train\.steps must be a valid integer, not '1:30'"):
        load_config(str(path))
    path.write_bytes("train: {steps: 5}".encode("utf-16"))
    with pytest.raises(SanaError, match=r"c\.yaml: cannot be read as UTF-8 text: UTF-16; save it as UTF-8"):
        load_config(str(path))
    path.write_text("train:\n  # five\u2028  steps: 5\n", encoding="utf-8")
    with pytest.raises(
        SanaError, match=r"c\.yaml:2: not YAML .*: the character U\+2028 ends a line for YAML alone"
    ):
        load_config(str(path))
