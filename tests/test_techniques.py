"""Each technique of part2_cifar_cnn.py against its definition, written out."""

import copy
import itertools
import math
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from torch import nn

import ablation
import bench_part2
import part2_cifar_cnn as part2
from part2_cifar_cnn import PRESETS, Settings, Training, build_model, draw_epoch
from utils import RunFailed, UserError, load_pyplot, write_csv

SETTINGS = Settings(
    dataset="digits", device="cpu", precision="float32", select_on="last", batch_size=50
)
PARAMETERS = {"small": 282_442, "tuned": 284_112, "strong": 1_972_792, "wide": 4_606_520,
              "resnet18": 11_173_962}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    """The first 200 digits, which may be mirrored here, so that mirroring is tried."""
    digits = part2.load_digits()
    return replace(digits, images=digits.images[:200], labels=digits.labels[:200], mirror=True)


@pytest.fixture
def loaded(data, monkeypatch):
    """The scripts find these digits and nothing else."""
    monkeypatch.setattr(part2, "load_data", lambda *a: data)


def training_with(data, **options):
    return Training(replace(SETTINGS, **options), data)


def one_step(training, seed=0, n=50):
    """Take one step on the first images; images, labels, logits and loss."""
    images = part2.normalise(training.data.images[:n], training.data.mean, training.data.std)
    labels = training.data.labels[:n]
    torch.manual_seed(seed)
    return images, labels, *training.take_step(images, labels)[:2]


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def state_of(model):
    """Weights and running statistics in one vector."""
    state = model.state_dict().values()
    return torch.cat([value.flatten() for value in state if value.is_floating_point()]).clone()


def soft_target_loss(logits, targets):
    """Cross-entropy with soft targets (b, classes), written out."""
    return -(targets * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()


# ---------------------------------------------------------------------- images


def test_cutout_zeroes_exactly_the_square():
    images = torch.rand(40, 3, 32, 32) + 1
    top, left = torch.randint(0, 25, (2, 40))
    before, cut = images.clone(), part2.cut_out(images, top, left, 8)
    for i in range(40):
        rows, columns = slice(top[i], top[i] + 8), slice(left[i], left[i] + 8)
        assert not cut[i, :, rows, columns].any()
        assert (cut[i] == 0).sum() == 3 * 8 * 8
        kept = cut[i] != 0
        assert torch.equal(cut[i][kept], before[i][kept])
    assert torch.equal(images, before)


def test_cutout_squares_lie_anywhere_inside():
    drawn = draw_epoch(torch.arange(20_000), replace(SETTINGS, cutout=8), True, 1)
    for name in ("cut_top", "cut_left"):
        assert sorted(set(drawn[name].tolist())) == list(range(25))
    assert len(set(zip(drawn["cut_top"].tolist(), drawn["cut_left"].tolist()))) == 25**2
    other = draw_epoch(torch.arange(20_000), replace(SETTINGS, cutout=8), True, 2)
    assert not torch.equal(drawn["cut_top"], other["cut_top"])
    largest = draw_epoch(torch.arange(100), replace(SETTINGS, cutout=31), True, 1)
    assert sorted(set(largest["cut_top"].tolist())) == [0, 1]


def test_cutout_and_fill_reach_the_batch(data):
    drawn = draw_epoch(torch.arange(200), replace(SETTINGS, cutout=8), True, 1)
    plain, cut, reflected = (
        part2.load_batch(data, replace(SETTINGS, **options), drawn)[0]
        for options in ({}, {"cutout": 8}, {"crop_fill": "reflect"})
    )
    assert torch.equal(cut, part2.cut_out(plain, drawn["cut_top"], drawn["cut_left"], 8))
    assert not torch.equal(cut, plain)
    places = (drawn[name] for name in ("order", "top", "left", "mirrored"))
    expected = part2.crop_and_flip(data.images, *places, "reflect")
    assert torch.equal(reflected, part2.normalise(expected, data.mean, data.std))
    assert not torch.equal(reflected, plain)


def test_alternating_flip_shows_both_orientations_in_two_epochs():
    flip = replace(SETTINGS, flip="alternating")
    mirrored = []
    for epoch in (1, 2, 3):
        drawn = draw_epoch(torch.arange(1000), flip, True, epoch)
        by_image = torch.empty(1000, dtype=torch.bool)
        by_image[drawn["order"]] = drawn["mirrored"]
        mirrored.append(by_image)
    assert torch.equal(mirrored[0], ~mirrored[1]) and torch.equal(mirrored[0], mirrored[2])
    assert 400 < mirrored[0].sum() < 600
    other = draw_epoch(torch.arange(1000), replace(flip, seed=1), True, 1)
    assert not torch.equal(mirrored[0][other["order"]], other["mirrored"])


def test_without_flip_nothing_is_mirrored():
    drawn = draw_epoch(torch.arange(500), replace(SETTINGS, flip="none"), True, 1)
    assert not drawn["mirrored"].any()


# ---------------------------------------------------------------- soft targets


def test_label_smoothing_is_cross_entropy_with_soft_targets(data):
    _, labels, logits, loss = one_step(training_with(data, label_smoothing=0.2))
    targets = 0.8 * F.one_hot(labels, 10) + 0.02
    assert loss.item() == pytest.approx(soft_target_loss(logits, targets).item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_is_cross_entropy_with_the_mixed_targets(data, monkeypatch, smoothing):
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda *a: torch.tensor(0.3))
    training = training_with(data, mixup=1.0, label_smoothing=smoothing, dropout=0.0)
    model = copy.deepcopy(training.model)
    images, labels, logits, loss = one_step(training)
    mixed = 0.3 * images + 0.7 * images.roll(1, 0)
    assert torch.allclose(model(mixed), logits, atol=1e-4)
    targets = 0.3 * F.one_hot(labels, 10) + 0.7 * F.one_hot(labels.roll(1), 10)
    targets = (1 - smoothing) * targets + smoothing / 10
    assert loss.item() == pytest.approx(soft_target_loss(logits, targets).item(), rel=1e-5)


def test_of_a_mixed_image_the_larger_part_is_what_counts_as_right(data, monkeypatch):
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda *a: torch.tensor(0.3))
    training, labels = training_with(data, mixup=1.0), data.labels[:50]
    images = part2.normalise(data.images[:50], data.mean, data.std)
    assert torch.equal(training.take_step(images, labels)[2], labels.roll(1))


