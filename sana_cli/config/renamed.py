"""Keys that had another name: a config that has one is refused with the new name, a record is read by it.

Nothing was released with these names. But checkpoints and runs made before must stay readable.
"""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "model.prediction_type": "objective.prediction_type",
    **{
        f"train.{key}": f"objective.{key}"
        for key in ("caption_dropout", "sigma_density", "logit_mean", "logit_std", "flow_shift", "sigma_floor")
    },
    **{
        f"train.{key}": f"optim.{key}"
        for key in (
            "optimizer", "lr", "schedule", "warmup_steps", "betas", "momentum", "weight_decay", "grad_clip", "ema_decay",
        )
    },
    **{f"train.{key}": f"log.{key}" for key in ("sample_every", "held_out_every", "held_out_images", "tensorboard")},
    "train.log_every": "log.every",
    "train.save_every": "save.every",
    "train.keep": "save.keep",
}  # fmt: skip


def in_new_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of keys, as a record holds them, with each key under its new name.

    A section that is no mapping stays as it is, for validation to refuse; an emptied one (None) is none.
    """
    found: dict[str, Any] = {key: value for key, value in content.items() if not isinstance(value, Mapping)}
    for section, keys in content.items():
        if not isinstance(keys, Mapping):
            continue
        found[section] = found.get(section) or {}
        for key, value in keys.items():
            new_section, _, name = RENAMED.get(f"{section}.{key}", f"{section}.{key}").partition(".")
            if found.get(new_section) is None:
                found[new_section] = {}
            if isinstance(found[new_section], dict):
                found[new_section][name] = value
    return found
