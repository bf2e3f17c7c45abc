"""Find the best decision threshold of a binary classifier, and how certain it is.

    python part1_threshold.py                                   simulated scores
    python part1_threshold.py --scenario underconfident         0.5 is wrong here
    python part1_threshold.py --scores FILE.csv --positive yes  your own scores

The first takes about 2 s on two CPU cores. Of 10,000 simulated cases F1 is best at 0.49:
0.8676 (95% interval 0.8573 to 0.8763), and 0.8655 at the default 0.5; ROC AUC 0.9698. It
writes summary.json (every number), thresholds.csv (81 thresholds, all metrics), scores.csv
(simulated scores only) and the plots 01_... to 06_...png into outputs/part1.

A case is called positive when ``score >= threshold``. One sort counts the true and false
positives at every threshold; all else follows from those counts, so that ten million cases
take seconds. Read on downwards: the story comes first, then its steps in their order.
"""

from __future__ import annotations

import argparse
import decimal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

import utils
from utils import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, UserError, option, say, tell

# Division, not a step of 0.01: each value is the float that "0.37" reads as.
GRID = np.arange(10, 91) / 100
TOLERANCE = 1e-12  # values closer than this are equally good
REPLICATES, LEVELS = utils.REPLICATES, utils.LEVELS  # tables behind each 95% interval
RATES = ("precision", "recall", "specificity", "alert_rate")  # with intervals, whatever is best
RULES = ("everybody", "nobody")  # that could be called without any score
LIMITS = {"min_precision": "precision", "min_recall": "recall", "max_alert_rate": "alert_rate"}
BALANCES = (0.05, 0.10, 0.30, 0.50)  # shares of positives in step 6


# %% The story
@utils.command
def main(argv=None):
    """Read or simulate scores, find the best threshold, tell the story, save and draw it."""
    a = parse_arguments(argv)
    if a.scores:
        cases, source, scenario = read(a.scores, a), utils.named(a.scores), None
    else:
        if a.n_samples > 500_000:
            say(f"Simulating and writing {a.n_samples:,} cases, which can take a while.")
        simulated = simulate_scores(a.n_samples, a.positive_rate, a.scenario, a.seed)
        cases, source, scenario = utils.Cases(*simulated), SCENARIOS[a.scenario], a.scenario
    how = {"exact": a.exact, "given": a.threshold, "share": a.holdout, "seed": a.seed}
    if a.test:
        about = {"source": source, "n": cases.n, "remark": cases.remark}
        how |= {"test": read(a.test, a), "chosen_on": about}
        source = utils.named(a.test)
    objective = Objective(**{field.name: getattr(a, field.name) for field in fields(Objective)})
    result = analyse(cases, objective, **how, source=source, scenario=scenario)
    folder = utils.output_folder(a.output_dir)
    narrate(result)
    say(f"8. Files in {folder}")
    save(result, folder)
    utils.draw_figures(FIGURES, result, folder, a.show)


@dataclass(frozen=True)
class Result:
    """What a run has found: the narration, the files and the figures are made of it."""

    cases: utils.Cases
    choice: Choice
    curve: Counts  # at no more than 2,000 of the distinct scores: a curve needs no more
    bars: Counts  # at evenly spaced scores, counted from the chosen threshold
    columns: dict  # what thresholds.csv holds: (T,) each
    reliability: dict | None  # isotonic curve, where the scores are probabilities
    bands: dict  # 95% band of each metric that is drawn: (2, T)
    summary: dict  # what summary.json holds

    objective = property(lambda self: self.choice.objective)
    table = property(lambda self: self.choice.table)

    def fill(self, text, **more):
        """Put numbers of the summary, and ``more``, into a text: ``{best[value]:{form}}``."""
        metric, best = self.objective.metric, self.summary["best"]["value"]
        form = f"z.{decimals(best, 4)}f"
        if metric == "cost":
            form = cost_form(best or min(self.summary[rule]["value"] for rule in RULES))
        return text.format(name=METRICS[metric].name, form=form, **more, **self.summary)

    def shown(self, entry):
        """A row of the table as text; the counts are those at the prevalence, of as many cases."""
        n, share = self.summary["n"], self.objective.prevalence
        pos = n * share if share else self.summary["n_positive"]
        tp, tn = entry["recall"] * pos, entry["specificity"] * (n - pos)
        counts = {"tp": tp, "fn": pos - tp, "tn": tn, "fp": n - pos - tn}
        few = 9.95 if share else 0  # these are estimates
        text = {key: f"{number:,.{int(number < few)}f}" for key, number in counts.items()}
        return entry | text | {rate: shown(entry[rate]) for rate in RATES}


def decimals(share, least=3):
    """How many show two digits of a share near 0, or of what it lacks of 1."""
    near = min(abs(share), abs(1 - share))
    return max(least, 1 - int(np.floor(np.log10(near)))) if near > TOLERANCE else least


def cost_form(cost):
    """The format that shows four digits of a cost, however large its unit is."""
    places = 3 - int(np.floor(np.log10(cost or 1.0)))
    return f"z,.{max(places, 0)}f" if abs(places) <= 13 else "z.4g"


def shown(value, metric=None):
    """A share, or a value of the metric, as the tables show it."""
    if value is None or np.isnan(value):
        return "-"
    form = f"z.{decimals(value)}f" if metric != "cost" else cost_form(value)
    return f"{value:{form}}"


def analyse(cases, objective, *, exact=False, given=None, test=None, share=0.5, seed=0, **about):
    """The Result of a run; nothing is printed, drawn or written.

    ``cases`` choose and ``test`` judges the choice (None: the same cases), both classes in each.
    ``exact``, ``given`` and ``share`` are --exact, --threshold and --holdout; ``about`` is what
    else the summary says of the source.
    """
    choice, cases, every, kind = choose(cases, objective, given, test, seed)
    table, best_row = choice.table, choice.table[[choice.chosen]]
    columns, drawn = tabulate(table, objective), certainty(choice)
    found = describe_choice(choice, columns, drawn)
    summary = {
        **about,
        "chosen_by": "given" if given is not None else "other cases" if test else "these cases",
        "seed": seed,
        **describe_cases(every, cases, objective),
        **asdict(objective),
        "table": kind,
        "small_loss": small_loss(table, objective),
        **found,
        "limits": drawn["limits"],
        "replicates": REPLICATES,
        "holdout": check_holdout(choice, share),
        "exact": describe_exact(every, cases, found["best"], choice) if exact else None,
        "calibration": calibration(every, choice, found["best"]),
        "balances": other_balances(table, objective),
        "dominant_error": dominant_error(choice),
    }
    rows = [*quantiles(every.tp, 1000), *quantiles(every.tp + every.fp, 1000)]
    curve = every[np.unique([*rows, every.threshold.size - 1])]
    bars = every.at(bin_edges(every, best_row.threshold.item()), cases.scores.dtype)
    shape = utils.reliability(*by_score(every), seed) if every.probabilities else None
    return Result(cases, choice, curve, bars, columns, shape, drawn["bands"], summary)


def narrate(result):
    """Tell the story in numbered steps; every number in it is one of the summary's."""
    story = {
        "The scores": tell_scores,
        "The best threshold": tell_choice,
        "What moving the threshold does": tell_trade_off,
        "How certain this is": tell_certainty,
        "Are the scores probabilities?": tell_calibration,
        "If another share of the cases were positive ({name}, no limits)": tell_balances,
        "What the errors of this run suggest": tell_errors,
    }
    for step, (title, paragraphs) in enumerate(story.items(), 1):
        say(f"{step}. {result.fill(title)}")
        for paragraph in paragraphs(result):
            tell(paragraph)
        say("")


# %% 1. The scores
SCENARIOS = {
    "balanced": "Beta(6,3) for positives, Beta(3,8) for negatives",
    "calibrated": "calibrated probabilities from evidence N(+-1.3, 1)",
    "underconfident": "logits N(0.5,1.1) for positives, N(-2.5,1.1) for negatives: scores too low",
}


