"""DDPM: a denoising diffusion model that learns MNIST from scratch and shows itself at work.

    python ddpm.py              with a CUDA GPU the article's run of 75 epochs, else the preview
    python ddpm.py --preview    the preview anyway: a small UNET, minutes on two CPU cores
    torchrun --nproc-per-node=4 ddpm.py     the same run on several GPUs

Run it again: it goes on where it stopped or, once finished, draws its pictures anew; they are in
outputs/. The numbers to play with are near the end, under EDIT HERE.

Sections 2 to 4 are the article's, in its order and with its names; below them stands what makes
them robust. The method is that of Ho, Jain & Abbeel 2020 (arXiv:2006.11239, "the paper") and, for
sampling in fewer steps, of Song, Meng & Ermon 2021 (DDIM, arXiv:2010.02502).

Measured: the preview takes 3 min 41 s and 1 GB on two cores of an AMD EPYC without a GPU (torch
2.15). The full run has not been measured on a GPU yet; README.md has all figures there are.
"""

import argparse
import inspect
import itertools
import math
import os
import pickle
import random
import re
import signal
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from matplotlib.backends.registry import BackendFilter, backend_registry
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Polygons
from matplotlib.textpath import TextPath
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

try:
    import fcntl  # file locks; Windows has none
except ImportError:
    fcntl = None


class UserError(ValueError):
    """A mistake the user can mend; `python ddpm.py` prints it as one line and exits with 1."""


# ==============================================================================================
# 2. The UNet (article: 模型代码实现). x is (B, C, H, W), t counts from 0, the least noisy step.
# ==============================================================================================


