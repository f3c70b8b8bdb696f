"""`python ddpm.py` as a new user meets it, and the pictures it makes."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT, TINY, TINY_PREVIEW, run_program

import ddpm

PICTURES = ['digits.png', 'grid.png', 'loss.png', 'reverse.png']


def test_preview_runs_draws_and_runs_again(tmp_path):
    edits = TINY_PREVIEW + "ddpm.PREVIEW['sample_every'] = 1"
    first = run_program(tmp_path, edits, '--preview')
    assert first.returncode == 0, first.stderr
    epochs = re.findall(r'^Epoch (\d) \| Loss 0?\.?\d', first.stdout, re.M)
    assert epochs == ['1', '2']
    assert re.search(r'Epoch 2/2: 100%.*12/12.*img/s, loss', first.stderr)
    pictures = [tmp_path / 'outputs' / name for name in [*PICTURES, 'reverse.gif']]
    progress = sorted((tmp_path / 'outputs/progress').iterdir())
    assert [p.name for p in progress] == ['tiny_001.png', 'tiny_002.png']
    for picture in pictures[:4] + progress:
        image = plt.imread(picture)
        assert image.std() > 0.05, f'{picture} is blank'
    assert pictures[4].read_bytes()[:6] == b'GIF89a'
    checkpoint = (tmp_path / 'checkpoints/tiny').read_bytes()
    assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['tiny']

    before = {p: p.read_bytes() for p in pictures}
    again = run_program(tmp_path, edits, '--preview')
    assert again.returncode == 0, again.stderr
    assert 'Epoch' not in again.stdout
    assert (tmp_path / 'checkpoints/tiny').read_bytes() == checkpoint
    for picture in (pictures[0], pictures[1], pictures[4]):
        assert picture.read_bytes() != before[picture], 'drawn anew'


def test_without_cuda_it_says_so_estimates_and_previews(tmp_path):
    if torch.cuda.is_available():
        pytest.skip('needs a machine without CUDA')
    edits = TINY_PREVIEW + 'from conftest import SMALL\nddpm.FULL["unet"] = SMALL'
    done = run_program(tmp_path, edits)
    assert done.returncode == 0, done.stderr
    assert re.search(r'No CUDA GPU here: .* about \d+ hours?', done.stdout)
    assert (tmp_path / 'checkpoints/tiny').exists()


def test_full_overrides(tmp_path):
    edits = TINY_PREVIEW + 'ddpm.FULL.update(TINY, checkpoint_path="full"); ddpm.NUM_STEPS = None'
    done = run_program(tmp_path, edits, '--full')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'full').exists()
    assert not (tmp_path / 'checkpoints').exists()


@pytest.mark.parametrize('flags', [['--help'], ['--epochs'], ['--full', '--preview']])
def test_help_and_unknown_flags(monkeypatch, capsys, flags):
    monkeypatch.setattr('sys.argv', ['ddpm.py', *flags])
    with pytest.raises(SystemExit) as end:
        ddpm.main()
    assert end.value.code == (0 if flags == ['--help'] else 2)
    said = capsys.readouterr()
    assert '--full' in said.out + said.err and '--preview' in said.out + said.err
    assert ('EDIT HERE' in said.out) == (flags == ['--help'])


NO_NETWORK = "from torchvision import datasets\ndatasets.MNIST.mirrors = ['http://127.0.0.1:9/']\n"


def test_preview_without_data_and_network_draws_fonts_and_says_so(tmp_path):
    edits = (
        'from conftest import *\n'
        f'{NO_NETWORK}'
        'ddpm.font_digits = few_images\n'
        "ddpm.PREVIEW.update({**TINY, 'dataset': 'MNIST'}); ddpm.NUM_STEPS = 4\n"
    )
    done = run_program(tmp_path, edits, '--preview')
    assert done.returncode == 0, done.stderr
    assert 'WARNING: MNIST is not in data/' in done.stdout
    assert 'train-images-idx3-ubyte.gz' in done.stdout
    assert 'FONTS' in done.stdout
    assert (tmp_path / 'checkpoints/tiny_font_digits').exists()


def test_full_run_without_data_and_network_says_what_to_do(tmp_path):
    edits = f"from conftest import *\n{NO_NETWORK}\nddpm.FULL['unet'] = SMALL"
    done = run_program(tmp_path, edits, '--full')
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith('ddpm.py: MNIST is not in data/ and cannot be downloaded')
    assert 'data/MNIST/raw' in last and last.count('.gz') == 4
    assert not (tmp_path / 'checkpoints/ddpm_checkpoint').exists()


def test_the_numbers_to_edit_are_the_articles():
    full = ddpm.FULL
    assert (full['num_epochs'], full['lr'], full['batch_size']) == (75, 2e-5, 64)
    assert (full['ema_decay'], full['num_time_steps'], full['unet']) == (0.9999, 1000, {})
    assert full['checkpoint_path'] == 'checkpoints/ddpm_checkpoint'
    assert full['checkpoint_path'] != ddpm.PREVIEW['checkpoint_path']


def test_the_strip_shows_the_articles_times(workdir, monkeypatch):
    numbers = {**TINY, 'num_time_steps': 1000, 'num_epochs': 1}
    ddpm.train(**numbers)
    seen = {}
    monkeypatch.setattr(ddpm, 'draw_strips', lambda *arguments: seen.update(strips=arguments))

    def process(model, x, scheduler, num_steps=None):
        times = ddpm.sampling_times(1000, num_steps or 1000)
        return ((t, torch.full_like(x, t)) for t in times)

    monkeypatch.setattr(ddpm, 'reverse_process', process)
    ddpm.inference('checkpoints/tiny')
    strips, labels = seen['strips']
    times = [999, 700, 550, 400, 300, 200, 100, 50, 15]
    assert labels == [f't = {t}' for t in times] + ['$x_0$']
    assert strips.shape == (10, 10, 1, 32, 32)
    assert strips[0, :, 0, 0, 0].tolist() == [*times, 0]


def test_sampling_times():
    assert ddpm.sampling_times(1000, 1000) == list(range(999, -1, -1))
    fifty = ddpm.sampling_times(1000, 50)
    assert (len(fifty), fifty[0], fifty[-1]) == (50, 999, 0)
    assert {a - b for a, b in zip(fifty, fifty[1:])} == {20, 21}


def test_display_reverse_draws_one_strip():
    images = [torch.full((1, 1, 8, 8), value) for value in (-3.0, 0.0, 0.5, 1.0, 9.0)]
    figure = ddpm.display_reverse(images)
    assert len(figure.axes) == 5
    shown = [ax.images[0] for ax in figure.axes]
    assert [image.get_array().mean() for image in shown] == [0, 0, 0.5, 1, 1]  # clamped to show
    assert {image.get_cmap().name for image in shown} == {'gray_r'}
    plt.close(figure)
    figure = ddpm.display_reverse([torch.rand(3, 8, 8)])
    assert figure.axes[0].images[0].get_array().shape == (8, 8, 3)
    plt.close(figure)


def test_a_window_where_there_is_a_screen(workdir, monkeypatch):
    ddpm.train(**{**TINY, 'num_epochs': 1})
    windows = []
    monkeypatch.setattr(ddpm, 'has_screen', lambda: True)
    monkeypatch.setattr(plt, 'show', lambda: windows.extend(plt.get_fignums()))
    ddpm.inference('checkpoints/tiny', num_time_steps=20, num_steps=3)
    assert windows


def test_the_module_imports_only_what_the_card_lists():
    imports = re.findall(r'^(?:from|import) (\w+)', (ROOT / 'ddpm.py').read_text(), re.M)
    import sys

    listed = {'torch', 'torchvision', 'einops', 'timm', 'tqdm', 'matplotlib', 'numpy'}
    assert {name for name in imports if name not in sys.stdlib_module_names} == listed
    required = {
        re.split('[>=]', line)[0] for line in Path(ROOT, 'requirements.txt').read_text().split()
    }
    assert required == listed
