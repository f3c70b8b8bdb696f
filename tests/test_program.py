"""`python ddpm.py` as a new user meets it, and the pictures it makes."""

import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import DIGITS, ROOT, TINY, TINY_PREVIEW, run_program
from PIL import Image

import ddpm

DRAWN = 'Drawn, in outputs/tiny/: reverse.png, digits.png, grid.png, reverse.gif'
PICTURES = ['digits.png', 'grid.png', 'loss.png', 'reverse.png']


def test_preview_runs_draws_and_runs_again(tmp_path):
    edits = TINY_PREVIEW + "ddpm.PREVIEW['sample_every'] = 1"
    first = run_program(tmp_path, edits, '--preview')
    assert first.returncode == 0, first.stderr
    epochs = re.findall(r'^Epoch (\d) \| Loss 0?\.?\d', first.stdout, re.M)
    assert epochs == ['1', '2']
    assert re.search(r'Epoch 2/2 100%.* img/s, loss 0?\.?\d+.* to go', first.stderr)
    assert 'checkpoints/tiny' in first.stdout
    assert first.stdout.splitlines()[-1] == DRAWN
    pictures = [tmp_path / 'outputs/tiny' / name for name in [*PICTURES, 'reverse.gif']]
    progress = sorted((tmp_path / 'outputs/tiny/progress').iterdir())
    assert [p.name for p in progress] == ['epoch_001.png', 'epoch_002.png']
    for picture in pictures[:4] + progress:
        image = plt.imread(picture)
        assert image.std() > 0.05, f'{picture} is blank'
    assert pictures[4].read_bytes()[:6] == b'GIF89a'
    checkpoint = (tmp_path / 'checkpoints/tiny').read_bytes()
    assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['tiny', 'tiny.lock']

    before = {p: p.read_bytes() for p in pictures}
    again = run_program(tmp_path, edits, '--preview')
    assert again.returncode == 0, again.stderr
    assert 'Epoch' not in again.stdout
    assert 'tiny: 2 epochs are done; a larger num_epochs trains on' in again.stdout
    assert (tmp_path / 'checkpoints/tiny').read_bytes() == checkpoint
    for picture in (pictures[0], pictures[1], pictures[4]):
        assert picture.read_bytes() != before[picture], 'drawn anew'


def test_without_cuda_it_says_so_and_previews(tmp_path):
    done = run_program(tmp_path, TINY_PREVIEW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('No CUDA GPU here: this is the preview. --full ')
    assert (tmp_path / 'checkpoints/tiny').exists()


def test_full_overrides(tmp_path):
    edits = (
        TINY_PREVIEW
        + 'ddpm.FULL.update(TINY, checkpoint_path="full"); ddpm.DRAWING["num_steps"] = None'
    )
    done = run_program(tmp_path, edits, '--full')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'full').exists()
    assert not (tmp_path / 'checkpoints').exists()


@pytest.mark.parametrize('asked', [None, '77'])
def test_threads_that_wait_soon_sleep(asked):
    """As GNU's OpenMP itself tells; what the user asks for stands."""
    environment = {**os.environ, 'OMP_DISPLAY_ENV': 'VERBOSE'}
    environment |= {'GOMP_SPINCOUNT': asked} if asked else {}
    command = [sys.executable, '-c', 'import ddpm']
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", told.stderr)
    if not found:
        pytest.skip("not GNU's OpenMP")
    assert found[1] == (asked or '10000')


