"""Part 2 where people put it: devices, threads, folders, notebooks, terminals, other programs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from helpers import ARCHIVE, BATCHES, check_tiny, error_line, read_table, run, run_tiny
from torch.utils._python_dispatch import TorchDispatchMode

import part2_cifar_cnn as part2
import utils
from part2_cifar_cnn import PRESETS, Data, Settings, Split, Training

ROOT = Path(part2.__file__).resolve().parent


# ------------------------------------------------------------ one run a folder


def test_a_folder_belongs_to_one_process_at_a_time(quick, tmp_path, capsys):
    script = (
        "import sys, utils; utils.output_folder(sys.argv[1]); print('in', flush=True); input()"
    )
    command = [sys.executable, "-c", script, tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == b"in\n"
        assert run(tmp_path) == 2
        line = error_line(capsys)
        assert "--output-dir" in line and (str(other.pid) in line or "another process" in line)
        other.kill()
    assert run(tmp_path, "--epochs", "1") == 0  # the lock died with its process


def test_of_equally_good_epochs_the_one_with_the_lowest_loss_is_kept():
    rows = [(0.9, 0.5), (0.95, 0.4), (0.95, 0.2), (0.95, 0.3), (0.8, 0.1)]
    history = [
        {"epoch": i, "val_accuracy": share, "val_loss": loss}
        for i, (share, loss) in enumerate(rows, 1)
    ]
    assert part2.best_epoch(history) == 3


def test_output_folder_that_is_deleted_in_mid_run_is_made_again(quick, tmp_path, capsys):
    folder, batches = tmp_path / "out", part2.batches

    def delete_in_epoch_2(data, settings, epoch, *size):
        if epoch == 2 and folder.exists():
            shutil.rmtree(folder)
        return batches(data, settings, epoch, *size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part2, "batches", delete_in_epoch_2)
        assert run(folder, "--select-on", "last") == 0
    assert capsys.readouterr().out.count("was deleted") == 1
    assert len(read_table(folder / "history.csv")) == 3
    assert (folder / "metrics.json").exists() and (folder / "best.pt").exists()


# ------------------------------------------------------------------- devices


def test_a_gpu_that_does_not_work_is_named_and_not_used(monkeypatch):
    def no_kernel(device):
        raise RuntimeError("CUDA error: no kernel image is available for execution\nmore")

    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **how: gpu)
    device, reason = utils.choose_device("auto", no_kernel)
    assert device.type == "cpu" and reason.endswith("no kernel image is available for execution")
    with pytest.raises(utils.UserError, match="--device cuda .* no kernel image .*--device cpu"):
        utils.choose_device("cuda", no_kernel)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert utils.choose_device("auto", lambda device: None) == (gpu, "found a GPU")


def test_the_trial_of_a_device_is_a_training_step(monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: steps.append(self))
    part2.try_device(torch.device("cpu"))
    assert len(steps) == 1
    with pytest.raises(RuntimeError):
        part2.try_device(torch.device("meta"))


class OnOneDevice(TorchDispatchMode):
    """Refuse what a GPU would wait for or refuse: numbers asked for, mixed devices, float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [each for each in torch.utils._pytree.tree_leaves((args, kwargs))]
        given = [each for each in given if isinstance(each, torch.Tensor)]
        on_device = [each for each in given if each.is_meta]
        assert not (on_device and "_local_scalar_dense" in str(func)), "a number is asked for"
        moves = ("_to_copy", "copy_", "_foreach_copy")
        if on_device and not any(name in str(func) for name in moves):
            assert all(each.is_meta or each.ndim == 0 for each in given), f"{func} mixes devices"
        assert not any(each.dtype == torch.float64 for each in on_device), "MPS has no float64"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [
    {}, {"optimizer": "adamw", "weight_decay": 0.01}, {"optimizer": "sgd", "lr": 0.05},
    {"cutout": 8, "mixup": 0.2}, {"grad_clip": 1.0, "label_smoothing": 0.1}, {"ema": 0.99},
    PRESETS["tuned"], PRESETS["strong"], PRESETS["resnet18"],
], ids=lambda options: " ".join(options))  # fmt: skip
def test_a_step_stays_on_its_device(options, monkeypatch):
    """On the meta device, which computes nothing but raises as a GPU does."""
    for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        real = optimizer.__init__  # meta has no fused steps
        monkeypatch.setattr(
            optimizer, "__init__", lambda *a, real=real, **k: real(*a, **k | {"fused": False})
        )
    images = torch.zeros(60, 32, 32, 3, dtype=torch.uint8, device="meta")
    split = Split(images, torch.zeros(60, dtype=torch.int64, device="meta"))
    about = tuple("0123456789"), part2.CIFAR10_MEAN, part2.CIFAR10_STD, True
    data = Data("trial", "trial", *about, split, split, split)
    how = {"device": "meta", "precision": "float32", "batch_size": 30}
    settings = Settings(**options | how)
    monkeypatch.setattr(part2, "WHITENED", set())  # on the CPU, before the first step
    monkeypatch.setattr(part2, "autocast", lambda settings: nullcontext())
    monkeypatch.setattr(part2, "check_finite", lambda *a: None)  # twice a second, and at the end
    training = Training(settings, data)
    steps, batches = [], part2.batches

    def watched(*args):
        with OnOneDevice():
            for images, targets in batches(*args):
                last = images.is_contiguous(memory_format=torch.channels_last)
                assert last or settings.mixup  # on meta torchvision's is laid out otherwise
                steps.append(len(images))
                yield images, targets

    monkeypatch.setattr(part2, "batches", watched)
    with pytest.raises(RuntimeError, match="meta"):  # the epoch's loss, after all steps
        part2.train_epoch(training)
    assert steps == [30, 30]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("preset", PRESETS)
