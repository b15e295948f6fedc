"""The first backward passes of a root are watched: what learns nothing is named once, at the line
of the user, and nothing else is. `fastdfa.check`: diagnostics/test_check.py."""

import copy
import linecache
import pickle
import warnings

import pytest
import torch
from helpers.kinds import KINDS, build, data, run
from helpers.networks import RULE, G, X, assert_close, expected_gradients, gradients, mlp, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdfa
from fastdfa.engine.witness import PASSES

every_kind = pytest.mark.parametrize("kind", KINDS)


class Nothing(torch.autograd.Function):
    """Gives no gradient, as a function whose author forgot one."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return None


class Forgetful(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return Nothing.apply(self.layer(x))


class Reentrant(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, h):
        return checkpoint(self.block, h, use_reentrant=True)


def dfa(*blocks):
    return fastdfa.DFA(nn.Sequential(*blocks).double(), RULE)


def forgetful():
    blocks = [nn.Linear(5, 8), fastdfa.FeedbackPoint(), Forgetful(nn.Linear(8, 8))]
    return dfa(*blocks, fastdfa.FeedbackPoint(), fastdfa.Linear(8, 3))


def said(model, times=PASSES + 2):
    """The warnings of some steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            step(model, X, G)
    return [warning for warning in caught if "None of the inputs" not in str(warning.message)]


def watched(model):
    return model.witness is not None and model.witness.left > 0


def no_hooks(model):
    return not any(p._backward_hooks for p in model.parameters())


def test_what_gets_no_gradient_though_the_graph_leads_there_is_named():
    found = said(forgetful(), 1)
    assert len(found) == 1
    assert "no gradient came to '2.layer.bias', '2.layer.weight' " in str(found[0].message)


def test_it_is_said_once_and_at_the_line_of_the_user():
    model = forgetful()
    (found,) = said(model)
    line = linecache.getline(found.filename, found.lineno)
    assert "backward()" in line
    assert model.witness is None and no_hooks(model)


@pytest.mark.parametrize("first", [nn.Linear(5, 8), Reentrant(nn.Linear(5, 8))])
def test_a_plain_block_in_a_reentrant_checkpoint_behind_a_cut_is_named(first):
    """Nothing that it reads has a gradient, so that it would never be run again."""
    points = [fastdfa.FeedbackPoint(), fastdfa.FeedbackPoint()]
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model = dfa(first, points[0], Reentrant(inner), points[1], fastdfa.Linear(8, 3))
    (found,) = said(model)
    assert "trains '2.block.0.weight', '2.block.0.bias': what is read at '3'" in str(found.message)


def test_a_block_that_is_cut_behind_and_detaches_is_named():
    class Detaches(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, h):
            return self.inner(h).detach()

    net = nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), Detaches(), nn.Linear(5, 3))
    model = fastdfa.convert(net.double(), RULE, blocks=["0", "1"])
    (found,) = said(model)
    assert "nothing trains '1.inner.weight', '1.inner.bias'" in str(found.message)


# What is right, and not said ---------------------------------------------------------------------


@every_kind
def test_nothing_is_said_of_networks_that_are_right(kind):
    model = build(kind)
    inputs, g = data(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for left in range(PASSES, 0, -1):
            assert watched(model) and model.witness.left == left
            run(model, inputs, g)
        run(model, inputs, g)
    assert model.witness is None and no_hooks(model)


def with_frozen_layers(model):
    model.module[0].requires_grad_(False)
    model.module[1].bias.requires_grad_(False)
    step(model, X, G)


def with_layers_frozen_before_backward(model):
    loss = (model(X) * G).sum()
    model.module[0].requires_grad_(False)
    loss.backward()


def with_grad_of_one(model):
    torch.autograd.grad((model(X) * G).sum(), [model.module[1].weight])


def with_grad_of_the_input(model):
    x = X.clone().requires_grad_()
    torch.autograd.grad((model(x) * G).sum(), [x])


def with_inputs(model):
    (model(X) * G).sum().backward(inputs=[model.module[0].weight])


def with_two_forward_passes(model):
    (model(X) * G + model(2 * X) * G).sum().backward()


def with_an_output_left_out(model):
    model(X)
    (model(X) * G + 0 * Nothing.apply(model(2 * X))).sum().backward()


def with_a_graph_kept(model):
    loss = (model(X) * G).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def with_checkpoints(model):
    for layer in model.module:
        forward = layer.forward
        layer.forward = lambda h, f=forward: checkpoint(f, h, use_reentrant=False)
    step(model, X, G)


def with_a_checkpoint_of_all(model):
    y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=True)
    (y * G).sum().backward()


