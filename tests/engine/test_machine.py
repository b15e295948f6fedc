"""One model through whatever may be done to it, in any order, with the definition asked after every
pass: what is remembered from one pass to the next is the main risk.

The machine keeps one model of `fastdfa.Linear` layers, norms and activations in an `nn.Sequential`.
Its definition reads the weights of now, calls the layers one by one, cuts by `detach` and hands
every cut tensor s e B_l, B_l being that of helpers/signals.py or, once it learns, the one it had.
"""

import contextlib
import copy
import dataclasses
import pickle

import pytest
import torch
from helpers.networks import assert_close, randn
from helpers.signals import matrix
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import nn

import fastdfa

WIDTH, CLASSES = 6, 3
ACTIVATIONS = ["tanh", "relu", "gelu", "softsign", "none"]
RULES = {
    "scale": ["launay2019", "tinydfa", 0.3],
    "shared": [True, False],
    "error": ["mean", "sum"],
    "signal": ["error", "sign"],
    "density": [1.0, 0.5],
    "dense": [None, True],
}
HOOKS = ["forward", "forward_pre", "full_backward"]


def layer(n, m, activation="none"):
    """A layer, also without an activation."""
    activation = None if activation == "none" else activation
    return fastdfa.Linear(n, m, activation=activation, dtype=torch.float64)


def idle(*arguments):
    """A hook that does nothing."""


class Pass:
    """A forward pass whose backward is to come: its output, error, and what it must give."""

    def __init__(self, y, g, expected):
        self.y, self.g, self.expected = y, g, expected


