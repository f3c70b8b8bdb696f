"""In a real notebook kernel: pictures inline, interrupt and resume, and the README's cell."""

import asyncio
import re
import subprocess
import threading
from importlib.util import find_spec

import pytest
from conftest import DIGITS, ROOT
from PIL import Image

nbclient = pytest.importorskip('nbclient')
nbformat = pytest.importorskip('nbformat')
if not find_spec('ipykernel'):  # imported, it would make this process a notebook for ddpm.py
    pytest.skip('ipykernel is not installed', allow_module_level=True)

TINY = (
    "dict(dataset='pictures', batch_size=4, num_time_steps=20, lr=1e-3, sample_every=0, unet=dict("
    'Channels=[8, 16], Attentions=[False] * 2, Upscales=[False, True], num_groups=4))'
)


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Runs cells in a new kernel in an empty folder; returns their outputs."""
    monkeypatch.delenv('MPLBACKEND')  # the kernel chooses
    (tmp_path / 'pictures').mkdir()
    for i, digit in enumerate(DIGITS[:8]):
        Image.fromarray(digit[0].numpy()).resize((32, 32)).save(tmp_path / f'pictures/{i}.png')

    def run(*cells, interrupt_at=None):
        cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
        book = nbformat.v4.new_notebook(cells=cells)
        resources = {'metadata': {'path': str(tmp_path)}}
        client = nbclient.NotebookClient(book, timeout=120, allow_errors=True, resources=resources)
        if interrupt_at:

            def interrupt_once(cell, cell_index):
                def when_it_trains():
                    while not (tmp_path / interrupt_at).exists():
                        stop.wait(0.05)
                    asyncio.run(client.km.interrupt_kernel())

                stop = threading.Event()
                if 'FIRST' in cell.source:
                    threading.Thread(target=when_it_trains, daemon=True).start()

            client.on_cell_execute = interrupt_once
        client.execute()
        return [cell.outputs for cell in cells]

    return run


def text(outputs):
    return ''.join(output.get('text', '') for output in outputs)


def shown(outputs):
    """The lines one sees: neighbours of one stream are joined, and \\r starts a line anew."""
    streams = [('', '')]
    for output in outputs:
        name, last = output.get('name'), streams[-1]
        if name == last[0]:
            streams[-1] = name, last[1] + output.get('text', '')
        else:
            streams.append((name, output.get('text', '')))
    lines = [line for _, text in streams for line in text.split('\n')]
    return [line.rstrip('\r').split('\r')[-1].strip() for line in lines]


def errors(outputs):
    return [output.ename for output in outputs if output.output_type == 'error']


def pictures(outputs):
    return [o for o in outputs if o.output_type == 'display_data' and 'image/png' in o.data]


def test_pictures_are_inline_once_each_and_bars_keep_to_their_line(notebook):
    start = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import ddpm'
    train = f"ddpm.train(**{TINY}, checkpoint_path='a', num_epochs=20)"
    infer = "x = ddpm.inference('a', num_images=8, num_steps=5); (x.shape, x.requires_grad)"
    outputs = notebook(start, train, infer, 'ddpm.main()')
    assert [errors(output) for output in outputs] == [[], [], [], ['SystemExit']]
    assert len(pictures(outputs[1])) == 0 and len(pictures(outputs[2])) == 2
    assert '(torch.Size([8, 1, 32, 32]), False)' in str(outputs[2])
    lines = shown(outputs[1]) + shown(outputs[2])
    assert sum('%|' in line for line in lines) == 3, lines  # reading, training, sampling
    assert sum(line.startswith('Epoch ') and '| Loss' in line for line in lines) == 20
    assert 'in a notebook call ddpm.train' in str(outputs[3])


def test_interrupted_and_run_again_it_resumes(notebook):
    start = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import ddpm; '
    train = f"ddpm.train(**{TINY}, checkpoint_path='a', num_epochs=%d, save_minutes=0)"
    outputs = notebook(
        start + '"FIRST"; ' + train % 4000,
        'import torch; n = len(torch.load("a")["losses"]); n',
        train % 4000 + ' if n < 0 else print("step", n)',
        train % 1,
        interrupt_at='a',
    )
    assert errors(outputs[0]) == ['Stopped']
    (error,) = [o for o in outputs[0] if o.output_type == 'error']
    saved = int(re.search(r'Stopped after step (\d+)', error.evalue)[1])
    assert f'step {saved}\n' in text(outputs[2])
    assert len(error.traceback) < 10 and f'resumed after step {saved}' in text(outputs[3])


def test_the_cell_of_the_readme(notebook, tmp_path):
    """With a stub for the drive, a clone of this folder, and settings for seconds; run twice."""
    readme = (ROOT / 'README.md').read_text()
    (cell,) = re.findall(r'```python\n(from google.colab.*?)```', readme, re.S)
    (tmp_path / 'google/colab').mkdir(parents=True)
    (tmp_path / 'google/colab/__init__.py').write_text('')
    (tmp_path / 'google/colab/drive.py').write_text('def mount(place): print("mounted", place)')
    (tmp_path / 'drive/MyDrive').mkdir(parents=True)
    repository = tmp_path / 'repository'
    repository.mkdir()
    (repository / 'ddpm.py').write_bytes((ROOT / 'ddpm.py').read_bytes())
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', str(repository)]
    for command in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'a']):
        subprocess.run([*git, *command], check=True)
    changes = {
        'REPOSITORY': str(repository),
        '!pip': '#',
        '/content': str(tmp_path),
        'num_epochs=75': f"num_epochs=2, **{{**{TINY}, 'dataset': {str(tmp_path / 'pictures')!r}}}",
        "ddpm.inference('checkpoints/ddpm')": "ddpm.inference('checkpoints/ddpm', num_images=4)",
    }
    for old, new in changes.items():
        assert old in cell
        cell = cell.replace(old, new)
    outputs = notebook(cell, cell, 'ddpm.__file__')
    assert [errors(output) for output in outputs] == [[], [], []]
    assert (tmp_path / 'drive/MyDrive/checkpoints/ddpm').exists()
    assert (tmp_path / 'drive/MyDrive/outputs/ddpm/grid.png').exists()
    assert 'resumed after step 4 of 4' in text(outputs[1])
    assert str(tmp_path / 'ddpm-mnist/ddpm.py') in str(outputs[2])
    assert not (tmp_path / 'ddpm-mnist/ddpm-mnist').exists()
