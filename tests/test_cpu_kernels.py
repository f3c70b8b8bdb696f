"""benchmarks/cpu_kernels.py beside torch's own operations."""

import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

sys.path.append(str(ROOT / 'benchmarks'))
import cpu_kernels  # noqa: E402


def results(operation, inputs, weights):
    """The output and the gradients of a weighted sum of it."""
    y = operation(*inputs)
    return y, *torch.autograd.grad((y * weights).sum(), inputs)


def assert_alike(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('size', [(4, 4), (8, 12), (16, 4)])
@pytest.mark.parametrize('kind', [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_are_those_of_torch(kind, size, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(cpu_kernels, 'LEAST_SIZE', 4)
    options = {nn.Conv2d: dict(kernel_size=3), nn.ConvTranspose2d: dict(kernel_size=4, stride=2)}
    conv = kind(64, 5, padding=1, **options[kind])
    x = torch.randn(2, 64, *size, requires_grad=True)
    inputs, weights = [x, *conv.parameters()], torch.randn_like(conv(x))
    expected = results(lambda *_: conv(x), inputs, weights)
    with (
        cpu_kernels.patched(),
        mock.patch.object(cpu_kernels.Conv3x3, 'apply', wraps=cpu_kernels.Conv3x3.apply) as ours,
    ):
        found = results(lambda *_: conv(x), inputs, weights)
    assert ours.call_count == 1
    assert_alike(found, expected)


@pytest.mark.parametrize(
    'conv, size',
    [
        (nn.Conv2d(32, 2, 3, padding=1), 8),
        (nn.Conv2d(64, 2, 3, padding=1), 6),
        (nn.Conv2d(64, 2, 3, padding=1, stride=2), 8),
        (nn.Conv2d(64, 2, 3), 8),
        (nn.ConvTranspose2d(64, 2, 4, stride=2, padding=1), 4),
        (nn.ConvTranspose2d(64, 2, 4, stride=2, padding=1), 10),
        (nn.ConvTranspose2d(64, 2, 3, stride=2, padding=1), 8),
    ],
)
def test_other_convolutions_stay_torchs(conv, size):
    x = torch.randn(1, conv.in_channels, size, size)
    expected = conv(x)
    with cpu_kernels.patched():
        assert torch.equal(conv(x), expected)


def test_dropout_takes_out_its_share():
    x = torch.full((8, 64, 32, 32), 3.0)
    with cpu_kernels.patched():
        y = nn.Dropout(0.1)(x)
        assert torch.equal(nn.Dropout(0.1).eval()(x), x)
    torch.testing.assert_close(y.unique(), torch.tensor([0, 3 / 0.9]))
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert (y == 0).float().mean((0, 2, 3)).max() < 0.13  # no channel more than its share
    assert not torch.equal(y[0], y[1])


def test_attention_is_that_of_torch_with_the_same_mask():
    torch.manual_seed(0)
    inputs = [torch.randn(3, 8, 10, 6, requires_grad=True) for _ in range(3)]  # 24 heads: 16 + 8
    weights, keep = torch.randn(3, 8, 10, 6), torch.rand(3, 8, 10, 10) < 0.9

    def plain(q, k, v):
        return ((q @ k.mT / 6**0.5).softmax(-1) * keep / 0.9) @ v

    expected, without = results(plain, inputs, weights), F.scaled_dot_product_attention(*inputs)
    with (
        cpu_kernels.patched(),
        mock.patch.object(cpu_kernels, 'kept', lambda shape, p: keep.view(shape)),
    ):
        attention = F.scaled_dot_product_attention
        found = results(lambda *qkv: attention(*qkv, dropout_p=0.1), inputs, weights)
        assert torch.equal(attention(*inputs), without)
    assert_alike(found, expected)
    assert F.scaled_dot_product_attention is not cpu_kernels.attention  # torch's again
