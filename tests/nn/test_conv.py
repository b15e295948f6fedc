"""Convolutions: torch's arguments and numbers, DFA's gradients in any memory format, and no input
gradient of a cut input (contracts 1, 3, 5 and 8)."""

import copy
import gc

import pytest
import torch
from helpers.formulas import ACTIVATIONS
from helpers.networks import (
    RULE,
    Apply,
    assert_close,
    blockwise_gradients,
    difference,
    gradients,
    randn,
    step,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastdfa

# Of the second of three convolutions of 4 channels, whose kernel is 3 unless it says otherwise.
ARGUMENTS = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": (2, 1), "kernel_size": (3, 2)},
    "same": {"padding": "same", "dilation": (1, 2)},
    "same, even kernel": {"padding": "same", "kernel_size": (2, 3)},
    "valid": {"padding": "valid"},
    "dilated": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1, "out_channels": 8},
    "pointwise": {"kernel_size": 1},
    "no bias": {"bias": False},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate"},
    "circular": {"padding": "same", "padding_mode": "circular", "kernel_size": 2},
}
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
X, G = randn(5, 3, 8, 7), randn(5, 3)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture(params=["fed at once", "fed in turn"])
def _workspace(request, monkeypatch):
    """Large networks are fed in turn: here as if none were small."""
    if request.param == "fed in turn":
        monkeypatch.setattr(fastdfa.engine.stages, "WORKSPACE_BYTES", {"cpu": 0})


def convolution(kind, activation="none", **options):
    """One of ours, or one of torch's with its activation behind it."""
    options = {"in_channels": 4, "out_channels": 4, "kernel_size": 3} | options
    if kind.__module__.startswith("fastdfa"):
        return kind(**options, activation=ACTIVATIONS[activation].argument())
    made = ACTIVATIONS[activation].argument()
    behind = [] if made is None else [fastdfa.activations.make(made)]
    return nn.Sequential(kind(**options), *behind)


def network(activation="tanh", arguments="padded", ours=True, size=(8, 7), format="contiguous"):
    """Three convolutions that read one another, and a linear head."""
    torch.manual_seed(3)
    conv, linear = (fastdfa.Conv2d, fastdfa.Linear) if ours else (nn.Conv2d, nn.Linear)
    options = ARGUMENTS[arguments]
    blocks = [
        convolution(conv, activation, in_channels=3, padding=1),
        convolution(conv, activation, **options),
        convolution(conv, activation, in_channels=options.get("out_channels", 4), padding=1),
    ]
    shape = nn.Sequential(*blocks)(torch.zeros(2, 3, *size)).shape
    head = nn.Sequential(nn.Flatten(), linear(shape[1:].numel(), 3))
    return nn.Sequential(*blocks, head).double().to(memory_format=FORMATS[format])


def by_definition(plain, model, x, g, **options):
    """What `gradients` of the model must be: of `plain`, each block on its own."""
    feedback = [model.feedback_matrix(name) for name in model.feedback_points]
    expected, y = blockwise_gradients(plain, x, g, feedback, **options)
    return [p for block in expected for p in block.values()], y


def check(model, plain, x=X, g=G, tolerance=1e-10, **options):
    model.zero_grad(), plain.zero_grad()
    y = step(model, x, g)
    expected, y_plain = by_definition(plain, model, x, g, **options)
    assert_close(y, y_plain, tolerance)
    found = gradients(model)
    assert len(found) == len(expected)
    for (name, actual), right in zip(found.items(), expected, strict=True):
        assert difference(actual, right) < tolerance, name


