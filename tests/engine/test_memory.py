"""Nothing is kept alive between steps (contract 8)."""

import gc
import weakref

import pytest
import torch
from helpers.networks import RULE, G, X, mlp, step
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastdfa


def watch(model):
    """Weak references to the memory of every tensor that a module reads or returns."""
    references = []

    def hook(module, args, output):
        references.extend(StorageWeakRef(t.untyped_storage()) for t in (*args, output))

    for layer in model.module:  # a hook on an activation would take it off the fused path
        layer.register_forward_hook(hook)
    return references


def alive(references):
    return [r for r in references if not r.expired()]


def nets():
    torch.manual_seed(0)
    return {
        "fused": mlp([5, 8, 7, 3]),
        "general": mlp([5, 8, 7, 3], "Softsign"),
        "points": fastdfa.DFA(
            nn.Sequential(nn.Linear(5, 8), fastdfa.FeedbackPoint(), nn.Linear(8, 3)).double(),
            feedback=RULE,
        ),
    }


@pytest.mark.parametrize("until", ["forward", "loss", "backward", "exception"])
@pytest.mark.parametrize("kind", ["fused", "general", "points"])
def test_nothing_is_kept_alive(kind, until):
    """Without the garbage collector's help: no cycle holds a tensor."""
    model = nets()[kind]
    step(model, X, G)
    gc.collect()
    gc.disable()
    try:
        references = watch(model)
        x = X.clone()
        y = model(x)
        assert len(alive(references)) > 3
        if until == "loss":
            loss = (y * G).sum()
            del loss
        if until == "backward":
            (y * G).sum().backward()
        if until == "exception":
            with pytest.raises(RuntimeError):
                y.backward()  # not a scalar
        del x, y
        assert alive(references) == []
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["fused", "general", "points"])
def test_backward_frees_what_forward_saved(kind):
    """Even where the loss is kept, to be printed later."""
    model = nets()[kind]
    references = watch(model)
    loss = (model(X.clone()) * G).sum()
    assert len(alive(references)) > 3
    loss.backward()
    assert alive(references) == []


def storages():
    """Bytes of all tensors the interpreter can reach."""
    gc.collect()
    seen = {}
    for o in gc.get_objects():
        if type(o) in (torch.Tensor, nn.Parameter) and not o.is_meta and o.layout is torch.strided:
            s = o.untyped_storage()
            seen[s.data_ptr()] = s.nbytes()
    return sum(seen.values())


@pytest.mark.filterwarnings("ignore")
def test_memory_does_not_grow(model):
    def round_():
        step(model, X, G)
        model.zero_grad()

    for _ in range(3):
        round_()
    before = storages()
    for _ in range(10):
        round_()
    assert storages() <= before


def test_a_model_is_freed():
    model = mlp([5, 8, 3])
    step(model, X, G)
    references = weakref.ref(model), weakref.ref(model.module[0].weight)
    del model
    gc.collect()
    assert [r() for r in references] == [None, None]


def _steps(kind):
    """A step of a path of its own: a whole network, a custom module, convolutions, streaming."""
    torch.manual_seed(0)
    hidden = [fastdfa.Linear(5, 8, activation="tanh"), fastdfa.Linear(8, 8, activation="relu")]
    layers = [*hidden, nn.Dropout(0.1), fastdfa.Linear(8, 3)]
    if kind == "whole":
        layers = [*hidden, fastdfa.Linear(8, 3)]
    if kind == "convolutions":
        layers = [
            nn.Unflatten(1, (1, 5)), fastdfa.Conv1d(1, 4, 3, padding=1, activation="relu"),
            nn.MaxPool1d(2), fastdfa.Conv1d(4, 4, 3, padding=1, activation="tanh"), nn.Flatten(),
            fastdfa.Linear(8, 3),
        ]  # fmt: skip
    model = fastdfa.DFA(nn.Sequential(*layers).double(), RULE, cut=() if kind == "uncut" else "all")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if kind == "streaming":
        streaming = fastdfa.StreamingStep(model, optimizer)
        return lambda: streaming(lambda: (model(X) * G).sum())

    def ordinary():
        optimizer.zero_grad()
        step(model, X, G)
        optimizer.step()

    return ordinary


@pytest.mark.parametrize("kind", ["whole", "blocks", "convolutions", "streaming", "uncut"])
def test_nothing_is_left_to_the_garbage_collector(kind):
    """No step leaves a cycle of objects."""
    make = _steps(kind)
    for _ in range(3):
        make()
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            make()
        assert gc.collect() == 0
    finally:
        gc.enable()
