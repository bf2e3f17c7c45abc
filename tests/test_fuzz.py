"""Damaged inputs by the hundred: each is refused in one line, or read as it really is.

Every input follows from a seed. ``main`` is called in the process, so an
exception that it does not turn into an exit status fails the test.
"""

import csv
import io
import json
import random
import zipfile

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchvision import datasets

import part1_threshold as part1
import part2_cifar_cnn as part2
import utils
from test_part2 import network_of, share_right
from test_reliability import (  # noqa: F401 (quick serves all tests here)
    ARCHIVE, BATCHES, Hostile, check_tiny, cifar_run, few_digits, quick, stopped_in_epoch_2,
    tiny,
)  # fmt: skip

N = {"csv": 200, "npz": 130, "last.pt": 110, "cifar": 90}  # inputs of each kind


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(part1, "plot_all", lambda *a, **k: {}, raising=False)
    monkeypatch.setattr(part2, "MIRRORS", ())


def status_of(main, arguments, capsys):
    """Exit status of a run, and what it said on standard error."""
    capsys.readouterr()
    return main(arguments), capsys.readouterr().err


def check_refusal(status, text, what):
    """Exit status 1 or 2, and one line that says why."""
    lines = text.strip().splitlines()
    assert status in (1, 2) and len(lines) == 1 and lines[0].startswith("error: "), (what, text)
    assert len(lines[0]) < 2000, what


def damaged_bytes(data, rng):
    """Truncate, overwrite, cut out, repeat or insert a few bytes; may leave all as it was."""
    data, way = bytearray(data), rng.randrange(6)
    start = rng.randrange(len(data) + 1)
    length = rng.choice([1, 2, 8, 100])
    if way == 0:
        del data[start:]
    elif way == 1:
        data[start : start + length] = rng.randbytes(len(data[start : start + length]))
    elif way == 2:
        del data[start : start + length]
    elif way == 3:
        data[start:start] = data[start : start + length]
    elif way == 4:
        data[start:start] = rng.randbytes(length)
    elif data:
        data[start % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def test_there_are_over_500_inputs():
    assert sum(N.values()) > 500


# -------------------------------------------------------------------------- CSV


def table(rng):
    rows = [["id", "y_true", "y_score"]]
    for i in range(rng.randrange(30, 60)):
        label = i % 3 == 0
        score = min(1, max(0, rng.gauss(0.6 if label else 0.4, 0.2)))
        rows.append([str(i), str(int(label)), repr(round(score, rng.choice([2, 16])))])
    return rows


def as_csv(rows, **options):
    text = io.StringIO()
    csv.writer(text, **options).writerows(rows)
    return text.getvalue().encode()


def random_csv(rng):
    """A score file, and whether it is surely readable (True), surely not (False) or open."""
    rows = table(rng)
    row, way = rng.choice(rows[1:]), rng.randrange(10)
    if way < 2:  # harmless
        order = rng.sample(range(3), 3)
        rows = [[each[i] for i in order] + ["more"] for each in rows]
        data = as_csv(rows, lineterminator=rng.choice("\n \r\n".split(" ")),
                      quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))  # fmt: skip
        return rng.choice([b"", b"\xef\xbb\xbf"]) + data, True
    if way < 4:  # a value that is no score
        row[2] = rng.choice(["", "nan", "-Infinity", "0.5.1", "1e999", "half", "0x1p-1", "0,5"])
        return as_csv(rows), False
    if way == 4:  # a value that is no label, or one class only
        row[1] = rng.choice(["", "2", "yes", "-1", "nan", "0.5"])
        if rng.random() < 0.3:
            rows[1:] = [[i, "1", score] for i, _, score in rows[1:]]
        return as_csv(rows), False
    if way == 5:  # a header or shape that does not fit
        rng.choice([
            lambda: rows.pop(0), lambda: rows[0].__setitem__(1, "label"), lambda: row.pop(),
            lambda: rows[0].__setitem__(0, "y_true"), lambda: rows.__delitem__(slice(1, None)),
            rows.clear,
        ])()  # fmt: skip
        return as_csv(rows), False
    if way == 6:  # other bytes altogether
        return rng.choice([
            rng.randbytes(300), as_csv(rows).decode().encode("utf-16"), b'"' + as_csv(rows),
            as_csv(rows).replace(b"y_score", b"y_sc\xffre"), b"\x00" * 50, b"PK\x03\x04",
        ]), False  # fmt: skip
    if way == 7:  # unusual, and outside [0, 1] only usable with --exact
        row[2] = rng.choice(["-3", "1e6", "1e300", "-0.0", " 0.25 ", "5e-324", "1"])
        return as_csv(rows), True if 0 <= float(row[2]) <= 1 else None
    return damaged_bytes(as_csv(rows), rng), None


