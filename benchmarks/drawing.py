"""Time a picture of 512 x 512 by the published 0.6B: what `sana sample` runs, and diffusers' `SanaPipeline`.

Both load the same folder, of the published shapes with random weights in bf16: Gemma 2 2B, the 0.6B transformer
and the DC-AE, 7 GB. Both draw twenty guided steps of the same prompt, each in a process of its own, by default one
model after another in memory here, and all three there. The parts are captions, steps, decoding with writing the
file, and what is left: imports, reading and freeing models.

    python benchmarks/drawing.py [--folder DIR] [--rounds 2] [--dtype bf16] [--steps 20] [--small]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PROMPT = (
    "A photo of a small red lighthouse on a rock, waves around it, under a sky with a few long clouds at dusk"
)
WIDTHS, LAYERS = (128, 256, 512, 512, 1024, 1024), (3, 3, 3, 3, 3, 3)  # of the DC-AE f32c32 of SANA 1.1
BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
SCALES = ((),) * 3 + ((5,),) * 3
THEIRS = """
import json, sys, time
begin = time.perf_counter()
import torch
from diffusers import SanaPipeline
folder, prompt, dtype, steps, side, out = sys.argv[1:]
pipe = SanaPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
pipe.set_progress_bar_config(disable=True)
times = [time.perf_counter()]
def step(*_): times.append(time.perf_counter()); return {}
image = pipe(prompt, num_inference_steps=int(steps), height=int(side), width=int(side),
             use_resolution_binning=False, callback_on_step_end=step).images[0]
image.save(out)
end = time.perf_counter()
each = (times[-1] - times[1]) / (len(times) - 2)
print(json.dumps({"load": times[0] - begin, "captions": times[1] - each - times[0], "steps": each * int(steps),
                  "decode": end - times[-1]}))
"""


OURS = """
import json, os, sys, time
begin = time.perf_counter()
from pathlib import Path
from sana_cli.runtime import openmp
openmp.ask_for_short_waits(os.environ)  # as the command does
from sana_cli.commands.sample import SampleOptions, SampleStep, sample
folder, prompt, precision, steps, side, out = sys.argv[1:]
parts = {"load": 0.0, "encode": 0.0, "draw": 0.0, "decode": 0.0}
def part(name):
    global begin
    now = time.perf_counter()
    parts[name] += now - begin
    begin = now
stage = "load"
def report(what, model):
    part("load" if what == "load" else stage)
options = SampleOptions((prompt,), checkpoint=Path(folder), precision=precision, steps=int(steps), height=int(side),
                        width=int(side), out=Path(out), report=report)
for event in sample(options):
    if isinstance(event, SampleStep):
        part("load" if event.done == 0 else event.stage)
        stage = "load" if event.done == event.total else event.stage
part("decode")
print(json.dumps({"load": parts["load"], "captions": parts["encode"], "steps": parts["draw"],
                  "decode": parts["decode"]}))
"""


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """A model of the meta device with small random weights in bf16."""
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():  # buffers are made anew when it is loaded
        parameter.data.uniform_(-0.02, 0.02)
    return model.eval()


def make_pipeline(folder: Path, small: bool) -> None:
    """A random `SanaPipeline` of the published shapes, or of two layers each."""
    import diffusers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    from sana_cli.config.file import load_config
    from sana_cli.weights.configs import diffusers_config

    torch.manual_seed(0)
    words = sorted({*PROMPT.split(), "a", "the", "prompt"})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    architecture = load_config("sana-0.6b").model.resolved(32, 2304)
    layers = 2 if small else None
    if small:
        architecture = architecture.model_copy(update={"num_layers": 2})
    vae: dict[str, Any] = {"latent_channels": 32, "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
    widths, each = (tuple(w // 8 for w in WIDTHS), (1,) * 6) if small else (WIDTHS, LAYERS)
    for side in ("encoder", "decoder"):
        vae |= {
            f"{side}_block_types": BLOCKS, f"{side}_block_out_channels": widths,
            f"{side}_layers_per_block": each, f"{side}_qkv_multiscales": SCALES,
        }  # fmt: skip
    with torch.device("meta"):
        gemma = Gemma2Model(Gemma2Config(**({} if layers is None else {"num_hidden_layers": layers})))
        transformer = diffusers.SanaTransformer2DModel.from_config(diffusers_config(architecture))
    if small:
        vae["attention_head_dim"] = 4
    flow = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    diffusers.SanaPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        text_encoder=drawn(gemma),
        vae=diffusers.AutoencoderDC(**vae, upsample_block_type="interpolate").to(torch.bfloat16).eval(),
        transformer=drawn(transformer),
        scheduler=flow,
    ).save_pretrained(folder)


def timed(code: str, dtype: str, folder: Path, options: argparse.Namespace, out: Path) -> dict[str, float]:
    """Seconds of a process, of its parts, and of all of them but loading."""
    given = [str(folder), PROMPT, dtype, str(options.steps), str(options.side), str(out)]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    parts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    drawing = sum(parts[name] for name in ("captions", "steps", "decode"))
    return {"all": time.perf_counter() - begin, "without loading": drawing} | parts


def main() -> None:
    """Measure in turns and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="of the random pipeline, made if it is not there")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--small", action="store_true", help="two layers, to try this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as there:
        folder = options.folder or Path(there) / "pipeline"
        if not (folder / "model_index.json").is_file():
            make_pipeline(folder, options.small)
        print(
            f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads"
        )
        found: dict[str, list[dict[str, float]]] = {"sana": [], "diffusers": []}
        for number in range(options.rounds):
            for name, code, dtype in (
                ("sana", OURS, options.dtype),
                ("diffusers", THEIRS, {"bf16": "bfloat16", "fp32": "float32"}[options.dtype]),
            ):
                out = Path(there) / f"{name}-{number}.png"
                found[name].append(timed(code, dtype, folder, options, out))
                shown = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in found[name][-1].items())
                print(f"{name:9} {shown}", flush=True)
        for part in ("all", "without loading", "steps"):
            ratios = [b[part] / a[part] for a, b in zip(*found.values(), strict=True)]
            spread = f"rounds: {min(ratios):.2f} to {max(ratios):.2f}"
            print(f"diffusers takes {statistics.median(ratios):.2f} times as long ({spread}): {part}")


if __name__ == "__main__":
    main()