class SinusoidalEmbeddings(nn.Module):
    """A table whose row t holds the sines (even columns) and cosines (odd columns) of
    t * 10000^(-2i / embed_dim), i = 0 .. embed_dim/2 - 1 (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, time_steps: int, embed_dim: int):
        super().__init__()
        position = torch.arange(time_steps).float()[:, None]  # (T, 1)
        frequency = torch.exp(torch.arange(0, embed_dim, 2) * (-math.log(10000.0) / embed_dim))
        embeddings = torch.zeros(time_steps, embed_dim)  # (T, E)
        embeddings[:, 0::2] = torch.sin(position * frequency)
        embeddings[:, 1::2] = torch.cos(position * frequency)
        self.register_buffer('embeddings', embeddings, persistent=False)

    def forward(self, x, t):
        """t (B,) -> (B, embed_dim, 1, 1), on the device of x."""
        return self.embeddings[t].to(x.device)[:, :, None, None]


class ResBlock(nn.Module):
    """Adds the time embedding, then two normalised 3x3 convolutions around a skip."""

    def __init__(self, C: int, num_groups: int, dropout_prob: float):
        super().__init__()
        self.relu = nn.ReLU()
        self.gnorm1 = nn.GroupNorm(num_groups, C)
        self.gnorm2 = nn.GroupNorm(num_groups, C)
        self.conv1 = nn.Conv2d(C, C, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(C, C, kernel_size=3, padding=1)
        self.dropout = nn.Dropout(dropout_prob)

    def forward(self, x, embeddings):
        """x (B, C, H, W), embeddings (B, E >= C, 1, 1) -> (B, C, H, W)."""
        x = x + embeddings[:, : x.shape[1]]
        r = self.conv1(self.relu(self.gnorm1(x)))
        r = self.dropout(r)
        r = self.conv2(self.relu(self.gnorm2(r)))
        return r + x  # the skip already holds the embedding


class Attention(nn.Module):
    """Multi-head self-attention over the H*W positions. As in the article its output takes the
    place of x: there is no norm and no skip."""

    def __init__(self, C: int, num_heads: int, dropout_prob: float):
        super().__init__()
        self.proj1 = nn.Linear(C, C * 3)
        self.proj2 = nn.Linear(C, C)
        self.num_heads = num_heads
        self.dropout_prob = dropout_prob

    def forward(self, x):
        """x (B, C, H, W) -> (B, C, H, W)."""
        h, w = x.shape[2:]
        x = rearrange(x, 'b c h w -> b (h w) c')  # (B, L, C), L = H*W
        x = self.proj1(x)  # (B, L, 3C)
        x = rearrange(x, 'b L (C H K) -> K b H L C', K=3, H=self.num_heads)
        q, k, v = x.contiguous()  # as fused attention kernels need them, (B, heads, L, C/heads)
        dropout = self.dropout_prob if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, heads, L, C/heads)
        x = rearrange(x, 'b H L C -> b L (C H)')  # (B, L, C)
        return rearrange(self.proj2(x), 'b (h w) c -> b c h w', h=h, w=w)  # (B, C, H, W)


class UnetLayer(nn.Module):
    """ResBlock, attention if asked for, ResBlock; then a convolution that halves the image and
    doubles the channels, or (upscale) the other way round."""

    def __init__(
        self,
        upscale: bool,
        attention: bool,
        num_groups: int,
        dropout_prob: float,
        num_heads: int,
        C: int,
    ):
        super().__init__()
        self.ResBlock1 = ResBlock(C, num_groups, dropout_prob)
        self.ResBlock2 = ResBlock(C, num_groups, dropout_prob)
        if upscale:
            self.conv = nn.ConvTranspose2d(C, C // 2, kernel_size=4, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(C, C * 2, kernel_size=3, stride=2, padding=1)
        if attention:
            self.attention_layer = Attention(C, num_heads, dropout_prob)

    def forward(self, x, embeddings):
        """x (B, C, H, W) -> the resampled x and the skip, which is x before it was resampled."""
        x = self.ResBlock1(x, embeddings)
        if hasattr(self, 'attention_layer'):
            x = self.attention_layer(x)
        x = self.ResBlock2(x, embeddings)
        return self.conv(x), x


class UNET(nn.Module):
    """eps_theta(x, t): the noise in x. The first half of the layers goes down and keeps skips, the
    second half comes up and joins them. Raises ValueError where the arguments do not fit."""

    def __init__(
        self,
        Channels: list = [64, 128, 256, 512, 512, 384],
        Attentions: list = [False, True, False, False, False, True],
        Upscales: list = [False, False, False, True, True, True],
        num_groups: int = 32,
        dropout_prob: float = 0.1,
        num_heads: int = 8,
        input_channels: int = 1,
        output_channels: int = 1,
        time_steps: int = 1000,
    ):
        super().__init__()
        check_unet(Channels, Attentions, Upscales, num_groups, dropout_prob, num_heads)
        self.num_layers = len(Channels)
        self.input_channels = input_channels
        self.time_steps = time_steps
        out_channels = Channels[-1] // 2 + Channels[0]
        self.shallow_conv = nn.Conv2d(input_channels, Channels[0], kernel_size=3, padding=1)
        self.late_conv = nn.Conv2d(out_channels, out_channels // 2, kernel_size=3, padding=1)
        self.output_conv = nn.Conv2d(out_channels // 2, output_channels, kernel_size=1)
        self.relu = nn.ReLU()
        self.embeddings = SinusoidalEmbeddings(time_steps, embed_dim=max(Channels))
        for i, (C, attention, upscale) in enumerate(zip(Channels, Attentions, Upscales), 1):
            layer = UnetLayer(upscale, attention, num_groups, dropout_prob, num_heads, C)
            self.add_module(f'Layer{i}', layer)

    def forward(self, x, t):
        """x (B, C, H, W), t (B,) or (1,), a tensor or a list of ints -> (B, C, H, W)."""
        t = check_input(self, x, t)
        layers = [getattr(self, f'Layer{i}') for i in range(1, self.num_layers + 1)]
        embeddings = self.embeddings(x, t)  # (B, E, 1, 1)
        x = self.shallow_conv(x)
        skips = []
        for layer in layers[: self.num_layers // 2]:
            x, skip = layer(x, embeddings)
            skips.append(skip)
        for layer in layers[self.num_layers // 2 :]:
            x = torch.cat((layer(x, embeddings)[0], skips.pop()), dim=1)
        return self.output_conv(self.relu(self.late_conv(x)))  # (B, C, H, W)


# ==============================================================================================
# 3. Training (article: 训练代码)
# ==============================================================================================


class DDPM_Scheduler(nn.Module):
    """beta rises linearly from 1e-4 to 0.02. `alpha` is the article's name for what the paper
    writes as alpha-bar: the cumulative product of 1 - beta."""

    def __init__(self, num_time_steps: int = 1000):
        super().__init__()
        beta = torch.linspace(1e-4, 0.02, num_time_steps)
        self.register_buffer('beta', beta, persistent=False)
        self.register_buffer('alpha', torch.cumprod(1 - beta, dim=0), persistent=False)

    def forward(self, t):
        """t, an int, a list or a tensor -> beta_t and alpha-bar_t, each of the shape of t."""
        return self.beta[t], self.alpha[t]


def set_seed(seed: int = 42):
    """Seeds torch, CUDA, numpy and random, and makes CUDA compute the same thing every time."""
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def diffusion_loss(model, scheduler, x, t, eps):
    """The mean square error of the predicted noise (paper eq. 14), a float32 scalar.
    x (B, C, H, W) images in [0, 1], t (B,) time steps, eps (B, C, H, W) the noise to predict."""
    abar = scheduler(t)[1][:, None, None, None]  # (B, 1, 1, 1)
    x_t = abar.sqrt() * x + (1 - abar).sqrt() * eps  # eq. 4
    with autocast(x.device):
        prediction = model(x_t, t)
    return F.mse_loss(prediction.float(), eps)


def train(
    batch_size: int = 64,
    num_time_steps: int = 1000,
    num_epochs: int = 15,
    seed: int = -1,
    ema_decay: float = 0.9999,
    lr: float = 2e-5,
    checkpoint_path: str | None = None,
    dataset: str = 'MNIST',
    unet: dict | None = None,
    save_minutes: float = 2,
    sample_every: int = 5,
    lr_decay: bool = False,
    beta2: float = 0.999,
):
    """Algorithm 1 of the paper, until num_epochs epochs are done in all.

    The file checkpoint_path (None: checkpoints/ddpm_checkpoint) is resumed if it exists, exactly
    as if the run had never stopped; it is written every save_minutes, at the end, and on Ctrl-C
    or SIGTERM. seed -1 draws one. dataset is one of DATASETS. unet holds the arguments of UNET
    that differ from its defaults. Every sample_every epochs (0: never) a grid of samples, always
    from the same noise, goes to outputs/progress. With lr_decay the learning rate rises to lr over
    the first 3% of the run and falls linearly to 0 at its end; the article's stays the same. beta2
    is Adam's: how slowly it forgets the size of the gradients.

    Raises UserError (a ValueError) for a number out of range, data or a checkpoint that cannot be
    used, and a loss that is not finite; SystemExit(128 + signal) when stopped, once saved.
    """
    config = {k: v for k, v in locals().items() if k not in ('checkpoint_path', 'unet')}
    check_numbers(config)
    device, fixed = best_device(), seed != -1
    rank, world = ranks()  # of several processes each takes its share of every batch
    share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    if batch_size % world:
        raise UserError(f'batch_size is {batch_size}, which {world} processes cannot share evenly')
    with Run(checkpoint_path or CHECKPOINT, config) as run:
        images = load_images(dataset).to(device)  # (N, C, H, W) uint8
        steps = len(images) // batch_size  # of an epoch; the last partial batch is dropped
        if steps == 0:
            raise UserError(f'batch_size is {batch_size}, but {dataset} has {len(images)} images')
        unet = unet_arguments(unet, images.shape[1], num_time_steps)
        seed = run.settle(unet, steps)

        set_seed(seed)
        choose_kernels(device, repeatable=fixed)
        model = UNET(**unet).to(device, memory_format=torch.channels_last)
        scheduler = DDPM_Scheduler(num_time_steps).to(device)
        fused = device.type != 'mps'
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, beta2), fused=fused)
        ema = ModelEmaV3(model, decay=ema_decay)
        run.restore(model, optimizer, ema)
        fast_model = fast(model, images.shape[1], batch_size // world, run)
        draws = torch.Generator(device)

        for epoch in range(run.done // steps, num_epochs):
            shuffle = torch.Generator().manual_seed(derive(seed, 0, epoch))
            order = torch.randperm(len(images), generator=shuffle).to(device)
            for step in run.progress(epoch):
                # every random number is a function of seed and step: that makes resuming exact
                draws.manual_seed(derive(seed, 1, run.done))
                torch.manual_seed(derive(seed, 2 + rank, run.done))  # dropout's

                # Algorithm 1, lines 2 to 5
                x = to_input(images[order[step * batch_size : (step + 1) * batch_size]])
                t = torch.randint(num_time_steps, (batch_size,), generator=draws, device=device)
                eps = torch.randn(x.shape, generator=draws, device=device)
                loss = diffusion_loss(fast_model, scheduler, x[share], t[share], eps[share])
                optimizer.zero_grad()
                loss.backward()
                if lr_decay:
                    left = 1 - run.done / run.total
                    optimizer.param_groups[0]['lr'] = lr * min((1 - left) / 0.03 + 1e-3, left)
                optimizer.step()
                ema.update(model)
                run.record(loss)
            say(f'Epoch {epoch + 1} | Loss {run.mean_loss(epoch):.5f}')
            if rank == 0 and sample_every and (epoch + 1) % sample_every == 0:
                draw_progress(ema.module, scheduler, run, epoch + 1)
        run.stop_if_asked()
    if rank == 0:
        draw_losses(run.losses, steps)


# ==============================================================================================
# 4. Inference (article: 推理)
# ==============================================================================================


def sampling_times(num_time_steps: int, num_steps: int | None = None) -> list:
    """num_steps time steps (None: all) from T-1 down to 0, evenly spread. Raises UserError for a
    num_steps outside 1..T."""
    num_steps = num_time_steps if num_steps is None else num_steps
    check_number('num_steps', num_steps, int, 1, num_time_steps)
    return torch.linspace(num_time_steps - 1, 0, num_steps).round().long().tolist()


@torch.inference_mode()
def reverse_process(model, x, scheduler, num_steps: int | None = None):
    """Turns noise into images; yields (t, x) after every step, from t = T-1 down to 0.

    x (B, C, H, W) ~ N(0, I), on the device of model and scheduler. With num_steps of None or T
    this is Algorithm 2 of the paper with sigma_t^2 = beta_t, and x is yielded before the step's
    noise is added. With fewer steps it is DDIM (Song et al. 2021, eq. 12 with sigma = 0), with
    the predicted x_0 clipped to [0, 1].
    """
    T = len(scheduler.beta)
    times = sampling_times(T, num_steps)
    model.eval()
    for t, t_next in zip(times, times[1:] + [None]):
        beta, abar = scheduler(t)
        with autocast(x.device):
            eps = model(x, torch.full((len(x),), t, device=x.device)).float()
        if len(times) == T:
            x = (x - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()  # Algorithm 2, line 4
            yield t, x
            if t > 0:
                x = x + beta.sqrt() * torch.randn_like(x)
        else:
            abar_next = 1.0 if t_next is None else scheduler(t_next)[1]
            x_0 = ((x - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(0, 1)
            eps = (x - abar.sqrt() * x_0) / (1 - abar).sqrt()
            x = abar_next**0.5 * x_0 + (1 - abar_next) ** 0.5 * eps
            yield t, x


def display_reverse(images: list, axes=None):
    """Draws one strip: the pictures (C, H, W) or (1, C, H, W) of a reverse process from left to
    right, on the given row of axes or else on a new figure, which it returns."""
    if axes is None:
        axes = plt.subplots(1, len(images), figsize=(len(images), 1), squeeze=False)[1][0]
    for image, ax in zip(images, axes):
        ax.imshow(to_picture(image), cmap='gray_r', vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
    return axes[0].figure


def inference(
    checkpoint_path: str | None = None,
    num_time_steps: int = 1000,
    ema_decay: float = 0.9999,
    num_steps: int | None = None,
    seed: int = -1,
):
    """Draws 64 digits from the EMA weights of a checkpoint, by the UNET that it names, in num_steps
    steps (None: num_time_steps, as in the article): their grid and its animation, and of the first
    ten the whole reverse process. The pictures go to outputs/, and to windows where there is a
    screen. Raises UserError for a checkpoint or a number that cannot be used."""
    path = Path(checkpoint_path or CHECKPOINT)
    saved = load_checkpoint(path)
    if saved['unet']['time_steps'] != num_time_steps:
        raise UserError(f'{path}: trained with num_time_steps={saved["unet"]["time_steps"]}')
    device = best_device()
    ema = ModelEmaV3(UNET(**saved['unet']), decay=ema_decay)
    ema.load_state_dict(saved['ema'])
    model = ema.module.to(device, memory_format=torch.channels_last)
    scheduler = DDPM_Scheduler(num_time_steps).to(device)
    set_seed(fresh_seed() if seed == -1 else seed)

    times = sampling_times(num_time_steps, num_steps)
    shown = [min(times, key=lambda t: abs(t - s * num_time_steps / 1000)) for s in STRIP_TIMES]
    shown.append(times[-1])
    kept = sorted({*shown, *times[:: -(-len(times) // 50)]}, reverse=True)  # 50 or so for the GIF
    rank, world = ranks()
    x = torch.randn(64, saved['unet']['input_channels'], 32, 32, device=device)
    x = x.tensor_split(world)[rank]  # each process draws its share
    process = reverse_process(model, x, scheduler, num_steps)
    process = tqdm(process, 'Reverse process', len(times), unit='step', disable=rank > 0)
    frames = joined(torch.stack([x.cpu()] + [x.cpu() for t, x in process if t in kept]))
    if rank > 0:
        return
    strips = frames[[1 + kept.index(t) for t in shown], :10]  # (10 times, 10 digits, C, H, W)
    draw_strips(strips.transpose(0, 1), [f't = {t}' for t in shown[:-1]] + ['$x_0$'])
    save_grid(strips[-1], 'digits.png', columns=5)
    save_grid(frames[-1], 'grid.png')
    save_animation(frames[:, :32], 'reverse.gif')
    if has_screen():
        plt.show()


# ==============================================================================================
# Around the article: devices, checks, data, checkpoints, pictures
# ==============================================================================================

DATASETS = ('MNIST', 'FashionMNIST', 'KMNIST', 'QMNIST', 'CIFAR10', 'FontDigits')
CHECKPOINT = 'checkpoints/ddpm_checkpoint'
OUTPUTS = Path('outputs')
DDIM_STEPS = 50  # of the grids that show a run's progress
LONG_RUN = 10_000  # steps from which on compiling the model pays,
COMPILES = ('cuda',)  # and where: two CPU cores take 1.43 s a step with it, 1.28 s without
STRIP_TIMES = (999, 700, 550, 400, 300, 200, 100, 50, 15)  # of the article's strip, for T = 1000
UNET_DEFAULTS = {k: p.default for k, p in inspect.signature(UNET).parameters.items()}
NUMBERS = {  # what may be asked of train: type, least, most
    'batch_size': (int, 1, math.inf),
    'num_time_steps': (int, 2, math.inf),
    'num_epochs': (int, 1, math.inf),
    'seed': (int, -1, 2**32 - 1),
    'ema_decay': (float, 0, 1),
    'lr': (float, 0, 1),
    'beta2': (float, 0, 0.999999),
    'save_minutes': (float, 0, math.inf),
    'sample_every': (int, 0, math.inf),
}


def ranks():
    """This process's number and how many there are: (0, 1) unless torchrun started us."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def best_device():
    """CUDA (under torchrun this process's own GPU), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')


def say(line):
    if ranks()[0] == 0:
        print(line, flush=True)


def agreed(*values):
    """The largest that any process has, of each of the whole numbers."""
    if ranks()[1] == 1:
        return values
    values = torch.tensor([int(value) for value in values])  # on the CPU: no GPU has to wait
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def joined(x):
    """What all processes hold, side by side along dimension 1."""
    parts = [x] * ranks()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, x)
    return torch.cat(parts, dim=1)


@contextmanager
def torchrun():
    """Joins the processes of `torchrun ddpm.py`, if it is that."""
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(best_device())
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')
    try:
        yield
    finally:
        dist.destroy_process_group()


def fast(model, channels, batch_size, run):
    """The model as the training loop calls it: compiled, if the run is long enough to pay for the
    minute that takes (it is tried out here), and with gradients averaged over the processes. The
    weights are those of `model`."""
    device = next(model.parameters()).device
    # run.total, not what is left of it: a run that goes on must compute as it did before
    if run.done < run.total >= LONG_RUN and device.type in COMPILES:
        model.compile()
        try:
            x = torch.zeros(batch_size, channels, 32, 32, device=device)
            with autocast(device):
                model(x, torch.zeros(batch_size, dtype=torch.long, device=device)).mean().backward()
            model.zero_grad()
        except Exception as error:  # no compiler on this machine, most likely
            model._compiled_call_impl = None
            say(f'torch.compile does not work here ({reason(error)}); going on without it')
    return DistributedDataParallel(model) if ranks()[1] > 1 else model


def choose_kernels(device, repeatable):
    """On CUDA either kernels that compute the same thing every time or the fastest ones."""
    # a CPU's attention with dropout stays in bfloat16: 1.25 s a step instead of 1.47 s
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if device.type == 'cuda':
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(repeatable, warn_only=True)
        torch.backends.cudnn.deterministic = repeatable
        torch.backends.cudnn.benchmark = not repeatable


def has_bf16(device):
    """Whether the device computes in bfloat16 itself, rather than emulating it."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported()


