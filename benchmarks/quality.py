"""How good are the digits? Measures a checkpoint of ddpm.py against the MNIST test split.

    pip install -r benchmarks/requirements.txt
    python benchmarks/quality.py checkpoints/ddpm_checkpoint [--samples N] [--steps 50] [--quick]

Prints tables, writes benchmarks/results/quality-NAME.json and pictures to outputs/NAME/, and exits
with 1 if a control comes out in the wrong order, for then no figure is to be trusted. It trains
three classifiers, in a few minutes, and keeps them in outputs/quality/. A checkpoint that is only
to be drawn from has no weights but their average, and so no control from the others.

What to know when reading the figures:

* FD is the Frechet distance of Gaussians fitted to features. In the features of a classifier that
  is trained here it is called FD-CNN. It is no FID: those features are Inception's.
* FD falls as N, the number of samples, grows: figures at another N are not comparable. The floor is
  the FD of N training digits, so FD / floor says how far from real digits the samples are.
* Samples are clamped to [0, 1] and rounded to 8 bits; real digits go through the same function.
* A sample is recognised if a third classifier gives one of the ten digits more than 0.9. It has an
  eleventh class, no digit, and was trained on noise, strokes and misshapen digits as well; the
  first one knows only digits, and is sure of noise too.
* A digit with Gaussian noise of sigma 0.1 (black is 0, white 1) still is one, and so is a digit
  blurred by 0.7 pixels: the third classifier was trained so. With noise of 0.3 or more it is none.
  In between nothing was trained.
* The variational bound is for 8-bit images of 32 x 32 with values k / 255 in [0, 1], the padding
  included. It is in nats an image, an upper limit of -log p.
"""

import argparse
import datetime
import gzip
import hashlib
import inspect
import io
import json
import platform
import sys
import time
import warnings
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from prdc import compute_prdc
from torch import nn
from torch.distributions import Normal, kl_divergence
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from speed import processor, table  # noqa: E402

import ddpm  # noqa: E402

RESULTS = Path(__file__).parent / 'results'
LEAST_ACCURACY = 0.992  # of the first classifier on the test split; below, its features are poor
EPOCHS = 3  # of the classifiers' training: enough for 99.4%
FLOOR_DRAWS = 5  # disjoint sets of N training digits; a sixth one makes the controls
NEAREST_K = 5  # neighbours, as Naeem et al. 2020 use
FEWER = 5  # the control from the non-EMA weights has N / 5 samples, since they cost as much again
CLOSEST = 20  # pairs in the picture
STILL, LOST = 0.1, 0.3  # noise up to the first sigma leaves a digit one; from the second on, none
MIXED, MIXED_STEPS = 200, 20  # samples from weights that are mixed with random ones
WEAK = ('noise of 0.1', 'blurred by 0.7 pixels', 'shifted by one pixel', 'no zeros')
NOISY_COPIES = 'copies with noise of 0.02'
GAUSSIAN, UNIFORM = 'a Gaussian per pixel', 'uniform noise'
ORDER = [  # pairs of controls: the FD of the first must be below that of the second
    *[('floor', name) for name in WEAK],
    *[(name, GAUSSIAN) for name in WEAK],
    (GAUSSIAN, UNIFORM),
    ('noise of 0.1', 'noise of 0.3'),
    ('blurred by 0.7 pixels', 'blurred by 1.5 pixels'),
]
LIMITS = {  # the least and the greatest share that may be recognised of a group's controls
    'digits': (0.97, 1),
    'changed slightly': (0.9, 1),
    'noise': (0, 0.02),
    'no digits': (0, 0.05),
    'open to dispute': (0, 1),  # nothing like these was trained on
}


# ==============================================================================================
# Images: all sets are (N, 1, 32, 32) uint8
# ==============================================================================================


def load_splits():
    """MNIST's train and test split, each (images (N, 1, 32, 32) uint8, labels (N,))."""
    train = ddpm.load_images('MNIST'), read_idx('train-labels-idx1', 8)
    test = read_idx('t10k-images-idx3', 16), read_idx('t10k-labels-idx1', 8)
    return train, (F.pad(test[0].reshape(-1, 1, 28, 28), [2] * 4), test[1])


def read_idx(name, header):
    """What lies behind the header of one of MNIST's files: bytes, or labels as whole numbers."""
    path = ddpm.DATA / f'MNIST/raw/{name}-ubyte.gz'
    values = torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)
    return values[header:].long() if 'labels' in name else values[header:]


def load_model(saved, part, device):
    """The UNET of a checkpoint with its `weights` or, part `ema`, their average."""
    model = ddpm.UNET(**saved['unet'])
    model.load_state_dict({k.removeprefix('module.'): v for k, v in saved[part].items()})
    return ddpm.to_device(model.eval(), device)


