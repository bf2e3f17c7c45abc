"""What each flag of part 2 buys, measured: one row of a table for each run.

    python tests/ablation.py --data-dir data                          every run, half a day with bfloat16
    python tests/ablation.py --data-dir data --presets strong --changes none --seeds 0
    python tests/ablation.py --report                                 table and plot only

Each run trains on all training images, keeps its last epoch and is tested once. Its row is
added to outputs/ablation/results.csv when it ends; runs that have a row are not made again.
A row is known by its preset's name and the flags that were changed, so when a preset or the
training itself changes, delete its rows and the checkpoints of its runs.
Precision and seconds are those of the machine: compare rows of one machine only.
A run that was stopped goes on after its last epoch: its checkpoints are kept in a folder
beside that of the table, named like it with "-runs" at the end.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import part2_cifar_cnn as part2
from utils import (
    BLUE, ORANGE, Interrupted, Parser, RunFailed, UserError, command, integer, load_pyplot,
    output_folder, save_figure, say, write_csv,
)  # fmt: skip

# What is changed, one thing at a time; lr and momentum go with the optimiser they suit.
CHANGES = {
    "baseline": [
        {}, {"dropout": 0.1}, {"crop_padding": 0}, {"crop_fill": "reflect"}, {"flip": "none"},
        {"flip": "alternating"}, {"cutout": 8}, {"mixup": 0.2}, {"schedule": "cosine"},
        {"schedule": "linear"}, {"warmup_epochs": 2.0}, {"optimizer": "adamw", "weight_decay": 0.01},
        {"weight_decay": 0.0005}, {"optimizer": "sgd", "lr": 0.05},
        {"optimizer": "muon", "lr": 0.1, "momentum": 0.6}, {"label_smoothing": 0.1},
        {"grad_clip": 1.0}, {"ema": 0.99}, {"tta": "flip"}, {"tta": "shift"}, {"epochs": 20},
        {"ensemble": 3}, {"model": "tuned"},
    ],
    "tuned": [{}, {"tta": "none"}],
    "strong": [
        {}, {"tta": "none"}, {"optimizer": "adamw", "lr": 0.002}, {"label_smoothing": 0.0},
        {"flip": "random"}, {"schedule": "none"},
        {"epochs": 20, "cutout": 8, "ensemble": 4},
        {"model": "wide", "epochs": 36, "crop_padding": 4, "cutout": 12},
    ],
    "resnet18": [{}],
}  # fmt: skip

# The strategies of the table, and the settings that belong to each.
STRATEGIES = {
    "another network": {"preset", "model"},
    "longer training": {"epochs"},
    "several networks": {"ensemble"},
    "less dropout": {"dropout"},
    "shifts and mirrors": {"crop_padding", "crop_fill", "flip"},
    "cutout and mixup": {"cutout", "mixup"},
    "another course of the learning rate": {"warmup_epochs", "schedule"},
    "another optimiser, decay, clipping": {"optimizer", "weight_decay", "grad_clip"},
    "softer labels": {"label_smoothing"},
    "averages of weights or of views": {"ema", "tta"},
}

# Name, test accuracy in percent, seconds of training as published, on what; height of the label.
PUBLISHED = (
    ("hiverge cifar10-speedrun", 94.01, 2.0, "A100", 22),
    ("airbench94, Muon", 94.01, 2.6, "A100", 10),
    ("airbench94", 94.01, 3.8, "A100", -18),
    ("airbench96", 96.03, 35, "A100", 10),
    ("cifar10-fast", 94.1, 26, "V100", -18),
    ("slatteryjim, two convolutions", 71.87, 197, "8-core Ryzen", 10),
)


def settings_of(preset, change, seed, dataset):
    """The settings of one run, on this machine."""
    flags = part2.PRESETS[preset] | {"select_on": "last"} | change
    which = {"preset": preset, "seed": seed, "dataset": dataset, "device": "cpu"}
    return part2.resolve(part2.Settings(**which | flags))[0]


def name_of(preset, change, seed):
    """The columns that say which run a row is of, as text."""
    keys, values = " ".join(change) or "none", " ".join(map(str, change.values()))
    return {"preset": preset, "change": keys, "value": values, "seed": str(seed)}


def run(settings, data, folder):
    """Train, or go on, or only test where the training is done; what metrics.json would hold."""
    checkpoint = None
    if (folder / "last.pt").exists():
        trained_with = {key: value for key, value in asdict(settings).items() if key != "tta"}
        try:
            checkpoint, _ = part2.read_last(folder / "last.pt", trained_with)
        except UserError as error:
            raise UserError(f"delete {folder} to make this run anew: {error}") from error
    try:
        histories = part2.train_members(settings, data, output_folder(folder), checkpoint)
    except KeyboardInterrupt:
        raise Interrupted("what is trained is saved; the same command goes on") from None
    metrics, _ = part2.measure_kept(folder, data, settings, histories, checkpoint is not None)
    return metrics


def checkpoints_of(settings, runs):
    """A folder for each training; views of the test images do not change it."""
    plain = part2.Settings(**part2.PRESETS[settings.preset])
    free = {"tta": plain.tta, "select_on": plain.select_on}
    parts = [
        f"{key}-{value}" for key, value in asdict(replace(settings, **free)).items()
        if value != getattr(plain, key) or key in ("preset", "seed")
    ]  # fmt: skip
    return runs / "_".join(parts)


def report(path):
    """Print the tables as Markdown and draw accuracy against seconds beside it."""
    rows = part2.read_table(path)
    gains = part2.measured_gains(rows)
    if not gains:
        raise UserError(f"{path} has no run of the baseline on CIFAR-10: make one to compare with")
    say(*strategies_table(rows), "", *presets_table(rows))
    plt = load_pyplot()
    save_figure(plot(plt, gains), path.with_name("accuracy_vs_seconds.png"))


def strategies_table(rows):
    """Lines of Markdown: what changes of the baseline and presets as they are added to it.

    The strategy of the largest gain comes first, and in each strategy its largest gain.
    """
    groups = {}
    for gain in part2.measured_gains(rows):
        change = gain["change"]
        if change and (change.keys() == {"preset"} or "preset" not in change):
            groups.setdefault(strategy_of(change), []).append(gain)
    groups = {f"{i}. {name}": gains for i, (name, gains) in enumerate(groups.items(), 1)}
    return grouped_table("strategy", "points over the baseline", groups)


def strategy_of(change):
    return next(name for name, settings in STRATEGIES.items() if settings & change.keys())


def presets_table(rows):
    """Lines of Markdown: what changes of the other presets added to them."""
    groups = {}
    for preset in CHANGES:
        for gain in part2.measured_gains(rows, preset):
            change = dict(gain["change"])
            if change.pop("preset", None) == preset:  # those of the baseline name none
                groups.setdefault(preset, []).append(gain | {"change": change})
    return grouped_table("preset", "points over it", groups)


def grouped_table(title, points, groups):
    """Lines of a Markdown table of gains; each group's name is in its first row."""
    return [
        f"| {title} | flags | runs | test accuracy (%) | {points} | training seconds |",
        "|---|---|---|---|---|---|",
    ] + [
        f"| {name if i == 0 else ''} | {flags_cell(gain['change'])} | {gain['runs']} "
        f"| {gain['accuracy']:.2f}{part2.spread_text(gain['accuracy_std'], 2)} "
        f"| {part2.gain_text(gain) if gain['change'] else ''} | {gain['seconds']:.0f} |"
        for name, gains in groups.items() for i, gain in enumerate(gains)
    ]  # fmt: skip


