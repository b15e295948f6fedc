"""Reads the data sets, each whole into memory and checked before it is believed.

| name | files looked for under `--data DIR` |
| --- | --- |
| digits | none: scikit-learn carries them |
| mnist, fashion-mnist | the four idx files, raw or .gz; also in torchvision's DIR/<set>/raw |
| cifar10 | cifar-10-batches-py/ (or its six batches in DIR itself), or cifar10.npz |
| shakespeare | input.txt (Karpathy's Tiny Shakespeare), or any text of that name |
| cora | cora.npz (features as CSR, labels, edges, the Planetoid split) |

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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch


class DataError(Exception):
    """Says that a data set is missing, damaged or not what its name says, in one line."""


@dataclass(frozen=True)
class Dataset:
    """Holds a classification task: x [N, *shape] and y int64 in [0, classes), or IGNORED.

    Images: x float32, y [N]. Text: x [N, T] characters, y [N, T] the next ones. A graph is one
    sample: x [1, nodes, features], y [1, nodes], with the labels of other splits IGNORED.
    """

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: int = 10
    adjacency: torch.Tensor | None = None  # of a graph: sparse [nodes, nodes], normalised

    @property
    def shape(self):
        return tuple(self.train_x.shape[1:])


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
    "shakespeare": "input.txt from https://raw.githubusercontent.com/karpathy/char-rnn/master/"
    "data/tinyshakespeare/",
    "cora": "the Planetoid files of https://github.com/kimiyoung/planetoid, made into cora.npz,",
}
IMAGES = ("digits", "mnist", "fashion-mnist", "cifar10")
DATASETS = (*IMAGES, "shakespeare", "cora")
IGNORED = -100  # a label without a loss, as in torch's cross_entropy
CONTEXT = 64  # characters of a sample of text


def load(
    name: str, directory: str | None = None, check_md5: bool = True, validate: bool = False
) -> Dataset:
    """Reads the data set `name` (one of DATASETS) from `directory`; DataError if anything is off.

    Pixels are scaled to mean 0 and standard deviation 1 over all of the training set.
    `check_md5=False` takes any files of the right format, a subset or another set of letters.
    `validate=True` never touches the test set: in its place stand the validation nodes of a graph,
    of anything else the last tenth of the training set, which is held out.
    """
    if name == "cora":
        return _graph(name, _root(name, directory), "val_idx" if validate else "test_idx")
    data = _whole(name, directory, check_md5)
    return _held_out(data) if validate else data


def _held_out(data):
    x, y = ([*t.split(len(t) - len(t) // 10)] for t in (data.train_x, data.train_y))
    return replace(data, train_x=x[0], train_y=y[0], test_x=x[1], test_y=y[1])


def _whole(name, directory, check_md5):
    if name == "digits":
        return _dataset(*_digits())
    root = _root(name, directory)
    if name == "shakespeare":
        return _text(name, root)
    return _dataset(*(_cifar10 if name == "cifar10" else _idx_set)(name, root, check_md5))


def _root(name, directory):
    if directory is None:
        raise DataError(f"{name} needs --data DIR: download {DOWNLOAD[name]} into DIR")
    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"--data {directory}: no such directory")
    return root


def _dataset(train_x, train_y, test_x, test_y):
    """Makes standardised float32 images [N, channels, height, width] of any integer or float
    type."""
    shape = train_x.shape[1:] if train_x.ndim == 4 else (1, *train_x.shape[1:])
    train_x, test_x = (x.reshape(-1, *shape).astype(np.float32) for x in (train_x, test_x))
    mean, std = train_x.mean(dtype=np.float64), train_x.std(dtype=np.float64)
    for x in (train_x, test_x):  # in place: CIFAR-10 is 737 MB in float32
        x -= np.float32(mean)
        x *= np.float32(1 / std)
    labels = (torch.from_numpy(y.astype(np.int64)) for y in (train_y, test_y))
    return Dataset(torch.from_numpy(train_x), next(labels), torch.from_numpy(test_x), next(labels))


def _digits():
    """Reads 1797 images of 8x8 (UCI, test part), of which a fixed fifth is held out for the
    test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8)
    order = np.random.RandomState(0).permutation(len(x))
    train, test = order[360:], order[:360]
    return x[train], y[train], x[test], y[test]


def _missing(name, files, root):
    return DataError(f"{name}: {files} not found in {root}; download {DOWNLOAD[name]} into {root}")


