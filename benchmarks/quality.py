"""How good are the digits? Measures a checkpoint of ddpm.py against the MNIST test split.

    python benchmarks/quality.py checkpoints/ddpm_checkpoint [--samples N] [--steps 50] [--seed 0]

Prints the figures and adds them to benchmarks/results/quality.json. Exits with 1 if a control comes
out wrong, for then no figure is to be trusted. Trains four classifiers, in some minutes, and keeps
them in outputs/quality.

What to know when reading the figures:

* FD-CNN is the Frechet distance of Gaussians fitted to the features of a classifier that is trained
  here. It is no FID: those features are Inception's.
* FD falls as N, the number of samples, grows: figures at another N are not comparable. The floor is
  the FD of N training digits, so FD / floor says how far from real digits the samples are.
* A sample is recognised if a strict classifier gives one of the ten digits more than 0.9. It has an
  eleventh class, no digit, and was trained on noise, strokes and misshapen digits as well; the
  first one knows only digits, and is sure of noise too. Since a training leaves some of it to
  chance, three are trained; the figure is their mean.
* A digit with Gaussian noise of sigma 0.1 (black is 0, white 1) still is one, and so is a digit
  blurred by 0.7 pixels: the strict classifiers were trained so. With noise of 0.3 or more it is
  none. In between nothing was trained.
* Chance: two seeds of the same weights, N = 1,000, differ in 95% of cases by less than 2.7 points
  in what is recognised, 2.4 in precision and recall, and a factor of 1.7 in an FD / floor of 2.5.
"""

import argparse
import datetime
import gzip
import hashlib
import inspect
import json
import os
import sys
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from speed import processor  # noqa: E402

import ddpm  # noqa: E402

RESULTS = Path(__file__).parent / 'results'
RESULT = RESULTS / 'quality.json'
LEAST_ACCURACY = 0.992  # of the first classifier on the test split; below, its features are poor
EPOCHS, PEAK_LR = 3, 1e-2  # of the classifiers' training: enough for 99.4%
STRICT = 3  # strict classifiers
FLOOR_DRAWS = 5  # disjoint sets of N training digits; a sixth one makes the controls
NEAREST_K = 5  # neighbours, as Naeem et al. 2020 use
STILL, LOST = 0.1, 0.3  # noise up to the first sigma leaves a digit one; from the second on, none
NOISY_COPIES = 'copies with noise of 0.02'
LADDERS = [  # of controls, the FD of each must be below that of the next; `floor` is its largest
    ('floor', 'noise of 0.1', 'noise of 0.3', 'a Gaussian per pixel'),
    ('floor', 'blurred by 0.7 pixels', 'blurred by 1.5 pixels'),
    ('floor', 'shifted by one pixel', 'a Gaussian per pixel'),
    ('floor', 'no zeros', 'a Gaussian per pixel'),
]
LIMITS = {  # the least and the greatest share that may be recognised of a group's controls
    'digits': (0.97, 1),
    'changed slightly': (0.9, 1),
    'noise': (0, 0.02),
    'no digits': (0, 0.05),
    'open to dispute': (0, 1),  # nothing like these was trained on
}


# ==== Images: all sets are (N, 1, 32, 32) uint8 ===================================================


def load_splits():
    """MNIST's train and test split, each (images (N, 1, 32, 32) uint8, labels (N,))."""
    test = F.pad(read_idx('t10k-images-idx3', 16).reshape(-1, 1, 28, 28), [2] * 4)
    train = ddpm.load_images('MNIST'), read_idx('train-labels-idx1', 8).long()
    return train, (test, read_idx('t10k-labels-idx1', 8).long())


def read_idx(name, header):
    """The bytes behind the header of one of MNIST's files."""
    path = ddpm.DATA / f'MNIST/raw/{name}-ubyte.gz'
    return torch.frombuffer(
        bytearray(gzip.decompress(path.read_bytes())[header:]), dtype=torch.uint8
    )


