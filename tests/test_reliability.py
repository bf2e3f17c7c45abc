"""Interruptions, full disks, bad servers, wrong options: nothing is lost or mixed up."""

import ctypes
import hashlib
import http.server
import io
import itertools
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    ARCHIVE,
    BATCHES,
    QUICK,
    check_tiny,
    contents,
    error_line,
    first,
    quick_runs,
    read_table,
    run,
    run_tiny,
)

import part2_cifar_cnn as part2
import utils
from part2_cifar_cnn import FIGURES
from utils import UserError, derive_seed, download, load_checkpoint

pytestmark = pytest.mark.usefixtures("quick")
SCRIPT = Path(part2.__file__).resolve()
STEPS = 6  # in an epoch of the quick runs


def without_times(value):
    """The same nested value without what was measured with a clock, or depends on it."""
    if isinstance(value, dict):
        measured = re.compile("seconds|per_second|digest|sha256")
        return {k: without_times(v) for k, v in value.items() if not measured.search(str(k))}
    if isinstance(value, (list, tuple)):
        return [without_times(item) for item in value]
    if isinstance(value, torch.Tensor):
        bits = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        return str(value.dtype), tuple(value.shape), hashlib.md5(bits).hexdigest()
    return value


def outcome(folder):
    """All that a run leaves, times and figures apart, as nested lists and dictionaries."""
    checkpoints = {
        name: torch.load(folder / name, weights_only=True) for name in ("best.pt", "last.pt")
    }
    files = {
        "history": read_table(folder / "history.csv"),
        "metrics": json.loads((folder / "metrics.json").read_text()),
        "config": json.loads((folder / "config.json").read_text()),
        "scores": (folder / "test_scores.csv").read_text(),
        "files": sorted(path.name for path in folder.iterdir() if path.suffix != ".png"),
    }
    return without_times(checkpoints | files)


