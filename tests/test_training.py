"""Training as a whole: it learns, averages, resumes, and takes the article's checkpoints."""

import math
import os
import random
import signal
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, TINY, few_images
from PIL import Image
from timm.utils import ModelEmaV3

import ddpm

# two layers train in milliseconds
TWO = {**SMALL, 'Channels': [8, 16], 'Attentions': [False, True], 'Upscales': [False, True]}
LITTLE = {**TINY, 'unet': TWO, 'image_size': 16}
DIGITS = F.avg_pool2d(few_images().float(), 2).byte()  # twelve, (12, 1, 16, 16)


@pytest.fixture(autouse=True)
def twelve_digits(workdir, monkeypatch):
    monkeypatch.setattr(ddpm, 'load_images', lambda *_: DIGITS)


def load(name='tiny'):
    return torch.load(f'checkpoints/{name}', map_location='cpu', weights_only=True)


def train(name='tiny', **changes):
    """What the checkpoint holds after it."""
    ddpm.train(**{**LITTLE, 'checkpoint_path': f'checkpoints/{name}', **changes})
    return load(name)


def assert_identical(a, b):
    """Of two checkpoints or parts of them; nan is like nan."""
    if torch.is_tensor(a):
        return torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if not isinstance(a, dict | list):
        assert a == b
        return
    assert len(a) == len(b)
    for name in a if isinstance(a, dict) else range(len(a)):
        assert_identical(a[name], b[name])


@pytest.fixture
def steps(monkeypatch):
    """Of each step of a training: images, times, noise and learning rate, and the weights after."""
    seen, loss, done = [], ddpm.diffusion_loss, ddpm.Run.step_done

    def spy_loss(model, scheduler, x, t, eps):
        assert all(p.grad is None for p in model.parameters())  # so much less memory is needed
        seen.append(SimpleNamespace(x=x, t=t, eps=eps))
        return loss(model, scheduler, x, t, eps)

    def spy_done(run, value):
        seen[-1].lr = run.parts['optimizer'].param_groups[0]['lr']
        seen[-1].weights = {k: v.clone() for k, v in run.parts['weights'].state_dict().items()}
        done(run, value)

    monkeypatch.setattr(ddpm, 'diffusion_loss', spy_loss)
    monkeypatch.setattr(ddpm.Run, 'step_done', spy_done)
    return seen


# ---- What a step does ---------------------------------------------------------------------------


def test_overfits_a_digit_and_gives_it_back(monkeypatch):
    digit = F.avg_pool2d(DIGITS[:1].float(), 2).byte()
    monkeypatch.setattr(ddpm, 'load_images', lambda *_: digit.repeat(32, 1, 1, 1))
    unet = {**SMALL, 'num_groups': 8, 'Attentions': [False] * 4, 'dropout_prob': 0.0}
    numbers = dict(unet=unet, batch_size=32, num_epochs=200, num_time_steps=200, image_size=8)
    losses = train(**numbers, lr=1e-2, lr_decay=True, ema_decay=0.95)['losses']
    assert losses[-50:].mean() < losses[:5].mean() / 10
    model, truth = ddpm.load_model('checkpoints/tiny'), ddpm.to_input(digit)
    for num_steps in (200, 30):
        out = ddpm.sample(model, 8, num_steps, seed=0)
        distance = (out - truth).square().mean((1, 2, 3))  # (8,)
        assert distance.median() < 0.25 * truth.square().mean()


def test_an_epoch_is_a_new_order_and_drops_the_last_partial_batch(steps, capsys):
    losses = train(batch_size=5, num_epochs=10, num_time_steps=3)['losses']
    assert len(losses) == len(steps) == 20
    orders = [bytes(x.flatten().tolist()) for step in steps for x in ddpm.to_uint8(step.x)]
    epochs = [orders[i : i + 10] for i in range(0, 100, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs) and len(set(map(tuple, epochs))) == 10
    assert set(orders) == {bytes(x.flatten().tolist()) for x in DIGITS}
    assert {t for step in steps for t in step.t.tolist()} == {0, 1, 2}  # the last one, too
    assert len({step.eps.sum().item() for step in steps}) == 20  # no step has another's noise
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('Epoch')]
    means = losses.reshape(10, 2).mean(1).tolist()
    assert lines == [f'Epoch {i} | Loss {mean:.5f}' for i, mean in enumerate(means, 1)]


