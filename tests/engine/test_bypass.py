"""The search for ways round a cut finds what another search finds, which knows how the network was
made, and its advice mends them (contract 4)."""

import re
import warnings
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from helpers.networks import RULE, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastdfa

pytestmark = pytest.mark.filterwarnings("ignore")

N = 4  # features of every tensor
LAYERS = ("cut", "fused", "unknown", "frozen", "plain", "fixed", "norm", "point")
CUTS = ("cut", "fused", "unknown", "frozen", "point")
FUNCTIONS = {
    "tanh": torch.tanh,
    "twice": lambda a: 2 * a,
    "add": torch.add,
    "mul": torch.mul,
    "relu_": torch.relu_,
    "mul_": lambda a: a.mul_(2),
    "add_": lambda a, b: a.add_(b),
}
SOURCES = ("input", "watched input", "parameter")


@dataclass(frozen=True)
class Made:
    """One value of a program: by which operation, from which values, by which layer."""

    kind: str
    of: tuple = ()
    layer: int = -1


@st.composite
def programs(draw, most=40):
    """Values in the order in which they are made, and the last, which reads some of them."""
    values = [Made("input"), Made("watched input"), Made("parameter")]
    changed = set()  # values that no longer are, as they were changed in place
    aliased = {0, 1, 2}  # what may not be changed so
    layers = []
    for _ in range(draw(st.integers(0, most - 4))):
        there = [v for v in range(len(values)) if v not in changed]
        kind = draw(st.sampled_from([*LAYERS, *CUTS, *FUNCTIONS]))
        near = st.sampled_from(there[-1:]) | st.sampled_from(there[-3:]) | st.sampled_from(there)
        of = [draw(near)]
        if kind in ("add", "mul", "add_"):
            of.append(draw(near))
        if kind.endswith("_"):
            if of[0] in aliased or of[0] in of[1:]:
                continue
            changed.add(of[0])
        layer = -1
        if kind in LAYERS:
            again = [k for k, other in enumerate(layers) if other == kind]
            layer = draw(st.sampled_from(again)) if again and draw(st.booleans()) else len(layers)
            layers += [kind] * (layer == len(layers))
        if kind in ("fused", "frozen", "point"):  # views, or what shares their memory
            aliased |= {*of, len(values)}
        values.append(Made(kind, tuple(of), layer))
    there = [v for v in range(len(values)) if v not in changed]
    read = draw(st.lists(st.sampled_from(there), min_size=1, max_size=2, unique=True))
    if len(read) == 2:
        values.append(Made("add", tuple(read)))
        read = [len(values) - 1]
    head = draw(st.sampled_from(["cut", "plain", "tanh"]))
    values.append(Made(head, tuple(read), len(layers) if head != "tanh" else -1))
    return values


class Built(nn.Module):
    """The network of a program; its layers are called "l0", "l1" and so on."""

    def __init__(self, values):
        super().__init__()
        self.values, self.state = values, nn.Parameter(randn(3, N))
        for value in values:
            if value.layer >= 0 and not hasattr(self, f"l{value.layer}"):
                setattr(self, f"l{value.layer}", made(value.kind))

    def forward(self, x, watched):
        found = []
        for value in self.values:
            if value.kind in SOURCES:
                found.append([x, watched, self.state][SOURCES.index(value.kind)])
                continue
            call = getattr(self, f"l{value.layer}") if value.layer >= 0 else FUNCTIONS[value.kind]
            found.append(call(*[found[v] for v in value.of]))
        return found[-1]


def made(kind):
    activations = {"fused": "tanh", "unknown": nn.Softsign()}
    if kind == "point":
        return fastdfa.FeedbackPoint()
    if kind == "norm":
        return nn.LayerNorm(N)
    layer = nn.Linear(N, N)
    if kind in CUTS:
        layer = fastdfa.Linear(N, N, activation=activations.get(kind))
    return layer.requires_grad_(kind not in ("frozen", "fixed"))