def mixed_with_random(model, unet, share, seed, device):
    """A UNET with the arguments unet, its weights a share of the way from those of model to random
    initial ones. Share 1 is an average that was never updated."""
    torch.manual_seed(seed)
    mixed = ddpm.to_device(ddpm.UNET(**unet).eval(), device)
    for weights, trained in zip(mixed.parameters(), model.parameters()):
        weights.data.lerp_(trained.data, 1 - share)
    return mixed


def draw(model, count, steps, seed):
    """count samples by the sampler of ddpm.py, (count, 1, 32, 32) uint8."""
    # worth the time that compiling takes; in float32 it made a CPU slower
    if ddpm.half_precision(next(model.parameters()).device) and count * steps >= 100_000:
        model.compile()
    with torch._dynamo.config.patch(suppress_errors=True):  # without a compiler as it is
        return ddpm.to_uint8(ddpm.sample(model, count, steps, seed))


def make_controls(digits, train, labels, seed):
    """Images whose FD is known to be good or bad, {name: as many as digits}. digits and train are
    training digits, labels (M,) those of train."""
    generator = torch.Generator().manual_seed(seed)
    x, count = ddpm.to_input(digits), len(digits)
    mean, std = ddpm.to_input(train).mean(0), ddpm.to_input(train).std(0)
    normal = torch.randn(x.shape, generator=generator)
    controls = {
        'copies of training digits': x,
        'noise of 0.1': x + 0.1 * normal,
        'noise of 0.3': x + 0.3 * normal,
        'blurred by 0.7 pixels': gaussian_blur(x, 7, 0.7),
        'blurred by 1.5 pixels': gaussian_blur(x, 11, 1.5),
        'shifted by one pixel': x.roll(1, dims=3),  # the padding leaves room
        'no zeros': ddpm.to_input(train[labels != 0][-count:]),
        GAUSSIAN: mean + std * normal,
        UNIFORM: torch.rand(x.shape, generator=generator),
    }
    return {name: ddpm.to_uint8(images) for name, images in controls.items()}


# ==============================================================================================
# What is no digit: images as float, not yet clamped to [0, 1]
# ==============================================================================================


def smooth_noise(shape, cells, generator):
    """Standard normal at cells x cells points, and smooth between them: (*shape, 32, 32)."""
    normal = torch.randn(*shape, cells, cells, generator=generator)
    return F.interpolate(normal, size=(32, 32), mode='bicubic')


