"""Standard PyTorch around a DFA model: accumulation, graphs, hooks, checkpointing, memory
(contract 8)."""

import gc
import weakref

import pytest
import torch
from networks import (
    Apply,
    assert_close,
    expected_gradients,
    feedback_of,
    gradients,
    mlp,
    randn,
    step,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fastdfa

RULE = fastdfa.Feedback(seed=1)
X, G = randn(6, 5), randn(6, 3)


@pytest.fixture
def model():
    return mlp([5, 8, 7, 3])


def fresh(model, x=X, g=G):
    """The gradients of one pass from zero."""
    model.zero_grad()
    step(model, x, g)
    found = gradients(model)
    model.zero_grad()
    return found


def added(a, b):
    return {name: a[name] + b[name] for name in a}


# Graphs --------------------------------------------------------------------------------------


def test_gradients_accumulate(model):
    x, g = randn(6, 5, seed=2), randn(6, 3, seed=3)
    expected = added(fresh(model), fresh(model, x, g))
    step(model, X, G)
    step(model, x, g)
    assert_close(gradients(model), expected)


def test_gradients_of_a_pass_are_not_changed_by_the_next(model):
    step(model, X, G)
    kept = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in kept]
    model.zero_grad(set_to_none=True)
    step(model, 2 * X, G)
    for a, b in zip(kept, copies, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_a_backward(model, order):
    x, g = randn(4, 5, seed=2), randn(4, 3, seed=3)
    expected = added(fresh(model), fresh(model, x, g))
    losses = [(model(X) * G).sum(), (model(x) * g).sum()]
    for i in order:
        losses[i].backward()
    assert_close(gradients(model), expected)


def test_two_forwards_in_one_loss(model):
    x, g = randn(4, 5, seed=2), randn(4, 3, seed=3)
    expected = added(fresh(model), fresh(model, x, g))
    ((model(X) * G).sum() + (model(x) * g).sum()).backward()
    assert_close(gradients(model), expected)


def test_a_model_that_reads_its_own_output(model):
    """The second pass is no part of the first: its input requires grad and is not cut."""
    square = mlp([5, 8, 5])
    y = square(X)
    z = square(y)
    (z * randn(6, 5)).sum().backward()
    assert list(square.feedback_points) == ["1"]
    assert all(p.grad is not None for p in square.parameters())


def test_autograd_grad(model):
    expected = fresh(model)
    y = model(X)
    found = torch.autograd.grad((y * G).sum(), list(model.module.parameters()))
    assert_close(dict(zip(expected, found, strict=True)), expected)
    assert all(p.grad is None for p in model.parameters())


def test_autograd_grad_of_one_parameter(model):
    expected = fresh(model)
    for name, p in model.module.named_parameters():
        (found,) = torch.autograd.grad((model(X) * G).sum(), p)
        assert_close(found, expected[name])


def test_autograd_grad_of_the_input(model):
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad((model(x) * G).sum(), x)
    layer = model.module[0]
    h = torch.tanh(x @ layer.weight.T + layer.bias).detach()
    assert_close(found, G @ model.feedback_matrix("1") * (1 - h * h) @ layer.weight.detach())


def test_backward_with_inputs(model):
    expected = fresh(model)
    layer = model.module[1]
    (model(X) * G).sum().backward(inputs=[layer.weight])
    assert_close(layer.weight.grad, expected["1.weight"])
    assert layer.bias.grad is None and model.module[0].weight.grad is None


def test_retain_graph_twice(model):
    expected = fresh(model)
    loss = (model(X) * G).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(gradients(model), added(expected, expected))


def test_a_second_backward_without_retain_graph_is_refused(model):
    loss = (model(X) * G).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("kind", ["fused", "general"])
def test_double_backward_is_refused(kind):
    model = mlp([5, 8, 7, 3], "tanh" if kind == "fused" else "Softsign")
    x = X.clone().requires_grad_()
    loss = (model(x) ** 2).sum()
    with pytest.raises(RuntimeError, match=r"once_differentiable|twice|double"):
        (gradient,) = torch.autograd.grad(loss, model.module[0].weight, create_graph=True)
        gradient.sum().backward()


def test_double_backward_of_a_layer_outside_a_dfa_is_refused():
    layer = fastdfa.Linear(5, 3, activation="tanh", dtype=torch.float64)
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"once_differentiable|twice|double"):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()


