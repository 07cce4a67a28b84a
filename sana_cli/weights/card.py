"""Model cards: the README.md of a step folder, for whoever finds it. It knows records and opens no file."""

import json

from sana_cli.choices import PredictionType
from sana_cli.config.instructions import DIFFUSERS
from sana_cli.runtime.records import CheckpointRecord

PREDICTS = {"flow_prediction": "noise - data", "sample": "the data (x_0)"}
SAMPLES = "samples.png"  # the grid that a card shows, beside it
ADAPTER_WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers calls the file


def card(
    record: CheckpointRecord,
    predicts: PredictionType,
    trained: str | None = None,
    sampled_at: int | None = None,
    made_of: str | None = None,
) -> str:
    """The card of a checkpoint.

    Args:
        record: of the checkpoint; one with a base is of adapters.
        predicts: what the transformer's output is.
        trained: with which objective, and for how long, in words; None: not on record.
        sampled_at: the step of the grid beside the card; None: there is no grid.
        made_of: what was merged to make it, in words.
    """
    title, tags = f"A SANA of {record.parameters:,} parameters", "sana, flow-matching"
    use = _whole_in_diffusers(predicts) if record.teacher is None else _student_in_diffusers(predicts)
    if record.base is not None:
        title, tags = f"Adapters of {record.base.name}", "sana, flow-matching, lora, text-to-image"
        use = _adapters_in_diffusers(record)
    shown = ""
    if sampled_at is not None:
        shown = (
            f"![Samples at step {sampled_at:,}, by prompt]({SAMPLES})\n\nSampled at step {sampled_at:,}.\n\n"
        )
    learned = f"Trained on {record.dataset.images:,} images of {record.image.in_words}"
    learned += f" with {trained}." if trained else "."
    if record.teacher is not None:
        learned += f" Its teacher is {record.teacher.name}, whose licence holds for it too."
    if made_of is not None:
        learned += f" Merged of {made_of}."
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [{tags}]
---
# {title}

{shown}{learned} Captions are encoded by `{record.encoder.encoder}`; `sana.json` has every setting.
Made by {record.made_by}.

    sana sample --checkpoint . {" ".join(json.dumps(caption) for caption in record.example_captions[:3])}

{use}"""


def _whole_in_diffusers(predicts: PredictionType) -> str:
    return f"""The transformer alone, with diffusers (it predicts {PREDICTS[predicts]}; `timestep = 1000 sigma`):

    from diffusers import SanaTransformer2DModel
    transformer = SanaTransformer2DModel.from_pretrained(".", subfolder="transformer")
"""


def _student_in_diffusers(predicts: PredictionType) -> str:
    if predicts == "sample":
        return """It draws in one to four steps, with the guidance scale as an input. diffusers' SanaSprintPipeline cannot
draw with it: that takes the output for the velocity, and this one is the data.
"""
    return """A Sprint model, which draws in one to four steps. With diffusers (captions encoded as `sana.json` says;
`timestep = sigma`, `guidance = 0.1 guidance_scale`):

    from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
    transformer = SanaTransformer2DModel.from_pretrained(".", subfolder="transformer")
    scheduler = SCMScheduler.from_pretrained(".", subfolder="scheduler")
    pipe = SanaSprintPipeline(None, None, None, transformer, scheduler)
    pipe(prompt_embeds=..., prompt_attention_mask=..., output_type="latent", use_resolution_binning=False)
"""


def _adapters_in_diffusers(record: CheckpointRecord) -> str:
    base, instruction = record.base, record.encoder.as_json().get("instruction")
    assert base is not None
    asks = {None: ", complex_human_instruction=None", DIFFUSERS: ""}.get(
        instruction,
        ", complex_human_instruction=[...]  # that of sana.json",
    )
    caption = json.dumps(record.example_captions[0] if record.example_captions else "")
    return f"""The weights of {base.name} are not in here, and its licence holds for what is made with it. In diffusers,
with that model as a pipeline:

    import torch
    from diffusers import SanaPipeline
    pipe = SanaPipeline.from_pretrained("{base.name}", torch_dtype=torch.bfloat16)
    pipe.load_lora_weights("{ADAPTER_WEIGHTS}")
    pipe({caption}{asks})
"""
