"""What both scripts share: errors, console, files, scores, figures, seeds, checkpoints.

torch and matplotlib are imported where they are used, so that part 1 never waits for torch.
"""

import argparse
import atexit
import bz2
import csv
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from collections import namedtuple
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

try:
    import fcntl
except ImportError:  # on Windows, where folders are not locked
    fcntl = None

# %% Command line


class UserError(Exception):
    """An error that the user can fix, in one line: what is wrong and what to do."""


class RunFailed(Exception):
    """The run itself went wrong (a loss that is not finite): exit status 1."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything worth keeping was saved; the text says what to do."""


def command(main):
    """Let ``main(argv)`` end without a traceback and return an exit status.

    That is 0 (done), 1 (the run failed), 2 (the user can fix it) or 130 (Ctrl-C).
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A log shows each line at once; a terminal without UTF-8 shows a
            # foreign column name as \xe9 instead of ending the run.
            sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        try:
            main(argv)
            return 0
        except (UserError, RunFailed) as error:
            text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # colours of others
            text = f"process {rank()}: {text}" if rank() else text
            print(f"error: {' '.join(text.split())}", file=sys.stderr)
            return 2 if isinstance(error, UserError) else 1
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate" not in str(error):  # torch's
                raise
            print("error: not enough memory: give less data or smaller batches", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            with suppress(KeyboardInterrupt):  # pressed twice
                print(f"\ninterrupted{f': {stop}' if str(stop) else ''}", file=sys.stderr)
            return 130
        finally:
            while LOCKED:
                os.close(LOCKED.popitem()[1])

    return wrapped


class Parser(argparse.ArgumentParser):
    """One that reports a wrong option as `command` does all errors: in one line."""

    def __init__(self, **how):
        super().__init__(usage="%(prog)s [OPTION ...]", **how)

    def error(self, message):
        """Raise what argparse would print below its whole usage."""
        raise UserError(f"{message} (--help lists the options)")

    def format_help(self):
        """Say a default only where there is one."""
        return re.sub(r"\s+\(default:\s+(None|False)\)", "", super().format_help())


def number(low, high=math.inf, ends="[]", kind=float):
    """Argparse type: a finite number from ``low`` to ``high``; ``ends`` as in [0, 1)."""
    span = f"{ends[0]}{low:,}, {high:,}{ends[1]}".replace("inf]", "inf)")

    def parse(text):
        try:
            value = kind(text.replace("_", "?"))  # Python would read 1_0 as 10
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text[:30]!r} is not a {what}") from None
        excluded = (value == low and ends[0] == "(") or (value == high and ends[1] == ")")
        if excluded or not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text:.30} is out of range: give one in {span}")
        return value

    return parse


def option(name):
    """The option that an argument was given by."""
    return f"--{name.replace('_', '-')}"


def integer(low, high=10**9):
    """Argparse type: a whole number from ``low`` to ``high``."""
    return number(low, high, kind=int)


def name_or_path(names, kind):
    """Argparse type: one of ``names``, or an existing "file" or "folder" as its whole path."""

    def parse(text):
        path = user_path(text)
        if text not in names and not (path.is_dir() if kind == "folder" else path.is_file()):
            text = f"{text!r} is no {kind}, and none of {', '.join(names)}"
            raise argparse.ArgumentTypeError(text)
        return text if text in names else str(path.resolve())

    return parse


# %% Console


def say(*lines):
    """Print each line at once; if the reader has gone (``| head``), go on in silence."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:
        # The results are in files; a closed pipe or a full log must not end a run.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(text):
    """Print a paragraph, wrapped and indented; a table's row (indented) stays as it is."""
    width = max(30, min(80, shutil.get_terminal_size().columns))
    if not text.startswith("  "):
        how = {"initial_indent": "  ", "subsequent_indent": "  ", "break_on_hyphens": False}
        text = textwrap.fill(text, width, **how)
    say(text)


def show_progress(text):
    """Draw ``text`` over the current line, where standard output is a terminal that can."""
    if sys.stdout and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        print(f"\r\033[K{text}", end="", flush=True)


def progress_bar(done, total, seconds, later=0):
    """What was done in ``seconds`` and the time left, of which ``later`` comes after ``total``."""
    left = seconds / done * (total - done)
    text = f"[{'#' * (20 * done // total):.<20}] {done / total:4.0%}, {left:.0f} s left"
    return text + f", {left + seconds / done * later:.0f} s to the end" * bool(later)


@contextmanager
def ctrl_c():
    """Yield a list that Ctrl-C fills, so that a loop can stop; a second one stops at once."""
    pressed, before = [], signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN or threading.current_thread() != threading.main_thread():
        yield pressed  # ignored since the start, as under nohup; or not ours to handle
        return

    def first(signum, frame):
        pressed.append(signum)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, first)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


# %% Files


def check_output(path):
    """Raise a UserError unless the folder ``path`` is, or could be made, writable."""
    path = path.absolute()
    there = next(part for part in (path, *path.parents) if os.path.exists(part))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        text = f"cannot write into the folder {path} ({there} is not a writable folder)"
        raise UserError(f"{text}: choose another --output-dir")


def user_path(text):
    """Argparse type: a path, ~ expanded."""
    return Path(text).expanduser()


LOCKED = {}  # folders of this run; an open handle keeps the lock until the process ends


def output_folder(path):
    """Make the folder ``path`` and keep other processes from writing into it.

    UserError if it cannot be written to, or another process is writing into it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        text = f"cannot write into the folder {path} ({error.strerror})"
        raise UserError(f"{text}: choose another --output-dir") from error
    inode = path.stat().st_ino
    if fcntl and inode not in LOCKED:
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            text = f"{_owner_of(inode)} is writing into {path}"
            raise UserError(f"{text}: wait for it, or choose another --output-dir") from error
        LOCKED[inode] = handle
    return path


def _owner_of(inode):
    """The process that has locked a file, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            if f":{inode} " in line:
                return f"process {line.split()[4]}"
    return "another process"


