"""What several test modules use: small data, quick runs, tables, damaged and hostile files."""

import csv
import os
import shlex
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import part2_cifar_cnn as part2

ARCHIVE, BATCHES = "cifar-10-python.tar.gz", "cifar-10-batches-py"
QUICK = shlex.split("--dataset digits --epochs 3 --batch-size 32 --device cpu --precision float32")
SHADES = {"dark": 30, "grey": 128, "light, $_{$": 220}  # names that CSV and plots must bear


def read_table(path):
    """Rows of a CSV file as dicts of text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rounded(value):
    """A nested value with its floats rounded: sums in another order differ in the last digit."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 9) if isinstance(value, float) else value


def contents(folder):
    """The bytes of each file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def first(data, n, n_test=100):
    """The same data set with its first images only."""
    return replace(data, train=data.train[:n], test=data.test[:n_test])


@contextmanager
def quick_runs(data):
    """Part 2 finds ``data`` in place of the digits, and draws no figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part2, "load_digits", lambda: data)
        patch.setattr(part2, "FIGURES", {})
        yield


def run(folder, *options):
    """Exit status of part 2, in three short epochs on the digits unless options say otherwise."""
    return part2.main([*QUICK, "--output-dir", str(folder), *options])


def run_tiny(folder, output, dataset="cifar10"):
    """Exit status of part 2 on the files of the fixture `tiny`."""
    options = f"--dataset {dataset} --epochs 1 --batch-size 50 --device cpu --data-dir".split()
    return part2.main([*options, str(folder), "--output-dir", str(output)])


def check_tiny(tiny, data):
    """These are the images and classes of the fixture `tiny`."""
    expected = np.concatenate([tiny.files[f"data_batch_{i}"]["data"] for i in range(1, 6)])
    pixels = expected.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(data.train.images, pixels) and data.classes[3] == "class 3"


def error_line(capsys):
    """The one line that a run left on standard error."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and "Traceback" not in line and len(line) < 2000
    return line


def as_tensors(images, data):
    """Bytes (n, 32, 32, 3) to normalised (n, 3, 32, 32), written out."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (data.mean, data.std))
    return (images.permute(0, 3, 1, 2) / 255 - mean) / std


def network_of(path):
    """The network of a checkpoint, read as README shows it."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = part2.build_model(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def share_right(model, split, data):
    """Accuracy of a network on images and labels, without views."""
    with torch.no_grad():
        logits = model(as_tensors(split.images, data))
    return (logits.argmax(1) == split.labels).double().mean().item()


def run_epoch(training):
    """Train and judge for one epoch, as `part2.train` does."""
    training.history.append(part2.judge(training, part2.train_epoch(training)))


def state_of(model):
    """Weights and running statistics in one vector."""
    state = model.state_dict().values()
    return torch.cat([value.flatten() for value in state if value.is_floating_point()]).clone()


def picture(shade, rng, size=(40, 50)):
    """A noisy picture around a shade of grey."""
    pixels = rng.normal(shade, 20, (*size[::-1], 3)).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def make_pictures(folder, shades, n, seed):
    """A folder of ``n`` pictures for each class."""
    rng = np.random.default_rng(seed)
    for name, shade in shades.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            picture(shade, rng).save(folder / name / f"{i:02}.png")


class Hostile:
    """What makes the file ``marker`` when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.marker))}",)


def damaged_bytes(data, rng):
    """Truncate, overwrite, cut out, repeat or insert a few bytes; may leave all as it was."""
    data, way = bytearray(data), rng.randrange(6)
    start = rng.randrange(len(data) + 1)
    length = rng.choice([1, 2, 8, 100])
    if way == 0:
        del data[start:]
    elif way == 1:
        data[start : start + length] = rng.randbytes(len(data[start : start + length]))
    elif way == 2:
        del data[start : start + length]
    elif way == 3:
        data[start:start] = data[start : start + length]
    elif way == 4:
        data[start:start] = rng.randbytes(length)
    elif data:
        data[start % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)
