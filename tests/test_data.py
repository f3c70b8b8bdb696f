"""Data: MNIST as it comes with the repository, datasets that are fetched, folders of pictures."""

import errno
import functools
import gzip
import hashlib
import http.server
import multiprocessing.pool
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS, ROOT, TINY
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
    assert images.dtype == torch.uint8 and images.shape == (60000, 1, 32, 32)
    assert torch.equal(images[:, 0], F.pad(theirs, [2] * 4))
    assert torch.equal(ddpm.load_images('mnist'), images)


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
    """What torchvision gives is (N, 28, 28), or (N, 32, 32, 3) for CIFAR10; here from local files.
    Small and capital letters are the same."""
    shape = (6, 32, 32, 3) if name == 'CIFAR10' else (6, 28, 28)
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    (data / 'Name').mkdir()
    (data / 'Name/images').write_bytes(bytes(pixels.flatten().tolist()))
    monkeypatch.setattr(datasets, name, source(never, shape))
    images = ddpm.load_images(name)
    channels = 3 if name == 'CIFAR10' else 1
    assert images.dtype == torch.uint8 and images.is_contiguous()
    assert images.shape == (6, channels, 32, 32)
    inner = images if name == 'CIFAR10' else images[..., 2:-2, 2:-2]
    assert torch.equal(inner, pixels.reshape(*shape[:3], -1).permute(0, 3, 1, 2))
    assert images.sum() == pixels.sum()  # the padding is 0
    assert torch.equal(ddpm.load_images(name.lower()), images)
    ddpm.train(**{**TINY, 'dataset': name.upper(), 'batch_size': 3, 'num_epochs': 1})
    assert ddpm.load_checkpoint('checkpoints/tiny')['unet']['input_channels'] == channels
    assert ddpm.inference('checkpoints/tiny', num_steps=3).shape == (64, channels, 32, 32)


def test_unpacked_files_of_torchvision_are_used_without_the_network(data, no_network):
    """The real class of torchvision, on files as it leaves them; they stay as they are."""
    raw = data / 'KMNIST/raw'
    raw.mkdir(parents=True)
    for path in (ROOT / 'data/MNIST/raw').glob('*.gz'):  # KMNIST's have the same names and form
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    before = content(data)
    assert torch.equal(ddpm.load_images('KMNIST')[:100, :, 2:-2, 2:-2], DIGITS)
    assert content(data) == before


KUZUSHIJI = (torch.arange(6 * 28 * 28) % 251).to(torch.uint8).reshape(6, 1, 28, 28)