def test_the_course_of_the_learning_rate(steps):
    train(lr_decay=True)
    expected = [1e-6, *(1e-3 * left / 6 for left in (5, 4, 3, 2, 1))]
    assert [step.lr for step in steps] == pytest.approx(expected)


def assert_is_the_average(ema, decays, start, steps):
    """decay * average + (1 - decay) * weights, one step after the other, in float64."""
    for name, average in start.items():
        average = average.double()
        for decay, step in zip(decays, steps, strict=True):
            average = decay * average + (1 - decay) * step.weights[name].double()
        torch.testing.assert_close(ema[f'module.{name}'].double(), average)


def test_ema_is_the_closed_form(steps):
    """With its warm-up: the decay of step n is n / (n + 10), which soon forgets the start, up to
    ema_decay."""
    ema = train(ema_decay=0.2)['ema']
    assert {step.lr for step in steps} == {1e-3}  # the article's is constant
    sampled = ddpm.load_model('checkpoints/tiny').state_dict()
    assert all(torch.equal(sampled[name], ema[f'module.{name}']) for name in sampled)
    ddpm.set_seed(1)
    start = ddpm.UNET(**TWO, time_steps=20).state_dict()
    assert not torch.equal(start['output_conv.weight'], steps[0].weights['output_conv.weight'])
    assert_is_the_average(ema, [0, 1 / 11, 2 / 12, 0.2, 0.2, 0.2], start, steps)


def article_checkpoint(steps=1, **changes):
    """What the article's code writes: weights, optimizer and ema of its default UNET."""
    torch.manual_seed(0)
    model = ddpm.UNET(**{**TWO, 'time_steps': 20, **changes})
    optimizer, ema = torch.optim.Adam(model.parameters(), lr=2e-5), ModelEmaV3(model, decay=0.9999)
    model(torch.randn(1, 1, 16, 16), [0]).square().mean().backward()
    optimizer.step()
    ema.update(model)
    state = dict(weights=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.state_dict())
    for entry in state['optimizer']['state'].values():
        entry['step'] = steps  # as older versions of torch wrote it
    Path('checkpoints').mkdir(exist_ok=True)
    torch.save(state, 'checkpoints/tiny')
    return load()


@pytest.fixture
def small_article(monkeypatch):
    """The article's UNET is a small one."""
    defaults = {**ddpm.UNET_DEFAULTS, **TWO, 'time_steps': 20, 'dropout_prob': 0.0}
    monkeypatch.setattr(ddpm, 'UNET_DEFAULTS', defaults)