def write_bytes(path, data):
    """Replace the file ``path``, which holds all old or all new bytes at any moment."""
    beside = Path(path).with_name(f".{Path(path).name}.part")
    try:
        if not beside.parent.exists():
            say(f"{beside.parent} was deleted while this ran: it is made again, with what follows")
            beside.parent.mkdir(parents=True)
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        text = f"cannot write {path} ({error.strerror}), so it is unchanged: free some space"
        raise UserError(f"{text} or choose another --output-dir") from error
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, values):
    """Write ``values`` as strict JSON; a number that is not finite becomes null."""
    text = json.dumps(_plain(values), indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_csv(path, columns):
    """Write a table of ``columns`` by name; floats read back exactly, NaN is an empty field."""
    values = [np.asarray(column).tolist() for column in columns.values()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if x != x else x for x in row] for row in zip(*values))
    write_bytes(path, text.getvalue().encode(errors="backslashreplace"))  # a file's odd name


def read_csv(path):
    """Rows of a table with a header, as dicts of text; UserError if it is no such table."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("rows are longer or shorter than its header")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read the table {path} ({error}): restore it") from error
    return rows


def read_json(path):
    """Read a JSON object as a dict; UserError if it is something else."""
    try:
        values = json.loads(Path(path).read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): restore it or delete it") from error
    return values


# %% Data files


def check_md5(path, expected, whole=None):
    """Raise a UserError unless a file has this MD5; ``whole`` is what to delete if it has not."""
    again = f"{whole or path} to have it fetched again"
    try:
        found = md5_of(path)
    except OSError as error:
        text = f"cannot read {path} ({error.strerror}): restore it, or move away {again}"
        raise UserError(text) from error
    if found != expected:
        text = f"{path} is damaged: its md5 is {found} instead of {expected}: delete {again}"
        raise UserError(text)


class Unavailable(UserError):
    """A data set is neither in its folder nor to be had from a server."""


Archive = namedtuple("Archive", "name size md5 urls")  # a tar file that several servers have


@contextmanager
def unpacked(archive, name, folder):
    """Yield a folder that holds the folder ``name`` of an archive, fetched if need be.

    ``folder`` may also be ``name`` itself, or hold it a level deeper, as unzip tools leave it, or
    hold the archive, packed or plain. ``name`` appears when it is whole, so that a sudden end
    does no harm; where ``folder`` is read-only, in a temporary one.
    """
    places = [folder / name, folder, *[folder.parent] * (folder.resolve().name == name)]
    path, plain = folder / archive.name, folder / Path(archive.name).stem
    with ExitStack() as stack:
        # os.path's, unlike pathlib's, raise no error where it is forbidden to look.
        found = [place for place in places if os.path.isdir(place / name)]
        if not found:
            if not (os.path.exists(path) or os.path.exists(plain)):
                _fetch_archive(archive, path)
            if os.path.exists(path):
                check_md5(path, archive.md5)
            if not os.access(folder, os.W_OK, effective_ids=True):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _unpack(path if os.path.exists(path) else plain, name, folder)
        yield (found or [folder])[0]


def _fetch_archive(archive, path):
    tell(f"{path} is not there: fetching it ({archive.size / 1e6:.0f} MB).")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download(archive.urls, path, archive.md5)
    except (UserError, OSError) as error:
        where = f"put {archive.name} ({archive.size} bytes, md5 {archive.md5}) into {path.parent}"
        where += ", or name a folder that has it with --data-dir"
        seen = [each for each in _listed(path.parent) if not each.startswith(".")]
        if seen:  # the user meant this folder
            raise UserError(
                f"{path.parent} holds {', '.join(seen[:3])}; {error}: {where}"
            ) from error
        raise Unavailable(f"{error}: {where}") from error


def _listed(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _unpack(archive, name, folder):
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as hidden:
            with tarfile.open(archive) as tar:
                tar.extractall(hidden, filter="data")
            Path(hidden, name).rename(folder / name)
    except OSError as error:
        if not (folder / name).is_dir():  # otherwise another process was faster
            raise UserError(f"cannot unpack {archive} ({error.strerror})") from error


def md5_of(path):
    """MD5 of a file as 32 hex digits (an identity check, not a security one)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def sha256_of(path):
    """SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5_of_arrays(*arrays):
    """MD5 of the bytes of arrays or tensors, one after the other."""
    md5 = hashlib.md5(usedforsecurity=False)
    for array in arrays:
        md5.update(np.ascontiguousarray(array))
    return md5.hexdigest()


def download(urls, path, md5, stall_seconds=15):
    """Fetch the file with this MD5 from the first of ``urls`` that delivers it.

    The bytes go into a file of this process's own, which becomes ``path`` only when the MD5 is
    right; if no address delivers it, the UserError names each failure.
    """
    failures = {}  # servers by the reason: without an internet connection it is the same
    for url in urls:
        tell(f"Downloading from {urllib.parse.urlsplit(url).hostname}.")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".download-")
        try:
            with os.fdopen(handle, "wb") as file:
                _fetch(url, file, stall_seconds)
            if (found := md5_of(name)) != md5:
                raise ValueError(f"md5 {found} instead of {md5}")
            os.chmod(name, 0o644)  # a temporary file is its owner's alone
            return os.replace(name, path)
        except (OSError, ValueError, EOFError, http.client.HTTPException) as error:
            failures.setdefault(str(error) or type(error).__name__, []).append(url)
        finally:
            Path(name).unlink(missing_ok=True)
    failures = "; ".join(f"{', '.join(tried)}: {why}" for why, tried in failures.items())
    raise UserError(f"no server delivered {path.name} ({failures})")


def _fetch(url, file, stall_seconds):
    """Copy ``url`` into ``file``; give up a connection that stalls, or drips below 5 kB/s."""
    with urllib.request.urlopen(url, timeout=stall_seconds) as response:
        total = int(response.headers.get("Content-Length") or 0)
        done, shown, told, since = 0, time.monotonic(), 0.1, (time.monotonic(), 0)
        while block := response.read1(1 << 16):
            file.write(block)
            done, now = done + len(block), time.monotonic()
            if now - since[0] > 2 * stall_seconds:
                if done - since[1] < 5_000 * (now - since[0]):
                    raise TimeoutError(f"{done - since[1]} bytes in {now - since[0]:.0f} s")
                since = now, done
            if now - shown > 1:
                show_progress(f"  {done / 1e6:.0f} MB" + f" of {total / 1e6:.0f}" * bool(total))
                shown = now
            if not sys.stdout.isatty() and total and done / total >= told:
                told = done * 10 // total / 10
                say(f"  {told:.0%} of {total / 1e6:.0f} MB")
                told += 0.1
        show_progress("")
        if total and done != total:
            raise EOFError(f"the connection ended after {done} of {total} bytes")


# %% Score files

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
FOREIGN = {  # how files of other kinds begin, what they are, and what exports them as CSV
    b"PAR1": ("a Parquet file", "DuckDB: COPY 'file.parquet' TO 'scores.csv'"),
    b"\x80": ("a pickle, which could run any program", "pandas' to_csv"),
    b"\xd0\xcf\x11\xe0": ("an Excel file", "its menu: Save as CSV"),
    b"PK\x03\x04": ("an Excel file or another archive", "its menu: Save as CSV"),
    b"\x1f\x8b": ("a gzip file", "gzip -d"),
    b"[": ("a JSON file", "pandas' to_csv"),
    b"{": ("a JSON file", "pandas' to_csv"),
}
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # the marks it begins with
MISSING = ("", "nan", "na", "n/a", "#n/a", "<na>", "null", "\\n", "?", "None", "-")  # as a label


class Cases(NamedTuple):
    """What a score file holds."""

    labels: np.ndarray  # bool, (n,)
    scores: np.ndarray  # float, (n,), in the file's own precision
    counts: np.ndarray | None = None  # int64, (n,): cases that each row stands for
    groups: np.ndarray | None = None  # int, (n,): which person, place or day a case belongs to
    remark: str = ""  # which columns were taken, if nobody said, and which labels are negative

    @property
    def n(self):
        """The number of cases."""
        return len(self.labels) if self.counts is None else int(self.counts.sum())


@dataclass(frozen=True)
class _Table:
    """Columns as they were read, and where each row was."""

    path: str
    columns: dict
    unit: str = "index"
    places: list | range = range(2**62)
    comma: bool = False  # whether numbers may be written 0,5

    def refuse(self, bad, what, values, remedy):
        """Raise a UserError if any row is ``bad``: how many, the first one and its value."""
        if (rows := np.flatnonzero(bad)).size:
            first = rows[0]
            raise UserError(
                f"{self.path}: {what} in {rows.size} row{'s' * (rows.size > 1)}, the first in "
                f"{self.unit} {self.places[first]} ({str(values[first])!r:.40}): {remedy}"
            )

    def numbers(self, name):
        """A column as numbers; what is none becomes NaN."""
        column = self.columns[name]
        if isinstance(column, np.ndarray) and column.dtype.kind not in "US":
            return column if column.dtype.kind in "fiub" else np.full(len(column), math.nan)
        return np.array([_number(text, self.comma) for text in column])


def read_scores(path, label=None, score=None, positive=None, count=None, group=None, unit=False):
    """Read labels and scores from a table with a header, or from NumPy's arrays.

    Parameters
    ----------
    path : path-like
        CSV with comma, semicolon, tab or bar, also compressed; NPZ, or NPY of shape (n, 2);
        ``-`` is standard input.
    label, score, count, group : str, optional
        Names of columns; the first two are ``y_true`` and ``y_score``, or found by their values.
    positive : str, optional
        The label that is positive, all others being negative; otherwise labels are 0 and 1.
    unit : bool
        Refuse scores outside [0, 1].

    Returns
    -------
    Cases

    Raises
    ------
    UserError
        If the file, a column, a score or a label is not what it should be.
    """
    table = _read_table(path)
    names = [name for name in (count, group) if name]
    label, score, remark = _find_columns(table, label, score, positive, names, unit)
    for name, flag in ((count, "--count-column"), (group, "--group-column")):
        if name and name not in table.columns:
            raise UserError(f"{table.path} {_without(table, name)}: name yours with {flag}")
    shapes = {name: np.shape(table.columns[name]) for name in (label, score, *names)}
    if len({*shapes.values()}) > 1 or len(shapes[label]) != 1:
        shapes = " and ".join(f"{name} has shape {shape}" for name, shape in shapes.items())
        raise UserError(f"{table.path}: {shapes}: give columns of equal length")
    if shapes[label] == (0,):
        raise UserError(f"{table.path} has a header but no cases: give a file with scores")
    counts = _find_counts(table, count) if count else None
    values = _as_labels(table, label)
    labels = _find_positives(table, label, values, positive, counts)
    if positive is not None:
        remark = f"{remark} {_list_negatives(values, labels, counts)}".strip()
    scores = _find_scores(table, score, unit)
    groups = _find_groups(table, group) if group else None
    held = slice(None) if counts is None else counts > 0
    some = [array if array is None else array[held] for array in (labels, scores, counts, groups)]
    return Cases(*some, remark)


def named(path):
    """A file as the console calls it."""
    return "standard input" if str(path) == "-" else str(path)


def _read_table(path):
    name = named(path)
    suffix = Path(path).suffix.lower()
    try:
        with _open(path) as file:
            head = file.read(6)
            file.seek(0)
            if suffix == ".npz":
                return _Table(name, _read_arrays(name, file))
            if head == b"\x93NUMPY":
                return _Table(name, _read_array(name, file))
            for start, (what, way) in FOREIGN.items():
                if head.startswith(start):
                    raise UserError(f"{name} is {what}: export it as CSV, for example by {way}")
            if b"\0" in head and head[:2] not in UTF_16:
                raise UserError(f"{name} is UTF-16 without its mark, or no text: save it as UTF-8")
            return _read_csv(name, file, "utf-16" if head[:2] in UTF_16 else "utf-8-sig")
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {name}: {reason}") from error


def _open(path):
    if str(path) == "-":
        if sys.stdin is None:
            raise UserError("standard input is closed: name a file instead of -")
        return io.BytesIO(sys.stdin.buffer.read())
    return OPENERS.get(Path(path).suffix.lower(), open)(path, "rb")


def _read_csv(path, file, encoding):
    rows, lines = [], []
    try:
        text = io.TextIOWrapper(file, encoding, newline="")
        above, top = [], next(text, "")
        while re.fullmatch(r"(sep=.)?\r?\n", top):  # blank, or as Excel begins a file
            above, top = [*above, "\n"], next(text, "")
        mark = max(",;\t|", key=top.count)
        reader = csv.reader(itertools.chain(above, [top], text), strict=True, delimiter=mark)
        header = [name.strip() for name in next(filter(None, reader), [])]
        for row in filter(None, reader):
            rows.append(row)
            lines.append(reader.line_num)
    except (UnicodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file ({error}): give CSV, NPZ or NPY") from error
    if not header:
        raise UserError(f"{path} is empty: give a CSV file with a header, NPZ or NPY")
    _refuse_numbers(path, header, all)
    table = _Table(path, dict.fromkeys(header, ()), "line", lines, mark == ";")
    fields = [len(row) for row in rows]
    table.refuse(
        np.array(fields) != len(header),
        f"more or fewer fields than the header, which has {len(header)},",
        [mark.join(row) for row in rows],
        "fix them; decimal commas need semicolons between the columns",
    )
    if len(table.columns) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"{path} has more than one column {twice!r}: rename all but one")
    return replace(table, columns=dict(zip(header, zip(*rows)))) if rows else table


def _refuse_numbers(path, header, some):
    if some(np.isfinite([_number(name, True) for name in header])):
        raise UserError(f"{path} begins with data: give it a header, such as y_true,y_score")


def _read_arrays(path, file):
    """The arrays of an NPZ file; nothing pickled is loaded."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            columns = {name: _as_text(arrays[name]) for name in arrays.files}
    except Exception as error:  # a damaged archive can raise almost anything
        raise UserError(f"{path} is not a readable NPZ file ({error})") from error
    if not columns:
        raise UserError(f"{path} is empty: give an NPZ file with labels and scores")
    return columns