# ---- What is no digit: images as float, not yet clamped to [0, 1] --------------------------------


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
    """Training data (images, labels) for the strict classifiers: all digits, a quarter of them with
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


def make_controls(images, labels):
    """What a measure has to tell apart, made from digits: {group of LIMITS: {kind: images}}. Noise
    and misshapen digits are of the kinds that the strict classifiers were trained on, drawn anew,
    and of others."""
    generator = torch.Generator().manual_seed(1)  # 0 is that of the training
    x = ddpm.to_input(images)
    normal = torch.randn(x.shape, generator=generator)
    noise_above = torch.rand(x.shape, generator=generator)
    noise_above[:, :, 16:] = x[:, :, 16:]
    noisy = {level: x + level * normal for level in (0.05, STILL, 0.2, LOST)}
    groups = {
        'changed slightly': {
            'noise of 0.05': noisy[0.05],
            'noise of 0.1': noisy[STILL],
            'blurred by 0.7 pixels': gaussian_blur(x, 7, 0.7),
            'shifted by one pixel': x.roll(1, dims=3),  # the padding leaves room
        },
        'noise': {
            **noises(len(x), generator),
            'a Gaussian per pixel': x.mean(0) + x.std(0) * normal,
        },
        'no digits': {
            **misshapen(x, labels, generator),
            'noise in the upper half': noise_above,  # it was not trained on these two
            'noise of 0.3': noisy[LOST],
        },
        'open to dispute': {
            'noise of 0.2': noisy[0.2],
            'blurred by 1.5 pixels': gaussian_blur(x, 11, 1.5),
            'mirrored': x.flip(3),
        },
    }
    return {
        group: {kind: ddpm.to_uint8(images) for kind, images in kinds.items()}
        for group, kinds in groups.items()
    }


# ==== Classifiers trained here, and their features ================================================


def first_network():
    """Three normalised 3x3 convolutions, maximum pooling, 96 features, ReLU."""

    def block(C_in, C_out):
        conv = nn.Conv2d(C_in, C_out, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(C_out), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten()]  # (B, 1024)
    return nn.Sequential(*layers, nn.Linear(1024, 96), nn.ReLU(), nn.Linear(96, 10))


def strict_network():
    """The same with an eleventh class, no digit: for what is recognised, not for features."""
    network = first_network()
    network[-1] = nn.Linear(96, 11)
    return network


def fit(network, images, labels, batch_size=128):
    """Trains a classifier by Adam, its learning rate rising to PEAK_LR and falling to 0."""
    device = next(network.parameters()).device
    batches = len(images) // batch_size
    optimizer = torch.optim.Adam(network.parameters())
    course = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, batches * EPOCHS)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images))[: batches * batch_size].split(batch_size)
        for batch in tqdm(order, f'Classifier, epoch {epoch + 1}/{EPOCHS}', unit='step'):
            x = ddpm.to_input(images[batch]).to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(network(x), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            course.step()


def classifier(build, data, seed=0):
    """The network of build, trained on data = (images, labels), or as an earlier run of the same
    code on the same data has left it on the disk."""
    device = ddpm.best_device()
    torch.manual_seed(seed)
    network = ddpm.to_device(build(), device)
    code = inspect.getsource(build) + inspect.getsource(fit)
    key = hashlib.sha256(f'{code}{EPOCHS, PEAK_LR, seed, device.type}'.encode())
    for tensor in data:
        key.update(tensor.numpy().tobytes())
    path = ddpm.OUTPUTS / f'quality/{build.__name__}-{seed}-{key.hexdigest()[:16]}.pt'
    if path.exists():
        network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    else:
        fit(network, *data)
        path.parent.mkdir(parents=True, exist_ok=True)
        ddpm.save_checkpoint(path, network.state_dict())
    return network.eval()


@torch.inference_mode()
def embed(network, images):
    """The outputs of a network, (N, D) float64 on the CPU."""
    device = next(network.parameters()).device
    batches = (ddpm.to_input(batch.to(device)) for batch in images.split(1000))
    return torch.cat([network(batch).cpu().double() for batch in batches])


# ==== What features tell: real (M, D), fake (N, D) ================================================


def frechet(real, fake):
    """FD, the Frechet distance (Heusel et al. 2017, eq. 6)."""
    a, b = real.T.cov(), fake.T.cov()
    root = torch.linalg.eigvals(a @ b).sqrt().real.sum()  # the trace of (a b)^(1/2)
    means = (real.mean(0) - fake.mean(0)).square().sum()
    return (means + a.trace() + b.trace() - 2 * root).item()


def precision_recall(real, fake):
    """The share of fake that lies among real, and of real that lies among fake (Kynkaanniemi et al.
    2019). Both depend on the numbers, which are therefore made equal."""
    count = min(len(real), len(fake))
    real, fake = real[:count].float(), fake[:count].float()
    distance = torch.cdist(real, fake)
    # a point lies among others if one of them has it nearer than its own k-th neighbour; the
    # nearest to each point is itself
    radius = [torch.cdist(x, x).kthvalue(NEAREST_K + 1).values for x in (real, fake)]
    precision = (distance < radius[0][:, None]).any(0)
    recall = (distance < radius[1]).any(1)
    return precision.double().mean().item(), recall.double().mean().item()


def recognised(logits):
    """The share of images that are a digit with a probability above 0.9: of a strict network's
    logits (N, 11), or of the first one's (N, 10), which knows nothing else than digits."""
    return (logits.softmax(1)[:, :10].amax(1) > 0.9).double().mean().item()


