"""The slow operations of the article's network, faster on a CPU in float32; results as torch's, up
to rounding and to which values dropout takes out.

    python benchmarks/cpu_kernels.py

times training steps of the article's network with them and without, with and without KEEP, and
writes benchmarks/results/cpu_kernels.json. `with patched():` uses them in place of torch's.

3x3 convolutions, and the transposed ones of the way up: Winograd's algorithm F(4x4, 3x3), a quarter
of the multiplications (Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks",
section 4.3). An image is cut into tiles of 6x6 pixels that overlap by 2; tiles and weights are
transformed, then multiplied and summed over the channels, one matrix product for each of the 36
places, and the sums are transformed back to 4x4.

Dropout: 16 random bits a value in place of 64. Attention with dropout: a few heads at a time, which
stay in the cache, and the backward pass computes the weights again.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from speed import processor  # noqa: E402

import ddpm  # noqa: E402

KEEP = dict(  # for glibc, which else gives large blocks back to the system and takes them anew
    MALLOC_MMAP_THRESHOLD_='8000000000',
    MALLOC_TRIM_THRESHOLD_='16000000000',
    MALLOC_TOP_PAD_='1000000000',
    GLIBC_TUNABLES='glibc.malloc.hugetlb=1',  # pages of 2 MB where the system has them
)
LEAST_CHANNELS = 64  # fewer were not tried
LEAST_SIZE = 8  # of transposed convolutions: at 4 pixels torch's are twice as fast
HEADS = 16  # that attention computes at a time

INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
WEIGHT = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
OUTPUT = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
]


def in_both_directions(matrix):
    """Transforms the rows and the columns of a flattened tile at once."""
    matrix = torch.tensor(matrix, dtype=torch.float32)
    return torch.kron(matrix, matrix)


INPUT = in_both_directions(INPUT)  # (36, 36)
WEIGHT = in_both_directions(WEIGHT)  # (36, 9)
OUTPUT = in_both_directions(OUTPUT)  # (16, 36)


class Conv3x3(torch.autograd.Function):
    """x (B, C, H, W), weight (K, C, 3, 3), bias (K,) -> (B, K, H, W); H and W multiples of 4."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        B, C, H, W = ctx.shape = x.shape
        K = len(weight)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        tiles = x.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)  # (6, 6, B, h, w, C)
        tiles = (INPUT @ tiles.reshape(36, -1)).view(36, -1, C)
        weight = (WEIGHT @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, C, K)
        ctx.save_for_backward(tiles, weight)
        y = (OUTPUT @ (tiles @ weight).view(36, -1)).view(4, 4, B, H // 4, W // 4, K)
        y = y.permute(2, 3, 0, 4, 1, 5).reshape(B, H, W, K) + bias
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, dy):
        """The transpose of each step of `forward`, in reverse order."""
        tiles, weight = ctx.saved_tensors
        B, C, H, W = ctx.shape
        K, h, w = weight.shape[2], H // 4, W // 4
        dy = dy.permute(0, 2, 3, 1)
        places = dy.reshape(B, h, 4, w, 4, K).permute(2, 4, 0, 1, 3, 5)
        dy_tiles = (OUTPUT.T @ places.reshape(16, -1)).view(36, -1, K)
        dweight = (WEIGHT.T @ (tiles.mT @ dy_tiles).view(36, -1)).view(3, 3, C, K)
        dtiles = (INPUT.T @ (dy_tiles @ weight.mT).view(36, -1)).view(6, 6, B, h, w, C)
        dtiles = dtiles.permute(2, 3, 0, 4, 1, 5)  # (B, h, 6, w, 6, C)
        dx = dy.new_zeros(B, h + 1, 4, w + 1, 4, C)
        dx[:, :h, :, :w] = dtiles[:, :, :4, :, :4]
        dx[:, 1:, :2, :w] += dtiles[:, :, 4:, :, :4]  # where a tile overlaps the next one
        dx[:, :h, :, 1:, :2] += dtiles[:, :, :4, :, 4:]
        dx[:, 1:, :2, 1:, :2] += dtiles[:, :, 4:, :, 4:]
        dx = dx.view(B, H + 4, W + 4, C)[:, 1 : H + 1, 1 : W + 1]
        return dx.permute(0, 3, 1, 2), dweight.permute(3, 2, 0, 1), dy.sum((0, 1, 2))


