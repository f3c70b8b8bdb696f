"""benchmarks/ablations.py: each change against a second way of computing what it should do, and the
whole at a tiny size."""

import json
import os
import sys
import time
from functools import wraps
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, few_images
from PIL import Image
from torch import nn

import ddpm

pytest.importorskip('torchmetrics')
pytest.importorskip('prdc')
sys.path.insert(0, str(ROOT / 'benchmarks'))
import ablations  # noqa: E402
from ablations import BASELINE, CHANGES, LIST, quality  # noqa: E402

T = 20
BETA = np.linspace(1e-4, 0.02, T)
ABAR = np.cumprod(1 - BETA)
SCHEDULER = ddpm.DDPM_Scheduler(T)
NOISE = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures('float32')


def unet(**changes):
    torch.manual_seed(0)
    return ddpm.UNET(**{**ddpm.PREVIEW['unet'], 'time_steps': T, **changes}).eval()


class Knows(nn.Module):
    """A model that knows that all images are x_0: it predicts the noise, x_0 or v."""

    def __init__(self, x_0, what='eps'):
        super().__init__()
        self.x_0, self.what = x_0, what

    def forward(self, x_t, t):
        a, s = (
            torch.tensor(v[t]).float()[:, None, None, None] for v in (ABAR**0.5, (1 - ABAR) ** 0.5)
        )
        eps = (x_t - a * self.x_0) / s
        return {'eps': eps, 'x_0': self.x_0 + 0 * x_t, 'v': a * eps - s * self.x_0}[self.what]


def draw(process, model, num_steps=None, seed=0):
    torch.manual_seed(seed)
    return list(process(model, NOISE, SCHEDULER, num_steps))[-1][1]


def process_of(name):
    return CHANGES[name].patches['reverse_process']


# ---- Sampling --------------------------------------------------------------------------------


def test_samplers_are_the_programs_where_they_must_be():
    model = unet()
    theirs = draw(ddpm.reverse_process, model)
    assert torch.allclose(draw(ablations.sampler(), model), theirs, atol=1e-3 * theirs.abs().max())
    for steps in (3, 10, 19):
        ours = draw(process_of('DDIM 10, eta 1'), model, steps)
        theirs = draw(ddpm.reverse_process, model, steps)
        assert torch.allclose(ours, theirs, atol=1e-3 * theirs.abs().max()), steps


@pytest.mark.parametrize('num_steps', [None, 5])
def test_a_step_has_the_mean_and_the_variance_of_the_papers(num_steps):
    (abar, abar_next), x_0, x_t = ABAR[ddpm.sampling_times(T, num_steps)[:2]], 0.5, 0.7
    beta = 1 - abar / abar_next
    tilde = beta * (1 - abar_next) / (1 - abar)
    mean = abar_next**0.5 * beta / (1 - abar) * x_0  # paper eq. 7
    mean += (1 - beta) ** 0.5 * (1 - abar_next) / (1 - abar) * x_t
    straight = (1 - abar_next) ** 0.5 * (x_t - abar**0.5 * x_0) / (1 - abar) ** 0.5
    straight += abar_next**0.5 * x_0  # DDIM eq. 12 with sigma = 0
    expected = {
        'x_0 clipped': (mean, beta),
        'sigma² = beta-tilde': (mean, tilde),
        'DDIM 10, eta 1': (mean, tilde),
        'no noise added': (mean, 0),
        'DDIM 10, eta 0': (straight, 0),
    }
    for name, (mean, variance) in expected.items():
        torch.manual_seed(0)
        x = torch.full((100, 1, 32, 32), x_t)
        x = next(process_of(name)(Knows(x_0), x, SCHEDULER, num_steps))[1]
        assert x.mean().item() == pytest.approx(mean, abs=2e-3), name
        assert x.var().item() == pytest.approx(variance, rel=0.02, abs=1e-9), name


def test_clipping_and_the_last_step():
    for name, change in CHANGES.items():
        if name.startswith('DDIM') or name in ('x_0 clipped', 'no noise added'):
            reached = draw(process_of(name), Knows(1.7), change.steps and 5)
            assert reached.mean() == pytest.approx(1 if 'clipped' in name else 1.7, abs=1e-3), name
    noise = draw(process_of('noise after last step'), Knows(0.5)) - 0.5
    assert noise.std().item() == pytest.approx(BETA[0] ** 0.5, rel=0.05)


