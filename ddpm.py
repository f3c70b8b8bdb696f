"""DDPM: a denoising diffusion model that learns to draw MNIST's digits from noise, in one file.

    python ddpm.py --sample    samples digits in seconds, from weights in the repository
    python ddpm.py             trains: the article's 75 epochs on a CUDA GPU, else the preview
    python ddpm.py --preview   trains a small UNET, some minutes on two CPU cores
    torchrun --nproc-per-node=4 ddpm.py     the article's run on several GPUs

Run it again in the same folder and it resumes where it stopped. Settings are edited under EDIT
HERE. The method is that of Ho, Jain & Abbeel 2020 (arXiv:2006.11239, "the paper"), the shorter
sampler that of DDIM (Song, Meng & Ermon 2021, arXiv:2010.02502). Sections and names follow the
article; the appendix only makes them robust. docs/ddpm.md explains it all step by step.

Measured on two cores of an AMD EPYC (torch 2.14): --sample takes 10 s, the preview 6 min; 92% of
what the weights in the repository sample is recognised as a digit.
"""

import argparse
import difflib
import inspect
import math
import os
import random
import secrets
import signal
import socket
import sys
import tempfile
import time
import zipfile
import zlib
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

# read when torch loads OpenMP: idle threads sleep instead of spinning, which beside another busy
# process made training 30 times slower
os.environ.setdefault('GOMP_SPINCOUNT', '10000')
if os.environ.get('MPLBACKEND', '').startswith('module://') and 'ipykernel' not in sys.modules:
    del os.environ['MPLBACKEND']  # a notebook's, which `!python ddpm.py` inherits and cannot use

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageOps
from timm.utils import ModelEmaV3
from torch import nn
from torchvision import datasets, utils
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

# ==== The UNet (article: Unet, 模型代码实现) ======================================================
# x is (B, C, H, W); t counts from 0, the least noisy step.


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
        """t, an int, a list or a tensor (B,) -> (B, E, 1, 1), or (1, E, 1, 1) for one t for all.
        Raises IndexError or RuntimeError for a t that is not a whole number in 0 .. T-1."""
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        return F.embedding(t, self.embeddings.to(x.device))[:, :, None, None]


class ResBlock(nn.Module):
    """Adds the time embedding, then two normalised 3x3 convolutions beside a skip. A layer of C
    channels sees the first C columns of the time table, the highest frequencies."""

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
            x = self.attention_layer(x)
        x = self.ResBlock2(x, embeddings)
        return self.conv(x), x


class UNET(nn.Module):
    """eps_theta(x, t): predicts the noise in x.

    The first half of the layers goes down and keeps skips, the second half comes up and joins them:
    with the defaults at 32, 16, 8, 4, 8 and 16 pixels. A layer of C channels outputs 2C on the way
    down and C/2 on the way up, where the skip's channels join them: 512/2 + 256 = 512, 512/2 + 128
    = 384. Raises UserError (a ValueError) where the arguments do not fit together.
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
        check_unet(dict(locals()))
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
        """x (B, C, H, W), t an int, a list or a tensor (B,) -> the noise in x, (B, C, H, W)."""
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
    """The variances beta of the forward process, rising linearly from 1e-4 to 0.02, and `alpha`,
    the article's name for the paper's alpha-bar: the cumulative product of 1 - beta.

    sqrt(alpha[t]) is how much of an image is left at step t. At the last it must be near 0 (0.006
    for 1000 steps), since sampling starts from noise alone. The first steps are small, since what
    they destroy is the finest detail."""

    def __init__(self, num_time_steps: int = 1000):
        super().__init__()
        beta = torch.linspace(1e-4, 0.02, num_time_steps)
        self.register_buffer('beta', beta, persistent=False)
        self.register_buffer('alpha', torch.cumprod(1 - beta, dim=0), persistent=False)

    def forward(self, t):
        """t, an int, a list or a tensor -> beta_t and alpha-bar_t, each of the shape of t."""
        return self.beta[t], self.alpha[t]


# ==== Training (article: 训练代码) ================================================================


def set_seed(seed: int = 42):
    """Seeds torch, CUDA, numpy and random, and makes cuDNN deterministic."""
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def diffusion_loss(model, scheduler, x, t, eps):
    """The mean square error of the predicted noise (paper eq. 14), a float32 scalar. Predicting
    eps = 0 gives a loss of 1.

    x (B, C, H, W) images in [0, 1], t (B,) timesteps, eps (B, C, H, W) ~ N(0, I). The noise is
    predicted rather than the image: the two follow from each other by eq. 4, and this weighting of
    the timesteps gave the paper its best samples.
    """
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
    exactly as if it had never stopped. It is saved every save_minutes, at the end, and when Ctrl-C,
    SIGTERM or SIGHUP stop the run. seed -1 draws a seed. dataset is one of DATASETS or a folder of
    pictures, which are cropped and resized to image_size. unet holds the arguments of UNET that
    differ from its defaults. Every sample_every epochs (0: never) a grid of samples goes to
    outputs/NAME OF THE CHECKPOINT/progress. lr_decay: by lr_schedule. beta2 is Adam's.

    Raises UserError (a ValueError) for a setting out of range, for data or a checkpoint that cannot
    be used, and when training diverges; Stopped (a KeyboardInterrupt) by a signal, once all is
    saved.
    """
    config = dict(locals())
    check_arguments(train, config)
    images = load_images(dataset, image_size)  # (N, C, H, W) uint8
    with Run(config, images) as run:  # locks the checkpoint
        device = best_device()
        set_seed(run.seed)  # of the initial weights
        run.enter_context(kernels(device, deterministic=seed != -1))
        model = to_device(UNET(**run.unet), device)
        scheduler = DDPM_Scheduler(num_time_steps).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, beta2), fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=half_precision(device) is torch.float16)
        # samples come from averaged weights, which vary less than those of any one step; the decay
        # warms up, n / (n + 10) in step n, so that the average soon forgets the random start
        ema = ModelEmaV3(model, ema_decay, use_warmup=True, warmup_gamma=10, warmup_power=1)
        run.resume(weights=model, optimizer=optimizer, ema=ema, scaler=scaler)
        images = images.to(device)
        network = parallelize_and_compile(model, images, run)  # shares the weights of model

        for epoch in run.epochs():
            # instead of a DataLoader: all images are on the device, in a new order every epoch
            torch.manual_seed(fold_in(run.seed, 0, epoch))
            batches = torch.randperm(len(images), device=device).split(batch_size)
            for batch in batches[run.step % run.steps_per_epoch : run.steps_per_epoch]:
                # all randomness is a function of the seed and the step: so resuming is exact
                torch.manual_seed(fold_in(run.seed, 1, run.step))
                if lr_decay:
                    optimizer.param_groups[0]['lr'] = lr * lr_schedule(run.step, run.total_steps)

                # Algorithm 1, lines 2 to 5; each of several processes takes its share of a batch
                x = to_input(images[batch])  # (B, C, H, W) in [0, 1]
                t = torch.randint(num_time_steps, (batch_size,), device=device)
                eps = torch.randn_like(x)
                share = slice(RANK, None, WORLD_SIZE)
                if RANK > 0:  # process 0 goes on as one would; the others need other dropout masks
                    torch.manual_seed(fold_in(run.seed, 1 + RANK, run.step))
                loss = diffusion_loss(network, scheduler, x[share], t[share], eps[share])
                optimizer.zero_grad()
                scaler.scale(loss).backward()  # scales in float16 only
                scaler.step(optimizer)
                scaler.update()
                ema.update(model, step=run.steps_before + run.step + 1)
                run.step_done(loss)  # saves, samples and stops when it is time to


