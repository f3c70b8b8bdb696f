"""The measured full run: everything that only a machine with a GPU can measure, by one command.

    python benchmarks/full_run.py FOLDER [--minutes 9.5] [--after results.json] [--weights 0 1 2]
    python benchmarks/full_run.py --export CHECKPOINT FILE

Does one part after the other, the most important first: the whole run of FULL, the ten digits,
their quality in 50 and in 1000 steps, the queries and keys of the trained weights; then two epochs
(start-up, seconds an epoch, memory), a profile of the training step, speed beside other libraries,
how large attention's queries and keys grow in training, and each of the CHOICES not yet made. The
result of each part is kept in outputs/full_run/. After each part FOLDER is updated: results.json
has the figures of all parts, pictures.zip the pictures of `ddpm.py`. A part whose packages are not
installed is skipped with a line that says so; any other failure is noted in results.json.

After --minutes the training is saved and stopped, and no further part is begun. A part that is LONG
is not begun when too little time is left. Run again on the same machine it resumes, also in
the middle of training. On another machine, which has no checkpoint, --after takes the results.json
of the first one, and only the parts missing from it are done; those that need the checkpoint fail.

--export writes what is needed for sampling, the EMA weights in half precision, to a file that
`ddpm.py --sample FILE` takes. --weights splits that file into pieces of 15 MB and puts those with
the given numbers into FOLDER; manifest.json lists all pieces, in order, with their SHA-256.
"""

import argparse
import contextlib
import datetime
import gc
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from functools import partial
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
COMPILED = mock.patch.object(ddpm, 'COMPILE_FROM', 0)  # as the whole run is
EAGER = mock.patch.object(ddpm, 'COMPILE_FROM', float('inf'))  # hooks see the layers
BACKEND = 'inductor'  # of torch.compile
SPEED = ['--rounds', '3', '--steps', '100', '--seconds', '0']  # arguments of speed.py
LONG = {  # minutes, estimated
    'part-04-quality-1000': 6,
    'part-08-speed': 6,
    'part-16-training, max-autotune': 4,
}
LARGEST = 15_000_000  # bytes of a file with weights
KINDS = {  # of kernels, by parts of their names; the first match counts
    'fused by the compiler: norms, activations, casts': ('triton_poi', 'triton_red', 'triton_per'),
    'attention': ('flash', 'fmha', 'attention', 'softmax'),
    'convolutions and matrix products': (
        *('conv', 'gemm', 'cudnn', 'cutlass', 'xmma', 'wgrad', 'dgrad', 'mkldnn', 'nvjet'),
        *('matmul', 'addmm', 'bmm', '::mm'),
    ),
    'GroupNorm': ('group_norm', 'groupnorm', 'native_layer_norm', 'welford'),
    'optimizer and EMA': ('adam', 'multi_tensor', 'foreach', 'lerp'),
    'copies': ('copy', 'memcpy', 'memset', 'cat', 'fill'),
}


def train_and_watch(epochs, watch=lambda run: None, compiled=None):
    """ddpm.train with the settings of FULL, for some epochs, on a checkpoint of its own. Returns
    the time of the call and the times at which the CPU was done with each step."""
    step_done, clock = ddpm.Run.step_done, [time.monotonic()]

    def watched(run, loss):
        if run.step % run.steps_per_epoch in (0, run.steps_per_epoch - 1):
            speed.now(loss.device)  # here the device too
        clock.append(time.monotonic())  # before the last step is saved
        step_done(run, loss)
        watch(run)

    path = PARTS / 'checkpoint'
    path.unlink(missing_ok=True)  # of an interrupted call
    settings = {**ddpm.FULL, 'num_epochs': epochs, 'sample_every': 0, 'checkpoint_path': str(path)}
    with mock.patch.object(ddpm.Run, 'step_done', watched), compiled or COMPILED:
        ddpm.train(**settings)
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
        'seconds from the call to the end of the first step, caches warm': clock[1] - clock[0],
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
        if run.step == first:
            speed.now(ddpm.best_device())
            profiler.start()
            began.append(time.monotonic())
        if run.step == first + count:
            speed.now(ddpm.best_device())
            began.append(time.monotonic())
            profiler.stop()
            run.stop_signal = signal.SIGINT  # as Ctrl-C does

    with contextlib.suppress(ddpm.Stopped):
        train_and_watch(1, watch)
    (PARTS / 'checkpoint').unlink(missing_ok=True)
    table = profiler.key_averages()
    sort = 'self_device_time_total' if cuda else 'self_cpu_time_total'
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    total, shares = (began[1] - began[0]) * 1e6, {}
    for event in table:
        spent = getattr(event, sort)
        if event.device_type == device and spent and not event.is_user_annotation:
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


