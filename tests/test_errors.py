"""Bad settings, checkpoints and losses: one clear line each, and nothing lost."""

import inspect
import io
import math
import os
import pickle
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, few_images
from conftest import TINY as TRAINING

import ddpm

NAN, INF = math.nan, math.inf
UNET = dict(Channels=[4, 8], Attentions=[False] * 2, Upscales=[False, True], num_groups=4)
TINY = {**TRAINING, 'unet': UNET}


# ---- Settings ---------------------------------------------------------------------------------

SETTINGS = {  # name: kind, limits, values outside them, values of another kind
    'batch_size': ('int', ', at least 1', [0, True], [2.5, '4', np.int64(4)]),
    'num_epochs': ('int', ', at least 1', [0, -1], [INF]),
    'num_time_steps': ('int', ', at least 2', [1], []),
    'lr': ('float', ' from 0 to 1', [NAN, INF, -1e-3, 1.5, True], ['2e-5']),
    'ema_decay': ('float', ' from 0 to 1', [1.1, NAN], []),
    'beta2': ('float', ' from 0 to 0.999999', [1.0, -0.1], []),
    'lr_decay': ('bool', '', [], [1, np.True_]),
    'seed': ('int', ' from -1 to 4294967295', [-2, 2**32], [1.0]),
    'save_minutes': ('float', ', at least 0', [NAN, INF, -1], []),
    'sample_every': ('float', ', at least 0', [-1], [None]),
    'image_size': ('int', ', at least 1', [0], [32.0, None]),
    'checkpoint_path': ('str or Path or NoneType', '', [''], [5]),
    'dataset': ('str or Path', '', [''], [5, None]),
    'unet': ('dict or NoneType', '', [], ['abc', 5, [8, 16]]),
}
TOO_MANY = 'at most 12, the number of images, and a multiple of that of processes'
WRONG = [('batch_size', 13, TOO_MANY)] + [
    (name, value, kind + limits * (value in outside))
    for name, (kind, limits, outside, others) in SETTINGS.items()
    for value in outside + others
]


@pytest.mark.parametrize('name, value, wanted', WRONG)
def test_a_wrong_setting_is_named_before_any_work(workdir, name, value, wanted):
    with pytest.raises(ddpm.UserError) as caught:
        ddpm.train(**{**TINY, name: value})
    assert str(caught.value) == f'{name} is {value!r}, but must be {wanted}'
    assert not list(workdir.iterdir())


def test_settings_at_the_ends_of_their_ranges_are_good():
    least = dict(num_time_steps=2, lr=0, ema_decay=0, beta2=0, save_minutes=0, sample_every=0)
    most = dict(lr=1, ema_decay=1, beta2=0.999999, seed=2**32 - 1, num_epochs=10**400)
    for settings in (least, most, dict(seed=-1, batch_size=1, dataset=Path('MNIST'), unet={})):
        ddpm.check_arguments(ddpm.train, settings)


def test_an_argument_of_ones_own_needs_no_entry():
    def train(p_uncond: float = 0.1, num_classes: int = 10, guidance=None):
        pass

    good = [('p_uncond', value) for value in (0, 0.1, 7, np.float64(0.1))]
    for name, value in [*good, ('num_classes', 1), ('guidance', [NAN])]:
        ddpm.check_arguments(train, {name: value})
    bad = [('p_uncond', value, 'float, at least 0') for value in (-0.1, NAN, INF, True)]
    for name, value, wanted in [*bad, ('num_classes', 0, 'int, at least 1')]:
        with pytest.raises(ddpm.UserError, match=f'^{name} is {value!r}, but must be {wanted}$'):
            ddpm.check_arguments(train, {name: value})


