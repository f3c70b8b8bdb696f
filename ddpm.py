"""DDPM: a denoising diffusion model that learns to draw MNIST's digits from noise, in one file.

    python ddpm.py --sample    samples digits in 8 to 17 s, from weights in the repository
    python ddpm.py             trains: the article's 75 epochs on a CUDA GPU, else the preview
    python ddpm.py --preview   trains a small UNET, 6 to 13 minutes on two CPU cores
    torchrun --nproc-per-node=4 ddpm.py     the article's run on several GPUs

Settings are edited under EDIT HERE. Run it again and it resumes where it stopped. The method is
that of Ho, Jain & Abbeel 2020 (arXiv:2006.11239, "the paper"), the shorter sampler that of DDIM
(Song, Meng & Ermon 2021, arXiv:2010.02502). docs/ddpm.md explains both, step by step.
"""

import argparse
import gzip
import inspect
import json
import math
import os
import random
import secrets
import signal
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path

# idle OpenMP threads soon sleep: spinning made training beside a busy process 30 times slower
os.environ.setdefault('GOMP_SPINCOUNT', '10000')
if 'ipykernel' in sys.modules:
    warnings.filterwarnings('ignore', 'IProgress')  # timm's imports ask for ipywidgets
elif os.environ.get('MPLBACKEND', '').startswith('module://'):
    del os.environ['MPLBACKEND']  # a notebook's, which `!python ddpm.py` inherits and cannot use

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from filelock import FileLock
from PIL import Image, ImageDraw, ImageOps
from timm.utils import ModelEmaV3
from torch import nn
from torchvision import datasets, utils
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

# ==== EDIT HERE: the settings of the runs; then `python ddpm.py` again ============================

CHECKPOINT = 'checkpoints/ddpm_checkpoint'
FULL = dict(  # the article's run, for a machine with a CUDA GPU
    checkpoint_path=CHECKPOINT,
    dataset='MNIST',  # FashionMNIST, KMNIST, QMNIST, CIFAR10 or a folder; change the path above too
    image_size=32,  # of a folder's pictures; a multiple of 8, since UNET halves them three times
    num_epochs=75,
    batch_size=64,
    lr=2e-5,  # of Adam, constant
    ema_decay=0.9999,  # at most: it warms up, the average covers the last tenth of the run so far
    num_time_steps=1000,  # with fewer, a linear schedule leaves bright images visible at the end
    unet=dict(),  # what differs from UNET's defaults
    lr_decay=False,  # True: a short warm-up, then down to 0; the article's lr is constant
    beta2=0.999,  # torch's default
    seed=-1,  # a new one for each run; with a seed, CUDA is deterministic and slower
    save_minutes=2,  # between two saves: what kill -9 or a power cut may cost
    sample_every=5,  # epochs between two grids of samples
)
PREVIEW = dict(  # the same made small: 6 to 13 minutes on two CPU cores
    FULL,
    checkpoint_path='checkpoints/preview',
    num_epochs=2,
    batch_size=20,  # many small steps learn more in the time than few large ones
    lr=2.5e-3,  # 4e-3 is worse; halve it where you double Channels
    lr_decay=True,
    beta2=0.99,  # a shorter memory than 0.999, for a short run
    num_time_steps=500,  # half the work of sampling; enough for images as dark as MNIST's
    unet=dict(
        Channels=[8, 16, 32, 64, 64, 48],
        Attentions=[False] * 6,
        num_groups=8,
        dropout_prob=0.0,  # so short a run cannot overfit
    ),
    save_minutes=1,
    sample_every=0.25,
)
AFTER_TRAINING = dict(  # what is sampled after a run
    num_images=64,  # more than 64 are also written one by one
    num_steps=None,  # of the reverse process: all, as in the article; below 10 are too few
    seed=-1,  # a new one each time; a seed gives the same images again, for the same num_images
)
SAMPLE = dict(num_images=64, num_steps=30, seed=-1)  # the same for --sample: few steps are quick

# ==== The UNet (article: Unet, 模型代码实现) ======================================================
# x is (B, C, H, W); t counts from 0, the least noisy step.


class SinusoidalEmbeddings(nn.Module):
    """A table whose row t holds the sines (even columns) and cosines (odd columns) of
    t * 10000^(-2i / embed_dim), i = 0 .. embed_dim/2 - 1, the highest frequencies first (Vaswani
    et al. 2017, section 3.5)."""

    def __init__(self, time_steps: int, embed_dim: int):
        super().__init__()
        position = torch.arange(time_steps).float()[:, None]  # (T, 1)
        frequency = torch.exp(torch.arange(0, embed_dim, 2) * (-math.log(10000.0) / embed_dim))
        embeddings = torch.zeros(time_steps, embed_dim)  # (T, E)
        embeddings[:, 0::2] = torch.sin(position * frequency)
        embeddings[:, 1::2] = torch.cos(position * frequency)
        self.register_buffer('embeddings', embeddings, persistent=False)

    def forward(self, x, t):
        """t, an int, a list or a tensor (B,) -> (B, E, 1, 1), or (1, E, 1, 1) for one t for all.
        Raises IndexError or RuntimeError for a t that is not a whole number in 0 .. T-1."""
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        return F.embedding(t, self.embeddings.to(x.device))[:, :, None, None]


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
        x = x + embeddings[:, : x.shape[1]]  # its first C columns
        r = self.conv1(self.relu(self.gnorm1(x)))
        r = self.dropout(r)
        r = self.conv2(self.relu(self.gnorm2(r)))
        return r + x  # the skip already holds the embedding


class Attention(nn.Module):
    """Multi-head self-attention over the H*W positions."""

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

    def __init__(self, upscale, attention, num_groups, dropout_prob, num_heads, C):
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
            x = self.attention_layer(x)  # as in the article without norm and skip
        x = self.ResBlock2(x, embeddings)
        return self.conv(x), x


