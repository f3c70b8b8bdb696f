"""`python ddpm.py` as a user meets it, and the pictures it makes: neither can end a run."""

import functools
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, TINY, TINY_PREVIEW, run_program, small_unet
from matplotlib.backends import BackendFilter, backend_registry
from PIL import Image

import ddpm

SAVED = 'Saved in outputs/tiny/: grid.png, reverse.png, reverse.gif'
PICTURES = {'grid.png', 'loss.png', 'reverse.png', 'reverse.gif'}


def save_weights(path='checkpoints/tiny', seed=0, time_steps=20):
    """A file of what sampling needs, as checkpoints/mnist is, of an untrained network."""
    weights = small_unet(seed, time_steps=time_steps).state_dict()
    ema = {f'module.{name}': weight.half() for name, weight in weights.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({'unet': {**SMALL, 'time_steps': time_steps}, 'ema': ema}, path)


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def assert_trained(folder, pictures):
    """All six steps, and nobody's text is in the file; these are its pictures."""
    saved = torch.load(folder / 'checkpoints/tiny', weights_only=True)
    assert len(saved['losses']) == 6 and {*os.listdir(folder / 'outputs/tiny')} == pictures


# ---- The program ---------------------------------------------------------------------------------


def test_the_preview_trains_samples_and_runs_again(tmp_path):
    edits = TINY_PREVIEW + "ddpm.PREVIEW['sample_every'] = 1\n"
    edits += 'ddpm.progress_bar = lambda **options: ddpm.tqdm(mininterval=0, **options)\n'
    first = run_program(tmp_path, edits, '--preview')
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert re.findall(r'^Epoch (\d) \| Loss \d\.\d{5}$', first.stdout, re.M) == ['1', '2']
    assert re.search(r'Epoch 2/2: 100%.* 6/6 .*, loss \d\.\d{4}\]', first.stderr)
    assert 'checkpoints/tiny is trained for 2 epochs; more num_epochs train on' in lines
    assert lines[-1].strip() == SAVED
    assert_trained(tmp_path, {*PICTURES, 'progress'})
    folder, progress = tmp_path / 'outputs/tiny', ['epoch_001.00.png', 'epoch_002.00.png']
    assert sorted(os.listdir(folder / 'progress')) == progress
    assert f'outputs/tiny/progress/{progress[0]}: samples after 1.00 epochs' in lines
    for name in ('grid.png', 'loss.png', 'reverse.png', f'progress/{progress[1]}'):
        assert pixels(folder / name).std() > 10, f'{name} is blank'
    checkpoint = (tmp_path / 'checkpoints/tiny').read_bytes()
    before = {name: (folder / name).read_bytes() for name in PICTURES}
    (seed,) = re.findall(r'^Sampled 64 images in 4 steps with seed (\d+)$', first.stdout, re.M)
    assert len(seed) > 3, 'of 32 random bits'

    for seeded in (True, False):
        edits += f'ddpm.AFTER_TRAINING["seed"] = {seed if seeded else -1}\n'
        again = run_program(tmp_path, edits, '--preview')
        assert again.returncode == 0, again.stderr
        assert 'checkpoints/tiny: resumed after step 6 of 6' in again.stdout
        assert 'Epoch' not in again.stdout
        assert (tmp_path / 'checkpoints/tiny').read_bytes() == checkpoint
        for name in PICTURES - {'loss.png'}:
            assert ((folder / name).read_bytes() == before[name]) == seeded


@pytest.mark.parametrize('flags', ['', '--preview', '--full', '--sample', '--sample x'])
@pytest.mark.parametrize('cuda, own', [(False, {}), (True, {'checkpoint_path': 'own'})])
def test_what_the_program_runs(monkeypatch, capsys, flags, cuda, own):
    """And with which settings: SAMPLE's checkpoint_path is for a bare --sample."""
    calls, choices = [], {'': 'FULL' if cuda else 'PREVIEW', '--preview': 'PREVIEW'}
    trained = (choices | {'--full': 'FULL'}).get(flags)
    for name in ('train', 'inference'):  # with the signatures that main checks
        spy = functools.wraps(getattr(ddpm, name))(lambda **given: calls.append(given))
        monkeypatch.setattr(ddpm, name, spy)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    settings = {name: dict(checkpoint_path=name, lr=0.5) for name in ('FULL', 'PREVIEW')}
    settings |= dict(AFTER_TRAINING={'num_images': 2, **own}, SAMPLE={'num_steps': 3, **own})
    for name, value in settings.items():
        monkeypatch.setattr(ddpm, name, value)
    ddpm.main(flags.split())
    path = {'--sample': own.get('checkpoint_path', ddpm.PRETRAINED)}.get(flags, 'x')
    sampled = settings['AFTER_TRAINING' if trained else 'SAMPLE']
    assert calls == ([settings[trained]] if trained else []) + [
        {**sampled, 'checkpoint_path': trained or path}
    ]
    told = 'No CUDA GPU here: this is the preview' in capsys.readouterr().out
    assert told == (not flags and not cuda)


def test_the_settings_to_edit_are_the_articles():
    articles = dict(num_epochs=75, lr=2e-5, batch_size=64, ema_decay=0.9999, num_time_steps=1000)
    articles |= dict(unet={}, checkpoint_path='checkpoints/ddpm_checkpoint', lr_decay=False)
    assert articles.items() <= ddpm.FULL.items()
    assert ddpm.PREVIEW['checkpoint_path'] != articles['checkpoint_path']
    assert 0 < ddpm.PREVIEW['sample_every'] <= 0.25  # the first picture comes soon


def test_the_module_imports_only_what_is_required():
    imports = re.findall(r'^(?:from|import) (\w+)', (ROOT / 'ddpm.py').read_text(), re.M)
    required = {line.split('>=')[0] for line in (ROOT / 'requirements.txt').read_text().split()}
    brought = {'PIL', 'filelock'}  # by torchvision and by torch
    assert {n for n in imports if n not in sys.stdlib_module_names} == required | brought


# ---- Where it prints -----------------------------------------------------------------------------

# a way to prepare standard output and error, and one to make them fail
FAILURES = {
    'a full disk': ('full = os.open("/dev/full", 1)', 'os.dup2(full, 1), os.dup2(full, 2)'),
    'a broken pipe': ('r, w = os.pipe(); os.dup2(w, 1); os.dup2(w, 2)', 'os.close(r)'),
    'a terminal that is gone': ('r, w = os.openpty(); os.dup2(w, 1); os.dup2(w, 2)', 'os.close(r)'),
}


@pytest.mark.parametrize('prepare, fail', FAILURES.values(), ids=FAILURES)
def test_output_that_fails_is_no_reason_to_stop(tmp_path, prepare, fail):
    """From the first save on: neither where a line is printed nor where the end flushes them."""
    edits = f"""{TINY_PREVIEW}
import functools, os, sys
{prepare}
fail, save = functools.cache(lambda: ({fail})), ddpm.save_checkpoint
ddpm.save_checkpoint = lambda *arguments: (save(*arguments), fail())
ddpm.PREVIEW.update(save_minutes=0, sample_every=1)
sys.stdout.reconfigure(line_buffering=os.isatty(1))
"""
    assert run_program(tmp_path, edits, '--preview').returncode == 0
    assert_trained(tmp_path, {*PICTURES, 'progress'})


def test_closed_streams(tmp_path):
    """Where Python has no sys.stdout, and the first files that are opened take its place; beside a
    matplotlibrc that wants LaTeX."""
    (tmp_path / 'matplotlibrc').write_text('text.usetex: True')
    code = f'import ddpm\n{TINY_PREVIEW}\nddpm.main(["--preview"])'
    command = ['sh', '-c', 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    assert_trained(tmp_path, PICTURES)


def test_what_is_decided_as_python_starts_and_ends(workdir):
    """A pipe that nobody reads; OpenMP's patience, as it tells itself; and a backend that a
    notebook asks for, in an environment that has no such module, as of `!python ddpm.py`."""
    save_weights(time_steps=40)
    Path('matplotlibrc').write_text('backend: agg')
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / 'ddpm.py'), '--sample', 'checkpoints/tiny']
    environment = {**os.environ, 'OMP_DISPLAY_ENV': 'VERBOSE', 'MPLBACKEND': 'module://nowhere'}
    environment.pop('GOMP_SPINCOUNT')
    done = subprocess.run(
        command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not re.search('Traceback|Exception|Error', done.stderr)
    assert {*os.listdir('outputs/tiny')} == PICTURES - {'loss.png'}
    assert 'GOMP' not in done.stderr or "GOMP_SPINCOUNT = '10000'" in done.stderr


@pytest.mark.parametrize('encoding, shown', [(None, '数'), ('ascii', r'\u6570')])
def test_the_file_run_by_another_program(workdir, monkeypatch, encoding, shown):
    """As runpy does, and a notebook's %run; into a stream that has no `reconfigure`, or not the
    letters, which are escaped. It is put back."""
    save_weights('checkpoints/数', time_steps=40)
    stream = io.TextIOWrapper(io.BytesIO(), encoding) if encoding else io.StringIO()
    monkeypatch.setattr(sys, 'argv', ['ddpm.py', '--sample', 'checkpoints/数'])
    monkeypatch.setattr(sys, 'stdout', stream)
    monkeypatch.setenv('GOMP_SPINCOUNT', '77')
    runpy.run_path(str(ROOT / 'ddpm.py'), run_name='__main__')
    assert sys.stdout is stream
    text = stream.buffer.getvalue().decode() if encoding else stream.getvalue()
    assert text.splitlines()[-1].strip() == SAVED.replace('tiny', shown)
    assert os.environ['GOMP_SPINCOUNT'] == '77'  # what the user asks for stands


@pytest.mark.parametrize('terminal, least, most', [(False, 9, 12), (True, 300, 6001)])
def test_a_log_file_gets_a_line_a_minute(workdir, monkeypatch, terminal, least, most):
    """In ten minutes of ten steps a second, by a clock of our own; tqdm's monitor, which redraws a
    bar that is late, waits as long."""
    clock, err = [0.0], io.StringIO()
    err.isatty = lambda: terminal
    monkeypatch.setattr('tqdm.std.time', lambda: clock[0])
    monkeypatch.setattr('tqdm.std.tqdm.monitor_interval', 0)
    monkeypatch.setattr(sys, 'stderr', err)
    with ddpm.progress_bar(desc='Training', total=6000) as bar:
        for _ in range(6000):
            clock[0] += 0.1
            bar.update()
    assert least <= err.getvalue().count('\r') <= most and bar.maxinterval == 60 - 50 * terminal


# ---- The pictures --------------------------------------------------------------------------------


def test_each_checkpoint_has_a_folder_of_its_own(workdir):
    """Below outputs, whatever its path and however it is spelled."""
    paths = 'checkpoints/m m runs/red/m runs/blue/m runs/m checkpoints/red/m checkpoints/n /m'
    paths += ' ../m ../../m ../checkpoints/m ../runs/red/m'
    folders = {path: ddpm.folder_of_pictures(Path(path)) for path in paths.split()}
    assert len({*folders.values()}) == len(folders) and folders['checkpoints/m'].name == 'm'
    for path, folder in folders.items():
        assert folder.parts[0] == 'outputs' and '..' not in folder.parts
        for same in (workdir / path, workdir / 'x/..' / path):
            assert ddpm.folder_of_pictures(same) == folder
    assert folders['checkpoints/m'] == Path('outputs/m')


@pytest.fixture
def batches(monkeypatch):
    """The noise and the images of each batch that is sampled, 40 at most; the third is stopped
    where this list begins with 'stop'."""
    sampled, process = [], ddpm.reverse_process
    monkeypatch.setattr(ddpm, 'images_at_once', lambda device, size: 40)

    def spy(model, noise, *arguments):
        for t, x in process(model, noise, *arguments):
            yield t, x
            if len(sampled) == 3 and sampled[0] == 'stop':
                raise KeyboardInterrupt
        sampled.append((noise, x))

    monkeypatch.setattr(ddpm, 'reverse_process', spy)
    return sampled


def test_single_images_are_those_of_one_call(workdir, batches):
    """8 bits, light on dark as in the data; of one checkpoint, number of steps and seed, also where
    a call is stopped, which keeps the batches that are finished."""

    def files(name, steps=3):
        (folder,) = Path('outputs').rglob(f'{name}/model/90_images_{steps}_steps_seed_3')
        return [pixels(path) for path in sorted(folder.iterdir())]

    save_weights('runs/red/model')
    grids = []
    for steps in (3, 4):
        batches.clear()
        images = ddpm.inference('runs/red/model', num_images=90, num_steps=steps, seed=3)
        x = torch.cat([x for _, x in batches])
        assert [len(x) for _, x in batches] == [40, 40, 10] and len(x.unique(dim=0)) == 90
        assert torch.equal(images, x.clamp(0, 1))
        assert np.array_equal(files('red', steps), (255 * images[:, 0]).round())
        grids.append(pixels('outputs/_/runs/red/model/grid.png'))
        assert np.array_equal(grids[-1], ddpm.grid(images[:64]))
    assert not np.array_equal(*grids)
    for name in ('blue', 'red'):  # new weights, stopped early
        batches[:] = ['stop']
        save_weights(f'runs/{name}/model', seed=2)
        with pytest.raises(KeyboardInterrupt):
            ddpm.inference(f'runs/{name}/model', num_images=90, num_steps=3, seed=3)
        x = torch.cat([x for _, x in batches[1:]])
        assert len(x) == 80 and np.array_equal(files(name), ddpm.to_uint8(x)[:, 0])
    assert len(files('red', steps=4)) == 90


def test_progress_is_of_the_average_and_always_from_the_same_noise(workdir, batches):
    """In every step, where sample_every is less; of as many images as are sampled at once."""
    ddpm.train(**{**TINY, 'lr': 1e-2, 'ema_decay': 0.9999, 'sample_every': 0.01})
    names = [f'epoch_00{n}.png' for n in ('0.33', '0.67', '1.00', '1.33', '1.67', '2.00')]
    assert sorted(os.listdir('outputs/tiny/progress')) == names
    assert len(batches) == 6 and all(torch.equal(noise, batches[0][0]) for noise, _ in batches)
    model = ddpm.load_model('checkpoints/tiny')
    for part, same in (('ema', True), ('weights', False)):
        weights = ddpm.load_checkpoint('checkpoints/tiny', ['ema', 'weights'])[part]
        model.load_state_dict({k.removeprefix('module.'): v for k, v in weights.items()})
        sampled = ddpm.grid(ddpm.sample(model, 40, ddpm.PROGRESS_STEPS, seed=0))
        assert np.array_equal(pixels(f'outputs/tiny/progress/{names[-1]}'), sampled) == same


@pytest.mark.parametrize('channels', [1, 3])
def test_a_grid_is_white_on_black_with_white_gaps_and_titles_above(channels):
    x = torch.zeros(5, channels, 8, 8)
    x[1] = 1
    x[2, :, :, 4:] = 0.5
    shown = np.asarray(ddpm.grid(x, columns=2)).reshape(3 * 18 + 2, 2 * 18 + 2, channels)
    expected = np.full_like(shown, 255)
    for row, column in ((2, 2), (20, 2), (20, 20), (38, 2)):
        expected[row : row + 16, column : column + 16] = 0
    expected[20:36, 10:18] = 128
    expected[38:54, 20:36] = shown[38:54, 20:36]  # where there is no sixth
    assert np.array_equal(shown, expected)
    titled = np.asarray(ddpm.grid(x, 2, ['a', 'b'])).reshape(-1, 2 * 18 + 2, channels)
    assert np.array_equal(titled[16:], shown)
    assert all((titled[:16, half] < 99).any() for half in (slice(19), slice(19, None)))


ARTICLES_TIMES = [999, 700, 550, 400, 300, 200, 100, 50, 15, 0]


@pytest.mark.parametrize('T, num_steps', [(1000, None), (1000, 30), (500, None), (20, 3)])
def test_the_strip_shows_the_articles_times(workdir, monkeypatch, T, num_steps):
    """Scaled to T, or those of the process that are nearest; read from the pictures, in which each
    image is as bright as its time is late."""
    times = np.linspace(T - 1, 0, num_steps or T).round().astype(int)
    steps = lambda model, x, *_: ((t, torch.full_like(x, t / T)) for t in times)  # noqa: E731
    monkeypatch.setattr(ddpm, 'reverse_process', steps)
    save_weights(time_steps=T)
    ddpm.inference('checkpoints/tiny', num_steps=num_steps)
    strip = pixels('outputs/tiny/reverse.png')
    assert len(strip) == 16 + 10 * 66 + 2 and (strip[50::66, 34::66] == strip[50, 34::66]).all()
    nearest = {min(times, key=lambda t: abs(t - wanted * T / 1000)) for wanted in ARTICLES_TIMES}
    columns = [round(255 * t / T) for t in sorted(nearest, reverse=True)]
    assert strip[50, 34::66].tolist() == columns
    titles = [f't = {t}' for t in sorted(nearest, reverse=True)]
    titled = ddpm.grid(torch.zeros(len(titles), 1, 32, 32), len(titles), titles)
    assert np.array_equal(strip[:16], np.asarray(titled)[:16])
    with Image.open('outputs/tiny/reverse.gif') as film:
        bright = []
        for i in range(film.n_frames):
            film.seek(i)
            bright.append(int(np.asarray(film.convert('L'))[50, 34]))
        # the first is the noise; then it goes down, and is shown longest at its end
        assert min(len(times), 36) // 2 < len(bright) <= 51 and film.info['duration'] > 2000
    assert bright[1] == columns[0] and bright[-1] == 0
    assert bright[1:] == sorted(bright[1:], reverse=True)


def test_display_reverse_draws_one_strip():
    images = [torch.full((1, 1, 8, 8), value) for value in (-3.0, 0.0, 0.5, 1.0, 9.0)]
    shown = [ax.images[0] for ax in ddpm.display_reverse(images).axes]
    assert [image.get_array().mean() for image in shown] == [0, 0, 128, 255, 255]  # clamped
    assert {(image.get_cmap().name, image.get_clim()) for image in shown} == {('gray', (0, 255))}
    figure = ddpm.display_reverse([torch.rand(3, 8, 8)])
    assert figure.axes[0].images[0].get_array().shape == (8, 8, 3)
    plt.close('all')


def test_the_curve_of_the_losses(tmp_path, monkeypatch):
    """Means over a 50th of an epoch, where no loss is missing; also before the first of them. In
    the style of the user it would be white lines on white paper, say, or text that wants LaTeX."""
    figures, shown, save = [], [], plt.Figure.savefig
    spy = lambda self, *a, **k: figures.append(self) or save(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(plt.Figure, 'savefig', spy)
    losses = np.random.default_rng(0).random(401).astype('f')
    losses[[0, 7]] = np.nan
    for style in ({}, {'text.usetex': True}, 'dark_background'):
        with plt.style.context(style):
            ddpm.draw_losses(torch.tensor(losses), 200, tmp_path)
        shown.append(pixels(tmp_path / 'loss.png'))
    assert all(np.array_equal(shown[0], picture) for picture in shown) and shown[0].std() > 10
    ddpm.draw_losses(torch.tensor(losses[:1]), 200, tmp_path)
    (x, y), *_, (none, _) = (figure.axes[0].lines[0].get_xydata().T for figure in figures)
    assert np.allclose(x, np.arange(1, 101) / 50) and not len(none)
    assert np.allclose(y, np.nanmean(losses[:400].reshape(100, 4), axis=1))


SAVES = 'draw loss.png,write outputs/tiny/progress/epoch_001.00.png,'
SAVES += (
    'write pictures into outputs/tiny/70_images_3_steps_seed_1,write pictures into outputs/tiny'
)
BROKEN = [('PIL.Image.Image.save', SAVES), ('matplotlib.pyplot.figure', 'show pictures')]
BROKEN += [('PIL.ImageDraw.ImageDraw.text', 'write pictures into outputs/tiny')]


@pytest.mark.parametrize('broken, told', BROKEN)
def test_a_picture_that_fails_ends_nothing(workdir, monkeypatch, capsys, broken, told):
    def fail(*_, **__):
        raise KeyError('a font\nthat is not there')

    monkeypatch.setattr(broken, fail)
    monkeypatch.setattr(plt, 'get_backend', lambda: 'TkAgg')
    monkeypatch.setattr(plt, 'show', lambda: None)
    ddpm.train(**{**TINY, 'num_epochs': 1, 'sample_every': 1})
    images = ddpm.inference('checkpoints/tiny', num_images=70, num_steps=3, seed=1)
    assert images.shape == (70, 1, 32, 32) and images.std() > 0
    line = r"^cannot (.*) \(KeyError\('a font.*'\)\); going on$"
    assert {*re.findall(line, capsys.readouterr().out, re.M)} == {*told.split(',')}


@pytest.mark.parametrize('num_images', [2, 70])
@pytest.mark.parametrize('outputs', ['a file', '/proc/self'])  # where not even root may write
def test_an_outputs_that_cannot_be_written_is_found_first(
    workdir, monkeypatch, outputs, num_images
):
    save_weights('checkpoints/fd')
    Path('a file').touch()
    monkeypatch.setattr(ddpm, 'OUTPUTS', Path(outputs))
    monkeypatch.setattr(ddpm, 'reverse_process', None)  # nothing is sampled
    monkeypatch.setattr(ddpm, 'SAMPLE', dict(num_images=num_images))
    with pytest.raises(SystemExit) as end:
        ddpm.main(['--sample', 'checkpoints/fd'])
    assert re.fullmatch(f'ddpm.py: .*{outputs}.*', end.value.code)  # with which Python exits by 1


@pytest.mark.parametrize('backend', ['TkAgg', 'module://matplotlib_inline.backend_inline'])
def test_a_window_where_there_is_a_screen(workdir, monkeypatch, backend):
    """The grid and a strip; no figure is left of the backends that only write files."""
    save_weights()
    windows, none = [], backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE)
    monkeypatch.setattr(plt, 'show', lambda: windows.append(plt.get_fignums()))
    for name in (*none, 'Agg', 'SVG', backend):
        monkeypatch.setattr(plt, 'get_backend', lambda name=name: name)
        ddpm.inference('checkpoints/tiny', num_images=1, num_steps=2)
        assert len(plt.get_fignums()) == 2 * (name == backend), name
    assert windows == [[1, 2]]
