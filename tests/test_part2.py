"""Tests of part2_cifar_cnn.py: data, augmentation, network, training, results, files."""

import itertools
import json
import pickle
import platform
import re
import socket
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    as_tensors,
    error_line,
    first,
    network_of,
    read_table,
    run_epoch,
    share_right,
)
from matplotlib.image import imread
from scipy.stats import binomtest
from sklearn import datasets as sk_datasets
from sklearn import metrics as sk
from torchvision.transforms.v2 import functional as tv

import part1_threshold as part1
import part2_cifar_cnn as part2
import utils
from part2_cifar_cnn import (
    Settings,
    Split,
    Training,
    batches,
    build_model,
    choose_precision,
    crop_and_flip,
    draw_epoch,
    normalise,
    set_aside,
)
from utils import derive_seed

ROOT = part1.Path(part1.__file__).resolve().parent
SETTINGS = Settings(dataset="digits", device="cpu", precision="float32")
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
EPOCHS = 8  # of the run that most tests look at


def titles(figure):
    texts = [figure._suptitle] if figure._suptitle else [figure.axes[0]._left_title]
    return " ".join(text.get_text() for text in texts)


def spy(monkeypatch, name):
    """Replace a function of the script by itself and note the arguments of each call."""
    real, calls = getattr(part2, name), []

    def noted(*args, **options):
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(part2, name, noted)
    return calls


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """One whole run on the digits: its folder, files, console text and figure titles."""
    folder, text, shown = tmp_path_factory.mktemp("digits"), StringIO(), {}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text):
        save = utils.save_figure
        patch.setattr(
            utils,
            "save_figure",
            lambda figure, path: (shown.update({path.name: titles(figure)}), save(figure, path)),
        )
        options = f"--dataset digits --epochs {EPOCHS} --device cpu --precision float32"
        status = part2.main([*options.split(), "--output-dir", str(folder)])
    assert status == 0
    return SimpleNamespace(
        folder=folder,
        text=text.getvalue(),
        titles=shown,
        metrics=json.loads((folder / "metrics.json").read_text()),
        config=json.loads((folder / "config.json").read_text()),
        history=read_table(folder / "history.csv"),
        scores=read_table(folder / "test_scores.csv"),
        best=torch.load(folder / "best.pt", weights_only=True),
        last=torch.load(folder / "last.pt", weights_only=True),
    )


# ------------------------------------------------------------------------ data


def test_digits_are_all_of_scikit_learns_enlarged_to_32_by_32(digits):
    images = torch.cat([digits.train.images, digits.test.images])
    labels = torch.cat([digits.train.labels, digits.test.labels])
    assert images.dtype == torch.uint8 and images.shape == (1797, 32, 32, 3)
    assert labels.dtype == torch.int64 and len(digits.test.labels) == 360
    assert (images[..., :1] == images).all()  # grey
    bunch = sk_datasets.load_digits()
    large = tv.resize(
        torch.tensor(bunch.images)[:, None].float() * 255 / 16, [32, 32], antialias=False
    )
    expected = sorted(zip(large[:, 0].round().byte().flatten(1).tolist(), bunch.target.tolist()))
    assert sorted(zip(images[..., 0].flatten(1).tolist(), labels.tolist())) == expected


def test_digits_are_split_by_class_and_normalised_by_their_training_pixels(digits):
    shares = torch.bincount(digits.test.labels) / torch.bincount(
        torch.cat([digits.train.labels, digits.test.labels])
    )
    assert (abs(shares - 0.2) < 0.01).all() and digits.classes == tuple("0123456789")
    pixels = digits.train.images.double() / 255
    assert digits.mean == pytest.approx([pixels.mean().item()] * 3, abs=1e-6)
    assert digits.std == pytest.approx([pixels.std().item()] * 3, abs=1e-6)


@pytest.mark.parametrize("preset", part2.PRESETS)
def test_digits_are_never_mirrored(digits, monkeypatch, preset):
    calls = spy(monkeypatch, "crop_and_flip")
    options = part2.PRESETS[preset] | {"model": "small", "batch_size": 64, "select_on": "val"}
    options |= {"weights": "none", "unfreeze": "all", "image_size": "32"}
    for mirror in (False, True):
        calls.clear()
        data = set_aside(replace(first(digits, 200), mirror=mirror), "val")
        run_epoch(Training(replace(SETTINGS, **options), data))
        assert any(call[4].any() for call in calls) == mirror


