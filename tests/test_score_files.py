"""Tests of reading score files: good ones, bad ones, and damaged ones by the hundred.

Every damaged file follows from a seed. ``main`` is called in the process, so an
exception that it does not turn into an exit status fails the test.
"""

import csv
import io
import json
import os
import random
import zipfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn import metrics as sk

import part1_threshold as part1
from utils import read_scores

HEAD = b"y_true,y_score\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No plots, and few resamples: what is tested here is what was read."""
    monkeypatch.setattr(part1, "FIGURES", {})
    monkeypatch.setattr(part1, "REPLICATES", 20)


def check_refusal(status, text, what):
    """Exit status 2 and one line that says why; returns the line."""
    lines = text.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (what, text)
    assert len(lines[0]) < 2000, what
    return lines[0]


LABELS, SCORES = [True, False, False, True], [0.9, 0.125, 0.5, 0.75]
ROWS = HEAD + b"1,0.9\n0,0.125\n0,0.5\n1,0.75\n"
GOOD_CSV = {  # case: content, value of --positive
    "plain": (ROWS, None),
    "quoted": (b'"y_true","y_score"\n"1","0.9"\n"0",".125"\n"0","5e-1"\n"1","0.75"\n', None),
    "byte order mark": (b"\xef\xbb\xbf" + ROWS, None),
    "CRLF": (ROWS.replace(b"\n", b"\r\n"), None),
    "blank lines": (ROWS.replace(b"\n", b"\n\n"), None),
    "no last newline": (ROWS.rstrip(), None),
    "float labels": (HEAD + b"1.0,0.9\n0.0,0.125\n0.0,0.5\n1.0,0.75\n", None),
    "columns": (b"a,y_score,b,y_true\n,0.9,x,1\n,0.125,x,0\n,0.5,x,0\n,0.75,x,1\n", None),
    "positive yes": (HEAD + b"yes,0.9\nno,0.125\nno,0.5\nyes,0.75\n", "yes"),
    "positive 1": (HEAD + b"1.0,0.9\n2,0.125\n0,0.5\n1,0.75\n", "1"),
    "positive 0": (HEAD + b"0,0.9\n1,0.125\n1,0.5\n0,0.75\n", "0"),
    "comma inside": (HEAD + b'"a,b",0.9\nc,0.125\nd,0.5\n"a,b",0.75\n', "a,b"),
}
GOOD_NPZ = {  # case: labels, type of the scores, value of --positive
    "int labels": (np.int8([1, 0, 0, 1]), "f8", None),
    "float labels": (np.float64([1, 0, 0, 1]), "f8", None),
    "bool labels": (LABELS, "f8", None),
    "bool labels, named": (LABELS, "f8", "True"),
    "text labels": (["cat", "dog", "cow", "cat"], "f8", "cat"),
    "byte labels": ([b"cat", b"dog", b"cow", b"cat"], "f8", "cat"),
    "byte labels beyond ASCII": ([b"cat", b"caf\xe9", b"cow", b"cat"], "f8", "cat"),
    "other numbers": ([7, 3, 3, 7], "f8", "7"),
    "half precision": (LABELS, "f2", None),
    "single precision": (LABELS, "f4", None),
    "big-endian": (np.array([1, 0, 0, 1], ">i4"), ">f4", None),
    "long double": (LABELS, "longdouble", None),
    "integers": (LABELS, "i4", None),
}


@pytest.mark.parametrize("case", GOOD_CSV)
def test_csv_is_read(tmp_path, case):
    content, positive = GOOD_CSV[case]
    (tmp_path / "s.csv").write_bytes(content)
    labels, scores = read_scores(tmp_path / "s.csv", "y_true", "y_score", positive)
    assert (labels.dtype, scores.dtype) == (bool, np.float64)
    assert (labels.tolist(), scores.tolist()) == (LABELS, SCORES)


@pytest.mark.parametrize("case", GOOD_NPZ)
def test_npz_is_read_in_its_own_precision(tmp_path, case):
    truth, dtype, positive = GOOD_NPZ[case]
    given = np.array(SCORES).astype(dtype)
    path = tmp_path / "s.npz"
    np.savez(path, y_true=truth, y_score=given)
    labels, scores = read_scores(path, "y_true", "y_score", positive)
    assert (labels.dtype, labels.tolist()) == (bool, LABELS)
    assert scores.dtype == {"f2": np.float16, "f4": np.float32, ">f4": np.float32}.get(
        dtype, float
    )
    assert_array_equal(scores, given)


