"""Schedule, forward kernel, samplers and loss against closed forms and the library diffusers."""

from functools import partial

import pytest
import torch
from conftest import small_unet
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


@pytest.mark.parametrize('num_steps', [0, -1, 1001, 2.5, True])
def test_num_steps_out_of_range(num_steps):
    with pytest.raises(ValueError, match='num_steps is'):
        next(
            ddpm.reverse_process(
                small_unet(), torch.zeros(1, 1, 32, 32), ddpm.DDPM_Scheduler(), num_steps
            )
        )


def test_sampling_needs_no_gradients_and_switches_dropout_off():
    model = small_unet(dropout_prob=0.5).train()
    x = torch.randn(2, 1, 32, 32)

    def sample():
        torch.manual_seed(0)
        *_, (_, out) = ddpm.reverse_process(model, x, ddpm.DDPM_Scheduler(), 3)
        return out

    out = sample()
    assert torch.equal(out, sample())
    assert not out.requires_grad
    assert out.dtype == torch.float32
