"""benchmarks/quality.py on a few digits: each measure against a closed form or a second way to
compute it, and the whole at a tiny size."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, small_unet

import ddpm

sys.path.insert(0, str(ROOT / 'benchmarks'))
import quality  # noqa: E402


def gaussians(count, width=4, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(scope='module')
def digits():
    """900 digits of MNIST's train split and 300 of its test split, with their labels: drawn, as
    neighbours in it are of one hand."""
    draws, parts = torch.Generator().manual_seed(0), []
    for (images, labels), count in zip(quality.load_splits(), (900, 300)):
        chosen = torch.randperm(len(images), generator=draws)[:count]
        parts.append((images[chosen], labels[chosen]))
    return parts


def test_recognised_is_a_sure_digit():
    odds = torch.full((4, 11), 0.001)
    odds[:, 3] = torch.tensor([0.9, 0.9, 0.9, 0.1])
    odds[:, 10] = torch.tensor([0.05, 0.0, 0.15, 9.0])  # no digit
    assert quality.recognised(odds.log()) == 0.5
    assert quality.recognised(odds[:, :10].log()) == 1  # to who knows only digits, all are one


def test_fd_has_closed_forms():
    x = gaussians(500) * torch.tensor([1, 2, 3, 4])
    a, c = 1.5, torch.tensor([1.0, 0, -2, 0.5]).double()
    expected = (1 - a) ** 2 * x.T.cov().trace() + ((a - 1) * x.mean(0) + c).square().sum()
    assert quality.frechet(x, a * x + c) == pytest.approx(expected.item(), rel=1e-6)
    # of two columns, whose covariances do not commute
    x, y = gaussians(500, 2).cumsum(1), gaussians(500, 2, 1) * torch.tensor([5, 1])
    a, b = x.T.cov(), y.T.cov()
    root = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root
    assert quality.frechet(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_precision_and_recall_tell_poor_from_uniform_samples():
    real, same = gaussians(400), gaussians(400, seed=1)
    own, other = (np.linalg.norm(real[:, None] - x, axis=2) for x in (real, same))
    precision, recall = quality.precision_recall(real, same)
    assert precision == (other < np.sort(own)[:, 5:6]).any(0).mean() and 0.8 < precision < 1
    assert recall == quality.precision_recall(same, real)[0]
    assert quality.precision_recall(real, same + 100) == (0, 0)
    # all samples crowded round ten real points: each is good, together they are not
    precision, recall = quality.precision_recall(real, real[:10].repeat(40, 1) + 0.01 * same)
    assert precision > 0.95 and recall < 0.2
    fewer = quality.precision_recall(real[:100], same[:100])
    assert quality.precision_recall(real, same[:100]) == fewer


def test_a_classifier_is_kept_for_the_same_code_data_and_seed(workdir, digits, monkeypatch):
    monkeypatch.setattr(quality, 'EPOCHS', 1)
    source, fit, fits, edited = quality.inspect.getsource, quality.fit, [], []
    first, strict = quality.first_network, quality.strict_network
    data, other = ([part[i : i + 256] for part in digits[1]] for i in (0, 44))

    def counted(*arguments):
        fits.append(arguments)
        fit(*arguments)

    monkeypatch.setattr(quality, 'fit', counted)
    monkeypatch.setattr(quality.inspect, 'getsource', lambda f: source(f) + '#' * edited.count(f))
    found = []
    for case in [(first, data), (first, data, 1), (first, other), (strict, data)]:
        found += [quality.embed(quality.classifier(*case), digits[1][0][:20]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(found[::2], found[1::2])) and len(fits) == 4
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[4])
    for part in (counted, first):
        edited.append(part)
        quality.classifier(first, data)
    monkeypatch.setattr(quality, 'EPOCHS', 2)
    quality.classifier(first, data)
    assert len(fits) == 7


@pytest.mark.parametrize(
    'where, name, value, said',
    [
        ('accuracy', None, 0.991, 'the classifier reaches 99.10%'),
        ('training digits', 'FD / floor', 2.0, 'training digits have a poor FD'),
        ('FD / floor', 'noise of 0.1', 1.1, 'noise of 0.1 is not above that of floor'),
        ('FD / floor', 'no zeros', math.nan, 'no zeros is not above that of floor'),
        ('FD / floor', 'blurred by 0.7 pixels', 999, 'blurred by 1.5 pixels is not above'),
        ('digits', 'test split', [0.98, 0.96, 0.98], 'of test split'),
        ('changed slightly', 'noise of 0.1', [0.95, 0.95, 0.89], 'of noise of 0.1'),
        ('noise', 'blobs', [0.03, 0.0, 0.0], 'of blobs'),
        ('no digits', 'warped', [0.0, 0.04, math.nan], 'of warped'),
        ('pixels', 'copies', 0.98, 'by pixels only 98% of copies are found'),
        ('features', quality.NOISY_COPIES, 0.4, 'by features only 40% of copies with noise'),
    ],
)
def test_a_control_out_of_order_is_reported(where, name, value, said):
    result = json.loads(quality.RESULT.read_text())['controls, N = 1000']
    assert quality.broken(result) == []
    places = result | result['recognised'] | result['memorised']
    (result if name is None else places[where])[name or where] = value
    assert said in quality.broken(result)[0]


@pytest.fixture
def tiny(workdir, digits, monkeypatch):
    """An untrained checkpoint, `tiny`, one of other images, `clothes`, and few digits."""
    monkeypatch.setattr(quality, 'load_splits', lambda: digits)
    ema = {f'module.{name}': weights for name, weights in small_unet().state_dict().items()}
    for name, dataset in (('tiny', 'MNIST'), ('clothes', 'FashionMNIST')):
        torch.save({'ema': ema, 'unet': SMALL, 'config': {'dataset': dataset}}, name)


def test_whole_run(tiny, digits, monkeypatch, capsys):
    monkeypatch.setattr(quality, 'STRICT', 2)
    monkeypatch.setattr(quality, 'EPOCHS', 2)
    monkeypatch.setattr(quality.fit, '__defaults__', (32,))  # more steps
    monkeypatch.setattr(quality, 'RESULT', Path('quality.json'))
    key = 'tiny, 3 steps, N = 150, seed 3'
    quality.RESULT.write_text(json.dumps({'another': 1, key: 2}))
    with pytest.raises(SystemExit, match='controls out of order: the classifier reaches 9'):
        quality.main('tiny --samples 150 --steps 3 --seed 3'.split())
    figures = json.loads(quality.RESULT.read_text())
    assert figures['another'] == 1 and len(figures) == 3
    controls, found = figures['controls, N = 150'], figures[key]
    # digits, copies and what is none are told apart, if not yet well
    shares = {k: v for kinds in controls['recognised'].values() for k, v in kinds.items()}
    assert {len(each) for each in shares.values()} == {2} and min(shares['test split']) > 0.6
    none = *quality.noises(3, None), '16 tiles shuffled', 'samples of an untrained network'
    assert max(share for kind in none for share in shares[kind]) < 0.1
    assert not any('FD' in sentence or 'are found' in sentence for sentence in controls['broken'])

    # each figure once more, by the classifiers that the run has left
    monkeypatch.setattr(torch.optim, 'Adam', None)
    yard = quality.Yardstick(150)
    (train, _), (test, test_labels) = digits
    images = ddpm.to_uint8(ddpm.sample(ddpm.load_model('tiny'), 150, 3, seed=3))
    real, fake = yard.features(test), yard.features(images)
    draws = torch.randperm(900, generator=torch.Generator().manual_seed(0)).split(150)
    *floor, copies = (quality.frechet(real, yard.features(train[draw])) for draw in draws)
    floor, fd = np.array(floor), quality.frechet(real, fake)
    answers = quality.embed(yard.cnn, torch.cat([images, test])).argmax(1)
    each = [quality.recognised(quality.embed(network, images)) for network in yard.strict]
    pixels = [x.flatten(1).float() for x in (test[yard.unseen], images, train)]
    unseen, ours = (torch.cdist(x, pixels[2]).amin(1) for x in pixels[:2])
    precision, recall = quality.precision_recall(real[yard.unseen], fake)
    classes = answers[:150].bincount(minlength=10) / 150
    right = (answers[150:] == test_labels).double().mean()
    for value, expected in [
        (found['FD'], fd),
        (found['FD / floor'], fd / floor.mean()),
        (found['low, high'], [fd / floor.max(), fd / floor.min()]),
        (found['precision'], precision),
        (found['recall'], recall),
        (found['by each'], each),
        (found['recognised'], np.mean(each)),
        (found['classes'], classes),
        (found['memorised']['pixels'], (ours < np.quantile(unseen, 0.01)).double().mean()),
        (controls['accuracy'], right),
        (controls['floor'], floor / floor.mean()),
        (controls['training digits']['FD'], copies),
    ]:
        assert np.allclose(value, expected, rtol=1e-3)
    assert not torch.equal(*[network[0].weight for network in yard.strict])
    assert f'FD / floor: {fd / floor.mean():.4g}\n' in capsys.readouterr().out


@pytest.mark.parametrize(
    'command, said',
    [
        ('tiny --samples 151', 'samples is 151, but must be from 100 to 150'),
        ('clothes', 'clothes was not trained on MNIST'),
    ],
)
def test_mistakes_end_in_one_line(tiny, command, said):
    with pytest.raises(SystemExit, match=f'^quality.py: {said}.*$'):
        quality.main(command.split())
