"""Makes every figure of docs/ddpm.md from ddpm.py, MNIST and the weights in the repository.

    python docs/figures.py              all of them, some minutes on two CPU cores
    python docs/figures.py unet noise   only these

Everything is seeded: the same figures each time, up to rounding on another machine."""

import io
import re
import shutil
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from timm.utils import ModelEmaV3
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / 'docs/figures'
sys.path.insert(0, str(ROOT))
import ddpm  # noqa: E402

ddpm.best_device = lambda: torch.device('cpu')  # the same figures also where there is a GPU
# a phone shows a page 6 inches wide at half its size: so no text is smaller than 12 points
STYLE = {'font.size': 13, 'axes.grid': True, 'grid.alpha': 0.3, 'lines.linewidth': 2}
DARK, BLUE, ORANGE = '#222222', '#1f6fb4', '#d9730d'
EPOCH = 60_000 // 64  # steps, as in the article


# ---- What the figures share ---------------------------------------------------------------------


def save(figure, name):
    """A PNG of few colours on white, without the date or version that would change its bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200, metadata={'Software': None}, facecolor='white')
    plt.close(figure)
    picture = Image.open(buffer).convert('RGB').quantize(48, dither=Image.Dither.NONE)
    picture.save(FOLDER / f'{name}.png', optimize=True)


def save_rows(name, rows, labels, titles=(), low=0, high=1, left=1.2):
    """Rows of pictures (N, 1, H, W), each with its label at the left, 6 inches wide; `low` and
    `high` are black and white, one of each for all rows or a list."""
    columns, top = max(map(len, rows)), 0.32 if titles else 0.05
    side = (6 - left) / columns
    figure = plt.figure(figsize=(6, top + side * len(rows)))
    lows, highs = (v if isinstance(v, list) else [v] * len(rows) for v in (low, high))
    for i, (row, label) in enumerate(zip(rows, labels)):
        bottom = side * (len(rows) - 1 - i) / figure.get_figheight()
        height = side / figure.get_figheight()
        figure.text(0.02, bottom + height / 2, label, va='center', fontsize=12)
        for j, picture in enumerate(row):
            place = (left + side * (j + 0.03)) / 6, bottom + 0.03 * height, side * 0.94 / 6
            ax = figure.add_axes((*place, height * 0.94), xticks=[], yticks=[])
            ax.imshow(picture[0], cmap='gray', vmin=lows[i], vmax=highs[i])
            if i == 0 and titles:
                ax.set_title(titles[j], fontsize=12, pad=4)
    save(figure, name)


def axes(height, rows=1, **settings):
    figure, ax = plt.subplots(rows, 1, figsize=(6, height), layout='constrained', squeeze=False)
    for one in ax[:, 0]:
        one.set(**settings)
    return figure, ax[0, 0] if rows == 1 else ax[:, 0]


@cache
def pretrained():
    model = ddpm.load_model(ddpm.PRETRAINED)
    return model, ddpm.DDPM_Scheduler(model.time_steps)


@cache
def page():
    """The names that the page's own blocks define: its play is drawn by the code it shows."""
    names, text = {}, (ROOT / 'docs/ddpm.md').read_text()
    with redirect_stdout(io.StringIO()):
        for code in re.findall(r'^```python\n(.*?)^```$', text, re.M | re.S):
            exec(code, names)
    return names


@cache
def digits():
    return ddpm.to_input(ddpm.load_images('MNIST')[:1000])


