"""`fastdfa.alignment`: cosines against an independent backprop twin of torch's own layers, and
against what is known of random directions; and that it leaves everything as it was."""

import builtins
import copy
import gc
import io
import math
import weakref

import pytest
import torch
from helpers.formulas import ACTIVATIONS, mlp_forward
from helpers.kinds import KINDS, build, by_hand, data, run
from helpers.networks import (
    RULE,
    Apply,
    assert_close,
    fresh,
    gradients,
    layers_of,
    mlp,
    randn,
    step,
)
from torch import nn

import fastdfa


def product(y, g):
    """A loss whose error is g."""
    return (y * g).sum()


def cosine(a, b):
    """Of each row of two matrices, by its definition; NaN where a row is zero."""
    return (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt())


def twin(kind, model, inputs, g):
    """True gradients at every point and of every parameter, by torch's own layers, uncut."""
    of, cuts = by_hand(cuts=False)
    plain = KINDS[kind][0](of).to(g.dtype).train(model.training)
    plain.load_state_dict(model.module.state_dict())
    y = plain(*inputs)
    for x in cuts.tensors:
        x.retain_grad()
    product(y, g).backward()
    return [x.grad for x in cuts.tensors], gradients(plain)


def expected_cosines(model, true, g):
    """At every point of the last pass of `model`, from the true gradients there."""
    e = g.reshape(-1, g.shape[-1])
    fed = [e @ model.feedback_matrix(name) for name in model.feedback_points]
    return [cosine(t.reshape(len(e), -1), f) for t, f in zip(true, fed, strict=True)]


# The cosines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_agrees_with_a_twin(kind, training):
    model = build(kind).train(training)
    inputs, g = data(kind)
    report = fastdfa.alignment(model, product, inputs, g, weights=True)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    true, true_weights = twin(kind, copy.deepcopy(model), inputs, g)
    run(model, inputs, g)
    assert [point.name for point in report.points] == model.feedback_points
    for point, cosines in zip(report.points, expected_cosines(model, true, g), strict=True):
        torch.testing.assert_close(point.cosines, cosines, atol=1e-9, rtol=0, equal_nan=True)
        known = cosines[~cosines.isnan()]
        assert point.mean == pytest.approx(known.mean().item(), abs=1e-9)
        assert point.std == pytest.approx(known.std(correction=0).item(), abs=1e-9)
        assert point.degrees == pytest.approx(known.acos().rad2deg().mean().item(), abs=1e-6)
        assert point.zero_rows == len(cosines) - len(known)
    by_feedback = gradients(model)
    assert report.weights.keys() == by_feedback.keys() == true_weights.keys()
    for name, found in report.weights.items():
        a, b = (each[name].reshape(1, -1) for each in (true_weights, by_feedback))
        assert found == pytest.approx(cosine(a, b).item(), abs=1e-9), name
    if training and kind in ("cnn", "resnet"):  # so the batch norm had something to restore
        assert any(not torch.equal(buffers[n], b) for n, b in model.named_buffers())


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_behind_the_local_derivative(activation):
    """The cosine between the deltas d_l = g * f'(a_l), true and fed."""
    model, x, g = mlp([5, 16, 12, 3], activation), randn(6, 5), randn(6, 3, seed=1)
    report = fastdfa.alignment(model, product, x, g, gated=True)
    step(model, x, g)
    layers = layers_of(model)
    pre, _ = mlp_forward(layers, x)
    true = g
    expected = []
    for layer, above, a in zip(layers[-2::-1], layers[:0:-1], pre[-2::-1], strict=True):
        derivative = ACTIVATIONS[layer.activation].derivative(a)
        true = (true @ above.weight.double()) * derivative
        name = model.feedback_points[len(layers) - 2 - len(expected)]
        expected.append(cosine(true, (g @ model.feedback_matrix(name)) * derivative))
    for point, cosines in zip(report.points, expected[::-1], strict=True):
        torch.testing.assert_close(point.gated, cosines, atol=1e-9, rtol=0, equal_nan=True)


