"""`LayerFeedback`: the rules by their formulas, written out by hand, and what is around them."""

import copy
import hashlib
import io
import math
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import ACTIVATIONS, mlp_forward, unit_feedback
from helpers.networks import assert_close, gradients, layers_of, mlp, randn, step
from torch import nn

import fastdfa
from fastdfa.layerwise import RULES

FIXED = [rule for rule in RULES if rule != "brsf"]
SEED = 2**40 + 3
X, G = randn(9, 5), randn(9, 3)
WIDTHS = [5, 8, 7, 3]


def deviation(scale, shape):
    positions = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * positions, shape[0] * positions
    named = {"xavier": math.sqrt(2 / (fan_in + fan_out)), "torch": 1 / math.sqrt(3 * fan_in)}
    return named.get(scale, scale)


def matrix(rule, weight, name, seed=SEED, scale="xavier"):
    """B of a layer in float64."""
    weight = weight.detach().double()
    if rule == "backprop":
        return weight
    s = deviation(scale, weight.shape)
    if rule == "usf":
        return s * weight.sign()
    stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
    m = unit_feedback(seed, len(weight), weight[0].numel(), "uniform", stream)
    m = s * m.view(weight.shape)
    return m if rule == "fa" else m.abs() * weight.sign()


def fed_back(layers, x, g, matrices):
    """[(weight gradient, bias gradient)] of an MLP, and the gradient of x."""
    pre, post = mlp_forward(layers, x)
    inputs = [x.double(), *post[:-1]]
    found, signal = [], g.double()
    for layer, a, h, b in zip(layers[::-1], pre[::-1], inputs[::-1], matrices[::-1], strict=True):
        delta = signal * ACTIVATIONS[layer.activation].derivative(a)
        found.append((delta.T @ h, None if layer.bias is None else delta.sum(0)))
        signal = delta @ b
    return found[::-1], signal


def network(rule, activation="tanh", **options):
    """A `LayerFeedback` of an MLP, and its layers for the formulas."""
    root = mlp(WIDTHS, activation)
    layers = layers_of(root)
    return fastdfa.LayerFeedback(root.module, rule, seed=SEED, **options), layers


def named(pairs):
    return {
        f"{i}.{kind}": gradient
        for i, pair in enumerate(pairs)
        for kind, gradient in zip(("weight", "bias"), pair, strict=True)
    }


def found_in(model):
    return gradients(model.module)


@pytest.mark.parametrize("activation", ["none", "tanh", "relu", "gelu", "Softsign"])
@pytest.mark.parametrize("rule", FIXED)
def test_by_the_formula(rule, activation):
    """On the fused path, and on the general one (no activation, or one that no kernel knows)."""
    model, layers = network(rule, activation)
    x = X.clone().requires_grad_()
    y = step(model, x, G)
    matrices = [matrix(rule, layer.weight, str(i)) for i, layer in enumerate(layers)]
    expected, input_gradient = fed_back(layers, X, G, matrices)
    assert_close(y, mlp_forward(layers, X)[1][-1])
    assert_close(found_in(model), named(expected))
    assert_close(x.grad, input_gradient)
    for i, b in enumerate(matrices):
        assert_close(model.feedback_matrix(str(i)), b)


def test_brsf_draws_in_every_backward_pass():
    model, layers = network("brsf")
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model.zero_grad()
        step(model, X, G)
        seen.append(found_in(model))
        torch.manual_seed(seed)
        matrices = [
            torch.zeros_like(layers[0].weight)
        ]  # of the first layer: its input wants no gradient
        for layer in reversed(layers[1:]):
            s = deviation("xavier", layer.weight.shape)
            magnitude = torch.empty_like(layer.weight).uniform_(0, math.sqrt(3) * s)
            matrices.insert(1, magnitude * layer.weight.sign())
        assert_close(seen[-1], named(fed_back(layers, X, G, matrices)[0]))
    assert (seen[0]["0.weight"] - seen[1]["0.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("scale", ["xavier", "torch", 0.3])
@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "brsf"])
def test_scales(rule, scale):
    layer = fastdfa.Conv2d(64, 32, 5, groups=2)
    model = fastdfa.LayerFeedback(nn.Sequential(layer), rule, scale, seed=SEED)
    b = model.feedback_matrix("0").double()
    s = deviation(scale, tuple(layer.weight.shape))
    assert b.square().mean().sqrt().item() == pytest.approx(s, rel=0.02)
    assert b.abs().max() <= math.sqrt(3) * s * (1 + 1e-6)
    if rule != "fa":
        assert torch.equal(b.sign(), layer.weight.sign().double())
    if rule != "brsf":
        assert_close(b, matrix(rule, layer.weight, "0", scale=scale), 1e-6)


