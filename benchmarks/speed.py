"""How fast is ddpm.py? Times it beside the article's own loop and two well-known libraries.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py

Works on CUDA and on a CPU. The contestants take turns (A B C D A B C D ...), so that other load and
the machine's temperature affect all of them alike. Ratios are formed within a round; their median
over the rounds is shown with the smallest and the largest. Prints tables, and keeps the figures of
each kind of machine in benchmarks/results/speed.json.

* ddpm.py trains by `ddpm.train` itself, compiled as for a long run, and samples by
  `ddpm.reverse_process`.
* The article's loop is written afresh from its description: float32, a DataLoader with 4 workers,
  tables and timesteps on the CPU, `.item()` each step, an EMA without warm-up. It samples ten
  digits one at a time, copies the state to the device and back at each step, and leaves attention's
  dropout on.
* diffusers: UNet2DModel with about as many weights, AdamW, EMAModel, gradients clipped to 1, as in
  its unconditional training script; DDPMScheduler, and DDIMScheduler for 50 steps.
* denoising-diffusion-pytorch: its Unet(64) and GaussianDiffusion with what its Trainer does each
  step (Adam, gradients clipped to 1, its EMA every 10 steps); full precision is its default.

ddpm.py is given images of noise, since only their size matters here; the others load MNIST. FLOPs
are counted by torch's FlopCounterMode on one image, forward and backward; a multiply-add counts as
two. Every step of the reverse process costs the same, so only a few steps are timed and the time is
multiplied; the table says how many.
"""

import argparse
import copy
import datetime
import itertools
import json
import multiprocessing
import platform
import resource
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image, to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpm  # noqa: E402

try:
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel
except ImportError:
    UNet2DModel = None  # it does not take part
try:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA
except ImportError:
    Unet = None

RESULT = Path(__file__).parent / 'results/speed.json'
DIGITS = 10  # of the article's inference
WARM = 2  # steps before the clock starts
SMALL = dict(Channels=[8, 16], Attentions=[False, True], Upscales=[False, True], num_groups=4)
SIZES = {  # of the models: the article's and its like, or small ones to try the benchmark itself
    'full': {'unet': {}, 'width': 64, 'widths': (64, 128, 256, 352), 'compile from': 0},
    'small': {'unet': SMALL, 'width': 8, 'widths': (32, 32, 32, 32), 'compile from': 1000},
}


class Digits(Dataset):
    """MNIST as torchvision gives it: a PIL picture of 28 x 28 made into a tensor."""

    def __init__(self):
        self.images = ddpm.load_images('MNIST')[:, :, 2:-2, 2:-2]  # without the padding

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return to_tensor(to_pil_image(self.images[i]))


