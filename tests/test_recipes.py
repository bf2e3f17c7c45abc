"""README's recipes, each run as it stands there with the engine that it is for."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from helpers import quick_runs, read_table, run
from PIL import Image

import part2_cifar_cnn as part2

ROOT = Path(part2.__file__).resolve().parent


def recipe(name, folder, *packages, **change):
    """Write a script of README into a folder, with the project's beside it."""
    for package in packages:
        pytest.importorskip(package, reason=f"install {package} to run this recipe")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"^```python\n(# {name}\n.*?)^```", text, re.M | re.S)
    for before, after in change.items():
        assert before in code
        code = code.replace(before, after)
    (folder / name).write_text(code)
    for script in ("part2_cifar_cnn.py", "utils.py"):
        if not (folder / script).exists():
            (folder / script).symlink_to(ROOT / script)
    return [sys.executable, name]


@pytest.fixture(scope="session")
def versions(whole, few_digits, tmp_path_factory):
    """Two runs on the digits, exported, and the test images as files."""
    pytest.importorskip("onnxscript", reason="install onnx and onnxscript to run the recipes")
    folder = tmp_path_factory.mktemp("versions")
    with quick_runs(few_digits):
        assert run(folder / "new", "--seed", "1") == 0
    runs = []
    for source, target in ((whole, folder / "old"), (folder / "new", folder / "new")):
        with pytest.MonkeyPatch.context() as patch:
            if target.name == "old":  # it is served only
                patch.setitem(sys.modules, "onnxscript", None)
            assert part2.main(["--export", str(source), "--output-dir", str(target)]) == 0
        sha256 = hashlib.sha256((source / "best.pt").read_bytes()).hexdigest()
        runs.append(SimpleNamespace(run=source, folder=target, sha256=sha256))
    pictures = folder / "pictures"
    pictures.mkdir()
    for i, image in enumerate(part2.load_digits().test.images[:200].numpy()):
        Image.fromarray(image).save(pictures / f"{i:03}.png")
    return SimpleNamespace(old=runs[0], new=runs[1], pictures=pictures)


# ------------------------------------------------------------------------ server


@pytest.fixture
def server(versions, tmp_path):
    """Address of README's server with two versions."""
    command = recipe("serve.py", tmp_path, "litserve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command += [str(port), *(str(v.folder / "model.pt2") for v in (versions.old, versions.new))]
    with open(tmp_path / "log", "w") as log:
        how = {"stdout": log, "stderr": log, "cwd": tmp_path, "start_new_session": True}
        process = subprocess.Popen(command, **how)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if process.poll() is not None or ask(f"{address}/health")[0] == 200:
                break
            time.sleep(0.1)
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def ask(address, body=None):
    """Status and text of an answer; status 0 while nobody listens."""
    try:
        with urlopen(Request(address, data=body), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()
    except (URLError, ConnectionError):
        return 0, ""


def predictions(version, pictures, folder):
    """Class and probability of each picture by --predict."""
    how = ["--checkpoint", str(version.run), "--output-dir", str(folder), "--device", "cpu"]
    assert part2.main(["--predict", str(pictures), *how]) == 0
    rows = read_table(folder / "predictions.csv")
    return {Path(row["file"]).name: (row["class_1"], float(row["probability_1"])) for row in rows}


def test_server_answers_200_at_once_as_predict_does(server, versions, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    expected = {
        version.sha256: predictions(version, versions.pictures, tmp_path / version.sha256)
        for version in (versions.old, versions.new)
    }
    bodies = {path.name: path.read_bytes() for path in sorted(versions.pictures.iterdir())}
    wrong = {f"wrong {i}": body for i, body in enumerate([b"no picture", b"\x89PNG", b""] * 5)}
    with ThreadPoolExecutor(32) as pool:
        everything = list((bodies | wrong).items())[::-1]
        found = list(pool.map(lambda item: ask(f"{server}/predict", item[1]), everything))
    newer = 0
    for (name, body), (status, text) in zip(everything, found):
        if name in wrong:
            assert status == 400 and "no picture" in text
            continue
        assert status == 200, text
        answer, to_newer = json.loads(text), int(hashlib.sha256(body).hexdigest(), 16) % 10 == 0
        assert answer["version"] == (versions.new if to_newer else versions.old).sha256
        best, share = expected[answer["version"]][name]
        assert answer["probabilities"][best] == pytest.approx(share, abs=1e-5)
        assert max(answer["probabilities"].values()) == answer["probabilities"][best]
        newer += to_newer
    assert 5 <= newer <= 40
    assert ask(f"{server}/predict", bytes(20_000_001))[0] == 413


# -------------------------------------------------------------------------- int8


def test_quantised_network_is_smaller_and_judged_beside_the_whole_one(versions, tmp_path):
    command = recipe("quantise.py", tmp_path, "onnx", "onnxruntime")
    how = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([*command, str(versions.new.folder), "data"], **how)
    assert done.returncode == 0, done.stderr
    pattern = r"model(?:-int8)?\.onnx: ([\d.]+) MB, ([\d.]+)%, (\d+) images/s"
    (size, share, _), (less, also, _) = re.findall(pattern, done.stdout)
    assert float(less) < 0.5 * float(size) and abs(float(share) - float(also)) < 10
    test = part2.load_digits().test
    probs = part2.probabilities(part2.load_network(versions.new.run), test.images)
    expected = 100 * (probs.argmax(1) == test.labels).double().mean().item()
    assert float(share) == pytest.approx(expected, abs=0.01)


# ------------------------------------------------------------------------ search


def search(folder, command, trials, epochs):
    """Run README's search on the digits."""
    options = ["--dataset", "digits", "--epochs", str(epochs), "--device", "cpu", "--threads", "1"]
    how = {"cwd": folder, "capture_output": True, "text": True}
    done = subprocess.run([*command, str(trials), *options], **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_search_ends_a_trial_that_lags_behind_and_goes_on_where_it_stopped(tmp_path):
    always = {"MedianPruner()": "ThresholdPruner(lower=1)", "print(": "0 and print("}
    command = recipe("search.py", tmp_path, "optuna", **always)
    search(tmp_path, command, 1, epochs=30)
    folder = tmp_path / "outputs/search"
    assert 0 < len(read_table(folder / "0/history.csv")) < 30
    assert not (folder / "0/metrics.json").exists() and (folder / "0/last.pt").exists()

    command = recipe("search.py", tmp_path, "optuna")
    for _ in range(2):  # the second time there is nothing left to try
        text = search(tmp_path, command, 2, epochs=1)
        assert sorted(path.name for path in folder.iterdir()) == ["0", "1", "study.db"]
        (row,) = read_table(folder / "1/history.csv")
        assert text.startswith(f"best: {float(row['val_accuracy']):.2%} with {{'lr':")
        assert (folder / "1/metrics.json").exists()


def test_recipes_are_the_ones_tested():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^```python\n# (\w+\.py)$", text, re.M) == [
        "serve.py",
        "quantise.py",
        "search.py",
    ]
