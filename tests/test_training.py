"""Training as a whole: it learns, averages, resumes, and takes the article's checkpoints."""

import math
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS, SMALL, SURROUNDINGS, TINY, few_images, small_unet, surroundings
from timm.utils import ModelEmaV3

import ddpm


def load(path='checkpoints/tiny'):
    return torch.load(path, map_location='cpu', weights_only=True)


def flat(value, name=''):
    """A checkpoint as {name of the leaf: tensor or plain value}."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flat(part, f'{name}/{key}').items()}
    return {name: value}


def assert_identical(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]
        assert same, name


def test_overfits_a_digit_and_gives_it_back(workdir, monkeypatch):
    digit = few_images()[:1]
    monkeypatch.setattr(ddpm, 'load_images', lambda *_: digit.repeat(16, 1, 1, 1))
    unet = {**SMALL, 'num_groups': 8, 'Attentions': [False] * 4, 'dropout_prob': 0.0}
    numbers = dict(unet=unet, batch_size=16, num_epochs=500, lr=8e-3, num_time_steps=400)
    ddpm.train(**{**TINY, **numbers, 'ema_decay': 0.95, 'lr_decay': True})
    losses = load()['losses']
    assert losses[-50:].mean() < losses[:5].mean() / 25

    model, truth = ddpm.load_model('checkpoints/tiny'), ddpm.to_input(digit)
    for num_steps in (400, 30):
        out = ddpm.sample(model, 8, num_steps, seed=0)
        distance = (out - truth).square().mean((1, 2, 3))  # (8,)
        assert distance.median() < 0.25 * truth.square().mean()


def moving_average(decays, average, weights):
    """For each parameter, in float64: decay * average + (1 - decay) * weights, one step after the
    other."""
    average = {name: value.double() for name, value in average.items()}
    for decay, now in zip(decays, weights, strict=True):
        for name in average:
            average[name] = decay * average[name] + (1 - decay) * now[name].double()
    return average


def assert_is_the_average(average, expected):
    for name, value in average.items():
        torch.testing.assert_close(value.double(), expected[name.removeprefix('module.')])


def test_ema_is_the_closed_form(workdir):
    """Of the weights after steps 0, 1, .., each an epoch of its own: the decay of step n is
    n / (n + 10), which forgets the random start at once, until it reaches ema_decay."""
    weights = []
    for epochs in range(1, 6):
        ddpm.train(**{**TINY, 'num_epochs': epochs, 'batch_size': 12, 'ema_decay': 0.2})
        weights.append(load()['weights'])
    ddpm.set_seed(1)
    start = ddpm.UNET(**{**SMALL, 'time_steps': 20}).state_dict()
    assert not torch.equal(start['output_conv.weight'], weights[0]['output_conv.weight'])
    decays = [0, 1 / 11, 2 / 12, 0.2, 0.2]
    assert_is_the_average(load()['ema'], moving_average(decays, start, weights))


@pytest.mark.parametrize('ema_decay', [0.2, 0.9999])
def test_ema_is_resumed_bit_for_bit(workdir, ema_decay):
    """Stopped after the steps 3, 6 and 9 of 12, while it warms up and after that."""
    numbers = {**TINY, 'ema_decay': ema_decay}
    ddpm.train(**{**numbers, 'num_epochs': 4})
    for epochs in (1, 2, 3, 4):
        ddpm.train(**{**numbers, 'num_epochs': epochs, 'checkpoint_path': 'checkpoints/parts'})
    assert_identical(load(), load('checkpoints/parts'))


def test_weights_after_a_step_are_adams(workdir, float32):
    """One epoch of one step: against torch's plain Adam on a loss computed here."""
    unet = {**SMALL, 'dropout_prob': 0.0}
    ddpm.train(**{**TINY, 'unet': unet, 'num_epochs': 1, 'batch_size': 12})
    ddpm.set_seed(1)
    model = ddpm.UNET(**{**unet, 'time_steps': 20})
    images = ddpm.to_input(few_images())
    shuffle = torch.Generator().manual_seed(ddpm.fold_in(1, 0, 0))
    draws = torch.Generator().manual_seed(ddpm.fold_in(1, 1, 0))
    x = images[torch.randperm(12, generator=shuffle)]
    t = torch.randint(20, (12,), generator=draws)
    eps = torch.randn(x.shape, generator=draws)
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 20), 0)[t][:, None, None, None]
    loss = (model(alpha**0.5 * x + (1 - alpha) ** 0.5 * eps, t) - eps).square().mean()
    loss.backward()
    assert load()['losses'].item() == pytest.approx(loss.item(), rel=1e-5)
    for name, value in model.named_parameters():
        moment = 0.1 * value.grad, 0.001 * value.grad**2
        step = 1e-3 * (moment[0] / 0.1) / ((moment[1] / 0.001).sqrt() + 1e-8)
        clear = value.grad.abs() > 1e-4  # elsewhere Adam's first step hangs on rounding
        torch.testing.assert_close(
            load()['weights'][name][clear], (value - step)[clear], rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_are_those_of_float32(monkeypatch, half):
    """From the same weights, images, noise and dropout masks."""
    torch.manual_seed(1)
    x, eps, t = torch.rand(4, 1, 32, 32), torch.randn(4, 1, 32, 32), torch.tensor([0, 9, 300, 999])
    gradients = []
    for dtype in (None, half):
        monkeypatch.setattr(ddpm, 'half_precision', lambda device, dtype=dtype: dtype)
        model = ddpm.UNET(**SMALL)
        model.load_state_dict(small_unet().state_dict())
        torch.manual_seed(0)
        ddpm.diffusion_loss(model, ddpm.DDPM_Scheduler(), x, t, eps).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact, rough = gradients
    assert 0 < (rough - exact).norm() < 0.03 * exact.norm()


def test_compiled_training_is_the_same(workdir, monkeypatch, float32, capsys):
    # compiled code draws other dropout masks; two layers compile in half the time of four
    two = dict(Channels=[8, 16], Attentions=[False, True], Upscales=[False, True])
    numbers = {**TINY, 'unet': {**SMALL, **two, 'dropout_prob': 0.0}, 'num_epochs': 20}
    curves = []
    for name, compile_from in (('plain', 61), ('compiled', 60)):
        monkeypatch.setattr(ddpm, 'COMPILE_FROM', compile_from)
        ddpm.train(**{**numbers, 'checkpoint_path': name})
        curves.append(load(name)['losses'])
    if 'does not work' in capsys.readouterr().out:
        pytest.skip('no compiler here')
    assert not torch.equal(*curves)
    torch.testing.assert_close(*curves, rtol=0.01, atol=0)


def test_without_a_compiler_training_goes_on(workdir, monkeypatch, capsys):
    monkeypatch.setattr(ddpm, 'COMPILE_FROM', 0)

    def broken(model, *_, **__):
        def call(*_):
            raise RuntimeError('no C++ compiler\nfound')

        model._compiled_call_impl = call

    monkeypatch.setattr(ddpm.UNET, 'compile', broken)
    ddpm.train(**TINY)
    assert 'does not work here (no C++ compiler found)' in capsys.readouterr().out
    assert len(load()['losses']) == 6


def test_the_course_of_the_learning_rate(workdir, monkeypatch):
    seen = []
    step = torch.optim.Adam.step

    def spy(optimizer):
        seen.append(optimizer.param_groups[0]['lr'])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, 'step', spy)
    ddpm.train(**{**TINY, 'checkpoint_path': 'constant'})
    assert set(seen) == {1e-3}  # the article's
    seen.clear()
    ddpm.train(**{**TINY, 'lr_decay': True})
    assert seen == pytest.approx([1e-6, *(1e-3 * left / 6 for left in (5, 4, 3, 2, 1))])


