"""Training as a whole: it learns, averages, resumes, and takes the article's checkpoints."""

import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, TINY, few_images, small_unet
from timm.utils import ModelEmaV3

import ddpm


def load(path='checkpoints/tiny'):
    return torch.load(path, map_location='cpu', weights_only=True)


def flat(value, name=''):
    """A checkpoint as {name of the leaf: tensor or plain value}."""
    if isinstance(value, dict | list):
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

    saved = load()
    ema = ModelEmaV3(ddpm.UNET(**saved['unet']))
    ema.load_state_dict(saved['ema'])
    x = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    truth = ddpm.to_input(digit)
    for num_steps in (400, 30):
        *_, (_, out) = ddpm.reverse_process(ema.module, x, ddpm.DDPM_Scheduler(400), num_steps)
        distance = (out - truth).square().mean((1, 2, 3))  # (8,)
        assert distance.median() < 0.25 * truth.square().mean()


def test_ema_is_the_closed_form(workdir):
    """Of the weights after 1, 2, .. steps: decay^n w_0 + (1 - decay) sum decay^(n-i) w_i."""
    weights = []
    for epochs in (1, 2):
        ddpm.train(**{**TINY, 'num_epochs': epochs, 'batch_size': 12, 'ema_decay': 0.75})
        weights.append(load()['weights'])
    ddpm.set_seed(1)
    first = ddpm.UNET(**{**SMALL, 'time_steps': 20}).state_dict()
    for name, ema in load()['ema'].items():
        name = name.removeprefix('module.')
        steps = 0.75**2 * first[name] + 0.25 * (0.75 * weights[0][name] + weights[1][name])
        torch.testing.assert_close(ema, steps)


def test_weights_after_a_step_are_adams(workdir, float32):
    """One epoch of one step: against torch's plain Adam on a loss computed here."""
    unet = {**SMALL, 'dropout_prob': 0.0}
    ddpm.train(**{**TINY, 'unet': unet, 'num_epochs': 1, 'batch_size': 12})
    ddpm.set_seed(1)
    model = ddpm.UNET(**{**unet, 'time_steps': 20})
    images = ddpm.to_input(few_images())
    shuffle = torch.Generator().manual_seed(ddpm.seed_of(1, 0, 0))
    draws = torch.Generator().manual_seed(ddpm.seed_of(1, 1, 0))
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


def test_compiled_training_is_the_same(workdir, monkeypatch, float32):
    # compiled code draws other dropout masks; two layers compile in half the time of four
    two = dict(Channels=[8, 16], Attentions=[False, True], Upscales=[False, True])
    numbers = {**TINY, 'unet': {**SMALL, **two, 'dropout_prob': 0.0}, 'num_epochs': 20}
    curves, lines = [], []
    monkeypatch.setattr(ddpm, 'print_once', lines.append)
    for name, long_run in (('plain', 61), ('compiled', 60)):
        monkeypatch.setattr(ddpm, 'LONG_RUN', long_run)
        ddpm.train(**{**numbers, 'checkpoint_path': name})
        curves.append(load(name)['losses'])
    if any('does not work' in line for line in lines):
        pytest.skip('no compiler here')
    assert not torch.equal(*curves)
    torch.testing.assert_close(*curves, rtol=0.01, atol=0)


def test_without_a_compiler_training_goes_on(workdir, monkeypatch):
    lines = []
    monkeypatch.setattr(ddpm, 'print_once', lines.append)
    monkeypatch.setattr(ddpm, 'LONG_RUN', 0)

    def broken(model, *_, **__):
        def call(*_):
            raise RuntimeError('no C++ compiler\nfound')

        model._compiled_call_impl = call

    monkeypatch.setattr(ddpm.UNET, 'compile', broken)
    ddpm.train(**TINY)
    assert [line for line in lines if 'no C++ compiler' in line and '\n' not in line]
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
    assert len(seen) == 7  # the first was asked for its shape only
    epochs = [torch.cat(seen[1:4]), torch.cat(seen[4:])]
    for epoch in epochs:
        keys = sorted(bytes(image.flatten().tolist()) for image in epoch)
        assert keys == sorted(bytes(image.flatten().tolist()) for image in few_images())
    assert not torch.equal(*epochs)  # in another order


