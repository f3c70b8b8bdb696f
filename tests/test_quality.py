"""benchmarks/quality.py on a few digits: each metric against a closed form or a second way to
compute it, and the whole protocol at a tiny size."""

import gzip
import hashlib
import inspect
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, small_unet
from torchvision import datasets

import ddpm

pytest.importorskip('torchmetrics')
pytest.importorskip('prdc')
sys.path.insert(0, str(ROOT / 'benchmarks'))
import quality  # noqa: E402

CPU = torch.device('cpu')
STEPS = 20


def gaussians(count, width=4, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(scope='module')
def digits():
    """3,000 digits of MNIST's train split and 500 of its test split, with their labels: drawn, as
    neighbours in it are of one hand."""
    draws, parts = torch.Generator().manual_seed(0), []
    for (images, labels), count in zip(quality.load_splits(), (3000, 500)):
        chosen = torch.randperm(len(images), generator=draws)[:count]
        parts.append((images[chosen], labels[chosen]))
    return parts


# ---- Images ----------------------------------------------------------------------------------


def test_the_splits_are_those_of_torchvision(tmp_path):
    for path in (ddpm.DATA / 'MNIST/raw').glob('*.gz'):
        (tmp_path / 'MNIST/raw').mkdir(parents=True, exist_ok=True)
        unpacked = tmp_path / 'MNIST/raw' / path.stem
        unpacked.write_bytes(gzip.decompress(path.read_bytes()))
    for train, (images, labels) in zip((True, False), quality.load_splits()):
        theirs = datasets.MNIST(tmp_path, train=train)
        assert torch.equal(images[:, 0, 2:-2, 2:-2], theirs.data)
        assert images.shape[2:] == (32, 32) and images.sum() == theirs.data.sum()  # zero-padded
        assert torch.equal(labels, theirs.targets)
        assert labels.dtype == torch.int64


def test_real_digits_pass_through_eight_bits_unchanged(digits):
    images = digits[1][0]
    assert torch.equal(ddpm.to_uint8(ddpm.to_input(images)), images)


def test_samples_are_those_of_the_sampler_and_of_the_seed(float32):
    model = small_unet(time_steps=STEPS)
    drawn = quality.draw(model, 4, STEPS, 1)
    draws = torch.Generator().manual_seed(1)
    noise = torch.randn(4, 1, 32, 32, generator=draws)
    scheduler = ddpm.DDPM_Scheduler(STEPS)
    for _, x in ddpm.reverse_process(model, noise, scheduler, generator=draws):
        pass
    assert torch.equal(drawn, (x.clamp(0, 1) * 255).round().byte())
    assert not torch.equal(drawn, quality.draw(model, 4, STEPS, 2))


def test_weights_and_their_average_are_told_apart():
    weights, average = (small_unet(seed).state_dict() for seed in (0, 1))
    unet = {**ddpm.UNET_DEFAULTS, **SMALL}
    ema = {f'module.{k}': v for k, v in average.items()}
    saved = {'unet': unet, 'weights': weights, 'ema': ema}
    for part, expected in (('weights', weights), ('ema', average)):
        loaded = quality.load_model(saved, part, CPU)
        assert not loaded.training
        assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())


