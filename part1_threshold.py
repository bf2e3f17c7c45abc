"""Find the decision threshold of a binary classifier, and say how sure that is.

    python part1_threshold.py                                  simulated scores
    python part1_threshold.py --scenario underconfident        0.5 is wrong here
    python part1_threshold.py --scores FILE.csv --positive yes your own scores

A case is called positive when ``score >= threshold``. One pass over the scores
fills a small table of counts (class x gap between thresholds); every metric,
the bootstrap, the hold-out check and the other class balances are computed
from that table, so they cost the same for a thousand cases and for ten million.

Writes summary.json, thresholds.csv, scores.csv (simulated scores only) and the
plots 01_... to 05_...png into the output folder. README.md has the time it takes.
"""

import argparse
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from utils import (
    BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, Parser, UserError, command, derive_seed,
    finish_figures, integer, load_pyplot, number, output_folder, read_scores, save_figure,
    say, tell, write_csv, write_json,
)  # fmt: skip

# ------------------------------------------------------------------- constants

# Division, not a step of 0.01: each value is the float that "0.37" reads as.
GRID = np.arange(10, 91) / 100
TOLERANCE = 1e-12  # values closer than this are equally good
NEAR = 0.005  # a loss too small to care about
REPLICATES = 2000  # of the bootstrap
LEVELS = (0.025, 0.975)  # of every 95 % interval
BALANCES = (0.05, 0.10, 0.30, 0.50)  # shares of positives in the closing table
BINS = 10  # of the reliability diagram

# ------------------------------------------------------------- simulated scores


def _beta(labels, rng):
    """Beta(6, 3) for positives, Beta(3, 8) for negatives: 0.5 happens to be best."""
    return np.where(labels, rng.beta(6, 3, labels.size), rng.beta(3, 8, labels.size))


def _calibrated(labels, rng):
    """The true probability of a case whose evidence is N(+-1.3, 1) in units of its sd."""
    evidence = rng.normal(np.where(labels, 1.3, -1.3))
    share = labels.mean()
    return _sigmoid(2.6 * evidence + np.log(share / (1 - share)))


def _underconfident(labels, rng):
    """Logits N(0.5, 1.1) and N(-2.5, 1.1): ranked well, but all scores too low."""
    return _sigmoid(rng.normal(np.where(labels, 0.5, -2.5), 1.1))


def _sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


SCENARIOS = {
    "balanced": (_beta, "Beta(6,3) for positives, Beta(3,8) for negatives"),
    "calibrated": (_calibrated, "calibrated probabilities from evidence N(+-1.3, 1)"),
    "underconfident": (
        _underconfident,
        "logits N(0.5,1.1) for positives, N(-2.5,1.1) for negatives: scores too low",
    ),
}


def simulate_scores(n, positive_rate, scenario, seed):
    """Labels and scores of ``n`` simulated cases, in random order.

    Returns
    -------
    labels : ndarray of bool, shape (n,)
    scores : ndarray of float64, shape (n,), in [0, 1]

    Raises
    ------
    UserError
        If ``n`` cases at this rate leave one class empty.
    """
    n_positive = round(n * positive_rate)
    if not 0 < n_positive < n:
        raise UserError(
            f"{n} cases at a positive rate of {positive_rate} leave one class empty: "
            "give a larger --n-samples or another --positive-rate"
        )
    rng = np.random.default_rng(derive_seed(seed, 0))
    labels = rng.permutation(np.arange(n) < n_positive)
    return labels, SCENARIOS[scenario][0](labels, rng)


# ------------------------------------------------------------------ count tables


@dataclass(frozen=True)
class Counts:
    """Confusion counts at each threshold; all arrays broadcast against each other.

    Attributes
    ----------
    threshold : ndarray of float, shape (T,), ascending
    tp, fp : ndarray, shape (..., T)
        True and false positives: cases with ``score >= threshold``.
    n_positive, n_negative : number, or ndarray of shape (..., 1)
    """

    threshold: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    n_positive: int
    n_negative: int

    @property
    def fn(self):
        return self.n_positive - self.tp

    @property
    def tn(self):
        return self.n_negative - self.fp

    def __getitem__(self, index):
        return replace(
            self,
            threshold=self.threshold[index],
            tp=self.tp[..., index],
            fp=self.fp[..., index],
        )

    def at_prevalence(self, share):
        """The same tpr and fpr in a population with this share of positives."""
        tpr, fpr = self.tp / self.n_positive, self.fp / self.n_negative
        return Counts(self.threshold, tpr * share, fpr * (1 - share), share, 1 - share)


def count_cells(labels, scores, chunk=1 << 15):
    """Count the scores of each class between the grid's thresholds, in one pass.

    Parameters
    ----------
    labels : ndarray of bool, shape (n,)
    scores : ndarray of float, shape (n,), in [0, 1]
        Compared in their own precision, so that a float32 0.30 reaches 0.30.

    Returns
    -------
    ndarray of int64, shape (2, 82)
        ``[c, j]``: cases of class c whose score reaches exactly j thresholds.
    """
    thresholds = GRID.astype(scores.dtype)
    following = np.append(thresholds, np.inf).astype(scores.dtype)
    # Multiplying by a power of two is exact, and no 1/128 holds two thresholds:
    # a look-up gives the count up to the score's 1/128, one comparison the rest.
    steps = np.arange(129, dtype=scores.dtype) / 128
    reached = np.searchsorted(thresholds, steps, side="right").astype(np.int16)
    cells = np.zeros(2 * following.size, np.int64)
    for start in range(0, scores.size, chunk):
        part = scores[start : start + chunk]
        index = reached[(part * 128).astype(np.int16)]
        index += part >= following[index]
        index += following.size * labels[start : start + chunk].astype(np.int16)
        cells += np.bincount(index, minlength=cells.size)
    return cells.reshape(2, -1)


