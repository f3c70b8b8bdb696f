"""Bad numbers, data and checkpoints: one clear line each, and nothing lost."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL, TINY, few_images, run_program

import ddpm

NAN = float('nan')


@pytest.mark.parametrize(
    'name, value',
    [
        ('batch_size', 0),
        ('batch_size', 2.5),
        ('batch_size', True),
        ('num_epochs', -1),
        ('num_epochs', 0),
        ('num_time_steps', 1),
        ('lr', NAN),
        ('lr', -1e-3),
        ('lr', '2e-5'),
        ('ema_decay', 1.1),
        ('ema_decay', NAN),
        ('seed', -2),
        ('seed', 2**32),
        ('save_minutes', NAN),
        ('sample_every', -1),
    ],
)
def test_a_number_out_of_range_is_named_before_any_work(workdir, name, value):
    with pytest.raises(ValueError, match=f'^{name} is '):
        ddpm.train(**{**TINY, name: value})
    assert not list(workdir.iterdir())


def test_other_arguments_that_cannot_be(workdir):
    with pytest.raises(ValueError, match='batch_size is 13, but Few has 12 images'):
        ddpm.train(**{**TINY, 'batch_size': 13})
    with pytest.raises(ValueError, match="unet has {'channels'}, but UNET takes only"):
        ddpm.train(**{**TINY, 'unet': {'channels': [8, 16]}})
    with pytest.raises(ValueError, match='cannot write /proc/no/such/checkpoint'):
        ddpm.train(**{**TINY, 'checkpoint_path': '/proc/no/such/checkpoint'})
    Path('file').write_text('')
    with pytest.raises(ValueError, match='cannot write file/checkpoint'):
        ddpm.train(**{**TINY, 'checkpoint_path': 'file/checkpoint'})
    with pytest.raises(ValueError, match='no checkpoint nowhere: train first'):
        ddpm.inference('nowhere')
    for name, value in (('Channels', 64), ('Attentions', False), ('Upscales', None)):
        with pytest.raises(ddpm.UserError, match=f'{name}.*{value}.* must be lists'):
            ddpm.train(**{**TINY, 'unet': {**SMALL, name: value}})
    assert not Path('checkpoints/tiny').exists()


def test_an_empty_dataset(workdir, monkeypatch):
    monkeypatch.setattr(ddpm, 'load_images', lambda *_: few_images()[:0])
    with pytest.raises(ValueError, match='batch_size is 4, but Few has 0 images'):
        ddpm.train(**TINY)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ('hacked',))


def changed(change):
    """A maker of a checkpoint that differs from a good one by `change(state)`."""

    def make(good):
        state = torch.load(io.BytesIO(good), weights_only=True)
        state = change(state) or state
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    return make


def set_entry(*names, value):
    def change(state):
        for name in names[:-1]:
            state = state[name]
        state[names[-1]] = value(state[names[-1]]) if callable(value) else value

    return changed(change)


def flipped(good):
    """One bit flipped in the middle of the largest tensor."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
    place = entry.header_offset + 300 + entry.file_size // 2
    return good[:place] + bytes([good[place] ^ 64]) + good[place + 1 :]


