"""Data: MNIST as it comes with the repository, datasets that are fetched, folders of pictures."""

import fcntl
import gzip
import hashlib
import itertools
import os
import shutil
import signal
import socket
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY
from PIL import Image
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
    return folder


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    monkeypatch.setattr(ddpm, 'draw_losses', lambda *_: None)  # it takes longer than the training


def content(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob('*')]}


# ---- MNIST ------------------------------------------------------------------------------------


def test_mnist_is_what_torchvision_reads(tmp_path, monkeypatch):
    """Of a copy of the same files, since it unpacks them; from any folder, without writing."""
    before = content(ROOT / 'data')
    monkeypatch.chdir(tmp_path)
    images = ddpm.load_images('MNIST')
    assert content(ROOT / 'data') == before and not list(tmp_path.iterdir())
    shutil.copytree(ROOT / 'data/MNIST/raw', 'theirs/MNIST/raw')
    theirs = datasets.MNIST('theirs', train=True, download=True).data
    assert torch.equal(images, F.pad(theirs[:, None], [2] * 4)) and images.dtype == torch.uint8
    assert torch.equal(ddpm.load_images(Path('MNIST')), images)


BROKEN = {
    'missing': None,
    'empty': lambda packed: b'',
    'cut': lambda packed: packed[:5_000_000],
    'changed': lambda packed: packed[:5_000_000] + b'changed' + packed[5_000_007:],
    'no gzip file': lambda packed: b'not found',
    'of ten thousand': lambda packed: gzip.compress(bytes(16 + 10_000 * 28 * 28)),
}


@pytest.mark.parametrize('damage', BROKEN.values(), ids=BROKEN)
def test_a_damaged_mnist_is_told_with_what_helps_and_left_alone(data, damage):
    path = data / 'MNIST/raw' / TRAIN_IMAGES
    path.parent.mkdir(parents=True)
    if damage:
        path.write_bytes(damage((ROOT / 'data/MNIST/raw' / TRAIN_IMAGES).read_bytes()))
    before = content(data)
    told = f'^cannot read MNIST in {data} .*: git checkout data$'
    with pytest.raises(ddpm.UserError, match=told):
        ddpm.load_images('MNIST')
    assert content(data) == before


# ---- Other datasets ---------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['FashionMNIST', 'KMNIST', 'QMNIST', 'CIFAR10'])
def test_other_datasets_have_the_same_form(name, data, monkeypatch):
    """What torchvision gives is (N, 28, 28), for CIFAR10 a numpy array (N, 32, 32, 3)."""
    colour = name == 'CIFAR10'
    shape = (6, 32, 32, 3) if colour else (6, 28, 28)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    theirs = SimpleNamespace(data=pixels if colour else torch.tensor(pixels))
    dataset = lambda root, train, download: theirs if train and root == data else None  # noqa: E731
    monkeypatch.setattr(datasets, name, dataset)
    images = ddpm.load_images(name)
    expected = pixels if colour else np.pad(pixels, [(0, 0), (2, 2), (2, 2)])[..., None]
    assert torch.equal(images, torch.tensor(expected).permute(0, 3, 1, 2))
    assert images.dtype == torch.uint8 and images.is_contiguous()


KUZUSHIJI = dict(images=torch.arange(6 * 28 * 28).reshape(6, 28, 28) % 251, labels=torch.arange(6))


def write_kmnist(folder, pack, suffix):
    """The four files of KMNIST, but with six pictures each, in the format of MNIST's."""
    folder.mkdir(parents=True)
    for part, (kind, tensor) in itertools.product(['train', 't10k'], KUZUSHIJI.items()):
        header = bytes([0, 0, 8, tensor.ndim]) + np.array(tensor.shape, '>i4').tobytes()
        content = pack(header + tensor.byte().numpy().tobytes())
        (folder / f'{part}-{kind}-idx{tensor.ndim}-ubyte{suffix}').write_bytes(content)


def assert_kmnist():
    images = ddpm.load_images('KMNIST')
    assert torch.equal(images[:, 0], F.pad(KUZUSHIJI['images'], [2] * 4))


@pytest.mark.parametrize('writable', [True, False])
def test_a_dataset_that_is_there_is_only_read(data, monkeypatch, writable):
    """Without the network, also in a folder that nobody may write to."""
    write_kmnist(data / 'KMNIST/raw', bytes, '')
    before = content(data / 'KMNIST')
    monkeypatch.setattr(os, 'access', lambda *_: writable)  # root may write everywhere
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: pytest.fail('asked the network'))
    assert_kmnist()
    assert content(data / 'KMNIST') == before
    assert os.listdir(data) == ['KMNIST'] or writable


