"""Faster forms of operations against the plain ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sana_cli import kernels


def test_the_gradient_of_the_gate() -> None:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(3, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(kernels.gated_silu, (both,))
    x, gate = both.detach().chunk(2, dim=-1)
    assert torch.allclose(kernels.gated_silu(both), x * gate * gate.sigmoid())


@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_are_each_layer(bias: bool) -> None:
    torch.manual_seed(0)
    layers, x = [nn.Linear(6, 4, bias=bias) for _ in range(3)], torch.randn(2, 5, 6)
    for found, layer in zip(kernels.joined(x, *layers), layers, strict=True):
        assert torch.allclose(found, layer(x), atol=1e-6)


def test_a_pointwise_convolution_of_tokens_is_that_of_the_grid() -> None:
    torch.manual_seed(0)
    convolution, x = nn.Conv2d(6, 4, 1), torch.randn(2, 12, 6)
    grid = x.transpose(1, 2).unflatten(2, (3, 4))
    expected = convolution(grid).flatten(2).transpose(1, 2)
    assert torch.allclose(kernels.pointwise(convolution, x), expected, atol=1e-6)


def test_attention_is_softmax_attention() -> None:
    q, k, v = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (7, 5, 5))
    bias = torch.zeros(2, 1, 1, 5)
    bias[1, ..., 3:] = -10000
    for mask in (None, bias):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.allclose(kernels.attention(q, k, v, mask), expected, atol=1e-6)
