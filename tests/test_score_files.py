"""Tests of reading score files: good ones, bad ones, and damaged ones by the hundred.

Every damaged file follows from a seed. ``main`` is called in the process, so an
exception that it does not turn into an exit status fails the test.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import random
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import Hostile, damaged_bytes, rounded
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
    "blank lines above": (b"\n\r\n" + ROWS.replace(b",", b"\t"), None),
    "no last newline": (ROWS.rstrip(), None),
    "float labels": (HEAD + b"1.0,0.9\n0.0,0.125\n0.0,0.5\n1.0,0.75\n", None),
    "columns": (b"a,y_score,b,y_true\n,0.9,x,1\n,0.125,x,0\n,0.5,x,0\n,0.75,x,1\n", None),
    "positive yes": (HEAD + b"yes,0.9\nno,0.125\nno,0.5\nyes,0.75\n", "yes"),
    "positive 1": (HEAD + b"1.0,0.9\n2,0.125\n0,0.5\n1,0.75\n", "1"),
    "positive 0": (HEAD + b"0,0.9\n1,0.125\n1,0.5\n0,0.75\n", "0"),
    "semicolons": (ROWS.replace(b",", b";"), None),
    "semicolons and decimal commas": (ROWS.replace(b",", b";").replace(b".", b","), None),
    "tabs": (ROWS.replace(b",", b"\t"), None),
    "bars": (ROWS.replace(b",", b"|"), None),
    "UTF-16": (ROWS.decode().encode("utf-16"), None),
    "UTF-16, big-endian": (b"\xfe\xff" + ROWS.decode().encode("utf-16-be"), None),
    "blanks": (ROWS.replace(b",", b" , ").replace(b"\n", b" \n"), None),
    "blanks around words": (HEAD + b"yes ,0.9\nno,0.125\n no,0.5\n yes,0.75\n", "yes"),
    "other names": (b"id,class,p\na,1,.9\nb,0,.125\nc,0,.5\nd,1,.75\n", None),
    "other names and words": (b"class,p\nbad,.9\ngood,.125\ngood,.5\nbad,.75\n", "bad"),
    "as Excel begins a file": (b"\xef\xbb\xbfsep=;\r\n" + ROWS.replace(b",", b";"), None),
    "signs": (HEAD + b"+,0.9\n-,0.125\n-,0.5\n+,0.75\n", "+"),
    "none as a word": (HEAD + b"mild,0.9\nnone,0.125\nnone,0.5\nmild,0.75\n", "mild"),
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
    labels, scores = read_scores(tmp_path / "s.csv", positive=positive)[:2]
    assert (labels.dtype, scores.dtype) == (bool, np.float64)
    assert (labels.tolist(), scores.tolist()) == (LABELS, SCORES)


@pytest.mark.parametrize("case", GOOD_NPZ)
def test_npz_is_read_in_its_own_precision(tmp_path, case):
    truth, dtype, positive = GOOD_NPZ[case]
    given = np.array(SCORES).astype(dtype)
    path = tmp_path / "s.npz"
    np.savez(path, y_true=truth, y_score=given)
    labels, scores = read_scores(path, positive=positive)[:2]
    assert (labels.dtype, labels.tolist()) == (bool, LABELS)
    assert scores.dtype == {"f2": np.float16, "f4": np.float32, ">f4": np.float32}.get(
        dtype, float
    )
    assert_array_equal(scores, given)


COUNTED, TIMES = b"y_true,y_score,times\n", ["--count-column", "times"]


def as_npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


BAD = {  # case: content of a CSV or NPZ file, further arguments, what the error names
    "no CSV": ("csv", None, [], ["scores.csv"]),
    "no NPZ": ("npz", None, [], ["scores.npz"]),
    "empty CSV": ("csv", b"", [], ["empty"]),
    "empty NPZ": ("npz", b"", [], ["NPZ"]),
    "header only": ("csv", HEAD, [], ["header"]),
    "an image": ("csv", b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", [], ["CSV"]),
    "open quote": ("csv", HEAD + b'1,"0.3\n0,0.4\n', [], ["CSV"]),
    "text as NPZ": ("npz", b"no archive", [], ["NPZ"]),
    "no column": ("csv", b"a,b,y_score\n1,1,.3\n0,1,.4\n", [], ["y_true", "a, b"]),
    "no array": (
        "npz",
        {"a": [0, 1], "b": [0.1, 0.2], "c": [0.5, 0.6]},
        [],
        ["y_true", "a, b, c"],
    ),
    "too many cases": (
        "csv",
        COUNTED + b"1,.9,5e15\n0,.1,5e15\n",
        TIMES,
        ["1e+16 cases in times", "fewer"],
    ),
    "no such column": ("csv", ROWS, ["--count-column", "times"], ["times", "y_true"]),
    "two columns": ("csv", b"y_true,y_score,y_score\n1,0.3,0.4\n", [], ["y_score"]),
    "short row": ("csv", HEAD + b"1,0.3\n0\n", [], ["line 3"]),
    "word as score": ("csv", HEAD + b"1,0.3\n\n0,many\n", [], ["line 4", "many"]),
    "NaN": ("csv", HEAD + b"1,0.3\n0,nan\n0,0.1\n1,inf\n", [], ["2 rows", "line 3", "nan"]),
    "NaN NPZ": (
        "npz",
        {"y_true": [0, 1, 1], "y_score": [0, np.nan, np.inf]},
        [],
        ["2 rows", "index 1"],
    ),
    "infinite in half precision": (
        "npz",
        {"y_true": [0, 1, 1], "y_score": np.float16([0, np.inf, 1])},
        ["--exact"],
        ["1 row", "index 1"],
    ),
    "too large to draw": ("csv", HEAD + b"1,1.7e308\n0,2\n", ["--exact"], ["1 row", "1e300"]),
    "unlabelled": ("csv", HEAD + b"1.0,.9\n,.8\n0.0,.1\n,.7\nNaN,.2\n", [], ["3 rows", "line 3"]),
    "unlabelled, named": (
        "csv",
        HEAD + b"1.0,.9\n,.8\n0.0,.1\n,.7\n",
        ["--positive", "1.0"],
        ["2 rows", "line 3"],
    ),
    "unlabelled NPZ": ("npz", {"y_true": [0, 1, np.nan], "y_score": [0, 0, 1]}, [], ["index 2"]),
    "None": ("csv", HEAD + b"yes,.9\nNone,.8\nno,.1\n-,.7\n", ["--positive", "yes"], ["2 rows"]),
    "no group": (
        "csv",
        b"y_true,y_score,who\n1,.9,a\n0,.8,None\n",
        ["--group-column", "who"],
        ["no group", "line 3"],
    ),
    "underscored label": ("csv", HEAD + b"1,.9\n0_1,.8\n0,.1\n", [], ["'0_1'", "line 3"]),
    "underscored score": ("csv", HEAD + b"1,.9\n0,0_1\n0,.1\n", [], ["'0_1'", "line 3"]),
    "no score": ("csv", HEAD + b"1,0.3\n0,\n0,0.1\n1,\n", [], ["2 rows", "line 3"]),
    "decimal commas": ("csv", HEAD + b"1,0,91\n0,0,12\n", [], ["2 rows", "line 2", "semicolons"]),
    "quoted decimal commas": (
        "csv",
        HEAD + b'1,"0,9"\n0,0.1\n',
        [],
        ["1 row", "0,9", "semicolons"],
    ),
    "long row": ("csv", HEAD + b"1,0.3\n0,0.2,5\n", [], ["1 row", "line 3"]),
    "above one": ("csv", HEAD + b"1,0.3\n0,1.0000001\n", [], ["1.0000001", "line 3", "--exact"]),
    "below blank lines": ("csv", b"\n\n" + HEAD + b"1,0.3\n0,x\n", [], ["'x'", "line 5"]),
    "late label": (
        "csv",
        HEAD + b"".join(b"%d,0.%d\n" % (i % 2, i) for i in range(1000)) + b"2,0.5\n",
        [],
        ["'2'", "line 1002", "--positive"],
    ),
    "no header": ("csv", b"1,0.9\n0,0.2\n", [], ["header", "y_true,y_score"]),
    "no header, words": ("csv", b"no,.5\nyes,.9\nno,.2\n", ["--positive", "yes"], ["header"]),
    "UTF-16, unmarked": ("csv", ROWS.decode().encode("utf-16-le"), [], ["UTF-16", "UTF-8"]),
    "UTF-16, big, unmarked": ("csv", ROWS.decode().encode("utf-16-be"), [], ["UTF-16", "UTF-8"]),
    "Parquet": ("parquet", b"PAR1\x15\x00", [], ["Parquet", "export", "CSV"]),
    "Excel": ("xlsx", b"PK\x03\x04\x14\x00", [], ["Excel", "export", "CSV"]),
    "old Excel": ("xls", b"\xd0\xcf\x11\xe0\xa1\xb1", [], ["Excel", "export", "CSV"]),
    "JSON": ("json", b'[{"y_true": 1, "y_score": 0.3}]', [], ["JSON", "export", "CSV"]),
    "JSON lines": ("jsonl", b'{"y_true": 1, "y_score": 0.3}\n', [], ["JSON", "export"]),
    "a pickle": ("pkl", pickle.dumps([1, 0]), [], ["pickle", "export", "CSV"]),
    "gzip unnamed": ("csv", gzip.compress(ROWS), [], ["gzip", "gzip -d"]),
    "not compressed": ("csv.gz", ROWS, [], ["cannot read"]),
    "cut off": ("csv.gz", gzip.compress(ROWS * 50)[:-20], [], ["cannot read"]),
    "not compressed xz": ("csv.xz", ROWS, [], ["cannot read"]),
    "three columns": ("npy", as_npy(np.ones((4, 3))), [], ["(4, 3)"]),
    "half a case": ("csv", COUNTED + b"1,0.3,2.5\n0,0.2,1\n", TIMES, ["2.5", "whole", "line 2"]),
    "minus a case": ("csv", COUNTED + b"1,0.3,2\n0,0.2,-1\n", TIMES, ["-1", "line 3"]),
    "no counted negatives": ("csv", COUNTED + b"1,0.3,2\n0,0.2,0\n", TIMES, ["both classes"]),
    "one class": ("csv", HEAD + b"1,0.3\n1,0.4\n", [], ["both classes"]),
    "word labels": ("csv", HEAD + b"cat,0.3\ndog,0.4\n", [], ["--positive", "cat", "dog"]),
    "three labels": ("csv", HEAD + b"0,0.3\n1,0.4\n2,0.4\n", [], ["--positive"]),
    "cow": ("csv", HEAD + b"cat,0.3\ndog,0.4\n", ["--positive", "cow"], ["cow", "cat", "dog"]),
    "another case": ("csv", b"a,b\nTRUE,.3\nFALSE,.4\n", ["--positive", "true"], ["'TRUE'"]),
    "which labels": ("csv", b"a,b,c\nx,x,.3\nx,y,.4\ny,x,.5\n", ["--positive", "x"], ["a, b, c"]),
    "no such label": ("csv", b"a,b\nx,.3\ny,.4\nz,.5\n", ["--positive", "w"], ["holds 'w'"]),
    "no such group": (
        "csv",
        b"ill,risk\n0,.3\n1,.4\n",
        ["--group-column", "patient_id"],
        ["'patient_id'", "ill", "--group-column"],
    ),
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


@pytest.mark.parametrize("suffix, compress", [
    ("csv.gz", gzip.compress), ("csv.bz2", bz2.compress), ("csv.xz", lzma.compress),
])  # fmt: skip
def test_compressed_files_are_read(tmp_path, suffix, compress):
    (tmp_path / f"s.{suffix}").write_bytes(compress(ROWS))
    labels, scores = read_scores(tmp_path / f"s.{suffix}")[:2]
    assert (labels.tolist(), scores.tolist()) == (LABELS, SCORES)


@pytest.mark.parametrize("data", [ROWS, as_npy(np.array([LABELS, SCORES]).T)])
def test_standard_input_is_read(tmp_path, monkeypatch, data):
    """CSV, and an NPY array of label and score."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert part1.main(["--scores", "-", "--output-dir", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["n"], summary["n_positive"], summary["roc_auc"]) == (4, 2, 1)