def noises(count, generator):
    """Noise of every level, {kind: (count, 1, 32, 32)}."""
    shape = (count, 1, 32, 32)
    level, mean, share = torch.rand(3, count, 1, 1, 1, generator=generator)
    uniform, values = torch.rand(2, *shape, generator=generator)
    dots = uniform < share**3  # few dots more often than many
    sizes = [smooth_noise((count // 3 + 1, 1), cells, generator) for cells in (4, 8, 16)]
    smooth = torch.cat(sizes)[:count]
    return {
        'uniform noise': level * uniform,
        'Gaussian noise': mean - 0.5 + level * torch.randn(shape, generator=generator),
        'salt and pepper': dots.float(),
        'sparse noise': dots * values,
        'smooth noise': mean + level * smooth,
        'blobs': 4 * (smooth - 2 * mean),
    }


def strokes(count, generator):
    """Two to four Bezier curves an image, as thick as a pen's: (count, 1, 32, 32)."""
    corners = 2 + 28 * torch.rand(count, 4, 3, 2, generator=generator)  # (x, y), three a curve
    drawn = torch.arange(4) < torch.randint(2, 5, (count, 1), generator=generator)
    corners = torch.where(drawn[:, :, None, None], corners, corners[:, :1])
    t = torch.linspace(0, 1, 24)
    weights = torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    points = torch.einsum('kt,nskc->nstc', weights, corners).flatten(1, 2)  # (count, 96, 2)
    pixels = torch.cartesian_prod(torch.arange(32.0), torch.arange(32.0))
    distance = torch.cat([torch.cdist(pixels, part).amin(2) for part in points.split(500)])
    width = 1.7 + torch.rand(count, 1, generator=generator)
    return (width - distance).reshape(count, 1, 32, 32)


def misshapen(x, labels, generator):
    """Digits x (N, 1, 32, 32), labels (N,), made into what is none, and strokes: {kind: images}."""
    count, order = len(x), torch.randperm(len(x), generator=generator)
    other, unlike = x[order], labels != labels[order]
    level = torch.rand(count, 1, 1, 1, generator=generator)
    quarters = [x[i::3].roll(by, (2, 3)) for i, by in enumerate([(16, 0), (0, 16), (16, 16)])]
    tiles = x.reshape(count, 4, 8, 4, 8).transpose(2, 3).flatten(1, 2)  # (N, 16, 8, 8)
    shuffle = torch.rand(count, 16, generator=generator).argsort()
    tiles = tiles[torch.arange(count)[:, None], shuffle].unflatten(1, (4, 4)).transpose(2, 3)
    where = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), x.shape, align_corners=False)
    where = where + 0.25 * smooth_noise((count, 2), 5, generator).permute(0, 2, 3, 1)
    return {
        'strokes': strokes(count, generator),
        'warped': F.grid_sample(x, where, align_corners=False)[labels != 1],  # a bent 1 is a 1
        'quarters swapped': torch.cat(quarters),
        '16 tiles shuffled': tiles.reshape(x.shape),
        'two side by side': torch.maximum(x, other.roll(8, dims=3))[unlike],
        'two blended': (x + (0.3 + 0.4 * level) * (other - x))[unlike],
        'mean of 8': sum(x.roll(i, dims=0) for i in range(8)) / 8 * (1 + level),
        'turned by 90 degrees': x.rot90(1, (2, 3))[(labels > 1) & (labels < 8)],
        'inverted': 1 - x,
        'in much noise': x + (LOST + level) * torch.randn(x.shape, generator=generator),
    }


def with_no_digits(images, labels):
    """Training data (images, labels) for the third network: all digits, a quarter of them with
    slight noise and a quarter blurred, and about as many images of class 10, no digit."""
    generator, count = torch.Generator().manual_seed(0), len(images) // 16  # of each of 16 kinds
    x = ddpm.to_input(images)
    none = noises(count, generator) | misshapen(x[:count], labels[:count], generator)
    none = torch.cat(list(none.values()))
    level = STILL * torch.rand(len(x[1::4]), 1, 1, 1, generator=generator)
    x[1::4] += level * torch.randn(x[1::4].shape, generator=generator)
    x[2::4] = gaussian_blur(x[2::4], 7, 0.7)
    eleventh = torch.full((len(none),), 10)
    return ddpm.to_uint8(torch.cat([x, none])), torch.cat([labels, eleventh])


def recognition_controls(images, labels, count, seed):
    """What the third network has to tell apart, {group of LIMITS: {kind: images}}, of count of the
    test digits: noise and misshapen digits of the kinds it was trained on, drawn anew, and others.
    """
    generator = torch.Generator().manual_seed(seed + 1)  # 0 is that of the training
    chosen = torch.randperm(len(images), generator=generator)[:count]
    x, labels = ddpm.to_input(images[chosen]), labels[chosen]
    normal = torch.randn(x.shape, generator=generator)
    noise_above = torch.rand(x.shape, generator=generator)
    noise_above[:, :, 16:] = x[:, :, 16:]

    def noisy(*levels):
        return {f'noise of {level}': x + level * normal for level in levels}

    groups = {
        'changed slightly': {
            **noisy(0.05, STILL),
            'blurred by 0.7 pixels': gaussian_blur(x, 7, 0.7),
        },
        'noise': {**noises(len(x), generator), GAUSSIAN: x.mean(0) + x.std(0) * normal},
        'no digits': {
            **misshapen(x, labels, generator),
            'noise in the upper half': noise_above,  # it was not trained on these two
            **noisy(LOST),
        },
        'open to dispute': {**noisy(0.2), 'mirrored': x.flip(3)},
    }
    return {
        group: {kind: ddpm.to_uint8(images) for kind, images in kinds.items()}
        for group, kinds in groups.items()
    }


# ==============================================================================================
# Classifiers trained here, and features: of two of them, and of no classifier at all
# ==============================================================================================


def first_network():
    """Three normalised 3x3 convolutions, maximum pooling, 96 features, ReLU."""

    def block(C_in, C_out):
        conv = nn.Conv2d(C_in, C_out, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(C_out), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten()]  # (B, 1024)
    return nn.Sequential(*layers, nn.Linear(1024, 96), nn.ReLU(), nn.Linear(96, 10))


def second_network():
    """Otherwise in each respect: 5x5 strides, no norm, no pooling, 64 features, GELU."""
    layers = [nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.GELU()]
    layers += [nn.Conv2d(16, 48, 5, stride=2, padding=2), nn.GELU(), nn.Flatten()]  # (B, 3072)
    return nn.Sequential(*layers, nn.Linear(3072, 64), nn.GELU(), nn.Linear(64, 10))


def third_network():
    """The first with an eleventh class, no digit: for what is recognised, not for features."""
    network = first_network()
    network[-1] = nn.Linear(96, 11)
    return network


def fit(network, images, labels, epochs, peak_lr, batch_size=128):
    """Trains a classifier by Adam, its learning rate rising to peak_lr and falling to 0."""
    device = next(network.parameters()).device
    batches = len(images) // batch_size
    optimizer = torch.optim.Adam(network.parameters())
    course = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, batches * epochs)
    for epoch in range(epochs):
        order = torch.randperm(len(images))[: batches * batch_size].split(batch_size)
        for batch in tqdm(order, f'Classifier, epoch {epoch + 1}/{epochs}', unit='step'):
            x = ddpm.to_input(images[batch]).to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(network(x), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            course.step()


def classifier(build, peak_lr, train, device):
    """The network of build, trained on train = (images, labels), or as an earlier run of the same
    code on the same data has left it on the disk. Returns it and the SHA-256 of its weights."""
    ddpm.set_seed(0)
    network = build().to(device, memory_format=torch.channels_last)
    code = inspect.getsource(build) + inspect.getsource(fit) + f'{EPOCHS, peak_lr, device.type}'
    key = sha256(code.encode(), *(tensor.numpy().tobytes() for tensor in train))
    path = ddpm.OUTPUTS / f'quality/{build.__name__}-{key[:16]}.pt'
    if path.exists():
        network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    else:
        fit(network, *train, EPOCHS, peak_lr)
        path.parent.mkdir(parents=True, exist_ok=True)
        ddpm.save_checkpoint(path, network.state_dict())
    weights = [tensor.cpu().numpy().tobytes() for tensor in network.state_dict().values()]
    return network.eval(), sha256(*weights)


class PCA(nn.Module):
    """The pixels' 64 principal components: sees what a classifier may have learned to ignore."""

    def __init__(self, images, components=64):
        super().__init__()
        x = ddpm.to_input(images).flatten(1)  # (N, 1024)
        self.register_buffer('mean', x.mean(0))
        basis = torch.linalg.eigh(x.T.cov().double())[1]  # float32 may fail to converge
        self.register_buffer('basis', basis[:, -components:].float())

    def forward(self, x):
        return (x.flatten(1) - self.mean) @ self.basis  # (B, 64)


@torch.inference_mode()
def embed(network, images, device):
    """The outputs of a network, (N, D) float64 on the CPU."""
    batches = (ddpm.to_input(batch.to(device)) for batch in images.split(1000))
    return torch.cat([network(batch).double().cpu() for batch in batches])


# ==============================================================================================
# Distances between sets of features, real (M, D) and fake (N, D)
# ==============================================================================================


def features_as_they_are(width):
    """What torchmetrics takes for its network, so that features are computed once for all."""
    network = nn.Identity()
    network.num_features = width
    return network


def frechet(real, fake):
    """FD, the Frechet distance (Heusel et al. 2017, eq. 6)."""
    metric = FrechetInceptionDistance(features_as_they_are(real.shape[1]))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute().item()


def kernel(real, fake, seed=0):
    """KID (Binkowski et al. 2018) and its standard deviation over 50 subsets of 1,000."""
    torch.manual_seed(seed)  # it draws the subsets
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # 'will save all extracted features in buffer'
        network = features_as_they_are(real.shape[1])
        metric = KernelInceptionDistance(network, 50, min(1000, len(real), len(fake)))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    mean, std = metric.compute()
    return {'KID': mean.item(), 'KID std': std.item()}


def neighbourhoods(real, fake):
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020). They
    too depend on the numbers of both, which are therefore made equal."""
    count = min(len(real), len(fake))
    real, fake = real[:count].float().numpy(), fake[:count].float().numpy()
    with redirect_stdout(io.StringIO()):  # prdc prints the two numbers
        return {k: float(v) for k, v in compute_prdc(real, fake, NEAREST_K).items()}


def frechet_over_floor(real, sets, floor, embedded):
    """FD of the sets {name: images} and of the list floor, all of the same N, to the features
    real; and FD / floor: over the mean, the largest and the smallest of the floor.
    embedded turns images into features."""
    draws = [frechet(real, embedded(images)) for images in floor]
    fd = {name: frechet(real, embedded(images)) for name, images in sets.items()}
    divisors = (float(np.mean(draws)), max(draws), min(draws))
    ratio = {name: [value / divisor for divisor in divisors] for name, value in fd.items()}
    return {'N': len(floor[0]), 'floor': draws, 'FD': fd, 'FD / floor, low, high': ratio}


# ==============================================================================================
# Classes, memorisation, likelihood
# ==============================================================================================


def class_balance(samples, real, seed=0):
    """samples (N, 10), real (M, 10): a classifier's logits. The shares of the classes, and their
    total variation distance, beside that of N draws from real's shares (mean and 95th percentile).
    """
    shares = [F.one_hot(logits.argmax(1), 10).double().mean(0) for logits in (samples, real)]
    generator = np.random.default_rng(seed)
    chance = generator.multinomial(len(samples), shares[1].numpy(), size=1000) / len(samples)
    chance = np.abs(chance - shares[1].numpy()).sum(1) / 2
    return {
        'samples': shares[0].tolist(),
        'test': shares[1].tolist(),
        'total variation': (shares[0] - shares[1]).abs().sum().item() / 2,
        'by chance, mean and 95%': [chance.mean(), np.quantile(chance, 0.95)],
    }


def recognised(logits):
    """The share of images that are a digit with a probability above 0.9: of the third network's
    logits (N, 11), or of another classifier's (N, 10), which knows nothing else than digits."""
    return (logits.softmax(1)[:, :10].amax(1) > 0.9).double().mean().item()


