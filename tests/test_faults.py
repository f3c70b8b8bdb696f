"""Never lose a run: it is killed, stopped and started twice, and the disk is full, at a tiny size.

`python -m pytest -s tests/test_faults.py -k killed --kills 300` is the long soak.
"""

import itertools
import os
import random
import resource
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SMALL, TINY, TINY_PREVIEW, few_images, finish, run_program, start_program
from torch.utils._pytree import tree_flatten

import ddpm

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PATH, FIRST = Path('checkpoints/tiny'), 'Stopped before the first step'
UNET = {**SMALL, 'Channels': [8, 16], 'Attentions': [False, True], 'Upscales': [False, True]}
RUN = {**TINY, 'unet': UNET, 'image_size': 16}  # of 6 steps
kill = partial(os.kill, os.getpid())
EDITS = f"""{TINY_PREVIEW}
import os, signal
ddpm.load_images = lambda *_: few_images()[..., ::2, ::2].contiguous()
ddpm.PREVIEW.update(unet={UNET}, image_size=16)
ddpm.AFTER_TRAINING['num_images'] = 1
ddpm.draw_losses = lambda *_: None  # with each save it would take longer than all else
loss, kill = ddpm.diffusion_loss, lambda number: os.kill(os.getpid(), number)
"""
LONG = EDITS + 'ddpm.PREVIEW.update(num_epochs=15, save_minutes=0, lr_decay=True)\n'


def steps(path=PATH):
    return len(ddpm.load_checkpoint(path)['losses'])


def differences(one, two):
    """How many tensors and values of two checkpoints differ, and how many there are."""
    (ours, names), (theirs, others) = tree_flatten(one), tree_flatten(two)
    assert names == others
    same = [torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(ours, theirs)]
    return same.count(False), len(same)


def at_call(monkeypatch, where, name, number, action):
    """Has the action done at that call of a function, just before it."""
    function, calls = getattr(where, name), itertools.count(1)

    def acting(*arguments, **options):
        if next(calls) == number:
            action()
        return function(*arguments, **options)

    monkeypatch.setattr(where, name, acting)


@pytest.fixture(autouse=True)
def quick(workdir, monkeypatch):
    monkeypatch.setattr(ddpm, 'load_images', lambda *_: few_images()[..., ::2, ::2].contiguous())
    monkeypatch.setattr(ddpm, 'draw_losses', lambda *_: None)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """The checkpoint of the long run when it is never stopped, and the seconds that it took."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    process, begun = start_program(folder, LONG, '--preview'), time.monotonic()
    assert finish(process, folder).returncode == 0
    return torch.load(folder / PATH), time.monotonic() - begun


@pytest.mark.parametrize('how', ['killed', 'stopped'])
def test_at_random_moments(uninterrupted, tmp_path, request, how):
    """The file is whole after each and never goes back, and the end is bit-identical."""
    rng, path, before, stops, inside, lefts = random.Random(0), tmp_path / PATH, 0, 0, 0, []
    while stops < (request.config.getoption('--kills') if how == 'killed' else 4):
        process = start_program(tmp_path, LONG, '--preview')
        process.join(rng.uniform(0, uninterrupted[1] / 3))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL if how == 'killed' else rng.choice(SIGNALS))
        end = finish(process, tmp_path)
        now = steps(path) if path.exists() else 0
        assert now >= before and 'Traceback' not in end.stderr
        if end.returncode == 130:
            last = end.stdout.splitlines()[-1]
            said = f'Stopped after step {now} of 45, saved in {PATH}: run again to resume'
            assert now == {FIRST: before, 'Stopped.': 45}.get(last, now)
            assert last in (said, FIRST, 'Stopped.')
        else:  # before and after training a signal ends the program as it ends any
            assert how == 'killed' or now in (before, 45)
            assert -end.returncode in (0, signal.SIGKILL, *(SIGNALS if how == 'stopped' else []))
        left = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in tmp_path.glob('*/*.tmp')]
        inside += left not in ([], lefts)
        stops += end.returncode != 0
        before, lefts = now if end.returncode else 0, left
        if end.returncode == 0:  # the end came first: once more from the beginning
            path.unlink()
    assert run_program(tmp_path, LONG, '--preview').returncode == 0
    differing, parts = differences(uninterrupted[0], torch.load(path))
    assert differing == 0 < parts
    assert sorted(os.listdir(path.parent)) == ['tiny', 'tiny.lock']
    print(f'\n{how} {stops} times, {inside} inside a save; {differing} of {parts} values differ')


@pytest.mark.parametrize(
    'name, fatal, saved',
    [
        ('torch.save', 'lambda state, file: file.write(b"PK") and file.flush() or kill(9)', 1),
        ('os.fsync', 'lambda file: kill(9)', 1),
        ('os.replace', 'lambda a, b: kill(9)', 1),
        ('os.replace', 'lambda a, b: usual(a, b) or kill(9)', 2),
    ],
)
def test_killed_inside_the_second_save(tmp_path, name, fatal, saved):
    """The file holds the save before it or all of this, and what is left is in nobody's way."""
    edits = f'ddpm.PREVIEW.update(save_minutes=0)\ncalls, usual, fatal = [], {name}, {fatal}\n'
    edits += f'{name} = lambda *a: calls.append(1) or (fatal if calls[1:] else usual)(*a)\n'
    assert run_program(tmp_path, EDITS + edits, '--preview').returncode == -signal.SIGKILL
    assert steps(tmp_path / PATH) == saved
    assert f'resumed after step {saved} of 6' in run_program(tmp_path, EDITS, '--preview').stdout
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['tiny', 'tiny.lock']


