"""docs/ddpm.md and docs/ddpm.zh.md: what they quote, run, show and measure is the project's own,
and both say the same."""

import json
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT, small_unet

import ddpm

DOCS = ROOT / 'docs'
ENGLISH, CHINESE = PAGES = [(DOCS / name).read_text() for name in ('ddpm.md', 'ddpm.zh.md')]
BOTH = pytest.mark.parametrize('page', PAGES, ids=['en', 'zh'])
FENCE = re.compile(r'^```(\S+)\n(.*?)^```$', re.M | re.S)
RUN = re.compile(r'^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?', re.M | re.S)
DISPLAYED = re.compile(r'^\$\$\n(.*?)\n\$\$$', re.M | re.S)
INLINE = re.compile(r'\$([^$\n]+)\$')
ABLATIONS = json.loads((ROOT / 'benchmarks/results/ablations.json').read_text())


def sections(page):
    """The heading and the text of each section, by its number."""
    parts = re.split(r'^## (\d+)\. (.*)\n', page, flags=re.M)
    return {int(n): (head, text) for n, head, text in zip(parts[1::3], parts[2::3], parts[3::3])}


def tables(text):
    """Each table as a list of rows of cells."""
    found = re.findall(r'(?:^\|.*\n)+', text, re.M)
    return [[re.split(r'\s*\|\s*', row)[1:-1] for row in table.splitlines()] for table in found]


# ---- Code and figures: of the English page; the Chinese one has the same ------------------------


def test_what_is_quoted_is_in_ddpm_py():
    """Line by line as it stands; `# ...` is for 1 to 15 lines left out."""
    quotes = [text for language, text in FENCE.findall(ENGLISH) if language == 'py']
    assert len(quotes) > 8
    for quote in quotes:
        head, *lines = quote.splitlines()
        skip = r'(?:.*\n){1,15}?'
        lines = [skip if line.strip() == '# ...' else re.escape(line) + r'\n' for line in lines]
        found = re.search('^' + ''.join(lines), (ROOT / 'ddpm.py').read_text(), re.M)
        assert head == '# from ddpm.py' and found, quote


def test_all_other_blocks_print_what_the_page_says(tmp_path, monkeypatch, capsys, float32):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    blocks, names = RUN.findall(ENGLISH), {}
    kinds = Counter(language for language, _ in FENCE.findall(ENGLISH))
    assert set(kinds) == {'shell', 'py', 'python', 'text'}
    assert kinds['python'] == len(blocks) and kinds['text'] == sum(bool(out) for _, out in blocks)
    assert ENGLISH.count('\n```') == 2 * kinds.total()
    for code, output in blocks:
        if by_hand := 'temp * model' in code:  # the loop of section 9: all steps, a small network
            model = names['model']
            names['model'] = small_unet(time_steps=model.time_steps)
        exec(compile(code, 'docs/ddpm.md', 'exec'), names)
        assert capsys.readouterr().out == output, code
        if by_hand:  # "reverse_process does the same"
            noise = torch.randn(names['z'].shape, generator=torch.manual_seed(0))
            *_, (t, x) = ddpm.reverse_process(names['model'], noise, names['scheduler'])
            assert t == 0 and (x - names['z']).abs().max() < 1e-3
            names['model'] = model


def test_every_figure_is_made_and_shown(monkeypatch):
    files = [path for path in (DOCS / 'figures').iterdir() if not path.name.startswith('recipe_')]
    assert sorted(parts(ENGLISH)['figures']) == sorted(path.name for path in files)
    assert sum(path.stat().st_size for path in files) < 3e6
    monkeypatch.setattr(ddpm, 'best_device', ddpm.best_device)  # figures.py sets it
    monkeypatch.syspath_prepend(DOCS)
    import figures

    made = {f'{function.__name__}.png' for function in figures.FIGURES} - {'article_samples.png'}
    assert made | {'grid.png', 'reverse.png', 'reverse.gif'} == {path.name for path in files}


@BOTH
def test_what_the_pages_link_to_is_there(page):
    links = [link for link in re.findall(r'\]\(([^)]+)\)', page) if not link.startswith('http')]
    assert len(links) > 20 and all((DOCS / link).exists() for link in links), links


# ---- Two languages ------------------------------------------------------------------------------


def parts(text):
    """What a section has in either language."""
    text = FENCE.sub('', text).replace('2.2 million', '220 万')
    plain = re.sub(r'\]\([^)]*\)|`[^`]*`', ' ', INLINE.sub(' ', DISPLAYED.sub(' ', text)))
    return {
        'displayed formulas': DISPLAYED.findall(text),
        'inline formulas': Counter(INLINE.findall(DISPLAYED.sub('', text))),
        'numbers': Counter(re.findall(r'\d+(?:,\d{3})*(?:\.\d+)?%?', plain)),
        'figures': re.findall(r'!\[[^]]+\]\(figures/([^)]+)\)', text),
        'captions': text.count('\n\n> '),
        'tables': [[len(row) for row in table] for table in tables(text)],
    }


