"""A converted model is the root itself: the same object, with all that it was."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from helpers.networks import RULE, assert_close, gradients, randn, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdfa
from fastdfa.feedback.rule import Feedback


class Net(nn.Module):
    """Holds names that a root has as well."""

    def __init__(self):
        super().__init__()
        self.hidden, self.output = nn.Linear(5, 8), nn.Linear(8, 3)
        self.target, self.calls = 3, 0

    def forward(self, pixels: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        return self.output(torch.tanh(self.hidden(pixels)))

    def generate(self, x):
        with torch.no_grad():
            return self(x).argmax(-1)


class ByHand(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.hidden = fastdfa.Linear(5, 8, activation="tanh")
        self.output = fastdfa.Linear(8, 3)
        self.load_state_dict(net.state_dict())

    def forward(self, x):
        return self.output(self.hidden(x))


def net():
    torch.manual_seed(1)
    return Net().double()


X, G = randn(6, 5), randn(6, 3)


def by_hand(model):
    """The gradients of the network that the model was, written with fastdfa's layers."""
    other = fastdfa.DFA(ByHand(net()).double(), RULE)
    step(other, X, G)
    return {name: p.grad for name, p in other.module.named_parameters()}


def found(model):
    model.zero_grad()
    step(model, X, G)
    return {name: p.grad for name, p in model.named_parameters()}


def test_a_result_that_is_dropped_trains_by_feedback_all_the_same():
    model = net()
    fastdfa.convert(model, RULE)
    assert_close(found(model), by_hand(model))


def test_it_stays_what_it_was():
    model, plain = net(), net()
    held = [model]
    assert fastdfa.convert(model, RULE) is model is held[0]
    assert isinstance(model, Net) and type(model).__name__ == "Net"
    assert (type(model).__module__, type(model).__doc__) == (Net.__module__, Net.__doc__)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert torch.equal(model.generate(X), plain.generate(X)) and model.calls == 1
    assert list(model.named_children()) == [("hidden", model.hidden), ("output", model.output)]
    assert [name for name, _ in model.named_parameters()] == [
        n for n, _ in plain.named_parameters()
    ]
    assert set(model.state_dict()) - set(plain.state_dict()) == {"fastdfa.seed"}
    assert repr(model) == repr(plain)


def test_a_sequential_counts_indexes_and_iterates_as_before():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    layers = list(model)
    fastdfa.convert(model, RULE, fold=False)
    assert len(model) == 3 and list(model) == layers and model[-1] is layers[-1]


def test_names_of_the_model_are_its_own():
    model = fastdfa.convert(net(), RULE)
    assert isinstance(model.output, nn.Linear) and model.target == 3
    model.target = 4
    assert model.target == 4 and model.fastdfa.target is None
    model.seed = nn.Linear(2, 2)  # of a name that the root has, given later
    assert isinstance(model.seed, nn.Linear)


def test_the_root_is_set_through_the_model():
    model = fastdfa.convert(net(), RULE)
    before = found(model)
    model.feedback = Feedback(seed=1234)
    assert int(model.seed) == RULE.seed
    model.cut = ()
    assert model.fastdfa.feedback.seed == 1234 and model.fastdfa.cut == ()
    exact = found(model)
    plain = net()
    step(plain, X, G)
    assert_close(exact, gradients(plain))
    model.cut, model.feedback = "all", RULE
    assert_close(found(model), before)


def test_the_name_of_the_wrapper_warns():
    model = fastdfa.convert(net(), RULE)
    with pytest.warns(DeprecationWarning, match="leave out .module") as caught:
        assert model.module is model
    assert caught[0].filename == __file__


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Reduced(Net):
    """Says itself how it is made again."""

    def __reduce__(self):
        return (Reduced, (), self.__dict__)


class Slow(Net):
    def __getstate__(self):
        return {**self.__dict__, "copied": True}


