"""Where every tensor lies, proved without a GPU: torch's fake tensors have a device and a shape but
no values. Two devices in one operation are an error here, and transfers are noted."""

import ctypes
import sys
from functools import partial, wraps
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conftest import DIGITS, ROOT, TINY
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

import ddpm

sys.path.append(str(ROOT / 'benchmarks'))
import full_run  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore:Accessing the data pointer of FakeTensor')

UNET = dict(Channels=[2, 4], Attentions=[False, True], Upscales=[False, True], num_groups=1)
UNET['num_heads'] = 2
RUN = {**TINY, 'unet': UNET, 'batch_size': 3, 'num_time_steps': 5, 'sample_every': 1}
GPU, aten = torch.device('cuda', 0), torch.ops.aten
READING = aten._local_scalar_dense.default  # of `item`, `float(x)`, `if x:` and their like
TRANSFERS = aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default, READING


class Watch(TorchDispatchMode):
    """Notes in `transfers` each operation that takes something to the GPU or from it."""

    def __init__(self, fake):
        super().__init__()
        self.fake, self.transfers = fake, []

    def as_fake(self, x):
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'prim':  # asks where a tensor is
            return func(*args)
        args, kwargs = tree_map_only(torch.Tensor, self.as_fake, (args, kwargs or {}))
        with self:  # inference mode brings `item` and others in one piece
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = 1 if func is READING else func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, FakeTensor)]
        # a single number of the CPU goes along with a call: that is no transfer
        devices = {x.fake_device for x in tensors if x.ndim or func in TRANSFERS}
        devices |= {torch.device('cpu')} if func is READING else set()
        assert len(devices) < 2 or func in TRANSFERS, f'{func} mixes {devices}'
        self.transfers += [str(func)] * (len(devices) > 1)
        return result


class Draws(torch.Generator):
    """A generator that only knows where it is: one of a GPU's needs the driver."""

    def __new__(cls, device='cpu'):
        draws = super().__new__(cls)
        draws.place = torch.device(device)
        return draws


