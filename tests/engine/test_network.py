"""A network of layers in turn goes round their calls (fastdfa/network.py): equal to the layers one
by one, with fused activations to the last bit, and only where nothing could notice."""

import copy
import pickle

import pytest
import torch
from helpers.networks import (
    RULE,
    assert_close,
    assert_nothing_is_kept_alive,
    blockwise_gradients,
    expected_gradients,
    gradients,
    mlp,
    one_by_one,
    randn,
    same_gradients,
    step,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastdfa
from fastdfa.engine import norms, stages
from fastdfa.ops import loading, products

X, G = randn(6, 5), randn(6, 3)
WIDTHS = [5, 12, 8, 9, 3]


def is_one_node(y):
    return y.grad_fn.name() == "SegmentNodeBackward"


def passed(model, x=X, g=G):
    """Whether a pass of this model, after one like it, goes round the layers; both are right."""
    other = one_by_one(model)
    for _ in range(2):
        model.zero_grad(), other.zero_grad()
        y, expected = step(model, x, g), step(other, x, g)
        assert torch.equal(y, expected)
        same_gradients(model, other)
    assert not is_one_node(expected)
    return is_one_node(y)


# What it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False, [True, False, True, False]])
def test_by_the_formulas(bias):
    model = mlp(WIDTHS, ["tanh", "relu", "sigmoid"], bias)
    step(model, X, G)
    for rows in (6, 1, 9):
        model.zero_grad()
        x, g = randn(rows, 5, seed=rows), randn(rows, 3, seed=rows + 1)
        y = step(model, x, g)
        assert y.grad_fn.name() == "SegmentNodeBackward"
        assert_close(gradients(model), expected_gradients(model, x, g))
    assert model.feedback_points == ["1", "2", "3"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (6,), (0,), (2, 3), (2, 1, 4)])
def test_any_rows_and_dtypes(rows, dtype):
    model = mlp(WIDTHS, ["tanh", "relu", "sigmoid"], dtype=dtype)
    assert passed(model, randn(*rows, 5, dtype=dtype), randn(*rows, 3, dtype=dtype))


@pytest.mark.parametrize("rule", [
    fastdfa.Feedback(seed=1, shared=False), fastdfa.Feedback(seed=1, error="sum"),
    fastdfa.Feedback(seed=1, dense=False), "tinydfa", "drtp",
])  # fmt: skip
def test_every_rule(rule):
    torch.manual_seed(3)
    assert passed(mlp(WIDTHS, feedback=rule))


def test_an_input_of_any_strides():
    model = mlp(WIDTHS)
    assert passed(model, randn(5, 6).T)
    assert passed(model, randn(12, 10)[::2, ::2])
    assert passed(model, randn(1, 5).expand(6, 5))
    y = model(X)
    y.backward(torch.ones(1, 1, dtype=torch.float64).expand(6, 3))


def test_under_autocast():
    model = mlp([5, 16, 16, 3], dtype=torch.float32)
    other = one_by_one(model)
    for _ in range(2):
        for each in (model, other):
            with torch.autocast("cpu", torch.bfloat16):
                y = each(X.float())
            assert y.dtype == torch.bfloat16 and is_one_node(y) == (each is model)
            (y * G).sum().backward()
    same_gradients(model, other)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    model(X.float())
    with torch.autocast("cpu", torch.float16):  # nor is one dtype's plan another's
        y = model(X.float())
    assert is_one_node(y) and y.dtype == torch.float16


def test_one_layer_twice(monkeypatch):
    if loading.available("cpu"):  # torch rounds a group of products of one size otherwise than one
        monkeypatch.setattr(products, "library", lambda: "fastdfa")
    layer = fastdfa.Linear(8, 8, activation="tanh")
    first, head = fastdfa.Linear(5, 8, activation="tanh"), fastdfa.Linear(8, 3)
    model = fastdfa.DFA(nn.Sequential(first, layer, layer, head).double(), feedback=RULE)
    assert passed(model)


