"""Bad numbers, data and checkpoints: one clear line each, and nothing lost."""

import functools
import io
import os
import pickle
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, TINY, TINY_PREVIEW, few_images, run_program
from PIL import Image
from test_faults import at_step

import ddpm

NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize(
    'name, value',
    [
        ('batch_size', 0),
        ('batch_size', 2.5),
        ('batch_size', True),
        ('batch_size', np.int64(4)),
        ('num_epochs', -1),
        ('num_epochs', 0),
        ('num_epochs', '2'),
        ('num_time_steps', 1),
        ('lr', NAN),
        ('lr', INF),
        ('lr', -1e-3),
        ('lr', 1.5),
        ('lr', '2e-5'),
        ('lr', np.float64(1e-3)),
        ('lr_decay', 1),
        ('lr_decay', np.bool_(True)),
        ('beta2', 1.0),
        ('beta2', 0),
        ('beta2', -0.1),
        ('ema_decay', 1.1),
        ('ema_decay', NAN),
        ('seed', -2),
        ('seed', 2**32),
        ('seed', 1.0),
        ('save_minutes', NAN),
        ('save_minutes', INF),
        ('sample_every', -1),
        ('sample_every', None),
        ('image_size', 0),
        ('image_size', 32.0),
        ('checkpoint_path', 5),
        ('dataset', 5),
        ('dataset', None),
        ('unet', 'abc'),
        ('unet', 5),
        ('unet', [8, 16]),
    ],
)
def test_a_setting_of_the_wrong_type_or_range_is_named_before_any_work(workdir, name, value):
    with pytest.raises(ddpm.UserError, match=f'^{name} is .* but must be ') as caught:
        ddpm.train(**{**TINY, name: value})
    assert '\n' not in str(caught.value)
    assert not list(workdir.iterdir())


@pytest.mark.parametrize(
    'name, value',
    [
        ('num_images', 0),
        ('num_images', 2.0),
        ('num_steps', 0),
        ('num_steps', 21),
        ('num_steps', np.int64(3)),
        ('seed', -2),
        ('seed', 2**32),
    ],
)
def test_a_setting_of_sampling_out_of_range_is_named(workdir, good, name, value):
    Path('tiny').write_bytes(good)
    model = ddpm.load_model('tiny')
    for use in (
        lambda **changed: ddpm.inference('tiny', **changed),
        lambda **changed: ddpm.sample(model, **{'num_images': 2, **changed}),
    ):
        with pytest.raises(ddpm.UserError, match=f'^{name} is .* but must be '):
            use(**{name: value})
    assert not Path('outputs').exists()


def test_other_arguments_that_cannot_be(workdir, monkeypatch):
    with pytest.raises(
        ValueError, match='batch_size is 13, but must be at most 12, the number of images'
    ):
        ddpm.train(**{**TINY, 'batch_size': 13})
    with pytest.raises(ValueError, match="UNET takes no 'channels'; did you mean Channels?"):
        ddpm.train(**{**TINY, 'unet': {'channels': [8, 16]}})
    with pytest.raises(ValueError, match="UNET takes no 'x', only Channels, Attentions, "):
        ddpm.train(**{**TINY, 'unet': {'x': 1}})
    for name, value in (('input_channels', 3), ('output_channels', 3), ('time_steps', 30)):
        wanted = 'unet must agree with .*input_channels.: 1, .output_channels.: 1, .time_steps.: 20'
        with pytest.raises(ValueError, match=wanted):
            ddpm.train(**{**TINY, 'unet': {**SMALL, name: value}})
    with pytest.raises(ValueError, match='cannot write /proc/no/such/checkpoint'):
        ddpm.train(**{**TINY, 'checkpoint_path': '/proc/no/such/checkpoint'})
    Path('file').write_text('')
    with pytest.raises(ValueError, match='cannot write file/checkpoint'):
        ddpm.train(**{**TINY, 'checkpoint_path': 'file/checkpoint'})
    for use in (ddpm.inference, ddpm.load_model):
        with pytest.raises(ValueError, match='no checkpoint nowhere: train first'):
            use('nowhere')
    for name, value in (('Channels', 64), ('Attentions', False), ('Upscales', None)):
        with pytest.raises(ddpm.UserError, match=f'^{name} is {value}, but must be list'):
            ddpm.train(**{**TINY, 'unet': {**SMALL, name: value}})
    with pytest.raises(ddpm.UserError, match=r'^Channels\[0\] is .*8.*, but must be'):
        channels = [*map(np.int64, SMALL['Channels'])]  # no checkpoint could hold them
        ddpm.train(**{**TINY, 'unet': {**SMALL, 'Channels': channels}})
    with pytest.raises(ddpm.UserError, match=r'^Channels is .* but must be \[8, 16, 32, 32\]'):
        ddpm.train(**{**TINY, 'unet': {**SMALL, 'Channels': [8, *channels[1:]]}})
    assert not Path('checkpoints').exists()


