"""Faster forms of operations against the plain ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sana_cli import kernels
from sana_cli.runtime import device


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


# --- products by oneDNN -----------------------------------------------------------------------------------------------


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """As on a processor that MKL holds back; the shapes of the products that oneDNN then makes."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs oneDNN")
    made: list[torch.Size] = []
    product = kernels._Product.forward

    def counted(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        made.append(torch.Size((*a.shape, len(b))))
        return product(a, b, bias)

    monkeypatch.setattr(kernels._Product, "forward", staticmethod(counted))
    monkeypatch.setattr(kernels, "mkl_keeps_to_avx2", lambda: True)
    monkeypatch.setattr(kernels, "LEAST", 0)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 33), (2, 3, 4, 16)])
def test_a_product_by_onednn_and_its_gradients(
    by_onednn: list[torch.Size], bias: bool, shape: tuple[int, ...]
) -> None:
    """As exact as float32 is, against float64."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape), torch.randn(24, shape[-1]), *([torch.randn(24)] if bias else [])]
    grad = torch.randn(*shape[:-1], 24)

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        given = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        out = kernels.linear(*given)
        return [out, *torch.autograd.grad(out, given, grad.to(dtype))]

    found, expected = results(torch.float32), results(torch.float64)
    assert len(by_onednn) == 3, "float64 is not for it"
    for one, two in zip(found, expected, strict=True):
        assert one.shape == two.shape
        assert float((one.double() - two).norm().detach() / two.norm().detach()) < 1e-6


def test_a_product_by_onednn_makes_the_gradients_that_are_asked_for(by_onednn: list[torch.Size]) -> None:
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    kernels.linear(x, weight.clone().requires_grad_()).sum().backward()
    assert by_onednn == [(8, 16, 4), (4, 8, 16)]
    by_onednn.clear()
    kernels.linear(x.clone().requires_grad_(), weight).sum().backward()
    assert by_onednn == [(8, 16, 4), (8, 4, 16)]


def test_further_derivatives_of_a_product_by_onednn(by_onednn: list[torch.Size]) -> None:
    """Of the second order, and forward."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 8), torch.randn(5, 8), torch.randn(5)
    along = (torch.randn(6, 8), torch.randn(5, 8), torch.randn(5))
    found = []
    for product in (kernels.linear, F.linear):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        first = torch.autograd.grad(product(a, b, bias).pow(3).sum(), (a, b), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (a, b))
        tangents = torch.func.jvp(product, (x, weight, bias), along)
        of_x_alone = torch.func.jvp(lambda x, product=product: product(x, weight, bias), (x,), along[:1])
        found.append([tensor.detach() for tensor in (*first, *second, *tangents, *of_x_alone)])
    assert by_onednn
    for one, two in zip(*found, strict=True):
        assert float((one - two).norm() / two.norm()) < 1e-5


def test_other_products_are_left_to_pytorch(
    by_onednn: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    kernels.linear(x.bfloat16(), weight.bfloat16())
    kernels.linear(x[0], weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.linear(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(kernels, "LEAST", 4 * 8 * 3 + 1)
    kernels.linear(x, weight)
    monkeypatch.setattr(kernels, "LEAST", 4 * 8 * 3)
    monkeypatch.setattr(kernels, "mkl_keeps_to_avx2", lambda: False)
    kernels.linear(x, weight)
    assert not by_onednn
    monkeypatch.setattr(kernels, "mkl_keeps_to_avx2", lambda: True)
    assert torch.allclose(kernels.linear(x, weight), F.linear(x, weight), atol=1e-6)
    assert len(by_onednn) == 1


def test_layers_of_other_libraries_multiply_as_ours_do(by_onednn: list[torch.Size]) -> None:
    """But for one that is more than its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))
    hooked = nn.Linear(4, 2)
    hooked.register_forward_hook(lambda _layer, _given, out: out + 1)
    model.append(hooked)
    x, names = torch.randn(5, 8), list(model.state_dict())
    expected = model(x)
    kernels.quick_products(model)
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert by_onednn == [(5, 8, 6), (5, 6, 4)]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("name", "avx512", "held_back"),
    [
        ("AMD EPYC", True, True),
        ("AMD EPYC", False, False),
        ("Intel(R) Xeon(R)", True, False),
        ("", True, False),
    ],
)
def test_mkl_keeps_to_avx2_on_processors_of_amd(
    monkeypatch: pytest.MonkeyPatch, name: str, avx512: bool, held_back: bool
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs oneDNN")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name, "avx512_f": avx512})
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert device.mkl_keeps_to_avx2.__wrapped__() == held_back
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not device.mkl_keeps_to_avx2.__wrapped__()


# --- the rest ---------------------------------------------------------------------------------------------------------


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