def with_unused_layers(model):
    model.module[0].unused = nn.Linear(3, 3)
    model.module[2].unused = nn.Linear(3, 3)
    step(model, X, G)


@pytest.mark.parametrize("use", [
    with_frozen_layers, with_layers_frozen_before_backward, with_grad_of_one,
    with_grad_of_the_input, with_inputs,
    with_two_forward_passes, with_an_output_left_out, with_a_graph_kept, with_checkpoints,
    with_a_checkpoint_of_all, with_unused_layers,
])  # fmt: skip
@pytest.mark.parametrize("hooked", [False, True])
def test_nothing_is_said_of(use, hooked, model):
    if hooked:  # no network in one node
        model.module.register_forward_hook(lambda *args: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(model)
    assert no_hooks(model)


def test_nothing_is_said_of_a_network_that_is_there_already():
    """Which runs without gradients on purpose, with layers of ours or of torch, or is frozen."""

    class Head(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.point = body, fastdfa.FeedbackPoint()
            self.first = fastdfa.Linear(8, 7, activation="tanh")
            self.last = fastdfa.Linear(7, 3)

        def forward(self, x):
            with torch.no_grad():
                h = self.body(x)
            return self.last(self.first(self.point(h)))

    for body in (nn.Linear(5, 8), mlp([5, 9, 8]).module):
        assert said(fastdfa.DFA(Head(body).double(), RULE)) == []
    frozen = nn.Linear(5, 8).requires_grad_(False)
    assert said(dfa(frozen, fastdfa.FeedbackPoint(), fastdfa.Linear(8, 3))) == []


def test_nothing_is_said_of_a_second_network_that_reads_another_input():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = mlp([5, 8, 6]).module, mlp([5, 7, 6]).module
            self.head = fastdfa.Linear(12, 3)

        def forward(self, x):
            return self.head(torch.cat([self.left(x), self.right(2 * x)], 1))

    assert said(fastdfa.DFA(Towers().double(), RULE)) == []


# What stays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_are_those_of_the_formulas_watched_or_not(model, hooked):
    if hooked:
        model.module.register_forward_hook(lambda *args: None)
    for _ in range(PASSES + 1):
        model.zero_grad()
        step(model, X, G)
        assert_close(gradients(model), expected_gradients(model, X, G))


def test_passes_without_a_backward_pass_are_not_counted(model):
    for _ in range(2 * PASSES):
        model(X)
    assert model.witness.left == PASSES


def test_an_exception_in_a_watched_pass_leaves_no_hook(model):
    class Fails(Exception):
        pass

    def fail(gradient):
        raise Fails

    handle = model.module[1].bias.register_hook(fail)
    with pytest.raises(Fails):
        step(model, X, G)
    handle.remove()
    assert said(model) == []
    assert no_hooks(model)


def test_a_network_that_was_changed_is_watched_again():
    model = dfa(fastdfa.Linear(5, 8, activation="tanh"), nn.Identity(), fastdfa.Linear(8, 3))
    assert said(model) == []
    model.module[1] = Forgetful(nn.Linear(8, 8).double())
    assert len(said(model)) == 1


def test_copies_and_pickles_are_watched_from_the_start():
    model = mlp([5, 8, 3])
    y = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.witness.left == PASSES
    (y * G).sum().backward()
    assert model.witness.left == PASSES - 1


def test_a_compiled_step_is_not_watched():
    model = mlp([5, 8, 7, 3])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (compiled(X) * G).sum().backward()
    assert model.witness.left == PASSES
    torch._dynamo.reset()