def test_a_checkpoint_in_place_of_its_pictures_is_refused(workdir):
    with pytest.raises(ddpm.UserError, match='outputs/mine is where its pictures go'):
        ddpm.train(**{**TINY, 'checkpoint_path': 'outputs/mine'})
    assert not Path('outputs').exists()
    ddpm.train(**{**TINY, 'num_epochs': 1, 'checkpoint_path': 'outputs/checkpoints/mine'})


def test_a_mistake_is_told_whole_and_other_errors_in_one_line(capsys):
    for error, told in (
        (ddpm.UserError(f'{"allocated " * 30}: mend it'), f'{"allocated " * 30}: mend it'),
        (OSError('a\n' * 300), 'ddpm.py: ' + ('a ' * 300)[:200]),
        (RuntimeError('Tried to allocate 2 GiB'), 'ddpm.py: out of memory: '),
    ):
        with pytest.raises(SystemExit) as end, ddpm.errors_in_one_line():
            raise error
        assert told in end.value.code and len(end.value.code) < 400


def test_an_empty_dataset(workdir, monkeypatch):
    monkeypatch.setattr(ddpm, 'load_images', lambda *_: few_images()[:0])
    with pytest.raises(
        ValueError, match='batch_size is 4, but must be at most 0, the number of images'
    ):
        ddpm.train(**TINY)


def test_any_number_of_epochs_may_be_begun(workdir, monkeypatch):
    """Nothing has the size of the whole run: 24 PB it would be for the losses alone."""
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(ddpm.Stopped, match='Stopped after step 2 of 3000000000000000, '):
        ddpm.train(**{**TINY, 'num_epochs': 10**15})
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 2


# ---- Checkpoints ------------------------------------------------------------------------------


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


