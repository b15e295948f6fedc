"""Draws programs. `program(pick)` makes one of the choices of `pick`, which returns one of several
options, of which the first is the simplest: hypothesis chooses, or `Numbers`.

Left out, as they are refused or known to be wrong: full backward hooks of layers that share their
input with others, or whose input is the network's; and branches of which one reads the tensor
itself and another something made of it. And what has a test of its own that fails: frozen layers of
branches that read different tensors (test_leaks.py), channels_last batches of one image in front of
a batch norm (test_conv.py).
"""

from random import Random
from typing import NamedTuple

import torch

import fastdfa

from .formulas import ACTIVATIONS, DISTRIBUTIONS, SCALES
from .kinds import MODULES
from .programs import (
    FUNCTIONS,
    WAYS,
    Again,
    Branches,
    Conv,
    Dense,
    Function,
    Module,
    Nested,
    Point,
    Program,
    Residual,
)
from .signals import CASES

# Activations: names, and modules that the kernels know or do not.
NAMES = ["none", *MODULES, *(name for name in ACTIVATIONS if "(" in name), "Softsign", "Tanhshrink"]
PLAIN = ["ReLU", "Tanh", "GELU", "SiLU", "ELU", "LeakyReLU", "Softsign", "PReLU", "Sigmoid"]
HOOKS = ["", "", "", "forward", "forward_pre"]
BACKWARD_HOOKS = [*HOOKS, "full_backward", "full_backward_pre"]
FROZEN = ["", "", "", "weight", "bias", "weight bias"]
WIDTHS = range(1, 13)
OF_ONE = [name for name in FUNCTIONS if name != "mean over tokens"]
SELDOM = [False, False, False, True]
NOW_AND_THEN = [True, False]


class Allowed(NamedTuple):
    """What the parts of a program may have."""

    hooks: list
    batch_norm: bool
    checkpoints: bool
    names: list  # of activations


class Numbers:
    """Chooses at random, or the options of these numbers and then the first ones. Keeps the numbers
    of what it chose."""

    def __init__(self, random=None, numbers=()):
        self.random, self.given, self.chosen = random, iter(numbers), []

    def __call__(self, options):
        if self.random is not None:
            number = self.random.randrange(len(options))
        else:
            number = min(next(self.given, 0), len(options) - 1)
        self.chosen.append(number)
        return options[number]


def numbered(seed, number):
    """Program `number` of a seed, and the numbers of its choices."""
    pick = Numbers(Random(f"{seed}/{number}"))
    return program(pick, ALL_WAYS), pick.chosen


def renumbered(numbers):
    """The program of these choices."""
    return program(Numbers(numbers=numbers), ALL_WAYS)


def layer(pick, allowed, n, m=None, hooks=HOOKS, frozen=FROZEN):
    """Of n to m features, or to any number of them."""
    m = m or pick(WIDTHS)
    return Dense(n, m, pick(allowed.names), pick(NOW_AND_THEN), pick(frozen), pick(hooks))


def may_change_in_place(parts):
    """Whether what these modules end in is a tensor that nothing else holds."""
    if not parts:
        return False
    last = parts[-1]
    if isinstance(last, (Dense, Conv)):
        return last.activation == "none" and "backward" not in last.hook
    return isinstance(last, Module) and "Norm" in last.name


def branches(pick, allowed, n):
    """And the width of what comes out."""
    merge, m = pick(["add", "mul", "cat"]), pick(WIDTHS)
    count, before, paths = pick([2, 3]), pick(SELDOM), []
    for _ in range(count):
        path = [Module(pick(["Tanh", "ReLU"]))] if before else []
        path.append(layer(pick, allowed, n, m, frozen=[""] if before else FROZEN))
        if pick(SELDOM):
            path.append(layer(pick, allowed, m, m))
        if pick(SELDOM):
            path.append(Module("LayerNorm", (m,)))
        paths.append(tuple(path))
    return Branches(tuple(paths), merge), count * m if merge == "cat" else m


