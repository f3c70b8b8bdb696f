"""The UNET against the article's facts and against a second way of computing it."""

import inspect
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, small_unet

import ddpm


def test_parameters_keys_and_their_order():
    model = ddpm.UNET()
    assert sum(p.numel() for p in model.parameters()) == 35_178_689
    keys = list(model.state_dict())
    block = ['gnorm1', 'gnorm2', 'conv1', 'conv2']
    parts = ['shallow_conv', 'late_conv', 'output_conv']
    for i in range(1, 7):
        parts += [f'Layer{i}.ResBlock{j}.{name}' for j in (1, 2) for name in block]
        parts += [f'Layer{i}.conv']
        parts += [f'Layer{i}.attention_layer.proj{j}' for j in (1, 2) if i in (2, 6)]
    assert keys == [f'{part}.{kind}' for part in parts for kind in ('weight', 'bias')]
    assert [name for name, _ in model.named_parameters()] == keys
    for module in (model, ddpm.DDPM_Scheduler()):  # tables are no part of a checkpoint
        assert dict(module.named_buffers())
        assert not dict(module.named_buffers()).keys() & module.state_dict().keys()


TRAIN = dict(batch_size=64, num_time_steps=1000, num_epochs=15, seed=-1, ema_decay=0.9999)
UNET = dict(
    Channels=[64, 128, 256, 512, 512, 384],
    Attentions=[False, True, False, False, False, True],
    Upscales=[False, False, False, True, True, True],
    **dict(num_groups=32, dropout_prob=0.1, num_heads=8),
    **dict(input_channels=1, output_channels=1, time_steps=1000),
)


@pytest.mark.parametrize(
    'function, arguments',
    [
        (ddpm.train, dict(**TRAIN, lr=2e-5, checkpoint_path=None)),
        # num_time_steps is 1000 in the article; here the checkpoint has the word
        (ddpm.inference, dict(checkpoint_path=None, num_time_steps=None, ema_decay=0.9999)),
        (ddpm.set_seed, dict(seed=42)),
        (ddpm.DDPM_Scheduler, dict(num_time_steps=1000)),
        (ddpm.UNET, UNET),
    ],
)
def test_signatures_begin_as_in_the_article(function, arguments):
    parameters = list(inspect.signature(function).parameters.values())[: len(arguments)]
    assert [(p.name, p.default) for p in parameters] == list(arguments.items())


def embeddings(t, width):
    """Sines in the even columns and cosines in the odd ones, in float64."""
    angle = t.double()[:, None] * 10000 ** (-2 * torch.arange(width // 2).double() / width)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (B, width)


def functional_unet(weights, x, t, attentions, num_groups, num_heads, embed_dim):
    """The forward pass from the state_dict alone: loops and sums instead of modules."""
    table = embeddings(t, embed_dim).float()

    def conv(name, x, **kwargs):
        return F.conv2d(x, weights[name + '.weight'], weights[name + '.bias'], **kwargs)

    def group_norm(name, x):
        grouped = x.reshape(len(x), num_groups, -1)
        mean = grouped.mean(-1, keepdim=True)
        variance = grouped.var(-1, unbiased=False, keepdim=True)
        x = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
        scale, shift = weights[name + '.weight'], weights[name + '.bias']
        return x * scale[:, None, None] + shift[:, None, None]

    def res_block(name, x):
        x = x + table[:, : x.shape[1], None, None]
        r = conv(f'{name}.conv1', group_norm(f'{name}.gnorm1', x).relu(), padding=1)
        return conv(f'{name}.conv2', group_norm(f'{name}.gnorm2', r).relu(), padding=1) + x

    def attention(name, x):
        B, C, H, W = x.shape
        D = C // num_heads
        tokens = x.flatten(2).transpose(1, 2)  # (B, L, C)
        qkv = tokens @ weights[f'{name}.proj1.weight'].T + weights[f'{name}.proj1.bias']
        out = torch.zeros_like(tokens)
        for head in range(num_heads):
            # the output axis of proj1 counts (channel of the head, head, qkv), the last fastest
            columns = torch.arange(D)[:, None] * num_heads * 3 + head * 3 + torch.arange(3)
            q, k, v = qkv[..., columns].unbind(-1)  # (B, L, D) each
            scores = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(D), dim=-1)
            out[..., torch.arange(D) * num_heads + head] = scores @ v
        out = out @ weights[f'{name}.proj2.weight'].T + weights[f'{name}.proj2.bias']
        return out.transpose(1, 2).reshape(B, C, H, W)

    x = conv('shallow_conv', x, padding=1)
    n, skips = len(attentions), []
    for i in range(1, n + 1):
        x = res_block(f'Layer{i}.ResBlock1', x)
        x = attention(f'Layer{i}.attention_layer', x) if attentions[i - 1] else x
        x = res_block(f'Layer{i}.ResBlock2', x)
        if i <= n // 2:
            skips.append(x)
            x = conv(f'Layer{i}.conv', x, stride=2, padding=1)
        else:
            weight, bias = weights[f'Layer{i}.conv.weight'], weights[f'Layer{i}.conv.bias']
            x = F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
            x = torch.cat([x, skips[n - i]], dim=1)
    return conv('output_conv', conv('late_conv', x, padding=1).relu())


@torch.no_grad()
@pytest.mark.parametrize('default', [False, True])
def test_forward_is_the_function_of_its_state_dict(default):
    torch.manual_seed(0)
    model = ddpm.UNET().eval() if default else small_unet(input_channels=3, output_channels=2)
    for name, value in model.named_parameters():
        if 'gnorm' in name:  # not ones and zeros, which would hide a swap
            value.uniform_(0.5, 1.5)
    x, t = torch.randn(2, model.input_channels, 32, 16), torch.tensor([3, 977])
    shape = (UNET['Attentions'], 32, 8, 512) if default else (SMALL['Attentions'], 4, 2, 32)
    out = model(x, t)
    assert out.shape == (2, 1 if default else 2, 32, 16)
    expected = functional_unet(model.state_dict(), x, t, *shape)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_embeddings_are_the_closed_form():
    out = ddpm.SinusoidalEmbeddings(1000, 512)(torch.zeros(1), range(1000))
    expected = embeddings(torch.arange(1000), 512)[:, :, None, None]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-4)