def same(found, expected, where="result"):
    """Whether two outcomes are equal, NaN included; names the first place that is not."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        return all(same(found[key], expected[key], f"{where}/{key}") for key in expected)
    if isinstance(expected, (list, tuple)) and len(expected) == len(found):
        return all(same(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(found, expected)))
    assert found == expected or (found != found and expected != expected), where
    return True


@contextmanager
def at_step(step, action):
    """Do ``action`` after the ``step``-th step of training, counted over all epochs."""
    real, steps = part2.batches, itertools.count(1)

    def batches(*args, **options):
        for batch in real(*args, **options):
            yield batch
            if next(steps) == step:
                action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part2, "batches", batches)
        yield steps


@contextmanager
def nan_at_step(step):
    """The ``step``-th batch of training holds no numbers."""
    real, steps = part2.batches, itertools.count(1)

    def batches(*args, **options):
        for images, targets in real(*args, **options):
            yield images * (np.nan if next(steps) == step else 1), targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part2, "batches", batches)
        yield


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def stop_after_epoch(epoch, folder, *options):
    """Run, and press Ctrl-C early in the epoch that follows."""
    with at_step(STEPS * epoch + 1, press_ctrl_c):
        assert run(folder, *options) == 130


def command_in(text):
    """The words of the command that Ctrl-C printed."""
    (line,) = text.strip().splitlines()
    return shlex.split(line[line.index(shlex.quote(sys.executable)) :])


@contextmanager
def largest_file(size):
    """No file can grow beyond ``size`` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def modes_bind(*folders):
    """The folders are read-only, even to root, who puts the right to override this down."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then their high words
    kept = 0
    for folder in folders:
        folder.chmod(0o555)
    try:
        if os.geteuid() == 0:
            libc = ctypes.CDLL(None)
            libc.capget(header, sets)
            kept, sets[0] = sets[0], sets[0] & ~0b110  # DAC_OVERRIDE, DAC_READ_SEARCH
            libc.capset(header, sets)
        if os.access(folders[0], os.W_OK, effective_ids=True):
            pytest.skip("this user's rights cannot be put down, so no folder is read-only")
        yield
    finally:
        if kept:
            sets[0] = kept
            libc.capset(header, sets)
        for folder in folders:
            folder.chmod(0o755)


# %% Ctrl-C and --resume

SHORT = "--epochs 2 --warmup-epochs 1 --batch-size 30"
FLAGS = [
    f"--preset tuned {SHORT}",  # with its own network
    f"--preset resnet18 --model small {SHORT}",
    "--optimizer sgd --schedule cosine --warmup-epochs 1 --grad-clip 1 --select-on test",
    "--optimizer adamw --schedule none --mixup 0.2 --cutout 8 --seed 3 --select-on last",
    "--model strong --image-size 28:0.5,32:0.5 --schedule cosine --epochs 4 --snapshots 2",
    "--ema 0.9 --flip alternating --crop-fill reflect --tta shift --precision bfloat16",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(flags, few_digits, tmp_path):
    cut, uncut = tmp_path / "cut", tmp_path / "uncut"
    few = replace(first(few_digits, 60, 60), mirror=True)
    with quick_runs(few):
        assert run(uncut, *flags.split()) == 0
        config = json.loads((uncut / "config.json").read_text())
        steps = -(-len(part2.set_aside(few, config["select_on"]).train) // config["batch_size"])
        with at_step(steps + 1, press_ctrl_c):
            assert run(cut, *flags.split()) == 130
        assert len(read_table(cut / "history.csv")) == 1
        assert part2.main(["--resume", str(cut)]) == 0
    assert same(outcome(cut), outcome(uncut))


def test_ctrl_c_prints_a_command_that_continues(digits, tmp_path, capsys):
    """In a terminal of 20 columns without UTF-8, and as with ``| head -1``."""
    folder, flags = tmp_path / "a caf\u00e9", ["--epochs", "2", "--batch-size", "256"]
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ascii_only |= {"PYTHONCOERCECLOCALE": "0", "COLUMNS": "20"}
    with quick_runs(digits), at_step(6 + 3, press_ctrl_c) as steps:
        assert run(folder, *flags) == 130
        assert next(steps) == 6 + 4  # no step followed
    kept = contents(folder)
    assert kept.keys() == {"config.json", "history.csv", "monitor.csv", "best.pt", "last.pt"}
    assert read_and_leave(command_in(capsys.readouterr().err), BARE | ascii_only) == b""
    assert (folder / "history.csv").read_bytes().startswith(kept["history.csv"])
    assert [row["epoch"] for row in read_table(folder / "history.csv")] == ["1", "2"]
    assert {path.stem for path in folder.glob("*.png")} == set(FIGURES)
    assert (folder / "metrics.json").exists()


def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(tmp_path):
    script, pipe = [sys.executable, SCRIPT, "--dataset", "digits"], subprocess.PIPE
    with subprocess.Popen(script, cwd=tmp_path, stdout=pipe, stderr=pipe) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == b"" and process.returncode == -signal.SIGINT
    assert not list(tmp_path.iterdir())


def test_ctrl_c_before_the_first_epoch_is_one_line(tmp_path, monkeypatch, capsys):
    def load_digits():
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler  # or all tests end
        press_ctrl_c()

    monkeypatch.setattr("sklearn.datasets.load_digits", load_digits)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--dataset", "digits"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("interrupted") and end.value.code == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["--seed", "1", "--overwrite"]], ids=["again", "other"])
def test_ctrl_c_in_the_first_epoch_loses_nothing_of_the_run_before(
    options, whole, tmp_path, capsys
):
    folder = shutil.copytree(whole, tmp_path / "run")
    stop_after_epoch(0, folder, *options)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("interrupted") and sys.executable not in line
    assert contents(folder) == contents(whole)


def test_ctrl_c_in_the_last_step_still_leaves_a_whole_run(whole, tmp_path):
    with at_step(3 * STEPS, press_ctrl_c):
        assert run(tmp_path) == 130
    assert len(read_table(tmp_path / "history.csv")) == 3
    assert run(tmp_path, "--resume") == 0 and same(outcome(tmp_path), outcome(whole))


def test_second_ctrl_c_ends_the_run_at_once(tmp_path, capsys, monkeypatch):
    def judge(training, row):
        if training.history:  # in the second epoch
            press_ctrl_c()
            press_ctrl_c()
        return real(training, row)

    real = part2.judge
    monkeypatch.setattr(part2, "judge", judge)
    assert run(tmp_path) == 130
    assert command_in(capsys.readouterr().err)[1].endswith("part2_cifar_cnn.py")
    assert len(load_checkpoint(tmp_path / "last.pt")["history"]) == 1


def test_run_that_fell_back_to_the_digits_is_continued(monkeypatch, whole, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(part2, "MIRRORS", ())
    with at_step(2 * STEPS + 1, press_ctrl_c):
        assert part2.main([*QUICK, "--dataset", "auto"]) == 130
    with at_step(STEPS + 1, pytest.fail):  # one epoch is left
        assert part2.main(command_in(capsys.readouterr().err)[2:]) == 0
    assert same(outcome(tmp_path / "outputs/part2-digits"), outcome(whole))


def test_command_that_continues_finds_the_data(tiny, tmp_path, capsys):
    with at_step(2, press_ctrl_c):
        assert run_tiny(tiny.folder, tmp_path / "out") == 130
    assert part2.main(command_in(capsys.readouterr().err)[2:]) == 0
    assert (tmp_path / "out/metrics.json").exists()


def test_bare_resume_continues_in_the_default_folder(monkeypatch, tmp_path):
    flags = ["--dataset", "digits", "--preset", "tuned", "--seed", "4"]
    more = "--model small --select-on val --tta none"
    monkeypatch.chdir(tmp_path)
    with at_step(STEPS + 1, press_ctrl_c):
        assert part2.main([*QUICK, *flags, *more.split()]) == 130
    with at_step(2 * STEPS + 1, pytest.fail):  # two epochs are left
        assert part2.main([*flags, "--resume"]) == 0
    (folder,) = Path("outputs").iterdir()
    assert folder.name == "part2-tuned-digits-seed4"
    assert len(read_table(folder / "history.csv")) == 3


@pytest.mark.parametrize("missing", ["nothing", "folder", "last.pt"])
def test_resume_without_a_run_is_refused_and_writes_nothing(missing, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    if missing == "folder":
        folder.mkdir()
    elif missing == "last.pt":
        shutil.copytree(whole, folder)
        (folder / "last.pt").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert part2.main(["--resume", str(folder)]) == 2
    assert str(folder) in error_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "given, named",
    [
        ("--lr 0.5 --seed 7 --epochs 3 --device auto --dataset auto", ["--lr 0.5", "--seed 7"]),
        ("--preset tuned", ["--preset tuned"]),
        ("--precision bfloat16", ["--precision bfloat16"]),
        ("--epochs 2", ["3 epochs"]),
    ],
)
def test_options_that_disagree_with_the_run_are_named(given, named, whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")
    assert part2.main(["--resume", str(folder), *given.split()]) == 2
    line = error_line(capsys)
    assert all(text in line for text in named)
    assert not any(text in line for text in ("--epochs", "--device", "--dataset"))  # these agree
    assert contents(folder) == contents(whole)


def test_resuming_a_finished_run_evaluates_it_again(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "metrics.json").unlink()
    (folder / "test_scores.csv").write_text("old")
    with at_step(1, pytest.fail):
        assert run(folder, "--resume") == 0
    assert same(outcome(folder), outcome(whole))


def test_run_may_go_on_on_another_device(whole, tmp_path):
    stop_after_epoch(2, tmp_path)
    assert run(tmp_path, "--resume", "--device", "cpu:0") == 0
    for name in ("config.json", "metrics.json"):
        assert json.loads((tmp_path / name).read_text())["device"] == "cpu:0"
    scores = "test_scores.csv"
    assert (tmp_path / scores).read_bytes() == (whole / scores).read_bytes()


LONGER = [("--schedule none --warmup-epochs 0.4", 1, 2), ("--schedule step", 4, 6)]


@pytest.mark.parametrize("flags, few, more", LONGER)
def test_longer_run_ends_as_if_it_had_been_one(flags, few, more, tmp_path):
    flags, longer = [*flags.split(), "--batch-size", "90"], ["--epochs", str(more)]
    short, long = tmp_path / "short", tmp_path / "long"
    assert run(long, *flags, *longer) == run(short, *flags, "--epochs", str(few)) == 0
    assert part2.main(["--resume", str(short), *longer]) == 0
    assert same(outcome(short), outcome(long))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step --warmup-epochs 2"])
def test_run_whose_schedule_knows_its_end_gets_no_longer(schedule, tmp_path, capsys):
    flags = ["--epochs", "2", "--batch-size", "90", "--schedule", *schedule.split()]
    assert run(tmp_path, *flags) == 0
    before = contents(tmp_path)
    assert part2.main(["--resume", str(tmp_path), "--epochs", "3"]) == 2
    assert str(tmp_path) in error_line(capsys)
    assert contents(tmp_path) == before


def test_results_of_fewer_epochs_are_removed(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    for name in ("01_augmented_samples.png", "notes.txt"):
        (folder / name).write_text("old")
    with pytest.MonkeyPatch.context() as patch, at_step(STEPS, press_ctrl_c):
        patch.setattr(part2, "FIGURES", {"01_augmented_samples": None})
        assert part2.main(["--resume", str(folder), "--epochs", "5"]) == 130
    names = {"best.pt", "last.pt", "config.json", "history.csv", "monitor.csv", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "config.json").read_text())["epochs"] == 5


# %% A folder that holds another run


def test_folder_of_another_run_is_refused_unless_overwritten(whole, tmp_path, capsys):
    folder, new = shutil.copytree(whole, tmp_path / "run"), tmp_path / "new"
    assert run(folder, "--seed", "7", "--lr", "0.002") == 2
    line = error_line(capsys)
    assert "--seed 42" in line and "--lr 0.001" in line and "--overwrite" in line
    assert contents(folder) == contents(whole)
    assert run(folder, "--seed", "7", "--lr", "0.002", "--overwrite") == 0
    assert run(new, "--seed", "7", "--lr", "0.002") == 0
    assert same(outcome(folder), outcome(new))


def test_run_is_repeated_in_its_folder_also_in_another_precision(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    assert run(folder, "--precision", "bfloat16") == 0
    for name in ("config.json", "metrics.json"):
        assert json.loads((folder / name).read_text())["precision"] == "bfloat16"


@pytest.mark.parametrize("text", ["", "[1, 2]", "{}", '{"epochs": "three"}'])
def test_folder_with_a_damaged_config_is_refused(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert run(tmp_path) == 2
    assert str(tmp_path) in error_line(capsys)
    assert contents(tmp_path) == {"config.json": text.encode()}


def test_folder_with_a_damaged_config_is_overwritten(whole, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert run(tmp_path, "--overwrite") == 0 and same(outcome(tmp_path), outcome(whole))


SIZES = [("--schedule step", 400_000), ("--schedule cosine", 2_000_000)]


@pytest.mark.parametrize("flags, size", SIZES, ids=["in best.pt", "in last.pt"])
def test_run_that_fails_in_its_first_save_is_not_mixed_with_the_one_before(
    flags, size, tmp_path, capsys
):
    old = ["--epochs", "2", "--batch-size", "90", *flags.split()]
    new = [*old, "--epochs", "3", "--overwrite"]
    folder, expected = tmp_path / "run", tmp_path / "expected"
    assert run(folder, *old) == run(expected, *new) == 0
    with largest_file(size):
        assert run(folder, *new) == 2
    assert str(folder) in error_line(capsys)
    if part2.main(["--resume", str(folder)]) == 0:
        assert same(outcome(folder), outcome(expected))
    assert run(folder, *new) == 0 and same(outcome(folder), outcome(expected))


# %% Killed, disk full, not enough memory


class DeadlyFile(io.FileIO):
    """A file in the middle of which the process is killed."""

    def write(self, data):
        super().write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)


def open_or_die(files, kill_at, path, mode):
    """Open a file, or a deadly one if it is the n-th that is written."""
    deadly = mode == "wb" and next(files) == kill_at
    return DeadlyFile(path, "w") if deadly else open(path, mode)


def end_of_run(folder, kill_at=None):
    """Exit status of a process that runs or resumes, and is killed in its n-th file."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        torch.set_num_threads(1)  # a pool of threads does not survive the fork
        utils.open = partial(open_or_die, itertools.count(1), kill_at)
        resume = ["--resume"] * (folder / "last.pt").exists()
        try:
            os._exit(run(folder, "--select-on", "last", "--epochs", "2", *resume))
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# An epoch writes config.json, history.csv, last.pt, best.pt; the evaluation two files more. To
# resume writes best.pt first, since here the last epoch is always the best.
MOMENTS = [
    3,  # last.pt of epoch 1: there is no run yet
    4,  # best.pt of epoch 1
    3,  # history.csv of epoch 2, which is the first to be resumed
    4,  # last.pt of epoch 2
    5,  # best.pt of epoch 2
    3,  # metrics.json
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA autograd cannot be forked")
def test_run_killed_in_its_saves_ends_as_if_never_killed(tmp_path):
    killed, never = tmp_path / "killed", tmp_path / "never"
    assert end_of_run(never) == 0
    for moment in MOMENTS:
        assert end_of_run(killed, moment) == -signal.SIGKILL
        for path in killed.glob("*.pt"):
            load_checkpoint(path)
    assert end_of_run(killed) == 0
    assert same(outcome(killed), outcome(never))


@pytest.mark.parametrize("size", [100, 400_000, 2_000_000])
def test_disk_full_while_resuming_leaves_what_was_there(size, whole, tmp_path, capsys):
    stop_after_epoch(1, tmp_path)
    before = contents(tmp_path)
    capsys.readouterr()
    with largest_file(size):
        assert run(tmp_path, "--resume") == 2
    line = error_line(capsys)
    assert str(tmp_path) in line and "space" in line
    after = contents(tmp_path)
    assert after.keys() == before.keys() and after["last.pt"] == before["last.pt"]
    assert after["best.pt"] == before["best.pt"] or size > 1_200_000
    load_checkpoint(tmp_path / "best.pt")
    assert run(tmp_path, "--resume") == 0 and same(outcome(tmp_path), outcome(whole))


@pytest.mark.parametrize("name", ["file.bin", "values.json", "table.csv"])
def test_files_are_replaced_as_a_whole_or_not_at_all(name, tmp_path):
    path = tmp_path / name
    write = {
        "file.bin": lambda n: utils.write_bytes(path, b"x" * n),
        "values.json": lambda n: utils.write_json(path, {"values": [1.5] * n}),
        "table.csv": lambda n: utils.write_csv(path, {"values": [1.5] * n}),
    }[name]
    write(10)
    before = contents(tmp_path)
    with largest_file(5000), pytest.raises(UserError, match=name):
        write(20_000)
    assert contents(tmp_path) == before
    write(20_000)
    assert path.stat().st_size > 5000 and list(tmp_path.iterdir()) == [path]


def test_unwritable_output_folder_is_reported(tmp_path, capsys):
    with modes_bind(tmp_path):
        assert run(tmp_path) == 2
        assert "--output-dir" in error_line(capsys)
        assert run(tmp_path / "new") == 2
    assert "--output-dir" in error_line(capsys) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["closed/data", "a" * 300])