def test_images_are_scaled_and_padded():
    images = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8)
    x = ddpm.to_input(images)
    assert x.shape == (2, 1, 32, 32)
    assert torch.equal((x[:, :, 2:30, 2:30] * 255).round().byte(), images)
    assert x.sum().item() == pytest.approx(images.sum().item() / 255, rel=1e-5)
    assert ddpm.to_input(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 3, 32, 32)


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
    assert group['lr'] == 1e-4 and group['betas'] == [0.9, 0.95]
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


def test_an_article_checkpoint_is_resumed_and_sampled(workdir, monkeypatch):
    defaults = {**ddpm.UNET_DEFAULTS, **SMALL, 'time_steps': 20}
    monkeypatch.setattr(ddpm, 'UNET_DEFAULTS', defaults)  # a small article
    state = article_checkpoint('checkpoints/tiny')
    ddpm.inference('checkpoints/tiny', num_time_steps=20, num_steps=3)
    assert Path('outputs/tiny/digits.png').exists()
    assert_identical(load(), state)
    ddpm.train(**{**TINY, 'num_epochs': 1, 'lr': 1e-12})
    assert len(load()['losses']) == 3
    assert load()['optimizer']['state'][0]['step'] == 4  # one of the article's, three more
    for name, value in state['weights'].items():
        torch.testing.assert_close(load()['weights'][name], value)


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
    shuffle = torch.Generator().manual_seed(ddpm.seed_of(1, 0, 0))
    draws = torch.Generator().manual_seed(ddpm.seed_of(1, 1, 0))
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


def test_an_overflow_of_float16_is_a_skipped_step_and_no_divergence(
    workdir, float16, monkeypatch, capsys
):
    loss, calls = ddpm.diffusion_loss, []

    def overflows_once(*arguments):
        calls.append(1)
        return loss(*arguments) * (float('inf') if len(calls) == 2 else 1)

    monkeypatch.setattr(ddpm, 'diffusion_loss', overflows_once)
    ddpm.train(**TINY)
    out = capsys.readouterr().out
    assert '| 1 steps skipped, for float16 overflowed' in out.splitlines()[0]
    assert 'skipped' not in out.splitlines()[1]
    assert load()['optimizer']['state'][0]['step'] == 5
    assert load()['scaler']['scale'] == 32768
    monkeypatch.setattr(ddpm, 'diffusion_loss', lambda *a: loss(*a) * float('nan'))
    with pytest.raises(ddpm.UserError, match='the loss is nan in epoch'):
        ddpm.train(**{**TINY, 'num_epochs': 12})


def test_the_time_to_go_does_not_count_what_comes_before_the_first_step(workdir, monkeypatch):
    """As compiling does, for a minute."""
    compiled, step_done, ends = ddpm.parallel_and_compiled, ddpm.Run.step_done, []

    def slow(*arguments):
        network = compiled(*arguments)
        ends.append(time.monotonic())
        return network

    def spy(run, loss):
        assert (run.began, run.began_at > ends[0]) == (run.done // 3 * 3, True)
        step_done(run, loss)

    monkeypatch.setattr(ddpm, 'parallel_and_compiled', slow)
    monkeypatch.setattr(ddpm.Run, 'step_done', spy)
    ddpm.train(**TINY)
    assert ends


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
    assert images.shape == (60000, 1, 28, 28)
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
    few = images[:2560]
    ddpm.load_images, original = (lambda *_: few), ddpm.load_images
    try:
        numbers = dict(dataset='MNIST', batch_size=32, num_epochs=1, num_time_steps=1000)
        ddpm.train(**{**TINY, **numbers, 'lr': 4e-3})
    finally:
        ddpm.load_images = original
    losses = load()['losses']
    assert losses[-10:].mean() < losses[:3].mean() / 4
