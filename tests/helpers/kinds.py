"""A small network of every kind, built twice: of fastdfa's layers, and of torch's own with the cuts
made by hand. DFA of the second is its definition: detach, and hand every cut tensor e B."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

import fastdfa

from .networks import RULE, gradients, randn

FASTDFA = SimpleNamespace(
    Linear=fastdfa.Linear, Conv1d=fastdfa.Conv1d, Conv2d=fastdfa.Conv2d,
    FeedbackPoint=fastdfa.FeedbackPoint,
)  # fmt: skip


# torch's own module for each name of an activation.
MODULES = {
    "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
    "elu": nn.ELU, "softplus": nn.Softplus, "gelu": nn.GELU, "silu": nn.SiLU, "mish": nn.Mish,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "selu": nn.SELU, "celu": nn.CELU,
    "relu6": nn.ReLU6, "hardtanh": nn.Hardtanh, "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish, "softsign": nn.Softsign,
}  # fmt: skip


@dataclass
class Cut:
    """A tensor that is cut, and the module whose input it is."""

    tensor: torch.Tensor
    reader: nn.Module

    def feed(self, projection):
        """Hands it the feedback [M, n_l]: by rows or flattened, or to each of its positions."""
        x, features = self.tensor, getattr(self.reader, "features", None)
        if features is None:
            signal = projection.reshape(x.shape)
        else:
            shape = [x.shape[0], *[1] * (x.dim() - 1)]
            shape[features] = -1
            positions = x[0].numel() // x.shape[features]
            signal = (projection.reshape(shape) / positions**0.5).expand(x.shape)
        x.backward(signal.to(x.dtype), retain_graph=True)  # two cuts may share what is before

    def width(self, rows):
        """Its features n_l, under an error [*rows, C]."""
        x, features = self.tensor, getattr(self.reader, "features", None)
        if features is not None:
            return x.shape[features]
        return x.shape[-1] if x.shape[:-1] == rows else x[0].numel()


class Cuts(list):
    """The cuts of one forward pass, in order. Nothing is cut from here on where `ended`, which is
    behind the submodule at whose output the error is taken."""

    ended = False
    inputs: tuple = ()  # of the network, which are not cut
    chosen = None  # the readers at whose inputs the network is cut, or all of them
    kinds: tuple = ()  # of readers

    def chosen_of(self, module, cut):
        """Those of a module that a number says, every so many of them, or truth values in turn; a
        first layer, with nothing before it, is none."""
        readers = [inner for inner in module.modules() if isinstance(inner, self.kinds)]
        trained = [inner for inner in module.modules() if list(inner.parameters(recurse=False))]
        readers = readers[1:] if readers[:1] == trained[:1] else readers
        if isinstance(cut, int):
            return set(readers[cut - 1 :: cut])
        return {reader for k, reader in enumerate(readers) if cut[k % len(cut)]}

    @property
    def tensors(self):
        return [cut.tensor for cut in self]

    def names(self, module):
        """Those of the readers, with "#2" and so on where one made several."""
        names, found = {m: name for name, m in module.named_modules()}, []
        for cut in self:
            calls = sum(cut.reader is other.reader for other in self[: len(found) + 1])
            found.append(names[cut.reader] + (f"#{calls}" if calls > 1 else ""))
        return found


def by_hand(cuts=True):
    """torch's layers under the same names, and the `Cuts` that they make, or would make."""
    made = Cuts()

    def cut(x, reader):
        if made.ended or any(x is given for given in made.inputs):
            return x
        if made.chosen is not None and reader not in made.chosen:
            return x
        if x.requires_grad and not any(x is seen for seen in made.tensors):
            made.append(Cut(x, reader))
        return x.detach() if cuts else x

    def layer(base):
        class Layer(base):
            def __init__(self, *args, activation=None, **options):
                super().__init__(*args, **options)
                known = isinstance(activation, str)
                self.activation = MODULES[activation]() if known else activation

            def forward(self, x):
                a = super().forward(cut(x, self))
                return a if self.activation is None else self.activation(a)

        return Layer

    class Point(nn.Module):
        def __init__(self, features=None):
            super().__init__()
            self.features = features

        def forward(self, x):
            return cut(x, self)

    bases = {"Linear": nn.Linear, "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d}
    names = {name: layer(base) for name, base in bases.items()} | {"FeedbackPoint": Point}
    made.kinds = tuple(names.values())
    return SimpleNamespace(**names), made


def mlp(of):
    return nn.Sequential(
        of.Linear(5, 8, activation="tanh"), of.Linear(8, 7, activation="relu"), of.Linear(7, 3)
    )


def cnn(of):
    return nn.Sequential(
        of.Conv2d(2, 4, 3, padding=1, activation="relu"),
        of.Conv2d(4, 6, 3, groups=2, padding=1, bias=False), nn.BatchNorm2d(6),
        nn.ReLU(inplace=True), nn.MaxPool2d(2),
        of.Conv2d(6, 4, 3, padding="same", padding_mode="circular", activation="tanh"),
        nn.Flatten(), of.Linear(36, 3),
    )  # fmt: skip


class ResidualBlock(nn.Module):
    """Cut after the add and its ReLU, as the skip path would go round any cut inside."""

    def __init__(self, of, n):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU(inplace=True),
            nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n),
        )  # fmt: skip
        self.relu, self.point = nn.ReLU(inplace=True), of.FeedbackPoint()

    def forward(self, h):
        return self.point(self.relu(self.inner(h) + h))