def idx(tensor):
    """A tensor in the format of MNIST's files."""
    sizes = b''.join(size.to_bytes(4, 'big') for size in tensor.shape)
    return bytes([0, 0, 8, tensor.ndim]) + sizes + bytes(tensor.flatten().tolist())


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves KMNIST, the four files of which have six pictures. `cut` is how much of a file of that
    name arrives before the connection is closed."""

    asked, cut = [], {}

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = Path(self.path).name
        self.asked.append(name)
        file = Path(self.directory, name).read_bytes()
        self.send_response(200)
        self.send_header('Content-Length', str(len(file)))
        self.end_headers()
        self.wfile.write(file[: self.cut.get(name)])
        self.close_connection = True


@pytest.fixture
def server(data, tmp_path, monkeypatch):
    """The real class of torchvision, with a server of our own in place of its mirrors."""
    folder = tmp_path / 'server'
    folder.mkdir()
    resources = []
    for part in ('train', 't10k'):
        for name, tensor in (('images-idx3', KUZUSHIJI[:, 0]), ('labels-idx1', torch.arange(6))):
            path = folder / f'{part}-{name}-ubyte.gz'
            path.write_bytes(gzip.compress(idx(tensor)))
            resources.append((path.name, hashlib.md5(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(Server, 'asked', [])
    monkeypatch.setattr(Server, 'cut', {})
    handler = functools.partial(Server, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirror = f'http://127.0.0.1:{server.server_port}/'
        monkeypatch.setattr(datasets.KMNIST, 'mirrors', [mirror])
        monkeypatch.setattr(datasets.KMNIST, 'resources', resources)
        for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
            monkeypatch.delenv(name, raising=False)
        yield Server
        server.shutdown()


def assert_kmnist():
    images = ddpm.load_images('KMNIST')
    assert torch.equal(images, F.pad(KUZUSHIJI, [2] * 4))


def assert_asked_once(server):
    """For each file there are two requests: torchvision first looks where the address leads."""
    assert len({*server.asked}) == 4 and len(server.asked) == 8


@pytest.mark.parametrize('timeout', [None, 77.0])
def test_a_download_says_what_it_fetches_and_happens_once(data, server, capfd, timeout):
    """Into a folder that it makes; the socket's timeout is then the caller's again."""
    data.rmdir()
    socket.setdefaulttimeout(timeout)
    for _ in range(2):
        assert_kmnist()
    assert socket.getdefaulttimeout() == timeout
    assert_asked_once(server)
    assert capfd.readouterr().out.count(f'Fetching KMNIST into {data}') == 1


@pytest.mark.parametrize('name', ['train-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'])
def test_a_download_that_was_cut_off_heals(data, server, name):
    server.cut[name] = 20
    with pytest.raises(ddpm.UserError, match='KMNIST .* is damaged or cannot be fetched') as caught:
        ddpm.load_images('KMNIST')
    assert str(data) in str(caught.value) and '\n' not in str(caught.value)
    server.cut.clear()
    assert_kmnist()


@pytest.mark.parametrize('where', ['_urlretrieve', '_decompress'])
@pytest.mark.parametrize('number', [1, 2, 4])
def test_a_download_that_was_interrupted_heals(data, server, monkeypatch, where, number):
    """By Ctrl-C in the middle of fetching or unpacking one of the files, which is half written."""
    function, calls = getattr(datasets.utils, where), []

    def interrupted(source, path, **options):
        calls.append(path)
        if len(calls) == number:
            Path(path).write_bytes(b'half')
            raise KeyboardInterrupt
        return function(source, path, **options)

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(datasets.utils, where, interrupted)
        ddpm.load_images('KMNIST')
    assert socket.getdefaulttimeout() is None
    assert_kmnist()


def test_one_of_several_processes_fetches(data, server):
    """The others wait for it, and then find the files."""
    with multiprocessing.pool.ThreadPool(4) as pool:
        for images in pool.map(ddpm.load_images, ['KMNIST'] * 4):
            assert torch.equal(images, F.pad(KUZUSHIJI, [2] * 4))
    assert_asked_once(server)


def test_files_that_are_damaged_are_named(data, server):
    assert_kmnist()
    path = data / 'KMNIST/raw/train-images-idx3-ubyte'
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ddpm.UserError, match=f'KMNIST in {data} is damaged or cannot be fetched'):
        ddpm.load_images('KMNIST')
    assert len(path.read_bytes()) == 100  # it may be the user's own


def test_a_file_system_without_locks_can_be_fetched_into(data, server, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr('fcntl.flock', no_locks)
    assert_kmnist()


def test_without_a_network_there_is_one_clear_line(data, monkeypatch):
    mirror = ['http://127.0.0.1:9/']  # where nobody listens
    monkeypatch.setattr(datasets.KMNIST, 'mirrors', mirror)
    with pytest.raises(ddpm.UserError, match='KMNIST .*cannot be fetched.*refused') as caught:
        ddpm.load_images('KMNIST')
    assert str(data) in str(caught.value) and '\n' not in str(caught.value)


def test_a_network_that_does_not_answer_is_given_up(data, monkeypatch):
    assert ddpm.NETWORK_TIMEOUT <= 15  # torchvision may ask twice
    monkeypatch.setattr(ddpm, 'NETWORK_TIMEOUT', 0.2)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        mirror = f'http://127.0.0.1:{silent.getsockname()[1]}/'
        monkeypatch.setattr(datasets.KMNIST, 'mirrors', [mirror])
        socket.setdefaulttimeout(60)  # the test's own patience
        begun = time.monotonic()
        with pytest.raises(ddpm.UserError, match='KMNIST .*cannot be fetched.*timed out'):
            ddpm.load_images('KMNIST')
    assert time.monotonic() - begun < 50
    assert socket.getdefaulttimeout() == 60


@pytest.mark.parametrize(
    'dataset, hint',
    [
        ('MINST', 'did you mean MNIST?'),
        ('FashionMINST', 'did you mean FashionMNIST?'),
        ('no/such/folder', 'only MNIST, FashionMNIST, KMNIST, QMNIST, CIFAR10'),
        ('', 'only MNIST, FashionMNIST, KMNIST, QMNIST, CIFAR10'),  # no dataset='.'
    ],
)
def test_an_unknown_dataset(workdir, dataset, hint):
    save(noise(32, 32), workdir / 'a.png')
    message = re.escape(f'dataset is {dataset!r}: no such dataset or folder') + '.*' + hint
    for use in (ddpm.load_images, lambda name: ddpm.train(**{**TINY, 'dataset': name})):
        with pytest.raises(ddpm.UserError, match=message):
            use(dataset)


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


def test_every_depth_is_scaled_to_eight_bits(tmp_path):
    """16-bit PNG and TIFF, a 32-bit TIFF of such numbers, floats from 0 to 1: white is white."""
    grey = noise(32, 32, 1).copy()
    grey[0, :2] = 0, 255
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'a.png')
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'b.tiff')
    Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / 'c.tiff')  # Pillow's mode I
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / 'd.tiff')  # its mode F
    images = ddpm.load_images(str(tmp_path))
    assert images.shape == (4, 1, 32, 32)
    difference = images.int() - torch.tensor(grey.astype(np.int32))
    assert difference.abs().max() <= 1  # a grey less, where it is rounded down
    assert (images[..., 0, 0] == 0).all() and (images[..., 0, 1] == 255).all()


def test_a_black_picture_of_sixteen_bits_is_a_picture(tmp_path):
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / 'a.png')
    with pytest.raises(ddpm.UserError, match='is of one plain colour'):  # alone it teaches nothing
        ddpm.load_images(str(tmp_path))
    save(noise(32, 32, 1), tmp_path / 'b.png')
    assert (ddpm.load_images(str(tmp_path))[0] == 0).all()


TWELVE_BITS = np.arange(1024, dtype=np.int32).reshape(32, 32) * 4 + 3  # up to 4095
OTHER_RANGES = {
    'twelve bits.png': TWELVE_BITS.astype(np.uint16),
    'twelve bits.tiff': TWELVE_BITS,
    'eight bits.png': (TWELVE_BITS // 16).astype(np.uint16),
    'up to 255.tiff': TWELVE_BITS.astype(np.float32) / 4095 * 255,
    'beyond 65535.tiff': TWELVE_BITS * 20,
    'negative.tiff': TWELVE_BITS.astype(np.float32) / 4095 - 0.5,
    'a hole.tiff': np.where(TWELVE_BITS == 3, np.nan, TWELVE_BITS / 4095).astype(np.float32),
}


@pytest.mark.parametrize('name', OTHER_RANGES)
def test_numbers_of_an_unknown_range_are_named_and_left_out(tmp_path, capfd, name):
    """What is their white? They would come out black, or clipped."""
    Image.fromarray(OTHER_RANGES[name]).save(tmp_path / name)
    save(noise(32, 32, 1), tmp_path / 'good.png')
    images = ddpm.load_images(str(tmp_path))
    assert torch.equal(images[:, 0], torch.tensor(noise(32, 32, 1))[None])
    assert f'{tmp_path}/{name} is left out: its values go from ' in capfd.readouterr().err


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


@pytest.mark.parametrize('scale', [1, 257])
def test_a_photograph_on_its_side_is_turned(tmp_path, scale):
    """Of 8 and of 16 bits."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to show
    pixels = noise(32, 32, 1)
    save(
        pixels.astype(np.uint8 if scale == 1 else np.uint16) * scale, tmp_path / 'a.png', exif=exif
    )
    expected = torch.tensor(np.rot90(pixels, -1).copy())
    assert (ddpm.load_images(str(tmp_path))[0, 0].int() - expected).abs().max() <= 1


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


