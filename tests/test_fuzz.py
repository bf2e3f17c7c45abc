"""Damaged, foreign and hostile files: each is refused in one line, or read as it really is.

What is random follows from a seed. ``main`` is called in the process, so that an exception
that it does not turn into an exit status fails the test.
"""

import hashlib
import io
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from helpers import (
    ARCHIVE,
    BATCHES,
    Hostile,
    check_tiny,
    contents,
    damaged_bytes,
    error_line,
    run_tiny,
)
from torchvision.datasets import CIFAR10

import part2_cifar_cnn as part2
import utils

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def folder(whole, tmp_path):
    """A finished run of three epochs, to be damaged."""
    return shutil.copytree(whole, tmp_path / "run")


def resume(folder):
    """Exit status of one epoch more, in which no step may be made.

    (A foreign optimizer state can crash Python itself.)
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part2, "batches", lambda *a: pytest.fail("it was trained with"))
        return part2.main(["--resume", str(folder), "--epochs", "4"])


def evaluate(folder):
    """Exit status of the evaluation of a finished run, which reads last.pt and best.pt."""
    return part2.main(["--evaluate", str(folder), "--output-dir", str(folder.parent / "judged")])


# %% Checkpoints


def truncated(data):
    return data[: len(data) // 2]


def empty(data):
    return b""


def flipped(data):
    return data[:50_000] + bytes([data[50_000] ^ 4]) + data[50_001:]


def flipped_aside(data):
    """A bit of a part of the file that is not loaded."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        (name,) = (name for name in file.namelist() if name.endswith("serialization_id"))
        place = data.index(file.read(name))
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def foreign(data):
    return b"epoch,lr\n1,0.1\n"


def altered(change):
    """Damage to a well-formed checkpoint, which no longer has its digest."""

    def damage(data):
        checkpoint, file = torch.load(io.BytesIO(data)), io.BytesIO()
        change(checkpoint)
        torch.save(checkpoint, file)
        return file.getvalue()

    return damage


def other_weight(checkpoint):
    checkpoint["model"]["12.bias"][:] = torch.arange(10.0)  # takes all for nines


def other_shapes(checkpoint):
    model = checkpoint["model"]
    model |= {key: value[..., :1] for key, value in model.items() if value.dim() > 1}


def other_moment(checkpoint):
    checkpoint["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 3)


DAMAGE = {
    "truncated": truncated,
    "empty": empty,
    "one bit flipped": flipped,
    "one bit flipped aside": flipped_aside,
    "foreign": foreign,
    "weight altered": altered(other_weight),
    "setting altered": altered(lambda c: c["config"].update(epochs="three")),
    "history is text": altered(lambda c: c.update(history="long")),
    "a bare state dict": altered(lambda c: [c.pop(key) for key in list(c) if key != "model"]),
}


CASES = [("last.pt", resume, key) for key in DAMAGE]
CASES += [("best.pt", evaluate, key) for key in ("truncated", "one bit flipped", "weight altered")]


@pytest.mark.parametrize("name, use, damage", CASES)
def test_damaged_checkpoint_is_refused_in_one_line(name, use, damage, folder, capsys):
    (folder / name).write_bytes(DAMAGE[damage]((folder / name).read_bytes()))
    before = contents(folder)
    assert use(folder) == 2
    assert name in error_line(capsys)
    assert contents(folder) == before


OTHER = {
    "another network": other_shapes,
    "another model's name": lambda c: c["config"].update(model="unheard of"),
    "a setting more": lambda c: c["config"].update(ensemble=3),
    "no weights": lambda c: c.pop("model"),
    "no history": lambda c: c.pop("history"),
    "no config": lambda c: c.pop("config"),
}
OTHER_LAST = OTHER | {
    "no optimizer": lambda c: c.pop("optimizer"),
    "optimizer of another network": other_moment,
}
OTHER_BEST = OTHER | {"no classes": lambda c: c.pop("classes")}
OTHERS = [("last.pt", resume, key) for key in OTHER_LAST]
OTHERS += [("best.pt", evaluate, key) for key in OTHER_BEST]


@pytest.mark.parametrize("name, use, change", OTHERS)
def test_whole_checkpoint_of_another_version_is_refused(name, use, change, folder, capsys):
    """Nothing was altered after it was written."""
    checkpoint = torch.load(folder / name)
    (OTHER_LAST | OTHER_BEST)[change](checkpoint)
    utils.save_checkpoint(folder / name, **checkpoint)
    before = contents(folder)
    assert use(folder) == 2
    assert name in error_line(capsys)
    assert contents(folder) == before


@pytest.mark.parametrize("name, use", [("last.pt", resume), ("best.pt", evaluate)])
def test_checkpoint_in_the_place_of_another_is_refused(name, use, folder, tmp_path, capsys):
    """The best in the place of the last, and the other way round that of another run."""
    if name == "last.pt":
        shutil.copy(folder / "best.pt", folder / "last.pt")
    else:
        checkpoint = torch.load(folder / "best.pt")
        other_weight(checkpoint)
        checkpoint["history"] = checkpoint["history"][:1]
        utils.save_checkpoint(folder / "best.pt", **checkpoint)
    before = contents(folder)
    assert use(folder) == 2
    assert name in error_line(capsys)
    assert contents(folder) == before


def test_checkpoint_in_another_format_is_refused(folder, capsys, monkeypatch):
    checkpoint = torch.load(folder / "last.pt")
    monkeypatch.setattr(utils, "CHECKPOINT_FORMAT", "cifar-cnn-checkpoint-99")
    utils.save_checkpoint(folder / "last.pt", **checkpoint)
    monkeypatch.undo()
    assert resume(folder) == 2 and "last.pt" in error_line(capsys)


def test_missing_checkpoint_is_named(folder, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    assert part2.main(["--evaluate", str(folder), nowhere]) == 2
    line = error_line(capsys)
    assert nowhere in line and "damaged" not in line
    (folder / "best.pt").unlink()
    assert evaluate(folder) == 2
    assert "best.pt" in error_line(capsys)


def plain_pickle(path, good, marker):
    path.write_bytes(pickle.dumps(good | {"model": Hostile(marker)}))


def in_torch_zip(path, good, marker):
    torch.save(good | {"model": Hostile(marker)}, path)


def in_old_torch_file(path, good, marker):
    torch.save(good | {"mean": Hostile(marker)}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("hide", [plain_pickle, in_torch_zip, in_old_torch_file])
@pytest.mark.parametrize("name, use", [("last.pt", resume), ("best.pt", evaluate)])
def test_hostile_checkpoint_is_refused_and_not_run(name, use, hide, folder, tmp_path, capsys):
    marker = tmp_path / "marker"
    hide(folder / name, torch.load(folder / name), marker)
    assert use(folder) == 2 and name in error_line(capsys)
    assert not marker.exists()
    if hide is in_torch_zip:  # the trap works
        torch.load(folder / name, weights_only=False)
        assert marker.exists()


JUNK = (None, -1, 0, 2.5, float("nan"), "", "unheard of", [], {}, [1, "a"], b"bytes", True)
JUNK += (torch.zeros(3), torch.tensor(float("nan")), torch.zeros(2).bfloat16())


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
    """Damaged bytes, damaged contents, or the same contents written once more."""
    way = rng.random()
    if way < 0.45:
        return damaged_bytes(good, rng)
    checkpoint, file = torch.load(io.BytesIO(good), weights_only=True), io.BytesIO()
    if way < 0.9:
        put_junk(checkpoint, rng)
    torch.save(checkpoint, file)
    return file.getvalue()


@pytest.mark.parametrize("seed", range(30))
def test_randomly_damaged_checkpoint(seed, folder, whole, capsys):
    """It is refused, unless all that it holds is what was saved."""
    rng, path = random.Random(f"checkpoint {seed}"), folder / "last.pt"
    good = path.read_bytes()
    path.write_bytes(random_checkpoint(good, rng))
    status = evaluate(folder)
    if status == 0:
        assert zipfile.ZipFile(path).testzip() is None  # each part matches its check sum
        found, saved = (torch.load(io.BytesIO(data)) for data in (path.read_bytes(), good))
        assert utils.digest_of(found) == utils.digest_of(saved)
        assert contents(folder) == contents(whole) | {"last.pt": path.read_bytes()}
    else:
        assert status == 2 and "last.pt" in error_line(capsys)


def test_checkpoint_of_a_gpu_loads_on_the_cpu(tmp_path):
    path, changed = tmp_path / "cpu.pt", tmp_path / "cuda.pt"
    model = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(7)}
    utils.save_checkpoint(path, model=model)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):  # where each tensor was: "cpu", 3 letters
                assert b"X\x03\0\0\0cpu" in data
                data = data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
            new.writestr(name, data)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(changed)
    found = utils.load_checkpoint(changed)["model"]
    assert all(torch.equal(found[key], model[key]) for key in model)
    assert {value.device.type for value in found.values()} == {"cpu"}


# %% CIFAR-10's files


def last_bits(data):
    return data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]


