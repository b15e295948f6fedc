"""`convert(example=x)` finds at once what a first step would, and says which call converts."""

import re
import warnings

import pytest
import torch
from helpers.networks import randn
from torch import nn

import fastdfa

pytestmark = pytest.mark.filterwarnings("ignore:the true gradient of the output trains")


class Residual(nn.Module):
    def __init__(self, n=8):
        super().__init__()
        self.a, self.b = nn.Linear(n, n), nn.Linear(n, n)

    def forward(self, h):
        return h + self.b(torch.tanh(self.a(h)))


class Branches(nn.Module):
    def __init__(self, n=8):
        super().__init__()
        self.a, self.b = nn.Linear(n, n // 2), nn.Linear(n, n // 2)

    def forward(self, h):
        return torch.cat([self.a(h), self.b(torch.relu(h))], -1)


class Twice(nn.Module):
    """A post-norm block: attention with its own skip, then another."""

    def __init__(self, n=8):
        super().__init__()
        self.attention, self.inner, self.norm = Residual(n), nn.Linear(n, n), nn.LayerNorm(n)

    def forward(self, h):
        h = self.attention(h)
        return self.norm(h + self.inner(h))


class Tokens(nn.Module):
    """A language model that returns a dict, blocks, perhaps tied weights."""

    def __init__(self, kind=Residual, tied=False):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(4, 8)
        self.blocks = nn.ModuleList(kind() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens, labels=None):
        h = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h))
        found = {} if labels is None else {"loss": logits.flatten(0, 1).logsumexp(-1).mean()}
        return found | {"logits": logits, "hidden": h}


def stack(kind):
    return nn.Sequential(nn.Linear(5, 8), kind(), nn.Tanh(), kind(), nn.Linear(8, 3))


X, TOKENS = torch.randn(4, 5), torch.arange(8).reshape(2, 4)
NEEDED = {
    "residual": (lambda: stack(Residual), X, {"blocks": ["1", "3"]}),
    "branches": (lambda: stack(Branches), X, {"blocks": ["1", "3"]}),
    "two skips in a block": (
        lambda: stack(Twice), X, {"blocks": ["1.attention", "1", "3.attention", "3"]},
    ),
    "a dict": (Tokens, TOKENS, {"output": "head", "blocks": ["blocks.*"]}),
    "by keyword": (
        Tokens, {"tokens": TOKENS, "labels": TOKENS}, {"output": "head", "blocks": ["blocks.*"]},
    ),
    "tied": (
        lambda: Tokens(tied=True), TOKENS,
        {"output": "head", "blocks": ["blocks.*"], "allow_tied": True},
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.Embedding(11, 8),
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2,
                enable_nested_tensor=False,
            ),
            nn.Linear(8, 11),
        ), TOKENS, {"blocks": ["1.layers.*"]},
    ),
}  # fmt: skip


def state_of(model):
    kinds = [(type(m), dict(m._modules), [*m._forward_hooks]) for m in model.modules()]
    return kinds, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("case", NEEDED)
def test_all_that_is_missing_is_said_in_one_call_that_works(case):
    make, x, needed = NEEDED[case]
    model = make()
    before, random = state_of(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="cannot be converted so") as caught:
        fastdfa.convert(model, fastdfa.Feedback(seed=1), example=x)
    assert str(state_of(model)) == str(before) and torch.equal(torch.get_rng_state(), random)
    (line,) = re.findall(r"fastdfa\.convert\(model, (.*)\)", str(caught.value))
    assert eval(f"dict({line})") == needed
    assert fastdfa.convert(model, example=x, **needed) is model
    assert all(p.grad is None for p in model.parameters()) and model.feedback_points


@pytest.mark.parametrize("case", ["residual", "branches", "two skips in a block", "transformer"])
def test_blocks_auto_takes_the_smallest_modules_round_a_skip(case):
    make, x, needed = NEEDED[case]
    model = fastdfa.convert(make(), blocks="auto", example=x)
    names = model.feedback_points
    model(x).sum().backward()
    assert model.feedback_points == names and {*names} == {*model.conversion.blocks}
    found = fastdfa.structure.patterns(names, model)
    assert found == needed["blocks"]


def test_blocks_auto_of_a_model_without_skips_cuts_its_layers():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    assert list(fastdfa.convert(model, blocks="auto", example=X).conversion.layers) == ["0", "2"]
    with pytest.raises(ValueError, match="give example="):
        fastdfa.convert(stack(Residual), blocks="auto")


def test_an_example_changes_nothing_else():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)
    )  # fmt: skip
    before, random = state_of(model)[1], torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdfa.convert(model, fastdfa.Feedback(seed=1, anchor=3), example=(X,))
    after = {k: v for k, v in model.state_dict().items() if not k.startswith("fastdfa.")}
    assert str(after) == str(before) and torch.equal(torch.get_rng_state(), random)
    model(X).sum().backward()  # the first pass that counts is an anchor
    assert model.fastdfa.anchors.count == 1


def test_what_no_call_mends_is_refused_as_it_is():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x)
            return self.c(h + self.b(h))

    model = Around()
    with pytest.raises(RuntimeError, match="'b'"):
        fastdfa.convert(model, example=X)
    assert type(model) is Around and type(model.a) is nn.Linear
    with pytest.raises(RuntimeError, match="5"):
        fastdfa.convert(stack(nn.Identity), example=randn(4, 6, dtype=torch.float32))