def test_dropout_is_on_where_it_is_said_to_be():
    model = unet(**ablations.ATTENTION, dropout_prob=0.5)
    dropout = {ddpm.Attention, nn.Dropout}
    for name, on in (('... on in attention', {ddpm.Attention}), ('... on everywhere', dropout)):
        draws = [list(process_of(name)(model, NOISE, SCHEDULER, 2))[0] for _ in 'ab']
        assert {type(m) for m in model.modules() if m.training} & dropout == on, name
        assert not torch.equal(*(x for _, x in draws))


# ---- Training --------------------------------------------------------------------------------


@pytest.fixture
def batch():
    """x, t from where there is hardly any noise to where there is most, and eps."""
    x = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 3, 9, 19]), NOISE


def test_weights_of_the_loss(batch):
    x, t, eps = batch
    snr, square = (ABAR / (1 - ABAR))[t], eps.square().mean((1, 2, 3)).numpy()
    weights = {'min-SNR-5': np.minimum(snr, 5) / snr, 'sqrt(1 - abar)': np.sqrt(1 - ABAR)[t]}
    for name, weight in weights.items():
        loss = CHANGES[f'loss by {name}'].patches['diffusion_loss']
        found = loss(lambda x, t: 0 * x, SCHEDULER, x, t, eps)
        assert found.item() == pytest.approx((weight * square).mean(), rel=1e-4), name
    model = unet()
    plain = ddpm.diffusion_loss(model, SCHEDULER, x, t, eps)
    assert torch.isclose(ablations.loss()(model, SCHEDULER, x, t, eps), plain)


@pytest.mark.parametrize('what', ['x_0', 'v'])
def test_what_is_predicted_is_learned_and_turned_into_eps(batch, what):
    x, t, eps = batch
    patches = CHANGES[f'predicts {what}'].patches
    assert patches['diffusion_loss'](Knows(x, what), SCHEDULER, x, t, eps) < 1e-7
    found = draw(patches['reverse_process'], Knows(x, what))
    assert torch.allclose(found, draw(ddpm.reverse_process, Knows(x)), atol=1e-4)


def test_symmetric_data_go_there_and_back():
    patches, images = CHANGES['[-1, 1] data'].patches, torch.tensor([[[[0, 51, 255]]]]).byte()
    assert torch.allclose(patches['to_input'](images), torch.tensor([-1, -0.6, 1]))
    assert draw(patches['reverse_process'], Knows(-0.6)).mean() == pytest.approx(0.2, abs=1e-3)


