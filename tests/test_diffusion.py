"""Schedule, forward kernel, samplers and loss against closed forms and the library diffusers; the
functions load_model and sample."""

import random
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS, SMALL, SURROUNDINGS, small_unet, surroundings
from diffusers import DDIMScheduler, DDPMScheduler

import ddpm


class Oracle(torch.nn.Module):
    """Stands for a trained model: predicts the noise that leads from an x_0 of its own to x, so the
    x_0 predicted from it is known; another one at each t."""

    def __init__(self, scheduler, brightest=0.9):
        super().__init__()
        self.scheduler = scheduler
        self.brightest = brightest
        self.calls = []

    def x_0(self, t):
        pattern = torch.linspace(0, 3, 64).reshape(1, 1, 8, 8)
        return 0.1 + (self.brightest - 0.1) * (0.5 + 0.5 * torch.sin(pattern + t))

    def forward(self, x, t):
        assert (t == t[0]).all() and t.shape == (len(x),)
        self.calls.append(t[0].item())
        abar = self.scheduler.alpha[t[0]]
        return (x - abar.sqrt() * self.x_0(t[0])) / (1 - abar).sqrt()


def test_schedule_is_that_of_diffusers():
    beta, alpha = ddpm.DDPM_Scheduler()(torch.arange(1000))
    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule='linear')
    torch.testing.assert_close(beta, theirs.betas)
    torch.testing.assert_close(alpha, theirs.alphas_cumprod)
    beta, alpha = ddpm.DDPM_Scheduler()(0)
    assert beta.item() == pytest.approx(1e-4)
    assert alpha.item() == pytest.approx(1 - 1e-4)


def test_forward_kernel_is_that_of_diffusers():
    """x_t, as diffusion_loss hands it to the model."""
    x, eps, t = torch.rand(5, 1, 8, 8), torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 400, 998, 999])
    seen = []

    def model(x_t, t):
        seen.append(x_t)
        return x_t

    ddpm.diffusion_loss(model, ddpm.DDPM_Scheduler(), x, t, eps)
    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02).add_noise(x, eps, t)
    torch.testing.assert_close(seen[0], theirs)


def test_forward_kernel_is_the_chain_of_single_steps():
    """Mean and variance of x_t (eq. 4) from those of q(x_t | x_{t-1}) (eq. 2), step by step."""
    scheduler = ddpm.DDPM_Scheduler(50)
    mean, variance = 1.0, 0.0
    for t in range(50):
        beta, alpha = (value.item() for value in scheduler(t))
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        assert alpha**0.5 == pytest.approx(mean, rel=1e-5)
        assert 1 - alpha == pytest.approx(variance, abs=1e-6)


def test_loss_is_the_mean_square_error_of_the_noise():
    x, eps, t = torch.rand(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])
    loss = ddpm.diffusion_loss(
        lambda x, t: torch.full_like(x, 0.25), ddpm.DDPM_Scheduler(), x, t, eps
    )
    assert loss.item() == pytest.approx(
        sum((e - 0.25) ** 2 for e in eps.flatten().tolist()) / eps.numel()
    )
    assert loss.dtype == torch.float32


def test_the_articles_sampler_is_that_of_diffusers():
    T = 40
    scheduler = ddpm.DDPM_Scheduler(T)
    theirs = DDPMScheduler(
        T, beta_start=1e-4, beta_end=0.02, variance_type='fixed_large', clip_sample=False
    )
    noise = torch.randn(3, 1, 8, 8)
    oracle = Oracle(scheduler)
    torch.manual_seed(1)
    ours = dict(ddpm.reverse_process(oracle, noise, scheduler))
    assert oracle.calls == list(ours) == list(range(T - 1, -1, -1))

    torch.manual_seed(1)
    x = noise
    for t in range(T - 1, -1, -1):
        eps = oracle(x, torch.full((3,), t))
        state = torch.get_rng_state()
        x = theirs.step(eps, t, x).prev_sample
        mean = x
        if t > 0:  # what ours yields has no noise yet
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            mean = x - scheduler.beta[t].sqrt() * torch.randn_like(x)
            torch.set_rng_state(after)
        torch.testing.assert_close(ours[t], mean, rtol=1e-4, atol=1e-4)


