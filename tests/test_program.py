"""`python ddpm.py` as a new user meets it, and the pictures it makes."""

import contextlib
import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_PREVIEW, few_images, run_program
from PIL import Image

import ddpm

SAVED = 'Saved in outputs/tiny/: grid.png, reverse.png, reverse.gif'
PICTURES = ['grid.png', 'loss.png', 'reverse.png', 'reverse.gif']


def test_preview_trains_samples_and_runs_again(tmp_path):
    edits = TINY_PREVIEW + "ddpm.PREVIEW['sample_every'] = 1"
    first = run_program(tmp_path, edits, '--preview')
    assert first.returncode == 0, first.stderr
    epochs = re.findall(r'^Epoch (\d) \| Loss \d\.\d{5}$', first.stdout, re.M)
    assert epochs == ['1', '2']
    lines = first.stdout.splitlines()
    assert 'checkpoints/tiny: trained for 2 epochs; a larger num_epochs trains on' in lines
    assert lines[-1] == SAVED
    pictures = [tmp_path / 'outputs/tiny' / name for name in PICTURES]
    progress = sorted((tmp_path / 'outputs/tiny/progress').iterdir())
    assert [p.name for p in progress] == ['epoch_001.00.png', 'epoch_002.00.png']
    for path in progress:
        assert f'{path.relative_to(tmp_path)}: samples after {path.stem[8]}.00 epochs' in lines
    for picture in pictures[:3] + progress:
        image = plt.imread(picture)
        assert image.std() > 0.05, f'{picture} is blank'
    assert pictures[3].read_bytes()[:6] == b'GIF89a'
    assert sorted(os.listdir(tmp_path / 'outputs/tiny')) == sorted([*PICTURES, 'progress'])
    checkpoint = (tmp_path / 'checkpoints/tiny').read_bytes()
    assert os.listdir(tmp_path / 'checkpoints') == ['tiny']

    before = {p: p.read_bytes() for p in pictures}
    again = run_program(tmp_path, edits, '--preview')
    assert again.returncode == 0, again.stderr
    assert 'Epoch' not in again.stdout
    assert 'checkpoints/tiny: resumed after step 6 of 6' in again.stdout
    assert 'checkpoints/tiny: trained for 2 epochs; a larger num_epochs' in again.stdout
    assert (tmp_path / 'checkpoints/tiny').read_bytes() == checkpoint
    for picture in (pictures[0], pictures[2], pictures[3]):
        assert picture.read_bytes() != before[picture], 'of another seed'