def test_t_is_spread_over_the_batch():
    seen, x = [], torch.zeros(10, 1, 32, 32)
    for seed in range(50):
        torch.manual_seed(seed)
        ablations.evenly_spread_t(lambda x, t: seen.append(t) or x, SCHEDULER, x, x, x)
    assert all(sorted((t // 2).tolist()) == list(range(10)) for t in seen)  # one in each tenth
    assert set(torch.cat(seen).tolist()) == set(range(T))


def test_cosine_schedule_is_that_of_diffusers():
    theirs = pytest.importorskip('diffusers').DDPMScheduler(T, beta_schedule='squaredcos_cap_v2')
    ours = ablations.Cosine(T)
    assert torch.allclose(ours.beta, theirs.betas, atol=1e-5)
    assert torch.allclose(ours(torch.arange(T))[1], theirs.alphas_cumprod, atol=1e-5)


# ---- The network -----------------------------------------------------------------------------


@torch.no_grad()
def test_without_time_and_without_skips():
    for Table, same in ((ddpm.SinusoidalEmbeddings, False), (ablations.Timeless, True)):
        with mock.patch.object(ddpm, 'SinusoidalEmbeddings', Table):
            model = unet()
        assert torch.equal(model(NOISE, [0]), model(NOISE, [T - 1])) == same
    for Layer, kept in ((ddpm.UnetLayer, True), (ablations.Skipless, False)):
        with mock.patch.object(ddpm, 'UnetLayer', Layer):
            model, joined = unet(), []
        for layer in (model.Layer5, model.Layer6, model.late_conv):
            layer.register_forward_pre_hook(lambda _, given, joined=joined: joined.append(given[0]))
        model(NOISE, [0])
        for x, skip in zip(joined, (32, 16, 8)):  # channels of the skips, which come last
            assert x[:, :-skip].any() and x[:, -skip:].any() == kept


def test_attention_with_a_norm_and_a_skip():
    x = torch.randn(2, 16, 4, 4)
    theirs, ours = ddpm.Attention(16, 8, 0.0), ablations.NormedAttention(16, 8, 0.0)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    groups = x.reshape(2, 8, -1)
    normed = (groups - groups.mean(2, keepdim=True)) / groups.std(2, False, keepdim=True)
    assert torch.allclose(ours(x), x + theirs(normed.reshape(x.shape)), atol=1e-4)


# ---- What is said about it, and the whole ----------------------------------------------------


def test_each_change_changes_what_it_names_and_nothing_else():
    base = ablations.settings_of(CHANGES[BASELINE])
    assert base['num_epochs'] == 2 and base['seed'] == 0 and base['unet'] == ddpm.PREVIEW['unet']
    own = {k: v for k, v in base.items() if v != ddpm.PREVIEW[k]}
    others = {'seed', 'sample_every', 'checkpoint_path'}
    assert own.keys() == {'batch_size', 'lr', 'ema_decay'} | others
    stored = json.loads(ablations.RESULT.read_text())['baseline']
    assert all(base[name] == stored[name] for name in stored.keys() - {'save_minutes'})
    expected = {
        'another seed': {'seed': 1},
        'EMA 0.9999': {'ema_decay': 0.9999},
        'lr constant': {'lr_decay': False},
        'batch 64': {'batch_size': 64},
        'T = 1000': {'num_time_steps': 1000},
        '[-1, 1] data, T = 1000': {'num_time_steps': 1000},
        'half the lr': {'lr': 1.5e-3},
        'no time embedding': {'lr': 1.5e-3},
        '2x wide, half the steps': {
            'num_epochs': 1,
            'lr': 1.5e-3,
            'Channels': [16, 32, 64, 128, 128, 96],
        },
        "the article's attention": ablations.ATTENTION,
        'attention, norm and skip': ablations.ATTENTION,
        'attention, dropout 0.1': {**ablations.ATTENTION, 'dropout_prob': 0.1},
    }
    flat = {**base, **base['unet'], 'unet': 0, 'checkpoint_path': 0}
    for change in LIST:
        settings = ablations.settings_of(change)
        settings = {**settings, **settings['unet'], 'unet': 0, 'checkpoint_path': 0}
        changed = {k: v for k, v in settings.items() if v != flat[k]}
        assert changed == expected.get(change.weights, {}), change.name
        others = change.patches or change.noise or change.part != 'ema' or change.name == BASELINE
        assert change.name in expected or others
    assert CHANGES['EMA 0.9999'].patches == {'ModelEmaV3': ablations.without_warmup}
    assert len({ablations.file_name(change) for change in LIST}) == len(CHANGES) == len(LIST)


def scored(fd, recognised=0.8):
    scores = {'FD / floor': fd, 'recognised': recognised, 'precision': 0.7, 'recall': 0.6}
    return {'scores': scores, 'minutes': 1.0}


def test_what_lies_within_the_spread_does_not_count():
    cases = {
        'batch 64': (
            scored(16),
            'same',
            'No difference',
        ),  # 13 is 1.3 times: up to 1.69 is the spread
        'lr constant': (scored(17.1), 'worse', 'FD / floor x 1.7.'),
        'T = 1000': (scored(5, 0.85), 'better', 'FD / floor x 0.5, recognised +5 points.'),
        'x_0 clipped': (scored(13), 'worse', 'FD / floor x 1.3.'),  # on the same weights
        'no noise added': (scored(10.5, 0.78), 'same', 'No difference'),
        'DDIM 10, eta 1': (scored(10, 0.5), 'worse', 'recognised -30 points.'),
        'cosine, x_0 clipped': (scored(10), 'same', 'against "x_0 clipped"'),
        'predicts v': ({'failed': 'the loss is nan'}, 'worse', 'Failed: the loss is nan.'),
    }
    parts = {BASELINE: scored(10), 'another seed': scored(13), 'other noise': scored(10.1)}
    parts |= {name: part for name, (part, *_) in cases.items()}
    for name, (_, verdict, sentence) in cases.items():
        found = ablations.seen(CHANGES[name], parts)
        assert found[0] == verdict and sentence in found[1], (name, found)
    assert 'No difference counts otherwise up to FD / floor x 1.7' in ablations.report(parts)


def test_a_run_that_may_have_diverged_is_a_failure(tmp_path, monkeypatch):
    """train keeps such a run beside its checkpoint, which then lacks the last steps."""
    monkeypatch.chdir(tmp_path)

    path = Path(ablations.settings_of(CHANGES[BASELINE])['checkpoint_path'])
    suspect = Path(f'{path}.suspect')
    path.parent.mkdir(parents=True)
    suspect.touch()
    monkeypatch.setattr(ddpm, 'train', lambda **_: None)
    with pytest.raises(ddpm.UserError, match=f'^{ablations.DIVERGED}'):
        ablations.make(CHANGES[BASELINE], 10)
    path.touch()
    for file, error in ((path, 'not a usable checkpoint'), (suspect, ablations.DIVERGED)):
        later = time.time_ns() + 10**9
        os.utime(file, ns=(later, later))  # what was saved last counts
        with pytest.raises(ddpm.UserError, match=error):
            ablations.make(CHANGES[BASELINE], 10)
        os.utime(file, ns=(0, 0))


def test_the_weights_of_the_last_step_and_their_ema(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ddpm, 'load_images', few_images)
    seen = []

    def sample(model, *_, **__):
        seen.append([*model.parameters()])
        return torch.zeros(1, 1, 32, 32)

    monkeypatch.setattr(ddpm, 'sample', sample)
    for name in (BASELINE, 'without the EMA'):
        ablations.make(CHANGES[name], 10)
    saved = ddpm.load_checkpoint(ablations.settings_of(CHANGES[BASELINE])['checkpoint_path'])
    for found, part in zip(seen, ('ema', 'weights')):
        assert all(map(torch.equal, found, saved[part].values()))
    assert not torch.equal(seen[0][0], seen[1][0])


def test_the_whole_resumes_where_it_stopped(tmp_path, monkeypatch, capsys):
    (images, labels), (test, test_labels) = quality.load_splits()
    few = (images[:300], labels[:300]), (test[:50], test_labels[:50])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, 'load_splits', lambda: few)
    monkeypatch.setattr(quality, 'EPOCHS', 1)
    monkeypatch.setattr(ddpm, 'load_images', lambda *_: images[:8])
    monkeypatch.setattr(ddpm, 'draw_losses', lambda *_: None)
    monkeypatch.setattr(ddpm, 'PREVIEW', ddpm.PREVIEW | {'num_time_steps': 3})
    monkeypatch.setitem(ablations.BASE, 'batch_size', 4)
    for name in ('RESULT', 'FIGURE'):
        monkeypatch.setattr(ablations, name, tmp_path / getattr(ablations, name).name)
    for change in LIST:
        monkeypatch.setattr(change, 'steps', change.steps and 2)
        for name, value in {'num_time_steps': 4, 'batch_size': 8}.items():
            if name in change.settings:
                monkeypatch.setitem(change.settings, name, value)
    sampled, stop = [], [len(LIST) // 2]
    real_sample, real_loss = ddpm.sample, ddpm.diffusion_loss

    @wraps(real_sample)
    def sample(*arguments, **options):
        if len(sampled) == stop[0]:
            raise KeyboardInterrupt
        sampled.append(real_sample(*arguments, **options))
        return sampled[-1]

    def loss(model, scheduler, x, *others):  # of a batch of 8 it is not finite
        return real_loss(model, scheduler, x, *others) / (len(x) != 8)

    monkeypatch.setattr(ddpm, 'sample', sample)
    monkeypatch.setattr(ddpm, 'diffusion_loss', loss)
    with pytest.raises(SystemExit, match='130'):
        ablations.main(['--samples', '10'])
    assert len(json.loads(ablations.RESULT.read_text())['changes']) == stop[0] + 1
    (folder,) = (tmp_path / 'outputs/ablations').iterdir()
    done = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    stop[0] = None
    ablations.main(['--samples', '10'])
    assert len(sampled) == len(LIST) - 1  # each once, but for the one whose training failed
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())

    changes = json.loads(ablations.RESULT.read_text())['changes']
    assert list(changes) == list(CHANGES)
    failed = changes['batch 64']['failed']
    assert failed.startswith(ablations.DIVERGED) and ('nan' in failed or 'inf' in failed)
    found = [set(part.get('scores', ())) for part in changes.values()]
    assert found.count({*ablations.MEASURES}) == len(LIST) - 1
    table = ablations.RESULT.with_suffix('.md').read_text()
    assert table in capsys.readouterr().out and all(f'**{name}**' in table for name in CHANGES)
    figure = np.asarray(Image.open(ablations.FIGURE).convert('L'))
    line, left = int((0.25 + ablations.PITCH) * 32), int((0.25 + ablations.LABEL) * 32)
    first = 255 - ddpm.to_uint8(sampled[0])[0, 0].numpy()  # one pixel in the figure for each
    found = figure[line : line + 32, left : left + 32].astype(int)
    assert abs(found - first).max() <= 1