def test_a_convolution_behind_its_derivative():
    layers = [fastdfa.Conv2d(2, 4, 3, activation="relu"), nn.Flatten(), fastdfa.Linear(64, 3)]
    layers.insert(1, fastdfa.Conv2d(4, 4, 1))
    model = fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE)
    x, g = randn(5, 2, 6, 6), randn(5, 3, seed=1)
    report = fastdfa.alignment(model, product, x, g, gated=True)
    assert report["3"].gated is None  # the output of a layer without an activation of its own
    model(x)
    h = torch.relu(nn.functional.conv2d(x, layers[0].weight, layers[0].bias))
    h = h.detach().requires_grad_()
    product(model.module[3](model.module[1](h).flatten(1)), g).backward()
    fed = (g @ model.feedback_matrix("1")).view_as(h)
    true, fed = (((gradient * (h > 0)).flatten(1)) for gradient in (h.grad, fed))
    torch.testing.assert_close(report["1"].gated, cosine(true, fed), atol=1e-9, rtol=0)


def test_random_directions_have_cosines_of_mean_zero_and_variance_one_over_n():
    """At initialisation B is independent of the network, and e B with normal entries has a uniform
    direction in n dimensions: its cosine with anything fixed has variance 1/n."""
    n, draws = 64, 500
    torch.manual_seed(3)
    module = nn.Sequential(fastdfa.Linear(5, n, activation="tanh"), fastdfa.Linear(n, 4)).double()
    x, y = randn(1, 5), torch.tensor([2])
    cosines = torch.cat([
        fastdfa.alignment(
            fastdfa.DFA(module, feedback=fastdfa.Feedback(seed=seed)),
            nn.functional.cross_entropy, x, y,
        )["1"].cosines
        for seed in range(draws)
    ])  # fmt: skip
    assert abs(cosines.mean()) < 4 / math.sqrt(n * draws)
    assert abs(n * cosines.square().mean() - 1) < 4 * math.sqrt(2 / draws)


def test_a_matrix_that_is_the_transposed_head_is_aligned():
    """With B_l = W^T the feedback is the true gradient: set B's own values as the head."""
    model = mlp([5, 8, 3])
    x, g = randn(6, 5), randn(6, 3)
    model(x)
    with torch.no_grad():
        model.module[1].weight.copy_(model.feedback_matrix("1"))
    point = fastdfa.alignment(model, product, x, g)["1"]
    torch.testing.assert_close(point.cosines, torch.ones(6, dtype=torch.float64))
    assert point.degrees == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "rule",
    [{"error": "sum"}, {"shared": False}, {"dense": False}, {"scale": "drtp"}],
    ids=lambda rule: next(iter(rule)),
)
def test_rules_of_feedback(rule):
    model = build("cnn", feedback=fastdfa.Feedback(seed=1, **rule))
    inputs, g = data("cnn")
    report = fastdfa.alignment(model, product, inputs, g)
    true, _ = twin("cnn", copy.deepcopy(model), inputs, g)
    model(*inputs)
    for point, cosines in zip(report.points, expected_cosines(model, true, g), strict=True):
        torch.testing.assert_close(point.cosines, cosines, atol=1e-7, rtol=0)


def test_channels_last():
    model, (inputs, g) = build("cnn"), data("cnn")
    plain = fastdfa.alignment(model, product, inputs, g)
    inputs = [x.to(memory_format=torch.channels_last) for x in inputs]
    permuted = fastdfa.alignment(
        model.to(memory_format=torch.channels_last), product, tuple(inputs), g
    )
    for a, b in zip(plain.points, permuted.points, strict=True):
        torch.testing.assert_close(a.cosines, b.cosines, atol=1e-9, rtol=0)


def test_one_feedback_for_all_positions():
    """features=1: every position of a channel receives the same."""
    first, last = nn.Conv2d(2, 4, 3), nn.Linear(4 * 16, 3)
    point = fastdfa.FeedbackPoint(features=1)
    model = fastdfa.DFA(nn.Sequential(first, point, nn.Flatten(), last).double(), feedback=RULE)
    x, g = randn(5, 2, 6, 6), randn(5, 3, seed=1)
    found = fastdfa.alignment(model, product, x, g)["1"].cosines
    model(x)
    true = (g @ last.weight.detach()).view(5, 4, 16)
    fed = (g @ model.feedback_matrix("1"))[:, :, None].expand(5, 4, 16)
    torch.testing.assert_close(found, cosine(true.flatten(1), fed.flatten(1)), atol=1e-9, rtol=0)


