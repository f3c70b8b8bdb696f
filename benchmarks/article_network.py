"""The article's own network on a CPU: FULL's 35 million weights, for two of its 75 epochs.

    python benchmarks/article_network.py train     hours; run again to resume
    python benchmarks/article_network.py article   the article's own loop, from the same weights
    python benchmarks/article_network.py rates     300 steps at each of three learning rates
    python benchmarks/article_network.py show      64 digits in 50 and in 1000 steps, attention
    python benchmarks/article_network.py quality   quality.py of samples in 50 steps

What they find is gathered in benchmarks/results/article-network.json; `show` also draws
assets/article_network.png. The learning rate is ten times the article's, which is made for 75
epochs, and decays. The article's loop runs under autocast like ours, else it would take three times
as long; all else in it is the article's. A CPU without bfloat16 works with the operations of
cpu_kernels.py.
"""

import datetime
import json
import os
import resource
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import cpu_kernels  # noqa: E402
import full_run  # noqa: E402
import quality  # noqa: E402
import speed  # noqa: E402
from ablations import DIVERGED  # noqa: E402

import ddpm  # noqa: E402

PATH = Path('checkpoints/article_network')
RESULT = HERE / 'results/article-network.json'
PICTURE = HERE.parent / 'assets/article_network.png'
SETTINGS = dict(
    checkpoint_path=str(PATH),
    num_epochs=2,
    lr=2e-4,
    lr_decay=True,
    seed=0,
    save_minutes=15,
    sample_every=0.5,
)
ARTICLE_STEPS = 200
RATES = (2e-5, 2e-4, 1e-3)
RATES_STEPS, RATES_BATCH = 300, 16
SAMPLES = 1000
SMOOTH = 10  # losses in one point of a curve


def found():
    return json.loads(RESULT.read_text()) if RESULT.exists() else {}


def note(**figures):
    known = found()
    about = dict(date=datetime.date.today().isoformat(), machine=speed.processor())
    about |= dict(torch=torch.__version__, threads=torch.get_num_threads())
    for name, value in figures.items():
        known[name] = dict(**about, **value)
    RESULT.write_text(json.dumps(known, indent=1) + '\n')