# ==== Inference (article: 推理) ===================================================================


@torch.no_grad()
def reverse_process(model, x, scheduler, num_steps: int | None = None, generator=None):
    """Algorithm 2 of the paper: turns noise into images; yields (t, x) after every step, from
    t = T-1 down to 0; x is the mean of the step, to which its noise is added afterwards.

    x (B, C, H, W) ~ N(0, I), on the device of model and scheduler; generator: of the noise, on the
    same device. num_steps is how many of the T steps to take (None: all), see `respace`.
    """
    model.eval()
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
    with one_line_about(checkpoint_path), torch.random.fork_rng([]):
        ema = ModelEmaV3(UNET(**saved['unet']).float())
        ema.load_state_dict(saved['ema'])
    ema.module.image_size = saved['config'].get('image_size', 32)
    return to_device(ema.module.eval(), best_device())


def sample(
    model, num_images: int, num_steps: int | None = None, seed: int = -1, noise=None, on_step=None
):
    """Images from a model of `load_model`: (N, C, H, W) float32 in [0, 1], on the CPU.

    num_steps: of the reverse process (None: all). seed: of the noise; -1 draws one, and the images
    depend on num_images as well. noise (N, C, H, W): start from this x_T instead. on_step(first, t,
    x), if given, is called for each batch, whose first image has the index `first`: with the noise,
    t = T, then after every step. Raises UserError for an argument out of range.
    """
    check_arguments(sample, dict(num_images=num_images, num_steps=num_steps, seed=seed))
    device, size, T = next(model.parameters()).device, model.image_size, model.time_steps
    num_steps = len(sampling_times(T, num_steps))
    scheduler = DDPM_Scheduler(T).to(device)
    generator = torch.Generator(device).manual_seed(secrets.randbits(32) if seed == -1 else seed)
    shape = num_images, model.input_channels, size, size
    if noise is None:
        noise = torch.empty(shape, device=device, dtype=torch.float32).normal_(generator=generator)
    noise = torch.as_tensor(noise)
    if noise.shape != shape or not noise.isfinite().all():
        raise UserError(f'noise is {tuple(noise.shape)}, but must be {shape}, and finite')
    images, at_once = [], sample_batch(device, size)
    starts = range(0, num_images, at_once)
    with progress_bar('Sampling', len(starts) * (num_steps + 1), unit=' steps', leave=None) as bar:
        for first in starts:
            x_T = noise[first : first + at_once].to(device, torch.float32)  # (B, C, H, W)
            process = reverse_process(model, x_T, scheduler, num_steps, generator)
            for t, x in chain([(T, x_T)], process):
                bar.update()
                if on_step:
                    on_step(first, t, x)
            images.append(x.clamp(0, 1).cpu())
    return torch.cat(images)


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
    checkpoint_path: str | Path | None = None,
    num_time_steps: int | None = None,
    ema_decay: float = 0.9999,
    num_steps: int | None = None,
    seed: int = -1,
    num_images: int = 64,
):
    """Samples images from the EMA weights of a checkpoint and shows how they come out of noise.

    Returns them as `sample` does. outputs/NAME OF THE CHECKPOINT gets the grid of the first 64, the
    reverse process of the first ten and an animation; more than 64 images are also written one by
    one, as 8-bit PNG files. Windows or the notebook show grid and reverse process. num_steps and
    seed are those of `sample`; num_time_steps, if given, must be the checkpoint's; ema_decay is the
    article's and ignored. Raises UserError for an unusable checkpoint or setting.
    """
    check_arguments(inference, dict(locals()))
    path = Path(checkpoint_path or CHECKPOINT)
    model = load_model(path)
    T = model.time_steps
    if num_time_steps not in (None, T):
        raise UserError(f'num_time_steps is {num_time_steps}, but {path} was trained with {T}')
    seed = secrets.randbits(32) if seed == -1 else seed
    times = sampling_times(T, num_steps)
    pictures = Pictures(OUTPUTS / path.name, times, T, num_images, seed)
    try:
        images = sample(model, num_images, num_steps, seed, on_step=pictures.on_step)
    except KeyboardInterrupt:
        raise KeyboardInterrupt('stopped while sampling') from None  # a notebook prints all frames
    print(f'Sampled {num_images} images in {len(times)} steps with seed {seed}')
    pictures.draw(images)
    return images


# ==== EDIT HERE: the settings of the runs; then `python ddpm.py` again ============================

CHECKPOINT = 'checkpoints/ddpm_checkpoint'
FULL = dict(  # the article's run, for a machine with a CUDA GPU
    checkpoint_path=CHECKPOINT,
    dataset='MNIST',  # FashionMNIST, KMNIST, QMNIST, CIFAR10 or a folder; with it checkpoint_path
    image_size=32,  # of a folder's pictures; a multiple of 8, since UNET halves them three times
    num_epochs=75,
    batch_size=64,
    lr=2e-5,  # of Adam, constant
    ema_decay=0.9999,  # at most; with its warm-up the average covers the last tenth of this run
    num_time_steps=1000,  # with fewer, bright images are still visible at the last timestep
    unet=dict(),  # what differs from UNET's defaults
    lr_decay=False,  # True: a short warm-up, then down to 0; the article's lr is constant
    beta2=0.999,  # torch's default
    seed=-1,  # a new one for each run; with a seed, CUDA is deterministic and slower
    save_minutes=2,  # what kill -9 or a power cut may cost
    sample_every=5,  # epochs between two grids of samples
)
PREVIEW = dict(  # the same made small: six minutes on two CPU cores with bfloat16
    checkpoint_path='checkpoints/preview',
    dataset='MNIST',
    image_size=32,
    num_epochs=2,
    batch_size=20,  # many small steps learn more in the time than few large ones
    lr=2.5e-3,  # 4e-3 is worse; halve it where you double Channels
    lr_decay=True,
    beta2=0.99,  # a shorter memory than 0.999, for a short run
    ema_decay=0.9999,
    num_time_steps=500,  # half the work of sampling; enough for dark images such as MNIST's only
    unet=dict(
        Channels=[8, 16, 32, 64, 64, 48],
        Attentions=[False] * 6,
        num_groups=8,
        dropout_prob=0.0,  # so short a run cannot overfit
    ),
    seed=-1,
    save_minutes=1,
    sample_every=0.25,
)
AFTER_TRAINING = dict(  # what is sampled after a run
    num_images=64,  # more than 64 are also written one by one
    num_steps=None,  # of the reverse process: all, as in the article; below 10 are too few
    seed=-1,  # a new one each time; a seed gives the same images again, for the same num_images
)
SAMPLE = dict(num_images=64, num_steps=30, seed=-1)  # the same for --sample: few steps are quick