def test_mixup_with_lambda_1_is_the_identity_and_draws_with_the_alpha_asked_for(data, monkeypatch):
    drawn_from = []
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda beta, *a: (
        drawn_from.extend([beta.concentration0.item(), beta.concentration1.item()]),
        torch.tensor(1.0))[1])  # fmt: skip
    one_step(training_with(data, mixup=0.2))
    assert drawn_from == pytest.approx([0.2, 0.2])
    images, labels = torch.randn(8, 3, 32, 32), data.labels[:8]
    mixed, targets = part2.mix_up(images, labels, 10, alpha=0.3)
    assert drawn_from[2:] == pytest.approx([0.3, 0.3])
    assert torch.equal(mixed, images)
    assert torch.equal(targets, F.one_hot(labels, 10).float())


# ------------------------------------------------------------------- averaging


def test_ema_with_hardly_a_decay_is_the_model_and_with_none_is_off(data):
    assert training_with(data).average is None
    averaged = training_with(data, ema=1e-12)
    averaged.run_epoch()
    assert torch.allclose(weights_of(averaged.average.module), weights_of(averaged.model), atol=1e-6)


def test_ema_is_the_running_mean_written_out(data):
    training = training_with(data, ema=0.2)
    one_step(training)
    expected = state_of(training.model)  # the first step starts the average
    for step, decay in enumerate([2 / 11, 0.2, 0.2], 1):  # never more than (1 + n) / (10 + n)
        one_step(training, step)
        expected = decay * expected + (1 - decay) * state_of(training.model)
    assert torch.allclose(state_of(training.average.module), expected, atol=1e-6)


def test_ema_is_what_is_kept(data):
    training = training_with(data, ema=0.9)
    training.run_epoch()
    kept = training.best["0.weight"]
    assert torch.equal(kept, training.average.module[0].weight)
    assert not torch.equal(kept, training.model[0].weight)


def test_the_average_is_evaluated_with_all_views(data):
    training = training_with(data, ema=0.9, tta="shift", select_on="val")
    training.run_epoch()
    images, labels = data.images[training.held], data.labels[training.held]
    logits = part2.predict(training.average.module, images, data, training.settings)
    loss = F.cross_entropy(logits, labels).item()
    assert training.history[0]["eval_loss"] == pytest.approx(loss, rel=1e-6)


