"""Schedule, forward kernel, samplers and loss against closed forms and the library diffusers; the
functions load_model and sample."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import SMALL, small_unet
from diffusers import DDIMScheduler, DDPMScheduler

import ddpm

LINEAR = dict(beta_start=1e-4, beta_end=0.02, beta_schedule='linear')


class Oracle:
    """Stands for a trained model: predicts the noise that leads from an x_0 of its own to x, so the
    x_0 predicted from it is known; another one at each t."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.calls = []

    def x_0(self, t):
        """Brighter than 1, too: nothing clips it."""
        return 0.9 + 0.8 * torch.sin(torch.linspace(0, 3, 64).reshape(1, 1, 8, 8) + t)

    def __call__(self, x, t):
        assert (t == t[0]).all() and t.shape == (len(x),)
        self.calls.append(t[0].item())
        abar = self.scheduler.alpha[t[0]]
        return (x - abar.sqrt() * self.x_0(t[0])) / (1 - abar).sqrt()


def test_schedule_is_that_of_diffusers():
    beta, alpha = ddpm.DDPM_Scheduler()(torch.arange(1000))
    theirs = DDPMScheduler(1000, **LINEAR)
    torch.testing.assert_close(beta, theirs.betas)
    torch.testing.assert_close(alpha, theirs.alphas_cumprod)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_loss_is_the_error_of_the_noise_in_diffusers_x_t(dtype):
    x, eps, t = torch.rand(5, 1, 8, 8), torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 400, 998, 999])
    seen = []

    def model(*inputs):
        seen.extend(inputs)
        return torch.full_like(x, 0.25).to(dtype)

    loss = ddpm.diffusion_loss(model, ddpm.DDPM_Scheduler(), x, t, eps)
    torch.testing.assert_close(seen[0], DDPMScheduler(1000, **LINEAR).add_noise(x, eps, t))
    assert torch.equal(seen[1], t)
    assert loss.item() == pytest.approx(np.mean([(e - 0.25) ** 2 for e in eps.flatten().tolist()]))
    assert loss.dtype == torch.float32


def test_the_articles_sampler_is_that_of_diffusers():
    T = 40
    scheduler = ddpm.DDPM_Scheduler(T)
    theirs = DDPMScheduler(T, **LINEAR, variance_type='fixed_large', clip_sample=False)
    x = torch.randn(3, 1, 8, 8)
    oracle = Oracle(scheduler)
    torch.manual_seed(1)
    ours = dict(ddpm.reverse_process(oracle, x, scheduler))
    assert oracle.calls == list(ours) == list(range(T - 1, -1, -1))
    torch.manual_seed(1)
    draws = torch.Generator().manual_seed(1)
    for t, mine in ours.items():
        x = theirs.step(oracle(x, torch.full((3,), t)), t, x).prev_sample
        if t > 0:  # what ours yields has no noise yet
            mine = mine + scheduler.beta[t].sqrt() * torch.randn(x.shape, generator=draws)
        torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('num_steps', [1, 4, 28])
