"""Embedded colour profiles, to sRGB, which is what everyone takes the numbers for. It knows no file."""

import hashlib
import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from sana_cli.sources.containers import MAX_PROFILE_BYTES
from sana_cli.sources.entry import BadImage

_MOST_PROFILES = 32  # whose transforms a process keeps
Change = np.ndarray | ImageCms.ImageCmsTransform | None
_changes: dict[tuple[bytes, str], Change] = {}


def in_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """The same colours in sRGB, as RGB or L; alpha stays. Without a profile that fits, it is as it was."""
    mode = {"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode)
    change = to_srgb(profile, mode)
    if change is None:
        return image
    colours = image if image.mode == mode else image.convert(mode)
    changed = colours.point(change.tolist()) if isinstance(change, np.ndarray) else change.apply(colours)
    if image.mode != mode:
        changed.putalpha(image.getchannel("A"))
    return changed


def to_srgb(profile: Any, mode: str) -> Change:
    """What brings colours to sRGB: for L a curve, (256,) uint8; for others a transform. None where nothing is to be done.

    A profile that cannot be read, or is for other kinds of colours, is as if not there.
    """
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE_BYTES:
        return None
    known = hashlib.sha256(profile).digest(), mode
    if known in _changes:
        return _changes[known]
    if len(_changes) >= _MOST_PROFILES:
        _changes.pop(next(iter(_changes)))
    change = _changes[known] = _build_change(profile, mode)
    return change


def _build_change(profile: bytes, mode: str) -> Change:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # for one ramp, slowly and exactly: what LittleCMS prepares for speed is coarse where greys are dark
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
        levels = np.arange(256, dtype=np.uint8)
        if mode == "L":
            curve = np.asarray(transform.apply(Image.fromarray(levels[None])).convert("L"))[0].copy()
            return None if abs(curve.astype(int) - levels).max() <= 1 else curve
        if mode == "RGB":  # its own colours, as most profiles have it: pixels stay as they are
            some = np.stack(np.meshgrid(*[levels[::15]] * 3), axis=-1).reshape(-1, 3)
            probe = np.concatenate([some, np.stack([levels] * 3, axis=-1)])[None]
            changed = np.asarray(transform.apply(Image.fromarray(probe)))
            return None if abs(changed.astype(int) - probe).max() <= 1 else transform
    except ImportError as error:
        raise BadImage("it has a colour profile, and this build of Pillow has no LittleCMS: install Pillow's wheel") from error
    except Exception:  # it is none, or for another kind of colours than the mode's
        return None
    return transform