def test_fewer_steps_are_those_of_diffusers_with_eta_1():
    scheduler = ddpm.DDPM_Scheduler(1000)
    theirs = DDIMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True
    )
    theirs.num_inference_steps = 3  # steps of 1000 // 3 = 333, which is ours for four times
    oracle = Oracle(scheduler, 1.7)  # nor is x_0 clipped
    x = torch.randn(3, 1, 8, 8)
    torch.manual_seed(1)
    ours = dict(ddpm.reverse_process(oracle, x, scheduler, num_steps=4))
    assert list(ours) == [999, 666, 333, 0]
    torch.manual_seed(1)
    for t, mine in ours.items():
        eps, none = oracle(x, torch.full((3,), t)), torch.zeros_like(x)
        step = partial(theirs.step, eps, t, x, eta=1.0)
        torch.testing.assert_close(
            mine, step(variance_noise=none).prev_sample, rtol=1e-4, atol=1e-4
        )
        x = step(variance_noise=torch.randn_like(x)).prev_sample
    x_0 = oracle.x_0(torch.tensor(0)).expand_as(x)
    torch.testing.assert_close(mine, x_0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('num_steps', [2, 3, 10, 39, 40, None])
def test_the_sampler_is_the_papers(num_steps):
    """Against a second implementation, in float64, by way of the predicted x_0. All steps: eq. 7's
    mean, with sigma^2 = beta; fewer: DDIM's eq. 12, with the sigma of eta = 1."""
    T, scheduler = 40, ddpm.DDPM_Scheduler(40)
    oracle, noise = Oracle(scheduler), torch.randn(3, 1, 8, 8)
    draws = torch.Generator().manual_seed(5)
    ours = list(ddpm.reverse_process(oracle, noise, scheduler, num_steps, draws))

    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    abar = torch.cumprod(1 - beta, 0).tolist()
    last = len(ours) - 1
    times = [round((T - 1) * (last - i) / last) for i in range(len(ours))]
    draws = torch.Generator().manual_seed(5)
    x = noise.double()
    for (t, x_t), s in zip(ours, [*times[1:], None]):
        now, then = abar[t], 1.0 if s is None else abar[s]
        x_0 = oracle.x_0(torch.tensor(t)).double()
        if num_steps in (T, None):
            of_x_0, of_x = then**0.5 * beta[t], (1 - beta[t]) ** 0.5 * (1 - then)
            mean, sigma = (of_x_0 * x_0 + of_x * x) / (1 - now), beta[t] ** 0.5
        else:
            eps = (x - now**0.5 * x_0) / (1 - now) ** 0.5
            sigma = ((1 - then) / (1 - now)) ** 0.5 * (1 - now / then) ** 0.5
            mean = then**0.5 * x_0 + (1 - then - sigma**2) ** 0.5 * eps
        torch.testing.assert_close(x_t, mean.float(), rtol=1e-4, atol=1e-4)
        x = mean + sigma * torch.randn(3, 1, 8, 8, generator=draws)
    assert [t for t, _ in ours] == times and (times[0], times[-1]) == (T - 1, 0)


def test_one_step_gives_the_predicted_image():
    scheduler = ddpm.DDPM_Scheduler(40)
    oracle = Oracle(scheduler)
    ((t, x),) = ddpm.reverse_process(oracle, torch.randn(3, 1, 8, 8), scheduler, 1)
    assert t == 39 and oracle.calls == [39]
    torch.testing.assert_close(x, oracle.x_0(torch.tensor(39)).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('num_steps', [1, 2, 7, 39, 40, None])
def test_no_noise_comes_after_the_last_step(num_steps):
    """Of n steps n - 1 draw noise, from the generator that is given and from no other."""
    scheduler, draws = ddpm.DDPM_Scheduler(40), torch.Generator().manual_seed(5)
    before = torch.get_rng_state()
    for _ in ddpm.reverse_process(
        Oracle(scheduler), torch.ones(3, 1, 8, 8), scheduler, num_steps, draws
    ):
        pass
    again = torch.Generator().manual_seed(5)
    for _ in range((num_steps or 40) - 1):
        torch.randn(3, 1, 8, 8, generator=again)
    assert torch.equal(draws.get_state(), again.get_state())
    assert torch.equal(torch.get_rng_state(), before)


def test_all_steps_have_the_articles_variance():
    scheduler = ddpm.DDPM_Scheduler(30)
    beta, abar, sigma = ddpm.respace(scheduler, list(range(29, -1, -1)))
    torch.testing.assert_close(beta, scheduler.beta.flip(0))
    torch.testing.assert_close(abar, scheduler.alpha.flip(0))
    torch.testing.assert_close(sigma, torch.linspace(1e-4, 0.02, 30).sqrt().flip(0))


@pytest.mark.parametrize('times', [[999], [999, 0], [999, 500, 499, 3], list(range(998, -1, -1))])
def test_fewer_steps_have_the_variance_of_ddim_with_eta_1(times):
    """DDIM's eq. 16, where alpha is what is alpha-bar here, and at the end there is no noise."""
    beta, abar, sigma = ddpm.respace(ddpm.DDPM_Scheduler(1000), times)
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0).tolist()
    for i, (t, s) in enumerate(pairwise([*times, None])):
        now, then = alpha[t], 1.0 if s is None else alpha[s]
        ratio = ((1 - then) / (1 - now)) * (1 - now / then)
        assert sigma[i].item() ** 2 == pytest.approx(ratio, rel=2e-3, abs=1e-9)
        assert abar[i].item() == pytest.approx(now, rel=1e-4)
        assert beta[i].item() == pytest.approx(1 - now / then, rel=2e-3)
    assert sigma[-1] == 0


def test_timesteps_are_evenly_spread():
    for T in (2, 3, 20, 37):
        assert ddpm.sampling_times(T) == list(range(T - 1, -1, -1))
        for num_steps in range(2, T + 1):
            times = ddpm.sampling_times(T, num_steps)
            assert (len(times), times[0], times[-1]) == (num_steps, T - 1, 0)
            steps = {a - b for a, b in pairwise(times)}
            assert min(steps) >= 1 and max(steps) - min(steps) <= 1
    assert ddpm.sampling_times(1000, 5) == [999, 749, 500, 250, 0]


@pytest.mark.parametrize('num_steps', [0, -1, 1001, 2.5])
def test_num_steps_out_of_range(num_steps):
    scheduler = ddpm.DDPM_Scheduler()
    with pytest.raises(ddpm.UserError, match='num_steps is .*, but must be from 1 to 1000'):
        next(ddpm.reverse_process(small_unet(), torch.zeros(1, 1, 32, 32), scheduler, num_steps))


def test_sampling_needs_no_gradients_and_switches_dropout_off():
    model = small_unet(dropout_prob=0.5).train()
    x = torch.randn(2, 1, 32, 32)

    def sample():
        draws = torch.Generator().manual_seed(0)
        *_, (_, out) = ddpm.reverse_process(model, x, ddpm.DDPM_Scheduler(), 3, draws)
        return out

    out = sample()
    assert torch.equal(out, sample())
    assert not out.requires_grad and not out.is_inference()
    assert out.dtype == torch.float32
    assert torch.is_grad_enabled()


# ---- load_model and sample ----------------------------------------------------------------------

NUMBERS = dict(time_steps=20, dropout_prob=0.5)


@pytest.fixture
def checkpoint(workdir):
    """A checkpoint with random weights: their pictures are grey noise, which sampling must repeat
    all the same."""
    state = {f'module.{name}': value for name, value in small_unet(**NUMBERS).state_dict().items()}
    config = dict(image_size=16)
    torch.save(dict(ema=state, unet={**SMALL, **NUMBERS}, config=config), 'random')
    return 'random'


def by_hand(model, x, num_steps=None, seed=0, skip=0):
    """The images of reverse_process, from a generator of which `skip` numbers are used up."""
    draws = torch.Generator().manual_seed(seed)
    if skip:
        torch.randn(skip, generator=draws)
    scheduler = ddpm.DDPM_Scheduler(model.time_steps)
    *_, (_, x) = ddpm.reverse_process(model, x, scheduler, num_steps, draws)
    return x.clamp(0, 1)


def test_a_model_is_ready_to_sample(checkpoint):
    model = ddpm.load_model(checkpoint)
    assert (model.time_steps, model.image_size, model.training) == (20, 16, False)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(model(x, [3]), small_unet(**NUMBERS)(x, [3]))
    images = ddpm.sample(model, 3)
    assert images.shape == (3, 1, 16, 16)
    assert (images.dtype, images.device.type) == (torch.float32, 'cpu')
    assert not images.requires_grad and not images.is_inference()
    assert 0 <= images.min() < images.max() <= 1


def test_colours_are_sampled(checkpoint):
    colours = dict(input_channels=3, output_channels=3, **NUMBERS)
    state = {f'module.{k}': v for k, v in small_unet(**colours).state_dict().items()}
    torch.save(dict(ema=state, unet={**SMALL, **colours}), 'colours')
    assert ddpm.sample(ddpm.load_model('colours'), 2, 3).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    'prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.', 'module.module.', '_orig_mod.' * 2]
)
def test_a_model_is_loaded_whatever_wrapped_it(checkpoint, prefix):
    weights = small_unet(**NUMBERS).state_dict()
    state = {f'{prefix}{name}': value for name, value in weights.items()}
    torch.save(dict(ema=state, unet={**SMALL, **NUMBERS}), 'wrapped')
    loaded = ddpm.load_model('wrapped').state_dict()
    assert list(loaded) == list(weights)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize('num_steps', [None, 1, 7])