def other_zip(good):
    """What is a zip file, as documents are, and no checkpoint."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('word/document.xml', '<digits/>')
    return buffer.getvalue()


def whole_module(good):
    """As torch.save(model) writes it, which can be read only by running code."""
    buffer = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), buffer)
    return buffer.getvalue()


WEIGHT = 'Layer1.conv.weight'
STATE = ('optimizer', 'state', 3)
USABLE = 'not a usable checkpoint'
BROKEN = {  # for training and for sampling
    'truncated': (lambda good: good[: len(good) // 2], USABLE),
    'truncated at the end': (lambda good: good[:-1], USABLE),
    'empty': (lambda good: b'', USABLE),
    'random bytes': (lambda good: bytes(range(256)) * 40, USABLE),
    'text': (lambda good: b'the digits are in the other file\n', USABLE),
    'pickle': (lambda good: pickle.dumps({'weights': 1}), USABLE),
    'flipped bit': (flipped, f'{USABLE}: .* is damaged'),
    'code': (changed(lambda state: {**state, 'x': Bomb()}), USABLE),
    'code in a bare pickle': (lambda good: pickle.dumps(Bomb()), USABLE),
    'another zip file': (other_zip, USABLE),
    'a whole module': (whole_module, USABLE),
    'a list': (changed(lambda state: [state]), USABLE),
    'weights alone': (changed(lambda state: state['weights']), 'no entry ema'),
    'no ema': (changed(lambda state: state.pop('ema') and None), 'no entry ema'),
    'a weight more': (set_entry('ema', 'module.x', value=torch.zeros(1)), 'Unexpected key'),
    'a weight less': (changed(lambda s: s['ema'].pop(f'module.{WEIGHT}') is s), 'Missing key'),
    'shape': (
        set_entry('ema', f'module.{WEIGHT}', value=torch.zeros(2, 2)),
        f'size mismatch for (module.)?{WEIGHT}',
    ),
    'NaN average': (
        set_entry('ema', f'module.{WEIGHT}', value=lambda w: w * NAN),
        'ema is not finite',
    ),
    'a string for a tensor': (set_entry('ema', f'module.{WEIGHT}', value='x'), USABLE),
}
OF_NO_UNET = {  # training first says that it is not this run's
    'no UNET at all': (set_entry('unet', value={'Channels': []}), USABLE),
    'another UNET': (set_entry('unet', 'num_groups', value=3), 'num_groups is 3, but must divide'),
}
ONLY_TO_SAMPLE = {  # it needs nothing but the EMA weights
    'no weights': (changed(lambda state: state.pop('weights') and None), 'no entry weights'),
    'no optimizer': (changed(lambda s: s.pop('optimizer') and None), 'no entry optimizer'),
    'a weight less': (changed(lambda s: s['weights'].pop(WEIGHT) is s), f'Missing key.*{WEIGHT}'),
    'shape': (
        set_entry('weights', WEIGHT, value=torch.zeros(2, 2)),
        f'size mismatch for {WEIGHT}',
    ),
    'NaN weight': (
        set_entry('weights', WEIGHT, value=lambda w: w * NAN),
        'weights is not finite',
    ),
    'NaN moment': (
        set_entry(*STATE, 'exp_avg', value=lambda w: w * NAN),
        'exp_avg of its optimizer is not finite',
    ),
    'infinite moment': (
        set_entry(*STATE, 'exp_avg_sq', value=lambda w: w + INF),
        'exp_avg_sq of its optimizer is not finite',
    ),
    'moment shape': (
        set_entry(*STATE, 'exp_avg', value=torch.zeros(1)),
        USABLE,
    ),
    'a string for the step': (set_entry(*STATE, 'step', value='x'), USABLE),
    'a NaN for the step': (set_entry(*STATE, 'step', value=torch.tensor(NAN)), USABLE),
    'three steps': (set_entry(*STATE, 'step', value=torch.ones(3)), USABLE),
    'a string for the losses': (set_entry('losses', value='abc'), USABLE),
    'a NaN for the scale': (set_entry('scaler', value={'scale': NAN}), 'the scale of its'),
    'a scale of 0': (set_entry('scaler', value={'scale': 0.0}), 'the scale of its'),
}


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    """The bytes of a good checkpoint of the numbers TINY, two epochs of six done."""
    folder = tmp_path_factory.mktemp('good')
    load_images, ddpm.load_images = ddpm.load_images, lambda *_: few_images()
    outputs, ddpm.OUTPUTS = ddpm.OUTPUTS, folder / 'outputs'
    try:
        ddpm.train(**{**TINY, 'checkpoint_path': str(folder / 'tiny')})
    finally:
        ddpm.load_images, ddpm.OUTPUTS = load_images, outputs
    return (folder / 'tiny').read_bytes()


def assert_refused(use, content, words):
    """In one line, and the file is left alone."""
    path = Path('checkpoints/tiny')
    with pytest.raises(ddpm.UserError, match=words) as caught:
        use()
    assert str(caught.value).startswith(f'{path} is not a usable checkpoint: ')
    assert 'to start afresh' in str(caught.value)
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert path.read_bytes() == content
    assert os.listdir('checkpoints') == ['tiny']
    assert not Path('hacked').exists()


def put(content):
    path = Path('checkpoints/tiny')
    path.parent.mkdir()
    path.write_bytes(content)


@pytest.mark.parametrize('make, words', BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_and_left_alone(workdir, good, make, words):
    content = make(good)
    assert content != good
    put(content)
    assert_refused(lambda: ddpm.train(**{**TINY, 'num_epochs': 6}), content, words)
    assert_refused(lambda: ddpm.inference('checkpoints/tiny', num_steps=3), content, words)
    assert not Path('outputs').exists()


@pytest.mark.parametrize('make, words', OF_NO_UNET.values(), ids=OF_NO_UNET)
def test_a_checkpoint_of_no_unet_is_refused(workdir, good, make, words):
    content = make(good)
    put(content)
    assert_refused(lambda: ddpm.load_model('checkpoints/tiny'), content, words)
    with pytest.raises(ddpm.UserError, match='is from a run with'):
        ddpm.train(**{**TINY, 'num_epochs': 6})
    assert Path('checkpoints/tiny').read_bytes() == content


@pytest.mark.parametrize('make, words', ONLY_TO_SAMPLE.values(), ids=ONLY_TO_SAMPLE)
def test_what_cannot_be_trained_on_can_be_sampled_from(workdir, good, make, words):
    content = make(good)
    assert content != good
    put(content)
    assert_refused(lambda: ddpm.train(**{**TINY, 'num_epochs': 6}), content, words)
    x = ddpm.sample(ddpm.load_model('checkpoints/tiny'), 2, num_steps=3, seed=0)
    Path('good').write_bytes(good)
    assert torch.equal(x, ddpm.sample(ddpm.load_model('good'), 2, num_steps=3, seed=0))


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(batch_size=3), 'batch_size=4, this one has batch_size=3'),
        (dict(seed=2), 'seed=1, this one has seed=2'),
        (dict(num_time_steps=30), 'num_time_steps=20, this one has num_time_steps=30'),
        (dict(unet={**SMALL, 'num_groups': 2}), 'num_groups=4, this one has num_groups=2'),
        (dict(unet={**SMALL, 'Channels': [16, 32, 64, 64]}), r'Channels=\[8, 16, 32, 32\]'),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(workdir, good, changes, words):
    put(good)
    with pytest.raises(ddpm.UserError, match=words) as caught:
        ddpm.train(**{**TINY, 'num_epochs': 6, **changes})
    assert 'to start afresh change checkpoint_path' in str(caught.value)
    assert Path('checkpoints/tiny').read_bytes() == good
    assert os.listdir('checkpoints') == ['tiny']  # no lock stays behind


def test_inference_with_another_number_of_time_steps(workdir, good):
    Path('tiny').write_bytes(good)
    with pytest.raises(ddpm.UserError, match='num_time_steps is 30, but tiny was trained with 20'):
        ddpm.inference('tiny', num_time_steps=30)


def test_a_folder_for_a_checkpoint(workdir):
    Path('checkpoints/tiny').mkdir(parents=True)
    for use in (lambda: ddpm.train(**TINY), lambda: ddpm.inference('checkpoints/tiny')):
        with pytest.raises(ddpm.UserError, match='checkpoints/tiny is not a usable checkpoint'):
            use()


PREFIXES = ['', 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.', 'module.module.']


@pytest.mark.parametrize('prefix', PREFIXES)
def test_prefixes_of_names_are_stripped(workdir, good, prefix):
    """Those of DistributedDataParallel, torch.compile and ModelEmaV3, before weights and average.
    The UNET may name only what differs from the defaults."""

    def change(state):
        for part in ('weights', 'ema'):
            items = state[part].items()
            state[part] = {prefix + name.removeprefix('module.'): x for name, x in items}
        del state['unet']['input_channels']

    Path('tiny').write_bytes(good)
    as_saved = ddpm.load_checkpoint('tiny', to_train=True)
    Path('tiny').write_bytes(changed(change)(good))
    saved = ddpm.load_checkpoint('tiny', to_train=True)
    for part in ('weights', 'ema', 'unet'):
        assert saved[part].keys() == as_saved[part].keys()
    ddpm.inference('tiny', num_images=2, num_steps=3)
    ddpm.train(**{**TINY, 'checkpoint_path': 'tiny', 'num_epochs': 3})


@pytest.mark.parametrize('precision', [torch.Tensor.double, torch.Tensor.half])
def test_any_precision_is_read(workdir, good, precision):
    def change(state):
        for part in ('weights', 'ema'):
            state[part] = {name: precision(x) for name, x in state[part].items()}

    put(changed(change)(good))
    model = ddpm.load_model('checkpoints/tiny')
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ddpm.train(**{**TINY, 'num_epochs': 3})
    weights = torch.load('checkpoints/tiny')['weights']
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


# ---- Divergence -------------------------------------------------------------------------------


@pytest.fixture
def saves(workdir, monkeypatch):
    """The (name, step) of each save that is begun."""
    saved, save_checkpoint = [], ddpm.save_checkpoint

    def spy(path, state):
        saved.append((Path(path).name, len(state['losses'])))
        save_checkpoint(path, state)

    monkeypatch.setattr(ddpm, 'save_checkpoint', spy)
    monkeypatch.setattr(ddpm, 'draw_losses', lambda *_: None)
    return saved


def train_with_losses(monkeypatch, *values, earlier=0, save_at=(), **changes):
    """Trains for as many steps as there are values, which are their losses, in epochs of three
    steps; `earlier` steps are done already, and a save is due in the steps `save_at`."""
    steps, step_done = [], ddpm.Run.step_done

    def diffusion_loss(model, *_):
        steps.append(1)
        return sum(parameter.sum() for parameter in model.parameters()) * 0 + values[len(steps) - 1]

    def step_done_and_saved(run, loss):
        run.next_save = 0 if run.step + 1 in save_at else run.next_save
        step_done(run, loss)

    with monkeypatch.context() as patches:
        patches.setattr(ddpm, 'diffusion_loss', diffusion_loss)
        patches.setattr(ddpm.Run, 'step_done', step_done_and_saved)
        ddpm.train(**{**TINY, 'num_epochs': (earlier + len(values)) // 3, **changes})


SUSPECT = 'training has probably diverged: lower lr. Its last step is in checkpoints/tiny.suspect'


@pytest.mark.parametrize('bad', [NAN, INF])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(saves, monkeypatch, bad):
    message = f'training has diverged at step 5, its loss is {bad}: lower lr'
    with pytest.raises(ddpm.UserError, match=message):
        train_with_losses(monkeypatch, 1, 1, 1, 1, bad, 1, save_minutes=0)
    assert saves == [('tiny', step) for step in (1, 2, 3, 4)]
    assert ddpm.load_checkpoint('checkpoints/tiny')['losses'].tolist() == [1] * 4
    assert os.listdir('checkpoints') == ['tiny']


def test_a_loss_that_is_not_finite_before_the_first_save(saves, monkeypatch):
    with pytest.raises(ddpm.UserError, match='diverged at step 3, its loss is inf: lower lr'):
        train_with_losses(monkeypatch, 1, 1, INF)
    assert saves == [] and os.listdir('checkpoints') == []


DIVERGED = {
    'from the start': [3.0] * 102,
    'after it was good': [0.1] * 102 + [3.0] * 102,
    'most of the last hundred': [0.1] * 42 + [3.0] * 60,
}
NOT_DIVERGED = {
    'a single bad step': [0.1] * 101 + [1e6],
    'two of the last five': [0.1] * 97 + [1e6, 0.1, 0.1, 0.1, 1e6],
    'less than half of them': [0.1] * 22 + [1e6] * 40 + [0.1] * 40,
    'an hour ago': [1e6] * 90 + [0.1] * 60,
}


@pytest.mark.parametrize('values', DIVERGED.values(), ids=DIVERGED)
def test_losses_far_above_that_of_predicting_nothing_end_it(saves, monkeypatch, values):
    message = f'training has diverged at step {len(values)}, its loss is 3: lower lr'
    with pytest.raises(ddpm.UserError, match=message):
        train_with_losses(monkeypatch, *values)
    assert saves == []


@pytest.mark.parametrize('values', NOT_DIVERGED.values(), ids=NOT_DIVERGED)
def test_some_bad_losses_are_no_divergence(saves, monkeypatch, capfd, values):
    train_with_losses(monkeypatch, *values)
    assert saves == [('tiny', len(values))]
    assert 'lower lr' not in capfd.readouterr().err


@pytest.mark.parametrize('was, now', [(0.1, 1.0), (0.1, 0.95), (0.45, 1.0)])
def test_a_loss_back_at_that_of_predicting_nothing_is_saved_beside(
    saves, monkeypatch, capfd, was, now
):
    """Perhaps it has diverged, perhaps not: both states are kept, training goes on, and may get
    well again."""
    values = [was] * 102 + [now] * 102 + [was] * 102
    train_with_losses(monkeypatch, *values, save_at=[102, 204])
    assert saves == [('tiny', 102), ('tiny.suspect', 204), ('tiny', 306)]
    assert len(ddpm.load_checkpoint('checkpoints/tiny.suspect', to_train=True)['losses']) == 204
    err = capfd.readouterr().err
    assert (
        err.count(
            f'The loss is {now:.3g}; a model that has learned nothing has 1: lower lr. Saved as '
            'checkpoints/tiny.suspect; checkpoints/tiny stays as it was'
        )
        == 1
    )
    assert sorted(os.listdir('checkpoints')) == ['tiny', 'tiny.suspect']


def test_a_loss_that_was_good_long_ago_still_counts(saves, monkeypatch):
    values = [0.1] * 102 + [1.0] * 204
    with pytest.raises(ddpm.UserError, match=SUSPECT):
        train_with_losses(monkeypatch, *values, save_at=[102])
    assert saves == [('tiny', 102), ('tiny.suspect', 306)]


@pytest.mark.parametrize('values', [[3.0] * 99, [0.1] * 99 + [3.0] * 3], ids=['start', 'end'])
def test_bad_losses_in_the_last_steps_are_saved_beside(saves, monkeypatch, capfd, values):
    """Most of the last five, but not yet most of the last hundred."""
    with pytest.raises(ddpm.UserError, match=SUSPECT):
        train_with_losses(monkeypatch, *values)
    assert saves == [('tiny.suspect', len(values))]
    assert 'The loss is 3; a model that has learned nothing has 1' in capfd.readouterr().err


def test_a_run_stopped_in_a_suspect_state_says_where_it_is(saves, monkeypatch, capfd):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGINT)

    train_with_losses(monkeypatch, *[0.1] * 102)
    monkeypatch.setattr(ddpm, 'draw_losses', stop)
    with pytest.raises(ddpm.Stopped) as end:
        train_with_losses(monkeypatch, *[1.0] * 105, save_at=[204], earlier=102)
    assert saves == [('tiny', 102), ('tiny.suspect', 204)]
    # run again it would go on from the last good state, not from this one
    assert str(end.value) == 'Stopped after step 204 of 207, saved in checkpoints/tiny.suspect'


@pytest.mark.parametrize('was, now', [(0.1, 0.8), (0.6, 1.0)])
def test_a_loss_that_is_no_suspect(saves, monkeypatch, was, now):
    """It is still good, or it never was, as with noise for pictures."""
    train_with_losses(monkeypatch, *[was] * 102, *[now] * 102, save_at=[102])
    assert saves == [('tiny', 102), ('tiny', 204)]


def test_a_single_good_loss_makes_no_suspect(saves, monkeypatch):
    """As with small batches, whose losses vary: never good, and not back at 1."""
    values = [1.0] * 101 + [0.1] + [1.0] * 102
    train_with_losses(monkeypatch, *values, save_at=[102])
    assert saves == [('tiny', 102), ('tiny', 204)]


def test_less_than_half_of_the_last_losses_make_no_suspect(saves, monkeypatch):
    values = [0.1] * 102 + [1.0, 1.0, 0.1, 0.1, 0.1] * 21
    train_with_losses(monkeypatch, *values, save_at=[102])
    assert saves == [('tiny', 102), ('tiny', 207)]


def test_a_loss_that_never_fell_is_saved_and_said_at_the_end(saves, monkeypatch, capfd):
    train_with_losses(monkeypatch, *[1.0] * 204, save_at=[102])
    assert saves == [('tiny', 102), ('tiny', 204)]
    err = capfd.readouterr().err
    told = 'The loss is 1; a model that has learned nothing has 1: train longer, or with another'
    assert err.count(told) == 1


def test_a_run_too_short_to_learn_is_not_said_to_have_learned_nothing(saves, monkeypatch, capfd):
    train_with_losses(monkeypatch, *[1.0] * 99)
    assert saves == [('tiny', 99)]
    assert 'learned nothing' not in capfd.readouterr().err


@pytest.fixture
def every_step_is_shown(monkeypatch):
    """A bar that is redrawn in every step, as at a terminal in every slow one."""
    monkeypatch.setenv('TQDM_MININTERVAL', '0')
    bar = functools.partial(ddpm.progress_bar, mininterval=0, miniters=1)
    monkeypatch.setattr(ddpm, 'progress_bar', bar)


@pytest.mark.parametrize('values, told', [([1, NAN, 1], 2), ([3.0] * 300, 100)])
def test_divergence_is_told_when_the_bar_is_redrawn(
    saves, monkeypatch, every_step_is_shown, values, told
):
    """And not only at the next save."""
    with pytest.raises(ddpm.UserError, match=f'has diverged at step {told}, '):
        train_with_losses(monkeypatch, *values, save_minutes=60)
    assert saves == []


def test_huge_losses_whose_sum_is_infinite(saves, monkeypatch, every_step_is_shown, capfd):
    with pytest.raises(ddpm.UserError, match=SUSPECT):
        train_with_losses(monkeypatch, 1, 3e38, 3e38)
    assert saves == [('tiny.suspect', 3)]
    assert 'loss 2000000' in capfd.readouterr().err


def test_weights_that_are_not_finite_are_not_saved(workdir, monkeypatch):
    step = torch.optim.Adam.step

    def spoil(optimizer):
        step(optimizer)
        optimizer.param_groups[0]['params'][0].data.fill_(NAN)

    monkeypatch.setattr(torch.optim.Adam, 'step', spoil)
    with pytest.raises(ddpm.UserError, match='diverged at step 1, its weights overflow'):
        ddpm.train(**{**TINY, 'save_minutes': 0})
    assert not Path('checkpoints/tiny').exists()


# ---- The program ------------------------------------------------------------------------------

ERRORS = {
    'a setting of the sampling after it': (
        'ddpm.AFTER_TRAINING.update(num_images=0); ddpm.load_images = None',
        'ddpm.py: num_images is 0',
    ),
    'more steps of sampling than there are': (
        'ddpm.AFTER_TRAINING.update(num_steps=21); ddpm.load_images = None',
        'ddpm.py: num_steps is 21, but must be from 1 to 20',
    ),
    'bad number': ("ddpm.PREVIEW.update(lr=float('nan'))", 'ddpm.py: lr is nan'),
    'misspelt, for the sampling after it': (
        'ddpm.AFTER_TRAINING.update(steps=8); ddpm.load_images = None',
        "ddpm.py: inference takes no 'steps'; did you mean num_steps?",
    ),
    'misspelt, for --sample': (
        'ddpm.SAMPLE.update(images=8); ddpm.load_images = None',
        "ddpm.py: inference takes no 'images'; did you mean num_images?",
    ),
    'misspelt': (
        'ddpm.PREVIEW.update(batchsize=8)',
        "ddpm.py: train takes no 'batchsize'; did you mean batch_size?",
    ),
    'bad UNET': ("ddpm.PREVIEW['unet'] = dict(num_groups=7)", 'num_groups is 7, but must divide'),
    'no memory': (
        'def f(*a): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")\n'
        'ddpm.diffusion_loss = f',
        'ddpm.py: out of memory: lower batch_size',
    ),
    'no memory on the CPU': (
        'ddpm.diffusion_loss = lambda *a: torch.empty(10**15)',
        'ddpm.py: out of memory: lower batch_size',
    ),
    'broken checkpoint': (
        "Path('checkpoints').mkdir(); Path('checkpoints/tiny').write_text('x')",
        'checkpoints/tiny is not a usable checkpoint',
    ),
}


@pytest.mark.parametrize('edit, words', ERRORS.values(), ids=ERRORS)
def test_the_program_ends_with_one_line_and_code_1(tmp_path, edit, words):
    edits = f'{TINY_PREVIEW}\nimport torch\nfrom pathlib import Path\n{edit}'
    done = run_program(tmp_path, edits, '--preview')
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr


def test_an_unexpected_error_keeps_its_traceback(tmp_path):
    edits = f'{TINY_PREVIEW}\nddpm.load_images = lambda *a: 1 / 0'
    done = run_program(tmp_path, edits, '--preview')
    assert done.returncode == 1
    assert 'ZeroDivisionError' in done.stderr
    assert 'Traceback' in done.stderr


@pytest.mark.parametrize('bad', [torch.zeros(3, 1, 32, 32), torch.full((2, 1, 32, 32), NAN)])
def test_noise_that_is_none(workdir, bad):
    ddpm.train(**{**TINY, 'num_epochs': 1})
    model = ddpm.load_model('checkpoints/tiny')
    with pytest.raises(ddpm.UserError, match='^noise is '):
        ddpm.sample(model, 2, 3, noise=bad)
    assert ddpm.sample(model, 2, 3, noise=np.zeros((2, 1, 32, 32))).shape == (2, 1, 32, 32)


def test_a_run_of_few_steps_is_told_what_it_lacks(workdir, capsys, monkeypatch):
    ddpm.train(**TINY)
    assert '6 steps in all' in capsys.readouterr().out
    monkeypatch.setattr(ddpm, 'FEW_STEPS', 6)
    ddpm.train(**{**TINY, 'checkpoint_path': 'other'})
    assert 'steps in all' not in capsys.readouterr().out


def test_a_plain_folder_is_refused(workdir):
    """White sprites on a transparent ground, say, which becomes white."""
    Path('white').mkdir()
    for i in range(3):
        Image.new('RGBA', (32, 32), (255, 255, 255, 90 * i)).save(f'white/{i}.png')
    with pytest.raises(ddpm.UserError, match='white is of one plain colour'):
        ddpm.train(**{**TINY, 'dataset': 'white'})


def test_no_name_after_sample_starts_no_training(tmp_path):
    done = run_program(tmp_path, 'ddpm.train = lambda **_: print("trained")', '--sample', '')
    assert done.returncode == 1 and 'trained' not in done.stdout
    assert 'ddpm.py: ' in done.stderr and 'Traceback' not in done.stderr
