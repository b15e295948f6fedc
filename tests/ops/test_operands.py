"""No operand crashes an op, nor is read where it does not lie: each is refused by name, before
anything is written, or the result is the right one (contract 10). Through the functions and through
the raw ops, as torch.export, AOTInductor and sharding call these."""

import copy
import math
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from helpers.kernels import needs_extension
from helpers.operands import (
    EVERY,
    LOST,
    OTHER_KINDS,
    SCHEMAS,
    WAYS,
    WRITTEN,
    calls,
    operands,
    raw,
    refusal,
    replaced,
)

READ = [(op, name) for op, name in EVERY if name not in WRITTEN.get(op, [])]
OVERWRITTEN = [(op, name) for op, names in WRITTEN.items() for name in names]


@needs_extension
def test_every_op_is_here():
    names = torch._C._dispatch_get_all_op_names()
    found = {name.removeprefix("fastdfa::") for name in names if "fastdfa::" in name}
    assert found - {"handed", "drawn"} == set(SCHEMAS)  # these are the engine's own
    for op, names in SCHEMAS.items():
        schema = getattr(torch.ops.fastdfa, op).default._schema
        assert [argument.name for argument in schema.arguments] == names
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        assert written == WRITTEN.get(op, [])


@pytest.mark.parametrize("way", WAYS)
def test_memory_that_is_not_there_is_named(way):
    """Freed, made smaller, or never there: what reads it may end the process."""
    run = subprocess.run(
        [sys.executable, "-m", "helpers.operands", way],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FASTDFA_GEMM": "fastdfa"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    lines = run.stdout.splitlines()
    assert run.returncode == 0, f"exit {run.returncode} at {lines[-1:]}\n{run.stderr[-2000:]}"
    assert [line for line in lines if not line.endswith(": refused")] == []
    assert len(lines) == len(EVERY) * len(LOST)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op, name", EVERY)
def test_what_no_kernel_reads_is_named(op, name, way):
    for kind, change in OTHER_KINDS.items():
        arguments = copy.deepcopy(calls()[op])
        given = operands(op, arguments)
        if len(given) == 1 and kind == "on another device":
            continue  # all of them are there, which is right
        if op == "activate_" and name == "x" and kind == "one dimension more":
            continue  # it takes any number of them
        said = refusal(way, op, replaced(op, arguments, **{name: change(given[name])}))
        assert said is not None, kind
        # On the meta device the first operand says where all of them must be.
        anywhere = kind == "on another device" and name == next(iter(given))
        assert name in said or (anywhere and "must be on" in said), (kind, said)
        assert way == "public" or op in said, (kind, said)
        for n, x in operands(op, calls()[op]).items():
            assert torch.equal(given[n], x), kind


def overlapping(op, name, other=None):
    """A call whose operand `name` overlaps itself, or has an element in common with another one."""
    arguments = copy.deepcopy(calls()[op])
    given = operands(op, arguments)
    x = given[name]
    if other is None:
        return replaced(op, arguments, **{name: x[:1].clone().expand(x.shape)})
    y = given[other]
    memory = torch.cat([x.flatten(), y.flatten()[1:]])
    both = {
        name: memory[: x.numel()].view(x.shape),
        other: memory[x.numel() - 1 :].view(y.shape),
    }
    return replaced(op, arguments, **both)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op, name", OVERWRITTEN)
def test_what_is_written_overlaps_nothing(op, name, way):
    for other in [None, *operands(op, calls()[op])]:
        if other == name or (name == "running_var" and other == "running_mean"):
            continue
        arguments = overlapping(op, name, other)
        before = copy.deepcopy(operands(op, arguments))
        said = refusal(way, op, arguments)
        if name == "x" and other is None:
            assert "x must be contiguous" in said
            continue
        assert said is not None, f"{name} and {other}"
        if other is None:
            assert f"the rows of {name} must not overlap" in said
        else:
            assert f"{name} must share no memory with {other}" in said, said
        for n, x in operands(op, arguments).items():
            assert torch.equal(x, before[n]), n


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_overlap_in_part_are_not_written(way):
    op = "layer_norm_backward_"
    delta = torch.randn(48).as_strided((6, 8), (7, 1))
    said = refusal(way, op, replaced(op, calls()[op], delta=delta))
    assert "the rows of delta must not overlap" in said


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_lie_between_each_other_are_apart(way):
    """What is written beside what is read in one buffer, as in halves of a fused product."""
    for op in ("batch_norm_backward_", "layer_norm_backward_"):
        right = copy.deepcopy(calls()[op])
        sums = WAYS[way](op, right)
        arguments = copy.deepcopy(calls()[op])
        given = operands(op, arguments)
        memory = torch.cat([given["delta"], given["a"]], 1)
        beside = dict(delta=memory[:, :8], a=memory[:, 8:])
        found = WAYS[way](op, replaced(op, arguments, **beside))
        assert torch.equal(beside["delta"], operands(op, right)["delta"])
        assert torch.equal(beside["a"], given["a"])
        for x, y in zip(found, sums, strict=True):
            assert torch.equal(x, y)


def stepped(x):
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]


def transposed(x):
    return x.mT.contiguous().mT if x.dim() > 1 else x


