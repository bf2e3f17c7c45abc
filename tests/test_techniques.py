"""Each technique of part2_cifar_cnn.py against its definition, written out."""

import copy
import json
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import ablation
import bench_part2
import lite0
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import error_line, first, quick_runs, run, run_epoch, state_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import FakeData

import part2_cifar_cnn as part2
from part2_cifar_cnn import (
    PRESETS,
    Settings,
    Training,
    batches,
    build_model,
    draw_epoch,
    set_aside,
)

SETTINGS = Settings(
    dataset="digits", device="cpu", precision="float32", select_on="last", batch_size=50
)
PARAMETERS = {
    "small": 282_442,
    "tuned": 284_112,
    "strong": 2_148_384,
    "wide": 4_939_808,
    "resnet18": 11_173_962,
}
TINY = "torchvision:mobilenet_v3_small"


@pytest.fixture(scope="module")
def data(digits):
    """The first 200 digits, which may be mirrored here, so that mirroring is tried."""
    return set_aside(replace(first(digits, 200, 360), mirror=True), "last")


@pytest.fixture
def loaded(data, monkeypatch):
    """The scripts find these digits and nothing else."""
    monkeypatch.setattr(part2, "load_data", lambda *a: data)


def training_with(data, **options):
    return Training(replace(SETTINGS, **options), data)