@pytest.mark.parametrize('article', [False, True])
def test_a_step_is_that_of_plain_adam(small_article, float32, article):
    """On a loss computed here, from a fresh network or from an article's checkpoint, whose moments
    are contiguous where the parameters are channels_last: they must find each other."""
    state, unet = article and article_checkpoint(dropout_prob=0.0), {**TWO, 'dropout_prob': 0.0}
    saved = train(unet=unet, num_epochs=1 + article, batch_size=12)
    ddpm.set_seed(1)
    model = ddpm.UNET(**unet, time_steps=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False)
    if article:
        model.load_state_dict(state['weights'])
        groups = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict({**state['optimizer'], 'param_groups': groups})
    torch.manual_seed(ddpm.fold_in(1, 0, int(article)))  # of the epoch
    x = DIGITS[torch.randperm(12)].float() / 255
    torch.manual_seed(ddpm.fold_in(1, 1, int(article)))  # of the step
    t, eps = torch.randint(20, (12,)), torch.randn(x.shape)
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 20), 0)[t][:, None, None, None]
    loss = (model(alpha**0.5 * x + (1 - alpha) ** 0.5 * eps, t) - eps).square().mean()
    loss.backward()
    optimizer.step()
    assert saved['losses'][-1].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, value in model.named_parameters():
        clear = value.grad.abs() > 1e-4  # elsewhere Adam's first step hangs on rounding
        expected = value.detach()[clear]
        torch.testing.assert_close(saved['weights'][name][clear], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_are_those_of_float32(monkeypatch, dtype):
    """From the same weights, images, noise and dropout masks."""
    x, eps, t = torch.rand(4, 1, 16, 16), torch.randn(4, 1, 16, 16), torch.tensor([0, 9, 300, 999])
    gradients, model = [], ddpm.UNET(**TWO)
    for half in (None, dtype):
        monkeypatch.setattr(ddpm, 'half_precision', lambda device, half=half: half)
        torch.manual_seed(0)
        model.zero_grad()
        ddpm.diffusion_loss(model, ddpm.DDPM_Scheduler(), x, t, eps).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact, rough = gradients
    assert 0 < (rough - exact).norm() < 0.03 * exact.norm()


def test_compiled_training_is_the_same(monkeypatch, float32, capsys):
    """In one graph, which a check that reads a tensor would break in two."""
    options = dict(backend='aot_eager', fullgraph=True)  # no C++: that would take a minute
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, **options))
    unet = {**TWO, 'dropout_prob': 0.0}  # compiled code draws other masks
    plain = train('plain', unet=unet)
    monkeypatch.setattr(ddpm, 'COMPILE_FROM', 6)
    compiled = train(unet=unet)
    assert 'does not work' not in capsys.readouterr().out
    torch.testing.assert_close(compiled['weights'], plain['weights'], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('broken', [False, True])
def test_a_long_run_is_compiled_where_that_works(monkeypatch, capsys, broken):
    """A trial comes before the first step, and leaves no trace in the run; one that is resumed
    computes as before, however few steps are left."""
    plain, events = train('plain'), []

    def compile(model):
        def compiled(x, t):
            events.append((*x.shape, model.training))
            out = model(x, t)
            out.register_hook(lambda gradient: events.append('backward'))
            assert not broken, 'no C++ compiler\nfound'
            return out

        return compiled

    monkeypatch.setattr(torch, 'compile', compile)
    monkeypatch.setattr(ddpm, 'COMPILE_FROM', 4)
    train(num_epochs=1)
    assert events == []
    assert_identical(train(), plain)
    once = [(4, 1, 16, 16, True), 'backward']
    assert events == (once[:1] if broken else once * 4)
    said = capsys.readouterr().out.splitlines()
    told = [line for line in said if line.startswith('torch.compile does not work here (')]
    assert len(told) == broken and all('no C++ compiler' in line for line in told)


# ---- Resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize('half', [None, torch.float16])
def test_resumed_is_the_same_as_never_stopped(monkeypatch, half):
    """Bit for bit, with dropout, the average while its decay warms up and afterwards, and float16's
    scaler (a T4's, here on the CPU): stopped amid an epoch, at the end of one and amid another."""
    monkeypatch.setattr(ddpm, 'half_precision', lambda device: half)
    numbers = dict(num_epochs=4, lr_decay=True, ema_decay=0.3)
    whole = train('whole', **numbers)
    loss, calls, found = ddpm.diffusion_loss, [], []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) in (2, 6, 8):
            signal.raise_signal(signal.SIGINT)
        return loss(*arguments)

    monkeypatch.setattr(ddpm, 'diffusion_loss', stopping)
    for _ in range(4):
        with suppress(KeyboardInterrupt):
            train('parts', **numbers)
        found.append(len(load('parts')['losses']))
    assert found == [2, 6, 8, 12]
    assert_identical(load('parts'), whole)
    assert bool(whole['scaler']) == (half is not None)


