"""What the tests share: a few digits, a small UNET, a folder of its own for each run, and the
program as users start it."""

import gzip
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
os.environ['MPLBACKEND'] = 'Agg'
# all but test_cuda.py is about a CPU; pytest-xdist's workers inherit both variables
GPU = os.environ.setdefault('GPU_OF_THE_TESTS', os.environ.get('CUDA_VISIBLE_DEVICES', '0'))
os.environ['CUDA_VISIBLE_DEVICES'] = ''
os.environ['OMP_NUM_THREADS'] = '1'  # the tests themselves run side by side
os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])  # of what they start
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one

import matplotlib.pyplot as plt  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import ddpm  # noqa: E402

SMALL = dict(
    Channels=[8, 16, 32, 32],
    Attentions=[False, True, False, False],
    Upscales=[False, False, True, True],
    num_groups=4,
    num_heads=2,
)
# `train` on twelve digits in a second or two
TINY = dict(
    checkpoint_path='checkpoints/tiny',
    dataset='Few',
    unet=SMALL,
    batch_size=4,
    num_epochs=2,
    num_time_steps=20,
    lr=1e-3,
    lr_decay=False,
    ema_decay=0.5,
    seed=1,
    sample_every=0,
)


with gzip.open(ROOT / 'data/MNIST/raw/train-images-idx3-ubyte.gz') as file:
    file.seek(16)
    DIGITS = torch.tensor(list(file.read(100 * 28 * 28)), dtype=torch.uint8)
DIGITS = DIGITS.reshape(100, 1, 28, 28)  # the first hundred of MNIST


def few_images(*_):
    """Twelve digits as `load_images` gives them, (12, 1, 32, 32)."""
    return F.pad(DIGITS[:12], [2] * 4)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty folder to run in, where the dataset 'Few' has the first 12 digits of MNIST."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ddpm, 'PROGRESS_STEPS', 3)
    monkeypatch.delitem(sys.modules, 'ipykernel', raising=False)  # a test may have imported it
    load = ddpm.load_images
    few = {'Few': few_images}
    monkeypatch.setattr(ddpm, 'load_images', lambda name, *size: few.get(name, load)(name, *size))
    yield tmp_path
    plt.close('all')


@pytest.fixture
def float32(monkeypatch):
    """float32 throughout, also where the processor has bfloat16."""
    monkeypatch.setattr(ddpm, 'half_precision', lambda device: None)


def small_unet(seed=0, **changes):
    torch.manual_seed(seed)
    return ddpm.UNET(**{**SMALL, **changes}).eval()


# Importing torch takes seconds: a server does it once and forks the programs, each a process of its
# own, in milliseconds.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['conftest'])


def program(folder, edits, flags, environment):
    """What a forked process does: `python ddpm.py FLAGS`, with its output in two files."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.update(environment)
    for number, name in ((2, 'err'), (1, 'out')):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    exec(edits, {'ddpm': ddpm})
    try:
        ddpm.main(flags)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_program(folder, edits, *flags, **environment):
    """`python ddpm.py FLAGS` in a folder, as after an inline edit of the numbers: `edits` are
    statements run on the module. Returns a multiprocessing.Process, under way."""
    for name in ('out', 'err'):
        (folder / name).unlink(missing_ok=True)
    process = FORKS.Process(target=program, args=(folder, edits, flags, environment))
    process.start()
    while process.is_alive() and not (folder / 'out').exists():
        process.join(0.01)
    return process


def finish(process, folder):
    """Waits for a program; its exit code and what it printed."""
    process.join(180)
    assert process.exitcode is not None, 'still running'
    out, err = (folder / name for name in ('out', 'err'))
    return SimpleNamespace(
        returncode=process.exitcode, stdout=out.read_text(), stderr=err.read_text()
    )


def run_program(folder, edits, *flags, **environment):
    return finish(start_program(folder, edits, *flags, **environment), folder)


TINY_PREVIEW = (
    'from conftest import *\n'
    'ddpm.load_images = few_images\n'
    "ddpm.PREVIEW.update(TINY); ddpm.AFTER_TRAINING['num_steps'] = 4\n"
    'ddpm.PROGRESS_STEPS = 4\n'
)


def pytest_addoption(parser):
    parser.addoption('--kills', type=int, default=10, help='how often test_faults.py kills the run')
