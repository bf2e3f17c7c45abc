"""The table of what each flag buys: how it is made, read, shown and used."""

import csv
import math
import signal
from pathlib import Path

import ablation
import numpy as np
import pytest
from helpers import first

import part2_cifar_cnn as part2
from part2_cifar_cnn import PRESETS, Network, Settings
from utils import RunFailed, write_csv

RUNS = (  # preset, change, value, seed, data set, test accuracy
    ("baseline", "none", "", "0", "cifar10", 0.70),
    ("baseline", "none", "", "1", "cifar10", 0.68),
    ("baseline", "dropout", "0.1", "0", "cifar10", 0.73),
    ("baseline", "dropout", "0.1", "1", "cifar10", 0.73),
    ("baseline", "optimizer lr", "sgd 0.05", "0", "cifar10", 0.69),
    ("baseline", "dropout", "0.1", "0", "digits", 0.99),
    ("strong", "none", "", "1", "cifar10", 0.94),
    ("strong", "tta", "none", "1", "cifar10", 0.93),
    ("baseline", "cutout", "8", "7", "cifar10", 0.99),  # no baseline with this seed
)
KEYS = ("preset", "change", "value", "seed", "dataset", "test_accuracy")
SAME = {"machine": "here", "peak_gflops": 800.0, "epochs": 10, "parameters": 1}
SAME |= {"train_pflop": 0.02, "train_seconds": 100.0}
ROWS = [dict(zip(KEYS, run)) | SAME for run in RUNS]


def write_rows(path, rows=ROWS):
    """The table of runs as a file."""
    path.parent.mkdir(exist_ok=True)
    write_csv(path, {key: [row[key] for row in rows] for key in ablation.COLUMNS})
    return path


def test_gains_are_over_the_baseline_of_the_same_seed_and_machine():
    elsewhere = [ROWS[2] | {"machine": "there"}]
    gains = ablation.measured_gains(ROWS + elsewhere)
    assert [part2.flags_text(gain["change"]) for gain in gains] == [
        "--preset strong",
        "--preset strong --tta none",
        "--dropout 0.1",
        "",
        "--optimizer sgd --lr 0.05",
    ]
    dropout = gains[2]
    assert dropout["points"] == pytest.approx(4) and dropout["accuracy"] == pytest.approx(73)
    assert dropout["points_std"] == pytest.approx(math.sqrt(2)) and dropout["runs"] == 2
    assert dropout["accuracy_std"] == 0 and math.isnan(gains[0]["accuracy_std"])
    both = ROWS[0] | {"change": "evaluate", "value": "2", "seed": "0 1", "test_accuracy": 0.75}
    (average,) = [g for g in ablation.measured_gains([*ROWS, both]) if "evaluate" in g["change"]]
    assert average["points"] == pytest.approx(6)  # over the mean of the two


def suggested(monkeypatch, folder, rows=ROWS, **options):
    """Flags that part 2 suggests to a run with these settings."""
    table = folder / "gains.csv"
    ablation.write_gains(ablation.measured_gains(rows), table)
    monkeypatch.setattr(part2, "GAINS", table)
    settings = Settings(**{"dataset": "cifar10"} | options)
    networks = [Network(None, settings, (), (), (), True, [], 0)]
    return [row["flags"] for row in part2.suggestions(networks)]


def test_suggestions_are_what_the_run_lacks_and_may_gain_from(monkeypatch, tmp_path):
    def flags(rows=ROWS, **options):
        return suggested(monkeypatch, tmp_path, rows, **options)

    strong = {"preset": "strong"} | PRESETS["strong"]
    assert flags() == ["--preset strong", "--dropout 0.1"]  # not sgd, nor strong without views
    assert flags(dropout=0.1) == ["--preset strong"]
    assert flags(**strong) == [] and flags(preset="tuned") == ["--preset strong"]
    assert flags(dataset="digits") == []
    better = [ROWS[0] | {"preset": "strong", "change": "epochs", "value": "20", "seed": "0",
                         "test_accuracy": 0.99}]  # fmt: skip
    assert flags(ROWS + better, **strong) == ["--preset strong --epochs 20"]
    cheap = [ROWS[2] | {"change": "tta", "value": "flip", "train_seconds": 1.0}]
    assert flags(ROWS + cheap)[0] == "--tta flip"  # the most for its time


