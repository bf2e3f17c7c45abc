"""Measure what each flag of part 2 buys: one row of a table for each run.

    python tests/ablation.py --data-dir data                          every run, most of a day
    python tests/ablation.py --data-dir data --presets strong --changes none --seeds 0
    python tests/ablation.py --report                                 tables and plot only

Each run trains on all training images, keeps its last epoch and is tested once. Its row is
added to outputs/ablation/results.csv when it ends; runs that have a row are not made again.
A row is known by preset, changed flags, seed and machine; so when a preset or the training
itself changes, delete its rows and the checkpoints of its runs. A run that was stopped
continues after its last epoch: its checkpoints are kept in a folder beside that of the table,
named like it with "-runs" at the end.

The report writes tables.md and gains.csv, which part 2 prints at its end: points over the
baseline of the same machine and seed, the most points for their time first.
"""

import argparse
import math
import sys
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_part2 import matmul_peak  # noqa: E402

import part2_cifar_cnn as part2  # noqa: E402
from utils import (  # noqa: E402
    BLUE,
    ORANGE,
    Interrupted,
    Parser,
    RunFailed,
    UserError,
    command,
    draw_figures,
    integer,
    output_folder,
    processor,
    read_csv,
    say,
    write_csv,
)

TABLE = Path(part2.GAINS).with_name("results.csv")
# What is changed, one thing at a time; lr and momentum go with the optimizer they suit, and
# "evaluate" averages the runs of that many seeds.
CHANGES = {
    "baseline": [
        {}, {"dropout": 0.1}, {"crop_padding": 0}, {"crop_fill": "reflect"}, {"flip": "none"},
        {"flip": "alternating"}, {"cutout": 8}, {"mixup": 0.2}, {"schedule": "cosine"},
        {"schedule": "linear"}, {"warmup_epochs": 2.0}, {"weight_decay": 0.0005},
        {"optimizer": "adamw", "weight_decay": 0.01}, {"optimizer": "sgd", "lr": 0.05},
        {"optimizer": "muon", "lr": 0.1, "momentum": 0.6}, {"label_smoothing": 0.1},
        {"grad_clip": 1.0}, {"ema": 0.99}, {"tta": "flip"}, {"tta": "shift"}, {"epochs": 20},
        {"model": "tuned"}, {"evaluate": 3},
        {"lr": 0.00137, "warmup_epochs": 0.6, "dropout": 0.005, "batch_size": 64},
        {"epochs": 20, "schedule": "cosine"}, {"epochs": 20, "schedule": "cosine", "snapshots": 4},
    ],
    "tuned": [{}, {"tta": "none"}],
    "strong": [
        {}, {"tta": "none"}, {"tta_below": 1.0}, {"optimizer": "adamw", "lr": 0.002},
        {"label_smoothing": 0.0}, {"flip": "random"}, {"schedule": "none"},
    ],
    "resnet18": [{}],
    "long": [{}],
    "transfer": [{}, {"unfreeze": "none", "epochs": 2, "image_size": "96"}],
    "lite0": [{}, {"unfreeze": "none", "epochs": 2, "image_size": "96"}],  # see tests/lite0.py
}  # fmt: skip

# The strategies of the table, and the settings that belong to each; the first that fits counts.
STRATEGIES = {
    "several at once, found by a search": {"batch_size"},
    "snapshots of one training": {"snapshots"},
    "another network": {"preset", "model"},
    "longer training": {"epochs"},
    "several networks": {"evaluate"},
    "less dropout": {"dropout"},
    "shifts and mirrors": {"crop_padding", "crop_fill", "flip"},
    "cutout and mixup": {"cutout", "mixup"},
    "another course of the learning rate": {"warmup_epochs", "schedule"},
    "another optimizer, decay, clipping": {"optimizer", "weight_decay", "grad_clip"},
    "softer labels": {"label_smoothing"},
    "averages of weights or of views": {"ema", "tta", "tta_below"},
}

# Name, test accuracy in percent, seconds of training as published, on what, PFLOP if published;
# place of the label in the two panels, in points.
PUBLISHED = (
    ("hiverge cifar10-speedrun", 94.01, 2.0, "A100", 0.26, (10, -44), (-10, 20)),
    ("airbench94, Muon", 94.01, 2.6, "A100", 0.29, (0, -31), (4, 8)),
    ("airbench94", 94.01, 3.8, "A100", 0.36, (-14, -18), (50, -3)),
    ("airbench95", 95.01, 10.4, "A100", 1.4, (-32, 6), (0, 10)),
    ("airbench96, filtered data", 96.00, 27.3, "A100", 3.1, (0, 22), (0, -18)),
    ("airbench96", 96.03, 34.7, "A100", 4.9, (4, 10), (0, 10)),
    ("cifar10-fast", 94.1, 26, "V100", None, (32, 5), None),
    ("slatteryjim, two convolutions", 71.87, 197, "8-core Ryzen", None, (0, 10), None),
)
# What is drawn at a preset, and the places; the others have their name below.
LABELS = {
    "long": ("long", (42, -4), (-42, -4)),
    "transfer": ("transfer, from ImageNet", (-20, 9), (30, 9)),
    "lite0": ("lite0, from ImageNet", (-20, 9), (30, 9)),
}