def test_rows_that_a_point_names():
    layers = [nn.Linear(5, 8), fastdfa.FeedbackPoint(rows=2), nn.Flatten(0, 1), nn.Linear(8, 3)]
    model = fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE)
    x, g = randn(2, 4, 5), randn(8, 3, seed=1)
    found = fastdfa.alignment(model, product, x, g)["1"].cosines
    model(x)
    expected = cosine(g @ layers[3].weight.detach(), g @ model.feedback_matrix("1"))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_several_readers_of_one_tensor_are_one_point():
    class Readers(nn.Module):
        def __init__(self):
            super().__init__()
            self.below = nn.Linear(5, 8)
            self.q, self.k, self.out = (fastdfa.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            h = self.below(x)
            return self.out(self.q(h) * self.k(h))

    model = fastdfa.DFA(Readers().double(), feedback=RULE)
    x, g = randn(6, 5), randn(6, 8, seed=1)
    report = fastdfa.alignment(model, product, x, g, weights=True)
    step(model, x, g)
    assert [point.name for point in report.points] == model.feedback_points == ["q", "out"]
    dfa = gradients(model)
    h = model.module.below(x).detach().requires_grad_()
    product(model.module.out(model.module.q(h) * model.module.k(h)), g).backward()
    expected = cosine(h.grad, g @ model.feedback_matrix("q"))
    torch.testing.assert_close(report["q"].cosines, expected, atol=1e-9, rtol=0)
    weight = (h.grad.T @ x).reshape(1, -1)
    expected = cosine(weight, dfa["below.weight"].reshape(1, -1)).item()
    assert report.weights["below.weight"] == pytest.approx(expected, abs=1e-9)


def test_a_parameter_can_be_a_point():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(randn(6, 8))
            self.layer = fastdfa.Linear(8, 3)

        def forward(self, x):
            return self.layer(self.queries) + x

    model = fastdfa.DFA(Queries().double(), feedback=RULE)
    x, g = randn(6, 3), randn(6, 3, seed=1)
    report = fastdfa.alignment(model, product, x, g, weights=True)
    step(model, x, g)
    expected = cosine(g @ model.module.layer.weight.detach(), model.module.queries.grad)
    torch.testing.assert_close(report["layer"].cosines, expected, atol=1e-9, rtol=0)
    assert report.weights["layer.weight"] == pytest.approx(1)
    assert -1 < report.weights["queries"] < 1


def test_a_tap_and_a_model_that_computes_its_loss():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                fastdfa.Linear(5, 8, activation="tanh"), fastdfa.Linear(8, 4, activation="tanh")
            )
            self.head = fastdfa.Linear(4, 9)

        def forward(self, x, labels):
            return {"loss": nn.functional.cross_entropy(self.head(self.body(x)), labels)}

    model = fastdfa.DFA(WithLoss().double(), feedback=RULE, output="body")
    x, labels = randn(6, 5), torch.arange(6)
    report = fastdfa.alignment(
        model, lambda out, _: out["loss"], {"x": x, "labels": labels}, None, weights=True
    )
    model(x, labels)["loss"].backward()
    assert [point.name for point in report.points] == model.feedback_points == ["body.1"]
    plain = copy.deepcopy(model.module)
    h = torch.tanh(nn.functional.linear(x, plain.body[0].weight, plain.body[0].bias))
    h = h.detach().requires_grad_()
    y = plain.body[1](h)
    loss = nn.functional.cross_entropy(plain.head(y), labels)
    true, e = torch.autograd.grad(loss, [h, y])
    expected = cosine(true, e @ model.feedback_matrix("body.1"))
    torch.testing.assert_close(report["body.1"].cosines, expected, atol=1e-9, rtol=0)
    # Behind the tap, and in the last layer before it, both gradients are the true one.
    for name in ("head.weight", "head.bias", "body.1.weight", "body.1.bias"):
        assert report.weights[name] == pytest.approx(1), name


def test_several_roots_in_one_model():
    model = nn.Sequential(mlp([5, 8, 4]), nn.Tanh(), mlp([4, 8, 3]))
    x, g = randn(6, 5), randn(6, 3, seed=1)
    report = fastdfa.alignment(model, product, x, g)
    assert [point.name for point in report.points] == ["0.1", "2.1"]
    # The second root is cut at none of its inputs, so that the first has a true error.
    h = model[1](model[0](x).detach())
    alone = fastdfa.alignment(model[2], product, h, g)
    torch.testing.assert_close(report["2.1"].cosines, alone["1"].cosines)