def test_accuracy_on_the_way_counts_the_right_guesses(data, monkeypatch):
    right, take = [], Training.take_step

    def counted(self, images, labels):
        found = take(self, images, labels)
        right.append((found[0].argmax(1) == labels).sum().item())
        return found

    monkeypatch.setattr(Training, "take_step", counted)
    training = training_with(data)
    training.run_epoch()
    assert training.history[0]["train_accuracy"] == sum(right) / len(data.images)


@pytest.mark.parametrize("tta", ["flip", "shift"])
def test_views_make_the_logits_of_a_mirror_image_the_same(data, tta):
    settings, model = replace(SETTINGS, tta=tta), build_model(asdict(SETTINGS))
    logits, mirrored = (
        part2.predict(model, images, data, settings)
        for images in (data.images, data.images.flip(2))
    )
    assert torch.allclose(logits, mirrored, atol=1e-5)
    plain = part2.predict(model, data.images, data, SETTINGS)
    assert not torch.allclose(logits, plain, atol=1e-3)


def test_six_views_written_out(data):
    model = build_model(asdict(SETTINGS)).eval()
    images, expected = data.images[:20].permute(0, 3, 1, 2), 0
    for shift, weight in ((0, 0.25), (-1, 0.125), (1, 0.125)):
        for mirrored in (False, True):  # with the columns shifted to the other side
            padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").byte()
            column = 1 - shift if mirrored else 1 + shift
            view = padded[:, :, 1 + shift : 33 + shift, column : column + 32]
            view = (view.flip(3) if mirrored else view).permute(0, 2, 3, 1)
            expected = expected + weight * model(part2.normalise(view, data.mean, data.std))
    found = part2.predict(model, data.images[:20], data, replace(SETTINGS, tta="shift"))
    assert torch.allclose(found, expected, atol=1e-5)


def test_predictions_are_computed_in_the_precision_of_the_run(data):
    seen = []
    model = build_model(asdict(SETTINGS))
    model[0].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    for precision in ("float32", "bfloat16"):
        part2.predict(model, data.images[:2], data, replace(SETTINGS, precision=precision))
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("tta", ["flip", "shift"])
def test_views_that_are_left_out_do_not_scale_the_logits(data, tta):
    model, unmirrored = build_model(asdict(SETTINGS)), replace(data, mirror=False)
    images = data.images
    if tta == "shift":  # of one colour, so that what is left looks the same
        images = images[:, :1, :1].expand_as(images).contiguous()
    plain, averaged = (
        part2.predict(model, images, unmirrored, replace(SETTINGS, tta=views))
        for views in ("none", tta)
    )
    assert torch.allclose(averaged, plain, atol=1e-6)


def test_views_are_weighted_to_one_and_include_the_image():
    for views in part2.VIEWS.values():
        assert sum(view[3] for view in views) == 1
        assert (0, 0, False) in [view[:3] for view in views]


def test_an_ensemble_of_one_is_the_model():
    assert isinstance(build_model(asdict(SETTINGS) | {"ensemble": 1}), nn.Sequential)
    model = build_model(asdict(SETTINGS)).eval()
    images = torch.randn(6, 3, 32, 32)
    probs = part2.Ensemble([model]).eval()(images).softmax(1)
    assert torch.allclose(probs, model(images).softmax(1), atol=1e-6)


@pytest.mark.parametrize("select_on", ["val", "last", "test"])
def test_an_ensemble_is_weighted_by_accuracy_on_held_out_images_only(data, tmp_path, select_on):
    settings = replace(SETTINGS, ensemble=2, select_on=select_on)
    members = [
        {"best": build_model(asdict(SETTINGS)).state_dict(),
         "history": [{"eval_accuracy": share}, {"eval_accuracy": 0.1}]}
        for share in (0.9, 0.6)
    ]
    part2.save_best(tmp_path, settings, members, data)
    weights = part2.load_best(tmp_path / "best.pt").weights
    expected = [0.6, 0.4] if select_on == "val" else [0.5, 0.5]
    assert torch.allclose(weights, torch.tensor(expected))