def test_a_converted_network():
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    assert passed(fastdfa.convert(plain.double(), feedback=RULE))


# Activations and norms of their own -----------------------------------------------------------


def separate(norm, activation, bias=False, **options):
    """Of a norm and an activation, behind two layers of three; without a bias in front of the norm,
    whose gradient is nothing but rounding then."""
    modules = []
    for n, m in ((5, 12), (9, 8)):
        modules.append([fastdfa.Linear(n, m, bias), norm(m), activation()])
    first, third = modules
    layers = [*first, fastdfa.Linear(12, 9, activation="tanh"), *third, fastdfa.Linear(8, 3)]
    return fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE, **options)


def in_blocks(model):
    """The same network in plain PyTorch, a block for each of its layers; names of its parameters
    there, in order."""
    blocks, names = [], []
    for name, module in copy.deepcopy(model.module).named_children():
        names += [f"{name}.{p}" for p, _ in module.named_parameters()]
        if isinstance(module, fastdfa.Linear):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.double().load_state_dict(module.state_dict())
            blocks.append(nn.Sequential(plain))
            module = module.activation
        if module is not None:
            blocks[-1].append(module)
    return blocks, names


def close_to_blocks(model, x=X, g=G):
    """Whether a pass goes round the layers; output, gradients and statistics are the blocks'."""
    blocks, names = in_blocks(model)
    feedback = [model.feedback_matrix(name) for name in model.feedback_points]
    made, expected = blockwise_gradients(blocks, x, g, feedback)
    model.zero_grad()
    y = step(model, x, g)
    assert_close(y, expected)
    grads = [grad for block in made for grad in block.values()]
    assert_close(gradients(model), dict(zip(names, grads, strict=True)))
    buffers = [buffer for block in blocks for buffer in block.buffers()]
    for actual, wanted in zip(model.module.buffers(), buffers, strict=True):
        assert_close(actual, wanted)
    return is_one_node(y)


ALL_NORMS = {
    "none": lambda n: nn.Identity(),
    "batch": nn.BatchNorm1d,
    "batch, without parameters": lambda n: nn.BatchNorm1d(n, affine=False),
    "batch, mean of all": lambda n: nn.BatchNorm1d(n, momentum=None),
    "batch, no statistics": lambda n: nn.BatchNorm1d(n, track_running_stats=False),
    "layer": nn.LayerNorm,
    "layer, without bias": lambda n: nn.LayerNorm(n, bias=False),
}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, nn.Identity,
                                        lambda: nn.ReLU(inplace=True)])  # fmt: skip
@pytest.mark.parametrize("norm", ALL_NORMS)
def test_norms_and_activations(norm, activation):
    torch.manual_seed(5)
    model = separate(ALL_NORMS[norm], activation)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.8, 1.2)
    step(model, X, G)
    for rows in (6, 9, 2):
        x, g = randn(rows, 5, seed=rows), randn(rows, 3, seed=rows + 1)
        assert close_to_blocks(model, x, g)
    model.eval()
    assert close_to_blocks(model)
    few = 2 if norm == "batch, no statistics" else 1
    assert close_to_blocks(model, X[:few], G[:few])


def hooked(of, method):
    return lambda model: getattr(of(model), method)(lambda *args: None)


def root_sequential(model):
    return model.module


def identity(model):
    model.module.append(nn.Identity())
    return model.module[-1]


def patched(model):
    layer = model.module[1]
    layer.forward = lambda x: type(layer).forward(layer, x)


def patched_sequential(model):
    sequential = model.module
    sequential.forward = lambda x: nn.Sequential.forward(sequential, x)


def with_an_activated_head(model):
    model.module[-1].activation = nn.Tanh()


def with_a_gelu_head(model):
    model.module[-1].activation = nn.GELU()


def with_dropout(model):
    model.module.insert(1, nn.Dropout())


def with_an_activation_behind_another(model):
    model.module.insert(1, nn.ReLU())


def with_a_norm_behind_an_activation(model):
    model.module.insert(1, nn.LayerNorm(12).double())