# ---- Attention has no norm: how large do its queries and keys grow? float16 ends at 65504 ------


class LargestOfAttention:
    """Records the largest |q| and |k| of each attention layer of a UNET, without waiting for the
    device."""

    def __init__(self, model):
        self.largest = {}
        for name, module in model.named_modules():
            if isinstance(module, ddpm.Attention):
                module.proj1.register_forward_hook(partial(self.look, name))

    def look(self, name, module, _, output):
        # (B, L, 3C), its last axis laid out as (C_head, head, qkv)
        now = output.detach().abs().float().unflatten(-1, (-1, 3)).amax((0, 1, 2))  # (3,)
        then = self.largest.get(name, torch.zeros_like(now))
        self.largest[name] = torch.maximum(then, now)

    def figures(self):
        return {name: dict(zip('qk', both.tolist())) for name, both in self.largest.items()}


def attention_in_training(epochs=1):
    """Of the first epochs, in eager mode."""
    watchers, to_device = [], ddpm.to_device

    def watched(model, device):
        watchers.append(LargestOfAttention(model))
        return to_device(model, device)

    with mock.patch.object(ddpm, 'to_device', watched):
        train_and_watch(epochs, compiled=EAGER)
    return {'largest of each layer': watchers[0].figures(), 'epochs': epochs}


def attention_of_the_weights(batches=20):
    """Of the trained weights, on noised images, dropout off."""
    path, found = ddpm.FULL['checkpoint_path'], {}
    images = ddpm.load_images(ddpm.FULL['dataset'])
    for part in ('weights', 'ema'):
        model = ddpm.load_model(path)  # the EMA weights
        if part == 'weights':
            model.load_state_dict(ddpm.load_checkpoint(path)['weights'])
        trainer = Trainer(model, images, ddpm.FULL['batch_size'])
        watcher = LargestOfAttention(model)
        with torch.no_grad():
            for _ in range(batches):
                trainer.loss()
        found[part] = watcher.figures()
    return found


# ---- The choices not yet made: each is timed alone; CHOICES names them --------------------------


