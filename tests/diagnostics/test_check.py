"""`fastdfa.check` says in sentences what does not train as DFA would."""

import warnings

import pytest
import torch
from helpers.kinds import KINDS, build, data
from helpers.networks import RULE, Apply, G, X, fresh, mlp
from torch import nn

import fastdfa

every_kind = pytest.mark.parametrize("kind", KINDS)


def tanh(n, m):
    return fastdfa.Linear(n, m, activation="tanh")


def dfa(*blocks, **options):
    return fastdfa.DFA(nn.Sequential(*blocks).double(), RULE, **options)


def findings(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fastdfa.check(model, *args, **kwargs)
    assert bool(found) is (found.findings == ())
    return found.findings


@every_kind
def test_nothing_is_found_in_networks_that_are_right(kind):
    model, (inputs, _) = build(kind), data(kind)
    assert findings(model, *inputs) == ()
    if kind in ("mlp", "transformer"):
        assert findings(torch.compile(model, backend="aot_eager"), *inputs) == ()
        torch._dynamo.reset()


def test_what_is_detached_is_named():
    model = dfa(tanh(5, 8), Apply(torch.Tensor.detach), tanh(8, 7), fastdfa.Linear(7, 3))
    (found,) = findings(model, X)
    assert found.startswith("trained by nothing: '0.weight', '0.bias'.")


def test_what_trains_by_the_true_gradient_though_it_is_not_the_head_is_named():
    (found,) = findings(dfa(tanh(5, 8), tanh(8, 7), nn.Linear(7, 6), nn.Linear(6, 3)), X)
    assert "the true gradient of the output trains '1', '2', '3'" in found


def test_a_path_round_a_cut_is_named():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = tanh(5, 8), tanh(8, 8)
            self.head = fastdfa.Linear(8, 3)

        def forward(self, x):
            h = self.first(x)
            return self.head(self.second(h)) + h[:, :3]

    model = fastdfa.DFA(Skip().double(), RULE, allow_bypass=True)
    found = findings(model, X)
    assert (
        "a path leads round a cut: feedback and a true gradient train 'first.weight', 'first.bias'"
        in found
    )


def test_a_gradient_that_is_zero_is_named():
    model = mlp([5, 8, 7, 3], "relu")
    nn.init.constant_(model.module[0].bias, -100)
    found = findings(model, X)
    assert found == ("the gradient is zero for this input of '0.weight', '0.bias', '1.weight'",)


def test_what_the_compiler_loses_is_named():
    """A backend that drops the gradient of a layer stands for what compilers may do."""

    def backend(graph, inputs):
        linear = next(n for n in graph.graph.nodes if "linear" in str(n.target))
        with graph.graph.inserting_after(linear):
            cut = graph.graph.call_method("detach", (linear,))
        linear.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)
        graph.recompile()
        return graph.forward

    model = mlp([5, 8, 7, 3])
    assert findings(model, X) == ()
    (found,) = findings(torch.compile(model, backend=backend), X)
    assert found.startswith("no gradient comes, as the model runs, compiled")
    assert "'0.weight', '0.bias'" in found
    torch._dynamo.reset()


def test_what_a_root_warns_of_is_found():
    (found,) = findings(dfa(tanh(5, 8), fastdfa.Linear(8, 3), nn.LogSoftmax(-1)), X)
    assert found.startswith("the output is a LogSoftmax")


@pytest.mark.parametrize("rule", [{}, {"signal": "target"}, {"anchor": 2}], ids=str)
def test_the_model_goes_on_as_if_nothing_had_been(rule):
    def trained(checked):
        torch.manual_seed(0)
        model = mlp([5, 8, 7, 3], feedback=fastdfa.Feedback(seed=1, **rule))
        found = []
        for _ in range(5):
            model.target = torch.arange(len(X)) % 3 if rule.get("signal") else None
            if checked:
                assert findings(model, X) == ()
                assert all(p.grad is None for p in model.parameters())
            found.append(fresh(model))
            model.zero_grad()
        return found, model.witness is None, torch.get_rng_state()

    (plain, *rest), (checked, *others) = trained(False), trained(True)
    for one, other in zip(plain, checked, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert rest[0] == others[0] and torch.equal(rest[1], others[1])


def test_a_loss_and_what_is_printed():
    model = mlp([5, 8, 3])
    found = fastdfa.check(model, X, loss=lambda y: (y * G).sum())
    assert str(found) == "findings\nnone: every parameter learns as DFA would"
    assert found.inspection["0.weight"].points == ("1",)
    with pytest.raises(ValueError, match="must hold a fastdfa"):
        fastdfa.check(nn.Linear(5, 3), X)