def batches(batch_size, workers=4):
    """Endless shuffled batches (B, 1, 28, 28) in [0, 1], from workers as in the article."""
    loader = DataLoader(Digits(), batch_size, True, num_workers=workers, drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


# ---- The contestants: `training` and `sampling` yield after each step, and go on from there ------


class Ours:
    """ddpm.py as it is."""

    name = 'ddpm.py'
    deterministic = True  # when it samples; train chooses for itself

    def __init__(self, size, device):
        self.size, self.device = size, device
        self.model = ddpm.UNET(**size['unet'])

    def loss_of_one(self, x):
        return ddpm.diffusion_loss(self.model, ddpm.DDPM_Scheduler(), x, torch.tensor([5]), x)

    def train(self, batch_size, steps, warm=WARM):
        """Seconds that `steps` steps of ddpm.train take, after `warm` others."""
        images = torch.randint(256, ((steps + warm) * batch_size, 1, 32, 32)).to(torch.uint8)
        step_done, clock = ddpm.Run.step_done, []

        def timed(run, loss):
            if run.step + 1 in (warm, warm + steps):  # before the last step is saved
                clock.append(now(self.device))
            step_done(run, loss)

        run = dict(num_epochs=1, unet=self.size['unet'], sample_every=0)
        with (
            mock.patch.object(ddpm.Run, 'step_done', timed),
            mock.patch.object(ddpm, 'load_images', lambda *_: images),
            mock.patch.object(ddpm, 'COMPILE_FROM', self.size['compile from']),
            mock.patch.object(ddpm, 'save_checkpoint'),
            mock.patch.object(ddpm, 'draw_losses'),
            tempfile.TemporaryDirectory() as folder,
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):
            ddpm.train(batch_size, checkpoint_path=f'{folder}/checkpoint', **run)
        return clock[1] - clock[0]

    def sampling(self, num_steps):
        model = ddpm.to_device(self.model.eval(), self.device)
        scheduler = ddpm.DDPM_Scheduler().to(self.device)
        while True:
            x = torch.randn(DIGITS, 1, 32, 32, device=self.device)
            yield from ddpm.reverse_process(model, x, scheduler, num_steps)


class Stepwise:
    """A contestant whose training is a generator."""

    steps = None
    deterministic = False

    def train(self, batch_size, steps, warm=WARM):
        """Seconds that `steps` steps take, after `warm` others."""
        self.steps = self.steps or self.training(batch_size)  # its workers live on between turns
        return pace(self.steps, steps, self.device, warm)


class ArticleUNET(ddpm.UNET):
    """The article's forward: the time table is on the CPU."""

    def forward(self, x, t):
        embeddings = self.table[t].to(x.device)[:, :, None, None]
        x, skips, half = self.shallow_conv(x), [], self.num_layers // 2
        for i in range(self.num_layers):
            x, skip = getattr(self, f'Layer{i + 1}')(x, embeddings)
            if i < half:
                skips.append(skip)
            else:
                x = torch.cat((x, skips.pop()), dim=1)
        return self.output_conv(self.relu(self.late_conv(x)))


class Article(Stepwise):
    name = "the article's"
    deterministic = True  # its set_seed has it so, as ddpm.py's

    def __init__(self, size, device):
        self.device = device
        self.model = ArticleUNET(**size['unet'])
        self.model.table = self.model.embeddings.embeddings.clone()  # no buffer: stays on the CPU
        self.scheduler = ddpm.DDPM_Scheduler()
        self.criterion = torch.nn.MSELoss()

    def loss_of_one(self, x):
        return self.criterion(self.model(x, [5]), x)

    def training(self, batch_size):
        model = self.model.train().to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-5)
        ema = ModelEmaV3(model, decay=0.9999)  # without the warm-up that ddpm.py has
        total = 0.0
        for x in batches(batch_size):
            x = F.pad(x.to(self.device), (2, 2, 2, 2))
            t = torch.randint(0, 1000, (batch_size,))
            e = torch.randn_like(x)
            a = self.scheduler.alpha[t].view(batch_size, 1, 1, 1).to(self.device)
            x = torch.sqrt(a) * x + torch.sqrt(1 - a) * e
            output = model(x, t)
            optimizer.zero_grad()
            loss = self.criterion(output, e)
            total += loss.item()
            loss.backward()
            optimizer.step()
            ema.update(model)
            yield

    @torch.no_grad()
    def sampling(self, num_steps):
        """One step of each of ten digits, one at a time; the process always has 1000 steps."""
        model = copy.deepcopy(self.model).eval().to(self.device)
        for module in model.modules():
            if isinstance(module, ddpm.Attention):
                module.train()  # its dropout is always on
        beta, alpha = self.scheduler.beta, self.scheduler.alpha
        zs = torch.randn(DIGITS, 1, 1, 32, 32)
        for t in itertools.cycle(reversed(range(1, 1000))):
            for i, z in enumerate(zs):
                z = z.to(self.device)
                scale = beta[t] / (torch.sqrt(1 - alpha[t]) * torch.sqrt(1 - beta[t]))
                z = z / torch.sqrt(1 - beta[t]) - scale * model(z, [t]).to(z.device)
                zs[i] = z.cpu() + torch.randn(1, 1, 32, 32) * torch.sqrt(beta[t])
            yield


class Diffusers(Stepwise):
    name = 'diffusers'

    def __init__(self, size, device):
        self.device = device
        self.model = UNet2DModel(
            sample_size=32,
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=size['widths'],
            down_block_types=('DownBlock2D', 'DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D'),
            up_block_types=('UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D', 'UpBlock2D'),
        )
        self.scheduler = DDPMScheduler(1000)

    def loss_of_one(self, x):
        return F.mse_loss(self.model(x, torch.tensor([5])).sample, x)

    def training(self, batch_size):
        model = self.model.train().to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ema = EMAModel(model.parameters(), decay=0.9999)
        for x in batches(batch_size):
            x = F.pad(x.to(self.device), (2, 2, 2, 2)) * 2 - 1
            noise = torch.randn_like(x)
            t = torch.randint(0, 1000, (batch_size,), device=self.device)
            prediction = model(self.scheduler.add_noise(x, noise, t), t).sample
            loss = F.mse_loss(prediction, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            loss.detach().item()
            yield

    @torch.no_grad()
    def sampling(self, num_steps):
        model = copy.deepcopy(self.model).eval().to(self.device)
        scheduler = (DDPMScheduler if num_steps == 1000 else DDIMScheduler)(1000)
        scheduler.set_timesteps(num_steps)
        while True:
            x = torch.randn(DIGITS, 1, 32, 32, device=self.device)
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t).sample, t, x).prev_sample
                yield


