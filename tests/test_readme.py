"""README keeps its word: commands, code, options, numbers, and the talk."""

import importlib.util
import json
import re
import shlex
import sys
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import ablation
import numpy as np
import pytest
import torchvision
from helpers import make_pictures, read_table
from pytest import approx
from torch.distributed.run import get_args_parser

import part1_threshold as part1
import part2_cifar_cnn as part2
import utils

ROOT = Path(part2.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SUMMARY = (ROOT / "SUMMARY.md").read_text(encoding="utf-8")
SCRIPTS = {1: part1, 2: part2}


def section(title):
    """What stands below a heading of the second level."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code(text, language):
    """The blocks of code in a part of README."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


# -------------------------------------------------------------------- commands


def readme_commands():
    """Arguments of each run of a script in README's code blocks, the script first."""
    for block in code(README.replace("\\\n", " "), "sh"):
        for line in block.splitlines():
            words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            words.whitespace_split = True
            command = []
            for word in [*words, ";"]:
                if set(word) <= set("();<>|&"):
                    if command:
                        yield command
                    command = []
                elif command or word.endswith(("part1_threshold.py", "part2_cifar_cnn.py")):
                    command.append(word)


COMMANDS = list(readme_commands())
LATER = {"--resume", "--evaluate", "--predict", "--export"}  # for runs that are there
TRAINING = [c for c in COMMANDS if "part2" in c[0] and not LATER & set(c)]


def test_readme_has_commands_of_both_scripts():
    scripts = {command[0].rpartition("/")[2] for command in COMMANDS}
    assert scripts == {"part1_threshold.py", "part2_cifar_cnn.py"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if "part1" in c[0]], ids=" ".join)