@command
def main(argv=None):
    """Make the runs that the table lacks, then report."""
    a = parse_arguments(argv)
    if not a.report:
        measure(a)
    rows = read_table(a.table)
    gains = measured_gains(rows)
    if gains:
        report(rows, gains, a.table)
    elif a.report:
        raise UserError(f"{a.table} has no baseline on CIFAR-10: make one to compare with")


def parse_arguments(argv):
    """Read the command line."""
    parser = Parser(
        description="Make the runs that the table lacks: all of them take most of a day.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="folder of CIFAR-10")
    text = "data set; the report is of CIFAR-10 only"
    add("--dataset", default="cifar10", choices=("cifar10", "digits"), help=text)
    presets = [name for name in CHANGES if name in part2.PRESETS]
    add("--presets", nargs="+", default=presets, choices=presets, help="what is changed")
    names = sorted({change_name(change) for preset in CHANGES for change in CHANGES[preset]})
    text = 'as in the column "change" of the table: none, dropout, "optimizer lr"'
    add("--changes", nargs="+", metavar="CHANGE", choices=names, default=names, help=text)
    text = "the seeds themselves, not their number"
    add("--seeds", nargs="+", type=integer(0, 2**128), default=[0, 1, 2], help=text)
    add("--table", type=Path, default=TABLE, help="CSV file to add to")
    add("--report", action="store_true", help="tables and plot only")
    a = parser.parse_args(argv)
    a.seeds, a.table = list(dict.fromkeys(a.seeds)), a.table.resolve()
    if a.table.name == "gains.csv":
        raise UserError("--table: the report writes its own gains.csv there, so name it otherwise")
    return a


# ------------------------------------------------------------------------- runs


def measure(a):
    """Make the runs that have no row yet, and add a row for each."""
    runs = [
        (preset, change, seed)
        for seed in a.seeds
        for preset in a.presets
        for change in CHANGES[preset]
        if change_name(change) in a.changes and "evaluate" not in change
    ]
    averages = [
        (preset, change, " ".join(map(str, a.seeds[: change["evaluate"]])))
        for preset in a.presets
        for change in CHANGES[preset]
        if change_name(change) in a.changes and change.get("evaluate", math.inf) <= len(a.seeds)
    ]
    if not runs + averages:
        raise UserError("no run has these presets, changes and seeds")
    output_folder(a.table.parent)
    for preset, change, seed in runs + averages:
        precision = part2.PRESETS[preset].get("precision", "auto")
        here, data, peak = prepare(a.dataset, precision, a.data_dir)
        name = name_of(preset, change, seed) | {"dataset": a.dataset, "machine": machine(here)}
        if has_row(read_table(a.table), name):
            continue
        say(f"{preset}, {flags_of(change) or 'as it is'}, seed {seed}")
        try:
            metrics = judge(preset, change, seed, here, data, Path(f"{a.table.parent}-runs"))
        except RunFailed as error:
            say(f"  no row: {error}")
            continue
        rows = read_table(a.table)
        if not has_row(rows, name):  # otherwise another process made it meanwhile
            about = {key: metrics[key] for key in ("epochs", "parameters")}
            about |= {"peak_gflops": peak, "train_pflop": f"{metrics['train_pflop']:.4f}"}
            about["test_accuracy"] = metrics["accuracy"]
            about["train_seconds"] = round(metrics["train_seconds"], 1)
            rows.append(name | about)
            write_csv(a.table, {key: [row[key] for row in rows] for key in COLUMNS})
        seconds = metrics["train_seconds"]
        say(f"  test accuracy {metrics['accuracy']:.2%} after {seconds:.0f} s")


@lru_cache
def prepare(dataset, precision, data_dir):
    """Settings of this machine, the data, and the peak of a matrix product in GFLOP/s."""
    settings = part2.Settings(dataset=dataset, precision=precision, select_on="last")
    here = part2.prepare_machine(settings)
    peak = round(matmul_peak(getattr(part2.torch, here.precision)))
    return here, part2.load_data(here, data_dir), peak


def judge(preset, change, seed, here, data, runs):
    """What metrics.json would hold of one run, or of the average of several."""
    if "evaluate" in change:
        networks = [trained(preset, {}, int(each), here, data, runs) for each in seed.split()]
    else:
        networks = [trained(preset, change, seed, here, data, runs)]
        networks = snapshots_of(networks[0]) if "snapshots" in change else networks
    return part2.evaluate(networks, data).metrics


def snapshots_of(network):
    """The networks at the ends of the cycles of a training."""
    paths = [
        network.path.with_name(f"snapshot-{i + 1}.pt") for i in range(network.settings.snapshots)
    ]
    return [replace(part2.load_network(path), settings=network.settings) for path in paths]


def trained(preset, change, seed, here, data, runs):
    """The network of one run: trained, or trained further, where it is not yet."""
    flags = part2.PRESETS[preset] | {"select_on": "last"} | change
    plain = part2.Settings(**part2.PRESETS[preset])
    this = {"preset": preset, "seed": seed, "dataset": data.key}
    this |= {"device": here.device, "precision": here.precision}
    asked = part2.Settings(**flags | this)
    settings = replace(asked, tta=plain.tta, tta_below=plain.tta_below)  # do not change it
    names = [
        f"{key}-{value}"
        for key, value in asdict(replace(settings, select_on=plain.select_on)).items()
        if value != getattr(plain, key) or key in ("preset", "seed")
    ]
    folder = output_folder(runs / "_".join(names))
    training, begun = part2.Training(settings, data), (folder / "last.pt").exists()
    if settings.weights != "none" and not begun:
        part2.load_weights(training.model, settings)
    try:
        if begun:
            _, state = part2.settings_to_resume(folder, asdict(settings))
            part2.restore(training, state, folder)
        part2.train(training, folder)
    except UserError as error:
        raise UserError(f"delete {folder} to make this run again: {error}") from error
    except KeyboardInterrupt:
        raise Interrupted("what is trained is saved; the same command continues") from None
    network = part2.kept_network(folder, training)
    return replace(network, settings=asked)


def machine(here):
    """What the seconds and the last digits of a run depend on."""
    name = processor().get("cpu_name", "CPU") if here.device == "cpu" else "GPU"
    return f"{name}, {part2.torch.get_num_threads()} threads, {here.precision}"


# ------------------------------------------------------------------------ table

# peak_gflops: of a matrix product in the precision of the run
COLUMNS = ("preset", "change", "value", "seed", "dataset", "machine", "peak_gflops", "epochs",
           "parameters", "train_pflop", "test_accuracy", "train_seconds")  # fmt: skip
NUMBERS = ("peak_gflops", "train_pflop", "test_accuracy", "train_seconds")


def read_table(path):
    """Rows of the table as dicts, [] if there is none; UserError if it is no such table."""
    if not path.exists():
        return []
    try:
        rows = [{key: row[key] for key in COLUMNS} for row in read_csv(path)]
        return [row | {key: float(row[key]) for key in NUMBERS} for row in rows]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is not the table of runs ({error!r}): restore it") from error


def name_of(preset, change, seed):
    """The columns that say which run a row is of, as text."""
    values = " ".join(map(str, change.values()))
    return {"preset": preset, "change": change_name(change), "value": values, "seed": str(seed)}


def change_name(change):
    """A change as in the column of that name."""
    return " ".join(change) or "none"


def has_row(rows, name):
    """Whether a run is in the table."""
    return any(name.items() <= row.items() for row in rows)


def flags_of(change):
    """A change as it is typed; that of several networks as a phrase."""
    if "evaluate" in change:
        return f"--evaluate {change['evaluate']} runs of other seeds"
    return part2.flags_text(change)


def measured_gains(rows, preset="baseline"):
    """What each other preset, and each change of one, added to ``preset`` on CIFAR-10.

    Parameters
    ----------
    rows : list of dict
        As from `read_table`.
    preset : str
        That with which all are compared.

    Returns
    -------
    list of dict, the largest gain first
        ``change`` (the settings, as text), ``runs``, ``accuracy`` and ``points`` (means in
        percent, the latter of the gain over the preset with the same seed and machine),
        ``accuracy_std`` and ``points_std`` (NaN for one run), ``seconds`` of training (median),
        ``pflop`` of training, ``peak`` (share of it that is reached) and ``machine``.
    """
    runs = {}  # of each change and machine: accuracy in percent and seconds, by seed
    for row in rows:
        if row["dataset"] == "cifar10":
            pace = row["train_pflop"] * 1e6 / row["train_seconds"]
            found = 100 * row["test_accuracy"], row["train_seconds"], row["train_pflop"]
            of = change_of(row), row["machine"]
            runs.setdefault(of, {})[row["seed"]] = *found, pace / row["peak_gflops"]
    plain, gains = plain_of(preset), []
    for (change, where), found in runs.items():
        base = runs.get((plain, where), {})
        found = {seed: run for seed, run in found.items() if base.keys() >= set(seed.split())}
        if found:
            about = {"change": dict(change), "machine": where}
            gains.append(about | gain_of(found, base))
    return sorted(gains, key=lambda gain: -gain["points"])


def plain_of(preset):
    """What a preset as it is differs in from the baseline."""
    return change_of({"preset": preset, "change": "none", "value": ""})


def change_of(row):
    """What a row's run differs in from the baseline, as pairs of setting and value."""
    preset = [] if row["preset"] == "baseline" else [("preset", row["preset"])]
    return (*preset, *zip(row["change"].split(), row["value"].split()))


def gain_of(found, base):
    """An entry of `measured_gains`; an average of several seeds is compared with their mean."""
    accuracy, seconds, pflop, peak = np.array(list(found.values())).T
    points = accuracy - [np.mean([base[each][0] for each in seed.split()]) for seed in found]
    return {
        "runs": len(found),
        "accuracy": accuracy.mean(),
        "accuracy_std": std_over_runs(accuracy),
        "points": points.mean(),
        "points_std": std_over_runs(points),
        "seconds": np.median(seconds),
        "pflop": pflop.mean(),
        "peak": np.median(peak),
    }


def std_over_runs(values):
    """Sample standard deviation, NaN for one value."""
    return values.std(ddof=1) if len(values) > 1 else np.nan


# ----------------------------------------------------------------------- report


def report(rows, gains, path):
    """Print the tables; write them, gains.csv and the plot beside the table of runs."""
    say(text := tables(rows, gains))
    path.with_name("tables.md").write_text(text, encoding="utf-8")
    write_gains(gains, path.with_name("gains.csv"))
    draw_figures({"accuracy_vs_seconds": plot}, as_they_are(rows), path.parent)


def write_gains(gains, path):
    """What part 2 prints at its end: the most points for their time first.

    A changed preset is worth suggesting only if it is better than the preset as it is.
    """
    as_it_is = {
        gain["change"]["preset"]: gain["points"]
        for gain in gains
        if gain["change"].keys() == {"preset"}
    }
    gains = [
        gain
        for gain in gains
        if gain["change"]
        if len(gain["change"]) == 1
        or gain["points"] > as_it_is.get(gain["change"].get("preset"), -np.inf)
    ]
    gains.sort(key=lambda gain: -gain["points"] / gain["seconds"])
    write_csv(
        path,
        {
            "flags": [flags_of(gain["change"]) for gain in gains],
            "runs": [gain["runs"] for gain in gains],
            "points": [f"{gain['points']:.1f}" for gain in gains],
            "deviation": [spread_text(gain["points_std"], 1)[4:] for gain in gains],
            "seconds": [f"{gain['seconds']:.0f}" for gain in gains],
            "machine": [gain["machine"] for gain in gains],
        },
    )


TABLES = """# What options of part 2 buy

Written by `python tests/ablation.py --report` from results.csv. All 50,000 images of CIFAR-10
train, the last epoch is tested once, and one thing is changed at a time. `+-` is the standard
deviation over runs with different seeds; points are over the runs with the same seeds on the
same machine. The peak is that of a matrix product.

Changes of the baseline, and other presets, by strategy:

{}

Other presets, and what a change takes from them or adds:

{}
"""


def tables(rows, gains):
    """Both tables in Markdown, and what they are."""
    return TABLES.format(*map("\n".join, (strategies_table(gains), presets_table(rows))))


def strategies_table(gains):
    """Lines of Markdown: what changes of the baseline and presets as they are added to it.

    The strategy of the largest gain comes first, and in each strategy its largest gain.
    """
    groups = {}
    for gain in gains:
        change = gain["change"]
        if change and (change.keys() == {"preset"} or "preset" not in change):
            groups.setdefault(strategy_of(change), []).append(gain)
    groups = {f"{i}. {name}": gains for i, (name, gains) in enumerate(groups.items(), 1)}
    return grouped_table("strategy", "points over the baseline", groups)


def strategy_of(change):
    """The strategy that a change belongs to; a new option is a strategy of its own."""
    names = [name for name, settings in STRATEGIES.items() if settings & change.keys()]
    return names[0] if names else change_name(change).replace("_", " ")


def presets_table(rows):
    """Lines of Markdown: what changes of the other presets added to them."""
    groups = {}
    for preset in CHANGES:
        for gain in measured_gains(rows, preset):
            change = dict(gain["change"])
            if change.pop("preset", None) == preset:  # those of the baseline name none
                groups.setdefault(preset, []).append(gain | {"change": change})
    return grouped_table("preset", "points over it", groups)


def grouped_table(title, points, groups):
    """Lines of a Markdown table of gains; each group's name is in its first row."""
    return [
        f"| {title} | flags | runs | test accuracy (%) | {points} | training seconds | PFLOP | "
        "share of the peak |",
        "|---|---|---|---|---|---|---|---|",
    ] + [
        f"| {name if i == 0 else ''} | {flags_cell(gain)} | {gain['runs']} "
        f"| {gain['accuracy']:.2f}{spread_text(gain['accuracy_std'], 2)} "
        f"| {gain_text(gain) if gain['change'] else ''} | {gain['seconds']:.0f} "
        f"| {gain['pflop']:.3f} | {gain['peak']:.0%} |"
        for name, gains in groups.items()
        for i, gain in enumerate(gains)
    ]


def flags_cell(gain):
    """A change in Markdown."""
    return f"`{flags_of(gain['change'])}`" if gain["change"] else "as it is"


def gain_text(gain):
    """Points of a gain with their deviation over the seeds."""
    return f"{gain['points']:+.1f}{spread_text(gain['points_std'], 1)}"


def spread_text(std, digits):
    """A standard deviation as it follows a mean, empty for NaN."""
    return "" if np.isnan(std) else f" +- {std:.{digits}f}"


def as_they_are(rows):
    """What each preset reached, by name, where it was fastest."""
    plain = {
        preset: [g for g in measured_gains(rows, preset) if g["change"] == dict(plain_of(preset))]
        for preset in CHANGES
    }
    return {name: min(g, key=lambda gain: gain["seconds"]) for name, g in plain.items() if g}


def plot(plt, presets):
    """Accuracy against seconds and PFLOP: each preset where it was fastest, and published ones."""
    labels = {name: LABELS.get(name, (name, (0, -22), (0, -22))) for name in presets}
    best, gain = max(presets.items(), key=lambda item: item[1]["accuracy"])
    figure, panels = plt.subplots(1, 2, figsize=(14, 6.5))
    axes, other = panels
    limits = {"seconds": ((0.3, 60_000), (66, 98.5)), "pflop": ((0.12, 9), (92.5, 96.8))}
    ticks = {"seconds": (1, 10, 100, 1_000, 10_000), "pflop": (0.2, 0.5, 1, 2, 5)}
    for panel, key in zip(panels, limits):
        xlim, ylim = limits[key]
        panel.set(xscale="log", xlim=xlim, ylim=ylim, ylabel="test accuracy (%)")
        panel.set_xticks(ticks[key], [f"{tick:,g}" for tick in ticks[key]])
        panel.minorticks_off()
        shown = [
            (
                f"{text} (n = {presets[name]['runs']})",
                presets[name][key],
                presets[name]["accuracy"],
                left if key == "seconds" else right,
                BLUE,
            )
            for name, (text, left, right) in labels.items()
        ]
        for name, accuracy, seconds, where, pflop, left, right in PUBLISHED:
            if key == "seconds":
                shown.append((f"{name} ({where}, {seconds:g} s)", seconds, accuracy, left, ORANGE))
            elif pflop:
                shown.append((f"{name} ({pflop:g})", pflop, accuracy, right, ORANGE))
        for text, x, y, place, color in shown:
            if xlim[0] < x < xlim[1] and ylim[0] < y < ylim[1]:
                ours = color == BLUE
                panel.plot(x, y, "o" if ours else "D", color=color, mfc=color if ours else "white")
                how = {"xytext": place, "textcoords": "offset points", "ha": "center"}
                panel.annotate(text, (x, y), fontsize=10 if ours else 8, **how)
    axes.plot([], [], "o", color=BLUE, label="this project, two CPU cores")
    axes.plot([], [], "D", color=ORANGE, markerfacecolor="white", label="as published")
    axes.set_xlabel("seconds of training, on the machine that was at hand")
    other.set_xlabel("operations of training (PFLOP), whatever the machine")
    other.set_ylabel("test accuracy (%), from 92.5 on")
    figure.suptitle(
        f"CIFAR-10: {gain['accuracy']:.2f}% in {gain['seconds'] / 60:.0f} minutes without a GPU "
        f"({labels[best][0]})"
    )
    return figure


if __name__ == "__main__":
    sys.exit(main())
