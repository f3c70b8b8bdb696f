"""docs/recipes: each patch applies to ddpm.py, and what comes out trains, resumes and samples."""

import gzip
import subprocess
from itertools import permutations
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TINY, few_images
from torch.testing import assert_close
from torchvision.datasets.mnist import read_label_file

import ddpm

PLAIN = (ROOT / 'ddpm.py').read_text()
RECIPES = {path.stem: path for path in sorted((ROOT / 'docs/recipes').glob('*.patch'))}
TARGETS = ['cosine_v', 'predict_x_0']  # these exclude each other; all others combine
FEW = TINY | dict(dataset='MNIST', batch_size=6)  # twelve digits of it: two steps an epoch


def patched(folder, *names):  # -> the module, which finds but twelve images
    (folder / 'ddpm.py').write_text(PLAIN)
    subprocess.run(['git', 'apply', *(RECIPES[name] for name in names)], check=True)
    recipe = ModuleType('recipe')
    recipe.__file__ = ddpm.__file__  # for its data
    exec((folder / 'ddpm.py').read_text(), vars(recipe))
    recipe.load_images, recipe.draw_losses = few_images, lambda *_: None
    return recipe


def test_short_and_combine_and_come_off(workdir):
    (workdir / 'ddpm.py').write_text(PLAIN)
    for pair in permutations(RECIPES, 2):
        assert RECIPES[pair[0]].read_text().count('\n+') <= 46  # one is that of +++
        applied = [name for name in pair if not subprocess.call(['git', 'apply', RECIPES[name]])]
        assert len(applied) == (1 if sorted(pair) == TARGETS else 2)
        subprocess.run(['git', 'apply', '-R', *(RECIPES[name] for name in applied)], check=True)
        assert (workdir / 'ddpm.py').read_text() == PLAIN


@pytest.mark.parametrize('name', RECIPES)
def test_trains_resumes_and_samples(name, workdir):
    recipe = patched(workdir, name)
    for path, epochs in (('once', 2), ('twice', 1), ('twice', 2)):
        recipe.train(**FEW | dict(checkpoint_path=path, num_epochs=epochs))
    assert_close(*(recipe.load_checkpoint(p)['ema'] for p in ('once', 'twice')), rtol=0, atol=0)
    x = recipe.sample(recipe.load_model('once'), 3, 4, seed=0)
    assert torch.equal(recipe.inference('once', num_steps=4, seed=0, num_images=3), x)
    ddpm.train(**FEW | dict(checkpoint_path='plain', dataset='Few'))
    for load, other in ((ddpm.load_model, 'once'), (recipe.load_model, 'plain')):
        with pytest.raises(ValueError, match='not a usable checkpoint'):
            load(other)


@pytest.mark.parametrize('name', TARGETS)
def test_target_of_who_knows_x_0(name, workdir):
    def knows_x_0(x_t, t):  # v is the derivative of x_t = x_0 cos(phi) + eps sin(phi)
        cos, sin = phi[t].cos()[:, None, None, None], phi[t].sin()[:, None, None, None]
        return (cos * x_t - x_0) / sin if name == 'cosine_v' else x_0

    recipe, (x_0, noise) = patched(workdir, name), torch.rand(2, 5, 1, 8, 8)
    phi = (scheduler := recipe.DDPM_Scheduler(50)).alpha.double().sqrt().acos()
    assert name != 'cosine_v' or (phi - torch.arange(1, 51) * torch.pi / 100).abs().max() < 0.015
    assert recipe.diffusion_loss(knows_x_0, scheduler, x_0, torch.arange(45, 50), noise) < 1e-8
    ((_, x),) = recipe.reverse_process(knows_x_0, noise, scheduler, num_steps=1)
    assert_close(x, x_0, rtol=0, atol=1e-3)


def test_paper_unet(workdir):
    """Attention is given normalised groups, and what it makes of them is added."""
    layer, seen = patched(workdir, 'paper_unet').UnetLayer(False, True, 4, 0, 2, 16), []
    layer.attention_layer.register_forward_hook(lambda _, given, out: seen.extend([*given, out]))
    x, time = torch.randn(2, 16, 8, 8), torch.ones(2, 16, 1, 1)
    (_, skip), before = layer(x, time), layer.ResBlock1(x, time)
    assert_close(seen[0], torch.group_norm(before, 4))
    assert_close(skip, layer.ResBlock2(before + seen[1], time))


@pytest.mark.parametrize('target', TARGETS)
def test_class_conditional_and_all_that_it_combines_with(target, workdir):
    recipe = patched(workdir, 'class_conditional', 'paper_unet', target)
    file = ddpm.DATA / 'MNIST/raw/train-labels-idx1-ubyte.gz'
    (workdir / 'labels').write_bytes(gzip.decompress(file.read_bytes()))
    labels, images = read_label_file('labels'), few_images() / 255
    assert torch.equal(recipe.load_digits('MNIST'), labels)
    recipe.diffusion_loss = Mock(wraps=recipe.diffusion_loss)
    recipe.train(**FEW)
    models, _, x, *_ = zip(*(call.args for call in recipe.diffusion_loss.mock_calls))
    digit = torch.cat([model.keywords['digit'] for model in models])
    true = labels[(torch.cat(x)[:, None] == images).flatten(2).all(2).int().argmax(1)]
    assert 0 < (digit == 10).sum() < 8 and torch.equal(digit, true.where(digit < 10, digit))
    model, digit = recipe.load_model(FEW['checkpoint_path']), labels[:12]
    free, asked = model(images, 5), model(images, 5, digit)
    assert_close(recipe.guided(model, digit, images, 5, 1), asked)
    assert_close(recipe.guided(model, digit, images, 5, 3), 3 * asked - 2 * free)
    recipe.images_at_once, recipe.guided = lambda *_: 2, Mock(wraps=recipe.guided)
    recipe.inference(FEW['checkpoint_path'], num_steps=1, num_images=3, digits=[3, 8])
    assert [call.args[1].tolist() for call in recipe.guided.mock_calls] == [[3, 8], [3]]