@torch.inference_mode()
def nearest(queries, train, device):
    """Euclidean distance to the nearest row of train and its index: (N, D), (M, D) -> (N,), (N,)"""
    train, distances, indices = train.float().to(device), [], []
    for part in queries.float().split(250):
        part = part.to(device)
        index = torch.cdist(part, train).argmin(1)
        distances.append((part - train[index]).norm(dim=1).cpu())  # cdist is inexact near 0
        indices.append(index.cpu())
    return torch.cat(distances), torch.cat(indices)


def memorisation(sets, test, train, device):
    """How near to training digits the sets {name: (N, D)} lie, against unseen test digits (M, D):
    the share nearer than the 1st percentile of test, 1% if nothing is memorised. The second result
    are the distances and indices of the nearest training digits."""
    near = {name: nearest(queries, train, device) for name, queries in sets.items()}
    distances = {name: distance for name, (distance, _) in near.items()}
    distances['test digits'] = nearest(test, train, device)[0]
    limit = distances['test digits'].quantile(0.01)
    shares = {name: (d < limit).double().mean().item() for name, d in distances.items()}
    medians = {name: d.median().item() for name, d in distances.items()}
    return {'limit': limit.item(), 'share below': shares, 'median distance': medians}, near


def log_bin(p, x):
    """log of the mass that the Normal p gives to the 8-bit bin around x, a multiple of 1/255: as
    in paper eq. 13, but for [0, 1]; the outer bins reach to infinity."""
    upper = ((x + 1 / 510 - p.mean) / p.stddev).masked_fill(x > 1 - 1 / 510, torch.inf)
    lower = ((x - 1 / 510 - p.mean) / p.stddev).masked_fill(x < 1 / 510, -torch.inf)
    flip = lower > 0  # to the left tail, where log_ndtr keeps its digits
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    upper, lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return upper + torch.log1p(-(lower - upper).exp())