def test_a_closed_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert part1.main(["--scores", "-", "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "closed" in error and error.count("\n") == 1


def test_columns_that_nobody_named_are_named(tmp_path, capsys):
    """One of 0 and 1 and one of numbers; of two other values it asks for the positive one."""
    path = tmp_path / "s.csv"
    path.write_bytes(b"outcome,risk,name\n1,.9,a\n0,.1,b\n0,.5,c\n")
    assert part1.main(["--scores", str(path), "--output-dir", str(tmp_path / "out")]) == 0
    assert "Labels are taken from outcome, scores from risk." in capsys.readouterr().out
    path.write_bytes(b"y_true,risk,name\n1,.9,a\n0,.1,b\n0,.5,c\n")  # or of one
    assert part1.main(["--scores", str(path), "--output-dir", str(tmp_path / "out")]) == 0
    assert "Labels are taken from y_true, scores from risk." in capsys.readouterr().out
    path.write_bytes(b"case,outcome,risk,age\n1,1,.9,40\n2,0,.1,50\n3,0,.5,30\n")
    options = ["--scores", str(path), "--output-dir", str(tmp_path / "out")]
    assert part1.main(options) == 0  # the others lie outside [0, 1]
    assert "Labels are taken from outcome, scores from risk." in capsys.readouterr().out
    assert part1.main([*options, "--exact"]) == 2 and "age" in capsys.readouterr().err
    for words in b"outcome,risk\nbad,.9\ngood,.1\n", b"outcome,risk\n1,.9\n2,.1\n2,.5\n":
        path.write_bytes(words)
        assert part1.main(["--scores", str(path), "--output-dir", str(tmp_path / "out")]) == 2
        assert "--positive" in check_refusal(2, capsys.readouterr().err, words)


def test_arrays_of_other_shapes_are_no_columns(tmp_path):
    """A note or a matrix beside labels and scores."""
    arrays = {"ill": [0, 1], "risk": [0.1, 0.9], "note": "run 7", "more": [["a", "b"]]}
    np.savez(tmp_path / "a.npz", **arrays)
    assert read_scores(tmp_path / "a.npz").labels.tolist() == [False, True]


def test_of_several_negative_labels_each_is_told(tmp_path):
    """And the column that holds the positive one is found; the rarest, perhaps an error, first."""
    path = tmp_path / "s.csv"
    path.write_bytes(b"outcome,risk,case\nbad,.9,a\ngood,.1,b\ngood,.2,c\ngod,.3,d\n")
    cases = read_scores(path, positive="bad")
    assert cases.labels.tolist() == [True, False, False, False]
    assert cases.remark.endswith("from risk. Negative labels: 'god' (1), 'good' (2).")
    path.write_bytes(b"kind,sex,score\na,m,.9\nb,f,.1\nc,m,1\na,f,1\n")
    assert read_scores(path, positive="a").labels.tolist() == [True, False, False, True]
    path.write_bytes(b"y_true,y_score,n\n3,.9,1\n1,.1,5\n2,.2,7\n")
    assert (
        read_scores(path, positive="3", count="n").remark == "Negative labels: '1' (5), '2' (7)."
    )
    path.write_bytes(HEAD + b"bad,.9\ngood,.1\n")
    assert read_scores(path, positive="bad").remark == ""


def test_a_row_that_counts_n_times_equals_n_rows(tmp_path):
    """Every number of the run, with ties and rows that count for nothing."""
    rng = np.random.default_rng(0)
    labels, counts = np.arange(60) % 3 == 0, rng.integers(0, 5, 60)
    scores = (0.5 * rng.random(60) + 0.3 * labels).round(2)
    np.savez(tmp_path / "a.npz", y_true=labels, y_score=scores, times=counts)
    rows = np.arange(60).repeat(counts)
    np.savez(tmp_path / "b.npz", y_true=labels[rows], y_score=scores[rows])
    found = []
    for name, more in ("a", ["--count-column", "times"]), ("b", []):
        out = ["--exact", "--output-dir", str(tmp_path / name)]
        assert part1.main(["--scores", str(tmp_path / f"{name}.npz"), *more, *out]) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        found.append(summary | {"source": ""})
    assert rounded(found[0]) == rounded(found[1])


GROUP_BY = """
COPY (SELECT y_true, round(y_score, 4) AS y_score, count(*) AS n
      FROM 'scores.parquet' GROUP BY ALL) TO 'counts.csv' (HEADER)
"""


def test_a_database_can_do_the_counting(tmp_path):
    """README's GROUP BY, on ten million scores of four decimals in a Parquet file."""
    duckdb = pytest.importorskip("duckdb")
    database, file = duckdb.connect(), tmp_path / "scores.parquet"
    database.execute(
        "COPY (SELECT (hash(i) % 10 < 3)::INT AS y_true, round(least(0.9999, hash(i + 1) % 10000"
        " / 20000 + (hash(i) % 10 < 3)::INT * (hash(i + 2) % 5000) / 10000), 4) AS y_score FROM "
        f"range(10_000_000) t(i)) TO '{file}' (FORMAT parquet)"
    )
    query = GROUP_BY.replace("scores.parquet", str(file))
    database.execute(query.replace("counts.csv", str(tmp_path / "counts.csv")))
    direct = database.execute(f"SELECT y_true, y_score FROM '{file}'").fetchnumpy()
    np.savez(tmp_path / "scores.npz", **direct)
    found = []
    for name, more in ("counts.csv", ["--count-column", "n"]), ("scores.npz", []):
        out = tmp_path / "out"
        assert part1.main(["--scores", str(tmp_path / name), *more, "--output-dir", str(out)]) == 0
        found.append(json.loads((out / "summary.json").read_text()) | {"source": ""})
    assert found[0]["n"] == 10_000_000
    assert rounded(found[0]) == rounded(found[1])


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
            lambda: rows.pop(0), lambda: rows[0].__setitem__(1, "y_score"), lambda: row.pop(),
            lambda: rows[0].__setitem__(0, "y_true"), lambda: rows.__delitem__(slice(1, None)),
            rows.clear,
        ])()  # fmt: skip
        return as_csv(rows), False
    if way == 6:  # other bytes altogether
        return rng.choice([
            rng.randbytes(300), as_csv(rows).decode().encode("utf-16-le"), b'"' + as_csv(rows),
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
            {"y_score": scores[None]}, {"y_score": scores + 1j},
            {"y_true": labels[:0], "y_score": scores[:0]}, {"y_score": np.array(0.5)},
            {"y_true": np.array([Hostile("marker")] * len(labels))},
            {"y_score": np.array(list(scores), dtype=object)},
        ])  # fmt: skip
        return as_npz(**good | other), False
    if way == 4:
        others = ({"y_true": "label"}, labels), ({"y_score": "score"}, scores)
        rename, good["more"] = rng.choice(others)  # of two it takes neither
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


def test_a_column_of_predictions_is_not_taken_for_the_labels(tmp_path, capsys):
    path = tmp_path / "p.csv"
    rows = [f"{'sick' if i % 3 else 'well'},{i % 2},{i / 50:.2f}" for i in range(50)]
    path.write_text("\n".join(["outcome,pred,score", *rows]))
    assert part1.main(["--scores", str(path), "--output-dir", str(tmp_path / "out")]) == 2
    assert "--label-column" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["N/A", "#N/A", "<NA>", "\\N", "?", "null"])
def test_missing_labels_and_groups_are_not_cases(tmp_path, capsys, missing):
    for column in ("y_true", "day"):
        path = tmp_path / f"{column}.csv"
        rows = [f"{i % 2},{i / 50:.2f},{i % 25}" for i in range(49)]
        rows.append(f"{missing},0.5,1" if column == "y_true" else f"1,0.5,{missing}")
        path.write_text("\n".join(["y_true,y_score,day", *rows]))
        options = ["--positive", "1", "--group-column", "day", "--output-dir", str(tmp_path / "o")]
        assert part1.main(["--scores", str(path), *options]) == 2
        assert "line 51" in capsys.readouterr().err