WEIGHT = 'Layer1.conv.weight'
BROKEN = {
    'truncated': (lambda good: good[: len(good) // 2], 'not a usable checkpoint'),
    'truncated at the end': (lambda good: good[:-1], 'not a usable checkpoint'),
    'empty': (lambda good: b'', 'not a usable checkpoint'),
    'random bytes': (lambda good: bytes(range(256)) * 40, 'not a usable checkpoint'),
    'text': (lambda good: b'the digits are in the other file\n', 'not a usable checkpoint'),
    'pickle': (lambda good: pickle.dumps({'weights': 1}), 'not a usable checkpoint'),
    'code': (changed(lambda state: {**state, 'x': Bomb()}), 'more than tensors and plain values'),
    'code in a bare pickle': (lambda good: pickle.dumps(Bomb()), 'more than tensors'),
    'a list': (changed(lambda state: [state]), 'not a usable checkpoint'),
    'no weights': (changed(lambda state: state.pop('weights') and None), 'no entry weights'),
    'no ema': (changed(lambda state: state.pop('ema') and None), 'no entry ema'),
    'no optimizer': (changed(lambda s: s.pop('optimizer') and None), 'no entry optimizer'),
    'a weight less': (
        changed(lambda s: s['weights'].pop(WEIGHT) is s),
        f'Missing key.*{WEIGHT}',
    ),
    'a weight more': (set_entry('ema', 'module.x', value=torch.zeros(1)), 'Unexpected key'),
    'shape': (
        set_entry('weights', WEIGHT, value=torch.zeros(2, 2)),
        rf'size mismatch for {WEIGHT}',
    ),
    'dtype': (set_entry('weights', WEIGHT, value=torch.Tensor.double), f'{WEIGHT} is not finite f'),
    'NaN weight': (
        set_entry('weights', WEIGHT, value=lambda w: w * NAN),
        f'{WEIGHT} is not finite',
    ),
    'NaN average': (
        set_entry('ema', f'module.{WEIGHT}', value=lambda w: w * NAN),
        f'{WEIGHT} is not finite',
    ),
    'NaN moment': (
        set_entry('optimizer', 'state', 3, 'exp_avg', value=lambda w: w * NAN),
        'exp_avg late_conv.bias is not finite',
    ),
    'an empty optimizer': (
        set_entry('optimizer', value={}),
        'its optimizer is not that of its UNET',
    ),
    'a string for the step': (
        set_entry('optimizer', 'state', 3, 'step', value='x'),
        'not a usable checkpoint',
    ),
    'a moment less': (
        changed(lambda s: s['optimizer']['state'].pop(3) is s),
        'its optimizer is not that of its UNET',
    ),
    'losses in two columns': (
        set_entry('losses', value=torch.zeros(3, 2)),
        'its losses are not float32 numbers in a row',
    ),
    'moment shape': (
        set_entry('optimizer', 'state', 3, 'exp_avg', value=torch.zeros(1)),
        'size mismatch for late_conv.bias',
    ),
    'a string for a tensor': (set_entry('weights', WEIGHT, value='x'), 'not a usable checkpoint'),
    'a string for the losses': (set_entry('losses', value='abc'), 'not a usable checkpoint'),
    'a string for the config': (set_entry('config', value='abc'), 'not a usable checkpoint'),
    'a string for the seed': (set_entry('config', 'seed', value='abc'), 'seed is'),
    'no UNET at all': (set_entry('unet', value={'Channels': []}), 'not a usable checkpoint'),
    'another UNET': (set_entry('unet', 'num_groups', value=3), 'num_groups 3 does not divide'),
    'flipped bit': (flipped, 'not a usable checkpoint'),
}


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    """The bytes of a good checkpoint of the numbers TINY, two epochs of six done."""
    folder = tmp_path_factory.mktemp('good')
    load_images, ddpm.load_images = ddpm.load_images, lambda *_: few_images()
    outputs, ddpm.OUTPUTS = ddpm.OUTPUTS, folder
    try:
        ddpm.train(**{**TINY, 'checkpoint_path': str(folder / 'tiny')})
    finally:
        ddpm.load_images, ddpm.OUTPUTS = load_images, outputs
    return (folder / 'tiny').read_bytes()


@pytest.mark.parametrize('make, words', BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_and_left_alone(workdir, good, make, words):
    path = Path('checkpoints/tiny')
    path.parent.mkdir()
    content = make(good)
    assert content != good
    path.write_bytes(content)
    for use in (
        lambda: ddpm.train(**{**TINY, 'num_epochs': 6}),
        lambda: ddpm.inference(str(path), num_time_steps=20, num_steps=3),
    ):
        with pytest.raises(ddpm.UserError, match=words) as caught:
            use()
        assert str(path) in str(caught.value)
        assert 'to start afresh' in str(caught.value)
        assert '\n' not in str(caught.value)
        assert len(str(caught.value)) < 400
    assert path.read_bytes() == content
    assert sorted(os.listdir('checkpoints')) in (['tiny'], ['tiny', 'tiny.lock'])
    assert not Path('hacked').exists()


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(batch_size=3), 'batch_size=4, this one has batch_size=3'),
        (dict(seed=2), 'seed=1, this one has seed=2'),
        (dict(dataset='MNIST'), "dataset='Few', this one has dataset='MNIST'"),
        (dict(num_time_steps=30), 'num_time_steps=20, this one has num_time_steps=30'),
        (dict(unet={**SMALL, 'num_groups': 2}), 'num_groups=4, this one has num_groups=2'),
        (dict(unet={**SMALL, 'Channels': [16, 32, 64, 64]}), r'Channels=\[8, 16, 32, 32\]'),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(workdir, good, changes, words):
    path = Path('checkpoints/tiny')
    path.parent.mkdir()
    path.write_bytes(good)
    with pytest.raises(ddpm.UserError, match=words) as caught:
        ddpm.train(**{**TINY, 'num_epochs': 6, **changes})
    assert 'to start afresh change checkpoint_path' in str(caught.value)
    assert path.read_bytes() == good


def test_inference_with_another_number_of_time_steps(workdir, good):
    Path('tiny').write_bytes(good)
    with pytest.raises(ddpm.UserError, match='num_time_steps is 30, but tiny was trained with 20'):
        ddpm.inference('tiny', num_time_steps=30)


def test_a_folder_for_a_checkpoint(workdir):
    Path('checkpoints/tiny').mkdir(parents=True)
    for use in (lambda: ddpm.train(**TINY), lambda: ddpm.inference('checkpoints/tiny')):
        with pytest.raises(ddpm.UserError, match='checkpoints/tiny is not a usable checkpoint'):
            use()


@pytest.mark.parametrize('bad', [NAN, float('inf')])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(workdir, monkeypatch, bad):
    ddpm.train(**{**TINY, 'num_epochs': 1})
    before = Path('checkpoints/tiny').read_bytes()
    loss, calls = ddpm.diffusion_loss, []

    def spoiled(*arguments):
        calls.append(1)
        return loss(*arguments) * (bad if len(calls) == 2 else 1)

    monkeypatch.setattr(ddpm, 'diffusion_loss', spoiled)
    with pytest.raises(ddpm.UserError, match=f'the loss is {bad} in epoch 2, step 2: lower lr'):
        ddpm.train(**{**TINY, 'save_minutes': 0})
    saved = ddpm.load_checkpoint('checkpoints/tiny')
    assert len(saved['losses']) == 4  # the step before it
    assert saved['losses'][:3].tolist() == torch.load(io.BytesIO(before))['losses'].tolist()


def test_a_loss_back_at_that_of_predicting_nothing_keeps_the_last_good_checkpoint(
    workdir, monkeypatch
):
    """As an lr that is too high leaves it. A single bad step is no divergence."""
    loss, values = ddpm.diffusion_loss, [0.1] * 290 + [1e4] + [0.1] * 9 + [1.0] * 30
    values = iter(values)
    monkeypatch.setattr(ddpm, 'diffusion_loss', lambda *a: loss(*a) * 0 + next(values))
    ddpm.train(**{**TINY, 'num_epochs': 100})
    before = Path('checkpoints/tiny').read_bytes()
    with pytest.raises(ddpm.UserError, match='has diverged, its loss is 1 again: lower lr'):
        ddpm.train(**{**TINY, 'num_epochs': 110})  # 30 steps are enough to tell
    assert Path('checkpoints/tiny').read_bytes() == before


def test_a_loss_that_never_fell_is_saved(workdir, monkeypatch):
    loss = ddpm.diffusion_loss
    monkeypatch.setattr(ddpm, 'diffusion_loss', lambda *a: loss(*a) * 0 + 1)
    ddpm.train(**{**TINY, 'num_epochs': 70})
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 210


def test_names_with_and_without_the_prefix_of_the_average_are_read(workdir, good):
    """Also a UNET that names only what differs from the defaults."""

    def change(state):
        state['ema'] = {k.removeprefix('module.'): v for k, v in state['ema'].items()}
        state['weights'] = {f'module.{k}': v for k, v in state['weights'].items()}
        del state['unet']['input_channels']

    Path('tiny').write_bytes(good)
    as_saved = ddpm.load_checkpoint('tiny')
    Path('tiny').write_bytes(changed(change)(good))
    saved = ddpm.load_checkpoint('tiny')
    assert saved['unet'] == as_saved['unet']
    for part in ('weights', 'ema'):
        assert saved[part].keys() == as_saved[part].keys()
    ddpm.inference('tiny', num_images=2, num_steps=3)
    ddpm.train(**{**TINY, 'checkpoint_path': 'tiny', 'num_epochs': 3})


def test_weights_that_are_not_finite_are_not_saved(workdir, monkeypatch):
    step = torch.optim.Adam.step

    def spoil(optimizer):
        step(optimizer)
        optimizer.param_groups[0]['params'][0].data.fill_(NAN)

    monkeypatch.setattr(torch.optim.Adam, 'step', spoil)
    with pytest.raises(ddpm.UserError, match='diverged, weights shallow_conv.weight is not finite'):
        ddpm.train(**{**TINY, 'save_minutes': 0})
    assert not Path('checkpoints/tiny').exists()


ERRORS = {
    'a number of the drawing that is after it': (
        'ddpm.DRAWING.update(num_images=0); ddpm.train = lambda **n: 1 / 0',
        'ddpm.py: num_images is 0',
    ),
    'more steps of the drawing than there are': (
        'ddpm.DRAWING.update(num_steps=21); ddpm.train = lambda **n: 1 / 0',
        'ddpm.py: num_steps is 21, but must be a whole number from 1 to 20',
    ),
    'bad number': ("ddpm.PREVIEW.update(lr=float('nan'))", 'ddpm.py: lr is nan'),
    'misspelt, for the drawing after it': (
        'ddpm.DRAWING.update(steps=8); ddpm.train = None',
        "argument 'steps': a name under EDIT HERE",
    ),
    'misspelt': (
        'ddpm.PREVIEW.update(batchsize=8)',
        "argument 'batchsize': a name under EDIT HERE",
    ),
    'bad UNET': ("ddpm.PREVIEW['unet'] = dict(num_groups=7)", 'num_groups 7 does not divide'),
    'no memory': (
        'def f(*a): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")\n'
        'ddpm.diffusion_loss = f',
        'ddpm.py: out of memory: lower batch_size',
    ),
    'broken checkpoint': (
        "Path('checkpoints').mkdir(); Path('checkpoints/tiny').write_text('x')",
        'checkpoints/tiny is not a usable checkpoint',
    ),
}


@pytest.mark.parametrize('edit, words', ERRORS.values(), ids=ERRORS)
def test_the_program_ends_with_one_line_and_code_1(tmp_path, edit, words):
    from conftest import TINY_PREVIEW

    edits = f'{TINY_PREVIEW}\nimport torch\nfrom pathlib import Path\n{edit}'
    done = run_program(tmp_path, edits, '--preview')
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr


def test_an_unexpected_error_keeps_its_traceback(tmp_path):
    from conftest import TINY_PREVIEW

    done = run_program(tmp_path, f'{TINY_PREVIEW}\nddpm.train = lambda **n: 1 / 0', '--preview')
    assert done.returncode == 1
    assert 'ZeroDivisionError' in done.stderr
    assert 'Traceback' in done.stderr
