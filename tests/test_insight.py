"""What is seen of a trained network: evidence, activations, confidence, comparisons, monitor."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import error_line, first, quick_runs, read_table, run, state_of
from matplotlib import pyplot as plt
from scipy.stats import binomtest
from torch import nn

import part2_cifar_cnn as part2
from part2_cifar_cnn import FIGURES, Network, Settings, Training, build_model, set_aside

EVALUATE = ["--device", "cpu", "--precision", "float32"]


def network_with(model, data, **options):
    """A network as `part2.predict` takes it, after one epoch."""
    about = data.classes, data.mean, data.std, data.mirror
    row = {"epoch": 1, "val_accuracy": math.nan, "val_loss": math.nan, "temperature": 1.0}
    settings = Settings(**{"device": "cpu", "precision": "float32"} | options)
    return Network(model, settings, *about, history=[row], epoch=1)


@pytest.fixture(scope="module")
def trained(digits):
    """A baseline that has learned the digits, and its data."""
    data = set_aside(digits, "val")
    settings = Settings(dataset="digits", epochs=4, batch_size=32, device="cpu", seed=0)
    training = Training(replace(settings, precision="float32"), data)
    for _ in range(4):
        training.history.append(
            part2.judge(training, part2.train_epoch(training)) | {"seconds": 1}
        )
    return SimpleNamespace(network=training.network, data=data, training=training)


@pytest.fixture(scope="module")
def result(trained):
    return part2.evaluate([trained.network], trained.data)


# ------------------------------------------------------------------ where it looks


@pytest.mark.parametrize("elementwise", [False, True])
def test_grad_cam_is_the_class_activation_map_before_average_pooling(digits, elementwise):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(6, 10))
    images, labels = digits.train.images[:5], torch.tensor([3, 1, 4, 1, 5])
    network = network_with(model, digits)
    found = part2.grad_cam(network, images, labels, elementwise)
    with torch.no_grad():
        maps = model[:2](part2.normalise(images, digits.mean, digits.std))
    cam = torch.einsum("bkhw,bk->bhw", maps, model[4].weight[labels].detach()).relu()
    cam = F.interpolate(cam[:, None], (32, 32), mode="bilinear")[:, 0]
    expected = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-9)
    assert torch.allclose(found, expected, atol=1e-5) and found.amax() == 1


def test_hirescam_weighs_each_place_by_its_own_slope(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=8), nn.Flatten(), nn.Linear(96, 10))
    images, label = digits.train.images[:2], torch.tensor([3, 4])
    with torch.no_grad():
        maps = model[0](part2.normalise(images, digits.mean, digits.std))
    slopes = model[2].weight[label].detach().view(2, 6, 4, 4)
    for elementwise in (False, True):
        weights = slopes if elementwise else slopes.mean((2, 3), keepdim=True)
        cam = F.interpolate(
            (weights * maps).sum(1, keepdim=True).relu(), (32, 32), mode="bilinear"
        )
        cam = cam[:, 0] / cam.amax((1, 2, 3))[:, None, None].clamp(min=1e-9)
        found = part2.grad_cam(network_with(model, digits), images, label, elementwise)
        assert torch.allclose(found, cam, atol=1e-5) and found.max() > 0


def test_hiding_the_evidence_lowers_the_probability_more_than_hiding_the_rest(trained):
    images = trained.data.test.images
    probs = part2.probabilities(trained.network, images)
    preds = probs.argmax(1)
    cams = part2.grad_cam(trained.network, images, preds)
    means = []
    for sign in (1, -1):  # the hottest quarter, the coldest
        order = (-sign * cams).flatten(1).argsort(1)[:, : 32 * 32 // 4]
        hidden = torch.zeros(len(images), 32 * 32, dtype=torch.bool).scatter(1, order, True)
        grey = torch.tensor(255 * trained.data.mean[0]).round().to(torch.uint8)
        covered = torch.where(hidden.view(-1, 32, 32, 1), grey, images)
        left = part2.probabilities(trained.network, covered).gather(1, preds[:, None])
        means.append(left.mean().item())
    assert means[0] < means[1] - 0.03


@pytest.mark.parametrize(
    "model, side", [("small", 8), ("tuned", 8), ("strong", 3), ("wide", 3), ("resnet18", 4)]
)
def test_evidence_is_taken_from_the_last_maps_of_several_places(digits, model, side):
    network = network_with(build_model({"model": model, "dropout": 0.0}), digits)
    maps = list(part2.maps_of(network, digits.test.images[:1]).values())
    assert maps[-1].shape[1:] == (side, side)
    cams = part2.grad_cam(network, digits.test.images[:3], torch.tensor([0, 1, 2]))
    assert cams.shape == (3, 32, 32) and cams.min() >= 0 and cams.max() <= 1


def test_a_network_without_maps_has_no_evidence_to_show(digits, result):
    network = network_with(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), digits)
    assert part2.grad_cam(network, digits.test.images[:2], torch.tensor([0, 1])) is None
    other = replace(result, networks=[network], firing={})
    assert part2.plot_grad_cam(plt, other) is None and part2.plot_activations(plt, other) is None


def test_units_that_never_fire_are_counted(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.ReLU(), nn.Linear(4, 10))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([1.0, 0.0, -1.0, 0.0]))
        model[1].weight[3, 0] = 1.0  # fires where the first pixel is brighter than the mean
    images = digits.test.images[:700]
    images = images.roll(6, 2)  # to have bright pixels there
    first = part2.normalise(images, digits.mean, digits.std)[:, 0, 0, 0]
    shares = part2.firing(replace(network_with(model, digits, tta="flip"), mirror=True), images)
    assert shares == {"2": [1.0, 0.0, 0.0, pytest.approx((first > 0).double().mean().item())]}
    assert 0 < shares["2"][3] < 1
    assert part2.silent_text("2", shares["2"]) == "2 of the 4 units of layer 2 (ReLU) never fire"


def test_evaluation_and_figures_change_nothing_and_leave_no_hooks(trained, tmp_path):
    model, before = trained.network.model, state_of(trained.network.model)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.train()
    draws = torch.random.get_rng_state()
    result = part2.evaluate([trained.network], trained.data)
    part2.utils.draw_figures(part2.FIGURES, result, tmp_path)
    assert torch.equal(state_of(model), before)
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    assert all(layer.training for layer in model.modules())
    model.eval()
    part2.probabilities(trained.network, trained.data.test.images[:2])
    assert not any(layer.training for layer in model.modules())
    with pytest.raises(RuntimeError), part2.watching(dict(model.named_modules()), print):
        raise RuntimeError
    assert not any(m._forward_hooks for m in model.modules())
    assert {path.stem for path in tmp_path.iterdir()} == set(part2.FIGURES)


# ---------------------------------------------------------------------- confidence


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_is_that_of_the_labels(true):
    torch.manual_seed(0)
    logits = 3 * torch.randn(20_000, 10)
    labels = (logits / true).softmax(1).multinomial(1)[:, 0]
    found = part2.fit_temperature(logits, labels)
    assert found == pytest.approx(true, rel=0.03)
    losses = [F.cross_entropy(logits / (found * by), labels) for by in (0.95, 1, 1.05)]
    assert losses[1] == min(losses)


def test_a_temperature_that_chance_explains_is_one():
    torch.manual_seed(0)
    found = []
    for n in [2, 6, 20, 50] * 100:
        logits = 2 * torch.randn(n, 10)
        found.append(part2.fit_temperature(logits, logits.softmax(1).multinomial(1)[:, 0]))
    assert found.count(1.0) >= 0.93 * len(found)


def test_the_temperature_stays_above_zero_where_all_images_are_right():
    labels = torch.arange(100) % 10
    logits = F.one_hot(labels, 10).float()
    found = part2.fit_temperature(logits, labels)
    assert 0.1 < found < 0.2  # an error in a hundred images
    assert (logits / found).softmax(1).max().item() == pytest.approx(1 - 0.9 / 102, abs=2e-3)


def test_probabilities_and_metrics_are_at_the_temperature(trained, result):
    network, split = trained.network, trained.data.test
    logits = part2.predict(network, split.images)
    assert network.temperature == result.metrics["temperature"] != 1
    probs = part2.probabilities(network, split.images)
    assert torch.allclose(probs, (logits / network.temperature).softmax(1))
    assert np.array_equal(result.probs, probs.numpy())
    for found, z in ((result.metrics, logits / network.temperature),
                     (result.metrics["as_trained"], logits)):  # fmt: skip
        assert found["loss"] == pytest.approx(F.cross_entropy(z, split.labels).item(), rel=1e-4)
    assert result.metrics["loss"] < result.metrics["as_trained"]["loss"]


@pytest.mark.parametrize("select_on", ["test", "last"])
def test_without_validation_images_the_temperature_is_1(quick, tmp_path, capsys, select_on):
    assert run(tmp_path, "--select-on", select_on, "--epochs", "1") == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["temperature"] == 1
    assert "No validation images are left" in capsys.readouterr().out
    columns = read_table(tmp_path / "monitor.csv")[0]
    assert not [name for name in columns if name.startswith(("image", "confidence"))]


def test_coverage_answers_the_surest_first():
    probs = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.45, 0.55]])
    answered, right = part2.coverage(np.array([0, 0, 1, 1]), probs)
    assert answered.tolist() == [0.25, 0.5, 0.75, 1] and right.tolist() == [1, 1, 2 / 3, 0.75]


# ---------------------------------------------------------------------- comparisons


def probs_that(right, labels):
    """Probabilities whose likeliest class is the label where ``right``."""
    return np.eye(3)[np.where(right, labels, (labels + 1) % 3)]


def test_two_networks_are_compared_on_the_same_images():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    right = np.ones((2, 200), bool)
    right[0, :30], right[1, 20:25] = False, False
    found = part2.compare(labels, *(probs_that(each, labels) for each in right), list("abc"))
    assert found["only_first"].tolist() == [] and len(found["only_second"]) == 25
    assert found["difference"] == pytest.approx(25 / 200)
    assert found["p"] == pytest.approx(2 * 0.5**25)
    middle, wide = 25 / 202, 1.96 * math.sqrt((25 + 1) / 202 - (25 / 202) ** 2) / math.sqrt(202)
    assert found["interval"] == pytest.approx((middle - wide, middle + wide))
    points = {name: right[1, labels == i].mean() - right[0, labels == i].mean()
              for i, name in enumerate("abc")}  # fmt: skip
    assert dict(found["classes"]) == pytest.approx(points)
    same = part2.compare(labels, *[probs_that(right[0], labels)] * 2, list("abc"))
    assert same["p"] == 1 and same["interval"][0] < 0 < same["interval"][1]


@pytest.mark.parametrize(
    "n, shares", [(100, (0.02, 0.05)), (360, (0.02, 0.02)), (2000, (0.1, 0.12))]
)
def test_the_paired_interval_covers_the_true_difference(n, shares):
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(n, [*shares, 1 - sum(shares)], 1000)
    labels, covered = np.zeros(n, int), []
    for lost, won, _ in drawn:
        right = np.ones((2, n), bool)
        right[1, :lost], right[0, lost : lost + won] = False, False
        low, high = part2.compare(labels, *(probs_that(r, labels) for r in right), "abc")[
            "interval"
        ]
        covered.append(low <= shares[1] - shares[0] <= high)
    assert np.mean(covered) > 0.93


def test_two_runs_are_compared_and_told_apart_by_their_settings(quick, tmp_path, capsys):
    for seed in "12":
        assert run(tmp_path / seed, "--seed", seed) == 0
    capsys.readouterr()
    runs = [str(tmp_path / seed) for seed in "12"]
    assert (
        part2.main(["--evaluate", *runs, *EVALUATE, "--output-dir", str(tmp_path / "both")]) == 0
    )
    text = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "both" / "comparison.json").read_text())
    lost, won = len(found["only_first"]), len(found["only_second"])
    assert found["p"] == pytest.approx(binomtest(won, won + lost).pvalue if won + lost else 1)
    metrics = [json.loads((tmp_path / seed / "metrics.json").read_text()) for seed in "12"]
    assert found["difference"] == pytest.approx(metrics[1]["accuracy"] - metrics[0]["accuracy"])
    assert f"{won} only the second" in text and "judge it on other images" in text
    for each, seed in zip(metrics, "12"):
        assert (
            f"{each['accuracy']:.2%}" in text and f"282,442 parameters, with --seed {seed}" in text
        )
    assert (
        part2.main(["--evaluate", runs[0], *EVALUATE, "--output-dir", str(tmp_path / "both")]) == 0
    )
    assert not (tmp_path / "both" / "comparison.json").exists()


def test_runs_are_judged_on_validation_images_when_asked(quick, few_digits, tmp_path, capsys):
    assert run(tmp_path / "run") == 0
    capsys.readouterr()
    assert part2.main(["--evaluate", str(tmp_path / "run"), "--split", "val", *EVALUATE]) == 0
    text, folder = " ".join(capsys.readouterr().out.split()), tmp_path / "run" / "evaluation"
    valid = set_aside(few_digits, "val").valid
    labels = [few_digits.classes[label] for label in valid.labels]
    assert [row["label"] for row in read_table(folder / "val_scores.csv")] == labels
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["split"] == "val" and metrics["accuracy"] == metrics["val_accuracy"]
    assert "Validation accuracy" in text and "so this number is optimistic" in text
    assert not (folder / "test_scores.csv").exists()


def test_validation_images_that_were_trained_on_are_refused(quick, tmp_path, capsys):
    assert run(tmp_path / "run", "--select-on", "last") == 0
    assert part2.main(["--evaluate", str(tmp_path / "run"), "--split", "val"]) == 2
    assert "validation images" in error_line(capsys)
    assert run(tmp_path / "other", "--split", "val") == 2
    assert "--evaluate" in error_line(capsys)


# -------------------------------------------------------------------- while it learns


def test_the_monitor_has_norms_rates_and_guesses_of_each_epoch(digits):
    data = set_aside(first(digits, 60), "val")
    settings = Settings(epochs=1, batch_size=4, warmup_epochs=0.0, device="cpu", dropout=0.0)
    training = Training(replace(settings, precision="float32", schedule="linear"), data)
    layer, gradients = training.model[4].weight, []
    note = lambda *_: gradients.append(layer.grad.norm().item())  # noqa: E731
    training.optimizer.register_step_pre_hook(note)
    row = part2.judge(training, part2.train_epoch(training))
    monitor = row["monitor"]
    assert training.steps > part2.EVERY
    assert monitor["gradient_4"] == pytest.approx(np.mean(gradients[:: part2.EVERY]), rel=1e-5)
    assert monitor["weight_4"] == pytest.approx(layer.norm().item(), rel=1e-5)
    assert monitor["lr_start"] == row["lr"] == 0.001
    assert monitor["lr_end"] == pytest.approx(0.001 / training.steps * 1)
    training.history.append(row)
    valid = data.valid.images[: part2.WATCHED]
    probs = part2.predict(training.network, valid) / row["temperature"]
    for i, (share, pred) in enumerate(zip(*(v.tolist() for v in probs.softmax(1).max(1))), 1):
        assert monitor[f"image_{i}"] == data.classes[pred]
        assert monitor[f"confidence_{i}"] == pytest.approx(share, rel=1e-5)
    shares = part2.firing(training.network, data.train.images)
    assert monitor["silent_10"] == shares["10"].count(0) / 64


def test_monitor_is_the_same_after_an_interruption(quick, whole, tmp_path):
    assert run(tmp_path, "--epochs", "2") == 0
    assert part2.main(["--resume", str(tmp_path), "--epochs", "3"]) == 0
    assert (tmp_path / "monitor.csv").read_bytes() == (whole / "monitor.csv").read_bytes()


def test_events_are_what_the_monitor_holds(quick, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(tmp_path, "--tensorboard") == 0
    sizes = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"), sizes)
    events.Reload()
    monitor = read_table(tmp_path / "monitor.csv")
    for tag, column in (("gradient/4", "gradient_4"), ("silent/10", "silent_10")):
        told = [(event.step, event.value) for event in events.Scalars(tag)]
        expected = [(int(row["epoch"]), float(row[column])) for row in monitor]
        assert told == [(step, pytest.approx(value)) for step, value in expected]
    history = read_table(tmp_path / "history.csv")
    assert [e.value for e in events.Scalars("val/accuracy")] == pytest.approx(
        [float(row["val_accuracy"]) for row in history]
    )
    assert [event.step for event in events.Histograms("4")] == [1, 2, 3]
    assert [event.step for event in events.Images("images")] == [1, 2, 3]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert events.Scalars("accuracy")[-1].value == pytest.approx(metrics["accuracy"])


def test_events_of_a_resumed_run_and_of_one_that_replaces_it(quick, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(tmp_path, "--tensorboard", "--epochs", "2") == 0
    events = ["--tensorboard", "--resume", str(tmp_path), "--epochs", "4"]
    assert part2.main(events) == 0

    def steps():
        found = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
        return [event.step for event in found.Reload().Scalars("gradient/4")]

    assert steps() == [1, 2, 3, 4]
    assert run(tmp_path, "--tensorboard", "--epochs", "1", "--seed", "5", "--overwrite") == 0
    assert steps() == [1]


def test_without_tensorboard_one_line_names_the_package(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert run(tmp_path / "out", "--tensorboard") == 2
    assert "package tensorboard" in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_bar_shows_the_share_done_and_the_time_left():
    text = part2.utils.progress_bar(25, 100, 10.0)
    assert text == "[#####...............]  25%, 30 s left"
    assert part2.utils.progress_bar(25, 100, 10.0, 300).endswith("30 s left, 150 s to the end")


# ------------------------------------------------------------------------------ figures


def shown(figure):
    """All text of a figure that can be seen."""
    texts = figure.findobj(lambda artist: hasattr(artist, "get_text") and artist.get_visible())
    return [text.get_text() for text in texts]


def test_figures_name_ties_and_show_no_empty_percentages(result):
    rows = {"a": 0.5, "b": 0.5, "c": 1.0, "d": 1.0, "e": 1.0, "f": 1.0}
    per_class = {k: {"recall": v, "precision": v, "f1": v} for k, v in rows.items()}
    tied = replace(result, metrics=result.metrics | {"per_class": per_class})
    assert any(
        "hardest: a and b; easiest: 4 classes" in text
        for text in shown(part2.plot_classes(plt, tied))
    )
    assert "0%" not in shown(part2.plot_confusion(plt, result))
    pairs = {"confused_pairs": [("1", "8", 3), ("2", "3", 3), ("4", "5", 1)]}
    tied = replace(result, metrics=result.metrics | pairs)
    assert any(
        "1 and 8, 2 and 3" in text and "4" not in text.split(":")[-1]
        for text in shown(part2.plot_confusion(plt, tied))
    )


def test_the_curves_say_how_training_is_measured(trained, result):
    kept = trained.network.kept
    assert kept["val_accuracy"] > kept["train_accuracy"]
    for changes, text in (
        ({}, "while the network learns, with augmentation and dropout"),
        # Digits are never mirrored.
        ({"dropout": 0.0, "crop_padding": 0}, "while the network learns"),
    ):
        settings = replace(trained.network.settings, **changes)
        network = replace(trained.network, settings=settings)
        texts = shown(part2.plot_history(plt, replace(result, networks=[network])))
        assert [each for each in texts if each.endswith(text)]
    (row,) = trained.network.history[-1:]
    network = replace(trained.network, history=[row | {"train_accuracy": 1.0}], epoch=1)
    texts = shown(part2.plot_history(plt, replace(result, networks=[network])))
    assert not [text for text in texts if "is lower" in text]


def test_the_strip_shows_what_the_monitor_holds(trained, result):
    texts = shown(part2.plot_strip(plt, result))
    for row in trained.network.history:
        guess, share = row["monitor"]["image_3"], row["monitor"]["confidence_3"]
        assert f"{guess}\n{share:.0%}" in texts
    network = replace(
        trained.network, settings=replace(trained.network.settings, select_on="last")
    )
    assert part2.plot_strip(plt, replace(result, networks=[network])) is None


def test_mistakes_are_the_most_confident_ones(result):
    wrong = np.flatnonzero(result.preds != result.labels)
    sure = np.sort(result.probs[wrong].max(1))[::-1]
    texts = [text for text in shown(part2.plot_mistakes(plt, result)) if "\nis " in text]
    assert f": {sure[0]:.0%}\n" in texts[0] and len(texts) >= len(wrong[:20])


@pytest.mark.parametrize("right", [True, False])
def test_figures_of_a_network_that_is_always_or_never_right(digits, result, capsys, right):
    probs = np.eye(10, dtype=np.float32)[(result.labels + (not right)) % 10]
    found = {
        k: metric(result.labels, probs, digits.classes) for k, metric in part2.METRICS.items()
    }
    changed = replace(result, probs=probs, metrics=result.metrics | found)
    figures = {name: plot(plt, changed) for name, plot in part2.FIGURES.items()}
    plt.close("all")
    assert [k for k, figure in figures.items() if not figure] == ["08_mistakes"] * right
    part2.report(changed)
    assert "-0.0" not in capsys.readouterr().out
    title = "digits: 100.0% overall; all classes alike" if right else "digits: 0.0% overall"
    assert any(text.startswith(title) for text in shown(figures["05_per_class"]))


def test_networks_of_all_kinds_can_be_looked_into(quick, few_digits, monkeypatch, tmp_path):
    class Odd(nn.Module):
        """Two channels, a recurrent layer that returns a pair, one that learns nothing."""

        def __init__(self):
            super().__init__()
            self.first, self.conv = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 8, stride=8)
            self.unused, self.gru = nn.Linear(2, 2), nn.GRU(16, 10, batch_first=True)

        def forward(self, images):
            return self.gru(self.conv(self.first(images)).flatten(2))[0][:, -1]

    for name, build in (
        ("odd", lambda dropout, classes: Odd()),
        ("bare", lambda dropout, classes: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072),
                                                         nn.AdaptiveAvgPool1d(classes))),
    ):  # fmt: skip
        monkeypatch.setitem(part2.MODELS, name, build)
        monkeypatch.setattr(part2, "FIGURES", FIGURES)
        folder = tmp_path / name
        assert run(folder, "--model", name, "--epochs", "1") == 0
        assert (folder / "10_activations.png").exists() == (name == "odd")
    assert float(read_table(tmp_path / "odd" / "monitor.csv")[0]["gradient_unused"]) == 0


def test_of_several_networks_only_what_all_share_is_drawn(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(part2, "FIGURES", FIGURES)
    for seed in "12":
        assert run(tmp_path / seed, "--seed", seed, "--epochs", "1") == 0
    capsys.readouterr()
    runs = [str(tmp_path / seed) for seed in "12"]
    out = ["--output-dir", str(tmp_path / "both")]
    assert part2.main(["--evaluate", *runs, *EVALUATE, *out]) == 0
    names = {path.stem for path in (tmp_path / "both").glob("*.png")}
    assert names == {name for name, plot in FIGURES.items() if plot not in part2.OF_ONE_NETWORK}
    assert "never fire" not in capsys.readouterr().out


# -------------------------------------------------------------------- what is stored


def test_an_evaluation_of_a_folder_knows_all_epochs(quick, tmp_path):
    assert run(tmp_path, "--lr", "0.02", "--epochs", "5") == 0
    network = part2.load_network(tmp_path)
    network = replace(network, history=network.history[:2])
    shares = [row["val_accuracy"] for row in part2.kept_network(tmp_path).history]
    assert len(shares) == 5
    assert part2.main(["--evaluate", str(tmp_path), *EVALUATE]) == 0
    first, again = (
        json.loads((folder / "metrics.json").read_text())
        for folder in (tmp_path, tmp_path / "evaluation")
    )
    assert again["train_seconds"] == first["train_seconds"]
    assert again["best_epoch"] == first["best_epoch"]


@pytest.mark.parametrize("change", ["empty", "no monitor", "temperature 0", "eval_accuracy"])
def test_a_history_of_another_version_is_refused_in_one_line(whole, tmp_path, capsys, change):
    for name in ("best.pt", "last.pt"):
        stored = part2.utils.load_checkpoint(whole / name)
        for row in stored["history"]:
            row |= {"temperature": 0.0} if change == "temperature 0" else {}
            if change == "no monitor":
                del row["monitor"]
            if change == "eval_accuracy":
                row["eval_accuracy"] = row.pop("val_accuracy")
        stored["history"] = stored["history"] * (change != "empty")
        del stored["format"], stored["digest"]
        part2.utils.save_checkpoint(tmp_path / name, **stored)
    (tmp_path / "metrics.json").write_text("{}")
    with quick_runs(part2.load_digits()):
        for option in ("--evaluate", "--resume"):
            assert part2.main([option, str(tmp_path)]) == 2
            assert "history" in error_line(capsys)
