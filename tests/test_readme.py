"""The two READMEs say the same: code, names, figures and links; and what they name exists."""

import re
from collections import Counter

from conftest import ROOT

import ddpm

ENGLISH, CHINESE = ((ROOT / name).read_text() for name in ('README.md', 'README.zh.md'))


def blocks(text):
    """The blocks of code, without comments, which are in the page's language."""
    found = re.findall(r'^ *```.*?^ *```', text, re.M | re.S)
    return [re.sub(r' *#(?! ?!).*', '', block) for block in found]


def prose(text):
    return re.sub(r'^ *```.*?^ *```', '', text, flags=re.M | re.S)


def spans(text):
    """What stands between backticks outside of blocks."""
    return Counter(' '.join(span.split()) for span in re.findall(r'`([^`]+)`', prose(text)))


def links(text):
    """Where its links and pictures lead."""
    return re.findall(r'(?:\]\(|src=")([^)"]+)', text)


def figures(text):
    """Every number of the prose, also 2.2 million and its 220 times ten thousand."""
    text = re.sub(r'\]\([^)]*\)|<img[^>]*>', ']', prose(text))  # without where links lead
    found = Counter()
    for number, unit in re.findall(r'(\d[\d,]*(?:\.\d+)*)( million| 万)?', text):
        scale = {' million': 1e6, ' 万': 1e4}.get(unit)
        found[f'{float(number) * scale:.0f}' if scale else number.rstrip(',')] += 1
    return found


def test_the_two_pages_say_the_same():
    assert blocks(ENGLISH) == blocks(CHINESE) and len(blocks(ENGLISH)) == 9
    own = {'pip install', '--index-url 镜像地址'}
    extra = spans(CHINESE) - spans(ENGLISH)
    assert set(extra) - own == {'outputs/检查点的名字/'}
    assert set(spans(ENGLISH) - spans(CHINESE)) == {'outputs/NAME OF THE CHECKPOINT/'}
    assert set(figures(ENGLISH)) == set(figures(CHINESE)) and len(figures(ENGLISH)) > 30
    other = {'README.md': 'README.zh.md', 'docs/ddpm.md': 'docs/ddpm.zh.md'}
    assert [other.get(link, link) for link in links(ENGLISH) if link != 'README.zh.md'] == [
        link for link in links(CHINESE) if link != 'README.md'
    ]
    assert ENGLISH.count('\n## ') == CHINESE.count('\n## ') == 12


def test_what_they_name_is_there():
    for link in links(ENGLISH + CHINESE):
        if link.startswith('http'):
            continue
        path, _, anchor = link.partition('#')
        headings = re.findall(r'^#+ (.*)', (ROOT / path).read_text(), re.M) if anchor else ['']
        names = [re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-') for heading in headings]
        assert (ROOT / path).exists() and anchor in names, link
    settings = {**ddpm.FULL, **ddpm.PREVIEW, **ddpm.SAMPLE, 'SAMPLE': 0, 'AFTER_TRAINING': 0}
    settings |= dict.fromkeys(['FULL', 'PREVIEW', 'Channels'])
    rows = re.findall(r'^\| .*?\|', ENGLISH.split('## Change things')[1].split('\n##')[0], re.M)
    named = re.findall(r'`([A-Za-z_0-9]+)[=`]', ' '.join(rows))
    assert len(named) > 15 and not set(named) - set(settings)


def test_the_lines_from_python_run(tmp_path, monkeypatch):
    """As they stand, but in three steps for time's sake."""
    (code,) = [b for b in blocks(ENGLISH) if 'load_model' in b]
    code = code.strip('`').removeprefix('python').replace('num_steps=50', 'num_steps=3')
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code, names)
    assert names['x'].shape == (16, 1, 32, 32) and 0 <= names['x'].min() <= names['x'].max() <= 1
