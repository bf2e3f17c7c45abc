"""Faults of all kinds: nothing is lost, nothing foreign gets in, no traceback is shown."""

import ctypes
import hashlib
import http.server
import io
import itertools
import json
import os
import pickle
import re
import resource
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import datasets

import part2_cifar_cnn as part2
import utils
from test_part2 import first, read_table
from utils import RunFailed, UserError, derive_seed, download, load_checkpoint

ROOT = Path(part2.__file__).resolve().parent
ARCHIVE, BATCHES = "cifar-10-python.tar.gz", "cifar-10-batches-py"
STEPS = 6  # in an epoch of the quick runs
QUICK = "--dataset digits --epochs 3 --batch-size 32 --device cpu --precision float32".split()


# --------------------------------------------------------------------- helpers


@pytest.fixture(scope="session")
def few_digits():
    return first(part2.load_digits(), 200)


@pytest.fixture(autouse=True)
def quick(few_digits, monkeypatch):
    """Runs on 200 digits and without plots take a moment only."""
    monkeypatch.setattr(part2, "load_digits", lambda: few_digits)
    monkeypatch.setattr(part2, "plot_all", lambda *a, **k: {}, raising=False)


def run(folder, *options):
    return part2.main([*QUICK, "--output-dir", str(folder), *options])


def error_line(capsys):
    """The one line that a run left on standard error."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and "Traceback" not in line
    return line


def without_times(value):
    """The same nested value without what was measured with a clock, or depends on it."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items()
                if not re.search("seconds|per_second|digest", str(key))}  # fmt: skip
    if isinstance(value, (list, tuple)):
        return [without_times(item) for item in value]
    if isinstance(value, torch.Tensor):
        bits = value.contiguous().reshape(-1).view(torch.uint8).numpy()
        return str(value.dtype), tuple(value.shape), hashlib.md5(bits).hexdigest()
    return value


def outcome(folder):
    """All that a run leaves, time fields apart, as nested lists and dictionaries."""
    checkpoints = {
        name: torch.load(folder / name, weights_only=True) for name in ("best.pt", "last.pt")
    }
    return without_times(checkpoints | {
        "history": read_table(folder / "history.csv"),
        "metrics": json.loads((folder / "metrics.json").read_text()),
        "config": json.loads((folder / "config.json").read_text()),
        "scores": (folder / "test_scores.csv").read_text(),
        "files": sorted(path.name for path in folder.iterdir()),
    })  # fmt: skip


