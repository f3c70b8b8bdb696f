"""What only a GPU can show. Each program here is a process of its own that sees one."""

import numpy as np
import pytest
import torch
from conftest import GPU, TINY_PREVIEW, run_program
from PIL import Image
from test_faults import differences

import ddpm

ON_GPU = f"""{TINY_PREVIEW}
import torch
if not torch.cuda.is_available(): raise SystemExit(77)
device = ddpm.best_device()
"""
NETWORK = """
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
torch.manual_seed(0)
model, x = ddpm.to_device(ddpm.UNET().eval(), device), torch.randn(2, 1, 32, 32)
with torch.no_grad(): eps = model(x.to(device), [3, 700]).cpu()
"""


def run_on_gpu(folder, edits, *flags):
    done = run_program(folder, ON_GPU + edits, *flags, CUDA_VISIBLE_DEVICES=GPU)
    if done.returncode == 77 or 'torch.compile does not work here' in done.stdout:
        pytest.skip('no CUDA, or no compiler')
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_network_is_that_of_a_cpu(tmp_path):
    run_on_gpu(tmp_path, NETWORK + "torch.save(eps, 'eps')\nraise SystemExit(0)\n")
    exec(NETWORK, here := {'ddpm': ddpm, 'torch': torch, 'device': torch.device('cpu')})
    torch.testing.assert_close(torch.load(tmp_path / 'eps'), here['eps'], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('compiled', [False, True])
def test_the_full_unet_repeats_and_resumes_bit_for_bit(tmp_path, compiled):
    """With dropout, attention and a seed."""
    edits = f'ddpm.COMPILE_FROM = {0 if compiled else 1000}; ddpm.PREVIEW["unet"] = {{}}\n'
    edits += 'real = torch.compile\n'
    edits += 'torch.compile = lambda model: print("Compiling") or real(model)\n'
    for path, epochs in (('one', 4), ('two', 4), ('parts', 1), ('parts', 4)):
        numbers = f'ddpm.PREVIEW.update(num_epochs={epochs}, checkpoint_path={path!r})'
        assert ('Compiling' in run_on_gpu(tmp_path, edits + numbers, '--preview')) == compiled
    one, *others = (torch.load(tmp_path / path) for path in ('one', 'two', 'parts'))
    assert [differences(one, other)[0] for other in others] == [0, 0]


def test_the_shipped_weights_draw_digits(tmp_path):
    """By random numbers that are not a CPU's: 0.10 of ink and 0.86 of paper, as MNIST has."""
    run_on_gpu(tmp_path, 'ddpm.SAMPLE.update(num_images=100, num_steps=50, seed=0)', '--sample')
    files = (tmp_path / 'outputs/mnist/100_images_50_steps_seed_0').glob('*.png')
    digits = np.stack([np.asarray(Image.open(file)) for file in files]) / 255  # (100, 32, 32)
    assert len(digits) == 100
    assert 0.08 < digits.mean() < 0.12 and 0.8 < (digits < 0.05).mean() < 0.9