def some_data(digits, counts):
    """A data set of black images, so many of each class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.arange(len(labels))[:, None, None, None].expand(-1, 2, 2, 3)
    names = tuple(map(str, range(len(counts))))
    return replace(digits, classes=names, train=Split(images, labels))


@pytest.mark.parametrize("counts", [[100] * 10, [10, 200, 35]])
def test_held_out_images_are_a_fixed_tenth_of_each_class(digits, counts):
    whole = some_data(digits, counts)
    data = set_aside(whole, "val")
    ids = torch.cat([part.images[:, 0, 0, 0] for part in (data.train, data.valid)])
    assert sorted(ids.tolist()) == list(range(sum(counts)))
    held = torch.bincount(data.valid.labels, minlength=len(counts))
    assert all(abs(part - n / 10) <= 0.5 for part, n in zip(held, counts))
    assert torch.equal(whole.train.labels[data.valid.images[:, 0, 0, 0]], data.valid.labels)
    assert torch.equal(set_aside(whole, "val").valid.images, data.valid.images)


def test_what_chooses_the_epoch_follows_from_select_on(digits):
    last, test = (set_aside(digits, how) for how in ("last", "test"))
    assert len(last.train) == len(test.train) == len(digits.train)
    assert len(last.valid) == 0 and torch.equal(test.valid.images, digits.test.images)


@pytest.fixture(scope="session")
def cifar(cifar10_dir):
    return part2.load_cifar10(cifar10_dir)


def test_cifar10_is_what_its_batches_hold(cifar, cifar10_dir):
    with open(cifar10_dir / "cifar-10-batches-py/test_batch", "rb") as file:
        batch = pickle.load(file, encoding="bytes")
    pixels = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(cifar.test.images, pixels)
    assert cifar.test.labels.tolist() == batch[b"labels"]
    assert (
        cifar.train.images.shape == (50_000, 32, 32, 3) and cifar.train.images.dtype == torch.uint8
    )
    assert torch.bincount(cifar.train.labels).tolist() == [5000] * 10
    assert cifar.classes == CIFAR10_CLASSES and cifar.mirror


def test_cifar10_constants_are_those_of_the_training_pixels(cifar):
    levels = np.arange(256) / 255
    for channel in range(3):
        counts = np.bincount(cifar.train.images[..., channel].flatten(), minlength=256)
        mean = np.average(levels, weights=counts)
        variance = np.average((levels - mean) ** 2, weights=counts)
        assert cifar.mean[channel] == pytest.approx(mean, abs=6e-6)
        assert cifar.std[channel] == pytest.approx(variance**0.5, abs=6e-6)


def test_500_cifar10_images_of_each_class_are_held_out(cifar):
    data = set_aside(cifar, "val")
    assert torch.bincount(data.valid.labels).tolist() == [500] * 10
    assert torch.bincount(data.train.labels).tolist() == [4500] * 10


def test_one_epoch_of_the_baseline_reaches_48_percent(cifar, all_cores):
    settings = replace(SETTINGS, dataset="cifar10", precision="auto", select_on="last", epochs=1)
    training = Training(part2.prepare_machine(settings), set_aside(cifar, "last"))
    run_epoch(training)
    logits = part2.predict(training.network, cifar.test.images)
    assert (logits.argmax(1) == cifar.test.labels).double().mean() > 0.48


def test_the_committed_network_has_the_committed_accuracy(cifar, all_cores):
    """On another processor, or in float32, a few images may be judged otherwise."""
    folder = ROOT / "outputs" / "part2"
    metrics = json.loads((folder / "metrics.json").read_text())
    settings = part2.prepare_machine(replace(SETTINGS, precision="auto"))
    network = part2.load_network(folder)
    here = {"device": settings.device, "precision": settings.precision}
    network = replace(network, settings=replace(network.settings, **here))
    probs = part2.probabilities(network, cifar.test.images).numpy()
    labels = cifar.test.labels.numpy()
    share = part2.accuracy(labels, probs, cifar.classes)
    assert share == pytest.approx(metrics["accuracy"], abs=0.002)
    assert network.n_parameters == metrics["parameters"]
    rows = read_table(folder / "test_scores.csv")
    stored = np.array([[float(row[name]) for name in cifar.classes] for row in rows])
    assert [row["label"] for row in rows] == [cifar.classes[label] for label in labels]
    assert np.abs(stored - probs).mean() < 0.003
    assert (stored.argmax(1) == labels).mean() == metrics["accuracy"]
    history = read_table(folder / "history.csv")
    best = max(history, key=lambda row: float(row["val_accuracy"]))
    assert int(best["epoch"]) == metrics["best_epoch"]
    assert float(best["val_accuracy"]) == metrics["val_accuracy"]


def test_the_header_claims_what_the_committed_run_reached():
    metrics = json.loads((ROOT / "outputs" / "part2" / "metrics.json").read_text())
    claim = " ".join(part2.__doc__.split())
    assert f"{metrics['parameters']:,} parameters" in claim
    assert f"{metrics['accuracy']:.2%}" in claim
    assert f"take {metrics['train_seconds']:.0f} s" in claim


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def no_server(monkeypatch, tmp_path):
    """No mirror answers, and relative paths lie in the temporary folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(part2, "MIRRORS", (f"http://127.0.0.1:{closed_port()}/cifar",))
    monkeypatch.chdir(tmp_path)


