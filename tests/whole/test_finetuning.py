"""docs/finetuning.md, from its first command to its last, on a small model with random weights.

The folder of the published model has a small one in it, and `configs/finetune-1.6b.yaml` of the working directory is
that of the product for smaller pictures, a smaller model and fewer steps (`SMALLER`). The commands are those of the
page but for what `REPLACED` and `ADDED` say.
"""

import inspect
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import REPOSITORY, assert_same_tensors, checkpoint_tensors, contents, invoke, metrics_lines
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana_cli.config.file import load_config
from sana_cli.dataset.reader import Dataset
from sana_cli.runtime import device
from sana_cli.sampling.conditioning import load_pipeline_encoder, prompt_states
from sana_cli.sampling.pipeline import open_pipeline

diffusers = pytest.importorskip("diffusers")

PAGE = (REPOSITORY / "docs" / "finetuning.md").read_text(encoding="utf-8")
BASE, SPRINT = Path("models/SANA1.5_1.6B_1024px_diffusers"), Path("models/Sana_Sprint_1.6B_1024px_diffusers")
RUN, CONFIG = Path("runs/finetune-1.6b"), Path("configs/finetune-1.6b.yaml")
PROMPT = "a photo of p3r5on on a beach"
SIDE = 512  # pixels, in place of 1024: the smallest of diffusers' tables
STEPS = 4  # in place of 1000
ARCHITECTURE = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32, "caption_channels": 32, "sample_size": SIDE // 32,
}  # fmt: skip
SMALLER: dict[str, dict[str, Any]] = {
    "data": {"image_size": SIDE, "buckets": [SIDE], "workers": 0},
    "model": ARCHITECTURE,
    "optim": {"warmup_steps": 1, "lr": 0.01},  # enough for adapters to show in a picture
    "train": {"steps": STEPS, "precision": "fp32"},  # so that pictures can be compared
    "log": {"every": 1, "sample_every": 100},
    "save": {"every": 2},
    "run": {"device": "cpu"},
}
REPLACED = {
    "--height 1024 --width 1024": f"--height {SIDE} --width {SIDE}",
    "height=1024": f"height={SIDE}",
    "width=1024": f"width={SIDE}",
    "step-001000": f"step-{STEPS:06d}",
    "train.steps=1500": f"train.steps={STEPS + 2}",
    "--images-per-prompt 100": "--images-per-prompt 2",
    "torch.bfloat16": "torch.float32",
    '.to("cuda")': '.to("cpu")',
}
SHORT = ("--set", "train.steps=2", "--set", "sample.steps=2")
ADDED = {  # to the command that has this in it, the first one of its kind
    "--seed 7": ("--precision", "fp32", "--out", "p3r5on-ours.png"),
    "runs/dora": SHORT,
    "runs/whole": (*SHORT, "--set", "train.precision=bf16"),  # what train.weights=bf16 is for
    "runs/with-people": SHORT,
}


def parts(page: str) -> Iterator[tuple[str, str]]:
    """("sana", a command) and ("python", a block of code), in the order of a page."""
    for language, block in re.findall(r"```(console|python)\n(.*?)```", page, re.DOTALL):
        if language == "python":
            yield "python", block
        else:
            yield from (("sana", line.removeprefix("$ sana ")) for line in block.splitlines())


def smaller(text: str) -> str:
    """A command or code of the page for the small model."""
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    return text


def save_pipeline(folder: Path, gemma: Path, sprint: bool) -> None:
    """A small random pipeline, with every part of the published one."""
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(1)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=32, out_channels=32, cross_attention_dim=64, patch_size=1, qk_norm="rms_norm_across_heads",
        guidance_embeds=sprint, **ARCHITECTURE,
    )  # fmt: skip
    with torch.no_grad():  # weights for which captions and time matter
        for parameter in transformer.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    widths, once, none = (4, 4, 8, 8, 16, 32), (1,) * 6, ((),) * 6
    vae = diffusers.AutoencoderDC(
        latent_channels=32, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=once,
        decoder_layers_per_block=once, encoder_qkv_multiscales=none, decoder_qkv_multiscales=none,
        scaling_factor=0.41407,
    )  # fmt: skip
    flow = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    kind = diffusers.SanaSprintPipeline if sprint else diffusers.SanaPipeline
    kind(
        tokenizer=AutoTokenizer.from_pretrained(gemma),
        text_encoder=AutoModel.from_pretrained(gemma),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=diffusers.SCMScheduler() if sprint else flow,
    ).save_pretrained(folder)


