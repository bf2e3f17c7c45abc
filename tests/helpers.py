"""What several test modules use: small data, tables, checkpoints, the ends of a run."""

import csv
from dataclasses import replace

import torch

import part2_cifar_cnn as part2


def read_table(path):
    """Rows of a CSV file as dicts of text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def first(data, n, n_test=100):
    """The same data set with its first images only."""
    return replace(data, train=data.train[:n], test=data.test[:n_test])


def error_line(capsys):
    """The one line that a run left on standard error."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and "Traceback" not in line
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