def autocast(device):
    """bfloat16 for convolutions and matrix products where the device has it, else float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def unet_arguments(unet, channels, num_time_steps):
    """All arguments of a UNET, of which unet holds those that differ from the defaults."""
    if unknown := set(unet or {}) - set(UNET_DEFAULTS):
        raise UserError(f'unet has {unknown}, but UNET takes only {list(UNET_DEFAULTS)}')
    of_data = {'input_channels': channels, 'output_channels': channels}
    return {**UNET_DEFAULTS, **of_data, **(unet or {}), 'time_steps': num_time_steps}


def fresh_seed():
    """A seed that no earlier set_seed decides."""
    return agreed(random.SystemRandom().randrange(2**32))[0]


def derive(seed, stream, index):
    """A seed for the index-th use of a stream of random numbers: unrelated to all the others."""
    return int(np.random.SeedSequence((seed, stream, index)).generate_state(1)[0])


def check_number(name, value, kind, least, most=math.inf):
    """Raises UserError, naming the parameter, unless value is a kind (an int will do for a float)
    with least <= value <= most; NaN is not."""
    kinds = (int,) if kind is int else (int, float)
    if type(value) not in kinds or not least <= value <= most:
        noun = 'a whole number' if kind is int else 'a number'
        limit = f'of at least {least}' if most == math.inf else f'from {least} to {most}'
        raise UserError(f'{name} is {value!r}, but it must be {noun} {limit}')


def check_numbers(config):
    """check_number for every entry of config that NUMBERS has a range for."""
    for name, limits in NUMBERS.items():
        if name in config:
            check_number(name, config[name], *limits)


def check_unet(Channels, Attentions, Upscales, num_groups, dropout_prob, num_heads):
    """Raises UserError, saying what would be right, where a UNET's arguments do not fit."""
    n, half = len(Channels), len(Channels) // 2
    if n < 2 or n % 2 or len(Attentions) != n or len(Upscales) != n:
        raise UserError(
            f'Channels, Attentions and Upscales have {n}, {len(Attentions)} and {len(Upscales)} '
            'entries: all three need the same even number, one entry a layer'
        )
    if [bool(u) for u in Upscales] != [False] * half + [True] * half:
        raise UserError(f'Upscales must be {half} times False, then {half} times True')
    check_number('Channels[0]', Channels[0], int, 1)
    check_number('num_groups', num_groups, int, 1)
    check_number('num_heads', num_heads, int, 1)
    check_number('dropout_prob', dropout_prob, float, 0, 1)
    chain = [Channels[0] * 2**i for i in range(half + 1)]  # each layer down doubles
    while len(chain) < n:  # each layer up halves and joins the skip of its mirror
        chain.append(chain[-1] // 2 + chain[n - len(chain)])
    if list(Channels) != chain:
        raise UserError(
            f'Channels {list(Channels)} do not chain: from {Channels[0]} on they must be {chain}'
        )
    for C, attention in zip(Channels, Attentions):
        if C % num_groups:
            raise UserError(f'num_groups {num_groups} does not divide the {C} in Channels')
        if attention and C % num_heads:
            raise UserError(
                f'num_heads {num_heads} does not divide the {C} channels it attends over'
            )


def check_input(model, x, t):
    """t as a tensor on the device of x. Raises UserError where x or t do not fit the UNET."""
    factor = 2 ** (model.num_layers // 2)
    if x.ndim != 4 or x.shape[1] != model.input_channels:
        raise UserError(
            f'x is {tuple(x.shape)}, but must be (batch, {model.input_channels}, height, width)'
        )
    if x.shape[2] % factor or x.shape[3] % factor:
        raise UserError(
            f'images of {x.shape[2]} x {x.shape[3]}: both sides must be multiples of {factor}'
        )
    t = torch.as_tensor(t)
    if t.ndim != 1 or len(t) not in (1, len(x)) or t.is_floating_point():
        raise UserError(f't is {t.dtype} {tuple(t.shape)}, but must be 1 or {len(x)} whole numbers')
    # reading a t that is on an accelerator would wait for it
    if t.device.type == 'cpu' and not (0 <= t.min() and t.max() < model.time_steps):
        raise UserError(f't is from {t.min()} to {t.max()}, outside 0 .. {model.time_steps - 1}')
    return t.to(x.device)


# ---- Data ------------------------------------------------------------------------------------


class MissingData(UserError):
    """A dataset that is neither on the disk nor to be had from the network."""


def load_images(dataset, root='data'):
    """The training images of a dataset, (N, C, H, W) uint8. Files under root are used as they are,
    else torchvision downloads them. Raises MissingData, or UserError for damaged files."""
    if dataset not in DATASETS:
        raise UserError(f'dataset is {dataset!r}, but must be one of {", ".join(DATASETS)}')
    if dataset == 'FontDigits':
        return font_digits()
    source = getattr(datasets, dataset)
    folder = Path(root, dataset, 'raw')
    resources = getattr(source, 'resources', [])  # of the MNIST family: names and MD5 sums
    resources = resources['train'] if isinstance(resources, dict) else resources
    names = [Path(url).name for url, _ in resources]
    for name, (_, md5) in zip(names, resources):
        check_file(folder / name, md5)
    rank, world = ranks()
    try:
        if rank > 0:
            dist.barrier()  # rank 0 downloads
        images = torch.as_tensor(source(root, train=True, download=True).data)
        if rank == 0 and world > 1:
            dist.barrier()
    except Exception as error:  # whatever torchvision makes of the files and the network
        if names and all((folder / name).with_suffix('').exists() for name in names):
            raise UserError(f'{folder} is damaged, delete it: {reason(error)}') from None
        files = f'; the files to put into {folder} are {", ".join(names)}' if names else ''
        raise MissingData(
            f'{dataset} is not in {root}/ and cannot be downloaded ({reason(error, -1)}){files}'
        ) from None
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)


def check_file(packed, md5):
    """Raises UserError if a .gz file, or what was unpacked from it, is not what it should be."""
    unpacked = packed.with_suffix('')
    if not packed.exists():
        return
    damaged = packed if not check_integrity(packed, md5) else None
    if unpacked.exists() and not damaged:
        crc = int.from_bytes(packed.read_bytes()[-8:-4], 'little')  # RFC 1952: of the contents
        damaged = unpacked if zlib.crc32(unpacked.read_bytes()) != crc else None
    if damaged:
        raise UserError(f'{damaged} is damaged: delete it and run again')


def to_input(images):
    """(B, C, H, W) uint8 -> float32 in [0, 1], zero-padded to 32 x 32."""
    margin = (32 - images.shape[-1]) // 2
    return F.pad(images.float() / 255, [margin] * 4)


def font_digits(count=6000, size=28):
    """(count, 1, 28, 28) uint8: digits of matplotlib's own fonts under random affine maps, always
    the same ones, for a machine with neither MNIST nor a network."""
    families = ('DejaVu Sans', 'DejaVu Serif', 'DejaVu Sans Mono', 'STIXGeneral', 'cmr10', 'cmss10')
    points = np.linspace(-1, 1, 2 * size)
    points = np.stack(np.meshgrid(points, points), -1).reshape(-1, 2)  # twice as fine
    glyphs = []
    for font, digit in itertools.product(families, '0123456789'):
        path = TextPath((0, 0), digit, prop=FontProperties(family=font))
        box = path.get_extents()
        vertices = (path.vertices - (box.min + box.max) / 2) * [1, -1] / box.height * 1.4
        rings = Polygons(vertices, path.codes).to_polygons(closed_only=False)  # outlines and holes
        inside = [Polygons(ring).contains_points(points) for ring in rings]
        glyphs.append(np.logical_xor.reduce(inside))
    glyphs = torch.tensor(np.array(glyphs)).float().reshape(-1, 1, 2 * size, 2 * size)
    draws = torch.Generator().manual_seed(0)
    glyphs = glyphs[torch.randint(len(glyphs), (count,), generator=draws)]
    maps = torch.eye(2, 3) + 0.15 * torch.randn(count, 2, 3, generator=draws)
    places = F.affine_grid(maps, [count, 1, size, size], align_corners=False)
    return (F.grid_sample(glyphs, places, align_corners=False) * 255).byte()


# ---- Runs and checkpoints --------------------------------------------------------------------


class Run:
    """What keeps a training run from being lost. Inside `with`, the checkpoint file is this
    process's alone; from restore on, Ctrl-C and SIGTERM wait until the step under way is saved."""

    def __init__(self, path, config):
        self.path, self.config = Path(path), config
        self.lock, self.signals, self.handlers = None, [], {}

    def __enter__(self):
        if ranks()[0]:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = open(f'{self.path}.lock', 'w')
            if fcntl:  # the lock ends with the process, however it ends
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self.lock.fileno()).st_nlink == 0:  # its owner was just removing it
                raise BlockingIOError
            temporary(self.path).unlink(missing_ok=True)  # of a run that was killed
        except BlockingIOError:
            raise UserError(f'another run is using {self.path}: change checkpoint_path') from None
        except OSError as error:
            raise UserError(f'cannot write {self.path} ({error}): change checkpoint_path') from None
        return self

    def __exit__(self, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        if self.lock:
            if fcntl:
                os.unlink(self.lock.name)
            self.lock.close()

    def settle(self, unet, steps):
        """Reads the checkpoint, if there is one, and compares its numbers with this run's. Returns
        the seed. Raises UserError where the run could not go on exactly as it began."""
        self.unet, self.steps = unet, steps
        self.saved = load_checkpoint(self.path) if self.path.exists() else None
        before = {**self.saved['unet'], **self.saved['config']} if self.saved else {}
        if self.config['seed'] == -1:
            self.config['seed'] = before.get('seed', fresh_seed())
        check_number('seed', self.config['seed'], int, 0)
        for name, now in {**unet, **self.config}.items():
            then = before.get(name, now)
            if repr(then) == repr(now):
                continue
            if name in unet or name in ('dataset', 'batch_size', 'seed'):
                raise UserError(
                    f'{self.path} is from a run with {name}={repr(then):.99}, this one has '
                    f'{name}={now!r}: put it back, or to start afresh change checkpoint_path'
                )
            say(f'{name} was {then}, is {now} from here on')
        return self.config['seed']

    def restore(self, model, optimizer, ema):
        """Puts the checkpoint into model, optimizer (its numbers stay as they are) and ema."""
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.done, self.total = 0, self.steps * self.config['num_epochs']  # steps
        saved, self.saved = self.saved, None
        if saved:
            self.done = len(saved['losses'])
            model.load_state_dict(saved['weights'])
            ema.load_state_dict(saved['ema'])
            groups = optimizer.state_dict()['param_groups']
            optimizer.load_state_dict({**saved['optimizer'], 'param_groups': groups})
            epoch, step = divmod(self.done, self.steps)
            say(f'{self.path}: going on after {epoch} epochs and {step} steps')
        device = next(model.parameters()).device
        self.losses = torch.zeros(max(self.done, self.total), device=device)  # of every step
        self.losses[: self.done] = saved['losses'] if saved else 0
        self.begun_at, self.begun = time.monotonic(), self.done
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.handlers[signum] = signal.signal(signum, lambda s, _: self.signals.append(s))
        self.next_save = time.monotonic() + 60 * self.config['save_minutes']

    def progress(self, epoch):
        """Yields the steps that are left of an epoch, under a bar."""
        size, first = self.config['batch_size'], self.done - epoch * self.steps
        name = f'Epoch {epoch + 1}/{self.config["num_epochs"]}'
        total = self.steps * size
        how = dict(initial=first * size, unit='img', mininterval=0.5, disable=ranks()[0] > 0)
        with tqdm(None, name, total, **how) as self.bar:
            yield from range(first, self.steps)

    def record(self, loss):
        """Takes the loss of a step, which is now done; saves, and stops, when it is time to."""
        loss, world = loss.detach(), ranks()[1]
        if world > 1:
            dist.all_reduce(loss)
        self.losses[self.done] = loss / world
        self.done += 1
        drawn = self.bar.update(self.config['batch_size'])  # a few times a second at the most
        if drawn or self.done % self.steps == 0:  # only then is the loss read
            pace = (time.monotonic() - self.begun_at) / (self.done - self.begun)
            left = tqdm.format_interval(pace * (self.total - self.done))
            epoch = (self.done - 1) // self.steps
            self.bar.set_postfix_str(f'loss {self.mean_loss(epoch):.4f}, whole run {left}')
        finished = self.done == self.total
        if world == 1 or self.done % 10 == 0 or finished:  # processes agree now and then
            signum, due = agreed(max(self.signals, default=0), time.monotonic() > self.next_save)
            if signum or due or finished:
                self.save(last=signum or finished)
            self.stop_if_asked()

    def mean_loss(self, epoch):
        """The mean over the steps done of an epoch. Raises UserError if one is not finite."""
        losses = self.losses[epoch * self.steps : self.done][: self.steps]
        mean = losses.mean().item()
        if not math.isfinite(mean):
            step = losses.isfinite().logical_not().nonzero()[0].item()
            raise UserError(
                f'the loss is {losses[step]} in epoch {epoch + 1}, step {step + 1}; lower lr. '
                f'What {self.path} holds is from before'
            )
        return mean

    def save(self, last):
        """Writes the checkpoint. Raises UserError if the run has diverged, or if the file cannot be
        written and there will be no later chance."""
        self.mean_loss((self.done - 1) // self.steps)
        self.next_save = time.monotonic() + 60 * self.config['save_minutes']
        if ranks()[0]:
            return
        state = {
            'weights': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'ema': self.ema.state_dict(),
            'unet': self.unet,
            'config': self.config,
            'losses': self.losses[: self.done].clone(),
        }
        try:
            check_tensors(state)
            save_checkpoint(self.path, state)
        except ValueError as error:
            raise UserError(
                f'the run has diverged ({error}); lower lr. {self.path} is from before'
            ) from None
        except OSError as error:
            problem = f'cannot write {self.path} ({error}); what it held before is unharmed'
            if last:
                raise UserError(problem) from None
            tqdm.write(f'{problem}; training goes on', file=sys.stderr)

    def stop_if_asked(self):
        (signum,) = agreed(max(self.signals, default=0))
        if signum:
            epoch, step = divmod(self.done, self.steps)
            say(f'\nStopped after {epoch} epochs and {step} steps, all saved in {self.path}.')
            say('Run again to go on.')
            raise SystemExit(128 + signum)


def temporary(path):
    return Path(f'{path}.tmp')


def save_checkpoint(path, state):
    """Writes a file beside path, then renames it: path holds the old state or the new, never less.
    Raises OSError."""
    try:
        with open(temporary(path), 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary(path), path)
    except RuntimeError as error:  # torch.save puts its own in place of a full disk's OSError
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        temporary(path).unlink(missing_ok=True)


def load_checkpoint(path):
    """A checkpoint as a dict of tensors on the CPU and plain values, found to be whole: `weights`,
    `optimizer`, `ema`, `unet`, `config`, `losses` (its length is the number of steps done). The
    article's code wrote the first three only. Raises UserError and runs nothing of the file."""
    try:
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):
            raise ValueError(f'{part} in it is damaged')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about unusual pickles: the error below says enough
            saved = torch.load(path, map_location='cpu', weights_only=True)
        saved = {'unet': UNET_DEFAULTS, 'config': {}, 'losses': torch.zeros(0), **saved}
        check_numbers(dict(saved['config']))
        check_tensors(saved)
        return saved
    except FileNotFoundError:
        raise UserError(f'there is no checkpoint {path}: train first') from None
    except Exception as error:  # whatever a damaged or hostile file sets off
        unsafe = isinstance(error, pickle.UnpicklingError)
        why = 'it holds more than tensors and plain values' if unsafe else reason(error)
        raise UserError(
            f'{path} is not a usable checkpoint: {why}. It stays as it is: to start afresh, move '
            'it away or change checkpoint_path'
        ) from None


def check_tensors(saved):
    """Raises ValueError unless a checkpoint's tensors are finite and those of its UNET."""
    for name in ('weights', 'optimizer', 'ema'):
        if not isinstance(saved.get(name), dict):
            raise ValueError(f'no entry {name}')
    with torch.device('meta'):  # shapes only
        shapes = {key: value.shape for key, value in UNET(**saved['unet']).state_dict().items()}
    expected = {f'weights {key}': shape for key, shape in shapes.items()}
    expected |= {f'ema module.{key}': shape for key, shape in shapes.items()}
    expected |= {'losses': (len(saved['losses']),)}
    state = saved['optimizer']['state']
    for i, shape in enumerate(shapes.values() if state else ()):
        expected |= {f'optimizer {i} exp_avg': shape, f'optimizer {i} exp_avg_sq': shape}
        expected |= {f'optimizer {i} step': ()}
    found = {f'{part} {k}': v for part in ('weights', 'ema') for k, v in saved[part].items()}
    found |= {f'optimizer {i} {k}': v for i, entry in state.items() for k, v in entry.items()}
    found |= {'losses': saved['losses']}
    for name in expected.keys() ^ found.keys():
        raise ValueError(f'{"no" if name in expected else "unexpected"} entry {name}')
    for name, shape in expected.items():
        tensor = found[name]
        if tensor.dtype != torch.float32 or tensor.shape != shape:
            raise ValueError(
                f'{name} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {tuple(shape)}'
            )
        if not tensor.isfinite().all():
            raise ValueError(f'{name} is not finite')


def reason(error, line=0):
    """One line of what an exception says, the first if not told otherwise."""
    return (str(error).strip() or type(error).__name__).splitlines()[line][:200]


# ---- Pictures --------------------------------------------------------------------------------


def to_picture(image):
    """(C, H, W) or (1, C, H, W) -> what imshow takes, its values clamped to [0, 1]."""
    picture = image.reshape(image.shape[-3:]).float().clamp(0, 1).cpu()
    return (picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)).numpy()


