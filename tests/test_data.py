"""Data: MNIST as it comes with the repository, datasets that are fetched, folders of pictures."""

import gzip
import os
import shutil
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS, ROOT, SMALL, TINY
from PIL import Image
from test_faults import at_step
from test_training import assert_identical
from torch_fidelity import FeatureExtractorBase, calculate_metrics, register_feature_extractor
from torchvision import datasets
from torchvision.transforms import functional as transforms

import ddpm

sys.path.append(str(ROOT / 'benchmarks'))
import own_pictures  # noqa: E402

TRAIN_IMAGES = 'train-images-idx3-ubyte.gz'


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder in place of data/."""
    folder = tmp_path / 'data'
    folder.mkdir()
    monkeypatch.setattr(ddpm, 'DATA', folder)
    yield folder
    socket.setdefaulttimeout(None)


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_, **__):
        raise AssertionError('the network was asked')

    monkeypatch.setattr(socket, 'getaddrinfo', fail)
    monkeypatch.setattr(socket, 'create_connection', fail)


# ---- MNIST ------------------------------------------------------------------------------------


def content(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob('*')]}


def test_mnist_is_what_torchvision_reads(tmp_path, monkeypatch, no_network):
    """Of a copy of the same files, since it unpacks them; from any folder, without writing."""
    before = content(ROOT / 'data')
    monkeypatch.chdir(tmp_path)
    images = ddpm.load_images('MNIST')
    assert content(ROOT / 'data') == before
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(ROOT / 'data/MNIST/raw', 'theirs/MNIST/raw')
    theirs = datasets.MNIST('theirs', train=True, download=True).data
    assert images.dtype == torch.uint8 and images.shape == (60000, 1, 28, 28)
    assert torch.equal(images[:, 0], theirs)


def broken(how, packed):
    half = len(packed) // 2
    return {
        'truncated': packed[:half],
        'changed': packed[:half] + bytes([packed[half] ^ 1]) + packed[half + 1 :],
        'text': b'not found',
        'empty': b'',
        'cut before it was packed': gzip.compress(gzip.decompress(packed)[:-100]),
    }[how]


@pytest.mark.parametrize(
    'how', ['truncated', 'changed', 'text', 'empty', 'cut before it was packed', 'missing']
)
def test_a_damaged_mnist_is_named_and_left_alone(data, how):
    path = data / 'MNIST/raw' / TRAIN_IMAGES
    if how != 'missing':
        path.parent.mkdir(parents=True)
        digits = torch.randint(256, (16 + 20 * 28 * 28,), dtype=torch.uint8)
        path.write_bytes(broken(how, gzip.compress(bytes(digits.tolist()))))
    before = content(data)
    with pytest.raises(ddpm.UserError, match='is damaged or missing') as caught:
        ddpm.load_images('MNIST')
    assert str(caught.value).startswith(str(path))
    assert '\n' not in str(caught.value)
    assert content(data) == before


# ---- Other datasets ---------------------------------------------------------------------------

NAMES = ['FashionMNIST', 'KMNIST', 'QMNIST', 'CIFAR10']


def source(fetch, shape=(6, 28, 28)):
    """Like torchvision's classes: reads root/Name/images, which `fetch` writes if asked to."""

    class Source:
        mirrors = ['http://somewhere/']

        def __init__(self, root, train, download=False):
            assert train
            path = Path(root) / 'Name/images'
            if download:
                path.parent.mkdir()
                fetch(path)
            if not path.exists():
                raise RuntimeError('Dataset not found. You can use download=True to download it')
            self.data = torch.tensor(list(path.read_bytes()), dtype=torch.uint8).reshape(shape)
            self.data = self.data.numpy() if len(shape) == 4 else self.data

    return Source


def never(path):
    raise AssertionError('fetched')


@pytest.mark.parametrize('name', NAMES)
def test_other_datasets_have_the_same_form(name, data, workdir, monkeypatch):
    """What torchvision gives is (N, H, W), or (N, H, W, 3) for CIFAR10; here from local files."""
    shape = (6, 32, 32, 3) if name == 'CIFAR10' else (6, 28, 28)
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    (data / 'Name').mkdir()
    (data / 'Name/images').write_bytes(bytes(pixels.flatten().tolist()))
    monkeypatch.setattr(datasets, name, source(never, shape))
    images = ddpm.load_images(name)
    channels = 3 if name == 'CIFAR10' else 1
    assert images.shape == (6, channels, shape[1], shape[1])
    assert torch.equal(images, pixels.reshape(*shape[:3], -1).permute(0, 3, 1, 2))
    ddpm.train(**{**TINY, 'dataset': name, 'batch_size': 3, 'sample_every': 2})
    ddpm.inference('checkpoints/tiny', num_steps=3)
    assert ddpm.load_checkpoint('checkpoints/tiny')['unet']['input_channels'] == channels