@torch.inference_mode()
def nearest(queries, train):
    """Euclidean distance to the nearest row of train, (N, D), (M, D) -> (N,)."""
    queries, train = queries.float(), train.float()
    index = torch.cat([torch.cdist(part, train).argmin(1) for part in queries.split(250)])
    return (queries - train[index]).norm(dim=1)  # cdist is inexact near 0


# ==== The measurement =============================================================================


class Yardstick:
    """Measures sets of `count` images, (count, 1, 32, 32) uint8. Raises ddpm.UserError for a count
    out of range."""

    def __init__(self, count):
        (self.train, self.labels), (self.test, self.test_labels) = load_splits()
        most = len(self.train) // (FLOOR_DRAWS + 1)
        if count not in range(100, most + 1):
            raise ddpm.UserError(f'samples is {count}, but must be from 100 to {most}')
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.train), generator=generator).split(count)
        self.base = order[FLOOR_DRAWS]  # of the controls
        self.unseen = torch.randperm(len(self.test), generator=generator)[:count]
        self.cnn = classifier(first_network, (self.train, self.labels))
        self.real = self.features(self.test)
        floor = [self.features(self.train[part]) for part in order[:FLOOR_DRAWS]]
        self.floor = [frechet(self.real, features) for features in floor]

    @cached_property
    def strict(self):
        data = with_no_digits(self.train, self.labels)
        return [classifier(strict_network, data, seed) for seed in range(STRICT)]

    def features(self, images):
        return embed(self.cnn[:-1], images)

    def scores(self, images):
        """FD, FD / floor (its mean; low and high: its largest and smallest), precision, recall."""
        fake = self.features(images)
        fd, mean = frechet(self.real, fake), sum(self.floor) / len(self.floor)
        precision, recall = precision_recall(self.real[self.unseen], fake)
        return {
            'FD': fd,
            'FD / floor': fd / mean,
            'low, high': [fd / max(self.floor), fd / min(self.floor)],
            'precision': precision,
            'recall': recall,
        }

    def recognised(self, images):
        """The share of images that are recognised, by each of the strict classifiers."""
        return [recognised(embed(network, images)) for network in self.strict]

    def memorised(self, sets):
        """How many of the sets {name: images} are copies of training digits: the share that is
        nearer to one than all but 1% of test digits are, by pixels and by features. So 1% if
        nothing is memorised."""
        found = {}
        for space, embedded in (('pixels', lambda x: x.flatten(1)), ('features', self.features)):
            train = embedded(self.train)
            limit = nearest(embedded(self.test[self.unseen]), train).quantile(0.01)
            nearer = {name: nearest(embedded(x), train) < limit for name, x in sets.items()}
            found[space] = {name: copies.double().mean().item() for name, copies in nearer.items()}
        return found


def measure_controls(yard):
    """What a measure that can be trusted tells apart: figures of images that are known to be good
    or bad, and `broken`, what is out of order among them."""
    groups = make_controls(yard.test[yard.unseen], yard.test_labels[yard.unseen])
    torch.manual_seed(1)  # 0 is that of a training
    untrained = ddpm.UNET(**ddpm.PREVIEW['unet'])
    samples = ddpm.to_uint8(ddpm.sample(untrained, 100, 10, seed=0))
    groups['no digits']['samples of an untrained network'] = samples
    groups = {'digits': {'test split': yard.test}, **groups}

    digits, labels = yard.train[yard.base], yard.labels[yard.base]
    far = {k: v for kinds in make_controls(digits, labels).values() for k, v in kinds.items()}
    far |= {'no zeros': yard.train[yard.labels != 0][-len(digits) :]}
    ranked = dict.fromkeys(kind for ladder in LADDERS for kind in ladder[1:])
    noise = 0.02 * torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))
    copies = {'copies': digits, NOISY_COPIES: ddpm.to_uint8(ddpm.to_input(digits) + noise)}
    right = embed(yard.cnn, yard.test).argmax(1) == yard.test_labels
    mean = sum(yard.floor) / len(yard.floor)
    result = {
        'N': len(digits),
        'accuracy': right.double().mean().item(),
        'training digits': yard.scores(digits),
        'floor': [fd / mean for fd in yard.floor],
        'FD / floor': {kind: yard.scores(far[kind])['FD / floor'] for kind in ranked},
        'recognised': {
            group: {kind: yard.recognised(images) for kind, images in kinds.items()}
            for group, kinds in groups.items()
        },
        'memorised': yard.memorised(copies),
    }
    return result | {'broken': broken(result)}


