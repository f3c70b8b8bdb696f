"""The speed benchmark at a tiny size: what it counts and what it writes, never how long it took."""

import itertools
import json
import sys

import torch
from conftest import ROOT

sys.path.append(str(ROOT / 'benchmarks'))
import speed  # noqa: E402

CPU = torch.device('cpu')


def noise(batch_size):
    return itertools.repeat(torch.rand(batch_size, 1, 28, 28))


def test_the_articles_loop_is_of_the_same_model(float32):
    size = speed.SIZES['small']
    ours, article = speed.Ours(size, CPU).model.eval(), speed.Article(size, CPU).model.eval()
    article.load_state_dict(ours.state_dict())
    x = torch.randn(3, 1, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(article(x, [0, 7, 999]), ours(x, [0, 7, 999]), atol=1e-5)


def test_the_whole_benchmark_and_what_it_reports(tmp_path, capsys, monkeypatch):
    # else another process, so that the memory is its own
    monkeypatch.setattr(speed, 'in_another_process', lambda function, *given: function(*given))
    monkeypatch.setattr(speed, 'matrix_rate', lambda device: 0.5)
    monkeypatch.setattr(speed, 'batches', noise)
    monkeypatch.setattr(speed, 'CONTESTANTS', [speed.Ours, speed.Article])
    monkeypatch.setattr(speed, 'RESULT', tmp_path / 'speed.json')
    speed.RESULT.write_text('{"a machine": 1}')
    speed.main('--batch 2 --rounds 1 --steps 1 --sampling-steps 1 --size small'.split())
    before, result = json.loads(speed.RESULT.read_text()).values()
    assert before == 1 and list(result['contestants']) == ['ddpm.py', "the article's"]
    ours, article = result['contestants'].values()
    ours['images a second'], article['images a second'] = [8.0, 6.0, 9.0], [4.0, 6.0, 3.0]
    for name in ('ten digits, 1000 steps, seconds', 'ten digits, 50 steps, seconds'):
        ours[name], article[name] = [2.0, 2.0, 2.0], [5.0, 6.0, 8.0]
    text = speed.report(result)
    assert '2.00 (1.00 to 3.00)' in text and '3.00 (2.50 to 4.00)' in text
    assert "| the article's | " in capsys.readouterr().out