KINDS = [
    "layer", "layer", "layers", "activation", "norm", "dropout", "function", "point", "branches",
    "residual", "again", "nested", "plain",
]  # fmt: skip


def sequence(pick, allowed, n, ranks, positions=False, most=5):
    """Operations on [N, n] (`ranks` of 2) or [N, T, n], and their last width."""
    parts = []
    for _ in range(pick(range(most + 1))):
        kind = pick(KINDS)
        if kind == "layer":
            parts.append(layer(pick, allowed, n, hooks=allowed.hooks))
            n = parts[-1].m
        elif kind == "layers":  # a run, of which nothing keeps the first from computing the others
            for _ in range(pick([2, 3, 4])):
                parts.append(layer(pick, allowed, n, hooks=[""]))
                n = parts[-1].m
        elif kind == "activation":
            name = pick(PLAIN)
            inplace = name in ("ReLU", "SiLU", "ELU", "LeakyReLU") and may_change_in_place(parts)
            parts.append(Module(name, inplace=inplace and pick([False, True])))
        elif kind == "norm":
            batch = allowed.batch_norm and ranks == 2 and pick([False, True])
            parts.append(Module("BatchNorm1d" if batch else "LayerNorm", (n,)))
        elif kind == "dropout":
            parts.append(Module("Dropout", (pick([0.0, 0.4]),)))
        elif kind == "function":
            parts.append(Function(pick(OF_ONE)))
        elif kind == "point":
            parts.append(Point(-1 if positions and pick(SELDOM) else None))
        elif kind == "branches":
            part, n = branches(pick, allowed, n)
            parts.append(part)
        elif kind == "residual":
            inner = [Module("LayerNorm", (n,))] * pick([0, 1])
            inner += [Module("Linear", (n, 5)), Module("GELU"), Module("Linear", (5, n))]
            parts.append(Residual(tuple(inner)))
        elif kind == "again":
            parts.append(Again(layer(pick, allowed, n, n), pick([2, 3]), pick([False, True])))
        elif kind == "nested":
            # A checkpoint would update the statistics of a batch norm twice.
            checkpointed = allowed.checkpoints and pick(SELDOM)
            inside = allowed._replace(batch_norm=allowed.batch_norm and not checkpointed)
            inner, n = sequence(pick, inside, n, ranks, positions, most=2)
            parts.append(Nested(tuple(inner), checkpointed))
        else:
            m = pick(WIDTHS)
            parts.append(Module("Linear", (n, m)))
            n = m
    return parts, n


