"""Data: local files first, damage found, no network needed."""

import gzip
import hashlib
import struct
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torchvision import datasets

import ddpm

RAW = Path('data/MNIST/raw')


def idx(array):
    """A uint8 array in the format of the MNIST files."""
    head = struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape)
    return head + array.numpy().tobytes()


@pytest.fixture
def small_mnist(workdir, monkeypatch):
    """data/MNIST/raw with the four .gz files of a dataset of 20 digits, and no network."""
    images = torch.randint(256, (20, 28, 28), dtype=torch.uint8)
    labels = torch.arange(20, dtype=torch.uint8) % 10
    RAW.mkdir(parents=True)
    resources = []
    for name, _ in datasets.MNIST.resources:
        packed = gzip.compress(idx(images if 'images' in name else labels))
        (RAW / name).write_bytes(packed)
        resources.append((name, hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, 'resources', resources)
    monkeypatch.setattr(datasets.MNIST, 'mirrors', ['http://127.0.0.1:9/'])
    return images


def test_local_files_are_used_without_the_network(small_mnist):
    for _ in range(2):  # packed, then unpacked
        assert torch.equal(ddpm.load_images('MNIST'), small_mnist[:, None])


@pytest.mark.parametrize('name', ['train-images-idx3-ubyte', 'train-images-idx3-ubyte.gz'])
@pytest.mark.parametrize('damage', ['truncated', 'changed', 'empty'])
def test_damaged_files_are_named(small_mnist, name, damage):
    ddpm.load_images('MNIST')
    content = (RAW / name).read_bytes()
    half = len(content) // 2
    broken = {'truncated': content[:half], 'empty': b''}
    broken['changed'] = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
    (RAW / name).write_bytes(broken[damage])
    with pytest.raises(ddpm.UserError, match=f'{name} is damaged: delete it and run again'):
        ddpm.load_images('MNIST')
    assert (RAW / name).read_bytes() == broken[damage]


def test_an_unpacked_file_alone_is_still_measured(small_mnist):
    ddpm.load_images('MNIST')
    for packed in RAW.glob('*.gz'):
        packed.unlink()
    ddpm.load_images('MNIST')
    path = RAW / 'train-images-idx3-ubyte'
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ddpm.UserError, match='data/MNIST/raw is damaged, delete it'):
        ddpm.load_images('MNIST')


def test_missing_files_are_listed(small_mnist, capfd):
    (RAW / 't10k-labels-idx1-ubyte.gz').unlink()
    with pytest.raises(ddpm.MissingData) as caught:
        ddpm.load_images('MNIST')
    for name, _ in datasets.MNIST.resources:
        assert name in str(caught.value)
    assert 'data/MNIST/raw' in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['FashionMNIST', 'KMNIST', 'QMNIST', 'CIFAR10'])
def test_other_datasets_have_the_same_form(name, workdir, monkeypatch):
    """What torchvision gives is (N, H, W), or (N, H, W, 3) for CIFAR10."""
    shape = (6, 32, 32, 3) if name == 'CIFAR10' else (6, 28, 28)
    data = torch.randint(256, shape, dtype=torch.uint8)

    class Source:
        def __init__(self, root, train, download):
            assert train and download
            self.data = data.numpy() if name == 'CIFAR10' else data

    monkeypatch.setattr(datasets, name, Source)
    images = ddpm.load_images(name)
    channels = 3 if name == 'CIFAR10' else 1
    assert images.shape == (6, channels, shape[1], shape[1])
    assert torch.equal(images[:, 0], data[..., 0] if channels == 3 else data)
    ddpm.train(**{**TINY, 'dataset': name, 'batch_size': 3, 'sample_every': 2})
    ddpm.inference('checkpoints/tiny', num_time_steps=20, num_steps=3)
    assert ddpm.load_checkpoint('checkpoints/tiny')['unet']['input_channels'] == channels


def test_an_unknown_dataset():
    with pytest.raises(ddpm.UserError, match='must be one of MNIST, FashionMNIST'):
        ddpm.load_images('MINST')


def test_font_digits_are_digits_and_always_the_same():
    images = ddpm.font_digits(200)
    assert images.shape == (200, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert torch.equal(images, ddpm.font_digits(200))
    ink = images.float().mean((1, 2, 3)) / 255
    assert 0.02 < ink.min() and ink.max() < 0.6
    assert len(images.unique(dim=0)) == 200
