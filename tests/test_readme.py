"""The two READMEs say the same, and what they name, quote and compute is the project's."""

import ast
import inspect
import re

import pytest
import torch
from conftest import ROOT

import ddpm

ENGLISH, CHINESE = ((ROOT / name).read_text() for name in ('README.md', 'README.zh.md'))
BLOCK = re.compile(r'^ *```(\w*)\n(.*?)^ *```', re.M | re.S)
LINK = re.compile(r'(?:\]\(|src=")([^)"]+)')
SOURCE = (ROOT / 'ddpm.py').read_text()


def blocks(language):
    return [code for kind, code in BLOCK.findall(ENGLISH) if kind == language]


def run(word, **names):
    """Runs the block of Python with this word in it; the names that there are then."""
    (code,) = [code for code in blocks('python') if word in code]
    exec(code.replace('num_steps=50', 'num_steps=2'), names)
    return names


def spans(page):
    """What stands between backticks outside of blocks."""
    return {' '.join(span.split()) for span in re.findall(r'`([^`]+)`', BLOCK.sub('', page))}


def form(page):
    """What is the same in both languages; also 2.2 million and 220 万."""
    text = BLOCK.sub('', page)
    prose = re.sub(r'\]\([^)]*\)|<img[^>]*>', ']', text)
    for unit, scale in ((' million', 10**6), (' 万', 10**4)):
        prose = re.sub(f'([0-9.]+){unit}', lambda m, s=scale: f'{float(m[1]) * s:.0f}', prose)
    yield [(kind, re.sub(r' *# .*', '', code)) for kind, code in BLOCK.findall(page)]
    yield [link.replace('.zh.md', '.md') for link in LINK.findall(page)]
    yield re.findall(r'^(?:#+| *- | *\d+\. )', text, re.M)
    yield [row.count('|') for row in re.findall(r'^\|.*', text, re.M)]
    yield {*re.findall(r'\d(?:[\d,.]*\d)?', prose)}


def test_the_two_pages_say_the_same():
    for english, chinese in zip(form(ENGLISH), form(CHINESE)):
        assert english == chinese and english
    own = {'pip install', '--index-url 镜像地址'}  # for a mirror near to the reader
    assert spans(CHINESE) - own == spans(ENGLISH)


def test_what_they_link_to_is_there():
    for link in LINK.findall(ENGLISH + CHINESE):
        if not link.startswith('http'):
            path, _, anchor = link.partition('#')
            heads = re.findall(r'^#+ (.*)', (ROOT / path).read_text(), re.M) if anchor else ['']
            names = [re.sub(r'[^\w -]', '', head).lower().replace(' ', '-') for head in heads]
            assert (ROOT / path).exists() and anchor in names, link


def test_what_they_name_is_there(capsys):
    """Functions, settings, flags of ddpm.py, files of commands, and the pictures of a run."""
    with pytest.raises(SystemExit):
        ddpm.main(['--help'])
    flags = {*re.findall(r'--\w+', capsys.readouterr().out)}
    functions = ddpm.train, ddpm.inference, ddpm.sample, ddpm.UNET
    settings = {name for function in functions for name in inspect.signature(function).parameters}
    known = {*vars(ddpm), *settings, *re.findall(r'\w+', ''.join(blocks('python'))), 'DataLoader'}
    for span in spans(ENGLISH) | {*''.join(blocks('sh')).splitlines()}:
        names = re.findall(r'^(?:ddpm\.(?!py))?(\w+)(?:\(.*\))?$', span)
        options = re.findall(r'^(\w+)=', span)
        given = re.findall(r'(?:^|(?<=ddpm\.py ))--\w+', span)
        assert known.issuperset(names) and flags.issuperset(given), span
        assert {*settings, 'download', 'OMP_NUM_THREADS'}.issuperset(options), span
        assert all(picture in SOURCE for picture in re.findall(r'\w+\.(?:png|gif)\b', span)), span
        for path in re.findall(r'[\w/]+\.(?:py|md|txt)\b', span):
            assert (ROOT / path).exists(), span


def test_what_the_program_says_is_quoted():
    """A setting out of range word for word, else what stands between numbers and paths."""
    for line in ''.join(blocks('')).splitlines():
        if said := re.fullmatch(r' *ddpm\.py: ((\w+) is (\S+), but .*)', line):
            with pytest.raises(ddpm.UserError, match=f'^{re.escape(said[1])}$'):
                ddpm.check_arguments(ddpm.train, {said[2]: ast.literal_eval(said[3])})
        else:
            assert all(words in SOURCE for words in re.split(r'\d+|\w+/\w+', line.strip())), line


def test_the_dozen_lines_that_are_ddpm():
    """They compute what ddpm.py computes, for a network of no great talent."""
    page, scheduler = run('eq. 14'), ddpm.DDPM_Scheduler(1000)
    network = lambda x, t: x * (t / 1000).view(-1, 1, 1, 1).sqrt() + 0.1  # noqa: E731
    x = torch.linspace(0, 1, 32).view(2, 1, 4, 4)

    def from_seed_1(function):
        torch.manual_seed(1)
        return function()

    ours = from_seed_1(lambda: (torch.randint(1000, (2,)), torch.randn_like(x)))
    loss = from_seed_1(lambda: page['loss'](network, x))
    torch.testing.assert_close(loss, ddpm.diffusion_loss(network, scheduler, x, *ours))
    sampled = from_seed_1(lambda: page['sample'](network, x))
    *_, (_, ours) = from_seed_1(lambda: [*ddpm.reverse_process(network, x, scheduler)])
    torch.testing.assert_close(sampled, ours, rtol=1e-3, atol=1e-3)


def test_the_other_blocks_of_python(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert ddpm.PRETRAINED.stat().st_size < 5_000_000
    x = run('load_model')['x']
    assert x.shape == (16, 1, 32, 32) and 0 <= x.min() < x.max() <= 1
    ddpm.check_arguments(ddpm.train, run('dict(\n    FULL,', FULL=ddpm.FULL)['PREVIEW'])
