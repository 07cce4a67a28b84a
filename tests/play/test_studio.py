"""What the page's models draw: the pictures of `sana sample`, in order, with their record."""

import copy
import json
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sampled
from helpers.pages import pixels, request, student

from sana_cli.errors import SanaError
from sana_cli.play import studio as studios
from sana_cli.play.studio import Message, PictureRequest, Studio
from sana_cli.sampling import conditioning, pictures
from sana_cli.sampling.opened import Opened, open_checkpoint


def studio(checkpoint: str | Path, **options: Any) -> Studio:
    return Studio(open_checkpoint(Path(checkpoint), device="cpu", **options))


@pytest.fixture(scope="module")
def digits() -> Studio:
    return studio("shipped")


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return studio(student(tmp_path_factory.mktemp("student") / "transformer"), encoder="tiny")


def drawn(of: Studio, **changes: Any) -> list[Message]:
    return list(of.draw(request(**changes)))


def picture(messages: list[Message]) -> np.ndarray:
    (found,) = [message.png for message in messages if message.kind == "picture"]
    return pixels(found)


def side_by_side(images: torch.Tensor) -> np.ndarray:
    return np.array(pictures.to_image(torch.cat(list(images), dim=-1)))


@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ("shipped", {"prompt": "4 two seven", "steps": 3}),
        ("shipped", {"prompt": "six", "steps": 8, "guidance_scale": 5.0, "seed": 2**40}),
        ("shipped:critters", {"prompt": "a round red monster", "steps": 2}),
        ("student", {"prompt": "a red cube"}),
        ("student", {"prompt": "a red cube", "steps": 3, "guidance_scale": 4.5}),
    ],
)
def test_a_picture_is_the_one_that_sample_draws(
    checkpoint: str, options: dict[str, Any], one_step: Studio, digits: Studio, tmp_path: Path
) -> None:
    """Equal pixels, and a record that draws it again."""
    of = {"student": one_step, "shipped": digits}.get(checkpoint) or studio(checkpoint)
    asked = request(**options)
    messages = list(of.draw(asked))
    place = of.opened.place
    more = {"encoder": "tiny"} if of is one_step else {}
    settings = {"steps": asked.steps, "guidance_scale": asked.guidance_scale, "seed": asked.seed}
    theirs = sampled(place, asked.prompt, **settings, **more, separate=tmp_path / "sample")
    assert np.array_equal(picture(messages), side_by_side(theirs.pixels))

    (found,) = [message for message in messages if message.kind == "picture"]
    assert found.facts["seed"] == asked.seed
    (tmp_path / "saved.png").write_bytes(found.png)
    record = pictures.read_record(tmp_path / "saved.png")
    expected = [pictures.read_record(path) for path in theirs.saved]
    assert record.cells == [cell for one in expected for cell in one.cells]
    assert record.as_json() | {"images": []} == expected[0].as_json() | {"images": []}


def test_other_seeds_are_those_pictures(digits: Studio) -> None:
    """Of two words, each variation takes the next two seeds. A batch rounds in another way."""
    messages = drawn(digits, prompt="4 two", steps=2, variations=3)
    others = [message for message in messages if message.kind == "variation"]
    assert [message.facts["seed"] for message in others] == [5, 7, 9]
    for message in others:
        alone = picture(drawn(digits, prompt="4 two", steps=2, seed=message.facts["seed"]))
        assert np.abs(alone.astype(int) - pixels(message.png)).max() <= 2
    kinds = [message.kind for message in messages]
    assert kinds.index("picture") < kinds.index("variation")


def test_large_variations_are_drawn_one_by_one(digits: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studios, "MANY_TOKENS", 4)
    kinds = [message.kind for message in drawn(digits, steps=2, variations=2)]
    assert kinds == ["step", "step", "picture", *(2 * ["step", "step", "variation"])]