@pytest.mark.parametrize("kind", [Net, Reduced, Slow])
@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_roots_too(kind, copied):
    torch.manual_seed(1)
    model = fastdfa.convert(kind().double(), RULE)
    for _ in range(2):  # before the first pass, and with plans
        twin = copied(model)
        assert isinstance(twin, kind) and twin.fastdfa is not model.fastdfa
        assert twin.fastdfa.module is twin and twin.conversion.model is twin
        assert_close(found(twin), by_hand(model))
        found(model)
    assert type(twin.conversion.undo()) is kind


def test_a_plain_checkpoint_loads_and_leaves_the_seed():
    plain, model = net(), fastdfa.convert(Net().double(), RULE)
    assert str(model.load_state_dict(plain.state_dict())) == "<All keys matched successfully>"
    assert int(model.seed) == RULE.seed
    assert_close(found(model), by_hand(model))


def test_its_own_checkpoint_brings_the_seed_and_b():
    model = fastdfa.convert(net(), RULE)
    found(model)
    model.learn_feedback()
    other = fastdfa.convert(Net().double(), Feedback(seed=99))
    found(other)
    other.learn_feedback()
    other.load_state_dict(model.state_dict())
    assert int(other.seed) == RULE.seed
    assert_close(other.feedback_matrix("output"), model.feedback_matrix("output"))
    inside = nn.ModuleDict({"a": other})
    inside.load_state_dict({f"a.{name}": value for name, value in model.state_dict().items()})
    wrong = {**model.state_dict(), "fastdfa.nothing": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"fastdfa\.nothing"'):
        other.load_state_dict(wrong)
    wrong = {**model.state_dict(), "fastdfa.matrices.output": torch.ones(1)}
    with pytest.raises(RuntimeError, match="size mismatch for matrices"):
        other.load_state_dict(wrong)
    wrong = model.state_dict()
    del wrong["fastdfa.matrices.output"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"fastdfa\.matrices\.output"'):
        other.load_state_dict(wrong)


def test_a_checkpoint_of_the_wrapper_that_convert_returned_loads():
    model = fastdfa.convert(Net().double(), Feedback(seed=99))
    old = {"seed": torch.tensor(RULE.seed)} | {
        f"module.{k}": v for k, v in net().state_dict().items()
    }
    with pytest.warns(DeprecationWarning, match="of a wrapper"):
        model.load_state_dict(old)
    assert_close(found(model), by_hand(model))


def test_what_learns_is_among_its_parameters_and_moves_with_it():
    model = fastdfa.convert(net(), RULE)
    found(model)
    (B,) = model.learn_feedback()
    around = nn.Sequential(model)
    assert any(B is p for p in around.parameters())
    assert {"0.fastdfa.seed"} == dict(around.named_buffers()).keys()
    around.float()
    assert model.matrices.of("output").dtype == torch.float32
    around.eval()
    assert not any(module.training for module in around.modules())


def test_a_forward_of_the_object_itself_is_kept():
    """As accelerate sets it, before the conversion or after."""

    def twice(model):
        own = model.forward
        model.forward = lambda x: own(x) * 2
        return model

    expected = {name: 2 * g for name, g in by_hand(net()).items() if name.startswith("output")}
    before, after = fastdfa.convert(twice(net()), RULE), twice(fastdfa.convert(net(), RULE))
    for model in (before, after):
        gradient = found(model)
        assert_close({name: gradient[name] for name in expected}, expected)
        assert model.feedback_points == ["output"]
    undone = before.conversion.undo()
    assert "forward" in vars(undone) and "plain_forward" not in vars(undone)


@pytest.mark.parametrize("around", [lambda m: m, nn.Sequential, lambda m: nn.Sequential(m, m)])
def test_it_is_found_by_what_looks_for_roots(around):
    model = fastdfa.convert(net(), RULE)
    with fastdfa.backprop(around(model)):
        exact = found(model)
    plain = net()
    step(plain, X, G)
    assert_close(exact, gradients(plain))
    with pytest.raises(ValueError, match="hold no DFA"):
        fastdfa.DFA(around(model))
    with pytest.raises(ValueError, match="hold no DFA"):
        fastdfa.convert(around(model))


def test_a_part_of_a_model_can_be_converted():
    body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    model = nn.Sequential(body, nn.Softsign()).double()
    fastdfa.convert(model[0], RULE)
    model(X).sum().backward()
    assert body.feedback_points == ["2"]
    table = fastdfa.inspect(model, X)
    assert str(table["0.0.weight"]) == "feedback at 2"


def test_the_diagnostics_take_it():
    model = fastdfa.convert(net(), RULE)
    found(model)
    model.learn_feedback()
    table = fastdfa.inspect(model, X)
    assert [row.name for row in table.rows] == [n for n, _ in net().named_parameters()]
    t = torch.arange(6) % 3
    assert fastdfa.alignment(model, nn.functional.cross_entropy, X, t).points
    by_layer = fastdfa.convert(net(), rule="fa")
    assert fastdfa.alignment(by_layer, nn.functional.cross_entropy, X, t).points


def test_anchors_and_streaming_take_it():
    model = fastdfa.convert(net(), Feedback(seed=1, anchor=2))
    for _ in range(4):
        found(model)
    assert model.explained.keys() == {"output"}
    streamed = fastdfa.convert(net(), RULE)
    expected = by_hand(streamed)
    optimizer = torch.optim.SGD(streamed.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in streamed.named_parameters()}
    fastdfa.StreamingStep(streamed, optimizer)(lambda: (streamed(X) * G).sum())
    moved = {name: before[name] - p.detach() for name, p in streamed.named_parameters()}
    assert_close(moved, expected)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["function", "method"])
def test_compiled_it_is_what_it_is_eagerly(compiled):
    torch._dynamo.reset()
    model = fastdfa.convert(net(), RULE)
    expected = by_hand(model)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    if compiled == "method":
        model.compile(fullgraph=True, backend="aot_eager")
        run = model
    step(run, X, G)
    assert_close(gradients(model), expected)
    torch._dynamo.reset()


# Parts that run outside of the model ------------------------------------------------------------


PARTS = {
    "layers": (lambda: fastdfa.convert(nn.Sequential(*stack()), RULE), "0.0"),
    "a block": (lambda: fastdfa.convert(nn.Sequential(*stack()), RULE, blocks=["0", "1"]), "0"),
    "by a hook": (
        lambda: fastdfa.convert(nn.Sequential(
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 8))), nn.Linear(8, 3)
        ), RULE), "0.0",
    ),
    "a copy": (lambda: copy.deepcopy(fastdfa.convert(nn.Sequential(*stack()), RULE)), "0.0"),
}  # fmt: skip


def stack():
    return [
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)),
        nn.Linear(8, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_that_is_called_outside_warns_once_by_name(kind):
    make, name = PARTS[kind]
    model, x = make(), X.float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()
        with torch.no_grad():
            model[0](x)
    with pytest.warns(UserWarning, match=f"'{name}' was converted .* outside of the model"):
        model[0](x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0](x).sum().backward()


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_what_runs_outside_legally_does_not_warn():
    x = X.float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for blocks in (None, ["0", "1"]):
            model = fastdfa.convert(nn.Sequential(*stack()), RULE, blocks=blocks)
            again = fastdfa.convert(nn.Sequential(*map(Checkpointed, stack())), RULE, blocks=blocks)
            for each in (model, again):
                each(x).sum().backward()
                with fastdfa.backprop(each):
                    each(x).sum().backward()
            model.conversion.undo()(x).sum().backward()
        fastdfa.convert(nn.Sequential(*stack()), rule="backprop")(x).sum().backward()
        fastdfa.Linear(5, 8)(x).sum().backward()
