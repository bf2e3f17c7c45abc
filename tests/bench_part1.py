"""Time and memory of part1_threshold.py beside the plain ways, or how often it is right.

    python tests/bench_part1.py                    ten million scores, some minutes
    python tests/bench_part1.py --n 1000000        a tenth of that
    python tests/bench_part1.py --coverage         simulated truth, 15 minutes

Alternatives take turns within each repeat, so that both meet the same load;
times are medians. Memory is the peak above what was there before.

The coverage comes from populations whose tails are known, so that the truth is known at every
threshold; each sample holds both classes. A star marks what misses its goal.
"""

import argparse
import itertools
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import stats

SCRIPT = Path(__file__).resolve().parent.parent / "part1_threshold.py"
sys.path.insert(0, str(SCRIPT.parent))

import part1_threshold as part1  # noqa: E402
from part1_threshold import (  # noqa: E402
    GRID,
    LEVELS,
    METRICS,
    RATES,
    REPLICATES,
    Choice,
    Counts,
    Objective,
    calibration,
    certainty,
    count_every_score,
    find_best,
    gain_over,
    goodness,
    lay_table,
    measure,
    promised,
    shortfall,
    simulate_scores,
    small_loss,
    tabulate,
    weigh,
)
from utils import Cases  # noqa: E402


def row(what, seconds, remark=""):
    print(f"{what:<58} {seconds:>9.4f} s  {remark}".rstrip(), flush=True)


def medians(repeats, *functions):
    """Median seconds of each function; one round without a clock comes first."""
    seconds = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, taken in zip(functions, seconds):
            start = time.perf_counter()
            function()
            if repeat:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def extra_memory(function, labels, scores):
    """Peak of what ``function`` allocates, as a multiple of its input."""
    tracemalloc.start()
    function(labels, scores)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return f"extra memory {peak / (labels.nbytes + scores.nbytes):.2f} x input"


def table_of(labels, scores):
    """Counts at the thresholds that a run chooses from."""
    every = count_every_score(Cases(labels, scores), Objective())
    return lay_table(every, find_best(every, Objective()), scores.dtype, Objective())[1]


def sweep(labels, scores):
    return tabulate(table_of(labels, scores), Objective())


def plain_sweep(labels, scores):
    """The table's counts alone, without those of every score."""
    index = np.searchsorted(GRID, scores, side="right") + (GRID.size + 1) * labels
    return np.bincount(index, minlength=2 * (GRID.size + 1))