@dataclass
class Search:
    """The other search: closures of relations between values, as matrices of truth values.

    Attributes:
        points: the values that are points, by number.
        names: of the points.
        bypasses: the pairs (source, point), by their names, of all ways round a cut.
        exact: the same, where it is known what reads behind cuts that leave no history.
    """

    values: list
    points: list = field(default_factory=list)
    names: list = field(default_factory=list)

    def __post_init__(self):
        count = len(self.values)
        self.grad = [False] * count
        self.uncut = torch.zeros(count, count, dtype=torch.bool)  # [made, of] where gradients pass
        self.data = self.uncut.clone()  # where anything passes, but at a cut
        self.cut = self.uncut.clone()  # what was made behind the cut of a point
        self.unseen, self.blind = [], []
        self.same = list(range(count))  # of a point that does not cut, as what it reads
        calls = {}
        for v, value in enumerate(self.values):
            self._visit(v, value, calls)
        assumed = self.cut.clone()
        for point in self.unseen:
            for v in self.blind:
                assumed[v, point] |= v > point or self.values[point].kind == "parameter"
        seen = assumed.clone()
        for v, value in enumerate(self.values):  # what has no gradient leaves no trace
            if not self.grad[v]:
                seen[v] = False
        self.bypasses = self._bypasses(self.uncut, seen)
        self.exact = self._bypasses(self.data, self.cut)

    def _visit(self, v, value, calls):
        if value.kind in SOURCES:
            self.grad[v] = value.kind != "input"
            return
        trained = value.kind in ("cut", "fused", "unknown", "plain", "norm")
        read = [self.same[of] for of in value.of]
        a = read[0]
        if value.kind in CUTS and self.grad[a] and a != 1:
            self.cut[v, a] = True
            if a not in self.points:
                calls[value.layer] = calls.get(value.layer, 0) + 1
                again = f"#{calls[value.layer]}" if calls[value.layer] > 1 else ""
                self.points.append(a)
                self.names.append(f"l{value.layer}{again}")
            if not trained:
                self.unseen.append(a)
            self.grad[v] = trained
            return
        if value.kind == "point":
            self.same[v], self.grad[v] = a, self.grad[a]
            return
        self.grad[v] = trained or any(self.grad[of] for of in read)
        blind = value.kind in ("twice", "mul_", "fixed") or not all(self.grad[of] for of in read)
        if self.grad[v] and blind:
            self.blind.append(v)
        for of in read:
            self.data[v, of] = True
            self.uncut[v, of] = self.grad[of] and of != 1

    def _bypasses(self, onward, cut):
        """Every pair, of which the source is a point or the last value."""
        through, uncut = closure(onward | cut), closure(self.uncut)
        behind = (through.int() @ cut.int()) > 0  # [value, point]
        last = len(self.values) - 1
        sources = [*self.points, *[last] * self.grad[last]]
        names = [*self.names, "the output"]
        trunk = [v for v, value in enumerate(self.values) if value.kind not in SOURCES]
        found = set()
        for (s, source), (p, point) in product(enumerate(sources), enumerate(self.points)):
            if s == p:
                continue
            meet = any(uncut[source, v] and uncut[point, v] for v in trunk)
            if uncut[source, point] or (meet and behind[source, point]):
                found.add((names[s], names[p]))
        return found


def closure(relation):
    """What is related in any number of steps, none included (Warshall)."""
    related = relation | torch.eye(len(relation), dtype=torch.bool)
    for k in range(len(related)):
        related |= related[:, k : k + 1] & related[k]
    return related


def refused(values):
    """The ends that the search of fastdfa names, (source, point); None where it accepts."""
    model = fastdfa.DFA(Built(values).double(), feedback=RULE)
    x, watched = randn(3, N), randn(3, N, seed=1).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            y = model(x, watched)
        except RuntimeError as error:
            text = str(error)
            assert "without passing a cut" in text, text
            point = re.search(r"(?:back to|made of) the input of '([^']*)'", text)
            source = re.search(r"^(?:a path leads from )?(the output|the input of '([^']*)')", text)
            return source[2] or source[1], point[1]
    return None if y.requires_grad else ()


def assert_found(values):
    search, ends = Search(values), refused(values)
    if ends:
        assert ends in search.bypasses, (ends, search)
    else:
        assert not search.bypasses, search
    assert bool(search.bypasses) >= bool(search.exact), "a way round a cut is missed"
    if not search.unseen:
        assert search.bypasses == search.exact
    return search


@settings(max_examples=300, derandomize=True, deadline=None)
@given(programs())
def test_no_miss_and_no_false_alarm(values):
    assert_found(values)