def test_auto_falls_back_to_the_digits_with_a_banner(no_server, quick, tmp_path, capsys):
    assert part2.main(["--epochs", "1"]) == 0
    text = capsys.readouterr().out
    assert "!" * 40 in text and "CIFAR-10 IS NOT AVAILABLE" in text.upper()
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name == "part2-digits"
    for name in ("metrics.json", "config.json"):
        assert json.loads((folder / name).read_text())["dataset"] == "digits"


def test_cifar10_by_name_without_a_server_says_what_to_put_where(no_server, tmp_path, capsys):
    assert part2.main(["--dataset", "cifar10", "--data-dir", "mine"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for part in (
        "cifar-10-python.tar.gz",
        "170498071",
        "c58f30108f718f92721af3b95e74349a",
        "mine",
    ):
        assert part in line
    assert not (tmp_path / "outputs").exists() and not any(tmp_path.glob("mine/*"))


# ---------------------------------------------------------------- augmentation


def random_images(n, height=32, width=32):
    rng = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=rng)


@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("fill, mode", [("black", "constant"), ("reflect", "reflect")])
def test_crop_and_flip_is_torchvisions_image_by_image(padding, size, fill, mode):
    images, rng = random_images(20, *size), torch.Generator().manual_seed(padding)
    index = torch.randint(0, 20, (50,), generator=rng)
    top, left = torch.randint(-padding, padding + 1, (2, 50), generator=rng)
    mirrored = torch.rand(50, generator=rng) < 0.5
    found = crop_and_flip(images, index, top, left, mirrored, fill)
    assert found.dtype == torch.uint8 and found.shape == (50, *size, 3)
    for i in range(50):
        image = tv.pad(images[index[i]].permute(2, 0, 1), [padding] * 4, padding_mode=mode)
        image = tv.crop(image, padding + top[i].item(), padding + left[i].item(), *size)
        image = tv.horizontal_flip(image) if mirrored[i] else image
        assert torch.equal(found[i], image.permute(1, 2, 0))


def test_crop_without_shift_is_the_identity_and_leaves_the_images_alone():
    images, zero = random_images(30), torch.zeros(30, dtype=torch.int64)
    before = images.clone()
    assert torch.equal(crop_and_flip(images, torch.arange(30), zero, zero, zero > 0), before)
    crop_and_flip(images, torch.arange(30), zero + 3, zero - 2, zero == 0)
    assert torch.equal(images, before)


def draw(n, mirror=True, epoch=1, **options):
    drawn = draw_epoch(n, replace(SETTINGS, **options), mirror, epoch)
    return [drawn[name] for name in ("order", "top", "left", "mirrored")]


def test_each_image_has_its_own_shift_and_mirroring():
    order, top, left, mirrored = draw(20_000)
    assert sorted(order.tolist()) == list(range(20_000)) != order.tolist()
    counts = Counter(zip(top.tolist(), left.tolist(), mirrored.tolist()))
    assert set(top.tolist()) == set(left.tolist()) == set(range(-4, 5))
    assert len(counts) == 162 and min(counts.values()) > 60  # about 123 of each
    together = torch.stack([top, left, mirrored, order]).double()
    assert (torch.corrcoef(together) - torch.eye(4)).abs().max() < 0.05


def test_draws_follow_from_seed_and_epoch_alone():
    def same(a, b):
        return [torch.equal(x, y) for x, y in zip(a, b)]

    assert same(draw(500, epoch=3), draw(500, epoch=3)) == [True] * 4
    assert same(draw(500, epoch=3), draw(500, epoch=4)) == [False] * 4
    assert same(draw(500, seed=1), draw(500, seed=0)) == [False] * 4


def test_without_padding_and_mirroring_nothing_is_shifted_or_mirrored():
    _, top, left, mirrored = draw(500, mirror=False, crop_padding=0)
    assert not top.any() and not left.any() and not mirrored.any()


def test_derived_seeds_differ_and_suit_torch():
    tuples = list(itertools.product(range(5), range(5), range(20)))
    tuples += [(0,), (0, 0), (1, 0), (2**32,), (10**30,)]
    seeds = {derive_seed(*each) for each in tuples}
    assert len(seeds) == len(tuples) and all(0 <= seed < 2**63 for seed in seeds)


def test_normalise_is_torchvisions_in_channels_last():
    images, mean, std = random_images(6), (0.49, 0.48, 0.44), (0.24, 0.25, 0.26)
    found = normalise(images, mean, std)
    expected = tv.normalize(images.permute(0, 3, 1, 2) / 255, mean, std)
    assert torch.allclose(found, expected, atol=1e-5) and found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------- model


def network(name="small"):
    torch.manual_seed(0)
    return build_model(asdict(replace(SETTINGS, model=name)) | {"classes": 10})


@pytest.mark.parametrize("name", part2.MODELS)
def test_networks_map_images_to_ten_logits(name):
    model = network(name).eval()
    for n in (1, 5):
        logits = model(torch.randn(n, 3, 32, 32))
        assert logits.shape == (n, 10) and logits.isfinite().all()


def test_baseline_has_the_layers_and_parameters_asked_for(run):
    model = network()
    kinds = [type(layer).__name__ for layer in model if type(layer).__name__ != "Flatten"]
    assert Counter(kinds) == Counter(
        ["Conv2d", "MaxPool2d", "BatchNorm2d", "ReLU"] * 2
        + ["Linear", "ReLU", "Dropout", "Linear"]
    )
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() > 1]
    assert shapes == [(32, 3, 3, 3), (64, 32, 3, 3), (64, 4096), (10, 64)]
    assert sum(p.numel() for p in model.parameters()) == 282_442 == run.metrics["parameters"]
    assert 1.1e6 < (run.folder / "best.pt").stat().st_size < 1.2e6
    assert [layer.p for layer in model if type(layer).__name__ == "Dropout"] == [0.5]