def flags_cell(change):
    return f"`{part2.flags_text(change)}`" if change else "as it is"


def plot(plt, gains):
    """Accuracy against training seconds of each preset, the best run and each published peer."""
    best = gains[0]
    figure, axes = plt.subplots(figsize=(10, 5.5))
    for gain in gains:
        if gain is best or gain["change"].keys() <= {"preset"}:
            point = gain["seconds"], gain["accuracy"]
            axes.plot(*point, "o", color=BLUE, markersize=9)
            axes.annotate(f"{name_on_plot(gain['change'])} (n = {gain['runs']})", point, ha="center",
                          xytext=(0, 12 if gain is best else -22), textcoords="offset points")  # fmt: skip
    for name, accuracy, seconds, machine, height in PUBLISHED:
        axes.plot(seconds, accuracy, "D", color=ORANGE, markerfacecolor="white", markersize=8)
        axes.annotate(f"{name} ({machine})", (seconds, accuracy), ha="center", fontsize=8,
                      xytext=(0, height), textcoords="offset points")  # fmt: skip
    axes.plot([], [], "o", color=BLUE, label="this project, two CPU cores")
    axes.plot([], [], "D", color=ORANGE, markerfacecolor="white", label="as published")
    axes.legend(loc="lower left")
    axes.set(xscale="log", xlim=(0.5, 30_000), xticks=[1, 10, 100, 1_000, 10_000],
             xticklabels=["1", "10", "100", "1,000", "10,000"], ylim=(66, 98),
             xlabel="seconds of training", ylabel="test accuracy (%)",
             title=f"CIFAR-10: {best['accuracy']:.2f} % in {best['seconds'] / 60:.0f} minutes "
                   f"without a GPU ({name_on_plot(best['change'])})")  # fmt: skip
    return figure