def test_a_seed_gives_the_articles_initial_weights():
    """The article draws the modules in the order of the keys, each by torch's own default."""
    ddpm.set_seed(5)
    model = ddpm.UNET(**SMALL)
    ddpm.set_seed(5)
    for name, module in model.named_modules():
        if hasattr(module, 'reset_parameters'):
            weight, bias = module.weight.clone(), module.bias.clone()
            module.reset_parameters()
            assert torch.equal(module.weight, weight), name
            assert torch.equal(module.bias, bias), name


def test_set_seed_repeats_every_generator(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', False)  # put back afterwards
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)

    def draws():
        ddpm.set_seed(3)
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    assert draws() == draws()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_dropout_only_while_training():
    x = torch.randn(2, 16, 4, 4)
    for module, *rest in ((ddpm.Attention(16, 2, 0.5),), (ddpm.ResBlock(16, 4, 0.5), x[:1])):
        inputs = [x, *rest]
        assert not torch.equal(module(*inputs), module(*inputs))
        module.eval()
        assert torch.equal(module(*inputs), module(*inputs))


@torch.no_grad()
def test_time_may_be_a_number_or_a_list():
    """One for all images, or one for each."""
    model, x = small_unet(), torch.randn(3, 1, 32, 32)
    expected = model(x, torch.tensor([7, 7, 7]))
    for t in (7, [7], [7, 7, 7], torch.tensor(7), np.int64(7), np.array([7, 7, 7])):
        torch.testing.assert_close(model(x, t), expected)
    assert not torch.allclose(model(x, 8), expected, atol=1e-5)
    t = [3, 200, 999]
    expected = torch.cat([model(x[i : i + 1], t[i]) for i in range(3)])
    for dtype in (np.int32, np.int64):
        for times in (t, np.array(t, dtype), torch.tensor(np.array(t, dtype))):
            torch.testing.assert_close(model(x, times), expected)


@pytest.mark.parametrize('time_steps', [20, 1000])
def test_a_time_that_there_is_not(time_steps):
    """Negative numbers do not count from the end, and what would mean something else than it seems
    to is refused; so is another image."""
    model, x = small_unet(time_steps=time_steps), torch.zeros(2, 1, 32, 32)
    for t in (-1, -20, time_steps, time_steps + 1):
        for time in (t, [t], [0, t], torch.tensor(t), np.array([t, 0])):
            with pytest.raises(IndexError):
                model(x, time)
    mask = torch.tensor([3, 10], dtype=torch.uint8)  # an index of this type would be a mask
    for t in ([1, 2, 3], [], 0.5, [0.5], True, [False, True], mask):
        with pytest.raises(RuntimeError):
            model(x, t)
    for shape in ((2, 3, 32, 32), (2, 1, 30, 32)):
        with pytest.raises(RuntimeError):
            model(torch.zeros(shape), [1])
