"""Time and memory of part1_threshold.py beside the plain ways, in one run.

    python tests/bench_part1.py                    ten million scores, some minutes
    python tests/bench_part1.py --n 1000000        a tenth of that

Alternatives take turns within each repeat, so that both meet the same load;
times are medians. Memory is the peak above what was there before.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parent.parent / "part1_threshold.py"
sys.path.insert(0, str(SCRIPT.parent))

from part1_threshold import (  # noqa: E402
    GRID,
    METRICS,
    REPLICATES,
    Choice,
    Objective,
    certainty,
    count_every_score,
    find_best,
    gain_over,
    lay_table,
    simulate_scores,
    tabulate,
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


def main():
    parser = argparse.ArgumentParser(description="Time and memory of part 1.")
    parser.add_argument("--n", type=int, default=10_000_000, help="scores (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
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