def test_an_epoch_shows_every_image_once(workdir, monkeypatch):
    seen = []
    to_input = ddpm.to_input
    monkeypatch.setattr(ddpm, 'to_input', lambda x: seen.append(x) or to_input(x))
    ddpm.train(**{**TINY, 'num_epochs': 2})
    assert len(seen) == 6
    epochs = [torch.cat(seen[:3]), torch.cat(seen[3:])]
    for epoch in epochs:
        keys = sorted(bytes(image.flatten().tolist()) for image in epoch)
        assert keys == sorted(bytes(image.flatten().tolist()) for image in few_images())
    assert not torch.equal(*epochs)  # in another order


def test_images_are_scaled():
    images = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8)
    x = ddpm.to_input(images)
    assert x.shape == (2, 1, 28, 28) and x.dtype == torch.float32
    torch.testing.assert_close(x.double(), images.double() / 255, rtol=1e-6, atol=0)
    assert torch.equal(ddpm.to_uint8(x), images)


def test_the_epoch_line_is_the_mean_of_the_batches(workdir, capsys):
    ddpm.train(**TINY)
    losses = load()['losses']
    assert losses.shape == (6,)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('Epoch')]
    assert lines == [
        f'Epoch {i + 1} | Loss {losses[3 * i : 3 * i + 3].mean().item():.5f}' for i in range(2)
    ]