def test_a_loss_of_a_part_of_the_batch(model):
    g = G.clone()
    g[3:] = 0
    expected = fresh(model, X, g)
    (model(X)[:3] * G[:3]).sum().backward()
    assert_close(gradients(model), expected)


def test_an_output_that_is_not_used_leaves_no_gradient(model):
    expected = fresh(model)
    model(2 * X)
    step(model, X, G)
    assert_close(gradients(model), expected)


# Hooks ---------------------------------------------------------------------------------------


def test_a_hook_of_a_point_sees_its_feedback(model):
    """h.register_hook inside the model, as people do to look at gradients."""
    seen = {}
    plain = model.module[0].forward

    def watched(x):
        h = plain(x)
        h.register_hook(lambda gradient: seen.update(h=gradient.clone()))
        return h

    model.module[0].forward = watched
    step(model, X, G)
    expected = expected_gradients(model, X, G)
    assert_close(seen["h"], G @ model.feedback_matrix("1"))
    assert_close(gradients(model), expected)


def test_a_hook_of_a_point_changes_its_feedback(model):
    expected = fresh(model)

    def doubled(module, args, output):
        output.register_hook(lambda gradient: 2 * gradient)

    model.module[0].register_forward_hook(doubled)
    found = fresh(model)
    assert_close(found["0.weight"], 2 * expected["0.weight"])
    assert_close(found["1.weight"], expected["1.weight"])


def test_retain_grad_of_a_point_is_its_feedback(model):
    kept = []

    def retain(module, args, output):
        output.retain_grad()
        kept.append(output)

    model.module[0].register_forward_hook(retain)
    step(model, X, G)
    assert_close(kept[0].grad, G @ model.feedback_matrix("1"))
    assert_close(gradients(model), expected_gradients(model, X, G))


def test_a_forward_hook_that_replaces_the_output(model):
    model.module[0].register_forward_hook(lambda module, args, output: 2 * output)
    step(model, X, G)
    layer = model.module[0]
    h = torch.tanh(X @ layer.weight.T + layer.bias).detach()
    delta = 2 * (G @ model.feedback_matrix("1")) * (1 - h * h)
    assert_close(layer.weight.grad, delta.T @ X)
    second = model.module[1]
    h2 = torch.tanh(2 * h @ second.weight.T + second.bias).detach()
    assert_close(second.weight.grad, ((G @ model.feedback_matrix("2")) * (1 - h2 * h2)).T @ (2 * h))


def test_a_forward_pre_hook_that_replaces_the_input(model):
    expected = fresh(model, 2 * X)
    model.module[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert_close(fresh(model), expected)


def test_full_backward_hooks_run_and_change_nothing(model):
    expected, seen = fresh(model), []
    for name, layer in model.module.named_children():
        layer.register_full_backward_hook(
            lambda module, grad_input, grad_output, name=name: seen.append((name, grad_output[0]))
        )
    assert_close(fresh(model), expected)
    found = dict(seen)
    assert sorted(found) == ["0", "1", "2"]
    model(X)
    assert_close(found["2"], G)
    assert_close(found["1"], G @ model.feedback_matrix("2"))
    assert_close(found["0"], G @ model.feedback_matrix("1"))


def test_hooks_of_parameters(model):
    expected, seen = fresh(model), []
    weight, bias = model.module[0].weight, model.module[0].bias
    weight.register_hook(lambda gradient: 3 * gradient)
    bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    step(model, X, G)
    assert_close(weight.grad, 3 * expected["0.weight"])
    assert_close(seen[0], expected["0.bias"])
    assert len(seen) == 1


def test_global_forward_hooks(model):
    expected = fresh(model)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: calls.append(m))
    try:
        found = fresh(model)
    finally:
        handle.remove()
    assert_close(found, expected)
    assert model.module[1] in calls