@pytest.mark.parametrize("name", part2.MODELS)
def test_gradients_reach_every_parameter(name):
    # In evaluation mode: batch normalisation takes the gradient of a bias before it.
    model = network(name).eval()
    F.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert [key for key, p in trained.items() if p.grad is None or not p.grad.any()] == []


def test_an_epoch_changes_every_parameter(digits):
    training = Training(SETTINGS, set_aside(first(digits, 200), "last"))
    before = [p.clone() for p in training.model.parameters()]
    run_epoch(training)
    assert not any(map(torch.equal, before, training.model.parameters()))


# -------------------------------------------------------------------- training


def test_digits_are_learned(run):
    assert run.metrics["accuracy"] > 0.95 and run.metrics["val_accuracy"] > 0.95
    losses = [float(row["train_loss"]) for row in run.history]
    assert losses[-1] < losses[0] / 3


def test_learning_rate_is_halved_after_five_epochs(run):
    assert [float(row["lr"]) for row in run.history] == [0.001] * 5 + [0.0005] * (EPOCHS - 5)


@pytest.mark.parametrize("batch", ["usual", "one left over", "all but", "larger than the set"])
def test_every_training_image_is_seen_once_an_epoch(digits, monkeypatch, batch):
    n, data = 201, set_aside(first(digits, 201), "last")
    size = {"usual": 64, "one left over": 50, "all but": 200, "larger than the set": 10**30}[batch]
    training = Training(replace(SETTINGS, batch_size=size, select_on="last"), data)
    sizes, take = [], training.model.forward
    monkeypatch.setattr(training.model, "forward", lambda x: (sizes.append(len(x)), take(x))[1])
    calls = spy(monkeypatch, "crop_and_flip")
    part2.train_epoch(training)
    assert sorted(torch.cat([call[1] for call in calls]).tolist()) == list(range(n))
    assert sum(sizes) == n and max(sizes) <= size and len(sizes) == training.steps
    assert batch not in ("all but", "one left over") or sizes[-1] == 1
    assert all(p.isfinite().all() for p in training.model.parameters())


