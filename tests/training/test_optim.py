"""Schedules and parameter groups of the optimizer."""

import pytest
import torch
from helpers import again

from sana_cli.config.keys import Config, OptimConfig
from sana_cli.model import build
from sana_cli.training import optim


def test_schedules() -> None:
    settings = OptimConfig(warmup_steps=10, schedule="cosine", ema_decay=0.998)
    factors = [optim.lr_factor(settings, step, 110) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[-1] < 0.001
    linear = settings.model_copy(update={"schedule": "linear"})
    assert optim.lr_factor(linear, 60, 110) == pytest.approx(0.5)
    assert optim.lr_factor(settings.model_copy(update={"schedule": "constant"}), 109, 110) == 1
    assert [optim.average_decay(0.998, step) for step in (0, 8, 10**6)] == pytest.approx([0.1, 0.5, 0.998])


def test_weight_decay_spares_biases_norms_and_tables(config: Config) -> None:
    model = build(config.model.resolved(16, 8))
    for kind in ("adamw", "muon"):
        settings = again(config, f"optim.optimizer={kind}").optim
        made = optim.Optimizer(dict(model.named_parameters()), settings, torch.device("cpu"))
        groups = []
        for group in made.param_groups:
            parameters = group["params"]
            assert isinstance(parameters, list)
            groups.append({made.names[p] for p in parameters})
        assert [group["weight_decay"] for group in made.param_groups] == [0.05, 0.0, 0.05][: len(groups)]
        assert {
            n for n in made.names.values() if n.endswith(("bias", "scale_shift_table", "norm.weight"))
        } == groups[1]
        assert set().union(*groups) == {name for name, _ in model.named_parameters()}
        if kind == "muon":
            attentions = [
                f"{attn}.{part}"
                for attn in ("attn1", "attn2")
                for part in ("to_q", "to_k", "to_v", "to_out.0")
            ]
            parts = (*attentions, "ff.conv_inverted", "ff.conv_point")
            assert groups[2] == {f"transformer_blocks.0.{part}.weight" for part in parts}