def simulate_scores(n, positive_rate, scenario, seed):
    """Labels (bool) and scores (float64 in [0, 1]) of ``n`` cases, in random order."""
    n_positive = round(n * positive_rate)
    if not 0 < n_positive < n:
        raise UserError(
            f"{n} cases at a positive rate of {positive_rate} leave one class empty: "
            "give a larger --n-samples or another --positive-rate"
        )
    rng = np.random.default_rng(utils.derive_seed(seed, 0))
    labels = rng.permutation(np.arange(n) < n_positive)
    if scenario == "balanced":  # the best threshold happens to be near 0.5
        return labels, np.where(labels, rng.beta(6, 3, n), rng.beta(3, 8, n))
    if scenario == "calibrated":  # the true probability of a case, given its evidence
        evidence = rng.normal(np.where(labels, 1.3, -1.3))
        logits = 2.6 * evidence + np.log(labels.mean() / (1 - labels.mean()))
    else:  # ranked well, but 0.5 misses half of the positives
        logits = rng.normal(np.where(labels, 0.5, -2.5), 1.1)
    return labels, 1 / (1 + np.exp(-logits))


def read(path, a):
    """The cases of a file, as the options name its columns."""
    if str(path) == "-" or (path.is_file() and path.stat().st_size > 10e6):
        say(f"Reading {utils.named(path)}, which can take a while.")
    columns = a.label_column, a.score_column, a.positive, a.count_column, a.group_column
    cases = utils.read_scores(path, *columns, unit=not (a.exact or a.lower_is_positive))
    return cases._replace(scores=-cases.scores) if a.lower_is_positive else cases


RANKINGS = {  # what the area under the ROC curve says before anything else
    "reversed": "A positive outscores a negative in only {roc_auc:.1%} of pairs (ROC AUC): {seem} "
    "scores seem to mean positive. If so, run again {how} --lower-is-positive.",
    "unclear": "A ROC AUC of {roc_auc:.3f} can be chance{unclear}.",
}


def tell_scores(result):
    """Which cases the run is about, and whether their scores rank them."""
    summary, objective = result.summary, result.objective
    seem, how = ("high", "without") if objective.lower_is_positive else ("low", "with")
    unclear = ": these scores may be guesses"
    if groups := summary["groups"]:
        unclear = " if a group tells no more than a single case would"
    if text := RANKINGS.get(summary["ranking"]):
        yield result.fill(text, seem=seem, how=how, unclear=unclear)
    made = "Simulated:" if summary["scenario"] else "Read from"
    yield made + result.fill(
        " {source}; {n:,} cases, {n_positive:,} of them positive; seed {seed}."
    )
    if result.cases.remark:
        yield result.cases.remark
    if summary["chosen_by"] == "other cases" and summary["chosen_on"]["remark"]:
        yield result.fill("{chosen_on[source]}: {chosen_on[remark]}")
    if groups:
        yield f"They come in {groups:,} groups, which are resampled as wholes."
        if groups < 20:
            yield "With so few groups the intervals are too narrow: they give a first impression."
    if objective.lower_is_positive:
        yield "A case is called positive when score <= threshold."
    if share := objective.prevalence:
        text = "From here on, unless something else is said, numbers are for cases of which "
        yield f"{text}{100 * share:.4g}% are positive."


# %% Counting
@dataclass(frozen=True)
class Counts:
    """Cases called positive at each threshold; all arrays broadcast against each other."""

    threshold: np.ndarray  # ascending, (T,)
    tp: np.ndarray  # positives with score >= threshold, (..., T)
    fp: np.ndarray  # negatives with score >= threshold, (..., T)
    pos: int  # all positives, or an array (..., 1)
    neg: int  # all negatives, likewise
    probabilities: bool = True  # whether all scores lie in [0, 1]

    fn = property(lambda self: self.pos - self.tp)
    tn = property(lambda self: self.neg - self.fp)
    n = property(lambda self: self.pos + self.neg)
    tpr = property(lambda self: self.tp / self.pos)
    fpr = property(lambda self: self.fp / self.neg)
    tnr = property(lambda self: self.tn / self.neg)

    @property
    def area(self):
        """The area under the ROC curve, from 0 to 1."""
        return abs((np.diff(self.fpr) * (self.tpr[1:] + self.tpr[:-1]) / 2).sum())

    @property
    def half(self):
        """The index of 0.5, None where it is no threshold or the scores are no probabilities."""
        found = np.flatnonzero(self.threshold == 0.5)
        return found[0] if self.probabilities and found.size else None

    def __getitem__(self, index):
        tp, fp = self.tp[..., index], self.fp[..., index]
        return replace(self, threshold=self.threshold[index], tp=tp, fp=fp)

    @np.errstate(over="ignore")  # beyond single precision nobody is called
    def at(self, thresholds, dtype=float):
        """The counts at any thresholds, compared in the scores' precision: float32(0.3) is 0.3."""
        index = np.searchsorted(self.threshold, thresholds.astype(dtype))
        return replace(self[index.clip(max=self.threshold.size - 1)], threshold=thresholds)

    def at_prevalence(self, share):
        """The same tpr and fpr where this share is positive; the counts become shares.

        Always in floats, since a metric's product of counts can exceed 64 bits.
        """
        found = self.tp, self.fp, self.pos, self.neg
        if share is not None:
            found = self.tpr * share, self.fpr * (1 - share), share, 1 - share
        tp, fp, pos, neg = (np.asarray(each, float) for each in found)
        return replace(self, tp=tp, fp=fp, pos=pos, neg=neg)

    def cells(self):
        """How many cases of each class lie between the thresholds; shape (2, T + 1)."""
        reaching = (self.neg, self.fp), (self.pos, self.tp)
        return np.array([-np.diff(np.concatenate([[n], k, [0]])) for n, k in reaching])

    def redrawn(self, cells):
        """The counts of other cells, shape (..., 2, T + 1), at the same thresholds."""
        reaching = cells[..., ::-1].cumsum(-1)[..., ::-1]
        fp, tp = reaching[..., 0, :], reaching[..., 1, :]
        return replace(self, tp=tp[..., 1:], fp=fp[..., 1:], pos=tp[..., :1], neg=fp[..., :1])


def count_every_score(cases, objective):
    """Counts at every distinct score and, last, just above the highest: nobody is positive."""
    labels, scores, counts = cases[:3]
    # Above 0 the next float would be 5e-324.
    top = np.nextafter(scores.max(), np.inf, dtype=scores.dtype) if scores.max() else 0.001
    threshold = np.add(np.append(scores, top), 0.0, dtype=np.float64)  # -0.0 becomes 0.0
    ordered = threshold[:-1]  # a view, sorted in place
    probabilities = ordered.min() >= 0 and ordered.max() <= 1 and not objective.lower_is_positive
    if probabilities and counts is None:
        # The bits of floats in [0, 1] sort like integers and leave the top two bits free,
        # so the label fits in below them: one plain sort, 5 times as fast as an argsort.
        keys = ordered.view(np.int64)
        keys <<= 1
        keys |= labels
        keys.sort()
        tp, total = at_or_above(keys & 1), np.arange(scores.size, -1, -1, float)
        keys >>= 1
    else:
        order = np.argsort(ordered)
        ordered[:] = ordered[order]
        each = np.ones(scores.size, int) if counts is None else counts[order]
        tp, total = at_or_above(labels[order] * each), at_or_above(each)
    fp = total - tp
    first = np.append(True, threshold[1:] != threshold[:-1])  # equal scores are one threshold
    found = Counts(threshold, tp, fp, int(tp[0]), int(fp[0]), bool(probabilities))
    return found if first.all() else found[first]


def at_or_above(amounts):
    """How much lies at or above each place of a sorted array, and last 0, as floats."""
    return np.append(np.cumsum(amounts[::-1], dtype=float)[::-1], 0)