def test_paths_that_the_system_refuses_to_look_at_are_reported(name, tmp_path, capsys):
    closed = tmp_path / "closed"
    closed.mkdir()
    with modes_bind(closed):
        closed.chmod(0)
        assert run(tmp_path / name) == 2
        assert "--output-dir" in error_line(capsys)
        assert run(tmp_path / name, "--resume") == 2
        assert str(tmp_path / name) in error_line(capsys)
        assert run_tiny(tmp_path / name, tmp_path / "out") == 2
        assert str(tmp_path / name) in error_line(capsys)


def test_too_little_memory_is_reported_and_other_errors_are_not_hidden(capsys):
    assert utils.command(lambda argv: torch.empty(2**60, dtype=torch.uint8))() == 2
    assert "memory" in error_line(capsys)
    with pytest.raises(RuntimeError, match="must match"):
        utils.command(lambda argv: torch.ones(2) + torch.ones(3))()


# %% Loss that is not finite


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(whole, tmp_path, capsys):
    with nan_at_step(STEPS + 3):
        assert run(tmp_path) == 1
    line = error_line(capsys)
    assert "epoch 2" in line and "--lr" in line
    assert len(load_checkpoint(tmp_path / "last.pt")["history"]) == 1
    assert len(read_table(tmp_path / "history.csv")) == 1
    assert run(tmp_path, "--resume") == 0 and same(outcome(tmp_path), outcome(whole))