def test_files_that_are_passed_over_are_counted_by_kind_in_one_line(tmp_path, capsys):
    for name in ('a.png', 'b.JPG', '.hidden.png'):
        save(noise(32, 32), tmp_path / name)
    (tmp_path / 'broken.png').write_text('no picture')
    for name in ('c.heic', 'd.HEIC', 'e.heic', 'f.npy', 'g.npy', 'README', '.git/h.npy'):
        path = tmp_path / 'sub' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('')
    assert len(ddpm.load_images(str(tmp_path))) == 2
    found = f'2 of 3 pictures in {tmp_path}; other files: 6 (.heic, .npy, no suffix)'
    assert capsys.readouterr().out.splitlines() == [found]


def pictures_of(folder):
    images = ddpm.load_images(folder)
    return {tuple(image.flatten().tolist()) for image in images}, len(images)


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch, capsys):
    save(noise(32, 32), tmp_path / 'a.png')
    save(noise(32, 32), tmp_path / 'secret/b.png')
    scandir = os.scandir

    def refused(path):
        if Path(path).name == 'secret':
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refused)
    assert len(ddpm.load_images(str(tmp_path))) == 1
    assert f'{tmp_path}/secret is left out: ' in capsys.readouterr().err


def test_a_folder_with_the_name_of_a_dataset(workdir, monkeypatch, capsys):
    """The dataset it is, and a line says so; written as a path it is the folder."""
    save(noise(32, 32), Path('mnist/a.png'))
    assert len(ddpm.load_images('mnist')) == 60000
    line = 'mnist is the dataset MNIST here, not the folder ./mnist'
    assert capsys.readouterr().out.splitlines() == [line]
    assert len(ddpm.load_images('./mnist')) == 1


