"""Several processes (gloo on the CPU): the same run, and checkpoints that move freely. torchrun
itself starts them once; else they are forked, which takes no seconds."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from conftest import FORKS, ROOT, TINY, TINY_PREVIEW, few_images, program, run_program
from PIL import Image

import ddpm

# batch 12, float32 and no dropout: then a run does not depend on how many share its batches but by
# rounding, which Adam's first steps magnify: hence the small learning rate
NUMBERS = f"""{TINY_PREVIEW}
import os, signal, torch, torch.distributed as dist
SMALL['dropout_prob'] = 0.0
ddpm.half_precision, loss = lambda device: None, ddpm.diffusion_loss
ddpm.PREVIEW.update(unet=SMALL, batch_size=12, num_epochs=8, lr=1e-4)
ddpm.AFTER_TRAINING['num_images'] = 1
"""
JOINED = """
ddpm.RANK, ddpm.WORLD_SIZE = rank, world_size = {}, {}
join = dist.init_process_group
dist.init_process_group = lambda: join('gloo', 'file://{}/meeting', None, world_size, rank)
"""


def start(folder, count, edits=''):
    """`count` processes as torchrun starts them, under way."""
    processes = []
    for rank in range(count):
        joined = NUMBERS + JOINED.format(rank, count, folder) + edits
        processes.append(FORKS.Process(target=program, args=(folder, joined, ['--preview'], {})))
        processes[-1].start()
    return processes


def exit_codes(processes):
    for process in processes:
        process.join(180)
    return [process.exitcode for process in processes]


def losses(folder):
    return torch.load(folder / 'checkpoints/tiny', weights_only=True)['losses']


def alone(folder):
    done = run_program(folder, NUMBERS, '--preview')
    assert (done.returncode, len(losses(folder))) == (0, 8), done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def expected(tmp_path_factory):
    """The losses of one process."""
    alone(folder := tmp_path_factory.mktemp('alone'))
    return losses(folder)


def test_torchrun(tmp_path, expected):
    """Two processes train as one does, on a folder with a picture that cannot be read; only the
    first prints. Gradients are cleared before the loss, and the processes part at the end."""
    (tmp_path / 'pictures').mkdir()
    for i, digit in enumerate(few_images()[:, 0].numpy()):
        Image.fromarray(digit).save(tmp_path / f'pictures/{i:02}.png')
    (tmp_path / 'pictures/broken.png').touch()
    (tmp_path / 'program.py').write_text(f"""import ddpm
load_images = ddpm.load_images
{NUMBERS}
def watched(model, *arguments):
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    assert len(arguments[1]) == 6
    assert all(parameter.grad is None for parameter in model.parameters())
    return loss(model, *arguments)