def test_batches_are_the_drawn_images_normalised_with_their_labels(digits):
    data, settings = set_aside(first(digits, 100), "last"), replace(SETTINGS, batch_size=64)
    (one, labels), (two, _) = batches(data, settings, epoch=3)
    drawn = draw_epoch(100, settings, data.mirror, 3)
    place = [drawn[name][:64] for name in ("order", "top", "left", "mirrored")]
    expected = normalise(crop_and_flip(data.train.images, *place), data.mean, data.std)
    assert torch.equal(one, expected) and len(two) == 36
    assert torch.equal(labels, data.train.labels[place[0]])


def test_the_mean_loss_weighs_each_image_alike(digits, monkeypatch):
    data = set_aside(first(digits, 201), "last")
    training = Training(replace(SETTINGS, batch_size=150, select_on="last"), data)
    losses, real = [], F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda *a, **k: (losses.append(real(*a, **k)), losses[-1])[1]
    )
    run_epoch(training)
    first_loss, second = (loss.item() for loss in losses)
    expected = (150 * first_loss + 51 * second) / 201
    assert training.history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)


def weights_after_an_epoch(seed, digits, **options):
    settings = replace(SETTINGS, seed=seed, batch_size=64, **options)
    training = Training(settings, set_aside(first(digits, 200), "val"))
    torch.rand(seed + 3)  # what happens between must not matter
    run_epoch(training)
    return torch.cat([p.detach().flatten() for p in training.model.parameters()])


def test_same_seed_same_bits_other_seed_other_bits(digits):
    once, again, other = (weights_after_an_epoch(seed, digits) for seed in (5, 5, 6))
    assert torch.equal(once, again) and not torch.isclose(once, other).all()


