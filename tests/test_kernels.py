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


def test_weights_that_lie_end_to_end_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers, x = [nn.Linear(6, rows, bias=False) for rows in (4, 4, 2)], torch.randn(2, 5, 6)
    apart = [layer.weight.clone() for layer in layers]
    kernels.lay_end_to_end(*layers)
    for layer, weight in zip(layers, apart, strict=True):
        assert torch.equal(layer.weight, weight)

    def no_copy(*_: object) -> None:
        raise AssertionError("weights are copied")

    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(torch, "cat", no_copy)
        together = kernels._end_to_end([layer.weight for layer in layers])
    assert torch.equal(together, torch.cat(apart))
    layers[1].weight.data = apart[1] + 1  # another tensor: they no longer lie so
    with torch.no_grad():
        assert torch.equal(
            kernels._end_to_end([layer.weight for layer in layers]),
            torch.cat([apart[0], apart[1] + 1, apart[2]]),
        )
        reverse = kernels._end_to_end([layers[2].weight, layers[0].weight])
        assert torch.equal(reverse, torch.cat([apart[2], apart[0]]))
    kernels.lay_end_to_end(*layers)
    kernels.joined(x, *layers)[0].sum().backward()  # with gradients each keeps its own
    grad = layers[0].weight.grad
    assert grad is not None
    assert torch.allclose(grad, x.sum((0, 1)).expand(4, 6), atol=1e-5)


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