def test_weights_are_mixed_with_random_ones():
    model, random = (small_unet(seed, time_steps=STEPS) for seed in (0, 7))
    before = [weights.clone() for weights in model.parameters()]
    for share in (0, 0.5, 1):
        mixed = quality.mixed_with_random(model, {**SMALL, 'time_steps': STEPS}, share, 7, CPU)
        assert not mixed.training
        for a, b, weights in zip(before, random.parameters(), mixed.parameters()):
            assert torch.allclose(weights, (1 - share) * a + share * b, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# ---- What is no digit, and what is recognised ------------------------------------------------


def test_the_first_classifier_is_that_of_older_figures():
    code = inspect.getsource(quality.first_network) + inspect.getsource(quality.fit)
    assert hashlib.sha256(code.encode()).hexdigest()[:16] == '62c327394902af5c'


def kinds_of_no_digit(images, labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kinds = quality.misshapen(ddpm.to_input(images), labels, generator)
    return kinds | quality.noises(len(images), generator)


def test_no_digits_are_those_of_the_seed(digits):
    images, labels = digits[0][0][:300], digits[0][1][:300]
    first, again, other = (kinds_of_no_digit(images, labels, seed) for seed in (0, 0, 1))
    for kind, x in first.items():
        assert x.shape[1:] == (1, 32, 32) and torch.equal(x, again[kind])
    for kind in ('uniform noise', 'blobs', 'strokes', 'warped', '16 tiles shuffled'):
        assert first[kind].shape != other[kind].shape or not torch.equal(first[kind], other[kind])


def test_noise_has_every_level():
    noise = quality.noises(300, torch.Generator().manual_seed(0))
    for kind, x in noise.items():
        assert len(x) == 300
        contrast = ddpm.to_input(ddpm.to_uint8(x)).flatten(1).std(1)
        assert contrast.min() < 0.1 and contrast.max() > 0.25, kind
    assert noise['salt and pepper'].unique().tolist() == [0, 1]


def test_misshapen_digits_are_made_of_digits(digits):
    images, labels = digits[0][0][:300], digits[0][1][:300]
    x, kinds = ddpm.to_input(images), kinds_of_no_digit(images, labels)
    thirds = torch.cat([x[i::3] for i in range(3)])
    assert torch.equal(kinds['quarters swapped'][:100, :, :16], thirds[:100, :, 16:])
    for kind, original in (('quarters swapped', thirds), ('16 tiles shuffled', x)):
        pixels, theirs = kinds[kind].flatten(1), original.flatten(1)
        assert torch.equal(pixels.sort(1)[0], theirs.sort(1)[0])  # the same ones, elsewhere
        assert (pixels != theirs).any(1).all()
    ours, theirs = (
        image.unfold(1, 8, 8).unfold(2, 8, 8).reshape(16, 64).tolist()
        for image in (kinds['16 tiles shuffled'][5], x[5])
    )
    assert sorted(ours) == sorted(theirs) and ours != theirs
    assert torch.equal(kinds['inverted'], 1 - x)
    assert len(kinds['warped']) == (labels != 1).sum()
    turned = x[(labels >= 2) & (labels <= 7)]  # the others may still be read
    assert torch.equal(kinds['turned by 90 degrees'], turned.transpose(2, 3).flip(2))
    for kind in ('two side by side', 'two blended'):  # two of one class may look like one digit
        assert 0.8 * 300 < len(kinds[kind]) < 300
    assert kinds['two blended'].amax((1, 2, 3)).median() < 1 == kinds['two side by side'].max()
    ink = kinds['strokes'].clamp(0, 1).mean((1, 2, 3))
    assert 0.02 < ink.min() and ink.max() < 0.6


def test_training_data_of_the_third_network(digits):
    images, labels = digits[0][0][:640], digits[0][1][:640]
    data, classes = quality.with_no_digits(images, labels)
    again, _ = quality.with_no_digits(images, labels)
    assert torch.equal(data, again) and data.dtype == torch.uint8
    assert torch.equal(classes[:640], labels) and (classes[640:] == 10).all()
    assert 0.9 * 640 < len(data) - 640 == len(classes) - 640 <= 640
    assert torch.equal(data[:640:4], images[::4]) and torch.equal(data[3:640:4], images[3::4])
    noise = ddpm.to_input(data[1:640:4]) - ddpm.to_input(images[1::4])
    level = noise.flatten(1).std(1)  # what goes beyond black or white is cut off
    assert 0.02 < level.median() and level.max() < quality.STILL
    blurred = ddpm.to_input(data[2:640:4]) - ddpm.to_input(images[2::4])
    assert blurred.abs().mean() > 0.01 and abs(blurred.mean()) < 1e-3


def test_recognition_controls_are_of_the_right_kind(digits):
    (images, labels), seed = digits[1], 4
    groups = quality.recognition_controls(images, labels, 100, seed)
    assert set(groups) | {'digits'} == set(quality.LIMITS)
    again = quality.recognition_controls(images, labels, 100, seed)
    kinds = {kind: x for group in groups.values() for kind, x in group.items()}
    assert all(torch.equal(x, again[g][kind]) for g in groups for kind, x in groups[g].items())
    assert all(x.dtype == torch.uint8 and 10 < len(x) <= 100 for x in kinds.values())
    digit = {image.numpy().tobytes() for image in images}
    below = {image[:, 16:].numpy().tobytes() for image in images}
    assert all(image.numpy().tobytes() in digit for image in kinds['mirrored'].flip(3))
    assert all(i[:, 16:].numpy().tobytes() in below for i in kinds['noise in the upper half'])
    levels = [kinds[f'noise of {level}'] for level in (0.05, 0.1, 0.2, 0.3)]
    off = [ddpm.to_input(x)[:, :, 0].max().item() for x in levels]  # of black: half of it is cut
    assert off == sorted(off) and off[0] < 0.3 < 0.8 < off[3]


def test_recognised_is_a_sure_digit():
    odds = torch.full((4, 11), 0.001)
    odds[:, 3] = torch.tensor([0.9, 0.9, 0.9, 0.1])
    odds[:, 10] = torch.tensor([0.05, 0.0, 0.15, 0.9])  # no digit
    assert quality.recognised(odds.log()) == 0.5
    assert quality.recognised(odds[:, :10].log()) == 1  # to who knows only digits, all are one


def test_a_third_network_tells_noise_from_digits(digits):
    train, (test, _) = digits
    ddpm.set_seed(0)
    network = quality.third_network()
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 11)
    quality.fit(network, *quality.with_no_digits(*train), 2, 1e-2)
    share = {
        kind: quality.recognised(quality.embed(network.eval(), images, CPU))
        for group in quality.recognition_controls(*digits[1], 300, 0).values()
        for kind, images in group.items()
    }
    assert quality.recognised(quality.embed(network, test, CPU)) > 0.5
    assert max(share[kind] for kind in quality.noises(3, None)) < 0.1
    assert share['noise of 0.05'] > 0.4 and share['inverted'] < 0.1


# ---- Distances -------------------------------------------------------------------------------


def test_fd_of_a_scaled_and_shifted_set_has_a_closed_form():
    x = gaussians(500) * torch.tensor([1, 2, 3, 4])
    a, c = 1.5, torch.tensor([1.0, 0, -2, 0.5]).double()
    expected = (1 - a) ** 2 * x.T.cov().trace() + ((a - 1) * x.mean(0) + c).square().sum()
    assert quality.frechet(x, a * x + c) == pytest.approx(expected.item(), rel=1e-6)
    assert quality.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_kid_is_nought_for_the_same_distribution_and_grows():
    near, far, farther = (
        quality.kernel(gaussians(600), gaussians(600, seed=1) + shift)['KID']
        for shift in (0.0, 0.3, 1.0)
    )
    assert abs(near) < 0.05 * far < 0.05 * farther


def test_neighbourhoods_tell_poor_from_uniform_samples():
    real, same = gaussians(400), gaussians(400, seed=1)
    good = quality.neighbourhoods(real, same)
    assert min(good.values()) > 0.8
    far = quality.neighbourhoods(real, same + 100)
    assert max(far.values()) == 0
    # all samples crowded round ten real points: each is good, together they are not
    crowd = quality.neighbourhoods(real, real[:10].repeat(40, 1) + 0.01 * same)
    assert crowd['precision'] > 0.95 and crowd['recall'] < 0.2 and crowd['coverage'] < 0.3
    assert quality.neighbourhoods(real, same[:100]) == quality.neighbourhoods(
        real[:100], same[:100]
    )


def test_pca_is_that_of_scikit_learn(digits):
    from sklearn.decomposition import PCA

    images = digits[0][0][:500]
    x = ddpm.to_input(images)
    theirs = PCA(64, svd_solver='full').fit_transform(x.flatten(1).numpy())[:, ::-1]
    ours = quality.embed(quality.PCA(images), images, CPU).numpy()
    assert np.abs(np.abs(ours) - np.abs(theirs)).max() < 1e-2  # the signs are free


def test_controls_are_in_order_for_real_digits(digits):
    (train, labels), (test, _) = ((ddpm.to_uint8(ddpm.to_input(x)), y) for x, y in digits)
    *floor, base = train.split(500)
    pca = quality.PCA(train)
    real = quality.embed(pca, test, CPU)
    controls = quality.make_controls(base, train, labels, seed=0)
    scores = quality.frechet_over_floor(
        real, controls, floor, lambda images: quality.embed(pca, images, CPU)
    )
    assert len(scores['floor']) == quality.FLOOR_DRAWS and scores['N'] == 500
    fd = {'floor': max(scores['floor']), **scores['FD']}
    assert len(quality.ORDER) == 11
    assert all(fd[less] < fd[more] for less, more in quality.ORDER)
    assert fd['copies of training digits'] < 1.25 * fd['floor']
    for name, (ratio, low, high) in scores['FD / floor, low, high'].items():
        assert ratio == pytest.approx(fd[name] / np.mean(scores['floor']))
        assert low == fd[name] / max(scores['floor']) and high == fd[name] / min(scores['floor'])


def test_a_missing_class_shows_in_features_of_the_class(digits):
    classes = torch.nn.functional.one_hot(digits[0][1]).double()
    *floor, base, test = classes.split(500)
    worst = max(quality.frechet(test, part) for part in floor)
    assert quality.frechet(test, base[base[:, 0] == 0]) > 2 * worst


def test_no_zeros_are_left_out_and_nothing_else(digits):
    train, labels = ddpm.to_uint8(ddpm.to_input(digits[0][0])), digits[0][1]
    controls = quality.make_controls(train[:200], train, labels, seed=0)
    others = {image.numpy().tobytes() for image in train[labels != 0]}
    assert all(image.numpy().tobytes() in others for image in controls['no zeros'])
    assert {images.shape for images in controls.values()} == {train[:200].shape}
    assert torch.equal(controls['copies of training digits'], train[:200])
    assert torch.equal(controls['shifted by one pixel'][..., 1:], train[:200, ..., :-1])


# ---- Classes, memorisation, likelihood -------------------------------------------------------


def test_class_balance():
    real = 20 * torch.eye(10).double().repeat(100, 1)
    zeros = torch.zeros(500, 10).double()
    zeros[:, 0] = 1
    one_class = quality.class_balance(zeros, real)
    assert one_class['total variation'] == pytest.approx(0.9)
    balanced = quality.class_balance(real[:500], real)
    assert balanced['total variation'] == pytest.approx(0)
    mean, most = balanced['by chance, mean and 95%']
    # the mean absolute deviation of ten binomials, which are nearly normal
    assert mean == pytest.approx(5 * math.sqrt(2 / math.pi * 0.1 * 0.9 / 500), rel=0.05)
    assert mean < most < 2 * mean


def test_memorised_samples_are_nearer_than_unseen_digits():
    train, unseen, new = (gaussians(2000, 8, seed) for seed in range(3))
    sets = {'new': new, 'copies': train[:300], 'far': new + 100}
    result, near = quality.memorisation(sets, unseen, train, CPU)
    assert result['share below']['copies'] == 1 and result['share below']['far'] == 0
    assert 0 < result['share below']['new'] < 0.03  # 0.01 expected, +- 0.003
    distance, index = near['new']
    every = np.linalg.norm(new[:50, None].numpy() - train[None].numpy(), axis=2)
    assert np.allclose(distance[:50], every.min(1), atol=1e-4)
    assert (index[:50].numpy() == every.argmin(1)).all()
    assert near['copies'][1].tolist() == list(range(300))


def test_bins_of_the_decoder_hold_all_of_its_mass():
    norm = pytest.importorskip('scipy.stats').norm
    k = torch.arange(256).double()
    for mean in (0.0, 1.0, 0.3):  # half of it in an outer bin, or none
        p = quality.Normal(*torch.tensor([mean, 0.01], dtype=torch.float64))
        ours = quality.log_bin(p, k / 255)
        assert ours.exp().sum().item() == pytest.approx(1, abs=1e-12)
    edges = np.array([-np.inf, *(np.arange(255) + 0.5) / 255, np.inf])
    theirs = np.diff(norm.cdf(edges, 0.3, 0.01))
    near = slice(70, 84)  # further out differences of the cdf lose their digits
    assert np.allclose(ours[near].exp(), theirs[near], rtol=1e-9)
    assert ours.isfinite().all()
    assert ours[255].item() == pytest.approx(norm.logsf(254.5 / 255, 0.3, 0.01), rel=1e-9)


class Oracle:
    """Predicts the noise in images that are all zero, times a factor."""

    time_steps = STEPS

    def __init__(self, factor):
        self.factor, self.abar = factor, ddpm.DDPM_Scheduler(STEPS).alpha

    def __call__(self, x, t):
        return self.factor * x / (1 - self.abar[t]).sqrt()[:, None, None, None]


def test_variational_bound_of_a_perfect_model_has_a_closed_form():
    images = torch.zeros(10, 1, 32, 32).byte()
    found = quality.variational_bound(Oracle(1), images, CPU)
    beta = torch.linspace(1e-4, 0.02, STEPS).double()
    variance = 1 - (1 - beta).cumprod(0)  # of x_t
    L_T = (variance[-1] - 1 - variance[-1].log()) / 2
    ratio = variance[:-1] / variance[1:]  # of the posterior's variance to beta
    L_t = ((ratio - 1 - ratio.log()) / 2).sum()
    L_0 = -torch.special.log_ndtr(1 / 510 / beta[0].sqrt())
    for name, expected in (('L_T', L_T), ('L_t', L_t), ('L_0', L_0)):
        assert found[name] == pytest.approx(1024 * expected.item(), rel=1e-3), name
    assert found['nats'] == pytest.approx(found['L_T'] + found['L_t'] + found['L_0'])
    worse = quality.variational_bound(Oracle(0.9), images, CPU)
    assert worse['nats'] > found['nats'] + 10 * worse['standard error'] > found['nats']


def test_histogram_counts_each_pixel_by_itself():
    train, test = torch.zeros(10, 1, 4, 4).byte(), torch.zeros(3, 1, 4, 4).byte()
    train[:5, :, 0, 0], test[:, :, 0, 0], test[:, :, 1, 1] = 255, 255, 7
    expected = -14 * math.log(11 / 266) - math.log(6 / 266) - math.log(1 / 266)
    assert quality.histogram_nats(train, test) == pytest.approx(expected)


# ---- What is out of order, and the whole -----------------------------------------------------


def sound_result():
    worth = {'floor': 1.0, 'copies of training digits': 1.0, 'samples': 5.0}
    worth |= {name: 2.0 for name in quality.WEAK}
    worth |= {quality.GAUSSIAN: 30.0, quality.UNIFORM: 40.0}
    worth |= {'noise of 0.3': 10.0, 'blurred by 1.5 pixels': 10.0}
    caught = {'samples': 0.01, 'copies': 1.0, quality.NOISY_COPIES: 0.9}
    return {
        'spaces': {
            space: {
                'all': {'floor': [0.9, 1.0], 'FD': dict(worth)},
                'fewer': {'floor': [1.9, 2.0], 'FD': {'EMA': 5.0, 'non-EMA': 6.0}},
            }
            for space in ('CNN', 'second CNN', 'PCA-64')
        },
        'memorisation': {space: {'share below': dict(caught)} for space in ('pixels', 'CNN')},
        'recognised': {
            'samples': {'samples': 0.1},
            'digits': {'test split': 0.98},
            'changed slightly': {'noise of 0.1': 0.95},
            'noise': {'blobs': 0.01},
            'no digits': {'samples of 100% random weights': 0.04},
            'open to dispute': {'mirrored': 0.5},
        },
    }


@pytest.mark.parametrize(
    'space, part, name, value',
    [
        ('CNN', 'all', 'noise of 0.1', 0.95),
        ('second CNN', 'all', 'blurred by 0.7 pixels', 11.0),
        ('PCA-64', 'all', 'shifted by one pixel', 1.0),
        ('CNN', 'all', 'no zeros', 31.0),
        ('CNN', 'all', quality.GAUSSIAN, 41.0),
        ('PCA-64', 'all', quality.UNIFORM, math.nan),
        ('second CNN', 'all', 'copies of training digits', 1.4),
        ('CNN', 'fewer', 'EMA', 7.0),
    ],
)
def test_a_control_out_of_order_is_reported(space, part, name, value):
    result = sound_result()
    assert quality.broken(result) == []
    result['spaces'][space][part]['FD'][name] = value
    assert quality.broken(result)
    assert all(line.startswith(f'{space}: ') for line in quality.broken(result))


@pytest.mark.parametrize(
    'group, kind, share',
    [
        ('digits', 'test split', 0.96),
        ('changed slightly', 'noise of 0.1', 0.8),
        ('noise', 'blobs', 0.03),
        ('no digits', 'samples of 100% random weights', 0.06),
        ('no digits', 'samples of 100% random weights', math.nan),
    ],
)
def test_a_share_that_should_not_be_recognised_is_reported(group, kind, share):
    result = sound_result()
    result['recognised'][group][kind] = share
    (line,) = quality.broken(result)
    assert line.startswith(f'of {kind} {share:.1%} are recognised, not ')


@pytest.mark.parametrize('name', ['copies', quality.NOISY_COPIES])
def test_copies_that_are_not_caught_are_reported(name):
    result = sound_result()
    result['memorisation']['pixels']['share below'][name] = 0.3
    assert len(quality.broken(result)) == 1


@pytest.fixture
def checkpoint(workdir, monkeypatch, digits):
    """An untrained checkpoint, few digits, and classifiers that need not be good."""
    (images, labels), (test, test_labels) = digits
    few = (images[:720], labels[:720]), (test[:150], test_labels[:150])
    monkeypatch.setattr(quality, 'load_splits', lambda: few)
    monkeypatch.setattr(quality, 'LEAST_ACCURACY', 0.5)
    monkeypatch.setattr(quality, 'EPOCHS', 8)
    monkeypatch.setattr(quality, 'MIXED', 20)
    unet = {**SMALL, 'Channels': [4, 8, 16, 16], 'Attentions': [False] * 4, 'num_groups': 2}
    weights = small_unet(**unet, time_steps=STEPS).state_dict()
    saved = {
        'weights': weights,
        'ema': {f'module.{k}': v for k, v in weights.items()},
        'optimizer': {'state': {}, 'param_groups': []},
        'unet': {**ddpm.UNET_DEFAULTS, **unet, 'time_steps': STEPS},
        'config': {'dataset': 'MNIST'},
        'losses': torch.zeros(7),
    }
    torch.save(saved, 'tiny')
    return saved


def run_main(monkeypatch, *args):
    """What the program exits with: None, or a message and so 1; and its JSON."""
    monkeypatch.setattr(sys, 'argv', ['quality.py', 'tiny', '--output', 'results', *args])
    try:
        code = quality.main()
    except SystemExit as error:
        code = error.code
    paths = list(Path('results').glob('*.json'))
    return code, json.loads(paths[0].read_text()) if paths else None


def test_whole_run(checkpoint, monkeypatch, capsys):
    code, result = run_main(monkeypatch, '--samples', '100', '--steps', '4', '--seed', '3')
    drawn = quality.draw(quality.load_model(checkpoint, 'ema', CPU), 100, 4, 3)
    expected = {'N': 100, 'steps': 4, 'seed': 3}
    expected['sha256'] = hashlib.sha256(drawn.numpy().tobytes()).hexdigest()
    assert result['samples'] == expected
    assert result['versions']['torch'] == torch.__version__.split('+')[0]
    assert result['machine'] and result['date'] and result['run']['optimizer steps'] == 7
    assert set(result['spaces']) == {'CNN', 'second CNN', 'PCA-64'}
    for scores in result['spaces'].values():
        assert scores['all']['N'] == 100 and scores['fewer']['N'] == 20
        assert len(scores['all']['floor']) == len(scores['fewer']['floor']) == 5
        # an untrained model is far from the digits
        assert scores['all']['FD / floor, low, high']['samples'][1] > 3
        assert scores['samples']['KID'] > scores['train digits']['KID']
        assert scores['samples']['coverage'] < scores['train digits']['coverage']
    assert result['classifiers']['features'] == {'CNN': 96, 'second CNN': 64, 'PCA-64': 64}
    assert sum(result['classes']['samples']) == pytest.approx(1)
    recognised = result['recognised']
    assert list(recognised) == ['samples', *quality.LIMITS]
    shares = {kind: share for group in recognised.values() for kind, share in group.items()}
    assert shares['samples'] < 0.2 < 0.3 < shares['test split']  # an untrained model's, and digits
    assert set(result['classifiers']['accuracy']) == {'CNN', 'second CNN', 'third CNN'}
    assert {f'samples of {share}% random weights' for share in (10, 25, 100)} < set(shares)
    for near in result['memorisation'].values():
        assert near['share below']['copies'] == 1 and near['share below']['samples'] < 0.1
    assert result['bound']['nats'] > result['bound']['histogram of each pixel']
    assert bool(code) == bool(result['broken'])
    for part in ('samples', 'closest', 'controls'):
        assert Path(f'outputs/tiny/quality-4-{part}.png').stat().st_size > 1000
    out = capsys.readouterr().out
    assert 'N = 100 samples in 4 steps' in out and expected['sha256'][:12] in out
    assert all(f' | {kind} | {share:.1%} | ' in out for kind, share in shares.items())

    # again, with the classifiers that the first run has left: nothing differs
    monkeypatch.setattr(torch.optim, 'Adam', None)
    again = run_main(monkeypatch, '--samples', '100', '--steps', '4', '--seed', '3')[1]
    assert again | {'minutes': 0} == result | {'minutes': 0}


def test_a_file_to_draw_from_is_measured_without_the_other_weights(checkpoint, monkeypatch, capsys):
    ema = {k: v.half() for k, v in checkpoint['ema'].items()}
    torch.save({'ema': ema, 'unet': checkpoint['unet'], 'config': {'dataset': 'MNIST'}}, 'tiny')
    saved = ddpm.load_checkpoint('tiny')
    result, _ = quality.measure(saved, *quality.load_splits(), samples=100)
    assert result['samples']['steps'] == STEPS  # all, where nothing else is asked for
    drawn = quality.draw(quality.load_model(saved, 'ema', CPU), 100, STEPS, 0)
    assert result['samples']['sha256'] == hashlib.sha256(drawn.numpy().tobytes()).hexdigest()
    assert all(list(s['fewer']['FD']) == ['EMA'] for s in result['spaces'].values())
    assert result['run']['optimizer steps'] is None
    said = quality.report(result)
    assert 'non-EMA, N' not in said and 'No control from the non-EMA weights' in said


def test_a_quick_measure_has_neither_the_other_weights_nor_the_bound(checkpoint):
    result, _ = quality.measure(
        checkpoint, *quality.load_splits(), samples=100, steps=2, quick=True
    )
    assert 'weights' in checkpoint and result['bound'] == {}
    assert all(list(s['fewer']['FD']) == ['EMA'] for s in result['spaces'].values())
    said = quality.report(result)
    assert 'Variational bound' not in said and 'No control from the non-EMA weights' in said


def test_mistakes_end_in_one_line(checkpoint, monkeypatch):
    assert 'samples is 121' in run_main(monkeypatch, '--samples', '121', '--steps', '4')[0]
    assert 'steps is 21' in run_main(monkeypatch, '--samples', '100', '--steps', '21')[0]
    monkeypatch.setattr(quality, 'LEAST_ACCURACY', 1.1)
    monkeypatch.setattr(quality, 'EPOCHS', 1)
    assert 'classifier reaches' in run_main(monkeypatch, '--samples', '100', '--steps', '4')[0]
    torch.save({**checkpoint, 'config': {'dataset': 'FashionMNIST'}}, 'tiny')
    code, result = run_main(monkeypatch)
    assert 'not trained on MNIST' in code and result is None
