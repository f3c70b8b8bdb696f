"""benchmarks/full_run.py at a tiny size, on the CPU: every part, stopped and resumed."""

import hashlib
import json
import sys
import zipfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS, ROOT, TINY, small_unet
from PIL import Image

import ddpm

sys.path.append(str(ROOT / 'benchmarks'))
import full_run  # noqa: E402

UNET = dict(Channels=[2, 4], Upscales=[False, True], num_groups=1, num_heads=2)
UNET['Attentions'] = [False, True]
FULL = {**TINY, 'unet': UNET, 'checkpoint_path': 'checkpoints/full'}


@pytest.fixture
def tiny_full(workdir, monkeypatch):
    """FULL for a tiny UNET and a few digits; nothing is really compiled."""
    monkeypatch.setattr(ddpm, 'FULL', FULL)
    monkeypatch.setattr(full_run, 'COMPILED', nullcontext())
    monkeypatch.setattr(full_run, 'BACKEND', 'eager')
    full_run.PARTS.mkdir(parents=True)
    return F.pad(DIGITS[:60], [2] * 4)


def test_every_part_and_resuming(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'pictures').mkdir()  # six steps an epoch
    for i, digit in enumerate(DIGITS[:24, 0].numpy()):
        Image.fromarray(digit).save(tmp_path / f'pictures/{i}.png')
    monkeypatch.setattr(ddpm, 'FULL', {**FULL, 'dataset': 'pictures'})
    monkeypatch.setattr(full_run, 'COMPILED', nullcontext())  # compiling takes long
    monkeypatch.setattr(full_run, 'speeds', lambda: {'images a second': 1.0})
    monkeypatch.setattr(full_run, 'LARGEST', 2000)
    monkeypatch.setattr(full_run, 'step_profile', partial(full_run.step_profile, 2, 3))
    monkeypatch.setattr(full_run, 'tried', lambda name: {'milliseconds a step': 1.0})

    def quality_in(steps, samples):
        if steps == 50:
            raise ImportError('no module', name='prdc')
        return {'FD': 2.0}

    monkeypatch.setattr(full_run, 'quality_in', quality_in)
    out = tmp_path / 'out'
    monkeypatch.setattr(full_run, 'BACKEND', 'eager')
    full_run.main([str(out), '--minutes', '0', '--weights', '0'])  # training is stopped at once
    assert 'run again to resume' in capsys.readouterr().out
    assert not any('part' in name for name in json.loads((out / 'results.json').read_text()))
    assert not (out / 'manifest.json').exists()

    monkeypatch.setitem(full_run.LONG, 'part-04-quality-1000', 1000)
    assert not full_run.main([str(out)])
    assert 'part-04-quality-1000: too little time is left' in capsys.readouterr().out
    assert not full_run.main([str(out), '--weights', *map(str, range(100))])  # it is the first now
    said = capsys.readouterr().out
    assert 'part-01-whole-run: done before' in said
    assert 'part-03-quality-50: skipped, prdc is not installed' in said
    results = json.loads((out / 'results.json').read_text())
    assert results['part-06-two-epochs']['seconds an epoch'] > 0
    shares = results['part-07-profile']['shares of the time']
    assert shares['convolutions and matrix products'] > 0.05
    assert sum(shares.values()) == pytest.approx(1)
    assert results['part-09-attention']['largest of each layer']['Layer2.attention_layer']['q'] > 0
    assert len(results['part-01-whole-run']['loss of each epoch']) == 2
    assert len(results['part-01-whole-run']['seconds of each call, pictures included']) == 2
    choices = [name[8:].replace(', ', ': ', 1) for name in results if 'part-' in name][8:]
    assert choices == [*full_run.CHOICES]
    assert full_run.LONG.keys() <= results.keys()
    with zipfile.ZipFile(out / 'pictures.zip') as archive:
        drawn = {f'full/{name}' for name in ('reverse.png', 'reverse.gif', 'grid.png', 'loss.png')}
        assert {*drawn, 'full_run/ten_digits/full/grid.png'} <= set(archive.namelist())
        pictures = [
            Image.open(archive.open(f'{folder}full/grid.png')).size
            for folder in ('', 'full_run/ten_digits/')
        ]
    assert pictures[0][1] > pictures[1][1]  # 64 digits of the whole run and 10 of the other
    trained = results['part-05-attention-trained']
    assert trained['ema']['Layer2.attention_layer'].keys() == {'q', 'k'}
    assert 'failed' not in results

    manifest = json.loads((out / 'manifest.json').read_text())
    content = b''.join((out / name).read_bytes() for name in manifest)
    assert len(manifest) > 1 and all((out / name).stat().st_size <= 2000 for name in manifest)
    assert all(
        hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
        for name, digest in manifest.items()
    )
    (tmp_path / 'joined').write_bytes(content)
    ddpm.inference('joined', num_steps=2, num_images=1)
    assert sorted(p.name for p in (tmp_path / 'checkpoints').glob('*[!k]')) == ['full']

    # on another machine
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    monkeypatch.setattr(full_run, 'quality_in', lambda *_: {'FD': 3.0})
    monkeypatch.setattr(full_run.speed, 'processor', lambda: 'another')
    assert not full_run.main(['out', '--after', str(out / 'results.json'), '--weights', '0'])
    parts = json.loads(Path('out/results.json').read_text())
    new = parts.pop('part-03-quality-50')
    assert parts == results | {'machine': 'another'}
    assert (new['FD'], new['measured on']) == (3.0, 'another')


