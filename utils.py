"""What both scripts share: errors, console, files, scores, figures, seeds, checkpoints.

torch and matplotlib are imported where they are used, so that part 1 never waits for torch.
"""

import argparse
import csv
import functools
import hashlib
import http.client
import io
import json
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
import urllib.request
import zipfile
from collections import namedtuple
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

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

    def error(self, message):
        """Raise what argparse would print below its whole usage."""
        raise UserError(f"{message} (--help lists the options)")


def number(low, high=math.inf, ends="[]", kind=float):
    """Argparse type: a finite number from ``low`` to ``high``; ``ends`` as in [0, 1)."""
    span = f"{ends[0]}{low:,}, {high:,}{ends[1]}".replace("inf]", "inf)")

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text[:30]!r} is not a {what}") from None
        excluded = (value == low and ends[0] == "(") or (value == high and ends[1] == ")")
        if excluded or not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text:.30} is out of range: give one in {span}")
        return value

    return parse


def integer(low, high=10**9):
    """Argparse type: a whole number from ``low`` to ``high``."""
    return number(low, high, kind=int)


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


def folder_option(text):
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
    write_bytes(path, text.getvalue().encode())


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
    say(f"{path} is not there: fetching it ({archive.size / 1e6:.0f} MB)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download(archive.urls, path, archive.md5)
    except (UserError, OSError) as error:
        where = f"put {archive.name} ({archive.size} bytes, md5 {archive.md5}) into {path.parent}"
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


def download(urls, path, md5, stall_seconds=15):
    """Fetch the file with this MD5 from the first of ``urls`` that delivers it.

    The bytes go into a file of this process's own, which becomes ``path`` only when the MD5 is
    right; if no address delivers it, the UserError names each failure.
    """
    failures = []
    for url in urls:
        say(f"  downloading {url}")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".download-")
        try:
            with os.fdopen(handle, "wb") as file:
                _fetch(url, file, stall_seconds)
            if (found := md5_of(name)) != md5:
                raise ValueError(f"md5 {found} instead of {md5}")
            os.chmod(name, 0o644)  # a temporary file is its owner's alone
            return os.replace(name, path)
        except (OSError, ValueError, EOFError, http.client.HTTPException) as error:
            failures.append(f"{url}: {error or type(error).__name__}")
        finally:
            Path(name).unlink(missing_ok=True)
        say(f"  failed: {failures[-1]}")
    raise UserError(f"no server delivered {path.name} ({'; '.join(failures)})")


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


def read_scores(path, label_column, score_column, positive=None):
    """Labels and scores from a CSV file with a header, or from an NPZ file.

    Returns
    -------
    labels : ndarray of bool, shape (n,)
    scores : ndarray of float, shape (n,), in the file's own precision

    Raises
    ------
    UserError
        If the file, a column, a score or a label is not what it should be.
    """
    read = _read_npz if path.suffix.lower() == ".npz" else _read_csv
    labels, scores, lines = read(path, label_column, score_column)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise UserError(
            f"{path}: {label_column} has shape {labels.shape} and {score_column} "
            f"{scores.shape}: give two columns of equal length"
        )
    if scores.size == 0:
        raise UserError(f"{path} has a header but no cases: give a file with scores")
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise UserError(
            f"{path}: {bad.size} scores in {score_column} are NaN or infinite, the "
            f"first in {lines[0]} {lines[1][bad[0]]}: remove or fix them"
        )
    return _find_positives(f"{path}: the labels in {label_column}", labels, positive), scores


