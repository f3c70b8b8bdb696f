"""benchmarks/winograd.py beside torch's own convolution."""

import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT
from torch import nn

sys.path.append(str(ROOT / 'benchmarks'))
import winograd  # noqa: E402


def results(conv, x, weights_of_loss):
    """The output and the gradients of a weighted sum of it."""
    x = x.clone().requires_grad_()
    y = conv(x)
    return y, *torch.autograd.grad((y * weights_of_loss).sum(), [x, *conv.parameters()])


@pytest.mark.parametrize('size', [(4, 4), (8, 12), (16, 4)])
def test_output_and_gradients_are_those_of_torch(size):
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 5, 3, padding=1)
    x, weights = torch.randn(2, 128, *size), torch.randn(2, 5, *size)
    expected = results(conv, x, weights)
    with (
        mock.patch.object(nn.Conv2d, '_conv_forward', winograd.conv_forward),
        mock.patch.object(winograd.Conv3x3, 'apply', wraps=winograd.Conv3x3.apply) as ours,
    ):
        found = results(conv, x, weights)
    assert ours.call_count == 1
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'channels, options, size',
    [
        (64, dict(padding=1), 8),
        (128, dict(padding=1), 6),
        (128, dict(padding=1, stride=2), 8),
        (128, dict(), 8),
    ],
)
def test_other_convolutions_stay_torchs(channels, options, size):
    conv, x = nn.Conv2d(channels, 2, 3, **options), torch.randn(1, channels, size, size)
    expected = conv(x)
    with mock.patch.object(nn.Conv2d, '_conv_forward', winograd.conv_forward):
        assert torch.equal(conv(x), expected)