# Convolutions.

CONVOLUTIONS = {
    "stride": ({"stride": 2}, {"stride": 2}),
    "padding": ({"padding": (1, 2)}, {"padding": (1, 2)}),
    "groups": ({"groups": 2}, {"groups": 2}),
    "dilation": ({"dilation": 2}, {"dilation": 2}),
    "same": ({"padding": "same"}, {"padding": (1, 1)}),
    "all": (
        {"stride": (2, 1), "padding": 2, "dilation": (1, 2), "groups": 4, "bias": False},
        {"stride": (2, 1), "padding": 2, "dilation": (1, 2), "groups": 4},
    ),
}


@pytest.mark.parametrize("activation", ["none", "tanh", "gelu", "Softsign"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "backprop"])
def test_convolutions_by_the_formula(rule, case, activation):
    """The gradient of its input, and so the weight gradient of a layer before it."""
    options, plain = CONVOLUTIONS[case]
    f, derivative = ACTIVATIONS[activation].f, ACTIVATIONS[activation].derivative
    layer = fastdfa.Conv2d(4, 8, 3, activation=ACTIVATIONS[activation].argument(), **options)
    model = fastdfa.LayerFeedback(nn.Sequential(layer).double(), rule, seed=SEED)
    x = randn(3, 4, 9, 8).requires_grad_()
    y = model(x)
    a = F.conv2d(x.detach(), layer.weight, layer.bias, **plain).detach()
    assert_close(y, f(a))
    g = randn(*y.shape, seed=1)
    y.backward(g)
    delta = g * derivative(a)
    b = matrix(rule, layer.weight, "0")
    assert_close(x.grad, torch.nn.grad.conv2d_input(x.shape, b, delta, **plain))
    weight = torch.nn.grad.conv2d_weight(x.detach(), layer.weight.shape, delta, **plain)
    assert_close(layer.weight.grad, weight)
    if layer.bias is not None:
        assert_close(layer.bias.grad, delta.sum((0, 2, 3)))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_one_dimension(activation):
    layer = fastdfa.Conv1d(4, 6, 3, padding=1, stride=2, activation=activation)
    model = fastdfa.LayerFeedback(nn.Sequential(layer).double(), "fa", seed=SEED)
    x = randn(3, 4, 9).requires_grad_()
    y = model(x)
    g = randn(*y.shape, seed=1)
    y.backward(g)
    delta = g * (1 if activation is None else (y > 0).double())
    b = matrix("fa", layer.weight, "0")
    expected = torch.nn.grad.conv1d_input(x.shape, b, delta, stride=2, padding=1)
    assert_close(x.grad, expected)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(4, 9, 8), (3, 4, 9, 8)])
def test_without_a_batch_and_with_channels_last(shape, activation):
    layer = fastdfa.Conv2d(4, 6, 3, padding=1, activation=activation)
    model = fastdfa.LayerFeedback(nn.Sequential(layer).double(), "fa", seed=SEED)
    x = randn(*shape)
    x = (x.to(memory_format=torch.channels_last) if x.dim() == 4 else x).requires_grad_()
    y = model(x)
    g = randn(*y.shape, seed=1)
    y.backward(g)
    delta = g * (1 if activation is None else (y > 0).double())
    b, batch = matrix("fa", layer.weight, "0"), x if x.dim() == 4 else x[None]
    expected = torch.nn.grad.conv2d_input(
        batch.shape, b, delta.reshape(-1, *delta.shape[-3:]), padding=1
    )
    assert_close(x.grad, expected.view(x.shape))


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_modes(mode):
    """Padding is differentiated as it is: what B stands for is the convolution alone."""
    layer = fastdfa.Conv2d(4, 6, 3, padding=1, padding_mode=mode, activation="tanh")
    model = fastdfa.LayerFeedback(nn.Sequential(layer).double(), "fa", seed=SEED)
    x = randn(3, 4, 6, 6).requires_grad_()
    y = model(x)
    g = randn(*y.shape, seed=1)
    y.backward(g)
    found = x.grad.clone()
    source = x.detach().requires_grad_()
    padded = F.pad(source, (1, 1, 1, 1), mode=mode)
    delta = g * (1 - y.detach() ** 2)
    b = matrix("fa", layer.weight, "0")
    padded.backward(torch.nn.grad.conv2d_input(padded.shape, b, delta))
    assert_close(found, source.grad)


# With the weight in the place of B it is backprop.