def offset(x):
    return torch.cat([x.new_full((3,), torch.nan), x.flatten()])[3:].view(x.shape)


# What is right however it lies: the dispatcher resolves some of it.
LAYOUTS = {
    "stepped": stepped,
    "transposed": transposed,
    "at an offset": offset,
    "negated": lambda x: torch._neg_view(-x),
    "a lazy copy": torch._lazy_clone,
    "a parameter": lambda x: torch.nn.Parameter(x.clone()),
}


def flat(result):
    if result is None:
        return []
    return list(result) if isinstance(result, list | tuple) else [result]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op, name", READ)
def test_an_operand_may_lie_in_any_way(op, name, layout):
    arguments, expected = copy.deepcopy(calls()[op]), copy.deepcopy(calls()[op])
    x = LAYOUTS[layout](operands(op, arguments)[name])
    found, right = flat(raw(op, replaced(op, arguments, **{name: x}))), flat(raw(op, expected))
    for a, b in zip(found, right, strict=True):
        close(a, b)
    for n in WRITTEN.get(op, []):
        close(operands(op, arguments)[n], operands(op, expected)[n])


@needs_extension
@pytest.mark.parametrize("op, name", READ)
def test_an_operand_of_zeros_without_memory_is_zero(op, name):
    arguments, expected = copy.deepcopy(calls()[op]), copy.deepcopy(calls()[op])
    shape = operands(op, arguments)[name].shape
    found = raw(op, replaced(op, arguments, **{name: torch._efficientzerotensor(shape)}))
    right = raw(op, replaced(op, expected, **{name: torch.zeros(shape)}))
    for a, b in zip(flat(found), flat(right), strict=True):
        close(a, b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op, name", OVERWRITTEN)
def test_what_is_negated_is_not_written(op, name, way):
    arguments = copy.deepcopy(calls()[op])
    memory = operands(op, arguments)[name]
    before = memory.clone()
    said = refusal(way, op, replaced(op, arguments, **{name: torch._neg_view(memory)}))
    assert said is not None and torch.equal(memory, before)
    assert way == "raw" or f"{name} must not be a negated view" in said  # else torch's own words


@pytest.fixture(scope="module")
def gibibytes():
    """20 GiB of zeros in a file without blocks: what is not touched takes no memory."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(20 * 2**30)
        yield torch.from_file(file.name, shared=True, size=5 * 2**30)


@needs_extension
@pytest.mark.parametrize("op, name", EVERY)
def test_strides_beyond_2_31(op, name, gibibytes):
    """Rows that lie 2^29 elements apart: 2^31 bytes, and 2^31 elements for more than four."""
    arguments, expected = copy.deepcopy(calls()[op]), copy.deepcopy(calls()[op])
    given = operands(op, arguments)[name]
    if (op, name) == ("activate_", "x"):
        return  # contiguous
    far = gibibytes.as_strided(given.shape, (2**29, 1)[: given.dim()], 7).copy_(given)
    found, right = flat(raw(op, replaced(op, arguments, **{name: far}))), flat(raw(op, expected))
    for a, b in zip(found, right, strict=True):
        close(a, b)
    if name in WRITTEN.get(op, []):
        close(far, operands(op, expected)[name])


KINDS = [
    ("project_gate", 6), ("gate", 2), ("activate_", 2), ("batch_norm", 8), ("layer_norm", 4),
    ("linear_chain", 3), ("backpropagate", 3),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op, place", KINDS)
def test_kinds_and_params_out_of_range_are_refused(op, place, way):
    """By each op: of an unknown kind a kernel writes nothing."""
    for kind, param, word in (
        (10, 0.0, "kind"),
        (-1, 0.0, "kind"),
        (2, -0.5, "param"),
        (2, math.nan, "param"),
    ):
        arguments = list(copy.deepcopy(calls()[op]))
        for i, value in ((place, kind), (place + 1, param)):
            several = isinstance(arguments[i], list)
            arguments[i] = [value] * len(arguments[i]) if several else value
        assert word in (refusal(way, op, arguments) or ""), (kind, param)


@needs_extension
def test_results_that_no_memory_holds_are_refused():
    wide = torch.empty(0, 2**30)
    said = refusal("raw", "weight_gradients", [[wide], [wide]])
    assert "weight_gradients: no memory for a result of shape [1073741824, 1073741824]" in said


@needs_extension
@pytest.mark.parametrize("shape", [(6, 8), (0, 8), (6, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(op, shape):
    """Nothing, and strides and offsets: the fakes know them, and what is written is declared."""
    if op.startswith("layer_norm") and shape[1] == 0:
        return  # refused
    plain = calls(*shape)[op]
    if "norm" in op and shape[0] < 2:
        plain = [False if x is True else x for x in plain]
    check = torch.library.opcheck
    target = getattr(torch.ops.fastdfa, op).default
    check(target, tuple(plain))
    names = [n for n in operands(op, plain) if n not in WRITTEN.get(op, [])]
    for change in (stepped, offset):
        changed = {n: change(operands(op, plain)[n]) for n in names}
        check(target, tuple(replaced(op, plain, **changed)))
