"""What the tests share: a small UNET, a folder of its own for each run, and the program as users
start it."""

import os
import subprocess
import sys
from pathlib import Path

os.environ['MPLBACKEND'] = 'Agg'
os.environ['OMP_NUM_THREADS'] = '1'  # the tests themselves run side by side
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import pytest  # noqa: E402
import torch  # noqa: E402

import ddpm  # noqa: E402

SMALL = dict(
    Channels=[8, 16, 32, 32],
    Attentions=[False, True, False, False],
    Upscales=[False, False, True, True],
    num_groups=4,
    num_heads=2,
)
# `train` on font digits in a second or two
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


FONT_DIGITS = ddpm.font_digits


def few_images(*_):
    return FONT_DIGITS(12)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty folder to run in, where the dataset 'Few' has 12 font digits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ddpm, 'DDIM_STEPS', 3)
    load_images = ddpm.load_images
    few = few_images()
    monkeypatch.setattr(ddpm, 'load_images', lambda d: few if d == 'Few' else load_images(d))
    return tmp_path


@pytest.fixture
def float32(monkeypatch):
    """float32 throughout, also where the processor has bfloat16."""
    monkeypatch.setattr(ddpm, 'has_bf16', lambda device: False)


def small_unet(seed=0, **changes):
    torch.manual_seed(seed)
    return ddpm.UNET(**{**SMALL, **changes}).eval()


def run_program(folder, edits, *flags, before='', wait=True):
    """`python ddpm.py FLAGS` in a folder, as after an inline edit of the numbers: `edits` are
    statements run on the module. With wait, the finished process; else the process."""
    code = (
        f'import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]\n'
        f'{before}\nimport ddpm\n{edits}\nddpm.main()\n'
    )
    command = [sys.executable, '-c', code, *flags]
    env = {**os.environ, 'MPLBACKEND': 'Agg', 'OMP_NUM_THREADS': '1'}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=folder, env=env, **pipes)
    if not wait:
        return process
    out, err = process.communicate(timeout=180)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


TINY_PREVIEW = (
    'from conftest import *\n'
    'ddpm.load_images = few_images\n'
    'ddpm.PREVIEW.update(TINY); ddpm.NUM_STEPS = 4; ddpm.DDIM_STEPS = 4\n'
)


def pytest_addoption(parser):
    parser.addoption('--kills', type=int, default=30, help='how often test_faults.py kills the run')