def means(losses):
    """Of SMOOTH losses each."""
    losses = torch.as_tensor(losses)
    return losses[: len(losses) // SMOOTH * SMOOTH].reshape(-1, SMOOTH).mean(1).tolist()


def train():
    began, first = time.monotonic(), 0
    if PATH.exists():
        first = len(ddpm.load_checkpoint(PATH)['losses'])
    try:
        ddpm.train(**{**ddpm.FULL, **SETTINGS})
    except ddpm.Stopped as stop:
        print(stop)
    saved = ddpm.load_checkpoint(PATH)
    sitting = dict(
        steps=[first, len(saved['losses'])],
        hours=(time.monotonic() - began) / 3600,
        peak_GB=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    )
    sittings = [*found().get('training', {}).get('sittings', []), sitting]
    config, losses = saved['config'], means(saved['losses'])
    note(training=dict(config=config, sittings=sittings, losses_in_tens=losses))


def article():
    """The article's loop on the same data from the same weights; its order and noise differ."""
    ddpm.set_seed(SETTINGS['seed'])
    loop = speed.Article(speed.SIZES['full'], torch.device('cpu'))
    losses, criterion = [], loop.criterion

    def kept(*pair):
        loss = criterion(*pair)
        losses.append(loss.detach())  # a loss that is kept keeps its step's graph
        return loss

    loop.criterion = kept
    steps, began = loop.training(ddpm.FULL['batch_size']), time.monotonic()
    with ddpm.autocast(loop.device), ddpm.progress_bar('Article', ARTICLE_STEPS) as bar:
        for _ in range(ARTICLE_STEPS):
            next(steps)
            bar.update()
    seconds = (time.monotonic() - began) / ARTICLE_STEPS
    losses = means(torch.stack(losses))
    note(article=dict(lr=2e-5, seconds_a_step=seconds, losses_in_tens=losses))


def rates():
    """Short runs on the same images from the same weights; each rate decays to 0 in its own."""
    load, losses = ddpm.load_images, {}
    settings = {**ddpm.FULL, **SETTINGS, 'batch_size': RATES_BATCH, 'num_epochs': 1}
    settings |= dict(sample_every=0, save_minutes=1000)

    def few(*arguments):
        return load(*arguments)[: RATES_STEPS * RATES_BATCH]

    with mock.patch.object(ddpm, 'load_images', few), TemporaryDirectory() as folder:
        for lr in RATES:
            path = Path(folder, f'lr_{lr:g}')
            try:
                ddpm.train(**settings | dict(lr=lr, checkpoint_path=path))
                losses[f'{lr:g}'] = means(ddpm.load_checkpoint(path)['losses'])
            except ddpm.UserError as error:
                if not str(error).startswith(DIVERGED):  # which is a finding
                    raise
                losses[f'{lr:g}'] = str(error)
            note(rates=dict(batch_size=RATES_BATCH, steps=RATES_STEPS, losses_in_tens=losses))


def show():
    strips = {}
    with mock.patch.dict(ddpm.FULL, checkpoint_path=str(PATH)):
        note(attention=full_run.attention_of_the_weights(batches=5))
    for steps in (50, 1000):
        began = time.monotonic()
        ddpm.inference(PATH, num_steps=steps, seed=0, num_images=64)
        note(**{f'sampling in {steps}': dict(images=64, seconds=time.monotonic() - began)})
        folder = ddpm.OUTPUTS / PATH.name
        for name in ('grid.png', 'reverse.png', 'reverse.gif'):
            shutil.copy(folder / name, folder / f'{steps}-{name}')
        strips[steps] = folder / f'{steps}-reverse.png'
        draw(strips, PICTURE)


def measure():
    arguments = ['quality.py', str(PATH), '--samples', str(SAMPLES), '--steps', '50', '--quick']
    with mock.patch.object(sys, 'argv', arguments):
        quality.main()


def draw(strips, path):
    """The losses, the progress grids in order of time, and both reverse processes."""
    known = found()
    per_epoch = 60000 // ddpm.FULL['batch_size']
    folder = ddpm.OUTPUTS / PATH.name
    grids = {float(path.stem.split('_')[1]): path for path in (folder / 'progress').glob('*.png')}
    if strips:
        _, done = known['training']['sittings'][-1]['steps']
        grids[done / per_epoch] = folder / '50-grid.png'
    heights = [2.4, 2.7, *[5] * bool(strips)]  # none before the training has ended
    figure = plt.figure(figsize=(10, sum(heights)), layout='constrained')
    above, middle, *below = figure.subfigures(len(heights), 1, height_ratios=heights)
    ax = above.subplots()
    for name, label in (
        ('training', f'ddpm.train, lr {SETTINGS["lr"]:g}'),
        ('article', 'the article’s loop, lr 2e-5'),
    ):
        if name in known:
            losses = known[name]['losses_in_tens']
            epochs = np.arange(1, len(losses) + 1) * SMOOTH / per_epoch
            ax.plot(epochs, losses, label=label, lw=1)
    ax.set(xlabel='epoch', ylabel='mean square error', yscale='log')
    ax.legend()
    pictures = [(f'{epochs:.2g} epochs', grids[epochs]) for epochs in sorted(grids)]
    if 1000 in strips:
        pictures.append((f'{pictures[-1][0]}, 1000 steps', folder / '1000-grid.png'))
    panels = [*middle.subplots(1, len(pictures), squeeze=False)[0]]
    for part in below:
        panels += [*part.subplots(1, len(strips), squeeze=False)[0]]
    pictures += [(f'{steps} steps', strip) for steps, strip in strips.items()]
    for ax, (title, picture) in zip(panels, pictures):
        ax.imshow(Image.open(picture), cmap='gray')  # of grey pictures; strips are in colour
        ax.set_title(title, fontsize=9)
        ax.axis('off')
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    parts = dict(train=train, article=article, rates=rates, show=show, quality=measure)
    if sys.argv[1:2] and sys.argv[1] in parts:
        if not cpu_kernels.KEEP.keys() <= os.environ.keys():
            environment = os.environ | cpu_kernels.KEEP
            os.execve(sys.executable, [sys.executable, *sys.argv], environment)
        plain = ddpm.half_precision(torch.device('cpu')) is not None
        with nullcontext() if plain else cpu_kernels.patched(), ddpm.errors_in_one_line():
            parts[sys.argv[1]]()
    else:
        sys.exit(__doc__)
