"""Never lose a run: the real program, stopped and killed at random moments, at a tiny size.

`python -m pytest tests/test_faults.py --kills 300` is the long soak.
"""

import errno
import itertools
import os
import random
import re
import resource
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_PREVIEW, finish, run_program, start_program
from test_training import assert_identical

import ddpm

EPOCHS, STEPS = 30, 90  # of the run that is stopped again and again
EDITS = f'{TINY_PREVIEW}\nddpm.PREVIEW.update(num_epochs={EPOCHS}, save_minutes=0, lr_decay=True)\n'

# every save takes 12 ms, so that a stop falls into one now and then; the curve that goes with each
# would take longer than all else
SLOW = f"""{EDITS}
import os, time, torch
ddpm.Pictures.draw = lambda *a: None
ddpm.draw_losses = lambda *a: None
save, replace = torch.save, os.replace

def slow_save(state, file):
    save(state, file)
    file.flush()
    time.sleep(0.004)

def slow_replace(a, b):
    time.sleep(0.004)
    replace(a, b)
    time.sleep(0.004)

torch.save, os.replace = slow_save, slow_replace
"""


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """The checkpoint of the run that was never stopped, and the seconds it took."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    begun = time.monotonic()
    done = run_program(folder, SLOW, '--preview')
    assert done.returncode == 0, done.stderr
    return load(folder), time.monotonic() - begun


def load(folder):
    return torch.load(folder / 'checkpoints/tiny', weights_only=True)


def send(process, number):
    with suppress(ProcessLookupError):  # it may have ended
        if process.is_alive():
            os.kill(process.pid, number)


def stop_at_random_moments(folder, signals, count, longest, rng):
    """Starts the run over and over, sends it one of the signals after a random time, and when that
    has happened `count` times lets it go to its end. Returns what is left to look at: how each
    start ended, the steps in the file after it, and how many were stopped inside a save."""
    ends, steps, inside = [], [0], 0
    stops = 0
    while stops < count:
        process = start_program(folder, SLOW, '--preview')
        process.join(rng.uniform(0, longest))
        send(process, rng.choice(signals))
        ends.append(finish(process, folder))
        stops += ends[-1].returncode != 0
        inside += (folder / 'checkpoints/tiny.tmp').exists()
        if (folder / 'checkpoints/tiny').exists():
            steps.append(len(load(folder)['losses']))
            if ends[-1].returncode == 0:  # finished before the stop: once more from the beginning
                (folder / 'checkpoints/tiny').unlink()
                steps.append(0)
    done = run_program(folder, SLOW, '--preview')
    assert done.returncode == 0, done.stderr
    return ends, steps, inside


def test_killed_at_random_moments(uninterrupted, tmp_path, request):
    """kill -9: the file is always whole, never goes back, and the end is bit-identical."""
    reference, seconds = uninterrupted
    rng, kills = random.Random(0), request.config.getoption('--kills')
    ends, steps, inside = stop_at_random_moments(
        tmp_path, [signal.SIGKILL], kills, min(1.5, seconds / 3), rng
    )
    codes = [end.returncode for end in ends]
    assert codes.count(-signal.SIGKILL) == kills
    assert set(codes) <= {-signal.SIGKILL, 0}
    assert all(a <= b or b == 0 for a, b in zip(steps, steps[1:]))
    assert inside > 0, 'no kill fell into a save: the test tests too little'
    assert_identical(load(tmp_path), reference)
    assert os.listdir(tmp_path / 'checkpoints') == ['tiny']  # no lock, nothing half-written
    print(f'{kills} kills survived, {inside} of them inside a save; 0 bytes differ')


def test_stopped_at_random_moments(uninterrupted, tmp_path):
    """Ctrl-C and SIGTERM: saved to the step, said so, gone in time, and bit-identical."""
    reference, seconds = uninterrupted
    stops = [signal.SIGINT, signal.SIGTERM]
    ends, steps, _ = stop_at_random_moments(
        tmp_path, stops, 20, min(1.5, seconds / 3), random.Random(1)
    )
    codes = {end.returncode for end in ends}
    # a signal before main() or in its first lines ends the program the plain way
    assert {130, 143} <= codes <= {130, 143, -signal.SIGINT, -signal.SIGTERM, 0}
    out = ''.join(end.stdout for end in ends)
    said = re.findall(rf'Stopped after step (\d+) of {STEPS}, saved in checkpoints/tiny: run', out)
    assert said and {*map(int, said)} <= {*steps}
    assert not any('Traceback' in end.stderr for end in ends)
    assert_identical(load(tmp_path), reference)
    assert os.listdir(tmp_path / 'checkpoints') == ['tiny']


def test_a_second_ctrl_c_while_saving(uninterrupted, tmp_path):
    path = tmp_path / 'checkpoints/tiny'
    for _ in range(3):
        before = path.stat().st_ino if path.exists() else None
        process = start_program(tmp_path, SLOW, '--preview')
        while not path.exists() or path.stat().st_ino == before:  # until it has saved
            time.sleep(0.01)
        for _ in range(5):  # most fall into the next save, which takes 12 ms
            time.sleep(0.002)
            send(process, signal.SIGINT)
        assert finish(process, tmp_path).returncode == 130
        load(tmp_path)
    assert run_program(tmp_path, SLOW, '--preview').returncode == 0
    assert_identical(load(tmp_path), uninterrupted[0])


def test_what_a_killed_save_left_is_removed_at_the_next_start(workdir):
    """Also where nothing is left to train, so that no save would take its place, and where the
    checkpoint is a link."""
    Path('elsewhere').mkdir()
    Path('checkpoints').mkdir()
    Path('checkpoints/tiny').symlink_to('../elsewhere/tiny')
    for _ in range(2):  # the second time the run is finished
        Path('elsewhere/tiny.tmp').write_text('half a checkpoint')
        ddpm.train(**{**TINY, 'num_epochs': 1})
        assert os.listdir('elsewhere') == ['tiny']
        assert os.listdir('checkpoints') == ['tiny']


def test_two_runs_on_one_checkpoint(tmp_path):
    slow = 'import time\nloss = ddpm.diffusion_loss\nddpm.draw_losses = lambda *a: None\n'
    slow += 'ddpm.diffusion_loss = lambda *a: time.sleep(0.2) or loss(*a)\n'
    slow += 'ddpm.PREVIEW["num_epochs"] = 10**6\n'
    first = start_program(tmp_path, EDITS + slow, '--preview')
    try:
        while not (tmp_path / 'checkpoints/tiny').exists():
            assert first.is_alive()
            time.sleep(0.05)
        for _ in range(2):  # who was refused leaves the lock of the first alone
            second = run_program(tmp_path, EDITS, '--preview')
            assert second.returncode == 1
            last = second.stderr.splitlines()[-1]
            assert last.startswith('ddpm.py: another run is using checkpoints/tiny')
            assert (tmp_path / 'checkpoints/tiny.lock').exists()
        other = EDITS + 'ddpm.PREVIEW.update(checkpoint_path="checkpoints/other", num_epochs=1)'
        assert run_program(tmp_path, other, '--preview').returncode == 0
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    # the lock of a dead process does not block
    assert (tmp_path / 'checkpoints/tiny.lock').exists()
    done = run_program(tmp_path, f'{EDITS}ddpm.PREVIEW["num_epochs"] = 1', '--preview')
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['other', 'tiny']


@pytest.mark.parametrize(
    'changes, left',
    [(dict(lr=-1), []), (dict(unet=dict(num_groups=7)), []), (dict(seed=2), ['tiny'])],
)
def test_a_refused_start_leaves_no_lock(workdir, changes, left):
    """A setting that cannot be, and the checkpoint of another run."""
    Path('checkpoints').mkdir()
    if left:
        ddpm.train(**{**TINY, 'num_epochs': 1})
    with pytest.raises(ddpm.UserError):
        ddpm.train(**{**TINY, **changes})
    assert os.listdir('checkpoints') == left


def test_a_full_disk_is_reported_and_survived(workdir, monkeypatch, capfd):
    """The disk is full for the first two saves; training goes on, and the third is written."""
    ddpm.train(**{**TINY, 'num_epochs': 1})
    before = Path('checkpoints/tiny').read_bytes()
    save, sizes = ddpm.save_checkpoint, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def save_with_little_room(path, state):
        sizes.append(len(state['losses']))
        full = len(sizes) <= 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if full else limits[0], limits[1]))
        try:
            save(path, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            if full:
                assert Path('checkpoints/tiny').read_bytes() == before
                assert sorted(os.listdir('checkpoints')) == ['tiny', 'tiny.lock']

    monkeypatch.setattr(ddpm, 'save_checkpoint', save_with_little_room)
    try:
        ddpm.train(**{**TINY, 'num_epochs': 3, 'save_minutes': 0})
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    err = capfd.readouterr().err
    assert err.count('cannot write checkpoints/tiny') == 2
    assert 'training goes on' in err
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 9


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), PermissionError('no')])
def test_no_room_for_the_last_save(workdir, monkeypatch, error):
    ddpm.train(**{**TINY, 'num_epochs': 1})
    before = Path('checkpoints/tiny').read_bytes()

    def fail(fd):
        raise error

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(ddpm.UserError, match='cannot write checkpoints/tiny .*is unharmed'):
        ddpm.train(**TINY)
    assert Path('checkpoints/tiny').read_bytes() == before
    assert os.listdir('checkpoints') == ['tiny']


FULL_DISK = f"""{EDITS}
import os, torch
saves = []

