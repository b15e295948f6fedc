"""Every kind of network, where its error is taken, and how its points are fed (contract 2 to 5)."""

import pytest
import torch
from helpers.kinds import KINDS, build, data, definition, run
from helpers.networks import RULE, assert_close, gradients, randn, step
from torch import nn

import fastdfa


def parameters(model):
    return dict(model.module.named_parameters())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, mode):
    """Are those of the definition; nothing is left out, and nothing is warned about."""
    model = build(kind)
    getattr(model, mode)()
    inputs, g = data(kind)
    y = run(model, inputs, g)
    y_expected, expected = definition(kind, model, inputs, g)
    assert_close(y, y_expected)
    assert_close(gradients(model), expected)
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())


# How a point is fed --------------------------------------------------------------------------


def true_gradients(output, model, signal):
    """Of the parameters of the first layers of `model`, where their output receives `signal`."""
    found = [p for p in model.module[0].parameters()]
    return dict(zip("wb", torch.autograd.grad(output, found, signal), strict=True))


def of_the_first(model):
    return dict(zip("wb", (p.grad for p in model.module[0].parameters()), strict=True))


def image_model(**options):
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1)
    return fastdfa.DFA(
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.Tanh(), fastdfa.FeedbackPoint(**options), pool, nn.Flatten(),
            nn.Linear(4, 3),
        ).double(),
        feedback=RULE,
    )  # fmt: skip


def test_a_point_by_rows():
    """Tokens [N, T, n] under an error [N, T, C]: e B_l for each token."""
    layers = [nn.Linear(5, 8), nn.Tanh(), fastdfa.FeedbackPoint(), nn.Linear(8, 3)]
    model = fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE)
    x, g = randn(4, 6, 5), randn(4, 6, 3)
    step(model, x, g)
    B = model.feedback_matrix("2")
    assert B.shape == (3, 8)
    expected = true_gradients(model.module[:2](x), model, torch.einsum("ntc,cj->ntj", g, B))
    assert_close(of_the_first(model), expected)


def test_a_flattened_point():
    """An image [N, n, H, W] under an error [N, C]: e B_l, as the features n H W."""
    model = image_model()
    x, g = randn(5, 2, 6, 7), randn(5, 3)
    step(model, x, g)
    B = model.feedback_matrix("2")
    assert B.shape == (3, 4 * 4 * 5)
    signal = torch.einsum("nc,cjhw->njhw", g, B.reshape(3, 4, 4, 5))
    assert_close(of_the_first(model), true_gradients(model.module[:2](x), model, signal))


@pytest.mark.parametrize("features", [1, -3])
def test_a_point_whose_positions_receive_the_same(features):
    """An image [N, n, H, W] under an error [N, C]: e B_l / sqrt(H W) everywhere."""
    model = image_model(features=features)
    for height, width in ((6, 7), (3, 5)):  # the number of positions may change
        x, g = randn(5, 2, height, width), randn(5, 3)
        model.zero_grad()
        step(model, x, g)
        B = model.feedback_matrix("2")
        assert B.shape == (3, 4)
        h = model.module[:2](x)
        scale = ((height - 2) * (width - 2)) ** -0.5
        signal = scale * torch.einsum("nc,cj->nj", g, B)[:, :, None, None].expand_as(h)
        assert_close(of_the_first(model), true_gradients(h, model, signal))


def test_positions_of_a_sequence():
    """[N, T, n] under an error [N, C]."""
    last = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    layers = [nn.Linear(5, 8), nn.Tanh(), fastdfa.FeedbackPoint(features=-1), last]
    model = fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE)
    x, g = randn(6, 4, 5), randn(6, 3)
    step(model, x, g)
    signal = (g @ model.feedback_matrix("2"))[:, None].expand(6, 4, 8) / 2
    assert_close(of_the_first(model), true_gradients(model.module[:2](x), model, signal))


def test_positions_behind_two_dimensions_of_rows():
    """[N, T, h, n] under an error [N, T, C], for every token the same in h positions."""
    split, point = nn.Unflatten(-1, (4, 2)), fastdfa.FeedbackPoint(rows=2, features=3)
    layers = [nn.Linear(5, 8), split, point, nn.Flatten(2), nn.Linear(8, 3)]
    model = fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE)
    x, g = randn(6, 4, 5), randn(6, 4, 3)
    step(model, x, g)
    signal = (g @ model.feedback_matrix("2"))[:, :, None].expand(6, 4, 4, 2) / 2
    assert_close(of_the_first(model), true_gradients(model.module[:2](x), model, signal))


def test_a_point_without_positions():
    """[N, n] with features=1 is fed as without it."""
    layers = [nn.Linear(5, 8), nn.Tanh(), fastdfa.FeedbackPoint(features=1), nn.Linear(8, 3)]
    model = fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE)
    x, g = randn(6, 5), randn(6, 3)
    step(model, x, g)
    signal = g @ model.feedback_matrix("2")
    assert_close(of_the_first(model), true_gradients(model.module[:2](x), model, signal))


