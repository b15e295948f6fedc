"""B is a function of the seed (contract 6, DESIGN 5.3), scaled as the literature scales it."""

import copy
import dataclasses
import io
import math
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.formulas import DISTRIBUTIONS, SCALES, philox4x32, standard_deviation, unit_feedback
from helpers.networks import assert_close, feedback_of, gradients, mlp, randn, step
from torch import nn

import fastdfa

SEEDS = [0, 1, 2**31 - 1, 2**32 + 5, 2**63 - 1]


def matrices(model, x=None):
    """{point: B_l} after a forward pass."""
    model(randn(2, model.module[0].in_features).to(model.module[0].weight) if x is None else x)
    return {name: model.feedback_matrix(name) for name in model.feedback_points}


# The generator -------------------------------------------------------------------------------


def test_philox_of_the_tests_has_the_published_values():
    """kat_vectors of Random123, philox4x32 with 10 rounds."""
    known = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, words in known:
        assert " ".join(f"{int(w):08x}" for w in philox4x32(counter, key)) == words


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-6)])
@pytest.mark.parametrize("stream", [0, 1, 2**31 - 1])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_entries(seed, distribution, stream, dtype, tolerance):
    out = torch.full((5, 23), float("nan"), dtype=dtype)
    fastdfa.ops.fill_feedback_(out, seed, stream, distribution)
    expected = unit_feedback(seed, 5, 23, distribution, stream)
    tolerance = tolerance if distribution == "normal" else 1e-7
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5 * tolerance)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mean_and_variance(distribution):
    out = torch.empty(400, 500)
    fastdfa.ops.fill_feedback_(out, 11, 0, distribution)
    n = out.numel()
    fourth = {"normal": 3, "uniform": 9 / 5, "rademacher": 1}[distribution]
    assert abs(out.mean()) < 5 / math.sqrt(n)
    assert abs(out.var() - 1) < 5 * math.sqrt(max(fourth - 1, 1e-3) / n)
    assert abs(out.pow(4).mean() - fourth) < 0.1
    correlation = (out @ out.T / out.shape[1]).fill_diagonal_(0)  # of the rows with one another
    assert correlation.abs().max() < 6 / math.sqrt(out.shape[1])


# Scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("scale", [*SCALES, 0.25, 2])
def test_matrix_of_a_point(scale, distribution):
    """B_l = scale_l D(philox) for every scale of DESIGN section 2, stream 0 where it is shared."""
    seed, widths, c = 77, [3, 10, 21, 6], 5
    rule = fastdfa.Feedback(distribution=distribution, scale=scale, seed=seed)
    B = matrices(mlp([*widths, c], feedback=rule))
    assert list(B) == ["1", "2", "3"]
    for n, actual in zip(widths[1:], B.values(), strict=True):
        expected = unit_feedback(seed, c, n, distribution) * standard_deviation(scale, c, n, 21)
        assert_close(actual, expected, 1e-6)


