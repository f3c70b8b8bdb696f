"""The measured full run: everything that a machine with a GPU has to tell, by one command.

    python benchmarks/full_run.py FOLDER [--minutes 9.5] [--weights]

Does one part after the other: two epochs (start-up, seconds an epoch, memory), where a step's time
goes, speed beside others, the whole run of FULL, the ten digits, their quality in 1000 and in 50
steps, and in the end, with --weights, the EMA weights. Each part is written to outputs/full_run/
as it finishes, and FOLDER is brought up to date after each: results.json with the figures of all
parts, pictures.zip with what `ddpm.py` drew. Called again it goes on where it stopped, also in the
middle of training: when --minutes are over it stops the run as Ctrl-C would. A part whose packages
are not installed is skipped, with a line that says so; another failure is noted in results.json.

The weights are in half precision, in files of at most 15 MB; manifest.json names them in order,
with their SHA-256. Joined, they are what torch.load reads.
"""

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import speed  # noqa: E402

import ddpm  # noqa: E402

PARTS = Path('outputs/full_run')
COMPILED = mock.patch.object(ddpm, 'LONG_RUN', 0)  # as the whole run is, however short
SPEED = []  # further arguments of speed.py
LARGEST = 15_000_000  # bytes of a file with weights
KINDS = {  # of what the device runs, by parts of the names of its kernels
    'attention': ('flash', 'fmha', 'attention', 'softmax'),
    'convolutions and matrix products': (
        *('conv', 'gemm', 'cudnn', 'cutlass', 'xmma', 'wgrad', 'dgrad', 'mkldnn', 'nvjet'),
        *('matmul', 'addmm', 'bmm', '::mm'),
    ),
    'GroupNorm': ('group_norm', 'groupnorm', 'native_layer_norm', 'welford'),
    'optimizer and EMA': ('adam', 'multi_tensor', 'foreach', 'lerp'),
    'copies': ('copy', 'memcpy', 'memset', 'cat', 'fill'),
}


def train_and_watch(epochs, watch=lambda run: None):
    """ddpm.train with the numbers of FULL, for some epochs, on a checkpoint of its own. Returns the
    time at which each step was asked for, the first entry being that of the call."""
    record, clock = ddpm.Run.record, [time.monotonic()]

    def record_and_watch(run, loss):
        record(run, loss)
        if (run.done - 1) % run.steps in (0, run.steps - 1):
            speed.now(loss.device)
        clock.append(time.monotonic())
        watch(run)

    path = PARTS / 'checkpoint'
    numbers = {**ddpm.FULL, 'num_epochs': epochs, 'sample_every': 0, 'checkpoint_path': str(path)}
    with mock.patch.object(ddpm.Run, 'record', record_and_watch), COMPILED:
        ddpm.train(**numbers)
    path.unlink()
    return clock


def two_epochs():
    cuda = torch.cuda.is_available()
    clock = train_and_watch(2)
    steps = (len(clock) - 1) // 2
    seconds = clock[-1] - clock[steps + 1]  # of the second epoch, from after its first step
    seconds *= steps / (steps - 1)
    rest = {'peak memory of the GPU, GB': torch.cuda.max_memory_allocated() / 1e9} if cuda else {}
    return {
        'seconds from the call to the end of the first step': clock[1] - clock[0],
        'seconds an epoch': seconds,
        'extrapolated minutes of the whole run': seconds * ddpm.FULL['num_epochs'] / 60,
        **rest,
    }


def step_profile(first=20, count=20):
    """Where the time of a step goes, in the middle of an epoch."""
    cuda = torch.cuda.is_available()
    profiler = profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda, acc_events=True
    )
    began = []

    def watch(run):
        if run.done == first:
            profiler.start()
            began.append(time.monotonic())
        if run.done == first + count:
            speed.now(ddpm.best_device())
            began.append(time.monotonic())
            profiler.stop()
            run.signals.append(signal.SIGINT)  # enough seen

    with contextlib.suppress(SystemExit):
        train_and_watch(1, watch)
    (PARTS / 'checkpoint').unlink(missing_ok=True)
    table = profiler.key_averages()
    sort = 'self_device_time_total' if cuda else 'self_cpu_time_total'
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    total, shares = (began[1] - began[0]) * 1e6, {}
    for event in table:
        if event.device_type == device and (spent := getattr(event, sort)):
            name = event.key.lower()
            kinds = [kind for kind, words in KINDS.items() if any(w in name for w in words)]
            kind = kinds[0] if kinds else 'other elementwise'
            shares[kind] = shares.get(kind, 0) + spent / total
    shares['gaps'] = 1 - sum(shares.values())
    return {
        'milliseconds a step': total / count / 1e3,
        'shares of the time': shares,
        'table': table.table(sort_by=sort, row_limit=40, max_name_column_width=80),
    }


def speeds():
    speed.main([*SPEED, '--output', str(PARTS)])
    (path,) = PARTS.glob('speed-*.json')
    return json.loads(path.read_text())