def test_links_to_folders_are_followed_once(tmp_path):
    """A link that leads back does not loop, and makes no picture count twice."""
    save(noise(32, 32, 1, 0), tmp_path / 'far/away/0.png')
    save(noise(32, 32, 1, 1), tmp_path / 'pictures/1.png')
    save(noise(32, 32, 1, 2), tmp_path / 'pictures/sub/2.png')
    (tmp_path / 'pictures/link').symlink_to(tmp_path / 'far')
    (tmp_path / 'pictures/sub/back').symlink_to(tmp_path / 'pictures')
    (tmp_path / 'pictures/nowhere').symlink_to(tmp_path / 'no such folder')
    found, count = pictures_of(tmp_path / 'pictures')
    assert len(found) == count == 3
    (tmp_path / 'only a link').mkdir()
    (tmp_path / 'only a link/link').symlink_to(tmp_path / 'pictures')
    assert pictures_of(tmp_path / 'only a link') == (found, 3)


def test_the_order_does_not_depend_on_that_of_the_disk(tmp_path, monkeypatch):
    """A folder that is there twice, by its name and by a link, is read by the first of the two."""
    save(noise(32, 32, 1, 0), tmp_path / 'z/0.png')
    save(noise(32, 32, 1, 1), tmp_path / 'k/1.png')
    (tmp_path / 'a').symlink_to('z')
    walk, scandir = [], os.scandir

    class Listing:
        def __init__(self, path):
            entries = sorted(scandir(path), key=lambda entry: entry.name, reverse=walk[-1])
            self.entries = iter(entries)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

    monkeypatch.setattr(os, 'scandir', Listing)
    read = []
    for reverse in (False, True):
        walk.append(reverse)
        read.append(ddpm.load_images(tmp_path))
    assert len(read[0]) == 2 and torch.equal(*read)


def test_what_is_no_file_does_not_hang(tmp_path):
    """A FIFO waits for a writer as long as there is none."""
    os.mkfifo(tmp_path / 'b.png')
    (tmp_path / 'folder.png').mkdir()
    save(noise(32, 32), tmp_path / 'a.png')

    def hangs(*_):
        raise TimeoutError('it hangs')

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    try:
        assert len(ddpm.load_images(str(tmp_path))) == 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_grey_is_asked_of_every_picture(tmp_path):
    """Not only of the first thousand, which are checked at a time."""
    for i in range(1001):
        save(noise(8, 8, 1, i), tmp_path / f'{i:04d}.png')
    save(noise(8, 8, 3), tmp_path / '1001.png')
    assert ddpm.load_images(tmp_path, 8).shape == (1002, 3, 8, 8)


def test_the_pictures_that_the_program_makes_are_no_data(workdir):
    """With dataset='.': the next start would find more pictures, and refuse its own checkpoint."""
    folder_of_pictures(workdir)
    numbers = {**TINY, 'dataset': '.', 'sample_every': 1}
    ddpm.train(**{**numbers, 'num_epochs': 1})
    ddpm.inference('checkpoints/tiny', num_steps=3)
    assert Path('outputs/tiny/grid.png').exists()
    ddpm.train(**numbers)
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 4
    # but what someone puts there on purpose can be trained on
    folder_of_pictures(workdir / 'outputs/faces')
    assert len(ddpm.load_images('outputs/faces')) == 8


def test_a_folder_that_is_given_in_another_way_is_the_same(workdir, monkeypatch, capsys):
    """Its pictures count, not its name."""
    numbers = folder_of_pictures(workdir / 'pictures') | dict(num_epochs=1)
    ddpm.train(**{**numbers, 'dataset': 'pictures'})
    monkeypatch.setenv('HOME', str(workdir))
    for dataset in ('pictures/', './pictures', str(workdir / 'pictures'), '~/pictures'):
        ddpm.train(**{**numbers, 'dataset': dataset})
    Path('pictures').rename('renamed')
    ddpm.train(**{**numbers, 'dataset': 'renamed', 'num_epochs': 2})
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 4
    assert ' was pictures' not in capsys.readouterr().out