def test_values_of_numpy_become_plain_ones_and_the_run_is_resumed(workdir, monkeypatch):
    """np.False_ must not become the string 'False', which is true."""
    attentions = [np.bool_(attention) for attention in SMALL['Attentions']]
    unet = {**SMALL, 'Attentions': attentions, 'Channels': np.array(SMALL['Channels'])}
    unet |= dict(num_groups=np.int64(4), dropout_prob=np.float64(0.1))
    ddpm.train(**{**TINY, 'unet': unet, 'lr': np.float64(1e-3), 'num_epochs': 1})
    saved = ddpm.load_checkpoint('checkpoints/tiny')
    assert {**saved['unet'], **SMALL} == saved['unet']
    assert {name.split('.')[1] for name in saved['ema'] if 'attention' in name} == {'Layer2'}
    monkeypatch.setattr(ddpm, 'lr_schedule', lambda *_: torch.tensor(0.5))  # an edited one
    ddpm.train(**{**TINY, 'unet': SMALL, 'lr_decay': True})
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 6


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(channels=[8, 16]), "unexpected keyword argument 'channels'"),
        (dict(num_groups=7), 'must be divisible by num_groups'),
        (dict(num_heads=3), 'Shape mismatch'),
        (dict(Channels=[8, 16, 32, 64]), 'RuntimeError'),
        (dict(Attentions=[False]), 'Layer2'),
        (dict(dropout_prob=1.5), 'dropout probability'),
        (dict(input_channels=3), "the data .* want {'input_channels': 1"),
        (dict(output_channels=2), "the data .* want .*'output_channels': 1"),
        (dict(time_steps=30), "num_time_steps want .*'time_steps': 20"),
    ],
)
def test_a_unet_that_does_not_fit_is_refused(workdir, changes, words):
    with pytest.raises(ddpm.UserError, match=rf'^unet does not fit \(.*{words}') as caught:
        ddpm.train(**{**TINY, 'unet': {**SMALL, **changes}})
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 400
    assert 'Channels [C, 2C, 4C, 8C, 8C, 6C] do' in str(caught.value)
    assert not list(workdir.iterdir())


def test_a_unet_may_compute_with_the_times(workdir, monkeypatch):
    forward = lambda self, x, t: self.output_conv.bias * t[:, None, None, None] / 20 + x  # noqa: E731
    monkeypatch.setattr(ddpm.UNET, 'forward', forward)
    ddpm.train(**{**TINY, 'num_epochs': 1})


def test_a_size_that_the_unet_cannot_halve_is_refused(workdir, monkeypatch):
    monkeypatch.setattr(ddpm, 'load_images', lambda *_: few_images()[..., :31, :31].contiguous())
    with pytest.raises(ddpm.UserError, match='^unet does not fit .*a multiple of 8$'):
        ddpm.train(**TINY)


# ---- Checkpoints ------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    """The bytes of a good checkpoint of the settings TINY, two epochs of six done."""
    folder = tmp_path_factory.mktemp('good')
    with pytest.MonkeyPatch.context() as patches:
        patches.chdir(folder)
        patches.setattr(ddpm, 'load_images', few_images)
        ddpm.train(**TINY)
    return (folder / 'checkpoints/tiny').read_bytes()


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ('hacked',))


