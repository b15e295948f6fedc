"""Networks as data: what builds them of fastdfa's layers or of torch's own, and their DFA by hand.

A program is a tree of operations whose `build(of)` makes a module of the layers of a namespace: of
`kinds.FASTDFA`, or of those of `kinds.by_hand`, which cut by `detach`. What builds both is the same
code, so that a difference is one of DFA. Hooks, which here do nothing, stand in the first only.
"""

from dataclasses import dataclass, fields

import torch
from torch import nn

import fastdfa

from .formulas import ACTIVATIONS
from .kinds import FASTDFA, MODULES, by_hand
from .networks import RULE, Apply, randn
from .signals import matrix, sent

# Names, and modules that the kernels know or do not.
NAMES = ["none", *MODULES, *(name for name in ACTIVATIONS if "(" in name), "Softsign", "Tanhshrink"]


def activation(name):
    """What `activation=` is given for a name of `NAMES`."""
    return name if name in MODULES else ACTIVATIONS[name].argument()


def idle(*arguments):
    """A hook that does nothing."""


def watched(h):
    """The same tensor, with a hook that does nothing."""
    if h.requires_grad:
        h.register_hook(idle)
    return h


FUNCTIONS = {
    "view": lambda h: h.view_as(h),
    "clone": torch.clone,
    "transposed": lambda h: h.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda h: h.repeat_interleave(2, -1)[..., ::2],
    "reshaped": lambda h: h.reshape(-1).reshape(h.shape),
    "hooked": watched,
    "mean over tokens": lambda h: h.mean(1),
}


def shown(data):
    """A dataclass with what is not as usual."""
    values = {field.name: getattr(data, field.name) for field in fields(data)}
    given = [
        f"{field.name}={shown(x) if isinstance(x, fastdfa.Feedback) else repr(x)}"
        for field, x in zip(fields(data), values.values(), strict=True)
        if x != field.default
    ]
    return f"{type(data).__name__}({', '.join(given)})"


class Operation:
    """What builds a module."""

    __repr__ = shown

    def _repr_pretty_(self, printer, cycle):
        """For hypothesis, which else shows every field in a line of its own."""
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Dense(Operation):
    """A layer that cuts its input."""

    n: int
    m: int
    activation: str = "none"
    bias: bool = True
    frozen: str = ""  # which of its parameters are
    hook: str = ""

    def build(self, of):
        layer = of.Linear(self.n, self.m, self.bias, activation=activation(self.activation))
        return finished(layer, self, of)


@dataclass(frozen=True, repr=False)
class Conv(Operation):
    """A convolution that cuts its input."""

    n: int
    m: int
    kernel: int = 3
    padding: int = 0
    stride: int = 1
    groups: int = 1
    activation: str = "none"
    bias: bool = True
    frozen: str = ""
    hook: str = ""

    def build(self, of):
        sizes = {"stride": self.stride, "padding": self.padding, "groups": self.groups}
        options = {"bias": self.bias, "activation": activation(self.activation)}
        return finished(of.Conv2d(self.n, self.m, self.kernel, **sizes, **options), self, of)


def finished(layer, operation, of):
    """A layer, parts of it frozen, and with its hook."""
    for name in operation.frozen.split():
        if getattr(layer, name) is not None:
            getattr(layer, name).requires_grad_(False)
    if of is FASTDFA and operation.hook:
        getattr(layer, f"register_{operation.hook}_hook")(idle)
    return layer


@dataclass(frozen=True, repr=False)
class Module(Operation):
    """One of torch.nn, which autograd differentiates."""

    name: str
    arguments: tuple = ()
    inplace: bool = False

    def build(self, of):
        options = {"inplace": True} if self.inplace else {}
        return getattr(nn, self.name)(*self.arguments, **options)


@dataclass(frozen=True, repr=False)
class Function(Operation):
    """One of `FUNCTIONS`."""

    name: str

    def build(self, of):
        return Apply(FUNCTIONS[self.name])


@dataclass(frozen=True, repr=False)
class Point(Operation):
    """A `FeedbackPoint`."""

    features: int | None = None

    def build(self, of):
        return of.FeedbackPoint(features=self.features)


@dataclass(frozen=True, repr=False)
class Nested(Operation):
    """A sequence as a module of its own."""

    parts: tuple = ()

    def build(self, of):
        return nn.Sequential(*[part.build(of) for part in self.parts])