def counts_at(cells, thresholds):
    """Confusion counts from cells of shape (..., 2, T + 1)."""
    reaching = cells[..., ::-1].cumsum(-1)[..., ::-1]
    negative, positive = reaching[..., 0, :], reaching[..., 1, :]
    return Counts(
        thresholds, positive[..., 1:], negative[..., 1:], positive[..., :1], negative[..., :1]
    )


def sort_with_labels(labels, scores, ordered, positive):
    """Fill ``ordered`` (float64) with the sorted scores, ``positive`` with their labels."""
    np.add(scores, 0.0, out=ordered)  # -0.0 becomes 0.0
    if ordered.min() < 0 or ordered.max() > 1:
        order = np.argsort(ordered)
        ordered[:], positive[:] = ordered[order], labels[order]
        return
    # The bits of floats in [0, 1] sort like integers and leave the top two bits free,
    # so the label fits in below them: one plain sort, 5 times as fast as an argsort.
    keys = ordered.view(np.int64)
    keys <<= 1
    keys |= labels
    keys.sort()
    np.bitwise_and(keys, 1, out=positive)
    keys >>= 1


def count_distinct(labels, scores):
    """Confusion counts at every distinct score and, last, at "predict nobody".

    That last threshold is the next float above the highest score. Equal scores
    are one threshold: no rule can tell them apart.
    """
    n = scores.size
    threshold, tp, fp = np.empty(n + 1), np.zeros(n + 1, np.int64), np.arange(n, -1, -1)
    threshold[n] = np.nextafter(scores.max(), np.inf, dtype=scores.dtype)
    sort_with_labels(labels, scores, threshold[:n], tp[1:])
    np.cumsum(tp, out=tp)  # positives below each score, ...
    np.subtract(tp[n], tp, out=tp)  # ... and at or above it
    fp -= tp
    first = threshold[1:] != threshold[:-1]
    if not first.all():
        first = np.append(True, first)
        threshold, tp, fp = threshold[first], tp[first], fp[first]
    return Counts(threshold, tp, fp, int(tp[0]), int(fp[0]))


def counts_from(distinct, thresholds):
    """Confusion counts at any thresholds, looked up among those of every score."""
    found = distinct[np.searchsorted(distinct.threshold, thresholds).clip(max=len(distinct.tp) - 1)]
    return replace(found, threshold=np.asarray(thresholds))


def cells_from(counts):
    """The count table (2, T + 1) of confusion counts of shape (T,)."""
    ends = [(counts.n_negative, counts.fp), (counts.n_positive, counts.tp)]
    return np.array([-np.diff(np.concatenate([[n], k, [0]])) for n, k in ends])


# ----------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Objective:
    """What makes a threshold good: the metric, its weights and the limits."""

    metric: str = "f1"
    beta: float = 2.0
    fp_cost: float = 1.0
    fn_cost: float = 1.0
    prevalence: float | None = None
    min_precision: float | None = None
    min_recall: float | None = None
    max_alert_rate: float | None = None
    probabilities: bool = True  # whether the scores are, as net benefit needs


def ratio(a, b):
    """a / b, and 0 where both are 0 (no alert, say, has precision 0)."""
    return a / (b + (b == 0))


def _f_beta(c, beta):
    # Never 2PR / (P + R): that is 0/0 where nothing is predicted.
    return ratio((1 + beta**2) * c.tp, beta**2 * c.n_positive + c.tp + c.fp)


def _mcc(c, o):
    # Two square roots: the product of four counts overflows from 50,000 cases on.
    scale = np.sqrt(1.0 * (c.tp + c.fp) * c.n_positive)
    return ratio(1.0 * c.tp * c.tn - 1.0 * c.fp * c.fn,
                 scale * np.sqrt(1.0 * (c.tn + c.fn) * c.n_negative))  # fmt: skip


def _kappa(c, o):
    agreement = 2.0 * (c.tp * c.tn - 1.0 * c.fp * c.fn)
    chance = 1.0 * (c.tp + c.fp) * c.n_negative + 1.0 * (c.fn + c.tn) * c.n_positive
    return ratio(agreement, chance)


def _net_benefit(c, o):
    """Vickers and Elkin 2006: a false alarm weighs t / (1 - t) of a hit."""
    weight = np.divide(c.threshold, 1 - c.threshold, where=c.threshold < 1,
                       out=np.full(c.threshold.shape, np.inf))  # fmt: skip
    harm = np.multiply(c.fp, weight, where=c.fp > 0, out=np.zeros(c.fp.shape))
    return (c.tp - harm) / total(c) if o.probabilities else np.full(c.fp.shape, np.nan)


def total(c):
    return c.n_positive + c.n_negative


# Each takes counts (or shares) and the objective; all but cost are better when higher.
METRICS = {
    "precision": lambda c, o: ratio(c.tp, c.tp + c.fp),
    "recall": lambda c, o: ratio(c.tp, c.n_positive),
    "specificity": lambda c, o: ratio(c.tn, c.n_negative),
    "f1": lambda c, o: _f_beta(c, 1),
    "youden_j": lambda c, o: ratio(c.tp, c.n_positive) - ratio(c.fp, c.n_negative),
    "balanced_accuracy": lambda c, o: (
        ratio(c.tp, c.n_positive) + ratio(c.tn, c.n_negative)
    ) / 2,
    "accuracy": lambda c, o: ratio(c.tp + c.tn, total(c)),
    "f_beta": lambda c, o: _f_beta(c, o.beta),
    "mcc": _mcc,
    "cohen_kappa": _kappa,
    "cost": lambda c, o: (o.fp_cost * c.fp + o.fn_cost * c.fn) / total(c),
    "net_benefit": _net_benefit,
    "alert_rate": lambda c, o: ratio(c.tp + c.fp, total(c)),
}  # fmt: skip
NAMES = {
    "f1": "F1", "f_beta": "F-beta", "youden_j": "Youden's J", "mcc": "Matthews corr.",
    "cohen_kappa": "Cohen's kappa",
}  # fmt: skip
LIMITS = {
    "min_precision": ("precision", 1),
    "min_recall": ("recall", 1),
    "max_alert_rate": ("alert_rate", -1),
}