def test_saved_tensor_hooks(model):
    """Offloading: what is saved goes through pack and unpack."""
    expected = fresh(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        found = fresh(model)
    assert_close(found, expected)


# Checkpointing -------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks[:-1]:
            x = checkpoint(block, x, use_reentrant=False)
        return self.blocks[-1](x)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "Softsign", None])
@pytest.mark.parametrize("per_block", [1, 2])
def test_activation_checkpointing(per_block, activation):
    def build():
        torch.manual_seed(0)
        make = nn.Softsign() if activation == "Softsign" else activation
        layers = [
            fastdfa.Linear(a, b, activation=make) for a, b in ((5, 8), (8, 8), (8, 6), (6, 7))
        ]
        blocks = [nn.Sequential(*layers[i : i + per_block]) for i in range(0, 4, per_block)]
        return nn.ModuleList([*blocks, fastdfa.Linear(7, 3)]).double()

    plain = fastdfa.DFA(nn.Sequential(*build()), feedback=RULE)
    model = fastdfa.DFA(Checkpointed(*build()), feedback=RULE)
    step(plain, X, G)
    step(model, X, G)
    assert len(list(model.feedback_points)) == 4
    for a, b in zip(gradients(model).values(), gradients(plain).values(), strict=True):
        assert_close(a, b)


def test_reentrant_checkpointing_is_right_or_refused():
    """It runs the block without gradients first, and again in backward, where no root is near."""

    class Reentrant(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = fastdfa.Linear(5, 8, activation="tanh")
            self.block = nn.Sequential(*mlp([8, 7, 6]).module)
            self.head = fastdfa.Linear(6, 3)

        def forward(self, x):
            return self.head(checkpoint(self.block, self.stem(x), use_reentrant=True))

    model = fastdfa.DFA(Reentrant().double(), feedback=RULE)
    try:
        step(model, X, G)
    except RuntimeError as error:
        assert "reentrant" in str(error)
        return
    x = X
    for layer, reader in ((model.module.stem, "block.0"), (model.module.block[0], "block.1")):
        h = torch.tanh(x @ layer.weight.T + layer.bias).detach()
        delta = G @ model.feedback_matrix(reader) * (1 - h * h)
        assert_close(layer.weight.grad, delta.T @ x)
        x = h


def test_checkpointing_of_the_whole_model(model):
    expected = fresh(model)
    y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=False)
    (y * G).sum().backward()
    assert_close(gradients(model), expected)


# In-place ------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """Something changes the output of the first layer in place."""

    def __init__(self, change, activation):
        super().__init__()
        self.change = change
        self.first = fastdfa.Linear(5, 8, activation=activation)
        self.second = fastdfa.Linear(8, 6, activation="tanh")
        self.head = fastdfa.Linear(6, 3)

    def forward(self, x):
        return self.head(self.second(self.change(self.first(x))))


def mask_(h):
    h[:, ::2] = 0
    return h


