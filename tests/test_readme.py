"""The two READMEs: one page, the same commands, names, figures and links; and what they name is
there."""

import re
from collections import Counter

import pytest
from conftest import ROOT

import ddpm

ENGLISH, CHINESE = ((ROOT / name).read_text() for name in ('README.md', 'README.zh.md'))


def blocks(text):
    return re.findall(r'^```.*?^```', text, re.M | re.S)


def spans(text):
    """What stands between backticks outside of blocks."""
    prose = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
    return Counter(' '.join(span.split()) for span in re.findall(r'`([^`]+)`', prose))


def links(text):
    """Where its links and pictures lead."""
    return re.findall(r'(?:\]\(|src=")([^)"]+)', text)


def figures(text):
    """Every number of the text, also 2.2 million and its 220 times ten thousand."""
    text = re.sub(r'\]\([^)]*\)|<img[^>]*>', ']', text)  # without where links lead
    found = Counter()
    for number, unit in re.findall(r'(\d+(?:\.\d+)*)( million| 万)?', text):
        scale = {' million': 1e6, ' 万': 1e4}.get(unit)
        found[f'{float(number) * scale:.0f}' if scale else number] += 1
    return found


def test_the_two_pages_say_the_same():
    assert blocks(ENGLISH) == blocks(CHINESE) and len(blocks(ENGLISH)) == 2
    own = {'pip install', '--index-url 镜像地址', 'pip config set global.index-url 镜像地址'}
    extra = spans(CHINESE) - spans(ENGLISH)
    assert not spans(ENGLISH) - spans(CHINESE) and set(extra) == own
    assert figures(ENGLISH) == figures(CHINESE) and len(figures(ENGLISH)) > 40
    found = [
        [link for link in links(text) if not link.startswith('README')]
        for text in (ENGLISH, CHINESE)
    ]
    assert found[0] == found[1] and len(found[0]) > 11
    assert [text.count('\n## ') for text in (ENGLISH, CHINESE)] == [7, 7]


@pytest.mark.parametrize('text', [ENGLISH, CHINESE])
def test_a_page_has_a_page(text):
    assert text.count('\n') <= 120


def test_what_they_name_is_there():
    for link in links(ENGLISH + CHINESE):
        if link.startswith('http'):
            continue
        path, _, anchor = link.partition('#')
        headings = re.findall(r'^#+ (.*)', (ROOT / path).read_text(), re.M) if anchor else ['']
        names = [re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-') for heading in headings]
        assert (ROOT / path).exists() and anchor in names, link
    numbers = {**ddpm.FULL, **ddpm.PREVIEW, **ddpm.DRAWING}
    edits = re.findall(r'^\| .*?\|', ENGLISH.split('## What to edit')[1].split('\n##')[0], re.M)
    for name in re.findall(r'`([a-z_0-9]+)[=`]', ' '.join(edits)):
        assert name in numbers, name