def to_grid(x, columns=8, scale=2):
    """(B, C, H, W) -> one PIL picture, dark on light if it is grey."""
    x = x.float().clamp(0, 1).cpu()
    x = 1 - x if x.shape[1] == 1 else x
    grid = make_grid(
        x.repeat_interleave(scale, 2).repeat_interleave(scale, 3), columns, pad_value=1
    )
    return to_pil_image(grid[:1] if x.shape[1] == 1 else grid)


def save_grid(x, name, columns=8):
    path = OUTPUTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    to_grid(x, columns).save(path)


def draw_progress(model, scheduler, run, epoch):
    """A grid of samples, always from the same noise; none when the run is asked to stop."""
    device = scheduler.beta.device
    always = torch.Generator(device).manual_seed(0)
    noise = torch.randn(64, model.input_channels, 32, 32, generator=always, device=device)
    for _, x in reverse_process(model, noise, scheduler, min(DDIM_STEPS, len(scheduler.beta))):
        if run.signals:
            return
    save_grid(x, f'progress/{run.path.name}_{epoch:03d}.png')


def save_animation(frames, name):
    """frames: (times, B, C, H, W), from noise to images -> an animated GIF."""
    pictures = [to_grid(x).quantize(16) for x in frames]  # noise in more greys would be megabytes
    times = [60] * (len(frames) - 1) + [2500]  # ms; the digits stay
    pictures[0].save(
        OUTPUTS / name, save_all=True, append_images=pictures[1:], duration=times, loop=0
    )