@pytest.mark.parametrize("options", [{}, {"features": 1}])
def test_the_feedback_of_a_sample_is_equally_long(options):
    """With the default scale |e| / sqrt(C) on average, flattened or the same everywhere."""
    net, squares = image_model(**options).module, []
    net[1].register_forward_hook(
        lambda module, args, h: h.register_hook(lambda f: squares.append(f.square().sum())) and None
    )
    x, g = randn(1, 2, 6, 6), randn(1, 3)
    for seed in range(120):
        step(fastdfa.DFA(net, feedback=fastdfa.Feedback(seed=seed)), x, g)
    assert abs(torch.stack(squares).mean() / (g.square().sum() / 3) - 1) < 0.2


@pytest.mark.parametrize("options, shape", [
    ({"features": 1}, (6,)), ({"features": 0}, (6, 5)), ({"features": -2}, (6, 5)),
    ({"features": 2}, (6, 5)), ({"features": 1, "rows": 2}, (6, 5, 4)),
])  # fmt: skip
def test_features_that_are_no_dimension_behind_the_rows(options, shape):
    with pytest.raises(ValueError, match=rf"features={options['features']} .*rows.*{shape[0]}"):
        fastdfa.FeedbackPoint(**options)(randn(*shape))


def test_positions_under_an_error_of_tokens_are_refused():
    """They would be rows: one point [N, T, n] has no N * T."""
    layers = [nn.Linear(5, 8), fastdfa.FeedbackPoint(features=-1), nn.Linear(8, 3)]
    with pytest.raises(ValueError, match=r"'1'.*rows.*6, 4"):
        fastdfa.DFA(nn.Sequential(*layers).double())(randn(6, 4, 5))


# Where the error is taken --------------------------------------------------------------------


class Heads(nn.Module):
    """Two heads, whose concatenated output is tapped."""

    def __init__(self):
        super().__init__()
        self.one, self.two = fastdfa.Linear(7, 3), fastdfa.Linear(7, 2)

    def forward(self, h):
        return torch.cat([self.one(h), self.two(h)], -1)


class TwoTasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            fastdfa.Linear(5, 8, activation="tanh"), fastdfa.Linear(8, 7, activation="tanh")
        )
        self.heads = Heads()

    def forward(self, x):
        y = self.heads(self.body(x))
        return {"one": y[:, :3], "two": y[:, 3:]}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tasks", ["one", "two", "one two"])
def test_several_heads_have_one_error(tasks):
    """[e_1, e_2], which is 0 where a head has no loss."""
    model = fastdfa.DFA(TwoTasks().double(), feedback=RULE, output="heads")
    x, errors = randn(6, 5), {"one": randn(6, 3), "two": randn(6, 2, seed=2)}
    y = model(x)
    sum((y[task] * errors[task]).sum() for task in tasks.split()).backward()
    for task in errors:
        errors[task] = errors[task] * (task in tasks)
    e = torch.cat([errors["one"], errors["two"]], -1)
    assert model.feedback_points == ["body.1", "heads.one"]
    p, B = parameters(model), model.feedback_matrix
    h = torch.tanh(x @ p["body.0.weight"].T + p["body.0.bias"]).detach()
    delta = e @ B("body.1") * (1 - h**2)
    assert_close(p["body.0.weight"].grad, delta.T @ x)
    top = torch.tanh(h @ p["body.1.weight"].T + p["body.1.bias"]).detach()
    assert_close(p["body.1.weight"].grad, (e @ B("heads.one") * (1 - top**2)).T @ h)
    for task in errors:
        assert_close(p[f"heads.{task}.weight"].grad, errors[task].T @ top)


@pytest.mark.parametrize("output", [["heads.one", "heads.two"], ("heads.one", "heads.two")])
def test_a_list_of_taps_is_refused_with_what_to_do(output):
    with pytest.raises(TypeError, match=r"one submodule.*torch.cat"):
        fastdfa.DFA(TwoTasks(), output=output)


@pytest.mark.parametrize("collect", [list, tuple, lambda pair: dict(zip("ab", pair, strict=True))])
def test_several_outputs_are_refused_with_what_to_do(collect):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 2)])

        def forward(self, x):
            return collect([head(x) for head in self.heads])

    with pytest.raises(TypeError, match=r"must be a tensor.*output=name.*torch.cat"):
        fastdfa.DFA(Net())(randn(6, 5, dtype=torch.float32))