def test_unpacked_files_of_torchvision_are_used_without_the_network(data, no_network):
    """The real class of torchvision, on files as it leaves them; they stay as they are."""
    raw = data / 'KMNIST/raw'
    raw.mkdir(parents=True)
    for path in (ROOT / 'data/MNIST/raw').glob('*.gz'):  # KMNIST's have the same names and form
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    before = content(data)
    assert torch.equal(ddpm.load_images('KMNIST')[:100], DIGITS)
    assert content(data) == before


def test_a_download_says_what_it_fetches_and_happens_once(data, monkeypatch, capfd):
    fetched = []

    def fetch(path):
        fetched.append(path)
        path.write_bytes(bytes(range(196)) * 24)

    monkeypatch.setattr(datasets, 'KMNIST', source(fetch))
    for _ in range(2):
        images = ddpm.load_images('KMNIST')
        assert bytes(images.flatten().tolist()) == bytes(range(196)) * 24
    assert len(fetched) == 1
    out = capfd.readouterr().out
    assert out.count('Fetching KMNIST from ') == 1 and str(data) in out
    assert [path.name for path in data.iterdir()] == ['Name']


@pytest.mark.parametrize('stop', [KeyboardInterrupt, SystemExit])
def test_what_an_interrupted_download_leaves_is_not_taken_for_data(data, monkeypatch, stop):
    def interrupted(path):
        path.write_bytes(bytes(28 * 28))
        raise stop

    # shape (-1, ...): a short file would be read as well
    monkeypatch.setattr(datasets, 'KMNIST', source(interrupted, (-1, 28, 28)))
    with pytest.raises(stop):
        ddpm.load_images('KMNIST')
    assert list(data.iterdir()) == []
    whole = source(lambda path: path.write_bytes(bytes(6 * 28 * 28)), (-1, 28, 28))
    monkeypatch.setattr(datasets, 'KMNIST', whole)
    assert len(ddpm.load_images('KMNIST')) == 6


def test_without_a_network_there_is_one_clear_line(data, monkeypatch):
    def fetch(path):
        urllib.request.urlopen('http://127.0.0.1:9/KMNIST')  # where nobody listens

    monkeypatch.setattr(datasets, 'KMNIST', source(fetch))
    with pytest.raises(ddpm.UserError, match='KMNIST .*cannot be fetched.*refused') as caught:
        ddpm.load_images('KMNIST')
    assert str(data) in str(caught.value) and '\n' not in str(caught.value)
    assert list(data.iterdir()) == []


def test_a_network_that_does_not_answer_is_given_up(data, monkeypatch):
    assert ddpm.NETWORK_SECONDS <= 15  # torchvision may ask twice
    monkeypatch.setattr(ddpm, 'NETWORK_SECONDS', 0.2)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        address = f'http://127.0.0.1:{silent.getsockname()[1]}/KMNIST'
        monkeypatch.setattr(datasets, 'KMNIST', source(lambda _: urllib.request.urlopen(address)))
        socket.setdefaulttimeout(60)  # the test's own patience
        begun = time.monotonic()
        with pytest.raises(ddpm.UserError, match='KMNIST .*cannot be fetched.*timed out'):
            ddpm.load_images('KMNIST')
    assert time.monotonic() - begun < 20


def test_the_folder_for_data_is_made(data, monkeypatch):
    data.rmdir()
    monkeypatch.setattr(datasets, 'KMNIST', source(lambda p: p.write_bytes(bytes(6 * 28 * 28))))
    assert len(ddpm.load_images('KMNIST')) == 6


@pytest.mark.parametrize('dataset', ['MINST', 'no/such/folder', 5, None])
def test_an_unknown_dataset(workdir, dataset):
    with pytest.raises(ddpm.UserError, match='must be MNIST, FashionMNIST, .* or a folder'):
        ddpm.load_images(dataset)
    with pytest.raises(ddpm.UserError, match='^dataset is '):
        ddpm.train(**{**TINY, 'dataset': dataset})


def test_another_image_size_is_for_folders_only():
    with pytest.raises(ddpm.UserError, match='image_size is 64, but that of MNIST is always 32'):
        ddpm.load_images('MNIST', 64)


