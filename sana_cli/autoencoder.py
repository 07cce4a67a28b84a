"""DC-AE (arXiv 2410.10733): images to latents and back. It comes from diffusers, in the `latent` extra, which only this knows.

The transformer sees latents times the autoencoder's `scaling_factor`; here they go in and come out scaled so.

Shapes: B images, C latent channels, h w of a latent, f the factor by which it is smaller than its image.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_cli.errors import SanaError
from sana_cli.runtime import files, hub

PIXELS_AT_ONCE = 1024 * 1024  # decoded in one go; the decoder's activations take far more room than its weights
TILE, STRIDE = 1024, 896  # of images larger than TILED, as for the published 4K models
TILED = 2048
MOST_BLOCKS = 10  # a factor of 512


@dataclass(frozen=True)
class AutoencoderInfo:
    """What can be known of an autoencoder without its weights."""

    source: str  # id or path
    latent_channels: int
    factor: int


def _folder(source: str) -> Path | None:
    """The local folder of an autoencoder, alone or in a diffusers pipeline; None for a Hugging Face id."""
    path = hub.local_folder(source, "autoencoder")
    return path / "vae" if path is not None and (path / "vae").is_dir() else path


def read_info(source: str) -> AutoencoderInfo:
    """Channels and factor of the autoencoder at an id or a path.

    Raises:
        SanaError: there is none, or it is no DC-AE; or an id that cannot be had.
    """
    folder = _folder(source)
    if folder is not None:
        config = files.read_json(folder / "config.json")
    else:
        config = hub.load("autoencoder", source, lambda local: _diffusers().load_config(source, local_files_only=local))
    if config.get("_class_name") != "AutoencoderDC":
        raise SanaError(f"autoencoder: {source} is a {config.get('_class_name')}, not an AutoencoderDC")
    channels, blocks, scale = (config.get(key) for key in ("latent_channels", "encoder_block_out_channels", "scaling_factor"))
    if not (
        isinstance(channels, int)
        and channels > 0
        and isinstance(blocks, list)
        and 0 < len(blocks) <= MOST_BLOCKS
        and isinstance(scale, int | float)
        and 0 < scale < math.inf
    ):
        raise SanaError(
            f"autoencoder: the config of {source} has no usable latent_channels, encoder_block_out_channels and scaling_factor"
        )
    return AutoencoderInfo(source, channels, 2 ** (len(blocks) - 1))


def _diffusers() -> Any:
    try:
        from diffusers import AutoencoderDC
    except ImportError as error:
        raise SanaError(
            "latents are encoded and decoded by diffusers, which is not installed",
            "install it with: pip install 'sana-cli[latent]'",
        ) from error
    return AutoencoderDC


class Autoencoder:
    """A DC-AE on a device."""

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Load it, in `dtype`; None: float32 on a CPU, bf16 elsewhere.

        Raises:
            SanaError: diffusers is not installed, or the autoencoder cannot be had.
        """
        loader, folder = _diffusers(), _folder(source)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        self.source = source

        def load(local_files_only: bool) -> Any:
            place = source if folder is None else str(folder)
            model, info = loader.from_pretrained(
                place,
                torch_dtype=dtype,
                local_files_only=local_files_only,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
            hub.check_whole("autoencoder", source, info)
            return model

        self.model = hub.load("autoencoder", source, load, is_local=folder is not None)
        self.model.requires_grad_(False).eval().to(device)
        self.device, self.dtype = device, dtype
        self.scale = float(self.model.config.scaling_factor)
        self.factor = int(self.model.spatial_compression_ratio)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells whether two would give the same latents."""
        return {"weights": hub.hash_weights(self.model), "dtype": str(self.dtype).removeprefix("torch."), "scale": self.scale}

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) in bf16 on the CPU, scaled, of images (B, 3, f h, f w) in [-1, 1]."""
        height, width = images.shape[-2:]
        some = images.split(max(1, PIXELS_AT_ONCE // (height * width)))
        latents = (self.model.encode(part.to(self.device, self.dtype), return_dict=False)[0] for part in some)
        return torch.cat([(part.float() * self.scale).to("cpu", torch.bfloat16) for part in latents])

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Images (b, 3, f h, f w) in about [-1, 1], float32 on the CPU, a few at a time, from latents (B, C, h, w).

        Raises:
            SanaError: one is not finite.
        """
        height, width = (side * self.factor for side in latents.shape[-2:])
        if max(height, width) > TILED:
            self.model.enable_tiling(TILE, TILE, STRIDE, STRIDE)
        for some in latents.split(max(1, PIXELS_AT_ONCE // (height * width))):
            scaled = some.to(self.device, self.dtype) / self.scale
            images = self.model.decode(scaled, return_dict=False)[0].float().cpu()
            if not images.isfinite().all():
                raise SanaError(f"the autoencoder {self.source} decodes to images that are not finite")
            yield images