@pytest.mark.parametrize('name, momentum', [('SGD', 0), ('SGD', 0.9), ('RMSprop', 0.9)])
def test_another_optimizer_resumes_too(monkeypatch, name, momentum):
    other = partial(getattr(torch.optim, name), momentum=momentum)
    monkeypatch.setattr(torch.optim, 'Adam', lambda weights, lr, **_: other(weights, lr=lr))
    train('parts', num_epochs=1)
    assert_identical(train('parts')['ema'], train('whole')['ema'])


def test_an_epoch_that_is_cut_short_is_saved(monkeypatch, capsys):
    monkeypatch.setattr(torch, 'randperm', lambda count, **_: torch.arange(8))  # of 12
    losses = train(num_epochs=1)['losses']
    assert len(losses) == 2 and f'Loss {losses.mean():.5f}' in capsys.readouterr().out


@pytest.mark.parametrize('kind', [torch.float32, torch.bool])
def test_images_may_be_in_0_to_1_already(monkeypatch, kind):
    """As a DataLoader's; of any size, whatever image_size is."""
    monkeypatch.setattr(ddpm, 'load_images', lambda *_: (DIGITS / 255).round().to(kind).mT)
    losses = [train(f'{n}', image_size=n, sample_every=2)['losses'] for n in (16, 32)]
    monkeypatch.setattr(ddpm, 'load_images', lambda *_: 255 * (DIGITS / 255).round().byte().mT)
    assert_identical(losses, [train('bytes')['losses']] * 2)
    assert ddpm.load_model('checkpoints/32').image_size == 16
    with Image.open('outputs/32/progress/epoch_002.00.png') as grid:
        assert grid.size[0] == 8 * (2 * 16 + 2) + 2


def test_seeds_differ_and_repeat():
    a, b, c, d = (train(f'{i}', num_epochs=1, seed=seed) for i, seed in enumerate((1, 1, 2, -1)))
    assert_identical(a, b)
    assert not torch.equal(a['losses'], c['losses'])
    assert len({ddpm.fold_in(*numbers) for numbers in ((0, 1, 2), (0, 2, 1), (1, 0, 2))}) == 3
    assert d['config']['seed'] >= 0
    again = train('3', seed=-1)  # goes on with the seed drawn
    assert again['config']['seed'] == d['config']['seed'] and len(again['losses']) == 6
    assert_identical(again['weights'], train('whole', seed=d['config']['seed'])['weights'])


def test_a_finished_run_trains_no_more_and_changed_numbers_are_taken_up():
    train()
    before = Path('checkpoints/tiny').read_bytes()
    train()
    train(num_epochs=1)
    assert Path('checkpoints/tiny').read_bytes() == before
    saved = train(num_epochs=3, lr=1e-4, ema_decay=0.75, beta2=0.95)
    group = saved['optimizer']['param_groups'][0]
    assert group['lr'] == 1e-4 and group['betas'] == [0.9, 0.95]
    assert saved['config']['ema_decay'] == 0.75 and len(saved['losses']) == 9


def test_an_article_checkpoint_is_sampled_and_goes_on_with_its_average(small_article, steps):
    """Adam has counted its steps, and so the decay goes on at n = done."""
    done = 7
    state = article_checkpoint(done)
    ddpm.inference('checkpoints/tiny', num_time_steps=20, num_steps=3)
    assert Path('outputs/tiny/grid.png').exists()
    assert_identical(load(), state)
    numbers = dict(batch_size=12, ema_decay=0.9999)
    train(**numbers, num_epochs=done + 1)
    saved = train(**numbers, num_epochs=done + 3)
    start = {name.removeprefix('module.'): value for name, value in state['ema'].items()}
    assert_is_the_average(saved['ema'], [n / (n + 10) for n in range(done, done + 3)], start, steps)
    assert saved['losses'].isnan().tolist() == [True] * done + [False] * 3
    assert saved['optimizer']['state'][0]['step'] == done + 3

    older = {**saved, 'losses': saved['losses'][done:], 'steps_before': done}  # not recorded
    del older['beta']
    torch.save(older, 'checkpoints/older')
    more = dict(numbers, num_epochs=done + 5)
    assert_identical(train('older', **more), train(**more))