@pytest.mark.parametrize('flags', [['--help'], ['--epochs'], ['--full', '--preview']])
def test_help_and_unknown_flags(monkeypatch, capsys, flags):
    monkeypatch.setattr('sys.argv', ['ddpm.py', *flags])
    with pytest.raises(SystemExit) as end:
        ddpm.main()
    assert end.value.code == (0 if flags == ['--help'] else 2)
    said = capsys.readouterr()
    assert '--full' in said.out + said.err and '--preview' in said.out + said.err
    assert ('EDIT HERE' in said.out) == (flags == ['--help'])


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
    monkeypatch.setattr(
        ddpm, 'draw_reverse_process', lambda frames, strip, *_, **__: seen.update(f=frames, s=strip)
    )

    def process(model, x, scheduler, num_steps=None):
        times = ddpm.sampling_times(1000, num_steps or 1000)
        return ((t, torch.full_like(x, t)) for t in times)

    monkeypatch.setattr(ddpm, 'reverse_process', process)
    ddpm.inference('checkpoints/tiny')
    assert seen['s'] == [999, 700, 550, 400, 300, 200, 100, 50, 15, 0]
    assert all((seen['f'][t] == t).all() for t in seen['s'])
    assert seen['f'][999].shape == (64, 1, 32, 32)


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
    assert [image.get_array().mean() for image in shown] == [0, 0, 128, 255, 255]  # clamped to show
    assert {image.get_cmap().name for image in shown} == {'gray'}
    plt.close(figure)
    figure = ddpm.display_reverse([torch.rand(3, 8, 8)])
    assert figure.axes[0].images[0].get_array().shape == (8, 8, 3)
    plt.close(figure)


def test_a_window_where_there_is_a_screen(workdir, monkeypatch):
    ddpm.train(**{**TINY, 'num_epochs': 1})
    windows = []
    monkeypatch.setattr(plt, 'show', lambda: windows.extend(plt.get_fignums()))
    ddpm.inference('checkpoints/tiny', num_time_steps=20, num_steps=3)
    assert windows


def test_the_module_imports_only_what_the_card_lists():
    imports = re.findall(r'^(?:from|import) (\w+)', (ROOT / 'ddpm.py').read_text(), re.M)
    listed = {'torch', 'torchvision', 'einops', 'timm', 'tqdm', 'matplotlib', 'numpy'}
    brought = {'PIL'}  # by torchvision and matplotlib
    assert {n for n in imports if n not in sys.stdlib_module_names} == listed | brought
    required = {
        re.split('[>=]', line)[0] for line in Path(ROOT, 'requirements.txt').read_text().split()
    }
    assert required == listed


def drawing_only(path):
    """A file of what is needed to draw, as checkpoints/mnist is, of a run of two epochs."""
    ddpm.train(**TINY)
    saved = ddpm.load_checkpoint('checkpoints/tiny')
    ema = {name: value.half() for name, value in saved['ema'].items()}
    torch.save({'unet': saved['unet'], 'ema': ema, 'config': saved['config']}, path)


def test_sample_draws_from_any_checkpoint_without_a_dataset(workdir, monkeypatch, capsys):
    drawing_only('shipped')
    monkeypatch.setattr(ddpm, 'SHIPPED', 'shipped')
    monkeypatch.setattr(ddpm, 'load_images', None)
    monkeypatch.setattr(ddpm, 'DRAWING', dict(num_images=6, num_steps=3, seed=1))
    for flags, name in ((['--sample'], 'shipped'), (['--sample', 'checkpoints/tiny'], 'tiny')):
        monkeypatch.setattr('sys.argv', ['ddpm.py', *flags])
        ddpm.main()
        assert f'Drawn, in outputs/sample/{name}/: ' in capsys.readouterr().out.splitlines()[-1]
        assert Path(f'outputs/sample/{name}/reverse.png').exists()
    monkeypatch.setattr('sys.argv', ['ddpm.py', '--sample', 'nowhere'])
    with pytest.raises(SystemExit, match='ddpm.py: there is no checkpoint nowhere'):
        ddpm.main()


def test_what_is_only_to_be_drawn_from_is_not_trained_on(workdir):
    drawing_only('shipped')
    before = Path('shipped').read_bytes()
    with pytest.raises(ddpm.UserError, match='only to be drawn from: to train, change checkpoint'):
        ddpm.train(**{**TINY, 'checkpoint_path': 'shipped'})
    assert Path('shipped').read_bytes() == before


