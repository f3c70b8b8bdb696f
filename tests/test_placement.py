"""Where every tensor lies, proved without a GPU: torch's device `meta`, which computes shapes but
not values, stands for it. Two devices in an operation are an error here, and transfers are counted.
"""

import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ddpm

pytestmark = pytest.mark.filterwarnings('ignore:.*copying from a non-meta parameter')
UNET = dict(Channels=[2, 4], Attentions=[False, True], Upscales=[False, True], num_groups=1)
UNET['num_heads'] = 2
RUN = {**TINY, 'unet': UNET, 'batch_size': 2, 'num_time_steps': 5, 'num_epochs': 1}  # of 6 steps
GPU, CPU, aten = torch.device('meta'), torch.device('cpu'), torch.ops.aten
READING = aten._local_scalar_dense.default  # of `item`, `float(x)`, `if x:` and their like
TRANSFERS = READING, aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default


class Watch(TorchDispatchMode):
    """Counts in `transfers` what takes something to the GPU or, all of it ones, from it."""

    transfers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        x, kwargs = args[0] if args else None, kwargs or {}
        if func is READING and x.is_meta:
            result, devices = 1, {GPU, CPU}
        elif func in TRANSFERS and x.is_meta and kwargs.get('device') == CPU:
            result, devices = torch.ones(x.shape, dtype=x.dtype), {GPU, CPU}
        else:
            result = func(*args, **kwargs)
            tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
            # a single number of the CPU goes along with a call: that is no transfer
            devices = {x.device for x in tensors if x.ndim or func in TRANSFERS}
        assert len(devices) < 2 or func in TRANSFERS, f'{func} mixes {devices}'
        self.transfers += len(devices) > 1
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
        result, draws = func(*args, **(kwargs or {})), (kwargs or {}).get('generator')
        assert not draws or draws.place == result.device, f'a generator of {draws.place}'
        return result


@pytest.fixture
def watch(workdir, monkeypatch):
    """What ddpm.py does in a test, it does on that GPU, under a Watch."""
    save = ddpm.save_checkpoint

    def copied(path, state):  # as torch.save does with what has values
        save(path, tree_map_only(torch.Tensor, torch.Tensor.cpu, state))

    monkeypatch.setattr(ddpm, 'best_device', lambda: GPU)
    monkeypatch.setattr(ddpm, 'autocast', lambda device: nullcontext())
    monkeypatch.setattr(ddpm, 'save_checkpoint', copied)
    monkeypatch.setattr(torch, 'Generator', Draws)
    adam = sys.modules[torch.optim.Adam.__module__]
    monkeypatch.setattr(adam, '_device_dtype_check_for_fused', lambda *_, **__: None, raising=False)
    with WatchDraws(), Watch() as watch:
        yield watch


@pytest.mark.parametrize(
    'device, half, facts',
    [
        ('cuda', torch.bfloat16, {}),
        ('cuda', torch.float16, dict(is_bf16_supported=False)),
        ('mps', None, {}),
        ('cpu', torch.bfloat16, {}),
        ('cpu', None, dict(_is_avx512_bf16_supported=False)),
        ('cpu', None, dict(_is_amx_tile_supported=False)),
        ('cpu', torch.bfloat16, dict(_is_amx_tile_supported=False, cpu_name='AMD EPYC')),
    ],
)
def test_16_bits_where_they_are_faster(monkeypatch, device, half, facts):
    known = dict.fromkeys(('_is_avx512_bf16_supported', '_is_amx_tile_supported'), True) | facts
    cpu = SimpleNamespace(**{name: lambda known=known[name]: known for name in known})
    cpu.get_capabilities = lambda: {'cpu_name': facts.get('cpu_name', 'Intel Xeon')}
    monkeypatch.setattr(torch, 'cpu', cpu)
    bf16 = lambda emulated: emulated or facts.get('is_bf16_supported', True)  # noqa: E731
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', bf16)
    assert ddpm.half_precision(torch.device(device)) == half
    del cpu.get_capabilities  # an older torch has none
    assert ddpm.half_precision(torch.device(device)) in (half, torch.bfloat16)


def test_channels_last_but_on_mps():
    model, formats = Mock(), []
    for device in ('cpu', 'cuda', 'mps'):
        ddpm.to_device(model, torch.device(device))
        formats.append(model.to.call_args.kwargs['memory_format'])
    assert formats == [torch.channels_last] * 2 + [torch.contiguous_format]


def test_what_is_wrong_is_noticed(watch):
    x, to_gpu = torch.ones(2, device=GPU), partial(torch.ones(2).to, GPU)
    for number, transfer in enumerate((x[0].item, x.cpu, x.all().__bool__, to_gpu)):
        assert watch.transfers == number
        transfer()
    with pytest.raises(RuntimeError, match='device'):
        x + torch.ones(2)
    with pytest.raises(AssertionError, match='mixes'):
        x[torch.tensor([0])]
    for draw in (partial(torch.randn, 2, device=GPU), torch.empty_like(x).normal_):
        with pytest.raises(AssertionError, match='a generator of cpu'):
            draw(generator=torch.Generator())


def test_a_step_waits_for_the_gpu_only_where_the_bar_is_drawn_anew(watch, monkeypatch):
    """For one number, the loss; here at every other step. Only a save reads all. It is the same in
    a run that was resumed, and in float16, which has a scaler."""
    step_done, seen = ddpm.Run.step_done, [0]

    class Bar(ddpm.tqdm):
        def update(self, n=1):
            super().update(n)
            return self.n % 2 == 0

    def watched(run, loss):
        seen.append(watch.transfers)
        step_done(run, loss)
        seen.append(watch.transfers)

    monkeypatch.setattr(ddpm.Run, 'step_done', watched)
    monkeypatch.setattr(ddpm, 'tqdm', Bar)
    for epochs, half in ((1, torch.bfloat16), (2, torch.float16)):
        monkeypatch.setattr(ddpm, 'half_precision', lambda device, half=half: half)
        ddpm.train(**{**RUN, 'num_epochs': epochs})
        counts = np.diff(seen).tolist()
        # before the first step, in it, from it to the second, ..., in the last
        assert counts[1:] == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]
        seen[:] = [0]
    assert ddpm.load_checkpoint(RUN['checkpoint_path'])['scaler']


def test_sampling_fetches_a_batch_when_it_is_done(watch):
    """However many its steps; and all that `inference` shows and draws is on the CPU."""
    ddpm.train(**{**RUN, 'batch_size': 12})
    model, counts = ddpm.load_model(RUN['checkpoint_path']), []
    for num_steps in (None, 3, 2):
        before = watch.transfers
        assert ddpm.sample(model, 65, num_steps).device == CPU
        counts.append(watch.transfers - before)
    assert len({*counts}) == 1
    assert ddpm.inference(RUN['checkpoint_path'], num_steps=3, num_images=66).device == CPU