def save_photos(folder: Path) -> None:
    """Twelve photos of three shapes, one of them small, with captions."""
    folder.mkdir()
    places = ("on a beach", "in the snow", "at a desk, by a window")
    for number in range(12):
        height, width = ((640, 480), (560, 560), (600, 900))[number % 3] if number else (200, 300)
        coarse = np.random.default_rng(number).integers(
            0, 256, (height // 20, width // 20, 3), dtype=np.uint8
        )
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{number:02}.jpg")
        (folder / f"{number:02}.txt").write_text(f"A photo of P3r5on {places[number % 3]}\n")


def save_others_adapter(path: Path) -> None:
    """A LoRA in ComfyUI's names, which diffusers would load without a change."""
    noise = torch.Generator().manual_seed(3)
    layer = "diffusion_model.transformer_blocks.1.attn2.to_q"
    sizes = {f"{layer}.lora_A.weight": (4, 64), f"{layer}.lora_B.weight": (64, 4)}
    save_file({name: 0.1 * torch.randn(size, generator=noise) for name, size in sizes.items()}, path)


def save_config(path: Path) -> None:
    """The product's config, for the small model."""
    content = yaml.safe_load((REPOSITORY / "configs" / path.name).read_text())
    for section, keys in SMALLER.items():
        content[section].update(keys)
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(content))


class Walk:
    """What the page's commands printed, and the names that its Python defines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.printed: dict[str, str] = {}  # by the command as the page has it
        self.names: dict[str, Any] = {}

    def output(self, *has: str) -> str:
        """What the one command that has all these words printed."""
        (found,) = [text for command, text in self.printed.items() if all(word in command for word in has)]
        return found

    def picture(self, name: str) -> np.ndarray:
        """The pixels of a picture in the folder."""
        with Image.open(self.folder / name) as image:
            return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory, gemma: Path) -> Iterator[Walk]:
    """The whole page, in the folder in which it leaves its files. It stays the working directory."""
    walk, left = Walk(tmp_path_factory.mktemp("walk")), dict(ADDED)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # still the name in older diffusers
        patch.setattr(device, "cpu_has_bf16", lambda: True)  # else train.weights=bf16 is refused
        patch.chdir(walk.folder)
        for path, sprint in ((BASE, False), (SPRINT, True)):
            save_pipeline(path, gemma, sprint)
        save_photos(Path("photos"))
        save_others_adapter(Path("watercolour.safetensors"))
        save_config(CONFIG)
        for kind, text in parts(PAGE):
            if kind == "python":
                exec(compile(smaller(text), "docs/finetuning.md", "exec"), walk.names)
                continue
            more = [word for key in list(left) if key in text for word in left.pop(key)]
            result = invoke(*shlex.split(smaller(text)), *more, columns=120)
            assert result.exit_code == 0, f"sana {text}\n{result.output}"
            walk.printed[text] = result.output
        assert not left, f"no command has {left}"
        yield walk


def test_the_small_config_trains_the_same_way(walk: Walk) -> None:
    """What is trained, and how, is the product's: the small one differs in sizes, lengths, rate and precision."""
    ours, published = (load_config(str(root / CONFIG)) for root in (walk.folder, REPOSITORY))
    for section in ("objective", "adapter", "text", "sample"):
        assert getattr(ours, section) == getattr(published, section)
    assert ours.optim.model_copy(update={"warmup_steps": 50, "lr": 1e-4}) == published.optim
    assert (ours.train.batch_size, ours.train.accumulate) == (
        published.train.batch_size,
        published.train.accumulate,
    )