class DenoisingDiffusion(Stepwise):
    name = 'denoising-diffusion-pytorch'

    def __init__(self, size, device):
        self.device = device
        self.model = Unet(size['width'], channels=1)
        self.diffusion = GaussianDiffusion(self.model, image_size=32, timesteps=1000)

    def loss_of_one(self, x):
        return self.diffusion(x)

    def training(self, batch_size):
        diffusion = self.diffusion.train().to(self.device)
        optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
        ema = EMA(diffusion, beta=0.995, update_every=10).to(self.device)
        for x in batches(batch_size):
            loss = diffusion(F.pad(x.to(self.device), (2, 2, 2, 2)))
            loss.item()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            yield

    @torch.inference_mode()
    def sampling(self, num_steps):
        diffusion = copy.deepcopy(self.diffusion).eval().to(self.device)
        x, x_0 = torch.randn(DIGITS, 1, 32, 32, device=self.device), None
        times = torch.linspace(999, 0, num_steps).round().long().tolist()
        for t in itertools.cycle(times):
            if num_steps == 1000:
                x, x_0 = diffusion.p_sample(x, t, None)
            else:  # what a step of its ddim_sample computes that takes time
                when = torch.full((DIGITS,), t, device=self.device, dtype=torch.long)
                diffusion.model_predictions(x, when, None, clip_x_start=True)
            yield


CONTESTANTS = [Ours, Article]
CONTESTANTS += [Diffusers] if UNet2DModel else []
CONTESTANTS += [DenoisingDiffusion] if Unet else []


# ---- Measuring -----------------------------------------------------------------------------------


def now(device):
    """The time in seconds, once the device has finished its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def pace(steps, count, device, warm=1):
    """Seconds that the next `count` steps take, after `warm` others."""
    for _ in range(warm):
        next(steps)
    start = now(device)
    for _ in range(count):
        next(steps)
    return now(device) - start


def set_cudnn(contestant):
    """As the contestant's users have it; ddpm.train sets its own."""
    torch.backends.cudnn.deterministic = contestant.deterministic
    torch.backends.cudnn.benchmark = False