def test_runs_on_cuda_and_its_checkpoint_loads_without(quick, preset, tmp_path):
    options = ["--preset", preset, "--warmup-epochs", "0", "--epochs", "1", "--device", "cuda"]
    assert run(tmp_path, *options, "--weights", "none") == 0
    stored = torch.load(tmp_path / "best.pt", weights_only=True)
    assert {value.device.type for value in stored["model"].values()} == {"cpu"}


def test_checkpoints_hold_cpu_tensors_whatever_trained_them(tmp_path):
    class OnGpu(torch.Tensor):
        def cpu(self):
            return torch.Tensor(self.numpy() + 1)

    moved = torch.ones(2).as_subclass(OnGpu)
    utils.save_checkpoint(tmp_path / "c.pt", model={"w": moved, "more": [moved]})
    stored = torch.load(tmp_path / "c.pt", weights_only=True)["model"]
    assert stored["w"].tolist() == stored["more"][0].tolist() == [2, 2]


def test_too_little_memory_on_a_gpu_names_the_batch_size_to_try(
    quick, monkeypatch, tmp_path, capsys
):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(part2, "train_epoch", full)
    assert run(tmp_path, "--batch-size", "64") == 2
    assert "--batch-size 32" in error_line(capsys)


# ------------------------------------------------------------------- threads


def test_threads_are_set_recorded_and_told_where_they_change(quick, tmp_path, capsys):
    before = torch.get_num_threads()
    try:
        assert run(tmp_path, "--epochs", "1", "--threads", "2") == 0
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["threads"] == config["machine"]["threads"] == torch.get_num_threads() == 2
        capsys.readouterr()
        options = ["--resume", str(tmp_path), "--epochs", "2", "--threads"]
        assert part2.main([*options, "2"]) == 0
        assert "had 2 threads" not in capsys.readouterr().out
        assert part2.main(["--resume", str(tmp_path), "--epochs", "3", "--threads", "1"]) == 0
        assert "had 2 threads" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("limit, expected", [("150000 100000", 1), ("max 100000", 4), (None, 4)])