def save_figure(figure, name):
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUTS / name, dpi=100)
    if not has_screen():
        plt.close(figure)


def draw_strips(strips, labels):
    """strips: (digits, times, C, H, W), a row each."""
    rows, columns = strips.shape[:2]
    figure, axes = plt.subplots(rows, columns, figsize=(columns, rows + 0.3), squeeze=False)
    figure.subplots_adjust(0, 0, 1, 1 - 0.3 / rows, wspace=0.05, hspace=0.05)
    for images, row in zip(strips, axes):
        display_reverse(images, row)
    for ax, label in zip(axes[0], labels):
        ax.set_title(label, fontsize=9)
    save_figure(figure, 'reverse.png')


def draw_losses(losses, steps):
    """losses: one a step of the run -> the curve of their means over a 50th of an epoch."""
    window = max(1, steps // 50)
    means = losses[: len(losses) // window * window].reshape(-1, window).mean(1).cpu()
    figure, ax = plt.subplots(figsize=(6, 3.5), layout='tight')
    ax.plot(torch.arange(1, len(means) + 1) * window / steps, means, color='black', linewidth=1)
    ax.set(xlabel='epoch', ylabel='mean square error of the noise', yscale='log')
    ax.grid(alpha=0.3)
    save_figure(figure, 'loss.png')


def has_screen():
    return plt.get_backend() not in backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE)


# ==============================================================================================
# EDIT HERE: the numbers of the two runs; then `python ddpm.py` again
# ==============================================================================================

FULL = dict(  # the article's run, for a machine with a CUDA GPU
    checkpoint_path=CHECKPOINT,
    dataset='MNIST',  # FashionMNIST, KMNIST, QMNIST, CIFAR10: change checkpoint_path with it
    num_epochs=75,
    batch_size=64,
    lr=2e-5,  # of Adam, the same throughout
    ema_decay=0.9999,  # the pictures come from the average of the last 10,000 steps or so
    num_time_steps=1000,
    unet=dict(),  # what differs from UNET's defaults
    lr_decay=False,  # the article's lr stays as it is
    beta2=0.999,  # torch's default
    seed=-1,  # draw one; with a number, CUDA is deterministic and slower
    save_minutes=2,  # what kill -9 or a power cut may cost
    sample_every=5,  # epochs between two grids in outputs/progress
)
PREVIEW = dict(  # the same system made small: five minutes on two CPU cores
    checkpoint_path='checkpoints/preview_checkpoint',
    dataset='MNIST',
    num_epochs=1,
    batch_size=16,  # many small steps learn more in the time than few large ones
    lr=5e-3,  # 8e-3 diverges
    lr_decay=True,
    beta2=0.95,  # as good as 0.999 after half as many steps again
    ema_decay=0.99,
    num_time_steps=500,  # by then all is noise; what is left of the 1000 teaches little
    unet=dict(
        Channels=[8, 16, 32, 64, 64, 48],
        Attentions=[False] * 6,
        num_groups=8,
        dropout_prob=0.0,  # one epoch cannot be overfitted
    ),
    seed=-1,
    save_minutes=1,
    sample_every=1,
)
NUM_STEPS = None  # of the reverse process: all, as in the article; 50 are quick, by DDIM


def full_run_hours(images=60_000):
    """What the training of FULL would take here, from three timed steps of 8 images."""
    device = best_device()
    model = UNET(**FULL['unet']).to(device, memory_format=torch.channels_last)
    scheduler = DDPM_Scheduler().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=FULL['lr'])
    x = torch.rand(8, model.input_channels, 32, 32, device=device)
    for step in range(4):
        if step == 1:  # the first one warms up
            start = time.monotonic()
        t = torch.randint(1000, (len(x),), device=device)
        loss = diffusion_loss(model, scheduler, x, t, torch.randn_like(x))
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
    return (time.monotonic() - start) / (3 * len(x)) * images * FULL['num_epochs'] / 3600