def test_a_hidden_folder_may_itself_be_the_dataset(tmp_path):
    save(noise(32, 32), tmp_path / '.cache/pictures/a.png')
    assert len(ddpm.load_images(str(tmp_path / '.cache/pictures'))) == 1


@pytest.mark.parametrize('files', [[], ['notes.txt'], ['broken.png']])
def test_a_folder_without_pictures(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text('no picture')
    with pytest.raises(ddpm.UserError, match='no picture that can be read') as caught:
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
    with monkeypatch.context() as stopped, pytest.raises(ddpm.Stopped):
        at_step(stopped, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        ddpm.train(**parts)
    assert len(ddpm.load_checkpoint('checkpoints/parts')['losses']) == 3
    ddpm.train(**parts)
    whole = ddpm.load_checkpoint('checkpoints/tiny')
    assert_identical(whole, ddpm.load_checkpoint('checkpoints/parts'))
    assert len(whole['losses']) == 8 and whole['unet']['input_channels'] == 3
    ddpm.inference('checkpoints/tiny', num_steps=3, num_images=8)
    assert Image.open('outputs/tiny/grid.png').size == (8 * 130 + 2, 130 + 2)
    assert Image.open('outputs/tiny/progress/epoch_002.00.png').mode == 'RGB'


@pytest.mark.parametrize('size', [28, 12, 4])
def test_any_size_that_the_unet_can_halve_is_trained_on_and_sampled(workdir, size):
    """SMALL halves twice. Nothing is padded: only MNIST's family is."""
    numbers = folder_of_pictures(workdir / 'pictures') | dict(image_size=size, num_epochs=1)
    assert ddpm.load_images('pictures', size).shape == (8, 3, size, size)
    sizes, loss = [], ddpm.diffusion_loss
    with pytest.MonkeyPatch.context() as patches:
        spy = lambda m, s, x, *a: sizes.append(x.shape[1:]) or loss(m, s, x, *a)  # noqa: E731
        patches.setattr(ddpm, 'diffusion_loss', spy)
        ddpm.train(**{**numbers, 'sample_every': 1})
    assert set(sizes) == {(3, size, size)}
    grid = Image.open('outputs/tiny/progress/epoch_001.00.png')
    assert grid.size == (8 * (2 * size + 2) + 2,) * 2
    model = ddpm.load_model('checkpoints/tiny')
    assert model.image_size == size
    assert ddpm.sample(model, 2, num_steps=3).shape == (2, 3, size, size)
    assert ddpm.inference('checkpoints/tiny', num_steps=3).shape == (64, 3, size, size)


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
    monkeypatch.setattr(ddpm, 'SAMPLE', dict(num_images=72, num_steps=3, seed=1))
    monkeypatch.setattr(ddpm, 'SAMPLE_BATCH', {'cpu': 100})
    monkeypatch.setattr('sys.argv', ['ddpm.py', '--sample', 'checkpoints/tiny'])
    ddpm.main()

    samples = 'outputs/tiny/72_images_seed_1'
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
    monkeypatch.setattr(own_pictures, 'SETTINGS', {**TINY, 'num_time_steps': 4})
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
    with monkeypatch.context() as stopped, pytest.raises(ddpm.Stopped):
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


@pytest.mark.parametrize('size', [30, 33, 2])
def test_a_size_that_the_unet_cannot_halve_is_refused(workdir, size):
    """SMALL halves twice, the article's UNET three times; said before anything is trained."""
    numbers = folder_of_pictures(workdir / 'pictures')
    wanted = f'^image_size is {size}, but must be a multiple of 4, since UNET halves it 2 times'
    with pytest.raises(ddpm.UserError, match=wanted):
        ddpm.train(**{**numbers, 'image_size': size})
    with pytest.raises(ddpm.UserError, match='but must be a multiple of 8'):
        ddpm.train(**{**numbers, 'image_size': 28, 'unet': {}})
    assert not Path('checkpoints').exists()


def test_a_batch_larger_than_the_folder(workdir):
    numbers = folder_of_pictures(workdir / 'pictures') | dict(batch_size=9)
    with pytest.raises(
        ddpm.UserError, match='batch_size is 9, but must be at most 8, the number of images'
    ):
        ddpm.train(**numbers)