def test_readme_command_of_part_1_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(part1, "FIGURES", {})  # drawn by the tests of part 1
    assert part1.main([*command[1:], "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "summary.json").exists()


def random_weights(weights):
    """In place of a download: what such a file would hold, but for the values."""
    name = type(weights).__name__.removesuffix("_Weights").lower()
    return torchvision.models.get_model(name).state_dict()


@pytest.mark.parametrize("command", TRAINING, ids=" ".join)
def test_readme_command_of_part_2_trains(quick, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils, "download_weights", random_weights)
    (tmp_path / "pictures").mkdir()
    short = ["--epochs", "1", "--warmup-epochs", "0", "--dataset", "digits", "--output-dir"]
    assert part2.main([*command[1:], *short, str(tmp_path)]) == 0
    assert (tmp_path / "metrics.json").exists()


def test_readme_commands_for_runs_that_are_there_work(quick, few_digits, tmp_path, monkeypatch):
    """In README's order, each on a few digits and for an epoch."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        make_pictures(tmp_path / "pictures" / part, {"cat": 30, "dog": 220}, 5, seed=0)
    few = replace(few_digits, key="cifar10", name="CIFAR-10")
    monkeypatch.setattr(part2, "load_cifar10", lambda folder: few)
    monkeypatch.setattr(utils, "download_weights", random_weights)
    for command in (c for c in COMMANDS if "part2" in c[0]):
        there = LATER & set(command)
        short = [] if there else ["--epochs", "1", "--warmup-epochs", "0", "--overwrite"]
        assert part2.main([*command[1:], *short]) == 0, command


# --------------------------------------------------------------------- options


def help_of(script):
    """What --help prints on a terminal where nothing has to be wrapped."""
    with pytest.MonkeyPatch.context() as wide, redirect_stdout(StringIO()) as text:
        wide.setenv("COLUMNS", "1000")
        with suppress(SystemExit):
            script.main(["--help"])
    return text.getvalue()


def option_table(text):
    """What --help says of each option, as a table in Markdown."""
    rows = ["| option | values | default | what it does |", "|---|---|---|---|"]
    for name, values, what in re.findall(
        r"^  (--[a-z-]+)(?: (\S[^\n]*?))?(?: {2,}|\n {3,})(\S.*)$", text, re.M
    ):
        what, default = re.fullmatch(r"(.*?)(?: \(default: (.*)\))?", what).groups("")
        values = values[1:-1].replace(",", ", ") if values.startswith("{") else ""
        rows.append(f"| `{name}` | {values} | {default} | {what} |")
    return "\n".join(rows)


@pytest.mark.parametrize("part", SCRIPTS)
def test_the_table_of_options_is_what_help_says(part):
    text = help_of(SCRIPTS[part])
    table = option_table(text)
    names = {*re.findall(r"^  (--[a-z-]+)", text, re.M)}
    assert set(re.findall(r"^\| `(--[a-z-]+)`", table, re.M)) == names
    assert table in section("Every option")


def test_every_option_in_readme_is_an_option():
    text = re.sub(r"^```python\n.*?^```", "", README, flags=re.M | re.S)  # its own examples
    text = text.replace("tensorboard --logdir", "").replace("--grey", "")
    known = set(re.findall(r"--[a-z][a-z-]*", " ".join(map(help_of, SCRIPTS.values()))))
    known |= set(re.findall(r"--[a-z][a-z-]*", (ROOT / "tests/ablation.py").read_text()))
    known |= {text for action in get_args_parser()._actions for text in action.option_strings}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) - known == set()


# ------------------------------------------------------------------ additions

ADDITIONS = code(section("Change it"), "python")
ONE_EPOCH = shlex.split("--dataset digits --epochs 1 --precision float32")
EXTENDED = [part1.METRICS, part2.METRICS, part2.MODELS, part2.OPTIMIZERS, part2.SCHEDULES]
SHOWS = {  # of what is added: whether the files of the run have it
    "jaccard": lambda folder: stored(folder, "summary")["metric"] == "jaccard",
    "07_scores": lambda folder: (folder / "07_scores.png").exists(),
    "linear": lambda folder: stored(folder, "metrics")["parameters"] == 30_730,
    "adagrad": lambda folder: stored(folder, "config")["optimizer"] == "adagrad",
    "tenth": lambda folder: float(read_table(folder / "history.csv")[0]["lr"]) == approx(0.001),
    "top_3": lambda folder: (
        stored(folder, "metrics")["accuracy"] <= stored(folder, "metrics")["top_3"] <= 1
    ),
    "12_lr": lambda folder: (folder / "12_lr.png").exists(),
}


def stored(folder, name):
    """What a JSON file of a run holds."""
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("addition", [text for text in ADDITIONS if ".main(" in text])
def test_an_addition_is_a_function_and_an_entry(addition, quick, tmp_path, monkeypatch):
    """Run as it stands, on a few digits; what it adds shows in the files."""
    monkeypatch.setattr(part1, "FIGURES", {})
    for script, short in (part1, ["--n-samples", "1000"]), (part2, ONE_EPOCH):

        def main(argv, run=script.main, short=short):
            return run([*argv, *short, "--output-dir", str(tmp_path)])

        monkeypatch.setattr(script, "main", main)
    tables = [*EXTENDED, part1.FIGURES, part2.FIGURES]
    with ExitStack() as restored:
        before = [restored.enter_context(patch.dict(table)).copy() for table in tables]
        with pytest.raises(SystemExit, match="^0$"):
            exec(addition, {})
        added = [name for table, old in zip(tables, before) for name in table.keys() - old.keys()]
    assert added and all(SHOWS[name](tmp_path) for name in added)


def test_a_trained_network_is_used_as_readme_shows(digits, monkeypatch):
    monkeypatch.chdir(ROOT)
    one, bare = (text for text in ADDITIONS if "outputs/part2" in text)
    names = {"images": digits.test.images[:5]}
    exec(one + bare, names)
    assert names["probs"].shape == names["logits"].shape == (5, 10)
    assert names["evidence"].shape == (5, 32, 32)
    assert (names["logits"].argmax(1) == names["probs"].argmax(1)).float().mean() >= 0.8


def test_an_augmentation_is_a_function_and_an_option(few_digits, tmp_path, monkeypatch):
    """In a copy of the script, put where README says."""
    function, field = (text for text in ADDITIONS if ".main(" not in text and "grey" in text)
    text = Path(part2.__file__).read_text(encoding="utf-8")
    for place, addition in ("# %% More networks\n", function), ("    # optimization\n", field):
        assert text.count(place) == 1
        text = text.replace(place, f"{addition}\n{place}")
    (tmp_path / "greyer.py").write_text(text)
    spec = importlib.util.spec_from_file_location("greyer", tmp_path / "greyer.py")
    greyer = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "greyer", greyer)
    spec.loader.exec_module(greyer)
    monkeypatch.setattr(greyer, "load_digits", lambda: few_digits)
    monkeypatch.setattr(greyer, "FIGURES", {})
    assert greyer.main([*ONE_EPOCH, "--grey", "1", "--output-dir", str(tmp_path)]) == 0
    assert stored(tmp_path, "config")["grey"] == 1
    settings = greyer.Settings(dataset="digits", device="cpu", precision="float32", grey=1.0)
    red = np.zeros((50, 32, 32, 3), np.uint8)
    red[..., 0] = 200
    split = greyer.Split(greyer.torch.tensor(red), few_digits.train.labels[:50])
    data = greyer.set_aside(replace(few_digits, train=split), "last")
    images, _ = next(greyer.batches(data, settings, 1))
    assert images.std(1).max() < 1e-6


# --------------------------------------------------------------------- numbers


def test_what_part_1_prints_is_what_readme_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(part1, "FIGURES", {})
    assert part1.main(["--output-dir", str(tmp_path)]) == 0
    (block,) = [text for text in code(README, "text") if text.startswith("1. The scores")]
    assert block in capsys.readouterr().out


def test_what_readme_shows_of_part_2_is_the_committed_run(capsys):
    folder = ROOT / "outputs/part2"
    network, metrics = part2.load_network(folder), stored(folder, "metrics")
    rows = read_table(folder / "test_scores.csv")
    probs = np.array([[float(row[name]) for name in network.classes] for row in rows])
    result = SimpleNamespace(
        metrics=metrics | {"suggestions": part2.suggestions([network])},
        networks=[network],
        split="test",
        name="test images",
        data=SimpleNamespace(name="CIFAR-10"),
        labels=np.array([network.classes.index(row["label"]) for row in rows]),
        preds=probs.argmax(1),
        sure=probs.max(1),
        firing={
            layer: [0] * silent + [1] * (units - silent)
            for layer, (silent, units) in metrics["silent_units"].items()
        },
    )
    part2.report(result)
    told = capsys.readouterr().out
    shown = code(section("What you will see") + section("The ladder of presets"), "text")
    training, next_steps = shown[1].split("4. Result"), shown[2]
    for row in network.history:
        assert part2.row_text(row) in training[0]
    assert f"4. Result{training[1]}".rstrip() in told and next_steps.rstrip() in told


def runs_in(text):
    """Rows of a Markdown table of presets, by name: the cells behind the name."""
    rows = re.findall(r"^\| `--preset (\w+)`.*?\|(.*)\|$", text, re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def committed_runs():
    """Of each preset parameters, PFLOP, seconds, number of seeds and accuracy, as text."""
    rows = ablation.read_table(ablation.TABLE)
    for name, gain in ablation.as_they_are(rows).items():
        same = {"preset": name, "change": "none"}.items()
        (parameters,) = {row["parameters"] for row in rows if same <= row.items()}
        accuracy = f"{gain['accuracy']:.2f}{ablation.spread_text(gain['accuracy_std'], 2)}%"
        seconds, pflop = f"{gain['seconds']:,.0f} s", f"{gain['pflop']:.3f}"
        yield name, [f"{int(parameters):,}", pflop, seconds, str(gain["runs"]), accuracy]


def test_the_ladder_shows_the_committed_runs():
    ladder, summary = runs_in(section("The ladder of presets")), runs_in(SUMMARY)
    assert ladder.keys() == part2.PRESETS.keys() | {"lite0"}
    for name, cells in committed_runs():
        assert ladder[name][:5] == summary[name][:5] == cells


def test_the_committed_strong_run_is_one_of_the_preset():
    config = stored(ROOT / "outputs/part2-strong", "config")
    assert config.items() >= part2.PRESETS["strong"].items()
    metrics = stored(ROOT / "outputs/part2-strong", "metrics")
    assert metrics["preset"] == "strong" and f"{metrics['calibration']['ece']:.3f}" in SUMMARY


def test_summary_has_the_gains_of_the_tables():
    tables = (ROOT / "outputs/ablation/tables.md").read_text(encoding="utf-8")
    gains = re.findall(r"\+\d+\.\d", SUMMARY.split("### What buys accuracy")[1].split("###")[0])
    assert len(gains) > 12 and {*gains} <= {*re.findall(r"\+\d+\.\d", tables)}


def test_the_first_lines_have_the_numbers_of_the_committed_runs():
    opening = re.sub(r"!\[.*?\)|`.*?`", "", README.split("## Run both")[0], flags=re.S)
    shown = section("What you will see") + section("The ladder of presets")
    numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", opening)
    assert len(numbers) == 10 and all(is_shown(number, shown) for number in numbers)


def test_the_table_of_figures_names_each_in_its_order():
    named = re.findall(r"^\| `(\d\d_\w+)` \|", section("What you will see"), re.M)
    assert named == list(part2.FIGURES)


def test_summary_says_what_the_default_run_reached():
    metrics = stored(ROOT / "outputs/part2", "metrics")
    low, high = metrics["accuracy_interval"]
    interval = f"(95% interval {100 * low:.2f} to {100 * high:.2f}%)"
    text = " ".join(SUMMARY.split())
    assert f"has {metrics['accuracy']:.2%} {interval}" in text
    assert len(SUMMARY.splitlines()) <= 200


# -------------------------------------------------------------------- the talk


def test_the_talk_shows_code_and_figures_that_are_there():
    """Of the code at most 250 lines, whole functions below the heading that is named."""
    talk, shown, lines = section("The talk"), 0, 0
    for figure in re.findall(r"`(\d\d_\w+)`", talk):
        assert list((ROOT / "outputs").glob(f"part?/{figure}.png")), figure
    for part, heading, names in re.findall(r"part (\d), ([\w ]+): ((?:`\w+`(?: and )?)+)", talk):
        text = Path(SCRIPTS[int(part)].__file__).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            before, after = text.split(f"\ndef {name}(")
            assert heading in re.findall(r"^# %% (.*)", before, re.M)[-1]
            body = re.split(r"^\S", after.partition("\n")[2], flags=re.M)[0]
            shown, lines = shown + 1, lines + 1 + len(body.rstrip().splitlines())
    assert shown == 7 and 100 < lines <= 250


def is_shown(number, text):
    """Whether a text has this number, to as many digits or to more."""
    half = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
    found = re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?", text)
    return any(
        abs(float(n.replace(",", "")) - float(number.replace(",", ""))) <= half for n in found
    )


def test_the_talk_says_the_numbers_that_are_shown(tmp_path, monkeypatch, capsys):
    """What the runs of its rows print; but for the guesses of figure 04, which need the images."""
    monkeypatch.setattr(part1, "FIGURES", {})
    part2_shows = section("What you will see").split("### Part 2")[1]
    part2_shows += section("The ladder of presets")
    rows = re.findall(r"^\| (\d+) \| (.*?) \| .*? \| (.*?) ?\|$", section("The talk"), re.M)
    assert len(rows) > 20
    for minute, what, numbers in rows:
        shown = part2_shows if int(minute) >= 15 else SUMMARY
        if int(minute) < 15 and "SUMMARY.md" not in numbers:
            options = re.findall(r"command with `(.*?)`", what)
            options += ["--output-dir", str(tmp_path)]
            assert part1.main(shlex.split(" ".join(options))) == 0
            shown = capsys.readouterr().out
        for number in re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?", re.sub(r"\(.*?\)", "", numbers)):
            assert is_shown(number, shown) or "04_" in what, (minute, number)


if __name__ == "__main__":  # the tables of options, as README has them
    for part, script in SCRIPTS.items():
        print(f"\nPart {part}:\n\n{option_table(help_of(script))}")