def test_learning_rate_named_is_that_of_the_epoch(tmp_path, capsys):
    with nan_at_step(2):  # the last step, after which the rate is 0
        assert run(tmp_path, "--epochs", "2", "--batch-size", "500", "--schedule", "linear") == 1
    line = error_line(capsys)
    assert "epoch 2" in line and "0.0005" in line


@pytest.mark.parametrize("flags", ["--lr 1e8", "--lr 1e30", "--lr 1e30 --batch-size 500"])
def test_weights_that_explode_are_not_saved_as_good(flags, tmp_path, capsys):
    status = run(tmp_path, "--epochs", "2", *flags.split())
    captured = capsys.readouterr()
    assert status in (0, 1) and "Traceback" not in captured.err
    assert not re.search(r"\b(nan|inf)\b", captured.out)
    assert ("--lr" in captured.err) == (status == 1)
    if (tmp_path / "last.pt").exists():
        last = load_checkpoint(tmp_path / "last.pt")
        losses = [row[f"{part}_loss"] for row in last["history"] for part in ("train", "eval")]
        assert np.isfinite(losses).all()
        assert all(value.isfinite().all() for value in last["model"].values())


# %% Data folders and servers


def test_missing_batch_file_is_named(tiny, tmp_path, capsys):
    path = tiny.folder / BATCHES / "data_batch_5"
    path.unlink()
    assert run_tiny(tiny.folder, tmp_path / "out") == 2
    assert str(path) in error_line(capsys)