def with_a_hooked_sequential_inside(model):
    model.module[1] = nn.Sequential(model.module[1])
    model.module[1].register_forward_hook(lambda *args: None)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:the output is a")
@pytest.mark.parametrize("change", [
    patched, patched_sequential, with_an_activated_head, with_a_gelu_head, with_dropout,
    with_an_activation_behind_another, with_a_norm_behind_an_activation,
    with_a_hooked_sequential_inside,
    lambda model: model.module[1].bias.requires_grad_(False),
    lambda model: model.module[-1].weight.requires_grad_(False),
    *[hooked(of, method)
      for of in (root_sequential, identity, lambda m: m.module[0], lambda m: m.module[0].activation)
      for method in ("register_forward_hook", "register_forward_pre_hook",
                     "register_full_backward_hook", "register_full_backward_pre_hook")],
])  # fmt: skip
def test_what_turns_it_off(change):
    model = mlp([5, 12, 8, 9, 3])
    assert passed(model)
    change(model)
    for _ in range(2):
        assert not is_one_node(step(model, X, G))


def test_hooks_of_all_modules_are_called():
    model, seen = mlp(WIDTHS), []
    assert passed(model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(m))
    try:
        model(X)
    finally:
        handle.remove()
    assert [layer in seen for layer in model.module] == [True] * 4
    assert is_one_node(model(X))


def test_an_input_with_a_gradient_has_one():
    model = mlp(WIDTHS)
    assert passed(model)
    x = X.clone().requires_grad_()
    step(model, x, G)
    assert x.grad is not None


def test_saved_tensor_hooks_see_every_tensor():
    model, packed = mlp(WIDTHS), []
    assert passed(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(1) or x, lambda x: x):
        assert not is_one_node(step(model, X, G))
    assert len(packed) > 6


def test_backprop_and_no_grad():
    model = mlp(WIDTHS)
    assert passed(model)
    with fastdfa.backprop(model):
        assert not is_one_node(model(X))
    with torch.no_grad():
        assert model(X).grad_fn is None
    assert is_one_node(model(X))


def test_after_a_pass_that_was_computed_ahead_in_vain():
    """Its layers are not computed ahead again, but a network they are."""
    model = mlp(WIDTHS)
    between = nn.Identity()
    model.module.insert(2, between)
    handle = between.register_forward_hook(lambda module, args, h: h.clone())
    step(model, X, G)
    handle.remove()
    assert passed(model)


def test_what_asks_for_layers_one_by_one_has_them_later_too():
    model = mlp(WIDTHS)
    assert passed(model)
    model.looks_ahead = False
    assert not is_one_node(model(X))
    model.looks_ahead = True
    assert is_one_node(model(X))