# Torch's convolutions --------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d"])
def test_without_activation_it_is_torch_s(name, arguments):
    """Same weights from a seed, same keys, same text, same bits; copies likewise."""
    first = lambda v: v[0] if name == "Conv1d" and isinstance(v, tuple) else v  # noqa: E731
    options = {"in_channels": 4, "out_channels": 4, "kernel_size": 3} | ARGUMENTS[arguments]
    options = {key: first(value) for key, value in options.items()}
    layers = []
    for library in (fastdfa, nn):
        torch.manual_seed(5)
        layers.append(getattr(library, name)(**options))
    ours, plain = layers
    assert isinstance(ours, type(plain)) and repr(ours) == repr(plain)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    shape = (2, 4, 9, 8)[: ours.weight.dim()]
    for x in (randn(*shape), randn(*shape[1:])):  # and without a batch
        x = x.float().requires_grad_()
        assert torch.equal(ours(x), plain(x))
        (expected,) = torch.autograd.grad(plain(x).sum(), x)
        assert torch.equal(torch.autograd.grad(ours(x).sum(), x)[0], expected)
    assert torch.equal(copy.deepcopy(ours)(x), plain(x))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "ReLU(inplace)", "Softsign"])
@pytest.mark.parametrize("arguments", ["padded", "same, even kernel", "depthwise", "reflect"])
def test_outside_a_dfa_it_trains_by_backprop(arguments, activation, format):
    ours = network(activation, arguments, format=format)
    plain = network(activation, arguments, ours=False, format=format)
    x, x_plain = (X.clone().to(memory_format=FORMATS[format]).requires_grad_() for _ in range(2))
    y, y_plain = ours(x), plain(x_plain)
    assert_close(y, y_plain)
    (y * G).sum().backward(), (y_plain * G).sum().backward()
    assert_close(x.grad, x_plain.grad)
    for p, right in zip(ours.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, right.grad)


def test_the_memory_format_is_torch_s():
    for format in FORMATS.values():
        for activation in (None, "relu", "gelu"):
            layer = fastdfa.Conv2d(3, 4, 3, activation=activation).to(memory_format=format)
            assert layer(X.float().to(memory_format=format)).is_contiguous(memory_format=format)


@pytest.mark.parametrize(
    "error, options",
    [
        (ValueError, {"activation": "sine"}),
        (TypeError, {"activation": 3}),
        (ValueError, {"groups": 3}),
        (ValueError, {"padding": "same", "stride": 2}),
        (TypeError, {"strides": 2}),
    ],
)
def test_arguments_that_are_not_so(error, options):
    with pytest.raises(error):
        fastdfa.Conv2d(4, 4, 3, **options)


# Gradients -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_workspace")
def test_by_the_formulas():
    """Two layers written out: every patch of the padded image times the kernel."""
    torch.manual_seed(0)
    first = fastdfa.Conv2d(3, 4, (3, 2), stride=2, padding=(1, 0), activation="tanh")
    second = fastdfa.Conv2d(4, 2, 2, activation="relu")
    head = fastdfa.Linear(2 * 3 * 2, 3)
    model = fastdfa.DFA(nn.Sequential(first, second, nn.Flatten(), head).double(), feedback=RULE)
    step(model, X, G)

    def patches(x, kernel, stride):
        """[N, C k1 k2, positions]"""
        u = x.unfold(2, kernel[0], stride).unfold(3, kernel[1], stride)
        return u.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)

    padded = torch.zeros(5, 3, 10, 7, dtype=torch.float64)
    padded[:, :, 1:-1] = X
    p1 = patches(padded, (3, 2), 2)
    h1 = torch.tanh(first.weight.detach().flatten(1) @ p1 + first.bias.detach()[:, None])
    p2 = patches(h1.unflatten(2, (4, 3)), (2, 2), 1)
    a2 = second.weight.detach().flatten(1) @ p2 + second.bias.detach()[:, None]
    d1 = (G @ model.feedback_matrix("1")).view(h1.shape) * (1 - h1 * h1)
    d2 = (G @ model.feedback_matrix("3")).view(a2.shape) * (a2 > 0)
    for layer, d, p in ((first, d1, p1), (second, d2, p2)):
        assert_close(layer.weight.grad.flatten(1), (d @ p.mT).sum(0))
        assert_close(layer.bias.grad, d.sum((0, 2)))
    assert_close(head.weight.grad, G.T @ a2.relu().flatten(1))


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "Softsign", "none"])
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments(arguments, activation, format):
    model = fastdfa.DFA(network(activation, arguments, format=format), feedback=RULE)
    x = X.to(memory_format=FORMATS[format])
    check(model, network(activation, arguments, ours=False, format=format), x)
    assert model.feedback_points == ["1", "2", "3.1"]


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, format):
    model = fastdfa.DFA(network(activation, format=format), feedback=RULE)
    x = X.to(memory_format=FORMATS[format])
    check(model, network(activation, ours=False, format=format), x)