@pytest.mark.parametrize('signum', SIGNALS)
def test_each_signal_saves_the_step(monkeypatch, signum):
    """Also where more of them come while it saves."""
    before = signal.getsignal(signum)
    at_call(monkeypatch, ddpm, 'diffusion_loss', 2, lambda: kill(signum))
    for module, name in ((torch, 'save'), (os, 'fsync'), (os, 'replace')):
        at_call(monkeypatch, module, name, 1, lambda: kill(signum))
    said = f'^Stopped after step 2 of 6, saved in {PATH}: run again to resume$'
    with pytest.raises(KeyboardInterrupt, match=said):
        ddpm.train(**RUN)
    assert steps() == 2 and signal.getsignal(signum) is before


@pytest.mark.parametrize(
    'where, name, call, saved, said',
    [
        (ddpm.Run, 'sample_progress', 2, 3, 'Stopped after step 3 of 6'),  # after step 2 has looked
        (ddpm, 'draw_losses', 1, 6, '^$'),  # with the last save
        (ddpm, 'respace', 1, 3, 'Stopped after step 3 of 6'),  # while progress is sampled
        (ddpm, 'respace', 2, 6, 'Stopped after step 6 of 6'),
        (ddpm, 'grid', 2, 6, '^$'),  # after the last step
    ],
)
def test_a_stop_between_two_steps(monkeypatch, where, name, call, saved, said):
    """It loses no step, and samples that are on their way are given up."""
    at_call(monkeypatch, where, name, call, lambda: kill(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match=said):
        ddpm.train(**{**RUN, 'sample_every': 1})
    assert steps() == saved
    assert name != 'respace' or not Path(f'outputs/tiny/progress/epoch_00{call}.00.png').exists()


def test_progress_that_cannot_be_sampled_ends_nothing(monkeypatch, capsys):
    at_call(monkeypatch, ddpm, 'respace', 1, lambda: 1 / 0)
    ddpm.train(**{**RUN, 'sample_every': 1})
    assert steps() == 6 and 'epoch_001.00.png (ZeroDivisionError' in capsys.readouterr().out
    assert os.listdir('outputs/tiny/progress') == ['epoch_002.00.png']


@pytest.mark.parametrize('signum', SIGNALS)
@pytest.mark.parametrize('compiling', [False, True])
def test_a_stop_before_the_first_step_is_done(monkeypatch, compiling, signum):
    """There is nothing new to save: it ends at once, also in the minutes that compiling takes."""
    monkeypatch.setattr(ddpm, 'COMPILE_FROM', 6)
    monkeypatch.setattr(torch, 'compile', lambda model: model)
    ddpm.train(**{**RUN, 'num_epochs': 1})
    before = PATH.read_bytes()
    monkeypatch.setattr(torch, 'compile', lambda model: lambda *_: compiling and kill(signum))
    monkeypatch.setattr(ddpm, 'diffusion_loss', lambda *_: compiling or kill(signum))
    monkeypatch.setattr(ddpm.Run, 'step_done', lambda *_: pytest.fail('went on'))
    for path in (PATH, 'new'):  # one that is resumed, one that begins
        with pytest.raises(KeyboardInterrupt, match=f'^{FIRST}$'):
            ddpm.train(**{**RUN, 'checkpoint_path': path})
    assert PATH.read_bytes() == before and not Path('new').exists()


GONE = 'import pty\na, b = pty.openpty()\nos.dup2(b, 1), os.dup2(b, 2), os.close(b), os.close(a)\n'
NOHUP = 'signal.signal(signal.SIGHUP, signal.SIG_IGN)\n'
SENT = [('', [0, 2]), ('', [0, 15]), (GONE, [0, 1]), (NOHUP, [1, 2])]  # during steps 1 and 2


@pytest.mark.parametrize('edits, signals', SENT)
def test_the_program_saves_and_ends_with_130(tmp_path, edits, signals):
    """By SIGINT, SIGTERM, or SIGHUP as its terminal is gone; but not by one that nohup ignores."""
    signalled = f'signals = iter({signals})\n'
    signalled += 'ddpm.diffusion_loss = lambda *a: kill(next(signals)) or loss(*a)\n'
    done = run_program(tmp_path, EDITS + edits + signalled, '--preview')
    assert (done.returncode, steps(tmp_path / PATH)) == (130, 2)
    said = f'Stopped after step 2 of 6, saved in {PATH}: run again to resume'
    assert edits == GONE or done.stdout.splitlines()[-1] == said
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'outputs/tiny/grid.png').exists()