def written(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def edited(good, statement):
    """The bytes of a checkpoint after a statement about its entries."""
    state = torch.load(io.BytesIO(good))
    exec(statement, globals(), {'state': state, **state})
    return written(state)


def flipped(good):
    """One bit flipped in a tensor."""
    mark = "state['x'] = torch.tensor([*b'a mark in it'], dtype=torch.uint8)"
    return edited(good, mark).replace(b'a mark in it', b'a mark in iu')


BROKEN = {  # for training and for sampling: what is done to it, and what is said of it
    'truncated': (lambda good: good[: len(good) // 2], None),
    'truncated at the end': (lambda good: good[:-1], None),
    'empty': (lambda good: b'', None),
    'text': (lambda good: b'the digits are in the other file\n', None),
    'code in a bare pickle': (lambda good: pickle.dumps(Bomb()), None),
    'a whole module': (lambda good: written(torch.nn.Linear(2, 2)), None),
    'a list': (lambda good: written([1, 2]), None),
    'a flipped bit': (flipped, 'is damaged'),
    'code': ("state['x'] = Bomb()", None),
    'no average': ("del state['ema']", 'no entry ema'),
    'a weight more': ("ema['module.x'] = torch.zeros(1)", 'Unexpected key'),
    'a weight less': ("del ema['module.output_conv.bias']", 'Missing key'),
    'another shape': ("ema['module.output_conv.bias'] = torch.zeros(2)", 'size mismatch'),
    'NaN': ("ema['module.output_conv.bias'] *= NAN", 'ema is not finite'),
    'no tensor': ("ema['module.output_conv.bias'] = 'x'", None),
}
ONLY_TO_SAMPLE = {  # which needs nothing but the EMA weights
    'no weights': ("del state['weights']", 'no entry weights'),
    'no optimizer': ("del state['optimizer'], state['weights']", 'no entry weights, optimizer'),
    'a weight less': ("del weights['output_conv.bias']", 'Missing key'),
    'NaN': ("weights['output_conv.bias'] *= NAN", 'weights is not finite'),
    'moment shape': ("optimizer['state'][3]['exp_avg'] = torch.zeros(1)", None),
    'a string for the step': ("optimizer['state'][3]['step'] = 'x'", None),
    'three steps': ("optimizer['state'][3]['step'] = torch.ones(3)", None),
    'a string for the losses': ("state['losses'] = 'abc'", None),
}


def put(content):
    Path('checkpoints').mkdir()
    Path('checkpoints/tiny').write_bytes(content)


def go_on():
    ddpm.train(**{**TINY, 'num_epochs': 3})


def load():
    return ddpm.load_model('checkpoints/tiny')


def assert_refused(use, words):
    """In one line, and the file is left alone."""
    path = Path('checkpoints/tiny')
    before = path.read_bytes()
    with pytest.raises(ddpm.UserError, match=words) as caught:
        use()
    assert str(caught.value).startswith(f'{path} is not a usable checkpoint (')
    assert str(caught.value).endswith(': to start afresh, move it away or change checkpoint_path')
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 400
    assert path.read_bytes() == before
    assert set(os.listdir('checkpoints')) <= {'tiny', 'tiny.lock'} and not Path('hacked').exists()


@pytest.mark.parametrize('how, words', BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_and_left_alone(workdir, good, how, words):
    put(edited(good, how) if isinstance(how, str) else how(good))
    assert_refused(go_on, words)
    assert_refused(lambda: ddpm.inference('checkpoints/tiny'), words)
    assert not Path('outputs').exists()


@pytest.mark.parametrize('statement, words', ONLY_TO_SAMPLE.values(), ids=ONLY_TO_SAMPLE)
def test_what_cannot_be_trained_on_can_be_sampled_from(workdir, good, statement, words):
    put(edited(good, statement))
    assert_refused(go_on, words)
    bias = torch.load(io.BytesIO(good))['ema']['module.output_conv.bias']
    assert torch.equal(load().output_conv.bias, bias)


def test_names_are_those_without_wrappers(workdir, good):
    """Of DistributedDataParallel and torch.compile; what only sounds like them stays."""
    names = [*torch.load(io.BytesIO(good))['ema'], 'module.time_module.x']
    more = "ema['module.time_module.x'] = ema['module.output_conv.bias']\n"
    wrap = "state['ema'] = {f'module._orig_mod.{name}': value for name, value in ema.items()}"
    put(edited(good, more + wrap))
    assert [*ddpm.load_checkpoint('checkpoints/tiny')['ema']] == names


class Half(ddpm.DDPM_Scheduler):
    def __init__(self, num_time_steps=1000):
        super().__init__(num_time_steps)
        self.beta = self.beta / 2
        self.alpha = torch.cumprod(1 - self.beta, dim=0)


def test_weights_of_another_noise_schedule_are_refused(workdir, good, monkeypatch):
    """Also those of the article, whose file does not hold its linear schedule."""
    articles, words = edited(good, "del state['beta']"), 'its noise schedule is not that of DDPM'
    put(good)
    with monkeypatch.context() as patches:
        patches.setattr(ddpm, 'DDPM_Scheduler', Half)
        for content in (good, articles):
            Path('checkpoints/tiny').write_bytes(content)
            assert_refused(go_on, words)
            assert_refused(load, words)
        Path('checkpoints/tiny').unlink()
        ddpm.train(**TINY)
        go_on()
        load()
    assert_refused(go_on, words)
    assert_refused(load, words)
    Path('checkpoints/tiny').write_bytes(articles)
    load()
    go_on()
    assert torch.equal(torch.load('checkpoints/tiny')['beta'], torch.linspace(1e-4, 0.02, 20))


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(batch_size=3), 'batch_size=4, this one has 3'),
        (dict(seed=2), 'seed=1, this one has 2'),
        (dict(num_time_steps=30), 'num_time_steps=20, this one has 30'),
        (dict(unet={**UNET, 'num_groups': 2}), 'num_groups=4, this one has 2'),
        (dict(unet={**UNET, 'Channels': [8, 16]}), r'Channels=\[4, 8\], this one has \[8, 16\]'),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(workdir, good, changes, words):
    put(good)
    told = f'^checkpoints/tiny is from a run with {words}: put it back, or change checkpoint_path$'
    with pytest.raises(ddpm.UserError, match=told):
        ddpm.train(**{**TINY, 'num_epochs': 6, **changes})
    assert Path('checkpoints/tiny').read_bytes() == good


def test_what_cannot_be_sampled_is_told_before_any_work(workdir, good):
    put(good)
    for settings, words in [
        (dict(num_time_steps=30), 'num_time_steps is 30, but checkpoints/tiny was trained with 20'),
        (dict(num_steps=21), 'num_steps is 21, but must be from 1 to 20'),
        (dict(num_images=0), 'num_images is 0, but must be int, at least 1'),
        (dict(checkpoint_path='nowhere'), 'there is no checkpoint nowhere: train first'),
    ]:
        with pytest.raises(ddpm.UserError, match=f'^{words}$'):
            ddpm.inference(**{'checkpoint_path': 'checkpoints/tiny', **settings})
    assert os.listdir() == ['checkpoints']


def test_where_a_checkpoint_cannot_be(workdir):
    Path('a file').write_text('')
    for path in ('/proc/no/such/checkpoint', 'a file/checkpoint'):
        told = rf'^another run uses {path}, or it cannot be written \(.*: change checkpoint_path$'
        with pytest.raises(ddpm.UserError, match=told):
            ddpm.train(**{**TINY, 'checkpoint_path': path})
    Path('checkpoints/tiny').mkdir(parents=True)
    for use in (go_on, load):
        with pytest.raises(ddpm.UserError, match='^checkpoints/tiny is not a usable checkpoint'):
            use()


# ---- Divergence -------------------------------------------------------------------------------


def test_a_learning_rate_that_is_too_high_diverges(workdir, monkeypatch):
    """In a run of any length: the losses alone of this one would be 24 PB."""
    monkeypatch.setattr(ddpm, 'COMPILE_FROM', math.inf)
    told = r'^training has diverged at step 100 \(loss .*, at first 1\.\d*\): lower lr$'
    with pytest.raises(ddpm.UserError, match=told):
        ddpm.train(**{**TINY, 'lr': 1.0, 'num_epochs': 10**15})


def test_weights_that_are_not_finite_are_not_saved(workdir, good, monkeypatch):
    def spoil(model, *_):
        model.output_conv.bias.data.fill_(NAN)
        return model.shallow_conv.bias.sum()

    put(good)
    monkeypatch.setattr(ddpm, 'diffusion_loss', spoil)
    told = r'^training has diverged at step 7 \(weights are not finite\): lower lr$'
    with pytest.raises(ddpm.UserError, match=told):
        ddpm.train(**{**TINY, 'num_epochs': 3, 'save_minutes': 0})
    assert Path('checkpoints/tiny').read_bytes() == good


COURSES = {  # the first loss, those of the steps up to 150, those after; the step that ends the run
    'summed over the pixels': (1000, 400, 187, None),
    'of a small target': (1e-3, 4e-4, 2e-4, None),
    'good weights, a lucky first batch': (0.004, 0.012, 0.012, None),
    'nothing is learned': (1, 1.05, 1.05, None),
    'half the way back': (1, 0.3, 0.7, None),
    'far above the first': (1, 2.5, 2.5, 100),
    'back at the first': (1, 0.3, 0.8, 300),
    'back, on another scale': (1000, 300, 900, 300),
    'the first overflows': (NAN, 0.3, 0.8, 300),
    'all but the first overflow': (1, NAN, NAN, 200),
}


@pytest.mark.parametrize('first, then, later, end', COURSES.values(), ids=COURSES)
def test_a_run_is_judged_by_its_own_first_loss(workdir, first, then, later, end):
    defaults = {k: p.default for k, p in inspect.signature(ddpm.train).parameters.items()}
    run = ddpm.Run(defaults | TINY, few_images())
    run.parts = {'weights': torch.nn.Linear(1, 1)}
    run.losses = torch.tensor([first] + [then] * 149 + [later] * 150)
    for run.step in range(100, (end or 300) + 1, 100):
        told = pytest.raises(ddpm.UserError, match=f'diverged at step {end} ')
        with told if run.step == end else nullcontext():
            run.check()


def test_a_run_that_was_resumed_diverges_too(workdir, monkeypatch):
    values = iter([1.28] + [0.3] * 149 + [0.9] * 90 + [1.0] * 60)
    loss = lambda model, *_: 0 * model.output_conv.bias.sum() + next(values)  # noqa: E731
    monkeypatch.setattr(ddpm, 'diffusion_loss', loss)
    ddpm.train(**{**TINY, 'num_epochs': 80})  # of three steps
    saved = Path('checkpoints/tiny').read_bytes()
    told = r'at step 300 \(loss 1, at first 1.28\)'
    with pytest.raises(ddpm.UserError, match=told):
        ddpm.train(**{**TINY, 'num_epochs': 100})
    assert Path('checkpoints/tiny').read_bytes() == saved


# ---- The program ------------------------------------------------------------------------------


def test_what_can_be_mended_is_one_line_and_other_errors_are_not():
    long = ddpm.UserError(f'{"allocated " * 30}: mend it')
    for error in (long, OSError(28, 'No space'), torch.OutOfMemoryError('CUDA out of memory')):
        with pytest.raises(SystemExit) as end, ddpm.errors_in_one_line():
            raise error
        assert end.value.code == f'ddpm.py: {error}'  # which Python prints, and exits with 1
    with pytest.raises(ZeroDivisionError), ddpm.errors_in_one_line():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    'flag, name, change, told',
    [
        ('--preview', 'AFTER_TRAINING', dict(num_images=0), 'num_images is 0, but must be int'),
        ('--preview', 'AFTER_TRAINING', dict(steps=8), "inference takes no 'steps', only check"),
        ('--preview', 'PREVIEW', dict(batchsize=8), "train takes no 'batchsize', only batch_si"),
        ('--full', 'FULL', dict(dataset=''), "dataset is '', but must be str or Path"),
        ('--sample', 'SAMPLE', dict(images=8), "inference takes no 'images', only checkpoint_"),
        ('--sample=', 'SAMPLE', {}, "checkpoint_path is '', but must be str or Path"),
    ],
)
def test_a_mistake_ends_the_program_before_any_work(workdir, monkeypatch, flag, name, change, told):
    monkeypatch.setattr(ddpm, name, getattr(ddpm, name) | change)
    for work in ('load_images', 'sample'):
        monkeypatch.setattr(ddpm, work, lambda *_, **__: pytest.fail('began'))
    with pytest.raises(SystemExit) as end:
        ddpm.main([flag])
    assert end.value.code.startswith(f'ddpm.py: {told}')
