"""Schedule, forward kernel, samplers and loss against closed forms and the library diffusers."""

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


@pytest.mark.parametrize('brightest', [0.9, 1.7])
def test_ddim_is_that_of_diffusers(brightest):
    """Where x_0 is clipped too: there eps is the one that leads from the clipped x_0 to x."""
    scheduler = ddpm.DDPM_Scheduler(1000)
    theirs = DDIMScheduler(  # clips to [-1, 1], but this x_0 is above 0
        1000, beta_start=1e-4, beta_end=0.02, clip_sample=True, set_alpha_to_one=True
    )
    theirs.num_inference_steps = 3  # steps of 1000 // 3 = 333, which is ours for four times
    oracle = Oracle(scheduler, brightest)
    x = torch.randn(3, 1, 8, 8)
    ours = dict(ddpm.reverse_process(oracle, x, scheduler, num_steps=4))
    assert list(ours) == [999, 666, 333, 0]
    for t, mine in ours.items():
        eps = oracle(x, torch.full((3,), t))
        x = theirs.step(eps, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)
    x_0 = oracle.x_0(torch.tensor(0)).clamp(max=1).expand_as(x)
    torch.testing.assert_close(x, x_0, rtol=1e-3, atol=1e-3)


def test_ddim_clips_the_predicted_image_and_is_deterministic():
    scheduler, x = ddpm.DDPM_Scheduler(1000), torch.randn(2, 1, 8, 8)

    def sample(num_steps):
        model = torch.nn.Module()
        model.forward = lambda x, t: torch.zeros_like(x)  # x_0 = x / sqrt(abar): far outside
        *_, (_, out) = ddpm.reverse_process(model, x, scheduler, num_steps)
        return out

    assert torch.equal(sample(50), sample(50))
    assert torch.equal(sample(50), (x > 0).float())
    assert sample(1000).abs().max() > 2  # the article's sampler does not clip


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
        *_, (_, out) = ddpm.reverse_process(model, x, ddpm.DDPM_Scheduler(), 3)
        return out

    out = sample()
    assert torch.equal(out, sample())
    assert not out.requires_grad
    assert out.dtype == torch.float32
