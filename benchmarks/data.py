"""The data sets of the benchmarks, each read whole into memory and checked before it is believed.

| name | files looked for under `--data DIR` |
| --- | --- |
| digits | none: scikit-learn carries them |
| mnist, fashion-mnist | the four idx files, raw or .gz; also in torchvision's DIR/<set>/raw |
| cifar10 | cifar-10-batches-py/ (or its six batches in DIR itself), or cifar10.npz |

All are also found one folder down, in DIR/<name>.

The published MD5 sums are those of the uncompressed idx files, so raw and re-compressed files are
checked alike, and of the CIFAR-10 batches. An .npz has no published sum; it carries CRC-32 sums.
"""

import gzip
import hashlib
import math
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


class DataError(Exception):
    """A data set is missing, damaged or not what its name says. The message is one line."""


@dataclass(frozen=True)
class Dataset:
    """A classification task: x [N, features] float32, y [N] int64 in [0, classes)."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: int = 10


IDX_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
TORCHVISION_FOLDER = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
DOWNLOAD = {
    "mnist": "the four idx files from https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "the four idx files from "
    "https://github.com/zalandoresearch/fashion-mnist/tree/master/data/fashion",
    "cifar10": "and unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
}
DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10")


def load(name: str, directory: str | None = None, check_md5: bool = True) -> Dataset:
    """Read the data set `name` (one of DATASETS) from `directory`; DataError if anything is off.

    Features are scaled to mean 0 and standard deviation 1 over all pixels of the training set.
    `check_md5=False` takes any files of the right format, a subset or another set of letters.
    """
    if name == "digits":
        return _dataset(*_digits())
    if directory is None:
        raise DataError(f"{name} needs --data DIR: download {DOWNLOAD[name]} into DIR")
    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"--data {directory}: no such directory")
    return _dataset(*(_cifar10 if name == "cifar10" else _idx_set)(name, root, check_md5))


def _dataset(train_x, train_y, test_x, test_y):
    """Flat standardised float32 features from images of any integer or float type."""
    train_x, test_x = (x.reshape(len(x), -1).astype(np.float32) for x in (train_x, test_x))
    mean, std = train_x.mean(dtype=np.float64), train_x.std(dtype=np.float64)
    for x in (train_x, test_x):  # in place: CIFAR-10 is 737 MB in float32
        x -= np.float32(mean)
        x *= np.float32(1 / std)
    labels = (torch.from_numpy(y.astype(np.int64)) for y in (train_y, test_y))
    return Dataset(torch.from_numpy(train_x), next(labels), torch.from_numpy(test_x), next(labels))


def _digits():
    """1797 images of 8x8 (UCI, test part), of which a fixed fifth is held out for the test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(x))
    train, test = order[360:], order[:360]
    return x[train], y[train], x[test], y[test]


def _missing(name, files, root):
    return DataError(f"{name}: {files} not found in {root}; download {DOWNLOAD[name]} into {root}")


def _verify(path, content, md5):
    """Compare with the published sum, or say in one line that it differs."""
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(
            f"{path}: wrong checksum, MD5 {found} where {md5} is published "
            "(download it again, or --skip-checksum to use other data of this format)"
        )


# MNIST and Fashion-MNIST: idx files, http://yann.lecun.com/exdb/mnist/


def _idx_set(name, root, check_md5):
    arrays = [
        _idx_file(name, root, stem, md5 if check_md5 else None)
        for stem, md5 in IDX_MD5[name].items()
    ]
    for images, labels in (arrays[:2], arrays[2:]):
        _check_pair(name, images, labels)
    return arrays


def _idx_file(name, root, stem, md5):
    """One idx file as an array: [N, 28, 28] for images, [N] for labels."""
    folders = (root, root / TORCHVISION_FOLDER[name], root / name)
    paths = [folder / (stem + suffix) for folder in folders for suffix in ("", ".gz")]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise _missing(name, f"{stem} (or {stem}.gz)", root)
    content = _read(path)
    array = _parse_idx(path, content, dimensions=int(stem.split("idx")[1][0]))
    if array.shape[1:] != (28, 28)[: array.ndim - 1]:
        raise DataError(f"{path}: expected images of 28x28, got {list(array.shape[1:])}")
    if md5:
        _verify(path, content, md5)
    return array


def _read(path):
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, truncated or damaged ({error})") from None


def _parse_idx(path, content, dimensions):
    """Header: 0, 0, type (8: uint8), dimensions, then each size as a big-endian uint32."""
    header = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"{path}: not an idx file of {dimensions} dimensions of bytes "
            f"(magic {content[:4].hex()}, expected 000008{dimensions:02x})"
        )
    if len(content) < header:
        raise DataError(f"{path}: truncated in its header")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) != header + math.prod(shape):
        raise DataError(
            f"{path}: truncated or damaged, {len(content):,} bytes where its header "
            f"says {header + math.prod(shape):,}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# CIFAR-10: https://www.cs.toronto.edu/~kriz/cifar.html


def _cifar10(name, root, check_md5):
    for folder in (root, root / name):
        for batches in (folder / "cifar-10-batches-py", folder):
            if (batches / "data_batch_1").is_file():
                return _cifar_batches(batches, check_md5)
        if (folder / "cifar10.npz").is_file():
            return _cifar_npz(folder / "cifar10.npz")
    raise _missing(name, "neither cifar-10-batches-py/ nor cifar10.npz", root)


def _cifar_batches(folder, check_md5):
    batches = [
        _cifar_batch(folder / stem, md5 if check_md5 else None) for stem, md5 in CIFAR_MD5.items()
    ]
    images, labels = (np.concatenate(part) for part in zip(*batches[:5], strict=True))
    return images, labels, *batches[5]


class _ArraysOnly(pickle.Unpickler):
    """A pickle may run any code; a batch of CIFAR-10 needs no more than NumPy arrays."""

    ALLOWED = (("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype"))

    def find_class(self, module, name):
        array = name == "_reconstruct" and module.endswith("core.multiarray")
        if not array and (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _cifar_batch(path, md5):
    """One batch: images [N, 3072] in (channel, row, column) order, labels [N]."""
    if not path.is_file():
        raise _missing("cifar10", path.name, path.parent)
    if md5:
        _verify(path, _read(path), md5)
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(f"{path}: truncated, or not a batch of CIFAR-10 ({error!r})") from None
    if images.ndim != 2 or images.shape[1] != 3072:
        raise DataError(f"{path}: expected data [N, 3072], got {list(images.shape)}")
    _check_pair("cifar10", images, labels)
    return images, labels


def _cifar_npz(path):
    """x_train, x_test [N, 32, 32, 3] uint8 and y_train, y_test [N], reordered as the batches."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated, damaged or incomplete ({error})") from None
    for images, labels in (arrays[:2], arrays[2:]):
        if images.shape[1:] != (32, 32, 3):
            raise DataError(f"{path}: expected images [N, 32, 32, 3], got {list(images.shape)}")
        _check_pair("cifar10", images, labels)
    return [a.transpose(0, 3, 1, 2) if a.ndim == 4 else a for a in arrays]


def _check_pair(name, images, labels):
    """One label in 0..9 for each image, and at least one image."""
    if images.dtype != np.uint8 or labels.ndim != 1 or len(labels) != len(images):
        raise DataError(
            f"{name}: expected uint8 images and one label for each, got {images.dtype} "
            f"{list(images.shape)} and labels {list(labels.shape)}"
        )
    if len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{name}: expected labels 0 to 9, of at least one image")