def test_same_command_same_results(quick, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = f"--dataset digits --epochs 1 --seed {seed} --output-dir {tmp_path / name}"
        assert part2.main(options.split()) == 0
    a, b, c = ((tmp_path / name / "test_scores.csv").read_bytes() for name in "abc")
    assert a == b != c
    a, b = (torch.load(tmp_path / name / "best.pt")["model"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_bfloat16_only_where_the_processor_computes_in_it(monkeypatch):
    cpu = torch.device("cpu")
    for able, expected in (
        ({}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": False, "avx2": True}, "float32"),
    ):
        monkeypatch.setattr(utils, "processor", lambda able=able: able)
        assert choose_precision("auto", cpu) == expected
        assert choose_precision("float32", cpu) == "float32"
        assert choose_precision("bfloat16", cpu) == "bfloat16"
    assert choose_precision("auto", torch.device("mps")) == "float32"


def test_a_torch_that_does_not_know_the_processor_computes_in_float32(monkeypatch):
    """As torch 2.6."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision("auto", torch.device("cpu")) == "float32"
    assert utils.describe_machine("cpu")["processor"] == platform.processor()


def test_bfloat16_run_is_recorded_and_close_to_float32(quick, tmp_path):
    losses = []
    for precision in ("bfloat16", "float32"):
        folder = tmp_path / precision
        options = f"--dataset digits --epochs 1 --precision {precision} --output-dir {folder}"
        assert part2.main(options.split()) == 0
        assert json.loads((folder / "metrics.json").read_text())["precision"] == precision
        losses.append(float(read_table(folder / "history.csv")[0]["train_loss"]))
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_a_run_in_emulated_bfloat16_is_told_so(quick, monkeypatch, tmp_path, capsys, precision):
    monkeypatch.setattr(utils, "processor", lambda: {})
    options = f"--dataset digits --epochs 1 --precision {precision} --output-dir {tmp_path}"
    assert part2.main(options.split()) == 0
    assert ("--precision float32 is faster" in capsys.readouterr().out) == (precision != "auto")


@pytest.mark.parametrize("select_on", ["val", "test", "last"])
def test_select_on_says_what_best_means(quick, tmp_path, capsys, select_on):
    options = f"--dataset digits --epochs 3 --batch-size 64 --select-on {select_on}"
    assert part2.main([*options.split(), "--output-dir", str(tmp_path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    rows = read_table(tmp_path / "history.csv")
    assert metrics["select_on"] == select_on
    if select_on == "last":
        assert metrics["best_epoch"] == 3 and {row["val_accuracy"] for row in rows} == {""}
    else:
        shares = [float(row["val_accuracy"]) for row in rows]
        assert shares[metrics["best_epoch"] - 1] == max(shares)
        assert metrics["val_accuracy" if select_on == "val" else "accuracy"] == max(shares)
    assert (metrics["val_accuracy"] is None) == (select_on != "val")
    assert ("optimistic" in text) == (select_on == "test")
    assert ("validation" in text.split("2. The network")[0]) == (select_on == "val")


# --------------------------------------------------------------------- results


def test_best_checkpoint_reproduces_every_accuracy_reported(run, digits):
    model, data = network_of(run.folder / "best.pt"), set_aside(digits, "val")
    for name, split in (("", data.test), ("val_", data.valid), ("train_", data.train)):
        assert share_right(model, split, data) == run.metrics[f"{name}accuracy"]


def test_last_checkpoint_is_the_last_epoch(run, digits):
    model, data = network_of(run.folder / "last.pt"), set_aside(digits, "val")
    assert share_right(model, data.valid, data) == float(run.history[-1]["val_accuracy"])
    loss = F.cross_entropy(model(as_tensors(data.valid.images, data)), data.valid.labels)
    assert float(run.history[-1]["val_loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert run.last["config"] == run.best["config"]


def test_checkpoints_are_plain_and_complete(run, digits):
    for checkpoint in (run.best, run.last):
        assert {"format", "model", "config", "classes", "mean", "std"} <= set(checkpoint)
        assert list(checkpoint["classes"]) == list(digits.classes)
        assert tuple(checkpoint["mean"]) == digits.mean and tuple(checkpoint["std"]) == digits.std
    assert all(type(value) is torch.Tensor for value in run.best["model"].values())


def test_history_has_a_row_per_epoch_and_the_documented_columns(run):
    assert list(run.history[0]) == (
        [
            "epoch",
            "lr",
            "train_loss",
            "train_accuracy",
            "val_loss",
            "val_accuracy",
            "temperature",
            "seconds",
        ]
    )
    assert [int(row["epoch"]) for row in run.history] == list(range(1, EPOCHS + 1))
    assert all(0 < float(row["train_accuracy"]) <= 1 for row in run.history)
    assert run.metrics["train_seconds"] == pytest.approx(
        sum(float(row["seconds"]) for row in run.history)
    )


def test_metrics_hold_what_is_documented(run):
    keys = [
        "dataset",
        "preset",
        "seed",
        "device",
        "precision",
        "parameters",
        "epochs",
        "best_epoch",
        "select_on",
        "train_accuracy",
        "val_accuracy",
        "accuracy",
        "per_class",
        "train_seconds",
        "images_per_second",
    ]
    assert set(keys) <= set(run.metrics)
    expected = {
        "dataset": "digits",
        "preset": "baseline",
        "seed": 42,
        "device": "cpu",
        "precision": "float32",
        "epochs": EPOCHS,
        "select_on": "val",
    }
    assert {key: run.metrics[key] for key in expected} == expected
    best = run.history[run.metrics["best_epoch"] - 1]
    assert best["val_accuracy"] == max(row["val_accuracy"] for row in run.history)
    assert run.metrics["machine"]["threads"] == run.config["threads"] == torch.get_num_threads()
    assert run.metrics["images_per_second"] == pytest.approx(
        1295 * EPOCHS / run.metrics["train_seconds"]
    )
    assert run.config == run.best["config"] | {"machine": run.metrics["machine"]}
    assert run.best["machine"] == run.last["machine"] == run.metrics["machine"]


def test_test_scores_are_probabilities_in_test_order(run, digits):
    assert list(run.scores[0]) == ["label", *digits.classes]
    labels = [digits.classes[label] for label in digits.test.labels]
    assert [row["label"] for row in run.scores] == labels
    probs = np.array([[float(row[name]) for name in digits.classes] for row in run.scores])
    assert np.allclose(probs.sum(1), 1, atol=1e-5) and (probs >= 0).all()
    preds = [digits.classes[i] for i in probs.argmax(1)]
    assert sk.accuracy_score(labels, preds) == run.metrics["accuracy"]
    names = ("precision", "recall", "f1")
    for name, score in zip(names, (sk.precision_score, sk.recall_score, sk.f1_score)):
        expected = score(labels, preds, average=None, labels=digits.classes, zero_division=0)
        found = [run.metrics["per_class"][label][name] for label in digits.classes]
        assert found == pytest.approx(list(expected))
    with torch.no_grad():
        logits = network_of(run.folder / "best.pt")(as_tensors(digits.test.images, digits))
    assert np.allclose(probs, (logits / run.metrics["temperature"]).softmax(1), atol=1e-5)


def test_part_1_reads_the_test_scores(run, tmp_path):
    options = ["--label-column", "label", "--score-column", "3", "--positive", "3", "--output-dir"]
    scores = str(run.folder / "test_scores.csv")
    assert part1.main(["--scores", scores, *options, str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    labels = [row["label"] == "3" for row in run.scores]
    assert (summary["n"], summary["n_positive"]) == (360, sum(labels))
    area = sk.roc_auc_score(labels, [float(row["3"]) for row in run.scores])
    assert summary["roc_auc"] == pytest.approx(area, abs=1e-9)


def test_interval_is_wilsons(run):
    right = round(360 * run.metrics["accuracy"])
    expected = binomtest(right, 360).proportion_ci(method="wilson")
    assert run.metrics["accuracy_interval"] == pytest.approx(list(expected), abs=1e-4)


def test_report_tells_the_numbers_of_the_files(run):
    assert "\r" not in run.text and "cpu" in run.text and "282,442" in run.text
    assert f"{run.metrics['accuracy']:.2%}" in run.text
    assert f"{run.metrics['train_accuracy']:.2%}" in run.text
    for name, found in run.metrics["per_class"].items():
        shares = "% +".join(f"{100 * found[key]:.1f}" for key in ("recall", "precision", "f1"))
        assert re.search(rf"^ +{name} +{shares}%", run.text, re.M)


@pytest.mark.parametrize(
    "train, test, half, verdict",
    [
        (0.21, 0.20, 0.10, "hardly learned"),
        (0.70, 0.69, 0.04, "underfits"),
        (0.85, 0.80, 0.04, "balanced"),
        (0.99, 0.98, 0.04, "little left"),
        (0.99, 0.80, 0.08, "memorises"),
        (0.99, 0.85, 0.08, "unclear"),
        (0.99, 1.00, 0.06, "unclear"),
    ],
)
def test_verdict_follows_from_accuracy_and_gap(run, train, test, half, verdict):
    assert part2.verdict(train, test, test - half, test + half) == verdict
    assert verdict in part2.VERDICTS
    assert run.metrics["verdict"] in part2.VERDICTS


def test_columns_of_the_table_stay_apart_when_the_loss_explodes():
    row = {
        "epoch": 1,
        "lr": 1000.0,
        "train_loss": 1e6,
        "train_accuracy": 0.1,
        "seconds": 1.0,
        "val_loss": 1e9,
        "val_accuracy": 0.1,
    }
    assert len(part2.row_text(row).split()) == 7


def test_confused_pairs_are_counted_from_the_scores(run, digits):
    pairs = Counter()
    for row in run.scores:
        guess = max(digits.classes, key=lambda name: float(row[name]))
        if guess != row["label"]:
            pairs[tuple(sorted((guess, row["label"])))] += 1
    told = run.metrics["confused_pairs"]
    assert told and [count for *_, count in told] == sorted(pairs.values())[::-1][: len(told)]
    assert all(pairs[a, b] == count for a, b, count in told)


def test_every_file_is_there_and_named_in_the_output(run):
    plots = sorted(path.name for path in run.folder.glob("*.png"))
    assert [name[:3] for name in plots] == [f"{i:02}_" for i in range(1, len(plots) + 1)]
    assert len(plots) >= 5
    files = ["config.json", "history.csv", "monitor.csv", "metrics.json", "best.pt"]
    files += ["last.pt", "test_scores.csv"]
    assert sorted(path.name for path in run.folder.iterdir()) == sorted([*files, *plots])
    assert all(name in run.text for name in [*files, *plots])


def test_plots_show_something_and_name_the_data_set(run):
    for path in run.folder.glob("*.png"):
        image = imread(path)[..., :3]
        assert image.shape[0] > 400 and image.shape[1] > 600 and image.std() > 0.03, path.name
        assert 0.1 < image.mean() < 0.99, path.name
        assert "digits" in run.titles[path.name], path.name


def test_default_folder_of_the_digits_is_their_own(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part2.main(["--dataset", "digits", "--epochs", "1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["part2-digits"]


@pytest.mark.parametrize(
    "options, name",
    [
        ([], "part2"),
        (["--dropout", "0.1"], "part2"),
        (["--seed", "1"], "part2-seed1"),
        (["--dataset", "digits"], "part2-digits"),
        (["--preset", "strong"], "part2-strong"),
        (
            ["--preset", "strong", "--dataset", "digits", "--seed", "1"],
            "part2-strong-digits-seed1",
        ),
    ],
)
def test_default_folder_tells_presets_data_sets_and_seeds_apart(options, name):
    a = part2.parse_arguments(options)
    settings = Settings(**part2.PRESETS[a.given.get("preset", "baseline")] | a.given)
    assert part2.run_folder(a, settings) == Path("outputs", name)


def test_help_spells_out_each_preset(capsys):
    with pytest.raises(SystemExit):
        part2.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, bundle in part2.PRESETS.items():
        assert f"{name}: {part2.flags_text(bundle) or 'the defaults'}" in text


def test_a_run_on_digits_says_that_they_are_not_mirrored(run):
    assert "nothing is mirrored" in " ".join(run.text.split())


# ------------------------------------------------------------- finished runs


def test_evaluate_makes_the_results_of_a_run_again(run, tmp_path):
    for path in (run.folder, run.folder / "best.pt"):
        options = ["--precision", "float32", "--output-dir", str(tmp_path)]
        assert part2.main(["--evaluate", str(path), *options]) == 0
        found = json.loads((tmp_path / "metrics.json").read_text())
        same = ("accuracy", "train_accuracy", "val_accuracy", "per_class", "seed", "calibration")
        assert {key: found[key] for key in same} == {key: run.metrics[key] for key in same}
        scores = (run.folder / "test_scores.csv").read_bytes()
        assert (tmp_path / "test_scores.csv").read_bytes() == scores
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".png"} == set(run.titles)


def test_evaluate_writes_beside_the_first_run_by_default(quick, tmp_path):
    options = ["--dataset", "digits", "--epochs", "1", "--output-dir"]
    assert part2.main([*options, str(tmp_path / "run")]) == 0
    assert part2.main(["--evaluate", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "evaluation" / "metrics.json").exists()


@pytest.fixture
def three_runs(quick, tmp_path):
    """Two runs that hold images out and one that does not, of two architectures."""
    flags = ["--seed 1", "--seed 2 --model tuned --tta shift", "--select-on last"]
    common = [
        "--dataset",
        "digits",
        "--epochs",
        "2",
        "--batch-size",
        "32",
        "--precision",
        "float32",
        "--output-dir",
    ]
    folders = [tmp_path / str(i) for i in range(3)]
    for folder, flag in zip(folders, flags):
        assert part2.main([*common, str(folder), *flag.split()]) == 0
    return folders


def scores_of(folder):
    return np.array(
        [list(row.values())[1:] for row in read_table(folder / "test_scores.csv")], float
    )


@pytest.mark.parametrize("which, weighted", [((0, 1), True), ((0, 1, 2), False)])
def test_evaluate_averages_probabilities_by_validation_accuracy(
    three_runs, tmp_path, which, weighted
):
    folders = [three_runs[i] for i in which]
    options = ["--precision", "float32", "--output-dir", str(tmp_path / "all")]
    assert part2.main(["--evaluate", *map(str, folders), *options]) == 0
    weights = np.ones(len(which))
    if weighted:
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
        weights = np.array([each["val_accuracy"] for each in metrics])
        assert weights[0] != weights[1]
    expected = np.average([scores_of(folder) for folder in folders], axis=0, weights=weights)
    assert np.allclose(scores_of(tmp_path / "all"), expected, atol=1e-6)
    assert json.loads((tmp_path / "all" / "metrics.json").read_text())["networks"] == len(which)


def test_evaluate_refuses_what_it_cannot_average(run, tmp_path, capsys):
    for options in (["--evaluate", str(tmp_path)], ["--evaluate", str(run.folder), "--lr", "0.1"]):
        assert part2.main([*options, "--output-dir", str(tmp_path / "out")]) == 2
        error_line(capsys)
    assert not (tmp_path / "out").exists()