def name_on_plot(change):
    """A preset's or its other network's name, with the number of networks and epochs if changed."""
    networks = f"{change['ensemble']} of " if "ensemble" in change else ""
    epochs = f", {change['epochs']} epochs" if "epochs" in change else ""
    return f"{networks}{change.get('model') or change.get('preset', 'baseline')}{epochs}"


@command
def main(argv=None):
    parser = Parser(
        description="Make the runs that the table lacks: by default all, half a day with bfloat16.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of CIFAR-10")
    parser.add_argument("--dataset", default="cifar10", choices=("cifar10", "digits"),
                        help="data set; the report is of CIFAR-10 only")  # fmt: skip
    parser.add_argument("--presets", nargs="+", default=list(CHANGES), choices=CHANGES,
                        help="what is changed")  # fmt: skip
    names = {name_of(preset, change, 0)["change"] for preset in CHANGES for change in CHANGES[preset]}
    parser.add_argument("--changes", nargs="+", metavar="CHANGE", choices=sorted(names),
                        help='as in the column "change" of the table: none, dropout, "optimizer lr"')  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=integer(0, 2**128), default=[0, 1, 2],
                        help="the seeds themselves, not their number")  # fmt: skip
    parser.add_argument("--table", type=Path, default=part2.ABLATION, help="CSV file to add to")
    parser.add_argument("--report", action="store_true", help="table and plot only")
    a = parser.parse_args(argv)
    runs = [
        (seed, preset, change)
        for seed in a.seeds for preset in a.presets for change in CHANGES[preset]
        if not a.changes or name_of(preset, change, seed)["change"] in a.changes
    ]  # fmt: skip
    if not runs:
        raise UserError("no run has these presets, changes and seeds")
    if not a.report:
        measure(runs, a)
    if a.report or part2.measured_gains(part2.read_table(a.table)):
        report(a.table)


def measure(runs, a):
    """Make the runs that have no row yet, and add a row for each."""
    output_folder(a.table.parent)
    data = None
    for seed, preset, change in runs:
        name = name_of(preset, change, seed) | {"dataset": a.dataset}
        if has_row(part2.read_table(a.table), name):
            continue
        settings = settings_of(preset, change, seed, a.dataset)
        if data is None:
            part2.prepare_machine(part2.torch.device(settings.device))
            data = part2.load_data(a.dataset, a.data_dir).to(settings.device)
        say(f"{preset}, {part2.flags_text(change) or 'as it is'}, seed {seed}")
        folder = checkpoints_of(settings, Path(f"{a.table.resolve().parent}-runs"))
        try:
            metrics = run(settings, data, folder)
        except RunFailed as error:
            say(f"  no row: {error}")
            continue
        share, seconds = metrics["test_accuracy"], metrics["train_seconds"]
        rows = part2.read_table(a.table)
        if has_row(rows, name):  # another process made it meanwhile
            continue
        rows.append(name | {
            "epochs": settings.epochs, "parameters": metrics["parameters"],
            "test_accuracy": share, "train_seconds": round(seconds, 1),
        })  # fmt: skip
        write_csv(a.table, {key: [row[key] for row in rows] for key in rows[0]})
        say(f"  test accuracy {share:.2%} after {seconds:.0f} s")


def has_row(rows, name):
    return any(name.items() <= row.items() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