def read_csv(data):
    """An independent reading: labels and scores, or an exception."""
    text = io.StringIO(data.decode("utf-8-sig"), newline="")
    rows = [row for row in csv.reader(text, strict=True) if row]
    header, rows = rows[0], rows[1:]
    assert header.count("y_true") == header.count("y_score") == 1
    labels, scores = (
        np.array([float(row[header.index(name)]) for row in rows]) for name in ("y_true", "y_score")
    )
    return labels, scores


def check_reading(read, data, summary, what):
    """Labels and scores are usable, and the summary holds what scikit-learn says of them."""
    labels, scores = read(data)
    assert np.isfinite(scores.astype(float)).all() and set(labels.tolist()) == {0, 1}, what
    assert (summary["n"], summary["n_positive"]) == (len(labels), labels.sum()), what
    best = summary["best"]
    reaching = scores >= np.array(best["threshold"]).astype(scores.dtype)
    assert best["f1"] == pytest.approx(sk.f1_score(labels, reaching)), what
    assert best["tp"] == (reaching & (labels == 1)).sum(), what
    assert summary["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-9), what


def fuzz_scores(kind, random_input, read, tmp_path, capsys):
    refused = 0
    for seed in range(N[kind]):
        rng = random.Random(f"{kind} {seed}")
        data, readable = random_input(rng)
        path, what = tmp_path / f"{seed}.{kind}", f"{kind} of seed {seed}"
        path.write_bytes(data)
        options = ["--scores", str(path), "--output-dir", str(tmp_path / "out")]
        options += ["--exact"] * (seed % 2)
        status, text = status_of(part1.main, options, capsys)
        if status == 0:
            assert readable is not False, what
            summary = json.loads((tmp_path / "out/summary.json").read_text())
            check_reading(read, data, summary, what)
        else:
            assert readable is not True, (what, text)
            check_refusal(status, text, what)
            assert path.name in text or "the scores run from" in text, what
            refused += 1
    assert N[kind] / 2 <= refused < 0.95 * N[kind]


def test_damaged_csv_files(tmp_path, capsys):
    fuzz_scores("csv", random_csv, read_csv, tmp_path, capsys)


# -------------------------------------------------------------------------- NPZ


def as_npz(save=np.savez, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def random_npz(rng):
    rows = table(rng)[1:]
    labels = np.array([int(row[1]) for row in rows])
    scores = np.array([float(row[2]) for row in rows])
    good, way = {"y_true": labels, "y_score": scores}, rng.randrange(10)
    if way < 2:
        other = rng.choice([
            {"y_score": scores.astype(np.float32)}, {"y_score": scores.astype(np.float16)},
            {"y_score": scores.astype(">f8")}, {"y_true": labels.astype(bool)}, {"more": labels},
            {"y_true": labels.astype(str)}, {"y_true": labels.astype(float)},
            {"y_score": (scores * 9) > 5},
        ])  # fmt: skip
        return as_npz(rng.choice([np.savez, np.savez_compressed]), **good | other), True
    if way < 4:
        place = rng.randrange(len(labels))
        bad, strange = scores.copy(), labels.copy()
        bad[place], strange[place] = rng.choice([np.nan, np.inf, -np.inf]), rng.choice([2, -1])
        other = rng.choice([
            {"y_score": bad}, {"y_true": strange}, {"y_score": scores[:-1]}, {"y_true": labels * 0},
            {"y_score": scores[None]}, {"y_score": scores + 1j}, {"y_score": scores.astype(str)},
            {"y_true": labels[:0], "y_score": scores[:0]}, {"y_score": np.array(0.5)},
            {"y_true": np.array([Hostile("marker")] * len(labels))},
            {"y_score": np.array(list(scores), dtype=object)},
        ])  # fmt: skip
        return as_npz(**good | other), False
    if way == 4:
        rename = rng.choice([{"y_true": "label"}, {"y_score": "score"}])
        return as_npz(**{rename.get(key, key): value for key, value in good.items()}), False
    if way == 5:
        single = io.BytesIO()
        np.save(single, scores)
        others = [single.getvalue(), b"", rng.randbytes(500), b"PK\x05\x06" + bytes(18)]
        return rng.choice(others), False
    if way == 6:  # a header that does not match the check sum of the archive
        return as_npz(**good).replace(b"'<f8'", rng.choice([b"'<f4'", b"'<i8'", b"'<c8'"])), False
    return damaged_bytes(as_npz(**good), rng), None


def read_npz(data):
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        arrays = [
            np.lib.format.read_array(io.BytesIO(file.read(name)), allow_pickle=False)
            for name in ("y_true.npy", "y_score.npy")
        ]
    assert arrays[0].ndim == 1 and arrays[0].shape == arrays[1].shape
    return arrays[0].astype(float), arrays[1]


def test_damaged_npz_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzz_scores("npz", random_npz, read_npz, tmp_path, capsys)
    assert not (tmp_path / "marker").exists()


# ------------------------------------------------------------------ checkpoints

JUNK = (None, -1, 0, 2.5, float("nan"), "", "unheard of", [], {}, [1, "a"], b"bytes", True,
        torch.zeros(3), torch.tensor(float("nan")), torch.zeros(2).bfloat16())  # fmt: skip


def put_junk(value, rng):
    """Replace, remove or reshape something somewhere in a nested value, in place."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    inner = value[key]
    if isinstance(inner, (dict, list)) and inner and rng.random() < 0.85:
        put_junk(inner, rng)
    elif isinstance(inner, torch.Tensor) and inner.dim() and rng.random() < 0.5:
        value[key] = rng.choice([inner[:-1], inner[None], inner.int(), inner.flatten()])
    elif rng.random() < 0.3:
        del value[key]
    else:
        value[key] = rng.choice(JUNK)


def random_checkpoint(good, rng):
    """Damaged bytes, damaged contents, or (True) the same contents written once more."""
    way = rng.random()
    if way < 0.4:
        return damaged_bytes(good, rng), False
    checkpoint, file = torch.load(io.BytesIO(good), weights_only=True), io.BytesIO()
    if way < 0.8:
        put_junk(checkpoint, rng)
    torch.save(checkpoint, file)
    return file.getvalue(), way >= 0.8


def check_optimizer(training):
    """A step with moments of another shape reads foreign memory: fail before it does."""
    for p, state in training.optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state.get(name)
            assert isinstance(moment, torch.Tensor) and moment.shape == p.shape, name


def test_damaged_checkpoints(tmp_path, capsys, monkeypatch, few_digits):  # noqa: F811
    folder, real = tmp_path / "run", part2.Training.train

    def train(training, *rest):
        check_optimizer(training)
        return real(training, *rest)

    stopped_in_epoch_2(folder, "--epochs", "2")
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(part2.Training, "train", train)
    refused, problems = 0, []
    for seed in range(N["last.pt"]):
        rng, what = random.Random(f"checkpoint {seed}"), f"checkpoint of seed {seed}"
        for path in folder.iterdir():
            path.unlink()
        for path, data in kept.items():
            path.write_bytes(data)
        data, harmless = random_checkpoint(kept[folder / "last.pt"], rng)
        (folder / "last.pt").write_bytes(data)
        try:
            status, text = status_of(part2.main, ["--resume", "--output-dir", str(folder)], capsys)
        except Exception as error:
            problems.append(f"{what}: {error!r}")
            continue
        assert status == 0 or not harmless, (what, text)
        if status == 0:  # every part matches its check sum
            assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None, what
        if status == 0 and (folder / "metrics.json").exists():
            metrics = json.loads((folder / "metrics.json").read_text())
            share = share_right(network_of(folder / "best.pt"), few_digits.test_images,
                                few_digits.test_labels, few_digits)  # fmt: skip
            assert metrics["test_accuracy"] == share, what
        elif status:
            check_refusal(status, text, what)
            assert "pt" in text or "loss" in text, what
            refused += 1
    assert not problems, "\n".join(problems)
    assert N["last.pt"] / 2 <= refused < N["last.pt"]


# -------------------------------------------------------------------- data files


def damage_folder(tiny, rng):  # noqa: F811
    """Make a data folder of batches or of an archive; whether it is readable."""
    folder = tiny.empty / str(rng.random())
    whole, packed = folder / BATCHES, tiny.archive.read_bytes()
    folder.mkdir()
    if rng.random() < 0.3:
        data = packed if rng.random() < 0.3 else damaged_bytes(packed, rng)
        (folder / ARCHIVE).write_bytes(data)
        return folder, data == packed
    whole.mkdir()
    good = {name: (tiny.folder / BATCHES / name).read_bytes() for name in tiny.md5}
    files, name, way = dict(good), rng.choice(list(good)), rng.randrange(7)
    if way < 3:
        files[name] = damaged_bytes(good[name], rng)
    elif way == 3:
        files[name] = good[rng.choice(list(good))]
    elif way == 4:
        del files[name]
    elif way == 5:
        files["readme.html"] = rng.randbytes(20)
    else:  # the archive is not looked at where there are batches
        (folder / ARCHIVE).write_bytes(damaged_bytes(packed, rng))
    for each, data in files.items():
        (whole / each).write_bytes(data)
    return folder, all(files.get(each) == data for each, data in good.items())


def test_damaged_data_files(tiny, tmp_path, capsys):  # noqa: F811
    refused = 0
    for seed in range(N["cifar"]):
        what = f"data folder of seed {seed}"
        folder, readable = damage_folder(tiny, random.Random(f"data {seed}"))
        if not readable:
            status, text = status_of(
                lambda argv: cifar_run(*argv), (folder, tmp_path / "out"), capsys
            )
            check_refusal(status, text, what)
            assert ARCHIVE in text or BATCHES in text, what
            refused += 1
        elif seed % 5:
            check_tiny(tiny, part2.load_cifar10(folder))
        else:
            assert cifar_run(folder, tmp_path / "out") == 0, what
    assert N["cifar"] / 2 <= refused < N["cifar"]
    assert datasets.CIFAR10.tgz_md5 == utils.md5_of(tiny.archive)