def one_step(training, seed=0, n=50):
    """Train on one batch, the first images as they are; images, labels, logits and loss."""
    images = part2.normalise(training.data.train.images[:n], training.data.mean, training.data.std)
    labels, seen = training.data.train.labels[:n], []

    def one_batch(*args):
        torch.manual_seed(seed)
        yield images, labels

    hook = training.model.register_forward_hook(
        lambda model, inputs, out: seen.append(out.detach().float())
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part2, "batches", one_batch)
        row = part2.train_epoch(training)
    hook.remove()
    return images, labels, seen[0], row["train_loss"]


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def soft_target_loss(logits, targets):
    """Cross-entropy with soft targets (b, classes), written out."""
    return -(targets * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()


# ---------------------------------------------------------------------- images


def test_cutout_zeroes_exactly_the_square():
    images = torch.rand(40, 3, 32, 32) + 1
    top, left = torch.randint(0, 25, (2, 40))
    before, cut = images.clone(), part2.cut_out(images, None, 8, (top, left), 10)[0]
    for i in range(40):
        rows, columns = slice(top[i], top[i] + 8), slice(left[i], left[i] + 8)
        assert not cut[i, :, rows, columns].any()
        assert (cut[i] == 0).sum() == 3 * 8 * 8
        kept = cut[i] != 0
        assert torch.equal(cut[i][kept], before[i][kept])


def test_cutout_squares_lie_anywhere_inside():
    drawn = draw_epoch(20_000, replace(SETTINGS, cutout=8), True, 1)
    for name in ("cut_top", "cut_left"):
        assert sorted(set(drawn[name].tolist())) == list(range(25))
    assert len(set(zip(drawn["cut_top"].tolist(), drawn["cut_left"].tolist()))) == 25**2
    other = draw_epoch(20_000, replace(SETTINGS, cutout=8), True, 2)
    assert not torch.equal(drawn["cut_top"], other["cut_top"])
    largest = draw_epoch(100, replace(SETTINGS, cutout=31), True, 1)
    assert sorted(set(largest["cut_top"].tolist())) == [0, 1]


def test_cutout_and_fill_reach_the_batch(data):
    drawn = draw_epoch(200, replace(SETTINGS, cutout=8), True, 1)
    plain, cut, reflected = (
        next(batches(data, replace(SETTINGS, **options), 1, size=200))[0]
        for options in ({}, {"cutout": 8}, {"crop_fill": "reflect"})
    )
    places = [drawn[name] for name in ("order", "top", "left", "mirrored")]
    for fill, found in (("black", plain), ("reflect", reflected)):
        expected = part2.crop_and_flip(data.train.images, *places, fill)
        assert torch.equal(found, part2.normalise(expected, data.mean, data.std))
    drawn = draw_epoch(200, replace(SETTINGS, cutout=8), True, 1)
    places = [drawn[name] for name in ("order", "top", "left", "mirrored")]
    shifted = part2.crop_and_flip(data.train.images, *places, "black")
    shifted = part2.normalise(shifted, data.mean, data.std)
    corners = drawn["cut_top"], drawn["cut_left"]
    assert torch.equal(cut, part2.cut_out(shifted.clone(), None, 8, corners, 10)[0])
    assert not torch.equal(cut, shifted) and not torch.equal(reflected, plain)


def test_images_have_the_sides_asked_for_in_turn(data):
    settings = replace(SETTINGS, epochs=8, image_size="20:0.375,24:0.375,32:0.25")
    assert [part2.side_in(settings, i + 1) for i in range(8)] == [20] * 3 + [24] * 3 + [32] * 2
    assert {part2.side_in(SETTINGS, i + 1) for i in range(SETTINGS.epochs)} == {32}
    thirds = replace(SETTINGS, epochs=3, image_size="20:0.33,24:0.33,32:0.33")
    assert [part2.side_in(thirds, i + 1) for i in range(3)] == [20, 24, 32]
    whole, _ = next(batches(data, SETTINGS, 1, size=50))
    for side, gap in ((16, 0.05), (64, 0.15)):
        images, _ = next(batches(data, replace(SETTINGS, image_size=f"{side}"), 1, size=50))
        assert images.shape == (50, 3, side, side)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert abs(images.mean((2, 3)) - whole.mean((2, 3))).max() < gap  # the same pictures
        again = part2.resize(images, 32)
        assert torch.corrcoef(torch.stack([again.flatten(), whole.flatten()]))[0, 1] > 0.9
    model = build_model(asdict(replace(SETTINGS, model="resnet18")))
    network = network_with(model, data, image_size="16:0.5,64:0.5")
    assert network.input_of(data.train.images[:3]).shape == (3, 3, 64, 64)
    assert part2.predict(network, data.train.images[:3]).shape == (3, 10)
    cam = part2.grad_cam(network, data.train.images[:3], torch.tensor([1, 2, 3]))
    assert cam.shape == (3, 32, 32)


@pytest.mark.parametrize(
    "text", ["7", "513", "1_6", "24:-1,32:2", "24:0.5", "24:0.5,32:0.6", "", "a:b", "24,32"]
)
def test_other_sides_are_refused(text, tmp_path, capsys):
    assert run(tmp_path, f"--image-size={text}") == 2
    assert "24:0.5,32:0.5" in error_line(capsys) and not any(tmp_path.iterdir())


def test_a_network_that_needs_whole_images_says_so(tmp_path, capsys):
    assert run(tmp_path, "--image-size", "24:0.5,32:0.5") == 2
    assert "small cannot learn from images of 24 pixels" in error_line(capsys)
    assert not any(tmp_path.iterdir())


def test_alternating_flip_shows_both_orientations_in_two_epochs():
    flip = replace(SETTINGS, flip="alternating")
    mirrored = []
    for epoch in (1, 2, 3):
        drawn = draw_epoch(1000, flip, True, epoch)
        by_image = torch.empty(1000, dtype=torch.bool)
        by_image[drawn["order"]] = drawn["mirrored"]
        mirrored.append(by_image)
    assert torch.equal(mirrored[0], ~mirrored[1]) and torch.equal(mirrored[0], mirrored[2])
    assert 400 < mirrored[0].sum() < 600
    other = draw_epoch(1000, replace(flip, seed=1), True, 1)
    assert not torch.equal(mirrored[0][other["order"]], other["mirrored"])


def test_without_flip_nothing_is_mirrored():
    drawn = draw_epoch(500, replace(SETTINGS, flip="none"), True, 1)
    assert not drawn["mirrored"].any()


# ---------------------------------------------------------------- soft targets


def test_label_smoothing_is_cross_entropy_with_soft_targets(data):
    _, labels, logits, loss = one_step(training_with(data, label_smoothing=0.2))
    targets = 0.8 * F.one_hot(labels, 10) + 0.02
    assert loss == pytest.approx(soft_target_loss(logits, targets).item(), rel=1e-5)


def draw_always(monkeypatch, share):
    """Let every Beta distribution draw ``share``; the list gets its two parameters."""
    drawn_from = []

    def sample(beta, *shape):
        drawn_from.extend([beta.concentration0.item(), beta.concentration1.item()])
        return torch.tensor(share)

    monkeypatch.setattr(torch.distributions.Beta, "sample", sample)
    return drawn_from


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_blends_images_and_targets(data, monkeypatch, smoothing):
    drawn_from = draw_always(monkeypatch, 0.3)
    settings = replace(SETTINGS, mixup=0.4, label_smoothing=smoothing, dropout=0.0)
    plain, labels = next(batches(data, SETTINGS, 1))
    images, targets = next(batches(data, settings, 1))
    assert drawn_from == pytest.approx([0.4, 0.4])
    assert torch.allclose(images, 0.3 * plain + 0.7 * plain.roll(1, 0), atol=1e-6)
    expected = 0.3 * F.one_hot(labels, 10) + 0.7 * F.one_hot(labels.roll(1), 10)
    assert torch.allclose(targets, expected)
    model = copy.deepcopy(Training(settings, data).model)
    few = replace(data, train=data.train[draw_epoch(200, settings, True, 1)["order"][:50]])
    monkeypatch.setattr(part2, "batches", lambda *a: iter([(images, targets)]))
    training = Training(settings, few)
    run_epoch(training)
    expected = (1 - smoothing) * targets + smoothing / 10
    loss = soft_target_loss(model(images), expected).item()
    assert training.history[0]["train_loss"] == pytest.approx(loss, rel=1e-5)


def test_of_a_mixed_image_the_larger_part_is_what_counts_as_right(data, monkeypatch):
    images, labels = next(batches(data, SETTINGS, 1))
    targets = 0.3 * F.one_hot(labels, 10) + 0.7 * F.one_hot(labels.roll(1), 10)
    monkeypatch.setattr(part2, "batches", lambda *a: iter([(images, targets)]))
    training, seen = training_with(data), []
    training.model.register_forward_hook(lambda model, inputs, out: seen.append(out))
    share = part2.train_epoch(training)["train_accuracy"]
    assert share == (seen[0].argmax(1) == labels.roll(1)).double().mean()


def test_mixup_with_lambda_1_is_the_identity(data, monkeypatch):
    draw_always(monkeypatch, 1.0)
    images, labels = torch.randn(8, 3, 32, 32), data.train.labels[:8]
    mixed, targets = part2.mix_up(images, labels, 0.3, (), 10)
    assert torch.equal(mixed, images)
    assert torch.equal(targets, F.one_hot(labels, 10).float())


# ------------------------------------------------------------------- averaging


def test_ema_with_hardly_a_decay_is_the_model_and_with_none_is_off(data):
    assert training_with(data).average is None
    averaged = training_with(data, ema=1e-12)
    run_epoch(averaged)
    assert torch.allclose(
        weights_of(averaged.network.model), weights_of(averaged.model), atol=1e-6
    )


def test_ema_is_the_running_mean_written_out(data):
    training = training_with(data, ema=0.2)
    one_step(training)
    expected = state_of(training.model)  # the first step starts the average
    for step, decay in enumerate([2 / 11, 0.2, 0.2], 1):  # never more than (1 + n) / (10 + n)
        one_step(training, step)
        expected = decay * expected + (1 - decay) * state_of(training.model)
    assert torch.allclose(state_of(training.average.module), expected, atol=1e-6)


def test_ema_is_what_is_kept(data, tmp_path):
    training = training_with(data, ema=0.9, epochs=1)
    part2.train(training, tmp_path)
    kept = part2.load_network(tmp_path / "best.pt").model[0].weight
    assert torch.equal(kept, training.average.module[0].weight)
    assert not torch.equal(kept, training.model[0].weight)


def test_the_average_is_judged_with_all_views(data):
    data = set_aside(data, "val")
    training = training_with(data, ema=0.9, tta="shift", select_on="val")
    run_epoch(training)
    logits = part2.predict(training.network, data.valid.images)
    loss = F.cross_entropy(logits, data.valid.labels).item()
    assert training.history[0]["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert training.network.model is not training.model


def network_with(model, data, **options):
    """A trained network, as `part2.predict` takes it."""
    about = data.classes, data.mean, data.std, data.mirror
    return part2.Network(model, replace(SETTINGS, **options), *about, history=[], epoch=1)


@pytest.mark.parametrize("tta", ["flip", "shift"])
def test_views_make_the_logits_of_a_mirror_image_the_same(data, tta):
    model, images = build_model(asdict(SETTINGS)), data.train.images
    network = network_with(model, data, tta=tta)
    logits, mirrored = (part2.predict(network, each) for each in (images, images.flip(2)))
    assert torch.allclose(logits, mirrored, atol=1e-5)
    plain = part2.predict(network_with(model, data), images)
    assert not torch.allclose(logits, plain, atol=1e-3)


def test_six_views_written_out(data):
    model = build_model(asdict(SETTINGS)).eval()
    images, expected = data.train.images[:20].permute(0, 3, 1, 2), 0
    for shift, weight in ((0, 0.25), (-1, 0.125), (1, 0.125)):
        for mirrored in (False, True):  # with the columns shifted to the other side
            padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").byte()
            column = 1 - shift if mirrored else 1 + shift
            view = padded[:, :, 1 + shift : 33 + shift, column : column + 32]
            view = (view.flip(3) if mirrored else view).permute(0, 2, 3, 1)
            expected = expected + weight * model(part2.normalise(view, data.mean, data.std))
    found = part2.predict(network_with(model, data, tta="shift"), data.train.images[:20])
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("tta", ["flip", "shift"])
def test_only_images_that_are_unsure_have_other_views(data, tta):
    """An image's answer does not depend on the images beside it."""
    model, images = build_model(asdict(SETTINGS)), data.train.images[:150]
    with torch.no_grad():
        model[-1].weight.mul_(30)
    plain, averaged = (
        part2.predict(network_with(model, data, tta=views), images) for views in ("none", tta)
    )
    sure = plain.softmax(1).amax(1)
    below = sure.median().item()
    found = part2.predict(network_with(model, data, tta=tta, tta_below=below), images)
    assert torch.allclose(found[sure <= below], averaged[sure <= below], atol=1e-4)
    assert torch.equal(found[sure > below], plain[sure > below])
    assert not torch.allclose(found[sure <= below], plain[sure <= below], atol=1e-2)
    alone = part2.predict(network_with(model, data, tta=tta, tta_below=below), images[:1])
    assert torch.allclose(alone, found[:1], atol=1e-4)
    never = part2.predict(network_with(model, data, tta=tta, tta_below=0.0), images)
    assert torch.equal(never, plain)


def test_predictions_are_computed_in_the_precision_of_the_run(data):
    seen = []
    model = build_model(asdict(SETTINGS))
    model[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    for precision in ("float32", "bfloat16"):
        part2.predict(network_with(model, data, precision=precision), data.train.images[:2])
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("tta", ["flip", "shift"])
def test_views_that_are_left_out_do_not_scale_the_logits(data, tta):
    model, unmirrored = build_model(asdict(SETTINGS)), replace(data, mirror=False)
    images = data.train.images
    if tta == "shift":  # of one colour, so that what is left looks the same
        images = images[:, :1, :1].expand_as(images).contiguous()
    plain, averaged = (
        part2.predict(network_with(model, unmirrored, tta=views), images)
        for views in ("none", tta)
    )
    assert torch.allclose(averaged, plain, atol=1e-6)


def test_views_are_weighted_to_one_and_include_the_image():
    for views in part2.VIEWS.values():
        assert sum(view[3] for view in views) == 1
        assert (0, 0, False) in [view[:3] for view in views]


def test_a_network_with_better_validation_accuracy_weighs_more(data):
    network = network_with(build_model(asdict(SETTINGS)), data)
    row = {"epoch": 1, "val_loss": 0.1, "temperature": 1.0}
    networks = [replace(network, history=[row | {"val_accuracy": s}]) for s in (0.9, 0.6)]
    networks = [replace(n, settings=replace(n.settings, select_on="val")) for n in networks]
    one, two = np.random.default_rng(0).dirichlet(np.ones(10), (2, 6)).astype(np.float32)
    assert np.allclose(part2.average(networks, [one, two]), 0.6 * one + 0.4 * two, atol=1e-6)
    assert np.array_equal(part2.average(networks[:1], [one]), one)
    others = {"none": [row | {"val_accuracy": np.nan}], "test": networks[0].history}
    for select_on, history in others.items():  # test accuracy must not weigh
        settings = replace(network.settings, select_on="test" if select_on == "test" else "val")
        networks[0] = replace(network, history=history, settings=settings)
        assert np.allclose(part2.average(networks, [one, two]), (one + two) / 2, atol=1e-6)


def test_the_training_curves_have_a_line_for_each_network(data):
    row = {"epoch": 1, "lr": 0.1, "train_loss": 2.0, "train_accuracy": 0.2}
    row |= {"val_loss": np.nan, "val_accuracy": np.nan}
    histories = [
        [row | {"epoch": i, "train_loss": loss} for i in (1, 2, 3)] for loss in (2.0, 1.0)
    ]
    network = network_with(None, data)
    networks = [
        replace(network, history=history, epoch=len(history), path=Path(run, "best.pt"))
        for run, history in zip("ab", histories)
    ]
    result = part2.Result(networks, data, "test", {"accuracy": 0.5}, None, None, {})
    figure = part2.plot_history(plt, result)
    lines = figure.axes[0].get_lines()[::2]  # the others mark the epoch that is kept
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3]] * 2
    assert [list(line.get_ydata()) for line in lines] == [[2.0] * 3, [1.0] * 3]
    labels = ["a: training", "epoch that is kept", "b: training"]
    assert figure.axes[0].get_legend_handles_labels()[1] == labels
    short = [replace(network, history=histories[0][:1])]
    figure = part2.plot_history(plt, replace(result, networks=short))
    figure.canvas.draw()
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


# ------------------------------------------------------------------- precision


def test_the_plain_script_of_the_bench_learns(monkeypatch):
    """On random images, of which it sees each once."""

    def images(folder, train, transform):
        return FakeData(150, (3, 32, 32), 10, transform)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", images)
    seconds, accuracy, *_ = bench_part2.run_plain(Path(), 1, 0)
    assert len(seconds) == 1 and 0 <= accuracy <= 1


def test_the_bench_rounds_as_autocast_to_bfloat16_does(data):
    logits, gradients = [], []
    for precision in ("bfloat16", "float32"):
        training = training_with(data, precision=precision, dropout=0.0)
        if precision == "float32":
            bench_part2.round_to_bfloat16(training.model)
        logits.append(one_step(training, n=8)[2])
        weights = [p for p in training.optimizer.param_groups[0]["params"] if p.ndim > 1]
        gradients.append(torch.cat([p.grad.flatten() for p in weights]))
    assert torch.allclose(*logits, atol=1e-3)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


# ---------------------------------------------------------------- optimisation


@pytest.mark.parametrize("shape", [(64, 216), (48, 48), (200, 30)])
def test_orthogonalise_keeps_the_singular_vectors_and_evens_out_the_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    u, expected, vt = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(3):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    inside = u.T @ part2.orthogonalise(matrix) @ vt.T
    values = inside.diagonal()
    assert (inside - values.diag()).abs().max() < 1e-9
    assert torch.allclose(values, expected, atol=1e-5) and values.max() < 1.3
    # Three steps bring all but the smallest directions near 1; more steps bring those, too.
    assert values.median() > 0.65
    assert torch.linalg.svdvals(part2.orthogonalise(matrix, steps=10)).min() > 0.6


def test_bias_norm_is_batch_norm_with_unit_weight_and_a_bias_that_moves_fast():
    images = torch.randn(9, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = part2.BiasNorm(3), nn.BatchNorm2d(3, eps=1e-12, momentum=0.4)
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == ["bias"]
    with torch.no_grad():
        ours.bias.copy_(torch.tensor([1.0, -2, 3]))
        theirs.bias.copy_(25 * ours.bias)
    for mode in (True, False):
        assert torch.allclose(ours.train(mode)(images), theirs.train(mode)(images), atol=1e-5)
    assert torch.allclose(ours.running_var, theirs.running_var)
    ours(images).sum().backward(), theirs(images).sum().backward()
    assert torch.allclose(ours.bias.grad, 25 * theirs.bias.grad)


def test_a_muon_step_moves_filters_by_an_orthogonal_matrix_and_fixes_their_norm():
    weights = nn.Parameter(torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(1)))
    before = weights.detach() * 4 / weights.detach().norm()  # sqrt(16)
    weights.grad = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(2))
    gradient, muon = (
        weights.grad.clone(),
        part2.Muon([weights], lr=0.1, momentum=0.6, weight_decay=9),
    )
    muon.step()
    update = (before - weights.detach()).flatten(1) / 0.1
    gram = update @ update.T
    assert torch.allclose(gram, torch.eye(16), atol=0.45)
    assert torch.allclose(update, part2.orthogonalise(gradient.flatten(1)), atol=1e-4)
    # The second step goes by the velocity, seen a step ahead (Nesterov).
    before = weights.detach() * 4 / weights.detach().norm()
    weights.grad = second = gradient.flip(0)
    muon.step()
    ahead = second + 0.6 * (0.6 * gradient + second)
    update = (before - weights.detach()).flatten(1) / 0.1
    assert torch.allclose(update, part2.orthogonalise(ahead.flatten(1)), atol=1e-4)