def test_one_of_several_processes_fetches_and_the_others_wait(data, tmp_path, monkeypatch):
    """From a folder in place of the network. Whoever gets the lock then finds the files."""
    mirror, asked = tmp_path / 'mirror', []
    write_kmnist(mirror, gzip.compress, '.gz')

    def fetch(url, path, **_):
        asked.append(Path(url).name)
        shutil.copy(mirror / Path(url).name, path)
        with open(data / 'lock') as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    files = [(p.name, hashlib.md5(p.read_bytes()).hexdigest()) for p in mirror.iterdir()]
    monkeypatch.setattr(datasets.KMNIST, 'resources', files)
    monkeypatch.setattr(datasets.utils, '_get_redirect_url', lambda url, **_: url)
    monkeypatch.setattr(datasets.utils, '_urlretrieve', fetch)
    for _ in range(2):
        assert_kmnist()
    assert sorted(asked) == sorted(os.listdir(mirror))


def test_a_dataset_that_there_is_not(workdir):
    Path('a file').write_text('')
    names = 'MNIST, FashionMNIST, KMNIST, QMNIST, CIFAR10'
    for dataset, size, told in [
        ('mnist', 32, f"dataset is 'mnist': no folder, and none of {names}"),
        ('a file', 32, f"dataset is 'a file': no folder, and none of {names}"),
        ('MNIST', 64, 'image_size is 64, but that of MNIST is always 32'),
    ]:
        with pytest.raises(ddpm.UserError, match=f'^{told}$'):
            ddpm.load_images(dataset, size)


# ---- Folders ----------------------------------------------------------------------------------