def test_archive_in_the_data_folder_is_unpacked(tiny):
    shutil.copy(tiny.archive, tiny.empty)
    check_tiny(tiny, part2.load_cifar10(tiny.empty))
    assert sorted(path.name for path in tiny.empty.iterdir()) == [BATCHES, ARCHIVE]


@pytest.mark.parametrize("kind", ["batches", "archive"])
def test_read_only_data_folder_works(kind, tiny):
    folder = tiny.folder if kind == "batches" else tiny.empty
    if kind == "archive":
        shutil.copy(tiny.archive, folder)
    before = list(folder.iterdir())
    with modes_bind(folder):
        check_tiny(tiny, part2.load_cifar10(folder))
    assert list(folder.iterdir()) == before


@pytest.mark.parametrize("read_only", [False, True])
def test_archive_for_which_there_is_no_room_is_named(read_only, tiny):
    folder = tiny.empty
    shutil.copy(tiny.archive, folder)
    rights = modes_bind(folder) if read_only else nullcontext()
    with largest_file(10_000), rights, pytest.raises(UserError, match=str(folder / ARCHIVE)):
        part2.load_cifar10(folder)
    assert [path.name for path in folder.iterdir()] == [ARCHIVE]


def test_data_folder_that_is_a_file_is_reported(tiny, tmp_path, capsys):
    assert run_tiny(tiny.archive, tmp_path / "out") == 2
    assert str(tiny.archive) in error_line(capsys)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``content`` rightly at /good, and in as many wrong ways as there are paths."""

    protocol_version = "HTTP/1.1"
    content = b""

    def log_message(self, *args):
        pass

    def reply(self, body, status=200, **headers):
        self.send_response(status)
        for key, value in ({"Content_Length": len(self.content)} | headers).items():
            if value is not None:
                self.send_header(key.replace("_", "-"), str(value))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def do_GET(self):
        self.server.seen.append(self.path)
        half = self.content[: len(self.content) // 2]
        page = b"<html>sorry</html>"
        if self.path == "/good":
            if self.server.together:
                self.server.together.wait(20)
            self.reply(self.content)
        elif self.path == "/stall":
            self.reply(half)
            self.server.released.wait(20)
        elif self.path == "/silent":
            self.server.released.wait(20)
        elif self.path == "/cut":
            self.reply(half)
        elif self.path == "/cut-chunk":
            body = b"%x\r\n%s\r\nffff\r\n" % (len(half), half)
            self.reply(body, Content_Length=None, Transfer_Encoding="chunked")
        elif self.path == "/cut-unsized":
            self.reply(half, Content_Length=None)
        elif self.path == "/page":
            self.reply(page, Content_Length=len(page))
        elif self.path == "/missing":
            self.reply(page, 404, Content_Length=len(page))
        elif self.path == "/broken":
            self.reply(page, 503, Content_Length=len(page))
        elif self.path == "/loop":
            self.reply(b"", 302, Content_Length=0, Location="/loop")
        elif self.path == "/no-number":
            self.reply(half, Content_Length="many")
        elif self.path == "/flipped":
            self.reply(half + bytes(len(self.content) - len(half)))
        elif self.path == "/not-http":
            self.wfile.write(b"\x00\xff\x13 what\r\n\r\n")
            self.close_connection = True
        elif self.path == "/hang-up":
            self.close_connection = True


WAYS = shlex.split(
    "stall silent cut cut-chunk cut-unsized page missing broken loop no-number flipped "
    "not-http hang-up"
)


@pytest.fixture
def server(tiny):
    """A server on this machine; calling it with paths gives their addresses."""
    handler = type("Here", (Handler,), {"content": tiny.archive.read_bytes()})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.seen, httpd.released, httpd.together = [], threading.Event(), None
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{httpd.server_port}"
    yield SimpleNamespace(
        httpd=httpd, seen=httpd.seen, at=lambda *names: [f"{address}/{name}" for name in names]
    )
    httpd.released.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("way", WAYS)
def test_bad_server_is_survived_by_the_next_mirror(way, tiny, server):
    path = tiny.empty / ARCHIVE
    began = time.monotonic()
    download(server.at(way, "good"), path, utils.md5_of(tiny.archive), stall_seconds=0.3)
    assert path.read_bytes() == tiny.archive.read_bytes() and time.monotonic() - began < 5
    assert list(tiny.empty.iterdir()) == [path] and server.seen[-1] == "/good"
    assert path.stat().st_mode & 0o777 == 0o644  # others may read it, too


def test_bad_servers_only_leave_nothing_and_are_all_named(tiny, server):
    ways = [way for way in WAYS if way != "not-http"]
    with pytest.raises(UserError) as error:
        download(server.at(*ways), tiny.empty / ARCHIVE, utils.md5_of(tiny.archive), 0.3)
    assert all(address in str(error.value) for address in server.at(*ways))
    assert f"{server.at('cut')[0]}: md5" not in str(error.value)  # what came was cut
    assert not list(tiny.empty.iterdir())


def test_first_good_mirror_is_enough(tiny, server, tmp_path, monkeypatch):
    monkeypatch.setattr(part2, "MIRRORS", server.at("cut", "page", "good", "missing"))
    assert run_tiny(tiny.empty / "new", tmp_path / "out", "auto") == 0
    assert server.seen == ["/cut", "/page", "/good"]
    assert sorted(path.name for path in (tiny.empty / "new").iterdir()) == [BATCHES, ARCHIVE]
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["dataset"] == "cifar10"
    server.seen.clear()
    check_tiny(tiny, part2.load_cifar10(tiny.empty / "new"))
    assert not server.seen  # not fetched a second time


def test_disk_full_during_the_download_leaves_nothing(tiny, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(part2, "MIRRORS", server.at("good"))
    with largest_file(100_000):
        assert run_tiny(tiny.empty, tmp_path / "out") == 2
    error_line(capsys)
    assert not list(tiny.empty.iterdir())


def test_two_processes_fetch_into_one_empty_folder(tiny, server, monkeypatch):
    monkeypatch.setattr(part2, "MIRRORS", server.at("good"))
    server.httpd.together = threading.Barrier(2)  # neither gets a byte before both ask
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(30)
            torch.set_num_threads(1)  # a pool of threads does not survive the fork
            try:
                check_tiny(tiny, part2.load_cifar10(tiny.empty))
                os._exit(0)
            except BaseException:
                os._exit(1)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0, 0] and server.seen == ["/good"] * 2
    assert sorted(path.name for path in tiny.empty.iterdir()) == [BATCHES, ARCHIVE]
    check_tiny(tiny, part2.load_cifar10(tiny.empty))


# %% Options

WRONG = [
    "--epochs 0", "--epochs -1", "--epochs 1.5", "--epochs many", f"--epochs {'9' * 5000}",
    "--batch-size 0", "--batch-size -8", "--lr 0", "--lr -1", "--lr nan", "--lr inf", "--lr fast",
    "--dropout 1", "--dropout -0.1", "--dropout nan", "--seed -1", f"--seed 1{'0' * 400}",
    "--device nonsense", "--device meta", "--device hpu", "--device cuda:99",
    "--precision float16", "--select-on train", "--dataset mnist", "--cutout 32",
    "--mixup 0.0001", "--momentum 0.5", "--crop-fill reflect --crop-padding 0",
    "--output-dir a-file", "--resume --overwrite", "--resume nowhere",
    "--unheard-of", "--see 1", "stray",
]  # fmt: skip


@pytest.mark.parametrize("options", WRONG, ids=lambda text: text[:30])
def test_wrong_option_is_one_line_and_nothing_is_written(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("mine")
    assert part2.main([*QUICK, "--output-dir", "out", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and options.split()[0].lstrip("-") in line
    assert contents(tmp_path) == {"a-file": b"mine"}


def test_an_option_beside_a_preset_wins(tmp_path):
    options = "--preset tuned --model small --epochs 1 --warmup-epochs 0.5 --tta none"
    assert run(tmp_path, *options.split()) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["tta"], config["batch_size"], config["model"]) == ("none", 32, "small")
    assert (config["optimizer"], config["crop_fill"]) == ("muon", "reflect")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda_says_what_to_use_instead(tmp_path, capsys):
    assert run(tmp_path / "out", "--device", "cuda") == 2
    line = error_line(capsys)
    assert "--device cpu" in line and "cuda" in line and not (tmp_path / "out").exists()


def test_output_path_is_checked_before_the_data_is_fetched(tiny, server, monkeypatch, capsys):
    monkeypatch.setattr(part2, "MIRRORS", server.at("good"))
    assert run_tiny(tiny.empty, tiny.archive) == 2
    assert "--output-dir" in error_line(capsys) and not server.seen


@pytest.mark.parametrize("size", ["179", str(10**30)])
def test_large_batches_and_a_last_batch_of_one_image_work(size, tmp_path):
    assert run(tmp_path, "--batch-size", size, "--epochs", "1") == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"] >= 0


def test_large_seed_works(tmp_path):
    assert run(tmp_path, "--seed", str(10**30), "--epochs", "1") == 0
    assert derive_seed(10**30) != derive_seed(10**30 + 1)


# %% Where the output goes to

PART1 = [
    sys.executable,
    str(SCRIPT.with_name("part1_threshold.py")),
    "--n-samples",
    "500",
    "--output-dir",
]
SPOKEN = ("DISPLAY", "WAYLAND_DISPLAY", "LANG", "LC_ALL", "MPLBACKEND")
BARE = {key: value for key, value in os.environ.items() if key not in SPOKEN}


def read_and_leave(command, environment):
    """Read the first line of a command's output, as ``| head -1``; what it writes to stderr."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline().startswith(b"1. ")
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 0
    return errors