def test_the_last_partial_batch_is_dropped(workdir):
    ddpm.train(**{**TINY, 'batch_size': 5})
    assert load()['losses'].shape == (4,)


def test_resumed_at_an_epoch_is_the_same_as_never_stopped(workdir):
    ddpm.train(**{**TINY, 'num_epochs': 3})
    for epochs in (1, 2, 3):
        ddpm.train(**{**TINY, 'num_epochs': epochs, 'checkpoint_path': 'checkpoints/parts'})
    assert_identical(load(), load('checkpoints/parts'))


def test_a_checkpoint_from_before_steps_were_counted_is_resumed(workdir):
    """Its losses are as many as Adam's steps: none came before."""
    ddpm.train(**TINY)
    state = load()
    del state['steps_before']
    torch.save(state, 'older')
    for path in ('checkpoints/tiny', 'older'):
        ddpm.train(**{**TINY, 'num_epochs': 3, 'checkpoint_path': path})
    assert_identical(load(), load('older'))


def test_seeds_differ_and_repeat(workdir):
    for name, seed in (('a', 1), ('b', 1), ('c', 2), ('d', -1)):
        ddpm.train(**{**TINY, 'num_epochs': 1, 'seed': seed, 'checkpoint_path': name})
    assert_identical(load('a'), load('b'))
    assert not torch.equal(load('a')['losses'], load('c')['losses'])
    assert load('d')['config']['seed'] >= 0
    ddpm.train(**{**TINY, 'seed': -1, 'checkpoint_path': 'd'})  # goes on with the seed drawn
    assert len(load('d')['losses']) == 6


def test_a_finished_run_trains_no_more(workdir):
    ddpm.train(**TINY)
    before = Path('checkpoints/tiny').read_bytes()
    ddpm.train(**TINY)
    ddpm.train(**{**TINY, 'num_epochs': 1})
    assert Path('checkpoints/tiny').read_bytes() == before


def test_changed_numbers_are_taken_up_and_said(workdir, capsys):
    ddpm.train(**{**TINY, 'num_epochs': 1})
    ddpm.train(**{**TINY, 'lr': 1e-4, 'ema_decay': 0.75, 'beta2': 0.95})
    out = capsys.readouterr().out
    assert 'lr was 0.001, is 0.0001 from here on' in out
    assert 'ema_decay was 0.5, is 0.75 from here on' in out
    group = load()['optimizer']['param_groups'][0]
    assert group['lr'] == 1e-4 and group['betas'] == (0.9, 0.95)
    assert len(load()['losses']) == 6


def article_checkpoint(path, unet=SMALL):
    """What the article's code writes: weights, optimizer and ema of its default UNET."""
    torch.manual_seed(0)
    model = ddpm.UNET(**{**unet, 'time_steps': 20})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-5)
    ema = ModelEmaV3(model, decay=0.9999)
    model(torch.randn(1, 1, 32, 32), [0]).square().mean().backward()
    optimizer.step()
    ema.update(model)
    state = dict(weights=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.state_dict())
    Path(path).parent.mkdir(exist_ok=True)
    torch.save(state, path)
    return state


@pytest.fixture
def small_article(monkeypatch):
    """The article's UNET is a small one."""
    defaults = {**ddpm.UNET_DEFAULTS, **SMALL, 'time_steps': 20}
    monkeypatch.setattr(ddpm, 'UNET_DEFAULTS', defaults)