def _read_array(path, file):
    try:
        array = _as_text(np.load(file, allow_pickle=False))
    except (ValueError, EOFError, MemoryError) as error:
        raise UserError(f"{path} is not a readable NPY file ({error})") from error
    if array.ndim != 2 or array.shape[1] != 2:
        raise UserError(f"{path} has shape {array.shape}: give one of (n, 2), label and score")
    return {"y_true": array[:, 0], "y_score": array[:, 1]}


def _as_text(array):
    if array.dtype.kind == "S":
        return np.char.decode(array, "utf-8", "backslashreplace")
    return array


def _find_columns(table, label, score, positive, others, unit):
    """Names of label and score, and what to say of a choice that nobody made."""
    columns = table.columns
    label = label or ("y_true" if "y_true" in columns else None)
    score = score or ("y_score" if "y_score" in columns else None)
    if not (label and score):
        others = [*others, label, score]
        flat = [n for n, c in columns.items() if getattr(c, "ndim", 1) == 1 and n not in others]
        kinds = {name: _kind(table, name) for name in flat}
        labels = [name for name in kinds if kinds[name] in ("0 and 1", "two words")]
        labels = labels or [name for name in kinds if kinds[name] == "two numbers"]
        if positive is not None:  # there may be three labels
            few = [name for name in kinds if kinds[name] != "numbers"]
            held = [n for n in few if _is_label(_as_labels(table, n), positive.strip()).any()]
            labels = held or labels
        labels = [label] if label else labels
        scores = [name for name in kinds if "numbers" in kinds[name] and name not in labels]
        if unit and len(scores) > 1:  # the others may be numbers of cases, or ages
            shares = [n for n in scores if np.all(abs(table.numbers(n) - 0.5) <= 0.5)]
            scores = shares or scores
        scores = [score] if score else scores
        if len(labels) == len(scores) == 1 and {*labels, *scores} <= {*columns}:
            _refuse_numbers(table.path, [*labels, *scores], any)
            remark = f"Labels are taken from {labels[0]}, scores from {scores[0]}."
            return labels[0], scores[0], remark
    for name in (label or "y_true", score or "y_score"):
        if name not in columns:
            text = f"{_without(table, name)}: name yours with --label-column and --score-column"
            if positive is not None and not label:
                text += f", and see that one of them holds {positive!r}"
            raise UserError(f"{table.path} {text}")
    return label, score, ""