def full(state, file):
    saves.append(1)
    if len(saves) in WHEN:
        os.kill(os.getpid(), 2)
    raise OSError(28, 'No space left on device')

def curve(*a):
    if 'curve' in WHEN:
        os.kill(os.getpid(), 2)

torch.save, ddpm.draw_losses = full, curve
"""


@pytest.mark.parametrize('when', [(2,), ('curve',)])
def test_a_stop_while_the_disk_is_full(tmp_path, when):
    """Whether it comes during the save that fails or just after it: never "saved"."""
    done = run_program(tmp_path, f'WHEN = {when}\n{FULL_DISK}', '--preview')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('ddpm.py: cannot write checkpoints/tiny')
    assert 'saved' not in (done.stdout + done.stderr).lower()
    assert os.listdir(tmp_path / 'checkpoints') == []


def test_a_stop_just_after_a_save_that_failed_saves_again(workdir, monkeypatch):
    save, saves = ddpm.save_checkpoint, []

    def fail_first(path, state):
        saves.append(len(state['losses']))
        if len(saves) == 1:
            raise OSError(errno.ENOSPC, 'No space left on device')
        save(path, state)

    monkeypatch.setattr(ddpm, 'save_checkpoint', fail_first)
    monkeypatch.setattr(ddpm, 'draw_losses', lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(ddpm.Stopped, match='Stopped after step 1 of 6, saved in checkpoints/tiny:'):
        ddpm.train(**{**TINY, 'save_minutes': 0})
    assert saves == [1, 1]
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 1


def test_a_full_file_system(tmp_path):
    """The same on a real, full file system (where the test may mount one)."""
    folder = tmp_path / 'checkpoints'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('may not mount a tmpfs here')
    try:
        done = run_program(tmp_path, EDITS + 'ddpm.PREVIEW["num_epochs"] = 2', '--preview')
        assert done.returncode == 1
        assert 'training goes on' in done.stderr
        assert 'ddpm.py: cannot write checkpoints/tiny' in done.stderr.splitlines()[-1]
        assert 'Traceback' not in done.stderr
        assert os.listdir(folder) == []
    finally:
        subprocess.run(['umount', str(folder)], check=True)


def test_a_folder_without_write_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip('root may write everywhere')
    folder = tmp_path / 'checkpoints'
    folder.mkdir(mode=0o500)
    done = run_program(tmp_path, EDITS, '--preview')
    assert done.returncode == 1
    assert 'cannot write checkpoints/tiny' in done.stderr.splitlines()[-1]


def test_a_stop_while_progress_is_sampled(workdir, monkeypatch):
    """Ctrl-C during the grid after the last epoch: it is given up, nothing is lost, and the next
    start makes it."""
    process = ddpm.reverse_process

    def stopped(*arguments):
        for i, item in enumerate(process(*arguments)):
            assert i <= 2, 'sampled on'
            if i == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    monkeypatch.setattr(ddpm, 'reverse_process', stopped)
    numbers = {**TINY, 'num_epochs': 1, 'sample_every': 1}
    with pytest.raises(ddpm.Stopped) as end:
        ddpm.train(**numbers)
    assert end.value.code == 130
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 3
    assert not Path('outputs/tiny/progress').exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(ddpm, 'reverse_process', process)
    ddpm.train(**{**numbers, 'num_epochs': 2})
    grids = sorted(os.listdir('outputs/tiny/progress'))
    assert grids == ['epoch_001.00.png', 'epoch_002.00.png']


@pytest.mark.parametrize('function', ['draw_losses', 'grid'])
def test_a_stop_while_the_last_picture_of_a_training_is_made(workdir, monkeypatch, function):
    """The loss curve of the last save, or the last grid of samples: no step comes after them."""
    make = getattr(ddpm, function)

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return make(*arguments)

    monkeypatch.setattr(ddpm, function, stopped)
    with pytest.raises(ddpm.Stopped, match='Stopped after step 3 of 3, saved in ') as end:
        ddpm.train(**{**TINY, 'num_epochs': 1, 'sample_every': 1})
    assert end.value.code == 130
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 3


def at_step(monkeypatch, number, action):
    """Has the action done in the middle of that step."""
    loss, calls = ddpm.diffusion_loss, []

    def acting(*arguments):
        calls.append(1)
        if len(calls) == number:
            action()
        return loss(*arguments)

    monkeypatch.setattr(ddpm, 'diffusion_loss', acting)


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize('signum', SIGNALS)
def test_each_signal_saves_the_step_and_says_so_at_once(workdir, monkeypatch, capfd, signum):
    """The function raises a KeyboardInterrupt, as whoever called it expects."""
    before = signal.getsignal(signum)
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(KeyboardInterrupt) as end:
        ddpm.train(**TINY)
    assert type(end.value) is ddpm.Stopped
    assert end.value.code == 128 + signum
    where = 'saved in checkpoints/tiny: run again to resume'
    assert str(end.value) == f'Stopped after step 2 of 6, {where}'
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 2
    assert 'finishing the step and saving' in capfd.readouterr().err
    assert signal.getsignal(signum) is before
    assert os.listdir('checkpoints') == ['tiny']


@pytest.mark.parametrize('signum', SIGNALS)
def test_the_program_ends_with_the_code_of_the_signal(tmp_path, signum):
    edits = f'{TINY_PREVIEW}\nimport os\nloss = ddpm.diffusion_loss\n'
    edits += f'ddpm.diffusion_loss = lambda *a: os.kill(os.getpid(), {int(signum)}) or loss(*a)'
    done = run_program(tmp_path, edits, '--preview')
    assert done.returncode == 128 + signum
    assert done.stdout.splitlines()[-1].startswith('Stopped after step 1 of 6, saved in ')
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'outputs/tiny/grid.png').exists()


def test_ctrl_c_while_sampling_ends_the_program_with_130(tmp_path):
    edits = f'{TINY_PREVIEW}\nimport os, signal\n'
    edits += 'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # as Python starts
    edits += 'ddpm.Pictures.draw = lambda *a: os.kill(os.getpid(), signal.SIGINT)'
    done = run_program(tmp_path, edits, '--preview')
    assert done.returncode == 130
    assert done.stdout.splitlines()[-1] == 'Stopped.'
    assert 'Traceback' not in done.stderr


def test_an_ignored_signal_stays_ignored(workdir, monkeypatch):
    """As after `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        ddpm.train(**TINY)
    except ddpm.Stopped:
        pytest.fail('stopped')
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 6


def test_training_in_a_thread_goes_without_handlers(workdir):
    thread = threading.Thread(target=lambda: ddpm.train(**TINY))
    thread.start()
    thread.join(60)
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 6


@pytest.mark.parametrize('where', ['compile', 'forward'])
def test_ctrl_c_while_compiling_ends_at_once(workdir, monkeypatch, where):
    """It may take minutes, most of them in the first step, and there is nothing to save."""

    def stopped(*_):
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail('compiled on')

    monkeypatch.setattr(ddpm, 'COMPILE_FROM', 0)
    monkeypatch.setattr(ddpm.UNET, 'compile', lambda model: None)
    monkeypatch.setattr(ddpm.UNET, where, stopped)
    with pytest.raises(KeyboardInterrupt) as end:
        ddpm.train(**TINY)
    assert type(end.value) is KeyboardInterrupt
    assert os.listdir('checkpoints') == []


def test_a_closed_terminal_does_not_keep_a_run_from_being_saved(workdir, monkeypatch):
    write = os.write

    def closed(fd, text):
        if fd == 2:
            raise OSError(errno.EIO, 'Input/output error')
        return write(fd, text)

    monkeypatch.setattr(os, 'write', closed)
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
    with pytest.raises(ddpm.Stopped) as end:
        ddpm.train(**TINY)
    assert end.value.code == 128 + signal.SIGHUP
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 2


def test_a_signal_between_the_check_and_the_next_step_loses_nothing(workdir, monkeypatch):
    """It comes just after a step has looked for one: the next step saves, not none."""
    sample_progress, calls = ddpm.Run.sample_progress, []

    def signal_then_sample(run):
        calls.append(run.step)
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        sample_progress(run)

    monkeypatch.setattr(ddpm.Run, 'sample_progress', signal_then_sample)
    with pytest.raises(ddpm.Stopped, match='Stopped after step 3 of 6'):
        ddpm.train(**TINY)
    assert calls == [0, 1, 2]
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 3


def test_pictures_that_cannot_be_written_stop_nothing(workdir, capfd):
    Path('outputs').write_text('a file')
    ddpm.train(**{**TINY, 'sample_every': 1})
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 6
    assert capfd.readouterr().err.count('cannot write a picture') == 3  # two grids, a loss curve


@pytest.mark.parametrize('outputs, name', [('a file', 'tiny'), ('/proc/self', 'fd')])
def test_a_folder_that_cannot_be_written_is_found_before_the_sampling(
    workdir, monkeypatch, outputs, name
):
    """It cannot be made, or it is there and nobody may write to it, not even root."""
    ddpm.train(**{**TINY, 'num_epochs': 1, 'checkpoint_path': f'checkpoints/{name}'})
    Path('a file').write_text('')
    monkeypatch.setattr(ddpm, 'OUTPUTS', Path(outputs))
    monkeypatch.setattr(ddpm, 'reverse_process', lambda *_: pytest.fail('sampled for nothing'))
    with pytest.raises(OSError):
        ddpm.inference(f'checkpoints/{name}')


def test_a_link_stays_a_link_and_home_is_found(workdir, monkeypatch):
    Path('elsewhere').mkdir()
    Path('link').symlink_to('elsewhere/tiny')
    ddpm.train(**{**TINY, 'checkpoint_path': 'link'})
    assert Path('link').is_symlink() and Path('elsewhere/tiny').is_file()
    monkeypatch.setenv('HOME', str(workdir / 'elsewhere'))
    ddpm.train(**{**TINY, 'checkpoint_path': '~/other'})
    assert Path('elsewhere/other').is_file() and not Path('~').exists()


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(workdir, monkeypatch, capsys, number):
    """As drives that are mounted over a network may be: only a line, and nothing stays behind."""

    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr('fcntl.flock', no_locks)
    for epochs in (1, 2):
        ddpm.train(**{**TINY, 'num_epochs': epochs})
        if number != errno.ENOSYS:  # there filelock has another way
            assert 'No locks here' in capsys.readouterr().out
    assert len(ddpm.load_checkpoint('checkpoints/tiny')['losses']) == 6


@pytest.mark.parametrize('number', [errno.EAGAIN, errno.EACCES])  # the latter on network mounts
def test_a_lock_that_is_refused(workdir, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr('fcntl.flock', refuse)
    with pytest.raises(ddpm.UserError, match='another run is using checkpoints/tiny'):
        ddpm.train(**TINY)
    assert os.listdir('checkpoints') == ['tiny.lock']  # which is the other run's


def test_saves_are_minutes_apart(workdir, monkeypatch):
    """By a clock that goes 5 s a reading: with save_minutes=1 some steps save, most do not."""
    clock, saved = itertools.count(0, 5), []
    monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
    monkeypatch.setattr(
        ddpm, 'save_checkpoint', lambda p, state: saved.append(len(state['losses']))
    )
    monkeypatch.setattr(ddpm, 'draw_losses', lambda *_: None)
    ddpm.train(**{**TINY, 'num_epochs': 10, 'save_minutes': 1})
    assert 3 <= len(saved) < 20 and saved[-1] == 30