def test_sample_is_the_reverse_process_from_its_seed(checkpoint, num_steps):
    model = ddpm.load_model(checkpoint)
    images = ddpm.sample(model, 3, num_steps, seed=4)
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(4))
    assert torch.equal(images, by_hand(model, x, num_steps, seed=4, skip=x.numel()))
    assert torch.equal(images, ddpm.sample(model, 3, num_steps, seed=4))
    assert not torch.equal(images, ddpm.sample(model, 3, num_steps, seed=5))
    assert not torch.equal(ddpm.sample(model, 3, num_steps), ddpm.sample(model, 3, num_steps))


@pytest.mark.parametrize('num_steps', [None, 7])
def test_sample_starts_from_the_noise_that_is_given(checkpoint, num_steps):
    model, noise = ddpm.load_model(checkpoint), torch.randn(3, 1, 16, 16)
    before = noise.clone()
    images = ddpm.sample(model, 3, num_steps, seed=4, noise=noise)
    assert torch.equal(images, by_hand(model, noise, num_steps, seed=4))
    assert torch.equal(images, ddpm.sample(model, 3, num_steps, seed=4, noise=noise.double()))
    assert torch.equal(noise, before)
    for shape in ((2, 1, 16, 16), (3, 1, 32, 32), (3, 3, 16, 16), (3, 16, 16)):
        with pytest.raises(ddpm.UserError, match=r'noise is \(.*, but must be \(3, 1, 16, 16\)'):
            ddpm.sample(model, 3, num_steps, noise=torch.zeros(shape))


