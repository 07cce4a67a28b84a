"""Prompts to caption states, as the transformer of a pipeline takes them. It knows no picture and no file."""

import torch
from torch import Tensor

from sana_cli.errors import SanaError
from sana_cli.runtime.device import has_native_bf16
from sana_cli.sampling.pipeline import Pipeline
from sana_cli.text import (
    CaptionEncoder,
    check_same_encoder,
    load_encoder,
    unseen_words,
)

MOST_WORDS = 8  # that a note names


def load_pipeline_encoder(
    pipeline: Pipeline, device: torch.device, precision: str = "fp32"
) -> CaptionEncoder:
    """The caption encoder that a pipeline's transformer was trained with.

    One that is not on record is loaded in bf16 where the transformer is and the device computes in it, as on a GPU.

    Raises:
        SanaError: it is not on record, cannot be loaded, or is another one.
    """
    if pipeline.text is None:
        raise SanaError(
            f"{pipeline.place} takes caption states {pipeline.model.caption_channels} wide, "
            "and whose they are is not on record",
            "say which encoder made them with `encoder` PATH (or tiny, or a Hugging Face id)",
        )
    text = pipeline.text
    if (
        pipeline.fingerprint is None
        and text.dtype == "auto"
        and precision == "bf16"
        and has_native_bf16(device)
    ):
        text = text.model_copy(update={"dtype": "bf16"})
    try:
        encoder = load_encoder(text, device)
    except SanaError as error:
        way = "was trained with" if pipeline.kind == "checkpoint" else "takes"
        raise SanaError(
            str(error),
            f"prompts are encoded by what {pipeline.place.name} {way}; `encoder` PATH says where that lies",
        ) from error
    if pipeline.fingerprint is not None:
        check_same_encoder(
            pipeline.fingerprint,
            encoder.fingerprint,
            str(pipeline.place),
            "`encoder` PATH must be the model that the checkpoint was trained with"
            if pipeline.text.encoder != "tiny"
            else "the tiny encoder has changed since: embed and train again",
        )
    if encoder.dim != pipeline.model.caption_channels:
        raise SanaError(
            f"the encoder {pipeline.text.encoder} gives states {encoder.dim} wide; {pipeline.place} takes "
            f"{pipeline.model.caption_channels}",
            "give its own with `encoder` PATH",
        )
    return encoder


def prompt_states(
    pipeline: Pipeline, encoder: CaptionEncoder, prompts: list[str], negative: str | None
) -> tuple[list[Tensor], list[Tensor]]:
    """States of each prompt, and of the null caption or the negative prompt beside it."""
    # ours are trained on bf16 states; others on whatever their encoder gave
    dtype = torch.bfloat16 if pipeline.kind == "checkpoint" else torch.float32
    states = dict(encoder.encode(prompts, dtype))
    captions = [states[prompt] for prompt in prompts]
    if pipeline.model.guidance_embeds:  # no null branch
        return captions, captions
    if negative or pipeline.null_caption is None:
        ((_, null),) = encoder.encode([negative or ""], dtype, instruct=False)
    else:
        null = pipeline.null_caption
        if pipeline.null_follows_prompt:
            return captions, [null[: len(caption)] for caption in captions]
    return captions, [null] * len(captions)


def prompt_notes(
    pipeline: Pipeline, encoder: CaptionEncoder, prompts: list[str], negative: str | None
) -> tuple[str, ...]:
    """Reasons why a picture may show something else than its prompt."""
    notes = []
    cut = [prompt for prompt in dict.fromkeys(prompts) if encoder.is_cut(prompt)]
    cut += [negative] if negative and encoder.is_cut(negative, instruct=False) else []
    if cut:
        notes.append(
            f"{len(cut)} of the prompts are longer than text.max_length, {encoder.text.max_length} tokens, "
            f"and were cut there: {cut[0]!r:.60}"
        )
    unseen = unseen_words([*prompts, *([negative] if negative else [])], pipeline.words)
    if unseen:
        more = f" and {len(unseen) - MOST_WORDS} more" if len(unseen) > MOST_WORDS else ""
        notes.append(
            f"words that this checkpoint was never trained on: {' '.join(unseen[:MOST_WORDS])}{more}"
        )
    return tuple(notes)