def test_narrow_ascii_output_in_a_file_is_whole(tmp_path):
    scores = tmp_path / "scores.csv"
    scores.write_text("caf\u00e9,y_score\n" + "1,0.9\n0,0.2\n1,0.7\n0,0.6\n" * 5, encoding="utf-8")
    options = ["--scores", scores, "--label-column", "caf\u00e9", "--show"]
    script = [*PART1[:2], "--output-dir"]
    narrow = BARE | {"PYTHONIOENCODING": "ascii", "COLUMNS": "20", "PYTHONUTF8": "1"}
    with open(tmp_path / "log", "wb") as log:
        how = {"stdout": log, "stderr": subprocess.PIPE, "check": False}
        done = subprocess.run([*script, tmp_path / "caf\u00e9", *options], env=narrow, **how)
    assert (done.returncode, done.stderr) == (0, b"")
    text = (tmp_path / "log").read_text("ascii")
    assert "no windows" in text and "caf\\xe9" in text
    assert "\r" not in text and "\x1b" not in text


@pytest.mark.parametrize("target", ["/dev/full", "&-"], ids=["full", "closed"])
def test_neither_a_lost_output_nor_a_notebooks_backend_ends_a_run(target, tmp_path):
    if target == "/dev/full" and not Path(target).exists():
        pytest.skip("there is no /dev/full here")
    colab = BARE | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = f"{shlex.join([*PART1, str(tmp_path)])} >{target}"
    how = {"stderr": subprocess.PIPE, "check": False}
    done = subprocess.run(command, shell=True, env=colab, **how)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "summary.json").exists()