@pytest.mark.parametrize('given', [True, False])
def test_batches_follow_each_other(checkpoint, monkeypatch, given):
    """Nine images, four at a time: all of x_T is drawn first, then each batch goes on with the
    generator of the one before."""
    model, noise = ddpm.load_model(checkpoint), torch.randn(9, 1, 16, 16)
    monkeypatch.setitem(ddpm.SAMPLE_BATCH, 'cpu', 1)  # of 32 x 32
    seen = []

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


def test_how_many_images_are_sampled_at_a_time():
    """As many pixels as SAMPLE_BATCH images of 32 x 32 have."""
    for device, size, count in [('cuda', 32, 500), ('cuda', 64, 125), ('cpu', 16, 256)]:
        assert ddpm.sample_batch(torch.device(device), size) == count
    assert ddpm.sample_batch(torch.device('cpu'), 4096) == 1


@pytest.mark.parametrize(
    'arguments, words',
    [
        (dict(num_images=0), 'num_images is 0'),
        (dict(num_images=2.0), 'num_images is 2.0'),
        (dict(num_images=True), 'num_images is True'),
        (dict(num_images=np.int64(3)), 'num_images is'),
        (dict(num_steps=0), 'num_steps is 0'),
        (dict(num_steps=True), 'num_steps is True'),
        (dict(num_steps=21), 'num_steps is 21, but must be from 1 to 20'),
        (dict(seed=-2), 'seed is -2'),
        (dict(seed=2**32), 'seed is 4294967296'),
    ],
)
def test_sample_refuses_what_it_cannot_do(arguments, words):
    with pytest.raises(ddpm.UserError, match=words):
        ddpm.sample(small_unet(**NUMBERS), **{'num_images': 2, **arguments})