def broken(result):
    """What a measure that can be trusted would not show, a sentence each; empty if all is well."""
    wrong, floor = [], max(result['floor'])
    if not result['accuracy'] >= LEAST_ACCURACY:
        wrong.append(f'the classifier reaches {result["accuracy"]:.2%}, not {LEAST_ACCURACY:.1%}')
    if not result['training digits']['FD / floor'] < 1.25 * floor:  # the draws differ by so much
        wrong.append('training digits have a poor FD')
    fd = {'floor': floor, **result['FD / floor']}
    for less, more in [pair for ladder in LADDERS for pair in zip(ladder, ladder[1:])]:
        if not fd[less] < fd[more]:
            wrong.append(f'the FD of {more} is not above that of {less}')
    for group, (least, most) in LIMITS.items():
        for kind, shares in result['recognised'][group].items():
            if not all(least <= share <= most for share in shares):
                wrong.append(f'of {kind} {shares} are recognised, not {least:.0%} to {most:.0%}')
    for space, shares in result['memorised'].items():
        for name, least in (('copies', 0.99), (NOISY_COPIES, 0.5)):
            if not shares[name] >= least:
                wrong.append(f'by {space} only {shares[name]:.0%} of {name} are found')
    return wrong


def measure(path, samples=1000, steps=None, seed=0):
    """The figures of samples from a checkpoint in `steps` steps (None: all), and those of the
    controls, both ready for JSON. Raises ddpm.UserError."""
    if ddpm.load_checkpoint(path)['config'].get('dataset', 'MNIST') != 'MNIST':
        raise ddpm.UserError(f'{path} was not trained on MNIST')
    model, yard = ddpm.load_model(path), Yardstick(samples)
    images = ddpm.to_uint8(ddpm.sample(model, samples, steps, seed))
    shares = yard.recognised(images)
    classes = embed(yard.cnn, images).argmax(1).bincount(minlength=10) / samples
    result = {
        'N': samples,
        'steps': len(ddpm.sampling_times(model.time_steps, steps)),
        'seed': seed,
        **yard.scores(images),
        'recognised': sum(shares) / STRICT,
        'by each': shares,
        'memorised': {k: v['samples'] for k, v in yard.memorised({'samples': images}).items()},
        'classes': classes.tolist(),
    }
    return result, measure_controls(yard)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('--samples', type=int, default=1000, help='100 to 10000')
    parser.add_argument('--steps', type=int, help='of the reverse process; all if not given')
    parser.add_argument('--seed', type=int, default=0, help='of the samples')
    args = parser.parse_args(arguments)
    try:
        result, controls = measure(args.checkpoint, args.samples, args.steps, args.seed)
    except ddpm.UserError as error:
        sys.exit(f'quality.py: {error}')

    today = datetime.date.today().isoformat()
    about = {'date': today, 'machine': processor(), 'torch': torch.__version__}
    key = '{}, {steps} steps, N = {N}, seed {seed}'.format(args.checkpoint.name, **result)
    figures = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    figures |= {f'controls, N = {args.samples}': about | controls, key: about | result}
    figures = json.loads(json.dumps(figures), parse_float=lambda text: float(f'{float(text):.4g}'))
    temporary = RESULT.with_suffix('.tmp')
    temporary.write_text(json.dumps(figures, indent=1) + '\n')
    os.replace(temporary, RESULT)
    for name, value in figures[key].items():
        print(f'{name}: {value}')
    if controls['broken']:
        sys.exit('quality.py: controls out of order: ' + '; '.join(controls['broken']))


if __name__ == '__main__':
    main()