def _read_csv(path, *names):
    """The columns (text, float64), and the line on which each row ends."""
    labels, scores, lines = [], [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if len(header) == 1 and (used := [mark for mark in ";\t|" if mark in header[0]]):
                raise UserError(
                    f"{path} separates its columns by {used[0]!r}: separate them by commas"
                )
            a, b = _find_columns(path, header, names)
            for row in filter(None, reader):
                labels.append(row[a])
                scores.append(float(row[b]))
                lines.append(reader.line_num)
    except IndexError:
        raise UserError(f"{path}, line {reader.line_num}: too few columns") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file ({error}): give CSV or NPZ") from error
    except ValueError:
        raise UserError(
            f"{path}, line {reader.line_num}: {row[b]!r} in {names[1]} is not a number"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return np.array(labels), np.array(scores), ("line", lines)


def _read_npz(path, *names):
    """The arrays as they are, and their indices; nothing pickled is loaded."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            _find_columns(path, arrays.files, names)
            labels, scores = (arrays[name] for name in names)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise almost anything
        raise UserError(f"{path} is not a readable NPZ file ({error})") from error
    if scores.dtype.kind not in "fiub" or labels.dtype.kind not in "fiubUS":
        raise UserError(
            f"{path}: {names[0]} is {labels.dtype} and {names[1]} is {scores.dtype}: "
            "labels must be numbers or text, scores numbers"
        )
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "backslashreplace")
    narrow = scores.dtype.kind == "f" and scores.dtype.itemsize <= 8
    dtype = scores.dtype.newbyteorder("=") if narrow else np.float64
    return labels, scores.astype(dtype, copy=False), ("index", range(scores.size))


def _find_columns(path, present, wanted):
    if not present:
        raise UserError(f"{path} is empty: give a CSV file with a header, or an NPZ file")
    for name in wanted:
        if present.count(name) != 1:
            raise UserError(
                f"{path} has {'more than one' if name in present else 'no'} column {name!r} among "
                f"{textwrap.shorten(', '.join(present), 300)}: name yours with --label-column "
                "and --score-column"
            )
    return [present.index(name) for name in wanted]


def _find_positives(what, values, positive):
    """Labels as bool: 1 (or ``positive``) against 0 (or every other value)."""
    found = np.unique(values[:1000]).tolist()
    found = ", ".join(map(repr, found[:5])) + ", ..." * (len(found) > 5)
    sought = "1" if positive is None else positive
    numbers, wanted = _as_numbers(values), _as_numbers(np.array([sought]))
    if positive is None and (numbers is None or not np.isin(numbers, (0, 1)).all()):
        raise UserError(
            f"{what} are not all 0 or 1 (there is {found}): say with --positive "
            "which value is positive"
        )
    as_text = numbers is None or wanted is None
    labels = values.astype(str) == sought if as_text else numbers == wanted
    if not labels.any() or labels.all():
        raise UserError(
            f"{what} are {'all' if labels.all() else 'never'} {sought} (there is {found}): "
            "both classes are needed; see --positive"
        )
    return labels


def _as_numbers(values):
    try:
        return values.astype(float)
    except (ValueError, TypeError):
        return None


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
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes(path, image.getvalue())


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
    return device, "as set" if asked else f"found {found}"


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


def describe_machine(device):
    """What the last bits of a result depend on, beside seed and settings."""
    import torch

    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return {"processor": name, "threads": torch.get_num_threads()} | versions


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
    """Read a checkpoint onto the CPU without running any code that it may hold.

    UserError if it cannot be read, is damaged or foreign, or was altered since it was written.
    """
    import torch

    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no regular file")
        data = Path(path).read_bytes()
        # torch does not verify the checksums of its zip members; zipfile does.
        if bad := zipfile.ZipFile(io.BytesIO(data)).testzip():
            raise ValueError(f"its part {bad} does not match its checksum")
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
            raise ValueError("this script did not write it")
        digest = digest_of(checkpoint | {"digest": None})
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): name another file") from error
    except Exception as error:  # a damaged file can raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        text = f"{path} is not a readable checkpoint ({reason}): name another file"
        raise UserError(text) from error
    # A foreign weight or optimizer state could do anything, up to crashing Python.
    if checkpoint.get("digest") != digest:
        raise UserError(f"{path} was altered after it was written: name another file")
    return checkpoint