def test_ctrl_c_while_sampling(tmp_path):
    edits = 'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # as Python starts
    edits += 'ddpm.draw_reverse = lambda *_: kill(signal.SIGINT)'
    done = run_program(tmp_path, EDITS + edits, '--preview')
    assert (done.returncode, done.stdout.splitlines()[-1]) == (130, 'Stopped.')


def test_two_runs_on_one_checkpoint(workdir, monkeypatch):
    """However its path is written. A run that is dead keeps nobody out, a link stays one."""
    monkeypatch.setenv('HOME', str(workdir))
    Path('sub').mkdir()
    for link, target in (('link', PATH), ('sub/link', '../link'), ('folder', 'checkpoints')):
        Path(link).symlink_to(target)
    edits = 'ddpm.diffusion_loss = lambda *_: open("training", "x") and signal.pause()'
    first = start_program(workdir, EDITS + edits, '--preview')
    try:
        while not Path('training').exists():
            assert first.is_alive()
            time.sleep(0.01)
        ways = [str(PATH), './checkpoints/../checkpoints/tiny', PATH.absolute(), '~/folder/tiny']
        for path in (*ways, 'link', 'sub/link'):
            with pytest.raises(ddpm.UserError, match='^another run uses .*change checkpoint_path$'):
                ddpm.train(**{**RUN, 'checkpoint_path': path})
        ddpm.train(**{**RUN, 'checkpoint_path': 'checkpoints/other'})
    finally:
        first.kill()
        first.join()
    ddpm.train(**{**RUN, 'checkpoint_path': 'sub/link'})
    assert Path('link').is_symlink() and Path('sub/link').is_symlink() and steps() == 6
    assert sorted(os.listdir('checkpoints')) == ['other', 'other.lock', 'tiny', 'tiny.lock']