CHANGES = {
    "relu_": lambda h: torch.relu_(h),
    "mul_": lambda h: h.mul_(2),
    "add_": lambda h: h.add_(1),
    "leaky_relu_": lambda h: nn.functional.leaky_relu(h, 0.3, inplace=True),
    "view": lambda h: h.view(-1, 2, 4).mul_(0.5).view(-1, 8),
    "index": mask_,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", None])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_right_or_refused(change, activation, compiled):
    torch.manual_seed(0)
    net = InPlace(CHANGES[change], activation).double()
    model = fastdfa.DFA(net, feedback=RULE)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    try:
        y = run(X)
        (y * G).sum().backward()
    except RuntimeError as error:
        assert "in-place" in str(error) or "inplace" in str(error), error
        return
    finally:
        torch._dynamo.reset()
    # The block alone, out of place.
    act = {"tanh": torch.tanh, "relu": torch.relu, "gelu": nn.functional.gelu, None: lambda a: a}
    a = nn.functional.linear(X, net.first.weight, net.first.bias)
    h = CHANGES[change](act[activation](a) + 0)
    B = [model.feedback_matrix(name) for name in ("second", "head")]
    (expected,) = torch.autograd.grad(h, net.first.weight, G @ B[0])
    assert_close(net.first.weight.grad, expected)
    h2 = torch.tanh(h @ net.second.weight.T + net.second.bias).detach()
    assert_close(net.second.weight.grad, (G @ B[1] * (1 - h2 * h2)).T @ h.detach())


@pytest.mark.parametrize("activation", ["tanh", None])
def test_a_change_of_what_a_layer_has_read_is_refused(activation):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fastdfa.Linear(5, 8, activation=activation)
            self.second = fastdfa.Linear(8, 6, activation="tanh")
            self.head = fastdfa.Linear(6, 3)

        def forward(self, x):
            h = self.first(x)
            out = self.second(h)
            h.add_(1)
            return self.head(out)

    model = fastdfa.DFA(Late().double(), feedback=RULE)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        step(model, X, G)


def test_a_change_of_the_input_after_the_forward_is_refused(model):
    x = X.clone()
    loss = (model(x) * G).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match=r"in-?place"):
        loss.backward()


def test_a_change_of_a_weight_between_forward_and_backward(model):
    """DFA reads no weight in backward: right, or refused as backprop refuses it."""
    expected = fresh(model)
    loss = (model(X) * G).sum()
    with torch.no_grad():
        model.module[1].weight.mul_(2)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "inplace" in str(error)
    else:
        assert_close(gradients(model), expected)


# Exceptions, modes, frozen layers ------------------------------------------------------------


class Failure(Exception):
    pass


def test_an_exception_in_forward_leaves_no_trace(model):
    expected = fresh(model)

    def fail(h):
        raise Failure

    model.module.insert(1, Apply(fail))
    with pytest.raises(Failure):
        model(X)
    # Layers outside train by backprop: nothing collects their inputs.
    layers = nn.Sequential(*[m for m in model.module if isinstance(m, nn.Linear)])
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    plain.double()
    for p, q in zip(plain.parameters(), layers.parameters(), strict=True):
        p.data.copy_(q)
    (layers(X) * G).sum().backward()
    (plain(X) * G).sum().backward()
    for p, q in zip(plain.parameters(), layers.parameters(), strict=True):
        assert_close(q.grad, p.grad)
    del model.module[1]
    assert_close(fresh(model), expected)