def test_networks_of_an_ensemble_are_of_different_seeds(data, tmp_path):
    settings = replace(SETTINGS, epochs=1)
    part2.train_members(replace(settings, ensemble=3), data, tmp_path)
    rows = (tmp_path / "history.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows] == [["network", "epoch"], ["1", "1"], ["2", "1"], ["3", "1"]]
    members = part2.load_best(tmp_path / "best.pt").members
    for first, second in itertools.combinations(members, 2):
        assert not torch.allclose(weights_of(first), weights_of(second), atol=0.01)
    alone = Training(settings, data)
    alone.run_epoch()
    assert torch.equal(weights_of(members[0]), weights_of(alone.model))


def test_the_plot_has_a_line_for_each_network():
    row = {"epoch": 1, "lr": 0.1, "train_loss": 2.0, "train_accuracy": 0.2, "eval_split": "none"}
    histories = [[row | {"train_loss": loss}] * 3 for loss in (2.0, 1.0)]
    metrics = {"test_accuracy": 0.5, "best_epoch": [3, 3]}
    figure = part2.plot_history(load_pyplot(), histories, metrics, "digits")
    lines = figure.axes[0].get_lines()
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3]] * 2
    assert [list(line.get_ydata()) for line in lines] == [[2.0] * 3, [1.0] * 3]
    assert len(figure.axes[0].get_legend().get_texts()) == 1
    figure = part2.plot_history(load_pyplot(), [[row]], metrics, "digits")
    figure.canvas.draw()
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_an_ensemble_averages_probabilities_by_weight():
    models = [build_model(asdict(SETTINGS)).eval() for _ in range(2)]
    both, images = part2.Ensemble(models).eval(), torch.randn(6, 3, 32, 32)
    both.weights.copy_(torch.tensor([0.25, 0.75]))
    first, second = (model(images).softmax(1) for model in models)
    assert torch.allclose(both(images).softmax(1), 0.25 * first + 0.75 * second, atol=1e-6)


# ------------------------------------------------------------------- precision


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
    gradient, muon = weights.grad.clone(), part2.Muon([weights], lr=0.1, momentum=0.6, weight_decay=9)
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


def rates_of(schedule, warmup_epochs=0.0, epochs=10, steps=10):
    """Learning rate of each step, for a rate of 1."""
    settings = replace(SETTINGS, schedule=schedule, warmup_epochs=warmup_epochs, epochs=epochs)
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
    model = build_model({"model": name, "dropout": 0.0, "ensemble": 1})
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
    assert 0.7 < covariance.diag().min() and covariance.diag().max() < 1.01


