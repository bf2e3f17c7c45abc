"""What all tests share: the import path, Ctrl-C, plots without a screen, data and quick runs."""

import os
import signal
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

# Tiny networks gain nothing from threads, and a forked child cannot use its parent's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
matplotlib.use("Agg")
signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup it is ignored

from helpers import first  # noqa: E402

import part2_cifar_cnn as part2  # noqa: E402


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
def quick(few_digits, monkeypatch):
    """Runs of part 2 on 200 digits and without figures, which take a moment only."""
    monkeypatch.setattr(part2, "load_digits", lambda: few_digits)
    monkeypatch.setattr(part2, "FIGURES", {})


@pytest.fixture
def all_cores():
    """Compute with all cores, as a user does; the other tests are too small to gain by it."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)