def test_threads_are_no_more_than_the_container_and_the_affinity_allow(
    monkeypatch, limit, expected
):
    def read_text(path):
        if limit is None:
            raise FileNotFoundError(path)
        return limit

    monkeypatch.setattr(
        utils, "Path", lambda name: SimpleNamespace(read_text=lambda: read_text(name))
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    assert utils.usable_threads() == expected


# ------------------------------------------------------------------- folders


def test_a_home_folder_is_expanded(quick, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("~/out", "--epochs", "1") == 0
    assert (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("place", ["itself", "deeper", "plain tar"])
def test_data_folders_as_people_have_them(tiny, place):
    folder = tiny.folder / BATCHES if place == "itself" else tiny.empty
    if place == "deeper":
        shutil.copytree(tiny.folder / BATCHES, folder / BATCHES / BATCHES)
    if place == "plain tar":
        with tarfile.open(folder / Path(ARCHIVE).stem, "w") as tar:
            tar.add(tiny.folder / BATCHES, BATCHES)
    check_tiny(tiny, part2.load_cifar10(folder))


@pytest.mark.parametrize("holds, name", [
    ("cifar-100-python/train", "CIFAR-100"), ("labels.npy", "CIFAR-10-C"),
    ("train/cat/1.png", "class folders"), ("notes.txt", "notes.txt"),
])  # fmt: skip
def test_other_data_is_named_and_never_ends_in_digits(tiny, holds, name, tmp_path, capsys):
    path = tiny.empty / holds
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    assert run_tiny(tiny.empty, tmp_path / "out", "auto") == 2
    assert name in error_line(capsys) and not (tmp_path / "out").exists()


# ------------------------------------------------- notebooks, threads, terminals


def test_a_notebook_keeps_its_style_backend_and_figures(quick, monkeypatch, tmp_path):
    import matplotlib.pyplot as plt

    def plot(plt, result):
        figure, axes = plt.subplots()
        axes.plot([1, 2], label="a line")
        return figure

    monkeypatch.setattr(part2, "FIGURES", {"06_toy": plot})
    monkeypatch.setenv("MPLBACKEND", "agg")
    plt.figure()
    before = dict(matplotlib.rcParams), plt.get_fignums(), dict(os.environ)
    assert run(tmp_path, "--epochs", "1") == 0
    assert (dict(matplotlib.rcParams), plt.get_fignums(), dict(os.environ)) == before
    assert (tmp_path / "06_toy.png").exists()
    plt.close("all")


@pytest.mark.parametrize("backend", ["module://no_such.backend", "pdf", "webagg"])
def test_show_without_windows_is_told_before_training(backend, tmp_path):
    """And the figures are saved."""
    script = ROOT / "part2_cifar_cnn.py"
    options = ["--show", "--dataset", "mnist"]  # refused: what is told before is enough
    environment = os.environ | {"MPLBACKEND": backend}
    command = [sys.executable, script, *options]
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **how)
    assert done.returncode == 2
    command = [sys.executable, "-c", "import utils; print(utils.can_show())"]
    done = subprocess.run(command, check=True, **how | {"cwd": ROOT})
    assert backend in done.stdout and done.stdout.endswith("False\n")


def test_main_runs_off_the_main_thread(quick, tmp_path):
    status = []
    thread = threading.Thread(target=lambda: status.append(run(tmp_path, "--epochs", "1")))
    thread.start()
    thread.join()
    assert status == [0]


def test_a_ctrl_c_that_was_ignored_at_the_start_stays_ignored(quick, monkeypatch, tmp_path):
    batches = part2.batches

    def pressed(*args):
        signal.raise_signal(signal.SIGINT)
        return batches(*args)

    monkeypatch.setattr(part2, "batches", pressed)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(tmp_path, "--epochs", "1") == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("terminal, drawn", [("xterm", True), ("dumb", False)])
def test_a_dumb_terminal_gets_plain_lines(monkeypatch, capsys, terminal, drawn):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", terminal)
    utils.show_progress("half")
    assert bool(capsys.readouterr().out) == drawn


def test_colours_of_others_are_not_in_our_line(capsys):
    @utils.command
    def main(argv):
        raise utils.UserError("\x1b[1mbold\x1b[0m\nand more")

    assert main([]) == 2 and error_line(capsys) == "error: bold and more"


def test_another_programs_utils_is_named(tmp_path):
    (tmp_path / "utils.py").write_text("def get_mean_and_std(data): pass\n")
    script = "import utils, sys; sys.path.insert(0, sys.argv[1]); import part2_cifar_cnn"
    command = [sys.executable, "-c", script, ROOT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and str(tmp_path / "utils.py") in done.stderr.splitlines()[-1]


# -------------------------------------------------------------- hostile files


@contextmanager
def within(seconds):
    """Fail where something hangs."""

    def alarm(*args):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["nested", "expanded", "pipe", "folder", "huge"])
def test_small_checkpoints_cannot_hang_or_fill_the_memory(kind, tmp_path):
    path = tmp_path / "best.pt"
    contents = {"format": utils.CHECKPOINT_FORMAT, "digest": "x"}
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(5 << 30)  # takes no room on the disk
    elif kind == "nested":  # 10 ** 12 lists in a few hundred bytes
        part = [0] * 10
        for _ in range(12):
            part = [part] * 10
        torch.save(contents | {"history": part}, path)
    else:
        torch.save(contents | {"model": torch.zeros(1).expand(10**10)}, path)
    with within(20), pytest.raises(utils.UserError, match=r"best\.pt"):
        utils.load_checkpoint(path)


def test_a_server_that_drips_is_given_up(tiny, monkeypatch):
    class Dripping:
        headers = {"Content-Length": "1000000"}

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def read1(self, size):
            threading.Event().wait(0.02)
            return b"x" * 10

    monkeypatch.setattr(utils.urllib.request, "urlopen", lambda *a, **k: Dripping())
    with within(20), pytest.raises(utils.UserError, match=r"bytes in \d+ s"):
        utils.download(["http://here/a"], tiny.empty / ARCHIVE, "0" * 32, stall_seconds=0.5)
    assert not list(tiny.empty.iterdir())


def test_off_a_terminal_a_download_says_each_tenth(tiny, monkeypatch, capsys):
    data = np.random.default_rng(0).bytes(1_000_000)

    class Response:
        headers = {"Content-Length": str(len(data))}
        parts = [data[i : i + 10_000] for i in range(0, len(data), 10_000)] + [b""]

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def read1(self, size):
            return self.parts.pop(0)

    monkeypatch.setattr(utils.urllib.request, "urlopen", lambda *a, **k: Response())
    path = tiny.empty / "file"
    with pytest.raises(utils.UserError):  # of another MD5
        utils.download(["http://here/a"], path, "0" * 32)
    shares = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "% of" in line]
    assert shares == [f"{10 * i}%" for i in range(1, 11)]


# --------------------------------------------------- what is not this run's


def test_only_our_own_files_are_replaced(quick, tmp_path):
    (tmp_path / "my_cat.png").write_text("mine")
    (tmp_path / "01_mine.png").write_text("mine")
    assert run(tmp_path) == 0 and run(tmp_path) == 0
    assert {path.read_text() for path in tmp_path.glob("*.png")} == {"mine"}


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_network_without_its_run_is_not_replaced(whole, quick, tmp_path, name, capsys):
    shutil.copy(whole / name, tmp_path)
    before = (tmp_path / name).read_bytes()
    assert run(tmp_path) == 2 and "--overwrite" in error_line(capsys)
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("arguments, why", [
    (["RUN", "--output-dir", "RUN"], "mix"), (["RUN/last.pt"], "best.pt"),
    (["RUN", "RUN/."], "same run"), (["EMPTY"], "--resume"), (["RUN", "--lr", "1"], "settings"),
    (["RUN", "--resume"], "--resume"),
])  # fmt: skip
def test_evaluate_refuses_what_would_not_be_true(whole, quick, tmp_path, arguments, why, capsys):
    folder, empty = shutil.copytree(whole, tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments = [
        each.replace("RUN", str(folder)).replace("EMPTY", str(empty)) for each in arguments
    ]
    assert part2.main(["--evaluate", *arguments]) == 2 and why in error_line(capsys)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_average_says_that_epochs_were_chosen_on_the_test_images(quick, tmp_path, capsys):
    for name, split in (("a", "val"), ("b", "test")):
        assert run(tmp_path / name, "--select-on", split, "--epochs", "1") == 0
    capsys.readouterr()
    runs = [str(tmp_path / name) for name in "ab"]
    assert part2.main(["--evaluate", *runs]) == 0
    assert "optimistic" in capsys.readouterr().out


def test_an_option_that_is_newer_than_a_run_has_its_default_there(
    whole, quick, monkeypatch, tmp_path
):
    option = part2.flag(0.0, utils.number(0, 1), "share of grey", augment=lambda *a: a[:2])
    newer = make_dataclass("Settings", [("grey", float, option)], bases=(Settings,), frozen=True)
    monkeypatch.setattr(part2, "Settings", newer)
    folder = shutil.copytree(whole, tmp_path / "run")
    assert part2.main(["--evaluate", str(folder)]) == 0
    assert part2.main(["--resume", str(folder), "--epochs", "4"]) == 0
    assert run(folder, "--epochs", "4", "--grey", "0.5") == 2


def test_a_best_network_that_a_sudden_end_lost_is_written_again(quick, tmp_path):
    assert run(tmp_path, "--select-on", "last") == 0
    scores = (tmp_path / "test_scores.csv").read_bytes()
    for name in ("best.pt", "metrics.json", "test_scores.csv"):
        (tmp_path / name).unlink()
    assert part2.main(["--resume", str(tmp_path)]) == 0
    assert (tmp_path / "test_scores.csv").read_bytes() == scores