def same(found, expected, where="result"):
    """Whether two outcomes are equal, NaN included; names the first place that is not."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        return all(same(found[key], expected[key], f"{where}/{key}") for key in expected)
    if isinstance(expected, (list, tuple)) and len(expected) == len(found):
        return all(same(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(found, expected)))
    assert found == expected or found != found and expected != expected, where
    return True


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def at_step(step, action):
    """Do ``action`` when training (of all epochs) loads its ``step``-th batch."""
    real, calls = part2.crop_and_flip, itertools.count(1)

    def crop(*args, **options):
        if not torch.is_inference_mode_enabled() and next(calls) == step:
            action()
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part2, "crop_and_flip", crop)
        yield calls


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def stopped_in_epoch_2(folder, *options):
    with at_step(STEPS + 2, press_ctrl_c):
        assert run(folder, *options) == 130


@contextmanager
def nan_at_step(step):
    """The images of the ``step``-th batch and of all that follow hold no numbers."""
    real, bad = part2.normalise, []
    with pytest.MonkeyPatch.context() as patch, at_step(step, lambda: bad.append(True)):
        patch.setattr(part2, "normalise", lambda *a: real(*a) * (np.nan if bad else 1))
        yield


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


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """What an uninterrupted run with the given options leaves (kept for later tests)."""
    known = {}

    def expected(*options):
        if options not in known:
            folder = tmp_path_factory.mktemp("whole")
            assert run(folder, *options) == 0
            known[options] = outcome(folder), folder
        return known[options][0]

    expected.folder = lambda *options: expected(*options) and known[options][1]
    return expected


# ---------------------------------------------------------------------- resume

SHORT = "--epochs 2 --warmup-epochs 1 --batch-size 16"
FLAGS = [f"--preset {preset} {SHORT}" for preset in part2.PRESETS] + [
    "--select-on test",
    "--select-on last",
    "--optimizer sgd --schedule cosine --warmup-epochs 1 --grad-clip 1 --weight-decay 1e-3",
    "--mixup 0.2 --cutout 8 --label-smoothing 0.1 --dropout 0 --seed 3",
    "--ema 0.9 --flip alternating --crop-fill reflect --crop-padding 2 --tta shift",
    "--ensemble 2 --schedule linear --lr 0.003",
    "--precision bfloat16",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    flags, whole, few_digits, tmp_path, monkeypatch, capsys
):
    flags, folder = flags.split(), tmp_path / "cut"
    few_digits = first(few_digits, 60, 60)  # some networks are large
    monkeypatch.setattr(part2, "load_digits", lambda: few_digits)
    chosen = whole(*flags)["config"]
    n = len(part2.split_rows(few_digits.labels, chosen["select_on"])[0])
    steps = -(-n // chosen["batch_size"])
    with at_step(steps + 1, press_ctrl_c):
        assert run(folder, *flags) == 130
    assert [row["epoch"] for row in read_table(folder / "history.csv")][0] == "1"
    resumed = ["--resume", "--output-dir", str(folder)]
    if "--ensemble" in flags:  # once more, in the second network
        with at_step(3 * steps + 1, press_ctrl_c):
            assert part2.main(resumed) == 130
        assert "1 of 3 epochs of this network are saved" in capsys.readouterr().err
    assert part2.main(resumed) == 0
    assert same(outcome(folder), whole(*flags))


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_ctrl_c_prints_the_command_that_continues(epoch, whole, tmp_path, capsys):
    folder = tmp_path / "a folder with spaces"
    with at_step(STEPS * (epoch - 1) + 3, press_ctrl_c) as calls:
        assert run(folder, "--seed", "4") == 130
        assert next(calls) == STEPS * (epoch - 1) + 4  # the current step was the last
    text = capsys.readouterr()
    (line,) = text.err.strip().splitlines()
    assert "Traceback" not in text.out + text.err
    if epoch > 1:
        assert len(read_table(folder / "history.csv")) == epoch - 1
        assert len(load_checkpoint(folder / "last.pt")["history"]) == epoch - 1
    script, *options = shlex.split(re.search(r"python3? (.*)", line)[1])
    assert script.endswith("part2_cifar_cnn.py")
    assert part2.main(options) == 0
    assert same(outcome(folder), whole("--seed", "4"))


def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(tmp_path):
    with script_of_part2(tmp_path) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT
    assert not list(tmp_path.iterdir())


def test_ctrl_c_before_the_first_epoch_is_one_line(tmp_path):
    with script_of_part2(tmp_path) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        (line,) = process.communicate()[1].strip().splitlines()
        assert line.startswith("interrupted") and process.returncode == 130


def script_of_part2(folder):
    script = [sys.executable, ROOT / "part2_cifar_cnn.py", "--dataset", "digits"]
    return subprocess.Popen(script, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)  # fmt: skip


def test_ctrl_c_in_the_last_step_still_leaves_a_whole_run(whole, tmp_path):
    with at_step(3 * STEPS, press_ctrl_c):
        assert run(tmp_path) == 130
    assert len(read_table(tmp_path / "history.csv")) == 3
    assert run(tmp_path, "--resume") == 0 and same(outcome(tmp_path), whole())


def test_second_ctrl_c_ends_the_run_at_once(tmp_path, capsys):
    with at_step(STEPS + 1, lambda: (press_ctrl_c(), press_ctrl_c())) as calls:
        assert run(tmp_path) == 130
        assert next(calls) == STEPS + 2
    assert "interrupted: go on with: python part2_cifar_cnn.py" in capsys.readouterr().err
    assert len(load_checkpoint(tmp_path / "last.pt")["history"]) == 1


def test_resume_after_falling_back_to_the_digits(monkeypatch, whole, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(part2, "MIRRORS", ())
    options = "--epochs 3 --batch-size 32 --device cpu --precision float32".split()
    with at_step(2 * STEPS + 1, press_ctrl_c):
        assert part2.main(options) == 130
    with at_step(STEPS + 1, pytest.fail):  # one epoch is left
        assert part2.main([*options, "--resume"]) == 0
    assert same(outcome(tmp_path / "outputs/part2-digits-changed"), whole())


def test_a_changed_run_is_resumed_without_its_options(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with at_step(STEPS + 1, press_ctrl_c):
        assert part2.main(QUICK) == 130
    with at_step(2 * STEPS + 1, pytest.fail):  # two epochs are left
        assert part2.main(["--dataset", "digits", "--resume"]) == 0
    assert [path.name for path in Path("outputs").iterdir()] == ["part2-digits-changed"]


def test_other_flags_on_resuming_are_named(tmp_path, capsys):
    stopped_in_epoch_2(tmp_path)
    before = contents(tmp_path)
    capsys.readouterr()
    assert run(tmp_path, "--resume", "--lr", "0.5", "--seed", "7", "--epochs", "3") == 2
    line = error_line(capsys)
    assert "--lr 0.5" in line and "--seed 7" in line and "--epochs" not in line
    assert contents(tmp_path) == before


def test_resume_without_a_checkpoint_starts_afresh(whole, tmp_path, capsys):
    assert run(tmp_path, "--resume") == 0
    assert "last.pt" in capsys.readouterr().out.splitlines()[0]
    assert same(outcome(tmp_path), whole())


@pytest.mark.parametrize("options", [QUICK, []], ids=["same options", "no options"])
def test_finished_run_is_left_unchanged(options, whole, capsys):
    folder = whole.folder()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert part2.main([*options, "--resume", "--output-dir", str(folder)]) == 0
    assert "finished" in capsys.readouterr().out
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert after == before


def test_new_run_that_is_killed_early_is_not_resumed_as_the_old_one(tmp_path, whole):
    assert run(tmp_path, "--seed", "1") == 0
    with at_step(2, press_ctrl_c):
        assert run(tmp_path) == 130
    run(tmp_path, "--resume")
    assert same(outcome(tmp_path), whole())


# ------------------------------------------------------------- killed, disk full

KILLER = """
import io, os, pathlib, random, signal, sys, time
import sklearn.datasets, sklearn.metrics, sklearn.model_selection
import part2_cifar_cnn as part2, utils
from test_part2 import first
import torch
torch.set_num_threads(1)  # a pool of threads would not survive the fork