def test_the_trajectory_leads_from_noise_to_the_picture(digits: Studio) -> None:
    messages = drawn(digits, steps=4, trajectory=True)
    frames = [message for message in messages if message.kind == "frame"]
    assert [message.facts["number"] for message in frames] == [0, 1, 2, 3, 4]
    assert np.array_equal(pixels(frames[-1].png), picture(messages))
    distances = [np.abs(pixels(message.png).astype(float) - picture(messages)).mean() for message in frames]
    assert distances == sorted(distances, reverse=True)
    noise = torch.randn((1, 32, 32), generator=torch.Generator().manual_seed(3))
    assert np.array_equal(pixels(frames[0].png), ((noise[0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy())


def test_each_step_shows_what_it_will_be(digits: Studio) -> None:
    steps = [message for message in drawn(digits, steps=4) if message.kind == "step"]
    assert [(message.facts["done"], message.facts["total"]) for message in steps] == [
        (1, 4),
        (2, 4),
        (3, 4),
        (4, 4),
    ]
    assert [bool(message.png) for message in steps] == [True, True, True, False]


def test_guidance_moves_pictures_with_and_without_a_null_branch(one_step: Studio, digits: Studio) -> None:
    for of in (one_step, digits):
        one, other = (picture(drawn(of, guidance_scale=scale)) for scale in (1.0, 4.0))
        assert not np.array_equal(one, other)


def test_captions_are_encoded_once(digits: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counter[tuple[str, ...]]()
    encode = conditioning.prompt_states

    def count(pipeline: Any, encoder: Any, prompts: list[str], negative: None) -> Any:
        counted[tuple(prompts)] += 1
        return encode(pipeline, encoder, prompts, negative)

    monkeypatch.setattr(studios, "prompt_states", count)
    monkeypatch.setattr(studios, "MOST_KEPT", 2)
    for prompt in ("3 3", "3 3", "8", "3 3", "9", "8"):
        drawn(digits, prompt=prompt)
    assert counted == {("3", "3"): 1, ("8",): 2, ("9",): 1}


def test_what_is_odd_about_a_prompt_is_said(digits: Studio, one_step: Studio) -> None:
    (found,) = [message for message in drawn(digits, prompt="4 banana") if message.kind == "picture"]
    assert found.facts["notes"] == ("words that this checkpoint was never trained on: banana",)
    with pytest.raises(SanaError, match="nothing to draw: the prompt is empty"):
        drawn(digits, prompt=" \n")
    with pytest.raises(SanaError, match="9 words; each is a picture, and there is room for 8"):
        drawn(digits, prompt="1 2 3 4 5 6 7 8 9")
    for prompt in ("\x00\x07", "עברית 🎈", "x" * 1000, "{red,blue}", "../../etc/passwd"):
        assert picture(drawn(one_step, prompt=prompt)).shape == (32, 32)


def test_what_the_page_is_told(digits: Studio, one_step: Studio) -> None:
    about = digits.about()
    assert (about["steps"], about["most_steps"], about["solver"]) == (8, 20, "dpm++")
    assert about["prompt"] == "5 zero 1"
    few = one_step.about()
    assert (few["most_steps"], few["solver"], few["one_word"]) == (4, "scm", False)
    assert json.dumps(few)
    assert (few["least_guidance"], few["most_guidance"]) == (1, 8)  # what it learned is not on record


@pytest.mark.parametrize("captions", [(), ("x" * 1001, " ", "a cube"), ("x" * 1001,)])
def test_examples_are_captions_that_the_page_takes(captions: tuple[str, ...], one_step: Studio) -> None:
    of = copy.copy(one_step)
    of._pipeline = replace(of._pipeline, example_captions=captions)
    about = of.about()
    assert (about["examples"], about["prompt"]) == (
        (["a cube"], "a cube") if len(captions) == 3 else ([], "")
    )


def no_room(*_given: object, **_named: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_no_room_is_one_message(one_step: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the command while models load, and of the page afterwards, with what the page has."""
    released: list[object] = []
    monkeypatch.setattr(studios, "release_memory", released.append)

    def refused(draw: Any) -> list[str]:
        with pytest.raises(SanaError) as caught:
            draw()
        return str(caught.value).splitlines()

    of, restart = copy.copy(one_step), "start sana play with --height, --width or --device cpu"
    of._kept = OrderedDict()
    of._decoder = SimpleNamespace(decode=no_room)  # type: ignore[assignment]
    assert refused(lambda: drawn(of)) == ["there is no room on cpu to decode the picture", restart]
    with monkeypatch.context() as patch:
        patch.setattr("sana_cli.sampling.sampler._sample_batch", no_room)
        assert refused(lambda: drawn(of))[1] == restart
    monkeypatch.setattr(studios, "prompt_states", no_room)
    assert refused(lambda: drawn(of, prompt="other")) == [
        "there is no room on cpu to encode the prompt",
        restart,
    ]
    monkeypatch.setattr(Opened, "load_transformer", no_room)
    assert refused(lambda: Studio(one_step.opened)) == [
        "there is no room on cpu for encoder, transformer and autoencoder together",
        "draw with sana sample, which loads one at a time, or elsewhere (`device` cpu)",
    ]
    assert released == [torch.device("cpu")] * 3


def test_images_that_overflow_are_one_message(one_step: Studio) -> None:
    with pytest.raises(SanaError) as caught:
        one_step._decode(torch.full((1, 1, 8, 8), torch.nan))
    assert str(caught.value).endswith(
        "are not finite\ntry less guidance, or start sana play with --precision fp32"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps`: input should be greater than or equal to 1"),
        ({"steps": 101}, "`steps`: input should be less than or equal to 100"),
        ({"steps": 1.5}, "`steps`: input should be a valid integer"),
        ({"seed": -1}, "`seed`: input should be greater than or equal to 0"),
        ({"seed": 2**53}, "`seed`: input should be less than 9007199254740992"),
        ({"guidance_scale": 1e9}, "`guidance_scale`: input should be less than or equal to 100"),
        ({"guidance_scale": float("nan")}, "`guidance_scale`: input should be a finite number"),
        ({"prompt": "x" * 1001}, "`prompt`: string should have at most 1000 characters"),
        ({"variations": 13}, "`variations`: input should be less than or equal to 12"),
        ({"tab": ""}, "`tab`: string should have at least 1 character"),
        ({"device": "cuda"}, "`device`: extra inputs are not permitted"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SanaError) as caught:
        request(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b'{"prompt": "\\ud800"}', b"{" * 9000])
def test_bodies_that_are_no_request_are_one_message(body: bytes) -> None:
    with pytest.raises(SanaError) as caught:
        PictureRequest.parse(body)
    assert len(str(caught.value).splitlines()) == 1