@pytest.mark.filterwarnings("ignore:the true gradient of the output trains")
def test_a_bypass_is_measured_as_it_trains():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.inner, self.head = (
                nn.Linear(5, 5), fastdfa.Linear(5, 5), nn.Linear(5, 3)
            )  # fmt: skip

        def forward(self, x):
            h = self.below(x)
            return self.head(h + self.inner(h))

    model = fastdfa.DFA(Residual().double(), feedback=RULE, allow_bypass=True)
    x, g = randn(6, 5), randn(6, 3, seed=1)
    report = fastdfa.alignment(model, product, x, g, weights=True)
    step(model, x, g)
    dfa = gradients(model)
    with fastdfa.backprop(model):
        true = fresh(model, x, g)
    for name, found in report.weights.items():
        expected = cosine(true[name].reshape(1, -1), dfa[name].reshape(1, -1)).item()
        assert found == pytest.approx(expected, abs=1e-9), name


def test_a_module_that_is_modified_in_place_behind_a_point():
    layers = [
        nn.Linear(5, 8), fastdfa.FeedbackPoint(), Apply(lambda h: h.mul_(2)), nn.Linear(8, 3)
    ]  # fmt: skip
    model = fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE)
    x, g = randn(6, 5), randn(6, 3, seed=1)
    report = fastdfa.alignment(model, product, x, g, weights=True)
    step(model, x, g)
    true = 2 * g @ layers[3].weight.detach()
    expected = cosine(true, g @ model.feedback_matrix("1"))
    torch.testing.assert_close(report["1"].cosines, expected, atol=1e-9, rtol=0)
    weight = cosine((true.T @ x).reshape(1, -1), layers[0].weight.grad.reshape(1, -1)).item()
    assert report.weights["0.weight"] == pytest.approx(weight, abs=1e-9)


def test_dropout_has_one_mask():
    """The true gradient and the feedback are those of one pass; a second mask would show."""
    layers = [fastdfa.Linear(5, 64, activation="tanh"), nn.Dropout(0.5), fastdfa.Linear(64, 3)]
    model = fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE)
    x, g = randn(6, 5), randn(6, 3, seed=1)
    torch.manual_seed(5)
    report = fastdfa.alignment(model, product, x, g, weights=True)
    torch.manual_seed(5)
    step(model, x, g)
    dfa = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    with fastdfa.backprop(model):
        step(model, x, g)
    true = gradients(model)
    for name, found in report.weights.items():
        expected = cosine(true[name].reshape(1, -1), dfa[name].reshape(1, -1)).item()
        assert found == pytest.approx(expected, abs=1e-9), name


def test_single_precision_and_gradients_whose_squares_underflow():
    torch.manual_seed(0)
    model, x, g = mlp([5, 8, 7, 3], dtype=torch.float32), randn(6, 5), randn(6, 3, seed=1)
    double = copy.deepcopy(model).double()
    expected = fastdfa.alignment(double, product, x, g)
    small = fastdfa.alignment(model, product, x.float(), 1e-30 * g.float())
    for a, b in zip(small.points, expected.points, strict=True):
        assert a.zero_rows == b.zero_rows
        torch.testing.assert_close(a.cosines, b.cosines, atol=1e-5, rtol=0)


def test_autocast_is_for_the_forward_pass_alone():
    """torch recommends to run backward passes outside of it, and so training does."""
    model, seen = mlp([5, 8, 3], dtype=torch.float32), []

    def loss_fn(y, g):
        seen.append((torch.is_autocast_enabled("cpu"), y.dtype))
        y.register_hook(lambda gradient: seen.append(torch.is_autocast_enabled("cpu")))
        return product(y, g)

    with torch.autocast("cpu", torch.bfloat16):
        report = fastdfa.alignment(
            model, loss_fn, randn(6, 5).float(), randn(6, 3).float(), weights=True
        )
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(True, torch.bfloat16), False, False]
    assert report.weights["1.weight"] == pytest.approx(1, abs=1e-2)