def run_script(*arguments):
    """Seconds and peak resident bytes of the script as a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, SCRIPT, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{SCRIPT.name} {arguments} ended with status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit


def write_scores(path, n):
    labels, scores = simulate_scores(n, 0.3, "balanced", 0)
    np.savez(path, y_true=labels, y_score=scores)


def bench_whole_runs(n):
    with tempfile.TemporaryDirectory() as folder:
        path, out = os.path.join(folder, "scores.npz"), ("--output-dir", os.path.join(folder, "o"))
        # Written by another process: on Linux a child's peak includes its parent's.
        writer = multiprocessing.get_context("spawn").Process(target=write_scores, args=(path, n))
        writer.start()
        writer.join()
        seconds, peak = map(statistics.median, zip(*(run_script(*out) for _ in range(3))))
        row("default run, imports and plots included", seconds, f"peak {peak / 1e9:.2f} GB")
        seconds, peak = run_script("--scores", path, *out)
        row(f"{n:.0e}: whole run on an NPZ file (once)", seconds, f"peak {peak / 1e9:.2f} GB")


def bench_numpy(labels, scores, repeats):
    n, rivals = f"{scores.size:.0e}", (sweep, plain_sweep)
    every = count_every_score(Cases(labels, scores), Objective())
    best = find_best(every, Objective())
    ours, plain, sort, table, exact = medians(
        repeats,
        *(lambda f=f: f(labels, scores) for f in rivals),
        lambda: np.sort(scores),
        lambda: tabulate(lay_table(every, best, scores.dtype, Objective())[1], Objective()),
        lambda: find_best(every, Objective()),
    )
    memory = [extra_memory(rival, labels, scores) for rival in rivals]
    row(f"{n}: count every score, table of {len(METRICS)} metrics", ours, memory[0])
    row(f"{n}: the table alone, once every score is counted", table)
    row(f"{n}: searchsorted + bincount, no metrics", plain, f"{memory[1]}")
    row(f"{n}: one np.sort", sort, f"the first row takes {ours / sort:.2f} of it")
    row(f"{n}: best of {every.threshold.size - 1:,} distinct scores, once counted", exact)


def bench_certainty(labels, scores, repeats):
    table = table_of(labels, scores)
    choice = Choice(table, Objective(), find_best(table, Objective()))
    both = medians(
        repeats,
        lambda: certainty(choice),
        lambda: gain_over(choice, 0),
    )
    row(f"{scores.size:.0e}: intervals of {REPLICATES:,} drawn tables", both[0])
    row(f"{scores.size:.0e}: interval of the gain, likewise", both[1])


def bench_sklearn(labels, scores, repeats):
    from sklearn import metrics as sk

    names = ["f1", "precision", "recall", "balanced_accuracy", "accuracy"]
    functions = {name: getattr(sk, f"{name}_score") for name in names}
    n, found = f"{scores.size:.0e}", sweep(labels, scores)
    (ours,) = medians(repeats, lambda: sweep(labels, scores))
    row(f"{n}: count every score, table of {len(METRICS)} metrics", ours)
    for chosen, step in (names[:1], 1), (names, 9):
        start = time.perf_counter()
        for i in range(0, GRID.size, step):
            for name in chosen:
                value = functions[name](labels, scores >= GRID[i])
                assert np.isclose(value, found[name][i]), (name, GRID[i])
        taken = (time.perf_counter() - start) * step
        what = f"{n}: 81 x sklearn {'f1_score' if step == 1 else 'five metrics'}, once"
        how = "" if step == 1 else f" (estimate: {step} x every {step}th threshold)"
        row(what, taken, f"{taken / ours:,.0f} times that{how}")


# %% How often the intervals, limits and calibration verdicts are right
def beta(positive, negative):
    return stats.beta(*positive).sf(GRID), stats.beta(*negative).sf(GRID)


def logit_normal(positive, negative):
    logits = np.log(GRID / (1 - GRID))
    return stats.norm(*positive).sf(logits), stats.norm(*negative).sf(logits)


POPULATIONS = {  # tpr and fpr, share of positives in the sample, --prevalence
    "30% positives": (beta((6, 3), (3, 8)), 0.3, None),
    "5% positives": (beta((6, 3), (3, 8)), 0.05, None),
    "nearly separable": (beta((20, 4), (4, 20)), 0.3, None),
    "no skill": (beta((4, 4), (4, 4)), 0.3, None),
    "prevalence 0.05": (beta((6, 3), (3, 8)), 0.3, 0.05),
    "prevalence 0.001": (beta((6, 3), (3, 8)), 0.3, 0.001),
    "underconfident": (logit_normal((0.5, 1.1), (-2.5, 1.1)), 0.3, None),
}
JUDGED = ("f1", "youden_j", "mcc", "balanced_accuracy", "cost")
SIZES = (50, 200, 1000, 10_000)
HALF = int(GRID.searchsorted(0.5))


def truth(name):
    (tpr, fpr), share, _ = POPULATIONS[name]
    return Counts(GRID, share * tpr, (1 - share) * fpr, share, 1 - share)


def samples(name, n, draws, rng):
    """Count tables of ``draws`` samples that hold both classes."""
    chances = truth(name).cells().ravel()
    while draws:
        cells = rng.multinomial(n, chances / chances.sum()).reshape(2, -1)
        if cells.sum(1).all():
            draws -= 1
            table = truth(name).redrawn(cells)
            yield replace(table, pos=table.pos.item(), neg=table.neg.item())


def goal(figure, met):
    return f"{figure:6.3f}{' ' if met else '*'}"


def share_of(hits, among, least):
    """Share of ``hits`` where there are enough to ask, otherwise NaN."""
    return hits[among].mean() if among.sum() >= least else np.nan


def cover_values(draws):
    print("\ncoverage of the value, its median width over the spread of the estimate at that")
    print("threshold, coverage of precision, recall, specificity, alert rate and of the gain;")
    print("gains claimed where there is none, and found where there is more than 0.05")
    for name, n, metric in itertools.product(POPULATIONS, SIZES, JUDGED):
        rng = np.random.default_rng([n, *name.encode(), *metric.encode()])
        prevalence = POPULATIONS[name][2]
        objective = Objective(metric, fn_cost=5, prevalence=prevalence)
        true = {m: measure(m, truth(name), objective) for m in (metric, *RATES)}
        good = goodness(truth(name), objective)
        spread = [measure(metric, table, objective) for table in samples(name, n, 1000, rng)]
        spread = np.ptp(np.quantile(spread, LEVELS, axis=0), axis=0)
        rows = []
        for seed, table in enumerate(samples(name, n, draws, rng)):
            choice = Choice(table, objective, find_best(table, objective), seed)
            at, found = choice.chosen, certainty(choice)["intervals"]
            inside = [low - 1e-9 <= true[m][at] <= high + 1e-9
                      for m, (low, high) in ((m, found[m]) for m in true)]  # fmt: skip
            gain, real = gain_over(choice, HALF), good[at] - good[HALF]
            low, high = gain["corrected_interval"]
            width = np.ptp(found[metric]) / spread[at] if spread[at] else np.inf
            pays = weigh(gain, small_loss(table, objective), n, True)["verdict"] == "pays"
            rows.append([*inside, width, low - 1e-9 <= real <= high + 1e-9, real, low > 0, pays])
        rows = np.array(rows, float)
        *inside, _, gain, _, _, _ = rows.mean(0)
        width, real = np.median(rows[:, 5]), rows[:, 7]
        claimed = share_of(rows[:, 8], real <= 1e-12, draws / 8)
        found = share_of(rows[:, 9], real > 0.05, draws / 8)
        least, asked = (
            0.925 if n >= 200 else 0.9,
            n == 1000 and name in ("30% positives", "underconfident"),
        )
        print(
            f"{name:17}{n:6} {metric:18}{goal(inside[0], inside[0] >= least)}"
            f"{goal(width, width <= 1.3)} {' '.join(f'{x:.2f}' for x in inside[1:])} "
            f"{goal(gain, gain >= least)}{goal(claimed, not claimed > 0.05)}"
            f"{goal(found, not (asked and found < 0.8))}",
            flush=True,
        )


LIMITED = ("30% positives", "5% positives", "underconfident")
# Drawn anew for each sample, so that no single threshold of the grid decides.
RANGES = {"min_precision": (0.7, 0.97), "min_recall": (0.7, 0.97), "max_alert_rate": (0.1, 0.4)}
PROMISES = (
    {"min_precision": 0.7}, {"min_precision": 0.8}, {"min_precision": 0.9}, {"min_recall": 0.8},
    {"max_alert_rate": 0.3}, {"min_precision": 0.7, "min_recall": 0.6},
    {"min_precision": 0.6, "min_recall": 0.6, "max_alert_rate": 0.4},
)  # fmt: skip


def cover_limits(draws):
    print("\nlimits, best by F1: share kept in the population, mean probability stated")
    for name, limit, n in itertools.product(LIMITED, RANGES, (300, 1000, 10_000)):
        rng, kept, stated = np.random.default_rng([n, *name.encode(), *limit.encode()]), [], []
        for seed, table in enumerate(samples(name, n, draws, rng)):
            objective = Objective(**{limit: rng.uniform(*RANGES[limit])})
            if (shortfall(table, objective) == 0).any():
                choice = Choice(table, objective, find_best(table, objective), seed)
                kept.append(shortfall(truth(name), objective)[choice.chosen] == 0)
                stated.append(certainty(choice)["limits"][limit]["probability"])
        off = abs(np.mean(stated) - np.mean(kept))
        said = goal(np.mean(stated), off <= 0.05)
        print(f"{name:15}{n:6} {limit:15} {np.mean(kept):.3f} {said}", flush=True)


def cover_promises(draws):
    print("\n--confidence 0.9: share of all runs with a limit broken, and with an answer")
    for name, limits, n in itertools.product(LIMITED, PROMISES, (200, 1000, 10_000)):
        rng = np.random.default_rng([n, *name.encode()])
        objective, broken, answers = Objective(**limits, confidence=0.9), 0, 0
        keeps = shortfall(truth(name), objective) == 0
        for table in samples(name, n, draws, rng):
            if (allowed := promised(table, objective)).any():
                answers += 1
                broken += not keeps[find_best(table, objective, allowed)]
        what = ", ".join(f"{key} {value}" for key, value in limits.items())
        broken = goal(broken / draws, broken <= 0.1 * draws)
        print(f"{name:15}{n:6} {what:52} {broken} {answers / draws:.3f}", flush=True)


CALIBRATED = {
    "logit-normal": lambda rng, n: 1 / (1 + np.exp(-rng.normal(-1, 2.5, n))),
    "rare": lambda rng, n: rng.beta(0.3, 15, n),
    "one decimal": lambda rng, n: rng.random(n).round(1),
}


def cover_calibration(draws):
    print("\nshare of samples that are called miscalibrated (calibrated ones: at most 5%)")
    for kind, n in itertools.product((*CALIBRATED, "underconfident"), (100, 300, 1000, 10_000)):
        rng, said = np.random.default_rng([n, *kind.encode()]), 0
        for seed in range(draws):
            if kind in CALIBRATED:
                scores = CALIBRATED[kind](rng, n)
                labels = rng.random(n) < scores
            else:
                labels, scores = simulate_scores(n, 0.3, kind, seed)
            every = count_every_score(Cases(labels, scores), Objective())
            said += calibration(every, Choice(every, Objective("mcc"), 0, seed), {"f1": 1})[
                "miscalibrated"
            ]
        met = said <= 0.05 * draws if kind in CALIBRATED else n != 1000 or said >= 0.95 * draws
        print(f"{kind:17}{n:6} {goal(said / draws, met)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Time and memory of part 1.")
    parser.add_argument("--n", type=int, default=10_000_000, help="scores (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--coverage", action="store_true", help="simulate how often it is right")
    parser.add_argument("--draws", type=int, default=400, help="a cell (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.coverage:
        part1.REPLICATES = 500  # of 2,000: the ends of an interval vary a little more
        part1.CURVES = part1.COMPARED = ()  # no bands for figures
        cover_values(arguments.draws)
        cover_limits(arguments.draws)
        cover_promises(arguments.draws)
        cover_calibration(arguments.draws)
        return
    print(f"Python {platform.python_version()}, numpy {np.__version__}, {os.cpu_count()} cores")
    bench_whole_runs(arguments.n)
    labels, scores = simulate_scores(arguments.n, 0.3, "balanced", 0)
    bench_numpy(labels, scores, arguments.repeats)
    for n in (10_000, arguments.n):
        bench_certainty(labels[:n], scores[:n], arguments.repeats)
    n = min(arguments.n, 1_000_000)
    bench_sklearn(labels[:n], scores[:n], arguments.repeats)


if __name__ == "__main__":
    main()
