"""What all tests share: the import path, plots without a screen, the real data."""

import os
import sys
from pathlib import Path

import matplotlib
import pytest

# Tiny networks gain nothing from threads, and a forked child cannot use its parent's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
matplotlib.use("Agg")


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
