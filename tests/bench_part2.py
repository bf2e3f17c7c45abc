"""Part 2 against the plain way of writing it, in turn, each in a process of its own.

    python tests/bench_part2.py --data-dir data                one seed, 10 epochs
    python tests/bench_part2.py --data-dir data --sides ours torchvision --seeds 5
    python tests/bench_part2.py --data-dir data --profile              where our time goes

The sides: ``plain`` is torchvision transforms in a DataLoader with two workers,
NCHW float32, conv-BatchNorm-ReLU-pool, and the same recipe otherwise; ``ours``
is the baseline of part 2; ``torchvision`` is ours with torchvision's own random
crop and flip, image by image; ``order`` is ours with the plain order of layers, and
``warmup`` is ours with a learning rate that rises for two epochs;
``bfloat16`` and ``float32`` are ours in that precision, and ``rounded`` is ours in
float32 with the numbers rounded that autocast would hold in bfloat16, to learn on
any machine what that does to the accuracy. All train on the 50,000 images and are
tested once, after the last epoch. Prints one line per run, with the memory of its
largest process, the share of a matrix product's speed in its precision that the whole
training step reaches, the number of the 64 hidden units that no test image makes fire, and
the test images judged in a second; then means and standard deviations.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils import Parser, UserError, command, integer

SIDES = ("plain", "ours", "torchvision", "order", "warmup", "float32", "bfloat16", "rounded")


def run_plain(data_dir, epochs, seed):
    """What most people write; seconds of each epoch, and what `tested` returns."""
    import torch
    from torch import nn
    from torchvision import datasets, transforms

    torch.manual_seed(seed)
    scale = [
        transforms.ToTensor(),
        transforms.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    ]
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    sets = [
        datasets.CIFAR10(data_dir, train, transforms.Compose(steps))
        for train, steps in ((True, augment + scale), (False, scale))
    ]
    train, test = (
        torch.utils.data.DataLoader(s, 128, shuffle=s is sets[0], num_workers=2) for s in sets
    )
    model = plain_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        scheduler.step()
        seconds.append(time.perf_counter() - start)
    return seconds, *tested(model, test)


def plain_network(dropout=0.5, classes=10):
    """The baseline's layers in the usual order: pooling last."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4096, 64),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(64, classes),
    )


def tested(model, batches):
    """Accuracy, units of the hidden layer that never fire, and images a second."""
    import torch

    model.eval()
    start = time.perf_counter()
    right, n, fired = 0, 0, torch.zeros(64, dtype=torch.bool)
    with torch.inference_mode():
        for images, labels in batches:
            hidden = model[:11](images)
            right += (model[11:](hidden).argmax(1) == labels).sum().item()
            fired |= (hidden > 0).any(0)
            n += len(labels)
    return right / n, 64 - fired.sum().item(), n / (time.perf_counter() - start)


def prepare_ours(data_dir, **options):
    """The script as a module, the baseline's settings on this processor, and CIFAR-10."""
    import part2_cifar_cnn as part2

    how = {"dataset": "cifar10", "device": "cpu", "select_on": "last"}
    settings = part2.prepare_machine(part2.Settings(**how | options))
    return part2, settings, part2.load_data(settings, Path(data_dir))


def run_ours(data_dir, epochs, seed, side):
    """The baseline of part 2, or a variant of it; the same return values."""
    options = {"epochs": epochs, "seed": seed, "precision": precision_of(side)}
    options |= {"warmup_epochs": 2.0} if side == "warmup" else {}
    part2, settings, data = prepare_ours(data_dir, **options)
    if side == "order":
        part2.MODELS["small"] = plain_network
    training = part2.Training(settings, data)
    if side == "torchvision":
        part2.crop_and_flip = torchvision_crop_and_flip
    if side == "rounded":
        round_to_bfloat16(training.model)
    for _ in range(epochs):
        start = time.perf_counter()
        row = part2.train_epoch(training)
        training.history.append(row | {"seconds": time.perf_counter() - start})
    batches = (
        (part2.normalise(images, data.mean, data.std), labels)
        for images, labels in zip(data.test.images.split(500), data.test.labels.split(500))
    )
    with part2.autocast(settings):
        right, dead, _ = tested(training.model, batches)
    start = time.perf_counter()
    part2.predict(training.network, data.test.images)
    pace = len(data.test) / (time.perf_counter() - start)
    return [row["seconds"] for row in training.history], right, dead, pace