# Rows that are zero ----------------------------------------------------------------------------


def test_rows_without_a_gradient_have_no_cosine():
    model, x, g = mlp([5, 8, 3]), randn(6, 5), randn(6, 3, seed=1)
    everything = fastdfa.alignment(model, product, x, g)["1"]
    g[[1, 4]] = 0
    point = fastdfa.alignment(model, product, x, g)["1"]
    assert point.cosines.isnan().tolist() == [False, True, False, False, True, False]
    assert point.zero_rows == 2
    kept = everything.cosines[[0, 2, 3, 5]]
    assert point.mean == pytest.approx(kept.mean().item(), abs=1e-12)
    assert point.std == pytest.approx(kept.std(correction=0).item(), abs=1e-12)


def test_a_true_gradient_of_zero_is_no_perfect_alignment():
    model, x, g = mlp([5, 8, 3]), randn(6, 5), randn(6, 3, seed=1)
    with torch.no_grad():
        model.module[1].weight.zero_()
    report = fastdfa.alignment(model, product, x, g, weights=True)
    point = report["1"]
    assert point.zero_rows == 6 and point.cosines.isnan().all()
    assert all(map(math.isnan, (point.mean, point.std, point.degrees)))
    assert math.isnan(report.weights["0.weight"])
    assert "nan" in str(report)


# What is left as it was ------------------------------------------------------------------------


def test_everything_stays_as_it_was():
    layers = [
        fastdfa.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.Flatten(), fastdfa.Linear(144, 8, activation="tanh"), fastdfa.Linear(8, 3),
    ]  # fmt: skip
    model = fastdfa.DFA(nn.Sequential(*layers), feedback=RULE)
    model.module[3].eval()
    x, y = randn(6, 2, 6, 6, dtype=torch.float32), torch.arange(6) % 3
    nn.functional.cross_entropy(model(x), y).backward()
    model.module[0].weight.grad = None
    state, grads = copy.deepcopy(model.state_dict()), gradients(model)
    modes = [module.training for module in model.modules()]
    random, points = torch.random.get_rng_state(), model.feedback_points
    fastdfa.alignment(model, nn.functional.cross_entropy, x, y, gated=True, weights=True)
    assert all(torch.equal(state[name], now) for name, now in model.state_dict().items())
    for name, now in gradients(model).items():
        assert now is None if grads[name] is None else torch.equal(now, grads[name]), name
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.random.get_rng_state())
    assert model.feedback_points == points


def test_a_buffer_that_two_modules_share():
    """Both write to one tensor inside, as in training, and that is none of theirs."""
    seen = []

    class Count(nn.Module):
        def forward(self, x):
            self.calls.add_(1)
            seen.append(self.calls)
            return x

    first, second = Count(), Count()
    first.register_buffer("calls", torch.zeros(()))
    second.register_buffer("calls", first.calls)
    model = mlp([5, 8, 3])
    model.module.insert(1, first)
    model.module.insert(3, second)
    fastdfa.alignment(model, product, randn(6, 5), randn(6, 3))
    assert seen[0] is seen[1] and seen[0].item() == 2
    assert first.calls is second.calls and first.calls._version == 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_without_it(kind):
    """Before the first pass of a model, and between two."""
    inputs, g = data(kind)
    plain, measured = build(kind), build(kind)
    for _ in range(3):
        fastdfa.alignment(measured, product, inputs, g, weights=True)
        expected, found = run(plain, inputs, g), run(measured, inputs, g)
        assert torch.equal(expected, found)
    assert_close(gradients(measured), gradients(plain), 1e-14)


def test_it_does_not_stand_in_for_the_check_of_the_first_pass():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.inner = nn.Linear(5, 5), fastdfa.Linear(5, 5)

        def forward(self, x):
            h = self.below(x)
            return h + self.inner(h)

    model = fastdfa.DFA(Residual().double(), feedback=RULE)
    fastdfa.alignment(model, product, randn(6, 5), randn(6, 5))
    with pytest.raises(RuntimeError, match="cut"):
        model(randn(6, 5))


def test_nothing_is_kept_alive():
    model = mlp([5, 8, 7, 3])
    seen = []
    watch = model.module[0].register_forward_hook(
        lambda layer, args, out: seen.append(weakref.ref(out))
    )
    gc.disable()
    try:
        fastdfa.alignment(model, product, randn(6, 5), randn(6, 3), gated=True, weights=True)
        assert len(seen) == 1 and seen[0]() is None
    finally:
        gc.enable()
        watch.remove()