def conv_forward(conv, x, weight, bias, plain=nn.Conv2d._conv_forward):
    """For Conv2d._conv_forward."""
    same = (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    if same and conv.in_channels >= LEAST_CHANNELS and whole_tiles(x):
        return Conv3x3.apply(x, weight, bias)
    return plain(conv, x, weight, bias)


def conv_transpose(conv, x, plain=nn.ConvTranspose2d.forward):
    """For ConvTranspose2d.forward. Each input pixel becomes 2x2 output pixels, of which each is a
    3x3 convolution with two taps of the 4x4 weight in each direction, and one of zero."""
    doubles = (conv.kernel_size, conv.stride, conv.padding) == ((4, 4), (2, 2), (1, 1))
    if not doubles or min(x.shape[2:]) < LEAST_SIZE or not whole_tiles(x):
        return plain(conv, x)
    taps = torch.tensor([[3, 1, 4], [4, 2, 0]])  # 4: zero
    weight = F.pad(conv.weight, (0, 1, 0, 1))[:, :, taps][..., taps]  # (C, K, 2, 3, 2, 3)
    weight = weight.permute(1, 2, 4, 0, 3, 5).flatten(0, 2)  # (4K, C, 3, 3)
    return F.pixel_shuffle(Conv3x3.apply(x, weight, conv.bias.repeat_interleave(4)), 2)


def whole_tiles(x):
    return not (x.shape[2] % 4 or x.shape[3] % 4)


def kept(shape, p):
    """A random mask of a share p of False, in steps of 1/65536."""
    count = torch.Size(shape).numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return (bits.view(torch.int16)[:count] >= round(p * 65536) - 32768).view(shape)


def dropout(layer, x):
    """For Dropout.forward, x (B, C, H, W) with the channels last in memory."""
    if not layer.training or not layer.p:
        return x
    B, C, H, W = x.shape
    keep = kept((B, H, W, C), layer.p).permute(0, 3, 1, 2)
    return x * keep.to(x.dtype).div_(1 - layer.p)


class DropoutAttention(torch.autograd.Function):
    """q, k, v (B, heads, L, C), p the dropout of the weights -> (B, heads, L, C)."""

    @staticmethod
    def forward(ctx, q, k, v, p):
        ctx.p, shape = p, q.shape
        q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
        q, v = q * shape[-1] ** -0.5, v / (1 - p)
        keep = kept((len(q), q.shape[1], k.shape[1]), p)
        ctx.save_for_backward(q, k, v, keep)
        y = torch.empty_like(q)
        for i in range(0, len(q), HEADS):
            part = slice(i, i + HEADS)
            weights = (q[part] @ k[part].mT).softmax(-1)
            torch.bmm(weights * keep[part], v[part], out=y[part])
        return y.view(shape)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, keep = ctx.saved_tensors
        shape, dy = dy.shape, dy.flatten(0, 1)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for i in range(0, len(q), HEADS):
            part = slice(i, i + HEADS)
            weights = (q[part] @ k[part].mT).softmax(-1)
            torch.bmm((weights * keep[part]).mT, dy[part], out=dv[part])
            dweights = (dy[part] @ v[part].mT).mul_(keep[part])
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            torch.bmm(dscores, k[part], out=dq[part])
            torch.bmm(dscores.mT, q[part], out=dk[part])
        dq, dv = dq * shape[-1] ** -0.5, dv / (1 - ctx.p)
        return dq.view(shape), dk.view(shape), dv.view(shape), None


def attention(q, k, v, dropout_p=0.0, plain=F.scaled_dot_product_attention):
    """For torch.nn.functional.scaled_dot_product_attention."""
    return DropoutAttention.apply(q, k, v, dropout_p) if dropout_p else plain(q, k, v)


@contextmanager
def patched():
    """All of the above in place of torch's."""
    with ExitStack() as stack:
        for owner, name, ours in (
            (nn.Conv2d, '_conv_forward', conv_forward),
            (nn.ConvTranspose2d, 'forward', conv_transpose),
            (nn.Dropout, 'forward', dropout),
            (F, 'scaled_dot_product_attention', attention),
        ):
            stack.enter_context(mock.patch.object(owner, name, ours))
        yield


def seconds_a_step(batch=64, steps=5):
    """Median of ddpm.train's step with the article's network, with torch's operations and with
    these in turn."""
    ddpm.set_seed(0)
    model = ddpm.to_device(ddpm.UNET(), torch.device('cpu'))
    scheduler, optimizer = ddpm.DDPM_Scheduler(), torch.optim.Adam(model.parameters(), fused=True)
    found = {'torch': [], 'ours': []}
    for _ in range(steps + 1):  # the first is no measurement
        for name, operations in {'torch': nullcontext(), 'ours': patched()}.items():
            x, t = torch.rand(batch, 1, 32, 32), torch.randint(1000, (batch,))
            began = time.perf_counter()
            with operations:
                loss = ddpm.diffusion_loss(model, scheduler, x, t, torch.randn_like(x))
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            found[name].append(time.perf_counter() - began)
    return {name: sorted(seconds[1:])[steps // 2] for name, seconds in found.items()}


def main():
    found = dict(machine=processor(), torch=torch.__version__, batch=64)
    for name, settings in {'as glibc does': {}, 'memory kept': KEEP}.items():
        command, environment = [sys.executable, __file__, 'once'], {**os.environ, **settings}
        answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        found[f'seconds a step, {name}'] = json.loads(answer.stdout)
    (HERE / 'results/cpu_kernels.json').write_text(json.dumps(found, indent=1) + '\n')
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    if sys.argv[1:] == ['once']:
        print(json.dumps(seconds_a_step()))
    else:
        main()