def noise(height, width, channels=3, seed=0):
    """Smooth noise, uint8 (height, width[, channels])."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, channels), np.uint8)
    picture = Image.fromarray(small.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def save(pixels, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def folder_of_pictures(path, size=32):
    for i in range(8):
        save(noise(size, size, 3, i), path / f'{i}.png')
    return {**TINY, 'dataset': str(path)}


def stop_in_step(patches, number):
    loss, steps = ddpm.diffusion_loss, itertools.count(1)

    def stopping(*arguments):
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    patches.setattr(ddpm, 'diffusion_loss', stopping)


@pytest.mark.parametrize('channels', [1, 3])
def test_pictures_of_the_right_size_are_taken_as_they_are_by_path(tmp_path, monkeypatch, channels):
    """Exactly, in the order of the paths, not of the disk; links to folders are not followed."""
    names = ['b.png', 'a/z.PNG', 'a/b.bmp', 'ä ö/数字.png', 'c.tiff', 'a.png']
    folder = tmp_path / '.cache/pictures'  # one may name a hidden folder itself
    pictures = {folder / name: noise(32, 32, channels, i) for i, name in enumerate(names)}
    for path, pixels in pictures.items():
        save(pixels, path)
    (folder / 'a/back').symlink_to(folder)
    rglob = Path.rglob
    monkeypatch.setattr(Path, 'rglob', lambda *a: reversed(sorted(rglob(*a))))
    expected = np.stack([pictures[path] for path in sorted(pictures)]).reshape(6, 32, 32, channels)
    images = ddpm.load_images(str(folder))
    assert images.dtype == torch.uint8 and images.is_contiguous()
    assert torch.equal(images, torch.tensor(expected).permute(0, 3, 1, 2))


def test_every_kind_of_grey_is_read_as_grey_and_beside_a_colour_as_colour(tmp_path):
    """What is transparent lies on white; a photograph on its side is turned."""
    grey = noise(32, 32, 1)
    for name in ('L.png', 'LA.png', 'P.gif', 'RGB.bmp', 'RGBA.webp', 'CMYK.tiff'):
        Image.fromarray(grey).convert(name.split('.')[0]).save(tmp_path / name, lossless=True)
    save(np.dstack([0 * grey] * 3 + [255 - grey]), tmp_path / 'transparent black.png')
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to show
    save(np.rot90(grey).copy(), tmp_path / 'turned.png', exif=exif)
    expected = torch.tensor(grey).expand(8, 1, 32, 32)
    assert torch.equal(ddpm.load_images(tmp_path), expected)
    save(noise(32, 32), tmp_path / 'z colour.png')
    images = ddpm.load_images(tmp_path)
    assert torch.equal(images[:8], expected.expand(-1, 3, -1, -1))
    assert torch.equal(images[8], torch.tensor(noise(32, 32)).permute(2, 0, 1))


@pytest.mark.parametrize('height, width, size', [(48, 100, 32), (97, 33, 64), (20, 30, 32)])
def test_the_middle_square_is_resized(tmp_path, height, width, size):
    """As torchvision crops and resizes; at the edges it has no pixels beyond the square."""
    pixels = np.random.default_rng(0).integers(64, 192, (height, width, 3), np.uint8)
    save(pixels, tmp_path / 'a.png')
    images = ddpm.load_images(tmp_path, size)
    square = transforms.center_crop(Image.fromarray(pixels), min(height, width))
    expected = transforms.resize(square, [size, size], transforms.InterpolationMode.LANCZOS)
    difference = images[0].int() - transforms.pil_to_tensor(expected)
    assert images.shape == (1, 3, size, size) and difference[:, 6:-6, 6:-6].abs().max() <= 2


def test_what_cannot_be_read_is_named_and_what_is_no_picture_is_passed_over(
    tmp_path, monkeypatch, capsys
):
    grey = noise(32, 32, 1)
    for name in ('a.png', 'b.jpg', 'cut.png', '.hidden.png', '.hidden/c.png', 'sub/.git/d.png'):
        save(grey, tmp_path / name)
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'cut.png').read_bytes()[:300])
    (tmp_path / 'text.png').write_text('no picture')
    for name, kind in (('16.png', 'uint16'), ('32.tiff', 'int32'), ('float.tiff', 'float32')):
        save(grey.astype(kind), tmp_path / name)  # what is their white?
    (tmp_path / 'labels.csv').write_text('a, b')
    (tmp_path / 'folder.png').mkdir()
    os.mkfifo(tmp_path / 'fifo.png')
    open_picture = Image.open

    def opened(path):
        assert not stat.S_ISFIFO(os.stat(path).st_mode), 'waits for a writer for ever'
        return open_picture(path)

    monkeypatch.setattr(Image, 'open', opened)
    assert len(ddpm.load_images(tmp_path)) == 2
    *left_out, count = capsys.readouterr().out.splitlines()
    names = [Path(line.split(' is left out (')[0]).name for line in left_out]
    assert sorted(names) == ['16.png', '32.tiff', 'cut.png', 'float.tiff', 'text.png']
    assert count == f'2 pictures can be read of 7 in {tmp_path}'
    (tmp_path / 'a.png').unlink()
    (tmp_path / 'b.jpg').unlink()
    with pytest.raises(ddpm.UserError, match='^there is no picture in .* that can be read$'):
        ddpm.load_images(tmp_path)


@pytest.mark.parametrize('size', [40, 12])
def test_a_folder_is_trained_on_resumed_exactly_and_drawn_from(workdir, size):
    """Stopped in the middle of an epoch. SMALL halves twice, so that 12 will do, too."""
    numbers = folder_of_pictures(workdir / 'my ä/图片', 80) | dict(image_size=size, sample_every=2)
    ddpm.train(**numbers)
    parts = {**numbers, 'checkpoint_path': 'checkpoints/parts'}
    with pytest.MonkeyPatch.context() as patches, pytest.raises(KeyboardInterrupt):
        stop_in_step(patches, 3)
        ddpm.train(**parts)
    assert len(ddpm.load_checkpoint('checkpoints/parts')['losses']) == 3
    ddpm.train(**parts)
    whole, resumed = (ddpm.load_checkpoint(f'checkpoints/{name}') for name in ('tiny', 'parts'))
    assert torch.equal(whole['losses'], resumed['losses']) and len(whole['losses']) == 4
    assert all(torch.equal(whole['ema'][name], resumed['ema'][name]) for name in whole['ema'])
    assert ddpm.sample(ddpm.load_model('checkpoints/tiny'), 2, 3).shape == (2, 3, size, size)
    progress = Image.open('outputs/tiny/progress/epoch_002.00.png')
    assert progress.mode == 'RGB' and progress.size[0] == 8 * (2 * size + 2) + 2


def test_the_worked_example(workdir, monkeypatch):
    monkeypatch.setattr(own_pictures, 'COUNT', 20)
    monkeypatch.setattr(own_pictures, 'SETTINGS', {**TINY, 'num_time_steps': 4})
    monkeypatch.setattr(ddpm, 'PREVIEW', {})
    own_pictures.main()
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 10
    assert len(ddpm.load_images('outputs/own_pictures/faces').unique(dim=0)) == 20
    assert Path('outputs/tiny/grid.png').exists()


def test_a_folder_that_is_given_in_another_way_is_the_same(workdir, monkeypatch):
    """Its pictures count, not its name; ~ is the home also for a checkpoint."""
    monkeypatch.setenv('HOME', str(workdir))
    settings = folder_of_pictures(workdir / 'pictures') | dict(num_epochs=1)
    ddpm.train(**{**settings, 'checkpoint_path': '~/checkpoints/tiny'})
    for dataset in ('./pictures/', Path('pictures'), '~/pictures'):
        ddpm.train(**{**settings, 'dataset': dataset})
    Path('pictures').rename('renamed')
    ddpm.train(**{**settings, 'dataset': 'renamed', 'num_epochs': 2})
    assert len(torch.load('checkpoints/tiny')['losses']) == 4
    ddpm.load_model('~/checkpoints/tiny')
    ddpm.inference('~/checkpoints/tiny', num_images=2, num_steps=2)
    assert Path('outputs/tiny/grid.png').exists() and not Path('~').exists()


def test_other_images_are_refused(workdir, monkeypatch):
    ddpm.train(**{**TINY, 'num_epochs': 1})
    before, few = Path('checkpoints/tiny').read_bytes(), ddpm.load_images('Few')
    for others in (few[:11], few[[*range(12), 0]], few.flip(0), few[[*range(11), 0]]):
        monkeypatch.setattr(ddpm, 'load_images', lambda *_, others=others: others)
        with pytest.raises(ddpm.UserError, match="tiny is from a run with data='12 images, CRC "):
            ddpm.train(**TINY)
    assert Path('checkpoints/tiny').read_bytes() == before