BAD = {  # case: content of a CSV or NPZ file, further arguments, what the error names
    "no CSV": ("csv", None, [], ["scores.csv"]),
    "no NPZ": ("npz", None, [], ["scores.npz"]),
    "empty CSV": ("csv", b"", [], ["empty"]),
    "empty NPZ": ("npz", b"", [], ["NPZ"]),
    "header only": ("csv", HEAD, [], ["header"]),
    "an image": ("csv", b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", [], ["CSV"]),
    "open quote": ("csv", HEAD + b'1,"0.3\n0,0.4\n', [], ["CSV"]),
    "text as NPZ": ("npz", b"no archive", [], ["NPZ"]),
    "semicolons": ("csv", b"y_true;y_score\n1;0.3\n", [], ["';'", "commas"]),
    "tabs": ("csv", b"y_true\ty_score\n1\t0.3\n", [], ["\\t", "commas"]),
    "bars": ("csv", b"y_true|y_score\n1|0.3\n", [], ["'|'", "commas"]),
    "no column": ("csv", b"label,y_score\n1,0.3\n", [], ["y_true", "label"]),
    "no array": ("npz", {"label": [0, 1], "y_score": [0.1, 0.2]}, [], ["y_true", "label"]),
    "two columns": ("csv", b"y_true,y_score,y_score\n1,0.3,0.4\n", [], ["y_score"]),
    "short row": ("csv", HEAD + b"1,0.3\n0\n", [], ["line 3"]),
    "word as score": ("csv", HEAD + b"1,0.3\n\n0,many\n", [], ["line 4", "many"]),
    "NaN": ("csv", HEAD + b"1,0.3\n0,nan\n0,0.1\n1,inf\n", [], ["2 scores", "line 3"]),
    "NaN NPZ": ("npz", {"y_true": [0, 1, 1], "y_score": [0, np.nan, np.inf]}, [], ["2 scores"]),
    "one class": ("csv", HEAD + b"1,0.3\n1,0.4\n", [], ["both classes"]),
    "word labels": ("csv", HEAD + b"cat,0.3\ndog,0.4\n", [], ["--positive", "cat", "dog"]),
    "three labels": ("csv", HEAD + b"0,0.3\n1,0.4\n2,0.4\n", [], ["--positive"]),
    "cow": ("csv", HEAD + b"cat,0.3\ndog,0.4\n", ["--positive", "cow"], ["cow", "cat", "dog"]),
    "yes for 1": ("csv", HEAD + b"0,0.3\n1,0.4\n", ["--positive", "yes"], ["yes"]),
    "logits": ("csv", HEAD + b"0,-1.5\n1,0.4\n", [], ["-1.5", "--exact"]),
    "lengths": ("npz", {"y_true": [0, 1], "y_score": [0.1, 0.2, 0.3]}, [], ["length"]),
    "rank 2": ("npz", {"y_true": [[0, 1]], "y_score": [[0.1, 0.2]]}, [], ["y_true"]),
    "text scores": ("npz", {"y_true": [0, 1], "y_score": ["a", "b"]}, [], ["y_score"]),
    "pickle": ("npz", {"y_true": np.array([0, 1], object), "y_score": [0.1, 0.2]}, [], ["NPZ"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_line_and_nothing_written(tmp_path, capsys, case):
    suffix, content, arguments, expected = BAD[case]
    path = tmp_path / f"scores.{suffix}"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    command = ["--scores", path, *arguments, "--output-dir", tmp_path / "out"]
    assert part1.main([*map(str, command)]) == 2
    error = check_refusal(2, capsys.readouterr().err, case).replace(str(tmp_path), "")
    assert all(text in error for text in expected) and not (tmp_path / "out").exists()


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
        quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        data = as_csv(rows, lineterminator=rng.choice(["\n", "\r\n"]), quoting=quoting)
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
        np.array([float(row[header.index(name)]) for row in rows])
        for name in ("y_true", "y_score")
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


def fuzz_scores(kind, number, random_input, read, tmp_path, capsys):
    """Each of ``number`` files is refused in one line, or read as it really is."""
    refused = 0
    for seed in range(number):
        rng = random.Random(f"{kind} {seed}")
        data, readable = random_input(rng)
        path, what = tmp_path / f"{seed}.{kind}", f"{kind} of seed {seed}"
        path.write_bytes(data)
        options = ["--scores", str(path), "--output-dir", str(tmp_path / "out")]
        status = part1.main(options + ["--exact"] * (seed % 2))
        text = capsys.readouterr().err
        if status == 0:
            assert readable is not False, what
            summary = json.loads((tmp_path / "out/summary.json").read_text())
            check_reading(read, data, summary, what)
        else:
            assert readable is not True, (what, text)
            line = check_refusal(status, text, what)
            assert path.name in line or "the scores run from" in line, what
            refused += 1
    assert number / 2 <= refused < 0.95 * number


def test_damaged_csv_files(tmp_path, capsys):
    fuzz_scores("csv", 200, random_csv, read_csv, tmp_path, capsys)


class Hostile:
    """What makes the folder ``marker`` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("marker",)


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
            {"y_score": bad}, {"y_true": strange}, {"y_true": labels * 0}, {"y_score": scores[1:]},
            {"y_score": scores[None]}, {"y_score": scores + 1j}, {"y_score": scores.astype(str)},
            {"y_true": labels[:0], "y_score": scores[:0]}, {"y_score": np.array(0.5)},
            {"y_true": np.array([Hostile()] * len(labels))},
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
    fuzz_scores("npz", 130, random_npz, read_npz, tmp_path, capsys)
    assert not (tmp_path / "marker").exists()
