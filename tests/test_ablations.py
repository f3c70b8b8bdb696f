"""benchmarks/ablations.py: each change against a second way of computing what it should do."""

import json
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, small_unet
from torch import nn

import ddpm

sys.path.insert(0, str(ROOT / 'benchmarks'))
import ablations  # noqa: E402
from ablations import BASELINE, CHANGES, LIST  # noqa: E402

T = 20
BETA = np.linspace(1e-4, 0.02, T)
ABAR = np.cumprod(1 - BETA)
SCHEDULER = ddpm.DDPM_Scheduler(T)
SAMPLERS = {c.name: c.patches.get('reverse_process') for c in LIST}
NOISE = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
REPLACED = {name for change in LIST for name in change.patches}
BATCH = torch.rand(4, 1, 32, 32), torch.tensor([0, 3, 9, 19]), NOISE  # x, t, eps
pytestmark = pytest.mark.usefixtures('float32')


class Knows(nn.Module):
    """A model that knows that all images are x_0: it predicts the noise, x_0 or v."""

    def __init__(self, x_0, what='eps'):
        super().__init__()
        self.x_0, self.what = x_0, what

    def forward(self, x_t, t):
        a, s = (torch.tensor(v[t]).float()[:, None, None, None] ** 0.5 for v in (ABAR, 1 - ABAR))
        eps = (x_t - a * self.x_0) / s
        return {'eps': eps, 'x_0': self.x_0 + 0 * x_t, 'v': a * eps - s * self.x_0}[self.what]


def draw(process, model, num_steps=None):
    torch.manual_seed(0)
    return list(process(model, NOISE, SCHEDULER, num_steps))[-1][1]


def test_samplers_are_the_programs_where_they_must_be():
    model = nn.Module()
    model.forward = lambda x, t: (x * (1 + t[:, None, None, None] / T)).tanh()
    for steps in (None, 3, 10, 19):
        ours = SAMPLERS['DDIM 10, eta 1'] if steps else ablations.sampler()
        theirs = draw(ddpm.reverse_process, model, steps)
        assert torch.allclose(draw(ours, model, steps), theirs, atol=1e-3 * theirs.abs().max())


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
        'no noise added': (mean, 0),
        **{f'DDIM {steps}, eta 1': (mean, tilde) for steps in (50, 20, 10)},
        'DDIM 50, eta 0': (straight, 0),
    }
    for name, (mean, variance) in expected.items():
        torch.manual_seed(0)
        x = torch.full((100, 1, 32, 32), x_t)
        x = next(SAMPLERS[name](Knows(x_0), x, SCHEDULER, num_steps))[1]
        assert x.mean().item() == pytest.approx(mean, abs=2e-3), name
        assert x.var().item() == pytest.approx(variance, rel=0.02, abs=1e-9), name


def test_clipping_the_last_step_and_dropout():
    for name, ends in {'x_0 clipped': 1, 'no noise added': 1.7, 'cosine, x_0 clipped': 1}.items():
        assert draw(SAMPLERS[name], Knows(1.7)).mean() == pytest.approx(ends, abs=1e-3), name
    noise = draw(SAMPLERS['noise after last step'], Knows(0.5)) - 0.5
    assert noise.std().item() == pytest.approx(BETA[0] ** 0.5, rel=0.05)
    model, dropout = small_unet(dropout_prob=0.5), {ddpm.Attention, nn.Dropout}
    for name, on in (('... on in attention', {ddpm.Attention}), ('... on everywhere', dropout)):
        draws = [list(SAMPLERS[name](model, NOISE, SCHEDULER, 2))[0] for _ in 'ab']
        assert {type(m) for m in model.modules() if m.training} & dropout == on, name
        assert not torch.equal(*(x for _, x in draws))