def test_a_dataset_with_another_number_of_images_is_refused(workdir, monkeypatch):
    ddpm.train(**{**TINY, 'num_epochs': 1})
    before = Path('checkpoints/tiny').read_bytes()
    few = ddpm.load_images('Few')
    for others in (few[:11], torch.cat([few, few[:4]]), few.flip(0)):
        monkeypatch.setattr(ddpm, 'load_images', lambda *_, others=others: others)
        with pytest.raises(ddpm.UserError, match=r"checkpoints/tiny is from .*data='12 images"):
            ddpm.train(**TINY)
    assert Path('checkpoints/tiny').read_bytes() == before


# ---- Folders ----------------------------------------------------------------------------------


def noise(height, width, channels=3, seed=0):
    """Smooth noise, uint8 (height, width[, channels])."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, channels), np.uint8)
    picture = Image.fromarray(small.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def save(pixels, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.mark.parametrize('channels', [1, 3])
def test_pictures_of_the_right_size_are_taken_as_they_are_by_path(tmp_path, channels):
    """Exactly, in the order of the paths, and not of their making; capitals in a suffix count."""
    names = ['b.png', 'a/z.PNG', 'a/b.bmp', 'ä ö/数字.png', 'c.tiff', 'a.png']
    pictures = {tmp_path / n: noise(32, 32, channels, i) for i, n in enumerate(names)}
    for path, pixels in pictures.items():
        save(pixels, path)
    expected = np.stack([pictures[path] for path in sorted(pictures)]).reshape(6, 32, 32, channels)
    images = ddpm.load_images(str(tmp_path))
    assert images.dtype == torch.uint8 and images.is_contiguous()
    assert torch.equal(images, torch.tensor(expected).permute(0, 3, 1, 2))


def test_grey_if_all_are_else_colour(tmp_path):
    grey = noise(32, 32, 1)
    save(grey, tmp_path / 'grey.png')
    save(np.stack([grey] * 3, axis=-1), tmp_path / 'stored as rgb.png')
    save(np.stack([grey] * 3 + [grey * 0 + 255], axis=-1), tmp_path / 'with alpha.png')
    images = ddpm.load_images(str(tmp_path))
    assert images.shape == (3, 1, 32, 32)
    assert (images == torch.tensor(grey)).all()
    save(noise(32, 32), tmp_path / 'z colour.png')
    images = ddpm.load_images(str(tmp_path))
    assert images.shape == (4, 3, 32, 32)
    assert (images[:3] == torch.tensor(grey)).all()
    assert torch.equal(images[3], torch.tensor(noise(32, 32)).permute(2, 0, 1))


def test_sixteen_bits_are_not_clipped(tmp_path):
    grey = noise(32, 32, 1).astype(np.uint16)
    Image.fromarray(grey * 257).save(tmp_path / 'a.png')
    Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / 'b.tiff')  # Pillow's mode I
    images = ddpm.load_images(str(tmp_path))
    assert images.shape == (2, 1, 32, 32)
    assert (images == torch.tensor(grey.astype(np.uint8))).all()


@pytest.mark.parametrize('height, width', [(48, 100), (100, 48), (97, 33), (20, 30)])
@pytest.mark.parametrize('size', [32, 64])
def test_the_middle_square_is_resized(tmp_path, height, width, size):
    """Against torchvision's own crop and antialiased resizing, which differ by less than a grey."""
    pixels = noise(height, width)
    save(pixels, tmp_path / 'a.png')
    images = ddpm.load_images(str(tmp_path), size)
    assert images.shape == (1, 3, size, size)
    x = torch.tensor(pixels).permute(2, 0, 1)
    x = transforms.center_crop(x, min(height, width))
    x = transforms.resize(x, [size, size], transforms.InterpolationMode.BICUBIC, antialias=True)
    difference = (images[0].int() - x.int()).abs().float()
    assert difference.mean() < 2
    assert difference.max() < 40  # at the sharp corners of smooth noise; a pixel's shift is more


def test_resizing_is_antialiased(tmp_path):
    lines = np.zeros((256, 256), np.uint8)
    lines[:, ::2] = 255
    save(lines, tmp_path / 'a.png')
    assert ((ddpm.load_images(str(tmp_path)).int() - 128).abs() <= 8).all()


def test_a_photograph_on_its_side_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to show
    pixels = noise(32, 32)
    save(pixels, tmp_path / 'a.png', exif=exif)
    expected = np.rot90(pixels, -1).copy()
    assert torch.equal(ddpm.load_images(str(tmp_path))[0], torch.tensor(expected).permute(2, 0, 1))