def test_a_tap_that_is_called_twice_is_refused():
    """Only one of its outputs would have an error, and the other train by backprop."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = fastdfa.Linear(5, 5, activation="tanh"), fastdfa.Linear(5, 3)

        def forward(self, x):
            h = self.first(x)
            return self.head(h) + self.head(self.first(h))

    model = fastdfa.DFA(Twice(), output="head")
    with pytest.raises(RuntimeError, match=r"output='head'.*twice"):
        model(randn(6, 5, dtype=torch.float32))
    assert all(p.grad is None for p in model.parameters())


# Models of the transformers library ----------------------------------------------------------


def gpt2():
    """Tokens and labels in, a dataclass of loss and logits out; the head is the embedding."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=6,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def cut_after_every_block(model):
    for block in model.transformer.h:
        block.point = fastdfa.FeedbackPoint()
        block.register_forward_hook(lambda block, args, h: block.point(h))
    return model


def gpt2_by_hand(model, points, tap):
    """Cuts the blocks of a plain model, and returns what runs it and hands out the feedback."""
    cuts, taps = [], []

    def cut(module, args, h):
        cuts.append(h)
        return h.detach()

    for block in model.transformer.h:
        block.register_forward_hook(cut)
    model.get_submodule(tap).register_forward_hook(lambda module, args, y: taps.append(y))

    def train(tokens):
        loss = model(tokens, labels=tokens).loss
        (e,) = torch.autograd.grad(loss, taps[0], retain_graph=True)
        loss.backward()
        for h, B in zip(cuts, points, strict=True):
            h.backward(torch.einsum("ntc,cj->ntj", e, B))
        return loss

    return train


@pytest.mark.filterwarnings("ignore:the true gradient of the output trains")
@pytest.mark.parametrize("tap, classes", [("transformer.ln_f", 8), ("lm_head", 11)])
def test_a_language_model_that_computes_its_loss(tap, classes):
    """The error before or after the vocabulary projection; both train the tied embedding by its
    true gradient as the head, and by feedback as the first layer."""
    model = fastdfa.DFA(cut_after_every_block(gpt2()), feedback=RULE, output=tap)
    tokens = torch.arange(12).reshape(2, 6) ** 2 % 11
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    names = model.feedback_points
    assert names == ["transformer.h.0.point", "transformer.h.1.point"]
    points = [model.feedback_matrix(name) for name in names]
    assert [tuple(B.shape) for B in points] == [(classes, 8)] * 2
    plain = gpt2()
    assert_close(gpt2_by_hand(plain, points, tap)(tokens), loss)
    assert_close(gradients(model), gradients(plain))


def test_a_converted_head_behind_the_tap_is_not_cut():
    """Its input gradient is what becomes the error."""
    first, body, head = (fastdfa.Linear(5, 5, activation="tanh"), fastdfa.Linear(5, 7),
                         fastdfa.Linear(7, 11))  # fmt: skip
    model = fastdfa.DFA(nn.Sequential(first, body, head).double(), feedback=RULE, output="1")
    x, g = randn(6, 5), randn(6, 11)
    step(model, x, g)
    assert model.feedback_points == ["1"]
    e = g @ head.weight.detach()
    h = torch.tanh(x @ first.weight.T + first.bias).detach()
    assert_close(head.weight.grad, g.T @ body(h))
    assert_close(body.weight.grad, e.T @ h)
    assert_close(first.weight.grad, (e @ model.feedback_matrix("1") * (1 - h**2)).T @ x)


# What is warned about ------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("head", [
    lambda: fastdfa.Linear(5, 3, activation=nn.PReLU()),
    lambda: nn.utils.parametrizations.weight_norm(fastdfa.Linear(5, 3)),
])  # fmt: skip
def test_a_head_with_parameters_inside_is_one_head(head):
    layers = [fastdfa.Linear(5, 5, activation="tanh"), head()]
    step(fastdfa.DFA(nn.Sequential(*layers).double()), randn(6, 5), randn(6, 3))


@pytest.mark.parametrize("after", [[], [nn.Identity()], [nn.Flatten()]])
def test_an_output_that_is_a_point_is_warned_about(after):
    """Nothing would learn from the true gradient."""
    layers = [fastdfa.Linear(5, 5, activation="tanh"), fastdfa.Linear(5, 3)]
    net = nn.Sequential(*layers, fastdfa.FeedbackPoint(), *after).double()
    with pytest.warns(UserWarning, match="itself the feedback point '2'"):
        fastdfa.DFA(net)(randn(6, 5))


@pytest.mark.filterwarnings("error")
def test_a_frozen_head_is_not_warned_about():
    layers = [fastdfa.Linear(5, 5, activation="tanh"), fastdfa.Linear(5, 3).requires_grad_(False)]
    model = fastdfa.DFA(nn.Sequential(*layers).double())
    step(model, randn(6, 5), randn(6, 3))
    assert model.module[0].weight.grad.abs().sum() > 0


def test_an_output_without_classes_is_refused_with_what_to_do():
    layers = [fastdfa.Linear(5, 5), fastdfa.Linear(5, 1), nn.Flatten(0)]
    with pytest.raises(ValueError, match=r"\(6,\); .*\[N, 1\]"):
        fastdfa.DFA(nn.Sequential(*layers).double())(randn(6, 5))