PUBLISHED = {  # the rule of each source: distribution, scale, error
    "launay2019": ("normal", "launay2019", "sum"),
    "tinydfa": ("uniform", "tinydfa", "mean"),
    "nokland2016": ("uniform", "nokland2016", "mean"),
    "drtp": ("uniform", "drtp", None),
    "biotorch": ("uniform", "biotorch", None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_is_the_published_rule(name):
    rule = fastdfa.PRESETS[name]
    distribution, scale, error = PUBLISHED[name]
    assert (rule.distribution, rule.scale) == (distribution, scale)
    assert error is None or rule.error == error


def test_uniform_presets_have_the_published_bounds():
    c, n, n_max = 4, 300, 500
    bounds = {
        "tinydfa": 1 / math.sqrt(n_max),
        "nokland2016": 1 / math.sqrt(n),
        "drtp": math.sqrt(6 / n),
        "biotorch": math.sqrt(6 / (c + n)),
    }
    for scale, bound in bounds.items():
        rule = fastdfa.Feedback(distribution="uniform", scale=scale, seed=1)
        largest = matrices(mlp([2, n, n_max, c], feedback=rule))["1"].abs().max().item()
        assert 0.98 * bound < largest <= bound * (1 + 1e-6), scale


def test_feedback_is_a_frozen_dataclass():
    rule = fastdfa.Feedback()
    expected = dict(distribution="normal", scale="launay2019", shared=True, error="mean")
    assert expected.items() <= dataclasses.asdict(rule).items()
    assert rule.signal == "error" and rule.seed is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.scale = 1.0
    assert hash(rule) == hash(fastdfa.Feedback()) and rule == fastdfa.Feedback()
    assert dataclasses.replace(rule, shared=False).shared is False


# Shared and separate -------------------------------------------------------------------------


def test_a_shared_matrix_has_one_prefix_for_all_layers():
    rule = fastdfa.Feedback(scale="unit", seed=1)
    B = matrices(mlp([3, 10, 21, 6, 5], feedback=rule))
    for matrix in B.values():
        n = matrix.shape[1]
        assert torch.equal(matrix, B["2"][:, :n])


def test_separate_matrices_differ_and_depend_on_the_name_only():
    rule = fastdfa.Feedback(scale="unit", shared=False, seed=1)
    B = matrices(mlp([3, 16, 16, 16, 5], feedback=rule))
    names = list(B)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert (B[a] * B[b]).mean().abs() < 0.5  # independent: 80 products of variance 1
    deeper = matrices(mlp([3, 16, 16, 16, 16, 5], feedback=rule))
    for name in names:
        assert torch.equal(B[name], deeper[name])


@pytest.mark.parametrize("shared", [True, False])
def test_prefixes_of_wrappers_do_not_change_a_matrix(shared):
    rule = fastdfa.Feedback(shared=shared, seed=1)

    def block():
        return nn.Sequential(*[fastdfa.Linear(6, 6, activation="tanh") for _ in range(2)])

    plain = fastdfa.DFA(nn.Sequential(block(), block(), fastdfa.Linear(6, 3)), feedback=rule)
    expected = matrices_of(plain)

    compiled = copy.deepcopy(plain)
    compiled.module[1] = torch.compile(compiled.module[1], backend="eager")
    assert_same(matrices_of(compiled), expected)

    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        checkpoint_wrapper,
    )

    wrapped = copy.deepcopy(plain)
    wrapped.module[1] = checkpoint_wrapper(wrapped.module[1], CheckpointImpl.NO_REENTRANT)
    wrapped.module[0][1] = checkpoint_wrapper(wrapped.module[0][1], CheckpointImpl.NO_REENTRANT)
    for model in (wrapped, fastdfa.DFA(copy.deepcopy(wrapped.module), feedback=rule)):
        assert_same(matrices_of(model), expected)


def matrices_of(model, n=6):
    model(randn(2, n, dtype=torch.float32))
    return {name: model.feedback_matrix(name) for name in model.feedback_points}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    assert_all_equal(actual.values(), expected.values())


def assert_all_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


# The seed ------------------------------------------------------------------------------------


def test_seed_decides():
    one, same, other = (
        matrices(mlp([3, 8, 6, 4], feedback=fastdfa.Feedback(seed=s))) for s in (5, 5, 6)
    )
    assert_all_equal(one.values(), same.values())
    assert not torch.equal(one["1"], other["1"])


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_any_nonnegative_int64_is_a_seed(seed):
    model = mlp([3, 8, 4], feedback=fastdfa.Feedback(scale="unit", seed=seed))
    assert int(model.seed) == seed
    assert_close(matrices(model)["1"], unit_feedback(seed, 4, 8, "normal"), 1e-6)


def test_no_seed_draws_one_from_torch():
    def draw():
        return int(mlp([3, 8, 4], feedback=fastdfa.Feedback()).seed)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert draw() == first
    assert second != first


def test_a_seed_leaves_the_generator_of_torch_alone():
    torch.manual_seed(3)
    expected = mlp([3, 8, 4]).module[0].weight
    torch.manual_seed(3)
    model = mlp([3, 8, 4], feedback=fastdfa.Feedback(seed=9))
    after = torch.random.get_rng_state()
    step(model, randn(2, 3), randn(2, 4))
    assert torch.equal(model.module[0].weight, expected)
    assert torch.equal(torch.random.get_rng_state(), after)


def test_dtypes_agree():
    model = mlp([3, 8, 6, 4])
    exact = matrices(model)
    for dtype, tolerance in [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]:
        low = copy.deepcopy(model).to(dtype)
        for name, B in matrices(low).items():
            assert_close(B, exact[name], tolerance)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_generated_and_dense_give_the_same_gradients(distribution, shared, dtype, tolerance):
    found = []
    for dense in (True, False):
        rule = fastdfa.Feedback(distribution, shared=shared, dense=dense, seed=2)
        torch.manual_seed(0)
        model = mlp([5, 33, 18, 41, 7], dtype=dtype, feedback=rule)
        step(model, randn(13, 5, dtype=dtype), randn(13, 7, dtype=dtype))
        found.append(gradients(model))
    assert_close(found[1], found[0], tolerance)


def test_feedback_matrices_need_no_forward_to_be_read_again(model):
    step(model, randn(6, 5), randn(6, 3))
    first = feedback_of(model)
    second = feedback_of(model)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False, None])