@pytest.mark.parametrize("name", ["tuned", "strong", "wide"])
def test_the_first_layer_starts_white_and_stays_so_unless_tuned(data, name):
    training = training_with(data, model=name, select_on="val")  # what is held out is not seen
    before = training.model[0].weight.detach().clone()
    assert torch.equal(before[: len(before) // 2], -before[len(before) // 2 :])
    white = copy.deepcopy(training.model[0])
    part2.whiten(white, part2.normalise(data.images[training.rows], data.mean, data.std))
    assert torch.equal(before, white.weight)
    one_step(training)
    assert torch.equal(training.model[0].weight, before) == (name != "tuned")


def test_strong_starts_by_passing_its_input_through():
    layers = list(build_model(asdict(SETTINGS) | {"model": "strong"}))
    convs = [layer for layer in layers[1:] if isinstance(layer, nn.Conv2d)]
    assert len(convs) == sum(isinstance(layer, part2.BiasNorm) for layer in layers) == 6
    for conv in convs:
        images = torch.randn(2, conv.in_channels, 8, 8)
        assert torch.allclose(conv(images)[:, : conv.in_channels], images, atol=1e-6)


@pytest.mark.parametrize("name, inputs", [("tuned", 3072), ("strong", 256), ("wide", 384)])
def test_the_last_layer_starts_small(name, inputs):
    weights = build_model(asdict(SETTINGS) | {"model": name})[-1].weight
    assert weights.shape == (10, inputs)
    assert weights.std().item() == pytest.approx(1 / inputs, rel=0.1)


def test_the_pool_before_the_head_of_tuned_sums_more_than_a_mean():
    pool = next(m for m in build_model(asdict(SETTINGS) | {"model": "tuned"}) if isinstance(m, nn.AvgPool2d))
    assert pool(torch.ones(1, 1, 8, 8))[0, 0, 1:, 1:].unique().tolist() == [4.5]


@pytest.mark.parametrize("name", PARAMETERS)
def test_dropout_reaches_every_network(name):
    shares = [layer.p for layer in build_model(asdict(SETTINGS) | {"model": name, "dropout": 0.3}).modules()
              if isinstance(layer, nn.Dropout)]  # fmt: skip
    assert shares == [0.3]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_and_only_use_what_is_there(data, preset):
    settings = replace(SETTINGS, **PRESETS[preset] | {"epochs": 1, "batch_size": 25})
    few = replace(data, images=data.images[:50], labels=data.labels[:50])
    training = Training(settings, few)
    training.run_epoch()
    assert np.isfinite(training.history[0]["train_loss"])


# ------------------------------------------------------------ the table of gains


ROWS = [
    {"preset": preset, "change": change, "value": value, "seed": seed, "dataset": dataset,
     "epochs": 10, "parameters": 1, "test_accuracy": share, "train_seconds": 100.0}
    for preset, change, value, seed, dataset, share in [
        ("baseline", "none", "", "0", "cifar10", 0.70), ("baseline", "none", "", "1", "cifar10", 0.68),
        ("baseline", "dropout", "0.1", "0", "cifar10", 0.73),
        ("baseline", "dropout", "0.1", "1", "cifar10", 0.73),
        ("baseline", "optimizer lr", "sgd 0.05", "0", "cifar10", 0.69),
        ("baseline", "dropout", "0.1", "0", "digits", 0.99),
        ("strong", "none", "", "1", "cifar10", 0.94), ("strong", "tta", "none", "1", "cifar10", 0.93),
        ("baseline", "cutout", "8", "7", "cifar10", 0.99),  # no baseline with this seed
    ]
]  # fmt: skip


def test_gains_are_over_the_baseline_of_the_same_seed():
    gains = part2.measured_gains(ROWS)
    assert [part2.flags_text(gain["change"]) for gain in gains] == [
        "--preset strong", "--preset strong --tta none", "--dropout 0.1", "",
        "--optimizer sgd --lr 0.05",
    ]  # fmt: skip
    dropout = gains[2]
    assert dropout["points"] == pytest.approx(4) and dropout["accuracy"] == pytest.approx(73)
    assert dropout["points_std"] == pytest.approx(math.sqrt(2)) and dropout["runs"] == 2
    assert dropout["accuracy_std"] == 0 and math.isnan(gains[0]["accuracy_std"])
    assert part2.gain_text(dropout) == "+4.0 +- 1.4" and part2.gain_text(gains[0]) == "+26.0"


def suggested(capsys, rows=ROWS, **options):
    part2.suggest(Settings(**options), part2.measured_gains(rows))
    return capsys.readouterr().out


def test_suggestions_are_what_the_run_has_not_and_may_gain_from(capsys):
    text = suggested(capsys)
    assert "--preset strong" in text and "--dropout 0.1" in text
    assert "--tta" not in text  # a part taken out of a preset
    assert "sgd" not in text  # it lost one point
    assert "--dropout" not in suggested(capsys, dropout=0.1)
    strong = {"preset": "strong"} | PRESETS["strong"]
    assert "nothing is better" in suggested(capsys, **strong)
    assert "--preset strong" in suggested(capsys, **strong | {"model": "small"})
    assert "--preset strong" in suggested(capsys, preset="tuned")
    assert "--dropout" not in suggested(capsys, preset="tuned")
    longer = [ROWS[0] | {"change": "epochs", "value": "20", "test_accuracy": 0.8}, *ROWS]
    assert "--epochs 20" in suggested(capsys, longer) and "--epochs" not in suggested(
        capsys, longer, epochs=30
    )
    smaller = [ROWS[2] | {"value": "0.2", "test_accuracy": 0.72}, *ROWS]
    assert "--dropout 0.2" in suggested(capsys, smaller)
    assert "--dropout" not in suggested(capsys, smaller, dropout=0.1)
    four = [ROWS[0] | {"preset": "strong", "change": "epochs ensemble", "value": "20 4",
                       "test_accuracy": 0.97}, *ROWS]  # fmt: skip
    for options in {}, strong:
        assert "--preset strong --epochs 20 --ensemble 4" in suggested(capsys, four, **options)
    assert "--ensemble" not in suggested(capsys, four, **strong | {"epochs": 20, "ensemble": 4})
    slow = [ROWS[0] | {"preset": "resnet18", "change": "epochs", "value": "14",
                       "test_accuracy": 0.93}, *ROWS]  # fmt: skip
    assert "resnet18" not in suggested(capsys, slow)  # strong as it is bought more
    assert "nothing is better" in suggested(capsys, [])


@pytest.mark.parametrize("damage", [
    lambda text: text.replace(b",", b";"), lambda text: text.replace(b"0.73", b""),
    lambda text: text[:-30], lambda text: text + b"\xff", lambda text: b"<<<<\n" + text,
])  # fmt: skip
def test_a_damaged_table_is_named_and_costs_no_result(tmp_path, damage):
    table = tmp_path / "results.csv"
    write_csv(table, {key: [row[key] for row in ROWS] for key in part2.COLUMNS})
    assert part2.read_table(table)[2]["test_accuracy"] == 0.73
    table.write_bytes(damage(table.read_bytes()))
    with pytest.raises(UserError, match="restore it"):
        part2.read_table(table)


def test_a_run_with_a_damaged_table_saves_its_results(loaded, monkeypatch, tmp_path, capsys):
    def damaged():
        raise UserError("the table is damaged: restore it")

    monkeypatch.setattr(part2, "read_table", damaged)
    monkeypatch.setattr(part2, "plot_all", lambda *a: {})
    options = f"--dataset digits --epochs 1 --output-dir {tmp_path}"
    assert part2.main(options.split()) == 0
    assert "the table is damaged: restore it." in capsys.readouterr().out
    assert (tmp_path / "metrics.json").exists()


def test_the_report_of_the_table_has_each_change_and_a_plot(tmp_path, capsys):
    table = tmp_path / "results.csv"
    write_csv(table, {key: [row[key] for row in ROWS] for key in part2.COLUMNS})
    assert ablation.main(["--report", "--table", str(table)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[2:5] == [
        "| 1. another network | `--preset strong` | 1 | 94.00 | +26.0 | 100 |",
        "| 2. less dropout | `--dropout 0.1` | 2 | 73.00 +- 0.00 | +4.0 +- 1.4 | 100 |",
        "| 3. another optimiser, decay, clipping | `--optimizer sgd --lr 0.05` | 1 | 69.00 | -1.0 | 100 |",
    ]
    assert text.splitlines()[8:10] == [
        "| strong | as it is | 1 | 94.00 |  | 100 |",
        "|  | `--tta none` | 1 | 93.00 | -1.0 | 100 |",
    ]
    assert imread(tmp_path / "accuracy_vs_seconds.png").std() > 0.01


def test_the_plot_has_a_point_for_each_preset_and_for_the_best_run():
    rows = [ROWS[0] | {"preset": "strong", "change": "model epochs", "value": "wide 30",
                       "test_accuracy": 0.96}, *ROWS]  # fmt: skip
    figure = ablation.plot(load_pyplot(), part2.measured_gains(rows))
    named = {text.get_text().split(" (")[0] for text in figure.axes[0].texts}
    published = {name for name, *_ in ablation.PUBLISHED}
    assert named - published == {"baseline", "strong", "wide, 30 epochs"}


def test_every_change_of_the_table_belongs_to_one_strategy():
    for change in filter(None, ablation.CHANGES["baseline"]):
        assert sum(bool(keys & change.keys()) for keys in ablation.STRATEGIES.values()) == 1


def test_the_summary_shows_the_committed_table():
    rows = part2.read_table()
    summary = (Path(part2.__file__).parent / "SUMMARY.md").read_text(encoding="utf-8")
    for table in ablation.strategies_table(rows), ablation.presets_table(rows):
        assert len(table) > 10 and "\n".join(table) in summary


def test_no_run_has_two_rows_in_the_committed_table():
    runs = [tuple(row[key] for key in part2.COLUMNS[:5]) for row in part2.read_table()]
    assert len(set(runs)) == len(runs)


def test_the_table_gets_one_row_a_run_and_no_run_twice(data, loaded, monkeypatch, tmp_path):
    table, trained = tmp_path / "ablation" / "results.csv", []
    epoch = Training.run_epoch
    monkeypatch.setattr(Training, "run_epoch", lambda self, *a: (trained.append(self), epoch(self, *a)))
    options = ["--dataset", "digits", "--table", str(table), "--presets", "baseline", "--seeds", "0"]
    assert ablation.main([*options, "--changes", "none"]) == 0
    assert len(trained) == 10
    assert ablation.main([*options, "--changes", "none", "tta"]) == 0
    rows = part2.read_table(table)
    assert [(row["change"], row["value"]) for row in rows] == [
        ("none", ""), ("tta", "flip"), ("tta", "shift"),
    ]  # fmt: skip
    assert len(trained) == 10  # other views of the test images need no new training
    for row in rows:
        settings = ablation.settings_of("baseline", {"tta": row["value"] or "none"}, 0, "digits")
        folder = ablation.checkpoints_of(settings, Path(f"{table.parent}-runs"))
        model = part2.load_best(folder / "best.pt")
        logits = part2.predict(model, data.test_images, data, settings)
        assert row["test_accuracy"] == part2.accuracy(logits, data.test_labels)
    assert len({row["test_accuracy"] for row in rows}) > 1
    assert list(rows[0]) == (
        "preset change value seed dataset epochs parameters test_accuracy train_seconds".split()
    )
    assert (rows[0]["epochs"], rows[0]["parameters"]) == ("10", "282442")
    assert ablation.main(options[:4] + ["--report"]) == 2  # there is no CIFAR-10 in it


def test_a_stopped_run_of_the_table_goes_on(loaded, monkeypatch, tmp_path):
    options = ["--dataset", "digits", "--presets", "baseline", "--changes", "none", "--seeds", "0"]
    assert ablation.main([*options, "--table", str(tmp_path / "whole" / "results.csv")]) == 0
    take, calls = Training.take_step, []

    def stop_once(self, *batch):
        calls.append(self)
        if len(calls) == 2 * 3 + 1:  # in the fourth epoch of two steps each
            signal.raise_signal(signal.SIGINT)
        return take(self, *batch)

    monkeypatch.setattr(Training, "take_step", stop_once)
    table = tmp_path / "cut" / "results.csv"
    assert ablation.main([*options, "--table", str(table)]) == 130 and not table.exists()
    assert ablation.main([*options, "--table", str(table)]) == 0
    assert len(calls) == 2 * 10 + 1  # only the step of the epoch that was cut is made twice
    shares = [part2.read_table(path)[0]["test_accuracy"]
              for path in (table, tmp_path / "whole" / "results.csv")]  # fmt: skip
    assert shares[0] == shares[1]


def test_two_processes_leave_one_row(loaded, monkeypatch, tmp_path):
    table, run = tmp_path / "t" / "results.csv", ablation.run
    options = ["--dataset", "digits", "--presets", "baseline", "--changes", "none", "--seeds", "0",
               "--table", str(table)]  # fmt: skip

    def overtaken(*args):
        monkeypatch.setattr(ablation, "run", run)
        assert ablation.main(options) == 0
        return run(*args)

    monkeypatch.setattr(ablation, "run", overtaken)
    assert ablation.main(options) == 0 and len(part2.read_table(table)) == 1


def test_a_run_that_fails_has_no_row_and_stops_nothing(loaded, monkeypatch, tmp_path):
    def fail_with_dropout(settings, *args):
        if settings.dropout == 0.1:
            raise RunFailed("the loss is nan")
        return train(settings, *args)

    train = part2.train_members
    monkeypatch.setattr(part2, "train_members", fail_with_dropout)
    options = ["--dataset", "digits", "--presets", "baseline", "--seeds", "0", "--table"]
    table = tmp_path / "t" / "results.csv"
    assert ablation.main([*options, str(table), "--changes", "dropout", "none"]) == 0
    assert [row["change"] for row in part2.read_table(table)] == ["none"]


def test_a_run_of_other_settings_is_not_taken_for_this_one(loaded, monkeypatch, tmp_path, capsys):
    options = ["--dataset", "digits", "--presets", "baseline", "--changes", "none", "--seeds", "0"]
    table = tmp_path / "t" / "results.csv"
    assert ablation.main([*options, "--table", str(table)]) == 0
    table.unlink()
    monkeypatch.setitem(part2.PRESETS, "baseline", {"lr": 0.002})  # the folder has the same name
    assert ablation.main([*options, "--table", str(table)]) == 2
    error = capsys.readouterr().err
    assert "lr" in error and f"delete {tmp_path / 't-runs'}" in error and not table.exists()