def test_an_article_checkpoint_is_resumed_and_sampled(workdir, small_article):
    state = article_checkpoint('checkpoints/tiny')
    ddpm.inference('checkpoints/tiny', num_time_steps=20, num_steps=3)
    assert Path('outputs/tiny/grid.png').exists()
    assert_identical(load(), state)
    ddpm.train(**{**TINY, 'num_epochs': 1, 'lr': 1e-12})
    assert len(load()['losses']) == 3
    assert load()['optimizer']['state'][0]['step'] == 4  # one of the article's, three more
    for name, value in state['weights'].items():
        torch.testing.assert_close(load()['weights'][name], value)


@pytest.mark.parametrize('steps', [3, 37])
def test_an_article_checkpoint_goes_on_with_its_average(workdir, small_article, steps):
    """Adam has counted its steps, and so the decay goes on at n = steps."""
    state = article_checkpoint('checkpoints/tiny')
    for entry in state['optimizer']['state'].values():
        entry['step'] = torch.tensor(float(steps))
    torch.save(state, 'checkpoints/tiny')
    numbers = {**TINY, 'batch_size': 12, 'ema_decay': 0.9999}
    weights = []
    for epochs in (1, 2, 3):
        ddpm.train(**{**numbers, 'num_epochs': epochs})
        weights.append(load()['weights'])
    start = {name.removeprefix('module.'): value for name, value in state['ema'].items()}
    decays = [n / (n + 10) for n in range(steps, steps + 3)]
    assert_is_the_average(load()['ema'], moving_average(decays, start, weights))

    torch.save(state, 'checkpoints/once')
    ddpm.train(**{**numbers, 'num_epochs': 3, 'checkpoint_path': 'checkpoints/once'})
    assert_identical(load(), load('checkpoints/once'))


@pytest.mark.parametrize(
    'prefix', ['module.', '_orig_mod.', 'module._orig_mod.', 'module.module.', '_orig_mod.module.']
)
def test_what_wrapped_the_weights_does_not_matter(workdir, prefix):
    """DistributedDataParallel, torch.compile and both put words before the names."""
    ddpm.train(**{**TINY, 'num_epochs': 1})
    saved = load()
    ddpm.train(**TINY)
    saved['weights'] = {f'{prefix}{name}': value for name, value in saved['weights'].items()}
    saved['ema'] = {
        f'module.{prefix}{name.removeprefix("module.")}': value
        for name, value in saved['ema'].items()
    }
    torch.save(saved, 'checkpoints/wrapped')
    ddpm.train(**{**TINY, 'checkpoint_path': 'checkpoints/wrapped'})
    assert_identical(load(), load('checkpoints/wrapped'))


def test_an_article_checkpoint_trains_on_as_plain_adam_would(workdir, monkeypatch, float32):
    """Its moments are contiguous, the parameters here channels_last: they must find each other."""
    unet = {**SMALL, 'dropout_prob': 0.0}
    defaults = {**ddpm.UNET_DEFAULTS, **unet, 'time_steps': 20}
    monkeypatch.setattr(ddpm, 'UNET_DEFAULTS', defaults)
    state = article_checkpoint('checkpoints/tiny', unet)
    for entry in state['optimizer']['state'].values():
        entry['step'] = int(entry['step'])  # as older versions of torch wrote it
    torch.save(state, 'checkpoints/tiny')
    ddpm.train(**{**TINY, 'unet': unet, 'num_epochs': 1, 'batch_size': 12, 'seed': 1})

    model = ddpm.UNET(**{**unet, 'time_steps': 20})
    model.load_state_dict(state['weights'])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False)
    groups = optimizer.state_dict()['param_groups']
    optimizer.load_state_dict({**state['optimizer'], 'param_groups': groups})
    shuffle = torch.Generator().manual_seed(ddpm.fold_in(1, 0, 0))
    draws = torch.Generator().manual_seed(ddpm.fold_in(1, 1, 0))
    x = ddpm.to_input(few_images())[torch.randperm(12, generator=shuffle)]
    t = torch.randint(20, (12,), generator=draws)
    eps = torch.randn(x.shape, generator=draws)
    ddpm.diffusion_loss(model, ddpm.DDPM_Scheduler(20), x, t, eps).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(load()['weights'][name], value, rtol=0, atol=3e-5)