def test_what_is_transparent_lies_on_white(tmp_path):
    picture = np.zeros((32, 32, 4), np.uint8)  # black
    picture[8:24, 8:24, 3] = 255  # where it can be seen
    Image.fromarray(picture, 'RGBA').save(tmp_path / 'a.png')
    (image,) = ddpm.load_images(str(tmp_path))
    assert image.shape == (1, 32, 32)
    assert (image[0] == 255 - torch.from_numpy(picture[..., 3])).all()


def test_what_cannot_be_read_is_named_and_left_out(tmp_path, capfd):
    for name in ('a.png', 'b.jpg', 'c.png', 'd.png'):
        save(noise(32, 32), tmp_path / name)
    (tmp_path / 'a.png').write_bytes((tmp_path / 'a.png').read_bytes()[:300])
    (tmp_path / 'c.png').write_text('no picture')
    for name in ('.hidden.png', '.hidden/e.png', 'sub/.git/f.png'):
        save(noise(32, 32), tmp_path / name)
    (tmp_path / 'labels.csv').write_text('a, b')
    assert len(ddpm.load_images(str(tmp_path))) == 2
    err = capfd.readouterr().err
    assert err.count('is left out') == 2
    assert f'{tmp_path}/a.png is left out: ' in err and f'{tmp_path}/c.png is left out: ' in err


def test_a_hidden_folder_may_itself_be_the_dataset(tmp_path):
    save(noise(32, 32), tmp_path / '.cache/pictures/a.png')
    assert len(ddpm.load_images(str(tmp_path / '.cache/pictures'))) == 1