class UNET(nn.Module):
    """eps_theta(x, t): predicts the noise in x.

    The first half of the layers goes down and keeps skips, the second half comes up and joins them:
    with the defaults at 32, 16, 8, 4, 8 and 16 pixels. A layer of C channels outputs 2C on the way
    down and C/2 on the way up, where the skip's channels join them: 512/2 + 256 = 512, 512/2 + 128
    = 384.
    """

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
        self.num_layers = len(Channels)
        self.input_channels, self.time_steps = input_channels, time_steps
        self.image_size = 32  # for `sample`; train and load_model set it
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
        """x (B, C, H, W), t an int, a list or a tensor (B,) -> (B, C, H, W)."""
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


# ==== The scheduler (article: 调度器) =============================================================


class DDPM_Scheduler(nn.Module):
    """The variances beta of the forward process, and `alpha`, the article's name for the paper's
    alpha-bar: the cumulative product of 1 - beta.

    sqrt(alpha[t]) is how much of an image is left at step t. At the last it must be near 0, since
    sampling starts from noise alone, but not at it, since sampling divides by it. The first steps
    are small, since what they destroy is the finest detail."""

    def __init__(self, num_time_steps: int = 1000):
        super().__init__()
        beta = torch.linspace(1e-4, 0.02, num_time_steps)  # 1000 steps leave 0.6% of an image
        self.register_buffer('beta', beta, persistent=False)
        self.register_buffer('alpha', torch.cumprod(1 - beta, dim=0), persistent=False)

    def forward(self, t):
        """t, an int, a list or a tensor -> beta_t and alpha-bar_t, each of the shape of t."""
        return self.beta[t], self.alpha[t]


# ==== Training (article: 训练代码) ================================================================


def set_seed(seed: int = 42):
    """Seeds torch, CUDA, numpy and random, and makes cuDNN deterministic. See `seeded`."""
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def diffusion_loss(model, scheduler, x, t, eps):
    """The mean square error of what the model predicts, a float32 scalar; x (B, C, H, W) images in
    [0, 1], t (B,) timesteps, eps (B, C, H, W) ~ N(0, I)."""
    abar = scheduler(t)[1][:, None, None, None]  # (B, 1, 1, 1)
    x_t = abar.sqrt() * x + (1 - abar).sqrt() * eps  # eq. 4
    with autocast(x.device):
        prediction = model(x_t, t)
    # eq. 14: the target is the noise rather than the image, which gave the paper its best samples;
    # by eq. 4 each follows from the other. Predicting 0 gives a loss of 1
    return F.mse_loss(prediction.float(), eps)


def train(
    batch_size: int = 64,
    num_time_steps: int = 1000,
    num_epochs: int = 15,
    seed: int = -1,
    ema_decay: float = 0.9999,
    lr: float = 2e-5,
    checkpoint_path: str | Path | None = None,
    dataset: str | Path = 'MNIST',
    unet: dict | None = None,
    save_minutes: float = 2,
    sample_every: float = 5,
    lr_decay: bool = False,
    beta2: float = 0.999,
    image_size: int = 32,
):
    """Algorithm 1 of the paper, until num_epochs epochs are done, those of a resumed run included.

    If the file checkpoint_path (None: checkpoints/ddpm_checkpoint) exists, its run is resumed,
    exactly as if it had never stopped (on CUDA only with a seed). It is saved every save_minutes,
    at the end and when a signal stops it. dataset: one of DATASETS or a folder of pictures, cropped
    and resized to image_size. unet: UNET's arguments that differ from its defaults. sample_every:
    epochs between two grids (0: none). seed: -1 draws one. lr_decay: by lr_schedule. beta2: Adam's.

    Raises UserError (a ValueError) for a setting out of range, for data or a checkpoint that cannot
    be used, and when training diverges; KeyboardInterrupt by a signal, once all is saved.
    """
    config = dict(locals())
    check_arguments(train, config)
    images = load_images(dataset, image_size)  # (N, C, H, W) uint8
    run = Run(config, images)
    with locked(run.path), seeded(run.seed, deterministic=seed != -1), signals_noted(run):
        device = best_device()
        model = to_device(UNET(**run.unet), device)
        model.image_size = images.shape[-1]  # for `sample`; the average copies it
        scheduler = DDPM_Scheduler(num_time_steps).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, beta2), fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=half_precision(device) is torch.float16)
        # samples come from averaged weights, which vary less than those of any one step; the decay
        # warms up, n / (n + 10) in step n, so that the average soon forgets the random start
        ema = ModelEmaV3(model, ema_decay, use_warmup=True, warmup_gamma=10, warmup_power=1)
        run.resume(weights=model, optimizer=optimizer, ema=ema, scaler=scaler)
        images = images.to(device)
        share = slice(RANK, None, WORLD_SIZE)  # of a batch, where several processes train
        network = compile_and_parallelize(model, run, to_input(images[:batch_size][share]))

        for epoch in run.epochs():
            # instead of a DataLoader: all images are on the device, in a new order every epoch
            torch.manual_seed(fold_in(run.seed, 0, epoch))
            batches = torch.randperm(len(images), device=device).split(batch_size)
            for batch in batches[run.step % run.steps_per_epoch : run.steps_per_epoch]:
                # all that torch draws is a function of seed and step: so resuming is exact
                torch.manual_seed(fold_in(run.seed, 1, run.step))
                if lr_decay:
                    for group in optimizer.param_groups:
                        group['lr'] = lr * lr_schedule(run.step, run.total_steps)

                # Algorithm 1, lines 2 to 5
                x = to_input(images[batch])  # (B, C, H, W) in [0, 1]
                t = torch.randint(num_time_steps, (batch_size,), device=device)
                eps = torch.randn_like(x)
                if RANK > 0:  # other dropout masks than those of process 0
                    torch.manual_seed(fold_in(run.seed, 1 + RANK, run.step))
                optimizer.zero_grad()
                loss = diffusion_loss(network, scheduler, x[share], t[share], eps[share])
                scaler.scale(loss).backward()  # scales in float16 only
                scaler.step(optimizer)
                scaler.update()
                ema.update(model, step=run.step + 1)
                run.step_done(loss)  # saves, samples and stops when it is time to