@pytest.fixture
def float16(monkeypatch):
    """What a T4 does, on the CPU: autocast to float16 and a gradient scaler."""
    monkeypatch.setattr(ddpm, 'half_precision', lambda device: torch.float16)


def test_float16_is_resumed_bit_for_bit(workdir, float16):
    ddpm.train(**{**TINY, 'num_epochs': 3})
    for epochs in (1, 2, 3):
        ddpm.train(**{**TINY, 'num_epochs': epochs, 'checkpoint_path': 'checkpoints/parts'})
    assert load()['scaler']['_growth_tracker'] == 9
    assert_identical(load(), load('checkpoints/parts'))


def test_a_checkpoint_moves_between_float16_and_none(workdir, monkeypatch):
    for epochs, half in ((1, torch.float16), (2, None), (3, torch.float16)):
        monkeypatch.setattr(ddpm, 'half_precision', lambda device, half=half: half)
        ddpm.train(**{**TINY, 'num_epochs': epochs})
        assert bool(load()['scaler']) == (half is not None)
    assert len(load()['losses']) == 9


@pytest.mark.parametrize('factor', [math.inf, math.nan])
@pytest.mark.parametrize('step', [0, 1, 3])
def test_an_overflow_of_float16_is_a_skipped_step_and_no_divergence(
    workdir, float16, monkeypatch, step, factor
):
    """Recorded with the loss of the step before (of predicting nothing, where there is none), so
    that the run can also be resumed without float16."""
    loss, calls = ddpm.diffusion_loss, []

    def overflows_once(*arguments):
        calls.append(1)
        return loss(*arguments) * (factor if len(calls) == step + 1 else 1)

    monkeypatch.setattr(ddpm, 'diffusion_loss', overflows_once)
    ddpm.train(**TINY)
    losses = load()['losses']
    assert losses.isfinite().all() and len(losses) == 6
    assert losses[step] == (losses[step - 1] if step else 1)
    assert len(set(losses.tolist())) == (5 if step else 6)
    assert load()['optimizer']['state'][0]['step'] == 5
    assert load()['scaler']['scale'] == 32768
    monkeypatch.setattr(ddpm, 'half_precision', lambda device: None)
    ddpm.train(**{**TINY, 'num_epochs': 3})
    assert torch.equal(load()['losses'][:6], losses) and len(load()['losses']) == 9


def test_a_run_that_overflows_float16_at_every_step_has_diverged(workdir, float16, monkeypatch):
    ddpm.train(**TINY)
    before, loss = load(), ddpm.diffusion_loss
    monkeypatch.setattr(ddpm, 'diffusion_loss', lambda *a: loss(*a) * math.nan)
    with pytest.raises(ddpm.UserError, match='training has diverged'):
        ddpm.train(**{**TINY, 'num_epochs': 12})
    assert_identical(load(), before)


@pytest.mark.parametrize('scale', [math.nan, 0.0, -1.0, math.inf])
def test_a_scale_that_is_no_scale_is_refused(workdir, float16, scale):
    ddpm.train(**TINY)
    saved = load()
    saved['scaler']['scale'] = scale
    torch.save(saved, 'checkpoints/tiny')
    with pytest.raises(ddpm.UserError, match='is not a usable checkpoint: .*scale'):
        ddpm.train(**{**TINY, 'num_epochs': 3})


def settings():
    """What a run sets for itself: a default dtype, a switch of attention, three signals' ends."""
    names = ('SIGINT', 'SIGTERM', 'SIGHUP')
    handlers = [signal.getsignal(getattr(signal, name, signal.SIGINT)) for name in names]
    sdp = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return torch.get_default_dtype(), sdp, modes, handlers