RULES = {
    "separate": {"shared": False},
    "generated": {"dense": False},
    "separate, generated": {"shared": False, "dense": False},
    "sum": {"error": "sum"},
}


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, format):
    rule = fastdfa.Feedback(seed=4, **RULES[rule])
    model = fastdfa.DFA(network(format=format), feedback=rule)
    plain = network(ours=False, format=format)
    factor = 5 if rule.error == "sum" else 1
    check(model, plain, X.to(memory_format=FORMATS[format]), factor=factor)
    model.seed += 1
    check(model, plain, X.to(memory_format=FORMATS[format]), factor=factor)
    assert {source.seed for source, _ in model.bank._cache._channels_last} <= {5}


def between(kind):
    return {
        "pool": lambda: [nn.ReLU(), nn.MaxPool2d(2)],
        "norm": lambda: [nn.BatchNorm2d(4), nn.ReLU(inplace=True)],
        "in place": lambda: [nn.ReLU(inplace=True)],
        "permuted": lambda: [Apply(lambda h: h.transpose(2, 3))],
        "every second row": lambda: [Apply(lambda h: h[:, :, ::2])],
    }[kind]()


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["pool", "norm", "in place", "permuted", "every second row"])
def test_what_stands_between(kind, format):
    def build(conv, linear):
        torch.manual_seed(3)
        blocks = [
            nn.Sequential(conv(3, 4, 3, padding=1, bias=kind != "norm"), *between(kind)),
            nn.Sequential(conv(4, 4, 3, padding=1, bias=kind != "norm"), *between(kind)),
        ]
        shape = nn.Sequential(*blocks)(torch.zeros(2, 3, 8, 8)).shape
        head = nn.Sequential(nn.Flatten(), linear(shape[1:].numel(), 3))
        return nn.Sequential(*blocks, head).double().to(memory_format=FORMATS[format])

    x = randn(5, 3, 8, 8).to(memory_format=FORMATS[format])
    model = fastdfa.DFA(build(fastdfa.Conv2d, fastdfa.Linear), feedback=RULE)
    check(model, build(nn.Conv2d, nn.Linear), x)


@pytest.mark.usefixtures("_workspace")
def test_memory_formats_have_identical_gradients():
    """Also where only the input or only the weights are so, and as the input changes it."""
    found = []
    for x_format in FORMATS:
        for w_format in FORMATS:
            model = fastdfa.DFA(network("relu", format=w_format), feedback=RULE)
            for x in (X, X.to(memory_format=FORMATS[x_format])):
                model.zero_grad()
                step(model, x, G)
            found.append(gradients(model))
    for other in found[1:]:
        assert_close(other, found[0], 1e-13)