class SlowFile(io.FileIO):
    def write(self, data):
        half = len(data) // 2
        written = super().write(data[:half])
        time.sleep(0.02)
        return written + super().write(data[half:])

def start(folder):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(part2.main([*sys.argv[2:], "--resume", "--output-dir", str(folder)]))
    return child

def finish(child):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

digits = first(part2.load_digits(), 200)
part2.load_digits, part2.plot_all = (lambda: digits), (lambda *a, **k: {})
utils.open = lambda path, mode: SlowFile(path, "w") if mode == "wb" else open(path, mode)
rng, top, kills, during_save, runs = random.Random(0), pathlib.Path(sys.argv[1]), 0, 0, 0
began = time.monotonic()
finish(start(top / "whole"))
duration = time.monotonic() - began
while kills < 20:
    runs += 1
    folder = top / f"run{runs}"
    while kills < 20:
        child = start(folder)
        deadline = time.monotonic() + rng.uniform(0, 0.8 * duration)
        in_save = kills % 4 == 3  # in any case wait for a save
        while time.monotonic() < deadline or in_save and not list(folder.glob(".*.part")):
            time.sleep(0.001)
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        kills += 1
        during_save += bool(list(folder.glob(".*.part")))
        for path in folder.glob("*.pt"):
            utils.load_checkpoint(path)
    finish(start(folder))
