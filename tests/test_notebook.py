"""In a real notebook kernel: the README's cell, pictures, bars, main(), interrupt and resume."""

import asyncio
import os
import re
import subprocess
import threading
from importlib.util import find_spec
from unittest import mock

import pytest
from conftest import DIGITS, ROOT
from PIL import Image

nbclient = pytest.importorskip('nbclient')
nbformat = pytest.importorskip('nbformat')
if not find_spec('ipykernel'):  # imported, it would make this process a notebook for ddpm.py
    pytest.skip('ipykernel is not installed', allow_module_level=True)

TINY = (
    "dict(dataset='pictures', batch_size=4, num_time_steps=40, lr=1e-3, sample_every=0, unet=dict("
    'Channels=[8, 16], Attentions=[False] * 2, Upscales=[False, True], num_groups=4))'
)
CELLS = dict(
    start='import sys; sys.modules["ipywidgets"] = None',  # nobody requires it
    readme='',
    again='',
    train=f"ddpm.train(**{TINY}, checkpoint_path='a', num_epochs=20)",
    infer="x = ddpm.inference('a', num_images=8, num_steps=5); (x.shape, x.requires_grad)",
    main=f"ddpm.PREVIEW = dict({TINY}, checkpoint_path='b', num_epochs=1); out = sys.stdout\n"
    'ddpm.SAMPLE = ddpm.AFTER_TRAINING = dict(num_images=1, num_steps=3)\n'
    'ddpm.main(); ddpm.main(["--sample", "a"]); sys.stdout is out',
    run=f'%run {ROOT}/ddpm.py --sample a',
    interrupted='ddpm.draw_losses = lambda *_: None  # it takes longer than the training\n'
    f"ddpm.train(**{TINY}, checkpoint_path='c', num_epochs=9999, save_minutes=0)",
    steps='import torch; len(torch.load("c")["losses"])',
    resume=f"ddpm.train(**{TINY}, checkpoint_path='c', num_epochs=1)",
    file='ddpm.__file__',
)


def cell_of_the_readme(place):
    """With a clone of this folder, a stub for the drive, and settings for seconds."""
    pages = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
    code = r'```python\n(from google.colab.*?)```'
    cell, *_ = [cell for page in pages for cell in re.findall(code, page.read_text(), re.S)]
    for folder in ('google/colab', 'drive/MyDrive/pictures', 'repository'):
        (place / folder).mkdir(parents=True)
    (place / 'google/colab/drive.py').write_text('def mount(place): print("mounted", place)')
    (place / 'repository/ddpm.py').write_bytes((ROOT / 'ddpm.py').read_bytes())
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', str(place / 'repository')]
    for command in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'a']):
        subprocess.run([*git, *command], check=True)
    for i, digit in enumerate(DIGITS[:8]):
        Image.fromarray(digit[0].numpy()).save(place / f'drive/MyDrive/pictures/{i}.png')
    for old, new in {
        'REPOSITORY': str(place / 'repository'),
        '!pip': '#',
        '/content': str(place),
        'num_epochs=75': f'num_epochs=2, **{TINY}',
        "ddpm.inference('checkpoints/ddpm')": "ddpm.inference('checkpoints/ddpm', num_images=4)",
    }.items():
        assert old in cell
        cell = cell.replace(old, new)
    return cell


@pytest.fixture(scope='module')
def notebook(tmp_path_factory):
    """The outputs of each cell, and the folder where the kernel was started."""
    place = tmp_path_factory.mktemp('notebook')
    readme = cell_of_the_readme(place)
    cells = [nbformat.v4.new_code_cell(cell or readme) for cell in CELLS.values()]

    def interrupt():
        while not (place / 'drive/MyDrive/c').exists():  # the first save of what is interrupted
            threading.Event().wait(0.05)
        asyncio.run(client.km.interrupt_kernel())

    def on_cell_execute(cell, cell_index):
        if [*CELLS][cell_index] == 'interrupted':
            threading.Thread(target=interrupt, daemon=True).start()

    book, resources = nbformat.v4.new_notebook(cells=cells), {'metadata': {'path': str(place)}}
    client = nbclient.NotebookClient(book, timeout=300, allow_errors=True, resources=resources)
    client.on_cell_execute = on_cell_execute
    with mock.patch.dict(os.environ):
        del os.environ['MPLBACKEND']  # the kernel chooses
        client.execute()
    return place, dict(zip(CELLS, (cell.outputs for cell in cells)))


def text(outputs):
    return ''.join(output.get('text', '') for output in outputs)


def errors(outputs):
    return [output.ename for output in outputs if output.output_type == 'error']


def test_the_cell_of_the_readme(notebook):
    """Run twice: no warning, the second resumes."""
    place, outputs = notebook
    assert not errors(outputs['readme']) and 'Warning' not in text(outputs['readme'])
    assert not errors(outputs['again']) and 'resumed after step 4 of 4' in text(outputs['again'])
    assert str(place / 'ddpm-mnist/ddpm.py') in str(outputs['file'])
    drive = place / 'drive/MyDrive'
    assert (drive / 'checkpoints/ddpm').exists() and (drive / 'outputs/ddpm/grid.png').exists()
    assert not (place / 'ddpm-mnist/ddpm-mnist').exists()


def test_pictures_are_shown_once_and_bars_keep_to_their_line(notebook):
    """As one sees them: \\r starts a line anew, and all that is printed is one stream."""
    train, infer = (notebook[1][name] for name in ('train', 'infer'))
    assert not errors(train + infer)
    assert sum('image/png' in output.get('data', '') for output in train + infer) == 2
    assert '(torch.Size([8, 1, 32, 32]), False)' in str(infer)
    assert {output.get('name') for output in train} == {'stdout'}
    lines = [line.rstrip('\r').split('\r')[-1].strip() for line in text(train + infer).split('\n')]
    bars = [line for line in lines if '%|' in line]  # reading, training, sampling
    assert len(bars) == 3 and all('100%|' in bar for bar in bars), lines
    assert sum(bool(re.fullmatch(r'Epoch \d+ \| Loss [\d.]+', line)) for line in lines) == 20


def test_main_and_run(notebook):
    """They read no arguments of the kernel's, and sys.stdout is the kernel's again."""
    main, run = (notebook[1][name] for name in ('main', 'run'))
    assert not errors(main + run) and main[-1].data['text/plain'] == 'True'
    assert 'b is trained for 1 epochs' in text(main) and text(main).count('Saved in outputs') == 2
    assert 'Saved in outputs/_/a' in text(run)


def test_interrupted_and_run_again_it_resumes(notebook):
    interrupted, steps, resume = (notebook[1][name] for name in ('interrupted', 'steps', 'resume'))
    saved = steps[-1].data['text/plain']
    assert errors(interrupted) == ['KeyboardInterrupt'] and not errors(resume)
    assert f'Stopped after step {saved} of' in interrupted[-1].evalue
    assert f'resumed after step {saved} of' in text(resume)