def main():
    parser = argparse.ArgumentParser(
        description='Trains a denoising diffusion model on MNIST and shows the reverse process. '
        'With a CUDA GPU it does the full run, without one the preview. Everything else is edited '
        'in the file, under EDIT HERE.'
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument('--full', action='store_true', help='the full run, also without a GPU')
    choice.add_argument('--preview', action='store_true', help='the preview, also with a GPU')
    args = parser.parse_args()
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # without a traceback
    with torchrun(), errors_in_one_line():
        full = args.full or (torch.cuda.is_available() and not args.preview)
        if not torch.cuda.is_available() and not args.preview:
            say(
                f'No CUDA GPU here: the full run would take about {full_run_hours():.0f} hours. '
                + ('As asked.' if full else 'This is the preview; --full asks for the full run.')
            )
        numbers = FULL if full else with_data(PREVIEW)
        train(**numbers)
        inference(numbers['checkpoint_path'], numbers['num_time_steps'], num_steps=NUM_STEPS)


def with_data(numbers):
    """The same numbers, or where the dataset is not to be had, those of a run on font digits."""
    try:
        load_images(numbers['dataset'])
        return numbers
    except MissingData as error:
        say(f'WARNING: {error}.\nTHIS PREVIEW TRAINS ON DIGITS DRAWN FROM FONTS INSTEAD.')
        path = numbers['checkpoint_path'] + '_font_digits'
        return {**numbers, 'dataset': 'FontDigits', 'checkpoint_path': path}


@contextmanager
def errors_in_one_line():
    """Ends the program with one line on stderr for what a user can mend."""
    try:
        yield
    except UserError as error:
        sys.exit(f'ddpm.py: {error}' if ranks()[0] == 0 else 1)
    except RuntimeError as error:  # CUDA, MPS and the CPU each have words of their own for it
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        sys.exit(
            'ddpm.py: out of memory: lower batch_size or the Channels of unet, under EDIT HERE'
        )


if __name__ == '__main__':
    main()
