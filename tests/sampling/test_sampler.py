"""The sampling loop: diffusers' pictures, the guidance formula, reuse of memory."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sampled, trained
from helpers.steps import drawn

from sana_cli.config.keys import Config, SampleConfig
from sana_cli.errors import SanaError
from sana_cli.model import SanaTransformer
from sana_cli.runtime import files
from sana_cli.sampling import sampler
from sana_cli.weights import checkpoint


@pytest.mark.parametrize("which", ["step", "predicts_samples"])
def test_our_pictures_are_those_of_diffusers(which: str, request: pytest.FixtureRequest) -> None:
    """A dozen lines of diffusers draw what `sana sample` draws, from the same noise."""
    diffusers = pytest.importorskip("diffusers")
    step: Path = request.getfixturevalue(which)
    summary = drawn(step, "4 two", steps=6, guidance_scale=2.0, seed=7, solver="dpm++")
    transformer = diffusers.SanaTransformer2DModel.from_pretrained(step, subfolder="transformer").eval()
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(step, subfolder="scheduler")
    from sana_cli.text import load_encoder, pad_states, text_config

    record = checkpoint.read_record(step)
    states = dict(
        load_encoder(text_config(record.encoder.as_json()), torch.device("cpu")).encode(["4", "two", ""])
    )
    captions, mask = pad_states([states["4"], states["two"], states[""], states[""]])
    x = torch.stack(
        [torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8)]
    )
    scheduler.set_timesteps(6)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            v = transformer(
                x.repeat(2, 1, 1, 1), captions.float(), timestep.expand(4), encoder_attention_mask=mask
            ).sample
        v_caption, v_null = v.chunk(2)
        x = scheduler.step(v_null + 2.0 * (v_caption - v_null), timestep, x).prev_sample
    difference = (sampler.to_pixels(x).int() - summary.pixels.int()).abs()
    assert int(difference.max()) <= 1


def test_guidance_is_the_formula(step: Path) -> None:
    """One Euler step from sigma 1: x_0 = noise - guided velocity, with the null caption."""
    model, record = checkpoint.load_transformer(step), checkpoint.read_record(step)
    null = files.read_tensors(step / checkpoint.NULL_CAPTION)["states"]
    from sana_cli.text import load_encoder, text_config

    states = dict(
        load_encoder(text_config(record.encoder.as_json()), torch.device("cpu")).encode(["seven", ""])
    )
    assert torch.equal(states[""], null)
    noise = sampler.Noise([9], (1, 16, 16))()[0]
    time = torch.tensor([1000.0])
    with torch.no_grad():
        conditional = model(noise[None], states["seven"][None].float(), time)
        unconditional = model(noise[None], null[None].float(), time)

    def one(**settings: Any) -> torch.Tensor:
        chosen = SampleConfig(steps=1, solver="euler").model_copy(update=settings)
        recipe = sampler.Recipe(chosen, (1, 16, 16), "flow_prediction", "fp32")
        return sampler.final_images(sampler.sample_images(model, [states["seven"]], [null], [9], recipe))

    guided = noise - (unconditional + 3.0 * (conditional - unconditional))
    assert torch.allclose(one(guidance_scale=3.0), guided, atol=1e-5)
    assert torch.allclose(one(guidance_scale=1.0), noise - conditional, atol=1e-5)
    assert torch.allclose(one(guidance_scale=0.0), noise - unconditional, atol=1e-5)
    assert torch.allclose(
        one(guidance_scale=3.0, guidance_interval=(0.0, 0.9)), noise - conditional, atol=1e-5
    )


FAULTS = """
import resource
import torch
from sana_cli.config.file import load_config
from sana_cli.model import build
from sana_cli.runtime import device
from sana_cli.sampling import sampler

config = load_config("quickstart")
model = build(config.model.resolved(32, 128))
state = torch.ones(2, 128)
torch.set_num_threads(1)
device.resolve_device("cpu")
recipe = sampler.Recipe(config.sample, (1, 32, 32), config.objective.prediction_type, "fp32")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    sampler.final_images(sampler.sample_images(model, [state] * 64, [state[:1]] * 64, range(64), recipe))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries manage memory differently")
def test_drawing_again_takes_the_memory_that_it_has() -> None:
    """Over 40,000 page faults occur if the C library returns freed memory to the system."""
    answer = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 5000


def test_sampling_halves_its_batches_when_memory_runs_out(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompt = trained(config).checkpoint, "4 two six one nine seven three"
    plain = sampled(folder, prompt)
    forward, sizes = SanaTransformer.forward, []

    def small_device(
        self: SanaTransformer, hidden_states: torch.Tensor, *rest: Any, **more: Any
    ) -> torch.Tensor:
        sizes.append(len(hidden_states))
        if len(hidden_states) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, hidden_states, *rest, **more)

    monkeypatch.setattr(SanaTransformer, "forward", small_device)
    assert torch.equal(sampled(folder, prompt).pixels, plain.pixels)
    assert max(sizes) == 14  # seven images, two branches
    assert sizes[-1] <= 4

    def none_fits(self: SanaTransformer, *_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(SanaTransformer, "forward", none_fits)
    with pytest.raises(SanaError, match="no room on cpu to draw a single image of 1 x 16 x 16"):
        sampled(folder, prompt)