ddpm.load_images, ddpm.diffusion_loss = load_images, watched
ddpm.PREVIEW.update(dataset='pictures', sample_every=8)
ddpm.main(['--preview'])
assert not dist.is_initialized()
""")
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    command += ['--redirects=3', '--log-dir=logs', 'program.py']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    logs = [tmp_path.glob(f'logs/**/{rank}/std{x}.log') for rank in (0, 1) for x in ('out', 'err')]
    out, err, *others = [next(log).read_text() for log in logs]
    assert done.returncode == 0, (err, others)
    assert others == ['', ''] and 'Warning' not in err
    for line in ('broken.png is left out', '12 pictures can be read of 13', 'after 8.00 epochs'):
        assert out.count(line) == 1
    assert out.count('Epoch 8 | Loss') == out.count('Sampled 1 images') == 1
    torch.testing.assert_close(losses(tmp_path), expected, rtol=1e-5, atol=0)


def test_three_processes_begin_and_one_goes_on(tmp_path, expected):
    assert exit_codes(start(tmp_path, 3, 'ddpm.PREVIEW["num_epochs"] = 5')) == [0, 0, 0]
    assert 'resumed after step 5 of 8' in alone(tmp_path)
    torch.testing.assert_close(losses(tmp_path), expected, rtol=1e-5, atol=0)


def test_two_processes_share_a_drawn_seed_but_no_dropout_mask(tmp_path):
    watch = (
        'masks, dropout, fold_in = [], torch.nn.Dropout.forward, ddpm.fold_in\n'
        "noted = lambda *n: open(f'seed{rank}', 'w').write(str(n[0])) and fold_in(*n)\n"
        'def watched(self, x):\n'
        "    if x.device.type != 'meta': masks.append(dropout(self, torch.ones_like(x)) > 0)\n"
        "    torch.save(masks[:20], f'masks{rank}')\n"
        '    return dropout(self, x)\n'
        "ddpm.fold_in, torch.nn.Dropout.forward, SMALL['dropout_prob'] = noted, watched, 0.5\n"
        'ddpm.PREVIEW.update(seed=-1, num_epochs=3)'
    )
    assert exit_codes(start(tmp_path, 2, watch)) == [0, 0]
    saved = torch.load(tmp_path / 'checkpoints/tiny', weights_only=True)['config']['seed']
    assert [int((tmp_path / f'seed{rank}').read_text()) for rank in (0, 1)] == [saved, saved]
    ours, theirs = (torch.load(tmp_path / f'masks{rank}') for rank in (0, 1))
    assert len(ours) == 20 and [x.shape for x in ours] == [x.shape for x in theirs]
    assert all(0.4 < mask.float().mean() < 0.6 for mask in ours + theirs)
    assert not any(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert not torch.equal(ours[0], ours[8])  # 8 in a step: nor do two steps share them


def test_a_stop_ends_all_and_the_last_save_stands(tmp_path, expected):
    """As where torchrun gets a signal, which it passes on: here in the middle of step 6."""
    edits = (
        'ddpm.PREVIEW["save_minutes"], calls = 0, iter(range(1, 9))\n'
        'def wait(*arguments):\n'
        '    if next(calls) == 6:\n'
        '        open(f"there{rank}", "x")\n'
        '        signal.pause()\n'
        '    return loss(*arguments)\n'
        'ddpm.diffusion_loss = wait'
    )
    processes = start(tmp_path, 2, edits)
    while not all((tmp_path / f'there{rank}').exists() for rank in (0, 1)):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.terminate()
    assert exit_codes(processes) == [-signal.SIGTERM] * 2
    torch.testing.assert_close(losses(tmp_path), expected[:5], rtol=1e-5, atol=0)
    assert 'resumed after step 5 of 8' in alone(tmp_path)
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['tiny', 'tiny.lock']


def test_a_batch_that_cannot_be_shared(workdir, monkeypatch):
    monkeypatch.setattr(ddpm, 'WORLD_SIZE', 3)
    with pytest.raises(
        ddpm.UserError, match='^batch_size is 8, .*, and a multiple of that of proc'
    ):
        ddpm.Run({**TINY, 'batch_size': 8}, few_images())


@pytest.mark.parametrize('works', [True, False])
def test_the_model_is_compiled_and_then_wrapped(monkeypatch, works):
    """Else DDP's hooks break what is compiled into pieces. What cannot be compiled is wrapped."""
    model, calls, x = object(), [], torch.zeros(2, 1, 32, 32)

    def compiled(*arguments):
        calls.append([argument.shape for argument in arguments])
        return arguments[0].requires_grad_() if works else 1 / 0

    monkeypatch.setattr(torch, 'compile', lambda module: calls.append(module) or compiled)
    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', lambda module: [module])
    monkeypatch.setattr(ddpm, 'WORLD_SIZE', 2)
    wrapped = ddpm.compile_and_parallelize(model, SimpleNamespace(total_steps=10**6), x)
    assert wrapped == [compiled if works else model]
    assert calls == [model, [x.shape, (2,)]]


def test_more_processes_than_gpus(monkeypatch):
    """One line that says so, from a process for which there is no GPU."""
    set_device = Mock(side_effect=RuntimeError('CUDA error: invalid device ordinal\nFor debugging'))
    monkeypatch.setattr(torch.cuda, 'set_device', set_device)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(dist, 'init_process_group', lambda: pytest.fail('waits for others'))
    monkeypatch.setattr(ddpm, 'WORLD_SIZE', 4)
    monkeypatch.setenv('LOCAL_RANK', '2')
    line = r'^cannot join the processes \(.*invalid device .*: start no more of them than there are'
    with pytest.raises(ddpm.UserError, match=f'{line} GPUs$'), ddpm.processes_joined():
        pytest.fail('joined')
    set_device.assert_called_once_with(torch.device('cuda', 2))


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
