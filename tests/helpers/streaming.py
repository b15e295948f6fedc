"""Steps and networks that the tests of streaming share."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import fastdfa

from .kinds import FASTDFA, Transformer
from .networks import RULE, assert_close, mlp

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def ordinary(model, optimizer):
    def step(closure):
        optimizer.zero_grad()
        loss = closure()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def values(model, optimizer):
    """Parameters, buffers and the optimizer's state, by name."""
    found = dict(model.state_dict())
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index} {name}": x for name, x in state.items() if isinstance(x, torch.Tensor)}
    return {name: x.clone() for name, x in found.items()}


def same_steps(
    model, closure, optimizer=sgd, steps=3, between=lambda model, n: None, tolerance=1e-10
):
    """`steps` steps of a copy, ordinary ones, and of the model: all numbers afterwards agree.

    `closure(model)` gives the loss. Returns the streaming step.
    """
    twin = copy.deepcopy(model)
    results = []
    for net, make in ((twin, ordinary), (model, fastdfa.StreamingStep)):
        optim = optimizer(net.parameters())
        step = make(net, optim)
        torch.manual_seed(7)
        losses = []
        for n in range(steps):
            losses.append(step(lambda net=net: closure(net)))
            between(net, n)
        found = values(net, optim) | {f"loss {n}": loss for n, loss in enumerate(losses)}
        results.append(found | {"random": torch.get_rng_state()})
        assert step is not None
    assert_close(results[1], results[0], tolerance)
    assert all(p.grad is None for p in model.parameters())
    return step


class Noisy(nn.Module):
    """Dropout, batch norm, and a buffer that every forward pass replaces."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            fastdfa.Conv2d(2, 4, 3, padding=1, activation="relu"), nn.BatchNorm2d(4), nn.Dropout(),
            fastdfa.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(),
            nn.Flatten(), fastdfa.Linear(144, 3),
        )  # fmt: skip
        self.register_buffer("passes", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.passes = self.passes + 1
        return self.layers(x) + torch.randn(3)


class Branches(nn.Module):
    """Several readers of one tensor, and two points behind one layer."""

    def __init__(self):
        super().__init__()
        self.first = fastdfa.Linear(5, 8, activation="tanh")
        self.q, self.k = fastdfa.Linear(8, 8), fastdfa.Linear(8, 8, activation="relu")
        self.trunk = nn.Linear(8, 8)
        self.left, self.right = fastdfa.Linear(8, 4), fastdfa.Linear(8, 4)
        self.head = fastdfa.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        h = self.trunk(self.q(h) * self.k(h))
        sides = [self.left(torch.tanh(h)), self.right(torch.relu(h))]
        return self.head(torch.cat(sides, -1))


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = fastdfa.Linear(5, 8, activation="tanh")
        self.blocks = nn.ModuleList([fastdfa.Linear(8, 8, activation="relu") for _ in range(3)])
        self.last = nn.Sequential(fastdfa.Linear(8, 6, activation="tanh"), fastdfa.Linear(6, 3))

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


class LanguageModel(nn.Module):
    """Computes its loss behind the tap, with the embedding as the head."""

    def __init__(self):
        super().__init__()
        self.body = Transformer(FASTDFA)
        self.norm = nn.LayerNorm(3)
        self.token = nn.Embedding(11, 3)
        self.calls = 0

    def forward(self, tokens):
        h = self.norm(self.body(tokens))
        self.calls += 1
        logits = F.dropout(h, 0.2) @ self.token.weight.T
        return {"loss": F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), "logits": logits}


class Counting(torch.optim.Optimizer):
    """SGD whose rate falls with the number of steps, which each group counts."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "steps": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p -= group["lr"] / group["steps"] * p.grad


def deep(depth, kind):
    """`depth` layers of one size."""
    if kind == "layers":
        return mlp([64] * (depth + 1) + [3], dtype=torch.float32)
    blocks = [[nn.Linear(64, 64), nn.GELU(), fastdfa.FeedbackPoint()] for _ in range(depth)]
    layers = [layer for block in blocks for layer in block]
    return fastdfa.DFA(nn.Sequential(*layers, nn.Linear(64, 3)), feedback=RULE)


def peak(step):
    """Bytes of tensors at the most, above those at the beginning."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    used = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        used = max(used + event.nbytes(), 0)
        most = max(most, used)
    return most
