"""Measures ddpm.py on a machine with a GPU, the most important first, in calls of a few minutes.

    python benchmarks/full_run.py FOLDER first      is it right, how fast, and where goes the time?
    python benchmarks/full_run.py FOLDER second     the run of FULL, its pictures and their quality
    python benchmarks/full_run.py FOLDER changes    what each of CHANGES makes of a step
    python benchmarks/full_run.py FOLDER 'CUDA graphs' quality      these parts alone
    python benchmarks/full_run.py --export CHECKPOINT FILE

Each part is written to FOLDER/results.json as it ends, and is not done again: so the same command
resumes, FULL's run in its middle if the checkpoint is still there. FOLDER/pictures.zip has its
pictures. After --minutes training is saved and all stops. A part that fails is noted; the rest goes
on. --export writes the EMA weights in half precision, all that `ddpm.py --sample FILE` needs.
"""

import argparse
import gc
import json
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import speed  # noqa: E402

import ddpm  # noqa: E402

CUDA, DEVICE = torch.cuda.is_available(), ddpm.best_device()
COMPILE_FROM = 0  # steps: short runs are compiled too, as the whole run is
SIZE = 'full'  # of the models of speed.py
STEPS, WARM = 200, 20  # that are timed, and before them
PROFILED = (20, 40)  # steps of an epoch
RESUMED = (20, 40)  # steps after which a run is stopped, and in all
TESTS = HERE.parent / 'tests/test_cuda.py'


def train(watch, name, **changed):
    """ddpm.train with the settings of FULL but for those changed, on checkpoints/NAME. watch(run)
    is called when the CPU is done with a step, before it is counted."""
    step_done = ddpm.Run.step_done
    settings = {**ddpm.FULL, 'checkpoint_path': f'checkpoints/{name}', 'sample_every': 0, **changed}

    def watched(run, loss):
        watch(run)
        step_done(run, loss)

    compiled = mock.patch.object(ddpm, 'COMPILE_FROM', COMPILE_FROM)
    with mock.patch.object(ddpm.Run, 'step_done', watched), compiled:
        ddpm.train(**settings)


# ---- The first call ------------------------------------------------------------------------------


def gradients():
    """Of 64 digits without dropout, eager and compiled: how far are they from float32's?"""
    x = ddpm.to_input(ddpm.load_images('MNIST')[:64]).to(DEVICE)  # (64, 1, 32, 32)
    t, found = torch.arange(64, device=DEVICE) * 1000 // 64, []
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scheduler, half = ddpm.DDPM_Scheduler().to(DEVICE), ddpm.half_precision(DEVICE)
    for dtype, compiled in ((None, False), (half, False), (half, True)):
        torch.manual_seed(0)
        model = ddpm.to_device(ddpm.UNET(**ddpm.FULL['unet'] | {'dropout_prob': 0.0}), DEVICE)
        if compiled:
            model.compile()
        with mock.patch.object(ddpm, 'half_precision', return_value=dtype):
            ddpm.diffusion_loss(model, scheduler, x, t, eps).backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    truth, *others = found
    errors = {
        name: [((other[name] - grad).norm() / grad.norm()).item() for other in others]
        for name, grad in truth.items()
    }
    worst = sorted(errors, key=lambda name: errors[name][0] - errors[name][1])[:10]
    return {'relative error, eager and compiled': {name: errors[name] for name in worst}}