def test_what_is_printed_says_what_became_of_the_photos(walk: Walk) -> None:
    printed = walk.output("embed", "data.path=photos")
    assert "1 of 12 images are smaller than their shape and were enlarged" in printed
    rows = re.findall(r"^(\d+) x (\d+) +(\d+)", printed, re.MULTILINE)
    assert sum(int(images) for *_, images in rows) == 12
    assert len(rows) == 3
    assert "in adapters (LoRA, rank 16)" in walk.output("--dry-run")


def test_the_adapters_have_moved(walk: Walk) -> None:
    assert re.search(r"moved \d+\.\d\d%", walk.output("train --config finetune-1.6b --resume"))
    moved = [line["adapter_movement"]["all"] for line in metrics_lines(RUN)]
    assert 0 < moved[0] < moved[-1]
    assert {path.name for path in (RUN / "samples").iterdir()} == {
        f"step-{step:06d}.png" for step in (0, STEPS, STEPS + 2)
    }
    assert (RUN / "report.html").is_file()


def test_diffusers_draws_the_picture_of_sana_sample(walk: Walk) -> None:
    """Same model, adapters, prompt, seed, steps and guidance, in float32."""
    theirs, base = walk.picture("p3r5on.png"), _theirs(walk.names["pipe"], scale=0)
    sheet = walk.picture("p3r5on-ours.png")
    distance, ours = _found_in(sheet, theirs)
    print(f"largest difference {distance} of 255; without adapters {np.abs(base - theirs).max()}")
    assert theirs.shape == ours.shape == (SIDE, SIDE, 3)
    assert theirs.std() > 10  # the picture is not flat
    assert distance <= 1
    assert np.abs(base - theirs).max() > 20  # which is not so because the adapters do nothing


def test_a_merged_model_draws_it_too(walk: Walk) -> None:
    assert "20 layers moved by" in walk.output("merge")
    merged = diffusers.SanaPipeline.from_pretrained("models/p3r5on")
    assert {
        type(layer) for layer in merged.transformer.modules() if "lora" in type(layer).__module__
    } == set()
    assert np.abs(_theirs(merged) - walk.picture("p3r5on.png")).max() <= 1