def gaussian(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def jump(scheduler, x, t, eps):
    """x_t from x_0 at once (paper eq. 4)."""
    abar = scheduler(t)[1]
    return abar.sqrt() * x + (1 - abar).sqrt() * eps


@cache
def article_samples():
    """16 images in all steps, with the grid, the film and half of the strips of `inference`."""
    with TemporaryDirectory() as folder, patch.object(ddpm, 'OUTPUTS', Path(folder)):
        images = ddpm.inference(ddpm.PRETRAINED, num_images=16, seed=0)
        drawn = ddpm.folder_of_pictures(ddpm.PRETRAINED)
        for name in ('grid.png', 'reverse.gif'):
            shutil.copy(drawn / name, FOLDER)
        strips = Image.open(drawn / 'reverse.png')
        strips.crop((0, 0, strips.width, strips.height - 5 * 66)).save(FOLDER / 'reverse.png')
    return images


# ---- The forward process ------------------------------------------------------------------------


def forward():
    scheduler, times = ddpm.DDPM_Scheduler(1000), (0, 50, 100, 200, 300, 400, 600, 999)
    rows = [
        [jump(scheduler, digits()[i], t, gaussian(i, 1, 32, 32)) for t in times] for i in (0, 2)
    ]
    titles = [f'{"t = " if t == 0 else ""}{t}' for t in times]
    save_rows('forward', rows, ['', ''], titles, left=0.05)


def schedule():
    scheduler = ddpm.DDPM_Scheduler(1000)
    figure, (top, bottom) = axes(5.4, 2, xlabel='timestep t', xlim=(0, 999))
    top.plot(scheduler.beta, color=DARK, label=r'$\beta_t$, variance added in a step')
    top.set(ylim=(0, 0.022))
    top.legend()
    abar = scheduler.alpha
    bottom.plot(abar.sqrt(), color=BLUE, label=r'$\sqrt{\bar\alpha_t}$, image left')
    bottom.plot((1 - abar).sqrt(), color=ORANGE, label=r'$\sqrt{1-\bar\alpha_t}$, noise')
    bottom.plot(abar, '--', color=BLUE, label=r'$\bar\alpha_t$')
    bottom.set(ylim=(0, 1.02))
    bottom.legend()
    save(figure, 'schedule')


def kernel():
    """The chain of small steps and the jump give pixels of one distribution."""
    torch.manual_seed(0)
    scheduler, times = ddpm.DDPM_Scheduler(1000), (20, 100, 400)
    x = x_0 = digits()[:1].expand(300, -1, -1, -1)
    figure, panels = axes(5.6, 3, yticks=[], ylabel='pixels', xlim=(-3, 5))
    for t in range(times[-1] + 1):
        beta, _ = scheduler(t)
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn_like(x)
        if t in times:
            ax, bins = panels[times.index(t)], np.linspace(-3, 5, 161)
            x_t = jump(scheduler, x_0, t, torch.randn_like(x))
            chain = f'{t + 1} small steps'
            ax.hist(x.flatten(), bins, color='#b8cfe6', density=True, label=chain)
            at_once = dict(histtype='step', color=DARK, linewidth=1.2, label='one jump')
            ax.hist(x_t.flatten(), bins, density=True, **at_once)
            ax.legend(title=f't = {t}')
    panels[-1].set_xlabel('value of a pixel of $x_t$')
    save(figure, 'kernel')


# ---- The reverse process ------------------------------------------------------------------------


@torch.no_grad()
def prediction():
    """x_t, the noise that the model sees in it, and the x_0 that follows (eq. 4 solved for it)."""
    model, scheduler = pretrained()
    times, x, eps = (10, 50, 100, 200, 300, 450), digits()[7:8], gaussian(0, 1, 1, 32, 32)
    x_t = torch.cat([jump(scheduler, x, t, eps) for t in times])
    predicted = model(x_t, torch.tensor(times))
    abar = scheduler.alpha[list(times)][:, None, None, None]
    x_0 = (x_t - (1 - abar).sqrt() * predicted) / abar.sqrt()
    labels = ['$x_t$', 'noise in it', 'predicted', 'implied $x_0$']
    rows, titles = [x_t, eps.expand(6, -1, -1, -1), predicted, x_0], [f't = {t}' for t in times]
    save_rows('prediction', rows, labels, titles, [0, -3, -3, 0], [1, 3, 3, 1])


def sigma():
    _, scheduler = pretrained()
    beta, abar = scheduler.beta, scheduler.alpha
    before = torch.cat([torch.ones(1), abar[:-1]])
    tilde = beta * (1 - before) / (1 - abar)
    figure, ax = axes(3.2, xlabel='timestep t + 1, of 500', xscale='log', yscale='log')
    ax.set_ylabel('standard deviation')
    ax.plot(range(1, 501), beta.sqrt(), color=DARK, label=r'$\sqrt{\beta_t}$, the article')
    ax.plot(range(2, 501), tilde[1:].sqrt(), '--', color=ORANGE, label=r'$\sqrt{\tilde\beta_t}$')
    ax.legend()
    save(figure, 'sigma')


def noise():
    """From the same x_T: as in Algorithm 2, without the noise of the steps, with one draw more."""
    (model, scheduler), kept = pretrained(), article_samples()[:10]
    respace, x_T = ddpm.respace, gaussian(0, 16, 1, 32, 32)[:10]  # as `sample` draws it
    without = lambda *a: (*respace(*a)[:2], torch.zeros(model.time_steps))  # noqa: E731
    with patch.object(ddpm, 'respace', without):
        mean = ddpm.sample(model, 10, seed=0, noise=x_T)
    more = kept + scheduler.beta[0].sqrt() * gaussian(1, *kept.shape)
    labels = ['Algorithm 2', 'no noise\nin the steps', 'noise also\nat the end']
    save_rows('noise', [kept, mean, more], labels)


@torch.no_grad()
def loss():
    """The loss at single timesteps, of 100 digits each."""
    model, scheduler = pretrained()
    T, x = model.time_steps, digits()[:100]
    times = np.unique(np.geomspace(1, T, 16).round().astype(int)) - 1
    losses = []
    for t in times:
        eps = gaussian(int(t), *x.shape)
        losses.append(ddpm.diffusion_loss(model, scheduler, x, torch.full((100,), t), eps).item())
    figure, ax = axes(3.6, xlabel='timestep t + 1, of 500', xscale='log', yscale='log')
    ax.set_ylabel('mean square error\nof the noise')
    ax.plot(times + 1, losses, 'o-', color=DARK, label='checkpoints/mnist')
    ax.axhline(1, color=ORANGE, linestyle='--', label='predicting 0')
    ax.legend()
    save(figure, 'loss')


# ---- The UNet -----------------------------------------------------------------------------------


def unet_shapes():
    """Of each layer of the article's UNet: input, output and skip, as a forward pass has them."""
    model, shapes = ddpm.UNET().eval(), {}
    for name, layer in model.named_children():

        def note(layer, inputs, outputs, name=name):
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            attention = hasattr(layer, 'attention_layer')
            shapes[name] = [tuple(x.shape[1:]) for x in (inputs[0], *outputs)] + [attention]

        layer.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 1, 32, 32), 0)
    return shapes