def whole_run(deadline):
    """`python ddpm.py --full`, which resumes and, at the deadline, is stopped as by Ctrl-C."""
    so_far = PARTS / 'seconds.json'
    seconds = json.loads(so_far.read_text()) if so_far.exists() else []
    start = time.monotonic()
    command = [sys.executable, '-c', f'import sys; sys.path.insert(0, {str(HERE.parent)!r})']
    command[-1] += f'; import ddpm; ddpm.FULL = {ddpm.FULL!r}; ddpm.main()'
    process = subprocess.Popen([*command, '--full'])
    try:
        code = process.wait(max(1, deadline - time.monotonic()))
        stopped = False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        code, stopped = process.wait(), True
    so_far.write_text(json.dumps([*seconds, time.monotonic() - start]))
    if code and stopped:
        raise TimeoutError('the run was stopped, and is saved')
    if code:
        raise RuntimeError(f'ddpm.py ended with {code}')
    saved = ddpm.load_checkpoint(ddpm.FULL['checkpoint_path'])
    losses, epochs = saved['losses'], ddpm.FULL['num_epochs']
    return {
        'seconds of each call, pictures included': json.loads(so_far.read_text()),
        'config': saved['config'],
        'loss of each epoch': losses.reshape(epochs, -1).mean(1).tolist(),
    }


def ten_digits():
    """The article's inference, twice: the first time warms up."""
    path, seconds = ddpm.FULL['checkpoint_path'], []
    for _ in range(2):
        start = time.monotonic()
        ddpm.inference(path, ddpm.FULL['num_time_steps'], num_steps=ddpm.NUM_STEPS)
        seconds.append(time.monotonic() - start)
    return {'seconds of inference() with all its pictures, first and second time': seconds}


def quality_in(steps, samples):
    import quality  # its packages may be missing

    path = ddpm.FULL['checkpoint_path']
    arguments = f'{path} --samples {samples} --steps {steps} --output {PARTS}'.split()
    with mock.patch.object(sys, 'argv', ['quality.py', *arguments]):
        quality.main()
    return json.loads((PARTS / f'quality-{Path(path).name}-{steps}.json').read_text())


def weights(folder):
    """The EMA weights in half precision, in several files."""
    saved, buffer = ddpm.load_checkpoint(ddpm.FULL['checkpoint_path']), io.BytesIO()
    ema = {k.removeprefix('module.'): v.half() for k, v in saved['ema'].items()}
    torch.save({'unet': saved['unet'], 'ema': ema}, buffer)
    content, manifest = buffer.getvalue(), {}
    for i in range(0, len(content), LARGEST):
        name, piece = f'weights-{i // LARGEST}.bin', content[i : i + LARGEST]
        (folder / name).write_bytes(piece)
        manifest[name] = hashlib.sha256(piece).hexdigest()
    (folder / 'manifest.json').write_text(json.dumps(manifest, indent=1) + '\n')
    return {'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}


def bring_up_to_date(folder, about):
    """results.json and pictures.zip of what is done so far."""
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(PARTS.glob('part-*.json'))}
    (folder / 'results.json').write_text(json.dumps(about | parts, indent=1) + '\n')
    with zipfile.ZipFile(folder / 'pictures.zip', 'w') as archive:
        for path in sorted(Path('outputs').rglob('*')):
            if path.suffix in ('.png', '.gif'):
                archive.write(path, path.relative_to('outputs'))


def main(arguments=None):
    parser = argparse.ArgumentParser(description='Measures the full run of ddpm.py.')
    parser.add_argument('folder', type=Path, help='for what it brings back')
    parser.add_argument('--minutes', type=float, default=9.5, help='when to stop training')
    parser.add_argument('--samples', type=int, default=10_000, help='for the quality')
    parser.add_argument('--weights', action='store_true', help='bring back the weights too')
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes
    cuda = torch.cuda.is_available()
    about = {
        'date': datetime.date.today().isoformat(),
        'machine': torch.cuda.get_device_name() if cuda else speed.processor(),
        'versions': {package: version(package) for package in ('torch', 'torchvision', 'timm')},
    }
    parts = {
        'part-1-two-epochs': two_epochs,
        'part-2-profile': step_profile,
        'part-3-speed': speeds,
        'part-4-whole-run': lambda: whole_run(deadline),
        'part-5-ten-digits': ten_digits,
        'part-6-quality-1000': lambda: quality_in(ddpm.FULL['num_time_steps'], args.samples),
        'part-7-quality-50': lambda: quality_in(ddpm.DDIM_STEPS, args.samples),
    }
    if args.weights:
        parts['part-8-weights'] = lambda: weights(args.folder)
    for folder in (args.folder, PARTS):
        folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        path = PARTS / f'{name}.json'
        if path.exists():
            print(f'{name}: done before')
            continue
        start = time.monotonic()
        try:
            figures = part()
        except ImportError as error:
            print(f'{name}: skipped, {error.name} is not installed')
            continue
        except TimeoutError as error:
            print(f'{name}: {error}; call again to go on')
            break
        except (Exception, SystemExit) as error:  # the parts after it may still do
            traceback.print_exc()
            about.setdefault('failed', {})[name] = f'{type(error).__name__}: {error}'
            continue
        finally:
            bring_up_to_date(args.folder, about)
        temporary = path.with_suffix('.tmp')
        temporary.write_text(json.dumps(figures | {'seconds': time.monotonic() - start}) + '\n')
        os.replace(temporary, path)
        bring_up_to_date(args.folder, about)
        print(f'{name}: {time.monotonic() - start:.0f} s', flush=True)
    return about.get('failed')


if __name__ == '__main__':
    sys.exit(1 if main() else 0)