def two_epochs():
    """How long they take, and what takes it: a profile of some steps of the first."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    profiler, clock, start = profile(activities=kinds), {}, time.perf_counter()

    def watch(run):
        size = run.steps_per_epoch
        if run.step in (0, *PROFILED, size, 2 * size - 1):
            clock[run.step] = speed.now(DEVICE)
        if run.step == PROFILED[0]:
            profiler.start()
        if run.step == PROFILED[1]:
            profiler.stop()

    Path('checkpoints/two_epochs').unlink(missing_ok=True)
    train(watch, 'two_epochs', num_epochs=2)
    size = (max(clock) + 1) // 2
    seconds = (clock[2 * size - 1] - clock[size]) * size / (size - 1)
    profiled, shares = (clock[PROFILED[1]] - clock[PROFILED[0]]) * 1e6, {}
    for event in profiler.key_averages():
        if event.device_type.name == ('CUDA' if CUDA else 'CPU') and not event.is_user_annotation:
            spent = event.self_device_time_total if CUDA else event.self_cpu_time_total
            shares[event.key[:100]] = shares.get(event.key[:100], 0) + spent / profiled
    largest = sorted(shares.items(), key=lambda item: -item[1])[:40]
    return {
        'seconds to the end of the first step': clock[0] - start,
        'seconds an epoch': seconds,
        'extrapolated minutes of the whole run': seconds * ddpm.FULL['num_epochs'] / 60,
        'milliseconds of a profiled step': profiled / 1e3 / (PROFILED[1] - PROFILED[0]),
        'share of them in which the device works': sum(shares.values()),
        'largest shares': dict(largest),
    }


def sampling_500():
    """The batch in which ddpm.py samples on CUDA."""
    model = ddpm.to_device(ddpm.UNET(**ddpm.FULL['unet']), DEVICE)
    start = time.perf_counter()
    ddpm.sample(model, 500, 10)
    return {'seconds of 10 steps': time.perf_counter() - start}


def stop_and_resume():
    """Of a seeded run: does anything differ after a stop?"""
    stop, end = RESUMED
    images = ddpm.load_images(ddpm.FULL['dataset'])[: end * ddpm.FULL['batch_size']]
    paths = [Path(f'checkpoints/{name}') for name in ('never_stopped', 'stopped')]

    def watch(run):
        if run.path == paths[1] and run.step + 1 == stop:
            run.stop.append(signal.SIGINT)  # as Ctrl-C does

    with mock.patch.object(ddpm, 'load_images', lambda *_: images):
        for path in paths:
            path.unlink(missing_ok=True)
        for path in (*paths, paths[1]):
            with suppress(KeyboardInterrupt):
                train(watch, path.name, num_epochs=1, seed=0)
    one, two = (tree_leaves(torch.load(path, weights_only=True)) for path in paths)
    same = [torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(one, two)]
    return {'values and tensors': [len(one), len(two)], 'the same': sum(same)}


def tests():
    command = [sys.executable, '-m', 'pytest', '-v', str(TESTS)]
    return {'exit code': subprocess.run(command).returncode}


# ---- The second call -----------------------------------------------------------------------------


def whole_run():
    """`python ddpm.py --full` but for the imports. It resumes."""
    path, first, clock = ddpm.FULL['checkpoint_path'], [], [time.perf_counter()]

    def watch(run):
        if not first:
            first.extend([run.step, speed.now(DEVICE) - clock[0]])

    train(watch, '', checkpoint_path=path, sample_every=ddpm.FULL['sample_every'])
    clock.append(time.perf_counter())
    for count in (10, 10, 64):
        ddpm.inference(path, num_images=count)
        clock.append(time.perf_counter())
    losses = ddpm.load_checkpoint(path)['losses'].reshape(ddpm.FULL['num_epochs'], -1)
    return {
        'steps before this call, seconds to the end of its first step': first,
        'seconds of training, of 10, 10 and 64 digits': [b - a for a, b in zip(clock, clock[1:])],
        'loss of each epoch': losses.nanmean(1).tolist(),
    }


def quality():
    import quality

    result, controls = quality.measure(ddpm.FULL['checkpoint_path'], 1000, 50)
    return result | {'controls': controls}


def article():
    """The article's loop and that of ddpm.py, milliseconds a step."""
    found = {}
    for Contestant in (speed.Ours, speed.Article):
        contestant = Contestant(speed.SIZES[SIZE], DEVICE)
        speed.set_cudnn(contestant)
        seconds = contestant.train(ddpm.FULL['batch_size'], STEPS, WARM)
        found[contestant.name] = seconds / STEPS * 1e3
    return found


# ---- What may make it faster: each alone, in place of a name of ddpm.py or torch -----------------


class KeptLists(ddpm.ModelEmaV3):
    """timm's average over lists that are made once, not from two state dicts in every step."""

    lists = None

    @torch.no_grad()
    def update(self, model, step):
        self.lists = self.lists or [list(m.parameters()) for m in (self.module, model)]
        torch._foreach_lerp_(*self.lists, weight=1 - self.get_decay(step))


def seed_generators(seed):
    """torch.manual_seed without its look at the stack."""
    torch.default_generator.manual_seed(seed)
    if CUDA:
        torch.cuda.default_generators[DEVICE.index].manual_seed(seed)


def compiled(**options):
    return torch, 'compile', partial(torch.compile, **options)


