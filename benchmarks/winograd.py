"""3x3 convolutions by Winograd's algorithm F(4x4, 3x3): the same result in float32, up to rounding,
for a quarter of the multiplications.

    python benchmarks/winograd.py

times training steps of the article's network with it and without, with and without KEEP, and writes
benchmarks/results/winograd.json.

Source: Lavin & Gray 2015, "Fast Algorithms for Convolutional Neural Networks", section 4.3. An
image is cut into tiles of 6x6 pixels that overlap by 2; tiles and weights are transformed, then
multiplied and summed over the channels, one matrix product for each of the 36 places, and the sums
are transformed back to 4x4.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from speed import processor  # noqa: E402

import ddpm  # noqa: E402

KEEP = dict(  # for glibc, which else gives large blocks back to the system and takes them anew
    MALLOC_MMAP_THRESHOLD_='8000000000',
    MALLOC_TRIM_THRESHOLD_='16000000000',
    MALLOC_TOP_PAD_='1000000000',
)
LEAST_CHANNELS = 128  # with fewer, the transforms cost what the products save

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


def conv_forward(conv, x, weight, bias, direct=torch.nn.Conv2d._conv_forward):
    """For torch.nn.Conv2d._conv_forward: Winograd's algorithm where it is faster."""
    same = (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    if same and conv.in_channels >= LEAST_CHANNELS and not (x.shape[2] % 4 or x.shape[3] % 4):
        return Conv3x3.apply(x, weight, bias)
    return direct(conv, x, weight, bias)


def seconds_a_step(batch=64, steps=5):
    """Median of ddpm.train's step with the article's network: torch's own convolutions and
    Winograd's algorithm in turn."""
    ddpm.set_seed(0)
    model = ddpm.to_device(ddpm.UNET(), torch.device('cpu'))
    scheduler, optimizer = ddpm.DDPM_Scheduler(), torch.optim.Adam(model.parameters(), fused=True)
    ways = dict(direct=torch.nn.Conv2d._conv_forward, winograd=conv_forward)
    found = {name: [] for name in ways}
    for _ in range(steps + 1):  # the first is no measurement
        for name, forward in ways.items():
            with mock.patch.object(torch.nn.Conv2d, '_conv_forward', forward):
                x, t = torch.rand(batch, 1, 32, 32), torch.randint(1000, (batch,))
                began = time.perf_counter()
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
    (HERE / 'results/winograd.json').write_text(json.dumps(found, indent=1) + '\n')
    print(json.dumps(found, indent=1))


if __name__ == '__main__':
    if sys.argv[1:] == ['once']:
        print(json.dumps(seconds_a_step()))
    else:
        main()