def test_suggestions_are_in_the_metrics_and_a_missing_table_costs_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(part2, "GAINS", tmp_path / "none.csv")
    networks = [Network(None, Settings(dataset="cifar10"), (), (), (), True, [], 0)]
    assert part2.suggestions(networks) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace(b",", b";"),
        lambda text: text.replace(b"0.73", b""),
        lambda text: text[:-30],
        lambda text: text + b"\xff",
        lambda text: b"<<<<\n" + text,
    ],
)
def test_a_damaged_table_is_named(tmp_path, capsys, damage):
    table = write_rows(tmp_path / "results.csv")
    table.write_bytes(damage(table.read_bytes()))
    assert ablation.main(["--report", "--table", str(table)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(table) in line and "restore it" in line


def test_the_report_has_each_change_a_plot_and_the_gains(tmp_path, capsys):
    table = write_rows(tmp_path / "results.csv")
    assert ablation.main(["--report", "--table", str(table)]) == 0
    text = (tmp_path / "tables.md").read_text()
    assert text in capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith(("| 1", "| 2", "| 3"))] == [
        "| 1. another network | `--preset strong` | 1 | 94.00 | +26.0 | 100 | 0.020 | 25% |",
        "| 2. less dropout | `--dropout 0.1` | 2 | 73.00 +- 0.00 | +4.0 +- 1.4 | 100 | 0.020 "
        "| 25% |",
        "| 3. another optimizer, decay, clipping | `--optimizer sgd --lr 0.05` | 1 | 69.00 "
        "| -1.0 | 100 | 0.020 | 25% |",
    ]
    with open(tmp_path / "gains.csv", newline="") as file:
        gains = list(csv.DictReader(file))
    assert [row["points"] for row in gains] == ["26.0", "4.0", "-1.0"]
    assert (tmp_path / "accuracy_vs_seconds.png").stat().st_size > 10_000


def test_every_change_of_the_table_belongs_to_a_strategy():
    names = [ablation.strategy_of(each) for each in ablation.CHANGES["baseline"] if each]
    assert {*names} == {*ablation.STRATEGIES}
    assert names.count("several at once, found by a search") == 1
    assert ablation.strategy_of({"brand_new": 1}) == "brand new"


def test_tables_and_gains_show_the_committed_runs(tmp_path):
    rows = ablation.read_table(ablation.TABLE)
    runs = [tuple(row[key] for key in ablation.COLUMNS[:6]) for row in rows]
    assert len(set(runs)) == len(runs)
    gains = ablation.measured_gains(rows)
    assert ablation.tables(rows, gains) == (part2.GAINS.parent / "tables.md").read_text()
    ablation.write_gains(gains, tmp_path / "gains.csv")
    assert (tmp_path / "gains.csv").read_bytes() == part2.GAINS.read_bytes()


# --------------------------------------------------------------- making it


@pytest.fixture
def data(digits, monkeypatch):
    """The scripts find 100 digits and nothing else."""
    few = part2.set_aside(first(digits, 100), "last")
    monkeypatch.setattr(part2, "load_data", lambda *a: few)
    return few


@pytest.fixture
def table(data, tmp_path):
    """Arguments that make runs of the baseline on the digits, and the table they go into."""
    path = tmp_path / "t" / "results.csv"
    return ["--dataset", "digits", "--presets", "baseline", "--table", str(path)], path


def test_the_table_gets_one_row_a_run_and_no_training_twice(table, data, monkeypatch):
    arguments, path = table
    trained, epoch = [], part2.train_epoch
    monkeypatch.setattr(part2, "train_epoch", lambda *a: (trained.append(a), epoch(*a))[1])
    assert ablation.main([*arguments, "--seeds", "0", "1", "2", "--changes", "none"]) == 0
    assert len(trained) == 30
    more = ["--changes", "none", "tta", "evaluate"]
    assert ablation.main([*arguments, "--seeds", "0", "1", "2", *more]) == 0
    assert len(trained) == 30  # other views and averages need no new training
    rows = ablation.read_table(path)
    names = [(row["change"], row["value"], row["seed"]) for row in rows]
    assert names[:3] == [("none", "", seed) for seed in "012"] and len(set(names)) == 10
    assert names[-1] == ("evaluate", "3", "0 1 2")
    folders = sorted(Path(f"{path.parent}-runs").iterdir())
    networks = [part2.load_network(folder) for folder in folders]
    each = [part2.probabilities(network, data.test.images).numpy() for network in networks]
    labels = data.test.labels.numpy()
    for probs, row in zip(each, rows):
        assert row["test_accuracy"] == (probs.argmax(1) == labels).mean()
    assert rows[-1]["test_accuracy"] == (np.mean(each, 0).argmax(1) == labels).mean()
    assert (rows[0]["epochs"], rows[0]["parameters"]) == ("10", "282442")
    assert ablation.main(["--table", str(path), "--report"]) == 2  # no CIFAR-10 in it


def test_snapshots_are_averaged(table, data):
    arguments, path = table
    assert (
        ablation.main([*arguments, "--seeds", "0", "--changes", "epochs schedule snapshots"]) == 0
    )
    (row,), (folder,) = ablation.read_table(path), Path(f"{path.parent}-runs").iterdir()
    networks = [part2.load_network(folder / f"snapshot-{i}.pt") for i in (1, 2, 3, 4)]
    probs = np.mean([part2.probabilities(n, data.test.images).numpy() for n in networks], 0)
    assert row["test_accuracy"] == (probs.argmax(1) == data.test.labels.numpy()).mean()
    assert row["train_seconds"] == pytest.approx(networks[3].seconds, abs=0.06)


def test_a_stopped_run_of_the_table_continues(table, monkeypatch):
    arguments, path = table
    batches, steps = part2.batches, []

    def stop_once(*args):
        for batch in batches(*args):
            steps.append(1)
            if len(steps) == 4:  # an epoch has one step
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(part2, "batches", stop_once)
    arguments += ["--seeds", "0", "--changes", "none"]
    assert ablation.main(arguments) == 130 and not path.exists()
    assert ablation.main(arguments) == 0 and len(ablation.read_table(path)) == 1
    assert len(steps) == 11  # that at which it was stopped is made again


def test_a_run_that_fails_has_no_row_and_stops_nothing(table, monkeypatch):
    arguments, path = table
    train = part2.train

    def fail_with_dropout(training, *args):
        if training.settings.dropout == 0.1:
            raise RunFailed("the loss is nan")
        train(training, *args)

    monkeypatch.setattr(part2, "train", fail_with_dropout)
    assert ablation.main([*arguments, "--seeds", "0", "--changes", "dropout", "none"]) == 0
    assert [row["change"] for row in ablation.read_table(path)] == ["none"]


def test_checkpoints_of_other_settings_are_not_taken_for_this_run(table, monkeypatch, capsys):
    arguments, path = table
    arguments += ["--seeds", "0", "--changes", "none"]
    assert ablation.main(arguments) == 0
    path.unlink()
    monkeypatch.setitem(PRESETS, "baseline", {"lr": 0.002})  # the folder has the same name
    assert ablation.main(arguments) == 2
    assert f"delete {path.parent}-runs" in capsys.readouterr().err and not path.exists()