def _verify(path, content, md5):
    """Compares with the published sum, or says in one line that it differs."""
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
    """Reads one idx file as an array: [N, 28, 28] for images, [N] for labels."""
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
    """Reads the header: 0, 0, type (8: uint8), dimensions, each size as a big-endian uint32; the
    data."""
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
    """Unpickles NumPy arrays alone: a pickle may run any code, and a batch of CIFAR-10 needs no
    more."""

    ALLOWED = (("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype"))

    def find_class(self, module, name):
        array = name == "_reconstruct" and module.endswith("core.multiarray")
        if not array and (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _cifar_batch(path, md5):
    """Reads one batch: images [N, 3072] in (channel, row, column) order, labels [N]."""
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
    return images.reshape(-1, 3, 32, 32), labels


def _cifar_npz(path):
    """Reads x_train, x_test [N, 32, 32, 3] uint8 and y_train, y_test [N], reordered as the
    batches."""
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
    """Checks for one label in 0..9 for each image, and for at least one image."""
    if images.dtype != np.uint8 or labels.ndim != 1 or len(labels) != len(images):
        raise DataError(
            f"{name}: expected uint8 images and one label for each, got {images.dtype} "
            f"{list(images.shape)} and labels {list(labels.shape)}"
        )
    if len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{name}: expected labels 0 to 9, of at least one image")


# Tiny Shakespeare: https://github.com/karpathy/char-rnn


def _text(name, root):
    """Cuts windows of CONTEXT characters side by side; the last tenth of the text is the test
    set."""
    path = next((p for p in (root / "input.txt", root / name / "input.txt") if p.is_file()), None)
    path = path or root / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        raise _missing(name, "input.txt", root)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from None
    letters = sorted(set(text))
    code = torch.tensor([letters.index(c) for c in text])
    if len(code) < 20 * CONTEXT:
        raise DataError(f"{path}: expected at least {20 * CONTEXT} characters, got {len(code)}")
    pieces = code.split([len(code) - len(code) // 10, len(code) // 10])
    return Dataset(*(xy for piece in pieces for xy in _windows(piece)), classes=len(letters))


def _windows(code):
    """Returns x and, one character further, y, [windows, CONTEXT] each."""
    count = (len(code) - 1) // CONTEXT
    return [code[i : i + count * CONTEXT].view(count, CONTEXT) for i in (0, 1)]


# Cora: Sen et al. 2008, in the split of Yang et al. 2016 (Planetoid)


def _graph(name, root, scored):
    """Reads a graph; the labels of `scored`, test_idx or val_idx, take the place of a test set."""
    path = next((p for p in (root / "cora.npz", root / name / "cora.npz") if p.is_file()), None)
    if path is None:
        raise _missing(name, "cora.npz", root)
    keys = ("x_data", "x_indices", "x_indptr", "x_shape", "y", "edges", "train_idx", scored)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: torch.from_numpy(file[key]).long() for key in keys[1:]}
            values = torch.from_numpy(file["x_data"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated, damaged or incomplete ({error})") from None
    x = torch.zeros(arrays["x_shape"].tolist())
    rows = torch.arange(len(x)).repeat_interleave(arrays["x_indptr"].diff())
    x[rows, arrays["x_indices"]] = values
    x = x / x.sum(1, keepdim=True).clamp(min=1)  # rows of sum 1, as published
    labels = [_labels_of(arrays["y"], arrays[split]) for split in ("train_idx", scored)]
    adjacency = _normalised(arrays["edges"], len(x))
    classes = int(arrays["y"].max()) + 1
    return Dataset(x[None], labels[0], x[None], labels[1], classes, adjacency)


def _labels_of(y, nodes):
    labels = torch.full((1, len(y)), IGNORED)
    labels[0, nodes] = y[nodes]
    return labels


def _normalised(edges, nodes):
    """Returns D^-1/2 (A + I) D^-1/2 of an undirected graph, as in Kipf and Welling 2017."""
    loops = torch.arange(nodes).expand(2, -1)
    both = torch.cat([edges.T, edges.T.flip(0), loops], 1)
    degree = torch.bincount(both[0], minlength=nodes).float()
    weights = (degree[both[0]] * degree[both[1]]).rsqrt()
    size = (nodes, nodes)
    return torch.sparse_coo_tensor(both, weights, size, check_invariants=True).coalesce()