def unet():
    shapes = unet_shapes()
    figure = plt.figure(figsize=(6, 6.6))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 6), ylim=(0, 6.6))
    ax.axis('off')

    def box(x, y, name, color):
        C, H, W = shapes[name][0]
        attention = '\nattention' if shapes[name][-1] is True and name.startswith('Layer') else ''
        frame = FancyBboxPatch((x, y), 1.75, 0.86, 'round,pad=0,rounding_size=0.08', fc=color)
        ax.add_patch(frame)
        text = f'{name}\n{C} x {H} x {W}{attention}'
        ax.text(x + 0.875, y + 0.43, text, ha='center', va='center', fontsize=12)

    def arrow(start, end, text='', at=(0, 0), color=DARK, **how):
        ax.annotate('', end, start, arrowprops=dict(arrowstyle='-|>', color=color, lw=1.8, **how))
        middle = (start[0] + end[0]) / 2 + at[0], (start[1] + end[1]) / 2 + at[1]
        ax.text(*middle, text, ha='center', va='center', fontsize=12, color=color)

    left, right, ys = 0.2, 4.05, (5.0, 3.6, 2.2)
    down, up = ['Layer1', 'Layer2', 'Layer3'], ['late_conv', 'Layer6', 'Layer5']
    for y, name, mirror in zip(ys, down, up):
        box(left, y, name, '#dbe9f6')
        box(right, y, mirror, '#fde6cf')
        skip = shapes[name][2]
        text = f'skip\n{skip[0]} x {skip[1]} x {skip[2]}'
        arrow((left + 1.75, y + 0.43), (right, y + 0.43), text, (0, 0.0), BLUE)
    for text in ax.texts:
        if text.get_text().startswith('skip'):
            text.set_bbox(dict(fc='white', ec='none', pad=2))
    box(2.125, 0.7, 'Layer4', '#e8e8e8')
    for y, name in zip(ys[:2], down):
        out = shapes[name][1]
        arrow((left + 0.6, y), (left + 0.6, y - 0.54), f'{out[0]}', (0.36, 0))
    arrow((left + 0.875, ys[2]), (2.125, 1.2), f'{shapes["Layer3"][1][0]}', (-0.25, -0.15))
    arrow((3.875, 1.2), (right + 0.5, ys[2]))
    joined = {'Layer4': (4.35, 1.5), 'Layer5': (4.4, 3.33), 'Layer6': (4.4, 4.73)}
    for name, skip, place in zip(joined, reversed(down), joined.values()):
        came, kept = shapes[name][1][0], shapes[skip][2][0]
        ax.text(*place, f'{came} + {kept} = {came + kept}', va='center', fontsize=12)
    for y in ys[:2]:
        arrow((right + 0.16, y - 0.54), (right + 0.16, y))
    C = shapes['shallow_conv'][1][0]
    ax.text(left + 0.875, 6.4, r'$x_t$, 1 x 32 x 32', ha='center', va='center')
    arrow((left + 0.6, 6.24), (left + 0.6, ys[0] + 0.86), f'shallow_conv: {C}', (0.9, 0))
    ax.text(right + 0.875, 6.4, r'noise, 1 x 32 x 32', ha='center', va='center')
    arrow((right + 0.5, ys[0] + 0.86), (right + 0.5, 6.24), 'output_conv', (0.68, 0))
    ax.text(3, 0.25, 'channels x height x width at each input', ha='center', fontsize=12)
    save(figure, 'unet')