@pytest.mark.parametrize('files', [[], ['notes.txt'], ['broken.png']])
def test_a_folder_without_pictures(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text('no picture')
    with pytest.raises(ddpm.UserError, match='has no picture that can be read') as caught:
        ddpm.load_images(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def folder_of_pictures(path, size=32):
    for i in range(8):
        save(noise(size, size, 3, i), path / f'{i}.png')
    return {**TINY, 'dataset': str(path)}


def test_a_folder_is_trained_on_resumed_exactly_and_drawn_from(workdir, monkeypatch):
    """Stopped in the middle of an epoch, at a real learning rate; of the checkpoint every bit."""
    numbers = folder_of_pictures(workdir / 'my ä/图片', 80) | dict(image_size=64, sample_every=2)
    numbers |= dict(batch_size=2, lr=1e-3)
    ddpm.train(**numbers)
    parts = {**numbers, 'checkpoint_path': 'checkpoints/parts'}
    with monkeypatch.context() as stopped, pytest.raises(SystemExit):
        at_step(stopped, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        ddpm.train(**parts)
    assert len(ddpm.load_checkpoint('checkpoints/parts')['losses']) == 3
    ddpm.train(**parts)
    whole = ddpm.load_checkpoint('checkpoints/tiny')
    assert_identical(whole, ddpm.load_checkpoint('checkpoints/parts'))
    assert len(whole['losses']) == 8 and whole['unet']['input_channels'] == 3
    ddpm.inference('checkpoints/tiny', num_steps=3, num_images=8)
    assert Image.open('outputs/tiny/grid.png').size == (8 * 130 + 2, 130 + 2)
    assert Image.open('outputs/tiny/progress/epoch_002.png').mode == 'RGB'


class Averages(FeatureExtractorBase):
    """The average colours of an image's four quarters, in place of Inception's features, which are
    a download. It keeps the images that it is given."""

    seen = []

    def __init__(self, name, features, **_):
        super().__init__(name, features)

    @staticmethod
    def get_provided_features_list():
        return ('quarters',)

    def forward(self, images):  # (B, 3, H, W) uint8
        self.seen.append(images)
        return (F.adaptive_avg_pool2d(images.double(), 2).flatten(1),)


register_feature_extractor('averages', Averages)


def fidelity(a, b):
    """The FID of torch-fidelity, and the images that it found in the two folders."""
    Averages.seen = []
    options = dict(fid=True, cuda=False, verbose=False, save_cpu_ram=True, batch_size=1000)
    options |= dict(feature_extractor='averages', feature_layer_fid='quarters')
    fid = calculate_metrics(input1=str(a), input2=str(b), samples_find_deep=True, **options)
    return fid['frechet_inception_distance'], *Averages.seen


def frechet(a, b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of the same averages, by numpy."""
    a, b = (x.numpy().reshape(len(x), 3, 2, 16, 2, 16).mean((3, 5)).reshape(-1, 12) for x in (a, b))
    A, B = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(A)
    root = vectors * values.clip(0) ** 0.5 @ vectors.T
    covariance = np.linalg.eigvalsh(root @ B @ root).clip(0) ** 0.5
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B) - 2 * covariance.sum()


@pytest.mark.parametrize('channels', [1, 3])
def test_samples_and_pictures_are_what_fid_tools_take(workdir, monkeypatch, channels):
    """torch-fidelity finds in both folders the very pixels that were trained on and drawn."""
    for i in range(70):
        save(noise(32, 32, channels, i), workdir / f'pictures/{i % 3}/{i}.png')
    ddpm.train(**{**TINY, 'dataset': 'pictures'})
    drawn, process = [], ddpm.reverse_process

    def spy(*arguments):
        for t, x in process(*arguments):
            yield t, x
        drawn.append(ddpm.to_uint8(x))

    monkeypatch.setattr(ddpm, 'reverse_process', spy)
    monkeypatch.setattr(ddpm, 'DRAWING', dict(num_images=72, num_steps=3, seed=1))
    monkeypatch.setattr('sys.argv', ['ddpm.py', '--sample', 'checkpoints/tiny'])
    ddpm.main()

    samples = 'outputs/sample/tiny/72_images_seed_1'
    fid, theirs, ours = fidelity('pictures', samples)
    pictures = ddpm.load_images('pictures')
    assert pictures.shape == (70, channels, 32, 32) and len(drawn) == 1
    assert torch.equal(theirs, pictures.expand(-1, 3, -1, -1))
    assert torch.equal(ours, drawn[0].expand(-1, 3, -1, -1))
    assert fid > 100
    assert fid == pytest.approx(frechet(theirs, ours), rel=1e-6)
    assert fidelity(samples, samples)[0] == pytest.approx(0, abs=1e-3)


def test_the_worked_example_goes_on_where_it_stopped(workdir, monkeypatch):
    """Between two faces, and in the middle of an epoch."""
    monkeypatch.setattr(own_pictures, 'COUNT', 20)
    monkeypatch.setattr(own_pictures, 'NUMBERS', {**TINY, 'num_time_steps': 4})
    monkeypatch.setattr(ddpm, 'PREVIEW', {})
    drawn, face = [], own_pictures.face

    def stopped_face(number):
        drawn.append(number)
        if len(drawn) == 7:
            raise KeyboardInterrupt
        return face(number)

    monkeypatch.setattr(own_pictures, 'face', stopped_face)
    with pytest.raises(KeyboardInterrupt):
        own_pictures.main()
    with monkeypatch.context() as stopped, pytest.raises(SystemExit):
        at_step(stopped, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        own_pictures.main()
    own_pictures.main()
    assert drawn == [*range(7), *range(6, 20)]  # each once
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 10
    assert Path('outputs/tiny/grid.png').exists()
    faces = ddpm.load_images('outputs/own_pictures/faces')
    assert faces.shape == (20, 3, 32, 32) and len(faces.unique(dim=0)) == 20


@pytest.mark.parametrize('change', ['another picture', 'one less', 'one more', 'another order'])
def test_a_folder_whose_content_changed_is_refused(workdir, change):
    folder = workdir / 'pictures'
    numbers = folder_of_pictures(folder)
    ddpm.train(**{**numbers, 'num_epochs': 1})
    before = Path('checkpoints/tiny').read_bytes()
    if change == 'another picture':
        save(noise(32, 32, 3, 99), folder / '3.png')
    if change == 'one less':
        (folder / '7.png').unlink()
    if change == 'one more':
        save(noise(32, 32), folder / '8.png')
    if change == 'another order':
        (folder / '7.png').rename(folder / '00.png')
    with pytest.raises(ddpm.UserError, match="is from a run with data='8 images"):
        ddpm.train(**numbers)
    assert Path('checkpoints/tiny').read_bytes() == before


def test_a_path_object_is_as_good_as_a_string(workdir):
    numbers = folder_of_pictures(workdir / 'pictures')
    ddpm.train(**{**numbers, 'num_epochs': 1, 'dataset': Path(numbers['dataset'])})
    ddpm.train(**numbers)
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 4


@pytest.mark.parametrize('size', [30, 33, 0, 32.0])
def test_an_image_size_that_does_not_fit(workdir, size):
    """SMALL halves twice; said before anything is read, drawn or saved."""
    numbers = folder_of_pictures(workdir / 'pictures') | dict(unet=SMALL, image_size=size)
    with pytest.raises(ddpm.UserError, match='^image_size is '):
        ddpm.train(**numbers)
    assert not Path('checkpoints/tiny').exists()


def test_a_batch_larger_than_the_folder(workdir):
    numbers = folder_of_pictures(workdir / 'pictures') | dict(batch_size=9)
    with pytest.raises(ddpm.UserError, match='batch_size is 9, but .*pictures has 8 images'):
        ddpm.train(**numbers)
