"""Several processes (torchrun, gloo on the CPU): the same run, and checkpoints that move freely."""

import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_PREVIEW, run_program, small_unet

import ddpm

# batch 12, float32 and no dropout: then a run does not depend on how many share its batches but by
# rounding, which Adam's first steps magnify: hence the small learning rate
NUMBERS = (
    TINY_PREVIEW + "SMALL['dropout_prob'] = 0.0\n"
    'ddpm.half_precision = lambda device: None\n'
    'ddpm.load_images = lambda *_: DIGITS[:36]\n'
    'ddpm.PREVIEW.update(batch_size=12, unet=SMALL, num_epochs=4, lr=1e-4)\n'
)


def start(folder, processes, edits=''):
    script = folder / 'program.py'
    script.write_text(
        f'import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]\n'
        f"import ddpm\n{NUMBERS}\n{edits}\nsys.argv = ['ddpm.py', '--preview']\nddpm.main()\n"
    )
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command += [f'--nproc-per-node={processes}', str(script)]
    env = {**os.environ, 'MPLBACKEND': 'Agg', 'OMP_NUM_THREADS': '1'}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def losses(folder):
    return torch.load(folder / 'checkpoints/tiny', weights_only=True)['losses']


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp('alone')
    done = run_program(folder, NUMBERS, '--preview')
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize('processes', [2, 3])
def test_the_loss_history_is_that_of_one_process(tmp_path, alone, processes):
    """Begun by several, gone on with by one."""
    out = finish(start(tmp_path, processes, 'ddpm.PREVIEW["num_epochs"] = 3'))
    assert out.count('Epoch 3 | Loss') == 1  # rank 0 alone speaks
    assert (tmp_path / 'outputs/tiny/grid.png').exists()
    done = run_program(tmp_path, NUMBERS, '--preview')
    assert done.returncode == 0, done.stderr
    assert len(losses(alone)) == 12
    torch.testing.assert_close(losses(tmp_path), losses(alone), rtol=1e-5, atol=0)


def test_each_process_has_dropout_masks_of_its_own(tmp_path):
    watch = (
        'import os, torch\nmasks, dropout = [], torch.nn.Dropout.forward\n'
        'def watched(self, x):\n'
        '    masks.append(dropout(self, torch.ones_like(x)) > 0)\n'
        '    torch.save(masks[:20], f\'masks{os.environ["RANK"]}\')\n'
        '    return dropout(self, x)\n'
        "torch.nn.Dropout.forward, SMALL['dropout_prob'] = watched, 0.5\n"
        'ddpm.PREVIEW.update(num_epochs=1)'
    )
    finish(start(tmp_path, 2, watch))
    ours, theirs = (torch.load(tmp_path / f'masks{rank}') for rank in (0, 1))
    assert len(ours) == 20 and [x.shape for x in ours] == [x.shape for x in theirs]
    assert all(0.4 < mask.float().mean() < 0.6 for mask in ours + theirs)
    assert not any(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert not torch.equal(ours[0], ours[8])  # 8 in a step: nor do two steps share them


def test_two_processes_draw_the_same_images_as_one(tmp_path, alone):
    """By the article's sampler, which adds noise at each step: the grid of 64, pixel by pixel."""
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    draw = 'import functools\n'
    draw += 'ddpm.train = functools.wraps(ddpm.train)(lambda **settings: None)\n'
    draw += 'ddpm.AFTER_TRAINING.update(num_steps=None, seed=7)\n'
    grids = []
    for again in (
        lambda: finish(start(tmp_path, 2, draw)),
        lambda: run_program(tmp_path, NUMBERS + draw, '--preview'),
    ):
        (tmp_path / 'outputs/tiny/grid.png').unlink()
        again()
        grids.append((tmp_path / 'outputs/tiny/grid.png').read_bytes())
    assert grids[0] == grids[1]
    grid = plt.imread(tmp_path / 'outputs/tiny/grid.png')[2:-2, 2:-2]
    rows = [grid[66 * i : 66 * i + 60] for i in range(8)]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(rows, 2))