@pytest.mark.usefixtures("_workspace")
def test_feedback_points_of_channels_last_images():
    """FeedbackPoints and fastdfa layers cut alike; a linear layer's rows keep their own order."""

    def build(point, linear):
        torch.manual_seed(3)
        blocks = [
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), point()),
            nn.Sequential(nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(2), point()),
            nn.Sequential(linear(12, 6), nn.Tanh(), nn.Flatten()),
            nn.Sequential(linear(24, 3)),
        ]
        return nn.Sequential(*blocks).double().to(memory_format=torch.channels_last)

    model = fastdfa.DFA(build(fastdfa.FeedbackPoint, fastdfa.Linear), feedback=RULE)
    x = X.to(memory_format=torch.channels_last)
    step(model, x, G)
    points = model.feedback_points
    assert points == ["0.2", "1.3", "3.0"]
    check(model, build(nn.Identity, nn.Linear), x)


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("options", [{"features": 1}, {"rows": 2}])
def test_options_of_a_point_of_channels_last_images(options):
    """Other features than those of a whole image."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.point = fastdfa.FeedbackPoint(**options)
            self.head = nn.Linear(30, 3)

        def forward(self, x):
            h = self.point(torch.tanh(self.conv(x)))
            return self.head(
                h.flatten(2).flatten(0, 1) if "rows" in options else h[:, 0].flatten(1)
            )

    nets = [Net().double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].to(memory_format=torch.channels_last).state_dict())
    g = randn(20, 3) if "rows" in options else G
    models = [fastdfa.DFA(net, feedback=RULE) for net in nets]
    step(models[0], X.to(memory_format=torch.channels_last), g)
    step(models[1], X, g)
    assert models[0].feedback_matrix("point").shape[1] == (30 if "rows" in options else 4)
    assert_close(gradients(models[0]), gradients(models[1]))


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "silu", "none"])
def test_conv1d(activation, transposed):
    """Of sequences [N, C, L], also as the transpose of [N, L, C]."""

    def build(conv, linear):
        torch.manual_seed(3)
        blocks = [
            convolution(conv, activation, in_channels=3, padding=1, groups=1),
            convolution(conv, activation, stride=2, padding="valid"),
            convolution(conv, activation, groups=2, padding="same", kernel_size=2),
        ]
        return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), linear(16, 3))).double()

    x = randn(5, 10, 3).transpose(1, 2) if transposed else randn(5, 3, 10)
    model = fastdfa.DFA(build(fastdfa.Conv1d, fastdfa.Linear), feedback=RULE)
    check(model, build(nn.Conv1d, nn.Linear), x)


def test_an_unbatched_image_is_right_or_refused():
    """Refused where the error [C] has no row that the image could have."""
    layers = [fastdfa.Conv2d(3, 4, 3, activation="tanh"), fastdfa.Conv2d(4, 2, 3), nn.Flatten(0)]
    model = fastdfa.DFA(nn.Sequential(*layers, fastdfa.Linear(24, 3)).double(), feedback=RULE)
    x, g = X[0], G[0]
    try:
        step(model, x, g)
    except ValueError as error:
        assert "feedback point '1'" in str(error)
        return
    found = gradients(model)
    model.zero_grad()
    model.module[2] = nn.Flatten(1)
    step(model, x[None], g[None])
    assert_close(found, gradients(model))


@pytest.mark.usefixtures("_workspace")
def test_a_layer_called_twice():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fastdfa.Conv2d(3, 4, 3, padding=1, activation="tanh")
            self.loop = fastdfa.Conv2d(4, 4, 3, padding=1, activation="tanh")
            self.head = fastdfa.Linear(4 * 8 * 7, 3)

        def forward(self, x):
            return self.head(self.loop(self.loop(self.first(x))).flatten(1))

    model = fastdfa.DFA(Loop().double(), feedback=RULE)
    step(model, X, G)
    assert model.feedback_points == ["loop", "loop#2", "head"]
    expected, h = {}, X
    for name, point in (("first", "loop"), ("loop", "loop#2"), ("loop", "head")):
        layer = getattr(model.module, name)
        h = torch.tanh(nn.functional.conv2d(h.detach(), layer.weight, layer.bias, padding=1))
        signal = (G @ model.feedback_matrix(point)).view(h.shape)
        found = torch.autograd.grad(h, [layer.weight, layer.bias], signal)
        expected[name] = [a + b for a, b in zip(found, expected.get(name, (0, 0)), strict=True)]
    for name, (weight, bias) in expected.items():
        assert_close(getattr(model.module, name).weight.grad, weight)
        assert_close(getattr(model.module, name).bias.grad, bias)


# The work that is not done ---------------------------------------------------------------------


class Convolutions(TorchDispatchMode):
    """Counts convolutions, and collects which gradients their backward is asked for."""

    def __init__(self):
        super().__init__()
        self.forward, self.masks = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        self.forward += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "Softsign", "none"])
def test_no_input_gradient_of_a_cut_input(activation, format):
    """Forward and weight gradients, and the projection beside them: exactly so many FLOPs."""
    model = fastdfa.DFA(network(activation, "strided", format=format), feedback=RULE)
    x = X.to(memory_format=FORMATS[format])
    step(model, x, G)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(x)
    with Convolutions() as convolutions, FlopCounterMode(display=False) as whole:
        step(model, x, G)
    products = 2 * forward.get_total_flops()
    projection = 2 * 5 * 3 * sum(B.shape[1] for B in map(model.feedback_matrix, ("1", "2", "3.1")))
    assert products <= whole.get_total_flops() <= products + projection
    assert convolutions.forward == 3
    assert [mask[:2] for mask in convolutions.masks] == [(False, True)] * 3


@pytest.mark.usefixtures("_workspace")
def test_an_input_that_wants_its_gradient_has_it():
    model, plain = fastdfa.DFA(network(), feedback=RULE), network(ours=False)
    x, x_plain = X.clone().requires_grad_(), X.clone().requires_grad_()
    with Convolutions() as convolutions:
        step(model, x, G)
    assert sorted(mask[0] for mask in convolutions.masks) == [False, False, True]
    h = plain[0](x_plain)
    signal = (G @ model.feedback_matrix("1")).view(h.shape)
    assert_close(x.grad, torch.autograd.grad(h, x_plain, signal)[0])


@pytest.mark.parametrize("format", FORMATS)
def test_a_fused_chain_is_gated_with_its_projection(format, monkeypatch):
    """Nothing is left for autograd to gate but the layer before the flattening."""
    calls = {"project_gate": [], "gate": []}
    for name, made in calls.items():
        op = getattr(fastdfa.ops, name)

        def counted(*args, op=op, made=made, **options):
            made.append(args)
            return op(*args, **options)

        monkeypatch.setattr(fastdfa.ops, name, counted)
    model = fastdfa.DFA(network(format=format), feedback=RULE)
    step(model, X.to(memory_format=FORMATS[format]), G)
    kinds = [kind for projection in calls["project_gate"] for kind in projection[3]]
    assert sorted(kinds) == [0, 3, 3]  # the identity, for autograd; tanh
    assert len(calls["gate"]) == 1


@pytest.mark.usefixtures("_workspace")
def test_frozen_layers_have_no_gradient():
    model, plain = fastdfa.DFA(network(), feedback=RULE), network(ours=False)
    model.module[0].requires_grad_(False)
    model.module[1].weight.requires_grad_(False)
    model.module[2].bias.requires_grad_(False)
    with Convolutions() as convolutions:
        step(model, X, G)
    assert sum(mask[1] for mask in convolutions.masks) == 1
    assert not any(mask[0] for mask in convolutions.masks)
    assert list(model.feedback_points) == ["2", "3.1"]
    feedback = [torch.zeros(3, 4 * 8 * 7), *map(model.feedback_matrix, ("2", "3.1"))]
    expected, _ = blockwise_gradients(plain, X, G, feedback)
    assert_close(model.module[1].bias.grad, expected[1]["0.bias"])
    assert_close(model.module[2].weight.grad, expected[2]["0.weight"])
    frozen = (model.module[0].weight, model.module[1].weight, model.module[2].bias)
    assert all(p.grad is None for p in frozen)


# PyTorch's tools -------------------------------------------------------------------------------


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_narrow_dtypes(how, dtype, format):
    """Within the rounding of 8 or 11 bits of the gradients in float64."""
    model = fastdfa.DFA(network("gelu", format=format).float(), feedback=RULE)
    expected = fastdfa.DFA(network("gelu", format=format), feedback=RULE)
    step(expected, X, G)
    x, g = X.float().to(memory_format=FORMATS[format]), G.float()
    if how == "weights":
        model.to(dtype)
        step(model, x.to(dtype), g.to(dtype))
    else:
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
            assert y.dtype == dtype
        (y.float() * g).sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    tolerance = 3e-2 if dtype == torch.bfloat16 else 4e-3
    assert_close(gradients(model), gradients(expected), tolerance)


@pytest.fixture
def _no_compiled_code_left():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = {
    "fused": lambda: network("relu", "same, even kernel"),
    "channels last": lambda: network("tanh", "depthwise", format="channels last"),
    "reflect": lambda: network("silu", "reflect"),
    "pool": lambda: nn.Sequential(
        fastdfa.Conv2d(3, 4, 3, padding=1, activation="relu"), nn.BatchNorm2d(4), nn.MaxPool2d(2),
        fastdfa.Conv2d(4, 6, 3), nn.ReLU(inplace=True), nn.Flatten(), fastdfa.Linear(12, 3),
    ).double(),
}  # fmt: skip


@pytest.mark.usefixtures("_no_compiled_code_left")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph_for_any_batch(name):
    torch.manual_seed(0)
    eager = fastdfa.DFA(COMPILED[name](), feedback=RULE)
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    for n in (5, 4, 9, 3):
        x, g = randn(n, 3, 8, 7, seed=n), randn(n, 3)
        if name == "channels last":
            x = x.to(memory_format=torch.channels_last)
        model.zero_grad(), eager.zero_grad()
        assert_close(step(run, x, g), step(eager, x, g))
        assert_close(gradients(model), gradients(eager))
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.usefixtures("_no_compiled_code_left")
def test_inductor():
    eager = fastdfa.DFA(COMPILED["channels last"](), feedback=RULE)
    model = copy.deepcopy(eager)
    run = torch.compile(model, fullgraph=True)
    x = X.to(memory_format=torch.channels_last)
    for k in (1, 2):
        model.zero_grad(), eager.zero_grad()
        assert_close(step(run, k * x, G), step(eager, k * x, G))
        assert_close(gradients(model), gradients(eager))


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("activation", ["tanh", "gelu", "Softsign", "none"])
@pytest.mark.parametrize("arguments", ["padded", "same, even kernel", "reflect", "replicate"])
def test_activation_checkpointing(arguments, activation):
    """Which runs the layers again, uncut, and wants the same tensors saved."""

    class Checkpointed(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            for layer in self.layers[:3]:
                x = checkpoint(layer, x, use_reentrant=False)
            return self.layers[3](x)

    model = fastdfa.DFA(Checkpointed(network(activation, arguments)), feedback=RULE)
    check(model, network(activation, arguments, ours=False))


@pytest.mark.usefixtures("_workspace")
def test_a_second_derivative_is_refused():
    layers = network()
    for run in (fastdfa.DFA(layers, feedback=RULE), layers):
        y = run(X)
        (gradient,) = torch.autograd.grad((y * y).sum(), layers[0].weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("format", FORMATS)
def test_hooks_see_and_change_the_feedback(format):
    x = X.to(memory_format=FORMATS[format])
    model, plain = fastdfa.DFA(network(format=format), feedback=RULE), network(ours=False)
    seen = []

    def hook(module, args, output):
        output.register_hook(lambda gradient: seen.append(gradient.clone()) or 2 * gradient)

    model.module[1].register_forward_hook(hook)
    step(model, x, G)
    expected, _ = by_definition(plain, model, X, G)
    factors = [1, 1, 2, 2, 1, 1, 1, 1]
    for p, right, factor in zip(model.parameters(), expected, factors, strict=True):
        assert_close(p.grad, factor * right)
    assert_close(seen[0].flatten(1), G @ model.feedback_matrix("2"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "Softsign"])
@pytest.mark.usefixtures("_no_compiled_code_left")
def test_a_module_in_place_is_right_or_refused(activation, compiled):
    def build(ours):
        layers = network(activation, ours=ours)
        layers[0] = nn.Sequential(layers[0], nn.LeakyReLU(0.3, inplace=True))
        return layers

    model = fastdfa.DFA(build(True), feedback=RULE)
    plain = build(False)
    plain[0][-1].inplace = False
    run = torch.compile(model, backend="aot_eager") if compiled else model
    try:
        step(run, X, G)
    except RuntimeError as error:
        assert activation != "none", "torch's own convolution allows it"
        assert "in-place" in str(error) or "inplace" in str(error)
        return
    expected, _ = by_definition(plain, model, X, G)
    for p, right in zip(model.parameters(), expected, strict=True):
        assert_close(p.grad, right)


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("activation", ["tanh", "none"])
def test_changes_in_place_of_what_a_layer_read_are_refused(activation):
    model = fastdfa.DFA(network(activation), feedback=RULE)
    x = X.clone()
    loss = (model(x) * G).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match=r"in-?place"):
        loss.backward()

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network(activation)

        def forward(self, x):
            h = self.layers[0](x)
            out = self.layers[1](h)
            h.add_(1)
            return self.layers[3](self.layers[2](out))

    with pytest.raises(RuntimeError, match=r"in-?place"):
        step(fastdfa.DFA(Late(), feedback=RULE), X, G)


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_kept_alive(format):
    model = fastdfa.DFA(network("relu", format=format), feedback=RULE)
    x = X.to(memory_format=FORMATS[format])
    step(model, x, G)
    references = []
    for layer in model.module[:3]:
        layer.register_forward_hook(
            lambda module, args, output: references.append(StorageWeakRef(output.untyped_storage()))
        )
    gc.collect()
    gc.disable()
    try:
        loss = (model(x) * G).sum()
        assert not any(r.expired() for r in references)
        loss.backward()
        assert all(r.expired() for r in references)
    finally:
        gc.enable()


@pytest.mark.usefixtures("_workspace")
def test_an_empty_batch():
    for format in FORMATS:
        model = fastdfa.DFA(network("relu", format=format), feedback=RULE)
        step(model, X[:0].to(memory_format=FORMATS[format]), G[:0])
        assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("n", [1, 2])
def test_the_output_lies_in_memory_as_that_of_torch(n):
    """To the stride of a dimension of one: batch norm's backward in PyTorch 2.13 goes by it, and is
    wrong for any other."""
    ours, plain = (c(2, 2, 3, padding=1).double() for c in (fastdfa.Conv2d, nn.Conv2d))
    ours.activation, norm = nn.ReLU(), nn.BatchNorm2d(2).double().eval()
    model = nn.Sequential(fastdfa.Conv2d(2, 2, 1), nn.Tanh(), ours, norm, nn.Flatten())
    model = fastdfa.DFA(model.append(fastdfa.Linear(8, 3)).double(), feedback=RULE)
    outputs, x = [], randn(n, 2, 1, 4).to(memory_format=torch.channels_last)
    ours.register_forward_hook(lambda layer, args, y: outputs.append((y, plain(args[0]))))
    g = randn(n, 3)
    step(model, x, g)
    (y, right), B = outputs[0], model.feedback_matrix("5")
    assert_close(norm.bias.grad, (g @ B).reshape(n, 2, 1, 4).sum((0, 2, 3)))
    assert y.stride() == torch.relu(right).stride()