class Trainer:
    """A step of ddpm.train, in pieces that can be compiled or captured. Only the EMA differs: its
    decay is constant, since a CUDA graph replays the decay it was captured with. The warm-up of
    ddpm.train changes one number a step, and no time."""

    def __init__(self, model, images, batch_size, capturable=False):
        self.model, self.batch_size = model, batch_size
        self.device = next(model.parameters()).device
        self.images = images.to(self.device)
        self.scheduler = ddpm.DDPM_Scheduler(model.time_steps).to(self.device)
        options = dict(lr=ddpm.FULL['lr'], fused=True, capturable=capturable)
        self.optimizer = torch.optim.Adam(model.parameters(), **options)
        ema = ddpm.ModelEmaV3(model, decay=ddpm.FULL['ema_decay'])
        # as lists, since ModelEmaV3.update does not compile
        self.weights, self.ema_weights = ([*m.parameters()] for m in (model, ema.module))

    def loss(self):
        """Gather, noise and the forward pass."""
        chosen = torch.randint(len(self.images), (self.batch_size,), device=self.device)
        x = ddpm.to_input(self.images[chosen])  # (B, C, H, W)
        t = torch.randint(self.model.time_steps, (self.batch_size,), device=self.device)
        return ddpm.diffusion_loss(self.model, self.scheduler, x, t, torch.randn_like(x))

    def update(self):
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema_weights, self.weights, 1 - ddpm.FULL['ema_decay'])

    def step(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.update()
        return loss.detach()


def compiled(function, **options):
    return torch.compile(function, backend=BACKEND, **options)


def captured(function, device):
    """The function as one CUDA graph; on a CPU the function itself."""
    if device.type != 'cuda':
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay():
        graph.replay()
        return result

    return replay


def step_of(model, images, batch_size, pieces='', capture=False, **options):
    """A training step. pieces names those of model, loss and update that are compiled."""
    trainer = Trainer(model, images, batch_size, capturable=capture and images.is_cuda)
    if 'model' in pieces:
        model.compile(backend=BACKEND, **options)
    if 'loss' in pieces:
        trainer.loss = compiled(trainer.loss, **options)
    if 'update' in pieces:
        trainer.update = compiled(trainer.update)

    def step():
        torch.compiler.cudagraph_mark_step_begin()
        return trainer.step()

    return captured(trainer.step, images.device) if capture else step


class Sampler:
    """Algorithm 2 for ten digits, a step at a time and in place, as a CUDA graph needs it."""

    def __init__(self, model, images, count=10):
        self.model, device = model.eval(), images.device
        self.scheduler = ddpm.DDPM_Scheduler(model.time_steps).to(device)
        self.x = torch.randn(count, *ddpm.to_input(images[:1]).shape[1:], device=device)
        self.t = torch.full((1,), model.time_steps - 1, device=device)  # (1,)

    def step(self):
        beta, abar = self.scheduler(self.t)
        with ddpm.autocast(self.x.device):
            eps = self.model(self.x, self.t).float()
        x = (self.x - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()
        self.x.copy_(torch.where(self.t > 0, x + beta.sqrt() * torch.randn_like(x), x))
        self.t.sub_(1).remainder_(self.model.time_steps)  # from 0 back to T - 1
        return self.x


def sampling_of(model, images, batch_size, pieces='', capture=False, **options):
    """A step of the reverse process of ten digits."""
    sampler = Sampler(model, images)
    if 'model' in pieces:
        model.compile(backend=BACKEND, **options)
    with torch.inference_mode():
        step = captured(sampler.step, images.device) if capture else sampler.step

    @torch.inference_mode()
    def stepped():
        torch.compiler.cudagraph_mark_step_begin()
        return step()

    return stepped


CHOICES = {  # a CUDA graph that fails may spoil what comes after it: the graphs are last
    'training: plain': step_of,
    'training: as in ddpm.py': partial(step_of, pieces='model'),
    'ten digits: as in ddpm.py': sampling_of,
    'ten digits: compiled': partial(sampling_of, pieces='model'),
    'training: gather and noise compiled too': partial(step_of, pieces='loss'),
    'training: all compiled, with optimizer and EMA': partial(step_of, pieces='loss update'),
    'training: max-autotune': partial(step_of, pieces='model', mode='max-autotune-no-cudagraphs'),
    'ten digits: one CUDA graph': partial(sampling_of, capture=True),
    'ten digits: compiled, one CUDA graph': partial(sampling_of, pieces='model', capture=True),
    'training: one CUDA graph': partial(step_of, capture=True),
    'training: all compiled, one CUDA graph': partial(step_of, pieces='loss update', capture=True),
    'training: reduce-overhead': partial(step_of, pieces='model', mode='reduce-overhead'),
}


def timed(choice, unet, images, count):
    """Milliseconds a step, memory, and seconds until the first step is done."""
    device, start = images.device, time.monotonic()
    torch.manual_seed(0)
    model = ddpm.to_device(ddpm.UNET(**unet), device)
    step = choice(model, images, ddpm.FULL['batch_size'])
    step()
    speed.now(device)
    first = time.monotonic() - start
    steps = (step() for _ in itertools.count())
    seconds = speed.pace(steps, count, device, warm=min(10, count))
    figures = {'milliseconds a step': seconds / count * 1e3, 'seconds to the first': first}
    if device.type == 'cuda':  # of a CPU only the peak of the whole process is known
        figures['peak memory, GB'] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def tried(name, count=200):
    """The figures of one choice; a failure is a result too."""
    device = ddpm.best_device()
    images = ddpm.load_images(ddpm.FULL['dataset']).to(device)
    unet = dict.fromkeys(('input_channels', 'output_channels'), images.shape[1])
    unet |= {'time_steps': ddpm.FULL['num_time_steps'], **ddpm.FULL['unet']}
    dtype = ddpm.half_precision(device)  # calling it would break a compiled graph
    fixed = mock.patch.object(ddpm, 'half_precision', lambda device: dtype)
    try:
        with fixed, ddpm.kernels(device, deterministic=False):
            found = timed(CHOICES[name], unet, images, count)
    except Exception as error:
        found = {'failed': f'{type(error).__name__}: {ddpm.one_line(error)}'}
    print(name, found, flush=True)
    return found


# ---- The whole run, its digits and its weights --------------------------------------------------


def whole_run(deadline):
    """`python ddpm.py --full`, which resumes; SIGTERM saves and stops it at the deadline."""
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
        process.terminate()  # SIGINT may be ignored, as in a shell's background job
        code, stopped = process.wait(), True
    so_far.write_text(json.dumps([*seconds, time.monotonic() - start]))
    if code and stopped:
        raise TimeoutError('the run was stopped')
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
    """The article's inference, twice: the first time is the warm-up."""
    path, seconds = ddpm.FULL['checkpoint_path'], []
    for _ in range(2):
        start = time.monotonic()
        with mock.patch.object(ddpm, 'OUTPUTS', PARTS / 'ten_digits'):  # keeps the run's pictures
            ddpm.inference(path, num_images=10)
        seconds.append(time.monotonic() - start)
    return {'seconds of inference() with all its pictures, first and second time': seconds}


def quality_in(steps, samples):
    import quality  # its packages may be missing

    path = ddpm.FULL['checkpoint_path']
    result = PARTS / f'quality-{Path(path).name}-{steps}.json'
    result.unlink(missing_ok=True)
    arguments = f'{path} --samples {samples} --steps {steps} --output {PARTS}'.split()
    with mock.patch.object(sys, 'argv', ['quality.py', *arguments]):
        try:
            quality.main()
        except SystemExit:
            if not result.exists():  # otherwise it is about the controls, and the result says so
                raise
    return json.loads(result.read_text())


def export(checkpoint, file):
    """Writes the EMA weights in half precision, with what is needed to sample from them."""
    saved = ddpm.load_checkpoint(checkpoint)
    ema = {name: value.half() for name, value in saved['ema'].items()}
    torch.save({'unet': saved['unet'], 'ema': ema, 'config': saved['config']}, file)
    ddpm.load_checkpoint(file)  # raises UserError where a weight is too large for half precision


def weights(folder, wanted):
    """Writes the wanted pieces of the exported weights, and a manifest of all pieces."""
    whole, manifest = PARTS / 'weights', {}
    export(ddpm.FULL['checkpoint_path'], whole)
    content = whole.read_bytes()
    for i in range(0, len(content), LARGEST):
        name, piece = f'weights-{i // LARGEST}.bin', content[i : i + LARGEST]
        if i // LARGEST in wanted:
            (folder / name).write_bytes(piece)
        manifest[name] = hashlib.sha256(piece).hexdigest()
    (folder / 'manifest.json').write_text(json.dumps(manifest, indent=1) + '\n')


def fresh_start():
    """Each part starts without the compiled code and the memory of the parts before it."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def update(folder, about):
    """Writes results.json and pictures.zip of the parts done so far."""
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(PARTS.glob('part-*.json'))}
    (folder / 'results.json').write_text(json.dumps(about | parts, indent=1) + '\n')
    with zipfile.ZipFile(folder / 'pictures.zip', 'w') as archive:
        for path in sorted(Path('outputs').rglob('*')):
            if path.suffix in ('.png', '.gif'):
                archive.write(path, path.relative_to('outputs'))


def main(arguments=None):
    parser = argparse.ArgumentParser(description='Measures the full run of ddpm.py.')
    parser.add_argument('folder', type=Path, nargs='?', help='for the results')
    what = 'only write the weights to sample from'
    parser.add_argument('--export', nargs=2, metavar=('CHECKPOINT', 'FILE'), help=what)
    parser.add_argument('--minutes', type=float, default=9.5, help='after which no part is begun')
    parser.add_argument('--samples', type=int, default=10_000, help='whose quality is measured')
    parser.add_argument('--after', type=Path, metavar='RESULTS', help='do what is missing there')
    what = 'write these pieces of the weights too'
    parser.add_argument('--weights', type=int, nargs='+', default=[], help=what)
    args = parser.parse_args(arguments)
    if args.export:
        try:
            return export(*args.export)
        except (ddpm.UserError, OSError) as error:
            sys.exit(f'full_run.py: {error}')
    if args.folder is None:
        parser.error('FOLDER or --export CHECKPOINT FILE')
    deadline = time.monotonic() + 60 * args.minutes
    cuda = torch.cuda.is_available()
    about = {
        'date': datetime.date.today().isoformat(),
        'machine': torch.cuda.get_device_name() if cuda else speed.processor(),
        'versions': {package: version(package) for package in ('torch', 'torchvision', 'timm')},
    }
    parts = {
        'part-01-whole-run': lambda: whole_run(deadline),
        'part-02-ten-digits': ten_digits,
        'part-03-quality-50': lambda: quality_in(50, args.samples),
        'part-04-quality-1000': lambda: quality_in(ddpm.FULL['num_time_steps'], args.samples),
        'part-05-attention-trained': attention_of_the_weights,
        'part-06-two-epochs': two_epochs,
        'part-07-profile': step_profile,
        'part-08-speed': speeds,
        'part-09-attention': attention_in_training,
    }
    for i, name in enumerate(CHOICES, 10):
        parts[f'part-{i}-{name.replace(": ", ", ")}'] = partial(tried, name)
    for folder in (args.folder, PARTS):
        folder.mkdir(parents=True, exist_ok=True)
    before = json.loads(args.after.read_text()) if args.after else {}
    for name in parts.keys() & before.keys():
        (PARTS / f'{name}.json').write_text(json.dumps(before[name]) + '\n')
    begun = False
    for name, part in parts.items():
        path = PARTS / f'{name}.json'
        if path.exists():
            print(f'{name}: done before')
            continue
        start = time.monotonic()
        if begun and start + 60 * LONG.get(name, 0) > deadline:
            print(f'{name}: too little time is left; run again to resume')
            break
        fresh_start()
        try:
            figures = part()
        except ImportError as error:
            print(f'{name}: skipped, {error.name} is not installed')
            continue
        except TimeoutError as error:
            print(f'{name}: {error}; run again to resume')
            break
        except (Exception, SystemExit) as error:  # later parts may still work
            traceback.print_exc()
            about.setdefault('failed', {})[name] = f'{type(error).__name__}: {error}'
            begun = True
            continue
        finally:
            update(args.folder, about)
        begun = True
        temporary = path.with_suffix('.tmp')
        figures |= {'seconds': time.monotonic() - start, 'measured on': about['machine']}
        temporary.write_text(json.dumps(figures) + '\n')
        os.replace(temporary, path)
        update(args.folder, about)
        print(f'{name}: {time.monotonic() - start:.0f} s', flush=True)
    trained = (PARTS / 'part-01-whole-run.json').exists()
    if args.weights and trained and Path(ddpm.FULL['checkpoint_path']).exists():
        weights(args.folder, args.weights)
    return about.get('failed')


if __name__ == '__main__':
    sys.exit(1 if main() else 0)
