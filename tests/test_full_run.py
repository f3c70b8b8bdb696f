"""benchmarks/full_run.py at a tiny size, on the CPU; torch.compile leaves everything as it is."""

import itertools
import json
import signal
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import ddpm

sys.path.append(str(ROOT / 'benchmarks'))
import full_run  # noqa: E402
from full_run import speed  # noqa: E402

UNET = dict(Channels=[2, 4], Attentions=[False, True], Upscales=[False, True], num_groups=1)
FULL = {**TINY, 'unet': {**UNET, 'num_heads': 2}, 'num_time_steps': 10, 'checkpoint_path': 'full'}


@pytest.fixture(autouse=True)
def tiny(workdir, monkeypatch):
    """FULL is six steps on twelve digits."""
    monkeypatch.setattr(torch, 'compile', lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, 'reset', lambda: None)  # there is nothing to forget, and
    monkeypatch.setattr(full_run.gc, 'collect', lambda: None)  # both take seconds
    monkeypatch.setattr(ddpm, 'FULL', FULL)
    monkeypatch.setattr(ddpm, 'draw_losses', lambda *_: None)
    small = dict(SIZE='small', STEPS=2, WARM=2, PROFILED=(0, 1), RESUMED=(1, 3))
    for name, value in small.items():
        monkeypatch.setattr(full_run, name, value)


def test_gradients_that_compiling_spoils_are_found(monkeypatch):
    def spoil(model):
        model.late_conv.weight.register_hook(lambda grad: 2 * grad)

    monkeypatch.setattr(ddpm.UNET, 'compile', spoil)
    (errors,) = full_run.gradients().values()
    first, *others = errors.items()
    assert first == ('late_conv.weight', pytest.approx([0, 1], abs=0.1)) and len(others) == 9
    assert all(error == pytest.approx([0, 0], abs=0.1) for _, error in others)


def test_two_epochs_are_timed_and_profiled(monkeypatch):
    steps, step_done = [], ddpm.Run.step_done
    monkeypatch.setattr(ddpm.Run, 'step_done', lambda *a: steps.append(a) or step_done(*a))
    monkeypatch.setattr(speed, 'now', lambda device: len(steps))  # a second a step
    found = full_run.two_epochs()
    assert found['seconds an epoch'] == 3 and found['milliseconds of a profiled step'] == 1000
    assert found['largest shares']['aten::convolution_backward'] > 0


@pytest.mark.parametrize('exact', [True, False])
def test_a_resume_that_is_not_exact_is_found(monkeypatch, exact):
    if not exact:
        monkeypatch.setattr(ddpm, 'fold_in', lambda *numbers: torch.seed() % 2**32)
    found = full_run.stop_and_resume()
    assert (found['the same'] == found['values and tensors'][0] > 100) == exact
    assert len({*found['values and tensors']}) == 1


def test_samples_of_500_and_the_tests_of_a_gpu(monkeypatch):
    assert full_run.sampling_500()['seconds of 10 steps'] > 0
    monkeypatch.setattr(full_run, 'TESTS', Path('no test'))
    assert full_run.tests() == {'exit code': 4}  # pytest's for a file that is not there


def test_the_second_call_stopped_resumed_and_done(monkeypatch):
    steps, loss = [], ddpm.diffusion_loss

    def with_the_time_up(*batch):
        steps.append(batch)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGALRM)
        return loss(*batch)

    monkeypatch.setattr(ddpm, 'diffusion_loss', with_the_time_up)
    monkeypatch.setattr(ddpm, 'draw_reverse', lambda *_: None)
    monkeypatch.setitem(full_run.PARTS, 'quality', lambda: 1 / 0)
    monkeypatch.setitem(full_run.PARTS, 'article', lambda: {'figure': 1})
    with pytest.raises(SystemExit, match='the same command goes on'):
        full_run.main(['out', 'second'])
    assert full_run.main(['out', 'second']).keys() == {'quality'}
    results = json.loads(Path('out/results.json').read_text())
    assert 'ZeroDivisionError' in results['failed']['quality'] and results['article']['figure'] == 1
    (before, first), seconds, losses = [*results['whole_run'].values()][:3]
    assert before == 2 and 0 < first < seconds[0] and len(seconds) == 4
    assert len(losses) == 2 and len(steps) == 6
    with zipfile.ZipFile('out/pictures.zip') as archive:
        assert Image.open(archive.open('grid.png')).size[1] > 500  # 64 digits
    monkeypatch.setitem(full_run.PARTS, 'quality', lambda: {'FD': 2})
    assert full_run.main(['out', 'quality', 'second']) == {} and len(steps) == 6


def test_the_articles_loop_and_a_change_are_timed(monkeypatch):
    batches = lambda size: itertools.repeat(torch.rand(size, 1, 28, 28))  # noqa: E731
    monkeypatch.setattr(speed, 'batches', batches)
    in_force = mock.Mock(wraps=ddpm.autocast)
    monkeypatch.setitem(full_run.CHANGES, 'as it is', [(ddpm, 'autocast', in_force)])
    article, changed = (full_run.PARTS[name]() for name in ('article', 'as it is'))
    assert article.keys() == {'ddpm.py', "the article's"}
    assert all(value > 0 for found in (article, changed) for value in found.values())
    assert in_force.call_count == 8  # steps, two to warm up and two timed, of both loops


def test_an_exported_file_samples_what_its_checkpoint_does():
    ddpm.train(**FULL)
    full_run.main(['--export', 'full', 'small'])
    raw, whole = torch.load('small', weights_only=True), ddpm.load_checkpoint('full')
    assert {value.dtype for value in raw['ema'].values()} == {torch.float16}
    assert raw.keys() == {'ema', 'unet', 'config', 'beta'}
    ours, theirs = (ddpm.sample(ddpm.load_model(path), 4, 2, seed=1) for path in ('small', 'full'))
    assert (ours - theirs).abs().max() <= 2 / 255 < ours.max() - ours.min()
    ema, weights = whole['ema'], whole['weights']
    assert not torch.equal(ema['module.late_conv.weight'], weights['late_conv.weight'])