def mixed():
    return nn.Sequential(
        fastdfa.Conv2d(2, 4, 3, padding=1, activation="relu"),
        nn.BatchNorm2d(4),
        fastdfa.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Hardswish(inplace=True),
        nn.Flatten(),
        fastdfa.Linear(54, 7, activation="gelu"),
        fastdfa.Linear(7, 8, activation=nn.Softsign()),
        nn.LayerNorm(8),
        fastdfa.Linear(8, 3),
    ).double()


IMAGES = randn(5, 2, 8, 8)
ERROR = randn(5, 3)


def test_with_the_weight_as_b_it_is_backprop(monkeypatch):
    net = mixed()
    step(net, IMAGES, ERROR)
    expected = gradients(net)
    net.zero_grad()
    model = fastdfa.LayerFeedback(net, "fa")
    weights = {name: layer.weight.detach() for name, layer in net.named_children()
               if hasattr(layer, "weight")}  # fmt: skip
    monkeypatch.setattr(fastdfa.LayerFeedback, "_matrix", lambda self, name, weight: weights[name])
    step(model, IMAGES, ERROR)
    assert_close(gradients(net), expected)


@pytest.mark.parametrize("rule", RULES)
def test_true_gradients_on_demand(rule):
    net = mixed()
    step(net, IMAGES, ERROR)
    expected = gradients(net)
    net.zero_grad()
    model = fastdfa.LayerFeedback(net, rule, seed=SEED)
    with fastdfa.backprop(model):
        step(model, IMAGES, ERROR)
    assert_close(gradients(net), expected)
    net.zero_grad()
    step(model, IMAGES, ERROR)
    same = torch.allclose(gradients(net)["0.weight"], expected["0.weight"])
    assert same == (rule == "backprop")


def test_the_forward_numbers_are_untouched():
    net = mixed().eval()
    assert_close(fastdfa.LayerFeedback(net, "fa")(IMAGES), net(IMAGES), 0.0)


# One source of randomness.


def test_the_seed_and_the_name_settle_b():
    model, _ = network("fa")
    other = fastdfa.LayerFeedback(nn.Sequential(model.module), "fa", seed=SEED)
    again = fastdfa.LayerFeedback(copy.deepcopy(model.module), "fa", seed=SEED)
    b = model.feedback_matrix("1")
    assert torch.equal(b, again.feedback_matrix("1"))
    assert not torch.allclose(b, other.feedback_matrix("0.1"))
    half = copy.deepcopy(model).float().feedback_matrix("1")
    assert_close(half, b, 1e-6)
    torch.manual_seed(5)
    first = fastdfa.LayerFeedback(model.module, "fa")
    second = fastdfa.LayerFeedback(model.module, "fa")
    assert first.seed != second.seed
    torch.manual_seed(5)
    assert fastdfa.LayerFeedback(model.module, "fa").seed == first.seed


def test_the_checkpoint_carries_the_seed_alone():
    model, _ = network("frsf")
    step(model, X, G)
    expected = found_in(model)
    assert set(model.state_dict()) == {"seed", *(f"module.{n}" for n in expected)}
    other = fastdfa.LayerFeedback(mlp(WIDTHS).module, "frsf", seed=1)
    step(other, X, G)  # its B is cached now
    other.load_state_dict(model.state_dict())
    other.zero_grad()
    step(other, X, G)
    assert_close(found_in(other), expected, 0.0)


def test_copies_and_pickles():
    model, _ = network("fa")
    step(model, X, G)
    expected = found_in(model)
    buffer = io.BytesIO(pickle.dumps(model))
    assert buffer.getbuffer().nbytes < 10_000
    for copied in (copy.deepcopy(model), pickle.loads(buffer.getvalue())):
        copied.zero_grad()
        step(copied, X, G)
        assert_close(found_in(copied), expected, 0.0)


# Around it.


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf"])
@pytest.mark.slow  # compiles
def test_compiled(rule):
    net = mixed()
    del net[3]  # the modification in place
    model = fastdfa.LayerFeedback(net, rule, seed=SEED)
    eager = copy.deepcopy(model)
    step(eager, IMAGES, ERROR)
    expected = gradients(eager.module)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        net.zero_grad()
        step(compiled, IMAGES, ERROR)
        assert_close(gradients(net), expected)