def _without(table, name):
    return f"has no column {name!r} among {textwrap.shorten(', '.join(table.columns), 300)}"


def _kind(table, name):
    numbers, values = table.numbers(name), {*np.ravel(table.columns[name]).tolist()}
    if np.isin(numbers, (0, 1)).all():
        return "0 and 1"
    kind = "numbers" if np.isfinite(numbers).all() else "words"
    return f"two {kind}" if len(values) == 2 else kind


def _find_scores(table, name, unit):
    scores = table.numbers(name)
    text = table.columns[name]
    remedy = "give a number in each row"
    if any("," in str(value) for value in text[:1000]):
        remedy += "; decimal commas need semicolons between the columns"
    bad = ~(abs(scores) <= np.float64(1e300))  # NaN, too; beyond it figures cannot be drawn
    table.refuse(bad, f"no number within +-1e300 in {name}", text, remedy)
    if unit:
        what = f"a score outside [0, 1] in {name}"
        remedy = "give probabilities, or add --exact for other scores"
        table.refuse((scores < 0) | (scores > 1), what, text, remedy)
    narrow = scores.dtype.kind == "f" and scores.dtype.itemsize <= 8
    return scores.astype(scores.dtype.newbyteorder("=") if narrow else np.float64, copy=False)


def _find_counts(table, name):
    counts, text = table.numbers(name), table.columns[name]
    bad = ~((counts >= 0) & (counts == np.floor(counts)) & (counts < 2**53))
    table.refuse(bad, f"no whole number of cases in {name}", text, "round or remove them")
    if (total := counts.sum(dtype=float)) >= 2**53:  # where floats begin to skip numbers
        what = f"{total:.3g} cases in {name} are more than 9e15, which can be counted exactly"
        raise UserError(f"{table.path}: {what}: give fewer")
    return counts.astype(np.int64)


def _find_groups(table, name):
    values = np.array([str(value).strip() for value in np.ravel(table.columns[name]).tolist()])
    table.refuse(_is_missing(values), f"no group in {name}", values, "name it")
    return np.unique(values, return_inverse=True)[1]


def _is_missing(values):
    absent = np.isin(values, MISSING) | np.isin(np.char.lower(values), MISSING)
    return absent & ((values != "-") | ~(values == "+").any())  # beside + it is a sign


def _as_labels(table, name):
    values = table.columns[name]
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
        return values
    return np.array([str(value).strip() for value in values])


def _is_label(values, sought):
    """Where labels are ``sought``, as numbers if all of them are, else as text."""
    numbers, wanted = _as_numbers(values), _as_numbers(np.array([sought]))
    as_text = numbers is None or wanted is None
    return values.astype(str) == sought if as_text else numbers == wanted