def test_the_weights_that_come_with_the_repository():
    saved = ddpm.load_checkpoint(ddpm.SHIPPED)
    assert ddpm.SHIPPED.stat().st_size < 5_000_000
    assert saved['config']['dataset'] == 'MNIST' and saved['config']['seed'] >= 0
    # they know digits: far better at removing noise than predicting x itself
    images = ddpm.to_input(DIGITS[:16])
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    model = ddpm.UNET(**saved['unet']).eval()
    model.load_state_dict({k.removeprefix('module.'): v for k, v in saved['ema'].items()})
    t = torch.full((16,), saved['unet']['time_steps'] // 4)
    scheduler = ddpm.DDPM_Scheduler(saved['unet']['time_steps'])
    with torch.no_grad():
        assert ddpm.diffusion_loss(model, scheduler, images, t, eps) < 0.05


def test_a_finished_run_is_drawn_without_a_dataset(workdir, monkeypatch, capsys):
    ddpm.train(**TINY)
    monkeypatch.setattr(ddpm, 'load_images', None)
    ddpm.train(**TINY)
    assert 'checkpoints/tiny: 2 epochs are done' in capsys.readouterr().out


def png(folder):
    return [np.asarray(Image.open(path)) for path in sorted(Path(folder).glob('*.png'))]


def test_many_images_are_files_of_eight_bits(workdir, monkeypatch, capsys, float32):
    """In batches, as they are in the data: light on dark, padded."""
    ddpm.train(**TINY)
    monkeypatch.setattr(ddpm, 'IMAGES_AT_ONCE', {'cpu': 40})
    sizes, process = [], ddpm.reverse_process
    drawn = []

    def spy(model, x, *arguments):
        sizes.append(len(x))
        for t, x in process(model, x, *arguments):  # noqa: B020
            yield t, x
        drawn.append(x)

    monkeypatch.setattr(ddpm, 'reverse_process', spy)
    ddpm.inference('checkpoints/tiny', num_images=90, seed=3)
    assert sizes == [40, 40, 10]
    images = png('outputs/tiny/90_images_seed_3')
    assert len(images) == 90 and images[0].dtype == np.uint8
    expected = ddpm.to_uint8(torch.cat(drawn))[:, 0].numpy()
    assert np.array_equal(np.stack(images), expected)
    assert len({image.tobytes() for image in images}) == 90  # each batch has noise of its own
    assert '90 of 90 images, in outputs/tiny/90_images_seed_3/' in capsys.readouterr().out


@pytest.mark.parametrize('at_once', [3, 40, 100])
def test_the_pictures_hold_64_images_of_however_many_batches(workdir, monkeypatch, at_once):
    """Large images are drawn a few at a time: every one of them is shown."""
    ddpm.train(**{**TINY, 'num_epochs': 1})
    monkeypatch.setattr(ddpm, 'IMAGES_AT_ONCE', {'cpu': at_once})
    shown, last = {}, []
    process = ddpm.reverse_process

    def spy(model, x, *arguments):
        for t, x in process(model, x, *arguments):  # noqa: B020
            yield t, x
        last.append(x)

    def keep(frames, strip, *_, **__):
        shown.update(frames)

    monkeypatch.setattr(ddpm, 'reverse_process', spy)
    monkeypatch.setattr(ddpm, 'draw_reverse_process', keep)
    ddpm.inference('checkpoints/tiny', num_images=70, num_steps=3)
    assert [*shown] == [20, 19, 10, 0]  # the noise, and every step
    assert all(x.shape == (64, 1, 32, 32) for x in shown.values())
    assert torch.equal(shown[0], torch.cat(last)[:64])


def test_a_stop_keeps_the_images_that_are_finished(workdir, monkeypatch, capsys):
    ddpm.train(**TINY)
    monkeypatch.setattr(ddpm, 'IMAGES_AT_ONCE', {'cpu': 40})
    process, calls = ddpm.reverse_process, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return process(*arguments)

    monkeypatch.setattr(ddpm, 'reverse_process', stopped)
    with pytest.raises(KeyboardInterrupt):
        ddpm.inference('checkpoints/tiny', num_images=90, num_steps=3, seed=3)
    assert len(png('outputs/tiny/90_images_seed_3')) == 80
    assert '80 of 90 images, in outputs/tiny/90_images_seed_3/' in capsys.readouterr().out


def test_images_are_those_of_the_seed_and_of_the_average(workdir):
    ddpm.train(**TINY)
    grids = []
    for path, seed in (('tiny', 1), ('tiny', 1), ('tiny', 2), ('raw', 1)):
        ddpm.inference(f'checkpoints/{path}', num_images=8, num_steps=3, seed=seed)
        grids.append(plt.imread(f'outputs/{path}/grid.png'))
        saved = torch.load('checkpoints/tiny')
        saved['ema'] = {f'module.{name}': value for name, value in saved['weights'].items()}
        torch.save(saved, 'checkpoints/raw')
    assert np.array_equal(grids[0], grids[1])
    assert not np.array_equal(grids[0], grids[2])
    assert not np.array_equal(grids[0], grids[3])


def test_progress_is_drawn_from_the_average(workdir, monkeypatch):
    """An average that has not moved yet draws what the initial weights do."""
    grids = []
    for lr, decay in ((1e-2, 1.0), (0.0, 0.0), (1e-2, 0.0)):
        path = f'checkpoints/{lr}_{decay}'
        numbers = {'lr': lr, 'ema_decay': decay, 'sample_every': 2, 'checkpoint_path': path}
        ddpm.train(**{**TINY, **numbers})
        grids.append(plt.imread(f'outputs/{lr}_{decay}/progress/epoch_002.png'))
    assert np.array_equal(grids[0], grids[1])
    assert not np.array_equal(grids[1], grids[2])


def test_progress_is_always_drawn_from_the_same_noise(workdir):
    ddpm.train(**{**TINY, 'lr': 0.0, 'num_epochs': 2, 'sample_every': 1})
    first, second = (plt.imread(f'outputs/tiny/progress/epoch_00{i}.png') for i in (1, 2))
    assert np.array_equal(first, second) and first.std() > 0


def test_progress_of_large_images_is_drawn_of_fewer(workdir, monkeypatch):
    monkeypatch.setattr(ddpm, 'IMAGES_AT_ONCE', {'cpu': 8})
    sizes, process = [], ddpm.reverse_process
    monkeypatch.setattr(
        ddpm, 'reverse_process', lambda m, x, *a: sizes.append(len(x)) or process(m, x, *a)
    )
    ddpm.train(**{**TINY, 'num_epochs': 1, 'sample_every': 1})
    assert sizes == [8]


def test_digits_are_dark_on_light_and_nothing_else_is(workdir, monkeypatch):
    ddpm.train(**TINY)
    saved = torch.load('checkpoints/tiny')
    grids = []
    for dataset in ('MNIST', 'FashionMNIST'):
        saved['config']['dataset'] = dataset
        torch.save(saved, 'checkpoints/tiny')
        ddpm.inference('checkpoints/tiny', num_images=8, num_steps=3, seed=1)
        grids.append(plt.imread('outputs/tiny/grid.png')[2:66, 2:66])
    assert np.allclose(grids[0], 1 - grids[1], atol=0.01)


def test_ctrl_c_while_torch_is_imported(tmp_path):
    command = [sys.executable, '-X', 'importtime', str(ROOT / 'ddpm.py'), '--preview']
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.split('|')[-1].strip() == 'numpy':  # torch is to come
            break
    process.send_signal(signal.SIGINT)
    assert 'Traceback' not in process.stderr.read()
    assert process.wait() == -signal.SIGINT
    assert not os.listdir(tmp_path)


def test_every_line_fits_80_columns(tmp_path):
    """The real program at a terminal of 80 columns, and nothing below its last line."""
    import pty

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    edits = f"{TINY_PREVIEW}\nddpm.PREVIEW.update(sample_every=1, checkpoint_path='checkpoints/a')"
    code = f'import sys, ddpm\n{edits}\nsys.argv = ["ddpm.py", "--preview"]\nddpm.main()'
    command = [sys.executable, '-c', code]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=slave, stderr=slave, text=True)
    os.close(slave)
    screen = b''
    with contextlib.suppress(OSError):  # at its end
        while part := os.read(master, 4096):
            screen += part
    assert process.wait() == 0
    lines = [line for line in re.split(r'[\r\n]+', screen.decode()) if line.strip()]
    assert max(len(re.sub(r'\x1b\[[A-Z]', '', line)) for line in lines) <= 80
    assert any(re.search(r'Epoch 2/2 .* img/s, loss \d\.\d{4}, \d+:\d+ to go$', x) for x in lines)
    assert lines[-1] == DRAWN.replace('tiny', 'a')