def precision_of(side):
    """What a side computes in on this processor."""
    import torch

    import part2_cifar_cnn as part2

    asked = {
        "plain": "float32",
        "rounded": "float32",
        "float32": "float32",
        "bfloat16": "bfloat16",
    }
    return part2.choose_precision(asked.get(side, "auto"), torch.device("cpu"))


def round_to_bfloat16(model):
    """Round operands, results and gradients of the layers as autocast does."""
    import torch
    from torch import nn
    from torch.nn.utils.parametrize import register_parametrization

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.bfloat16().float()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.bfloat16().float()

    class Rounded(nn.Module):
        def forward(self, values):
            return Round.apply(values)

    for layer in model:
        layer.register_forward_pre_hook(lambda layer, inputs: (Round.apply(inputs[0]),))
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            for name in ("weight", "bias"):
                register_parametrization(layer, name, Rounded())
    model[-1].register_forward_hook(lambda layer, inputs, output: Round.apply(output))


def torchvision_crop_and_flip(images, index, *drawn):
    """Torchvision's random crop and flip, drawn by itself for each image."""
    import torch
    from torchvision.transforms import v2

    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    images = images[index].permute(0, 3, 1, 2)
    return torch.stack([augment(image) for image in images]).permute(0, 2, 3, 1)


def profile(data_dir, steps=50):
    """Print the operations that our training steps spend their time in."""
    from dataclasses import replace

    import torch

    part2, settings, data = prepare_ours(data_dir)
    data = replace(data, train=data.train[: steps * settings.batch_size])
    training = part2.Training(settings, data)
    part2.train_epoch(training)  # warm
    with torch.profiler.profile() as profiler:
        part2.train_epoch(training)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14))


def child(side, data_dir, epochs, seed):
    """One run in this process; prints its result as JSON."""
    run = run_plain if side == "plain" else lambda *args: run_ours(*args, side)
    seconds, accuracy, dead, judged = run(data_dir, epochs, seed)
    peaks = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    found = {"seconds": seconds, "accuracy": accuracy, "dead": dead, "judged": judged}
    print(json.dumps(found | {"megabytes": max(peaks) / 1e3}))


def matmul_peak(dtype, size=2048, repeats=5):
    """GFLOP/s of a square matrix product, the best of a few."""
    import torch

    a, b = torch.randn(2, size, size).to(dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9


@command
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--epochs", type=integer(1), default=10)
    parser.add_argument("--seeds", type=integer(1), default=1)
    parser.add_argument("--sides", nargs="+", default=["plain", "ours"], choices=SIDES)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.profile:
        return profile(a.data_dir)
    if a.child:
        return child(a.child, a.data_dir, a.epochs, a.seed)
    import torch

    results = {side: [] for side in a.sides}
    peaks = {
        name: matmul_peak(getattr(torch, name))
        for name in sorted({"float32", *map(precision_of, a.sides)})
    }
    import part2_cifar_cnn as part2

    operations = part2.step_flops(part2.Settings(), epoch=1) * 50_000
    print(
        "matrix product: "
        + ", ".join(f"{v:.0f} GFLOP/s in {k}" for k, v in peaks.items())
        + f"; {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(
        "side         seed  s/epoch  images/s  peak MB  test accuracy  share of peak  dead"
        "  judged/s",
        flush=True,
    )
    for seed in range(a.seeds):
        for side in a.sides:
            run = [
                sys.executable,
                __file__,
                "--child",
                side,
                "--seed",
                str(seed),
                "--data-dir",
                a.data_dir,
                "--epochs",
                str(a.epochs),
            ]
            done = subprocess.run(run, capture_output=True, text=True)
            if done.returncode:
                why = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
                raise UserError(f"{side} failed: {why.removeprefix('error: ')}")
            result = json.loads(done.stdout.splitlines()[-1])
            results[side].append(result)
            pace = statistics.median(result["seconds"])
            share = operations / pace / 1e9 / peaks[precision_of(side)]
            print(
                f"{side:<12} {seed:>4} {pace:>8.2f} {50_000 / pace:>9.0f} "
                f"{result['megabytes']:>8.0f} {result['accuracy']:>14.2%} {share:>14.0%} "
                f"{result['dead']:>5} {result['judged']:>9.0f}",
                flush=True,
            )
    for side, runs in results.items():
        shares = [run["accuracy"] for run in runs]
        spread = f" +- {statistics.stdev(shares):.2%}" if len(shares) > 1 else ""
        pace = statistics.median(s for run in runs for s in run["seconds"])
        print(
            f"{side}: {statistics.mean(shares):.2%}{spread} (n = {len(runs)}), {pace:.2f} s/epoch"
        )


if __name__ == "__main__":
    sys.exit(main())