def test_muon_steps_all_but_filters_as_torchs_adamw_at_a_hundredth_of_the_rate(data):
    options = {"model": "strong", "lr": 0.1, "weight_decay": 0.2}
    ours = training_with(data, optimizer="muon", **options)
    theirs = training_with(data, optimizer="adamw", **options | {"lr": 0.001})
    theirs.optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        for a, b in zip(ours.model.parameters(), theirs.model.parameters()):
            a.grad = torch.randn(a.shape, generator=rng) if a.requires_grad else None
            b.grad = a.grad
        for training in (ours, theirs):
            training.optimizer.step()
    for a, b in zip(ours.model.parameters(), theirs.model.parameters()):
        assert torch.equal(a, b) == (a.ndim != 4 or not a.requires_grad)


def test_momentum_reaches_muon(data):
    training = training_with(data, model="strong", optimizer="muon", lr=0.1, momentum=0.7)
    assert training.optimizer.param_groups[0]["momentum"] == 0.7


def rates_of(schedule, warmup_epochs=0.0, epochs=10, steps=10, snapshots=1):
    """Learning rate of each step, for a rate of 1."""
    settings = replace(SETTINGS, schedule=schedule, warmup_epochs=warmup_epochs, epochs=epochs)
    settings = replace(settings, snapshots=snapshots)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = part2.build_scheduler(optimizer, settings, steps)
    rates = []
    for _ in range(epochs * steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates, scheduler.get_last_lr()[0]


def test_schedules_at_their_knots():
    rates, end = rates_of("none")
    assert set(rates) == {1.0} and end == 1
    rates, end = rates_of("step")
    assert rates == [1.0] * 50 + [0.5] * 50 and end == 0.25
    rates, end = rates_of("linear")
    assert rates == pytest.approx([1 - i / 100 for i in range(100)]) and end == pytest.approx(0)
    rates, end = rates_of("cosine")
    expected = [(1 + math.cos(math.pi * i / 100)) / 2 for i in range(100)]
    assert rates == pytest.approx(expected) and end == pytest.approx(0, abs=1e-9)
    rates, _ = rates_of("cosine", snapshots=2)
    assert rates == pytest.approx([(1 + math.cos(math.pi * i / 50)) / 2 for i in range(50)] * 2)


def test_snapshots_are_the_ends_of_the_cycles_and_count_as_one_training(few_digits, tmp_path):
    with quick_runs(few_digits):
        cycles = ["--schedule", "cosine", "--epochs", "4", "--snapshots", "2"]
        assert run(tmp_path / "run", *cycles, "--select-on", "last") == 0
        names = [tmp_path / "run" / f"snapshot-{i}.pt" for i in (1, 2)]
        snapshots = [part2.load_network(name) for name in names]
        assert [network.kept["epoch"] for network in snapshots] == [2, 4]
        assert state_of(snapshots[1].model).equal(
            state_of(part2.load_network(tmp_path / "run").model)
        )
        assert (
            part2.main(["--evaluate", *map(str, names), "--output-dir", str(tmp_path / "both")])
            == 0
        )
        whole, both = (
            json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("run", "both")
        )
        assert both["train_seconds"] == pytest.approx(whole["train_seconds"])
        assert both["train_pflop"] == whole["train_pflop"] > 0
        assert both["best_epoch"] == [2, 4] and both["networks"] == 2
        twice = [str(tmp_path / "run"), str(names[1]), "--output-dir", str(tmp_path / "same")]
        assert part2.main(["--evaluate", *twice]) == 0
        names[0].unlink()
        run(tmp_path / "run", "--epochs", "1", "--overwrite")
        assert not list((tmp_path / "run").glob("snapshot-*"))


@pytest.mark.parametrize(
    "options",
    ["", "--schedule cosine --epochs 3", "--schedule cosine --epochs 4 --warmup-epochs 1"],
)
def test_snapshots_without_whole_cycles_are_refused(options, tmp_path, capsys):
    assert run(tmp_path, "--snapshots", "2", *options.split()) == 2
    assert "--snapshots needs --schedule cosine" in error_line(capsys)


def test_filters_of_one_channel_are_counted_as_such():
    """A step takes three times as much as going forward: only the first gradient is not needed."""
    settings = replace(SETTINGS, model=TINY, image_size="64")
    with FlopCounterMode(display=False) as counter:
        build_model(asdict(settings)).eval()(torch.zeros(1, 3, 64, 64))
    forward = counter.get_total_flops()
    assert 2.8 * forward < part2.step_flops(settings, epoch=1) < 3 * forward


def test_a_step_is_counted_in_operations():
    """Of the baseline, written out: two operations for each product, forward and backward."""
    first, second, dense = 32 * 27 * 32**2, 64 * 288 * 16**2, 4096 * 64 + 64 * 10
    expected = 2 * (3 * (first + second + dense) - first)  # images need no gradient
    assert part2.step_flops(SETTINGS, epoch=1) == expected


@pytest.mark.parametrize("schedule", ["none", "step", "linear", "cosine"])
def test_warmup_rises_evenly_to_the_full_rate_and_the_schedule_follows(schedule):
    rates, end = rates_of(schedule, warmup_epochs=2.0)
    assert rates[:20] == pytest.approx([(i + 1) / 21 for i in range(20)])
    assert rates[20] == pytest.approx(1)
    alone, _ = rates_of(schedule, epochs=8)
    assert rates[20:] == pytest.approx(alone, abs=1e-9)
    assert end == pytest.approx({"none": 1, "step": 0.5}.get(schedule, 0), abs=1e-9)


def test_warmup_may_end_within_an_epoch():
    rates, _ = rates_of("none", warmup_epochs=1.5)
    assert rates == pytest.approx([min(1, (i + 1) / 16) for i in range(100)])


def test_warmup_takes_at_most_half_of_the_steps():
    rates, end = rates_of("linear", warmup_epochs=100.0, epochs=1, steps=10)
    assert int(np.argmax(rates)) == 5 and end == pytest.approx(0)


def test_gradient_norm_after_clipping(data):
    moved = []
    for limit in (0.0, 0.05):
        training = training_with(data, grad_clip=limit, optimizer="sgd", momentum=0.0, lr=1.0)
        before = weights_of(training.model)
        one_step(training)
        moved.append((weights_of(training.model) - before).norm().item())
    assert moved[0] > 0.1 and moved[1] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_weight_decay_and_momentum_reach_the_optimiser(data, optimizer):
    momentum = {"momentum": 0.8} if optimizer == "sgd" else {}
    training = training_with(data, optimizer=optimizer, weight_decay=0.02, lr=0.3, **momentum)
    group = training.optimizer.param_groups[0]
    assert (group["weight_decay"], group["lr"]) == (0.02, 0.3)
    assert type(training.optimizer).__name__.lower() == optimizer
    assert optimizer != "sgd" or (group["momentum"], group["nesterov"]) == (0.8, True)


# --------------------------------------------------------- networks and presets


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    model = build_model({"model": name, "dropout": 0.0})
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_whitened_filters_decorrelate_the_patches():
    generator = torch.Generator().manual_seed(0)
    images = F.avg_pool2d(torch.randn(750, 3, 20, 20, generator=generator), 5, 1)  # correlated
    images[500:] *= 3  # the last part, of 250 images, is not like the first
    conv = nn.Conv2d(3, 24, 2, bias=False)
    part2.whiten(conv, images)
    out = conv(images).detach().transpose(0, 1).flatten(1)
    assert torch.allclose(out[:12], -out[12:], atol=1e-4)
    covariance = out[:12] @ out[:12].T / out.shape[1]
    off = covariance - covariance.diag().diag()
    assert off.abs().max() < 0.02
    assert covariance.diag().min() > 0.7 and covariance.diag().max() < 1.01


@pytest.mark.parametrize("name", ["tuned", "strong", "wide"])
def test_the_first_layer_starts_white_and_stays_so_unless_tuned(data, name):
    data = set_aside(data, "val")  # what is held out is not seen
    training = training_with(data, model=name)
    before = training.model[0].weight.detach().clone()
    assert torch.equal(before[: len(before) // 2], -before[len(before) // 2 :])
    white = copy.deepcopy(training.model[0])
    part2.whiten(white, part2.normalise(data.train.images, data.mean, data.std))
    assert torch.equal(before, white.weight)
    one_step(training)
    assert torch.equal(training.model[0].weight, before) == (name != "tuned")


def test_strong_starts_by_passing_its_input_through():
    layers = list(build_model(asdict(SETTINGS) | {"model": "strong"}))
    convs = [layer for layer in layers[1:] if isinstance(layer, nn.Conv2d)]
    assert len(convs) == sum(isinstance(layer, part2.BiasNorm) for layer in layers) == 7
    assert [conv.kernel_size[0] for conv in convs] == [2, 3, 2, 3, 2, 3, 3]
    for conv in convs:
        images = torch.randn(2, conv.in_channels, 8, 8)
        seen = images[:, :, 1:, 1:] if conv.kernel_size == (2, 2) else images
        assert torch.allclose(conv(images)[:, : conv.in_channels], seen, atol=1e-6)
    maps = torch.rand(2, 3, 5, 5)
    both = part2.MaxAndMean()(maps)
    assert torch.allclose(both, torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1))


@pytest.mark.parametrize("name, inputs", [("tuned", 3072), ("strong", 512), ("wide", 768)])
def test_the_last_layer_starts_small(name, inputs):
    weights = build_model(asdict(SETTINGS) | {"model": name})[-1].weight
    assert weights.shape == (10, inputs)
    assert weights.std().item() == pytest.approx(1 / inputs, rel=0.1)


def test_the_pool_before_the_head_of_tuned_sums_more_than_a_mean():
    pool = next(
        m
        for m in build_model(asdict(SETTINGS) | {"model": "tuned"})
        if isinstance(m, nn.AvgPool2d)
    )
    assert pool(torch.ones(1, 1, 8, 8))[0, 0, 1:, 1:].unique().tolist() == [4.5]


@pytest.mark.parametrize("name", PARAMETERS)
def test_dropout_reaches_every_network(name):
    shares = [
        layer.p
        for layer in build_model(asdict(SETTINGS) | {"model": name, "dropout": 0.3}).modules()
        if isinstance(layer, nn.Dropout)
    ]
    assert shares == [0.3]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_and_only_use_what_is_there(data, preset):
    settings = replace(SETTINGS, **PRESETS[preset] | {"epochs": 1, "batch_size": 25})
    training = Training(settings, first(data, 50))
    run_epoch(training)
    assert np.isfinite(training.history[0]["train_loss"])


# ------------------------------------------------- networks and weights from elsewhere


@pytest.mark.parametrize("name", ["torchvision:resnet50", TINY, "torchvision:densenet121"])
def test_torchvision_networks_learn(name, few_digits, tmp_path):
    with quick_runs(few_digits):
        options = f"--model {name} --image-size 64 --epochs 1 --batch-size 100".split()
        assert run(tmp_path, *options) == 0
    network = part2.load_network(tmp_path)
    assert network.model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    ours = {layer.p for layer in network.model.modules() if isinstance(layer, nn.Dropout)}
    assert ours <= {0.5}  # the setting's, not torchvision's


@pytest.mark.parametrize(
    "options, text",
    [
        ("--model torchvision:resnet9000", "is no network"),
        ("--model resnet34", "is no network"),
        ("--model torchvision:googlenet", "is no network"),
        ("--model torchvision:inception_v3", "is no network"),
        ("--model torchvision:vit_b_16 --image-size 64", "cannot learn from images of 64 pixels"),
        ("--weights default", "--weights default is for --model torchvision:NAME"),
        ("--weights nowhere.pt", "is no file"),
        ("--tta-below 0.5", "give a --tta, too"),
        ("--optimizer muon --unfreeze gradual", "--unfreeze is not for muon"),
    ],
)
def test_networks_and_weights_that_cannot_be_are_refused(options, text, tmp_path, capsys):
    assert run(tmp_path, *options.split()) == 2
    assert text in error_line(capsys) and not any(tmp_path.iterdir())


def test_a_last_batch_of_one_image_that_cannot_be_normalised(few_digits, tmp_path, capsys):
    n = len(set_aside(few_digits, "val").train)
    with quick_runs(few_digits):
        assert run(tmp_path, "--model", "torchvision:resnet18", "--batch-size", str(n - 1)) == 2
    assert "the one image of the last batch" in error_line(capsys)


def test_a_layer_that_is_used_more_than_once_fires_each_time(data):
    shared = nn.ReLU()
    model = nn.Sequential(nn.Flatten(), shared, nn.Linear(3072, 5), shared, nn.Linear(5, 10))
    fires = part2.firing(network_with(model, data), data.train.images[:700])
    assert {name: len(shares) for name, shares in fires.items()} == {"1": 3072, "1, use 2": 5}
    assert all(0 <= share <= 1 for shares in fires.values() for share in shares)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Torch's cache, empty, and no network beyond it."""
    import urllib.error

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def absent(*args, **how):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", absent)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_default_weights_are_torchvisions_with_their_normalisation(
    cache, few_digits, tmp_path, monkeypatch, capsys
):
    from torchvision.models import MobileNet_V3_Small_Weights as Weights
    from torchvision.models import mobilenet_v3_small

    options = f"--model {TINY} --weights default --unfreeze none --epochs 1".split()
    url = Weights.DEFAULT.url
    with quick_runs(few_digits):
        assert run(tmp_path / "run", *options) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [each for each in lines if not each.startswith("Downloading:")]  # torch 2.6 says so
    assert url in line and str(cache) in line and "no network" in line
    torch.manual_seed(5)
    model = mobilenet_v3_small()
    torch.save(model.state_dict(), cache / url.rpartition("/")[2])
    monkeypatch.setattr(torch.hub, "_get_hash", None, raising=False)
    with quick_runs(few_digits):
        assert run(tmp_path / "run", *options) == 0
    text = capsys.readouterr().out
    assert "242 of 244 tensors" in text and "classifier.3.weight" in text
    network = part2.load_network(tmp_path / "run")
    assert (network.mean, network.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    state = network.model.state_dict()
    for name, value in model.state_dict().items():  # frozen, the statistics of BatchNorm, too
        assert name.startswith("classifier") or torch.equal(state[name], value)
    (cache / url.rpartition("/")[2]).unlink()
    with quick_runs(few_digits):  # a finished run needs the weights no more
        assert part2.main(["--resume", str(tmp_path / "run")]) == 0


def test_weights_of_a_file_as_far_as_they_fit(few_digits, tmp_path, capsys):
    with quick_runs(few_digits):
        assert run(tmp_path / "first", "--epochs", "1") == 0
        best = tmp_path / "first" / "best.pt"
        state = part2.load_network(best).model.state_dict()
        other = {k: v for k, v in state.items() if k != "4.bias"} | {"12.weight": torch.ones(3)}
        torch.save(other | {"more": torch.ones(2)}, tmp_path / "other.pt")
        torch.save({"else": torch.ones(1)}, tmp_path / "none.pt")
        (tmp_path / "text.pt").write_text("no weights")
        capsys.readouterr()
        loaded = []
        keep = part2.load_weights
        with pytest.MonkeyPatch.context() as patch:

            def spy(model, settings):
                keep(model, settings)
                loaded.append({k: v.clone() for k, v in model.state_dict().items()})

            patch.setattr(part2, "load_weights", spy)
            for i, path in enumerate((best, tmp_path / "other.pt")):
                options = f"--epochs 1 --weights {path} --seed {i}"
                assert run(tmp_path / f"run{i}", *options.split()) == 0
        assert all(torch.equal(value, state[key]) for key, value in loaded[0].items())
        new = [key for key, value in loaded[1].items() if not torch.equal(value, state[key])]
        assert new == ["4.bias", "12.weight"]
        text = capsys.readouterr().out
        assert "4.bias, 12.weight" in text and "of no use: 12.weight, more" in text
        for name, reason in (("none.pt", "fits small"), ("text.pt", "not a readable")):
            assert run(tmp_path / "bad", "--weights", str(tmp_path / name)) == 2
            assert reason in error_line(capsys)


def grads_of(training):
    """Parts of a torchvision network that an epoch has changed, and parts that are frozen."""
    model, before = training.model, [p.clone() for p in training.model.parameters()]
    row = part2.train_epoch(training)
    training.history.append(row)
    changed = {
        name.split(".")[0] if name.startswith("classifier") else int(name.split(".")[1])
        for (name, p), old in zip(model.named_parameters(), before)
        if not torch.equal(p, old)
    }
    frozen = {i for i, part in enumerate(model.features) if not part.training}
    return changed, frozen


def test_layers_learn_from_the_head_down(data, capsys):
    settings = {"model": TINY, "unfreeze": "gradual", "optimizer": "adamw", "epochs": 10}
    few = replace(data, train=data.train[:40], valid=data.train[:0])
    training = training_with(few, **settings, batch_size=20)
    part2.introduce(training)
    told = "upper half of the rest from epoch 2 on, everything from epoch 4 on."
    assert told in " ".join(capsys.readouterr().out.split())
    assert [group["lr"] for group in training.optimizer.param_groups] == pytest.approx(
        [0.001, 0.001 / 3, 0.001 / 9]
    )
    assert sum(len(p["params"]) for p in training.optimizer.param_groups) == len(
        list(training.model.parameters())
    )
    found = [grads_of(training) for _ in range(4)]
    everything, lower = {"classifier", *range(13)}, set(range(7))
    assert found[0] == ({"classifier"}, set(range(13)))
    assert found[1] == found[2] == (everything - lower, lower)
    assert found[3] == (everything, set())
    operations = [part2.step_flops(training.settings, i) for i in (1, 2, 4)]
    assert operations[0] < operations[1] < operations[2]
    keys = [set(row["monitor"]) for row in training.history]
    assert keys[0] == keys[3]


def test_a_frozen_backbone_stays_as_it_is(data, capsys):
    few = replace(data, train=data.train[:40], valid=data.train[:0])
    training = training_with(few, model=TINY, unfreeze="none", epochs=2, batch_size=20)
    part2.introduce(training)
    assert "Only the head learns." in capsys.readouterr().out
    assert [grads_of(training) for _ in range(2)] == [({"classifier"}, set(range(13)))] * 2


def test_lite0_learns_from_weights_in_the_order_of_the_package(
    few_digits, tmp_path, monkeypatch, capsys
):
    model = lite0.lite0(0.2, 1000)
    assert (
        len(model.state_dict()) == 296 and sum(p.numel() for p in model.parameters()) == 4_652_008
    )
    folder = tmp_path / lite0.PACKAGE
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    theirs = {f"other.{i}": value for i, value in enumerate(model.state_dict().values())}
    torch.save(theirs, folder / "models" / "weights.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for names in (part2.MODELS, part2.PRESETS):
        monkeypatch.setitem(names, "lite0", None)  # and at the end as it is now
        del names["lite0"]
    options = ["--preset", "lite0", "--output-dir", "run"]
    more = "--dataset digits --unfreeze none --image-size 64 --epochs 1 --device cpu"
    with quick_runs(few_digits):
        assert lite0.main([*options, *shlex.split(more)]) == 0
        assert "294 of 296 tensors" in capsys.readouterr().out
        lite0.WEIGHTS.unlink()
        # It needs neither weights nor package:
        assert lite0.main(["--preset=lite0", "--resume", "run"]) == 0
    state = part2.load_network(tmp_path / "run").model.state_dict()
    assert torch.equal(list(state.values())[0], list(theirs.values())[0])
    monkeypatch.setattr(lite0, "PACKAGE", "not_there")
    with pytest.raises(SystemExit, match="install not-there"):
        lite0.main(options)


def test_lite0_is_a_preset_of_the_ablation(monkeypatch, capsys):
    assert ablation.main(["--presets", "lite0"]) == 2
    for names in (part2.MODELS, part2.PRESETS):
        monkeypatch.setitem(names, "lite0", None)
        del names["lite0"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        lite0.main(["ablation", "--help"])
    assert "lite0" in capsys.readouterr().out