def global_state():
    """What a call may have changed for others."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
        (cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()),
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize('deterministic', [True, False])
def test_sampling_changes_nothing_for_others(checkpoint, monkeypatch, deterministic):
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', deterministic)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', not deterministic)
    before = global_state()
    model = ddpm.load_model(checkpoint)
    assert global_state() == before
    for seed in (-1, 3):
        ddpm.sample(model, 2, 3, seed=seed)
        ddpm.sample(model, 2, 3, seed=seed, noise=torch.zeros(2, 1, 16, 16))
        assert global_state() == before
        assert ddpm.inference(checkpoint, num_steps=3, num_images=2, seed=seed).shape[0] == 2
        assert global_state() == before


@pytest.mark.parametrize('kind', SURROUNDINGS)
def test_sampling_works_anywhere(checkpoint, float32, kind):
    expected = ddpm.sample(ddpm.load_model(checkpoint), 2, 5, seed=4)
    with surroundings(kind):
        model = ddpm.load_model(checkpoint)
        images = ddpm.sample(model, 2, 5, seed=4)
        pictures = ddpm.inference(checkpoint, num_steps=5, seed=4, num_images=2)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    for found in (images, pictures):
        assert found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found, expected)


# ---- Too few timesteps --------------------------------------------------------------------------


def images_of_mean(mean):
    """Pictures half of whose pixels are black, (8, 1, 32, 32) uint8."""
    values = torch.zeros(8, 1, 32, 32)
    values[..., ::2] = 2 * mean * 255
    return values.round().byte()


@pytest.mark.parametrize(
    'num_time_steps, images, warned',
    [
        *((T, F.pad(DIGITS, [2] * 4), True) for T in (10, 100, 200, 300)),
        *((T, F.pad(DIGITS, [2] * 4), False) for T in (500, 1000)),
        (300, images_of_mean(0.02), True),  # dark, but much of it is left
        (500, images_of_mean(0.02), False),
        (500, images_of_mean(0.5), True),  # little is left, but of a bright image
        (1000, images_of_mean(0.5), False),
        (1000, images_of_mean(1.0), False),
    ],
)
def test_too_few_timesteps_are_warned_of(capsys, num_time_steps, images, warned):
    """The line names sqrt(alpha-bar_T), the share of an image that the last timestep leaves."""
    ddpm.warn_of_few_timesteps(num_time_steps, images)
    said = capsys.readouterr().out
    assert bool(said) == warned
    if warned:
        share = np.prod(1 - np.linspace(1e-4, 0.02, num_time_steps)) ** 0.5
        assert f'num_time_steps={num_time_steps} the last timestep leaves {share:.1%} of' in said
        assert f'(mean {images.double().mean() / 255:.2f})' in said
        assert '1000 leave 0.6%' in said and said.count('\n') == 1