@pytest.mark.parametrize('kind', SURROUNDINGS)
def test_training_works_anywhere_and_puts_everything_back(workdir, monkeypatch, kind):
    ddpm.train(**{**TINY, 'checkpoint_path': 'expected', 'sample_every': 1})
    picture = Path('outputs/expected/progress/epoch_002.00.png').read_bytes()
    inside, loss = [], ddpm.diffusion_loss
    monkeypatch.setattr(ddpm, 'diffusion_loss', lambda *a: inside.append(settings()) or loss(*a))
    with surroundings(kind):
        for epochs, allowed in ((1, True), (2, False)):
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)
            before = settings()
            ddpm.train(**{**TINY, 'num_epochs': epochs, 'sample_every': 1})
            assert settings() == before
    assert len(inside) == 6
    for dtype, sdp, modes, handlers in inside:
        assert (dtype, sdp, modes) == (torch.float32, True, (True, False))
        assert handlers != before[3]
    assert_identical(load(), load('expected'))
    assert Path('outputs/tiny/progress/epoch_002.00.png').read_bytes() == picture


@pytest.mark.parametrize('kind', SURROUNDINGS)
def test_training_that_fails_puts_everything_back(workdir, monkeypatch, kind):
    inside = []

    def broken(*_):
        inside.append(settings())
        raise RuntimeError('broken')

    monkeypatch.setattr(ddpm, 'diffusion_loss', broken)
    with surroundings(kind):
        before = settings()
        with pytest.raises(RuntimeError, match='broken'):
            ddpm.train(**TINY)
        assert settings() == before and inside[0][3] != before[3]
        with pytest.raises(ddpm.UserError, match='lr is 5'):
            ddpm.train(**{**TINY, 'lr': 5.0})
        assert settings() == before


def test_the_time_to_go_does_not_count_what_comes_before_the_first_step(workdir, monkeypatch):
    """As compiling does, for a minute."""
    compiled, step_done, ends = ddpm.parallelize_and_compile, ddpm.Run.step_done, []

    def slow(*arguments):
        network = compiled(*arguments)
        ends.append(time.monotonic())
        return network

    def spy(run, loss):
        assert (run.first_step, run.began > ends[0], run.bar.start_t > 0) == (0, True, True)
        step_done(run, loss)

    monkeypatch.setattr(ddpm, 'parallelize_and_compile', slow)
    monkeypatch.setattr(ddpm.Run, 'step_done', spy)
    ddpm.train(**TINY)
    assert ends


@pytest.mark.parametrize('seconds, days', [(86400, '2.0'), (22000, '0.5'), (21500, None)])
def test_a_run_of_days_says_so(workdir, monkeypatch, capsys, seconds, days):
    """After ten steps of twelve, by the time that they took; earlier starts do not count."""
    step_done, clock = ddpm.Run.step_done, time.monotonic
    monkeypatch.setattr(time, 'monotonic', lambda: clock() + passed[0])
    passed = [0]

    def slow(run, loss):
        passed[0] += seconds
        run.next_save = math.inf
        step_done(run, loss)

    ddpm.train(**{**TINY, 'num_epochs': 1})
    monkeypatch.setattr(ddpm.Run, 'step_done', slow)
    ddpm.train(**{**TINY, 'num_epochs': 5})
    said = [line for line in capsys.readouterr().out.splitlines() if 'days to go' in line]
    assert [line.split()[0] for line in said] == [days] * (days is not None)


def test_checkpoints_move_through_weights_only_loading(workdir):
    ddpm.train(**TINY)
    saved = load()
    assert {'weights', 'optimizer', 'ema'} < saved.keys()
    assert all(key.startswith('module.') for key in saved['ema'])
    assert list(saved['weights']) == [key.removeprefix('module.') for key in saved['ema']]
    plain = {torch.Tensor, int, float, str, bool, type(None)}
    assert {type(v) for v in flat(saved).values()} <= plain


def test_on_real_mnist_the_loss_falls(workdir):
    images = ddpm.load_images('MNIST')
    assert images.shape == (60000, 1, 32, 32)
    digits = images[:, :, 2:30, 2:30]
    assert images.sum() == digits.sum()  # around them there is nothing
    assert digits.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert torch.equal(images[:100], F.pad(DIGITS, [2] * 4))
    few = images[:2560]
    ddpm.load_images, original = (lambda *_: few), ddpm.load_images
    try:
        numbers = dict(dataset='MNIST', batch_size=32, num_epochs=1, num_time_steps=1000)
        ddpm.train(**{**TINY, **numbers, 'lr': 4e-3})
    finally:
        ddpm.load_images = original
    losses = load()['losses']
    assert losses[-10:].mean() < losses[:3].mean() / 4
