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
from fastdfa.engine.bypass import _Graph

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
        seen[~torch.tensor(self.grad)] = False  # what has no gradient leaves no trace
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
        uncut, through = closure(self.uncut), closure(onward | cut)
        behind = through.float() @ cut.float() > 0  # [value, point]
        trunk = uncut.float()
        trunk[:, [value.kind in SOURCES for value in self.values]] = 0
        wrong = uncut | (trunk @ trunk.T > 0) & behind
        last = len(self.values) - 1
        sources = [*self.points, *[last] * self.grad[last]]
        names = [*self.names, "the output"]
        return {
            (names[s], names[p])
            for (s, source), (p, point) in product(enumerate(sources), enumerate(self.points))
            if s != p and wrong[source, point]
        }


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


# What a refusal says ---------------------------------------------------------------------------


class Inception(nn.Module):
    """Branches that read h, and what pooling makes of it."""

    def __init__(self, of):
        super().__init__()
        self.point, self.b1, self.b2 = (
            fastdfa.FeedbackPoint(),
            of.Conv2d(4, 3, 1),
            of.Conv2d(4, 1, 1),
        )

    def forward(self, h):
        h = self.point(h) if self.mended else h
        return torch.cat([self.b1(h), self.b2(nn.functional.max_pool2d(h, 3, 1, 1))], 1)


class Residual(nn.Module):
    """A skip connection round two layers in a row."""

    def __init__(self, of):
        super().__init__()
        self.point, self.norm = fastdfa.FeedbackPoint(), nn.BatchNorm2d(4)
        self.inner = nn.Sequential(of.Conv2d(4, 4, 1), nn.Tanh(), of.Conv2d(4, 4, 1))

    def forward(self, h):
        h = self.point(h) if self.mended else h
        return h + self.inner(self.norm(h))


def stacked(block, of, mended=False):
    """Two blocks inside a part of a network."""
    stem, body = of.Conv2d(3, 4, 1), nn.Sequential(block(of), block(of))
    for module in body:
        module.mended = mended
    return nn.Sequential(stem, body, nn.Flatten(), of.Linear(4 * 36, 5)).double()


IMAGES = randn(2, 3, 6, 6)


@pytest.mark.parametrize("block, what", [
    (Inception, "branches of one tensor meet"), (Residual, "skip connection"),
])  # fmt: skip
def test_the_advice_names_the_block_and_mends_the_network(block, what):
    with pytest.raises(RuntimeError, match=what) as error:
        fastdfa.DFA(stacked(block, fastdfa), feedback=RULE)(IMAGES)
    blocks = re.search(r"blocks=(\['[^']*'\])", str(error.value))[1]
    assert blocks == "['1.0']"
    by_block = fastdfa.convert(stacked(block, nn), blocks=["1.0", "1.1"], feedback=RULE)
    by_block(IMAGES).sum().backward()
    assert by_block.feedback_points == ["1.0", "1.1"]
    mended = fastdfa.DFA(stacked(block, fastdfa, mended=True), feedback=RULE)
    mended(IMAGES).sum().backward()
    assert {"1.0.point", "1.1.point"} <= set(mended.feedback_points)
    assert all(p.grad is not None for p in mended.module.parameters())


def test_a_network_without_blocks_is_told_where_a_point_belongs():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (fastdfa.Linear(N, N) for _ in range(3))

        def forward(self, x):
            h = self.a(x)
            return self.c(h + self.b(h))

    with pytest.raises(RuntimeError, match=r"FeedbackPoint where the two part.* 'b'") as error:
        fastdfa.DFA(Flat().double(), feedback=RULE)(randn(3, N))
    assert "blocks=" not in str(error.value)


def test_blocks_of_parallel_branches_may_share_a_trunk():
    """Neither point lies behind the other, though what reads behind them leaves no history."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 1, 1, bias=False)

        def forward(self, h):
            return torch.cat([self.left(h), self.right(h)], 1)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), Parallel(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
    model = fastdfa.convert(net, blocks=["1.left", "1.right"], feedback=RULE)
    model(IMAGES).sum().backward()
    assert model.feedback_points == ["1.left", "1.right"]


def test_a_skip_round_a_frozen_layer_is_found():
    """It leaves no history behind its cut."""
    net = stacked(Residual, fastdfa)
    net[1][0].inner.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"1\.0\.inner\.0"):
        fastdfa.DFA(net, feedback=RULE)(IMAGES)


# How long it takes ------------------------------------------------------------------------------


class GRU(nn.Module):
    """A cell of layers that cut; h passes by them, unless a point is there."""

    def __init__(self, point):
        super().__init__()
        self.x, self.h = fastdfa.Linear(N, 3 * N), fastdfa.Linear(N, 3 * N)
        self.head = fastdfa.Linear(N, 3)
        self.point = fastdfa.FeedbackPoint() if point else nn.Identity()

    def forward(self, x):
        h = x.new_zeros(len(x), N)
        for step in x.unbind(1):
            h = self.point(h)
            (a, b, c), (d, e, f) = self.x(step).chunk(3, 1), self.h(h).chunk(3, 1)
            z, r = torch.sigmoid(a + d), torch.sigmoid(b + e)
            h = (1 - z) * torch.tanh(c + r * f) + z * h
        return self.head(h)


@pytest.mark.parametrize("point, options, accepted", [
    (True, {}, True), (False, {"allow_bypass": True}, True), (False, {}, False),
])  # fmt: skip
def test_the_search_takes_as_long_as_the_sequence(point, options, accepted, monkeypatch):
    """By the places that it looks at."""
    looked, edges = [], _Graph.edges
    monkeypatch.setattr(_Graph, "edges", lambda *args: looked.append(args) or edges(*args))
    counts = []
    for steps in (40, 80, 160):
        looked.clear()
        model = fastdfa.DFA(GRU(point).double(), feedback=RULE, **options)
        if accepted:
            model(randn(2, steps, N))
        else:
            with pytest.raises(RuntimeError, match="skip connection"):
                model(randn(2, steps, N))
        counts.append(len(looked))
    assert counts[2] - counts[1] <= 2.05 * (counts[1] - counts[0]), counts