def test_controls_out_of_order_are_part_of_what_was_measured(tiny_full, monkeypatch):
    quality = pytest.importorskip('quality')

    def measured():
        (full_run.PARTS / 'quality-full-50.json').write_text('{"broken": ["a < b"]}')
        raise SystemExit('quality.py: controls out of order')

    monkeypatch.setattr(quality, 'main', measured)
    assert full_run.quality_in(50, 100) == {'broken': ['a < b']}
    monkeypatch.setattr(quality, 'main', lambda: sys.exit('quality.py: no checkpoint'))
    with pytest.raises(SystemExit, match='no checkpoint'):
        full_run.quality_in(50, 100)


def test_a_part_that_was_cut_off_begins_anew(tiny_full):
    clock = full_run.train_and_watch(1)
    (full_run.PARTS / 'checkpoint').write_bytes(b'of a call that ended')
    assert len(full_run.train_and_watch(1)) == len(clock) > 1


def test_an_exported_file_samples_what_its_checkpoint_does(tiny_full):
    ddpm.train(**ddpm.FULL)
    full_run.main(['--export', 'checkpoints/full', 'small'])
    small, whole = ddpm.load_checkpoint('small'), ddpm.load_checkpoint('checkpoints/full')
    raw = torch.load('small', weights_only=True)
    assert raw.keys() == {'unet', 'ema', 'config'}
    assert {value.dtype for value in raw['ema'].values()} == {torch.float16}
    assert small['unet'] == whole['unet'] and small['config'] == whole['config']
    for name, value in small['ema'].items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, whole['ema'][name], rtol=1e-3, atol=1e-7)
    assert not torch.equal(
        whole['ema']['module.late_conv.weight'], whole['weights']['late_conv.weight']
    )
    ours, theirs = (
        ddpm.sample(ddpm.load_model(path), 4, num_steps=2, seed=1)
        for path in ('small', 'checkpoints/full')
    )
    assert (ours - theirs).abs().max() <= 2 / 255 < ours.max() - ours.min()
    with pytest.raises(SystemExit, match='^full_run.py: there is no checkpoint missing'):
        full_run.main(['--export', 'missing', 'small'])


def test_queries_and_keys_are_found_where_attention_takes_them(monkeypatch):
    model, seen = small_unet(dropout_prob=0.0), []
    attention = full_run.ddpm.F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.abs().max().item(), k.abs().max().item()))
        return attention(q, k, v, **options)

    monkeypatch.setattr(full_run.ddpm.F, 'scaled_dot_product_attention', spy)
    watcher = full_run.LargestOfAttention(model)
    for seed in range(3):
        torch.manual_seed(seed)
        model(10**-seed * torch.randn(2, 1, 32, 32), [seed])
    assert list(watcher.figures()) == ['Layer2.attention_layer']
    found = watcher.figures()['Layer2.attention_layer']
    for name, values in zip('qk', zip(*seen)):
        assert len(set(values)) == 3 and found[name] == max(values)