@dataclass(frozen=True, repr=False)
class Branches(Operation):
    """Sequences that read one tensor, and meet."""

    paths: tuple
    merge: str = "add"

    class Net(nn.Module):
        def __init__(self, paths, merge):
            super().__init__()
            self.paths, self.merge = nn.ModuleList(paths), merge

        def forward(self, h):
            first, *rest = [path(h) for path in self.paths]
            if self.merge == "cat":
                return torch.cat([first, *rest], -1)
            for other in rest:
                first = first + other if self.merge == "add" else first * other
            return first

    def build(self, of):
        return self.Net([Nested(path).build(of) for path in self.paths], self.merge)


@dataclass(frozen=True, repr=False)
class Residual(Operation):
    """h + inner(h), of torch's own modules, cut after the add."""

    inner: tuple

    class Net(nn.Module):
        def __init__(self, inner, point):
            super().__init__()
            self.inner, self.point = inner, point

        def forward(self, h):
            return self.point(h + self.inner(h))

    def build(self, of):
        return self.Net(Nested(self.inner).build(of), of.FeedbackPoint())


@dataclass(frozen=True, repr=False)
class Again(Operation):
    """A layer of n to n features that is called several times, or layers that share a weight."""

    layer: Dense
    calls: int = 2
    weight_only: bool = False

    def build(self, of):
        first = self.layer.build(of)
        layers = [first]
        for _ in range(self.calls - 1):
            layer = self.layer.build(of) if self.weight_only else first
            layer.weight = first.weight
            layers.append(layer)
        return nn.Sequential(*layers)


class Steps(nn.Module):
    """A sequence that is no `nn.Sequential`."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, h):
        for part in self.parts:
            h = part(h)
        return h


class Tapped(nn.Module):
    """The error is taken between the two."""

    def __init__(self, body, tail):
        super().__init__()
        self.body, self.tail = body, tail

    def forward(self, h):
        return self.tail(self.body(h))


@dataclass(frozen=True, repr=False)
class Program(Operation):
    """A network, its rule, and the batches that it is given in turn."""

    parts: tuple
    shape: tuple  # of one sample
    classes: int  # of the output, or of the tap where there is a tail
    tail: tuple | None = None  # what is behind the tap
    outputs: int | None = None  # of the tail
    sequential: bool = True
    rule: fastdfa.Feedback = RULE
    signal: str = "error"
    raw: bool = False
    batches: tuple = (3,)
    training: bool = True
    wants_input_gradient: bool = False
    channels_last: bool = False

    def build(self, of):
        torch.manual_seed(0)
        container = nn.Sequential if self.sequential else Steps
        net = container(*[part.build(of) for part in self.parts])
        if self.tail is not None:
            net = Tapped(net, Nested(self.tail).build(of))
        return net.double().train(self.training)

    def model(self):
        """Its DFA."""
        output = None if self.tail is None else "body"
        return fastdfa.DFA(self.build(FASTDFA), self.rule, output=output)

    def input(self, number):
        """Of a batch."""
        x = randn(self.batches[number], *self.shape, seed=number)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        return x.requires_grad_(self.wants_input_gradient)

    def target(self, y):
        """Class indices for an output, of which the tap's rows are."""
        return torch.arange(y.shape[:-1].numel()).reshape(y.shape[:-1]) % self.classes

    def definition(self, state, x):
        """DFA by hand, of the weights of `state`: output, its gradient, that of each parameter,
        buffers, and the B_l of each point."""
        of, cuts = by_hand()
        cuts.inputs = (x,)
        plain = self.build(of)
        plain.load_state_dict(state)
        tap = []

        def taken(module, args, output):
            cuts.ended = True
            output.retain_grad()
            tap.append(output)

        (plain if self.tail is None else plain.body).register_forward_hook(taken)
        torch.manual_seed(9)  # the masks of dropout
        y = plain(x)
        g = randn(*y.shape, seed=1)
        (y * g).sum().backward()
        target = self.target(y)
        e = tap[0].grad.reshape(-1, self.classes)
        s = sent(self.signal, e, tap[0].detach().reshape(e.shape), self.raw, target.reshape(-1))
        s = s * len(e) if self.rule.error == "sum" else s
        names, rows = cuts.names(plain), tap[0].shape[:-1]
        widths = [cut.width(rows) for cut in cuts]
        feedback = {}
        for name, cut, n in zip(names, cuts, widths, strict=True):
            B = matrix(self.rule, name, s.shape[1], n, max(widths))
            feedback[name] = B
            cut.feed(s @ B)
        found = {name: p.grad for name, p in plain.named_parameters()}
        return y, g, found, dict(plain.named_buffers()), feedback
