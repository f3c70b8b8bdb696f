"""The speed benchmark at a tiny size: what it counts and what it writes, never how long it took."""

import itertools
import json
import sys
from importlib.metadata import version

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / 'benchmarks'))
import speed  # noqa: E402

CPU = torch.device('cpu')


def test_flops_of_the_default_unet_are_counted():
    forward, training = speed.gflop_of_image(speed.Ours(speed.SIZES['full'], CPU))
    assert forward == pytest.approx(7.26, rel=0.005)  # spec: 7.26 forward, 21.8 in training
    assert training == pytest.approx(21.8, rel=0.005)


def test_the_articles_loop_is_of_the_same_model(float32):
    size = speed.SIZES['small']
    ours, article = speed.Ours(size, CPU).model.eval(), speed.Article(size, CPU).model.eval()
    article.load_state_dict(ours.state_dict())
    x = torch.randn(3, 1, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(article(x, [0, 7, 999]), ours(x, [0, 7, 999]), atol=1e-5)


@pytest.mark.parametrize('Contestant', speed.CONTESTANTS)
def test_contestants_really_train(Contestant, monkeypatch):
    monkeypatch.setattr(
        speed, 'batches', lambda size: itertools.repeat(torch.rand(size, 1, 28, 28))
    )
    torch.manual_seed(0)
    contestant = Contestant(speed.SIZES['small'], CPU)
    updates = []
    monkeypatch.setattr(speed.ddpm.Run, 'step_done', count(speed.ddpm.Run.step_done, updates))
    before = [p.detach().clone() for p in contestant.model.parameters()]
    assert contestant.train(2, 3) > 0
    if Contestant is speed.Ours:  # ddpm.train builds its own model
        assert len(updates) == speed.WARM + 3
    else:
        assert any(not torch.equal(a, b) for a, b in zip(before, contestant.model.parameters()))


def count(function, calls):
    def counting(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return counting


def test_the_others_are_fed_mnist_in_shuffled_batches():
    x = next(speed.batches(100, workers=0))
    assert x.shape == (100, 1, 28, 28) and x.dtype == torch.float32
    assert x.min() == 0 and x.max() == 1 and 0.10 < x.mean() < 0.16  # 0.1307 of all
    train = speed.ddpm.load_images('MNIST')
    first = (x[0] * 255).round().byte()
    same = (train[:, :, 2:-2, 2:-2] == first).flatten(1).all(1)
    assert same.any() and not same[0]


@pytest.mark.parametrize('side', [32, 64])
def test_larger_images_reach_the_training_loop_as_they_are(monkeypatch, side):
    shapes, loss = [], speed.ddpm.diffusion_loss
    monkeypatch.setattr(
        speed.ddpm, 'diffusion_loss', lambda *a: shapes.append(a[2].shape[2:]) or loss(*a)
    )
    speed.Ours(speed.SIZES['small'], CPU).train(2, 1, side)
    assert set(shapes) == {(side, side)}


def test_pace_times_only_what_was_asked_for(monkeypatch):
    clock, done = iter([10.0, 16.0]), []
    monkeypatch.setattr(speed, 'now', lambda device: next(clock))
    steps = (done.append(i) for i in range(100))
    assert speed.pace(steps, 3, CPU, warm=2) == 6.0
    assert len(done) == 5


def test_the_whole_benchmark(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, 'CONTESTANTS', [speed.Ours, speed.Article])
    measure = speed.in_another_process  # one process is enough to wait for

    def once(function, name, *others):
        return measure(function, name, *others) if name == speed.Ours.name else 0.2

    monkeypatch.setattr(speed, 'in_another_process', once)
    speed.main(
        '--batch 2 --rounds 1 --steps 1 --sampling-steps 1 --seconds 0.5 --size small '
        f'--output {tmp_path}'.split()
    )
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert path.name.startswith('speed-') and result['versions']['torch'] == version('torch')
    names = [Contestant.name for Contestant in speed.CONTESTANTS]
    assert list(result['contestants']) == names
    for figures in result['contestants'].values():
        assert figures['parameters'] > 1000 and len(figures['images a second']) == 1
        assert figures['peak memory, GB'] > 0.1
    assert result['curves']['batch size']['16'] > 0 and result['curves']['image size']['32'] > 0
    out = capsys.readouterr().out
    assert all(f'| {name} | ' in out for name in names)
