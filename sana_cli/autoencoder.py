"""DC-AE (arXiv 2410.10733): images to latents and back, through diffusers (the `latent` extra).

Latents are multiplied by the autoencoder's `scaling_factor`, as the transformer sees them.

Shapes: B images, C latent channels, h w of a latent, f the factor from latent to image size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_cli import kernels
from sana_cli.errors import SanaError
from sana_cli.runtime import files, hub
from sana_cli.runtime.device import frozen_dtype

PIXELS_AT_ONCE = 1024 * 1024  # per batch: activations take far more memory than the weights
TILED = 2048  # a longer side is decoded in tiles, as for the published 4K models
TILE, STRIDE = 1024, 896
MAX_BLOCKS = 10  # a factor of 512


@dataclass(frozen=True)
class AutoencoderInfo:
    """What the config of an autoencoder says."""

    source: str  # id or path
    latent_channels: int
    factor: int


def _folder(source: str) -> Path | None:
    """The folder of a local autoencoder or pipeline; None for a Hugging Face id."""
    path = hub.local_folder(source, "autoencoder")
    return path / "vae" if path is not None and (path / "vae").is_dir() else path


def read_info(source: str) -> AutoencoderInfo:
    """Read channels and factor of the autoencoder at an id or a path.

    Raises:
        SanaError: it is missing, cannot be downloaded, or is not a DC-AE.
    """
    folder = _folder(source)
    if folder is not None:
        config = files.read_json(folder / "config.json")
    else:
        load = _diffusers().load_config
        config = hub.load("autoencoder", source, lambda local: load(source, local_files_only=local))
    if config.get("_class_name") != "AutoencoderDC":
        raise SanaError(f"autoencoder: {source} is a {config.get('_class_name')}, not an AutoencoderDC")
    names = ("latent_channels", "encoder_block_out_channels", "scaling_factor")
    channels, blocks, scale = (config.get(name) for name in names)
    if not (
        isinstance(channels, int)
        and channels > 0
        and isinstance(blocks, list)
        and 0 < len(blocks) <= MAX_BLOCKS
        and isinstance(scale, int | float)
        and 0 < scale < math.inf
    ):
        raise SanaError(
            f"autoencoder: the config of {source} has no usable {', '.join(names[:2])} and {names[2]}"
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
        """Load an autoencoder in `dtype`; None: `frozen_dtype`.

        Raises:
            SanaError: diffusers is not installed, or the autoencoder cannot be loaded.
        """
        loader, folder = _diffusers(), _folder(source)
        dtype = dtype or frozen_dtype(device)
        self.source = source

        def load(local_files_only: bool) -> Any:
            model, info = loader.from_pretrained(
                source if folder is None else str(folder),
                torch_dtype=dtype,
                local_files_only=local_files_only,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
            hub.check_complete("autoencoder", source, info)
            return model

        self.model = hub.load("autoencoder", source, load, is_local=folder is not None)
        kernels.quick_products(self.model.requires_grad_(False).eval().to(device))
        self.device, self.dtype = device, dtype
        self.scale = float(self.model.config.scaling_factor)
        self.factor = int(self.model.spatial_compression_ratio)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Identify the weights and settings: equal fingerprints give equal latents."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"weights": hub.hash_weights(self.model), "dtype": dtype, "scale": self.scale}

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, f h, f w) in [-1, 1] to latents (B, C, h, w), bf16 on CPU."""
        height, width = images.shape[-2:]
        batches = images.split(max(1, PIXELS_AT_ONCE // (height * width)))
        inputs = (batch.to(self.device, self.dtype) for batch in batches)
        latents = (self.model.encode(batch, return_dict=False)[0] for batch in inputs)
        return torch.cat([(latent.float() * self.scale).to("cpu", torch.bfloat16) for latent in latents])

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode scaled latents (B, C, h, w), yielding batches of images.

        Images are (b, 3, f h, f w) in about [-1, 1], float32 on the CPU.

        Raises:
            SanaError: an image is not finite.
        """
        height, width = (side * self.factor for side in latents.shape[-2:])
        if max(height, width) > TILED:
            self.model.enable_tiling(TILE, TILE, STRIDE, STRIDE)
        for batch in latents.split(max(1, PIXELS_AT_ONCE // (height * width))):
            unscaled = batch.to(self.device, self.dtype) / self.scale
            images = self.model.decode(unscaled, return_dict=False)[0].float().cpu()
            if not images.isfinite().all():
                raise SanaError(f"the autoencoder {self.source} decodes to images that are not finite")
            yield images