def test_without_cuda_it_says_so_and_previews(tmp_path):
    done = run_program(tmp_path, TINY_PREVIEW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('No CUDA GPU here: this is the preview. --full ')
    assert (tmp_path / 'checkpoints/tiny').exists()


def test_full_overrides(tmp_path):
    edits = (
        TINY_PREVIEW
        + 'ddpm.FULL.update(TINY, checkpoint_path="full"); ddpm.AFTER_TRAINING["num_steps"] = None'
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


def test_the_settings_to_edit_are_the_articles():
    full = ddpm.FULL
    assert (full['num_epochs'], full['lr'], full['batch_size']) == (75, 2e-5, 64)
    assert (full['ema_decay'], full['num_time_steps'], full['unet']) == (0.9999, 1000, {})
    assert full['checkpoint_path'] == 'checkpoints/ddpm_checkpoint'
    assert full['checkpoint_path'] != ddpm.PREVIEW['checkpoint_path']


def test_the_strip_shows_the_articles_times(workdir, monkeypatch):
    """And what is shown is the x of those very times."""
    ddpm.train(**{**TINY, 'num_time_steps': 1000, 'num_epochs': 1})
    seen = {}
    monkeypatch.setattr(
        ddpm.Pictures, 'draw', lambda self, images: seen.update(f=self.frames, s=self.strip)
    )

    def process(model, x, scheduler, num_steps=None, generator=None):
        times = ddpm.sampling_times(1000, num_steps)
        return ((t, torch.full_like(x, t)) for t in times)

    monkeypatch.setattr(ddpm, 'reverse_process', process)
    ddpm.inference('checkpoints/tiny')
    assert seen['s'] == [999, 700, 550, 400, 300, 200, 100, 50, 15, 0]
    assert all((seen['f'][t][0] == t).all() for t in seen['s'])
    assert [x.shape for x in seen['f'][999]] == [(32, 1, 32, 32)]
    assert [*seen['f']] == sorted(seen['f'], reverse=True) and max(seen['f']) == 1000


@pytest.mark.parametrize(
    'T, num_steps',
    [(1000, 1000), (1000, 30), (1000, 2), (500, 500), (500, 30), (20, 20), (20, 3), (2, 1)],
)
def test_the_times_to_show(T, num_steps):
    """Each once, of those that the process goes through, from its first to its last; what is left
    of the image grows from one to the next, in steps that are as even as they can be."""
    times = ddpm.sampling_times(T, num_steps)
    for shown, most in zip(ddpm.times_to_show(times, T), (10, 40)):
        assert {*shown} <= {*times} and len({*shown}) == len(shown) <= most
        assert shown[0] == times[0] and shown[-1] == times[-1]
        if num_steps > 1:
            left = np.cumprod(1 - np.linspace(1e-4, 0.02, T))[shown] ** 0.5
            grown = np.diff(left)
            assert (grown > 0).all()
            all_left = np.cumprod(1 - np.linspace(1e-4, 0.02, T))[times] ** 0.5
            if (T, most) != (1000, 10):  # the article's times
                even = (left[-1] - left[0]) / (most - 1)
                assert grown.max() < even + max(np.diff(all_left))
        if num_steps == 500:
            assert len(shown) == most


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
    monkeypatch.setattr(plt, 'get_backend', lambda: 'TkAgg')
    monkeypatch.setattr(plt, 'show', lambda: windows.extend(plt.get_fignums()))
    ddpm.inference('checkpoints/tiny', num_time_steps=20, num_steps=3)
    assert windows


def test_the_module_imports_only_what_the_card_lists():
    imports = re.findall(r'^(?:from|import) (\w+)', (ROOT / 'ddpm.py').read_text(), re.M)
    listed = {'torch', 'torchvision', 'einops', 'timm', 'tqdm', 'matplotlib', 'numpy'}
    brought = {'PIL', 'filelock'}  # by torchvision and by torch
    assert {n for n in imports if n not in sys.stdlib_module_names} == listed | brought
    required = {
        re.split('[>=]', line)[0] for line in Path(ROOT, 'requirements.txt').read_text().split()
    }
    assert required == listed


def only_to_sample(path):
    """A file of what sampling needs, as checkpoints/mnist is, of a run of two epochs."""
    ddpm.train(**TINY)
    saved = ddpm.load_checkpoint('checkpoints/tiny')
    ema = {name: value.half() for name, value in saved['ema'].items()}
    torch.save({'unet': saved['unet'], 'ema': ema, 'config': saved['config']}, path)


def test_sample_takes_any_checkpoint_without_a_dataset(workdir, monkeypatch, capsys):
    """With the settings for it, not those of the sampling after a training."""
    only_to_sample('pretrained')
    monkeypatch.setattr(ddpm, 'PRETRAINED', 'pretrained')
    monkeypatch.setattr(ddpm, 'load_images', None)
    monkeypatch.setattr(ddpm, 'SAMPLE', dict(num_images=6, num_steps=3, seed=1))
    for flags, name in ((['--sample'], 'pretrained'), (['--sample', 'checkpoints/tiny'], 'tiny')):
        monkeypatch.setattr('sys.argv', ['ddpm.py', *flags])
        capsys.readouterr()
        ddpm.main()
        *_, sampled, saved = capsys.readouterr().out.splitlines()
        assert sampled == 'Sampled 6 images in 3 steps with seed 1'
        assert saved.replace(', in place of earlier ones', '') == SAVED.replace('tiny', name)
        assert Path(f'outputs/{name}/reverse.png').exists()
    monkeypatch.setattr('sys.argv', ['ddpm.py', '--sample', 'nowhere'])
    with pytest.raises(SystemExit, match='ddpm.py: there is no checkpoint nowhere'):
        ddpm.main()


def test_a_training_is_sampled_from_with_its_own_settings(workdir, monkeypatch, capsys):
    monkeypatch.setattr(ddpm, 'PREVIEW', TINY)
    monkeypatch.setattr(ddpm, 'SAMPLE', dict(num_images=6, num_steps=3, seed=1))
    monkeypatch.setattr(ddpm, 'AFTER_TRAINING', dict(num_images=2, num_steps=4, seed=2))
    monkeypatch.setattr('sys.argv', ['ddpm.py', '--preview'])
    ddpm.main()
    assert 'Sampled 2 images in 4 steps with seed 2' in capsys.readouterr().out


def test_sample_may_name_its_checkpoint(workdir, monkeypatch, capsys):
    """That of the command line comes first; after a training it is that of the training."""
    only_to_sample('mine')
    numbers = dict(checkpoint_path='mine', num_images=2, num_steps=3, seed=1)
    for name in ('SAMPLE', 'AFTER_TRAINING'):
        monkeypatch.setattr(ddpm, name, numbers)
    monkeypatch.setattr(ddpm, 'PREVIEW', TINY)
    for flags, name in (
        (['--sample'], 'mine'),
        (['--sample', 'checkpoints/tiny'], 'tiny'),
        (['--preview'], 'tiny'),
    ):
        monkeypatch.setattr('sys.argv', ['ddpm.py', *flags])
        ddpm.main()
        assert f'Saved in outputs/{name}' in capsys.readouterr().out


def test_what_is_only_to_be_sampled_from_is_not_trained_on(workdir):
    only_to_sample('pretrained')
    before = Path('pretrained').read_bytes()
    with pytest.raises(ddpm.UserError, match='pretrained is not .*no entry weights.*move it away'):
        ddpm.train(**{**TINY, 'checkpoint_path': 'pretrained'})
    assert Path('pretrained').read_bytes() == before


def test_the_weights_that_come_with_the_repository():
    saved = ddpm.load_checkpoint(ddpm.PRETRAINED)
    assert ddpm.PRETRAINED.stat().st_size < 5_000_000
    assert saved['config']['dataset'] == 'MNIST' and saved['config']['seed'] >= 0
    # they know digits: far better at removing noise than predicting x itself
    images = ddpm.to_input(few_images())
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    model = ddpm.load_model(ddpm.PRETRAINED)
    t = torch.full((len(images),), model.time_steps // 4)
    with torch.no_grad():
        assert (
            ddpm.diffusion_loss(model, ddpm.DDPM_Scheduler(model.time_steps), images, t, eps) < 0.05
        )


def png(folder):
    return [np.asarray(Image.open(path)) for path in sorted(Path(folder).glob('*.png'))]


@pytest.fixture
def batches(monkeypatch):
    """The x_0 of each batch that is sampled."""
    sampled, process = [], ddpm.reverse_process

    def spy(model, x, *arguments):
        for t, x in process(model, x, *arguments):  # noqa: B020
            yield t, x
        sampled.append(x)

    monkeypatch.setattr(ddpm, 'reverse_process', spy)
    return sampled


def test_many_images_are_files_of_eight_bits(workdir, monkeypatch, float32, batches):
    """In batches, as they are in the data: light on dark, padded."""
    ddpm.train(**TINY)
    monkeypatch.setattr(ddpm, 'SAMPLE_BATCH', {'cpu': 40})
    images = ddpm.inference('checkpoints/tiny', num_images=90, num_steps=3, seed=3)
    assert [len(x) for x in batches] == [40, 40, 10]
    files = png('outputs/tiny/90_images_seed_3')
    assert len(files) == 90 and files[0].dtype == np.uint8
    expected = torch.cat(batches)
    assert torch.equal(images, expected.clamp(0, 1))
    assert np.array_equal(np.stack(files), ddpm.to_uint8(expected)[:, 0].numpy())
    assert len({file.tobytes() for file in files}) == 90  # each batch has noise of its own


@pytest.mark.parametrize('at_once', [6, 30, 40, 100])
def test_the_pictures_hold_as_many_images_of_however_many_batches(
    workdir, monkeypatch, batches, at_once
):
    """Large images are sampled a few at a time: the grid has 64 and the animation 32 of them."""
    ddpm.train(**{**TINY, 'num_epochs': 1})
    monkeypatch.setattr(ddpm, 'SAMPLE_BATCH', {'cpu': at_once})
    shown, grids, grid = {}, [], ddpm.grid
    monkeypatch.setattr(ddpm.Pictures, 'animate', lambda _, frames, path: shown.update(frames))
    monkeypatch.setattr(ddpm, 'grid', lambda x: grids.append(x) or grid(x))
    images = ddpm.inference('checkpoints/tiny', num_images=70, num_steps=3)
    assert torch.equal(images, torch.cat(batches).clamp(0, 1))
    assert torch.equal(grids[0], images[:64])
    assert [*shown] == [20, 19, 10, 0]  # the noise, and every step
    assert all(x.shape == (32, 1, 32, 32) for x in shown.values())
    assert torch.equal(shown[0], torch.cat(batches)[:32])
    assert all(len(x.flatten(1).unique(dim=0)) == 32 for x in shown.values())


@pytest.mark.parametrize(
    'size, expected', [(16, [10]), (32, [8, 2]), (64, [2] * 5), (128, [1] * 10)]
)
def test_as_many_images_at_a_time_as_fit_into_the_memory(
    workdir, monkeypatch, batches, size, expected
):
    """As many of their pixels, that is, but at least one image."""
    ddpm.train(**{**TINY, 'num_epochs': 1})
    model = ddpm.load_model('checkpoints/tiny')
    model.image_size = size
    monkeypatch.setattr(ddpm, 'SAMPLE_BATCH', {'cpu': 8})
    assert ddpm.sample(model, 10, num_steps=1).shape == (10, 1, size, size)
    assert [len(x) for x in batches] == expected


def test_a_stop_keeps_the_images_that_are_finished(workdir, monkeypatch):
    ddpm.train(**TINY)
    monkeypatch.setattr(ddpm, 'SAMPLE_BATCH', {'cpu': 40})
    process, calls = ddpm.reverse_process, []

    def stopped(*arguments):
        calls.append(1)
        for step in process(*arguments):
            yield step
            if len(calls) == 3:  # in the middle of the last batch
                raise KeyboardInterrupt

    monkeypatch.setattr(ddpm, 'reverse_process', stopped)
    with pytest.raises(KeyboardInterrupt):
        ddpm.inference('checkpoints/tiny', num_images=90, num_steps=3, seed=3)
    assert len(png('outputs/tiny/90_images_seed_3')) == 80


def test_the_seed_is_printed_and_gives_the_same_images_again(workdir, capsys):
    """And it is said where they take the place of others."""
    ddpm.train(**TINY)
    grids, images = [], []
    seed = -1
    for again in (False, True):
        capsys.readouterr()
        images.append(ddpm.inference('checkpoints/tiny', num_images=8, num_steps=3, seed=seed))
        grids.append(plt.imread('outputs/tiny/grid.png'))
        out = capsys.readouterr().out
        seed = int(re.search(r'Sampled 8 images in 3 steps with seed (\d+)', out)[1])
        replaced = 'Saved in outputs/tiny/, in place of earlier ones: grid.png, reverse.png'
        assert (replaced in out) == again
    assert torch.equal(*images) and np.array_equal(*grids)
    images.append(ddpm.inference('checkpoints/tiny', num_images=8, num_steps=3))
    assert not torch.equal(*images[1:])  # -1 draws another one


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


def test_progress_is_sampled_from_the_average(workdir):
    """And not from the weights of the last step."""
    ddpm.train(**{**TINY, 'lr': 1e-2, 'ema_decay': 0.9999, 'sample_every': 2})
    shown = np.asarray(Image.open('outputs/tiny/progress/epoch_002.00.png'))
    model = ddpm.load_model('checkpoints/tiny')

    def sampled():
        return np.asarray(ddpm.grid(ddpm.sample(model, 64, ddpm.PROGRESS_STEPS, seed=0)))

    assert np.array_equal(shown, sampled())
    model.load_state_dict(ddpm.load_checkpoint('checkpoints/tiny', to_train=True)['weights'])
    assert not np.array_equal(shown, sampled())


def test_progress_is_always_sampled_from_the_same_noise(workdir):
    ddpm.train(**{**TINY, 'lr': 0.0, 'num_epochs': 2, 'sample_every': 1})
    first, second = (plt.imread(f'outputs/tiny/progress/epoch_00{i}.00.png') for i in (1, 2))
    assert np.array_equal(first, second) and first.std() > 0


def test_progress_of_large_images_is_sampled_of_fewer(workdir, monkeypatch, batches):
    monkeypatch.setattr(ddpm, 'SAMPLE_BATCH', {'cpu': 8})
    ddpm.train(**{**TINY, 'num_epochs': 1, 'sample_every': 1})
    assert [len(x) for x in batches] == [8]


def test_the_first_progress_comes_soon(workdir, capsys):
    """Of the preview within a quarter of an epoch; where it is is said."""
    assert 0 < ddpm.PREVIEW['sample_every'] <= 0.25
    ddpm.train(**{**TINY, 'sample_every': 1 / 3, 'num_epochs': 1})
    grids = [f'epoch_00{epoch}.png' for epoch in ('0.33', '0.67', '1.00')]
    assert sorted(os.listdir('outputs/tiny/progress')) == grids
    out = capsys.readouterr().out
    assert 'outputs/tiny/progress/epoch_000.33.png: samples after 0.33 epochs\n' in out


def test_a_tiny_part_of_an_epoch_is_a_step(workdir):
    ddpm.train(**{**TINY, 'sample_every': 0.01, 'num_epochs': 1})
    assert len(os.listdir('outputs/tiny/progress')) == 3


@pytest.mark.parametrize('channels', [1, 3])
def test_a_grid_is_white_on_black_with_white_gaps(channels):
    x = torch.zeros(5, channels, 8, 8)
    x[1] = 1
    x[2, :, :, 4:] = 0.5
    picture = ddpm.grid(x, columns=2)
    assert picture.mode == ('L' if channels == 1 else 'RGB')
    pixels = np.asarray(picture).reshape(3 * 18 + 2, 2 * 18 + 2, channels)
    expected = np.full_like(pixels, 255)
    expected[2:18, 2:18] = 0
    expected[20:36, 2:18] = 0
    expected[20:36, 10:18] = 128
    expected[20:36, 20:36] = expected[38:54, 2:18] = 0
    expected[38:54, 20:36] = pixels[38:54, 20:36]  # where there is no fifth
    assert np.array_equal(pixels, expected)


BACKENDS = ['module://matplotlib_inline.backend_inline', 'module://no_such_module']


@pytest.mark.parametrize('backend', BACKENDS)
def test_a_backend_that_a_notebook_asks_for(workdir, backend):
    """Its kernel puts it into the environment, also of `!python ddpm.py` in an environment of its
    own, which has no such module."""
    ddpm.train(**{**TINY, 'num_time_steps': 40, 'num_epochs': 1})
    code = 'import runpy, sys; sys.modules["matplotlib_inline"] = None; del sys.argv[0]\n'
    code += 'runpy.run_path(sys.argv[0], run_name="__main__")'
    flags = [str(ROOT / 'ddpm.py'), '--sample', 'checkpoints/tiny']
    environment = {**os.environ, 'MPLBACKEND': backend}
    command = [sys.executable, '-c', code, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    assert Path('outputs/tiny/grid.png').exists()


def test_main_in_a_notebook_names_what_to_call(monkeypatch):
    monkeypatch.setattr('sys.argv', ['/lib/ipykernel_launcher.py', '-f', '/tmp/kernel-1.json'])
    with pytest.raises(SystemExit) as end:
        ddpm.main()
    assert str(end.value).startswith('ddpm.py: ') and '\n' not in str(end.value)
    assert 'call ddpm.train and inference' in str(end.value)


def real_program(folder, edits, *flags, shell='exec "$@"', **environment):
    """What no fork can show, since it is decided when Python starts or a module is imported."""
    code = f'import sys, ddpm\n{TINY_PREVIEW}\n{edits}\nsys.argv = ["ddpm.py", *sys.argv[1:]]\n'
    command = ['sh', '-c', shell, 'sh', sys.executable, '-c', f'{code}ddpm.main()', *flags]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True)


@pytest.mark.parametrize('variable, shown', [('DISABLE', 0), ('MININTERVAL', 1)])
def test_the_variables_of_tqdm_are_honoured(tmp_path, variable, shown):
    """A bar that is switched off, or redrawn in every step, also in a log file."""
    edits = "ddpm.PREVIEW['num_epochs'] = 10"
    value = {'DISABLE': '1', 'MININTERVAL': '0'}[variable]
    done = real_program(tmp_path, edits, '--preview', **{f'TQDM_{variable}': value})
    assert done.returncode == 0, done.stderr
    redrawn = done.stderr.count(b'img/s')
    assert redrawn >= 30 if shown else redrawn == 0
    assert b'Epoch 10 | Loss' in done.stdout


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize('stream, least, most', [(io.StringIO, 9, 12), (Terminal, 300, 700)])
def test_a_log_file_gets_a_line_a_minute(monkeypatch, stream, least, most):
    """In ten minutes of a step a second, by a clock of our own."""
    clock = [0.0]
    monkeypatch.setattr('tqdm.std.time', lambda: clock[0])
    monkeypatch.setattr('tqdm.std.tqdm.monitor_interval', 0)
    monkeypatch.delenv('TQDM_MININTERVAL', raising=False)
    monkeypatch.setattr(sys, 'stderr', stream())
    with ddpm.progress_bar('Training', 600) as bar:
        for _ in range(600):
            clock[0] += 1
            bar.update()
    assert least <= sys.stderr.getvalue().count('\r') <= most


def test_a_terminal_that_knows_ascii_only(tmp_path):
    edits = "ddpm.PREVIEW.update(checkpoint_path='checkpoints/数字', sample_every=1)"
    done = real_program(tmp_path, edits, '--preview', PYTHONIOENCODING='ascii')
    assert done.returncode == 0, done.stderr
    assert rb'checkpoints/\u6570\u5b57: trained for 2 epochs' in done.stdout
    assert (tmp_path / 'outputs/数字/grid.png').exists()


@pytest.mark.parametrize('closed', ['2>&-', '>&-'])
def test_a_closed_stream(tmp_path, closed):
    done = real_program(tmp_path, '', '--preview', shell=f'exec "$@" {closed}')
    assert done.returncode == 0, done.stderr
    assert b'Traceback' not in done.stderr
    assert (tmp_path / 'outputs/tiny/grid.png').exists()
    state = torch.load(tmp_path / 'checkpoints/tiny', weights_only=True)
    assert len(state['losses']) == 6  # and nobody's text is in the file


def test_every_line_fits_80_columns(tmp_path):
    """The real program at a terminal of 80 columns, and nothing below its last line."""
    import pty

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    edits = f'{TINY_PREVIEW}\nddpm.PREVIEW.update(sample_every=1, num_time_steps=1000)'
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
    assert any(re.search(r'Epoch 2/2: 100%.* img/s, loss \d\.\d{4}\]$', x) for x in lines)
    assert lines[-1] == SAVED