def main():
    parser = argparse.ArgumentParser(
        description='Trains a denoising diffusion model on MNIST and samples from it: the full run '
        'with a CUDA GPU, else the preview. All settings are under EDIT HERE in the file.'
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument('--full', action='store_true', help='the full run, also without a GPU')
    choice.add_argument('--preview', action='store_true', help='the preview, also with a GPU')
    text = 'only sample, from this checkpoint or the weights that come with the repository'
    default = SAMPLE.get('checkpoint_path', PRETRAINED)
    choice.add_argument('--sample', nargs='?', const=default, metavar='CHECKPOINT', help=text)
    with errors_in_one_line():
        args = parser.parse_args()
        check_arguments(inference, SAMPLE)
        check_arguments(inference, AFTER_TRAINING)
        path, sampling = args.sample, SAMPLE
        if path is None:
            full = args.full or (torch.cuda.is_available() and not args.preview)
            if not (full or args.preview):
                print('No CUDA GPU here: this is the preview. --full trains for days on a CPU.')
            settings, sampling = FULL if full else PREVIEW, AFTER_TRAINING
            check_arguments(train, settings)
            sampling_times(settings.get('num_time_steps', 1000), sampling.get('num_steps'))
            train(**settings)
            path = settings.get('checkpoint_path')
        if RANK == 0:
            inference(**{**sampling, 'checkpoint_path': path})


# ==== Appendix: what makes it robust ==============================================================
# The article has nothing of this, and needs none of it.

HERE = Path(__file__).resolve().parent
PRETRAINED = HERE / 'checkpoints/mnist'
DATA = HERE / 'data'
OUTPUTS = Path('outputs')
NOTEBOOK = type(sys.stderr).__module__.startswith('ipykernel')
DATASETS = ('MNIST', 'FashionMNIST', 'KMNIST', 'QMNIST', 'CIFAR10')
RANK, WORLD_SIZE = 0, 1  # of this process, among those that torchrun started
if dist.is_available() and dist.is_torchelastic_launched():
    RANK, WORLD_SIZE = (int(os.environ[name]) for name in ('RANK', 'WORLD_SIZE'))
NETWORK_TIMEOUT = 10  # seconds without an answer
COMPILE_FROM = 10_000  # steps of a run: fewer do not pay for the minute that compiling takes
STRIP_TIMES = (999, 700, 550, 400, 300, 200, 100, 50, 15, 0)  # the article's, of 1000; 0: x_0
PROGRESS_STEPS = 50  # of the reverse process, for the grids that show a run's progress
# images of 32 x 32 sampled at a time: 500 take 10 GB with a UNET of full size
SAMPLE_BATCH = {'cuda': 500, 'mps': 64, 'cpu': 64}
FEW_STEPS = 2000  # of a run that cannot learn much
RECENT = 100  # steps whose median loss tells whether training has diverged
UNET_DEFAULTS = {k: p.default for k, p in inspect.signature(UNET).parameters.items()}
RANGES = {  # (lowest, highest); numbers that are not listed must be at least 1
    **dict.fromkeys(('lr', 'ema_decay', 'dropout_prob'), (0, 1)),
    **dict.fromkeys(('sample_every', 'save_minutes'), (0, math.inf)),
    'num_time_steps': (2, math.inf),
    'beta2': (0.1, 0.999999),  # at 0 a zero gradient leaves only Adam's eps to divide by
    'seed': (-1, 2**32 - 1),
}
MAY_CHANGE = ('num_epochs', 'lr', 'lr_decay', 'beta2', 'ema_decay', 'save_minutes', 'sample_every')


class UserError(ValueError):
    """A mistake the user can mend; `python ddpm.py` prints it as one line and exits with 1."""


class Stopped(KeyboardInterrupt):
    """A signal has stopped training, and what was done is saved; the program exits with `code`."""

    def __init__(self, signum, line):
        super().__init__(line)
        self.code = 128 + signum


def one_line(error):
    """An exception's message as one line of at most 200 characters."""
    return ' '.join(str(error).split())[:200] or type(error).__name__


@contextmanager
def errors_in_one_line():
    """Joins torchrun's processes, runs the program, and turns errors that the user can mend into
    one line on stderr and exit code 1."""
    try:
        if 'kernel_launcher' in sys.argv[0]:
            raise UserError('main() is for the shell: in a notebook call ddpm.train and inference')
        # closed streams, as by `2>&-`, swallow what is printed; ASCII terminals escape it
        sys.stdout = sys.stdout or open(os.devnull, 'w')
        sys.stderr = sys.stderr or open(os.devnull, 'w')
        sys.stdout.reconfigure(errors='backslashreplace')
        init_distributed()
        yield
    except KeyboardInterrupt as stop:
        print(f'\n{str(stop) or "Stopped."}', flush=True)
        sys.exit(getattr(stop, 'code', 130))
    except Exception as error:
        if RANK > 0:  # mostly process 0 reports the same first, and torchrun ends this one
            time.sleep(10)
            sys.stderr = sys.__stderr__
        line = one_line(error)
        if isinstance(error, UserError):
            line = str(error)  # whole
        elif 'allocate' in line:  # in torch's words for it, on CUDA and on a CPU
            line = 'out of memory: lower batch_size, num_images or Channels, under EDIT HERE'
        elif not isinstance(error, OSError | MemoryError):
            raise
        sys.exit(f'ddpm.py: {line}')


def progress_bar(name, total, iterable=None, **options):
    """tqdm's; in a log file it is a line a minute. TQDM_DISABLE and TQDM_MININTERVAL overrule."""
    to_a_log = not (NOTEBOOK or sys.stderr.isatty())
    if to_a_log and 'TQDM_MININTERVAL' not in os.environ:
        options |= dict(mininterval=60, maxinterval=60)
    return tqdm(iterable, name, total, **options)


def write(line):
    """Prints a line above the bars; in a notebook on stderr: stdout starts new bars."""
    tqdm.write(line, file=sys.stderr if NOTEBOOK else sys.stdout)


# ---- Devices and processes: the same run on a CPU, on one GPU and on several -------------------


def init_distributed():
    """Joins the processes of torchrun, if it has started us. All but the first are silent."""
    if WORLD_SIZE > 1:
        if torch.cuda.is_available():
            gpus = torch.cuda.device_count()
            if int(os.environ['LOCAL_WORLD_SIZE']) > gpus:
                raise UserError(f'--nproc-per-node must be at most {gpus}, the number of GPUs here')
            torch.cuda.set_device(best_device())
        dist.init_process_group()
    if RANK > 0:
        sys.stdout = sys.stderr = open(os.devnull, 'w')


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
    """The 16-bit type that the device computes in natively: bfloat16, or on CUDA devices without it
    float16; None where there is neither."""
    if device.type == 'cuda':
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float16
    bf16 = device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if bf16 else None


def autocast(device):
    """16 bits for convolutions and matrix products where the device has them, else float32."""
    dtype = half_precision(device)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def kernels(device, deterministic):
    """On CUDA either deterministic kernels or the fastest ones; everywhere float32 and gradients,
    whatever the caller has set. Afterwards all is as it was."""
    cuda, cudnn, attention = torch.backends.cuda, torch.backends.cudnn, nn.attention
    dtype, half_math = torch.get_default_dtype(), cuda.fp16_bf16_reduction_math_sdp_allowed()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(cuda.allow_fp16_bf16_reduction_math_sdp, half_math)
        stack.callback(torch.use_deterministic_algorithms, was_deterministic)
        stack.enter_context(torch.inference_mode(False))
        torch.set_default_dtype(torch.float32)
        # keeps attention with dropout in bfloat16 on a CPU: 1.25 s a step instead of 1.47 s
        cuda.allow_fp16_bf16_reduction_math_sdp(device.type == 'cpu')
        if device.type == 'cuda':
            os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
            torch.use_deterministic_algorithms(deterministic)
            flags = dict(enabled=True, deterministic=deterministic, benchmark=not deterministic)
            stack.enter_context(cudnn.flags(**flags))
            if deterministic:  # the other kernels of attention may not be
                allowed = [attention.SDPBackend.FLASH_ATTENTION, attention.SDPBackend.MATH]
                stack.enter_context(attention.sdpa_kernel(allowed))
        yield


def parallelize_and_compile(model, images, run):
    """The model as the training loop calls it: with gradients averaged over the processes, and
    compiled if the run is long. The weights are those of `model`."""
    network = model
    if WORLD_SIZE > 1:
        network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    # total_steps, not what is left of them: a run that is resumed must compute as it did before
    if run.finished() or run.total_steps < COMPILE_FROM or images.device.type == 'mps':
        return network
    print('Compiling the UNET ...', flush=True)
    network.compile()
    try:  # a whole step, so that an error of the compiler shows up here
        x = to_input(images[: run.config['batch_size'] // WORLD_SIZE])
        with autocast(x.device):
            network(x, torch.zeros(len(x), dtype=torch.long, device=x.device)).mean().backward()
    except Exception as error:  # no compiler on this machine, most likely
        network._compiled_call_impl = None
        print(f'torch.compile does not work here ({one_line(error)}); going on without it')
    model.zero_grad()
    return network


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


# ---- Checks: a bad setting is named, with what would be right, before training ------------------


def did_you_mean(word, choices):
    """The end of a line about a name that is none of the choices."""
    lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(str(word).lower(), lower, 1)
    return f'; did you mean {lower[close[0]]}?' if close else f', only {", ".join(choices)}'


def check_arguments(function, given):
    """Raises UserError where the function has no parameter of a name in `given`, or the value is
    not of the parameter's type and range. Numbers must be Python's own, as a checkpoint's are."""
    parameters = inspect.signature(function).parameters
    for name, value in given.items():
        if name not in parameters:
            hint = did_you_mean(name, parameters)
            raise UserError(f'{function.__name__} takes no {name!r}{hint}')
        kind = parameters[name].annotation
        low, high = RANGES.get(name, (1, math.inf))
        fits = isinstance(value, float | int if kind is float else kind)
        if isinstance(value, bool | np.generic):  # a bool is an int, and numpy's float64 a float
            fits = kind is bool and type(value) is bool
        elif isinstance(value, int | float):
            fits = fits and low <= value <= high and value < math.inf
        if not fits:
            limits = f' from {low}' + (f' to {high}' if high < math.inf else '')
            limits = limits if kind in (int, float, int | None) else ''
            kind = kind.__name__ if isinstance(kind, type) else kind
            raise UserError(f'{name} is {value!r:.99}, but must be {kind}{limits}')


def check_unet(unet):
    """Raises UserError, saying what would be right, where arguments of UNET do not fit together."""
    unet = {name: unet[name] for name in UNET_DEFAULTS}
    check_arguments(UNET, unet)
    Channels, Attentions, Upscales = unet['Channels'], unet['Attentions'], unet['Upscales']
    n, half = len(Channels), len(Channels) // 2
    if n < 2 or n % 2 or not n == len(Attentions) == len(Upscales):
        lengths = f'{n}, {len(Attentions)} and {len(Upscales)}'
        why = f'Channels, Attentions and Upscales are {lengths} long'
        raise UserError(f'{why}, but must have the same length, an even number')
    if type(Channels[0]) is not int or Channels[0] < 1:
        raise UserError(f'Channels[0] is {Channels[0]!r}, but must be a whole number from 1')
    widths = [Channels[0] * 2**i for i in range(half + 1)]  # each layer down doubles
    while len(widths) < n:  # each layer up halves and joins the skip of its mirror
        widths.append(widths[-1] // 2 + widths[n - len(widths)])
    flags = [bool(attention) for attention in Attentions]
    right = dict(Channels=widths, Attentions=flags, Upscales=[False] * half + [True] * half)
    for name, wanted in right.items():
        if repr(unet[name]) != repr(wanted):  # 16.0 == 16, but makes no layer
            raise UserError(f'{name} is {unet[name]}, but must be {wanted}')
    with_attention = [C for C, attention in zip(Channels, flags) if attention]
    for name, layers in (('num_groups', Channels), ('num_heads', with_attention)):
        if any(C % unet[name] for C in layers):
            raise UserError(f'{name} is {unet[name]}, but must divide each of {layers}')


def warn_of_few_timesteps(num_time_steps, images):
    """Prints a line where samples will suffer from how much of an image the last timestep leaves:
    training still sees it there, but sampling starts from noise, whose mean is 0."""
    left = DDPM_Scheduler(num_time_steps).alpha[-1].sqrt().item()
    mean = images[:: len(images) // 1000 + 1].float().mean().item() / 255
    # the brightness left, in standard deviations of the mean of the noise's pixels
    if left > 0.1 or left * mean * images.shape[-1] > 0.5:
        print(
            f'With num_time_steps={num_time_steps} the last timestep leaves {left:.1%} of an image '
            f'(mean {mean:.2f}), but sampling starts from noise alone: samples will be dark or '
            'noisy. More timesteps leave less; 1000 leave 0.6%.',
            flush=True,
        )


# ---- Data: MNIST comes with the repository; others are read from data/, or else fetched ---------


def load_images(dataset, image_size=32):
    """The training images of one of DATASETS, or of a folder of pictures, (N, C, H, W) uint8; 28 x
    28 is zero-padded to 32 x 32. Raises UserError for files that are missing or damaged and cannot
    be fetched."""
    name = {name.lower(): name for name in DATASETS}.get(str(dataset).lower())
    if name is None:
        folder = Path(dataset).expanduser()
        if str(dataset) and folder.is_dir():
            return load_folder(folder, image_size)
        hint = did_you_mean(dataset, DATASETS)
        raise UserError(f'dataset is {str(dataset)!r}: no such dataset or folder{hint}')
    if image_size != 32:
        raise UserError(f'image_size is {image_size}, but that of {name} is always 32')
    if Path(dataset).is_dir():
        print(f'{dataset} is the dataset {name} here, not the folder ./{dataset}')
    if name == 'MNIST':
        path = DATA / 'MNIST/raw/train-images-idx3-ubyte.gz'
        try:
            pixels = zlib.decompress(path.read_bytes(), wbits=31)[16:]  # 31: gzip's, with its CRC
            images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(-1, 28, 28)
        except (OSError, zlib.error, ValueError, RuntimeError) as error:
            why = f'{path} is damaged or missing ({one_line(error)})'
            raise UserError(f'{why}: restore it') from None
    else:
        images = torch.as_tensor(fetch(name))
    if images.ndim == 3:
        return F.pad(images[:, None], [2] * 4)
    return images.permute(0, 3, 1, 2).contiguous()  # CIFAR10


def fetch(name):
    """The training images of a dataset of torchvision, from DATA or else from the network."""
    source, timeout = getattr(datasets, name), socket.getdefaulttimeout()
    try:
        with suppress(RuntimeError):  # not there, or not whole
            return source(DATA, train=True).data
        print(f'Fetching {name} into {DATA}', flush=True)
        socket.setdefaulttimeout(NETWORK_TIMEOUT)
        DATA.mkdir(exist_ok=True)
        with locked(DATA / f'{name}.lock'):  # of several processes one fetches and unpacks
            return source(DATA, train=True, download=True).data
    except Exception as error:  # of damaged files, the network, the disk
        why = f'{name} in {DATA} is damaged or cannot be fetched: {one_line(error)}'
        raise UserError(f'{why}. Delete it, or copy it from where torchvision has it') from None
    finally:
        socket.setdefaulttimeout(timeout)


def load_folder(folder, size):
    """Every picture below a folder, in the order of their paths: the middle square, resized to
    (size, size); grey if all are. Hidden files and this program's outputs are passed over."""
    files, seen = [], {OUTPUTS.resolve()}
    for place, folders, names in os.walk(folder, onerror=leave_out, followlinks=True):
        real = Path(place).resolve()
        if real in seen:  # outputs, or a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        files += [Path(place, name) for name in names if not name.startswith('.')]
    suffixes = Image.registered_extensions()
    paths = sorted(path for path in files if path.suffix.lower() in suffixes and path.is_file())
    with ThreadPool() as readers:
        pictures = readers.imap(lambda path: read_picture(path, size), paths, chunksize=16)
        bar = progress_bar(f'Reading {folder.name}', len(paths), pictures)
        pictures = [picture for picture in bar if picture is not None]
    others = {*files} - {*paths}
    kinds = ', '.join(sorted({path.suffix.lower() or 'no suffix' for path in others})[:9])
    found = f'{len(pictures)} of {len(paths)} pictures in {folder}; other files: {len(others)}'
    found += f' ({kinds})' if others else ''
    if not pictures:
        raise UserError(f'no picture that can be read: {found}')
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    if images.min() == images.max():
        raise UserError(f'{folder} is of one plain colour (what is transparent is taken as white)')
    print(found, flush=True)
    grey = (images == images[:, :1]).all()
    return (images[:, :1] if grey else images).contiguous()


def read_picture(path, size):
    """One picture, (size, size, 3) uint8; None, and a line that says why, if it cannot be read."""
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode[0] in 'IF':  # 16 or 32 bits, which Pillow would clip to 0 .. 255
                values = np.asarray(picture).astype(np.float64)
                low, high, white = values.min(), values.max(), 1 if picture.mode == 'F' else 65535
                # 12 bits in 16, say, would come out black
                if not (0 <= low and high <= white) or (white > 1 and 0 < high < 4096):
                    raise ValueError(f'its values go from {low:g} to {high:g}, not to {white}')
                picture = Image.fromarray((values * (255 / white)).astype(np.uint8))
            picture = ImageOps.fit(picture.convert('RGBA'), (size, size), Image.Resampling.LANCZOS)
            ground = Image.new('RGBA', picture.size, 'white')  # behind what is transparent
            return np.asarray(Image.alpha_composite(ground, picture).convert('RGB'))
    except Exception as error:  # each format has errors of its own
        leave_out(error, path)


def leave_out(error, path=None):
    path = path or error.filename
    tqdm.write(f'{path} is left out: {one_line(error)}', file=sys.stderr)


def to_input(images):
    """uint8 -> float32 in [0, 1]."""
    return images.float() / 255


def to_uint8(x):
    """float -> uint8, clamped to [0, 1] and rounded."""
    return (x.float().clamp(0, 1) * 255).round().byte()


# ---- Runs and checkpoints: no stop loses more than save_minutes, none changes the result -------


class Run(ExitStack):
    """What keeps a training run from being lost. Inside `with` no other run can use its checkpoint;
    while it goes through its epochs, a signal waits until the step under way is done and saved."""

    def __init__(self, config, images):
        super().__init__()
        self.path = Path(config.pop('checkpoint_path') or CHECKPOINT).expanduser()
        unet, batch_size, channels = config.pop('unet') or {}, config['batch_size'], images.shape[1]
        if batch_size > len(images) or batch_size % WORLD_SIZE:
            limits = f'at most {len(images)}, the number of images'
            if WORLD_SIZE > 1:
                limits += f', and a multiple of {WORLD_SIZE}, that of the processes'
            raise UserError(f'batch_size is {batch_size}, but must be {limits}')
        if self.path.resolve() == (OUTPUTS / self.path.name).resolve():
            raise UserError(f'{self.path} is where its pictures go: change checkpoint_path')
        check_arguments(UNET, unet)
        given = dict(input_channels=channels, output_channels=channels)
        given['time_steps'] = config['num_time_steps']
        self.unet = {**UNET_DEFAULTS, **unet, **given}
        if {**self.unet, **unet} != self.unet:
            raise UserError(f'unet must agree with the images and num_time_steps: {given}')
        check_unet(self.unet)
        self.image_size, halvings = images.shape[-1], len(self.unet['Channels']) // 2
        if self.image_size % 2**halvings:
            wanted = f'a multiple of {2**halvings}, since UNET halves it {halvings} times'
            raise UserError(f'image_size is {self.image_size}, but must be {wanted}')
        warn_of_few_timesteps(config['num_time_steps'], images)
        data = f'{len(images)} images, CRC {zlib.crc32(images.numpy()):08x}'
        self.config = {**config, 'dataset': str(config['dataset']), 'data': data}
        self.steps_per_epoch = len(images) // batch_size  # the last partial batch is dropped
        self.total_steps = self.steps_per_epoch * config['num_epochs']
        if self.total_steps < FEW_STEPS:
            print(f'{self.total_steps} steps in all; samples get good after some 5,000 or more')
        self.seed = secrets.randbits(32) if config['seed'] == -1 else config['seed']
        if WORLD_SIZE > 1:  # process 0's for all
            seed = torch.tensor(self.seed)
            dist.broadcast(seed, 0)
            self.seed = seed.item()
        self.step, self.saved_step, self.saved_path = 0, 0, self.path  # steps done, and saved
        self.stop_signal = None

    def __enter__(self):
        if RANK == 0:
            try:
                writable(self.path.parent)
                self.enter_context(locked(f'{self.path}.lock', timeout=0))
            except OSError as error:
                why = f'cannot write {self.path} ({one_line(error)})'
                if isinstance(error, Timeout):
                    why = f'another run is using {self.path}'
                raise UserError(f'{why}: change checkpoint_path') from None
            Path(f'{self.path.resolve()}.tmp').unlink(missing_ok=True)  # left by a killed save
        return self

    def __exit__(self, kind, *error):
        super().__exit__(kind, *error)  # from here on signals are the caller's again
        if kind is None:
            self.exit_if_stopped()

    def resume(self, **parts):
        """Loads the checkpoint, if there is one, into the parts whose state it holds."""
        self.parts, self.steps_before = parts, 0
        self.losses = torch.zeros(0, dtype=torch.float32, device=best_device())  # one a step
        if self.path.exists():
            saved = load_checkpoint(self.path, to_train=True)
            self.step = self.saved_step = len(saved['losses'])
            self.compare({**saved['unet'], **saved['config']})
            self.seed = saved['config'].get('seed', self.seed)
            with one_line_about(self.path):
                self.load(saved)
            print(f'{self.path}: resumed after step {self.step} of {self.total_steps}', flush=True)
        self.config['seed'] = self.seed
        parts['ema'].module.image_size = self.image_size

    def load(self, saved):
        optimizer = self.parts['optimizer']  # its hyperparameters come from this call
        saved['optimizer']['param_groups'] = optimizer.state_dict()['param_groups']
        for name, part in self.parts.items():
            if saved[name]:  # a scaler without float16 has no state
                part.load_state_dict(saved[name])
        for parameter, state in optimizer.state.items():
            for name in ('exp_avg', 'exp_avg_sq'):  # fused Adam needs the parameter's strides
                if not state[name].isfinite().all():
                    raise ValueError(f'{name} of its optimizer is not finite')
                state[name] = torch.empty_like(parameter).copy_(state[name].view_as(parameter))
        # the article's code records no losses, but its Adam has counted the steps
        steps = [int(state['step']) for state in optimizer.state.values()]
        before = max([self.step, *steps]) - self.step
        self.steps_before = saved.get('steps_before', before)
        self.losses = saved['losses'].to(self.losses)

    def compare(self, before):
        """Raises UserError where a setting that must stay is not the checkpoint's."""
        for name, now in {**self.config, **self.unet}.items():
            then = before.get(name, now)
            if then == now or name == 'dataset' or (name == 'seed' and now == -1):
                continue  # not the dataset's name, its images must be the same: `data`
            if name not in MAY_CHANGE:
                raise UserError(
                    f'{self.path} is from a run with {name}={then!r:.99}, this one has '
                    f'{name}={now!r:.99}: put it back, or to start afresh change checkpoint_path'
                )
            if not self.finished():
                print(f'{name} was {then}, is {now} from here on')

    def epochs(self):
        """Yields the epochs that are left, under a progress bar of the whole run."""
        size, epochs = self.config['batch_size'], self.config['num_epochs']
        if not self.finished():
            self.first_step, self.began = self.step, time.monotonic()
            self.next_save = self.began + 60 * self.config['save_minutes']
            self.catch_signals()
            done, total = self.step * size, self.total_steps * size
            bar = progress_bar('Training', total, initial=done, unit=' img')
            self.bar = self.enter_context(bar)
            self.sample_progress()  # the grid that an earlier stop cut off
        for epoch in range(self.step // self.steps_per_epoch, epochs):
            first, end = (n * self.steps_per_epoch for n in (epoch, epoch + 1))
            self.losses = F.pad(self.losses, (0, end - len(self.losses)), value=1.0)
            self.bar.set_description(f'Epoch {epoch + 1}/{epochs}')
            yield epoch
            write(f'Epoch {epoch + 1} | Loss {self.losses[first:end].mean().item():.5f}')
        if self.saved_path != self.path:  # X.suspect
            last = f'Its last step is in {self.saved_path}'
            raise UserError(f'training has probably diverged: lower lr. {last}')
        done = self.step // self.steps_per_epoch
        write(f'{self.path}: trained for {done} epochs; a larger num_epochs trains on')

    def catch_signals(self):
        """From here to the end of the run Ctrl-C, SIGTERM and SIGHUP are only noted."""

        def note(signum, frame):
            self.stop_signal = signum
            with suppress(OSError):  # after SIGHUP there is no terminal
                os.write(2, b'\nStopping: finishing the step and saving ...\n')

        if WORLD_SIZE > 1:
            return  # each would stop at another step: with several, the last save stands
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
            signum = getattr(signal, name, signal.SIGINT)  # Windows has no SIGHUP
            with suppress(ValueError):  # in a thread, where handlers cannot be set
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
                    self.callback(signal.signal, signum, signal.signal(signum, note))

    def finished(self):
        return self.step >= self.total_steps

    def step_done(self, loss):
        """Records the loss of a step; saves, samples and stops when it is time to."""
        loss = loss.detach() / WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.all_reduce(loss)
        if self.parts['scaler'].is_enabled():  # it skips a step that overflows
            loss = torch.where(loss.isfinite(), loss, self.losses[max(0, self.step - 1)])
        self.losses[self.step] = loss
        self.step += 1
        if self.finished() or self.stop_signal or time.monotonic() > self.next_save:
            self.save()
            self.exit_if_stopped()
        # the bar is redrawn a few times a second; only then is the loss read from the device
        if self.bar.update(self.config['batch_size']):
            self.bar.set_postfix_str(f'loss {np.mean(self.recent_losses()):.4f}', refresh=False)
        if self.step == self.first_step + 10:
            hours = (time.monotonic() - self.began) / 10 * (self.total_steps - self.step) / 3600
            if hours > 12:
                write(f'{hours / 24:.1f} days to go; fewer num_epochs or Channels take less')
        self.sample_progress()

    def recent_losses(self):
        """The last losses. Raises UserError where training has certainly diverged: a loss is not
        finite, or most are far above 1, the loss of predicting nothing."""
        recent = self.losses[max(0, self.step - RECENT) : self.step].tolist()
        bad = [loss for loss in recent if not math.isfinite(loss)]
        if len(recent) == RECENT and np.median(recent) > 2:
            bad.append(np.median(recent))
        if bad:
            raise self.diverged(f'its loss is {bad[0]:.3g}')
        return recent

    def diverged(self, why):
        kept = f'. {self.path} still holds the last save' if self.path.exists() else ''
        return UserError(f'training has diverged at step {self.step}, {why}: lower lr{kept}')

    def save(self):
        """Writes the checkpoint, or X.suspect beside it where training may have diverged, and the
        curve of the losses. Raises UserError if training has certainly diverged, or if the file
        cannot be written and there will be no later chance."""
        self.next_save = time.monotonic() + 60 * self.config['save_minutes']
        if RANK > 0:
            return
        recent, path = self.recent_losses(), self.path
        losses = self.losses[: self.step].clone().cpu()  # torch.save writes a view's whole storage
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if state['scaler'].get('scale', 1) < 1 or not all_finite(state['weights']):
            raise self.diverged('its weights overflow')
        loss, last = np.median(recent), np.median(recent[-5:])
        line = f'The loss is {max(loss, last):.3g}; a model that has learned nothing has 1'
        hundreds = losses[: self.step // RECENT * RECENT].reshape(-1, RECENT).median(1).values
        if last > 2 or (loss > 0.9 and (hundreds < 0.5).any()):
            path = Path(f'{path}.suspect')
            line += f': lower lr. Saved as {path}; {self.path} stays as it was'
            tqdm.write(line, file=sys.stderr)
        elif loss > 0.9 and self.finished() and self.step >= RECENT:
            tqdm.write(f'{line}: train longer, or with another lr', file=sys.stderr)
        state |= dict(unet=self.unet, config=self.config, losses=losses)
        state['steps_before'] = self.steps_before
        try:
            save_checkpoint(path, state)
            self.saved_step, self.saved_path = self.step, path
        except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
            problem = f'cannot write {path} ({one_line(error)}); what it held before is unharmed'
            if self.finished() or self.stop_signal:
                raise UserError(problem) from None
            tqdm.write(f'{problem}; training goes on', file=sys.stderr)
        with pictures_or_a_line():
            draw_losses(losses, self.steps_per_epoch, OUTPUTS / self.path.name)

    def exit_if_stopped(self):
        if self.stop_signal:
            if self.saved_step < self.step:  # the last save has failed, or the signal came after it
                self.save()
            line = f'Stopped after step {self.step} of {self.total_steps}, '
            line += f'saved in {self.saved_path}'
            line += ': run again to resume' if self.saved_path == self.path else ''
            raise Stopped(self.stop_signal, line)

    def sample_progress(self):
        """Every sample_every epochs a grid of samples, always from the same noise."""
        every = self.config['sample_every'] * self.steps_per_epoch
        if RANK > 0 or not every or not self.step or self.step % max(1, round(every)):
            return
        model = self.parts['ema'].module
        count = min(64, sample_batch(best_device(), self.image_size))
        steps = min(PROGRESS_STEPS, model.time_steps)
        x = sample(model, count, steps, seed=0, on_step=lambda *_: self.exit_if_stopped())
        epoch = self.step / self.steps_per_epoch
        with pictures_or_a_line():
            path = writable(OUTPUTS / self.path.name / 'progress') / f'epoch_{epoch:06.2f}.png'
            grid(x).save(path)
            write(f'{path}: samples after {epoch:.2f} epochs')


@contextmanager
def locked(path, timeout=-1):
    """Holds a lock file, then deletes it; where the file system has no locks, a line says so.
    Raises Timeout if another process has it for longer than `timeout` seconds (-1: waits)."""
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        print(f'No locks here ({one_line(error)}): start no second run on {Path(path).stem}')
    try:
        yield
    finally:
        if lock.is_locked and os.name != 'nt':  # Windows deletes no open file
            Path(path).unlink(missing_ok=True)
        lock.release()


def all_finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors.values())


def save_checkpoint(path, state):
    """Writes a file beside path, then renames it: path holds the old state or the new, never less.
    Raises OSError or RuntimeError."""
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


@contextmanager
def one_line_about(path):
    """Raises UserError in place of whatever a damaged, foreign or hostile checkpoint sets off."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f'there is no checkpoint {path}: train first') from None
    except Exception as error:
        why = f'{path} is not a usable checkpoint: {one_line(error)}'
        advice = 'It stays as it is: to start afresh, move it away or change checkpoint_path'
        raise UserError(f'{why}. {advice}') from None


def load_checkpoint(path, to_train=False):
    """A checkpoint as a dict: `weights`, `optimizer`, `ema`, `scaler`, `unet`, `config`, `losses`
    (one a step), `steps_before`. The article's code wrote only the first three, and sampling needs
    only `ema`, in 16 or 32 bits. Raises UserError for a file that is damaged or would run code."""
    path = Path(path).expanduser()
    with one_line_about(path):
        with zipfile.ZipFile(path) as archive:  # torch.load checks no CRC
            if part := archive.testzip():
                raise ValueError(f'{part} in it is damaged')
        saved = torch.load(path, map_location='cpu', weights_only=True)
        needed = ['ema', 'weights', 'optimizer'] if to_train else ['ema']
        for part in needed:
            if not isinstance(saved.get(part), dict):
                only = ', it can only be sampled from' if part != 'ema' else ''
                raise ValueError(f'it has no entry {part}{only}')
        saved = {'losses': torch.zeros(0, dtype=torch.float32), 'scaler': {}, **saved}
        saved['unet'] = {**UNET_DEFAULTS, **saved.get('unet', {})}
        saved['config'] = {**saved.get('config', {})}
        for part in needed[:2]:
            if not all_finite(saved[part]):
                raise ValueError(f'{part} is not finite')
            prefix = 'module.' if part == 'ema' else ''  # of ModelEmaV3
            saved[part] = {  # without those of DistributedDataParallel and torch.compile
                prefix + name.replace('module.', '').replace('_orig_mod.', ''): tensor.float()
                for name, tensor in saved[part].items()
            }
        if to_train and not 0 < saved['scaler'].get('scale', 1) < math.inf:
            raise ValueError('the scale of its gradients is not a number above 0')
    return saved


# ---- Pictures: each run has a folder of its own, and what it holds is printed -------------------


def writable(folder):
    """The folder, made if need be. Raises OSError if no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


@contextmanager
def pictures_or_a_line():
    """Where a picture cannot be written, training goes on without it."""
    try:
        yield
    except OSError as error:
        tqdm.write(f'cannot write a picture ({one_line(error)}); going on', file=sys.stderr)


def sample_batch(device, size):
    """How many images of size x size are sampled at a time."""
    return max(1, SAMPLE_BATCH[device.type] * 32**2 // size**2)


def grid(x, columns=8):
    """(B, C, H, W) in [0, 1] -> one PIL picture, twice as large."""
    x = F.interpolate(x.float(), scale_factor=2)
    return to_pil_image(utils.make_grid(to_uint8(x).cpu(), columns, pad_value=255)[: x.shape[1]])


def times_to_show(times, T):
    """Of the timesteps of a reverse process those of the strip and those of the animation. For T =
    1000 the strip's are the article's. Others are even steps of sqrt(alpha-bar), what is left of
    the image, so that one sees it come; an animation in steps of t is mostly noise."""
    left = DDPM_Scheduler(T).alpha[times].sqrt()

    def nearest(values, wanted):
        return [times[i] for i in (values[:, None] - wanted).abs().argmin(0).unique()]

    def even(count):
        return nearest(left, torch.linspace(left[0].item(), left[-1].item(), count))

    strip = nearest(torch.tensor(times), torch.tensor(STRIP_TIMES)) if T == 1000 else even(10)
    return strip, even(40)


class Pictures:
    """What `inference` shows of a reverse process: `on_step` collects it, `draw` saves it."""

    def __init__(self, folder, times, T, num_images, seed):
        self.folder, self.last = writable(folder), times[-1]
        self.strip, animation = times_to_show(times, T)
        self.shown = {T, *self.strip, *animation}
        self.frames = {}  # t -> list of (B, C, H, W), of the first images
        self.files = None  # where more images than the grid shows are written one by one
        if num_images > 64:
            self.files = writable(folder / f'{num_images}_images_seed_{seed}')

    def on_step(self, first, t, x):
        if first < 32 and t in self.shown:
            self.frames.setdefault(t, []).append(x[:32].cpu())
        if self.files and t == self.last:  # 8 bits, as FID tools take them
            for i, image in enumerate(to_uint8(x).cpu(), first):
                to_pil_image(image).save(self.files / f'{i:06d}.png')

    def draw(self, images):
        """Saves the grid of the first 64, the strips of the first ten and the animation; shows
        them in windows or a notebook."""
        replaced = ', in place of earlier ones' if (self.folder / 'grid.png').exists() else ''
        picture = grid(images[:64])
        picture.save(self.folder / 'grid.png')
        frames = {t: torch.cat(parts)[:32] for t, parts in self.frames.items()}
        self.animate(frames, self.folder / 'reverse.gif')
        columns, rows = len(self.strip), min(10, len(images))
        size = 0.6 * columns, 0.6 * rows + 0.25  # inches
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
        figure.subplots_adjust(0, 0, 1, 1 - 0.25 / size[1], wspace=0.05, hspace=0.05)
        for i, row in enumerate(axes):
            display_reverse([frames[t][i] for t in self.strip], row)
        for ax, t in zip(axes[0], self.strip):
            ax.set_title(self.title(t).replace('x_0', '$x_0$'), fontsize=8, pad=3)
        figure.savefig(self.folder / 'reverse.png', dpi=100)
        print(f'Saved in {self.folder}/{replaced}: grid.png, reverse.png, reverse.gif', flush=True)
        if self.files:
            print(f'One by one in {self.files}/')
        if plt.get_backend().lower() != 'agg':  # a screen, or a notebook
            ax = plt.figure(figsize=(5, 5)).add_axes((0, 0, 1, 1), xticks=[], yticks=[])
            ax.imshow(picture, cmap='gray')
            plt.show()
            plt.close(ax.figure)
        plt.close(figure)

    def animate(self, frames, path):
        pictures = []
        for t, x in frames.items():
            picture = grid(x)
            frame = Image.new(picture.mode, (picture.width, picture.height + 16), 'white')
            frame.paste(picture, (0, 16))
            ImageDraw.Draw(frame).text((3, 2), self.title(t), 'black')
            pictures.append(frame.quantize(32 if x.shape[1] == 1 else 64))  # noise compresses badly
        durations = [80] * (len(pictures) - 1) + [2500]  # ms
        how = dict(save_all=True, append_images=pictures[1:], duration=durations, loop=0)
        pictures[0].save(path, **how)

    def title(self, t):
        return 'x_0' if t == self.last else f't = {t}'


def draw_losses(losses, steps_per_epoch, folder):
    """losses, one a step -> loss.png, the curve of their means over a 50th of an epoch."""
    window = max(1, steps_per_epoch // 50)
    means = losses[: len(losses) // window * window].reshape(-1, window).mean(1)
    figure = plt.Figure(figsize=(6, 3.5), layout='tight')
    ax = figure.subplots()
    epochs = torch.arange(1, len(means) + 1) * window / steps_per_epoch
    ax.plot(epochs, means, color='black', linewidth=1)
    ax.set(xlabel='epoch', ylabel='mean square error of the noise', yscale='log')
    ax.grid(alpha=0.3)
    figure.savefig(writable(folder) / 'loss.png', dpi=100)


if __name__ == '__main__':
    main()
