"""Tests of part1_threshold.py: numbers against references, relations, files, errors."""

import contextlib
import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot
import numpy as np
import pytest
from helpers import rounded
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from sklearn import metrics as sk

import part1_threshold as part1
import utils
from part1_threshold import (
    GRID,
    METRICS,
    Choice,
    Counts,
    Metric,
    Objective,
    analyse,
    calibration,
    certainty,
    count_every_score,
    find_best,
    gain_over,
    hold_out,
    lay_table,
    measure,
    simulate_scores,
)
from utils import Cases, UserError, read_scores

ROOT = Path(part1.__file__).resolve().parent
COUNTS = ["threshold", "tp", "fp", "fn", "tn"]
RATES = ["precision", "recall", "specificity", "f1", "youden_j", "balanced_accuracy", "accuracy"]
COLUMNS = [*COUNTS, *RATES, "f_beta", "mcc", "cohen_kappa", "cost", "net_benefit", "alert_rate"]
HALF = 40  # index of 0.50 in the grid


def sample(n=400, seed=0, decimals=None, dtype=np.float64):
    """Random labels (both classes present) and overlapping scores in (0, 1)."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    labels[:2] = True, False
    scores = np.where(labels, rng.beta(5, 3, n), rng.beta(3, 6, n))
    return labels, (scores if decimals is None else scores.round(decimals)).astype(dtype)


def count(labels, scores, objective=Objective()):  # noqa: B008 (frozen)
    return count_every_score(Cases(labels, scores), objective)


def table_of(labels, scores, objective=Objective()):  # noqa: B008 (frozen)
    """Counts at the thresholds that a run chooses from."""
    every = count(labels, scores, objective)
    return lay_table(every, find_best(every, objective), scores.dtype, objective)[1]


def all_metrics(labels, scores, objective=Objective()):  # noqa: B008 (frozen)
    table = table_of(labels, scores)
    return {metric: measure(metric, table, objective) for metric in METRICS}


def calibrate(labels, scores, seed=0):
    every = count(labels, scores)
    return calibration(every, Choice(every, Objective("mcc"), 0, seed), {"f1": 1.0})


def summary_of(labels, scores, *arguments, **more):
    return analyse(Cases(labels, scores), *arguments, **more).summary


def write_npz(path, labels, scores):
    np.savez(path, y_true=labels, y_score=scores)
    return path


def results(folder):
    """Summary (strict JSON: no NaN, no Infinity) and table (named columns) of a run."""
    text = (folder / "summary.json").read_text()
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    return summary, np.genfromtxt(folder / "thresholds.csv", delimiter=",", names=True)


def run(folder, *arguments):
    assert part1.main([*map(str, arguments), "--output-dir", str(folder)]) == 0
    return results(folder)


def assert_refused(folder, capsys, *arguments, out="out"):
    """Status 2, one line on standard error, no new folder; returns the line."""
    assert part1.main([*map(str, arguments), "--output-dir", str(folder / out)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", error) and not (folder / out).is_dir()
    return error.replace(str(folder), "")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Draw nothing; `default_run` is made before and has its figures."""
    monkeypatch.setattr(part1, "FIGURES", {})
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture
def few_resamples(monkeypatch):
    """For tests that look at no interval."""
    monkeypatch.setattr(part1, "REPLICATES", 20)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """Folder and printed text of a run without other arguments."""
    folder, text = tmp_path_factory.mktemp("default"), io.StringIO()
    with contextlib.redirect_stdout(text):
        assert part1.main(["--output-dir", str(folder)]) == 0
    return folder, text.getvalue()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_counts_of_the_table_equal_plain_comparisons(dtype):
    """Also at, just below and just above each threshold (0.30 reaches 0.30)."""
    decimals = [float(f"{i / 100:.2f}") for i in range(101)]
    assert GRID.tolist() == decimals[10:91] == [float(f"0.{i}") for i in range(10, 91)]
    rng, edges = np.random.default_rng(0), np.array(decimals, dtype)
    around = [np.nextafter(edges, dtype(end)) for end in (0, 1)]
    scores = np.concatenate([edges, *around, rng.random(5_000).astype(dtype)])
    labels = rng.random(scores.size) < 0.3
    counts = table_of(labels, scores)
    counts = counts[np.isin(counts.threshold, GRID)]
    predicted = scores >= GRID.astype(dtype)[:, None]
    assert_array_equal(counts.tp, (predicted & labels).sum(1))
    assert_array_equal(counts.fp, (predicted & ~labels).sum(1))
    assert_array_equal(counts.fn, (~predicted & labels).sum(1))
    assert_array_equal(counts.tn, (~predicted & ~labels).sum(1))


SKLEARN = {
    "precision": partial(sk.precision_score, zero_division=0),
    "recall": sk.recall_score,
    "specificity": partial(sk.recall_score, pos_label=0),
    "f1": partial(sk.f1_score, zero_division=0),
    "youden_j": lambda y, p: sk.recall_score(y, p) + sk.recall_score(y, p, pos_label=0) - 1,
    "balanced_accuracy": sk.balanced_accuracy_score,
    "accuracy": sk.accuracy_score,
    "f_beta": partial(sk.fbeta_score, beta=2, zero_division=0),
    "mcc": sk.matthews_corrcoef,
    "cohen_kappa": lambda y, p: np.nan_to_num(sk.cohen_kappa_score(y, p)),
}


@pytest.mark.parametrize("metric", SKLEARN)
def test_metric_equals_sklearn_at_every_threshold(metric, dtype=np.float32):
    """With ties on the grid; up to 0.25 all are called positive, above 0.80 nobody."""
    labels, scores = sample(200, decimals=2, dtype=dtype)
    scores = scores.clip(dtype(0.25), dtype(0.80))
    expected = [SKLEARN[metric](labels, scores >= dtype(t)) for t in GRID]
    assert_allclose(all_metrics(labels, scores)[metric], expected, rtol=1e-12, atol=1e-15)


def test_cost_net_benefit_and_alert_rate_equal_their_formulas():
    labels, scores = sample(300, decimals=2)
    found = all_metrics(labels, scores, Objective(fp_cost=1.5, fn_cost=7))
    at_10 = all_metrics(labels, scores, Objective(prevalence=0.1))
    for i, t in enumerate(GRID):
        tp, fp = (sum(y == k and s >= t for y, s in zip(labels, scores)) for k in (1, 0))
        p, n, odds = labels.sum(), (~labels).sum(), t / (1 - t)
        assert found["cost"][i] == pytest.approx((1.5 * fp + 7 * (p - tp)) / 300)
        assert found["net_benefit"][i] == pytest.approx(tp / 300 - fp / 300 * odds)
        assert found["alert_rate"][i] == pytest.approx((tp + fp) / 300)
        expected = tp / p * 0.1 - fp / n * 0.9 * odds
        assert at_10["net_benefit"][i] == pytest.approx(expected, abs=1e-15)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("threshold", [-0.5, 1, 1.5])
def test_net_benefit_has_a_value_below_1_and_where_nobody_is_called(tmp_path, capsys, threshold):
    """The odds of other thresholds are infinite or negative."""
    labels, scores = np.array([True, False, False]), np.array([1.0, 0.5, 0.0])
    every = count(labels, scores)
    assert_array_equal(every.threshold, [0, 0.5, 1, np.nextafter(1, 2)])
    assert_array_equal(measure("net_benefit", every, Objective()), [1 / 3, 0, np.nan, 0])
    path = write_npz(tmp_path / "s.npz", labels, scores)
    options = ["--metric", "net_benefit", "--threshold", threshold, "--scores", path]
    if threshold <= 1:
        assert f"no value at {threshold}" in assert_refused(tmp_path, capsys, *options)
    if threshold >= 1:  # of which no case is part any more
        write_npz(path, labels, 0.9 * scores)
        best = run(tmp_path / "out", *options)[0]["best"]
        assert best["value"] == 0 and best["value_interval"] == [0, 0]
        assert "inf" not in printed(capsys)