def _find_positives(table, name, values, positive, counts):
    """Labels as bool: 1 (or ``positive``) against 0 (or every other value)."""
    absent = _is_missing(values) if values.dtype.kind == "U" else np.isnan(values)
    table.refuse(absent, f"no label in {name}", values, "label or remove them")
    known = np.unique(values[:1000]).tolist()
    known = ", ".join(map(repr, known[:5])) + ", ..." * (len(known) > 5)
    sought = "1" if positive is None else positive.strip()
    labels = _is_label(values, sought)
    if positive is None:
        remedy = f"there is {known}; say with --positive which label is positive"
        strange = ~(labels | _is_label(values, "0"))
        table.refuse(strange, f"a label in {name} that is neither 0 nor 1", values, remedy)
    held = labels if counts is None else labels[counts > 0]
    if not held.any() or held.all():
        raise UserError(
            f"{table.path}: the labels in {name} are {'all' if held.any() else 'never'} "
            f"{sought} (there is {known}): both classes are needed; see --positive"
        )
    return labels


def _list_negatives(values, labels, counts):
    """The negative labels, the rarest first, for it may be misspelt; "" if there is but one."""
    rest = ~labels if counts is None else ~labels & (counts > 0)
    others, index = np.unique(values[rest], return_inverse=True)
    n = np.bincount(index, None if counts is None else counts[rest])
    rarest = [f"{str(others[i])!r:.40} ({n[i]:,.0f})" for i in n.argsort(kind="stable")[:5]]
    text = f"Negative labels: {', '.join(rarest)}{' and others' * (len(n) > 5)}."
    return text * (len(n) > 1)


def _as_numbers(values):
    if values.dtype.kind in "fiub":
        return values
    if values.dtype.kind == "U" and np.char.count(values, "_").any():  # 0_1 is no 1
        return None
    try:
        return values.astype(float)
    except (ValueError, TypeError):
        return None


def _number(text, comma):
    try:
        return float(text.replace("_", "?").replace(",", "." if comma else ","))
    except ValueError:
        return math.nan


# %% Pictures


def files_in(folder):
    """Files directly in a folder, by name and without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if not e.name.startswith(".") and not e.is_dir()]
    except OSError as error:
        raise UserError(f"cannot look into {folder} ({error.strerror}): name another") from error
    return [Path(folder, name) for name in sorted(names)]


def files_of(paths):
    """The files among ``paths``, and those in its folders; UserError if there are none."""
    groups = [files_in(path) if os.path.isdir(path) else [path] for path in paths]
    if not (files := sum(groups, [])):
        raise UserError(f"there is no file in {some_of(list(map(str, paths)))}: name another")
    return files


def likeliest(files, probs, classes):
    """A dict for each file: its name, and its likeliest classes with their probabilities."""
    rows, top = [], probs.topk(min(3, len(classes)))
    for file, shares, labels in zip(files, top.values.tolist(), top.indices.tolist()):
        rows.append({"file": str(file)})
        for i, (share, label) in enumerate(zip(shares, labels), 1):
            rows[-1] |= {f"class_{i}": classes[label], f"probability_{i}": round(share, 6)}
    return rows


def tell_likeliest(rows, most, classes):
    """Print the first of these rows as a table, and what it cannot say."""
    for row in rows[:most]:
        _, *pairs = row.values()
        pairs = zip(pairs[::2], pairs[1::2])
        text = "".join(f"  {name:<11.11} {share:>6.1%}" for name, share in pairs)
        say(f"  {short_name(row['file']):<16}{text}")
    if len(rows) > most:
        tell(f"The other {len(rows) - most:,} are in predictions.csv.")
    tell(
        f"The network knows {len(classes)} classes and nothing else: a picture of anything else "
        "is one of them to it, perhaps with a high probability."
    )


def short_name(file):
    """The end of a file's name, for a column of a table."""
    name = Path(file).name
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= 16 else f"...{name[-13:]}"


def class_files(folder):
    """The files of each class: of each folder in ``folder``, by name; none if it is not there."""
    if not os.path.isdir(folder):
        return {}
    names = [name for name in _listed(folder) if not name.startswith(".")]
    return {name: files_in(folder / name) for name in names if os.path.isdir(folder / name)}