def test_an_error_leaves_no_trace(model):
    expected = fresh(model)
    for loss in (lambda y, g: y, lambda y, g: 1 / 0):
        with pytest.raises((ValueError, ZeroDivisionError)):
            fastdfa.alignment(model, loss, randn(6, 5), randn(6, 3))
    assert_close(fresh(model), expected, 1e-14)


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "backprop"])
def test_inside_other_contexts(context, model):
    x, g = randn(6, 5), randn(6, 3)
    expected = fastdfa.alignment(model, product, x, g)
    inside = {
        "no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
        "backprop": lambda: fastdfa.backprop(model),
    }[context]  # fmt: skip
    with inside():
        found = fastdfa.alignment(model, product, x, g)
        assert torch.is_grad_enabled() == (context == "backprop")
    for a, b in zip(found.points, expected.points, strict=True):
        torch.testing.assert_close(a.cosines, b.cosines, equal_nan=True)


def test_a_compiled_model_is_measured_eagerly(model):
    x, g = randn(6, 5), randn(6, 3)
    expected = fastdfa.alignment(model, product, x, g)
    found = fastdfa.alignment(torch.compile(model, backend="eager"), product, x, g)
    for a, b in zip(found.points, expected.points, strict=True):
        assert torch.equal(a.cosines.nan_to_num(), b.cosines.nan_to_num())


# Bad input -------------------------------------------------------------------------------------


def refused(error, match, *args, **options):
    with pytest.raises(error, match=match):
        fastdfa.alignment(*args, **options)


def test_bad_arguments(model):
    x, g = randn(6, 5), randn(6, 3)
    refused(TypeError, "model must be an nn.Module, got list", [], product, x, g)
    refused(TypeError, "loss_fn must be callable, got float", model, 0.5, x, g)
    refused(ValueError, "model must hold a fastdfa.DFA, got Linear", nn.Linear(5, 3), product, x, g)
    refused(TypeError, "loss_fn must return a tensor, got float", model, lambda y, g: 1.0, x, g)
    refused(ValueError, r"scalar, got shape \(6, 3\)", model, lambda y, g: y, x, g)
    refused(ValueError, "loss_fn must depend", model, lambda y, g: g.sum(), x, g)
    refused(
        ValueError, "loss_fn must depend", model,
        lambda y, g: sum(p.sum() for p in model.parameters()), x, g,
    )  # fmt: skip
    refused(ValueError, "at least one row", model, product, x[:0], g[:0])
    bad = g.clone()
    bad[0, 0] = math.inf
    refused(ValueError, "at feedback point '1' is not finite", model, product, x, bad)
    frozen = mlp([5, 8, 3]).requires_grad_(False)
    frozen.module[1].requires_grad_(True)
    refused(ValueError, "must have feedback points", frozen, product, x, g)


def test_a_root_is_called_once(model):
    x, g = randn(6, 5), randn(6, 3)
    never = nn.ModuleDict({"root": model, "other": nn.Linear(5, 3).double()})
    never.forward = never["other"].forward
    refused(ValueError, "must call the DFA 'root' once", never, product, x, g)
    twice = nn.ModuleDict({"root": model})
    twice.forward = lambda x: model(x) + model(x)
    refused(ValueError, "called a DFA twice", twice, product, x, g)


def test_an_unknown_point(model):
    report = fastdfa.alignment(model, product, randn(6, 5), randn(6, 3))
    assert report["2"] is report.points[1]
    with pytest.raises(KeyError, match="no feedback point '7'; there are"):
        report["7"]


# What is shown ---------------------------------------------------------------------------------


def test_tables(model):
    from rich.console import Console

    report = fastdfa.alignment(model, product, randn(6, 5), randn(6, 3), weights=True)
    lines = str(report).splitlines()
    assert lines[0].split() == ["point", "rows", "cosine", "std", "degrees", "zero", "rows"]
    for line, point in zip(lines[1:3], report.points, strict=True):
        name, rows, mean, std, degrees, zero = line.split()
        assert (name, int(rows), int(zero)) == (point.name, 6, point.zero_rows)
        shown = [point.mean, point.std, point.degrees]
        assert [float(mean), float(std), float(degrees)] == pytest.approx(shown, abs=0.06)
    assert len(lines) == 3 + 1 + 1 + 6
    console = Console(file=io.StringIO(), width=100)
    console.print(report)
    text = console.file.getvalue()
    assert all(f"{point.mean:.3f}" in text for point in report.points) and "0.weight" in text