BATCH_DAMAGE = [
    ("data_batch_3", last_bits, "auto"),
    ("data_batch_3", "hostile", "cifar10"),
    ("data_batch_3", empty, "cifar10"),
    ("test_batch", truncated, "cifar10"),
    ("batches.meta", foreign, "cifar10"),
]


@pytest.mark.parametrize("name, damage, dataset", BATCH_DAMAGE)
def test_damaged_batch_file_is_named_with_both_md5_sums(
    name, damage, dataset, tiny, tmp_path, capsys
):
    path, marker = tiny.folder / BATCHES / name, tmp_path / "marker"
    data = path.read_bytes()
    damaged = pickle.dumps(Hostile(marker)) if damage == "hostile" else damage(data)
    path.write_bytes(damaged)
    assert run_tiny(tiny.folder, tmp_path / "out", dataset) == 2
    line = error_line(capsys)
    assert str(path) in line and tiny.md5[name] in line
    assert hashlib.md5(damaged).hexdigest() in line
    assert not (tmp_path / "out").exists() and not marker.exists()


@pytest.mark.parametrize("damage, dataset", [(truncated, "auto"), (foreign, "cifar10")])
def test_damaged_archive_is_named_with_both_md5_sums(damage, dataset, tiny, tmp_path, capsys):
    damaged = damage(tiny.archive.read_bytes())
    (tiny.empty / ARCHIVE).write_bytes(damaged)
    assert run_tiny(tiny.empty, tmp_path / "out", dataset) == 2
    line = error_line(capsys)
    assert str(tiny.empty / ARCHIVE) in line and CIFAR10.tgz_md5 in line
    assert hashlib.md5(damaged).hexdigest() in line
    assert [path.name for path in tiny.empty.iterdir()] == [ARCHIVE]


def damage_folder(tiny, rng):
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


def test_randomly_damaged_data_folders(tiny, tmp_path, capsys):
    n, refused = 40, 0
    for seed in range(n):
        folder, readable = damage_folder(tiny, random.Random(f"data {seed}"))
        if readable:
            check_tiny(tiny, part2.load_cifar10(folder))
        else:
            assert run_tiny(folder, tmp_path / "out") == 2, seed
            line = error_line(capsys)
            assert ARCHIVE in line or BATCHES in line, seed
            refused += 1
    assert n / 4 < refused < n and not (tmp_path / "out").exists()