@torch.inference_mode()
def variational_bound(model, images, device, seed=0):
    """Paper eq. 5 with sigma_t^2 = beta_t, in nats an image: L_T over all images, and at every t
    the mean over images drawn for it, with the standard error that these draws leave."""
    beta = ddpm.DDPM_Scheduler(model.time_steps).beta.double().to(device)
    abar = torch.cumprod(1 - beta, dim=0)
    draws, images = torch.Generator(device).manual_seed(seed), images.to(device)
    x_0 = ddpm.to_input(images).double()
    p = Normal(torch.zeros_like(abar[-1]), torch.ones_like(abar[-1]))
    q = Normal(abar[-1].sqrt() * x_0, (1 - abar[-1]).sqrt())
    means, variance = [kl_divergence(q, p).flatten(1).sum(1).mean()], 0.0

    for t in tqdm(range(model.time_steps), 'Variational bound', unit='step'):
        count = 16 + 1024 // (t + 1)  # the terms, and so their errors, fall about as 1 / t
        chosen = torch.randint(len(images), (count,), generator=draws, device=device)
        x_0 = ddpm.to_input(images[chosen]).double()  # (B, 1, 32, 32)
        eps = torch.randn(x_0.shape, generator=draws, device=device)
        x_t = abar[t].sqrt() * x_0 + (1 - abar[t]).sqrt() * eps  # eq. 4
        with ddpm.autocast(device):
            eps = model(x_t.float(), torch.full((count,), t, device=device)).double()
        mean = (x_t - beta[t] / (1 - abar[t]).sqrt() * eps) / (1 - beta[t]).sqrt()  # eq. 11
        p = Normal(mean, beta[t].sqrt())
        if t == 0:
            terms = -log_bin(p, x_0)
        else:  # eq. 6 and 7
            rest = (1 - abar[t - 1]) / (1 - abar[t])
            mean = abar[t - 1].sqrt() * beta[t] / (1 - abar[t]) * x_0
            mean = mean + (1 - beta[t]).sqrt() * rest * x_t
            terms = kl_divergence(Normal(mean, (rest * beta[t]).sqrt()), p)
        terms = terms.flatten(1).sum(1)  # (B,)
        means.append(terms.mean())
        variance = variance + terms.var() / count
    last, first, *between = torch.stack(means).tolist()
    return {
        'nats': last + first + sum(between),
        'standard error': variance.sqrt().item(),
        'L_T': last,
        'L_t': sum(between),
        'L_0': first,
    }