def name_of(metric):
    return NAMES.get(metric, metric.replace("_", " "))


def measure(metric, counts, objective):
    """The metric at each threshold, at the objective's class balance; shape (..., T)."""
    if objective.prevalence is not None:
        counts = counts.at_prevalence(objective.prevalence)
    return METRICS[metric](counts, objective)


# ------------------------------------------------------------- the best threshold


def direction(objective):
    """1 where a higher metric is better, -1 for the cost."""
    return -1 if objective.metric == "cost" else 1


def goodness(counts, objective):
    """The metric, turned so that higher is better; shape (..., T)."""
    return direction(objective) * measure(objective.metric, counts, objective)


def shortfall(counts, objective):
    """By how much each threshold misses the limits, summed; 0 where it keeps them."""
    missing = np.zeros(np.shape(counts.tp))
    for limit, (metric, sign) in LIMITS.items():
        wanted = getattr(objective, limit)
        if wanted is not None:
            value = measure(metric, counts, objective)
            missing = missing + np.maximum(0, sign * (wanted - value) - TOLERANCE)
    return missing


def has_limits(objective):
    return any(getattr(objective, limit) is not None for limit in LIMITS)


def eligible(counts, objective):
    """Goodness, and -inf where a limit is missed or the metric has no value."""
    values = goodness(counts, objective)
    if has_limits(objective):
        values = np.where(shortfall(counts, objective) > 0, -np.inf, values)
    return np.where(np.isnan(values), -np.inf, values)


def near(objective):
    """A loss of the metric that is too small to care about."""
    return NEAR * (max(objective.fp_cost, objective.fn_cost) if objective.metric == "cost" else 1)


