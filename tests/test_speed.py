"""The speed benchmark at a tiny size: what it counts and what it writes, never how long it took."""

import itertools
import json
import os
import sys

import pytest
import torch
from conftest import DIGITS, ROOT
from torch._subclasses import FakeTensorMode

sys.path.append(str(ROOT / 'benchmarks'))
import speed  # noqa: E402

CPU = torch.device('cpu')


def noise(batch_size):
    return itertools.repeat(torch.rand(batch_size, 1, 28, 28))


def test_flops_of_the_default_unet_are_counted():
    with FakeTensorMode():  # nothing is computed
        found = speed.gflop_of_image(speed.Ours(speed.SIZES['full'], CPU))
    assert found == pytest.approx(21.8, rel=0.005)  # three times the forward pass's 7.26


def test_the_articles_loop_is_of_the_same_model(float32):
    size = speed.SIZES['small']
    ours, article = speed.Ours(size, CPU).model.eval(), speed.Article(size, CPU).model.eval()
    article.load_state_dict(ours.state_dict())
    x = torch.randn(3, 1, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(article(x, [0, 7, 999]), ours(x, [0, 7, 999]), atol=1e-5)


@pytest.mark.parametrize('Contestant', speed.CONTESTANTS)
def test_what_is_timed_is_training_and_nothing_else(Contestant, monkeypatch):
    """The clock is read after the steps that warm up and after those that are asked for."""
    done, read, step_done = [], [], speed.ddpm.Run.step_done

    def batches(size):
        for x in noise(size):
            done.append(1)
            yield x

    def counted(run, loss):
        step_done(run, loss)
        done.append(1)

    monkeypatch.setattr(speed.ddpm.Run, 'step_done', counted)
    monkeypatch.setattr(speed, 'batches', batches)
    monkeypatch.setattr(speed, 'now', lambda device: read.append(len(done)) or 10.0 * len(read))
    contestant = Contestant(speed.SIZES['small'], CPU)
    before = [p.detach().clone() for p in contestant.model.parameters()]
    assert contestant.train(2, 1) == 10
    assert read[1] - read[0] == 1 and read[0] >= speed.WARM - 1
    ours = Contestant is speed.Ours  # ddpm.train builds its own model
    after = contestant.model.parameters()
    assert ours or any(not torch.equal(a, b) for a, b in zip(before, after))


def test_the_others_are_fed_shuffled_digits(monkeypatch):
    images = torch.nn.functional.pad(DIGITS, [2] * 4)
    monkeypatch.setattr(speed.ddpm, 'load_images', lambda name: images)
    x = next(speed.batches(100, workers=0)) * 255
    order = [(DIGITS == digit.round()).flatten(1).all(1).nonzero().item() for digit in x]
    assert sorted(order) == [*range(100)] != order


def test_memory_is_that_of_a_process_of_its_own():
    assert speed.in_another_process(os.getpid) != os.getpid()
    assert 0.1 < speed.peak_memory(speed.Ours, 'small', CPU, 2) < 10  # in GB


def test_the_whole_benchmark_and_what_it_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, 'in_another_process', lambda function, *arguments: 0.25)
    monkeypatch.setattr(speed, 'matrix_rate', lambda device: 0.5)
    monkeypatch.setattr(speed, 'batches', noise)
    monkeypatch.setattr(speed, 'CONTESTANTS', [speed.Ours, speed.Article])
    monkeypatch.setattr(speed, 'RESULT', tmp_path / 'speed.json')
    speed.RESULT.write_text('{"a machine": 1}')
    speed.main('--batch 2 --rounds 1 --steps 1 --sampling-steps 1 --size small'.split())
    before, result = json.loads(speed.RESULT.read_text()).values()
    assert before == 1 and list(result['contestants']) == ['ddpm.py', "the article's"]
    ours, article = result['contestants'].values()
    assert {len(value) for value in article.values() if isinstance(value, list)} == {1}
    ours['images a second'], article['images a second'] = [8.0, 6.0, 9.0], [4.0, 6.0, 3.0]
    for name in ('ten digits, 1000 steps, seconds', 'ten digits, 50 steps, seconds'):
        ours[name], article[name] = [2.0, 2.0, 2.0], [5.0, 6.0, 8.0]
    text = speed.report(result)
    assert '2.00 (1.00 to 3.00)' in text and '3.00 (2.50 to 4.00)' in text
    assert "| the article's | " in capsys.readouterr().out