def test_a_tap_and_a_subclass():
    class Own(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    layers = mlp(WIDTHS).module
    assert not passed(fastdfa.DFA(Own(*layers), feedback=RULE))
    assert not passed(fastdfa.DFA(nn.Sequential(*layers), feedback=RULE, output="3"))


def test_the_bias_in_front_of_a_norm():
    """Its true gradient is zero."""
    model = separate(nn.BatchNorm1d, nn.ReLU, bias=True)
    step(model, X, G)
    model.zero_grad()
    assert is_one_node(step(model, X, G))
    assert model.module[0].bias.grad.abs().max() < 1e-12 < model.module[0].weight.grad.abs().max()


def frozen_weight_of_a_norm(model):
    model.module[1].weight.requires_grad_(False)


def replaced_norm(model):
    model.module[1] = nn.LayerNorm(12).double()


def removed_norm(model):
    model.module[1] = nn.Identity()


@pytest.mark.parametrize("change", [frozen_weight_of_a_norm, replaced_norm, removed_norm])
def test_other_norms(change):
    model = separate(nn.BatchNorm1d, nn.ReLU)
    step(model, X, G)
    change(model)
    step(model, X, G)
    assert close_to_blocks(model)


def test_statistics_that_move_before_backward():
    """Those of an evaluation are what they were."""
    model = separate(nn.BatchNorm1d, nn.ReLU)
    step(model, X, G)
    other = copy.deepcopy(model)
    for each in (model, other):
        each.zero_grad()
        each.eval()
        y = each(X)
        if each is model:
            assert is_one_node(y)
            each.train()
            each(3 * X)
        (y * G).sum().backward()
    assert_close(gradients(model), gradients(other))


def test_a_norm_that_is_modified_before_backward():
    model = separate(nn.BatchNorm1d, nn.ReLU)
    step(model, X, G)
    y = model(X)
    with torch.no_grad():
        model.module[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y * G).sum().backward()


def test_a_norm_that_is_frozen_before_backward():
    model = separate(nn.BatchNorm1d, nn.ReLU)
    step(model, X, G)
    expected = gradients(model)
    model.zero_grad()
    y = model(X)
    model.module[1].weight.requires_grad_(False)
    (y * G).sum().backward()
    assert is_one_node(y)
    assert_close(gradients(model), expected | {"1.weight": gradients(model)["1.weight"]})


def test_hooks_of_a_norms_parameters_are_called():
    model, seen = separate(nn.BatchNorm1d, nn.ReLU), []
    step(model, X, G)
    model.module[1].weight.register_hook(seen.append)
    assert is_one_node(step(model, X, G))
    assert len(seen) == 1


def test_backward_again_through_norms():
    model = separate(nn.BatchNorm1d, nn.GELU)
    step(model, X, G)
    model.zero_grad()
    y = model(X)
    (y * G).sum().backward(retain_graph=True)
    once = gradients(model)
    (y * G).sum().backward()
    for name, grad in gradients(model).items():
        assert_close(grad, 2 * once[name])
    with pytest.raises(RuntimeError, match="second time"):
        (y * G).sum().backward()


def test_norms_free_what_they_kept(monkeypatch):
    """With the group of layers that they are behind, from the top."""
    model, kept, freed = separate(nn.BatchNorm1d, nn.GELU), [], []
    step(model, X, G)
    monkeypatch.setitem(stages.FEW_CLASSES_BYTES, "cpu", 1)
    forward, backward = norms.forward, fastdfa.ops.weight_gradients

    def watched_forward(norm, a, gate):
        made = forward(norm, a, gate)
        kept.extend(StorageWeakRef(h.untyped_storage()) for h in (a, made[0]))
        return made

    def watched_backward(deltas, *rest):
        freed.append([h.expired() for h in kept])
        return backward(deltas, *rest)

    monkeypatch.setattr(norms, "forward", watched_forward)
    monkeypatch.setattr(fastdfa.ops, "weight_gradients", watched_backward)
    y = model(X)
    assert is_one_node(y) and len(kept) == 4
    loss = (y * G).sum()
    del y
    loss.backward()
    below, done = [False, False], [True, True]  # input and output of the norm of a layer
    gating = [True, False]
    assert freed == [below + gating, below + done, gating + done]


def test_one_row_is_no_batch():
    model = separate(nn.BatchNorm1d, nn.ReLU)
    step(model, X, G)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(X[:1])
    assert is_one_node(step(model, X, G))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_no_rows(norm, training):
    model = separate(ALL_NORMS[norm], nn.ReLU).train(training)
    other = one_by_one(model)
    for each in (model, other):
        assert step(each, X[:0], G[:0]).shape == (0, 3)
    assert_close(gradients(model), gradients(other))
    assert all(not grad.any() for grad in gradients(model).values())


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_norms_under_autocast(norm):
    """Which has layer norms in float32."""
    model = separate(ALL_NORMS[norm], nn.ReLU).float()
    other = one_by_one(model)
    for _ in range(2):
        for each in (model, other):
            with torch.autocast("cpu", torch.bfloat16):
                y = each(X.float())
            assert is_one_node(y) == (each is model and norm != "layer")
            (y * G).sum().backward()
    assert_close(gradients(model), gradients(other), 3e-2)
    assert_close(dict(model.named_buffers()), dict(other.named_buffers()), 1e-2)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def hooked_activation(model):
    model.module[2].register_forward_hook(lambda *args: None)


def hooked_norm(model):
    model.module[1].register_forward_hook(lambda module, args, output: output + 1)


def hooked_norm_as_an_activation(model):
    hooked_norm(model)
    model.module[0].activation = model.module[1]
    model.module[1] = nn.Identity()


def one_norm_twice(model):
    model.module[5] = nn.BatchNorm1d(8).double()
    model.module.insert(4, model.module[5])
    model.module[3] = fastdfa.Linear(12, 8).double()
    model.module[5] = fastdfa.Linear(8, 8).double()


def norm_of_no_kind(model):
    model.module[1] = nn.GroupNorm(3, 12).double()


def wide_layer_norm(model):
    model.module[1] = nn.LayerNorm((6, 12)).double()


def norm_behind(model):
    model.module[1], model.module[2] = model.module[2], model.module[1]


@pytest.mark.parametrize("change", [
    hooked_activation, hooked_norm, hooked_norm_as_an_activation, one_norm_twice,
    norm_of_no_kind, wide_layer_norm, norm_behind,
])  # fmt: skip
def test_norms_that_are_called(change):
    model = separate(nn.BatchNorm1d, nn.ReLU)
    change(model)
    other = one_by_one(model)
    for _ in range(2):
        assert not is_one_node(step(model, X, G))
        step(other, X, G)
    assert_close(gradients(model), gradients(other))


def test_a_batch_norm_of_sequences_is_called():
    """It has its channels in the middle."""
    model, x, g = separate(lambda n: nn.BatchNorm1d(4), nn.ReLU), randn(6, 4, 5), randn(6, 4, 3)
    for _ in range(2):
        assert not is_one_node(step(model, x, g))
    model = separate(nn.LayerNorm, nn.ReLU)
    for _ in range(2):
        assert not is_one_node(step(model, x, g))
    model = separate(ALL_NORMS["none"], nn.ReLU)
    other = one_by_one(model)
    assert is_one_node(step(model, x, g))
    step(other, x, g)
    assert_close(gradients(model), gradients(other))


def test_modules_in_front_and_sequentials_inside():
    torch.manual_seed(4)
    front = [nn.Flatten(), nn.Dropout(0.4)]
    inside = nn.Sequential(fastdfa.Linear(6, 7), nn.Sequential(nn.BatchNorm1d(7)), nn.ReLU())
    layers = nn.Sequential(*front, inside, fastdfa.Linear(7, 3)).double()
    model = fastdfa.DFA(layers, feedback=RULE)
    other, x, g = one_by_one(model), randn(8, 2, 3), randn(8, 3)
    for passes in range(3):
        outputs = []
        for each in (model, other):
            torch.manual_seed(passes)
            outputs.append(step(each, x, g))
        assert_close(*outputs)
        assert is_one_node(outputs[0])
    model.module[2][0].bias = other.module[2][0].bias = None
    assert_close(gradients(model), gradients(other))


# Changes between passes -----------------------------------------------------------------------


def replaced_layer(model):
    model.module[1] = fastdfa.Linear(12, 8, activation="relu").double()


def replaced_parameters(model):
    model.module[2].weight = nn.Parameter(randn(9, 8))
    model.module[3].bias = None


def replaced_data(model):
    model.module[2].weight.data = randn(9, 8)


def another_slope(model):
    model.module[0].activation = nn.LeakyReLU(0.3)
    step(model, X, G)
    model.module[0].activation.negative_slope = 0.7


def another_seed(model):
    model.load_state_dict(model.state_dict() | {"seed": torch.tensor(77)})


def another_rule(model):
    model.feedback = fastdfa.Feedback(seed=1, error="sum")


def another_scale(model):
    model.feedback = fastdfa.Feedback(seed=1, scale="tinydfa")


def in_single_precision_and_back(model):
    model.float()
    step(model, X.float(), G.float())
    model.double()


@pytest.mark.parametrize("change", [
    replaced_layer, replaced_parameters, replaced_data, another_slope, another_seed, another_rule,
    another_scale, in_single_precision_and_back, identity,
])  # fmt: skip
def test_of_what_the_network_is_now(change):
    model = mlp(WIDTHS)
    assert passed(model)
    change(model)
    assert passed(model)


def test_a_way_round_a_cut_is_found_in_what_was_a_network():
    """Though it has the same points."""

    class Skip(nn.Sequential):
        def forward(self, x):
            h = self[0](x)
            return self[2](h + self[1](h))

    model = mlp([5, 8, 8, 3])
    assert is_one_node(step(model, X, G))
    plain, model.module = model.module, Skip(*model.module)
    with pytest.raises(RuntimeError, match="without passing a cut"):
        step(model, X, G)
    model.module, model.looks_ahead = plain, False
    assert not is_one_node(step(model, X, G))
    model.module = Skip(*plain)  # after a pass with these points that was searched
    with pytest.raises(RuntimeError, match="without passing a cut"):
        step(model, X, G)


def test_the_width_of_a_layer_stays():
    model = mlp(WIDTHS)
    assert passed(model)
    first, second = model.module[0], model.module[1]
    first.weight.data, first.bias.data = first.weight[:-1].detach(), first.bias[:-1].detach()
    second.weight.data = second.weight[:, :-1].detach()
    with pytest.raises(ValueError, match=r"expected 12 features .* got 11"):
        model(X)


def test_bad_inputs_are_refused():
    model = mlp(WIDTHS)
    assert passed(model)
    with pytest.raises(RuntimeError, match=r"(?s)(?=.*(?<!\d)4(?!\d))(?=.*(?<!\d)5(?!\d))"):
        model(X[:, :4])
    with pytest.raises(RuntimeError, match=r"'0' must be torch.float64 .* got torch.float32"):
        model(X.float())
    assert not is_one_node(model(X[0]))
    assert passed(model)


def test_an_input_of_another_dtype_is_refused():
    """As by torch, though the kernels multiply bfloat16 by weights in float32 under autocast."""
    model = mlp(WIDTHS, bias=False, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"must be torch.*, got torch"):
        model(X.bfloat16())
    assert is_one_node(model(X.float()))
    model.bfloat16()(X.bfloat16())
    with pytest.raises(RuntimeError, match=r"must be torch.*, got torch"):
        model.float()(X.bfloat16())


def test_layers_that_do_not_fit_settle_no_sizes():
    model = mlp(WIDTHS)
    model.module[0] = fastdfa.Linear(5, 10).double()
    with pytest.raises(RuntimeError, match="shape"):
        model(X)
    model.module[0] = fastdfa.Linear(5, 12).double()
    assert is_one_node(model(X))


def test_copies_and_pickles():
    model = mlp(WIDTHS)
    assert passed(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert passed(other)
        same_gradients(model, other)


# Autograd around it ---------------------------------------------------------------------------


def test_backward_again_and_several_forwards():
    model = mlp(WIDTHS)
    step(model, X, G)
    model.zero_grad()
    other = one_by_one(model)
    for each in (model, other):
        y, z = each(X), each(2 * X)
        (y * G).sum().backward(retain_graph=True)
        (z * G).sum().backward()
        (y * G).sum().backward()
    for a, b in zip(gradients(model).values(), gradients(other).values(), strict=True):
        assert_close(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        (y * G).sum().backward()


def test_a_modification_in_place_is_refused():
    model, x = mlp(WIDTHS), X.clone()
    assert passed(model)
    y = model(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y * G).sum().backward()


def test_the_output_may_be_modified():
    model = mlp(WIDTHS)
    assert passed(model)
    y = model(X)
    assert is_one_node(y)
    with torch.no_grad():
        expected = expected_gradients(model, X, 2 * G)
    model.zero_grad()
    (y.mul_(2) * G).sum().backward()
    assert_close(gradients(model), expected)


def test_no_double_backward():
    model = mlp(WIDTHS)
    assert passed(model)
    (grad,) = torch.autograd.grad(
        (model(X) ** 2).sum(), [model.module[0].weight], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("until", ["forward", "backward"])
def test_nothing_is_kept_alive(until, monkeypatch):
    model = mlp(WIDTHS)
    step(model, X, G)
    node = assert_nothing_is_kept_alive(model, X, G, until, monkeypatch)
    assert node == "SegmentNodeBackward"


@pytest.mark.parametrize("rule", [RULE, fastdfa.Feedback(seed=1, shared=False)])
@pytest.mark.parametrize("whole", [True, False])
def test_a_chain_is_done_in_groups_from_the_top(whole, rule, monkeypatch):
    """Of a whole network and of one that another layer follows; what is done with is freed."""
    widths = [5, 12, 8, 9, 8, 7, 3]
    sequential = mlp(widths).module
    if not whole:
        sequential.append(nn.Identity().train())
        sequential[-1].register_forward_hook(lambda *args: None)
    model = fastdfa.DFA(sequential, feedback=rule)
    model.activations = ["tanh"] * 5 + ["none"]
    step(model, X, G)
    monkeypatch.setitem(stages.FEW_CLASSES_BYTES, "cpu", 6 * 17 * 8)
    hidden, lengths, freed = [], [], []
    forward, backward = fastdfa.ops.linear_chain, fastdfa.ops.weight_gradients

    def watched_forward(*args):
        outputs = forward(*args)
        hidden.extend(StorageWeakRef(h.untyped_storage()) for h in outputs)
        return outputs

    def watched_backward(deltas, *rest):
        lengths.append(len(deltas))
        freed.append([h.expired() for h in hidden])
        return backward(deltas, *rest)

    monkeypatch.setattr(fastdfa.ops, "linear_chain", watched_forward)
    monkeypatch.setattr(fastdfa.ops, "weight_gradients", watched_backward)
    model.zero_grad()
    for again in (False, True):
        hidden.clear(), lengths.clear(), freed.clear()
        y = model(X)
        assert is_one_node(y) == whole
        loss = (y * G).sum()
        del y
        loss.backward(retain_graph=again)
        assert lengths == [2, 2, 1]
        if not again:
            expected = gradients(model)
            assert_close(expected, expected_gradients(model, X, G))
            if fastdfa.ops.products.library() == "fastdfa":  # else all outputs may be one buffer
                assert [sum(row) for row in freed] == [0, 2, 4]
    loss.backward()
    for name, grad in gradients(model).items():
        assert_close(grad, 3 * expected[name])


def test_many_classes_that_share_a_product_are_one_group(monkeypatch):
    """As each group would make it anew."""
    monkeypatch.setitem(stages.FEW_CLASSES_BYTES, "cpu", 1)
    lengths, op = [], fastdfa.ops.weight_gradients
    monkeypatch.setattr(
        fastdfa.ops, "weight_gradients", lambda d, *rest: lengths.append(len(d)) or op(d, *rest)
    )
    for classes in (63, 64):
        model, g = mlp([5, 12, 8, 9, classes]), randn(6, classes)
        for _ in range(2):
            model.zero_grad()
            lengths.clear()
            step(model, X, g)
            assert lengths == ([1, 1, 1] if classes == 63 else [3])
            assert_close(gradients(model), expected_gradients(model, X, g))


# Around parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_are_called(register):
    model, seen = mlp(WIDTHS), []
    step(model, X, G)
    model.zero_grad()
    getattr(model.module[1].weight, register)(seen.append)
    step(model, X, G)
    assert len(seen) == 1
    assert_close(gradients(model), expected_gradients(model, X, G))


def test_direct_gradients_are_deprecated_and_change_nothing():
    with pytest.warns(DeprecationWarning, match="direct_gradients"):
        model = mlp(WIDTHS, direct_gradients=True)
    step(model, X, G)
    assert_close(gradients(model), expected_gradients(model, X, G))