class Machine(RuleBasedStateMachine):
    @initialize(
        names=st.lists(st.sampled_from(ACTIVATIONS), min_size=1, max_size=4),
        bias=st.booleans(),
    )
    def start(self, names, bias):
        torch.manual_seed(0)
        layers = [layer(WIDTH, WIDTH, name) for name in names] + [layer(WIDTH, CLASSES)]
        if not bias:
            layers[0].bias = None
        self.model = fastdfa.DFA(nn.Sequential(*layers), feedback=fastdfa.Feedback(seed=1))
        self.seed, self.learns, self.handles, self.open = 1, None, [], []
        self.count = 0

    # What the definition says.

    def feedback(self, names, s):
        """B_l of each point, of the seed or as it has learnt."""
        if self.learns is not None:
            return [self.learns[name].detach() for name in names]
        given = dataclasses.replace(self.model.feedback, seed=self.seed)
        return [matrix(given, name, s.shape[1], WIDTH, WIDTH) for name in names]

    def definition(self, x, g, true=False):
        """Output, gradient of every parameter, and points, from the weights of now; in the dtype of
        x and under the autocast of now."""
        net = copy.deepcopy(self.model.module).to(x.dtype)
        for p in net.parameters():
            p.grad = None
        for module in net.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            module._backward_hooks.clear()
        cuts, h = [], x
        for name, module in net.named_children():
            if isinstance(module, nn.Linear):
                if h.requires_grad and not true:
                    cuts.append((name, h))
                    h = h.detach()
                h = nn.functional.linear(h, module.weight, module.bias)
                if module.activation is not None:
                    h = module.activation(h)
            else:
                h = module(h)
        (h * g).sum().backward()
        s = g.reshape(-1, CLASSES)
        if self.model.feedback.signal == "sign":
            s = s.sign() / s.sign().norm(dim=1, keepdim=True) * s.norm(dim=1, keepdim=True)
        s = s * len(s) if self.model.feedback.error == "sum" else s
        for (_, cut), B in zip(cuts, self.feedback([n for n, _ in cuts], s), strict=True):
            cut.backward((s @ B.to(s)).reshape(cut.shape).to(cut.dtype))
        return h.detach(), {n: p.grad for n, p in net.named_parameters()}, [n for n, _ in cuts]

    def batch(self, rows):
        self.count += 1
        shape = (rows,) if isinstance(rows, int) else rows
        return randn(*shape, WIDTH, seed=self.count), randn(*shape, CLASSES, seed=1000 + self.count)

    def found(self):
        return {
            name: None if p.grad is None else p.grad.clone()
            for name, p in self.model.module.named_parameters()
        }

    def backward(self, passes):
        """All of them in one loss, in which gradients add up."""
        self.model.zero_grad()
        torch.stack([(p.y * p.g).sum() for p in passes]).sum().backward()
        expected = dict(passes[0].expected)
        for p in passes[1:]:
            for name, gradient in p.expected.items():
                assert (gradient is None) == (expected[name] is None)
                expected[name] = None if gradient is None else expected[name] + gradient
        assert_close(self.found(), expected, 1e-9)

    def train(self, rows=4):
        x, g = self.batch(rows)
        y, expected, names = self.definition(x, g)
        out = self.model(x)
        assert_close(out.detach(), y, 1e-9)
        assert list(self.model.feedback_points) == names
        return Pass(out, g, expected)

    # Passes.

    @rule(rows=st.sampled_from([4, 1, 7, (2, 3)]))
    def forward_and_backward(self, rows):
        self.backward([self.train(rows)])

    @rule(count=st.integers(2, 3), last=st.booleans())
    def several_forwards_before_one_backward(self, count, last):
        passes = [self.train(4 if k else 5) for k in range(count)]
        self.backward(passes[-1:] if last else passes)

    @rule()
    def accumulate(self):
        one, other = self.train(3), None
        self.backward([one])
        first = self.found()
        other = self.train(4)
        (other.y * other.g).sum().backward()
        both = {n: None if g is None else g + other.expected[n] for n, g in first.items()}
        assert_close(self.found(), both, 1e-9)

    @rule()
    def forward_without_gradients(self):
        x, g = self.batch(5)
        with torch.no_grad():
            y = self.model(x)
        assert not y.requires_grad
        assert_close(y, self.definition(x, g)[0], 1e-9)

    @rule()
    def true_gradients(self):
        x, g = self.batch(4)
        y, expected, _ = self.definition(x, g, true=True)
        self.model.zero_grad()
        with fastdfa.backprop(self.model):
            out = self.model(x)
        (out * g).sum().backward()
        assert_close(out.detach(), y, 1e-9)
        assert_close(self.found(), expected, 1e-9)

    @rule()
    def abandoned_forward(self):
        self.model(self.batch(4)[0])

    @rule()
    def failing_forward(self):
        with contextlib.suppress(RuntimeError, ValueError, TypeError):
            self.model(randn(4, WIDTH + 1))
            raise AssertionError("an input of another width was taken")

    @precondition(lambda self: self.learns is None)
    @rule()
    def autocast(self):
        """In bfloat16, which has eight bits."""
        net = copy.deepcopy(self.model).float()
        x, g = (t.float() for t in self.batch(4))
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
            _, expected, _ = self.definition(x, g)
        (y * g).sum().backward()
        # A unit of ReLU may be on the other side of its kink, and a norm divides by what is small.
        smooth = not any(isinstance(m, (nn.ReLU, nn.LayerNorm)) for m in net.modules())
        largest = max(e.norm() for e in expected.values() if e is not None)
        for name, p in net.module.named_parameters():
            right = expected[name]
            assert (p.grad is None) == (right is None), name
            if right is not None and smooth:
                assert (p.grad - right).norm() <= 0.1 * largest, name

    @rule(momentum=st.sampled_from([0.0, 0.9]))
    def streaming_step(self, momentum):
        x, g = self.batch(4)
        _, expected, _ = self.definition(x, g)
        self.model.zero_grad()
        before = {n: p.detach().clone() for n, p in self.model.module.named_parameters()}
        optimizer = torch.optim.SGD(self.model.module.parameters(), 0.1, momentum)
        fastdfa.StreamingStep(self.model, optimizer)(lambda: (self.model(x) * g).sum())
        right = {n: p if expected[n] is None else p - 0.1 * expected[n] for n, p in before.items()}
        now = {n: p.detach() for n, p in self.model.module.named_parameters()}
        assert_close(now, right, 1e-8)

    @precondition(lambda self: self.learns is None and len(self.model.module) > 1)
    @rule()
    def learn_feedback(self):
        """From here on the matrices are those that the parameters hold, also once they move."""
        self.model.module.requires_grad_(True)
        self.model(self.batch(4)[0])
        names = list(self.model.feedback_points)
        if not names:
            return
        before = [self.model.feedback_matrix(name) for name in names]
        self.model.learn_feedback()
        self.learns = {name: self.model.feedback_matrix(name).clone() for name in names}
        assert_close(list_of(self.learns.values()), list_of(before))

    # Changes.

    @precondition(lambda self: self.learns is None)
    @rule(option=st.sampled_from(sorted(RULES)), data=st.data())
    def another_rule(self, option, data):
        value = data.draw(st.sampled_from(RULES[option]))
        self.model.feedback = dataclasses.replace(self.model.feedback, **{option: value})

    @rule(place=st.integers(0, 3), name=st.sampled_from(ACTIVATIONS))
    def replace_a_layer(self, place, name):
        hidden = self.hidden()
        if hidden:
            place = hidden[place % len(hidden)]
            self.model.module[place] = layer(WIDTH, WIDTH, name)

    @precondition(lambda self: self.learns is None)
    @rule(place=st.integers(0, 3), other=st.integers(0, 3))
    def swap_layers(self, place, other):
        hidden = self.hidden()
        if hidden:
            i, j = hidden[place % len(hidden)], hidden[other % len(hidden)]
            net = self.model.module
            first, second = net[i], net[j]
            if first is not second:
                net[i], net[j] = second, first

    @precondition(lambda self: self.learns is None and len(self.model.module) < 7)
    @rule(place=st.integers(0, 3), what=st.sampled_from(["layer", "norm", "tanh"]))
    def insert_a_module(self, place, what):
        made = {
            "layer": lambda: layer(WIDTH, WIDTH, "tanh"),
            "norm": lambda: nn.LayerNorm(WIDTH, dtype=torch.float64),
            "tanh": nn.Tanh,
        }[what]()
        self.model.module.insert(min(place, len(self.model.module) - 1), made)

    @precondition(lambda self: self.learns is None)  # then there is a B for each point, always
    @rule(place=st.integers(0, 6), which=st.sampled_from(["weight", "bias", "both", "none"]))
    def freeze(self, place, which):
        module = self.model.module[place % (len(self.model.module) - 1)]
        for name, p in module.named_parameters():
            p.requires_grad_(which == "none" or (which != "both" and name != which))

    @rule(seed=st.integers(0, 3))
    def other_weights_in_place(self, seed):
        with torch.no_grad():
            for k, p in enumerate(self.model.module.parameters()):
                p.copy_(randn(*p.shape, seed=100 * seed + k) / 2)

    @precondition(lambda self: self.learns is None)
    @rule(seed=st.sampled_from([5, 6, 2**40 + 7]))
    def load_another_seed(self, seed):
        state = copy.deepcopy(self.model.state_dict())
        state["seed"] = torch.tensor(seed)
        self.model.load_state_dict(state)
        self.seed = seed

    @rule(place=st.integers(0, 6), kind=st.sampled_from(HOOKS))
    def add_a_hook(self, place, kind):
        module = self.model.module[place % len(self.model.module)]
        self.handles.append(getattr(module, f"register_{kind}_hook")(idle))

    @rule()
    def remove_the_hooks(self):
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @rule(mode=st.booleans())
    def train_or_eval(self, mode):
        self.model.train(mode)

    @rule()
    def go_on_with_a_copy(self):
        self.remove_the_hooks()
        self.model = copy.deepcopy(self.model)

    @rule()
    def go_on_with_a_pickle(self):
        self.remove_the_hooks()
        self.model = pickle.loads(pickle.dumps(self.model))

    def hidden(self):
        """The places of the layers but the head."""
        net = self.model.module
        return [k for k in range(len(net) - 1) if isinstance(net[k], nn.Linear)]


def list_of(tensors):
    return dict(enumerate(tensors))


Machine.TestCase.settings = settings(max_examples=120, stateful_step_count=30)
test_a_model_through_whatever_may_be_done_to_it = pytest.mark.filterwarnings("ignore")(
    Machine.TestCase
)