@pytest.mark.slow  # compiles
def test_brsf_compiled_draws_in_every_step():
    model, _ = network("brsf")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    seen = []
    for _ in range(2):
        model.zero_grad()
        step(compiled, X, G)
        seen.append(found_in(model))
    assert (seen[0]["0.weight"] - seen[1]["0.weight"]).abs().max() > 1e-3
    assert_close(seen[0]["2.weight"], seen[1]["2.weight"])  # the head's is true


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(rule, dtype):
    net = mixed().float().eval()
    model = fastdfa.LayerFeedback(net, rule, seed=SEED)
    exact = copy.deepcopy(model).double()
    with torch.autocast("cpu", dtype=dtype):
        y = model(IMAGES.float())
        loss = (y.float() * ERROR.float()).sum()
    loss.backward()
    assert y.dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    step(exact, IMAGES, ERROR)
    assert_close(gradients(net), gradients(exact.module), 4e-2)


class Block(nn.Module):
    """Any network, in an activation checkpoint or not."""

    checkpointed = False

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if self.checkpointed:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
        return self.inner(x)


def test_activation_checkpoints():
    """The recomputation, outside of the root, does not put the weight back in the place of B."""
    block = Block(mixed())
    model = fastdfa.LayerFeedback(block, "fa", seed=SEED)
    found = []
    for block.checkpointed in (False, True):
        model.zero_grad()
        step(model, IMAGES, ERROR)
        found.append(found_in(model))
    assert_close(found[1], found[0])


def test_a_layer_that_is_called_twice_has_one_b():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.loop = fastdfa.Linear(5, 5, activation="tanh")

        def forward(self, x):
            return self.loop(self.loop(x))

    model = fastdfa.LayerFeedback(Loop().double(), "fa", seed=SEED)
    g = randn(9, 5)
    step(model, X, g)
    weight, bias = model.module.loop.weight.detach(), model.module.loop.bias.detach()
    h = torch.tanh(X @ weight.T + bias)
    y = torch.tanh(h @ weight.T + bias)
    b = matrix("fa", weight, "loop")
    above = g * (1 - y**2)
    below = (above @ b) * (1 - h**2)
    assert_close(model.module.loop.weight.grad, above.T @ h + below.T @ X)


def test_an_exception_leaves_no_trace():
    model, _ = network("fa")
    with pytest.raises(RuntimeError):
        model(randn(9, 4))
    net = mlp(WIDTHS).module
    x = X.clone().requires_grad_()
    step(net, x, G)
    layers = layers_of(fastdfa.DFA(net))
    _, expected = fed_back(layers, X, G, [layer.weight for layer in layers])
    assert_close(x.grad, expected)


def test_another_thread_is_not_concerned():
    model, _ = network("fa")
    other, found = mlp(WIDTHS).module, []
    plain = copy.deepcopy(other)
    step(plain, X, G)
    hook = model.module[1].register_forward_hook(
        lambda *_: run_in_thread(lambda: found.append(step(other, X, G)))
    )
    step(model, X, G)
    hook.remove()
    assert found
    assert_close(gradients(other), gradients(plain))


def run_in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


# Alignment.


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf"])
def test_alignment_by_hand(rule):
    model, layers = network(rule)

    def loss_fn(y, target):
        return (y * target).sum()

    measured = fastdfa.alignment(model, loss_fn, X, G, weights=True)
    pre, _ = mlp_forward(layers, X)
    true, fed = G, G
    for i in (2, 1):
        true = true @ layers[i].weight
        fed = fed @ matrix(rule, layers[i].weight, str(i))
        cosines = F.cosine_similarity(true, fed, dim=1)
        assert_close(measured[str(i)].cosines, cosines)
        derivative = 1 - torch.tanh(pre[i - 1]) ** 2
        true, fed = true * derivative, fed * derivative
    a, b = true.T @ X, fed.T @ X
    cosine = (a * b).sum() / a.norm() / b.norm()
    assert measured.weights["0.weight"] == pytest.approx(cosine.item(), abs=1e-10)
    assert measured.weights["2.weight"] == pytest.approx(1, abs=1e-10)
    assert [p.name for p in measured.points] == ["1", "2"]
    assert all(p.grad is None for p in model.parameters())


def test_alignment_of_backprop_is_one():
    net = mixed()  # its batch norm trains
    model = fastdfa.LayerFeedback(net, "backprop")
    before = copy.deepcopy(net.state_dict())
    measured = fastdfa.alignment(model, lambda y, t: (y * t).sum(), IMAGES, ERROR)
    assert [p.name for p in measured.points] == ["2", "5", "6", "8"]
    assert all(abs(p.mean - 1) < 1e-10 for p in measured.points)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_the_monitor_takes_it():
    model, _ = network("fa")
    monitor = fastdfa.AlignmentMonitor(model, lambda y, t: (y * t).sum(), every=2)
    assert monitor(X, G) is not None and monitor(X, G) is None
    assert "cosine" in str(monitor.history[0][1])