def test_a_checkpoint_has_the_seed_and_not_the_matrix(dense):
    model = mlp([3, 8, 6, 4], feedback=fastdfa.Feedback(seed=123, dense=dense))
    step(model, randn(2, 3), randn(2, 4))
    state = model.state_dict()
    assert state["seed"].dtype == torch.int64 and int(state["seed"]) == 123
    parameters = {f"module.{name}" for name, _ in model.module.named_parameters()}
    assert state.keys() == parameters | {"seed"}


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_loading_a_checkpoint_changes_the_matrix(shared, dense):
    def build(seed):
        return mlp([3, 8, 6, 4], feedback=fastdfa.Feedback(seed=seed, shared=shared, dense=dense))

    source, target = build(1), build(2)
    x, g = randn(5, 3), randn(5, 4)
    step(source, x, g)
    step(target, x, g)  # a dense B of seed 2 exists now
    target.zero_grad()
    target.load_state_dict(source.state_dict())
    step(target, x, g)
    assert_close(gradients(target), gradients(source), 0)
    assert_all_equal(matrices(target).values(), matrices(source).values())


def test_the_seed_may_be_written_in_place():
    """As DistributedDataParallel does when it broadcasts buffers."""
    model = mlp([3, 8, 4], feedback=fastdfa.Feedback(seed=1))
    x, g = randn(5, 3), randn(5, 4)
    step(model, x, g)
    model.seed.fill_(2)
    model.zero_grad()
    step(model, x, g)
    other = mlp([3, 8, 4], feedback=fastdfa.Feedback(seed=2))
    other.module.load_state_dict(model.module.state_dict())
    step(other, x, g)
    assert_close(gradients(model), gradients(other), 0)


@pytest.mark.parametrize("shared", [True, False])
def test_another_process_has_the_same_matrix(shared, tmp_path):
    model = mlp([3, 8, 6, 4], feedback=fastdfa.Feedback(seed=None, shared=shared))
    B = matrices(model)
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    torch.save(B, tmp_path / "feedback.pt")
    code = f"""
import sys, torch
sys.path[:0] = {[p for p in sys.path if p]!r}
import fastdfa
from helpers.networks import mlp, randn
model = mlp([3, 8, 6, 4], feedback=fastdfa.Feedback(shared={shared}))
model.load_state_dict(torch.load(r"{tmp_path}/checkpoint.pt"))
model(randn(2, 3))
for name, expected in torch.load(r"{tmp_path}/feedback.pt").items():
    assert torch.equal(model.feedback_matrix(name), expected), name
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("when", ["fresh", "after forward", "after backward"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_copies_at_any_time(duplicate, when):
    model = mlp([3, 8, 6, 4], feedback=fastdfa.Feedback(shared=False))
    x, g = randn(5, 3), randn(5, 4)
    if when != "fresh":
        y = model(x)
        if when == "after backward":
            y.sum().backward()
            model.zero_grad()
    twin = duplicate(model)
    step(model, x, g)
    step(twin, x, g)
    assert_close(gradients(twin), gradients(model), 0)
    assert twin.module[0].weight is not model.module[0].weight
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert twin.module[0].weight.any()


@pytest.mark.parametrize("dense", [True, None])
def test_converting_a_model_converts_its_matrix(dense):
    model = mlp([3, 8, 6, 4], dtype=torch.float32, feedback=fastdfa.Feedback(seed=1, dense=dense))
    step(model, randn(5, 3, dtype=torch.float32), randn(5, 4, dtype=torch.float32))
    model.zero_grad()
    model.double()
    step(model, randn(5, 3), randn(5, 4))
    exact = copy.deepcopy(model)
    exact.zero_grad()
    exact.load_state_dict(model.state_dict())
    step(exact, randn(5, 3), randn(5, 4))
    assert_close(gradients(model), gradients(exact))
    assert int(model.seed) == 1 and model.seed.dtype == torch.int64
    assert model.feedback_matrix("1").dtype == torch.float64
    assert_close(model.feedback_matrix("1"), unit_feedback(1, 4, 8, "normal") / math.sqrt(32), 1e-6)