def test_scales_are_those_of_diffusers(walk: Walk) -> None:
    size = ("--height", str(SIDE), "--width", str(SIDE), "--precision", "fp32", "--out", "weaker.png")
    result = invoke(
        "sample", "--checkpoint", str(BASE), "--adapter", f"{RUN}/checkpoints/step-{STEPS:06d}:0.5", PROMPT,
        "--seed", "7", *size,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert _found_in(walk.picture("weaker.png"), _theirs(walk.names["pipe"], scale=0.5))[0] <= 1


def test_captions_are_the_same_text_everywhere(walk: Walk) -> None:
    """In embed and train (the dataset), in sample (a run, and a model with adapters), and in diffusers."""
    dataset, pipe = Dataset(Path("data/finetune-1.6b")), walk.names["pipe"]
    number = dataset.texts().index(f"A photo of P3r5on {PROMPT.partition('p3r5on ')[2]}")
    trained, null = dataset.states([number, dataset.index.null_caption])
    for place in (RUN / "checkpoints" / f"step-{STEPS:06d}", BASE):
        pipeline = open_pipeline(place)
        encoder = load_pipeline_encoder(pipeline, torch.device("cpu"))
        (caption,), (empty,) = prompt_states(pipeline, encoder, [PROMPT], None)
        assert torch.equal(caption.bfloat16(), trained.bfloat16())
        assert torch.equal(empty.bfloat16(), null.bfloat16())
    theirs, mask, negative, negative_mask = pipe.encode_prompt(
        PROMPT,
        negative_prompt="",
        complex_human_instruction=_default_instruction(pipe),
        device=torch.device("cpu"),
    )
    for found, wanted in ((theirs[mask.bool()], caption), (negative[negative_mask.bool()], empty)):
        assert found.shape == wanted.shape
        assert torch.allclose(found, wanted, atol=1e-4)
    plain, plain_mask, *_ = pipe.encode_prompt(PROMPT, device=torch.device("cpu"))
    assert not _alike(plain[plain_mask.bool()], caption)  # the instruction matters


def test_a_run_goes_on_to_the_bit(walk: Walk) -> None:
    end = f"step-{STEPS + 2:06d}"
    straight = (
        "--set",
        f"train.steps={STEPS + 2}",
        "--set",
        "run.dir=runs/straight",
        "--set",
        "sample.steps=1",
    )
    result = invoke("train", "--config", "finetune-1.6b", *straight)
    assert result.exit_code == 0, result.output
    resumed, whole = (Path(run) / "checkpoints" / end for run in (RUN, "runs/straight"))
    assert_same_tensors(checkpoint_tensors(resumed), checkpoint_tensors(whole))


def test_a_run_goes_on_with_its_own_model_alone(walk: Walk) -> None:
    run = Path(shutil.copytree(RUN, "runs/copied"))
    before = contents(run)
    on = ("train", "--config", "finetune-1.6b", "--resume", "auto", "--set", f"run.dir={run}")
    shutil.copytree(BASE, "models/changed")
    weights = Path("models/changed/transformer/diffusion_pytorch_model.safetensors")
    tensors = load_file(weights)
    tensors["proj_out.bias"][0] += 1
    save_file(tensors, weights, {"format": "pt"})
    longer = ("--set", f"train.steps={STEPS + 3}", "--set", "sample.steps=1")
    result = invoke(*on, *longer, "--set", "train.init_from=models/changed")
    assert result.exit_code == 1
    assert "models/changed is not the model that runs/copied" in result.output
    assert contents(run) == before
    shutil.copytree(BASE, "models/moved")
    result = invoke(*on, *longer, "--set", "train.init_from=models/moved")
    assert result.exit_code == 0, result.output


def test_other_runs_of_the_page(walk: Walk) -> None:
    dora = load_file("runs/dora/checkpoints/step-000002/pytorch_lora_weights.safetensors")
    assert any("magnitude" in name for name in dora)
    whole = load_file("runs/whole/checkpoints/step-000002/transformer/diffusion_pytorch_model.safetensors")
    assert {*whole} == {*load_file(BASE / "transformer" / "diffusion_pytorch_model.safetensors")}
    assert "13 images" in walk.output("data.also")  # of the 14, an epoch has one of the two drawings
    assert Dataset(Path("data/people")).texts().count("a photo of a person") == 1
    assert "was trained on another model" in walk.output(str(SPRINT))
    assert re.search(r"attn2\.to_q +1 +4 ", walk.output("inspect watercolour"))


# --- pictures and captions ----------------------------------------------------------------------


def _theirs(pipe: Any, scale: float | None = None) -> np.ndarray:
    """The picture of the page's Python by a pipeline of diffusers, with adapters of another strength."""
    if scale is not None:
        pipe.set_adapters("default_0", scale)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        PROMPT, height=SIDE, width=SIDE, guidance_scale=4.5, num_inference_steps=20,
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    if scale is not None:
        pipe.set_adapters("default_0", 1.0)
    return np.asarray(image).astype(int)


def _found_in(sheet: np.ndarray, picture: np.ndarray) -> tuple[int, np.ndarray]:
    """The part of a labelled sheet that is closest to a picture, and the largest difference between the two."""
    height, width, _ = picture.shape
    cuts = [
        sheet[y : y + height, x : x + width]
        for y in range(sheet.shape[0] - height + 1)
        for x in range(sheet.shape[1] - width + 1)
    ]
    best = min(cuts, key=lambda cut: int(np.abs(cut[::8, ::8] - picture[::8, ::8]).sum()))
    return int(np.abs(best - picture).max()), best


def _default_instruction(pipe: Any) -> list[str]:
    """The instruction that a pipeline uses if none is given."""
    default: list[str] = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
    return default


def _alike(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.allclose(one, two, atol=1e-4)