GRAPHS = compiled(mode='reduce-overhead')
COMBO = compiled(options={'triton.cudagraphs': True, 'combo_kernels': True})
LISTS, SEEDS = (ddpm, 'ModelEmaV3', KeptLists), (torch, 'manual_seed', seed_generators)
CHANGES = {  # a CUDA graph that fails may spoil what comes after it
    'as it is': [],
    'not compiled': [(torch, 'compile', lambda function: function)],
    "the average's lists kept": [LISTS],
    'generators seeded': [SEEDS],
    'CUDA graphs': [GRAPHS],
    'all three': [LISTS, SEEDS, GRAPHS],
    'CUDA graphs, combo kernels': [COMBO],
    'max-autotune': [compiled(mode='max-autotune-no-cudagraphs')],
}


def changed(name):
    """A training step, and one of the reverse process of ten digits, which ddpm.py does not compile
    and this does."""
    with ExitStack() as stack:
        for replaced in CHANGES[name]:
            stack.enter_context(mock.patch.object(*replaced))
        ours = speed.Ours(speed.SIZES[SIZE], DEVICE)
        training = ours.train(ddpm.FULL['batch_size'], STEPS, WARM)
        ours.model.compile()
        sampling = speed.pace(ours.sampling(1000), STEPS, DEVICE, WARM)
    found = {'training': training, 'ten digits': sampling}
    return {f'{what}, milliseconds a step': s / STEPS * 1e3 for what, s in found.items()}


# ---- The program ---------------------------------------------------------------------------------

CALLS = {
    'first': [gradients, two_epochs, sampling_500, stop_and_resume, tests],
    'second': [whole_run, quality, article],
}
CALLS = {call: {part.__name__: part for part in parts} for call, parts in CALLS.items()}
CALLS['changes'] = {name: partial(changed, name) for name in CHANGES}
PARTS = {name: part for parts in CALLS.values() for name, part in parts.items()}


def export(checkpoint, file):
    """Writes the EMA weights in half precision, with what is needed to sample from them."""
    saved = ddpm.load_checkpoint(checkpoint)
    ema = {name: value.half() for name, value in saved['ema'].items()}
    beta = ddpm.DDPM_Scheduler(saved['unet']['time_steps']).beta  # load_checkpoint has compared it
    rest = {'unet': saved['unet'], 'config': saved['config'], 'beta': beta}
    ddpm.save_checkpoint(file, {'ema': ema, **rest})
    ddpm.load_checkpoint(file)  # raises UserError where a weight is too large for half precision


def measure(folder, names):
    """Does the parts that results.json lacks. Returns those that failed."""
    path, failed = folder / 'results.json', {}
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= {'machine': speed.processor(), 'torch': torch.__version__, 'failed': failed}
    for name in [name for name in names if name not in results]:
        torch.compiler.reset()  # without the compiled code and the memory of the parts before
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            results[name] = PARTS[name]()
            results[name]['seconds of all'] = time.perf_counter() - start
            if CUDA:  # of a CPU only the peak of the whole process is known
                results[name]['peak memory, GB'] = torch.cuda.max_memory_allocated() / 1e9
        except Exception as error:  # later parts may still work
            traceback.print_exc()
            failed[name] = f'{error!r:.300}'
        print(name, json.dumps(results.get(name), indent=1), flush=True)
        path.write_text(json.dumps(results, indent=1) + '\n')
        pictures = ddpm.folder_of_pictures(Path(ddpm.FULL['checkpoint_path']))
        if pictures.exists():
            shutil.make_archive(folder / 'pictures', 'zip', pictures)
    return failed


def main(arguments=None):
    parser = argparse.ArgumentParser(description='Measures ddpm.py on a GPU.')
    parser.add_argument('folder', type=Path, nargs='?', help='for the results')
    what = f'of {", ".join(CALLS)}, or of their parts: {", ".join(PARTS)}'
    parser.add_argument('what', nargs='*', help=what)
    parser.add_argument('--minutes', type=float, help='after which all stops; 6 for first, else 8')
    parser.add_argument('--export', nargs=2, metavar=('CHECKPOINT', 'FILE'))
    args = parser.parse_args(arguments)
    if args.export:
        with ddpm.errors_in_one_line():
            return export(*args.export)
    if not args.what or not CALLS.keys() | PARTS.keys() >= {*args.what}:
        parser.error(f'FOLDER and some {what}')
    args.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    minutes = args.minutes or (6 if args.what == ['first'] else 8)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        return measure(
            args.folder, [part for name in args.what for part in CALLS.get(name, [name])]
        )
    except KeyboardInterrupt as stop:
        sys.exit(f'{stop or "Stopped"}; the same command goes on')
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == '__main__':
    sys.exit(1 if main() else 0)