# ==== Inference (article: 推理) ===================================================================


@torch.no_grad()
def reverse_process(model, x, scheduler, num_steps: int | None = None, generator=None):
    """Algorithm 2 of the paper: turns noise into images; yields (t, x) after every step, from
    t = T-1 down to 0; x is the mean of the step, to which its noise is added afterwards.

    model(x, t) may be any function; x (B, C, H, W) ~ N(0, I); generator: of the noise; all are on
    one device. num_steps is how many of the T steps to take (None: all), see `respace`.
    """
    times = sampling_times(len(scheduler.beta), num_steps)
    beta, abar, sigma = respace(scheduler, times)  # one entry a step
    for i, t in enumerate(times):
        with autocast(x.device):
            eps = model(x, torch.full((len(x),), t, device=x.device)).float()
        x = (x - beta[i] / (1 - abar[i]).sqrt() * eps) / (1 - beta[i]).sqrt()  # Alg. 2, line 4
        yield t, x
        # each step but the last samples from a Gaussian around this mean; without its noise only
        # fragments come out, and after the last step the mean is the image
        if t != times[-1]:
            x = x + sigma[i] * torch.empty_like(x).normal_(generator=generator)


def load_model(checkpoint_path: str | Path):
    """The UNET of a checkpoint with its EMA weights, in eval mode on the best device, for `sample`.
    It knows its `time_steps` and `image_size`. Raises UserError for an unusable checkpoint."""
    saved = load_checkpoint(checkpoint_path)
    # UNET() draws initial weights: the caller's random state stays as it was
    with errors_as(f'{checkpoint_path} is not a usable checkpoint'), torch.random.fork_rng([]):
        ema = ModelEmaV3(UNET(**saved['unet']).float())
        ema.load_state_dict(saved['ema'])
    ema.module.image_size = saved['config'].get('image_size', 32)
    return to_device(ema.module.eval(), best_device())


def sample(
    model, num_images: int, num_steps: int | None = None, seed: int = -1, noise=None, on_step=None
):
    """Images from a model of `load_model`: (N, C, H, W) float32 in [0, 1], on the CPU.

    num_steps: of the reverse process; all T (None) are the article's, fewer have another variance
    (see `respace`). seed: of the noise; -1 draws one; the images depend on num_images, too. noise
    (N, C, H, W): start from this x_T instead. on_step(first, t, x) is called for each batch, whose
    first image has the index `first`, with the noise, t = T, and after every step. Raises UserError
    for an argument out of range, and where samples are not finite.
    """
    check_arguments(sample, dict(num_images=num_images, num_steps=num_steps, seed=seed))
    device, size, T = next(model.parameters()).device, model.image_size, model.time_steps
    num_steps = len(sampling_times(T, num_steps))
    training, scheduler = model.training, DDPM_Scheduler(T).to(device)
    model.eval()
    generator = torch.Generator(device).manual_seed(secrets.randbits(32) if seed == -1 else seed)
    shape = num_images, model.input_channels, size, size
    if noise is None:
        noise = torch.empty(shape, device=device, dtype=torch.float32).normal_(generator=generator)
    noise = torch.as_tensor(noise)
    if noise.shape != shape or not noise.isfinite().all():
        raise UserError(f'noise is {tuple(noise.shape)}, but must be {shape}, and finite')
    images, at_once = [], images_at_once(device, size)
    starts = range(0, num_images, at_once)
    with progress_bar(desc='Sampling', total=len(starts) * (num_steps + 1), leave=None) as bar:
        for first in starts:
            x_T = noise[first : first + at_once].to(device, torch.float32)  # (B, C, H, W)
            process = reverse_process(model, x_T, scheduler, num_steps, generator)
            for t, x in chain([(T, x_T)], process):
                bar.update()
                if on_step:
                    on_step(first, t, x)
            images.append(x.clamp(0, 1).cpu())
    model.train(training)
    if (images := torch.cat(images)).isnan().any():
        raise UserError('samples are not finite: the last beta may be too near to 1')
    return images


def display_reverse(images: list):
    """A figure of a reverse process from left to right: pictures (C, H, W) or (1, C, H, W)."""
    figure, axes = plt.subplots(1, len(images), figsize=(len(images), 1), squeeze=False)
    for image, ax in zip(images, axes[0]):
        picture = to_uint8(image.reshape(image.shape[-3:])).permute(1, 2, 0)  # (H, W, C)
        ax.imshow(picture.cpu().numpy(), cmap='gray', vmin=0, vmax=255)
        ax.set_axis_off()
    return figure


def inference(
    checkpoint_path: str | Path | None = None,
    num_time_steps: int | None = None,
    ema_decay: float = 0.9999,
    num_steps: int | None = None,
    seed: int = -1,
    num_images: int = 64,
):
    """Samples images from the EMA weights of a checkpoint, returns them as `sample` does, and shows
    how they come out of noise.

    `folder_of_pictures` gets the grid of the first 64, the reverse process of the first ten and an
    animation, and more than 64 images one by one. A window or the notebook shows the grid and a
    reverse process. num_time_steps, if given, must be the checkpoint's; ema_decay is ignored; the
    rest are arguments of `sample`. Raises UserError for an unusable checkpoint or setting."""
    check_arguments(inference, dict(locals()))
    path = Path(checkpoint_path or CHECKPOINT).expanduser()
    model = load_model(path)
    T = model.time_steps
    if num_time_steps not in (None, T):
        raise UserError(f'num_time_steps is {num_time_steps}, but {path} was trained with {T}')
    seed = secrets.randbits(32) if seed == -1 else seed
    times = sampling_times(T, num_steps)
    strip, animation = (times_to_show(times, T, count) for count in (10, 40))
    folder = folder_of_pictures(path)
    name = f'{num_images}_images_{len(times)}_steps_seed_{seed}'
    one_by_one = folder / name if num_images > 64 else None
    (one_by_one or folder).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=one_by_one or folder).close()  # OSError if it cannot be written
    for old in one_by_one.glob('*.png') if one_by_one else []:  # these may have other weights
        old.unlink()
    frames = {}  # t -> the first images, (B, C, H, W)

    def on_step(first, t, x):
        if first == 0 and t in (T, *strip, *animation):
            frames[t] = x[:32].cpu()
        if one_by_one and t == times[-1]:
            with or_a_line(f'cannot write pictures into {one_by_one}'):
                for i, image in enumerate(to_uint8(x).cpu(), first):
                    to_pil_image(image).save(one_by_one / f'{i:06d}.png')

    images = sample(model, num_images, num_steps, seed, on_step=on_step)
    print(f'Sampled {num_images} images in {len(times)} steps with seed {seed}')
    picture = grid(images[:64])
    with or_a_line(f'cannot write pictures into {folder}'):
        picture.save(folder / 'grid.png')
        draw_reverse(frames, strip, folder)
        print(f'Saved in {folder}/: grid.png, reverse.png, reverse.gif', one_by_one or '')
    with or_a_line('cannot show pictures'):
        if plt.get_backend().lower() not in NO_SCREEN:
            plt.figure(figsize=(5, 5)).add_axes((0, 0, 1, 1)).imshow(picture, cmap='gray')
            display_reverse([frames[t][0] for t in strip])
            plt.show()
    return images