def test_fewer_steps_are_those_of_diffusers_with_eta_1(num_steps):
    scheduler = ddpm.DDPM_Scheduler(1000)
    theirs = DDIMScheduler(1000, **LINEAR, clip_sample=False, set_alpha_to_one=True)
    theirs.num_inference_steps = max(1, num_steps - 1)  # their steps are then as long as ours
    oracle = Oracle(scheduler)
    x = torch.randn(3, 1, 8, 8)
    torch.manual_seed(1)
    ours = dict(ddpm.reverse_process(oracle, x, scheduler, num_steps))
    assert list(ours) == [999 - i * 999 // max(1, num_steps - 1) for i in range(num_steps)]
    torch.manual_seed(1)
    for t, mine in ours.items():
        step = partial(theirs.step, oracle(x, torch.full((3,), t)), t, x, eta=1.0)
        mean = step(variance_noise=torch.zeros_like(x)).prev_sample
        torch.testing.assert_close(mine, mean, rtol=1e-4, atol=1e-4)
        x = step(variance_noise=torch.randn_like(x)).prev_sample
    x_0 = oracle.x_0(torch.tensor(t)).expand_as(x)  # what comes out is the image predicted last
    torch.testing.assert_close(mine, x_0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('num_steps', [1, 7, 39, 40, None])
def test_no_noise_comes_after_the_last_step(num_steps):
    """Of n steps n - 1 draw noise, from the generator that is given and from no other."""
    scheduler, draws = ddpm.DDPM_Scheduler(40), torch.Generator().manual_seed(5)
    before, x = torch.get_rng_state(), torch.ones(3, 1, 8, 8, requires_grad=True)
    for _, out in ddpm.reverse_process(Oracle(scheduler), x, scheduler, num_steps, draws):
        assert torch.is_grad_enabled() and not out.requires_grad
    again = torch.Generator().manual_seed(5)
    for _ in range((num_steps or 40) - 1):
        torch.randn(3, 1, 8, 8, generator=again)
    assert torch.equal(draws.get_state(), again.get_state())
    assert torch.equal(torch.get_rng_state(), before)


def test_timesteps_are_evenly_spread():
    for T in (2, 3, 20, 37):
        assert ddpm.sampling_times(T) == list(range(T - 1, -1, -1))
        for num_steps in range(2, T + 1):
            times = ddpm.sampling_times(T, num_steps)
            assert (len(times), times[0], times[-1]) == (num_steps, T - 1, 0)
            steps = {a - b for a, b in pairwise(times)}
            assert min(steps) >= 1 and max(steps) - min(steps) <= 1
    assert ddpm.sampling_times(1000, 5) == [999, 749, 500, 250, 0]
    for num_steps in (0, -1, 1001, 2.5):
        with pytest.raises(ddpm.UserError, match='num_steps is .*, but must be from 1 to 1000'):
            ddpm.sampling_times(1000, num_steps)


# ---- load_model and sample ----------------------------------------------------------------------

NUMBERS = dict(time_steps=20, dropout_prob=0.5)


def random_checkpoint(config=dict(image_size=16), **changes):
    """Random weights: their pictures are grey noise, which sampling must repeat all the same."""
    weights = small_unet(**{**NUMBERS, **changes}).state_dict()
    state = {f'module.{name}': value for name, value in weights.items()}
    beta = torch.linspace(1e-4, 0.02, 20)
    torch.save(dict(ema=state, unet={**SMALL, **NUMBERS, **changes}, config=config, beta=beta), 'x')
    return 'x'


@pytest.fixture
def model(workdir):
    return ddpm.load_model(random_checkpoint())


def by_hand(model, x, num_steps=None, seed=0, skip=0):
    """The images of reverse_process, from a generator of which `skip` numbers are used up."""
    draws = torch.Generator().manual_seed(seed)
    if skip:
        torch.randn(skip, generator=draws)
    scheduler = ddpm.DDPM_Scheduler(model.time_steps)
    *_, (_, x) = ddpm.reverse_process(model, x, scheduler, num_steps, draws)
    return x.clamp(0, 1)


def test_a_model_is_ready_to_sample(model):
    assert (model.time_steps, model.image_size, model.training) == (20, 16, False)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(model(x, [3]), small_unet(**NUMBERS)(x, [3]))
    images = ddpm.sample(model, 3)
    assert images.shape == (3, 1, 16, 16)
    assert (images.dtype, images.device.type) == (torch.float32, 'cpu')
    assert not images.requires_grad and not images.is_inference()
    assert 0 <= images.min() < images.max() <= 1
    colours = ddpm.load_model(random_checkpoint(dict(), input_channels=3, output_channels=3))
    assert ddpm.sample(colours, 2, 3).shape == (2, 3, 32, 32)


@pytest.mark.parametrize('num_steps', [None, 1, 7])
def test_sample_is_the_reverse_process_from_its_seed_or_noise(model, num_steps):
    images = ddpm.sample(model.train(), 3, num_steps, seed=4)  # and without dropout, in between
    assert model.training
    noise = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(4))
    expected = by_hand(model.eval(), noise, num_steps, seed=4, skip=noise.numel())
    assert torch.equal(images, expected)
    assert not torch.equal(images, ddpm.sample(model, 3, num_steps, seed=5))
    assert not torch.equal(ddpm.sample(model, 3, num_steps), ddpm.sample(model, 3, num_steps))

    before = noise.clone()
    expected = by_hand(model, noise, num_steps, seed=4)
    for given in (noise, noise.double(), noise.numpy()):
        assert torch.equal(ddpm.sample(model, 3, num_steps, seed=4, noise=given), expected)
    assert torch.equal(noise, before)


@pytest.mark.parametrize('given', [True, False])
def test_batches_follow_each_other(model, monkeypatch, given):
    """Nine images, four at a time: all of x_T is drawn first, then each batch goes on with the
    generator of the one before."""
    for device, size, count in [('cuda', 32, 500), ('cuda', 64, 125), ('cpu', 16, 256)]:
        assert ddpm.images_at_once(torch.device(device), size) == count
    assert ddpm.images_at_once(torch.device('cpu'), 4096) == 1
    monkeypatch.setattr(ddpm, 'images_at_once', lambda device, size: 64 // size)
    noise, seen = torch.randn(9, 1, 16, 16), []

    def on_step(first, t, x):
        seen.append((first, t, x.clone()))

    images = ddpm.sample(model, 9, 3, seed=4, noise=noise if given else None, on_step=on_step)
    draws, expected = torch.Generator().manual_seed(4), []
    if not given:
        noise = torch.randn(9, 1, 16, 16, generator=draws)
    for i in (0, 4, 8):
        x, scheduler = noise[i : i + 4], ddpm.DDPM_Scheduler(20)
        steps = list(ddpm.reverse_process(model, x, scheduler, 3, draws))
        expected += [(i, 20, x), *((i, *step) for step in steps)]
    assert [step[:2] for step in seen] == [step[:2] for step in expected]
    assert all(torch.equal(ours[2], theirs[2]) for ours, theirs in zip(seen, expected))
    last = [x for _, t, x in expected if t == 0]
    assert torch.equal(images, torch.cat(last).clamp(0, 1))


def test_samples_that_are_not_finite_are_refused(model):
    model.output_conv.bias.data.fill_(np.nan)
    with pytest.raises(ddpm.UserError, match='^samples are not finite: '):
        ddpm.sample(model, 2, 3)


def test_sample_refuses_what_it_cannot_do(model):
    wrong = [('num_images', 0), ('num_images', 2.0), ('num_images', True)]
    wrong += [('num_images', np.int64(3)), ('num_steps', 0), ('num_steps', 21)]
    wrong += [('seed', -2), ('seed', 2**32)]
    wrong += [('noise', torch.zeros(*shape, 16, 16)) for shape in ((2,), (1, 1), (2, 3))]
    for name, value in [*wrong, ('noise', torch.full((2, 1, 16, 16), np.inf))]:
        with pytest.raises(ddpm.UserError, match=f'^{name} is .*, but must be '):
            ddpm.sample(model, **{'num_images': 2, name: value})


@pytest.mark.parametrize(
    'warned, cases',  # timesteps and the mean of the images; that of MNIST is 0.1
    [
        (True, [(10, 0.1), (200, 0.1), (300, 0.1), (300, 0.02), (500, 0.5)]),
        (False, [(500, 0.1), (500, 0.02), (1000, 0.5), (1000, 1)]),
    ],
)
def test_too_few_timesteps_are_warned_of(capsys, warned, cases):
    """The line names sqrt(alpha-bar_T), the share of an image that the last timestep leaves."""
    for T, mean in cases:
        images = torch.full((8, 1, 32, 32), round(255 * mean), dtype=torch.uint8)
        ddpm.warn_of_few_timesteps(T, images)
        share = np.prod(1 - np.linspace(1e-4, 0.02, T)) ** 0.5
        said = capsys.readouterr().out
        assert (
            said.startswith(f'After {T} timesteps {share:.1%} of an image') == warned == bool(said)
        )