def lay_table(every, optimum, dtype, objective):
    """A name and the thresholds to choose from: the grid, or quantiles of scores outside [0, 1].

    Where the best distinct score (index ``optimum``) lies outside the grid and gains more than
    a small loss, or only scores outside the table keep the limits, it is added, and with it 81
    quantiles of the positives' scores: those of all cases would miss what a rare class needs.
    """
    alerts = every.tp + every.fp
    usual = GRID if every.probabilities else shortened(every, quantiles(alerts), dtype)
    table = every.at(usual, dtype)
    gain = goodness(every[[optimum]], objective).item() - merits(table, objective).max()
    inside = every.probabilities and GRID[0] <= every.threshold[optimum] <= GRID[-1]
    # Net benefit falls with the threshold itself, so the lowest scores would always be added.
    inside |= objective.metric == "net_benefit"
    if objective.confidence:  # which may depend on the scores, but not on their labels
        wanted = np.append(np.geomspace(1, every.n, GRID.size).round(), 0)  # and that of nobody
        rows = np.unique(last_reaching(wanted, alerts))
    elif gain == np.inf or (gain > small_loss(every, objective) and not inside):
        rows = np.union1d(quantiles(every.tp), optimum)
    else:
        return "grid" if every.probabilities else "quantiles", table
    return "extended", every.at(np.union1d(usual, shortened(every, rows, dtype)), dtype)


def quantiles(reaching, number=GRID.size):
    """Indices of that many distinct scores at most, equal shares of these cases between them."""
    wanted = reaching[0] * (1 - np.arange(number) / number)
    return np.unique(last_reaching(wanted, reaching))


def last_reaching(wanted, reaching):
    """Index of the highest threshold that at least so many cases reach, for each of ``wanted``."""
    return np.searchsorted(-reaching, -wanted, side="right") - 1


def shortened(every, rows, dtype):
    """The thresholds of those rows in the fewest digits that change no count."""
    below = np.append(-np.inf, every.threshold)[rows]
    nobody = rows == every.threshold.size - 1
    return np.array([*map(shortest, below, every.threshold[rows].astype(dtype), nobody)])


def shortest(below, score, nobody):
    """The number of fewest digits above ``below`` that ``score`` reaches, or nobody does."""
    rounding = decimal.ROUND_CEILING if nobody else decimal.ROUND_FLOOR
    for digits in range(1, 18):
        number = float(decimal.Context(digits, rounding).create_decimal(str(score)))
        if below < score.dtype.type(number):
            return number


# %% Metrics
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
    confidence: float | None = None
    lower_is_positive: bool = False

    sign = property(lambda self: METRICS[self.metric].sign)
    # Scores of which low ones mean positive are counted as their negatives.
    orient = property(lambda self: -1.0 if self.lower_is_positive else 1.0)

    unlimited = property(lambda self: replace(self, confidence=None, **dict.fromkeys(LIMITS)))
    # Where one kind of error does not count, calling almost everybody or nobody is best.
    one_sided = property(lambda self: self.metric in RATES and not self.limits)

    @property
    def limits(self):
        """Name and value of each limit that was given."""
        given = {name: getattr(self, name) for name in LIMITS}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Metric:
    """How a metric is called, computed and drawn; a new one is an entry in METRICS."""

    name: str
    value: Callable  # of Counts and an Objective, with the shape of counts.tp; NaN: no value
    style: tuple = (RED, "-")  # colour and line of its curve
    sign: int = 1  # -1 where lower is better


def ratio(a, b):
    """Return a / b, and 0 where both are 0 (where nobody is called positive, say)."""
    return a / (b + (b == 0))


def f_beta(c, beta):
    """F-beta from the counts: 2PR / (P + R) would be 0/0 where nobody is called positive."""
    return ratio((1 + beta**2) * c.tp, beta**2 * c.pos + c.tp + c.fp)


def matthews(c):
    """Matthews correlation."""
    scale = np.sqrt((c.tp + c.fp) * c.pos) * np.sqrt((c.tn + c.fn) * c.neg)
    return ratio(c.tp * c.tn - c.fp * c.fn, scale)


def kappa(c):
    """Cohen's kappa, as agreement over what chance leaves room for."""
    chance = (c.tp + c.fp) * c.neg + (c.fn + c.tn) * c.pos
    return ratio(2 * (c.tp * c.tn - c.fp * c.fn), chance)


def net_benefit(c):
    """Vickers and Elkin 2006: a false alarm weighs t / (1 - t) of a hit, 0 <= t < 1."""
    if not c.probabilities:
        return np.full(c.tp.shape, np.nan)
    t = np.where((c.threshold >= 0) & (c.threshold < 1), c.threshold, np.nan)
    return np.where(c.tp + c.fp > 0, (c.tp - c.fp * (t / (1 - t))) / c.n, 0)


METRICS = {
    "precision": Metric("precision", lambda c, o: ratio(c.tp, c.tp + c.fp), (BLUE, "--")),
    "recall": Metric("recall", lambda c, o: c.tpr, (ORANGE, "-.")),
    "specificity": Metric("specificity", lambda c, o: c.tnr),
    "f1": Metric("F1", lambda c, o: f_beta(c, 1), (BLACK, "-")),
    "youden_j": Metric("Youden's J", lambda c, o: c.tpr - c.fpr, (GREEN, "--")),
    "balanced_accuracy": Metric(
        "balanced accuracy", lambda c, o: (c.tpr + c.tnr) / 2, (PURPLE, "-.")
    ),
    "accuracy": Metric("accuracy", lambda c, o: (c.tp + c.tn) / c.n),
    "f_beta": Metric("F-beta", lambda c, o: f_beta(c, o.beta)),
    "mcc": Metric("Matthews corr.", lambda c, o: matthews(c), (SKY, ":")),
    "cohen_kappa": Metric("Cohen's kappa", lambda c, o: kappa(c)),
    "cost": Metric("cost", lambda c, o: (o.fp_cost * c.fp + o.fn_cost * c.fn) / c.n, sign=-1),
    "net_benefit": Metric("net benefit", lambda c, o: net_benefit(c)),
    "alert_rate": Metric("alert rate", lambda c, o: (c.tp + c.fp) / c.n),
}


def measure(metric, counts, objective):
    """The metric at each threshold, at the objective's prevalence; shape (..., T)."""
    return METRICS[metric].value(counts.at_prevalence(objective.prevalence), objective)


def tabulate(counts, objective):
    """The columns of thresholds.csv: counts as observed, then every metric; shape (T,)."""
    observed = {"threshold": objective.orient * counts.threshold + 0.0}  # no -0.0
    observed |= {key: getattr(counts, key).astype(int) for key in ("tp", "fp", "fn", "tn")}
    return observed | {metric: measure(metric, counts, objective) for metric in METRICS}


def row(columns, index, metric):
    """One threshold of a table as plain numbers; ``value`` is that of the metric."""
    values = {name: column[index].item() for name, column in columns.items()}
    return values | {"value": values[metric]}


def describe_cases(every, cases, objective):
    """How many cases there are, and how well their scores rank them."""
    ranking = judge_ranking(every, cases.groups)  # before the two large arrays are made
    recall, precision = (measure(m, every, objective) for m in ("recall", "precision"))
    return {
        "n": every.n,
        "n_positive": every.pos,
        "groups": None if cases.groups is None else int(cases.groups.max()) + 1,
        "probabilities": every.probabilities,
        "roc_auc": every.area,
        # Of separable scores the sum can exceed 1 by a rounding error.
        "average_precision": min(-np.diff(recall) @ precision[:-1], 1.0),
        "ranking": ranking,
    }


def judge_ranking(every, groups=None):
    """Whether high scores mean positive: "right", "reversed" or "unclear" (Mann and Whitney 1947).

    By the area's spread, ties included, if scores were guesses; each group counts as one case.
    """
    n, pairs = every.n, every.pos * every.neg
    ties = -np.diff(every.tp + every.fp)
    variance = (n + 1 - (ties**3 - ties).sum() / (n * (n - 1))) / (12 * pairs)
    variance *= 1 if groups is None else n / (groups.max() + 1)
    above = every.area - 0.5
    if abs(above) <= 1.96 * np.sqrt(max(variance, 0)):
        return "unclear"
    return "right" if above > 0 else "reversed"


# %% 2. The best threshold
@dataclass(frozen=True)
class Choice:
    """A threshold of a table, and what was chosen how."""

    table: Counts
    objective: Objective
    chosen: int  # index in the table
    seed: int = 0
    fixed: bool = False  # whether it was chosen before these cases were seen
    allowed: np.ndarray | bool = True  # the thresholds that are proved to keep the limits, (T,)
    clusters: np.ndarray | None = None  # cells of each group, (G, 2, T + 1)

    # What was fixed beforehand is judged whatever the limits.
    asked = property(lambda self: self.objective.unlimited if self.fixed else self.objective)


