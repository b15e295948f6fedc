"""CIFAR-10 as the published code normalises it, its splits and its augmentation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.paper.table import Config
from examples.training.data import load

QUICK_IMAGES = 1280

# The published code normalises each channel by these; the deviations are those of an image, on
# average, so that the inputs are 1.2 times as large as at a deviation of 1.
_MEAN = torch.tensor((0.4914, 0.4822, 0.4465)).view(3, 1, 1)
_STD = torch.tensor((0.2023, 0.1994, 0.2010)).view(3, 1, 1)


class Split(NamedTuple):
    x: Tensor  # [N, 3, 32, 32] float32
    y: Tensor


class Data(NamedTuple):
    train: Split
    test: Split


def read(directory: str, quick: bool, device: str) -> Data:
    """Reads CIFAR-10 as the published code normalises it, all of it onto the device."""
    data = load("cifar10", directory)
    low, high = data.train_x.min(), data.train_x.max()  # the pixels 0 and 255
    for x in (data.train_x, data.test_x):
        x.sub_(low).div_(high - low).sub_(_MEAN).div_(_STD)
    count = QUICK_IMAGES if quick else None
    train = Split(data.train_x[:count].to(device), data.train_y[:count].to(device))
    return Data(train, Split(data.test_x[:count].to(device), data.test_y[:count].to(device)))


def split(data: Data, config: Config, quick: bool) -> dict[str, Split]:
    """Returns what is trained on, the test set and, for choices, what is held out: the last
    images."""
    held_out = min(config.held_out, len(data.train.y) // 10) if quick else config.held_out
    if not held_out:
        return {"train": data.train, "test": data.test}
    kept = len(data.train.y) - held_out
    held = Split(data.train.x[kept:], data.train.y[kept:])
    return {
        "train": Split(data.train.x[:kept], data.train.y[:kept]), "held_out": held,
        "test": data.test,
    }  # fmt: skip


def augmented(x: Tensor, kinds: tuple[str, ...]) -> Tensor:
    """Mirrors images at random and shifts them by up to 4 pixels within zeros, all drawn anew."""
    n, device = len(x), x.device
    if "flip" in kinds:
        mirrored = torch.rand(n, device=device) < 0.5
        x = torch.where(mirrored.view(n, 1, 1, 1), x.flip(3), x)
    if "shift" in kinds:
        x = F.pad(x, (4, 4, 4, 4))
        pixels, images = (torch.arange(of, device=device) for of in (32, n))
        rows, columns = (torch.randint(9, (n, 1), device=device) + pixels for _ in range(2))
        images = images.view(n, 1, 1)
        x = x.movedim(1, 3)[images, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
    return x
