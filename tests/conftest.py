"""What all tests share: the import path, Ctrl-C, plots without a screen, data and quick runs."""

import os
import pickle
import signal
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

# Tiny networks gain nothing from threads, and a forked child cannot use its parent's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
matplotlib.use("Agg")
signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup it is ignored

from helpers import ARCHIVE, BATCHES, first, quick_runs, run  # noqa: E402

import part2_cifar_cnn as part2  # noqa: E402
import utils  # noqa: E402


def _folder(variable, content):
    """The folder that an environment variable names; otherwise the test is skipped."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"set {variable} to the folder of {content} to run this test")
    if not Path(value).is_dir():
        pytest.skip(f"{variable} is {value}, which is not a folder: no {content} there")
    return Path(value)


@pytest.fixture(scope="session")
def scores_dir():
    """Folder of published score files (``dca.csv``)."""
    return _folder("SCORES_DIR", "published scores")


@pytest.fixture(scope="session")
def cifar10_dir():
    """Folder of the CIFAR-10 files."""
    return _folder("CIFAR10_DIR", "the CIFAR-10 files")


@pytest.fixture(scope="session")
def digits():
    """All of scikit-learn's digits, as `part2.load_digits` gives them."""
    return part2.load_digits()


@pytest.fixture(scope="session")
def few_digits(digits):
    """Two hundred of them to train on."""
    return first(digits, 200)


@pytest.fixture
def quick(few_digits):
    """Runs of part 2 on 200 digits and without figures, which take a moment only."""
    with quick_runs(few_digits):
        yield


@pytest.fixture(scope="session")
def whole(few_digits, tmp_path_factory):
    """Folder of a quick run that nobody interrupted; copy it to change it."""
    folder = tmp_path_factory.mktemp("whole")
    with quick_runs(few_digits):
        assert run(folder) == 0
    return folder


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """CIFAR-10's files in small, whose MD5 sums take the place of the real ones."""
    rng, folder, empty = np.random.default_rng(0), tmp_path / "data", tmp_path / "empty"
    files = {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        files[name] = {"data": pixels, "labels": [i % 10 for i in range(20)]}
    (folder / BATCHES).mkdir(parents=True)
    empty.mkdir()
    for name, content in files.items():
        (folder / BATCHES / name).write_bytes(pickle.dumps(content))
    md5 = {name: utils.md5_of(folder / BATCHES / name) for name in files}
    archive = tmp_path / ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / BATCHES, BATCHES)
    train = [[name, md5[name]] for name in files if name.startswith("data_")]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", utils.md5_of(archive))
    monkeypatch.setattr(part2, "MIRRORS", ())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return SimpleNamespace(folder=folder, files=files, md5=md5, archive=archive, empty=empty)


@pytest.fixture
def all_cores():
    """Compute with all cores, as a user does; the other tests are too small to gain by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)
