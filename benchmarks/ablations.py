"""What is each choice worth? A small UNET, one thing changed at a time.

    pip install -r benchmarks/requirements.txt
    OMP_NUM_THREADS=1 python benchmarks/ablations.py [--samples 1000]

Trains the UNET of PREVIEW for two epochs, then again with each of CHANGES, and measures N samples
of each with the functions of quality.py. A change is another setting, or something that replaces a
name of ddpm.py while its own `train` and `sample` run. A change that concerns only sampling uses
the weights of the baseline. All results are about a short training of a small UNET.

Parts and checkpoints are kept in outputs/ablations/ and checkpoints/ablations/: run again it
resumes, also in the middle of a training; to measure a change again, delete its files there. Each
part updates benchmarks/results/ablations.json; the last one prints the tables and draws
assets/ablations.png, where all digits come from the same noise.

A difference counts only if it is more than twice that of another seed or another machine (on the
same weights: of other noise), and more than so few samples can show by chance.
"""

import argparse
import datetime
import json
import math
import re
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import quality  # noqa: E402
from speed import processor, table  # noqa: E402

import ddpm  # noqa: E402

EPOCHS = 2  # of each training
BASE = dict(batch_size=8, lr=3e-3, ema_decay=0.99, seed=0)  # the rest is PREVIEW's
DIVERGED = 'training has diverged'  # how ddpm.train begins the line
GROUPS = ('training', 'network', 'sampling')
RESULT = quality.RESULTS / 'ablations.json'
FIGURE = HERE.parent / 'assets/ablations.png'
# the least difference that N = 1,000 samples can show; of FD that of its logarithm
MEASURES = {'FD / floor': math.log(1.1), 'recognised': 0.04, 'precision': 0.05, 'recall': 0.05}


def first(value, *_):
    return value


# ---- Training: what replaces diffusion_loss, DDPM_Scheduler, to_input and ModelEmaV3 -------------


def loss(target=lambda x, eps, abar: eps, weight=lambda abar: 1):
    """diffusion_loss for another target, or with a weight for each image."""

    def diffusion_loss(model, scheduler, x, t, eps):
        abar = scheduler(t)[1][:, None, None, None]  # (B, 1, 1, 1)
        x_t = abar.sqrt() * x + (1 - abar).sqrt() * eps
        with ddpm.autocast(x.device):
            prediction = model(x_t, t)
        return (weight(abar) * (prediction.float() - target(x, eps, abar)).square()).mean()

    return diffusion_loss


def evenly_spread_t(model, scheduler, x, t, eps):
    """t of a batch at equal distances from a random start (Kingma et al. 2021, appendix I.1)."""
    start = torch.rand((), device=t.device)
    share = (start + torch.arange(len(t), device=t.device) / len(t)) % 1  # in [0, 1)
    return loss()(model, scheduler, x, (share * len(scheduler.beta)).long(), eps)


class Cosine(ddpm.DDPM_Scheduler):
    """abar falls as a squared cosine (Nichol & Dhariwal 2021, eq. 17)."""

    def __init__(self, num_time_steps=1000):
        super().__init__(num_time_steps)
        u = torch.arange(num_time_steps + 1).double() / num_time_steps
        abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        self.beta = (1 - abar[1:] / abar[:-1]).clamp(max=0.999).float()
        self.alpha = torch.cumprod(1 - self.beta, dim=0)


def without_warmup(model, decay=0.9999, ema=ddpm.ModelEmaV3, **_):
    """The article's EMA: its decay is the same in every step."""
    return ema(model, decay)


# ---- The network: what replaces SinusoidalEmbeddings, UnetLayer and Attention --------------------


class Timeless(ddpm.SinusoidalEmbeddings):
    """A time table of zeros: the UNET does not know the timestep."""

    def __init__(self, time_steps, embed_dim):
        super().__init__(time_steps, embed_dim)
        self.embeddings.zero_()


class Skipless(ddpm.UnetLayer):
    """The second half of the UNET gets zeros for the skips; the number of weights is the same."""

    def forward(self, x, embeddings):
        x, skip = super().forward(x, embeddings)
        return x, torch.zeros_like(skip)


class NormedAttention(ddpm.Attention):
    """Attention after a norm, and added to x, as in the paper's code."""

    def __init__(self, C, num_heads, dropout_prob):
        super().__init__(C, num_heads, dropout_prob)
        self.norm = nn.GroupNorm(math.gcd(C, 8), C)

    def forward(self, x):
        return x + super().forward(self.norm(x))


# ---- Sampling: what replaces reverse_process -----------------------------------------------------