def gflop_of_image(contestant):
    """Forward and backward, of one image of 32 x 32."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        contestant.loss_of_one(torch.rand(1, 1, 32, 32)).backward()
    contestant.model.zero_grad()
    return counter.get_total_flops() / 1e9


def matrix_rate(device):
    """TFLOP/s of the product of two square matrices, in 16 bits where ddpm.py would use them."""
    n, repeats = (8192, 20) if device.type == 'cuda' else (2048, 5)
    a = torch.randn(n, n, device=device).to(ddpm.half_precision(device) or torch.float32)
    products = (a @ a for _ in itertools.count())
    return max(2 * n**3 * repeats / pace(products, repeats, device) for _ in range(3)) / 1e12


def peak_memory(Contestant, size, device, batch_size):
    """In GB: the GPU's, or on a CPU this whole process's."""
    Contestant(SIZES[size], device).train(batch_size, 1)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cuda = device.type == 'cuda'
    return (torch.cuda.max_memory_allocated() if cuda else kilobytes * 1024) / 1e9


def in_another_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *arguments).result()


def contest(size, device, batch_size, rounds, steps, sampling_steps):
    """{name: figures} of all contestants, which take turns."""
    contestants = [Contestant(SIZES[size], device) for Contestant in CONTESTANTS]
    results = {}
    for c in contestants:
        results[c.name] = {
            'parameters': sum(p.numel() for p in c.model.parameters()),
            'GFLOP an image in training': gflop_of_image(c),
            'peak memory, GB': in_another_process(peak_memory, type(c), size, device, batch_size),
            'images a second': [],
        }
    for turn in range(rounds + 1):
        for c in contestants:
            set_cudnn(c)
            seconds = c.train(batch_size, steps)
            if turn:  # the first round warms up: compilation, workers, choice of algorithms
                results[c.name]['images a second'].append(steps * batch_size / seconds)
    for num_steps in (1000, 50):
        processes = {c: c.sampling(num_steps) for c in contestants}
        for turn in range(rounds + 1):
            for c, process in processes.items():
                set_cudnn(c)
                # the article has no shorter process than its 1000 steps
                length = 1000 if isinstance(c, Article) else num_steps
                count = min(sampling_steps, length)
                seconds = pace(process, count if turn else 1, device) * length / count
                times = results[c.name].setdefault(f'ten digits, {num_steps} steps, seconds', [])
                times += [seconds] if turn else []
    return results


# ---- The report ----------------------------------------------------------------------------------


def table(head, rows):
    """Markdown. Numbers get three digits."""
    rows = [[f'{v:,.3g}' if isinstance(v, float) else str(v) for v in row] for row in rows]
    lines = [head, ['---', *['---:'] * (len(head) - 1)], *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n'


def report(result):
    """The tables, from what the JSON file holds."""
    found, rate, faster = result['contestants'], result['matrix rate, TFLOP/s'], 'is faster by'
    trained, sampled = [], []

    def ratio(figures, key, power=1):
        """How much faster the first is: median, smallest and largest ratio within a round."""
        pairs = zip(found[Ours.name][key], figures[key])
        ratios = [(ours / theirs) ** power for ours, theirs in pairs]
        return f'{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'

    for name, figures in found.items():
        key, work = 'images a second', figures['GFLOP an image in training']
        pace = median(figures[key])
        row = [name, f'{figures["parameters"] / 1e6:.1f} M', work, pace]
        row += [f'{pace * work / 1e3 / rate:.0%}', figures['peak memory, GB']]
        trained.append([*row, ratio(figures, key)])
        keys = [f'ten digits, {steps} steps, seconds' for steps in (1000, 50)]
        cells = [(median(figures[key]), ratio(figures, key, -1)) for key in keys]
        sampled.append([name, *itertools.chain(*cells)])
    text = f'Training, batch {result["batch size"]}, {result["steps a turn"]} steps a turn, '
    text += f'{result["rounds"]} rounds; a matrix product reaches {rate:.3g} TFLOP/s:\n\n'
    head = ['', 'weights', 'GFLOP an image', 'images a second', 'of the matrix rate', 'GB']
    text += table([*head, f'{Ours.name} {faster}'], trained)
    count = result['timed steps of the reverse process']
    text += f'\nTen digits, seconds; {count} steps a turn were timed, then multiplied:\n\n'
    return text + table(['', '1000 steps', faster, '50 steps', faster], sampled)


def main(arguments=None):
    parser = argparse.ArgumentParser(description='Times ddpm.py beside its like.')
    cuda = torch.cuda.is_available()
    parser.add_argument('--batch', type=int, default=64 if cuda else 16)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=200 if cuda else 4, help='of training, a turn')
    sampling = 250 if cuda else 4
    parser.add_argument('--sampling-steps', type=int, default=sampling, help='of a turn')
    parser.add_argument('--size', choices=SIZES, default='full', help='of the models')
    args = parser.parse_args(arguments)
    warnings.simplefilter('ignore')  # of the DataLoader: more workers than cores
    device, start = ddpm.best_device(), time.monotonic()
    found = contest(args.size, device, args.batch, args.rounds, args.steps, args.sampling_steps)
    packages = ['torch', *(Contestant.name for Contestant in CONTESTANTS[2:])]
    machine = f'{processor()}, {ddpm.half_precision(device) or torch.float32}'
    result = {
        'date': datetime.date.today().isoformat(),
        'versions': {package: version(package) for package in packages},
        'batch size': args.batch,
        'rounds': args.rounds,
        'steps a turn': args.steps,
        'timed steps of the reverse process': args.sampling_steps,
        'matrix rate, TFLOP/s': matrix_rate(device),
        'contestants': found,
        'minutes': (time.monotonic() - start) / 60,
    }
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**before, machine: result}, indent=1) + '\n')
    print(report(result))
    print(f'{machine}, {result["minutes"]:.1f} minutes; {RESULT}')


def processor():
    """The GPU's name, or the CPU's, where Linux tells it, and the number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(': ')[1] for line in lines if line.startswith('model name')]
    return f'{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads'


if __name__ == '__main__':
    main()