def time_table():
    """The sines of the time table, all of them, and those that a layer of 64 channels sees."""
    sines = ddpm.SinusoidalEmbeddings(1000, 512).embeddings[:, 0::2]
    figure, panels = axes(6, 2, ylabel='timestep t', xlabel='column (the even ones: sines)')
    for ax, part in zip(panels, (sines, sines[:100, :32])):
        extent = 0, 2 * part.shape[1], len(part), 0
        how = dict(aspect='auto', vmin=-1, vmax=1, interpolation='nearest', extent=extent)
        image = ax.imshow(part, cmap='RdBu', **how)
        ax.grid(False)
    panels[0].axvline(64, color=DARK, linewidth=2.5)
    panels[1].set_title('left of the line: what a layer of 64 channels sees', fontsize=12)
    figure.colorbar(image, ax=panels, label='value', ticks=[-1, 0, 1])
    save(figure, 'time_table')


# ---- Training -----------------------------------------------------------------------------------


def decays(steps):
    """The decay of each update of the EMA, as timm has it with the warm-up of ddpm.py."""
    warm_up = dict(use_warmup=True, warmup_gamma=10, warmup_power=1)
    ema = ModelEmaV3(torch.nn.Linear(1, 1), 0.9999, **warm_up)
    return np.array([ema.get_decay(n) for n in range(1, steps + 1)])


def ema():
    """How much of the average is the random start, or of the first epoch."""
    steps = 40 * EPOCH
    epochs = np.arange(1, steps + 1) / EPOCH
    figure, ax = axes(3.6, xlabel='epoch of 937 steps', ylim=(-2, 102), xlim=(0, 40))
    ax.set_ylabel('share of the average, %')
    constant = np.full(steps, 0.9999)
    ax.plot(epochs, 100 * constant.cumprod(), color=ORANGE, label='random start, no warm-up')
    for decay, style, name in ((constant, '--', 'no warm-up'), (decays(steps), '-', 'warm-up')):
        since = np.where(np.arange(steps) < EPOCH, 1, decay).cumprod()
        color = ORANGE if style == '--' else BLUE
        ax.plot(epochs, 100 * since, style, color=color, label=f'start and first epoch, {name}')
    ax.legend(fontsize=12)
    save(figure, 'ema')