def sampler(
    eta=1, variance=first, clip=False, last=False, to_eps=first, to_image=first, dropout_in=()
):
    """A reverse_process; with the defaults it is Algorithm 2 of the paper.

    A step is DDIM's eq. 12: the mean for eta, and noise of variance(beta, tilde), where beta and
    tilde are paper eq. 7's beta_t and beta-tilde_t of that step, however long it is. clip keeps the
    predicted x_0 in [0, 1]. last adds noise after the last step too. to_eps(prediction, x, abar)
    turns another prediction into eps, to_image(x) other data into images. Modules of the class
    dropout_in stay in train mode."""

    @torch.no_grad()
    def reverse_process(model, x, scheduler, num_steps=None, generator=None):
        times = ddpm.sampling_times(len(scheduler.beta), num_steps)
        for module in model.modules():
            module.training = isinstance(module, dropout_in)
        for t, t_next in zip(times, times[1:] + [None]):
            abar = scheduler(t)[1]
            abar_next = torch.ones_like(abar) if t_next is None else scheduler(t_next)[1]
            with ddpm.autocast(x.device):
                prediction = model(x, torch.full((len(x),), t, device=x.device)).float()
            eps = to_eps(prediction, x, abar)
            x_0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
            if clip:
                x_0 = x_0.clamp(0, 1)
                eps = (x - abar.sqrt() * x_0) / (1 - abar).sqrt()
            beta = 1 - abar / abar_next
            tilde = (1 - abar_next) / (1 - abar) * beta
            x = abar_next.sqrt() * x_0 + (1 - abar_next - eta**2 * tilde).sqrt() * eps
            if last or t_next is not None:
                noise = torch.randn(x.shape, generator=generator, device=x.device)
                x = x + variance(beta, tilde).sqrt() * noise
            yield t, to_image(x)

    return reverse_process


# ---- The changes, in the order of the figure -----------------------------------------------------

BASELINE, NOISE = 'the baseline', 'other noise'
SEED, FLOAT32 = 'another seed', 'in float32'  # other runs of the same
REPEATS = (SEED, FLOAT32, NOISE)


def change(
    group: str,
    name: str,
    why: str,  # what the choice is for
    weights: str = '',  # the change whose weights are used; default: this one
    against: str = BASELINE,  # what it is compared with
    part: str = 'ema',  # of the checkpoint
    steps: int | None = None,  # of the reverse process; None: all
    noise: int = 0,  # the seed of the samples
    **changed,  # arguments of UNET or of train, or what replaces a name of ddpm.py
):
    """All of it in a namespace, with changed split into unet, patches and settings."""
    weights = weights or name
    unet = {k: changed.pop(k) for k in [*changed] if k in ddpm.UNET_DEFAULTS}
    patches = {k: changed.pop(k) for k in [*changed] if hasattr(ddpm, k)}
    settings = changed
    return SimpleNamespace(**locals())


training, network = partial(change, 'training'), partial(change, 'network')


def sampling(name, why, weights=BASELINE, steps=None, **how):
    process = sampler(**how)
    return change('sampling', name, why, weights, weights, steps=steps, reverse_process=process)


def ddim(steps, eta):
    why = (
        f'The same weights in {steps} steps, {"as ddpm.py does" if eta else "none of them random"}.'
    )
    how = dict(eta=eta, variance=lambda _, tilde: eta**2 * tilde)
    return sampling(f'DDIM {steps}, eta {eta}', why, steps=steps, **how)