def test_an_exception_in_backward_leaves_no_trace(model):
    expected = fresh(model)

    def fail(gradient):
        raise Failure

    handle = model.module[0].weight.register_hook(fail)
    with pytest.raises(Failure):
        step(model, X, G)
    handle.remove()
    assert_close(fresh(model), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_leaves_no_trace(model, mode):
    expected = fresh(model)
    with mode():
        y = model(X)
    assert not y.requires_grad
    assert_close(fresh(model), expected)
    assert_close(y, model(X))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_first_pass_may_be_without_gradients(mode):
    model = mlp([5, 8, 7, 3])
    with mode():
        model(X)
        model(X[:0])
    step(model, X, G)
    assert_close(gradients(model), expected_gradients(model, X, G))


def test_eval_mode_trains_the_same_way(model):
    expected = fresh(model)
    assert_close(fresh(model.eval()), expected)


def test_enable_grad_inside_no_grad(model):
    expected = fresh(model)
    with torch.no_grad(), torch.enable_grad():
        y = model(X)
    (y * G).sum().backward()
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("frozen", ["0", "1", "2", "0.weight", "1.bias", "0 1", "1 2", "2.weight"])
def test_frozen_parameters(frozen):
    """A frozen parameter gets no gradient, and the others get what they got before."""
    model = mlp([5, 8, 7, 3])
    x = X.clone().requires_grad_()  # so that every layer has something to pass on
    expected = fresh(model, x)
    x.grad = None
    names = [n for n in expected if any(n.startswith(f) for f in frozen.split())]
    for name, p in model.module.named_parameters():
        p.requires_grad_(name not in names)
    found = fresh(model, x)
    for name in names:
        expected[name] = None
    assert_close(found, expected)


def test_a_frozen_stem_makes_no_point(model):
    """Its output does not require grad, so there is nothing to cut."""
    expected = fresh(model)
    model.module[0].requires_grad_(False)
    found = fresh(model)
    model(X)
    assert list(model.feedback_points) == ["2"]
    assert_close({n: found[n] for n in list(found)[2:]}, {n: expected[n] for n in list(found)[2:]})
    assert found["0.weight"] is None


def test_a_frozen_model_runs():
    model = mlp([5, 8, 7, 3]).requires_grad_(False)
    assert not model(X).requires_grad


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_partial_last_batch(model, set_to_none):
    for rows in (6, 6, 2, 1, 6):
        model.zero_grad(set_to_none)
        step(model, X[:rows], G[:rows])
        assert_close(gradients(model), expected_gradients(model, X[:rows], G[:rows]))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_optimizers_and_clipping(optimizer, model):
    """A step with any optimizer equals its step on a plain model with the same gradients."""
    plain = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 3)).double()
    plain.load_state_dict(model.module.state_dict())
    steps = [getattr(torch.optim, optimizer)(m.parameters(), lr=0.01) for m in (model, plain)]
    for _ in range(3):
        model.zero_grad()
        step(model, X, G)
        expected = expected_gradients(model, X, G).values()
        for right, q in zip(expected, plain.parameters(), strict=True):
            q.grad = right
        for m, o in zip((model, plain), steps, strict=True):
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            o.step()
    for p, q in zip(model.module.parameters(), plain.parameters(), strict=True):
        assert_close(p, q)


# Backprop ------------------------------------------------------------------------------------


def backprop_gradients(model, x=X, g=G):
    """By autograd through the same weights, without the library."""
    h = x
    weights = []
    for layer in model.module:
        w, b = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
        weights += [w, b]
        h = h @ w.T + b
        if layer is not model.module[-1]:
            h = torch.tanh(h)
    found = torch.autograd.grad((h * g).sum(), weights)
    return dict(zip(gradients(model), found, strict=True))


def test_backprop_gives_the_true_gradient(model):
    expected = fresh(model)
    with fastdfa.backprop(model):
        true = fresh(model)
    assert_close(true, backprop_gradients(model))
    assert_close(fresh(model), expected)


def test_backprop_ends_with_an_exception(model):
    expected = fresh(model)
    with pytest.raises(Failure), fastdfa.backprop(model):
        raise Failure
    assert_close(fresh(model), expected)


def test_backprop_nests(model):
    expected = fresh(model)
    with fastdfa.backprop(model):
        with fastdfa.backprop(model):
            fresh(model)
        assert_close(fresh(model), backprop_gradients(model))
    assert_close(fresh(model), expected)


def test_backprop_is_of_one_model(model):
    other = mlp([5, 8, 7, 3], feedback=fastdfa.Feedback(seed=8))
    expected = fresh(other)
    with fastdfa.backprop(model):
        assert_close(fresh(other), expected)


def test_backprop_allows_what_a_cut_would_not():
    """Skip connections, several outputs: inside it the model is plain PyTorch."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = fastdfa.Linear(5, 5), fastdfa.Linear(5, 5, activation="tanh")

        def forward(self, x):
            h = self.first(x)
            return h + self.inner(h)

    model = fastdfa.DFA(Skip().double(), feedback=RULE)
    with fastdfa.backprop(model):
        model(X).sum().backward()
    assert model.module.first.weight.grad is not None


# Memory --------------------------------------------------------------------------------------


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
        if type(o) in (torch.Tensor, nn.Parameter) and not o.is_meta:
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


def test_feedback_matrices_need_no_forward_to_be_read_again(model):
    step(model, X, G)
    first = feedback_of(model)
    second = feedback_of(model)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