def ema_samples():
    """The weights of the repository, mixed with a random start as the EMA would without warm-up."""
    model, _ = pretrained()
    saved = ddpm.load_checkpoint(ddpm.PRETRAINED)
    torch.manual_seed(0)
    start, rows, labels = ddpm.UNET(**saved['unet']), [], []
    for epochs in (10, 15, 20, 30, None):
        share = 0.9999 ** (epochs * EPOCH) if epochs else 0
        mixed = ddpm.load_model(ddpm.PRETRAINED)
        with torch.no_grad():
            for m, s, p in zip(mixed.parameters(), start.parameters(), model.parameters()):
                m.copy_(share * s + (1 - share) * p)
        rows.append(ddpm.sample(mixed, 10, 50, seed=0))
        labels.append(f'{epochs} epochs:\n{share:.0%} of start' if epochs else 'warm-up:\n0%')
    save_rows('ema_samples', rows, labels, left=1.5)


def progress():
    """The first epoch of the preview, 3,000 steps: its samples and its loss."""
    shown = (150, 450, 900, 1500, 3000)
    with (
        TemporaryDirectory() as folder,
        patch.multiple(ddpm, PROGRESS_STEPS=30, OUTPUTS=Path(folder)),
    ):
        path = Path(folder) / 'run'
        settings = dict(checkpoint_path=path, num_epochs=1, seed=0, sample_every=0.05)
        ddpm.train(**{**ddpm.PREVIEW, **settings})
        losses = ddpm.load_checkpoint(path)['losses']
        drawn = ddpm.folder_of_pictures(path) / 'progress'
        grids = [Image.open(drawn / f'epoch_{n / 3000:06.2f}.png') for n in shown]
        rows = [np.asarray(grid.convert('L'))[2:66] for grid in grids]
    figure = plt.figure(figsize=(6, 6))
    ax = figure.add_axes((0.17, 0.63, 0.78, 0.35), yscale='log', xlim=(0, 3000))
    ax.plot(range(15, 3000, 30), losses.reshape(-1, 30).mean(1), color=DARK)
    ax.set(xlabel='step', ylabel='mean square error\nof the noise')
    for i, (n, row) in enumerate(zip(shown, rows)):
        ax.axvline(n, color=BLUE, linestyle=':')
        bottom = 0.41 - i * 0.1
        below = figure.add_axes((0.19, bottom, 0.8, 0.096), xticks=[], yticks=[])
        below.imshow(row, cmap='gray', vmin=0, vmax=255)
        figure.text(0.01, bottom + 0.048, f'step {n}', va='center', fontsize=12)
    save(figure, 'progress')


# ---- Sampling -----------------------------------------------------------------------------------


def fewer_steps():
    model, _ = pretrained()
    x_T, counts = gaussian(0, 16, 1, 32, 32)[:10], (12, 20, 30, 50)
    rows = [ddpm.sample(model, 10, steps, seed=0, noise=x_T) for steps in counts]
    labels = [f'{steps} steps' for steps in (*counts, model.time_steps)]
    save_rows('fewer_steps', [*rows, article_samples()[:10]], labels)


# ---- Play: the pictures of section 11 -----------------------------------------------------------


def nearest(x):
    """The index of the training digit that is nearest to each image."""
    return torch.cdist(x.flatten(1), page()['data'].flatten(1)).argmin(1)


def play_tensor():
    """Eight samples, and the training digit that is nearest to each."""
    x = ddpm.sample(pretrained()[0], 8, 20, seed=1)
    save_rows('play_tensor', [x, page()['data'][nearest(x)]], ['samples', 'nearest of\n60,000'])


def play_ask():
    """Ten times the digits 0 to 9, of which the first ten are shown, and how many the labels of
    the nearest training digits agree with."""
    (_, scheduler), asked = pretrained(), torch.arange(100) % 10
    asking_for, rows, labels = page()['asking_for'], [], []
    for scale in (0, 1, 2, 4):
        torch.manual_seed(0)
        guided = asking_for(asked, scale)
        *_, (_, x) = ddpm.reverse_process(guided, gaussian(0, 100, 1, 32, 32), scheduler, 20)
        right = (page()['labels'][nearest(x.clamp(0, 1))] == asked).sum()
        rows.append(x[:10])
        labels.append(f'scale {scale}:\n{right} of 100')
    save_rows('play_ask', rows, labels)


