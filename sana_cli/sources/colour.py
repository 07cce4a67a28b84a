"""Embedded colour profiles, converted to sRGB, which most programs assume. It knows no file."""

import hashlib
import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from sana_cli.sources.containers import MAX_PROFILE_BYTES
from sana_cli.sources.entry import BadImage

_MAX_PROFILES = 32  # transforms that a process caches
Transform = np.ndarray | ImageCms.ImageCmsTransform | None
_transforms: dict[tuple[bytes, str], Transform] = {}


def to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """Convert to sRGB, as RGB or L; alpha stays. Unchanged without a usable profile."""
    mode = {"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode)
    change = srgb_transform(profile, mode)
    if change is None:
        return image
    colours = image if image.mode == mode else image.convert(mode)
    changed = colours.point(change.tolist()) if isinstance(change, np.ndarray) else change.apply(colours)
    if image.mode != mode:
        changed.putalpha(image.getchannel("A"))
    return changed


def srgb_transform(profile: Any, mode: str) -> Transform:
    """What converts colours to sRGB: for L a curve (256,) uint8, for others a transform.

    None if the colours are already sRGB, or the profile is unreadable or for other colours.
    """
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE_BYTES:
        return None
    key = hashlib.sha256(profile).digest(), mode
    if key in _transforms:
        return _transforms[key]
    if len(_transforms) >= _MAX_PROFILES:
        _transforms.pop(next(iter(_transforms)))
    transform = _transforms[key] = _build_transform(profile, mode)
    return transform


def _build_transform(profile: bytes, mode: str) -> Transform:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # exact, not fast, for a ramp: LittleCMS's optimised tables are coarse in dark greys
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
        levels = np.arange(256, dtype=np.uint8)
        if mode == "L":
            curve = np.asarray(transform.apply(Image.fromarray(levels[None])).convert("L"))[0].copy()
            return None if abs(curve.astype(int) - levels).max() <= 1 else curve
        if mode == "RGB":  # most profiles are sRGB itself: pixels stay as they are
            some = np.stack(np.meshgrid(*[levels[::15]] * 3), axis=-1).reshape(-1, 3)
            probe = np.concatenate([some, np.stack([levels] * 3, axis=-1)])[None]
            changed = np.asarray(transform.apply(Image.fromarray(probe)))
            return None if abs(changed.astype(int) - probe).max() <= 1 else transform
    except ImportError as error:
        reason = "it has a colour profile, and this build of Pillow has no LittleCMS: install Pillow's wheel"
        raise BadImage(reason) from error
    except Exception:  # not a profile, or one for another mode
        return None
    return transform