def histogram_nats(train, test):
    """The trivial baseline: a histogram of 256 values for each pixel by itself, from train with one
    added to every count; -log of what it gives test, in nats an image."""
    pixels = train[0].numel()
    place = 256 * torch.arange(pixels)  # (1024,)
    counts = sum(
        torch.bincount((place + part.flatten(1)).flatten(), minlength=256 * pixels)
        for part in train.split(5000)
    )
    log_p = ((counts + 1) / (len(train) + 256)).log()
    return -log_p[place + test.flatten(1)].sum(1).mean().item()


# ==============================================================================================
# The measurement
# ==============================================================================================


def sha256(*parts):
    """Of the bytes, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def measure(saved, train, test, samples=10_000, steps=None, seed=0, quick=False):
    """saved: what ddpm.load_checkpoint returns; train, test: (images, labels); steps: of the
    reverse process, None for all; quick: without the non-EMA weights and the variational bound.
    Returns the result, ready for JSON, and pictures {name: (images, columns)}. Raises
    ddpm.UserError."""
    most = len(train[0]) // (FLOOR_DRAWS + 1)
    if samples not in range(20 * FEWER, most + 1):
        raise ddpm.UserError(f'samples is {samples}, but must be from {20 * FEWER} to {most}')
    steps = len(ddpm.sampling_times(saved['unet']['time_steps'], steps))
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    train, test = ((ddpm.to_uint8(ddpm.to_input(x)), labels) for x, labels in (train, test))

    cnn, cnn_hash = classifier(first_network, 1e-2, train, device)
    second, second_hash = classifier(second_network, 3e-3, train, device)
    third, third_hash = classifier(third_network, 1e-2, with_no_digits(*train), device)
    logits, right = embed(cnn, test[0], device), {}
    for name, network in (('CNN', cnn), ('second CNN', second), ('third CNN', third)):
        right[name] = (embed(network, test[0], device).argmax(1) == test[1]).double().mean().item()
    if right['CNN'] < LEAST_ACCURACY:
        raise ddpm.UserError(f'the classifier reaches {right["CNN"]:.2%}, not {LEAST_ACCURACY:.1%}')
    spaces = {'CNN': cnn[:-1], 'second CNN': second[:-1], 'PCA-64': PCA(train[0]).to(device)}

    ema = load_model(saved, 'ema', device)
    judged = recognition_controls(*test, samples, seed)
    for group, share in (('no digits', 1), ('open to dispute', 0.25), ('open to dispute', 0.1)):
        mixed = mixed_with_random(ema, saved['unet'], share, seed, device)
        garbage = draw(mixed, MIXED, min(steps, MIXED_STEPS), seed)
        judged[group][f'samples of {share:.0%} random weights'] = garbage
    drawn = draw(ema, samples, steps, seed)
    judged = {'samples': {'samples': drawn}, 'digits': {'test split': test[0]}, **judged}
    few = samples // FEWER
    fewer = {'EMA': drawn[:few]}
    if 'weights' in saved and not quick:
        raw = load_model(saved, 'weights', device)
        fewer['non-EMA'] = draw(raw, few, steps, seed)

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train[0]), generator=generator)
    *floor, digits = train[0][order].split(samples)[: FLOOR_DRAWS + 1]
    unseen = test[0][torch.randperm(len(test[0]), generator=generator)[:samples]]
    controls = make_controls(digits, *train, seed)
    noisy = ddpm.to_uint8(
        ddpm.to_input(digits) + 0.02 * torch.randn(digits.shape, generator=generator)
    )

    result = {'spaces': {}, 'memorisation': {}}
    for name, network in spaces.items():

        def embedded(images, network=network):
            return embed(network, images, device)

        real = embedded(test[0])
        result['spaces'][name] = {
            'samples': {
                **kernel(real, embedded(drawn)),
                **neighbourhoods(embedded(unseen), embedded(drawn)),
            },
            'train digits': {
                **kernel(real, embedded(floor[0])),
                **neighbourhoods(embedded(unseen), embedded(floor[0])),
            },
            'all': frechet_over_floor(real, {'samples': drawn, **controls}, floor, embedded),
            'fewer': frechet_over_floor(real, fewer, [part[:few] for part in floor], embedded),
        }

    sets = {'samples': drawn, 'copies': digits, NOISY_COPIES: noisy}
    embeddings = {'pixels': nn.Flatten(), 'CNN': spaces['CNN']}
    for name, network in embeddings.items():
        queries = {key: embed(network, images, device) for key, images in sets.items()}
        others = [embed(network, images, device) for images in (unseen, train[0])]
        result['memorisation'][name], near = memorisation(queries, *others, device)
        if name == 'pixels':
            distance, index = near['samples']
            closest = distance.argsort()[:CLOSEST]
            pairs = torch.cat([drawn[closest], train[0][index[closest]]])

    result |= {
        'classifiers': {
            'accuracy': right,
            'features': {
                name: embed(net, digits[:1], device).shape[1] for name, net in spaces.items()
            },
            'sha256': {'CNN': cnn_hash, 'second CNN': second_hash, 'third CNN': third_hash},
        },
        'classes': class_balance(embed(cnn, drawn, device), logits),
        'recognised': {
            group: {kind: recognised(embed(third, images, device)) for kind, images in sets.items()}
            for group, sets in judged.items()
        },
        'recognised by the first classifier': {
            'samples': recognised(embed(cnn, drawn, device)),
            'test split': recognised(logits),
        },
        'bound': {},
        'samples': {
            'N': samples,
            'steps': steps,
            'seed': seed,
            'sha256': sha256(drawn.numpy().tobytes()),
        },
        'run': {
            # None: the file does not say
            'optimizer steps': len(saved['losses']) or None,
            **saved['config'],
            'unet': saved['unet'],
        },
    }
    if not quick:
        histogram = {'histogram of each pixel': histogram_nats(train[0], test[0])}
        result['bound'] = variational_bound(ema, test[0], device) | histogram
    result['broken'] = broken(result)
    rows = torch.cat([images[:CLOSEST] for images in [drawn, *controls.values()]])
    pictures = {'samples': (drawn[:100], 10), 'closest': (pairs, CLOSEST), 'controls': (rows, 20)}
    return result, pictures


def broken(result):
    """What a measure that can be trusted would not show, a sentence each; empty if all is well."""
    wrong = []
    for space, scores in result['spaces'].items():
        fd, floor = scores['all']['FD'], max(scores['all']['floor'])
        for less, more in ORDER:
            if not {'floor': floor, **fd}[less] < fd[more]:
                wrong.append(f'{space}: the FD of {more} is not above that of {less}')
        if not fd['copies of training digits'] < 1.25 * floor:  # the draws differ by so much
            wrong.append(f'{space}: copies of training digits have a poor FD')
    for group, (least, most) in LIMITS.items():
        for kind, share in result['recognised'][group].items():
            if not least <= share <= most:
                wrong.append(f'of {kind} {share:.1%} are recognised, not {least:.0%} to {most:.0%}')
    fewer = result['spaces']['CNN']['fewer']
    if 'non-EMA' in fewer['FD']:
        # after a long training at a low rate the two are equal, but for chance
        chance = max(fewer['floor']) - min(fewer['floor']) + 0.1 * fewer['FD']['non-EMA']
        if not fewer['FD']['EMA'] < fewer['FD']['non-EMA'] + chance:
            wrong.append('CNN: samples from the non-EMA weights have a lower FD')
    for space, near in result['memorisation'].items():
        for name, least in (('copies', 0.99), (NOISY_COPIES, 0.5)):
            if not near['share below'][name] >= least:
                wrong.append(f'{space}: {name} of training digits pass for new digits')
    return wrong


def report(result):
    """The result as Markdown tables."""
    samples, spaces, classes = result['samples'], result['spaces'], result['classes']
    accuracy, bound = result['classifiers']['accuracy'], result['bound']
    few = spaces['CNN']['fewer']['N']
    text = (
        f'N = {samples["N"]:,} samples in {samples["steps"]} steps, seed {samples["seed"]}, '
        f'SHA-256 {samples["sha256"][:12]}. FD at another N is not comparable.\n'
        f'Features: of classifiers with {accuracy["CNN"]:.2%} and {accuracy["second CNN"]:.2%} on '
        'the test split (FD-CNN), and PCA-64 of the pixels.\n\n'
    )
    names = ['KID', 'KID std', 'precision', 'recall', 'density', 'coverage']
    rows = []
    for space, scores in spaces.items():
        fd = scores['all']
        ratio, low, high = fd['FD / floor, low, high']['samples']
        score = [f'**{ratio:.3g}** ({low:.3g} to {high:.3g})', fd['FD']['samples']]
        rows += [[f'{space}: samples', *score, *[scores['samples'][k] for k in names]]]
        floor = ['1', float(np.mean(fd['floor'])), *[scores['train digits'][k] for k in names]]
        rows += [[f'{space}: train digits', *floor]]
    text += table(['', 'FD / floor (spread)', 'FD', *names], rows)

    ratios = [scores['all']['FD / floor, low, high'] for scores in spaces.values()]
    rows = [[name, *[ratio[name][0] for ratio in ratios]] for name in ratios[0]]
    ratios = [scores['fewer']['FD / floor, low, high'] for scores in spaces.values()]
    rows += [[f'{name}, N = {few:,}', *[r[name][0] for r in ratios]] for name in ratios[0]]
    text += '\n' + table(['FD / floor', *spaces], rows)
    if 'non-EMA' not in spaces['CNN']['fewer']['FD']:
        text += (
            'No control from the non-EMA weights: they are not in the file, or --quick was given.\n'
        )

    rows = [[part, *[f'{share:.1%}' for share in classes[part]]] for part in ('samples', 'test')]
    text += '\n' + table(['share of', *'0123456789'], rows)
    mean, most = classes['by chance, mean and 95%']
    text += (
        f'Total variation {classes["total variation"]:.3f}; by chance alone {mean:.3f}, in 95% of '
        f'cases below {most:.3f}.\n\nRecognised by a classifier that also knows what is no digit '
        f'({accuracy["third CNN"]:.2%} on the test split):\n\n'
    )
    rows = []
    for group, kinds in result['recognised'].items():
        least, most = LIMITS.get(group, (0, 1))
        limits = f'{least:.0%} to {most:.0%}' if most - least < 1 else ''
        rows += [[group, kind, f'{share:.1%}', limits] for kind, share in kinds.items()]
    text += table(['', 'kind', 'recognised', 'should be'], rows)
    first = result['recognised by the first classifier']
    text += (
        f'\nThe first classifier, which knows digits only, is sure of {first["samples"]:.1%} of '
        f'the samples and of {first["test split"]:.1%} of the test split.\n\n'
    )
    near = result['memorisation'].values()
    rows = []
    for name in result['memorisation']['CNN']['share below']:
        figures = [(v['share below'][name], v['median distance'][name]) for v in near]
        rows += [[name, *[f'{share:.1%}, {median:.2f}' for share, median in figures]]]
    text += 'The share nearer to a training digit than 99% of test digits; median distance:\n\n'
    text += table(['', *result['memorisation']], rows)
    if bound:
        text += (
            f'\nVariational bound {bound["nats"]:.1f} +- {bound["standard error"]:.1f} nats an '
            f'image (L_T {bound["L_T"]:.2g}, L_t {bound["L_t"]:.1f}, L_0 {bound["L_0"]:.1f}); a '
            f'histogram of each pixel takes {bound["histogram of each pixel"]:.1f}. For 32 x 32 '
            'pixels of 8 bits in [0, 1].\n'
        )
    return text


def main():
    parser = argparse.ArgumentParser(
        description='Measures how good the digits of a checkpoint are.'
    )
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('--samples', type=int, default=10_000, help='100 to 10000')
    parser.add_argument('--steps', type=int, help='of the reverse process; all if not given')
    parser.add_argument('--seed', type=int, default=0, help='of the samples')
    parser.add_argument(
        '--quick',
        action='store_true',
        help='without the non-EMA weights and the variational bound: of 1000 samples in 50 steps '
        'a third of the work',
    )
    parser.add_argument('--output', type=Path, default=RESULTS, help='folder of the JSON file')
    args = parser.parse_args()
    start = time.monotonic()
    try:
        saved = ddpm.load_checkpoint(args.checkpoint)
        if saved['config'].get('dataset', 'MNIST') != 'MNIST':
            raise ddpm.UserError(f'{args.checkpoint} was not trained on MNIST')
        numbers = dict(samples=args.samples, steps=args.steps, seed=args.seed, quick=args.quick)
        result, pictures = measure(saved, *load_splits(), **numbers)
    except ddpm.UserError as error:
        sys.exit(f'quality.py: {error}')

    steps = result['samples']['steps']
    name = f'quality-{args.checkpoint.name}-{steps}'
    cuda = torch.cuda.is_available()
    about = {
        'checkpoint': args.checkpoint.name,
        'date': datetime.date.today().isoformat(),
        'machine': torch.cuda.get_device_name() if cuda else processor(),
        'versions': {'python': platform.python_version()}
        | {package: version(package) for package in ('torch', 'torchmetrics', 'prdc', 'numpy')},
        'minutes': (time.monotonic() - start) / 60,
        'note': 'FD depends on N: compare it at the same N only',
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f'{name}.json').write_text(json.dumps(about | result, indent=1) + '\n')
    for part, (images, columns) in pictures.items():
        path = ddpm.OUTPUTS / args.checkpoint.name / f'quality-{steps}-{part}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        ddpm.grid(ddpm.to_input(images), columns).save(path)
    print(report(result))
    print(f'{about["machine"]}, {about["minutes"]:.1f} minutes; {args.output / name}.json')
    if result['broken']:
        sys.exit('quality.py: controls out of order: ' + '; '.join(result['broken']))


if __name__ == '__main__':
    main()
