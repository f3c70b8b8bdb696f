"""DDPM: a denoising diffusion model that learns MNIST from scratch and shows itself at work.

    python ddpm.py --sample    draws digits, from weights that come with the repository
    python ddpm.py             trains: the article's 75 epochs on a CUDA GPU, else the preview
    python ddpm.py --preview   a small UNET, a few minutes on two CPU cores
    torchrun --nproc-per-node=4 ddpm.py     the article's run on several GPUs

Run it again in the same folder and it goes on where it stopped, or once finished draws anew. All
to play with stands under EDIT HERE. The method is that of Ho, Jain & Abbeel 2020 (arXiv:2006.11239,
"the paper") and, for sampling in fewer steps, of Song, Meng & Ermon 2021 (DDIM, arXiv:2010.02502).

Sections 2 to 4 are the article's (1 is theory), in its order and with its names. Then come the
numbers to edit and main(); what makes all that robust is the appendix below them.

Measured on AMD EPYC, torch 2.14 and 2.15: the preview takes two cores 3 min 42 s with AVX-512
bfloat16 and 10 min 54 s in float32; 75% of its digits are recognised. The weights of --sample: 40
epochs at the pace of 3 h 9 min on one core; 93%, FD-CNN 2.8 times that of real digits. No GPU has
done the full run yet. README.md has the rest.
"""

import os
import signal