def test_what_cannot_be_aligned():
    model, _ = network("fa")
    with pytest.raises(ValueError, match="gated compares at the points of a DFA"):
        fastdfa.alignment(model, lambda y, t: y.sum(), X, G, gated=True)
    with pytest.raises(TypeError, match="loss_fn must return a tensor"):
        fastdfa.alignment(model, lambda y, t: 1.0, X, G)
    both = nn.Sequential(model, mlp([3, 4, 2]))
    with pytest.raises(ValueError, match="one LayerFeedback alone, got 2 roots"):
        fastdfa.alignment(both, lambda y, t: y.sum(), X, G)


# Converting.


def plain():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8),
        nn.Tanh(), nn.Linear(8, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_convert(rule):
    net = plain()
    converted = copy.deepcopy(net)
    model = fastdfa.convert(converted, rule=rule)
    assert model is converted and isinstance(model.fastdfa, fastdfa.LayerFeedback)
    assert model.rule == rule
    layers = [type(layer).__module__.split(".")[0] for layer in model if
              isinstance(layer, (nn.Linear, nn.Conv2d))]  # fmt: skip
    assert layers == ["fastdfa"] * 3
    step(net, IMAGES, ERROR)
    step(model, IMAGES, ERROR)
    head = {k: v for k, v in gradients(net).items() if k.startswith("6")}
    assert_close({k: gradients(model)[k] for k in head}, head)
    assert "hands down its gradient by the rule, applies Tanh '5'" in str(model.conversion)
    undone = model.conversion.undo()
    assert {type(m) for m in undone} == {type(m) for m in net}


def test_shallow():
    net = plain()
    step(net, IMAGES, ERROR)
    model = fastdfa.convert(copy.deepcopy(net), rule="shallow")
    model.zero_grad()
    step(model, IMAGES, ERROR)
    trained = {name: g for name, g in gradients(model).items() if g is not None}
    assert_close(trained, {k: gradients(net)[k] for k in ("6.weight", "6.bias")})
    assert all(p.requires_grad for p in model.conversion.undo().parameters())


def test_convert_by_default_is_dfa():
    assert isinstance(fastdfa.convert(plain(), rule="dfa").fastdfa, fastdfa.DFA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "kp"}, "rule must be one of 'dfa', 'fa', .*'shallow', got 'kp'"),
        ({"rule": "fa", "feedback": "tinydfa"}, "feedback is of rule='dfa' alone"),
        ({"rule": "usf", "output": "6"}, "output is of rule='dfa' alone, got it with rule='usf'"),
        ({"rule": "shallow", "blocks": "6"}, "blocks is of rule='dfa' alone"),
        ({"rule": "fa", "allow_bypass": True}, "allow_bypass is of rule='dfa' alone"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    net = plain()
    with pytest.raises(ValueError, match=message):
        fastdfa.convert(net, **options)
    assert type(net[0]) is nn.Conv2d


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rule": "dfa"}, ValueError, "rule must be one of 'fa', .*got 'dfa'"),
        ({"scale": "biotorch"}, ValueError, "scale must be a number or one of 'xavier', 'torch'"),
        ({"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
        ({"scale": None}, TypeError, "scale must be a number or a name, got NoneType"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"seed": "1"}, TypeError, "seed must be an int or None, got str"),
        ({"module": 3}, TypeError, "module must be an nn.Module, got int"),
        ({"module": nn.Sequential(mlp([3, 4, 2]))}, ValueError, "must hold no DFA, got one at '0'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fastdfa.LayerFeedback(**{"module": nn.Identity()} | arguments)


def test_no_root_inside_another():
    inner, _ = network("fa")
    with pytest.raises(ValueError, match="must hold no LayerFeedback, got one at '0'"):
        fastdfa.DFA(nn.Sequential(inner))

    class Hidden(nn.Module):
        def forward(self, x):
            return inner(x)

    with pytest.raises(RuntimeError, match="inside another root"):
        fastdfa.DFA(Hidden())(X)
    with pytest.raises(RuntimeError, match="inside another root"):
        fastdfa.LayerFeedback(Hidden())(X)


def test_layers_of_torch_are_warned_of():
    net = nn.Sequential(nn.Linear(3, 4), fastdfa.Linear(4, 2))
    with pytest.warns(UserWarning, match="'0': no layer of fastdfa") as caught:
        fastdfa.LayerFeedback(net, "fa")
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdfa.LayerFeedback(net, "backprop")


def test_names_that_are_no_layer():
    model, _ = network("fa")
    with pytest.raises(KeyError, match=r"no layer '7'.*\['0', '1', '2'\]"):
        model.feedback_matrix("7")
