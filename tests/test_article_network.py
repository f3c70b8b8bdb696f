"""benchmarks/article_network.py at a tiny size, all of its parts."""

import json
import sys
from functools import wraps

import pytest
import torch
from conftest import DIGITS, ROOT, SMALL, TINY
from PIL import Image

import ddpm

sys.path.append(str(ROOT / 'benchmarks'))
import article_network  # noqa: E402
import speed  # noqa: E402


@pytest.fixture
def result(workdir, monkeypatch):
    """Three steps an epoch of a small UNET with attention; a function that reads what is found."""
    numbers = {name: value for name, value in TINY.items() if name != 'num_time_steps'}
    monkeypatch.setattr(ddpm, 'FULL', numbers)
    monkeypatch.setattr(ddpm, 'PROGRESS_STEPS', 3)
    inference = ddpm.inference

    @wraps(inference)
    def quick(path, num_steps, seed, num_images):
        inference(path, num_steps=3, seed=seed, num_images=num_images)

    monkeypatch.setattr(ddpm, 'inference', quick)
    monkeypatch.setattr(article_network, 'RESULT', workdir / 'result.json')
    monkeypatch.setattr(article_network, 'PICTURE', workdir / 'picture.png')
    monkeypatch.setattr(article_network, 'ARTICLE_STEPS', 4)
    monkeypatch.setattr(article_network, 'SMOOTH', 2)
    monkeypatch.setattr(article_network, 'RATES_STEPS', 4)
    monkeypatch.setattr(article_network, 'RATES_BATCH', 2)
    monkeypatch.setattr(
        article_network, 'SETTINGS', {**article_network.SETTINGS, 'save_minutes': 9}
    )
    monkeypatch.setitem(speed.SIZES, 'full', {'unet': SMALL})
    monkeypatch.setattr(speed, 'batches', lambda size: iter([DIGITS[:size] / 255] * 4))
    return lambda: json.loads((workdir / 'result.json').read_text())


def test_what_is_found_is_gathered(result, workdir, monkeypatch):
    starts, unet = [], ddpm.UNET.__init__

    @wraps(unet)
    def kept(model, *arguments, **options):
        unet(model, *arguments, **options)
        if model.shallow_conv.weight.device.type == 'cpu':
            starts.append(model.shallow_conv.weight.detach().clone())

    monkeypatch.setattr(ddpm.UNET, '__init__', kept)
    step_done = ddpm.Run.step_done

    def stop(run, loss):
        run.stop_signal = 2 if run.step == 3 else None
        step_done(run, loss)

    monkeypatch.setattr(ddpm.Run, 'step_done', stop)
    article_network.train()
    assert len(ddpm.load_checkpoint(article_network.PATH)['losses']) == 4
    article_network.train()
    article_network.article()
    losses = ddpm.load_checkpoint(article_network.PATH)['losses']
    training = result()['training']
    assert [sitting['steps'] for sitting in training['sittings']] == [[0, 4], [4, 6]]
    expected = [(losses[i] + losses[i + 1]).item() / 2 for i in (0, 2, 4)]
    assert training['losses_in_tens'] == pytest.approx(expected)
    assert training['config']['lr'] == 2e-4
    assert len(result()['article']['losses_in_tens']) == 2
    assert len(starts) > 2  # of the training's starts and, last, of the article's loop
    assert all(torch.equal(start, starts[0]) for start in starts)

    article_network.draw({}, 'so far.png')
    assert Image.open('so far.png').size == (1100, 561)
    monkeypatch.setattr(article_network.quality, 'main', lambda: starts.append(sys.argv))
    article_network.measure()
    assert starts.pop()[1:] == f'{article_network.PATH} --samples 1000 --steps 50 --quick'.split()
    article_network.show()
    attention = result()['attention']['ema']
    assert (
        list(attention) == ['Layer2.attention_layer'] and min(attention.popitem()[1].values()) > 0
    )
    assert Image.open('picture.png').size == (1100, 1111)
    folder = ddpm.OUTPUTS / 'article_network'
    assert all((folder / f'{steps}-reverse.png').exists() for steps in (50, 1000))
    assert len(list((folder / 'progress').glob('*.png'))) == 3  # every two steps


def test_three_learning_rates(result, monkeypatch):
    article_network.rates()
    curves = result()['rates']['losses_in_tens']
    assert list(curves) == ['2e-05', '0.0002', '0.001']
    starts, ends = zip(*curves.values())
    assert starts == pytest.approx([starts[0]] * 3, rel=0.05)
    assert ends[0] > ends[1] > ends[2]
    assert not article_network.PATH.exists()

    train, message = ddpm.train, 'training has diverged'

    @wraps(train)
    def diverging(**settings):
        if settings['lr'] == 2e-4:
            raise ddpm.UserError(message)
        train(**settings)

    monkeypatch.setattr(ddpm, 'train', diverging)
    article_network.rates()
    assert result()['rates']['losses_in_tens'] == curves | {'0.0002': 'training has diverged'}
    message = 'the disk is full'
    with pytest.raises(ddpm.UserError, match='disk'):
        article_network.rates()