def test_f_beta_at_1_is_f1_and_at_its_limits_precision_and_recall():
    for beta, metric in (1, "f1"), (1e-6, "precision"), (1e6, "recall"):
        found = all_metrics(*sample(), Objective(beta=beta))
        assert_allclose(found["f_beta"], found[metric], atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_no_metric_overflows_where_a_row_stands_for_a_billion_cases(metric):
    labels, scores = sample(400)
    few, many = (
        count_every_score(Cases(labels, scores, np.full(400, n)), Objective()) for n in (1, 10**9)
    )
    expected = measure(metric, few, Objective())
    assert_allclose(measure(metric, many, Objective()), expected, rtol=1e-12, atol=1e-12)
    whole = {key: np.array(getattr(many, key), int) for key in ("tp", "fp", "pos", "neg")}
    found = measure(metric, replace(many, **whole), Objective())  # as of a hold-out
    assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decimals", [None, 1])
def test_areas_and_calibration_error_equal_sklearn_and_a_loop(decimals):
    """Without ties in ten groups of 40; with ties a group is one score of one decimal."""
    scores = sample(seed=1, decimals=decimals)[1]
    labels, error = np.random.default_rng(1).random(scores.size) < scores, 0
    order = np.argsort(scores)
    groups = np.split(order, 10) if decimals is None else [scores == s for s in set(scores)]
    for group in groups:
        error += abs(labels[group].sum() - scores[group].sum()) / scores.size
    found = calibrate(labels, scores)
    # Rare scores are joined, whose errors can then cancel out.
    assert found["ece"] == pytest.approx(error, abs=1e-12 if decimals is None else 0.02)
    summary = summary_of(labels, scores, Objective())
    assert summary["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, scores))
    expected = sk.average_precision_score(labels, scores)
    assert summary["average_precision"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "low, high, expected", [((1000, 100), (1000, 100), 0.090), ((5000, 90), (5000, 10), 0.016)]
)
def test_errors_within_a_tenth_of_the_scores_are_seen(low, high, expected):
    """All scores are 0.002 or 0.018: in one bin of equal width all errors can cancel out."""
    sizes, positives = zip(low, high)
    scores = np.repeat([0.002, 0.018], sizes)
    labels = np.concatenate([np.arange(n) < k for n, k in zip(sizes, positives)])
    found = calibrate(labels, scores)
    loop = sum(abs(k - n * s) for (n, k), s in zip((low, high), (0.002, 0.018))) / sum(sizes)
    assert found["ece"] == pytest.approx(loop)
    assert (round(found["ece"], 3), found["miscalibrated"]) == (expected, True)


CALIBRATED = {  # scores that are true probabilities
    "logit-normal": lambda rng, n: 1 / (1 + np.exp(-rng.normal(-1, 2.5, n))),
    "rare": lambda rng, n: rng.beta(0.3, 15, n),
    "one decimal": lambda rng, n: rng.random(n).round(1),
    "two scores": lambda rng, n: rng.choice([0.1, 0.8], n, p=[0.9, 0.1]),
    "certain": lambda rng, n: rng.choice([0.0, 1.0, 0.5], n),
}


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize("kind", CALIBRATED)
def test_calibrated_scores_are_rarely_called_miscalibrated(monkeypatch, kind, n):
    monkeypatch.setattr(utils, "REPLICATES", 400)
    said = 0
    for seed in range(100):
        rng = np.random.default_rng([seed, n])
        scores = CALIBRATED[kind](rng, n)
        labels = rng.random(n) < scores
        said += calibrate(labels, scores, seed)["miscalibrated"]
    assert said <= 9  # binomial: more than 9 of 100 at 5% has a chance of 2.8%, at 2.5% none


def test_miscalibrated_scores_are_called_so():
    for seed in range(20):
        labels, scores = simulate_scores(1000, 0.3, "underconfident", seed)
        assert calibrate(labels, scores, seed)["miscalibrated"]


def test_the_isotonic_curve_equals_sklearns():
    from sklearn.isotonic import IsotonicRegression

    rng = np.random.default_rng(0)
    count, positives = rng.integers(1, 9, 200).astype(float), np.arange(200) / 40
    positives = np.minimum(count, (positives * rng.random(200)).round())
    expected = IsotonicRegression().fit(x := np.arange(200), positives / count, count).predict(x)
    assert_allclose(utils.isotonic(positives, count), expected, atol=1e-12)


PLAIN = {  # goodness (higher is better) of n cases at threshold t
    "f1": lambda tp, fp, fn, tn, n, t: 2 * tp / (2 * tp + fp + fn),
    "accuracy": lambda tp, fp, fn, tn, n, t: (tp + tn) / n,
    "youden_j": lambda tp, fp, fn, tn, n, t: tp / (tp + fn) - fp / (fp + tn),
    "mcc": lambda tp, fp, fn, tn, n, t: (
        (tp * tn - fp * fn) / (((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5 or 1)
    ),
    "cost": lambda tp, fp, fn, tn, n, t: -(2 * fp + 3 * fn) / n,
    "net_benefit": lambda tp, fp, fn, tn, n, t: (tp - fp * t / (1 - t)) / n if tp + fp else 0,
}


def brute_force(labels, scores, objective):
    """Best goodness over every cut and "predict nobody"; -inf if none keeps the limits."""
    best, n = -np.inf, labels.size
    for cut in [*np.unique(scores), np.inf]:
        hit = scores >= cut
        tp, fp, fn, tn = (int((a & b).sum()) for a in (hit, ~hit) for b in (labels, ~labels))
        if (
            tp / max(tp + fp, 1) >= (objective.min_precision or 0) - 1e-12
            and tp / (tp + fn) >= (objective.min_recall or 0) - 1e-12
            and (tp + fp) / n <= (objective.max_alert_rate or 1) + 1e-12
        ):
            best = max(best, PLAIN[objective.metric](tp, fp, fn, tn, n, float(cut)))
    return best


@pytest.mark.parametrize(
    "limits",
    [{}, {"min_precision": 0.6}, {"min_recall": 0.7}, {"min_recall": 0.5, "max_alert_rate": 0.5}],
)
@pytest.mark.parametrize("metric", PLAIN)
def test_exact_optimum_equals_brute_force(metric, limits):
    """On 100 small data sets with ties, some of them float32 or outside [0, 1]."""
    objective, answered = Objective(metric, fp_cost=2, fn_cost=3, **limits), 0
    for seed in range(100):
        labels, scores = sample(2 + seed % 28, seed, decimals=1 + seed % 2)
        scores = scores.clip(0, 0.95)
        if seed % 4 == 3 and metric != "net_benefit":
            scores = (10 * scores - 5).astype(np.float32)
        expected, counts = (
            brute_force(labels, scores, objective),
            count(labels, scores),
        )
        if expected == -np.inf:
            with pytest.raises(UserError, match="closest"):
                find_best(counts, objective)
            continue
        answered, best = answered + 1, find_best(counts, objective)
        value = METRICS[metric].sign * measure(metric, counts, objective)[best]
        assert value == pytest.approx(expected, rel=1e-12, abs=1e-12), seed
        predicted = scores >= counts.threshold[best]
        assert counts.tp[best] == (predicted & labels).sum()
        assert counts.fp[best] == (predicted & ~labels).sum()
    assert answered > 20


@pytest.mark.parametrize("metric", ["accuracy", "cost", "net_benefit"])
@pytest.mark.parametrize("top", [0.99, 1.0])
def test_predict_nobody_wins_where_it_should(metric, top):
    """A single positive below all negatives, which score high."""
    labels = np.arange(20) == 0
    summary = summary_of(labels, np.where(labels, 0.5, top), Objective(metric), exact=True)
    exact = summary["exact"]
    assert [exact[key] for key in ("tp", "fp", "fn", "tn", "net_benefit")] == [0, 0, 1, 19, 0]
    assert exact["threshold"] > top


@pytest.mark.parametrize("metric", ["f1", "cost", "net_benefit"])
def test_exact_optimum_is_never_worse_than_the_table(few_resamples, metric):
    for seed in range(10):
        labels, scores = sample(30, seed, decimals=2)
        summary = summary_of(labels, scores, Objective(metric), exact=True)
        more = METRICS[metric].sign * (summary["exact"]["value"] - summary["best"]["value"])
        assert more == pytest.approx(summary["exact"]["grid_loss"], abs=1e-15), seed
        assert more >= 0, seed


def test_middle_of_a_plateau_is_chosen():
    labels = np.array([False, True] * 10)
    summary = summary_of(labels, np.where(labels, 0.8, 0.2), Objective())
    assert summary["plateau"] == {"low": 0.21, "high": 0.8}
    assert summary["best"]["threshold"] in (0.5, 0.51)


@pytest.mark.parametrize("metric", ["f1", "mcc", "cost"])
def test_plateau_and_near_optimal_are_runs_around_the_best(few_resamples, metric):
    for seed in range(10):
        labels, scores = sample(60, seed)
        summary = summary_of(labels, scores, Objective(metric))
        values = METRICS[metric].sign * all_metrics(labels, scores)[metric]
        best = GRID.tolist().index(summary["best"]["threshold"])
        assert values[best] == pytest.approx(values.max())
        for name, loss in ("plateau", 1e-12), ("near_optimal", 0.005):
            low = high = best
            while low > 0 and values[low - 1] >= values[best] - loss:
                low -= 1
            while high < 80 and values[high + 1] >= values[best] - loss:
                high += 1
            assert summary[name] == {"low": GRID[low], "high": GRID[high]}


@pytest.mark.parametrize(
    "column, option, limit",
    [("precision", "min_precision", 0.95), ("recall", "min_recall", 0.95),
     ("alert_rate", "max_alert_rate", 0.2)],
)  # fmt: skip
def test_constraint_is_kept_and_the_best_of_the_rest_chosen(tmp_path, column, option, limit):
    arguments = ["--n-samples", 2000, f"--{option.replace('_', '-')}", limit]
    summary, table = run(tmp_path, *arguments)
    low, high = (0, limit) if option.startswith("max") else (limit, 1)
    allowed = (table[column] >= low - 1e-12) & (table[column] <= high + 1e-12)
    assert allowed.any() and not allowed[table["f1"].argmax()]
    assert summary["best"]["f1"] == table["f1"][allowed].max()
    assert low - 1e-12 <= summary["best"][column] <= high + 1e-12
    assert summary["limits"][option]["limit"] == limit


def test_impossible_constraint_tells_the_closest_attainable(tmp_path, capsys):
    """The highest score is a negative's, so precision never reaches 1."""
    labels, scores = np.arange(50) >= 25, np.linspace(0.05, 0.99, 50)
    scores[0] = 1.0
    path = write_npz(tmp_path / "s.npz", labels, scores)
    error = assert_refused(tmp_path, capsys, "--scores", path, "--min-precision", 1)
    closest = max(labels[scores >= cut].mean() for cut in scores)
    assert "closest" in error and f"{closest:.4f}" in error


def rare(n=2000, share=0.02, top=0.08, seed=0):
    """A rare class whose scores all lie below the grid, as those of a calibrated model do."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) < n * share
    return labels, (top * np.where(labels, rng.beta(8, 3, n), rng.beta(2, 9, n))).round(4)


@pytest.mark.parametrize("options", ["", "--exact", "--min-recall 0.9", "--min-precision 0.5"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_table_holds_the_answer_of_scores_outside_the_grid(tmp_path, options, dtype):
    """With the best of all cuts, or with what keeps a limit; the grid always stays."""
    labels, scores = rare()
    scores = scores.astype(dtype)
    path = write_npz(tmp_path / "s.npz", labels, scores)
    summary, table = run(tmp_path / "out", "--scores", path, *options.split())
    objective = Objective(**{name: summary[name] for name in part1.LIMITS})
    assert summary["table"] == "extended" and set(GRID) <= set(table["threshold"])
    assert table.size <= 81 + 82
    assert summary["best"]["f1"] == pytest.approx(brute_force(labels, scores, objective))
    reaching = scores >= dtype(summary["best"]["threshold"])
    assert summary["best"]["tp"] == (reaching & labels).sum() and summary["best"]["tp"] > 0


def test_the_grid_is_kept_where_it_loses_little(tmp_path):
    assert run(tmp_path, "--n-samples", 2000)[0]["table"] == "grid"


@pytest.mark.parametrize("scores", [[0.97, 0.95], [0.505, 0.5025]])
def test_limits_that_only_scores_outside_the_table_keep_have_an_answer(tmp_path, scores):
    """Beyond the grid, or between two of its thresholds."""
    path = write_npz(tmp_path / "s.npz", [True, False], scores)
    summary, _ = run(tmp_path / "out", "--scores", path, "--min-precision", 1)
    assert (summary["table"], summary["best"]["tp"], summary["best"]["fp"]) == ("extended", 1, 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("metric", ["f1", "accuracy"])
@pytest.mark.parametrize("scale", [0.01, 1, 60_000])
def test_a_printed_threshold_can_be_typed_back(
    tmp_path, capsys, few_resamples, scale, metric, dtype
):
    """It has the counts of the chosen cut, and as few digits as that allows."""
    for seed in range(6):
        labels, scores = sample(60 - 10 * seed, seed)
        labels = labels if metric == "f1" else np.arange(labels.size) == scores.argmin()
        scores = (scale * scores).astype(dtype)
        path = write_npz(tmp_path / "s.npz", labels, scores)
        summary, _ = run(tmp_path / "out", "--scores", path, "--exact", "--metric", metric)
        printed = re.search(r"Best threshold for [\w ]+: (\S+) \(", capsys.readouterr().out)[1]
        best = summary["best"]
        reaching = scores >= dtype(printed)
        counts = [(reaching & labels).sum(), (reaching & ~labels).sum()]
        assert counts == [best["tp"], best["fp"]], (seed, printed)
        if float(printed) not in GRID:
            digits = len(printed.replace(".", "").strip("0"))
            fewer = [dtype(f"{float(printed):.{digits - 2}e}")] if digits > 1 else []
            assert all(((scores >= cut) != reaching).any() for cut in fewer), printed


def test_nobody_is_a_threshold_above_the_highest_score(tmp_path):
    """Where that is 1.0, a printed 1 would call it positive."""
    labels, scores = np.arange(6) == 3, np.array([1.0, 1.0, 0.95, 0.93, 0.97, 0.99])
    path = write_npz(tmp_path / "s.npz", labels, scores)
    summary, _ = run(tmp_path / "out", "--scores", path, "--metric", "accuracy", "--exact")
    for found in summary["best"], summary["exact"]:
        assert found["threshold"] > 1 and found["accuracy"] == pytest.approx(5 / 6)


def test_large_scores_keep_their_digits(tmp_path, capsys):
    """Five digits, of which four would lose a case."""
    scores = np.array([11020, 12001, 54326, 54320, 30111, 54327, 98764, 54299, 76543, 2005])
    path = write_npz(tmp_path / "s.npz", np.isin(scores, [54326, 54327, 98764, 76543]), scores)
    summary, _ = run(tmp_path / "out", "--scores", path, "--exact")
    assert (summary["best"]["threshold"], summary["best"]["f1"]) == (54326, 1)
    assert "54326.0 (F1 1.0000" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("metric", ["f1", "cost"])
def test_intervals_agree_with_resampling_the_rows(metric):
    """Against 2,000 real resamples of 300 rows; at a threshold chosen beforehand."""
    labels, scores = sample(300, seed=3)
    objective, sign, chosen = Objective(metric, fn_cost=2), METRICS[metric].sign, HALF - 3
    table = table_of(labels, scores)
    choice = Choice(table, objective, chosen)
    found, gain = certainty(choice), gain_over(choice, HALF)

    rng = np.random.default_rng(99)
    rows = rng.integers(0, 300, (2000, 300))
    weights = np.array([np.bincount(row, minlength=300) for row in rows])
    predicted = (scores[:, None] >= GRID).astype(int)
    tp, fp = ((weights * y) @ predicted for y in (labels, ~labels))
    sizes = ((weights @ y)[:, None] for y in (labels, ~labels))
    values = sign * measure(metric, Counts(GRID, tp, fp, *sizes), objective)
    whole = sign * measure(metric, table, objective)
    value, gains = values[:, chosen], values[:, chosen] - values[:, HALF]
    best = values >= values.max(1, keepdims=True) - 1e-12
    picks = np.array([ties[(ties.size - 1) // 2] for ties in map(np.flatnonzero, best)])
    ends = partial(np.quantile, q=[0.025, 0.975])

    # An end of two such intervals differs by about 0.09 standard deviations.
    band = sign * found["bands"][metric][:, chosen]
    assert_allclose(np.sort(band), ends(value), atol=0.3 * value.std())
    luck = (values[np.arange(2000), picks] - whole[picks]).mean() - (value - whole[chosen]).mean()
    assert sign * found["luck"][metric] == pytest.approx(luck, abs=0.1 * value.std())
    low, high = ends(gains)  # longer on the side of luck
    assert low - 2 * luck - 0.3 * gains.std() < gain["corrected_interval"][0] < low
    assert gain["corrected_interval"][1] == pytest.approx(high, abs=0.3 * gains.std())
    assert_allclose(found["intervals"]["threshold"], ends(GRID[picks]), atol=0.03)


def test_only_the_gain_of_the_default_over_itself_is_certain():
    """Where no error was seen, the interval ends at none, but has a width."""
    labels, scores = np.arange(8) == 7, np.linspace(0.2, 0.9, 8)
    table = table_of(labels, scores)
    same = gain_over(Choice(table, Objective(), HALF), HALF)
    assert same["value"] == same["corrected"] == 0 == np.ptp(same["corrected_interval"])
    found = summary_of(labels, scores, Objective())["best"]
    for metric in "value", "precision", "recall", "specificity":
        low, high = found[f"{metric}_interval"]
        assert low < 0.95 and high == found[metric] == 1, metric


def test_three_cases_without_an_error_are_no_certainty():
    """Clopper-Pearson for two of two hits is 0.158 to 1, for one of one rejections 0.025 to 1."""
    labels, scores = np.array([False, True, True]), np.array([0.2, 0.45, 0.48])
    best = summary_of(labels, scores, Objective())["best"]
    assert best["recall_interval"][0] < 0.4 and best["specificity_interval"][0] < 0.2
    assert best["value_interval"][0] < 0.6 and best["value_interval"][1] == 1
    assert best["threshold_interval"] == [0.21, 0.45]


def test_no_false_alarm_seen_at_a_low_prevalence_is_not_none_possible(tmp_path):
    """The tails of the Beta distributions give F1 0.175 at the chosen 0.78."""
    best = run(tmp_path, "--prevalence", 0.0001, "--seed", 2)[0]["best"]
    assert best["threshold"] == 0.78 and best["value_interval"][0] < 0.175 < best["value"]
    assert best["precision_interval"][0] < 0.1


def test_a_limit_has_the_probability_with_which_the_population_keeps_it():
    """Of 200 samples, about as many keep the limit as the runs say on average."""
    limit, kept, stated = 0.9, [], []
    labels, scores = simulate_scores(300_000, 0.3, "balanced", 9)
    population = part1.count_every_score(Cases(labels, scores), Objective())
    for seed in range(150):
        objective = Objective(min_precision=limit)
        table = table_of(*simulate_scores(300, 0.3, "balanced", seed), objective)
        choice = Choice(table, objective, find_best(table, objective), seed)
        at = population.at(table.threshold[[choice.chosen]])
        kept.append(measure("precision", at, objective).item() >= limit)
        stated.append(certainty(choice)["limits"]["min_precision"]["probability"])
    assert np.mean(stated) == pytest.approx(np.mean(kept), abs=0.1)
    assert 0.2 < np.mean(kept) < 0.8


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_hold_out_deals_the_cases_at_random(share):
    cells = table_of(*sample(500)).cells()
    splits = [hold_out(cells, share, seed) for seed in range(200)]
    for choosing, scoring in splits:
        assert_array_equal(choosing + scoring, cells)
        assert choosing.min() >= 0 and scoring.min() >= 0
    mean = np.mean([scoring for _, scoring in splits], axis=0)
    assert_allclose(mean, cells * share, atol=5 * np.sqrt(cells.max() / 4 / 200))


def test_nothing_is_held_out_where_a_part_lacks_a_class():
    labels, scores = sample(20)
    held = [summary_of(labels, scores, Objective(), share=s)["holdout"] for s in (1e-9, 0.5)]
    assert held[0] is None and 0 < held[1]["n"] < 20


def test_holdout_chooses_on_one_part_and_scores_on_the_other():
    labels, scores = sample(500, seed=4)
    table = table_of(labels, scores)
    parts = hold_out(table.cells(), 0.3, 7)
    choosing, scoring = (measure("f1", table.redrawn(part), Objective()) for part in parts)
    held = summary_of(labels, scores, Objective(), share=0.3, seed=7)["holdout"]
    at = GRID.tolist().index(held["threshold"])
    assert held["value_where_chosen"] == choosing[at] == pytest.approx(choosing.max())
    assert (held["value"], held["n"]) == (scoring[at], parts[1].sum())
    assert held["gain"] == pytest.approx(scoring[at] - scoring[HALF], abs=1e-15)


def test_theory_agrees_with_calibrated_scores_only(tmp_path):
    """c_FP / (c_FP + c_FN) is near the optimum of scores that are probabilities."""
    arguments = [
        "--n-samples",
        50_000,
        "--metric",
        "cost",
        "--fp-cost",
        2,
        "--fn-cost",
        2,
        "--scenario",
    ]
    right = run(tmp_path / "a", *arguments, "calibrated")[0]["calibration"]
    wrong = run(tmp_path / "b", *arguments, "underconfident")[0]["calibration"]
    assert right["expected_threshold"] == wrong["expected_threshold"] == 0.5
    assert right["ece"] < 0.01 < wrong["ece"]
    assert right["expected_loss"] < 0.002 < wrong["expected_loss"]
    assert right["expected_loss_interval"][0] <= 0 < wrong["expected_loss_interval"][0]
    assert (right["miscalibrated"], wrong["miscalibrated"]) == (False, True)


def test_prevalence_is_a_population_with_rows_replicated(tmp_path):
    """Positives 7 times and negatives 3 times: 30 of 100 become 210 of 420."""
    labels, scores = np.arange(100) < 30, sample(100, decimals=2)[1]
    path, times = write_npz(tmp_path / "s.npz", labels, scores), np.where(labels, 7, 3)
    a, table = run(tmp_path / "a", "--scores", path, "--prevalence", 0.5)
    write_npz(path, labels.repeat(times), scores.repeat(times))
    b, wanted = run(tmp_path / "b", "--scores", path)
    for metric in METRICS:
        assert_allclose(table[metric], wanted[metric], atol=1e-12)
        for entry in "best", "default":
            assert a[entry][metric] == pytest.approx(b[entry][metric], abs=1e-12)
    assert a["best"]["threshold"] == b["best"]["threshold"]
    assert a["average_precision"] == pytest.approx(b["average_precision"])
    assert a["best"]["tp"] + a["best"]["fn"] == a["n_positive"] == 30  # as observed
    row = a["balances"][3]  # the closing table says the same
    assert (row["prevalence"], row["threshold"]) == (0.5, a["best"]["threshold"])
    assert [row["value"], row["value_at_default"]] == pytest.approx(
        [a["best"]["f1"], a["default"]["f1"]]
    )


def test_order_of_the_rows_changes_nothing(tmp_path):
    """Scores are multiples of 1/1024, so that sums in any order are the same."""
    labels, scores = sample()
    order, path = np.random.default_rng(0).permutation(labels.size), tmp_path / "s.npz"
    for name, rows in ("a", slice(None)), ("b", order):
        write_npz(path, labels[rows], np.floor(scores * 1024)[rows] / 1024)
        run(tmp_path / name, "--scores", path, "--exact")
    a, b = ((tmp_path / name / "summary.json").read_text() for name in "ab")
    assert a == b


def test_every_row_twice_changes_no_metric():
    labels, scores = sample(decimals=2)
    once = analyse(Cases(labels, scores), Objective(), exact=True)
    twice = analyse(Cases(labels.repeat(2), scores.repeat(2)), Objective(), exact=True)
    for a, b in (once.table, twice.table), (once.curve, twice.curve):
        assert_array_equal(2 * a.tp, b.tp)
        for metric in METRICS:
            values = (measure(metric, counts, Objective()) for counts in (a, b))
            assert_allclose(*values, atol=1e-12)
    a, b = once.summary, twice.summary
    assert a["calibration"]["ece"] == pytest.approx(b["calibration"]["ece"])
    assert a["best"]["threshold"] == b["best"]["threshold"]
    for key in "roc_auc", "average_precision":
        assert a[key] == pytest.approx(b[key])


def test_swapped_classes_mirror_recall_and_specificity():
    """With labels and scores turned round, recall at t is specificity at 1 - t."""
    labels, scores = sample()
    scores = (np.floor(scores * 4096) + 0.5) / 4096  # 1 - score is exact, no score on the grid
    a, b = all_metrics(labels, scores), all_metrics(~labels, 1 - scores)
    for one, other in ("recall", "specificity"), ("specificity", "recall"), ("mcc", "mcc"):
        assert_allclose(a[one], b[other][::-1], atol=1e-12)


@pytest.mark.parametrize("constant, exact", [(0.4, False), (0.4, True), (7.0, True)])
def test_constant_scores_are_answered(tmp_path, constant, exact):
    """Everybody or nobody: F1 takes everybody, accuracy the larger class."""
    path = write_npz(tmp_path / "s.npz", np.arange(10) < 3, np.full(10, constant))
    arguments = ["--scores", path, *["--exact"] * exact, "--metric"]
    f1 = run(tmp_path / "a", *arguments, "f1")[0]
    nobody = run(tmp_path / "b", *arguments, "accuracy")[0]["exact" if exact else "best"]
    assert (f1["best"]["tp"], f1["best"]["fp"], f1["roc_auc"]) == (3, 7, 0.5)
    assert (nobody["tp"], nobody["fp"], nobody["accuracy"]) == (0, 0, 0.7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_outside_0_1_get_a_table_of_quantiles(tmp_path, dtype):
    """Nothing is rescaled, and there is no default of 0.5."""
    labels, scores = sample(1000)
    scores = (8 * scores - 5).round(3).astype(dtype)
    path = write_npz(tmp_path / "s.npz", labels, scores)
    summary, table = run(tmp_path / "out", "--scores", path, "--exact")
    assert summary["default"] is summary["gain"] is summary["calibration"] is None
    assert table.size == 81 and summary["table"] == "quantiles"
    predicted = scores >= table["threshold"].astype(dtype)[:, None]
    assert_array_equal(table["tp"], (predicted & labels).sum(1))
    assert_array_equal(table["fp"], (predicted & ~labels).sum(1))
    assert_allclose(table["alert_rate"], 1 - np.arange(81) / 81, atol=0.003)
    assert summary["exact"]["f1"] >= summary["best"]["f1"] == table["f1"].max()


@pytest.mark.parametrize("shift", [0, 100])
def test_net_benefit_needs_probabilities(tmp_path, capsys, shift):
    """Scores such as logits have none, even where some happen to lie in [0, 1)."""
    labels, scores = sample()
    path = write_npz(tmp_path / "s.npz", labels, 6 * scores - 3 + shift)
    arguments = ["--scores", path, "--exact", "--metric", "net_benefit"]
    assert "net_benefit" in assert_refused(tmp_path, capsys, *arguments)


def test_output_folder_that_cannot_be_made_and_a_class_without_cases(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in "file", "file/below":
        assert "--output-dir" in assert_refused(tmp_path, capsys, "--n-samples", 50, out=out)
    assert (tmp_path / "file").read_text() == "mine"
    arguments = ["--n-samples", 10, "--positive-rate", 0.01]
    assert "--n-samples" in assert_refused(tmp_path, capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    ["--fp-cost -1", "--fn-cost nan", "--fp-cost 0 --fn-cost 0", "--metric best", "--beta 0",
     "--n-samples 1", "--n-samples 2.5", "--positive-rate 0", "--positive-rate 1",
     "--holdout 0", "--holdout 1", "--min-precision 1.1", "--min-recall -0.1",
     "--max-alert-rate 2", "--prevalence 0", "--prevalence 1", "--seed -1", "--seed 4_2",
     "--prevalence 0_1", "--scenario no"],
)  # fmt: skip
def test_bad_argument_is_refused_by_name(tmp_path, capsys, arguments):
    assert part1.main([*arguments.split(), "--output-dir", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and arguments.split()[0] in line
    assert not (tmp_path / "out").exists()


def test_extreme_beta_is_answered_or_refused(tmp_path):
    arguments = ["--n-samples", "50", "--beta", "1e200", "--output-dir", str(tmp_path)]
    assert part1.main(arguments) in (0, 2)


def test_scores_of_a_network_with_a_column_per_class(tmp_path):
    """The form in which part 2 writes its test scores."""
    labels, scores = sample(200)
    rows = [["cat" if y else "dog", s, 1 - s] for y, s in zip(labels, scores.tolist())]
    path = tmp_path / "test_scores.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["label", "cat", "dog"], *rows])
    names = ["--label-column", "label", "--score-column", "cat", "--positive", "cat"]
    table = run(tmp_path / "out", "--scores", path, *names)[1]
    assert_array_equal(table["recall"], all_metrics(labels, scores)["recall"])
    assert not (tmp_path / "out" / "scores.csv").exists()


def test_published_net_benefit(tmp_path, scores_dir):
    """Numbers published with the R package dcurves."""
    path, names = scores_dir / "dca.csv", ["cancer", "cancerpredmarker"]
    arguments = ["--scores", path, "--label-column", names[0], "--score-column", names[1]]
    summary, table = run(tmp_path, *arguments, "--metric", "net_benefit")
    model = table["net_benefit"][table["threshold"] == 0.25].item()
    labels, _ = read_scores(path, *names)[:2]
    everybody = all_metrics(labels, np.ones(labels.size))["net_benefit"][15]
    assert summary["n"] == 750
    assert model == pytest.approx(0.0640, abs=5e-5)
    assert everybody == pytest.approx(-0.1466667, abs=5e-8)
    assert (model - everybody) / (0.25 / 0.75) == pytest.approx(0.632, abs=5e-4)


def test_files_of_the_default_run(default_run):
    folder, text = default_run
    plots = {
        "01_outcomes.png", "02_precision_recall_f1_vs_threshold.png",
        "03_precision_recall_curve.png", "04_roc_curve.png", "05_metric_comparison.png",
        "06_reliability.png",
    }  # fmt: skip
    names = plots | {"scores.csv", "thresholds.csv", "summary.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    assert all(name in text for name in names)
    rows = list(csv.reader((folder / "thresholds.csv").read_text().splitlines()))
    assert rows[0] == COLUMNS and [float(row[0]) for row in rows[1:]] == GRID.tolist()
    labels, scores = read_scores(folder / "scores.csv")[:2]
    expected = simulate_scores(10_000, 0.3, "balanced", 42)
    assert_array_equal(labels, expected[0])
    assert_array_equal(scores, expected[1])


def test_summary_agrees_with_the_table(default_run):
    summary, table = results(default_run[0])
    assert (summary["n"], summary["n_positive"], summary["metric"]) == (10_000, 3_000, "f1")
    assert summary["default"]["threshold"] == 0.5 and summary["exact"] is None
    assert summary["calibration"]["expected_threshold"] == summary["best"]["f1"] / 2
    assert list(summary["by_metric"]) == COLUMNS[len(COUNTS) :]
    for entry in summary["best"], summary["default"], *summary["by_metric"].values():
        row = table[table["threshold"] == entry["threshold"]]
        assert [entry[name] for name in COLUMNS] == [row[name].item() for name in COLUMNS]
    for metric, entry in summary["by_metric"].items():
        best = table[metric].min() if metric == "cost" else table[metric].max()
        assert entry["value"] == pytest.approx(best, abs=1e-12)
    best, gain = summary["best"], summary["gain"]
    assert gain["value"] == pytest.approx(best["f1"] - summary["default"]["f1"])
    assert gain["corrected_interval"][0] < gain["value"] < gain["corrected_interval"][1]
    assert best["value_interval"][0] < best["f1"] < best["value_interval"][1]
    assert best["threshold_interval"][0] <= best["threshold"] <= best["threshold_interval"][1]


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path, default_run):
    run(tmp_path / "same", "--seed", 42)
    run(tmp_path / "other", "--seed", 1)
    for name in "scores.csv", "thresholds.csv", "summary.json":
        original = (default_run[0] / name).read_bytes()
        assert (tmp_path / "same" / name).read_bytes() == original
        assert (tmp_path / "other" / name).read_bytes() != original


def test_another_process_writes_the_same_bytes(tmp_path, default_run):
    """Python orders sets of text anew in each process."""
    subprocess.run([sys.executable, part1.__file__, "--output-dir", tmp_path], check=True)
    assert (tmp_path / "summary.json").read_bytes() == (
        default_run[0] / "summary.json"
    ).read_bytes()


def test_default_optimum_is_near_one_half_for_most_seeds():
    """Threshold in 0.48 to 0.52 and F1 in 0.85 to 0.90, for at least 90 of 100 seeds."""
    hits = 0
    for seed in range(100):
        table = table_of(*simulate_scores(10_000, 0.3, "balanced", seed))
        best = table[find_best(table, Objective())]
        hits += 0.48 <= best.threshold <= 0.52 and 0.85 <= measure("f1", best, Objective()) <= 0.90
    assert hits >= 90, f"{hits} of 100 seeds"


@pytest.mark.parametrize("scenario", part1.SCENARIOS)
def test_simulated_scores_are_probabilities_at_the_rate_asked_for(scenario):
    labels, scores = simulate_scores(1000, 0.25, scenario, 5)
    assert labels.dtype == bool and labels.sum() == 250 and not labels[:250].all()
    assert scores.min() >= 0 and scores.max() <= 1
    assert sk.roc_auc_score(labels, scores) > 0.9


def test_smallest_simulation_is_answered(tmp_path):
    """One case a class: nothing to hold out."""
    summary, _ = run(tmp_path, "--n-samples", 2, "--exact")
    assert summary["n"] == 2 and summary["holdout"] is None


@pytest.mark.parametrize(
    "arguments, verdict, error",
    [
        ("", "cannot_tell", None),
        ("--seed 1", "cannot_tell", None),
        ("--n-samples 100000", "does_not_pay", None),
        ("--min-recall 0.97", None, "false_alarms"),
        ("--min-precision 0.97", None, "misses"),
        ("--scenario underconfident", "pays", None),
        ("--metric youden_j", "cannot_tell", "false_alarms"),
        ("--metric youden_j --prevalence 0.9", "cannot_tell", "misses"),
        ("--metric cost --fn-cost 5", "pays", None),
        ("--metric cost --fn-cost 5 --prevalence 0.05", "cannot_tell", "misses"),
    ],
)
def test_verdicts_follow_from_the_run(tmp_path, arguments, verdict, error):
    summary = run(tmp_path, *arguments.split())[0]
    assert (summary["gain"]["verdict"], summary["dominant_error"]) == (verdict, error)


FIGURES = dict(part1.FIGURES)  # before `no_figures` takes them away


@pytest.mark.parametrize(
    "arguments",
    [
        "--metric cost --fn-cost 5 --prevalence 0.05 --min-recall 0.9",
        "--metric net_benefit --n-samples 2 --exact",
        "--metric accuracy --positive-rate 0.01 --n-samples 200",
        "--metric alert_rate --n-samples 200",
        "--threshold 5 --n-samples 200",
    ],
)
def test_figures_of_unusual_runs_can_be_drawn(tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(part1, "FIGURES", FIGURES)
    run(tmp_path, *arguments.split())
    assert {path.stem for path in tmp_path.glob("*.png")} == set(FIGURES)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_the_outcomes_are_split_at_the_threshold(dtype, threshold):
    """In single precision 0.7 is a little less."""
    labels, scores = sample(2000, dtype=dtype)
    result = analyse(Cases(labels, scores), Objective(), given=threshold)
    (axes,) = FIGURES["01_outcomes"](matplotlib.pyplot, result).axes
    edges = {patch.get_label().split(":")[0]: patch.get_data().edges for patch in axes.patches}
    for name, end in ("misses", -1), ("correct rejections", -1), ("hits", 0), ("false alarms", 0):
        assert edges[name][end] == pytest.approx(threshold, abs=1e-6), name
        assert np.diff(edges[name]).min() > 1 / 80, name  # a sliver would be a spike


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "scores", [[0, 5e-324], [0.4, 0.4 + 1e-16], [0.3, 0.3], [-1e300, 1e300], [-7.0, 1e3]]
)
@pytest.mark.parametrize("threshold", [None, 0.31, -1e300])
def test_any_scores_have_bins_that_hold_them_all(scores, threshold):
    """Also scores that are equal, nearly equal, or as far apart as they can be."""
    labels, scores = np.array([True, False] * 2), np.array(scores * 2)
    result = analyse(Cases(labels, scores), Objective(), given=threshold)
    FIGURES["01_outcomes"](matplotlib.pyplot, result)
    assert result.bars.cells()[:, 1:-1].sum() == 4
    assert result.bars.threshold.size <= 66 and np.diff(result.bars.threshold).min() > 0


def test_scores_outside_0_1_have_no_reliability(tmp_path, monkeypatch):
    monkeypatch.setattr(part1, "FIGURES", FIGURES)
    path = write_npz(tmp_path / "s.npz", np.arange(10) < 3, np.full(10, 7.0))
    run(tmp_path, "--scores", path, "--exact")
    assert {path.stem for path in tmp_path.glob("*.png")} == set(FIGURES) - {"06_reliability"}


@pytest.mark.filterwarnings("error")  # such as matplotlib's of a legend without entries
def test_a_metric_and_a_figure_are_one_entry_each(tmp_path, monkeypatch):
    """A toy of each, as README shows them."""

    def jaccard(c, objective):
        return c.tp / (c.tp + c.fp + c.fn)

    def plot_scores(plt, result):
        figure, axes = plt.subplots()
        axes.hist(result.cases.scores[result.cases.labels])
        return figure

    monkeypatch.setitem(METRICS, "jaccard", Metric("Jaccard index", jaccard))
    monkeypatch.setitem(part1.FIGURES, "07_scores", plot_scores)
    monkeypatch.setitem(part1.FIGURES, "04", FIGURES["05_metric_comparison"])
    summary, table = run(tmp_path, "--metric", "jaccard", "--min-precision", 0.9)
    f1 = table["f1"]
    assert_allclose(table["jaccard"], f1 / (2 - f1))
    assert summary["best"]["value"] == table["jaccard"][table["precision"] >= 0.9].max()
    assert summary["best"]["value_interval"][0] < summary["best"]["jaccard"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"07_scores.png", "04.png"}


def test_the_committed_outputs_and_the_first_lines_are_those_of_the_default_run(default_run):
    """The file opens with the threshold, values and area that summary.json has."""
    committed, table = results(ROOT / "outputs/part1")
    summary, expected = results(default_run[0])
    chance, again = (each["calibration"].pop("ece_by_chance") for each in (committed, summary))
    others = np.lib.NumpyVersion(np.__version__) >= "2.5.0"  # which draws other numbers
    assert_allclose(chance, again, rtol=0, atol=1e-4 if others else 1e-9)
    assert rounded(committed) == rounded(summary)
    assert_allclose(table.tolist(), expected.tolist(), rtol=1e-9)
    best, text = committed["best"], " ".join(part1.__doc__.split())
    low, high = best["value_interval"]
    assert f"Of {committed['n']:,} simulated cases F1 is best at {best['threshold']}:" in text
    assert f"{best['value']:.4f} (95% interval {low:.4f} to {high:.4f})" in text
    assert f"{committed['default']['value']:.4f} at the default 0.5" in text
    assert f"ROC AUC {committed['roc_auc']:.4f}." in text


def test_a_run_needs_neither_torch_nor_sklearn_and_ends_with_a_status(tmp_path):
    def python(*arguments):
        command, folder = [sys.executable, *arguments], Path(part1.__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    code = (
        "import sys, part1_threshold as part1; before = [*sys.modules]; "
        f"part1.main(['--output-dir', {str(tmp_path / 'run')!r}]); "
        "print(['matplotlib' in before, *(m in sys.modules for m in ('torch', 'sklearn'))])"
    )
    done = python("-c", code)
    assert done.stdout.endswith("\n[False, False, False]\n"), done.stderr
    done = python(part1.__file__, "--scores", "no.csv", "--output-dir", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]*no\.csv[^\n]*\n", done.stderr)


@pytest.mark.parametrize("metric", ["youden_j", "mcc", "balanced_accuracy"])
def test_a_gain_is_rarely_claimed_of_scores_without_skill(monkeypatch, metric):
    monkeypatch.setattr(part1, "REPLICATES", 400)
    claims = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        table = table_of(
            rng.random(300) < 0.3, rng.beta(4, 4, 300), objective := Objective(metric)
        )
        half = table.threshold.searchsorted(0.5)
        gain = gain_over(Choice(table, objective, find_best(table, objective), seed), half)
        claims += gain["corrected_interval"][0] > 0
    assert claims <= 7  # binomial: more than 7 of 60 at 5% has a chance of 1.5%


def test_a_true_gain_is_found(monkeypatch):
    monkeypatch.setattr(part1, "REPLICATES", 400)
    for seed in range(10):
        data = simulate_scores(1000, 0.3, "underconfident", seed)
        assert summary_of(*data, Objective(), seed=seed)["gain"]["verdict"] == "pays"


@pytest.mark.parametrize(
    "interval, corrected, verdict, needed",
    [
        ([0.01, 0.03], 0.02, "pays", None),
        ([-0.001, 0.004], 0.001, "does_not_pay", None),
        ([0.001, 0.004], 0.002, "does_not_pay", None),
        ([-0.02, 0.06], 0.02, "cannot_tell", 400),  # twice as narrow, it would not reach 0
        # (0.019 / 0.004) ** 2 times as many, to one digit
        ([-0.02, 0.02], 0.001, "cannot_tell", 3_000),
    ],
)
def test_the_verdict_follows_from_the_interval(interval, corrected, verdict, needed):
    gain = {"value": 0.01, "corrected": corrected, "corrected_interval": interval}
    found = part1.weigh(gain, loss=0.005, n=100, judged=True)
    assert found["verdict"] == verdict
    assert found["cases_needed"] == needed
    assert part1.weigh(gain, 0.005, 100, judged=False)["verdict"] is None
    same = part1.weigh(gain | {"value": -1e-16}, 0.005, 100, judged=True)
    assert (same["verdict"], same["cases_needed"]) == ("does_not_pay", None)  # 0.5 is as good


def printed(capsys):
    """What a run printed, in one line."""
    return " ".join(capsys.readouterr().out.split())


REVERSED = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [5, 12, 18, 22, 40, 30, 55, 61, 68, 74, 83, 91]


def test_reversed_scores_are_said_to_be_so_and_can_be_turned(tmp_path, capsys):
    """Of 35 pairs one is right; low is positive up to 0.4, with one false alarm."""
    path = write_npz(tmp_path / "s.npz", REVERSED[0], np.array(REVERSED[1]) / 100)
    summary, _ = run(tmp_path / "a", "--scores", path)
    assert (summary["ranking"], summary["roc_auc"]) == ("reversed", pytest.approx(1 / 35))
    text = printed(capsys)
    assert text.index("--lower-is-positive") < text.index("12 cases")
    summary, table = run(tmp_path / "b", "--scores", path, "--lower-is-positive")
    assert (summary["ranking"], summary["roc_auc"]) == ("right", pytest.approx(34 / 35))
    best = summary["best"]
    assert (best["threshold"], best["f1"]) == (0.4, pytest.approx(10 / 11))
    assert best["threshold_interval"][0] <= 0.4 <= best["threshold_interval"][1]
    assert "score <= threshold" in printed(capsys)
    for line in table:
        called = np.array(REVERSED[1]) / 100 <= line["threshold"]
        assert line["tp"] == called[:5].sum() and line["fp"] == called[5:].sum()


def test_lower_is_positive_mirrors_the_scores_exactly(tmp_path):
    """As negated scores would have it; 1 - score would round."""
    labels, scores = sample(300, seed=2)
    path = write_npz(tmp_path / "s.npz", labels, -scores)
    a, _ = run(tmp_path / "a", "--scores", path, "--lower-is-positive", "--exact")
    write_npz(path, labels, 5 + scores)  # outside [0, 1], too
    b, _ = run(tmp_path / "b", "--scores", path, "--exact")
    for key in "f1", "tp", "fp", "value_interval":
        assert a["best"][key] == b["best"][key]
    assert a["exact"]["f1"] == b["exact"]["f1"] and a["roc_auc"] == b["roc_auc"]
    assert (a["calibration"], a["default"]) == (None, None)


@pytest.mark.parametrize("n", [3, 40, 1000])
def test_scores_that_say_nothing_are_said_to_be_guesses(n):
    """As often as not: at most 5% of areas of guesses count as right or reversed."""
    rng, known = np.random.default_rng(n), 0
    for _ in range(200):
        labels = rng.permutation(np.arange(n) < max(1, n // 3))
        known += part1.judge_ranking(count(labels, rng.random(n).round(2))) != "unclear"
    assert known <= 20
    if n > 3:
        skilled = count(*sample(n))
        assert part1.judge_ranking(skilled) == "right"


def test_guesses_about_groups_are_no_ranking():
    """Of eight persons, whose cases share label and score, the area says little."""
    person, known = np.repeat(np.arange(8), 50), 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels, noise = rng.permutation(np.arange(8) < 4)[person], rng.random(8)[person]
        every = count(labels, noise + 0.001 * rng.random(400))
        known += part1.judge_ranking(every, person) != "unclear"
    assert known <= 12


def test_everybody_and_nobody_are_what_to_beat(tmp_path, capsys):
    """Doing nothing costs 0.2 a case, and what is saved of it is not small."""
    options = "--scenario calibrated --positive-rate 0.001 --metric cost --fn-cost 200"
    summary, _ = run(tmp_path, *options.split(), "--n-samples", 200_000)
    assert summary["nobody"]["value"] == pytest.approx(0.2)
    assert summary["everybody"]["value"] == pytest.approx(0.999)
    assert summary["small_loss"] == pytest.approx(0.005 * 0.2)
    assert (summary["gain"]["verdict"], summary["table"]) == ("pays", "extended")
    assert summary["best"]["value"] < 0.15 and "call nobody 0.2000 0.000" in printed(capsys)


@pytest.mark.parametrize("metric", ["precision", "recall", "specificity", "alert_rate"])
def test_one_rate_alone_is_no_advice(tmp_path, capsys, metric):
    """Under a limit on another it is."""
    assert run(tmp_path, "--n-samples", 500, "--metric", metric)[0]["gain"]["verdict"] is None
    text = printed(capsys)
    assert "worth having" not in text and "no advice" in text
    limit = (
        ["--min-precision", 0.8] if metric in ("recall", "alert_rate") else ["--min-recall", 0.8]
    )
    run(tmp_path, "--n-samples", 500, "--metric", metric, *limit)
    assert "no advice" not in printed(capsys)


def test_with_a_prevalence_the_screen_is_of_that_population(tmp_path, capsys):
    """Counts agree with the rates beside them; summary.json has those observed."""
    summary, _ = run(tmp_path, "--prevalence", 0.05)
    best, text = summary["best"], printed(capsys)
    found = r"hits ([\d,]+), false alarms ([\d,]+), misses ([\d,]+), correct rejections ([\d,]+)"
    numbers = re.search(found, text).groups()
    hits, alarms, misses, rejections = (int(number.replace(",", "")) for number in numbers)
    assert hits + misses == 500 and hits + misses + alarms + rejections == 10_000
    assert hits / (hits + alarms) == pytest.approx(best["precision"], abs=0.002)
    assert best["tp"] + best["fn"] == 3000 and f"misses: {misses}" in text


@pytest.mark.parametrize(
    "options, bound",
    [
        ("--prevalence 0.05", False),
        ("--metric cost --fp-cost 10 --fn-cost 1", False),
        ("--min-precision 0.95", True),
        ("--min-recall 0.9 --confidence 0.9", True),
        ("--threshold 0.3", True),
    ],
)
def test_the_data_are_not_blamed_for_what_an_option_does(tmp_path, capsys, options, bound):
    """Errors that a given threshold or a limit brings about are no sign of wrong labels."""
    summary, _ = run(tmp_path, *options.split())
    text = printed(capsys)
    assert summary["dominant_error"] and "prevail" in text
    assert bound == ("another threshold or limit shifts that" in text) == ("look for" not in text)


def test_separable_scores_need_no_more_cases_and_have_no_area_above_1(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for n in 7, 24, 57, 300:
        labels = np.arange(n) < n // 3 + 1
        scores = np.where(labels, 0.9, 0.1) + rng.uniform(-0.05, 0.05, n)
        path = write_npz(tmp_path / "s.npz", labels, scores)
        summary, _ = run(tmp_path / "out", "--scores", path)
        text = printed(capsys)
        assert summary["average_precision"] <= 1 and "no errors" in text
        assert "label more cases" not in text


def test_no_number_is_a_negative_zero(tmp_path, capsys):
    for options in (
        "--metric cost --n-samples 20 --exact",
        "--metric youden_j --n-samples 20 --exact",
    ):
        run(tmp_path, *options.split())
        text = printed(capsys) + (tmp_path / "summary.json").read_text()
        text = text.replace(str(tmp_path), "")  # which may be below pytest-0
        assert not re.search(r"-0(\.0+)?\b(?!\.?\d)", text)


def test_the_closing_table_is_in_the_metric_of_the_run(tmp_path, capsys):
    summary, _ = run(tmp_path, "--metric", "cost", "--fn-cost", 5)
    at_30 = summary["balances"][2]
    assert at_30["value"] == pytest.approx(summary["best"]["value"])
    assert at_30["value_at_default"] == pytest.approx(summary["default"]["value"])
    assert "positive (cost, no limits)" in printed(capsys)


def test_a_given_threshold_is_judged_and_not_flattered(tmp_path, capsys):
    """It need not be in the table; there was no choice, so there is no luck and no hold-out."""
    labels, scores = sample(500, seed=1)
    path = write_npz(tmp_path / "s.npz", labels, scores)
    summary, table = run(tmp_path / "out", "--scores", path, "--threshold", 0.4321)
    best, called = summary["best"], scores >= 0.4321
    assert (best["threshold"], best["tp"]) == (0.4321, (called & labels).sum())
    assert best["f1"] == pytest.approx(sk.f1_score(labels, called)) == best["value_corrected"]
    assert best["value_interval"][0] < best["f1"] < best["value_interval"][1]
    assert summary["gain"]["corrected"] == summary["gain"]["value"] and not summary["holdout"]
    assert summary["chosen_by"] == "given" and "In 2,000" not in printed(capsys)
    assert 0.4321 in table["threshold"]


@pytest.mark.parametrize("metric", ["f1", "cost"])
def test_what_was_optimised_is_only_flattered_by_luck(metric):
    """A limit on the alerts makes some drawn tables choose a worse threshold."""
    seen = []
    for seed in range(20):
        labels, scores = sample(200, seed)
        objective = Objective(metric, fn_cost=5, max_alert_rate=0.2)
        table = table_of(labels, scores, objective)
        choice = Choice(table, objective, find_best(table, objective), seed)
        gain = gain_over(choice, HALF)
        seen += [METRICS[metric].sign * certainty(choice)["luck"][metric]]
        seen += [gain["value"] - gain["corrected"]]
    assert min(seen) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("threshold", [1e300, -1e300])
def test_a_threshold_beyond_single_precision_calls_nobody_or_everybody(tmp_path, threshold):
    labels, scores = sample(50, dtype=np.float32)
    cases = Cases(labels, scores, None, np.arange(50))
    best = analyse(cases, Objective(), given=threshold).summary["best"]
    assert (best["tp"], best["fp"]) == (
        (labels.sum(), (~labels).sum()) if threshold < 0 else (0, 0)
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("score, sign", [(0.0, 1), (0.0, -1), (0.4, 1), (7.0, 1)])
def test_nobody_is_a_plain_number_of_scores_that_are_all_equal(
    tmp_path, capsys, monkeypatch, score, sign
):
    monkeypatch.setattr(part1, "FIGURES", FIGURES)
    path = write_npz(tmp_path / "s.npz", np.arange(9) < 3, np.full(9, score, np.float32))
    options = ["--lower-is-positive"] if sign < 0 else ["--exact"]
    summary, _ = run(tmp_path / "out", "--scores", path, "--metric", "accuracy", *options)
    nobody = summary["best"]["threshold"]
    assert summary["best"]["tp"] == 0 and 0 < sign * (nobody - score) < 1.001
    assert not re.search(r"e-\d\d|-0\.0+\b", printed(capsys))


def test_a_choice_is_judged_on_the_cases_of_another_file(tmp_path, capsys):
    """Later data say of the threshold what they would say of it if it were given."""
    first, later = sample(400, seed=1), sample(300, seed=2)
    paths = [write_npz(tmp_path / f"{i}.npz", *data) for i, data in enumerate((first, later))]
    chosen = run(tmp_path / "a", "--scores", paths[0])[0]["best"]["threshold"]
    summary, _ = run(tmp_path / "b", "--scores", paths[0], "--test", paths[1])
    given, _ = run(tmp_path / "c", "--scores", paths[1], "--threshold", chosen)
    assert summary["best"] == given["best"] and summary["gain"] == given["gain"]
    assert summary["n"] == 300 and summary["roc_auc"] == given["roc_auc"]
    assert summary["chosen_by"] == "other cases"
    assert summary["chosen_on"] == {"source": str(paths[0]), "n": 400, "remark": ""}
    assert f"Threshold {chosen}, chosen on the 400 cases of {paths[0]} (F1" in printed(capsys)


def dependent(seed, groups=40, size=25):
    """Cases of 40 persons, whose scores share most of their noise."""
    rng = np.random.default_rng(seed)
    person = np.repeat(np.arange(groups), size)
    labels = rng.random(groups * size) < np.repeat(rng.beta(2, 4, groups), size)
    noise = np.repeat(rng.normal(0, 1.2, groups), size) + rng.normal(0, 0.6, groups * size)
    return Cases(labels, 1 / (1 + np.exp(-(2.5 * labels - 1.25 + noise))), None, person)


def test_cases_of_a_group_are_resampled_together(monkeypatch):
    """With 40 groups of 25 dependent cases the interval covers the truth; without it does not."""
    monkeypatch.setattr(part1, "REPLICATES", 400)
    many = np.mean(
        [
            measure("f1", table_of(*dependent(1000 + s)[:2])[[HALF]], Objective())
            for s in range(400)
        ]
    )
    covered = {"alone": 0, "grouped": 0}
    for seed in range(100):
        cases = dependent(seed)
        table = table_of(*cases[:2])[np.arange(HALF - 30, HALF + 41)]
        for name, clusters in ("alone", None), ("grouped", part1.split_groups(cases, table)):
            half = table.threshold.searchsorted(0.5)
            choice = Choice(table, Objective(), half, seed, fixed=True, clusters=clusters)
            low, high = certainty(choice)["intervals"]["f1"]
            covered[name] += low <= many <= high
    assert covered["grouped"] >= 87 > 75 > covered["alone"]  # 90%, less 1 standard deviation


def test_a_group_column_is_read_and_split_as_wholes(tmp_path, capsys):
    cases = dependent(0)
    names = np.array([f"person {i}" for i in cases.groups])
    path = tmp_path / "s.npz"
    np.savez(path, y_true=cases.labels, y_score=cases.scores, who=names)
    plain, _ = run(tmp_path / "a", "--scores", path)
    summary, _ = run(tmp_path / "b", "--scores", path, "--group-column", "who")
    assert summary["groups"] == 40 and summary["holdout"]["n"] % 25 == 0
    assert "40 groups" in printed(capsys) and summary["calibration"]["miscalibrated"] is None
    widths = [np.ptp(s["best"]["recall_interval"]) for s in (plain, summary)]
    assert widths[1] > 1.5 * widths[0]
    assert summary["best"]["f1"] == plain["best"]["f1"]


def test_of_few_groups_nothing_is_said_to_be_guesses(tmp_path, capsys):
    """The scores rank the cases, but each of ten groups counts as one case."""
    rng, path = np.random.default_rng(0), tmp_path / "s.npz"
    labels, groups = rng.random(500) < 0.4, np.arange(500) % 10
    scores = 0.6 * rng.random(500) + 0.4 * rng.random(500) * (1 + labels) / 2 + 0.1 * labels
    np.savez(path, y_true=labels, y_score=np.clip(scores, 0, 1), who=groups)
    for options, ranking in ([], "right"), (["--group-column", "who"], "unclear"):
        summary, _ = run(tmp_path / "out", "--scores", path, *options)
        text = printed(capsys)
        assert summary["ranking"] == ranking and "guesses" not in text
    assert "can be chance if a group tells no more than a single case" in text
    assert "With so few groups" in text


def test_groups_of_one_case_each_are_no_groups():
    labels, scores = sample(1500, seed=3)
    cases = Cases(labels, scores, None, np.arange(1500))
    a, b = (analyse(c, Objective()).summary["best"] for c in (cases, cases._replace(groups=None)))
    for metric in "value", "recall", "specificity":
        assert_allclose(a[f"{metric}_interval"], b[f"{metric}_interval"], atol=0.01)


@pytest.mark.parametrize(
    "arguments",
    ["--fp-cost 2", "--fn-cost 2 --metric f1", "--beta 3", "--positive yes", "--count-column n",
     "--group-column g", "--lower-is-positive", "--label-column y", "--test x.csv",
     "--threshold 0.5 --test x.csv --scores x.csv"],
)  # fmt: skip
def test_an_option_without_effect_is_refused(tmp_path, capsys, arguments):
    assert arguments.split()[0] in assert_refused(tmp_path, capsys, *arguments.split())


def test_a_metric_may_be_called_as_the_console_calls_it(tmp_path):
    for name, key in ("F1", "f1"), ("Youden's J", "youden_j"), ("Matthews corr.", "mcc"):
        assert run(tmp_path, "--n-samples", 100, "--metric", name)[0]["metric"] == key


def test_a_wait_is_announced(tmp_path, capsys):
    rng = np.random.default_rng(0)
    path = write_npz(tmp_path / "s.npz", rng.random(2_400_000) < 0.3, rng.random(2_400_000))
    run(tmp_path / "out", "--scores", path)
    assert capsys.readouterr().out.startswith("Reading ")


def population(name):
    """True tpr and fpr at the grid, and a sampler of labels and scores."""
    good, bad = {"plain": ((6, 3), (3, 8)), "weak": ((4, 3), (3, 5))}[name]

    def draw(seed, n):
        rng = np.random.default_rng(seed)
        labels = rng.random(n) < 0.3
        return labels, np.where(labels, rng.beta(*good, n), rng.beta(*bad, n))

    return stats.beta(*good).sf, stats.beta(*bad).sf, draw


@pytest.mark.parametrize("limits", [
    {"min_precision": 0.8}, {"min_recall": 0.8}, {"max_alert_rate": 0.3},
    {"min_precision": 0.6, "min_recall": 0.6, "max_alert_rate": 0.4},
])  # fmt: skip
@pytest.mark.parametrize("name, n", [("plain", 300), ("weak", 1000)])
def test_a_promise_is_rarely_broken(name, n, limits):
    """In at most 10% of all runs the population breaks a limit at the chosen threshold."""
    tpr, fpr, draw = population(name)
    objective, broken, runs = Objective(**limits, confidence=0.9), 0, 120
    for seed in range(runs):
        try:
            table = table_of(*draw(seed, n), objective)
            chosen = find_best(table, objective, part1.promised(table, objective))
        except UserError:
            continue
        at = table.threshold[[chosen]]
        truth = Counts(at, 0.3 * tpr(at), 0.7 * fpr(at), 0.3, 0.7)
        broken += part1.shortfall(truth, objective).item() > 0
    assert broken <= 18  # binomial: more than 18 of 120 at 10% has a chance of 3%


def test_a_promise_that_is_easy_is_made():
    """Some threshold's precision exceeds the limit by 0.1: an answer in 80% at n = 1,000."""
    objective, draw = Objective(min_precision=0.8, confidence=0.9), population("plain")[2]
    tables = [table_of(*draw(seed, 1000), objective) for seed in range(20)]
    assert sum(part1.promised(table, objective).any() for table in tables) >= 16


def test_exact_bounds_in_a_fixed_sequence():
    """From 11 alerts, of which all are right (0.8**11 < 0.1), until the first that fails."""
    right, of = np.array([9, 10, 11, 12, 12, 30]), np.array([9, 10, 11, 12, 16, 30])
    found = part1.proved(right, of, 0.8, 0.1, 1)
    assert found.tolist() == [False, False, True, True, False, False]
    for k, n, share in (11, 11, 0.8), (45, 50, 0.85), (40, 50, 0.7):
        chance = stats.binomtest(k, n, share, alternative="greater").pvalue
        for error, passes in (chance * 1.001, True), (chance * 0.999, False):
            found = part1.proved(np.array([k]), np.array([n]), share, error, 1)
            assert found.item() == (passes and share**n <= error)


def test_a_promise_is_a_choice_or_a_number_of_cases(tmp_path, capsys):
    options = ["--n-samples", 1000, "--min-precision", 0.9, "--confidence", 0.9]
    summary, _ = run(tmp_path / "a", *options)
    plain, _ = run(tmp_path / "b", *options[:-2])
    assert summary["best"]["threshold"] > plain["best"]["threshold"] and not summary["holdout"]
    assert summary["limits"]["min_precision"]["probability"] > 0.85
    assert summary["confidence"] == 0.9 and "break a limit in at most 10%" in printed(capsys)
    options[1] = 60
    error = assert_refused(tmp_path, capsys, *options)
    needed = int(re.search(r"at least ([\d,]+) cases", error)[1].replace(",", ""))
    assert 60 < needed < 1000


@pytest.mark.parametrize(
    "arguments", ["--prevalence 0.1", "--threshold 0.4", "--group-column g --scores x.csv"]
)
def test_what_cannot_be_promised_is_refused(tmp_path, capsys, arguments):
    options = ["--min-precision", 0.9, "--confidence", 0.9, *arguments.split()]
    assert arguments.split()[0] in assert_refused(tmp_path, capsys, *options)
    assert "limit" in assert_refused(tmp_path, capsys, "--confidence", 0.9)


def test_a_given_threshold_needs_no_search_and_no_limit_is_kept_by_it(tmp_path):
    """Precision 0.9 is out of reach here, but 0.5 can be judged."""
    labels, scores = np.arange(60) % 2 == 0, np.linspace(0.2, 0.8, 60)
    path = write_npz(tmp_path / "s.npz", labels, scores)
    options = ["--threshold", 0.5, "--min-precision", 0.9]
    summary = run(tmp_path / "out", "--scores", path, *options)[0]
    assert summary["best"]["threshold"] == 0.5 and summary["chosen_by"] == "given"


def test_a_table_without_one_half_has_no_default(tmp_path):
    labels, scores = sample(300)
    logits = write_npz(tmp_path / "a.npz", labels, 6 * scores - 3)
    later = write_npz(tmp_path / "b.npz", labels, scores)
    summary = run(tmp_path / "out", "--scores", logits, "--test", later, "--exact")[0]
    assert summary["default"] is None and summary["gain"] is None


def test_counts_of_billions_are_held_out_too(tmp_path):
    path = tmp_path / "c.csv"
    rows = [f"{i % 2},{(i % 97) / 97 + 0.001:.4f},{10_000_000}" for i in range(400)]
    path.write_text("\n".join(["y_true,y_score,n", *rows]))
    summary = run(tmp_path / "out", "--scores", path, "--count-column", "n")[0]
    assert summary["n"] == 4 * 10**9
    assert summary["holdout"]["value"] == pytest.approx(summary["best"]["value"], abs=0.01)


def test_holdout_is_refused_where_nothing_is_held_out(tmp_path, capsys):
    line = assert_refused(tmp_path, capsys, "--threshold", 0.5, "--holdout", 0.2)
    assert "--holdout has no effect" in line


@pytest.mark.parametrize(
    "option", [["--scenario", "calibrated"], ["--n-samples", 99], ["--positive-rate", 0.2]]
)
def test_options_of_the_simulation_are_refused_beside_a_file(tmp_path, capsys, option):
    path = write_npz(tmp_path / "a.npz", *sample(300))
    line = assert_refused(tmp_path, capsys, "--scores", path, *option)
    assert f"{option[0]} has no effect beside --scores" in line


@pytest.mark.parametrize(
    "options, rule",
    [
        ("--metric cost --fn-cost 1e6", "everybody"),
        ("--metric cost --fp-cost 0", "everybody"),  # which costs nothing
        ("--metric accuracy", "nobody"),
        ("--metric f1 --prevalence 0.95", "everybody"),
        ("--metric f1 --threshold 0.99", "everybody"),
    ],
)
def test_a_rule_that_needs_no_score_and_is_as_good_is_named(tmp_path, capsys, options, rule):
    """In the headline, which says what a threshold is worth."""
    labels, scores = np.arange(800) % 10 == 0, np.linspace(0, 1, 800)
    path = write_npz(tmp_path / "a.npz", labels, scores)
    summary, _ = run(tmp_path / "out", "--scores", path, *options.split())
    reached = f"{value:.4f}" if (value := summary[rule]["value"]) else "0.000"
    assert f"But calling {rule} reaches {reached}." in printed(capsys)


def test_a_cost_stands_beside_that_of_the_cheaper_rule(tmp_path, capsys):
    """Of 3,000 misses and 7,000 false alarms the false alarms are cheaper here."""
    summary, _ = run(tmp_path, "--metric", "cost", "--fn-cost", 5)
    text = printed(capsys)
    assert f"costs {10_000 * summary['best']['value']:,.6g}; calling everybody or" in text
    assert "nobody costs 7,000 or more." in text and "But calling" not in text


@pytest.mark.parametrize(
    "share, text",
    [
        (0.8676, "0.868"), (0.00042, "0.00042"), (0.0096, "0.0096"), (0.99958, "0.99958"),
        (1.0, "1.000"), (0.0, "0.000"), (-0.0, "0.000"), (-1e-17, "0.000"), (-0.004, "-0.0040"),
        (1e-9, "0.0000000010"), (-4500.0, "-4500.000"), (None, "-"), (np.nan, "-"),
    ],
)  # fmt: skip
def test_a_share_has_two_digits_near_0_and_near_1(share, text):
    assert part1.shown(share) == text


def test_the_columns_of_a_rare_class_and_of_money_stay_apart(tmp_path, capsys):
    """Millions of counts, shares near 0 and 1, and costs of 9e7."""
    path = tmp_path / "c.csv"
    rows = [f"{int(i % 25 == 7)},{i / 100},{(1, 9 * 10**7)[i % 25 != 7]}" for i in range(100)]
    path.write_text("\n".join(["y_true,y_score,n", *rows]))
    options = ["--scores", path, "--count-column", "n"]
    for more in [], ["--metric", "cost", "--fp-cost", "9e7", "--fn-cost", "9e8"]:
        run(tmp_path / "out", *options, *more)
        text = capsys.readouterr().out
        assert not re.search(r"\d\.\d+\.\d", text)
        for line in text.splitlines():
            if re.match(r"  (cost|F1|Youden's J|balanced accuracy|call \w+)  ", line):
                assert len(re.findall(r" [\d.,e+-]+(?= |$)", line)) in (4, 5), line
            if re.match(r" +0\.\d+ +", line):
                assert len(line.split()) == 5, line
        assert "off by 0.000 " not in text and "1.000 to 1.000" not in text


def test_counts_below_10_at_a_prevalence_have_a_decimal(tmp_path, capsys):
    run(tmp_path, "--n-samples", 1000, "--prevalence", 0.004)
    found = re.search(r"hits (\S+), false alarms \S+, misses (\S+),", printed(capsys))
    assert sum(map(float, found.groups())) == pytest.approx(4, abs=0.11)
    assert all(re.fullmatch(r"\d\.\d", number) for number in found.groups())


def test_where_one_half_is_as_good_no_more_cases_are_asked_for(tmp_path, capsys):
    """Separable scores, where the middle of what is as good is 0.55."""
    path = write_npz(tmp_path / "s.npz", [1, 1, 0, 1, 0], [0.9, 0.8, 0.3, 0.7, 0.4])
    summary, _ = run(tmp_path / "out", "--scores", path)
    assert (summary["best"]["threshold"], summary["gain"]["verdict"]) == (0.55, "does_not_pay")
    text = printed(capsys)
    assert "The default 0.5 reaches the same: no reason to leave it." in text
    assert "or more" not in text and "estimated" not in text


def test_a_rule_is_compared_with_one_half_too_and_only_the_better_one_named(tmp_path, capsys):
    run(tmp_path, "--n-samples", 2000, "--threshold", 0.99)  # F1 0, but 0.87 at 0.5
    assert "But calling" not in printed(capsys)
    labels, scores = np.arange(400) % 2 == 0, np.random.default_rng(0).random(400)
    path = write_npz(tmp_path / "s.npz", labels, scores)  # both rules are right in half
    run(tmp_path / "out", "--scores", path, "--metric", "accuracy", "--threshold", 0.99)
    assert printed(capsys).count("But calling") <= 1


def test_a_promise_is_made_only_of_the_cases_that_chose(tmp_path, capsys):
    """On another site the limit may be out of reach."""
    paths = [write_npz(tmp_path / f"{i}.npz", *sample(2000, seed=i)) for i in range(2)]
    np.savez(paths[1], y_true=(hard := sample(2000, seed=1))[0], y_score=0.1 + 0.9 * hard[1])
    options = ["--scores", paths[0], "--min-precision", 0.8, "--confidence", 0.9]
    for more, promise in ([], True), (["--test", paths[1]], False):
        run(tmp_path / "out", *options, *more)
        text = printed(capsys)
        assert ("break a limit" in text) == promise
        assert re.search(r"with a probability of (<1%|>99%|[1-9]\d?%)\.", text)


@pytest.mark.parametrize(
    "options, said",
    [
        ("", False),
        ("--n-samples 100000 --scenario calibrated --positive-rate 0.01 --metric mcc", False),
        ("--scenario calibrated --positive-rate 0.001 --metric cost --fn-cost 200", True),
        ("--scenario calibrated --positive-rate 0.001 --metric cost --threshold 0.05", False),
    ],
)
def test_a_best_threshold_outside_the_grid_is_said_to_be_so(tmp_path, capsys, options, said):
    best = run(tmp_path, *options.split())[0]["best"]["threshold"]
    assert ("lies outside 0.10 to 0.90" in printed(capsys)) == said
    assert "--threshold" in options or (best < 0.1) == said


def test_a_range_of_one_threshold_is_no_range(tmp_path, capsys):
    for options in "", "--min-recall 0.8":
        run(tmp_path, "--n-samples", 3000, *options.split())
        text = printed(capsys)
        assert not re.search(r"(\b[\d.]+) (?:to|and) \1 (?:the|\(95)", text)
        assert ("of the best of those allowed" in text) == bool(options)
    path = write_npz(tmp_path / "s.npz", np.arange(9) < 3, np.full(9, 7.0))
    run(tmp_path / "out", "--scores", path, "--exact", "--threshold", 3)
    run(tmp_path / "out", "--scores", path, "--exact")
    text = printed(capsys)
    assert "the best threshold is between" not in text and "of the best" not in text


@pytest.mark.parametrize(
    "figure", ["02_precision_recall_f1_vs_threshold", "03_precision_recall_curve"]
)
def test_where_nobody_is_called_no_alert_is_said_to_be_wrong(figure):
    result = analyse(Cases(*sample(50)), Objective(), given=2.0)
    (axes,) = FIGURES[figure](matplotlib.pyplot, result).axes[:1]
    assert axes.get_title(loc="left") + axes.get_title() == "At 2.0 nobody is called positive"
