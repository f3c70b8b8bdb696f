"""docs/ddpm.md and docs/ddpm.zh.md: what they quote, run, show and measure is the project's own,
and both say the same."""

import contextlib
import importlib.util
import io
import json
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT

import ddpm

DOCS = ROOT / 'docs'
ENGLISH, CHINESE = PAGES = [(DOCS / name).read_text() for name in ('ddpm.md', 'ddpm.zh.md')]
BOTH = pytest.mark.parametrize('page', PAGES, ids=['en', 'zh'])
FENCE = re.compile(r'^```(\S+)\n(.*?)^```$', re.M | re.S)


def fences(page):
    """Every block as (language, text)."""
    return FENCE.findall(page)


def sections(page):
    """The heading and the text of each section, by its number."""
    parts = re.split(r'^## (\d+)\. (.*)\n', page, flags=re.M)
    return {int(n): (head, text) for n, head, text in zip(parts[1::3], parts[2::3], parts[3::3])}


def prose(text):
    return FENCE.sub('', text)


def formulas(text):
    """What stands between $$ and $$, and between $ and $."""
    text = prose(text)
    displayed = re.findall(r'^\$\$\n(.*?)\n\$\$$', text, re.M | re.S)
    inline = re.findall(r'\$([^$\n]+)\$', re.sub(r'^\$\$\n.*?\n\$\$$', '', text, flags=re.M | re.S))
    return displayed, inline


def figures_of(page):
    return re.findall(r'!\[[^]]+\]\(figures/([^)]+)\)', page)


def tables(text):
    """Each table as a list of rows of cells."""
    found = re.findall(r'(?:^\|.*\n)+', text, re.M)
    return [[row.strip('|').split('|') for row in table.splitlines()] for table in found]


# ---- Code ---------------------------------------------------------------------------------------


def is_in(quote, source):
    """Whether the lines are in the source as they stand; `# ...` is for 1 to 15 lines left out."""
    lines = [
        r'(?:.*\n){1,15}?' if line.strip() == '# ...' else re.escape(line) + r'\n'
        for line in quote.splitlines()
    ]
    return re.search('^' + ''.join(lines), source, re.M) is not None


@BOTH
def test_what_is_quoted_is_in_ddpm_py(page):
    quotes = [text for language, text in fences(page) if language == 'py']
    source = (ROOT / 'ddpm.py').read_text()
    assert len(quotes) > 8
    for quote in quotes:
        head, _, lines = quote.partition('\n')
        assert head == '# from ddpm.py'
        assert is_in(lines, source), lines


def test_a_quote_that_differs_is_found():
    source = 'a = 1\nb = 2\nc = 3\n'
    assert is_in('a = 1\n# ...\nc = 3\n', source) and is_in('b = 2\n', source)
    for wrong in ('a = 2\n', 'a = 1\nc = 3\n', 'b = 2\na = 1\n', 'b = 2\n# ...\nc = 3\n', ' = 1\n'):
        assert not is_in(wrong, source)


@BOTH
def test_what_is_not_quoted_is_python_with_its_output(page):
    """And no other kind of block could escape these tests."""
    languages = [language for language, _ in fences(page)]
    assert set(languages) == {'shell', 'py', 'python', 'text'}
    for before, language in zip(['', *languages], languages):
        assert language != 'text' or before == 'python'
    assert page.count('\n```') == 2 * len(languages)


def test_the_blocks_run_and_print_what_the_page_says(tmp_path, monkeypatch, float32):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    blocks, names = fences(ENGLISH), {}
    for (language, code), after in zip(blocks, [*blocks[1:], ('', '')]):
        if language == 'python':
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, 'docs/ddpm.md', 'exec'), names)
            assert printed.getvalue() == (after[1] if after[0] == 'text' else ''), code
    # section 9: "reverse_process does the same"
    torch.manual_seed(0)
    noise = torch.randn(2, 1, 32, 32)
    *_, (t, x) = ddpm.reverse_process(names['model'], noise, names['scheduler'])
    assert t == 0 and (x - names['z']).abs().max() < 1e-3
    # section 11: the figures are made by the class and the function of the page
    for start in ('class Clipped', 'def without_chance'):
        code = next(code for _, code in blocks if code.startswith(start))
        assert code.split('\n\n\n')[0] in (DOCS / 'figures.py').read_text()


# ---- Figures ------------------------------------------------------------------------------------


