"""One call of every op, and operands that no op can take, or that lie in memory in another way."""

import copy
import sys

import torch

import fastdfa

from .formulas import DISTRIBUTIONS
from .kernels import EXTENSION, REFUSED
from .networks import randn


def calls(rows=6, columns=8, dtype=torch.float32):
    """(op, arguments as its schema has them) of every op, by matrices [rows, columns]."""
    m, n = rows, columns

    def f(*shape, seed=0):
        return randn(*shape, seed=seed).to(dtype).tanh()

    h = [f(m, n, seed=1), f(m, 5, seed=2)]
    vectors = [f(n, seed=i).abs() + 0.5 for i in range(4)]
    return {
        "fill_feedback_": (f(m, n), 5, 0, 0),
        "project_gate": (
            f(m, 3), [f(3, max(n, 5))], 0, [0], 0, h, [3, 0], [0.0] * 2, [1.0] * 2, False, False
        ),
        "gate": (f(m, n), h[0], 3, 0.0),
        "activate_": (f(m, n), f(n), 3, 0.0),
        "batch_norm": (h[0], *vectors, m > 1, 0.1, 1e-3, 3, 0.0),
        "batch_norm_backward_": (f(m, n), *vectors[:1], h[0], *vectors[1:], True),
        "layer_norm": (h[0], *vectors[:2], 1e-3, 3, 0.0),
        "layer_norm_backward_": (f(m, n), h[0], f(m, seed=3), f(m, seed=4), vectors[0]),
        "linear_chain": (f(m, n), [f(5, n), f(4, 5)], [f(5), None], [3, 0], [0.0] * 2),
        "weight_gradients": (h, [f(m, 3), f(m, n)]),
        "backpropagate": (f(m, n), [f(n, 5)], [h[1]], [3], [0.0]),
    }  # fmt: skip


# What each op writes; all other operands it reads.
WRITTEN = {
    "fill_feedback_": ["out"],
    "activate_": ["x"],
    "batch_norm": ["running_mean", "running_var"],
    "batch_norm_backward_": ["delta"],
    "layer_norm_backward_": ["delta"],
}


def operands(op, arguments):
    """{name: tensor} of a call, by the names of the schema."""
    schema = SCHEMAS[op]
    found = {}
    for name, value in zip(schema, arguments, strict=True):
        values = value if isinstance(value, list) else [value]
        for i, x in enumerate(values):
            if isinstance(x, torch.Tensor):
                found[f"{name}[{i}]" if isinstance(value, list) else name] = x
    return found


SCHEMAS = {
    "fill_feedback_": "out seed stream distribution",
    "project_gate": "error feedback seed streams distribution saved kinds params scales sum_error "
    "allow_tf32",
    "gate": "grad saved kind param",
    "activate_": "x bias kind param",
    "batch_norm": "a weight bias running_mean running_var training momentum eps kind param",
    "batch_norm_backward_": "delta delta_sums a mean rstd weight training",
    "layer_norm": "a weight bias eps kind param",
    "layer_norm_backward_": "delta a mean rstd weight",
    "linear_chain": "x weights biases kinds params",
    "weight_gradients": "deltas inputs",
    "backpropagate": "delta weights saved kinds params",
}
SCHEMAS = {op: names.split() for op, names in SCHEMAS.items()}
EVERY = [(op, name) for op, arguments in calls().items() for name in operands(op, arguments)]


def replaced(op, arguments, **changes):
    """The arguments with some operands, by name, replaced."""
    arguments = [list(x) if isinstance(x, list) else x for x in arguments]
    for name, x in changes.items():
        base, _, index = name.partition("[")
        place = SCHEMAS[op].index(base)
        if index:
            arguments[place][int(index[:-1])] = x
        else:
            arguments[place] = x
    return arguments


def raw(op, arguments):
    return getattr(torch.ops.fastdfa, op)(*arguments)


def public(op, arguments):
    """The same by the function of fastdfa.ops."""
    function = getattr(fastdfa.ops, op)
    if op == "fill_feedback_":
        return function(*arguments[:-1], DISTRIBUTIONS[arguments[-1]])
    if op == "project_gate":
        error, feedback, seed, streams, code, *others, sum_error, tf32 = arguments
        return function(
            error, feedback, *others, sum_error=sum_error, seed=seed, streams=streams,
            distribution=DISTRIBUTIONS[code], allow_tf32=tf32,
        )  # fmt: skip
    return function(*arguments)


WAYS = {"raw": raw, "public": public} if EXTENSION else {"public": public}


def refusal(way, op, arguments):
    """What an op says where it refuses, or None."""
    try:
        WAYS[way](op, arguments)
    except REFUSED as error:
        return str(error)
    return None


def resized(x, nbytes):
    x = x.clone()
    x.untyped_storage().resize_(nbytes)
    return x


def placed(x, strides, offset):
    """A view that nobody has checked, as compiled code makes it."""
    return torch.ops.inductor._reinterpret_tensor(x.clone(), x.shape, strides, offset)


# Where memory is read that is not there.
LOST = {
    "freed": lambda x: resized(x, 0),
    "short of an element": lambda x: resized(x, x.untyped_storage().nbytes() - x.itemsize),
    "behind": lambda x: placed(x, x.stride(), 10**7),
    "before": lambda x: placed(x, x.stride(), -1),
    "far apart": lambda x: placed(x, (2**61, *x.stride()[1:]), 0),
    "overflowing": lambda x: placed(x, (2**63 - 1, *x.stride()[1:]), 1),
    "2^62 elements": lambda x: x.flatten()[:1].as_strided((2**31, 2**31), (0, 0)),
}

# What no kernel can read.
OTHER_KINDS = {
    "on another device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.expand(2, *x.shape).to_sparse_csr(),
    "opaque": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "complex": lambda x: x.to(torch.complex64).conj(),
    "integers": lambda x: x.long(),
    "8 bits": lambda x: x.to(torch.float8_e4m3fn),
    "one dimension more": lambda x: x.expand(2, *x.shape),
    "a number": lambda x: x.sum(),
}


def refuse_what_is_lost(way):
    """Run in a process of its own: prints what is tried, before it may crash, and what came."""
    for op, name in EVERY:
        for kind, change in LOST.items():
            arguments = copy.deepcopy(calls()[op])
            bad = replaced(op, arguments, **{name: change(operands(op, arguments)[name])})
            print(f"{op} of {name} {kind}", end=": ", flush=True)
            said = refusal(way, op, bad)
            named = said is not None and name in said and (way == "public" or op in said)
            print("refused" if named else f"NOT NAMED: {said}", flush=True)


if __name__ == "__main__":
    refuse_what_is_lost(sys.argv[1])