def test_queries_and_keys_of_training_are_those_of_the_network_that_trains(tiny_full):
    figures = full_run.attention_in_training()['largest of each layer']
    assert min(figures['Layer2.attention_layer'].values()) > 0


def test_every_choice_is_timed_for_itself(tiny_full, monkeypatch):
    def broken(*_):
        raise RuntimeError('no graphs\nhere')

    monkeypatch.setitem(full_run.CHOICES, 'broken', broken)
    assert full_run.tried('broken') == {'failed': 'RuntimeError: no graphs here'}
    for name in full_run.CHOICES.keys() - {'broken'}:
        figures = full_run.tried(name, 2)
        assert 'failed' not in figures, (name, figures)
        assert figures['milliseconds a step'] > 0 and figures['seconds to the first'] > 0


TRAINING = [name for name in full_run.CHOICES if name.startswith('training')]


@pytest.mark.parametrize('name', TRAINING)
def test_a_training_choice_computes_what_a_plain_step_does(tiny_full, float32, name):
    """The weights after three steps, from the same random numbers."""
    unet, after = {**UNET, 'dropout_prob': 0.0}, []
    for choice in (full_run.step_of, full_run.CHOICES[name]):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = ddpm.to_device(ddpm.UNET(**unet), torch.device('cpu'))
        before = [p.detach().clone() for p in model.parameters()]
        step = choice(model, tiny_full, 4)
        torch.manual_seed(1)
        losses = [step().item() for _ in range(3)]
        after.append([*model.parameters()])
    assert all(not torch.equal(a, b) for a, b in zip(before, after[1]))
    assert len(set(losses)) == 3
    torch.testing.assert_close(*after)


def test_the_benchmarks_step_averages_as_timm_does(tiny_full, monkeypatch):
    monkeypatch.setitem(ddpm.FULL, 'ema_decay', 0.75)
    model = ddpm.UNET(**UNET)
    trainer, ema = full_run.Trainer(model, tiny_full, 4), ddpm.ModelEmaV3(model, decay=0.75)
    for _ in range(3):
        trainer.step()
        ema.update(model)
    torch.testing.assert_close(trainer.ema_weights, [*ema.module.parameters()])


SAMPLING = [name for name in full_run.CHOICES if name.startswith('ten')]


@pytest.mark.parametrize('name', SAMPLING)
def test_a_sampling_choice_is_algorithm_2(tiny_full, float32, name):
    torch.compiler.reset()
    model = small_unet(**UNET, time_steps=5)
    torch.manual_seed(1)
    step = full_run.CHOICES[name](model, tiny_full, 4)
    sampled = [step().clone() for _ in range(5)][-1]
    torch.manual_seed(1)
    process = ddpm.reverse_process(model, torch.randn(10, 1, 32, 32), ddpm.DDPM_Scheduler(5))
    assert sampled.shape == (10, 1, 32, 32)
    torch.testing.assert_close(sampled, list(process)[-1][1])


def test_a_failure_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = 'two_epochs step_profile speeds tried ten_digits'.split()
    for part in (*parts, 'attention_in_training', 'attention_of_the_weights'):
        monkeypatch.setattr(full_run, part, lambda *_: {'figure': 1})
    monkeypatch.setattr(full_run, 'whole_run', lambda deadline: 1 / 0)
    monkeypatch.setattr(full_run, 'quality_in', lambda steps, samples: {'figure': 2})
    failed = full_run.main([str(tmp_path / 'out')])
    assert list(failed) == ['part-01-whole-run'] and 'ZeroDivisionError' in str(failed)
    results = json.loads((tmp_path / 'out/results.json').read_text())
    assert results['failed'] == failed and results['part-04-quality-1000']['figure'] == 2