def resnet(of):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), of.FeedbackPoint(),
        ResidualBlock(of, 4), ResidualBlock(of, 4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


class Transformer(nn.Module):
    """Tokens [N, T] -> logits [N, T, 3], cut after the embedding and after every block."""

    def __init__(self, of):
        super().__init__()
        self.token, self.position = nn.Embedding(11, 8), nn.Embedding(4, 8)
        self.points = nn.ModuleList([of.FeedbackPoint() for _ in range(3)])
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)]
        )
        self.norm, self.head = nn.LayerNorm(8), of.Linear(8, 3)

    def forward(self, tokens):
        h = self.points[0](self.token(tokens) + self.position.weight)
        for block, point in zip(self.blocks, self.points[1:], strict=True):
            h = point(block(h))
        return self.head(self.norm(h))


class GCN(nn.Module):
    """Kipf and Welling's: h = f(A h W), rows are nodes."""

    def __init__(self, of):
        super().__init__()
        self.layers = nn.ModuleList([of.Linear(5, 8), of.Linear(8, 7)])
        self.head = of.Linear(7, 3)

    def forward(self, adjacency, h):
        for layer in self.layers:
            h = torch.relu(adjacency @ layer(h))
        return adjacency @ self.head(h)


class Recurrent(nn.Module):
    """A cell called T times, its state cut after each: [N, T, 5] -> [N, 3]."""

    def __init__(self, of):
        super().__init__()
        self.cell, self.point = nn.GRUCell(5, 8), of.FeedbackPoint()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 8)
        for t in range(x.shape[1]):
            h = self.point(self.cell(x[:, t], h))
        return self.head(h)


def images(n, dtype):
    return (randn(n, 2, 6, 6, dtype=dtype),)


def graph(n, dtype):
    edges = (randn(n, n) > 0.5).to(dtype) + torch.eye(n, dtype=dtype)
    return edges / edges.sum(1, keepdim=True), randn(n, 5, dtype=dtype)


# What builds a network, makes its inputs for n rows, and the shape of its error for them.
KINDS = {
    "mlp": (mlp, lambda n, dtype: (randn(n, 5, dtype=dtype),), lambda n: (n, 3)),
    "cnn": (cnn, images, lambda n: (n, 3)),
    "resnet": (resnet, images, lambda n: (n, 3)),
    "transformer": (
        Transformer, lambda n, dtype: (torch.arange(4 * n).reshape(n, 4) ** 2 % 11,),
        lambda n: (n, 4, 3),
    ),
    "gcn": (GCN, graph, lambda n: (n, 3)),
    "recurrent": (Recurrent, lambda n, dtype: (randn(n, 3, 5, dtype=dtype),), lambda n: (n, 3)),
}  # fmt: skip


def build(kind, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return fastdfa.DFA(KINDS[kind][0](FASTDFA).to(dtype), **{"feedback": RULE} | options)


def data(kind, n=6, dtype=torch.float64):
    """Inputs, and an error for the output."""
    _, inputs, error = KINDS[kind]
    return inputs(n, dtype), randn(*error(n), seed=1, dtype=dtype)


def run(model, inputs, g):
    """One forward and backward pass whose error is g. Returns the output."""
    y = model(*inputs)
    (y.to(g.dtype) * g).sum().backward()
    return y


def definition(kind, model, inputs, g):
    """Output and gradients of DFA by its definition, for the weights and points of `model`, which
    ran before; under the mode, dtype and autocast of now."""
    of, cuts = by_hand()
    plain = KINDS[kind][0](of).to(g.dtype).train(model.training)
    plain.load_state_dict(model.module.state_dict())
    y = run(plain, inputs, g)
    e = g.reshape(-1, g.shape[-1])
    for cut, name in zip(cuts, model.feedback_points, strict=True):
        cut.feed(e @ model.feedback_matrix(name).to(e))
    return y, gradients(plain)
