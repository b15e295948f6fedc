"""Makes B learn the network's own derivative, by forward-mode differentiation: FDFA.

The best linear feedback from the output to a point is the Jacobian between them. One forward pass
in which a random p_l is added to every point, to first order, gives d = sum_l J_l p_l at the output
beside the output itself, and d^T p_l is J_l on average, as the p_l do not depend on each other
(forward gradient with momentum: arXiv 2212.07282).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .dfa import DFA
from .diagnostics.untouched import called, on_copies_of_buffers, roots_of, unwrapped
from .engine.finish import check_output
from .engine.nodes import Edge
from .engine.plan import lay_out, what_is_read
from .engine.root import only_root
from .engine.tape import Point, Tape
from .matrices import Matrices


def forward_gradient(model: nn.Module, x: Any) -> None:
    """Adds B_l - d^T p_l / M to the `.grad` of every B_l [C, n_l] of a DFA, M being the rows.

    So SGD of rate 1 - m on B makes it an average over steps, with momentum m, of estimates of the
    Jacobian of the output with respect to point l. (Where B = Q P, P_l - (d Q)^T p_l / M for P_l;
    Q learns in the backward pass.) To be called before an optimizer's step, after
    `model.learn_feedback("forward_gradient")`. It costs two to three forward passes, and leaves
    buffers as they are; p is drawn by torch's generators, and so is dropout.

        model(x)                                           # tells the sizes
        feedback = model.learn_feedback("forward_gradient")
        optimizer = torch.optim.SGD([{"params": model.module.parameters()},
                                     {"params": feedback, "lr": 0.1}], lr=0.05)

    Args:
        model: a `DFA`, or a module that holds one.
        x: the input of the `DFA`; a tuple holds several arguments, a dict keyword arguments.

    Raises:
        TypeError, ValueError: for a model that does not hold one `DFA`, or one whose feedback does
            not learn so, or has no B that fits a point.
        RuntimeError: where a layer has no forward-mode derivative.
    """
    root = only_root(roots_of(unwrapped(model)))
    if not root.matrices or not all(B.requires_grad for B in root.matrices.values()):
        raise ValueError(
            "model must have learning feedback: call learn_feedback('forward_gradient') once"
        )
    with forward_ad.dual_level(), torch.enable_grad(), on_copies_of_buffers(root):
        tape = _PerturbedPass(root)
        with sdpa_kernel(SDPBackend.MATH):  # the one attention with a forward-mode derivative
            _run(root, tape, x)
        estimates = tape.estimates(root.matrices)
    for name, estimate in estimates.items():
        B = root.matrices.of(name)
        gradient = B.detach() - estimate.to(B)
        B.grad = gradient if B.grad is None else B.grad + gradient


def _run(root: DFA, tape: Tape, x: Any) -> None:
    try:
        called(lambda *args, **kwargs: root.run(tape, args, kwargs), x)
    except NotImplementedError as error:
        raise RuntimeError(
            "forward_gradient needs the forward-mode derivative of every layer, and one has none: "
            "write it as other functions of torch, give its autograd function a jvp, or let B "
            f"learn by another rule than 'forward_gradient'. {error}"
        ) from error


class _PerturbedPass(Tape):
    """Adds a random tangent to every point of a forward pass."""

    looks_ahead = False
    cuts = False
    root: DFA
    gates = False  # the layers run as torch's own functions, which have forward derivatives

    def __init__(self, root: DFA) -> None:
        super().__init__(root, [], root.install_tap())
        self.found: dict[int, tuple[Tensor, Point, Tensor]] = {}  # by the id of the tensor read
        self.duals: set[int] = set()  # their ids: a layer behind a `FeedbackPoint` reads one
        self.derivative: Tensor | None = None  # d, of the shape of the output
        self.rows = 0

    def cut(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Tensor:
        if id(x) in self.duals:
            return x
        if id(x) not in self.found:
            value, tangent = forward_ad.unpack_dual(x)
            value = value.detach()
            p = torch.randn_like(value)
            point = Point(layer, p, p, None, None, 0, rows, features, None)
            total = p if tangent is None else p + tangent.detach()
            dual = forward_ad.make_dual(value, total).requires_grad_()
            self.found[id(x)] = (x, point, dual)
            self.duals.add(id(dual))
        return self.found[id(x)][2]

    def read(self, x: Tensor, edge: Edge | None) -> None:
        pass

    def end(self, y: Any) -> Any:
        check_output(y, self.root.output)
        self.rows = y.shape[:-1].numel()
        tangent = forward_ad.unpack_dual(y).tangent
        self.derivative = torch.zeros_like(y) if tangent is None else tangent.detach()
        return y

    def estimates(self, matrices: Matrices) -> dict[str, Tensor]:
        """Returns d^T p_l / M [C, n_l] by the points' names; (d Q)^T p_l / M where B = Q P.

        Raises:
            TypeError, ValueError: where a point has no B among the matrices that fits.
        """
        points = [point for _, point, _ in self.found.values()]
        assert self.derivative is not None  # as the pass is over
        columns = self.root.columns(self.derivative.shape[-1])
        names = self.root.names_of_points([point.layer for point in points])
        layout = lay_out(points, names, self.derivative, columns)
        matrices.check(self.root.bank.rule.rows(columns), layout.points)
        d = self.derivative.reshape(self.rows, -1)
        if self.root.compression is not None:
            d = d @ self.root.compression.detach().to(d)
        return {
            name: d.t() @ what_is_read(point, self.rows).to(d) / max(self.rows, 1)
            for name, point in zip(names, points, strict=True)
        }