def choose(cases, objective, given=None, test=None, seed=0):
    """The choice, the cases that judge it, their counts at every score, and the kind of table."""
    every, dtype = count_every_score(cases, objective), cases.scores.dtype
    asked = objective if given is None else objective.unlimited  # a given one needs no search
    kind, table, allowed, chosen = search(every, asked, dtype)
    if given is not None:
        place = np.array([objective.orient * given])
        table = every.at(np.union1d(table.threshold, place), dtype)
        chosen = table.threshold.searchsorted(place).item()
    if test is not None:  # the thresholds stay; every number is that of the other cases
        cases, every = test, count_every_score(test, objective)
        table = every.at(table.threshold, test.scores.dtype)
    if np.isnan(goodness(table[chosen], objective)):
        text = f"{objective.metric} has no value at {objective.orient * table.threshold[chosen]:g}"
        raise UserError(f"{text} among these scores: give another --metric or threshold")
    fixed, clusters = given is not None or test is not None, split_groups(cases, table)
    choice = Choice(table, objective, chosen, seed, fixed, fixed or allowed, clusters)
    return choice, cases, every, kind


def search(every, objective, dtype):
    """The kind of table, the table, which of its thresholds are allowed, and the best's index."""
    kind, table = lay_table(every, find_best(every, objective), dtype, objective)
    allowed = promised(table, objective)
    return kind, table, allowed, find_best(table, objective, allowed)


def goodness(counts, objective):
    """The metric, turned so that higher is better; shape (..., T)."""
    return objective.sign * measure(objective.metric, counts, objective)


def small_loss(counts, objective):
    """A loss too small to care about: 0.5% of the way from a useless rule to no error."""
    share = objective.prevalence or counts.pos / counts.n
    nobody, everybody = objective.fn_cost * share, objective.fp_cost * (1 - share)
    reach = {"cost": min(nobody, everybody), "net_benefit": share}
    return 0.005 * reach.get(objective.metric, 1)


def shortfall(counts, objective, allowed=True):
    """By how much each threshold misses the limits, summed; 0 where it keeps them."""
    missing = 1.0 * ~np.array(allowed)
    for name, limit in objective.limits.items():
        below = limit - measure(LIMITS[name], counts, objective)
        below = -below if name.startswith("max") else below
        missing = missing + np.maximum(0, below - TOLERANCE)
    return missing


def merits(counts, objective, allowed=True):
    """What a choice maximises: goodness, and -inf where a limit is missed or there is no value."""
    good = goodness(counts, objective)
    return np.where((shortfall(counts, objective, allowed) > 0) | np.isnan(good), -np.inf, good)


