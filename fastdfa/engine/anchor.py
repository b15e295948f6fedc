"""Runs the anchor passes of a root with anchored feedback: backprop, observed, by which every B is
fitted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed import is_available
from torch.nn.parallel import DistributedDataParallel

from ..feedback.anchors import MOST_COLUMNS, Anchors, Moments
from ..feedback.bank import Layout
from ..matrices import Matrices
from ..ops.reference import accumulation_dtype
from .broadcast import Sender, as_matrix
from .finish import check_output, sender_of, take_target
from .plan import in_rows, lay_out
from .planner import Planner
from .tape import Point, TrainedRoot
from .uncut import UncutTape


class AnchorTape(UncutTape):
    """Lets a forward pass be one of backprop, whose backward pass fits every B.

    Raises:
        RuntimeError: for a root whose parameters are sharded.
    """

    def __init__(
        self,
        root: TrainedRoot,
        planner: Planner,
        anchors: Anchors,
        inputs: list[Tensor],
        tap: nn.Module | None,
    ) -> None:
        assert root.matrices is not None  # as an anchored root has some
        self.observation = Observation(anchors, root.matrices)
        super().__init__(root, inputs, tap, self.observation.gradient)
        self.planner = planner
        _check_not_sharded(root.module)

    def end(self, y: Any) -> Any:
        """Returns y, at which the observation of the backward pass begins.

        Raises:
            TypeError, ValueError: for an output or a point that does not fit the contract, and for
                an error of more columns than sums are held for.
        """
        root, points = self.root, self.in_order()
        check_output(y, root.output)
        columns = root.columns(y.shape[-1])
        names = root.names_of_points([point.layer for point in points])
        layout = self.planner.layout = lay_out(points, names, y, columns)
        sender = sender_of(root, layout, y.device, columns, take_target(root))
        if not points:
            return y
        _check_columns(root.bank.rule.rows(columns))
        root.bank.settle(root.read_seed(), layout)
        self.observation.expect(points, layout, sender, y)
        y = y.view_as(y)
        y.register_hook(self.observation.begin)
        return y


class Observation:
    """Takes the error and the true gradients of one anchor pass, and fits B at its end.

    A point whose gradient did not come is left as it was. Under `DistributedDataParallel` the sums
    are those of all processes, so that these go on with one B.
    """

    def __init__(self, anchors: Anchors, matrices: Matrices) -> None:
        self.anchors, self.matrices = anchors, matrices
        self.group = _processes()
        self.sent: Tensor | None = None  # z [M, C], while a backward pass is under way
        self.moments: dict[int, Moments] = {}

    def expect(self, points: list[Point], layout: Layout, sender: Sender | None, y: Tensor) -> None:
        """Notes what the forward pass has told: the points, and how the error is sent."""
        self.names = [size.name for size in layout.points]
        self.dimensions = [(point.rows, point.features) for point in points]
        self.sender = None if sender is None else sender.checked(y)
        needs_output = sender is not None and sender.signal.needs_output
        self.output = y.detach() if needs_output else None

    def begin(self, error: Tensor) -> None:
        """Takes the error [*rows, C]; the hook of the output."""
        error = error.detach()
        sent: Any = as_matrix(error) if self.sender is None else self.sender.of(error, self.output)
        self.sent = sent.to(accumulation_dtype(sent.dtype))
        Variable._execution_engine.queue_callback(self.end)

    def gradient(self, number: int, gradient: Tensor) -> None:
        """Takes the true gradient of a point; the hook of that."""
        if self.sent is None:  # the loss does not depend on the output
            return
        matrix = self.matrices.of(self.names[number])
        sent, gradient = self.sent.to(matrix), gradient.detach().to(matrix)
        rows = in_rows(gradient, len(sent), *self.dimensions[number])
        self.moments[number] = Moments.of(sent, rows, gradient.square().sum())

    @torch.no_grad()
    def end(self) -> None:
        """Fits every B whose gradient has come."""
        moments, self.moments, self.sent = self.moments, {}, None
        for number, sums in sorted(moments.items()):
            if self.group is not None:
                for total in sums:
                    torch.distributed.all_reduce(total, group=self.group)
            name = self.names[number]
            self.anchors.fit(name, self.matrices.of(name).detach(), sums)


def _processes() -> Any:
    """Returns the processes of the `DistributedDataParallel` that calls the root, if one does."""
    wrapper = DistributedDataParallel._get_active_ddp_module() if is_available() else None
    return None if wrapper is None else wrapper.process_group


def _check_not_sharded(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise RuntimeError(
                "anchored feedback observes the gradients of whole batches, and does not know how "
                f"fully_shard has split them: expected plain parameters, got {name!r} sharded. "
                "Shard after model.feedback = replace(model.feedback, anchor=None), or use "
                "DistributedDataParallel"
            )


def _check_columns(columns: int) -> None:
    if columns > MOST_COLUMNS:
        raise ValueError(
            f"anchor: expected an error of at most {MOST_COLUMNS} columns, got {columns}, of whose "
            "products [C, C] every point would hold a sum; give Feedback a rank, or take the error "
            "before the wide layer by DFA(output=name)"
        )