def test_the_plot_shows_every_row(model):
    pytest.importorskip("matplotlib")
    report = fastdfa.alignment(model, product, randn(6, 5), randn(6, 3))
    (axes,) = report.plot().axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1", "2"]
    for patch, point in zip(axes.patches, reversed(report.points), strict=True):
        heights = patch.get_xy()[:, 1]
        assert heights.max() >= 1
        assert len(point.cosines) - point.zero_rows == round(_histogram_total(heights))


def _histogram_total(heights):
    """Of the outline of a histogram: every bin has two corners at its height."""
    return heights[1:-1].sum() / 2


def test_without_matplotlib(model, monkeypatch):
    report = fastdfa.alignment(model, product, randn(6, 5), randn(6, 3))
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install fastdfa"):
        report.plot()


# The monitor -----------------------------------------------------------------------------------


def test_a_monitor_measures_every_so_many_steps():
    model = mlp([5, 32, 32, 3], dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x, y = randn(64, 5, dtype=torch.float32), torch.arange(64) % 3
    monitor = fastdfa.AlignmentMonitor(model, nn.functional.cross_entropy, every=40)
    for k in range(161):
        assert (monitor(x, y) is not None) == (k % 40 == 0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert [step for step, _ in monitor.history] == [0, 40, 80, 120, 160]
    now = fastdfa.alignment(model, nn.functional.cross_entropy, x, y)
    last = monitor(x, y)
    assert last is None and monitor.step == 162
    # Training aligns the weights with the feedback (the point of DFA).
    first, last = monitor.history[0][1], monitor.history[-1][1]
    assert last["2"].mean > first["2"].mean + 0.2 and last["2"].mean > 0.3
    assert abs(now["2"].mean - last["2"].mean) < 0.1


def test_the_plot_of_a_monitor(model):
    pytest.importorskip("matplotlib")
    monitor = fastdfa.AlignmentMonitor(model, product, every=1)
    with pytest.raises(ValueError, match="measured nothing yet"):
        monitor.plot()
    for seed in range(3):
        monitor(randn(6, 5, seed=seed), randn(6, 3, seed=seed))
    left, right = monitor.plot().axes
    lines = [line for line in left.lines if not line.get_label().startswith("_")]
    for line, name in zip(lines, ["1", "2"], strict=True):
        assert line.get_label() == name
        assert line.get_xdata().tolist() == [0, 1, 2]
        means = [measured[name].mean for _, measured in monitor.history]
        assert line.get_ydata().tolist() == pytest.approx(means)
    assert right.get_title(loc="left") == "step 2"


def test_bad_arguments_of_a_monitor(model):
    def monitor(*args, **options):
        fastdfa.AlignmentMonitor(*args, **options)

    with pytest.raises(TypeError, match="every must be an int, got float"):
        monitor(model, product, every=1.5)
    with pytest.raises(ValueError, match="every must be a positive int, got 0"):
        monitor(model, product, every=0)
    with pytest.raises(ValueError, match="model must hold a fastdfa"):
        monitor(nn.Linear(2, 2), product)
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        monitor(model, None)


@pytest.mark.parametrize("anchor", [None, 2])
def test_a_layer_behind_a_point_makes_no_other(anchor):
    layers = [fastdfa.Linear(4, 6, activation="tanh"), nn.Linear(6, 6), fastdfa.FeedbackPoint()]
    network = nn.Sequential(*layers, fastdfa.Linear(6, 3))
    model, x = fastdfa.DFA(network, fastdfa.Feedback(anchor=anchor)), torch.randn(5, 4)
    for _ in range(3):
        model(x).square().sum().backward()
        assert model.feedback_points == ["2"]
    measured = fastdfa.alignment(model, nn.functional.mse_loss, x, torch.zeros(5, 3))
    assert [point.name for point in measured.points] == ["2"]