@pytest.mark.parametrize('step, factor', [(0, math.inf), (3, math.nan)])
def test_an_overflow_of_float16_is_a_skipped_step(monkeypatch, capsys, step, factor):
    """The run can be resumed without float16, and with it again."""
    loss, calls = ddpm.diffusion_loss, []

    def overflows_once(*arguments):
        calls.append(1)
        return loss(*arguments) * (factor if len(calls) == step + 1 else 1)

    monkeypatch.setattr(ddpm, 'half_precision', lambda device: torch.float16)
    monkeypatch.setattr(ddpm, 'diffusion_loss', overflows_once)
    saved = train()
    assert saved['losses'].isnan().tolist() == [i == step for i in range(6)]
    assert saved['optimizer']['state'][0]['step'] == 5
    assert saved['scaler']['scale'] == 32768
    means = saved['losses'].reshape(2, 3).nanmean(1).tolist()
    said = capsys.readouterr().out
    assert all(f'Epoch {i} | Loss {mean:.5f}' in said for i, mean in enumerate(means, 1))
    for epochs, half in ((3, None), (4, torch.float16)):
        monkeypatch.setattr(ddpm, 'half_precision', lambda device, half=half: half)
        again = train(num_epochs=epochs)
        assert_identical(again['losses'][:6], saved['losses'])
        assert len(again['losses']) == 3 * epochs
        assert bool(again['scaler']) == (half is not None)


# ---- What a call leaves behind ------------------------------------------------------------------


def surroundings():
    """What a call may have changed for others: settings; random states and signals' ends."""
    cudnn = torch.backends.cudnn
    settings = cudnn.enabled, cudnn.deterministic, cudnn.benchmark
    settings += torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    numbers, words = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    ends = [signal.getsignal(end) for end in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    return settings, numbers, words, random.getstate(), ends


@pytest.mark.parametrize('switch', [True, False])
def test_what_others_have_set_is_put_back(monkeypatch, switch):
    """Python's, numpy's and torch's random state, cuDNN's switches, signals; also by a training
    that fails. Without CUDA deterministic mode is not touched."""
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', switch)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', not switch)
    before, inside, loss = surroundings(), [], ddpm.diffusion_loss
    monkeypatch.setattr(torch, 'use_deterministic_algorithms', None)
    monkeypatch.setattr(
        ddpm, 'diffusion_loss', lambda *a: inside.append(surroundings()) or loss(*a)
    )
    for seed in (-1, 3):
        train(f'{seed}', seed=seed, sample_every=1)
        assert surroundings() == before
        model = ddpm.load_model(f'checkpoints/{seed}')
        assert surroundings() == before
        ddpm.sample(model, 2, 3, seed=seed)
        ddpm.sample(model, 2, 3, seed=seed, noise=torch.zeros(2, 1, 16, 16))
        assert surroundings() == before
        ddpm.inference(f'checkpoints/{seed}', num_steps=3, num_images=2, seed=seed)
        assert surroundings() == before
    assert all(now != then for now, then in zip(inside[0][1:], before[1:]))
    monkeypatch.setattr(ddpm, 'diffusion_loss', lambda *_: random.seed(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train('failed')
    assert surroundings() == before


@pytest.mark.parametrize('deterministic', [True, False])
def test_a_gpu_is_seeded_and_put_back(monkeypatch, deterministic):
    """By name: asked of all of them, torch warns where there are several."""
    forked = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 1)
    monkeypatch.setattr(torch.random, 'fork_rng', lambda gpus: forked.append(gpus) or nullcontext())
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', not deterministic)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', deterministic)
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', '')
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG')
    before = surroundings()
    with suppress(KeyboardInterrupt), ddpm.seeded(3, deterministic):
        settings = surroundings()[0]
        assert settings[:4] == (True, deterministic, not deterministic, deterministic)
        assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'  # cuBLAS asks for it
        raise KeyboardInterrupt
    assert forked == [[1]] and surroundings()[0] == before[0]