def read_picture(file, side=32):
    """The middle square of a picture, upright and made small, as uint8 (side, side, 3).

    ``file`` is a path or an open binary file of any format, size and mode that Pillow reads; of
    an animation it is the first frame. Transparent parts become white. Whole or broken numbers
    instead of bytes are scaled: 65,535, 1 or, if that is more, the largest becomes white.
    ValueError, in one line, if it is no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(file, Path) and os.path.exists(file) and not os.path.isfile(file):
            raise ValueError("it is no regular file")
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            if image.format == "EPS":
                raise ValueError("it is PostScript, a program that would have to be run")
            image.draft(None, (8 * side, 8 * side))  # of a large JPEG, decode less
            image = ImageOps.exif_transpose(image)
            length, (width, height) = min(image.size), image.size
            left, top = (width - length) // 2, (height - length) // 2
            image = image.crop((left, top, left + length, top + length))
            if image.mode.startswith(("I", "F")):
                values = np.nan_to_num(np.asarray(image, np.float32)).clip(0)
                white = max(values.max(), 1 if image.mode == "F" else 65_535)
                image = Image.fromarray((255 / white * values).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
            return np.array(image)
    except UnidentifiedImageError:
        raise ValueError("it is no picture") from None
    except Exception as error:  # a damaged file can raise almost anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(reason.splitlines()[0]) from error


def read_pictures(paths, side, size=500):
    """Read files in batches, so that many need no more memory than a few.

    Yields
    ------
    images : Tensor of uint8, shape (n, side, side, 3)
    good : list of Path
        The files of these images.
    bad : list of str
        Those that are no pictures, each with the reason.
    """
    import torch

    shown = time.monotonic()
    for start in range(0, len(paths), size):
        images, good, bad = [], [], []
        for i, path in enumerate(paths[start : start + size], start):
            try:
                images.append(read_picture(path, side))
                good.append(path)
            except ValueError as error:
                bad.append(f"{path if str(path).isprintable() else ascii(str(path))} ({error})")
            if time.monotonic() - shown > 0.5:
                show_progress(f"  {i:,} of {len(paths):,} files")
                shown = time.monotonic()
        show_progress("")
        yield torch.from_numpy(np.array(images, np.uint8).reshape(-1, side, side, 3)), good, bad


def read_class_folders(folder, side):
    """Read labelled pictures from train/CLASS/* and, if it is there, test/CLASS/*.

    Returns
    -------
    classes : tuple of str
    train, test : tuple of Tensor
        Images, uint8 (n, side, side, 3), and labels, int64 (n,); without a folder of their own the
        test images are a fifth of the others.
    """
    import torch

    train, test = (class_files(folder / part) for part in ("train", "test"))
    if odd := [name for name in train if not name.isprintable()]:
        raise UserError(
            f"{folder / 'train'}: {ascii(odd[0])} cannot be printed: rename that class"
        )
    few = [f", not {len(files)} as in {name}" for name, files in train.items() if len(files) < 5]
    if len(train) < 2 or few:
        text = "there must be two or more folders, a class each, of five or more pictures"
        raise UserError(f"{folder / 'train'}: {text}{''.join(few[:1])}")
    if test and (list(test) != list(train) or not all(test.values())):
        text = "there must be pictures of each class that train has, and of no other"
        raise UserError(f"{folder / 'test'}: {text}")
    groups = [*train.values(), *test.values()]
    files = sum(groups, [])
    images, _, bad = zip(*read_pictures(files, side))
    if bad := sum(bad, []):
        text = f"{len(bad):,} of {len(files):,} files are no pictures: replace or delete them"
        raise UserError(f"{text}: {some_of(bad)}")
    images, n_train = torch.cat(images), sum(map(len, train.values()))
    labels = np.arange(len(groups)) % len(train)
    labels = torch.from_numpy(labels.repeat(list(map(len, groups))))
    rows = (slice(n_train), slice(n_train, None)) if test else part_a_fifth(labels)
    return tuple(train), *((images[part], labels[part]) for part in rows)


def part_a_fifth(labels):
    """Rows of four fifths to train on and of a fifth to test on, fixed and stratified."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels))
    return train_test_split(rows, test_size=0.2, stratify=labels.numpy(), random_state=0)


def channel_statistics(images):
    """Mean and deviation of each channel, of pixels in [0, 1], from counts of the 256 values."""
    import torch

    levels = torch.arange(256).double() / 255
    shares = [torch.bincount(images[..., c].flatten(), minlength=256).double() for c in range(3)]
    mean = [(n @ levels / n.sum()).item() for n in shares]
    var = [(n @ (levels - m) ** 2 / n.sum()).item() for n, m in zip(shares, mean)]
    return tuple(mean), tuple(max(math.sqrt(v), 1 / 255) for v in var)  # never zero


def some_of(items):
    """The first few, in words."""
    return ", ".join(items[:10]) + f" and {len(items) - 10:,} more" * (len(items) > 10)


# %% Plots

# Okabe and Ito's colours can be told apart with every kind of colour vision.
OKABE_ITO = "#000000 #E69F00 #56B4E9 #009E73 #0072B2 #D55E00 #CC79A7"
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = OKABE_ITO.split()
STYLE = {
    "figure.figsize": (8, 5),
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in the name of a class or a file is just a $
}


def can_show():
    """Whether matplotlib can open windows here; if not, a line says so."""
    try:
        import matplotlib.pyplot as plt

        backend = plt.get_backend().lower()
    except (ImportError, ValueError):  # MPLBACKEND names one that is not installed
        backend = os.environ["MPLBACKEND"]
    if not backend.startswith(("gtk", "macosx", "qt", "tk", "wx")):
        say(f"--show: {backend} opens no windows here, so the figures are only saved", "")
        return False
    return True


def draw_figures(figures, result, folder, show=False):
    """Draw and save ``figures``, functions of pyplot and ``result`` by file name.

    Without ``show`` nothing of matplotlib's global state is used or changed.
    """
    backend = os.environ.pop("MPLBACKEND", None)  # of a notebook, perhaps, and not installed
    import matplotlib

    if backend:
        os.environ["MPLBACKEND"] = backend
    if show:
        import matplotlib.pyplot as plt
    else:
        plt = SimpleNamespace(subplots=_subplots)
    with matplotlib.rc_context(STYLE):
        for name, plot in figures.items():
            if figure := plot(plt, result):  # some results have nothing to show in it
                save_figure(figure, folder / f"{name}.png")
                say(f"  {name}.png")
    if show:
        say("close the figures' windows to continue")
        plt.show()


def _subplots(*shape, figsize=None, **how):
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize)
    return figure, figure.subplots(*shape, **how)


def save_figure(figure, path):
    """Save ``figure`` as a PNG of 150 dots per inch, with its legend where it hides nothing."""
    if any(axes.get_legend_handles_labels()[1] for axes in figure.axes):
        columns = int(figure.get_figwidth() / 2.5)
        figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
    if figure.get_suptitle():
        figure._suptitle.set_wrap(True)
    image = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
        figure.savefig(image, format="png")
    write_bytes(path, image.getvalue())


# %% Calibration

REPLICATES = 2000  # draws behind each interval
LEVELS = (0.025, 0.975)  # of every 95% interval


def calibration(scores, cases, positives, seed, number=10):
    """Expected calibration error, and what chance alone makes of that of calibrated scores.

    The mean distance of the share of positives from the mean score (Naeini et al. 2015), over
    groups of equal size: groups of equal width can hold all cases, whose errors cancel out.

    Parameters
    ----------
    scores : ndarray of float, shape (m,)
        Distinct and ascending, in [0, 1].
    cases, positives : ndarray of int, shape (m,)
        How many cases have each score, and how many of them are positive.

    Returns
    -------
    dict
        ``ece``; how many ``groups`` there are; ``ece_by_chance``, a 95% interval; whether the
        scores are ``miscalibrated``, which is said of 2.5% of calibrated ones.
    """
    groups = equal_groups(scores, cases, positives, number)

    def error(positives):
        return abs(positives - groups[2]).sum(-1) / groups[0].sum()

    chance, ece = by_chance(groups, REPLICATES, seed), error(groups[1])
    interval = np.quantile(error(chance), LEVELS)
    found = {"ece": ece, "groups": groups.shape[1], "ece_by_chance": interval}
    return found | {"miscalibrated": bool(ece > interval[1])}


def reliability(scores, cases, positives, seed):
    """The isotonic curve, and its band if scores were calibrated (Dimitriadis et al. 2021).

    The arguments are those of `calibration`; ``score``, ``share`` (G,) and ``band`` (2, G).
    """
    groups = equal_groups(scores, cases, positives, 1000)
    count, hits, total, _ = groups
    drawn = [isotonic(row, count) for row in by_chance(groups, 200, seed)]
    band = np.quantile(drawn, LEVELS, axis=0)
    return {"score": total / count, "share": isotonic(hits, count), "band": band}


def equal_groups(scores, cases, positives, number):
    """Up to ``number`` groups of about equally many cases by score; equal scores stay together.

    Returns
    -------
    ndarray of float, shape (4, G)
        Of each group the cases, the positives and the sums of s and s (1 - s). Of perfectly
        calibrated scores s, the last two are mean and variance of the number of positives.
    """
    upto = np.cumsum(cases)  # the last of a group is the first that reaches its share of them
    last = np.searchsorted(upto, np.arange(1, number) * upto[-1] / number)
    start = np.unique(np.append(0, last[last < scores.size - 1] + 1))
    total = cases * scores
    sums = np.add.reduceat(total, start)
    total *= scores
    counts = (np.add.reduceat(each, start) for each in (cases, positives))
    return np.array([*counts, sums, sums - np.add.reduceat(total, start)])


def by_chance(groups, number, seed):
    """Positives of each group if the scores were perfectly calibrated; shape (number, G).

    A binomial draw of the same mean and, but for rounding, the same variance stands for the
    sum of independent cases of unequal chances.
    """
    mean, variance = groups[2:]
    trials = np.ceil(mean**2 / np.maximum(mean - variance, 1e-300)).clip(np.ceil(mean), 2.0**62)
    rng = np.random.default_rng(derive_seed(seed, 3, groups.shape[1]))
    return rng.binomial(trials.astype(np.int64), mean / np.maximum(trials, 1), (number, mean.size))


def isotonic(positives, count):
    """The rising share of positives nearest to the one seen: pool adjacent violators."""
    pools = []  # each of them: positives, cases, groups
    for pool in zip(positives.tolist(), count.tolist(), [1] * count.size):
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            pool = tuple(map(sum, zip(pools.pop(), pool)))
        pools.append(pool)
    hits, cases, width = np.array(pools).T
    return np.repeat(hits / cases, width.astype(int))


def draw_reliability(axes, shape, what="scores", right="positives", band=True):
    """Draw what `reliability` found; ``what`` has a share of ``right`` that it should equal."""
    if band:
        label = f"where calibrated {what} would be (95%)"
        axes.fill_between(shape["score"], *shape["band"], color="lightgray", lw=0, label=label)
    else:
        axes.axline((0, 0), slope=1, color="gray", ls=":", label=f"calibrated {what}")
    label = f"these {what} (isotonic curve)"
    axes.plot(shape["score"], shape["share"], color=BLUE, label=label)
    axes.set_ylabel(f"share of {right}")


# %% Seeds and devices


def derive_seed(seed, *keys):
    """An independent 64-bit seed for each tuple of non-negative ``keys``.

    Every draw follows from (seed, purpose, epoch), so resuming needs no generator's state.
    """
    # With their number in front, since trailing zeros would not count.
    sequence = np.random.SeedSequence([len(keys), seed, *keys])
    # The sign bit is cleared because torch's generators take a signed number.
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def choose_device(name, trial):
    """The torch device to compute on, and why.

    ``trial(device)`` is a training step. A GPU (CUDA, XPU or MPS) on which it fails is not used
    by "auto"; UserError if it fails on the one that was asked for.
    """
    import torch

    asked = name != "auto"
    if not asked and not torch.accelerator.is_available():
        return torch.device("cpu"), "PyTorch sees no GPU"
    try:
        device = torch.device(name) if asked else torch.accelerator.current_accelerator()
        if device.type != "cpu":
            trial(device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:
        why = str(error).splitlines()[0][:200]
        if asked:
            text = f"--device {name} does not work here ({why})"
            raise UserError(f"{text}: use --device cpu or --device auto") from error
        return torch.device("cpu"), f"the GPU that PyTorch sees does not work: {why}"
    found = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return device, "as its settings say" if asked else f"found {found}"


def usable_threads():
    """Threads that torch would take, but no more than this process and its container may use."""
    import torch

    cores = torch.get_num_threads()  # OMP_NUM_THREADS, or all cores
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):  # no such file, or no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def processor():
    """What torch knows of this processor, by name; nothing in releases that do not ask."""
    import torch

    return getattr(torch.cpu, "get_capabilities", dict)()


def describe_machine(device):
    """What the last bits of a result depend on, beside seed and settings."""
    import torch
    import torchvision

    name = processor().get("cpu_name") or platform.processor()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    versions |= {"torch": str(torch.__version__), "torchvision": torchvision.__version__}
    how = {"processor": name, "threads": torch.get_num_threads(), "processes": processes()}
    return how | versions


# %% Several processes, as torchrun starts them


def processes():
    """How many train together: those that torchrun has started."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank():
    """Which of them this is, from 0."""
    return int(os.environ["RANK"]) if processes() > 1 else 0


def join_processes():
    """Join the others; all but the first then wait for it, and print nothing but errors."""
    if processes() == 1:
        return
    import torch

    gpu = torch.cuda.is_available()
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    atexit.register(torch.distributed.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sum_over_processes(torch.zeros(1))


def let_others_follow():
    """Say in the first process that options, data and folder are as they should be."""
    if not rank():
        import torch

        sum_over_processes(torch.zeros(1))


def sum_over_processes(values):
    """Add a tensor to those of the other processes, in place."""
    if processes() > 1:
        import torch

        try:
            torch.distributed.all_reduce(values)
        except RuntimeError:  # another process has ended: it says why, or torchrun does
            raise SystemExit(1) from None
    return values


def average_gradients(weights, n, stop):
    """Give each process the mean of all gradients, by images; return whether any asks to stop."""
    if processes() == 1:
        return stop
    import torch

    weights = [each for each in weights if each.grad is not None]
    flat = [each.grad.flatten() * n for each in weights]
    flat = torch.cat([*flat, flat[0].new_tensor([n, stop])])
    *parts, (total, stops) = sum_over_processes(flat).split([*map(torch.numel, weights), 2])
    for each, part in zip(weights, parts):
        each.grad.copy_((part / total).view_as(each))
    return bool(stops)


# %% Checkpoints

CHECKPOINT_FORMAT = "cifar-cnn-checkpoint-1"


def save_checkpoint(path, **contents):
    """Save ``contents`` (tensors and plain values) as one torch file, all or nothing."""
    import torch

    contents = _on_cpu(contents | {"format": CHECKPOINT_FORMAT, "digest": None})
    contents["digest"] = digest_of(contents)
    data = io.BytesIO()
    torch.save(contents, data)
    write_bytes(path, data.getvalue())


def _on_cpu(value):
    """The same nested value with all tensors on the CPU, so that it loads anywhere."""
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_on_cpu, value))
    return value.cpu() if hasattr(value, "cpu") else value


def digest_of(value, known=None):
    """SHA-256 of nested dicts, lists, tensors and plain values, as 64 hex digits.

    What a value holds several times is looked at once; a tensor larger than its data is refused.
    """
    import torch

    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, dict):
        parts = [digest_of(part, known) for item in value.items() for part in item]
    elif isinstance(value, (list, tuple)):
        parts = [digest_of(part, known) for part in value]
    elif isinstance(value, torch.Tensor):
        if value.nbytes > value.untyped_storage().nbytes():
            raise ValueError("a tensor is larger than its data")
        array = value.detach().cpu().contiguous()
        bits = array.flatten().view(torch.uint8).numpy()
        parts = [str(array.dtype), str(array.shape), hashlib.sha256(bits).hexdigest()]
    else:
        parts = [repr(value)]
    text = "\0".join([type(value).__name__, *parts])
    known[id(value)] = hashlib.sha256(text.encode()).hexdigest()
    return known[id(value)]


def load_checkpoint(path):
    """Read a checkpoint of ours onto the CPU.

    UserError if it cannot be read, is damaged or foreign, or was altered since it was written.
    """
    checkpoint, digest = _load(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        text = "is not a readable checkpoint (this script did not write it): name another file"
        raise UserError(f"{path} {text}")
    # A foreign weight or optimizer state could do anything, up to crashing Python.
    if checkpoint.get("digest") != digest:
        raise UserError(f"{path} was altered after it was written: name another file")
    return checkpoint


def load_state(path):
    """Read the tensors of a state dict, by name, or those of the network in a checkpoint."""
    stored, _ = _load(path)
    stored = stored if isinstance(stored, dict) else {}
    stored = stored["model"] if isinstance(stored.get("model"), dict) else stored
    return {name: value for name, value in stored.items() if hasattr(value, "shape")}


def download_weights(weights):
    """The state dict of torchvision's ``weights``, which torchvision keeps in its cache."""
    import torch

    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # no network; or a damaged file, which can raise almost anything
        folder = Path(torch.hub.get_dir(), "checkpoints")
        text = f"cannot load {weights.url} ({error}): put that file, whole, into {folder}"
        raise UserError(text) from error


def _load(path):
    """What a torch file holds, without running any code in it, and its `digest_of`."""
    import torch

    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no regular file")
        if os.path.getsize(path) > 4 << 30:
            raise ValueError("it is larger than 4 GiB")
        data = Path(path).read_bytes()
        # torch does not verify the checksums of its zip members; zipfile does.
        whole = io.BytesIO(data)  # of old files, which are no zip, it can tell nothing
        if zipfile.is_zipfile(whole) and (bad := zipfile.ZipFile(whole).testzip()):
            raise ValueError(f"its part {bad} does not match its checksum")
        with warnings.catch_warnings(action="ignore"):  # of old files: the error says enough
            stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        ours = isinstance(stored, dict) and "digest" in stored
        return stored, digest_of(stored | {"digest": None} if ours else stored)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): name another file") from error
    except Exception as error:  # a damaged file can raise almost anything
        reason = re.split(r"\n|\. ", str(error))[0] or type(error).__name__
        text = f"{path} is not a readable checkpoint ({reason}): name another file"
        raise UserError(text) from error


# %% Exports


def export_function(function, model, images, expected, about, folder):
    """Write what computes with a model as model.pt2, which torch alone loads, and model.onnx.

    Before a file is written it must give ``expected`` for ``images`` (n, h, w, 3), and the same
    for the first one alone; the dict ``about`` is in it as version.json.
    """
    import torch

    class Exported(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model  # whose weights go with the function

        def forward(self, images):
            return function(images)

    batch = {0: torch.export.Dim("n", max=1 << 40)}  # torch 2.6 would fail without an end
    how = {"dynamic_shapes": (batch,), "strict": False}  # as newer releases do anyway
    program = torch.export.export(Exported().eval(), (images[:2],), **how)
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if hasattr(graph, "graph") else ():
            node.meta.pop("stack_trace", None)  # it names folders of this machine
    about = json.dumps(_plain(about), indent=2)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"version.json": about})
    file.seek(0)
    _check_export("model.pt2", torch.export.load(file).module(), images, expected)
    (folder / "model.onnx").unlink(missing_ok=True)  # which may be of another network
    write_bytes(folder / "model.pt2", file.getvalue())
    say("  model.pt2")
    _export_onnx(program, images, expected, about, folder)


def _export_onnx(program, images, expected, about, folder):
    import torch

    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError:
        return tell("model.onnx is written too where onnx and onnxscript are installed.")
    program = program.run_decompositions({torch.ops.aten.avg_pool2d.default: _average})
    model = torch.onnx.export(program, opset_version=20, dynamo=True, verbose=False).model_proto
    onnx.helper.set_model_props(model, {"version.json": about})
    data = model.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        tell("model.onnx is checked, too, where onnxruntime is installed.")
    else:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()

        def run(images):
            return torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])

        _check_export("model.onnx", run, images, expected)
    write_bytes(folder / "model.onnx", data)
    say("  model.onnx")


def _average(images, size, stride, padding=(0,), ceil=False, include=True, divisor=None):
    """Divide an average pool by another number afterwards: ONNX ignores ``divisor``."""
    import torch.nn.functional as F

    if divisor is None:
        return NotImplemented  # it may stay as it is
    return F.avg_pool2d(images, size, stride, padding, ceil) * (math.prod(size) / divisor)


def _check_export(name, model, images, expected):
    """RunFailed unless ``model`` gives what is expected for one image and for many."""
    for few in (images[:1], images):
        error = abs(model(few) - expected[: len(few)]).max().item()
        if not error <= 1e-5:
            text = f"its probabilities are off by {error:.2g}, so it is not written"
            raise RunFailed(f"{name} does not compute what the network does: {text}")
