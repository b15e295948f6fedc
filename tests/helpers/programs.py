"""Networks as data: what builds them of fastdfa's layers or of torch's own, and their DFA by hand.

A program is a tree of operations whose `build(of)` makes a module of the layers of a namespace: of
`kinds.FASTDFA`, or of those of `kinds.by_hand`, which cut by `detach`. What builds both is the same
code, so that a difference is one of DFA. Hooks, which here do nothing, and checkpoints stand in the
first only. `repr` of a program is what makes it again; `drawing.py` draws them.
"""

import contextlib
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdfa
from fastdfa import signals

from .formulas import ACTIVATIONS
from .kinds import FASTDFA, MODULES, by_hand
from .networks import RULE, Apply, gradients, randn
from .signals import CASES, matrix, sent


def activation(name):
    """What `activation=` is given for a name of `drawing.NAMES`."""
    return name if name in MODULES else ACTIVATIONS[name].argument()


def idle(*arguments):
    """A hook that does nothing."""


def watched(h):
    """The same tensor, with a hook that does nothing."""
    if h.requires_grad:
        h.register_hook(idle)
    return h


def retained(h):
    """The same tensor, whose gradient is kept."""
    if h.requires_grad:
        h.retain_grad()
    return h


FUNCTIONS = {
    "view": lambda h: h.view_as(h),
    "clone": torch.clone,
    "transposed": lambda h: h.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda h: h.repeat_interleave(2, -1)[..., ::2],
    "reshaped": lambda h: h.reshape(-1).reshape(h.shape),
    "hooked": watched,
    "retained": retained,
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
    """A convolution that cuts its input, over as many dimensions."""

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
    dimensions: int = 2

    def build(self, of):
        sizes = {"stride": self.stride, "padding": self.padding, "groups": self.groups}
        options = {"bias": self.bias, "activation": activation(self.activation)}
        kind = getattr(of, f"Conv{self.dimensions}d")
        return finished(kind(self.n, self.m, self.kernel, **sizes, **options), self, of)


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
    """A sequence as a module of its own, whose activations backward may make anew."""

    parts: tuple = ()
    checkpointed: bool = False

    class Checkpointed(nn.Sequential):
        def forward(self, h):
            return checkpoint(super().forward, h, use_reentrant=False)

    def build(self, of):
        anew = self.checkpointed and of is FASTDFA
        return (self.Checkpointed if anew else nn.Sequential)(*[p.build(of) for p in self.parts])


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


# How a program is called: "together" are all of its batches, whose losses have one backward pass.
WAYS = ["eager", "together", "saved tensor hooks", "functional", "streaming", "compiled"]

# What may be lost, as a share of a gradient's norm: in float32 a norm divides by what is small; in
# float64 B, or a part of each of its numbers, may be made in float32.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-2}
MADE_IN_FLOAT32 = 1e-4


@dataclass(frozen=True, repr=False)
class Program(Operation):
    """A network, its rule, and the batches that it is given in turn."""

    parts: tuple
    shape: tuple  # of one sample
    classes: int  # of the output, or of the tap where there is a tail
    tail: tuple | None = None  # what is behind the tap
    outputs: int | None = None  # of the tail
    sequential: bool = True
    rule: fastdfa.Feedback = RULE  # but for its signal
    signal: str = "error"  # of `CASES`
    raw: bool = False
    batches: tuple = (3,)
    training: bool = True
    wants_input_gradient: bool = False
    channels_last: bool = False
    cut: str | int | tuple = "all"  # or for the places in turn whether the network is cut there
    way: str = "eager"
    dtype: torch.dtype = torch.float64

    def build(self, of):
        torch.manual_seed(0)
        container = nn.Sequential if self.sequential else Steps
        net = container(*[part.build(of) for part in self.parts])
        if self.tail is not None:
            net = Tapped(net, Nested(self.tail).build(of))
        return net.double().train(self.training)

    @property
    def feedback(self):
        """The rule with its signal."""
        if self.signal == "error":
            return self.rule
        signal = signals.make(CASES[self.signal][0])
        return replace(self.rule, signal=type(signal)(**{**vars(signal), "raw": self.raw}))

    def model(self):
        """Its DFA."""
        output = None if self.tail is None else "body"
        cut, all_cut = self.cut, self.cut == "all"
        if isinstance(cut, tuple):
            of, cuts = by_hand()
            plain = self.build(of)
            chosen = cuts.chosen_of(plain, cut)
            cut = [name for name, module in plain.named_modules() if module in chosen]
        # Where a place is left open, paths lead round the cuts beside it.
        options = {"output": output, "cut": cut, "allow_bypass": not all_cut}
        return fastdfa.DFA(self.build(FASTDFA), self.feedback, **options).to(self.dtype)

    def input(self, number):
        """Of a batch."""
        x = randn(self.batches[number], *self.shape, seed=number, dtype=self.dtype)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last)
        return x.requires_grad_(self.wants_input_gradient)

    def target(self, y):
        """Class indices for an output, of which the tap's rows are."""
        return torch.arange(y.shape[:-1].numel()).reshape(y.shape[:-1]) % self.classes

    def definition(self, state, x):
        """DFA by hand, in float64, of the weights of `state`: output, its gradient, that of each
        parameter and of x, buffers, and the B_l of each point."""
        x = x.detach().double().requires_grad_(x.requires_grad)
        of, cuts = by_hand()
        cuts.inputs = (x,)
        plain = self.build(of)
        plain.load_state_dict(state)
        cuts.chosen = None if self.cut == "all" else cuts.chosen_of(plain, self.cut)
        tap = []

        def taken(module, args, output):
            cuts.ended = True
            output.retain_grad()
            tap.append(output)

        (plain if self.tail is None else plain.body).register_forward_hook(taken)
        torch.manual_seed(9)  # the masks of dropout
        y = plain(x)
        g = randn(*y.shape, seed=1, dtype=self.dtype).double()
        (y * g).sum().backward(retain_graph=True)
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
        found = {name: p.grad for name, p in plain.named_parameters()} | {"x": x.grad}
        return y, g, found, dict(plain.named_buffers()), feedback

    def check(self):
        """Compares the library with the definition, in every batch."""
        model = self.model()
        call = self.called(model)
        made_in_float32 = self.rule.rank is not None or self.rule.dense is False  # Q is always
        tolerance = max(TOLERANCES[self.dtype], MADE_IN_FLOAT32 * made_in_float32)
        losses, total = [], {}
        for number in range(len(self.batches)):
            x = self.input(number)
            state = {name: t.clone() for name, t in model.module.state_dict().items()}
            right, g, expected, buffers, feedback = self.definition(state, x)
            model.target = self.target(g) if self.signal in ("target", "function") else None
            torch.manual_seed(9)  # the masks of dropout
            y, found = call(x, g)
            what = f"batch {number}, points {model.feedback_points}:"
            assert model.feedback_points == list(feedback), f"{what} expected {list(feedback)}"
            matrices = {name: model.feedback_matrix(name) for name in feedback}
            compare(f"{what} B", matrices, feedback, tolerance)
            compare(f"{what} output", {"": y.detach()}, {"": right.detach()}, tolerance)
            compare(f"{what} buffer", dict(model.module.named_buffers()), buffers, tolerance)
            losses.append((y * g).sum())
            total = added(total, {**expected, "x": None} if self.way == "together" else expected)
            if self.way == "together" and number + 1 < len(self.batches):
                continue
            if found is None:
                torch.stack(losses).sum().backward()
                found = {**gradients(model), "x": None if self.way == "together" else x.grad}
            compare(f"{what} gradient of", found, total, tolerance)
            losses, total = [], {}
            model.zero_grad()

    def called(self, model):
        """What calls the model with an input and an error, and returns the output; and gradients,
        where these are made there already."""
        if self.way == "streaming":
            return lambda x, g: self.streamed(model, x, g)
        if self.way == "functional":
            return lambda x, g: self.functional(model, x, g)
        if self.way == "compiled":
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="aot_eager")
            return lambda x, g: (compiled(x), None)
        hooks = contextlib.nullcontext
        if self.way == "saved tensor hooks":
            hooks = torch.autograd.graph.saved_tensors_hooks

        def eager(x, g):
            with hooks(*[torch.clone] * 2) if self.way == "saved tensor hooks" else hooks():
                return model(x), None

        return eager

    def streamed(self, model, x, g):
        """By a step that updates the parameters, which are put back."""
        before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
        outputs = []

        def closure():
            outputs.append(model(x))
            return (outputs[-1] * g).sum()

        optimizer = torch.optim.SGD(model.module.parameters(), 1.0)
        fastdfa.StreamingStep(model, optimizer)(closure)
        found = {}
        with torch.no_grad():
            for n, p in model.module.named_parameters():
                found[n] = before[n] - p if p.requires_grad else None
                p.copy_(before[n])
        return outputs[0], found | {"x": None}

    def functional(self, model, x, g):
        """With parameters that are handed over."""
        names = {n: p.detach().clone() for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            names[n].requires_grad_(p.requires_grad)
        y = torch.func.functional_call(model, names, (x,))
        (y * g).sum().backward()
        return y, {n.removeprefix("module."): p.grad for n, p in names.items()} | {"x": x.grad}


def added(total, more):
    """Gradients summed by name; None adds nothing."""
    if not total:
        return more
    pairs = {name: [g for g in (total[name], more[name]) if g is not None] for name in more}
    return {name: sum(found) if found else None for name, found in pairs.items()}


def compare(what, actual, expected, tolerance):
    """Tensors by name, to a share of their norm; of what cancels, to one of all, which is larger in
    float32."""
    assert actual.keys() == expected.keys()
    known = [x.double().norm().item() for x in expected.values() if x is not None]
    exact = all(x is None or x.dtype == torch.float64 for x in actual.values())
    least = (1e-2 if exact else 1.0) * max(known, default=0.0)
    for name, right in expected.items():
        found = actual[name]
        assert (found is None) == (right is None), f"{what} {name}: {found}, expected {right}"
        if right is None:
            continue
        assert found.shape == right.shape, f"{what} {name}: {found.shape}, not {right.shape}"
        allowed = tolerance * max(right.double().norm().item(), least)
        off = (found.double() - right.double()).norm().item()
        assert off <= allowed, f"{what} {name} is off by {off:.3g}, allowed {allowed:.3g}"