def play_half():
    """Two upper halves, each finished in eight ways."""
    _, scheduler = pretrained()
    top, rows = page()['top'], []
    for known in (digits()[7:8], digits()[1:2]):
        torch.manual_seed(0)
        finishing = page()['finishing'](known, top)
        *_, (_, x) = ddpm.reverse_process(finishing, gaussian(0, 8, 1, 32, 32), scheduler, 20)
        rows.append(torch.cat([known * top, torch.where(top, known, x)]))
    save_rows('play_half', rows, ['', ''], ['given', *[''] * 8], left=0.05)


def play_between():
    """Two noises and seven between them: with the sampler as it is, and without chance."""
    a, b = gaussian(0, 2, 1, 1, 32, 32)
    angles = torch.linspace(0, torch.pi / 2, 9)
    noises = torch.cat([angle.cos() * a + angle.sin() * b for angle in angles])
    model, scheduler = pretrained()
    sampled = [ddpm.sample(model, 1, 50, seed=0, noise=noise[None]) for noise in noises]
    x = page()['without_chance'](model, scheduler, noises, 50)
    labels = ['$x_T$', r'$\eta = 1$', r'$\eta = 0$']
    save_rows('play_between', [noises, torch.cat(sampled), x], labels, (), [-3, 0, 0], [3, 1, 1])


def play_clip():
    model, scheduler = pretrained()
    x_T, rows = gaussian(0, 10, 1, 32, 32), []
    for function in (model, page()['clipped']):
        torch.manual_seed(0)
        *_, (_, x) = ddpm.reverse_process(function, x_T, scheduler, 10)
        rows.append(x)
    save_rows('play_clip', rows, ['10 steps', '$x_0$ clipped'])


def play_times():
    """Where training ends for several T, and the noise from which sampling starts."""
    x, rows, labels = digits()[:8], [], []
    for T in (10, 100, 500, 1000):
        rows.append(jump(ddpm.DDPM_Scheduler(T), x, T - 1, gaussian(0, *x.shape)))
        labels.append(f'T = {T}')
    rows.append(gaussian(0, *x.shape))
    save_rows('play_times', rows, [*labels, 'noise alone'])


@torch.no_grad()
def play_half_way():
    """A digit is noised up to t, and denoised from there: what comes back?"""
    model, scheduler = pretrained()
    torch.manual_seed(0)
    x_0, rows, starts = digits()[7:8].expand(8, -1, -1, -1), [], (100, 200, 300, 400)
    for start in starts:
        x = jump(scheduler, x_0, start, torch.randn_like(x_0))
        for t in range(start, -1, -1):
            beta, abar = scheduler(t)
            x = (x - beta / (1 - abar).sqrt() * model(x, t)) / (1 - beta).sqrt()
            x = x + beta.sqrt() * torch.randn_like(x) * (t > 0)
        rows.append(x)
    labels = [f'from t = {start}' for start in starts]
    save_rows('play_half_way', [x_0[:1], *rows], ['the digit', *labels])


FIGURES = [
    article_samples,
    forward,
    schedule,
    kernel,
    prediction,
    sigma,
    noise,
    loss,
    unet,
    time_table,
    ema,
    ema_samples,
    progress,
    fewer_steps,
    play_tensor,
    play_ask,
    play_half,
    play_between,
    play_clip,
    play_times,
    play_half_way,
]


def main():
    wanted = sys.argv[1:]
    plt.switch_backend('Agg')
    plt.rcParams.update(STYLE)
    FOLDER.mkdir(exist_ok=True)
    bar = tqdm([f for f in FIGURES if not wanted or f.__name__ in wanted], 'Figures', position=0)
    for figure in bar:
        bar.set_description(figure.__name__)
        figure()


if __name__ == '__main__':
    main()
