"""Part 2 on several processes, as torchrun starts them."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import read_table, state_of

import part2_cifar_cnn as part2
import utils

OPTIONS = shlex.split(
    "--dataset digits --device cpu --precision float32 --epochs 2 --batch-size 100"
)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def together(folder, *options, code=None):
    """Two processes that train on the digits; ``code`` runs in each before part 2 does."""
    script = [part2.__file__]
    if code:
        code = f"import sys, part2_cifar_cnn as part2\n{code}\nsys.exit(part2.main())"
        (folder / "changed.py").write_text(code)
        script = [str(folder / "changed.py")]
    run = [sys.executable, *TORCHRUN, *script, *OPTIONS, "--output-dir", str(folder / "run")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(part2.__file__).parent)}
    return subprocess.run([*run, *options], capture_output=True, text=True, env=env, timeout=300)


def ours(stderr):
    """The lines on standard error that are not torchrun's."""
    return [line for line in stderr.splitlines() if re.match("error:|interrupted", line)]


@pytest.fixture
def one_thread():
    """As many as torchrun gives a process: small differences in rounding grow with each step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one_process_on_halves(data, settings):
    """The rows of the epochs, and the weights, where each half of a batch is normalised alone."""
    training = part2.Training(settings, data)
    model, rows = training.model.train(), []
    for epoch in (1, 2):
        loss_sum = right = 0
        for images, labels in part2.batches(data, settings, epoch):
            training.optimizer.zero_grad()
            for half in (1, 0):  # what the first process has normalised by is kept
                before = [buffer.clone() for buffer in model.buffers()]
                logits = model(images[half::2])
                loss = F.cross_entropy(logits, labels[half::2], reduction="sum")
                (loss / len(images)).backward()
                loss_sum += loss.item()
                right += (logits.argmax(1) == labels[half::2]).sum().item()
                for buffer, value in zip(model.buffers(), before):
                    buffer.copy_(value) if half else None
            training.optimizer.step()
            training.scheduler.step()
        rows.append((loss_sum / len(data.train), right / len(data.train)))
    return rows, state_of(model)


@pytest.mark.parametrize("model", ["small", "strong"])
def test_two_processes_learn_what_one_does_that_normalises_the_halves_alone(
    model, tmp_path, one_thread
):
    options = ["--model", model, "--dropout", "0", "--select-on", "last"]
    done = together(tmp_path, *options)
    assert done.returncode == 0 and ours(done.stderr) == []
    assert done.stdout.count("4. Result on the") == 1 == done.stdout.count("3. Training (15 steps")
    settings = part2.Settings(model=model, dropout=0.0, select_on="last", dataset="digits")
    settings = replace(settings, device="cpu", precision="float32", epochs=2, batch_size=100)
    data = part2.set_aside(part2.load_digits(), "last")
    assert len(data.train) % 100 % 2 == 1  # the last step is uneven
    rows, state = one_process_on_halves(data, settings)
    for row, (loss, right) in zip(read_table(tmp_path / "run" / "history.csv"), rows):
        assert float(row["train_loss"]) == pytest.approx(loss, rel=1e-3)
        assert float(row["train_accuracy"]) == pytest.approx(right, abs=0.003)
    found = state_of(part2.load_network(tmp_path / "run").model)
    assert (found - state).norm() < 0.01 * state.norm()


def test_an_error_that_all_have_is_told_once(tmp_path):
    done = together(tmp_path, "--lr", "-1")
    assert done.returncode and len(ours(done.stderr)) == 1 and "--lr" in ours(done.stderr)[0]
    assert 'part2_cifar_cnn.py", line' not in done.stderr and not (tmp_path / "run").exists()


def test_a_process_that_fails_ends_all_with_one_line(tmp_path):
    code = """
import utils
def fail(training, epoch, real=part2.judge):
    raise part2.UserError("this one is out of luck")
if utils.rank():
    part2.check_finite = fail
"""
    done = together(tmp_path, code=code)
    assert done.returncode and 'part2_cifar_cnn.py", line' not in done.stderr
    assert ours(done.stderr) == ["error: process 1: this one is out of luck"]


def test_ctrl_c_is_agreed_on_and_the_run_can_go_on_alone(tmp_path):
    code = """
import os, signal, utils
steps = []
def counted(*args, real=utils.average_gradients, **how):
    steps.append(1)
    if utils.rank() and len(steps) == 20:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*args, **how)
utils.average_gradients = counted
"""
    done = together(tmp_path, code=code)
    (line,) = {re.sub(" -.*", "", line) for line in ours(done.stderr)}
    assert line.startswith("interrupted: 1 of 2 epochs are saved; continue with: torchrun")
    assert part2.main(["--resume", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.2 and len(read_table(tmp_path / "run" / "history.csv")) == 2


def test_finished_runs_need_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "processes", lambda: 2)
    with pytest.raises(utils.UserError, match="leave it out for finished runs"):
        part2.parse_arguments(["--export", str(tmp_path)])