def images(pick, allowed, channels, sizes):
    """Operations on images [N, C, *sizes] that end in [N, n], and n."""
    parts, dimensions = [], len(sizes)
    for _ in range(pick([1, 2, 3])):
        groups = pick([1, 1, 2]) if channels % 2 == 0 else 1
        m = 2 * pick([1, 2, 3])
        kernel, padding = pick([(3, 1), (3, 0), (2, 1), (1, 0)])
        stride = 1 if kernel == 1 else pick([1, 1, 2])
        made = [(size + 2 * padding - kernel) // stride + 1 for size in sizes]
        if min(made) < 1:
            break
        sizes = made
        parts.append(Conv(
            channels, m, kernel, padding, stride, groups, pick(allowed.names), pick(NOW_AND_THEN),
            pick(FROZEN), pick(allowed.hooks), dimensions,
        ))  # fmt: skip
        channels = m
        if allowed.batch_norm and pick(SELDOM):
            parts.append(Module(f"BatchNorm{dimensions}d", (m,)))
        if pick(SELDOM):
            parts.append(Module("ReLU", inplace=may_change_in_place(parts) and pick(NOW_AND_THEN)))
        if pick(SELDOM):
            parts.append(Point(pick([None, 1])))
        if min(sizes) >= 2 and pick(SELDOM):
            parts.append(Module(f"MaxPool{dimensions}d", (2,)))
            sizes = [size // 2 for size in sizes]
    parts.append(Module("Flatten"))
    for size in sizes:
        channels *= size
    return parts, channels


def rule(pick, tail, float64):
    """A `Feedback`, and the name of its signal in `CASES` and whether it is raw."""
    # Behind a tap an error may be 0 but for rounding, and its sign would not be.
    name = pick(["error", "error", "error", *CASES]) if float64 or not tail else "error"
    raw = not tail and pick([False, True])
    density = pick([1.0, 1.0, 0.4])
    made = fastdfa.Feedback(
        distribution=pick(DISTRIBUTIONS),
        scale=pick([*SCALES, 0.3]),
        shared=pick(NOW_AND_THEN),
        error=pick(["mean", "sum"]),
        seed=pick([1, 2**40 + 7]),
        dense=pick([None, True] + [False] * (density == 1)),
        rank=pick([None, None, 1, 3]),
        density=density,
    )
    return made, name, raw


CUTS = ["all"] * 6 + [2, 3, (False,), (True, False), (False, True, True)]
EAGER_WAYS = ["eager"] * 30 + [way for way in WAYS[1:-1] for _ in range(4)]
ALL_WAYS = [*EAGER_WAYS, "compiled"]  # a second or more of a program, which hypothesis would shrink
# Not bfloat16, of whose units some are on the other side of a kink.
DTYPES = [torch.float64] * 3 + [torch.float32]


def program(pick, ways=EAGER_WAYS):
    way, dtype = pick(ways), pick(DTYPES)
    float64 = dtype == torch.float64
    training, wants = pick([True, True, False]), way != "streaming" and pick(SELDOM)
    batches = tuple(pick([3, 1, 2, 7]) for _ in range(pick([1, 2, 3])))
    allowed = Allowed(
        hooks=HOOKS if wants else BACKWARD_HOOKS,
        # It needs several values; those of two rows are all but equal now and then.
        batch_norm=not training or min(batches) > (1 if float64 else 2),
        # A StreamingStep refuses points in them; to Dynamo another batch is another graph, which
        # torch's checkpoints refuse.
        checkpoints=way not in ("streaming", "compiled"),
        names=NAMES if float64 else [name for name in NAMES if name != "Tanhshrink"],  # a - tanh(a)
    )
    kind = pick(["rows", "rows", "tokens", "images"])
    parts, n, ranks, dimensions = [], pick(WIDTHS), 2, 0
    if kind == "images":
        dimensions = pick([2, 2, 1])
        shape = (pick([2, 3]), *[pick([3, 4, 5, 6]) for _ in range(dimensions)])
        # A convolution of 1x1 outputs has one value a channel: batch norm refuses it.
        inside = allowed._replace(batch_norm=allowed.batch_norm and not training)
        parts, n = images(pick, inside, shape[0], shape[1:])
    elif kind == "tokens":
        shape, ranks = (pick([1, 2, 3, 4]), n), 3
        by_sample = pick([False, True])  # whether the error is one of samples
        parts, n = sequence(pick, allowed, n, 3, by_sample, 3)
        if by_sample:
            parts.append(Function("mean over tokens"))
            ranks = 2
    else:
        shape = (n,)
    more, n = sequence(pick, allowed, n, ranks)
    parts += more
    classes = pick(range(1, 6))
    parts.append(layer(pick, allowed, n, classes, allowed.hooks, [""]))
    tail = outputs = None
    if pick(SELDOM):
        outputs = pick([1, 2, 3, 4])
        tail, m = sequence(pick, allowed._replace(hooks=HOOKS), classes, ranks, most=2)
        tail = (*tail, Dense(m, outputs))
    made, signal, raw = rule(pick, tail is not None, float64)
    return Program(
        tuple(parts), shape, classes, tail, outputs, pick(NOW_AND_THEN), made, signal, raw,
        batches, training, wants, dimensions == 2 and min(batches) > 1 and pick(SELDOM),
        pick(CUTS), way, dtype,
    )  # fmt: skip