LONG, COSINE, CLIPPED = 'T = 1000', 'cosine schedule', 'x_0 clipped'
HALF = 'half the lr'  # for what diverges at the baseline's
HALVED = {'lr': BASE['lr'] / 2, 'against': HALF}
PLAIN, DROPOUT = "the article's attention", 'attention, dropout 0.1'
ATTENTION = dict(Attentions=[False, True, False, False, False, True])  # where the article has it
TIMELESS = {'SinusoidalEmbeddings': Timeless, **HALVED}
WIDE = dict(Channels=[2 * C for C in ddpm.PREVIEW['unet']['Channels']], num_epochs=EPOCHS // 2)
SYMMETRIC = {
    'to_input': lambda images, to_input=ddpm.to_input: 2 * to_input(images) - 1,
    'reverse_process': sampler(to_image=lambda x: (x + 1) / 2),
}
AS_LONG = {'num_time_steps': 1000, 'against': LONG}
CLIP = {'reverse_process': sampler(clip=True), 'weights': COSINE, 'against': CLIPPED}
# min(SNR, 5) / SNR, for a network that predicts eps (Hang et al. 2023)
MIN_SNR = {'diffusion_loss': loss(weight=lambda abar: (5 * (1 - abar) / abar).clamp(max=1))}
ROOT = {'diffusion_loss': loss(weight=lambda abar: (1 - abar).sqrt())}
X_0 = {
    'diffusion_loss': loss(lambda x, eps, abar: x),
    'reverse_process': sampler(to_eps=lambda x_0, x, a: (x - a.sqrt() * x_0) / (1 - a).sqrt()),
}
V = {  # Salimans & Ho 2022
    'diffusion_loss': loss(lambda x, eps, abar: abar.sqrt() * eps - (1 - abar).sqrt() * x),
    'reverse_process': sampler(to_eps=lambda v, x, a: a.sqrt() * v + (1 - a).sqrt() * x),
}
LONG_EMA = {'ema_decay': 0.9999, 'ModelEmaV3': without_warmup}
MASKED = {'dropout_prob': 0.1, 'steps': 50, 'against': PLAIN}


def left_on(kind):
    return dict(weights=DROPOUT, steps=50, variance=lambda _, b: b, dropout_in=kind)


LIST = [
    training(BASELINE, 'What the others are compared with.'),
    training(SEED, 'The spread between runs.', seed=1),
    training(FLOAT32, 'No 16-bit numbers.', half_precision=lambda device: None),
    training('without the EMA', 'It varies less than the last step.', BASELINE, part='weights'),
    training('EMA 0.9999', "The article's, without ddpm.py's warm-up.", **LONG_EMA),
    training('lr constant', "As the article's; the preview's falls to 0.", lr_decay=False),
    training(HALF, 'As two networks below need it.', lr=BASE['lr'] / 2),
    training('batch 64', "The article's: surer steps, but fewer.", batch_size=64),
    training(LONG, "The article's: each step takes away less.", num_time_steps=1000),
    training('[-1, 1] data', "The paper's are centred, the article's not.", **SYMMETRIC),
    training('[-1, 1] data, T = 1000', 'No trace of x_0 is left.', **AS_LONG, **SYMMETRIC),
    training(COSINE, 'Noise comes later than with the linear beta.', DDPM_Scheduler=Cosine),
    training('cosine, x_0 clipped', 'Its last beta, 0.999, multiplies errors by 32.', **CLIP),
    training(
        't evenly spread', 'The t of a batch are spaced evenly.', diffusion_loss=evenly_spread_t
    ),
    training('loss by min-SNR-5', 'Low t count less; otherwise all count the same.', **MIN_SNR),
    training('loss by sqrt(1 - abar)', 'The same, more gently.', **ROOT),
    training('predicts x_0', 'Instead of the noise.', **X_0),
    training('predicts v', 'A mixture of noise and x_0.', **V),
    network('no time embedding', 'It tells how noisy x is. Half the lr.', **TIMELESS),
    network('no skips between halves', 'Skips carry the fine detail.', UnetLayer=Skipless),
    network(PLAIN, 'It relates distant parts of a digit.', **ATTENTION),
    network('attention, norm and skip', "The paper's.", Attention=NormedAttention, **ATTENTION),
    network('2x wide, half the steps', 'More weights, fewer steps. Half the lr.', **WIDE, **HALVED),
    change('sampling', NOISE, 'The spread between sets of samples.', BASELINE, noise=1),
    sampling(CLIPPED, "The article's sampler leaves x_0 free.", clip=True),
    sampling('sigma² = beta-tilde', "The paper's second choice.", variance=lambda _, b: b),
    sampling('no noise added', 'Each step takes the mean.', variance=lambda b, _: 0 * b),
    sampling('noise after last step', 'Algorithm 2 adds none there.', last=True),
    change('sampling', DROPOUT, 'Against overfitting. 50 steps.', **MASKED, **ATTENTION),
    sampling('... on in attention', "The article's code has it.", **left_on(ddpm.Attention)),
    sampling('... on everywhere', 'As if eval() were forgotten.', **left_on(nn.Module)),
    *(ddim(steps, eta) for steps, eta in ((50, 1), (20, 1), (10, 1), (50, 0))),
]
CHANGES = {change.name: change for change in LIST}


# ---- One part: train, sample, measure ------------------------------------------------------------


def file_name(change):
    return re.sub('[^a-z0-9]+', '_', change.name.lower()).strip('_')


def settings_of(change):
    """The arguments of ddpm.train with which the weights for a change are made."""
    change = CHANGES[change.weights]
    own = dict(num_epochs=EPOCHS, sample_every=0, unet=ddpm.PREVIEW['unet'] | change.unet)
    own['checkpoint_path'] = f'checkpoints/ablations/{file_name(change)}'
    return {**ddpm.PREVIEW, **BASE, **own, **change.settings}


def make(change, samples):
    """The samples of a change, (N, 1, 32, 32) uint8; trains unless its weights are there. Raises
    ddpm.UserError."""
    settings = settings_of(change)
    path = settings['checkpoint_path']
    patches = {'train': ddpm.train, **CHANGES[change.weights].patches, **change.patches}
    torch.compiler.reset()  # it keeps eight versions of a function, and runs more in eager mode
    with mock.patch.multiple(ddpm, **patches):
        ddpm.train(**settings)
        model = ddpm.load_model(path)  # the EMA weights
        if change.part == 'weights':
            model.load_state_dict(ddpm.load_checkpoint(path)['weights'])
        return ddpm.to_uint8(ddpm.sample(model, samples, change.steps, seed=change.noise))


def measured(images, yard):
    """MEASURES of the images. Recognised is by the classifier of FD, which knows digits only."""
    recognised = quality.recognised(quality.embed(yard.cnn, images))
    scores = yard.scores(images) | {'recognised': recognised}
    return {name: scores[name] for name in MEASURES}


def machine(device):
    """The machine, what it computes in, and the version of torch."""
    return (
        f'{processor()}, {ddpm.half_precision(device) or torch.float32}, torch {version("torch")}'
    )


def work(folder, samples):
    """Measures the changes that are missing, each into a file of the folder. Raises
    ddpm.UserError."""
    left = [change for change in LIST if not (folder / file_name(change)).exists()]
    device = ddpm.best_device()
    yard = quality.Yardstick(samples) if left else None
    folder.mkdir(parents=True, exist_ok=True)
    for change in tqdm(left, 'Changes', unit='change'):
        tqdm.write(change.name)
        began = time.monotonic()
        try:
            images = make(change, samples)
            part = {'digits': images[:10].clone(), 'scores': measured(images, yard)}
        except ddpm.UserError as error:
            if not str(error).startswith(DIVERGED):
                raise
            part = {'failed': str(error).split(': ')[0]}
        part['minutes'] = (time.monotonic() - began) / 60
        part['machine'] = machine(device)
        ddpm.save_checkpoint(folder / file_name(change), part)
        write_result(folder, samples)


# ---- The report; parts is {name: what `work` has stored} -----------------------------------------


def differences(name, other, parts):
    """{measure: the part's score minus the other's}, for FD / floor the difference of the
    logarithms; empty where one of the two has no scores."""
    one, two = (parts.get(key, {}).get('scores') for key in (name, other))
    if not one or not two:
        return {}
    ratio = math.log(one['FD / floor'] / two['FD / floor'])
    return {measure: one[measure] - two[measure] for measure in MEASURES} | {'FD / floor': ratio}


def margins(repeats, parts):
    """{measure: the difference that must be exceeded to count}."""
    gaps = [differences(name, BASELINE, parts) for name in repeats]
    return {
        m: max([least, *(2 * abs(gap[m]) for gap in gaps if gap)]) for m, least in MEASURES.items()
    }


def in_words(by):
    return ', '.join(
        f'{m} x {math.exp(d):.2g}' if m == 'FD / floor' else f'{m} {100 * d:+.0f} points'
        for m, d in by.items()
    )


def seen(change, parts):
    """The effect of a change: 'better', 'worse', 'same' or '', and a sentence."""
    if 'failed' in parts[change.name]:
        return 'worse', f'Failed: {parts[change.name]["failed"]}.'
    by, other = differences(change.name, change.against, parts), CHANGES[change.against]
    if change.name in (BASELINE, *REPEATS) or not by:
        return '', ''
    same_weights = (change.weights, change.part) == (other.weights, other.part)
    limits = margins([NOISE] if same_weights else REPEATS, parts)
    by = {m: d for m, d in by.items() if abs(d) > limits[m]}
    against = f' against "{other.name}"' if other.name != BASELINE else ''
    if not by:
        return 'same', f'Nothing seen{against} beyond the spread.'
    first, d = next(iter(by.items()))
    better = (d < 0) == (first == 'FD / floor')
    return 'better' if better else 'worse', f'Seen{against}: {in_words(by)}.'


def short(scores):
    """The scores as text, FD / floor with three digits."""
    fd, *shares = (scores[measure] for measure in MEASURES)
    return [f'{fd:.3g}' if fd < 999.5 else f'{fd:,.0f}', *(f'{share:.0%}' for share in shares)]


def report(parts):
    """Markdown: a table of what was seen, and the rest in a sentence."""
    rows, rest = [], []
    for change in (change for change in LIST if change.name in parts):
        scores = short(parts[change.name]['scores']) if 'scores' in parts[change.name] else [''] * 4
        verdict, words = seen(change, parts)
        if verdict == 'same' or change.name in REPEATS:
            rest.append(f'{change.name} ({scores[0]})')
        else:
            rows.append([f'**{change.name}** {change.why} {words}'.strip(), *scores])
    text = table(['', *MEASURES], rows)
    text += f'\nNothing was seen beyond the spread of (FD / floor): {"; ".join(rest)}.\n'
    for what, repeats in (('on the same weights', [NOISE]), ('otherwise', REPEATS)):
        text += f'No difference counts {what} up to {in_words(margins(repeats, parts))}.\n'
    return text


COLOURS = {'better': '#1f5fa8', 'worse': '#b3401a', 'same': '#777777', '': '#000000'}
LEGEND = """All digits come from the same noise. FD / floor: 1 is as good as real digits.
recog.: recognised by a classifier with confidence.
Blue is better than the baseline, red worse, grey the same within the spread.
A row that builds on another change is compared with that one."""
LABEL, COLUMN, PITCH = 12, 22.5, 1.125  # widths of name and score, column, line; in digits


def draw_row(ax, change, parts, x, y):
    """Name, scores and ten digits of a change at (x, y), in digits from the top left."""
    part = parts[change.name]
    style = dict(va='center', fontsize=11, color=COLOURS[seen(change, parts)[0]])
    ax.text(x, y, change.name, **style)
    if 'failed' in part:
        return ax.text(x + LABEL, y, 'diverged', **style)
    for left, score in zip((2.3, 0.25), short(part['scores'])):
        ax.text(x + LABEL - left, y, score, ha='right', **style)
    row = 255 - torch.cat(list(part['digits'][:, 0]), dim=1).numpy()  # (32, 320)
    extent = (x + LABEL, x + LABEL + len(part['digits']), y + 0.5, y - 0.5)
    ax.imshow(row, cmap='gray', vmin=0, vmax=255, extent=extent)


def draw_figure(parts, path):
    """A row of digits for each change, from the same noise; training has a column of its own."""
    fig = plt.figure()
    ax, bottom = fig.add_axes([0, 0, 1, 1]), 0
    for x, groups in ((0.25, GROUPS[:1]), (0.25 + COLUMN, GROUPS[1:])):
        y = 0.75
        for group in groups:
            ax.text(x, y, group, va='center', fontsize=13, weight='bold')
            for left, head in ((2.3, 'FD / floor'), (0.25, 'recog.')):
                ax.text(x + LABEL - left, y, head, va='center', ha='right', fontsize=8)
            for change in LIST:
                own = change.group == group and not change.noise
                if change.name in parts and (own or change.name == BASELINE):
                    y += PITCH
                    draw_row(ax, change, parts, x, y)
            y += 1.5
        if bottom == 0:
            ax.text(x, y, LEGEND, va='top', fontsize=10, linespacing=1.4)
            y += 4
        bottom = max(bottom, y - 0.5)
    ax.set(xlim=(0, 2 * COLUMN), ylim=(bottom, 0), aspect='auto')
    ax.axis('off')
    fig.set_size_inches(2 * COLUMN / 4, bottom / 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=128)  # a digit has its own 32 pixels
    plt.close(fig)


def write_result(folder, samples):
    """Writes the result of the parts that are done, and returns these parts."""
    paths = {change.name: folder / file_name(change) for change in LIST}
    parts = {name: torch.load(path) for name, path in paths.items() if path.exists()}
    about = {
        'date': datetime.date.today().isoformat(),
        'hours': sum(part['minutes'] for part in parts.values()) / 60,
        'N': samples,
        'baseline': settings_of(CHANGES[BASELINE]),
    }
    changes = {
        name: {k: v for k, v in part.items() if k != 'digits'}
        | {'seen': seen(CHANGES[name], parts)[1]}
        for name, part in parts.items()
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({**about, 'changes': changes}, indent=1) + '\n')
    return parts


def main(arguments=None):
    parser = argparse.ArgumentParser(description='Measures what each choice contributes.')
    parser.add_argument('--samples', type=int, default=1000, help='of each change')
    args = parser.parse_args(arguments)
    folder = ddpm.OUTPUTS / f'ablations/{args.samples}_samples'
    try:
        work(folder, args.samples)
    except ddpm.UserError as error:
        sys.exit(f'ablations.py: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
    parts = write_result(folder, args.samples)
    draw_figure(parts, FIGURE)
    print(report(parts) + f'{RESULT}, {FIGURE}')


if __name__ == '__main__':
    main()