# GNU's OpenMP: threads that wait for each other soon sleep. By default they spin for milliseconds,
# and where another program keeps a core busy, training is up to 30 times slower.
os.environ.setdefault('GOMP_SPINCOUNT', '10000')
if __name__ == '__main__' and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import argparse
import gzip
import inspect
import math
import pickle
import random
import re
import secrets
import socket
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

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
    """Adds the time embedding, then two normalised 3x3 convolutions beside a skip."""

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
        check_unet(locals())
        super().__init__()
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
        t = checked_times(self, x, t)
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
    """Seeds torch, CUDA, numpy and random, and has cuDNN compute the same thing every time."""
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
    image_size: int = 32,
):
    """Algorithm 1 of the paper, until num_epochs epochs are done in all.

    The file checkpoint_path (None: checkpoints/ddpm_checkpoint) is resumed if it exists, exactly
    as if the run had never stopped; it is written every save_minutes, at the end, and on Ctrl-C,
    SIGTERM or SIGHUP. seed -1 draws one. dataset is one of DATASETS or a folder of pictures, which
    are cropped and resized to image_size. unet holds the arguments of UNET that differ from its
    defaults. Every sample_every epochs (0: never) a grid of samples, always from the same noise,
    goes to outputs/NAME OF THE CHECKPOINT/progress. With lr_decay the learning rate rises to 97%
    of lr over the first 3% of the run, and falls linearly to 0 at its end; the article's stays.
    beta2 is Adam's: how slowly it forgets the size of the gradients.

    Raises UserError (a ValueError) for a number out of range, data or a checkpoint that cannot be
    used, and a loss that is not finite or is back at its start; SystemExit(128 + signal) when
    stopped, once saved.
    """
    given = {k: v for k, v in dict(locals()).items() if k not in ('checkpoint_path', 'unet')}
    with Run(checkpoint_path or CHECKPOINT, given, unet or {}) as run:
        if run.is_finished():
            return
        device = best_device()
        images = load_images(dataset, image_size)  # (N, C, H, W) uint8
        run.begin_with(images)
        images = images.to(device)

        set_seed(run.seed)
        choose_kernels(device, repeatable=seed != -1)
        model = to_device(UNET(**run.unet), device)
        scheduler = DDPM_Scheduler(num_time_steps).to(device)
        fused = device.type != 'mps'
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, beta2), fused=fused)
        scaler = torch.amp.GradScaler(device.type, enabled=half_precision(device) is torch.float16)
        ema = ModelEmaV3(model, decay=ema_decay)
        run.resume(model, optimizer, scaler, ema)
        network = parallel_and_compiled(model, run)  # the same weights
        draws = torch.Generator(device)
        draw_progress(ema.module, scheduler, run)  # if a stop prevented it

        for epoch in range(run.done // run.steps, num_epochs):  # steps done, steps an epoch
            # in place of a DataLoader: all images are on the device, in a new order each epoch
            shuffle = torch.Generator().manual_seed(seed_of(run.seed, 0, epoch))
            order = torch.randperm(len(images), generator=shuffle).to(device)
            for step in run.steps_left(epoch):
                # every random number is a function of seed and step: that makes resuming exact
                draws.manual_seed(seed_of(run.seed, 1, run.done))
                torch.manual_seed(seed_of(run.seed, 2 + run.rank, run.done))  # dropout's
                if lr_decay:
                    optimizer.param_groups[0]['lr'] = lr * rise_and_fall(run.done / run.total)

                # Algorithm 1, lines 2 to 5; of several processes each takes its share
                x = to_input(images[order[step * batch_size : (step + 1) * batch_size]])  # [0, 1]
                t = torch.randint(num_time_steps, (batch_size,), generator=draws, device=device)
                eps = torch.randn(x.shape, generator=draws, device=device)
                mine = run.share
                loss = diffusion_loss(network, scheduler, x[mine], t[mine], eps[mine])
                optimizer.zero_grad()
                scaler.scale(loss).backward()  # by 1, but for float16
                scaler.step(optimizer)
                scaler.update()
                ema.update(model)

                run.step_done(loss)  # saves, and stops, when it is time to
            print_once(f'Epoch {epoch + 1} | Loss {run.mean_loss(epoch):.5f}{run.skipped()}')
            draw_progress(ema.module, scheduler, run)
        run.finish()


# ==============================================================================================
# 4. Inference (article: 推理)
# ==============================================================================================

STRIP_TIMES = (999, 700, 550, 400, 300, 200, 100, 50, 15)  # of 1000; then x_0


def sampling_times(num_time_steps: int, num_steps: int | None = None) -> list:
    """num_steps time steps (None: all) from T-1 down to 0, evenly spread. Raises UserError for a
    num_steps outside 1..T."""
    num_steps = num_time_steps if num_steps is None else num_steps
    check_number('num_steps', num_steps, int, 1, num_time_steps)
    return torch.linspace(num_time_steps - 1, 0, num_steps).round().long().tolist()


@torch.inference_mode()
def reverse_process(model, x, scheduler, num_steps: int | None = None):
    """Turns noise into images; yields (t, x) after every step, from t = T-1 down to 0.

    x (B, C, H, W) ~ N(0, I), on the device of model and scheduler. It is Algorithm 2 of the paper,
    and x is yielded before the step's noise is added. With num_steps of None or T sigma_t^2 is
    beta_t; fewer steps are longer and take the paper's second choice, beta-tilde_t, as DDIM with
    eta = 1 does (Song et al. 2021, eq. 16).
    """
    T = len(scheduler.beta)
    times = sampling_times(T, num_steps)
    model.eval()
    for t, t_next in zip(times, times[1:] + [None]):
        beta, abar = scheduler(t)
        variance = beta  # sigma_t^2
        if len(times) < T:  # the beta of all the steps from t_next to t in one
            abar_next = 1.0 if t_next is None else scheduler(t_next)[1]
            beta = 1 - abar / abar_next
            variance = (1 - abar_next) / (1 - abar) * beta
        with autocast(x.device):
            eps = model(x, torch.full((len(x),), t, device=x.device)).float()
        x = (x - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()  # Algorithm 2, line 4
        yield t, x
        if t_next is not None:
            x = x + variance.sqrt() * torch.randn_like(x)


def display_reverse(images: list, axes=None):
    """Draws one strip: the pictures (C, H, W) or (1, C, H, W) of a reverse process from left to
    right, on the given row of axes or else on a new figure, which it returns."""
    if axes is None:
        axes = plt.subplots(1, len(images), figsize=(len(images), 1), squeeze=False)[1][0]
    for image, ax in zip(images, axes):
        picture = to_uint8(image.reshape(image.shape[-3:])).permute(1, 2, 0)  # (H, W, C)
        ax.imshow(picture.cpu().numpy(), cmap='gray', vmin=0, vmax=255)
        ax.set(xticks=[], yticks=[])
    return axes[0].figure


def inference(
    checkpoint_path: str | None = None,
    num_time_steps: int | None = None,
    ema_decay: float = 0.9999,
    num_steps: int | None = None,
    seed: int = -1,
    num_images: int = 64,
    folder: str | None = None,
):
    """Draws images from the EMA weights of a checkpoint, by the UNET and the time steps that it
    names, in num_steps steps of the reverse process (None: all, as in the article); num_time_steps,
    if given, must be the checkpoint's.

    Their grid, its animation, and of the first ten the whole process go to folder (None:
    outputs/NAME OF THE CHECKPOINT), and to windows where there is a screen. More than 64 are also
    written one by one, as 8-bit PNG files. seed -1 draws one. ema_decay, of the article's
    signature, changes nothing here. Raises UserError for a checkpoint or a number that cannot be
    used.
    """
    check_numbers({'seed': seed, 'num_images': num_images})
    if rank_and_world()[0] > 0:
        return  # one process draws: the same images however many have trained
    path = Path(checkpoint_path or CHECKPOINT).expanduser()
    saved = load_checkpoint(path)
    device, size = best_device(), saved['config'].get('image_size', 32)
    ema = ModelEmaV3(UNET(**saved['unet']), decay=ema_decay)
    ema.load_state_dict(saved['ema'])
    model = to_device(ema.module, device)
    T = model.time_steps
    if num_time_steps not in (None, T):
        raise UserError(f'num_time_steps is {num_time_steps!r}, but {path} was trained with {T}')
    scheduler = DDPM_Scheduler(T).to(device)
    seed = secrets.randbits(32) if seed == -1 else seed  # which no earlier set_seed decides
    set_seed(seed)

    times = sampling_times(T, num_steps)
    strip, film_times = times_to_show(times, T)
    frames = {t: [] for t in (T, *times) if t in film_times}
    batch, drawn = images_at_once(device, size), 0
    folder = Path(folder or OUTPUTS / path.name)
    folder.mkdir(parents=True, exist_ok=True)  # now, not after the drawing
    one_by_one = Path(folder, f'{num_images}_images_seed_{seed}') if num_images > 64 else None
    all_steps = -(-num_images // batch) * len(times)
    bar = tqdm(None, 'Reverse process', all_steps, bar_format=STEPS_BAR)
    try:
        while drawn < num_images:
            count = min(batch, num_images - drawn)
            shape = count, model.input_channels, size, size  # (B, C, H, W)
            noise = torch.randn(shape, device=device)
            shown = max(0, 64 - drawn)  # of this batch, in the pictures
            frames[T].append(noise[:shown].cpu())
            for t, x in reverse_process(model, noise, scheduler, num_steps):
                bar.update()
                if t in frames:
                    frames[t].append(x[:shown].cpu())
            if one_by_one:
                save_one_by_one(x, one_by_one, drawn)
            drawn += count
    finally:  # also on Ctrl-C
        bar.close()
        if one_by_one:
            print(f'Drawn, one by one: {drawn} of {num_images} images, in {one_by_one}/')
    frames = {t: torch.cat(parts) for t, parts in frames.items()}
    draw_reverse_process(frames, strip, folder, dark_on_light=is_ink(saved['config']))


# ==============================================================================================
# EDIT HERE: the numbers of the runs; then `python ddpm.py` again
# ==============================================================================================

CHECKPOINT = 'checkpoints/ddpm_checkpoint'
FULL = dict(  # the article's run, for a machine with a CUDA GPU
    checkpoint_path=CHECKPOINT,
    dataset='MNIST',  # FashionMNIST, KMNIST, QMNIST, CIFAR10 or a folder; with it checkpoint_path
    image_size=32,  # of a folder's pictures; a multiple of 8, as often as UNET halves them
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
    sample_every=5,  # epochs between two grids of samples
)
PREVIEW = dict(  # the same system made small: four minutes on two CPU cores with bfloat16
    checkpoint_path='checkpoints/preview',
    dataset='MNIST',
    image_size=32,
    num_epochs=2,
    batch_size=20,  # many small steps learn more in the time than few large ones
    lr=2.5e-3,  # 4e-3 is worse; halve it where you double Channels
    lr_decay=True,
    beta2=0.99,  # a shorter memory than 0.999, for a short run
    ema_decay=0.99,
    num_time_steps=500,  # half the work of drawing; the last leaves 8% of the digit
    unet=dict(
        Channels=[8, 16, 32, 64, 64, 48],
        Attentions=[False] * 6,
        num_groups=8,
        dropout_prob=0.0,  # so short a run cannot overfit
    ),
    seed=-1,
    save_minutes=1,
    sample_every=1,
)
DRAWING = dict(  # after a run, and with --sample
    num_images=64,  # above 64, each is also written as a file of its own
    num_steps=None,  # of the reverse process: all, as in the article; 50 are quick
    seed=-1,  # draw one; a number draws the same images again
)


def main():
    parser = argparse.ArgumentParser(
        description='Trains a denoising diffusion model on MNIST and shows the reverse process. '
        'With a CUDA GPU it does the full run, without one the preview. Everything else is edited '
        'in the file, under EDIT HERE.'
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument('--full', action='store_true', help='the full run, also without a GPU')
    choice.add_argument('--preview', action='store_true', help='the preview, also with a GPU')
    sample = 'only draw, from this checkpoint or the weights that come with the repository'
    choice.add_argument('--sample', nargs='?', const=SHIPPED, metavar='CHECKPOINT', help=sample)
    args = parser.parse_args()
    with as_a_program():
        check_names(inference, DRAWING)
        if args.sample is not None:
            folder = OUTPUTS / 'sample' / Path(args.sample).name
            return inference(args.sample, folder=folder, **DRAWING)
        full = args.full or (torch.cuda.is_available() and not args.preview)
        if not (full or args.preview):
            print_once('No CUDA GPU here: this is the preview. --full trains for days on a CPU.')
        numbers = FULL if full else PREVIEW
        check_names(train, numbers)
        check_numbers({**numbers, **DRAWING})  # the drawing's too, before a long training
        sampling_times(numbers.get('num_time_steps', 1000), DRAWING.get('num_steps'))
        train(**numbers)
        inference(numbers.get('checkpoint_path'), **DRAWING)


# ==============================================================================================
# Appendix: what makes it robust. The article has nothing of this, and needs none of it.
# ==============================================================================================

HERE = Path(__file__).resolve().parent
SHIPPED = HERE / 'checkpoints/mnist'
DATA = HERE / 'data'
OUTPUTS = Path('outputs')
DATASETS = ('MNIST', 'FashionMNIST', 'KMNIST', 'QMNIST', 'CIFAR10')
NETWORK_SECONDS = 10  # of silence, after which a download is given up
LONG_RUN = 10_000  # steps from which on compiling the model pays for the minute it takes
FEW_STEPS = 50  # of the grids that show a run's progress
# of 32 x 32: 500 take 10 GB with a UNET of full size, 100 are the quickest on a CPU
IMAGES_AT_ONCE = {'cuda': 500, 'mps': 100, 'cpu': 100}
TOO_FAR = ': lower lr. Only what was saved before is kept'
BAR = '{desc} {percentage:3.0f}%|{bar:12}| '
STEPS_BAR = BAR + '{n_fmt}/{total_fmt} steps, {remaining} to go'
UNET_DEFAULTS = {k: p.default for k, p in inspect.signature(UNET).parameters.items()}
LISTS = ('Channels', 'Attentions', 'Upscales')  # of a UNET, one entry a layer
NUMBERS = {  # what may be asked for: type, least, most
    'batch_size num_epochs image_size num_images': (int, 1, math.inf),
    'num_groups num_heads input_channels output_channels time_steps': (int, 1, math.inf),
    'num_time_steps': (int, 2, math.inf),
    'sample_every steps': (int, 0, math.inf),
    'seed': (int, -1, 2**32 - 1),
    'lr ema_decay dropout_prob': (float, 0, 1),
    'beta2': (float, 0, 0.999999),
    'save_minutes': (float, 0, math.inf),
    'lr_decay': (bool, False, True),
}
MAY_CHANGE = ('num_epochs', 'lr', 'lr_decay', 'beta2', 'ema_decay', 'save_minutes', 'sample_every')


class UserError(ValueError):
    """A mistake the user can mend; `python ddpm.py` prints it as one line and exits with 1."""


def reason(error, line=0):
    """One line of what an exception says, the first if not told otherwise."""
    return (str(error).strip() or type(error).__name__).splitlines()[line].strip()[:200]


# ---- Devices and processes: the same run on a CPU, on one GPU and on several -------------------


def rank_and_world():
    """This process's number and how many there are: (0, 1) unless torchrun started us."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print_once(line):
    if rank_and_world()[0] == 0:
        print(line, flush=True)


def largest_of_all(*values):
    """Of each of the whole numbers the largest that any process has."""
    if rank_and_world()[1] == 1:
        return values
    values = torch.tensor([int(value) for value in values])  # on the CPU: no GPU has to wait
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def best_device():
    """CUDA (under torchrun this process's own GPU), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    alone = rank_and_world()[1] == 1  # gloo cannot reduce MPS tensors
    return torch.device('mps' if torch.backends.mps.is_available() and alone else 'cpu')


def to_device(model, device):
    """The model there, in the memory format in which its convolutions are fastest."""
    last = device.type != 'mps'  # where channels_last meets open bugs of torch
    return model.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)


def half_precision(device):
    """The 16-bit type that the device computes in, rather than emulating it: bfloat16, or on CUDA
    devices without it float16; None where there is neither."""
    if device.type == 'cuda':
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float16
    bf16 = device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if bf16 else None


def autocast(device):
    """16 bits for convolutions and matrix products where the device has them, else float32."""
    dtype = half_precision(device)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def choose_kernels(device, repeatable):
    """On CUDA either kernels that compute the same thing every time or the fastest ones."""
    # a CPU's attention with dropout stays in bfloat16: 1.25 s a step instead of 1.47 s
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(device.type == 'cpu')
    if device.type == 'cuda':
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(repeatable)
        torch.backends.cudnn.deterministic = repeatable
        torch.backends.cudnn.benchmark = not repeatable
        # these two have no deterministic backward pass; flash attention has one
        torch.backends.cuda.enable_mem_efficient_sdp(not repeatable)
        torch.backends.cuda.enable_cudnn_sdp(not repeatable)


def parallel_and_compiled(model, run):
    """The model as the training loop calls it: with gradients averaged over the processes, and
    compiled if the run is long. The weights are those of `model`."""
    network = DistributedDataParallel(model, broadcast_buffers=False) if run.world > 1 else model
    device, problem = next(model.parameters()).device, None
    # run.total, not what is left of it: a run that goes on must compute as it did before
    if run.total < LONG_RUN or device.type == 'mps':
        return network
    print_once('Compiling the UNET ...')
    network.compile()
    try:  # a whole step, so that what cannot be compiled shows here
        with network.no_sync() if run.world > 1 else nullcontext(), autocast(device):
            size = run.config['batch_size'] // run.world, *run.image_shape
            t = torch.zeros(size[0], dtype=torch.long, device=device)
            network(torch.zeros(size, device=device), t).float().mean().backward()
    except Exception as error:  # no compiler on this machine, most likely
        problem = reason(error)
    model.zero_grad()
    run.stop_if_asked()  # a Ctrl-C ends the compilers too, and no step may go without them
    if largest_of_all(problem is not None)[0]:
        network._compiled_call_impl = None
        print_once(f'torch.compile does not work here ({problem}); going on without it')
    return network


def seed_of(seed, stream, index):
    """A seed for the index-th use of a stream of random numbers, unrelated to that of any other."""
    return int(np.random.SeedSequence((seed, stream, index)).generate_state(1)[0])


def rise_and_fall(done):
    """The learning rate's factor when this part of the run is done: up over 3% of it, down to 0."""
    return min(done / 0.03 + 1e-3, 1 - done)


@contextmanager
def as_a_program():
    """Joins the processes of torchrun, if it is that, and ends with one line on stderr for what a
    user can mend."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        join_processes()
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        print('\nStopped.', file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if int(os.environ.get('RANK', 0)) > 0:
            time.sleep(10)  # process 0 has the word; if it has failed, torchrun ends this one now
        line = reason(error)
        if re.search("out of memory|can't allocate memory", str(error)):  # CUDA and MPS; the CPU
            line = 'out of memory: lower batch_size, num_images or Channels, under EDIT HERE'
        elif not isinstance(error, UserError | OSError | MemoryError):
            raise
        sys.exit(f'ddpm.py: {line}')


def join_processes():
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        return
    gpus = torch.cuda.device_count()
    if gpus:
        if int(os.environ['LOCAL_WORLD_SIZE']) > gpus:
            raise UserError(f'--nproc-per-node must be {gpus} or less, the number of GPUs here')
        torch.cuda.set_device(best_device())
    dist.init_process_group('cpu:gloo,cuda:nccl' if gpus else 'gloo')


# ---- Checks: a bad number is named, with what would be right, before any work is done ----------


def plain(value):
    """Numbers, arrays and tuples as Python's own numbers and lists, a path as a string."""
    value = value.tolist() if hasattr(value, 'tolist') else value
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def check_number(name, value, kind, least, most=math.inf):
    """Raises UserError, naming the parameter, unless value is a kind (an int will do for a float,
    0 and 1 for False and True) with least <= value <= most; NaN is not."""
    kinds = {int: (int,), float: (int, float), bool: (bool, int)}[kind]
    value = plain(value)
    if type(value) not in kinds or not least <= value <= most:
        noun = {int: 'a whole number', float: 'a number', bool: 'True or False'}[kind]
        limit = f' of at least {least}' if most == math.inf else f' from {least} to {most}'
        raise UserError(f'{name} is {value!r}, but must be {noun}{"" if kind is bool else limit}')


def check_numbers(config):
    """check_number for every entry of config that NUMBERS has a range for."""
    for names, limits in NUMBERS.items():
        for name in config.keys() & {*names.split()}:
            check_number(name, config[name], *limits)


def check_names(function, numbers):
    """Raises UserError where numbers has a name that the function does not take."""
    try:
        inspect.signature(function).bind(**numbers)
    except TypeError as error:
        raise UserError(f'{error}: a name under EDIT HERE is misspelt') from None


def check_unet(unet):
    """Raises UserError, saying what would be right, where a UNET's arguments do not fit."""
    unet = plain(unet)
    check_numbers(unet)
    lists = Channels, Attentions, Upscales = [unet[name] for name in LISTS]
    n = len(Channels) if isinstance(Channels, list) else 0
    if n < 2 or n % 2 or not all(isinstance(x, list) and len(x) == n for x in lists):
        raise UserError(f'{", ".join(LISTS)} are {lists}, but must be lists of one even length')
    half = n // 2
    if Upscales != [False] * half + [True] * half:
        raise UserError(f'Upscales must be {half} times False, then {half} times True')
    for flag in Attentions:
        check_number('an entry of Attentions', flag, bool, False, True)
    check_number('Channels[0]', Channels[0], int, 1)
    chain = [Channels[0] * 2**i for i in range(half + 1)]  # each layer down doubles
    while len(chain) < n:  # each layer up halves and joins the skip of its mirror
        chain.append(chain[-1] // 2 + chain[n - len(chain)])
    if repr(Channels) != repr(chain):  # 16.0 == 16, but makes no layer
        raise UserError(f'Channels {Channels} do not chain: they must be {chain}')
    for C, attention in zip(Channels, Attentions):
        for name in ('num_groups', 'num_heads')[: 1 + bool(attention)]:
            if C % unet[name]:
                raise UserError(f'{name} {unet[name]} does not divide the {C} in Channels')


def unet_arguments(unet, channels, num_time_steps):
    """All arguments of a UNET for images of so many channels; unet holds what differs from the
    defaults."""
    if unknown := set(unet) - set(UNET_DEFAULTS):
        raise UserError(f'unet has {unknown}, but UNET takes only {list(UNET_DEFAULTS)}')
    of_data = dict(input_channels=channels, output_channels=channels, time_steps=num_time_steps)
    for name, value in of_data.items():
        if unet.get(name, value) != value:
            raise UserError(f'unet has {name}={unet[name]!r}, but here it must be {value}')
    unet = {**UNET_DEFAULTS, **unet, **of_data}
    check_unet(unet)
    return unet


def checked_times(model, x, t):
    """t as whole numbers on the device of x. Raises UserError where x or t do not fit the UNET."""
    C, factor = model.input_channels, 2 ** (model.num_layers // 2)
    if x.ndim != 4 or x.shape[1] != C or any(side % factor for side in x.shape[2:]):
        wanted = f'(batch, {C}, height, width) with both sides multiples of {factor}'
        raise UserError(f'x is {tuple(x.shape)}, but must be {wanted}')
    t = torch.as_tensor(t)
    whole = not t.is_floating_point() and t.dtype is not torch.bool
    if not whole or t.shape not in ((1,), x.shape[:1]):
        raise UserError(f't is {t.dtype} {tuple(t.shape)}, but must be 1 or {len(x)} whole numbers')
    t = t.to(x.device, torch.long)
    # reading a t that is on an accelerator would wait for it, and break a compiled graph in two
    readable = t.device.type == 'cpu' and not torch.compiler.is_compiling()
    if readable and not 0 <= t.min() <= t.max() < model.time_steps:
        raise UserError(f't is from {t.min()} to {t.max()}, outside 0 .. {model.time_steps - 1}')
    return t


# ---- Data: MNIST comes with the repository; other files are used if there, else fetched --------


def load_images(dataset, image_size=32):
    """The training images of one of DATASETS, or of a folder of pictures, (N, C, H, W) uint8.
    Raises UserError for files that are missing or damaged and not to be had."""
    if dataset not in DATASETS:
        folder = Path(str(dataset)).expanduser()
        if folder.is_dir():
            return load_folder(folder, image_size)
        raise UserError(f'dataset is {dataset!r}, but must be {", ".join(DATASETS)} or a folder')
    if image_size != 32:
        raise UserError(f'image_size is {image_size}, but that of {dataset} is always 32')
    if dataset == 'MNIST':
        path = DATA / 'MNIST/raw/train-images-idx3-ubyte.gz'
        try:
            pixels = gzip.decompress(path.read_bytes())[16:]  # behind the header; checks a CRC
            return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(-1, 1, 28, 28)
        except (OSError, EOFError, zlib.error, ValueError, RuntimeError) as error:
            raise UserError(f'{path} is damaged or missing ({reason(error)}): restore it') from None
    rank, world = rank_and_world()
    if rank > 0:
        largest_of_all(0)  # process 0 fetches; NCCL's barrier would give up after ten minutes
    try:
        images = torch.as_tensor(torchvision_dataset(dataset).data)
    except Exception as error:  # of damaged files, the network, the disk
        why = f'{dataset} in {DATA} is damaged or cannot be fetched: {reason(error, -1)}'
        raise UserError(f'{why}. Delete it, or copy it from where torchvision has it') from None
    if rank == 0 and world > 1:
        largest_of_all(0)
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def torchvision_dataset(dataset):
    """The training split of one of torchvision's datasets. What is not there is fetched into a
    folder of its own and moved when it is whole: what a stop leaves is never taken for data."""
    source = getattr(datasets, dataset)
    try:
        return source(DATA, train=True)
    except RuntimeError:
        urls = getattr(source, 'mirrors', None) or [getattr(source, 'url', '')]
        urls = [source.resources['train'][0][0]] if dataset == 'QMNIST' else urls
        print_once(f'Fetching {dataset} from {urls[0]} into {DATA}')
    socket.setdefaulttimeout(NETWORK_SECONDS)
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA) as folder:
        source(folder, train=True, download=True)
        for entry in os.scandir(folder):
            os.replace(entry, DATA / entry.name)
    return source(DATA, train=True)


def load_folder(folder, size):
    """Every picture below a folder, in the order of their paths: the middle square, resized to
    (size, size); grey if all are. What cannot be read is named and left out."""
    paths = sorted(
        path
        for path in folder.rglob('*')
        if path.suffix.lower() in Image.registered_extensions()
        and not any(part.startswith('.') for part in path.relative_to(folder).parts)
    )
    # 3 KB a picture of 32 x 32; a MemoryError comes here, before the work
    images, count = np.empty((len(paths), size, size, 3), np.uint8), 0

    def read(path):
        try:
            with Image.open(path) as picture:
                if picture.mode.startswith('I'):  # 16 bits, which Pillow would clip
                    picture = Image.fromarray((np.asarray(picture) // 256).astype(np.uint8))
                picture = ImageOps.exif_transpose(picture).convert('RGBA')
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
                white = Image.new('RGBA', picture.size, 'white')  # behind what is transparent
                return np.asarray(Image.alpha_composite(white, picture).convert('RGB'))
        except Exception as error:  # each format has errors of its own
            if rank_and_world()[0] == 0:
                tqdm.write(f'{path} is left out: {reason(error)}', file=sys.stderr)

    with ThreadPool() as readers:
        pictures = readers.imap(read, paths, chunksize=16)
        how = dict(total=len(paths), ncols=79, disable=rank_and_world()[0] > 0)
        for picture in tqdm(pictures, f'Reading {folder.name}', **how):
            if picture is not None:
                images[count], count = picture, count + 1
    if count == 0:
        raise UserError(f'{folder} has no picture that can be read')
    images = torch.from_numpy(images[:count]).permute(0, 3, 1, 2)
    grey = all((part == part[:, :1]).all() for part in images.split(1000))
    return (images[:, :1] if grey else images).contiguous()


def to_input(images):
    """(B, C, H, W) uint8 -> float32 in [0, 1]; 28 x 28 is zero-padded to 32 x 32."""
    margin = 2 if images.shape[-1] == 28 else 0
    return F.pad(images.float() / 255, [margin] * 4)


def to_uint8(x):
    """float -> uint8, clamped to [0, 1] and rounded; what to_input has padded stays."""
    return (x.float().clamp(0, 1) * 255).round().byte()


# ---- Runs and checkpoints: no stop loses more than save_minutes, none changes the result -------


class Run:
    """What keeps a training run from being lost. Inside `with`, the checkpoint file is this
    process's alone; from resume on, Ctrl-C and SIGTERM wait until the step under way is saved."""

    def __init__(self, path, config, unet):
        path = Path(path).expanduser()
        self.path = path.resolve() if path.is_symlink() else path  # a link stays a link
        self.config, self.unet = plain(config), plain(unet)
        check_numbers(self.config)
        self.rank, self.world = rank_and_world()
        size = self.config['batch_size']
        if size % self.world:
            raise UserError(f'batch_size is {size}, which {self.world} processes cannot share')
        self.share = slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)
        self.bar, self.done, self.signals, self.exits = tqdm(disable=True), 0, [], ExitStack()

    def __enter__(self):
        if self.rank:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.exits.enter_context(open(f'{self.path}.lock', 'w'))
        except OSError as error:
            raise UserError(f'cannot write {self.path} ({error}): change checkpoint_path') from None
        claim(lock, self.path)
        return self

    def __exit__(self, kind, *_):
        with self.exits:
            with suppress(OSError):
                self.bar.close()
            if self.done and kind and issubclass(kind, OSError):  # nobody reads the output any more
                self.save(last=True)

    def is_finished(self):
        """Reads the checkpoint, if there is one. Raises UserError if it is that of another run."""
        saved = load_checkpoint(self.path, to_train=True) if self.path.exists() else None
        self.saved, self.before = saved, {**saved['unet'], **saved['config']} if saved else {}
        fresh = largest_of_all(secrets.randbits(32))[0]
        if self.config['seed'] == -1:
            self.config['seed'] = self.before.get('seed', fresh)
        self.seed = self.config['seed']
        done = len(saved['losses']) // saved['steps'] if saved and saved['steps'] else 0
        finished = done >= self.config['num_epochs']
        self.compare({**self.unet, **self.config, 'time_steps': self.config['num_time_steps']})
        if finished:
            print_once(f'{self.path}: {done} epochs are done; a larger num_epochs trains on')
        return finished

    def compare(self, numbers):
        """Raises UserError where a number that may not change is not the checkpoint's, so that the
        run could not go on exactly."""
        for name, now in numbers.items():
            then = plain(self.before.get(name, now))
            if then != now and name not in MAY_CHANGE:
                raise UserError(
                    f'{self.path} is from a run with {name}={then!r:.99}, this one has '
                    f'{name}={now!r:.99}: put it back, or to start afresh change checkpoint_path'
                )

    def begin_with(self, images):
        """Settles what depends on the images, (N, C, H, W) uint8. Raises UserError if they are too
        few or not those of the checkpoint."""
        size, name = self.config['batch_size'], self.config['dataset']
        self.steps = len(images) // size  # of an epoch; the last partial batch is dropped
        if self.steps == 0:
            raise UserError(f'batch_size is {size}, but {name} has {len(images)} images')
        self.total = self.steps * self.config['num_epochs']
        self.image_shape = to_input(images[:1]).shape[1:]
        self.unet = unet_arguments(self.unet, images.shape[1], self.config['num_time_steps'])
        side, factor = self.image_shape[-1], 2 ** (len(self.unet['Channels']) // 2)
        if side % factor:
            raise UserError(f'image_size is {side}, but this UNET needs a multiple of {factor}')
        self.config['data'] = f'{len(images)} images, CRC {zlib.crc32(images.numpy()):08x}'
        self.compare({**self.unet, 'data': self.config['data']})

    def resume(self, model, optimizer, scaler, ema):
        """Puts the checkpoint into them; the optimizer's numbers stay as they are."""
        self.model, self.optimizer, self.scaler, self.ema = model, optimizer, scaler, ema
        saved, self.saved = self.saved, None
        self.done = len(saved['losses']) if saved else 0  # steps
        device = next(model.parameters()).device
        self.losses = torch.zeros(max(self.done, self.total), device=device)  # of every step
        if saved:
            self.losses[: self.done] = saved['losses']
            model.load_state_dict(saved['weights'])
            ema.load_state_dict(saved['ema'])
            groups = optimizer.state_dict()['param_groups']
            optimizer.load_state_dict({**saved['optimizer'], 'param_groups': groups})
            for parameter, state in optimizer.state.items():
                for name in ('exp_avg', 'exp_avg_sq'):  # fused Adam pairs them by their strides
                    state[name] = torch.empty_like(parameter).copy_(state[name])
            if saved['scaler']:
                scaler.load_state_dict(saved['scaler'])
            for name, now in self.config.items():  # those of MAY_CHANGE: others are compared
                if (then := self.before.get(name, now)) != now:
                    print_once(f'{name} was {then}, is {now} from here on')
            print_once(f'{self.path}: going on after {self.progress()}')
        self.next_save = time.monotonic() + 60 * self.config['save_minutes']
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for signum in (signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGINT)):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
                    before = signal.signal(signum, self.note_signal)
                    self.exits.callback(signal.signal, signum, before)

    def note_signal(self, signum, _):
        self.signals.append(signum)
        if self.rank == 0:
            with suppress(OSError):
                os.write(2, b'\nStopping: finishing the step and saving ...\n')

    def progress(self):
        epochs, steps = divmod(self.done, self.steps)
        return f'{epochs} epochs and {steps} steps'

    def steps_left(self, epoch):
        """Yields the steps that are left of an epoch, under a bar."""
        size, first = self.config['batch_size'], self.done - epoch * self.steps
        self.began, self.began_at = self.done, time.monotonic()
        self.skipped_before = self.done - self.updates()
        name, how = f'Epoch {epoch + 1}/{self.config["num_epochs"]}', dict(unit=' img')
        how |= dict(initial=first * size, mininterval=0.5, disable=self.rank > 0)
        how['bar_format'] = BAR + '{rate_noinv_fmt}{postfix}'
        with tqdm(None, name, self.steps * size, **how) as self.bar:
            yield from range(first, self.steps)

    def step_done(self, loss):
        """Takes the loss of a step, which is now done; saves, and stops, when it is time to."""
        loss = loss.detach()
        if self.world > 1:
            dist.all_reduce(loss)
        self.losses[self.done] = loss / self.world
        self.done += 1
        ended, finished = self.done % self.steps == 0, self.done == self.total
        # a few times a second the bar is drawn anew; only then is the loss read
        if self.bar.update(self.config['batch_size']) or ended:
            pace = (time.monotonic() - self.began_at) / (self.done - self.began)
            left = tqdm.format_interval(pace * (self.total - self.done))
            loss = self.mean_loss((self.done - 1) // self.steps)
            self.bar.set_postfix_str(f'loss {loss:.4f}, {left} to go')
        if self.world == 1 or self.done % 10 == 0 or finished:  # processes agree now and then
            due = time.monotonic() > self.next_save
            signum, due = largest_of_all(max(self.signals, default=0), due)
            if signum or due or finished:
                self.save(last=signum or finished)
                self.stop_if_asked()

    def mean_loss(self, epoch):
        """The mean over the steps done of an epoch. Raises UserError if one is not finite, unless
        the step was skipped for it: float16 has its overflows, and scales the loss down then."""
        losses = self.losses[epoch * self.steps : self.done][: self.steps]
        mean = losses.mean().item()
        if math.isfinite(mean):
            return mean
        finite = losses.isfinite()
        if self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            return losses[finite].mean().item()
        step = finite.logical_not().nonzero()[0].item()
        where = f'in epoch {epoch + 1}, step {step + 1}'
        raise UserError(f'the loss is {losses[step]} {where}{TOO_FAR}')

    def updates(self):
        """How often Adam has changed the weights."""
        return int(next((state['step'] for state in self.optimizer.state.values()), 0))

    def skipped(self):
        """A word about the steps of this epoch that float16 has skipped."""
        count = self.done - self.updates() - self.skipped_before
        return f' | {count} steps skipped, for float16 overflowed' if count else ''

    def save(self, last):
        """Writes the checkpoint. Raises UserError if the run has diverged, or if the file cannot be
        written and there will be no later chance."""
        self.mean_loss((self.done - 1) // self.steps)
        losses = self.losses[: self.done].clone().cpu()  # a view is saved with all of its tensor
        best, recent = losses.nan_to_num(1).min().item(), losses[-20:].nanmedian().item()
        if best < 0.5 and recent > 0.9:  # 1 is the loss of predicting nothing
            raise UserError(f'the run has diverged, its loss is {recent:.3g} again{TOO_FAR}')
        self.next_save = time.monotonic() + 60 * self.config['save_minutes']
        if self.rank:
            return
        parts = dict(weights=self.model, optimizer=self.optimizer, ema=self.ema, scaler=self.scaler)
        state = {name: part.state_dict() for name, part in parts.items()}
        groups = plain(state['optimizer']['param_groups'])  # may hold numpy's numbers
        state['optimizer']['param_groups'] = groups
        state |= dict(unet=self.unet, config=self.config, steps=self.steps, losses=losses)
        try:
            check_tensors(state)
            save_checkpoint(self.path, state)
        except ValueError as error:
            raise UserError(f'the run has diverged, {error}{TOO_FAR}') from None
        except OSError as error:
            problem = f'cannot write {self.path} ({error}); what it held before is unharmed'
            if last:
                raise UserError(problem) from None
            tqdm.write(f'{problem}; training goes on', file=sys.stderr)

    def stop_if_asked(self):
        (signum,) = largest_of_all(max(self.signals, default=0))
        if signum:
            self.bar.close()
            saved = f'all saved in {self.path}' if self.done else 'with nothing to save'
            with suppress(OSError):  # the terminal may be closed
                print_once(f'\nStopped after {self.progress()}, {saved}. Run again to go on.')
            raise SystemExit(128 + signum)

    def finish(self):
        self.stop_if_asked()
        if self.rank == 0:
            with picture_or_line('the loss curve'):
                draw_losses(self.losses, self.steps, OUTPUTS / self.path.name)
            epochs = self.config['num_epochs']
            print(f'Trained for {epochs} epochs: {self.path}. A larger num_epochs trains on.')


def claim(lock, path):
    """Makes a path's lock this process's until that ends, however it ends. Raises UserError if it
    is another's; where the file system has no locks, that is printed."""
    try:
        import fcntl  # which Windows lacks

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on some network mounts
        raise UserError(f'another run is using {path}: change checkpoint_path') from None
    except (ImportError, OSError) as error:
        print_once(f'{lock.name}: no locks here ({error}). Start no second run on this checkpoint.')


def save_checkpoint(path, state):
    """Writes a file beside path, then renames it: path holds the old state or the new, never less.
    Raises OSError."""
    temporary = Path(f'{path}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save puts its own in place of a full disk's OSError
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, to_train=False):
    """A checkpoint as a dict of tensors on the CPU and plain values, found to be whole: `weights`,
    `optimizer`, `ema`, `unet`, `config`, `losses` (its length is the number of steps done). The
    article's code wrote the first three only; a file that is only to be drawn from has no others
    than `ema`, in any precision, `unet` and `config`. Raises UserError and runs nothing of it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    raise ValueError(f'{part} in it is damaged')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about unusual pickles: the error below says enough
            saved = torch.load(path, map_location='cpu', weights_only=True)
        rest = {'config': {}, 'losses': torch.zeros(0), 'scaler': {}, 'steps': 0}
        saved = {**rest, **saved, 'unet': {**UNET_DEFAULTS, **saved.get('unet', {})}}
        check_numbers({**saved['config'], 'steps': saved['steps']})
        drawing_only = not saved.keys() & {'weights', 'optimizer'}
        for part in ['ema'] if drawing_only else ['weights', 'optimizer', 'ema']:
            if not isinstance(saved.get(part), dict):
                raise ValueError(f'no entry {part}')
        if drawing_only:
            saved['ema'] = {name: value.float() for name, value in saved['ema'].items()}
        check_tensors(saved)
        prefixes = {'weights': '', 'ema': 'module.'}  # of the names that model and average load
        for part in prefixes.keys() & saved.keys():
            entries = {name.removeprefix('module.'): value for name, value in saved[part].items()}
            saved[part] = {prefixes[part] + name: value for name, value in entries.items()}
    except FileNotFoundError:
        raise UserError(f'there is no checkpoint {path}: train first') from None
    except Exception as error:  # whatever a damaged or hostile file sets off
        why = reason(error, -1)
        if isinstance(error, pickle.UnpicklingError):
            why = 'it is none, or holds more than tensors and plain values'
        advice = 'It stays as it is: to start afresh, move it away or change checkpoint_path'
        raise UserError(f'{path} is not a usable checkpoint: {why}. {advice}') from None
    if to_train and drawing_only:
        raise UserError(f'{path} is only to be drawn from: to train, change checkpoint_path')
    return saved


def check_tensors(saved):
    """Raises ValueError unless a checkpoint's tensors are finite and those of its UNET."""
    with torch.device('meta'):  # shapes only
        model = UNET(**saved['unet'])
    names = list(model.state_dict())
    parts = {part: saved[part] for part in ('weights', 'ema') if part in saved}
    moments = saved['optimizer'].get('state') if 'optimizer' in saved else {}
    if moments is None or moments and list(moments) != list(range(len(names))):
        raise ValueError('its optimizer is not that of its UNET')
    for state in moments.values():  # once the step was an int
        state['step'] = torch.as_tensor(state['step'], dtype=torch.float32)
    for kind in ('exp_avg', 'exp_avg_sq') if moments else ():
        parts[kind] = {name: moments[i][kind] for i, name in enumerate(names)}
    if saved['losses'].ndim != 1 or saved['losses'].dtype != torch.float32:
        raise ValueError('its losses are not float32 numbers in a row')
    for part, tensors in parts.items():
        tensors = {name.removeprefix('module.'): value for name, value in tensors.items()}
        model.load_state_dict(tensors, assign=True)  # raises where names or shapes differ
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise ValueError(f'{part} {name} is not finite float32')


# ---- Pictures: each run has a folder of its own, and what it holds is printed -------------------


def is_ink(config):
    """Whether images are strokes that look best dark on light: MNIST's digits."""
    return config.get('dataset', 'MNIST') == 'MNIST'


@contextmanager
def picture_or_line(what):
    """Where a picture cannot be written, the run goes on without it."""
    try:
        yield
    except OSError as error:
        tqdm.write(f'cannot write {what} ({error}); going on without', file=sys.stderr)


def images_at_once(device, size):
    """How many images of size x size are drawn at a time."""
    return max(1, IMAGES_AT_ONCE[device.type] * 32**2 // size**2)


def times_to_show(times, T):
    """Of the steps of a reverse process those of the article's strip, and those of a film, which
    begins with the noise, t = T."""
    strip = [min(times, key=lambda t: abs(t - s * T / 1000)) for s in STRIP_TIMES] + times[-1:]
    return strip, {T, *strip, *times[:: -(-len(times) // 50)]}  # 50 or so


def grid(x, columns=8):
    """(B, C, H, W) in [0, 1] -> one PIL picture, twice as large."""
    x = F.interpolate(x.float(), scale_factor=2)
    return to_pil_image(make_grid(to_uint8(x).cpu(), columns, pad_value=255)[: x.shape[1]])


def save_grid(x, path, columns=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(x, columns).save(path)


def draw_progress(model, scheduler, run):
    """After every sample_every epochs a grid of samples, always from the same noise; none when the
    run is asked to stop."""
    epoch, step = divmod(run.done, run.steps)
    every = run.config['sample_every']
    if run.rank or step or not epoch or not every or epoch % every:
        return
    device, steps = scheduler.beta.device, min(FEW_STEPS, len(scheduler.beta))
    torch.manual_seed(0)  # each step of the training seeds anew
    count = min(64, images_at_once(device, run.image_shape[-1]))
    noise = torch.randn(count, *run.image_shape, device=device)
    process = reverse_process(model, noise, scheduler, steps)
    for _, x in tqdm(process, 'Drawing the progress', steps, bar_format=STEPS_BAR, leave=False):
        if run.signals:
            return
    path = OUTPUTS / run.path.name / f'progress/epoch_{epoch:03d}.png'
    with picture_or_line(path):
        save_grid(1 - x if is_ink(run.config) else x, path)


def save_one_by_one(x, folder, first):
    """(B, C, H, W) -> files of 8 bits, as tools that measure FID take them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(to_uint8(x).cpu(), first):
        to_pil_image(image).save(folder / f'{i:06d}.png')


def draw_reverse_process(frames, strip, folder, dark_on_light):
    """frames: {t: (B, C, H, W)} from noise to images; strip: the times to show side by side."""
    if dark_on_light:
        frames = {t: 1 - x for t, x in frames.items()}
    last = frames[strip[-1]]
    save_grid(last[:10], folder / 'digits.png', columns=5)
    save_grid(last, folder / 'grid.png')
    # noise in more greys or colours would be megabytes; 60 ms a frame, the images stay
    film = [grid(x[:32]).quantize(16 if x.shape[1] == 1 else 64) for x in frames.values()]
    times = [60] * (len(film) - 1) + [2500]
    options = dict(save_all=True, append_images=film[1:], duration=times, loop=0)
    film[0].save(folder / 'reverse.gif', **options)

    rows = min(10, len(last))
    figure, axes = plt.subplots(rows, len(strip), figsize=(len(strip), rows + 0.3), squeeze=False)
    figure.subplots_adjust(0, 0, 1, 1 - 0.3 / rows, wspace=0.05, hspace=0.05)
    for i, row in enumerate(axes):
        display_reverse([frames[t][i] for t in strip], row)
    for ax, t in zip(axes[0], strip):
        ax.set_title(f't = {t}' if ax is not axes[0][-1] else '$x_0$', fontsize=9)
    figure.savefig(folder / 'reverse.png', dpi=100)
    print(f'Drawn, in {folder}/: reverse.png, digits.png, grid.png, reverse.gif', flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # where there is no screen
        plt.show()
    plt.close(figure)


def draw_losses(losses, steps, folder):
    """losses: one a step of the run -> the curve of their means over a 50th of an epoch."""
    window = max(1, steps // 50)
    means = losses[: len(losses) // window * window].reshape(-1, window).mean(1).cpu()
    figure, ax = plt.subplots(figsize=(6, 3.5), layout='tight')
    ax.plot(torch.arange(1, len(means) + 1) * window / steps, means, color='black', linewidth=1)
    ax.set(xlabel='epoch', ylabel='mean square error of the noise', yscale='log')
    ax.grid(alpha=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / 'loss.png', dpi=100)
    plt.close(figure)


if __name__ == '__main__':
    main()