def test_both_have_the_same_blocks_formulas_figures_tables_and_numbers():
    assert FENCE.findall(ENGLISH) == FENCE.findall(CHINESE)
    english, chinese = map(sections, PAGES)
    assert [*english] == [*chinese] == [*range(13)] and parts(ENGLISH)['numbers'].total() > 150
    # the article's headings stand in brackets behind the page's
    articles = {2: '扩散模型原理', 4: '扩散模型原理', 5: '扩散模型原理、训练代码', 9: '推理'}
    articles |= {6: '扩散模型原理、推理', 7: 'Unet、模型代码实现', 8: '训练代码'}
    for n, (head, text) in english.items():
        assert parts(text) == parts(chinese[n][1]), n
        bracket = articles.get(n, '')
        assert ''.join(re.findall(r'\(([^)]+)\)$', head)) == bracket.replace('、', ', ')
        assert ''.join(re.findall(r'（([^）]+)）$', chinese[n][0])) == bracket


@BOTH
def test_formulas_are_written_as_github_needs_them(page):
    """Its Markdown eats a backslash before all but letters, may take `}_ ... _{` for emphasis,
    and sees no formula behind a letter, a bracket or a full-width sign."""
    displayed, inline = (parts(page)[f'{kind} formulas'] for kind in ('displayed', 'inline'))
    assert len(displayed) == 13 and inline.total() > 50
    for formula in (*displayed, *inline):
        assert not re.search(r'\\[^A-Za-z]|}_|[*<>|]', formula), formula
        assert formula.isascii() and formula == formula.strip()
    assert page.count('\n\n$$\n') == len(displayed) == page.count('\n$$\n\n')
    text = DISPLAYED.sub('', FENCE.sub('', page))
    for before, after in re.findall(r'(^|.)\$[^$\n]+\$(.|$)', text, re.M):
        assert before in ('', ' ') and after in ('', *' ,.;:?!，。；：？！、）)'), (before, after)


# ---- Measured and computed ----------------------------------------------------------------------


def score(change, name='FD / floor', form='.3g'):
    return format(ABLATIONS['changes'][change]['scores'][name], form)


def recall(change):
    return score(change, 'recall', '.0%')


@BOTH
def test_the_table_of_ablations_is_that_of_the_file(page):
    rows = tables(page.split('<!-- table ablations -->\n')[1])[0][2:]
    assert len(rows) == 20
    for _, name, _, *measured, seen in rows:
        name = name.strip('`')
        assert measured == [score(name), recall(name)]
        words = {'Seen': ('yes', '有'), 'Noth': ('no', '无'), '': ('',)}
        assert seen in words[ABLATIONS['changes'][name]['seen'][:4]], name


def claims():
    """What the text says in passing, by section, as it follows from the code and the file."""
    model, base = ddpm.load_model(ddpm.PRETRAINED), score('the baseline')
    preview, ablation = ddpm.PREVIEW, ABLATIONS['baseline']
    millions = f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}'
    yield 0, (f'{millions} million', f'{100 * float(millions):.0f} 万'), str(model.time_steps), base
    left = [f'{ddpm.DDPM_Scheduler(T).alpha[-1].sqrt():.0%}' for T in (100, model.time_steps)]
    yield 2, *left, f'{ddpm.DDPM_Scheduler().beta.sum():.0f}'
    beta, abar = ddpm.DDPM_Scheduler()(torch.arange(1000))
    weight = abar[:-1].sqrt() * beta[1:] / (1 - abar[1:])  # of x_0 in a step from t = 1, 2 ...
    yield 4, *(f'{weight[t - 1]:.2f}' for t in (1, 10, 100))
    yield 5, score('predicts x_0'), base
    yield 6, score('no noise added'), base, recall('the baseline'), recall('no noise added')
    abar = ddpm.DDPM_Scheduler(500).alpha
    far = 1 - ((1 - abar[:-1]) / (1 - abar[1:])).sqrt() > 0.05  # of beta-tilde's root from beta's
    yield 6, score('noise after last step'), score('sigma² = beta-tilde'), str(int(far.sum()) + 1)
    yield 7, score('no skips between halves'), recall('no skips between halves'), base
    yield 7, *map(score, ('no time embedding', 'half the lr', "the article's attention"))
    yield 7, score('attention, norm and skip')
    yield 8, score('[-1, 1] data'), score('lr constant'), base, f'{0.9999 ** (15 * 937):.1%}'
    yield 8, f'{ddpm.FULL["lr"]:.5f}', f'{preview["lr"]:.4f}', f'{ablation["lr"]:.3f}'
    sampled = ((50, 1), (20, 1), (10, 1), (50, 0))
    yield 10, base, *(score(f'DDIM {steps}, eta {eta}') for steps, eta in sampled)
    yield 11, score('x_0 clipped'), base
    for values in (ablation, preview):
        yield 12, f'{values["lr"]:.4f}'.rstrip('0'), str(values['batch_size'])
    yield 12, f'{ABLATIONS["N"]:,}'


def test_what_the_text_says_in_passing_is_so():
    for n, *figures in claims():
        for figure in figures:
            for page, one in zip(PAGES, [figure] * 2 if isinstance(figure, str) else figure):
                text = sections(page)[n][1]
                assert re.search(rf'(?<![\d.]){re.escape(one)}(?![\d]|\.\d)', text), (n, one)