class WatchDraws(TorchFunctionMode):
    """Random numbers come from a generator of the device that they are for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if draws := kwargs.get('generator'):
            of_x = args[0].device if args and isinstance(args[0], torch.Tensor) else 'cpu'
            device = torch.device(kwargs.get('device', of_x))
            assert draws.place == device, f'a generator of {draws.place} for {device}'
        return func(*args, **kwargs)


def really(function):
    """On the CPU, with values: what is fake has none, and no fake module can be moved."""

    @wraps(function, updated=())
    def call(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


@pytest.fixture
def watch(workdir, monkeypatch):
    """What ddpm.py does in a test, it does on a fake GPU, under a Watch. A backward pass would
    start threads that need the driver: all models get gradients instead."""
    models, saved, unet, ema, respaced = [], {}, ddpm.UNET, ddpm.ModelEmaV3, ddpm.respace

    def backward(loss):
        for parameter in (p for model in models for p in model.parameters()):
            parameter.grad = torch.zeros_like(parameter)

    def save(path, state):
        saved[path] = tree_map_only(torch.Tensor, lambda x: x.cpu(), state)
        path.touch()

    def picture(x):
        assert x.device.type == 'cpu'
        return Image.new('L', (8, 8))

    def draw(pictures, images):
        kept = [x for parts in pictures.frames.values() for x in parts]
        assert kept and all(x.device.type == 'cpu' for x in [images, *kept])

    def average(model, *decay, **warmup):
        make = ema if next(model.parameters()).is_cuda else really(ema)
        return make(model, *decay, **warmup)

    def respace(*arguments):  # takes the timesteps to the GPU, once for all steps
        before = len(watch.transfers)
        result = respaced(*arguments)
        assert watch.transfers[before:] == [str(aten._to_copy.default)] * 2
        del watch.transfers[before:]
        return result

    def tolist(x):  # moves all at once; here losses, and the largest queries
        x.cpu()
        return [0.1] * x.numel()

    @wraps(unet, updated=())  # whose arguments are checked by its signature
    def kept(**arguments):
        models.append(unet(**arguments))
        return models[-1]

    stubs = dict(UNET=really(kept))
    for name in ('DDPM_Scheduler', 'sampling_times', 'times_to_show', 'load_images'):
        stubs[name] = really(getattr(ddpm, name))
    stubs |= dict(best_device=lambda: GPU, ModelEmaV3=average, to_pil_image=picture)
    stubs |= dict(respace=respace, kernels=MagicMock())
    stubs |= dict(draw_losses=MagicMock())
    monkeypatch.setattr(ddpm.Pictures, 'draw', draw)
    stubs |= dict(save_checkpoint=save, load_checkpoint=lambda path, **_: saved[Path(path)])
    for name, stub in stubs.items():
        monkeypatch.setattr(ddpm, name, stub)
    monkeypatch.setattr(ddpm.Run, '__init__', really(ddpm.Run.__init__))
    graphs = ('Stream', 'current_stream', 'stream', 'CUDAGraph', 'graph')
    for name in ('is_bf16_supported', 'synchronize', *graphs):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, 'enabled', False)
    monkeypatch.setattr(torch.__future__, '_overwrite_module_params_on_conversion', True)
    monkeypatch.setattr(torch, 'Generator', Draws)
    monkeypatch.setattr(torch.Tensor, 'backward', backward)
    monkeypatch.setattr(FakeTensor, 'tolist', tolist)
    monkeypatch.setattr(FakeTensorMode, '__deepcopy__', lambda mode, _: mode, raising=False)
    if not torch.cuda.is_available() and not hasattr(torch._C, '_ensureCUDADeviceGuardSet'):
        # torch 2.7 would ask for a driver: as in later ones, the GPU gets a guard that does nothing
        library = Path(torch.__file__).parent / 'lib/libc10.so'
        if not library.exists():
            pytest.skip('torch before 2.8, and not on Linux')
        name = '_ZN3c104impl26device_guard_impl_registryE'
        guards = (ctypes.c_void_p * 2).in_dll(ctypes.CDLL(str(library)), name)
        guards[1] = guards[0]
    plain = sdpa_kernel(SDPBackend.MATH)  # the others ask the GPU what it is
    with torch.no_grad(), plain, WatchDraws(), FakeTensorMode() as fake, Watch(fake) as watch:
        yield watch


@pytest.fixture
def bar(watch, monkeypatch):
    """The bar of a run, drawn anew at every third step however quick they are. From one refresh to
    the next nothing is read; a refresh, and the line of an epoch, read one number. A save reads
    all."""

    class Bar(ddpm.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            watch.transfers.clear()

        def update(self, n=1):
            assert not watch.transfers
            super().update(n)
            return self.n // n % 3 == 0

        def set_postfix_str(self, text, refresh):
            assert len(watch.transfers) == 1 and not refresh
            watch.transfers.clear()

        def set_description(self, text):
            assert len(watch.transfers) <= 1
            watch.transfers.clear()

    save = ddpm.Run.save

    def watched_save(run):
        assert not watch.transfers
        save(run)
        watch.transfers.clear()

    monkeypatch.setattr(ddpm, 'tqdm', Bar)
    monkeypatch.setattr(ddpm.Run, 'save', watched_save)


def test_what_is_wrong_is_noticed(watch):
    x, to_gpu = torch.ones(2, device=GPU), partial(torch.ones(2).to, GPU)
    for inference in (False, True):
        with torch.inference_mode(inference):
            for transfer in (x[0].item, x.tolist, x.cpu, x.all().__bool__, to_gpu):
                watch.transfers.clear()
                transfer()
                assert watch.transfers
            with pytest.raises(RuntimeError, match='devices'):
                x + torch.ones(2)
            with pytest.raises(AssertionError, match='mixes'):
                x[torch.tensor([0])]
            for draw in (partial(torch.randn, 2, device=GPU), torch.empty_like(x).normal_):
                with pytest.raises(AssertionError, match='a generator of cpu'):
                    draw(generator=torch.Generator())


@pytest.mark.parametrize('bf16', [True, False])
def test_training_reads_nothing_between_two_refreshes_of_the_bar(watch, bar, monkeypatch, bf16):
    """Of two epochs, the second of which resumes the first, each with its picture."""
    original, read = ddpm.sample, []

    @wraps(original)
    def sample(*arguments, **options):
        x = original(*arguments, **options)
        assert x.device.type == 'cpu' and len(x) == 64
        read.append(len(watch.transfers))  # since the bar of the samples began
        watch.transfers.clear()
        return x

    monkeypatch.setattr(ddpm, 'sample', sample)
    torch.cuda.is_bf16_supported.return_value = bf16  # else float16, with its scaler
    for epochs in (1, 2):
        ddpm.train(**{**RUN, 'num_epochs': epochs})
    saved = ddpm.load_checkpoint(RUN['checkpoint_path'])
    assert len(saved['losses']) == 8 and bool(saved['scaler']) != bf16
    drawn = sorted(path.name for path in Path('outputs/tiny/progress').iterdir())
    assert drawn == ['epoch_001.00.png', 'epoch_002.00.png']
    assert read and {*read} == {1}  # all images at once, when they are done


@pytest.mark.parametrize('num_steps', [None, 3])
def test_the_reverse_process_stays_on_the_gpu(watch, num_steps):
    model = ddpm.to_device(ddpm.UNET(**UNET), GPU)
    x, scheduler = torch.randn(2, 1, 32, 32, device=GPU), ddpm.DDPM_Scheduler(5).to(GPU)
    watch.transfers.clear()
    found = [x for _, x in ddpm.reverse_process(model, x, scheduler, num_steps)]
    assert len(found) == (num_steps or 5) and all(x.device == GPU for x in found)
    assert not watch.transfers


def test_inference(watch):
    ddpm.train(**{**RUN, 'num_epochs': 1})
    ddpm.inference(RUN['checkpoint_path'], num_steps=3, num_images=66, seed=5)
    assert len([*Path('outputs/tiny/66_images_seed_5').glob('*.png')]) == 66


def test_queries_and_keys_are_watched_without_waiting(watch, bar, monkeypatch):
    monkeypatch.setattr(ddpm, 'FULL', RUN)
    full_run.PARTS.mkdir(parents=True)
    assert full_run.attention_in_training()['largest of each layer'] == {
        'Layer2.attention_layer': {'q': 0.1, 'k': 0.1}
    }


@pytest.mark.parametrize('capture', [False, True])
@pytest.mark.parametrize('choice', [full_run.step_of, full_run.sampling_of])
def test_the_steps_of_the_full_run(watch, choice, capture):
    model = ddpm.to_device(ddpm.UNET(**UNET), GPU)
    graph = torch.cuda.graph.return_value.__enter__
    graph.side_effect = lambda *_: watch.transfers.clear()
    step = choice(model, DIGITS.to(GPU), 4, capture=capture)
    assert graph.called == capture
    if not capture:
        watch.transfers.clear()
    assert step().device == step().device == GPU
    assert not watch.transfers