# ==== The program =================================================================================


def main(arguments=()):
    """`python ddpm.py ARGUMENTS`: trains and samples, or only samples."""
    whole = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=whole)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument('--full', action='store_true', help='the full run, also without a GPU')
    choice.add_argument('--preview', action='store_true', help='the preview, also with a GPU')
    text = 'only sample, from this checkpoint or the weights that come with the repository'
    default = SAMPLE.get('checkpoint_path', PRETRAINED)
    choice.add_argument('--sample', nargs='?', const=default, metavar='CHECKPOINT', help=text)
    args = parser.parse_args(arguments)
    with errors_in_one_line(), processes_joined():
        path, sampling = args.sample, AFTER_TRAINING if args.sample is None else SAMPLE
        check_arguments(inference, sampling)
        if path is None:
            full = args.full or (torch.cuda.is_available() and not args.preview)
            if not (full or args.preview):
                print('No CUDA GPU here: this is the preview. --full trains for days on a CPU.')
            settings = FULL if full else PREVIEW
            check_arguments(train, settings)
            train(**settings)
            path = settings.get('checkpoint_path')
        if RANK == 0:
            inference(**{**sampling, 'checkpoint_path': path})


# ==== Appendix: what makes it robust; the article needs none of it ================================

DATA = Path(__file__).resolve().parent / 'data'
PRETRAINED = DATA.parent / 'checkpoints/mnist'
OUTPUTS = Path('outputs')
DATASETS = ('MNIST', 'FashionMNIST', 'KMNIST', 'QMNIST', 'CIFAR10')
RANK, WORLD_SIZE = 0, 1  # of this process, among those that torchrun started
if dist.is_available() and dist.is_torchelastic_launched():
    RANK, WORLD_SIZE = (int(os.environ[name]) for name in ('RANK', 'WORLD_SIZE'))
COMPILE_FROM = 10_000  # steps of a run: fewer do not pay for the minute that compiling takes
STRIP_TIMES = (999, 700, 550, 400, 300, 200, 100, 50, 15, 0)  # the article's, of 1000; 0: x_0
PROGRESS_STEPS = 50  # of the reverse process, for the grids that show a run's progress
NO_SCREEN = ('agg', 'cairo', 'pdf', 'pgf', 'ps', 'svg', 'template')  # matplotlib's backends
UNET_DEFAULTS = {k: p.default for k, p in inspect.signature(UNET).parameters.items()}
# (lowest, highest); whole numbers that are not listed are at least 1, others at least 0
RANGES = dict(lr=(0, 1), ema_decay=(0, 1), beta2=(0, 0.999999), seed=(-1, 2**32 - 1))
RANGES['num_time_steps'] = (2, math.inf)
# the settings that may differ when a run is resumed; of a dataset the images are compared
MAY_CHANGE = 'dataset num_epochs lr lr_decay beta2 ema_decay save_minutes sample_every'.split()


# ---- Mistakes: one line that names what is wrong, before training starts -----------------------


class UserError(ValueError):
    """A mistake the user can mend; `python ddpm.py` prints it as one line and exits with 1."""


@contextmanager
def errors_as(problem, advice='to start afresh, move it away or change checkpoint_path'):
    """Raises UserError in place of whatever goes wrong inside."""
    try:
        yield
    except Exception as error:
        raise UserError(f'{problem} ({error!r:.200}): {advice}') from None


class Stream:
    """Standard output or error, but silent where it is closed, full or gone: no reason to stop."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, 'w')
        with suppress(Exception):  # letters that the terminal lacks are escaped
            self.stream.reconfigure(errors='backslashreplace')

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError, ValueError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self.stream.flush()


@contextmanager
def or_a_line(problem):
    """Where a picture, say, cannot be written a line says so, and the program goes on."""
    try:
        yield
    except Exception as error:  # matplotlib, Pillow and torch have many
        tqdm.write(f'{problem} ({error!r:.200}); going on')


@contextmanager
def errors_in_one_line():
    """Turns errors that the user can mend into one line on stderr and exit code 1."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Stream, streams)
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f'\n{str(stop) or "Stopped."}')
        sys.exit(130)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f'ddpm.py: {str(error) or repr(error)}')
    finally:
        with suppress(Exception):  # one that fails stays wrapped: Python flushes it at its exit
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = streams


def progress_bar(**options):
    """tqdm's, of process 0: a line a minute in a log file, in a notebook among what is printed."""
    file = sys.stdout if 'ipykernel' in sys.modules else sys.stderr
    if not (file is sys.stdout or file.isatty()):
        options |= dict(mininterval=60, maxinterval=60)
    return tqdm(file=file, disable=RANK > 0, **options)


