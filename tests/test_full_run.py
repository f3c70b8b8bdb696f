"""benchmarks/full_run.py at a tiny size, on the CPU: every part, stopped and gone on with."""

import hashlib
import io
import json
import sys
import zipfile
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import ROOT, TINY

import ddpm

sys.path.append(str(ROOT / 'benchmarks'))
import full_run  # noqa: E402

UNET = dict(Channels=[2, 4], Attentions=[False] * 2, Upscales=[False, True], num_groups=1)
FULL = {**TINY, 'unet': UNET, 'dataset': 'FontDigits', 'batch_size': 500}
FULL['checkpoint_path'] = 'checkpoints/full'


def test_every_part_and_going_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ddpm, 'FULL', {**FULL, 'num_epochs': 2})
    monkeypatch.setattr(full_run, 'COMPILED', nullcontext())  # compiling takes long
    monkeypatch.setattr(full_run, 'speeds', lambda: {'images a second': 1.0})
    monkeypatch.setattr(full_run, 'LARGEST', 2000)
    monkeypatch.setattr(full_run, 'step_profile', partial(full_run.step_profile, 2, 3))

    def quality_in(steps, samples):
        if steps == ddpm.DDIM_STEPS:
            raise ImportError('no module', name='prdc')
        return {'FD': 2.0}

    monkeypatch.setattr(full_run, 'quality_in', quality_in)
    out = tmp_path / 'out'
    full_run.main([str(out), '--minutes', '0', '--weights'])  # training is stopped at once
    assert 'call again to go on' in capsys.readouterr().out
    results = json.loads((out / 'results.json').read_text())
    assert results['part-1-two-epochs']['seconds an epoch'] > 0
    shares = results['part-2-profile']['shares of the time']
    assert shares['convolutions and matrix products'] > 0.05
    assert sum(shares.values()) == pytest.approx(1)
    assert 'part-4-whole-run' not in results

    assert not full_run.main([str(out), '--weights'])
    said = capsys.readouterr().out
    assert 'part-1-two-epochs: done before' in said
    assert 'part-7-quality-50: skipped, prdc is not installed' in said
    results = json.loads((out / 'results.json').read_text())
    assert len(results['part-4-whole-run']['loss of each epoch']) == 2
    assert len(results['part-4-whole-run']['seconds of each call, pictures included']) == 2
    with zipfile.ZipFile(out / 'pictures.zip') as archive:
        assert {'reverse.png', 'reverse.gif', 'grid.png', 'loss.png'} <= set(archive.namelist())

    manifest = json.loads((out / 'manifest.json').read_text())
    content = b''.join((out / name).read_bytes() for name in manifest)
    assert len(manifest) > 1 and all((out / name).stat().st_size <= 2000 for name in manifest)
    assert all(
        hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
        for name, digest in manifest.items()
    )
    saved = torch.load(io.BytesIO(content), weights_only=True)
    model = ddpm.UNET(**UNET, time_steps=20)
    assert saved['ema'].keys() == model.state_dict().keys()
    assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['full']


def test_a_failure_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ('two_epochs', 'step_profile', 'speeds', 'ten_digits'):
        monkeypatch.setattr(full_run, part, lambda: {'figure': 1})
    monkeypatch.setattr(full_run, 'whole_run', lambda deadline: 1 / 0)
    monkeypatch.setattr(full_run, 'quality_in', lambda steps, samples: {'figure': 2})
    failed = full_run.main([str(tmp_path / 'out')])
    assert list(failed) == ['part-4-whole-run'] and 'ZeroDivisionError' in str(failed)
    results = json.loads((tmp_path / 'out/results.json').read_text())
    assert results['failed'] == failed and results['part-7-quality-50']['figure'] == 2