def choose(values):
    """Index of the best of ``values``, shape (T,); of equally good ones, the middle one."""
    tied = np.flatnonzero(values >= values.max() - TOLERANCE)
    return int(tied[(tied.size - 1) // 2])


def run_around(mask, index):
    """First and last index of the run of True in ``mask`` that holds ``index``."""
    gaps = np.flatnonzero(~np.concatenate([[False], mask, [False]])) - 1
    after = np.searchsorted(gaps, index)
    return [gaps[after - 1] + 1, gaps[after] - 1]


def find_best(counts, objective, where="the table", piece=1 << 17):
    """Index of the best threshold that keeps the limits.

    Raises
    ------
    UserError
        If none does; the text gives the closest attainable.
    """
    # In pieces that fit the cache; only those that hold the best are looked at again.
    pieces = [counts[i : i + piece] for i in range(0, counts.tp.size, piece)]
    tops = np.array([eligible(part, objective).max() for part in pieces])
    if np.isfinite(tops).any():
        best = [i for i in range(len(pieces)) if tops[i] >= tops.max() - TOLERANCE]
        values = np.concatenate([eligible(pieces[i], objective) for i in best])
        place = choose(values)
        return best[place // piece] * piece + place % piece
    if np.isnan(goodness(counts, objective)).all():
        raise UserError(f"{objective.metric} has no value at these scores: choose another --metric")
    given = {limit: getattr(objective, limit) for limit in LIMITS}
    given = [f"--{k.replace('_', '-')} {v:g}" for k, v in given.items() if v is not None]
    closest = entry(counts, objective, int(shortfall(counts, objective).argmin()))
    raise UserError(
        f"no threshold of {where} satisfies {' and '.join(given)}; the closest is "
        f"{closest['threshold']:.6g} with precision {closest['precision']:.4f}, recall "
        f"{closest['recall']:.4f}, alert rate {closest['alert_rate']:.4f}: relax a limit"
    )


def entry(counts, objective, index):
    """One threshold as plain values: its counts, every metric, the objective's value."""
    one = counts[index : index + 1]
    values = {metric: float(measure(metric, one, objective)[0]) for metric in METRICS}
    return {
        "threshold": float(one.threshold[0]),
        **{key: int(np.ravel(getattr(one, key))[0]) for key in ("tp", "fp", "fn", "tn")},
        **values,
        "value": values[objective.metric],
    }


# -------------------------------------------------------------------- how sure


def interval(draws, **how):
    """95 % percentile interval over the first axis; shape (2, ...)."""
    return np.quantile(draws, LEVELS, axis=0, **how)


def bootstrap(cells, thresholds, objective, chosen, default, seed):
    """Intervals from resampling all cases with replacement (Efron and Tibshirani 1993).

    Drawing n rows with replacement is one multinomial draw over the cells of
    the count table, whatever n is. The optimism of choosing and scoring on the
    same cases is estimated as by Harrell, Lee and Mark (1996); taking it off the
    gain's interval, too (Noma et al. 2021), keeps false claims of a gain below 5 %.

    Parameters
    ----------
    cells : ndarray of int, shape (2, T + 1)
    chosen, default : int
        Indices of the threshold chosen on all cases, and of 0.5 (or None).

    Returns
    -------
    dict
        95 % intervals of the ``threshold`` (chosen anew in each replicate), of
        the ``value`` of the chosen one and of its paired ``gain`` over 0.5;
        ``optimism`` and ``gain_optimism``; ``bands``, (2, T) for each plotted
        metric; the numbers of ``replicates`` used and ``dropped``.
    """
    rng = np.random.default_rng(derive_seed(seed, 1))
    drawn = rng.multinomial(cells.sum(), cells.ravel() / cells.sum(), size=REPLICATES)
    drawn = drawn.reshape(REPLICATES, *cells.shape)
    drawn = drawn[(drawn.sum(-1) > 0).all(-1)]  # without one class there is no recall
    counts = counts_at(drawn, thresholds)
    values = eligible(counts, objective)
    usable = np.isfinite(values).any(-1)  # a replicate may miss the limits everywhere
    picks, rows = np.array([*map(choose, values[usable])]), np.arange(usable.sum())
    here = goodness(counts, objective)[usable]
    there = goodness(counts_at(cells, thresholds), objective)
    # The chosen threshold's own excess is zero but for chance: less noise without it.
    excess, sign = here - there, direction(objective)
    result = {
        "replicates": rows.size,
        "dropped": REPLICATES - rows.size,
        "threshold": interval(thresholds[picks], method="inverted_cdf"),
        "value": np.sort(sign * interval(here[:, chosen])) + 0.0,  # never -0.0
        "optimism": sign * (excess[rows, picks] - excess[:, chosen]).mean(),
        "bands": {
            metric: interval(measure(metric, counts, objective))
            for metric in {*CURVES, objective.metric}
        },
    }
    if default is not None:
        result["gain"] = interval(here[:, chosen] - here[:, default])
        result["gain_optimism"] = sign * result["optimism"]  # 0.5 was not chosen
    return result


def hold_out(cells, share, seed):
    """Split the cases at random, by class, into a choosing and a scoring part.

    From which cells a random split takes its cases is a multivariate
    hypergeometric draw, so no row has to be touched.

    Returns
    -------
    list of two ndarrays of int64, each (2, T + 1)
        Choosing part, scoring part; both have cases of each class if each
        class has at least two.
    """
    totals = cells.sum(-1)
    sizes = np.clip(np.round(totals * share), 1, totals - 1).astype(int)
    rng = np.random.default_rng(derive_seed(seed, 2))
    scoring = np.array([
        rng.multivariate_hypergeometric(row, size, method="marginals")
        for row, size in zip(cells, sizes)
    ])  # fmt: skip
    return [cells - scoring, scoring]


def check_holdout(cells, thresholds, objective, default, share, seed):
    """What a threshold chosen on one part of the cases does on the other part."""
    if cells.sum(-1).min() < 2:
        return None
    choosing, scoring = (counts_at(c, thresholds) for c in hold_out(cells, share, seed))
    values = eligible(choosing, objective)
    chosen = choose(values)
    if not np.isfinite(values[chosen]):
        return None
    good = goodness(scoring, objective)
    return entry(scoring, objective, chosen) | {
        "share": share,
        "n": int(scoring.n_positive[0] + scoring.n_negative[0]),
        "value_where_chosen": entry(choosing, objective, chosen)["value"],
        "gain": None if default is None else good[chosen] - good[default],
    }


# ----------------------------------------------------------------- calibration


def calibration(labels, scores):
    """Expected calibration error over ten equal-width bins (Naeini et al. 2015).

    Returns
    -------
    dict
        ``ece`` in [0, 1]; ``bins``: of each bin that holds a case its
        ``count``, mean ``score`` and ``share`` of positives.
    """
    index = np.minimum((scores * BINS).astype(np.int8), BINS - 1)
    count = np.bincount(index, minlength=BINS)
    share, score = (
        np.bincount(index, weights=values, minlength=BINS)[count > 0] / count[count > 0]
        for values in (labels, scores)
    )
    count = count[count > 0]
    ece = (count * abs(share - score)).sum() / count.sum()
    return {"ece": ece, "bins": {"count": count, "score": score, "share": share}}


def check_theory(distinct, best, objective):
    """Where calibrated probabilities would have the optimum, and what using it loses.

    F1: half the best F1 (Lipton, Elkan and Naryanaswamy 2014). Cost:
    c_FP / (c_FP + c_FN) (Elkan 2001). None for the other metrics, under limits,
    and at a class balance other than the one in which the scores were made.
    """
    expected = {
        "f1": best["f1"] / 2,
        "cost": objective.fp_cost / (objective.fp_cost + objective.fn_cost),
    }.get(objective.metric if objective.prevalence is None and not has_limits(objective) else None)
    if expected is None:
        return {"expected_threshold": None, "expected_loss": None}
    there = entry(counts_from(distinct, np.array([expected])), objective, 0)
    loss = direction(objective) * (best["value"] - there["value"])
    return {"expected_threshold": expected, "expected_loss": loss}


# ----------------------------------------------------------- the whole analysis


def analyse(labels, scores, objective, exact=False, share=0.5, seed=0):
    """Every number of a run; nothing is printed, drawn or written.

    Parameters
    ----------
    labels : ndarray of bool, shape (n,)
    scores : ndarray of float, shape (n,)
    exact : bool
        Also search all distinct scores; needed for scores outside [0, 1].
    share : float in (0, 1)
        Share of the cases on which the choice of the others is scored.

    Returns
    -------
    summary : dict
        What summary.json holds, apart from the description of the input.
    counts, distinct : Counts
        At the thresholds of the table, and at every distinct score.
    bands : dict of ndarray, shape (2, T)
        95 % bootstrap band of each plotted metric.
    """
    probabilities = bool(scores.min() >= 0 and scores.max() <= 1)
    if not (probabilities or exact):
        raise UserError(
            f"the scores run from {scores.min():.6g} to {scores.max():.6g}: give "
            "probabilities in [0, 1], or add --exact for other scores"
        )
    objective = replace(objective, probabilities=probabilities)
    distinct = count_distinct(labels, scores)
    thresholds = GRID if probabilities else quantiles(distinct)
    default = int(np.searchsorted(GRID, 0.5)) if probabilities else None
    cells = (
        count_cells(labels, scores) if probabilities
        else cells_from(counts_from(distinct, thresholds))
    )  # fmt: skip
    counts = counts_at(cells, thresholds)
    if exact and not np.isfinite(eligible(counts, objective)).any():
        index = find_best(distinct, objective, "all distinct scores")  # or says that none does
        raise UserError(
            f"no threshold of the table keeps the limits, but {distinct.threshold[index]:.9g} "
            "among the scores does: relax a limit, or use that one"
        )
    chosen = find_best(counts, objective)
    sure = bootstrap(cells, thresholds, objective, chosen, default, seed)
    summary = {
        "n": int(cells.sum()),
        "n_positive": int(cells[1].sum()),
        **asdict(objective),
        **areas(distinct, objective),
        **describe_choice(counts, objective, chosen, default, sure),
        "holdout": check_holdout(cells, thresholds, objective, default, share, seed),
        "exact": None,
        "calibration": None,
        "balances": other_balances(counts, default),
    }
    if exact:
        summary["exact"] = exact_optimum(distinct, summary["best"], objective)
    if probabilities:
        theory = check_theory(distinct, summary["best"], objective)
        summary["calibration"] = calibration(labels, scores) | theory
    return summary, counts, distinct, sure["bands"]


def exact_optimum(distinct, best, objective):
    """The best of all distinct scores, and what keeping to the table costs."""
    found = entry(distinct, objective, find_best(distinct, objective, "all distinct scores"))
    loss = direction(objective) * (found["value"] - best["value"])
    # Net benefit falls with the threshold itself, so one between two scores can win.
    return (best if loss < 0 else found) | {"grid_loss": max(loss, 0.0)}


def quantiles(distinct):
    """81 scores that cut the cases into equal parts, from the lowest score on."""
    reaching = distinct.tp + distinct.fp  # falls from n to 0
    wanted = reaching[0] * (1 - np.arange(GRID.size) / GRID.size)
    return distinct.threshold[np.searchsorted(-reaching, -wanted, side="right") - 1]


def areas(distinct, objective):
    """Areas under the ROC curve (trapezoids) and the precision-recall curve (steps)."""
    recall, precision = (measure(m, distinct, objective) for m in ("recall", "precision"))
    return {
        "roc_auc": abs(np.trapezoid(recall, distinct.fp / distinct.n_negative)),
        "average_precision": -np.diff(recall) @ precision[:-1],
    }


def describe_choice(counts, objective, chosen, default, sure):
    """The chosen threshold with its intervals, beside 0.5 and the other metrics' choices."""
    values, good = eligible(counts, objective), goodness(counts, objective)
    best = entry(counts, objective, chosen)
    ranges = {
        name: counts.threshold[run_around(values >= values[chosen] - loss, chosen)]
        for name, loss in (("plateau", TOLERANCE), ("near_optimal", near(objective)))
    }
    others = {metric: replace(objective, metric=metric) for metric in METRICS}
    found = {m: eligible(counts, other) for m, other in others.items()}
    return {
        "best": best | {
            "threshold_interval": sure["threshold"],
            "value_interval": sure["value"],
            "value_corrected": best["value"] - sure["optimism"],
        },
        "default": None if default is None else entry(counts, objective, default),
        "gain": None if default is None else {
            "value": good[chosen] - good[default],
            "interval": sure["gain"],
            "corrected": good[chosen] - good[default] - sure["gain_optimism"],
            "corrected_interval": sure["gain"] - sure["gain_optimism"],
            "default_keeps_limits": bool(np.isfinite(values[default])),
        },
        "by_metric": {
            m: entry(counts, others[m], choose(v)) if np.isfinite(v).any() else None
            for m, v in found.items()
        },
        **{name: {"low": low, "high": high} for name, (low, high) in ranges.items()},
        "constraints": {limit: getattr(objective, limit) for limit in LIMITS},
        "bootstrap": {key: sure[key] for key in ("replicates", "dropped")},
    }  # fmt: skip


def other_balances(counts, default):
    """Best threshold, F1 there and F1 at 0.5 if other shares of cases were positive."""
    rows = []
    for share in BALANCES:
        values = measure("f1", counts, Objective(prevalence=share))
        best = choose(values)
        rows.append({
            "prevalence": share, "threshold": counts.threshold[best], "f1": values[best],
            "f1_at_default": None if default is None else values[default],
        })  # fmt: skip
    return rows


# ------------------------------------------------------------------------- plots

CURVES = {
    "precision": (BLUE, "--"), "recall": (ORANGE, "-."), "f1": (BLACK, "-"),
    "youden_j": (GREEN, "--"), "balanced_accuracy": (PURPLE, "-."), "mcc": (SKY, ":"),
}  # fmt: skip


def plot_all(plt, summary, objective, counts, distinct, bands):
    """The figures of a run by file name; curves are thinned after all is computed."""
    from sklearn.metrics import PrecisionRecallDisplay, RocCurveDisplay

    thin = distinct[np.unique(np.linspace(0, distinct.tp.size - 1, 2000).astype(int))]
    recall, precision, specificity = (
        measure(m, thin, objective) for m in ("recall", "precision", "specificity")
    )
    precision[-1] = 1  # where nobody is predicted, no alert is wrong
    roc = RocCurveDisplay(fpr=1 - specificity, tpr=recall, roc_auc=summary["roc_auc"])
    pr = PrecisionRecallDisplay(
        precision, recall, average_precision=summary["average_precision"],
        prevalence_pos_label=objective.prevalence or summary["n_positive"] / summary["n"],
    )  # fmt: skip
    best, own, metric = summary["best"], summary["by_metric"], objective.metric
    mark = f"chosen {best['threshold']:.3g} ({name_of(metric)} {best['value']:.3f})"
    low, high = summary["near_optimal"].values()
    compared = [*dict.fromkeys(["f1", "youden_j", "balanced_accuracy", "mcc", metric])]
    figures = {
        "01_precision_recall_f1_vs_threshold": plot_thresholds(
            plt, objective, counts, bands, best, mark,
            {m: best for m in ("precision", "recall", "f1")},
            f"From {low:.3g} to {high:.3g}, {name_of(metric)} is within {near(objective):g} "
            f"of its best{' within the limits' * has_limits(objective)}",
        ),
        "02_precision_recall_curve": plot_curve(
            plt, pr, (best["recall"], best["precision"]), mark, "precision-recall",
            f"At recall {best['recall']:.3f}, {best['precision']:.1%} of the alerts are right",
            xlabel="recall", ylabel="precision",
        ),
        "03_roc_curve": plot_curve(
            plt, roc, (1 - best["specificity"], best["recall"]), mark, "ROC",
            f"A positive outscores a negative in {summary['roc_auc']:.1%} of pairs (AUC)",
            xlabel="false positive rate", ylabel="true positive rate (recall)",
        ),
        "04_metric_comparison": plot_thresholds(
            plt, objective, counts, bands, best, mark, {m: own[m] for m in compared},
            "The best thresholds of these metrics (dots) lie from "
            f"{min(own[m]['threshold'] for m in compared):.3g} to "
            f"{max(own[m]['threshold'] for m in compared):.3g}",
        ),
    }  # fmt: skip
    if summary["calibration"]:
        figures["05_reliability"] = plot_reliability(plt, summary["calibration"])
    return figures


def plot_thresholds(plt, objective, counts, bands, best, mark, points, title):
    """Metrics against the threshold with 95 % bands and the dots given in ``points``."""
    figure, axes = plt.subplots()
    for metric, point in points.items():
        color, style = CURVES.get(metric, (RED, "-"))
        scale = axes.twinx() if metric == "cost" else axes  # money has its own axis
        values = measure(metric, counts, objective)
        scale.plot(counts.threshold, values, style, color=color)
        scale.fill_between(counts.threshold, *bands[metric], color=color, alpha=0.15, lw=0)
        scale.plot(point["threshold"], point[metric], "o", color=color)
        axes.plot([], [], style, color=color, label=name_of(metric))
        if metric == "cost":
            scale.set_ylabel("cost per case", color=color)
    axes.axvline(best["threshold"], color=RED, lw=1, label=mark)
    if objective.probabilities:
        axes.axvline(0.5, color="gray", lw=1.5, ls=":", label="default 0.5")
    axes.set(xlabel="threshold", ylabel="value, with 95 % bootstrap band", title=title)
    axes.legend(fontsize=9, frameon=True, framealpha=0.9, edgecolor="white")
    return figure


def plot_curve(plt, display, point, mark, name, title, **labels):
    """A curve with its area, chance, and the chosen point."""
    figure, axes = plt.subplots(figsize=(6.4, 6))
    display.plot(axes, name=name, curve_kwargs={"color": BLUE}, plot_chance_level=True,
                 chance_level_kw={"color": "gray"})  # fmt: skip
    axes.plot(*point, "o", color=RED, label=mark)
    axes.set(title=title, **labels)
    axes.legend(loc="lower center", fontsize=9)
    return figure


def plot_reliability(plt, found):
    """Share of positives against the mean score, above the number of cases."""
    figure, (axes, below) = plt.subplots(
        2, sharex=True, figsize=(6.4, 6), height_ratios=(3, 1)
    )
    bins = found["bins"]
    axes.plot([0, 1], [0, 1], ":", color="gray", label="perfectly calibrated")
    axes.plot(bins["score"], bins["share"], "o-", color=BLUE, label="these scores")
    axes.set(ylabel="share of positives",
             title=f"As probabilities, the scores are off by {found['ece']:.3f} on average")  # fmt: skip
    axes.legend(fontsize=9)
    below.bar(bins["score"], bins["count"], width=0.06, color=SKY)
    below.set(xlabel="mean score of the cases in each tenth", ylabel="cases", xlim=(0, 1))
    return figure


# --------------------------------------------------------------------- narration


def narrate(summary, objective, counts):
    """Tell the story of a run in numbered steps, every number from its summary."""
    story = {
        "The best threshold": tell_choice(summary, objective, counts),
        "What moving the threshold does": tell_trade_off(counts, objective, summary["best"]),
        "How sure this is": tell_certainty(summary, objective),
        "Are the scores probabilities?": tell_calibration(summary, objective),
        "Which metric when": [
            "F1 when only the positives matter and both errors weigh alike; Youden's J or "
            "balanced accuracy when both classes matter alike whatever their sizes; cost or "
            "net benefit when you can price the errors; --min-precision or --min-recall when "
            "one of them is promised."
        ],
        "If another share of the cases were positive (F1, no limits)": tell_balances(summary),
        "What the errors of this run suggest": suggestions(summary),
    }
    for step, (title, lines) in enumerate(story.items(), 2):
        say("", f"{step}. {title}")
        for line in lines:
            tell(line)


def headline(summary, objective):
    """The result in a few words: value, default, difference, uncertainty."""
    best, default, gain = summary["best"], summary["default"], summary["gain"]
    low, high = best["value_interval"]
    text = f"With {objective.prevalence:.4g} positive: " if objective.prevalence else ""
    text += (
        f"{name_of(objective.metric)} is best at {best['threshold']:.4g}: {best['value']:.4f} "
        f"(95 % interval {low:.4f} to {high:.4f}). "
    )
    if default is None:
        return text + "Scores outside [0, 1] have no default threshold to compare with."
    text += f"At the default 0.5 it is {default['value']:.4f}. "
    if not gain["default_keeps_limits"]:
        return text + "But the default breaks a limit."
    if gain["value"] <= TOLERANCE:
        return text + "Nothing is to be gained over the default."
    low, high = gain["corrected_interval"]
    text += (
        f"Corrected for the optimism of choosing and scoring on the same cases, the gain is "
        f"{gain['corrected']:+.4f} (95 % interval {low:+.4f} to {high:+.4f}): "
    )
    if not is_real(gain):
        return text + "it cannot be told from zero, so keep 0.5."
    return text + ("worth having." if gain["corrected"] > near(objective) else "real, but small.")


def is_real(gain):
    """Whether the gain over 0.5 can be told from zero."""
    return gain["corrected_interval"][0] > 0


def tell_choice(summary, objective, counts):
    yield headline(summary, objective)
    yield "  best for           threshold    value  precision  recall  specificity"
    for metric in dict.fromkeys([objective.metric, "f1", "youden_j", "balanced_accuracy"]):
        e = summary["by_metric"][metric]
        yield (
            f"  {name_of(metric):<18} {e['threshold']:>9.4g} {e['value']:>8.3f} "
            f"{e['precision']:>10.3f} {e['recall']:>7.3f} {e['specificity']:>12.3f}"
        )
    best, exact = summary["best"], summary["exact"]
    yield (
        f"At {best['threshold']:.4g}: {best['tp']:,} hits, {best['fp']:,} false alarms, "
        f"{best['fn']:,} misses, {best['tn']:,} correct rejections. Whatever the threshold: "
        f"ROC AUC {summary['roc_auc']:.4f}, average precision "
        f"{summary['average_precision']:.4f}."
    )
    equal = summary["plateau"]
    if equal["low"] == counts.threshold[0] or equal["high"] == counts.threshold[-1]:
        yield "It is as good up to the edge of the table: --exact looks beyond it."
    if objective.metric == "net_benefit":
        yield (
            "Net benefit weighs false alarms by the odds of the threshold, so its values at "
            "two thresholds answer two questions: compare models with it, not thresholds."
        )
    if exact:
        nobody = ", which predicts nobody" * (exact["tp"] + exact["fp"] == 0)
        yield (
            f"Of all distinct scores {exact['threshold']:.9g}{nobody} is best with "
            f"{exact['value']:.6f}; keeping to the table costs {exact['grid_loss']:.6f}."
        )


def tell_trade_off(counts, objective, best):
    """0.1 to either side of the grid's choice, or ten rows of a table of quantiles."""
    here = int(np.searchsorted(counts.threshold, best["threshold"]))
    for index in sorted({max(here - 10, 0), min(here + 10, GRID.size - 1)} - {here}):
        e = entry(counts, objective, index)
        yield (
            f"{'Down' if index < here else 'Up'} to {e['threshold']:.4g}: precision "
            f"{best['precision']:.3f} -> {e['precision']:.3f}, recall {best['recall']:.3f} -> "
            f"{e['recall']:.3f}; {e['fp'] - best['fp']:+,} false alarms, "
            f"{e['fn'] - best['fn']:+,} misses."
        )


def tell_certainty(summary, objective):
    best, drawn, held = summary["best"], summary["bootstrap"], summary["holdout"]
    gain = summary["gain"]
    (low, high), good = best["threshold_interval"], summary["near_optimal"]
    yield (
        f"Chosen anew on {drawn['replicates']:,} resamples of the cases, the threshold lies "
        f"from {low:.4g} to {high:.4g} (95 %). From {good['low']:.4g} to {good['high']:.4g} "
        f"the value is within {near(objective):g} of the best. Corrected for optimism it is "
        f"{best['value_corrected']:.4f}."
    )
    if drawn["dropped"]:
        yield f"{drawn['dropped']} resamples without a usable threshold were left out."
    if held is None:
        yield "There are too few cases to choose on one part and score on the other."
        return
    yield (
        f"Chosen on one part of the cases ({held['threshold']:.4g}, value "
        f"{held['value_where_chosen']:.4f}) and scored on the other {held['n']:,}: "
        f"{held['value']:.4f}"
        + (f", {held['gain']:+.4f} over 0.5." if gain and gain["default_keeps_limits"] else ".")
    )


def tell_calibration(summary, objective):
    """The calibration error, and what the theory of true probabilities says here."""
    found, best = summary["calibration"], summary["best"]
    if found is None:
        yield "No: they lie outside [0, 1]."
        return
    yield f"On average they are off by {found['ece']:.3f} (expected calibration error)."
    if found["expected_threshold"] is not None:
        rule = "half the best F1" if objective.metric == "f1" else "c_FP / (c_FP + c_FN)"
        verdict = (
            "close enough." if found["expected_loss"] <= near(objective) else
            "so they are not calibrated: do not read them as probabilities, or recalibrate."
        )  # fmt: skip
        yield (
            f"True probabilities would have their best threshold at {rule} = "
            f"{found['expected_threshold']:.3f}; here that loses {found['expected_loss']:.4f} "
            f"against {best['threshold']:.4g}, {verdict}"
        )


def tell_balances(summary):
    yield "  positives  threshold  best F1  F1 at 0.5"
    for row in summary["balances"]:
        plain = f"{row['f1_at_default']:.3f}" if summary["default"] else "-"
        yield (
            f"  {row['prevalence']:>9.0%} {row['threshold']:>10.4g} {row['f1']:>8.3f} "
            f"{plain:>10}"
        )


def suggestions(summary):
    """What to try next, from this run's false positives and false negatives."""
    best, found, gain = summary["best"], summary["calibration"], summary["gain"]
    fp, fn = best["fp"], best["fn"]
    share = summary["prevalence"] or summary["n_positive"] / summary["n"]
    alarms, misses = (1 - share) * (1 - best["specificity"]), share * (1 - best["recall"])
    weighed = " at this prevalence" if summary["prevalence"] else ""
    if summary["metric"] == "cost":
        alarms, misses = alarms * summary["fp_cost"], misses * summary["fn_cost"]
        weighed = f" by cost{weighed}"
    if alarms > 1.5 * misses:
        yield (
            f"False alarms lead{weighed} ({fp:,} against {fn:,} misses). If they hurt more, try "
            f"--min-precision {(1 + best['precision']) / 2:.2f}, or --metric cost with a higher "
            "--fp-cost, and look at the highest-scoring negatives for wrong labels."
        )
    elif misses > 1.5 * alarms:
        yield (
            f"Misses lead{weighed} ({fn:,} against {fp:,} false alarms). If they hurt more, try "
            f"--min-recall {(1 + best['recall']) / 2:.2f}, or --metric cost with a higher "
            "--fn-cost, and look at the lowest-scoring positives for a missing feature."
        )
    else:
        yield (
            f"False alarms ({fp:,}) and misses ({fn:,}) are about in balance{weighed}: no "
            "threshold removes one kind without adding the other; only better scores do."
        )
    if found and found["ece"] > 0.05:
        yield (
            f"Off by {found['ece']:.2f} as probabilities: calibrate the scores (Platt scaling, "
            "isotonic regression) on held-out cases before reading them as risks."
        )
    if gain and gain["default_keeps_limits"] and not is_real(gain):
        yield "Keep 0.5 unless the errors have unequal costs (--metric cost --fn-cost 5, say)."
    low, high = best["threshold_interval"]
    if high - low > 0.1:
        yield f"The threshold is known only to {low:.4g} to {high:.4g}: label more cases."


# ------------------------------------------------------------------ command line


def parse_arguments(argv):
    parser = Parser(
        description="Find the decision threshold of a binary classifier.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    share = number(0, 1, "()")
    add = parser.add_argument_group("simulated scores").add_argument
    add("--scenario", choices=SCENARIOS, default="balanced", help="score distributions")
    add("--n-samples", type=integer(2), default=10_000, help="number of cases")
    add("--positive-rate", type=share, default=0.3, help="share of positives")
    add = parser.add_argument_group("your own scores").add_argument
    add("--scores", type=Path, help="CSV file with a header, or NPZ file")
    add("--label-column", default="y_true", help="column or array of the labels")
    add("--score-column", default="y_score", help="column or array of the scores")
    add("--positive", help="label that is positive; every other one is negative")
    add = parser.add_argument_group("what is best").add_argument
    add("--metric", choices=METRICS, default="f1", metavar="METRIC",
        help=f"column of thresholds.csv to optimise: {', '.join(METRICS)}")  # fmt: skip
    add("--beta", type=number(0, 1000, "(]"), default=2.0, help="weight of recall in f_beta")
    add("--fp-cost", type=number(0, 1e9), default=1.0, help="cost of a false alarm")
    add("--fn-cost", type=number(0, 1e9), default=1.0, help="cost of a miss")
    add("--min-precision", type=number(0, 1), help="limit on the precision")
    add("--min-recall", type=number(0, 1), help="limit on the recall")
    add("--max-alert-rate", type=number(0, 1), help="limit on the share of alerts")
    add("--prevalence", type=share, help="share of positives where it will be used")
    add("--exact", action="store_true", help="also search all distinct scores")
    add = parser.add_argument_group("run").add_argument
    add("--holdout", type=share, default=0.5, help="share of cases that scores the choice")
    add("--seed", type=integer(0, 2**128), default=42, help="of simulation and resampling")
    add("--output-dir", type=Path, default=Path("outputs/part1"), help="where to write")
    add("--show", action="store_true", help="also show the plots in windows")
    arguments = parser.parse_args(argv)
    if arguments.fp_cost + arguments.fn_cost == 0:
        raise UserError("--fp-cost and --fn-cost are both 0: give one of them a value")
    return arguments


@command
def main(argv=None):
    """Get the scores, analyse, tell, draw and save."""
    a = parse_arguments(argv)
    if a.scores:
        labels, scores = read_scores(a.scores, a.label_column, a.score_column, a.positive)
        source = {"source": str(a.scores), "scenario": None}
    else:
        labels, scores = simulate_scores(a.n_samples, a.positive_rate, a.scenario, a.seed)
        source = {"source": SCENARIOS[a.scenario][1], "scenario": a.scenario}
    goal = {f.name: getattr(a, f.name) for f in fields(Objective) if hasattr(a, f.name)}
    objective = Objective(**goal)
    summary, counts, distinct, bands = analyse(
        labels, scores, objective, a.exact, a.holdout, a.seed
    )
    objective = replace(objective, probabilities=summary["probabilities"])
    folder = output_folder(a.output_dir)

    say("1. The scores")
    tell(
        f"{'Read from' if a.scores else 'Simulated:'} {source['source']}; {summary['n']:,} "
        f"cases, {summary['n_positive']:,} positive ({labels.mean():.1%}), seed {a.seed}."
    )
    narrate(summary, objective, counts)

    say("", f"9. Files in {folder}")
    columns = {key: getattr(counts, key) for key in ("threshold", "tp", "fp", "fn", "tn")}
    columns |= {metric: measure(metric, counts, objective) for metric in METRICS}
    write_csv(folder / "thresholds.csv", columns)
    write_json(folder / "summary.json", source | {"seed": a.seed} | summary)
    say("  thresholds.csv", "  summary.json")
    if not a.scores:
        write_csv(folder / "scores.csv", {"y_true": labels.astype(int), "y_score": scores})
        say("  scores.csv")
    plt = load_pyplot(a.show)
    for name, figure in plot_all(plt, summary, objective, counts, distinct, bands).items():
        save_figure(figure, folder / f"{name}.png")
        say(f"  {name}.png")
    finish_figures(plt, a.show)


if __name__ == "__main__":
    sys.exit(main())