def test_weights_of_the_loss_and_t_spread_over_the_batch():
    x, t, eps = BATCH
    snr, square = (ABAR / (1 - ABAR))[t], eps.square().mean((1, 2, 3)).numpy()
    weights = {'min-SNR-5': np.minimum(snr, 5) / snr, 'sqrt(1 - abar)': np.sqrt(1 - ABAR)[t]}
    for name, weight in weights.items():
        loss = CHANGES[f'loss by {name}'].patches['diffusion_loss']
        found = loss(lambda x, t: 0 * x, SCHEDULER, x, t, eps)
        assert found.item() == pytest.approx((weight * square).mean(), rel=1e-4), name
    seen, x = [], torch.zeros(10, 1, 32, 32)
    for seed in range(50):
        torch.manual_seed(seed)
        ablations.evenly_spread_t(lambda x, t: seen.append(t) or x, SCHEDULER, x, x, x)
    assert all(sorted((t // 2).tolist()) == list(range(10)) for t in seen)  # one in each tenth
    assert set(torch.cat(seen).tolist()) == set(range(T))


@pytest.mark.parametrize('what', ['x_0', 'v'])
def test_what_is_predicted_is_learned_and_turned_into_eps(what):
    x, t, eps = BATCH
    patches = CHANGES[f'predicts {what}'].patches
    assert patches['diffusion_loss'](Knows(x, what), SCHEDULER, x, t, eps) < 1e-7
    found = draw(patches['reverse_process'], Knows(x, what))
    assert torch.allclose(found, draw(ddpm.reverse_process, Knows(x)), atol=1e-4)


def test_symmetric_data_and_the_cosine_schedule():
    patches, images = CHANGES['[-1, 1] data'].patches, torch.tensor([[[[0, 51, 255]]]]).byte()
    assert torch.allclose(patches['to_input'](images), torch.tensor([-1, -0.6, 1]))
    assert draw(patches['reverse_process'], Knows(-0.6)).mean() == pytest.approx(0.2, abs=1e-3)
    theirs = pytest.importorskip('diffusers').DDPMScheduler(T, beta_schedule='squaredcos_cap_v2')
    ours = ablations.Cosine(T)
    assert torch.allclose(ours.beta, theirs.betas, atol=1e-5)
    assert torch.allclose(ours(torch.arange(T))[1], theirs.alphas_cumprod, atol=1e-5)


@torch.no_grad()
def test_networks_without_time_without_skips_and_with_a_norm():
    for Table, same in ((ddpm.SinusoidalEmbeddings, False), (ablations.Timeless, True)):
        with mock.patch.object(ddpm, 'SinusoidalEmbeddings', Table):
            model = small_unet()
        assert torch.equal(model(NOISE, [0]), model(NOISE, [T - 1])) == same
    for Layer, kept in ((ddpm.UnetLayer, True), (ablations.Skipless, False)):
        with mock.patch.object(ddpm, 'UnetLayer', Layer):
            model, joined = small_unet(), []
        for layer in (model.Layer4, model.late_conv):
            layer.register_forward_pre_hook(lambda _, given, joined=joined: joined.append(given[0]))
        model(NOISE, [0])
        for x, skip in zip(joined, (16, 8)):  # channels of the skips, which come last
            assert x[:, :-skip].any() and x[:, -skip:].any() == kept
    x = torch.randn(2, 16, 4, 4)
    theirs, ours = ddpm.Attention(16, 8, 0.0), ablations.NormedAttention(16, 8, 0.0)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    normed = nn.functional.group_norm(x, 8)
    assert torch.allclose(ours(x), x + theirs(normed), atol=1e-4)


def test_the_stored_result_is_of_these_changes_and_settings():
    base = ablations.settings_of(CHANGES[BASELINE])
    stored = json.loads(ablations.RESULT.read_text())
    assert all(base[k] == v for k, v in stored['baseline'].items() if k != 'save_minutes')
    assert list(stored['changes']) == list(CHANGES)


def test_each_change_is_in_force_while_it_trains_and_samples(monkeypatch):
    """And its samples are of the weights, the steps and the noise that it names."""
    seen, model = [], mock.Mock()

    def state():
        return {name: getattr(ddpm, name) for name in REPLACED}

    def sample(model, *numbers, seed):
        seen.extend([state(), (*numbers, seed)])
        return torch.zeros(1)

    monkeypatch.setattr(ddpm, 'train', lambda **settings: seen.extend([settings, state()]))
    monkeypatch.setattr(ddpm, 'load_model', lambda path: seen.append(path) or model)
    monkeypatch.setattr(ddpm, 'load_checkpoint', lambda path: {'weights': path})
    monkeypatch.setattr(ddpm, 'sample', sample)
    before, base = state(), ablations.settings_of(CHANGES[BASELINE])
    for change in LIST:
        seen.clear()
        model.reset_mock()
        ablations.make(change, 3)
        settings, trained, path, sampled, numbers = seen
        training = CHANGES[change.weights]
        assert trained == sampled == before | training.patches | change.patches, change.name
        differ = {k for k in base if settings[k] != base[k]} - {'checkpoint_path'}
        assert differ == {*training.settings} | ({'unet'} if training.unet else set())
        assert path == settings['checkpoint_path'] and numbers == (3, change.steps, change.noise)
        last = [mock.call(path)] if change.part == 'weights' else []
        assert model.load_state_dict.mock_calls == last
        assert change.name == BASELINE or differ or sampled != before or last or any(numbers[1:])


def test_what_is_replaced_is_what_the_program_uses(workdir, monkeypatch):
    doubles = {name: mock.Mock(wraps=getattr(ddpm, name)) for name in REPLACED}
    for name, double in doubles.items():
        monkeypatch.setattr(ddpm, name, double)
    ddpm.train(**TINY)
    assert {name for name in REPLACED if not doubles[name].called} == {'reverse_process'}
    for double in doubles.values():
        double.reset_mock()
    ddpm.sample(ddpm.load_model(TINY['checkpoint_path']), 2, 3)
    assert {n for n in REPLACED if not doubles[n].called} == {'diffusion_loss', 'to_input'}
