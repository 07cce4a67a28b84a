"""The average of the weights."""

import torch
from helpers import again, checkpoint_tensors, trained

from sana_cli.config.keys import Config


def test_the_average_follows_the_weights(config: Config) -> None:
    """With a decay of 0 it equals the weights."""
    found = checkpoint_tensors(trained(again(config, "optim.ema_decay=0.0")).checkpoint)
    averages = {name: tensor for name, tensor in found.items() if name.startswith("transformer/")}
    assert averages
    for name, tensor in averages.items():
        assert torch.equal(tensor, found[name.replace("transformer/diffusion_pytorch_model", "training/raw")])