def check_arguments(function, given):
    """Raises UserError for a name that is no parameter, or a value of another type or range."""
    parameters = inspect.signature(function).parameters
    for name, value in given.items():
        if name not in parameters:
            raise UserError(f'{function.__name__} takes no {name!r}, only {", ".join(parameters)}')
        kind, limits = function.__annotations__.get(name, object), ''
        fits = isinstance(value, int | float if kind is float else kind) and str(value)
        if kind in (int, float, int | None) and fits and value is not None:
            low, high = RANGES.get(name, (0 if kind is float else 1, math.inf))
            limits = f' from {low} to {high}' if high < math.inf else f', at least {low}'
            fits = type(value) is not bool and low <= value <= high and value < math.inf
        if not fits:
            kinds = ' or '.join(kind.__name__ for kind in getattr(kind, '__args__', [kind]))
            raise UserError(f'{name} is {value!r:.99}, but must be {kinds}{limits}')


def warn_of_few_timesteps(T, images):
    """Prints a line where samples will suffer from how much of an image the last timestep leaves:
    training still sees it there, but sampling starts from noise, whose mean is 0."""
    left = DDPM_Scheduler(T).alpha[-1].sqrt().item()
    mean = to_input(images[:: len(images) // 1000 + 1]).mean().item()
    # the brightness left, in standard deviations of the mean of the noise's pixels
    if left > 0.1 or left * mean * images.shape[-1] > 0.5:
        print(f'After {T} timesteps {left:.1%} of an image are left: take more, or samples suffer')


# ---- Devices and processes: the same run on a CPU, on one GPU and on several -------------------


@contextmanager
def processes_joined():
    """Inside, the processes of torchrun, if it has started us, work together; the first prints."""
    if WORLD_SIZE > 1:
        with errors_as('cannot join the processes', 'start no more of them than there are GPUs'):
            if torch.cuda.is_available():
                torch.cuda.set_device(best_device())
            dist.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, 'w')
    yield
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def best_device():
    """CUDA (under torchrun this process's own GPU), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)) if WORLD_SIZE > 1 else 0)
    mps = torch.backends.mps.is_available() and WORLD_SIZE == 1  # gloo cannot reduce MPS tensors
    return torch.device('mps' if mps else 'cpu')


def to_device(model, device):
    """The model there, in the memory format in which its convolutions are fastest."""
    last = device.type != 'mps'  # where channels_last meets open bugs of torch
    return model.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)


def half_precision(device):
    """The 16-bit type that is faster than float32 there, if any: bfloat16, on old GPUs float16."""
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported():
        cpu = getattr(torch.cpu, 'get_capabilities', dict)().get('cpu_name', '')
        if 'Intel' not in cpu or torch.cpu._is_amx_tile_supported():  # theirs is slow without
            return torch.bfloat16


def autocast(device):
    """16 bits for convolutions and matrix products where the device has them, else float32."""
    dtype = half_precision(device)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def seeded(seed, deterministic):
    """Inside, random numbers follow from the seed, and CUDA's kernels are deterministic or else the
    fastest. Afterwards the caller's random state and switches are put back."""
    python, numpy = random.getstate(), np.random.get_state()
    before = torch.are_deterministic_algorithms_enabled()
    gpu = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(gpu), torch.backends.cudnn.flags(enabled=True):
            set_seed(seed)
            if gpu:
                os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
                torch.use_deterministic_algorithms(deterministic)
                torch.backends.cudnn.deterministic = deterministic
                torch.backends.cudnn.benchmark = not deterministic
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if gpu:
            torch.use_deterministic_algorithms(before)


def compile_and_parallelize(model, run, x):
    """The model, sharing its weights: compiled if the run is long, with gradients averaged over the
    processes. x (B, C, H, W) is like the input of a step, by which compiling is tried."""
    network = model
    # total_steps, not what is left of them: a run that is resumed must compute as it did before
    if run.total_steps >= COMPILE_FROM and x.device.type != 'mps':
        with or_a_line('torch.compile does not work here'), autocast(x.device):
            compiled = torch.compile(model)
            compiled(x, torch.zeros(len(x), dtype=torch.long, device=x.device)).sum().backward()
            network = compiled
    return network if WORLD_SIZE == 1 else nn.parallel.DistributedDataParallel(network)


def fold_in(*numbers):
    """Hashes whole numbers into one seed; if one of them differs, it is an unrelated seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def lr_schedule(step, total_steps):
    """The learning rate's factor: up to 97% over the first 3% of a run, then linearly down to 0."""
    return min(step / total_steps / 0.03 + 1e-3, 1 - step / total_steps)


# ---- Fewer sampling steps: Algorithm 2 for some of the timesteps -------------------------------


def sampling_times(num_time_steps: int, num_steps: int | None = None) -> list:
    """num_steps timesteps (None: all) from T-1 down to 0, evenly spread; if num_steps is 1,
    only T-1. Raises UserError unless num_steps is in 1 .. T."""
    num_steps = num_time_steps if num_steps is None else num_steps
    if num_steps not in range(1, num_time_steps + 1):
        raise UserError(f'num_steps is {num_steps!r}, but must be from 1 to {num_time_steps}')
    return torch.linspace(num_time_steps - 1, 0, num_steps).round().long().tolist()


def respace(scheduler, times):
    """beta, alpha-bar and sigma for the steps of a reverse process through these timesteps.

    All of them: the article's, with sigma_t^2 = beta_t. Fewer: each is one longer step, whose beta,
    1 - abar_t / abar_next, is that of all the steps it replaces; sigma^2 is then beta-tilde, the
    paper's other choice and the better one for long steps. This is DDIM with eta = 1 (Song et al.
    2021, eq. 16).
    """
    beta, abar = scheduler(times)
    if len(times) == len(scheduler.beta):
        return beta, abar, beta.sqrt()
    abar_next = F.pad(abar[1:], (0, 1), value=1.0)  # at the timestep to which a step leads
    beta = 1 - abar / abar_next
    return beta, abar, (beta * (1 - abar_next) / (1 - abar)).sqrt()


# ---- Data: MNIST comes with the repository; others are read from data/, or else fetched --------


def load_images(dataset, image_size=32):
    """The training images of one of DATASETS, or of a folder of pictures, (N, C, H, W) uint8; 28 x
    28 is zero-padded to 32 x 32. Raises UserError for data that is not there or damaged."""
    dataset = str(dataset)
    if dataset not in DATASETS:
        return load_folder(Path(dataset).expanduser(), image_size)
    if image_size != 32:
        raise UserError(f'image_size is {image_size}, but that of {dataset} is always 32')
    advice = 'git checkout data' if dataset == 'MNIST' else 'delete it there, to fetch it again'
    with errors_as(f'cannot read {dataset} in {DATA}', advice):
        if dataset == 'MNIST':
            with gzip.open(DATA / 'MNIST/raw/train-images-idx3-ubyte.gz') as file:
                images = np.frombuffer(bytearray(file.read()[16:]), np.uint8)
            images = images.reshape(60_000, 28, 28)
        else:
            # of several processes one fetches, where it may write
            with FileLock(DATA / 'lock') if os.access(DATA, os.W_OK) else nullcontext():
                images = getattr(datasets, dataset)(DATA, train=True, download=True).data
        images = torch.as_tensor(images)
    if images.ndim == 3:
        return F.pad(images[:, None], [2] * 4)
    return images.permute(0, 3, 1, 2).contiguous()  # CIFAR10


def load_folder(folder, size):
    """Every picture below a folder, in the order of their paths: the middle square, resized to
    (size, size); grey if all are. Hidden files are passed over, links to folders not followed."""
    if not folder.is_dir():
        raise UserError(f'dataset is {str(folder)!r}: no folder, and none of {", ".join(DATASETS)}')
    suffixes = Image.registered_extensions()
    paths = [p for p in sorted(folder.rglob('*')) if p.suffix.lower() in suffixes and p.is_file()]
    paths = [path for path in paths if '/.' not in f'/{path.relative_to(folder).as_posix()}']
    with ThreadPoolExecutor() as pool:
        pictures = pool.map(lambda path: read_picture(path, size), paths)
        pictures = list(progress_bar(iterable=pictures, desc='Reading', total=len(paths)))
    pictures = [picture for picture in pictures if picture is not None]
    print(f'{len(pictures)} pictures can be read of {len(paths)} in {folder}')
    if not pictures:
        raise UserError(f'there is no picture in {folder} that can be read')
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    grey = (images == images[:, :1]).all()
    return (images[:, :1] if grey else images).contiguous()


def read_picture(path, size):
    """One picture, (size, size, 3) uint8; None, and a line that says why, if it cannot be read."""
    with or_a_line(f'{path} is left out'), Image.open(path) as picture:
        if picture.mode[0] in 'IF':  # 16 or 32 bits, which Pillow would clip to 0 .. 255
            raise ValueError(f'its mode is {picture.mode}: save it with 8 bits a channel')
        picture = ImageOps.exif_transpose(picture).convert('RGBA')
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
        ground = Image.new('RGBA', picture.size, 'white')  # behind what is transparent
        return np.asarray(Image.alpha_composite(ground, picture).convert('RGB'))


def images_at_once(device, size):
    """The batch in which images of size x size are sampled."""
    return max(1, (500 if device.type == 'cuda' else 64) * 32**2 // size**2)


def to_input(images):
    """uint8, or what is in [0, 1] already -> float32 in [0, 1]."""
    return images.float() / (255 if images.dtype == torch.uint8 else 1)


def to_uint8(x):
    """float -> uint8, clamped to [0, 1] and rounded."""
    return (x.float().clamp(0, 1) * 255).round().byte()


# ---- Runs and checkpoints: no stop loses more than save_minutes, none changes the result -------


class Run:
    """What keeps a training run from being lost: it counts the steps, saves and resumes."""

    def __init__(self, config, images):
        self.path = Path(config.pop('checkpoint_path') or CHECKPOINT).expanduser()
        self.folder = folder_of_pictures(self.path)
        (count, channels, size, _), batch_size = images.shape, config['batch_size']
        if batch_size > count or batch_size % WORLD_SIZE:
            limits = f'at most {count}, the number of images, and a multiple of that of processes'
            raise UserError(f'batch_size is {batch_size}, but must be {limits}')
        given, T = config.pop('unet') or {}, config['num_time_steps']
        fixed = dict(input_channels=channels, output_channels=channels, time_steps=T)
        unet = {**UNET_DEFAULTS, **fixed, **given}
        advice = 'Channels [C, 2C, 4C, 8C, 8C, 6C] do, and an image_size that is a multiple of 8'
        crc = zlib.crc32(images.contiguous().numpy())
        config |= dict(image_size=size, data=f'{count} images, CRC {crc:08x}')
        text = json.dumps([config, unet], default=lambda x: getattr(x, 'tolist', lambda: str(x))())
        self.config, self.unet = json.loads(text)  # plain values, which a checkpoint can hold
        with errors_as('unet does not fit', advice), torch.device('meta'):  # shapes, no numbers
            if not fixed.items() <= self.unet.items():
                raise ValueError(f'the data and num_time_steps want {fixed}')
            UNET(**self.unet)(torch.empty(1, channels, size, size), torch.zeros(1).long())
        warn_of_few_timesteps(T, images)
        self.steps_per_epoch = count // batch_size  # the last partial batch is dropped
        self.total_steps = self.steps_per_epoch * config['num_epochs']
        seed = torch.tensor(secrets.randbits(32) if config['seed'] == -1 else config['seed'])
        if WORLD_SIZE > 1:  # process 0's for all
            dist.broadcast(seed, 0)
        self.seed = seed.item()
        self.stop = []  # signals to stop
        self.step = self.first_step = 0  # steps done, and those done when this call began

    def resume(self, **parts):
        """Loads the checkpoint, if there is one, into the parts whose state it holds. Raises
        UserError where a setting that must stay is not the checkpoint's."""
        self.parts, self.losses = parts, torch.zeros(0, device=best_device())  # one a step
        if not self.path.exists():
            return
        saved = load_checkpoint(self.path, ['ema', 'weights', 'optimizer'])
        before = {**saved['config'], **saved['unet']}
        if self.config['seed'] == -1:
            self.seed = before.get('seed', self.seed)
        for name, now in {**self.config, **self.unet, 'seed': self.seed}.items():
            then = before.get(name, now)
            if then != now and name not in MAY_CHANGE:
                told = f'is from a run with {name}={then!r:.99}, this one has {now!r:.99}'
                raise UserError(f'{self.path} {told}: put it back, or change checkpoint_path')
        with errors_as(f'{self.path} is not a usable checkpoint'):
            optimizer = parts['optimizer']  # whose hyperparameters come from this call
            saved['optimizer']['param_groups'] = optimizer.state_dict()['param_groups']
            for name, part in parts.items():
                if saved.get(name):  # a scaler without float16 has no state
                    part.load_state_dict(saved[name])
            for parameter, state in optimizer.state.items():
                for name, moment in state.items():  # fused Adam needs the parameter's strides
                    if torch.is_tensor(moment) and moment.ndim:
                        state[name] = torch.empty_like(parameter).copy_(moment.view_as(parameter))
            # the article's code records no losses, but its Adam has counted the steps
            steps = max((int(s.get('step', 0)) for s in optimizer.state.values()), default=0)
            losses = saved.get('losses', torch.full([steps], math.nan)).to(self.losses)
            self.losses = F.pad(losses, (saved.get('steps_before', 0), 0), value=math.nan)
        self.step = self.first_step = len(self.losses)
        print(f'{self.path}: resumed after step {self.step} of {self.total_steps}')

    def epochs(self):
        """Yields the epochs that are left, under a progress bar of the whole run."""
        self.next_save = time.monotonic() + 60 * self.config['save_minutes']
        done, total, size = self.step, self.total_steps, self.steps_per_epoch
        with progress_bar(total=total, initial=done, unit='step') as self.bar:
            for epoch in range(done // size, self.config['num_epochs']):
                first, end = epoch * size, (epoch + 1) * size
                self.losses = F.pad(self.losses, (0, end - len(self.losses)), value=math.nan)
                self.bar.set_description(f'Epoch {epoch + 1}/{self.config["num_epochs"]}')
                yield epoch
                tqdm.write(f'Epoch {epoch + 1} | Loss {self.losses[first:end].cpu().nanmean():.5f}')
        if RANK == 0 and self.step > self.first_step:
            self.save(last=True)
        print(f'{self.path} is trained for {self.step // size} epochs; more num_epochs train on')

    def step_done(self, loss):
        """Records the loss of a step; saves, samples and stops when it is time to."""
        loss = loss.detach() / WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.all_reduce(loss)
        self.losses[self.step] = torch.where(loss.isfinite(), loss, math.nan)  # float16 overflows
        self.step += 1
        if RANK == 0 and time.monotonic() > self.next_save:
            self.save()
        self.stop_if_asked()
        if self.step % 100 == 0:
            self.check()
        if self.bar.update():  # a few times a second; only then is the loss read from the device
            self.bar.set_postfix_str(f'loss {self.loss():.4f}', refresh=False)
        self.sample_progress()

    def loss(self, steps=100):
        """The median of the last losses, without those that float16 made overflow."""
        return self.losses[max(0, self.step - steps) : self.step].cpu().nanmedian().item()

    def check(self, steps=100):
        """Raises UserError where the loss is far above the first or back at it, or weights NaN."""
        loss, first = self.loss(steps), self.losses[0].nan_to_num(1).item()
        hundreds = self.losses[: self.step // 100 * 100].view(-1, 100)
        learned = steps == 100 and (hundreds.cpu().nanmedian(1).values < 0.5 * first).any()
        limit = 0.75 * first if learned else 2 * max(first, 1)  # 1: that of predicting 0
        finite = torch.stack([w.isfinite().all() for w in self.parts['weights'].parameters()]).all()
        if not finite or (self.step >= 100 and not loss < limit):
            told = f'loss {loss:.3g}, at first {first:.3g}' if finite else 'weights are not finite'
            raise UserError(f'training has diverged at step {self.step} ({told}): lower lr')

    def save(self, last=False):
        """Writes the checkpoint and the curve of the losses, unless training has diverged."""
        self.next_save = time.monotonic() + 60 * self.config['save_minutes']
        losses = self.losses[: self.step].clone().cpu()  # torch.save writes a view's whole storage
        state = {name: part.state_dict() for name, part in self.parts.items()}
        groups = state['optimizer']['param_groups']  # of plain values, not numpy's or tensors
        state['optimizer']['param_groups'] = json.loads(json.dumps(groups, default=float))
        self.check()
        self.check(steps=10)
        state |= dict(unet=self.unet, config={**self.config, 'seed': self.seed}, losses=losses)
        state['beta'] = DDPM_Scheduler(self.unet['time_steps']).beta  # what the weights are for
        problem, advice = f'cannot write {self.path}', 'what it held before is unharmed'
        with errors_as(problem, advice) if last or self.stop else or_a_line(f'{problem}: {advice}'):
            save_checkpoint(self.path, state)
        with or_a_line('cannot draw loss.png'):
            draw_losses(losses, self.steps_per_epoch, self.folder)

    def stop_if_asked(self, *_):
        if self.stop:
            self.save()
            told = f'Stopped after step {self.step} of {self.total_steps}, saved in {self.path}'
            raise KeyboardInterrupt(f'{told}: run again to resume')

    def sample_progress(self):
        """Every sample_every epochs a grid of samples, always from the same noise."""
        every = self.config['sample_every'] * self.steps_per_epoch
        if RANK > 0 or not every or self.step % max(1, round(every)):
            return
        model, epoch = self.parts['ema'].module, self.step / self.steps_per_epoch
        count, T = min(64, images_at_once(best_device(), model.image_size)), model.time_steps
        path = self.folder / f'progress/epoch_{epoch:06.2f}.png'
        with or_a_line(f'cannot write {path}'):
            x = sample(model, count, min(PROGRESS_STEPS, T), seed=0, on_step=self.stop_if_asked)
            path.parent.mkdir(parents=True, exist_ok=True)
            grid(x).save(path)
            tqdm.write(f'{path}: samples after {epoch:.2f} epochs')


def locked(path):
    """In a `with`, no other run can use the checkpoint."""
    if RANK > 0:
        return nullcontext()
    with errors_as(f'another run uses {path}, or it cannot be written', 'change checkpoint_path'):
        path.parent.mkdir(parents=True, exist_ok=True)
        place = path.resolve()
        place.parent.resolve(strict=True)  # an error if a link leads nowhere
        return FileLock(f'{place}.lock').acquire(timeout=0)


@contextmanager
def signals_noted(run):
    """Inside, Ctrl-C, SIGTERM and SIGHUP go into run.stop, so that the run saves before it stops.
    Several processes would each stop at another step: there the last save stands."""

    def note(number, frame):
        run.stop.append(number)
        if run.step == run.first_step:  # there is nothing to save yet
            raise KeyboardInterrupt('Stopped before the first step')

    with ExitStack() as stack:
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGINT)}:
            if WORLD_SIZE == 1 and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                stack.callback(signal.signal, number, signal.signal(number, note))
        yield
        if run.stop:  # after the last step
            raise KeyboardInterrupt


def save_checkpoint(path, state):
    """Writes a file beside path and renames it: path holds the old state or the new, never less."""
    path = Path(path).resolve()  # a link stays a link
    temporary = Path(f'{path}.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, parts=('ema',)):
    """A checkpoint as a dict: see `Run.save`. The article's code wrote only `weights`, `optimizer`
    and `ema`. Raises UserError for a file that is damaged, lacks one of parts or would run code."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f'there is no checkpoint {path}: train first')
    with errors_as(f'{path} is not a usable checkpoint'):
        with zipfile.ZipFile(path) as archive:  # torch.load checks no CRC
            if part := archive.testzip():
                raise ValueError(f'{part} in it is damaged')
        saved = {'config': {}, **torch.load(path, map_location='cpu', weights_only=True)}
        if missing := [part for part in parts if part not in saved]:
            raise ValueError(f'it has no entry {", ".join(missing)}')
        for part in parts[:2]:
            if not all(tensor.isfinite().all() for tensor in saved[part].values()):
                raise ValueError(f'{part} is not finite')
            prefix = 'module.' if part == 'ema' else ''  # of ModelEmaV3
            saved[part] = {  # without those of DistributedDataParallel and torch.compile
                prefix + '.'.join(n for n in k.split('.') if n not in ('module', '_orig_mod')): v
                for k, v in saved[part].items()
            }
        saved['unet'] = {**UNET_DEFAULTS, **saved.get('unet', {})}
        ours = DDPM_Scheduler(saved['unet']['time_steps']).beta
        theirs = saved.get('beta', torch.linspace(1e-4, 0.02, len(ours)))
        if not torch.allclose(theirs.to(ours), ours):
            raise ValueError('its noise schedule is not that of DDPM_Scheduler')
    return saved


# ---- Pictures: each run has a folder of its own ------------------------------------------------


def folder_of_pictures(path):
    """outputs/NAME for checkpoints/NAME; for others the way from checkpoints/, with _ for .."""
    parts = Path(os.path.relpath(path, 'checkpoints')).parts
    return OUTPUTS.joinpath(*('_' if part == '..' else part for part in parts))


def grid(x, columns=8, titles=()):
    """(B, C, H, W) in [0, 1] -> one PIL picture, twice as large, with titles above its columns."""
    x = to_uint8(F.interpolate(x.float(), scale_factor=2)).cpu()
    picture = to_pil_image(utils.make_grid(x, columns, pad_value=255)[: x.shape[1]])
    picture = ImageOps.expand(picture, (0, 16 if titles else 0, 0, 0), 'white')  # above
    for i, title in enumerate(titles):
        ImageDraw.Draw(picture).text((4 + i * (x.shape[-1] + 2), 3), title, 'black')
    return picture


def times_to_show(times, T, count):
    """`count` of these timesteps, spread as the article's ten of 1000: most of them late."""
    wanted = np.interp(np.linspace(0, 9, count), range(10), STRIP_TIMES) * T / 1000
    nearest = np.abs(np.subtract.outer(times, wanted)).argmin(0)
    return [times[i] for i in np.unique(nearest)]


def draw_reverse(frames, strip, folder):
    """frames, a dict of t -> (B, C, H, W) -> reverse.gif, and reverse.png of some t for ten."""
    gif = [grid(x, titles=[f't = {t}']) for t, x in frames.items()]
    octree = Image.Quantize.FASTOCTREE  # noise in many colours is large, and slow by other methods
    gif = [x.quantize(32) if x.mode == 'L' else x.quantize(256, octree) for x in gif]
    ms = [80] * (len(gif) - 1) + [2500]
    gif[0].save(folder / 'reverse.gif', save_all=True, append_images=gif[1:], duration=ms, loop=0)
    rows = torch.stack([frames[t][:10] for t in strip], dim=1).flatten(0, 1)
    grid(rows, len(strip), [f't = {t}' for t in strip]).save(folder / 'reverse.png')


def draw_losses(losses, steps_per_epoch, folder):
    """losses, one a step -> loss.png, the curve of their means over a 50th of an epoch."""
    window = max(1, steps_per_epoch // 50)
    means = losses[: len(losses) // window * window].reshape(-1, window).nanmean(1)
    folder.mkdir(parents=True, exist_ok=True)
    with plt.style.context('default'):  # not the user's, which may want LaTeX
        ax = plt.Figure(figsize=(6, 3.5), layout='tight').subplots()
        ax.semilogy(torch.arange(1, len(means) + 1) * window / steps_per_epoch, means, 'k', lw=1)
        ax.set(xlabel='epoch', ylabel='mean square error')
        ax.grid(alpha=0.3)
        ax.figure.savefig(folder / 'loss.png', dpi=100)


if __name__ == '__main__':
    main(sys.argv[1:])