print(runs, during_save)
"""


def script_environment(**variables):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables


def test_run_killed_at_20_random_moments_ends_as_if_never_killed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), *QUICK], env=script_environment(),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs, during_save = map(int, done.stdout.split())
    assert during_save >= 4
    expected = outcome(tmp_path / "whole")
    assert all(same(outcome(tmp_path / f"run{i + 1}"), expected) for i in range(runs))


@pytest.mark.parametrize("size", [1000, 400_000, 2_000_000])
def test_disk_full_while_resuming_leaves_what_was_there(size, whole, tmp_path, capsys):
    stopped_in_epoch_2(tmp_path)
    before = contents(tmp_path)
    capsys.readouterr()
    with largest_file(size):
        assert run(tmp_path, "--resume") == 2
    line = error_line(capsys)
    assert "cannot write" in line and str(tmp_path) in line and "space" in line
    after = contents(tmp_path)
    assert after.keys() == before.keys() and after["last.pt"] == before["last.pt"]
    assert after["best.pt"] == before["best.pt"] or size > 1_200_000
    assert after["history.csv"].startswith(before["history.csv"])
    assert json.loads(after["config.json"]) == json.loads(before["config.json"])
    load_checkpoint(tmp_path / "best.pt")
    assert run(tmp_path, "--resume") == 0 and same(outcome(tmp_path), whole())


def test_disk_full_in_a_new_run_leaves_the_old_one_as_it_was(tmp_path, capsys):
    assert run(tmp_path, "--epochs", "1") == 0
    before = contents(tmp_path)
    with largest_file(400_000):
        assert run(tmp_path, "--epochs", "1", "--seed", "1") == 2
    assert "cannot write" in error_line(capsys)
    assert contents(tmp_path) == before


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
    with largest_file(5000), pytest.raises(UserError, match="cannot write"):
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
        for resume in ([], ["--resume"]):
            assert run(tmp_path / name, *resume) == 2
            assert "choose another --output-dir" in error_line(capsys)
        assert cifar_run(tmp_path / name, tmp_path / "out") == 2
    assert "CIFAR-10 cannot be had" in error_line(capsys)


def test_too_little_memory_is_reported_and_other_errors_are_not_hidden(capsys):
    assert utils.command(lambda argv: torch.empty(2**60, dtype=torch.uint8))() == 2
    assert "not enough memory" in error_line(capsys)
    with pytest.raises(RuntimeError, match="must match"):
        utils.command(lambda argv: torch.ones(2) + torch.ones(3))()


# -------------------------------------------------------------- loss not finite


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(whole, tmp_path, capsys):
    with nan_at_step(STEPS + 3):
        assert run(tmp_path) == 1
    line = error_line(capsys)
    assert "epoch 2" in line and "step 3" in line and "learning rate 0.001" in line
    assert "checkpoints of the epochs before are kept" in line
    assert len(load_checkpoint(tmp_path / "last.pt")["history"]) == 1
    assert len(read_table(tmp_path / "history.csv")) == 1
    assert run(tmp_path, "--resume") == 0 and same(outcome(tmp_path), whole())


def test_learning_rate_named_is_that_of_the_step(tmp_path, capsys):
    with nan_at_step(5):  # the rate is halved after this step
        assert run(tmp_path, "--epochs", "6", "--batch-size", "500") == 1
    line = error_line(capsys)
    assert "epoch 5" in line and "step 1" in line and re.search(r"rate 0\.001\b", line)


@pytest.mark.parametrize("batch_size", ["32", "500"])
@pytest.mark.parametrize("lr", ["1e8", "1e30"])
def test_weights_that_explode_are_not_saved_as_good(lr, batch_size, tmp_path, capsys):
    status = run(tmp_path, "--lr", lr, "--batch-size", batch_size, "--epochs", "2")
    captured = capsys.readouterr()
    assert status in (0, 1) and "Traceback" not in captured.err
    assert not re.search(r"\b(nan|inf)\b", captured.out)
    if status == 1:
        assert "learning rate" in captured.err and "epoch" in captured.err
        assert ("are kept" in captured.err) == ("at epoch 1," not in captured.err)
    if (tmp_path / "last.pt").exists():
        last = load_checkpoint(tmp_path / "last.pt")
        losses = [row[f"{part}_loss"] for row in last["history"] for part in ("train", "eval")]
        assert np.isfinite(losses).all()
        assert all(value.isfinite().all() for value in last["model"].values())


# ----------------------------------------------------------------- checkpoints


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.marker))}",)


def plain_pickle(path, good, marker):
    path.write_bytes(pickle.dumps(good | {"model": Hostile(marker)}))


def in_torch_zip(path, good, marker):
    torch.save(good | {"model": Hostile(marker)}, path)


def in_old_torch_file(path, good, marker):
    torch.save(good | {"mean": Hostile(marker)}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("hide", [plain_pickle, in_torch_zip, in_old_torch_file])
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_hostile_checkpoint_is_refused_and_not_run(name, hide, tmp_path, capsys):
    folder, marker = tmp_path / "run", tmp_path / "marker"
    stopped_in_epoch_2(folder)
    hide(folder / name, torch.load(folder / name), marker)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        if name == "best.pt":  # it must not be mended by a better epoch
            patch.setattr(part2, "accuracy", lambda *a: 0.0)
        status = run(folder, "--resume")
    assert not marker.exists()
    if name == "last.pt" or status:
        assert status == 2 and name in error_line(capsys)
    torch.load(folder / name, weights_only=False) if hide is in_torch_zip and status else None
    assert marker.exists() == (hide is in_torch_zip and status == 2)  # the trap works


def truncated(data):
    return data[: len(data) // 2]


def empty(data):
    return b""


def flipped(data):
    return data[:50_000] + bytes([data[50_000] ^ 4]) + data[50_001:]


def foreign(data):
    return b"epoch,lr\n1,0.1\n"


def edited(change):
    """Damage that a whole, well-formed checkpoint can have."""

    def edit(data):
        checkpoint, file = torch.load(io.BytesIO(data)), io.BytesIO()
        change(checkpoint)
        torch.save(checkpoint, file)
        return file.getvalue()

    return edit


def config(**values):
    return edited(lambda c: c["config"].update(values))


def other_shapes(checkpoint):
    model = checkpoint["model"]
    model |= {key: value[..., :1] for key, value in model.items() if value.dim() > 1}


def other_optimizer(checkpoint):
    state = checkpoint["optimizer"]["state"]
    state[0]["exp_avg"] = torch.zeros(3, 3)


DAMAGE = {
    "truncated": truncated, "empty": empty, "one bit flipped": flipped, "foreign": foreign,
    "another architecture": edited(other_shapes),
    "another model's name": config(model="unheard of"),
    "no such device": config(device="abacus"),
    "epochs as text": config(epochs="three"),
    "no batch": config(batch_size=0),
    "seed below zero": config(seed=-1),
    "dropout of two": config(dropout=2.0),
    "select on what": config(select_on="what"),
    "data set unknown": config(dataset="unheard of"),
    "config is a list": edited(lambda c: c.update(config=[1])),
    "other classes": edited(lambda c: c.update(classes=["cat", "dog"])),
    "classes are a number": edited(lambda c: c.update(classes=3)),
    "no classes": edited(lambda c: c.pop("classes")),
    "a setting is missing": edited(lambda c: c["config"].pop("crop_fill")),
    "no optimiser": edited(lambda c: c.pop("optimizer")),
    "optimiser of another network": edited(other_optimizer),
    "history is text": edited(lambda c: c.update(history="long")),
    "history of numbers": edited(lambda c: c.update(history=[1, 2])),
    "another format": edited(lambda c: c.update(format="cifar-cnn-checkpoint-99")),
    "a bare state dict": edited(lambda c: [c.pop(k) for k in list(c) if k != "model"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_refused_in_one_line(damage, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(part2, "MIRRORS", ())
    stopped_in_epoch_2(tmp_path)
    path = tmp_path / "last.pt"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    before = contents(tmp_path)
    capsys.readouterr()
    # Not one step may be made with it: a foreign optimiser state can crash Python itself.
    monkeypatch.setattr(part2.Training, "train", lambda *a: pytest.fail("it was trained with"))
    assert part2.main(["--resume", "--output-dir", str(tmp_path)]) == 2
    assert "last.pt" in error_line(capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["another architecture", "another model's name",
                                    "other classes", "optimiser of another network",
                                    "a setting is missing", "no optimiser"])  # fmt: skip
def test_whole_checkpoint_of_another_network_is_refused(damage, tmp_path, capsys, monkeypatch):
    """As of another version of the script: nothing was altered after it was written."""
    stopped_in_epoch_2(tmp_path)
    path = tmp_path / "last.pt"
    utils.save_checkpoint(path, **torch.load(io.BytesIO(DAMAGE[damage](path.read_bytes()))))
    before = contents(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(part2.Training, "train", lambda *a: pytest.fail("it was trained with"))
    assert part2.main(["--resume", "--output-dir", str(tmp_path)]) == 2
    assert "last.pt" in error_line(capsys) and contents(tmp_path) == before


def test_best_checkpoint_in_the_place_of_the_last_is_refused(whole, tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes((whole.folder() / "best.pt").read_bytes())
    assert part2.main(["--resume", "--output-dir", str(tmp_path)]) == 2
    assert "last.pt" in error_line(capsys)


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "another architecture",
                                    "another model's name", "missing"])  # fmt: skip
def test_damaged_best_checkpoint_is_never_reported_from(damage, whole, tmp_path, capsys):
    with at_step(3 * STEPS, press_ctrl_c):  # only the evaluation is left
        assert run(tmp_path) == 130
    path = tmp_path / "best.pt"
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(DAMAGE[damage](data))
    capsys.readouterr()
    status = run(tmp_path, "--resume")
    if status == 0:  # it was made again from what last.pt holds
        assert same(outcome(tmp_path), whole())
    else:
        assert status == 2 and "best.pt" in error_line(capsys)


def test_a_run_may_go_on_in_another_precision(tmp_path):
    with at_step(STEPS + 1, press_ctrl_c):
        assert run(tmp_path) == 130
    assert run(tmp_path, "--resume", "--precision", "bfloat16") == 0
    for name in ("config.json", "metrics.json"):
        assert json.loads((tmp_path / name).read_text())["precision"] == "bfloat16"


def test_accuracy_read_back_is_that_reported():
    history = [{"eval_accuracy": 0.5}, {"eval_accuracy": 0.9}]
    part2.check_reported({"val": 0.9}, history, "val", slack=0)
    part2.check_reported({"val": 0.899}, history, "val", slack=0.02)
    for found, slack in ((0.899, 0), (0.87, 0.02)):
        with pytest.raises(RunFailed, match="cannot be trusted"):
            part2.check_reported({"val": found}, history, "val", slack)


@pytest.mark.parametrize("resumed", [False, True])
def test_another_network_in_best_is_not_reported_from(resumed, tmp_path, capsys):
    def replaced(save, path, **content):
        if path.name == "best.pt":
            content["model"]["12.bias"][:] = torch.arange(10.0)  # takes all for nines
        save(path, **content)

    if resumed:
        with at_step(STEPS + 1, press_ctrl_c):
            assert run(tmp_path) == 130
        capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part2, "save_checkpoint", partial(replaced, utils.save_checkpoint))
        assert run(tmp_path, *["--resume"] * resumed) == 1
    assert "cannot be trusted" in error_line(capsys)


def test_checkpoint_of_a_gpu_loads_on_the_cpu(tmp_path):
    path, changed = tmp_path / "cpu.pt", tmp_path / "cuda.pt"
    model = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(7)}
    utils.save_checkpoint(path, model=model, config={}, classes=[], mean=[], std=[])
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):  # where each tensor was: "cpu", 3 letters
                assert b"X\x03\0\0\0cpu" in data
                data = data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
            new.writestr(name, data)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(changed)
    found = load_checkpoint(changed)["model"]
    assert all(torch.equal(found[key], model[key]) for key in model)
    assert {value.device.type for value in found.values()} == {"cpu"}


# ------------------------------------------------------------------------ data


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """CIFAR-10's files in small, whose MD5 sums take the place of the real ones."""
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    source, files = datasets.CIFAR10, {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        files[name] = {"data": pixels, "labels": [i % 10 for i in range(20)]}
    files["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / BATCHES).mkdir(parents=True)
    for name, content in files.items():
        (folder / BATCHES / name).write_bytes(pickle.dumps(content))
    md5 = {name: utils.md5_of(folder / BATCHES / name) for name in files}
    with tarfile.open(tmp_path / ARCHIVE, "w:gz") as tar:
        tar.add(folder / BATCHES, BATCHES)
    archive = tmp_path / ARCHIVE
    monkeypatch.setattr(source, "train_list", [[k, v] for k, v in md5.items() if "data_" in k])
    monkeypatch.setattr(source, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(source, "tgz_md5", utils.md5_of(archive))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(part2, "MIRRORS", ())
    empty = tmp_path / "empty"
    empty.mkdir()
    return SimpleNamespace(folder=folder, files=files, md5=md5, archive=archive, empty=empty)


def check_tiny(tiny, data):
    expected = np.concatenate([tiny.files[f"data_batch_{i}"]["data"] for i in range(1, 6)])
    pixels = expected.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(data.images, pixels) and data.classes[3] == "class 3"


def cifar_run(folder, output, dataset="cifar10"):
    options = f"--dataset {dataset} --epochs 1 --batch-size 50 --device cpu --data-dir".split()
    return part2.main([*options, str(folder), "--output-dir", str(output)])


@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
@pytest.mark.parametrize("damage", [truncated, empty, flipped, foreign, "hostile"])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_batch_file_is_named_with_both_md5_sums(
    name, damage, dataset, tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(part2, "fetch_archive", lambda *a: pytest.fail("a second download"))
    path, marker = tiny.folder / BATCHES / name, tmp_path / "marker"
    data = path.read_bytes()
    if damage == "hostile":
        damaged = pickle.dumps(Hostile(marker))
    elif damage is flipped:
        damaged = data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]
    else:
        damaged = damage(data)
    path.write_bytes(damaged)
    assert cifar_run(tiny.folder, tmp_path / "out", dataset) == 2
    line = error_line(capsys)
    assert str(path) in line and tiny.md5[name] in line
    assert hashlib.md5(damaged).hexdigest() in line and "delete" in line
    assert not (tmp_path / "out").exists() and not marker.exists()


@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
def test_missing_batch_file_is_named(dataset, tiny, tmp_path, capsys):
    path = tiny.folder / BATCHES / "data_batch_5"
    path.unlink()
    assert cifar_run(tiny.folder, tmp_path / "out", dataset) == 2
    assert str(path) in error_line(capsys)


@pytest.mark.parametrize("damage", [truncated, empty, foreign])
@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
def test_damaged_archive_is_named_with_both_md5_sums(damage, dataset, tiny, tmp_path, capsys):
    damaged = damage(tiny.archive.read_bytes())
    (tiny.empty / ARCHIVE).write_bytes(damaged)
    assert cifar_run(tiny.empty, tmp_path / "out", dataset) == 2
    line = error_line(capsys)
    assert str(tiny.empty / ARCHIVE) in line and datasets.CIFAR10.tgz_md5 in line
    assert hashlib.md5(damaged).hexdigest() in line
    assert [path.name for path in tiny.empty.iterdir()] == [ARCHIVE]


def test_archive_in_the_data_folder_is_unpacked(tiny):
    (tiny.empty / ARCHIVE).write_bytes(tiny.archive.read_bytes())
    check_tiny(tiny, part2.load_cifar10(tiny.empty))
    assert sorted(path.name for path in tiny.empty.iterdir()) == [BATCHES, ARCHIVE]


@pytest.mark.parametrize("kind", ["batches", "archive"])
def test_read_only_data_folder_works(kind, tiny):
    folder = tiny.folder
    if kind == "archive":
        folder = tiny.empty
        (folder / ARCHIVE).write_bytes(tiny.archive.read_bytes())
    with modes_bind(folder):
        check_tiny(tiny, part2.load_cifar10(folder))


@pytest.mark.parametrize("read_only", [False, True])
def test_an_archive_for_which_there_is_there_is_no_room_is_named(read_only, tiny):
    folder = tiny.empty
    (folder / ARCHIVE).write_bytes(tiny.archive.read_bytes())
    with largest_file(10_000), modes_bind(folder) if read_only else nullcontext():
        with pytest.raises(UserError, match=f"cannot unpack {folder / ARCHIVE}"):
            part2.load_cifar10(folder)
    assert [path.name for path in folder.iterdir()] == [ARCHIVE]


def test_data_folder_that_is_a_file_is_reported(tiny, tmp_path, capsys):
    assert cifar_run(tiny.archive, tmp_path / "out") == 2
    assert str(tiny.archive) in error_line(capsys)


# --------------------------------------------------------------------- servers


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``content`` rightly at /good, and in as many wrong ways as there are paths."""

    protocol_version = "HTTP/1.1"
    content, together = b"", None

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


WAYS = ("stall silent cut cut-chunk cut-unsized page missing broken loop no-number flipped "
        "not-http hang-up").split()  # fmt: skip


@pytest.fixture
def server(tiny):
    """A server on this machine; calling it with paths gives their addresses."""
    handler = type("Here", (Handler,), {"content": tiny.archive.read_bytes()})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.seen, httpd.released, httpd.together = [], threading.Event(), None
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
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
    download(server.at(way, "good"), path, utils.md5_of(tiny.archive), stall_seconds=0.5)
    assert path.read_bytes() == tiny.archive.read_bytes() and time.monotonic() - began < 5
    assert list(tiny.empty.iterdir()) == [path] and server.seen[-1] == "/good"


def test_bad_servers_only_leave_nothing_and_are_all_named(tiny, server):
    ways = [way for way in WAYS if way != "not-http"]
    with pytest.raises(UserError) as error:
        download(server.at(*ways), tiny.empty / ARCHIVE, utils.md5_of(tiny.archive), 0.3)
    assert all(address in str(error.value) for address in server.at(*ways))
    assert not list(tiny.empty.iterdir())


def test_first_good_mirror_is_enough(tiny, server, tmp_path, monkeypatch):
    monkeypatch.setattr(part2, "MIRRORS", server.at("cut", "page", "good", "missing"))
    assert cifar_run(tiny.empty / "new", tmp_path / "out") == 0
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
        assert cifar_run(tiny.empty, tmp_path / "out") == 2
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


# --------------------------------------------------------------------- options

WRONG = (
    "--epochs 0|--epochs -1|--epochs 1.5|--epochs many|--batch-size 0|--batch-size -8|--lr 0|"
    "--lr -1|--lr nan|--lr inf|--lr fast|--dropout 1|--dropout -0.1|--dropout nan|--seed -1|"
    "--device nonsense|--device meta|--device hpu|--device cuda:99|--precision float16|"
    "--select-on train|--dataset mnist|--unheard-of|--see 1|stray|--cutout 32|--mixup 0.0001|"
    "--momentum 0.5|--crop-fill reflect --crop-padding 0"
).split("|") + [
    f"--seed 1{'0' * 400}", f"--epochs {'9' * 5000}", "--output-dir a-file",
]  # fmt: skip


def test_an_option_beside_a_preset_wins(tmp_path):
    options = "--preset tuned --epochs 1 --warmup-epochs 0.5 --tta none"
    assert run(tmp_path, *options.split()) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["tta"], config["batch_size"]) == ("none", 32)
    assert (config["model"], config["optimizer"]) == ("tuned", "muon")


@pytest.mark.parametrize("options", WRONG, ids=lambda text: text[:30])
def test_wrong_option_is_one_line_and_nothing_is_written(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("mine")
    assert part2.main([*QUICK, "--output-dir", "out", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and options.split()[0].lstrip("-") in line
    assert contents(tmp_path) == {"a-file": b"mine"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_cuda_says_what_to_use_instead(tmp_path, capsys):
    assert run(tmp_path / "out", "--device", "cuda") == 2
    line = error_line(capsys)
    assert "--device cpu" in line and "cuda" in line and not (tmp_path / "out").exists()


def test_output_path_is_checked_before_the_data_is_fetched(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(part2, "fetch_archive", lambda *a: pytest.fail("fetched before"))
    assert cifar_run(tiny.empty, tiny.archive) == 2
    assert "--output-dir" in error_line(capsys)


@pytest.mark.parametrize("size", ["178", "179", "180", "1000000", str(10**30)])
def test_large_batches_and_a_last_batch_of_one_image_work(size, tmp_path, capsys):
    assert run(tmp_path, "--batch-size", size, "--epochs", "1") == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["test_accuracy"] >= 0


def test_large_seed_works(tmp_path):
    assert run(tmp_path, "--seed", str(10**30), "--epochs", "1") == 0
    assert derive_seed(10**30) != derive_seed(10**30 + 1)


# ----------------------------------------------------- where the output goes to

PART1 = [sys.executable, "part1_threshold.py", "--n-samples", "500", "--output-dir"]
PART2 = [sys.executable, "part2_cifar_cnn.py", *QUICK, "--epochs", "1", "--output-dir"]
BARE = {key: value for key, value in os.environ.items()
        if key not in ("DISPLAY", "WAYLAND_DISPLAY", "LANG", "LC_ALL", "MPLBACKEND")}  # fmt: skip


@pytest.mark.parametrize("command", [PART1, PART2], ids=["part 1", "part 2"])
def test_reader_that_leaves_early_narrow_ascii_and_no_display(command, tmp_path):
    """As with ``| head -1``, in a terminal of 20 columns without UTF-8, and --show in vain."""
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0",
                  "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20"}  # fmt: skip
    folder = tmp_path / os.fsdecode(b"caf\xc3\xa9 \xff")
    process = subprocess.Popen(
        [*command, folder, "--show"], cwd=ROOT, env=BARE | ascii_only,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline().startswith(b"1. ")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 0 and errors == b""
    assert len(list(folder.glob("*.png"))) >= 4 and len(list(folder.glob("*.json"))) >= 1


def test_narrow_ascii_output_in_a_file_is_whole(tmp_path):
    scores = tmp_path / "scores.csv"
    scores.write_text("caf\u00e9,y_score\n" + "1,0.9\n0,0.2\n1,0.7\n0,0.6\n" * 5, encoding="utf-8")
    options = ["--scores", scores, "--label-column", "caf\u00e9", "--show"]
    with open(tmp_path / "log", "wb") as log:
        done = subprocess.run(
            [*PART1, tmp_path / "caf\u00e9", *options], cwd=ROOT, stdout=log, check=False,
            stderr=subprocess.PIPE,
            env=BARE | {"PYTHONIOENCODING": "ascii", "COLUMNS": "20", "PYTHONUTF8": "1"},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    text = (tmp_path / "log").read_text("ascii")
    assert "no display" in text and "caf\\xe9" in text
    assert "\r" not in text and "\x1b" not in text


def test_plot_backend_of_a_notebook_does_not_matter(tmp_path):
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as Colab sets it
    done = subprocess.run([*PART1, tmp_path], cwd=ROOT, env=BARE | backend, stderr=subprocess.PIPE,
                          check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("target", ["/dev/full", "&-"], ids=["full", "closed"])
def test_output_that_cannot_be_written_does_not_end_a_run(target, tmp_path):
    if target == "/dev/full" and not Path(target).exists():
        pytest.skip("there is no /dev/full here")
    command = f"{shlex.join([*PART1, str(tmp_path)])} >{target}"
    done = subprocess.run(command, shell=True, cwd=ROOT, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "summary.json").exists()