def middle_best(values):
    """Index of the best along the last axis; of equally good ones, the middle one."""
    tied = (values >= values.max(-1, keepdims=True) - TOLERANCE).cumsum(-1)
    return (tied >= (tied[..., -1:] + 1) // 2).argmax(-1)


def find_best(counts, objective, allowed=True):
    """Index of the best threshold within the limits; if none is, an error names the closest."""
    values = merits(counts, objective, allowed)
    if np.isfinite(values).any():
        return middle_best(values)
    if np.isnan(goodness(counts, objective)).all():
        raise UserError(f"{objective.metric} has no value at these scores: give another --metric")
    missing = shortfall(counts, objective)
    given = " and ".join(f"{option(k)} {limit:g}" for k, limit in objective.limits.items())
    if objective.confidence and missing.min() == 0:
        raise UserError(
            f"these {counts.n:,} cases prove for no threshold that the population keeps {given} "
            f"with a confidence of {objective.confidence:g}: "
            f"{cases_needed(counts, objective)}, relax a limit or lower --confidence"
        )
    text = "no threshold satisfies {}; the closest is {threshold:.6g} with precision "
    text += "{precision:.4f}, recall {recall:.4f}, alert rate {alert_rate:.4f}: relax a limit"
    raise UserError(text.format(given, **tabulate(counts[missing.argmin()], objective)))


def promised(table, objective):
    """Thresholds that keep all limits in the population, with the objective's confidence.

    Exact binomial tests in fixed sequences (Angelopoulos et al. 2021, Learn then Test): of the
    precision and the alert rate from the highest threshold down, of the recall from the lowest
    up, each from where the number of cases could prove it until the first that fails. The
    limits share the chance of a wrong one, 1 - confidence.
    """
    allowed, limits, alerts = True, objective.limits, table.tp + table.fp
    for name, limit in limits.items() if objective.confidence else ():
        right, of, share, step, least = {
            # From a few alerts a single unlucky case would end the sequence.
            "min_precision": (table.tp, alerts, limit, -1, np.sqrt(table.pos)),
            "min_recall": (table.tp, table.pos + 0 * alerts, limit, 1, 1),
            "max_alert_rate": (table.n - alerts, table.n + 0 * alerts, 1 - limit, -1, 1),
        }[name]
        error = (1 - objective.confidence) / len(limits)
        allowed = allowed & proved(right[::step], of[::step], share, error, least)[::step]
    return allowed


def proved(right, of, share, error, least):
    """Where more than ``share`` of the cases is right, in a sequence of tests; shape (T,)."""
    from scipy.special import betainc  # scikit-learn needs scipy, so it is there

    begun = np.maximum.accumulate((share**of <= error) & (of >= least))
    chance = betainc(right, of - right + 1, share)  # that so many are right if no more is
    return begun & ~np.maximum.accumulate(begun & ~(chance <= error))


def cases_needed(table, objective):
    """How many cases like these would prove the limits, in words."""
    for factor in 1.25 ** np.arange(1, 40):
        more = {key: factor * getattr(table, key) for key in ("tp", "fp", "pos", "neg")}
        if np.any(promised(replace(table, **more), objective)):
            return f"give at least {float(f'{factor * table.n:.1e}'):,.0f} cases like these"
    return "cases like these may never do"


def range_around(chosen, values, loss, threshold):
    """The run of thresholds around the chosen one whose values are within ``loss`` of it."""
    gaps = np.flatnonzero(~np.pad(values >= values[chosen] - loss, 1))
    after = np.searchsorted(gaps, chosen + 1)
    ends = threshold[[gaps[after - 1], gaps[after] - 2]]
    return {"low": ends.min(), "high": ends.max()}


def describe_choice(choice, columns, drawn):
    """The chosen threshold with its intervals, beside 0.5 and the other metrics' choices."""
    table, objective, chosen = choice.table, choice.objective, choice.chosen
    default, metric, loss = table.half, objective.metric, small_loss(table, objective)
    best = row(columns, chosen, metric)
    best |= {f"{name}_interval": ends for name, ends in drawn["intervals"].items()}
    best["value_interval"] = best[f"{metric}_interval"]
    best["value_corrected"] = best["value"] - drawn["luck"][metric]
    merit = {m: merits(table, replace(choice.asked, metric=m), choice.allowed) for m in METRICS}
    own = {m: row(columns, middle_best(v), m) for m, v in merit.items() if v.max() > -np.inf}
    values = merit[metric]
    plateau = range_around(chosen, values, TOLERANCE, columns["threshold"])
    if not choice.fixed:
        ties = np.append(best["threshold_interval"], [*plateau.values()])  # as good in each table
        best["threshold_interval"] = [ties.min(), ties.max()]
    gain = None
    if default is not None:
        judged = np.isfinite(values[default]) and not objective.one_sided
        gain = weigh(gain_over(choice, default), loss, table.n, judged)
    called = {"tp": np.array([table.pos, 0]), "fp": np.array([table.neg, 0])}
    useless = tabulate(replace(table[[chosen, chosen]], **called), objective)
    return {
        "best": best,
        "default": None if default is None else row(columns, default, metric),
        "gain": gain,
        **{rule: row(useless, i, metric) | {"threshold": None} for i, rule in enumerate(RULES)},
        "by_metric": {m: own.get(m) for m in METRICS},
        "plateau": plateau,
        "near_optimal": range_around(chosen, values, loss, columns["threshold"]),
    }


def round_up(number):
    """To one digit, which is all that is known of how many cases it takes."""
    unit = 10.0 ** np.floor(np.log10(number))
    return np.ceil(number / unit) * unit


def weigh(gain, loss, n, judged):
    """The gain over 0.5 with a verdict: None where there is nothing to judge.

    And roughly how many cases would tell, where these cannot: an interval shrinks by their root.
    """
    (low, high), corrected = gain["corrected_interval"], gain["corrected"]
    verdict = "pays" if low > 0 and corrected > loss else "cannot_tell"
    if high < loss or abs(gain["value"]) <= TOLERANCE:  # 0.5 is as good
        verdict = "does_not_pay"
    end, goal = (low, 0) if corrected > loss else (high, loss)
    needed = round_up(n * max(1.1, ratio(end - corrected, goal - corrected) ** 2))
    return gain | {
        "verdict": verdict if judged else None,
        "cases_needed": needed if judged and verdict == "cannot_tell" else None,
    }


def describe_exact(every, cases, best, choice):
    """The best of all distinct scores, and what keeping to the table costs."""
    objective, dtype = choice.asked, cases.scores.dtype
    optimum = np.array([find_best(every, objective)])
    counts = every.at(shortened(every, optimum, dtype), dtype)
    found = row(tabulate(counts, objective), 0, objective.metric)
    loss = objective.sign * (found["value"] - best["value"])
    # Net benefit falls with the threshold itself, so one between two scores can win.
    return (best if loss < 0 else found) | {"grid_loss": max(0.0, loss)}


CHOSEN_BY = {
    "these cases": "Best threshold for {name}: {best[threshold]}",
    "other cases": "Threshold {best[threshold]}, chosen on the {chosen_on[n]:,} cases of "
    "{chosen_on[source]}",
    "given": "Threshold {best[threshold]}, as given",
}
VALUE = " ({name} {best[value]:{form}}, 95% interval {best[value_interval][0]:{form}} to "
VALUE += "{best[value_interval][1]:{form}}). "
GAIN = "The default 0.5 reaches {default[value]:{form}}. {luck}he gain is estimated at "
GAIN += "{gain[corrected]:+{form}} (95% interval {gain[corrected_interval][0]:+{form}} to "
GAIN += "{gain[corrected_interval][1]:+{form}}): "
VERDICTS = {
    "pays": GAIN + "worth having.",
    "does_not_pay": GAIN + "no reason to leave 0.5.",
    "equal": "The default 0.5 reaches the same: no reason to leave it.",
    "cannot_tell": GAIN + "these cases cannot tell whether it pays; it may take "
    "{gain[cases_needed]:,.0f} cases or more.",
    "out": "The default 0.5 reaches {default[value]:{form}}, but is ruled out by the limits.",
    "none": "These scores have no default threshold to compare with.",
    "one_sided": "That is no advice: {name} alone is best where almost everybody or almost "
    "nobody is called. Add a limit on another rate.",
}


def headline(result):
    """The result in a few words: value, default, difference, uncertainty, what is as good."""
    summary, objective = result.summary, result.objective
    gain, best, default = (summary[key] for key in ("gain", "best", "default"))
    verdict = "none" if gain is None else gain["verdict"] or "out"
    equal = verdict == "does_not_pay" and abs(gain["value"]) <= TOLERANCE
    verdict = "one_sided" if objective.one_sided else "equal" if equal else verdict
    text = CHOSEN_BY[summary["chosen_by"]] + VALUE + VERDICTS[verdict]
    reached = max(objective.sign * found["value"] for found in (best, default or best))
    simple = [objective.sign * summary[rule]["value"] for rule in RULES]
    enough = reached - np.nanmax(simple) <= summary["small_loss"]
    if enough and not (objective.limits or objective.one_sided):
        rule = RULES[np.nanargmax(simple)]
        text += f" But calling {rule} reaches {{{rule}[value]:{{form}}}}."
    luck = "T" if result.choice.fixed else "Corrected for the luck of the choice, t"
    return result.fill(text, luck=luck)


def tell_choice(result):
    """The headline, the choices of some metrics, and what the best one does."""
    summary, metric = result.summary, result.objective.metric
    yield headline(result)
    first = "best within limits" if result.choice.asked.limits else "best for"
    yield f"  {first:<18} threshold       value  precision  recall  specificity"
    line = "  {:<18} {threshold:>9} {:>11} {precision:>10} {recall:>7} {specificity:>12}"
    metrics = dict.fromkeys([metric, "f1", "youden_j", "balanced_accuracy"])
    rows = [(METRICS[own].name, own, summary["by_metric"][own]) for own in metrics]
    if not result.choice.asked.limits:
        rows += [(f"call {rule}", metric, summary[rule] | {"threshold": ""}) for rule in RULES]
    for name, own, found in rows:
        yield line.format(name, shown(found["value"], own), **result.shown(found))
    if metric == "cost":
        own, *others = (summary["n"] * summary[key]["value"] for key in ("best", *RULES))
        others = f"calling everybody or nobody costs {min(others):,.6g} or more"
        yield f"In all it costs {own:,.6g}; {others}."
    if metric == "net_benefit":
        yield "Net benefit compares models, not thresholds: each weighs the errors differently."
    yield result.fill(
        "At {best[threshold]}: hits {tp}, false alarms {fp}, misses {fn}, correct rejections "
        "{tn}.",
        **result.shown(summary["best"]),
    )
    yield result.fill(
        "Over all thresholds: ROC AUC {roc_auc:.4f}, average precision {average_precision:.4f}."
    )
    inside = 0.1 <= summary["best"]["threshold"] <= 0.9 or not summary["probabilities"]
    if not (inside or result.choice.fixed or result.objective.confidence):
        text = "The best threshold lies outside 0.10 to 0.90, so scores of positives were added "
        yield text + "to the table."
    if summary["exact"] and not result.objective.confidence:  # which does not hold for it
        text = "No other distinct score does better."
        if summary["exact"]["grid_loss"]:
            text = "Of all distinct scores, not only the table's, {exact[threshold]} is best: "
            text += "{name} {exact[value]:{form}}. The best of so many is also the luckiest."
        yield result.fill(text)


# %% 3. What moving the threshold does
def tell_trade_off(result):
    """The choice, and ten rows of the table down and up from it: 0.1 on the grid."""
    last, chosen = result.table.threshold.size - 1, result.choice.chosen
    yield "  threshold  precision  recall  false alarms    misses"
    line = "  {threshold:>9} {precision:>10} {recall:>7} {fp:>13} {fn:>9}"
    for index in sorted({max(chosen - 10, 0), chosen, min(chosen + 10, last)}):
        found = row(result.columns, index, result.objective.metric)
        yield line.format(**result.shown(found))


# %% 4. How certain this is
@np.errstate(over="ignore")
def split_groups(cases, table):
    """Cells of each group, shape (G, 2, T + 1); those beyond 2,000 are joined to others."""
    if cases.groups is None:
        return None
    size = table.threshold.size + 1
    cell = np.searchsorted(table.threshold.astype(cases.scores.dtype), cases.scores, side="right")
    cell += size * cases.labels + 2 * size * (cases.groups % 2000)
    number = min(cases.groups.max() + 1, 2000)
    counts = np.bincount(cell, cases.counts, minlength=2 * size * number)
    return counts.reshape(number, 2, size)


def draw(choice, *cuts):
    """Tables that the population may have, given the cases, and the threshold chosen in each.

    Bayesian bootstrap (Rubin 1981): a Gamma draw for each cell of the counts gives its share.
    The thresholds ``cuts`` cut each class into parts, and each part has half a case more
    (Jeffreys' prior): that no error was seen does not mean that none is possible. The time
    does not depend on the number of cases. Groups are drawn as wholes.
    """
    table, clusters = choice.table, choice.clusters
    rng = np.random.default_rng(utils.derive_seed(choice.seed, 1, *cuts))
    cells = table.cells() if clusters is None else np.zeros(clusters.shape[1:])
    prior = np.zeros(cells.shape)
    prior[:, [0, *(cut + 1 for cut in sorted(cuts)[:-1]), -1]] = 0.5
    weights = rng.standard_gamma(cells + prior, (REPLICATES, *cells.shape))
    if clusters is not None:
        shares = rng.standard_exponential((REPLICATES, len(clusters)))
        weights += np.tensordot(shares, clusters, 1)
    drawn = table.redrawn(weights)
    if choice.fixed:
        return drawn, np.full(REPLICATES, choice.chosen)
    values = merits(drawn, choice.objective, choice.allowed)
    return drawn, np.where(values.max(-1) > -np.inf, middle_best(values), choice.chosen)


def evaluate(choice, metric, drawn, picks):
    """A metric in the drawn tables, as it was seen, and by how much luck flatters it.

    Harrell, Lee and Mark (1996): the threshold picked in each drawn table, there and by the
    counts seen; both beside the chosen threshold, whose own excess is chance. What was
    optimised can only be flattered. Where a drawn table has no value, what was seen stands.
    """
    objective, chosen = choice.objective, choice.chosen
    draws, seen = (measure(metric, counts, objective) for counts in (drawn, choice.table))
    draws = np.where(np.isnan(draws), seen, draws)
    there = draws[np.arange(picks.size), picks] - draws[:, chosen]
    lucky = there.mean() - (seen[picks] - seen[chosen]).mean()
    if metric == objective.metric:
        lucky = objective.sign * max(objective.sign * lucky, 0)
    return draws, seen, lucky


def ends(draws, seen, lucky, low=-np.inf, high=np.inf):
    """95% interval of a quantity from its draws, longer on the side of luck, in [low, high].

    How much of the choice was luck is unknown: one end counts on all of it, the other on none.
    What was seen is inside: where no error was, it ends at none (Brown, Cai, DasGupta 2001).
    """
    lower, upper = np.quantile(draws, LEVELS) - (max(lucky, 0), min(lucky, 0))
    return np.array([min(max(lower, low), seen), max(min(upper, high), seen)]) + 0.0  # no -0.0


def certainty(choice):
    """What the counts leave open.

    95% ``intervals`` of the threshold and of metrics at the chosen one, the ``luck`` in those
    metrics, how likely the population keeps the ``limits``, and (2, T) ``bands`` of the metrics.
    """
    table, objective, chosen = choice.table, choice.objective, choice.chosen
    drawn, picks = draw(choice, chosen)
    found = {"intervals": {}, "luck": {}, "bands": {}, "limits": {}}
    thresholds = np.quantile(table.threshold[picks], LEVELS, method="inverted_cdf")
    found["intervals"]["threshold"] = np.sort(objective.orient * thresholds + 0.0)  # no -0.0
    for metric in dict.fromkeys([objective.metric, *RATES, *CURVES, *COMPARED]):
        draws, seen, lucky = evaluate(choice, metric, drawn, picks)
        at = draws[:, chosen]
        found["intervals"][metric] = ends(at, seen[chosen], lucky, draws.min(), draws.max())
        found["luck"][metric] = lucky
        found["bands"][metric] = np.quantile(draws, LEVELS, axis=0)
        for name in (name for name in objective.limits if LIMITS[name] == metric):
            limit, rates = objective.limits[name], at - lucky
            kept = rates <= limit if name.startswith("max") else rates >= limit
            found["limits"][name] = {"limit": limit, "probability": kept.mean()}
    return found


def gain_over(choice, other):
    """How much better the chosen threshold is than another one, which was not chosen.

    Where no threshold is better than another, the drawn tables, which take the counts for the
    truth, show 1 / sqrt(2) of the luck: the interval allows for all of it.
    """
    chosen, metric, sign = choice.chosen, choice.objective.metric, choice.objective.sign
    found = evaluate(choice, metric, *draw(choice, chosen, other))
    draws, seen, lucky = (sign * each for each in found)
    value = seen[chosen] - seen[other]
    interval = ends(draws[:, chosen] - draws[:, other], value, np.sqrt(2) * lucky)
    if chosen == other:
        lucky, interval = 0.0, np.zeros(2)
    return {"value": value, "corrected": value - lucky, "corrected_interval": interval}


def hold_out(cells, share, seed):
    """Deal cases or groups at random into a choosing and a scoring part, (2, T + 1) each."""
    rng = np.random.default_rng(utils.derive_seed(seed, 2))
    if cells.ndim == 3:  # of groups
        scored = rng.random(len(cells)) < share
        return cells[~scored].sum(0), cells[scored].sum(0)
    scoring = rng.binomial(cells.astype(int), share)
    return cells - scoring, scoring


def check_holdout(choice, share):
    """What a threshold chosen on one part of the cases does on the other; None if too few."""
    if choice.fixed or choice.objective.confidence:  # no choice, or one that needs all cases
        return None
    table, objective, default = choice.table, choice.objective, choice.table.half
    cells = table.cells() if choice.clusters is None else choice.clusters
    parts = hold_out(cells, share, choice.seed)
    if min(part.sum(-1).min() for part in parts) == 0:
        return None
    choosing, scoring = (table.redrawn(part) for part in parts)
    values = merits(choosing, objective)
    chosen, good = middle_best(values), goodness(scoring, objective)
    if not np.isfinite(values[chosen]):
        return None
    return row(tabulate(scoring[[chosen]], objective), 0, objective.metric) | {
        "share": share,
        "n": scoring.n.item(),
        "value_where_chosen": objective.sign * values[chosen],
        "gain": None if default is None else good[chosen] - good[default],
    }


def tell_certainty(result):
    """How far the threshold, its value and its rates may be off."""
    best, objective = result.summary["best"], result.objective
    if not result.choice.fixed:
        yield tell_range(result)
    yield result.fill("  at {best[threshold]:<14}   value  95% interval")
    for rate in RATES:
        low, high = map(shown, best[f"{rate}_interval"])
        yield f"  {METRICS[rate].name:<17} {shown(best[rate]):>7}  {low} to {high}"
    kept = "The population keeps {} {limit:g} there with a probability of {}."
    for name, limit in result.summary["limits"].items():
        chance = f"{limit['probability']:.0%}"  # of 2,000 draws
        yield kept.format(option(name), {"0%": "<1%", "100%": ">99%"}.get(chance, chance), **limit)
    if objective.confidence and not result.choice.fixed:
        wrong = 100 * (1 - objective.confidence)
        yield f"Choices like this one break a limit in at most {wrong:.3g}% of all samples."
    held = "Chosen on one part of the cases ({holdout[threshold]}), scored on the other "
    if result.summary["holdout"]:
        yield result.fill(held + "{holdout[n]:,}: {name} {holdout[value]:{form}}.")


def tell_range(result):
    """Which thresholds may be the best, and which are nearly as good."""
    text = ""
    if np.ptp(result.summary["best"]["threshold_interval"]):
        text += "In {replicates:,} redraws of these counts the best threshold is between "
        text += "{best[threshold_interval][0]} and {best[threshold_interval][1]} (95%). "
    if np.ptp([*result.summary["near_optimal"].values()]):
        text += "From {near_optimal[low]} to {near_optimal[high]} the value is within "
        text += "{small_loss:.3g} of the best{those}. "
    text += "Corrected for the luck of the choice, {name} is {best[value_corrected]:{form}}."
    return result.fill(text, those=" of those allowed" if result.objective.limits else "")


# %% 5. Are the scores probabilities?
def by_score(every):
    """Each distinct score, its cases and its positives."""
    positives = -np.diff(every.tp)
    return every.threshold[:-1], positives - np.diff(every.fp), positives


def calibration(every, choice, best):
    """The calibration error beside chance, and what the theory of true probabilities says."""
    if not every.probabilities:
        return None
    found = utils.calibration(*by_score(every), choice.seed)
    if choice.clusters is not None:  # chance is that of independent cases
        found |= {"ece_by_chance": None, "miscalibrated": None}
    return found | check_theory(choice, best)


def check_theory(choice, best):
    """Where calibrated probabilities would have the optimum, and what using it loses.

    F1: half the best F1 (Lipton, Elkan and Naryanaswamy 2014). Cost: c_FP / (c_FP + c_FN)
    (Elkan 2001). None where neither is known to hold.
    """
    o, found = choice.objective, (None, None, None)
    rules = {"f1": best["f1"] / 2, "cost": o.fp_cost / (o.fp_cost + o.fn_cost)}
    if o.metric in rules and not (o.limits or o.prevalence or choice.fixed):
        expected = rules[o.metric]
        loss = gain_over(choice, abs(choice.table.threshold - expected).argmin())
        found = expected, loss["value"], loss["corrected_interval"]
    return dict(zip(["expected_threshold", "expected_loss", "expected_loss_interval"], found))


OFF = "They are off by {ece} on average"
CHANCE = OFF + " (calibrated scores: {low} to {high} by chance): "
MISCALIBRATED = {
    None: OFF + ". How much of it is chance is not known where cases depend on each other.",
    True: CHANCE + "calibrate them on held-out cases (Platt scaling, isotonic regression).",
    False: CHANCE + "no sign of miscalibration.",
}
THEORY = "If they were true probabilities, {rule} ({expected}) would be the best threshold; "
THEORY += "choosing it loses {calibration[expected_loss]:{form}} (95% interval "
THEORY += "{calibration[expected_loss_interval][0]:{form}} to "
THEORY += "{calibration[expected_loss_interval][1]:{form}})."


def tell_calibration(result):
    """The calibration error beside chance, and what the theory of true probabilities says."""
    if (found := result.summary["calibration"]) is None:
        low = result.objective.lower_is_positive
        yield "No: low ones mean positive." if low else "No: some lie outside [0, 1]."
        return
    if result.objective.prevalence:
        yield "This is about the cases as they were observed."
    by_chance = found["ece_by_chance"] if result.choice.clusters is None else (None, None)
    ece, low, high = map(shown, (found["ece"], *by_chance))
    yield result.fill(MISCALIBRATED[found["miscalibrated"]], ece=ece, low=low, high=high)
    if found["expected_threshold"] is not None:
        rule = "half the best F1" if result.objective.metric == "f1" else "c_FP/(c_FP + c_FN)"
        yield result.fill(THEORY, rule=rule, expected=shown(found["expected_threshold"]))


# %% 6. Other class balances
def other_balances(table, objective):
    """Best threshold, its value and that at 0.5 if other shares of cases were positive."""
    default, rows = table.half, []
    for share in BALANCES:
        there = replace(objective.unlimited, prevalence=share)
        best, value = middle_best(merits(table, there)), measure(there.metric, table, there)
        found = {"prevalence": share, "threshold": objective.orient * table.threshold[best] + 0.0}
        plain = None if default is None else value[default]
        rows.append(found | {"value": value[best], "value_at_default": plain})
    return rows


def tell_balances(result):
    """One row for each share of positives."""
    yield "  positives  threshold        best      at 0.5"
    for share, threshold, *values in (found.values() for found in result.summary["balances"]):
        best, plain = (shown(value, result.objective.metric) for value in values)
        yield f"  {share:>9.0%} {threshold:>10} {best:>11} {plain:>11}"


# %% 7. What the errors suggest
def dominant_error(choice):
    """The error that is over 1.5 times the other, by cost if that is the metric, or None."""
    objective = choice.objective
    counts = choice.table[[choice.chosen]].at_prevalence(objective.prevalence)
    alarms, misses = counts.fp.item(), counts.fn.item()
    if objective.metric == "cost":
        alarms, misses = objective.fp_cost * alarms, objective.fn_cost * misses
    if max(alarms, misses) <= 1.5 * min(alarms, misses):
        return None
    return "false_alarms" if alarms > misses else "misses"


ERRORS = {
    None: "The errors are in balance",
    "false_alarms": "False alarms prevail",
    "misses": "Misses prevail",
}
ADVICE = {
    None: "only better scores remove both kinds.",
    "false_alarms": "look for wrong labels among the highest-scoring negatives.",
    "misses": "look for a missing feature in the lowest-scoring positives.",
}
BOUND = "another threshold or limit shifts that; only better scores remove both kinds."


def tell_errors(result):
    """What to try next, from this run's false positives and false negatives."""
    best, error = result.summary["best"], result.summary["dominant_error"]
    if best["fp"] + best["fn"] == 0:
        yield "There are no errors at the chosen threshold among these cases."
        return
    bound = error and (result.choice.fixed or result.objective.limits)
    text = ERRORS[error] + " by cost" * (result.objective.metric == "cost")
    text += " (false alarms: {fp}, misses: {fn}): " + (BOUND if bound else ADVICE[error])
    yield text.format(**result.shown(best))


# %% 8. Files and figures
def save(result, folder):
    """Write the table, the summary and, if they were simulated, the scores."""
    utils.write_csv(folder / "thresholds.csv", result.columns)
    utils.write_json(folder / "summary.json", result.summary)
    say("  thresholds.csv", "  summary.json")
    if result.summary["scenario"]:
        cases = {"y_true": result.cases.labels.astype(int), "y_score": result.cases.scores}
        utils.write_csv(folder / "scores.csv", cases)
        say("  scores.csv")


def bin_edges(every, threshold):
    """Edges of 60 bins or so, one at the threshold: a sliver beside it would be a spike."""
    low, high = every.threshold[[0, -2]]
    width = high / 60 - low / 60
    if width <= 1e-12 * max(abs(low), abs(high)):  # all are equal
        width = max(abs(high), 1) / 60
    start = threshold if low - width <= threshold <= high + width else low
    first, last = np.floor([low / width - start / width, high / width - start / width])
    return start + width * np.arange(min(first, 0), max(last + 1, 0) + 1)


CURVES = ("precision", "recall", "f1")  # of the second figure
COMPARED = ("f1", "youden_j", "balanced_accuracy", "mcc")  # of the fifth
CHOSEN = "chosen {best[threshold]} ({name} {best[value]:{form}})"
NOBODY = "At {best[threshold]} nobody is called positive"
SQUARE = {"xlim": (-0.01, 1.01), "ylim": (-0.01, 1.01), "aspect": "equal"}


def plot_outcomes(plt, result):
    """The scores of both classes, split by the threshold into the four outcomes."""
    bars, best, orient = result.bars, result.summary["best"], result.objective.orient
    x, shares = orient * bars.threshold, bars.cells()[:, 1:-1] / [[bars.neg], [bars.pos]]
    cut = abs(x - best["threshold"]).argmin()
    counts, left, right = result.shown(best), slice(0, cut + 1), slice(cut, None)
    figure, axes = plt.subplots()
    for name, key, sign, part, color in (
        ("hits", "tp", 1, right, BLUE),
        ("misses", "fn", 1, left, ORANGE),
        ("false alarms", "fp", -1, right, RED),
        ("correct rejections", "tn", -1, left, SKY),
    ):
        edges = x[part]
        heights = sign * shares[int(sign > 0), part][: edges.size - 1] / abs(np.diff(edges))
        if heights.size:  # nothing is where everybody or nobody is called positive
            axes.stairs(heights, edges, fill=True, color=color, label=f"{name}: {counts[key]}")
    axes.axvline(best["threshold"], color=BLACK, lw=1.5, label=result.fill(CHOSEN))
    axes.axhline(0, color=BLACK, lw=0.8)
    title = f"{1 - best['recall']:.1%} of the positives are missed, "
    title += f"{1 - best['specificity']:.1%} of the negatives are called"
    label = "negatives below, positives above\n(each class has area 1)"
    axes.set(xlabel="score", ylabel=label, yticks=[], title=title)
    return figure


def plot_metrics(plt, result):
    """Precision, recall and F1 against the threshold."""
    title = "At {best[threshold]}, {best[precision]:.1%} of the alerts are right, and "
    title += "{best[recall]:.1%} of the positives found"
    points = dict.fromkeys(CURVES, best := result.summary["best"])
    title = title if best["alert_rate"] else NOBODY
    return plot_thresholds(plt, result, points, result.fill(title))


def plot_comparison(plt, result):
    """The metrics that people choose by, and the best threshold of each."""
    metrics = dict.fromkeys([*COMPARED, result.objective.metric])
    points = {metric: result.summary["by_metric"][metric] for metric in metrics}
    places = [point["threshold"] for point in points.values()]
    title = f"The best thresholds of these metrics (dots) lie from {min(places)} to {max(places)}"
    if min(places) == max(places):
        title = f"The best threshold of all these metrics (dots) is {places[0]}"
    return plot_thresholds(plt, result, points, title)


def plot_thresholds(plt, result, points, title):
    """Metrics against the threshold with 95% bands and the dots given in ``points``."""
    x, best = result.columns["threshold"], result.summary["best"]["threshold"]
    figure, axes = plt.subplots()
    for metric, point in points.items():
        color, style = METRICS[metric].style
        scale = axes.twinx() if metric == "cost" else axes  # money has its own axis
        scale.plot(x, result.columns[metric], style, color=color)
        scale.fill_between(x, *result.bands[metric], color=color, alpha=0.15, lw=0)
        scale.plot(point["threshold"], point[metric], "o", color=color)
        axes.plot([], [], style, color=color, label=METRICS[metric].name)
        if metric == "cost":
            scale.set_ylabel("cost per case", color=color)
            scale.grid(visible=False)
    axes.axvline(best, color=BLACK, lw=1, ls="--", label=result.fill(CHOSEN))
    if result.table.probabilities:
        axes.axvline(0.5, color="gray", lw=1.5, ls=":", label="default 0.5")
    axes.set(xlabel="threshold", ylabel="value, with 95% band", title=title)
    return figure


def plot_precision_recall(plt, result):
    """Precision against recall, with the chosen point."""
    best, objective = result.summary["best"], result.objective
    recall, precision = (measure(m, result.curve, objective) for m in ("recall", "precision"))
    precision[-1] = 1  # where nobody is called positive, no alert is wrong
    chance = precision[0]  # where everybody is
    figure, axes = plt.subplots(figsize=(6.4, 6))
    label = result.fill("precision-recall (AP = {average_precision:.2f})")
    axes.plot(recall, precision, color=BLUE, drawstyle="steps-post", label=label)
    axes.axhline(chance, ls="--", color="gray", label=f"chance level (AP = {chance:.2f})")
    axes.plot(best["recall"], best["precision"], "o", color=RED, label=result.fill(CHOSEN))
    title = "At recall {best[recall]:.3f}, {best[precision]:.1%} of the alerts are right"
    title = result.fill(title if best["alert_rate"] else NOBODY)
    axes.set(xlabel="recall", ylabel="precision", title=title, **SQUARE)
    return figure


def plot_roc(plt, result):
    """True against false positive rate, with the chosen point."""
    best, curve = result.summary["best"], result.curve
    figure, axes = plt.subplots(figsize=(6.4, 6))
    axes.plot(curve.fpr, curve.tpr, color=BLUE, label=result.fill("ROC (AUC = {roc_auc:.2f})"))
    axes.plot([0, 1], [0, 1], "--", color="gray", label="chance level (AUC = 0.5)")
    axes.plot(1 - best["specificity"], best["recall"], "o", color=RED, label=result.fill(CHOSEN))
    axes.set(xlabel="false positive rate", ylabel="true positive rate (recall)", **SQUARE)
    axes.set_title(result.fill("A positive outscores a negative in {roc_auc:.1%} of pairs (AUC)"))
    return figure


def plot_reliability(plt, result):
    """Share of positives against the mean score, above the number of cases."""
    if result.reliability is None:
        return None
    figure, (axes, below) = plt.subplots(2, sharex=True, figsize=(6.4, 6), height_ratios=(3, 1))
    utils.draw_reliability(axes, result.reliability, band=result.choice.clusters is None)
    ece = shown(result.summary["calibration"]["ece"])
    axes.set_title(f"As probabilities, the scores are off by {ece} on average")
    edges, cases = result.bars.threshold, result.bars.cells().sum(0)[1:-1]
    below.stairs(cases / np.diff(edges), edges, fill=True, color=SKY)
    below.set(xlabel="score", ylabel="cases", xlim=(0, 1), yticks=[])
    return figure


FIGURES = {
    "01_outcomes": plot_outcomes,
    "02_precision_recall_f1_vs_threshold": plot_metrics,
    "03_precision_recall_curve": plot_precision_recall,
    "04_roc_curve": plot_roc,
    "05_metric_comparison": plot_comparison,
    "06_reliability": plot_reliability,
}


# %% Command line
def parse_arguments(argv):
    """The options; --help shows them with their defaults."""
    how = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = utils.Parser(description="Find the best threshold of a binary classifier.", **how)
    number, share, path = utils.number, utils.number(0, 1, "()"), utils.user_path
    add = parser.add_argument_group("simulated scores").add_argument
    add("--scenario", choices=SCENARIOS, default="balanced", help="score distributions")
    add("--n-samples", type=utils.integer(2), default=10_000, help="number of cases")
    add("--positive-rate", type=share, default=0.3, help="share of positives")
    add = parser.add_argument_group("your own scores").add_argument
    add("--scores", type=path, help="CSV (also .gz, .bz2, .xz), NPZ or NPY file; - for stdin")
    add("--label-column", help="column or array of the labels, else y_true or found by values")
    add("--score-column", help="column or array of the scores, else y_score or found by values")
    add("--positive", help="label that is positive; every other one is negative")
    add("--lower-is-positive", action="store_true", help="low scores mean positive")
    add("--count-column", help="how many cases a row stands for")
    add("--group-column", help="person, place or day; cases of one are resampled together")
    add("--test", type=path, help="judge the choice on the cases of another file")
    add = parser.add_argument_group("what is best").add_argument
    add("--metric", type=metric_name, choices=METRICS, default="f1", help="what to optimise")
    add("--beta", type=number(0, 1000, "(]"), default=2.0, help="weight of recall in f_beta")
    add("--fp-cost", type=number(0, 1e9), default=1.0, help="cost of a false alarm")
    add("--fn-cost", type=number(0, 1e9), default=1.0, help="cost of a miss")
    for name, rate in LIMITS.items():
        add(option(name), type=number(0, 1), help=f"limit on the {METRICS[rate].name}")
    add("--confidence", type=share, help="confidence with which the limits are kept")
    add("--prevalence", type=share, help="share of positives where it will be used")
    add("--exact", action="store_true", help="also search all distinct scores, of any range")
    add("--threshold", type=number(-1e300, 1e300), help="judge this one instead of choosing")
    add = parser.add_argument_group("run").add_argument
    add("--holdout", type=share, default=0.5, help="share of cases kept back to judge the choice")
    add("--seed", type=utils.integer(0, 2**128), default=42, help="of simulation and resampling")
    add("--output-dir", type=path, default=Path("outputs/part1"), help="where to write")
    add("--show", action="store_true", help="also show the plots in windows")
    arguments = parser.parse_args(argv)
    check_arguments(arguments, parser.get_default)
    arguments.show = arguments.show and utils.can_show()
    return arguments


def metric_name(text):
    """The key of a metric, of which the console shows the name."""
    return {m.name.lower(): key for key, m in METRICS.items()}.get(text.lower(), text.lower())


OF_FILES = "label_column score_column positive lower_is_positive count_column group_column test"


def check_arguments(a, default):
    """Refuse options that contradict each other or have no effect."""
    given = [name for name in vars(a) if getattr(a, name) != default(name)]
    judged = a.threshold is not None or a.test or a.confidence
    for names, wrong, why in (
        (OF_FILES, not a.scores, "has no effect without --scores"),
        ("scenario n_samples positive_rate", a.scores, "has no effect beside --scores"),
        ("fp_cost fn_cost", a.metric != "cost", "has no effect without --metric cost"),
        ("beta", a.metric != "f_beta", "has no effect without --metric f_beta"),
        ("confidence", not {*given} & {*LIMITS}, "has no effect without a limit (--min-recall)"),
        ("threshold", a.test, "has no effect beside --test"),
        ("holdout", judged, "has no effect beside --threshold, --test or --confidence"),
        ("prevalence group_column threshold", a.confidence, "does not go with --confidence"),
    ):
        for name in (name for name in given if wrong and name in names.split()):
            raise UserError(f"{option(name)} {why}: leave it out")
    if a.fp_cost + a.fn_cost == 0:
        raise UserError("--fp-cost and --fn-cost are both 0: give one of them a value")


if __name__ == "__main__" and not hasattr(sys, "ps1"):  # not as a notebook's cells
    sys.exit(main())