def test_every_figure_is_named_once_and_none_is_left_over():
    files = [path for path in (DOCS / 'figures').iterdir()]
    assert figures_of(ENGLISH) == figures_of(CHINESE)
    assert sorted(figures_of(ENGLISH)) == sorted(path.name for path in files)
    assert sum(path.stat().st_size for path in files) < 3e6
    spec = importlib.util.spec_from_file_location('figures', DOCS / 'figures.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = {f'{function.__name__}.png' for function in module.FIGURES}
    made = made - {'article_samples.png'} | {'grid.png', 'reverse.png', 'reverse.gif'}
    assert made == {path.name for path in files}


# ---- Two languages ------------------------------------------------------------------------------


def test_both_have_the_same_sections_code_and_formulas():
    assert fences(ENGLISH) == fences(CHINESE)
    english, chinese = map(sections, PAGES)
    assert [*english] == [*chinese] == [*range(13)]
    for (_, en), (_, zh) in zip(english.values(), chinese.values()):
        assert formulas(en)[0] == formulas(zh)[0]
        assert Counter(formulas(en)[1]) == Counter(formulas(zh)[1])
        assert figures_of(en) == figures_of(zh)
        assert len(re.findall(r'\n\n> ', en)) == len(re.findall(r'\n\n> ', zh))  # captions


def test_the_articles_headings_are_the_articles():
    """They stand in brackets behind the headings, in both languages."""
    wanted = {2: '扩散模型原理', 4: '扩散模型原理', 5: '扩散模型原理, 训练代码'}
    wanted |= {6: '扩散模型原理, 推理', 7: 'Unet, 模型代码实现', 8: '训练代码', 9: '推理'}
    for number, (head, _) in sections(ENGLISH).items():
        assert ''.join(re.findall(r'\(([^)]+)\)$', head)) == wanted.get(number, '')
    for number, (head, _) in sections(CHINESE).items():
        bracket = ''.join(re.findall(r'（([^）]+)）$', head))
        assert bracket.replace('、', ', ') == wanted.get(number, '')


def numbers(text):
    """The numbers outside of blocks, formulas, links and `code`."""
    text = re.sub(r'\]\([^)]*\)|`[^`]*`|\$\$.*?\$\$|\$[^$\n]+\$', ' ', prose(text), flags=re.S)
    return Counter(re.findall(r'\d+(?:,\d{3})*(?:\.\d+)?%?', text.replace('2.2 million', '220 万')))


def test_both_have_the_same_numbers_and_tables():
    english, chinese = map(sections, PAGES)
    for n in english:
        assert numbers(english[n][1]) == numbers(chinese[n][1]), n
        shapes = [
            [[len(row) for row in table] for table in tables(page[n][1])]
            for page in (english, chinese)
        ]
        assert shapes[0] == shapes[1], n
    assert sum(numbers(ENGLISH).values()) > 150


@BOTH
def test_formulas_are_written_as_github_needs_them(page):
    """Its Markdown eats a backslash before all but letters, may take `}_ ... _{` for emphasis,
    and sees no formula behind a letter, a bracket or a full-width sign."""
    displayed, inline = formulas(page)
    assert len(displayed) == 12 and len(inline) > 50
    for formula in displayed + inline:
        assert not re.search(r'\\[^A-Za-z]|}_|[*<>|]', formula), formula
        assert formula.isascii() and formula == formula.strip()
    text = re.sub(r'^\$\$\n.*?\n\$\$$', '', prose(page), flags=re.M | re.S)
    assert page.count('\n\n$$\n') == len(displayed) == page.count('\n$$\n\n')
    for before, after in re.findall(r'(^|.)\$[^$\n]+\$(.|$)', text, re.M):
        assert before in ('', ' ') and after in ('', *' ,.;:?!，。；：？！、）)'), (before, after)


@BOTH
def test_what_the_pages_link_to_is_there(page):
    for link in re.findall(r'\]\(([^)]+)\)', page):
        if not link.startswith('http'):
            path, _, anchor = link.partition('#')
            text = (DOCS / path).read_bytes()
            headings = re.findall(r'^#+ (.*)', text.decode(), re.M) if anchor else []
            anchors = [re.sub(r'[^\w -]', '', head).lower().replace(' ', '-') for head in headings]
            assert not anchor or anchor in anchors, link


# ---- Measured -----------------------------------------------------------------------------------


def result(name):
    return json.loads((ROOT / f'benchmarks/results/{name}.json').read_text())


CHANGES = result('ablations')['changes']


def score(change):
    return f'{CHANGES[change]["scores"]["FD / floor"]:.3g}'


@BOTH
def test_the_table_of_ablations_is_that_of_the_file(page):
    table = page.split('<!-- table ablations -->\n')[1].split('\n\n')[0]
    rows = [[cell.strip() for cell in row] for row in tables(table + '\n')[0][2:]]
    assert len(rows) == 20
    for _, name, _, fd, recall, seen in rows:
        change = CHANGES[name.strip('`')]
        assert [fd, recall] == [score(name.strip('`')), f'{change["scores"]["recall"]:.0%}']
        words = {'Seen': ('yes', '有'), 'Noth': ('no', '无'), '': ('',)}[change['seen'][:4]]
        assert seen in words, name


def shipped(steps):
    """FD / floor of checkpoints/mnist, of 2,000 samples."""
    measured = result(f'quality-mnist-{steps}')['spaces']['CNN']['all']
    assert measured['N'] == 2000
    return f'{measured["FD / floor, low, high"]["samples"][0]:.2f}'


@BOTH
def test_the_table_of_fewer_steps_is_that_of_the_files(page):
    table = page.split('<!-- table steps -->\n')[1].split('\n\n')[0]
    rows = [[cell.strip() for cell in row] for row in tables(table + '\n')[0][2:]]
    measured = result('recognised')['samples of checkpoints/mnist']
    assert [steps for steps, _, _ in rows] == ['50', '30', '20', '12']
    for steps, fd, recognised in rows:
        found = measured[f'{steps} steps']
        assert fd == f'{found["FD-CNN / floor"]:.2f}'
        assert recognised == f'{found["recognised"]:.1%}'


def claims():
    """What the text says in passing, by section, as it follows from the code and the files."""
    model = ddpm.load_model(ddpm.PRETRAINED)
    left = {T: ddpm.DDPM_Scheduler(T).alpha[-1].sqrt() for T in (100, 500)}
    preview, base = ddpm.PREVIEW, score('the baseline')
    loss = result('mnist-training')['loss of epoch']['40']
    epochs = next(run for run in result('preview') if 'losses of the epochs' in run)
    recall = [CHANGES[n]['scores']['recall'] for n in ('the baseline', 'no noise added')]
    weights = sum(p.numel() for p in model.parameters())
    measured = result('recognised')
    usual = measured['samples of checkpoints/mnist'][f'{ddpm.SAMPLE["num_steps"]} steps']
    real = measured['test split']['recognised']
    millions = f'{weights / 1e6:.1f}'
    yield 0, (f'{millions} million', f'{100 * float(millions):.0f} 万'), str(model.time_steps)
    yield 0, f'{usual["FD-CNN / floor"]:.1f}', f'{usual["recognised"]:.1%}', f'{real:.1%}'
    yield 0, str(ddpm.SAMPLE['num_steps'])
    yield 2, f'{left[100]:.0%}', f'{left[500]:.0%}', f'{ddpm.DDPM_Scheduler().beta.sum():.0f}'
    yield 5, f'{epochs["losses of the epochs"][1]:.3f}', f'{float(loss):.4f}'
    yield 5, score('predicts x_0'), base
    yield 6, score('no noise added'), base, *(f'{r:.0%}' for r in recall)
    yield 6, score('noise after last step'), score('sigma² = beta-tilde')
    yield 7, score('no skips between halves'), score('no time embedding'), score('half the lr')
    yield 7, score("the article's attention"), score('attention, norm and skip')
    yield 7, f'{CHANGES["no skips between halves"]["scores"]["recall"]:.0%}', base
    yield 8, score('[-1, 1] data'), score('lr constant'), f'{0.9999 ** (15 * 937):.1%}', base
    yield 8, f'{ddpm.FULL["lr"]:.5f}', f'{preview["lr"]:.4f}', f'{ddpm.FULL["ema_decay"]:.4f}'
    yield 10, shipped('50-eta-0'), shipped(50), shipped(500), base
    yield 10, *(score(f'DDIM {steps}, eta 1') for steps in (50, 20, 10))
    yield 11, score('x_0 clipped'), base
    yield 12, base, f'{result("ablations")["N"]:,}'


def test_what_the_text_says_in_passing_is_measured():
    for section, *figures in claims():
        for figure in figures:
            for page, one in zip(PAGES, [figure] * 2 if isinstance(figure, str) else figure):
                text = sections(page)[section][1]
                assert re.search(rf'(?<![\d.]){re.escape(one)}(?![\d]|\.\d)', text), (section, one)