@pytest.mark.parametrize('path', ['link', 'loop', 'folder/tiny'])
def test_a_link_that_leads_nowhere_is_refused_at_the_start(monkeypatch, path):
    for link, target in (('link', 'gone/tiny'), ('loop', 'loop'), ('folder', 'gone')):
        Path(link).symlink_to(target)
    monkeypatch.setattr(ddpm, 'best_device', lambda: pytest.fail('began'))
    with pytest.raises(ddpm.UserError, match='cannot be written .*: change checkpoint_path$'):
        ddpm.train(**{**RUN, 'checkpoint_path': path})
    assert Path(path).parts[0] in os.listdir() and not Path('gone').exists()


def test_a_full_disk_in_mid_run(monkeypatch, capsys):
    """It has no room for the first two saves; training goes on, and later ones are written."""
    ddpm.train(**{**RUN, 'num_epochs': 1})
    before, (soft, hard) = PATH.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def room(size):
        assert PATH.read_bytes() == before
        assert sorted(os.listdir('checkpoints')) == ['tiny', 'tiny.lock']
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    at_call(monkeypatch, ddpm, 'save_checkpoint', 1, lambda: room(len(before) // 2))
    at_call(monkeypatch, ddpm, 'save_checkpoint', 3, lambda: room(soft))
    try:
        ddpm.train(**{**RUN, 'save_minutes': 0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    said = f'cannot write {PATH}: what it held before is unharmed ('
    assert capsys.readouterr().out.count(said) == 2 and steps() == 6


@pytest.mark.parametrize('stop', [None, (os, 'fsync'), (ddpm, 'draw_losses')])
@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('no')])
def test_no_room_for_the_last_save(monkeypatch, error, stop):
    """That of the last step, or of a stop that comes in a save which fails or just after it: it is
    an error, and nothing is called saved."""
    ddpm.train(**{**RUN, 'num_epochs': 1})
    before = PATH.read_bytes()

    def fail(file):
        raise error

    monkeypatch.setattr(os, 'fsync', fail)
    if stop:
        at_call(monkeypatch, *stop, 1, lambda: kill(signal.SIGINT))
    monkeypatch.setattr(ddpm.Run, 'sample_progress', lambda run: stop and pytest.fail('went on'))
    with pytest.raises(ddpm.UserError, match=f'^cannot write {PATH} .*is unharmed$'):
        ddpm.train(**{**RUN, 'save_minutes': 0 if stop else 2})
    assert PATH.read_bytes() == before
    assert sorted(os.listdir('checkpoints')) == ['tiny', 'tiny.lock']


def test_a_save_that_failed_is_made_again_for_a_stop(monkeypatch):
    at_call(monkeypatch, os, 'fsync', 1, lambda: kill(signal.SIGINT) or 1 / 0)
    with pytest.raises(KeyboardInterrupt, match='^Stopped after step 1 of 6, saved in '):
        ddpm.train(**{**RUN, 'save_minutes': 0})
    assert steps() == 1


def test_a_save_is_on_the_disk_before_it_takes_the_place_of_the_last(monkeypatch):
    events, fsync = [], os.fsync
    monkeypatch.setattr(os, 'fsync', lambda file: fsync(file) or events.append(os.fstat(file)))
    at_call(monkeypatch, os, 'replace', 1, lambda: events.append('replace'))
    ddpm.train(**RUN)
    there, (synced, *then) = PATH.stat(), events
    assert (synced.st_ino, synced.st_size) == (there.st_ino, there.st_size) and then == ['replace']


def test_saves_are_minutes_apart(monkeypatch):
    """By a clock that goes 5 s a reading: with save_minutes=1 some steps save, most do not."""
    clock, saved = itertools.count(0, 5), []
    monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
    monkeypatch.setattr(ddpm, 'save_checkpoint', lambda _, new: saved.append(len(new['losses'])))
    ddpm.train(**{**RUN, 'num_epochs': 10, 'save_minutes': 1})
    assert 3 <= len(saved) < 20 and saved[-1] == 30