def test_a_stop_ends_all_and_the_last_save_stands(tmp_path, alone):
    """What it leaves beside the checkpoint, a lock or half a file, is gone after the next start."""
    slow = 'import time\nloss = ddpm.diffusion_loss\n'
    slow += 'ddpm.diffusion_loss = lambda *a: time.sleep(0.05) or loss(*a)\n'
    slow += 'ddpm.PREVIEW.update(num_epochs=400, save_minutes=0)'
    process = start(tmp_path, 2, slow)
    while not (tmp_path / 'checkpoints/tiny').exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    stopped = losses(tmp_path)
    assert 1 <= len(stopped) < 1200
    torch.testing.assert_close(stopped[:12], losses(alone)[: len(stopped)], rtol=1e-5, atol=0)
    (tmp_path / 'checkpoints/tiny.tmp').touch()
    done = run_program(tmp_path, NUMBERS, '--preview')
    assert done.returncode == 0, done.stderr
    assert f'resumed after step {len(stopped)} of 12' in done.stdout
    assert os.listdir(tmp_path / 'checkpoints') == ['tiny']


def test_a_batch_that_cannot_be_shared(tmp_path):
    process = start(tmp_path, 2, 'ddpm.PREVIEW["batch_size"] = 9')
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    line = 'ddpm.py: batch_size is 9, but must be at most 36, the number of images, and a multi'
    assert err.count(line) == 1


def test_an_error_of_process_0_ends_all_with_one_line(tmp_path):
    """While the other waits for it."""
    broken = 'import torch.distributed as dist\ndef broken(*_):\n    if dist.get_rank():\n'
    broken += '        dist.barrier()\n    raise ddpm.UserError("no data")\n'
    process = start(tmp_path, 2, broken + 'ddpm.load_images = broken')
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count('ddpm.py: no data') == 1


def test_what_is_compiled_is_the_wrapped_model(monkeypatch):
    """Else all gradients are exchanged at the end of a step. The model's tables stay at home."""
    calls = []

    class Wrapper(torch.nn.Module):
        def __init__(self, module, **options):
            super().__init__()
            self.module = module
            calls.append((module, options))

        def compile(self):
            calls.append('compile')

        def forward(self, x, t):
            calls.append(x.shape)
            return self.module(x, t)

    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', Wrapper)
    monkeypatch.setattr(ddpm, 'WORLD_SIZE', 2)
    model, images = small_unet(), torch.zeros(9, 1, 32, 32, dtype=torch.uint8)
    run = SimpleNamespace(total_steps=10**6, config={'batch_size': 4}, finished=lambda: False)
    network = ddpm.parallelize_and_compile(model, images, run)
    assert calls == [(model, {'broadcast_buffers': False}), 'compile', (2, 1, 32, 32)]
    assert isinstance(network, Wrapper) and network.module is model
    assert all(p.grad is None for p in model.parameters())  # of the trial


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(ddpm, 'WORLD_SIZE', 4)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(ddpm.UserError, match='nproc-per-node must be at most 2'):
        ddpm.init_distributed()


@pytest.mark.parametrize('launched', [False, True])
def test_only_torchrun_tells_the_number_of_processes(monkeypatch, launched):
    """Variables of other launchers, or left over in a shell, are not ours."""
    for name, value in {'WORLD_SIZE': '4', 'RANK': '3', 'LOCAL_RANK': '1'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    if launched:
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    spec = importlib.util.spec_from_file_location('another_ddpm', ROOT / 'ddpm.py')
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert (another.RANK, another.WORLD_SIZE) == ((3, 4) if launched else (0, 1))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert another.best_device() == torch.device('cuda', 1 if launched else 0)
    monkeypatch.setattr(another.dist, 'init_process_group', lambda: pytest.fail('waits for others'))
    if not launched:
        another.init_distributed()


def test_what_torchrun_left_behind_is_ignored(tmp_path, alone):
    left = {'WORLD_SIZE': '2', 'RANK': '1', 'LOCAL_RANK': '1', 'MASTER_ADDR': 'nowhere.invalid'}
    done = run_program(tmp_path, NUMBERS, '--preview', **left)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('Epoch 4 | Loss') == 1
    assert torch.equal(losses(tmp_path), losses(alone))
