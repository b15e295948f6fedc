"""Holds the root: `DFA` collects the points of a forward pass and broadcasts the error to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import arguments
from .engine import sharding, whole
from .engine.anchor import AnchorTape
from .engine.finish import ONE_ERROR, finish, low_of, sender_of, take_target
from .engine.handed import Handing
from .engine.inplace import class_of
from .engine.plan import names_of
from .engine.planner import Planner
from .engine.root import Root, exporting, roots_in
from .engine.tape import Tape, TracedTape, state
from .engine.witness import Readers, Witness
from .feedback import rule as rules
from .feedback.anchors import Anchors
from .feedback.bank import Bank, Layout
from .feedback.rule import Feedback
from .matrices import SHARED, Compression, Learning, Matrices, Rule, learning_of
from .nn.converted import Conversion
from .nn.point import cut_modules
from .ops import capture
from .ops.reference import accumulation_dtype
from .ops.tracing import check_or_untrace, traced, transformed, wants_gradient
from .ops.typed import uncompiled
from .projectors import Projector


class DFA(Root):
    """Trains the network it wraps by direct feedback alignment.

    Inside, every fastdfa layer and `FeedbackPoint` cuts the network at its input; in backward each
    such point receives `s e B_l` in place of its true gradient, e being the error at the
    output, [*rows, C] (arXiv 1609.01596, 1906.04554). The forward numbers are untouched.

    Args:
        module: the network; its output must be a tensor, unless `output` is given.
        feedback: the rule, or the name of a preset of `fastdfa.PRESETS`.
        output: the name of the submodule at whose output the error is taken, so that a model may
            return a dict or its loss, or feed back the error before a vocabulary projection.
            Nothing is cut after it: what follows trains by backprop. There is one error: a model
            of several heads concatenates their outputs in a submodule, which is named here.
        allow_bypass: accept paths that carry feedback past a cut, such as `h + layer(h)`.
        direct_gradients: deprecated, and without effect.
        matrices: the B to use in place of generated ones, already scaled: one [C, >= n_max] for
            all points, of which each takes its first n_l columns, or a dict of B_l [C, n_l] by the
            names of points, in the dtype of the network. They are parameters that do not require
            grad, and in the checkpoint. Of the rule, distribution, scale, density, `shared` and
            `dense` are without effect then. With `Feedback(anchor=)` they are where B begins.
        projector: what makes e B in place of this library, such as an optical processor
            (`fastdfa.projectors`): it takes the signal [M, C] in float32 or float64, and returns
            its product with a B of its own, [M, >= n_max], or a future of it, for which the first
            point that receives feedback waits. A point takes the first n_l columns of it, times
            `scale`.
        cut: at which of these inputs the network is cut: "all", or the names of points; or a number
            k, every k-th, in the order in which the module holds its layers and blocks. Where it is
            not cut, the true gradient of what is above goes on, up to the next cut. `()` cuts
            nowhere: backprop, by the same kernels. `model.cut` may be set anew.

    Attributes:
        target: what a signal of the target or a rule of learning reads, set before each forward
            pass that trains, which takes it: class indices [*rows], or of the output's shape
            [*rows, C]. A pass without gradients, or inside `fastdfa.backprop`, leaves it.
        compression: Q [C, r], once a B = Q P of low rank learns (`learn_feedback`).

    Buffers: `seed`, int64: the one source of randomness of B. It is in the checkpoint, B is not.
        The host reads it only after it was written. DistributedDataParallel writes it in every
        forward pass, and on a GPU each such read waits for the work before it. To avoid that, give
        `Feedback` a seed and DDP `broadcast_buffers=False`, which then leaves out the broadcast at
        construction too; or `forward_sync_buffers=False` (PyTorch 2.13), which does not.

    Raises:
        TypeError, ValueError: for arguments that are not so, or a `DFA` inside `module`.
    """

    looks_ahead = True  # whether layers may be computed ahead of their calls, or without them
    made_again = (*Root.made_again, "planner", "handing", "cut_at", "witness", "_after")
    settings = (
        "feedback", "cut", "output", "allow_bypass", "matrices", "projector", "learning",
        "compression",
    )  # fmt: skip
    settable = ("feedback", "cut", "target", "allow_bypass", "looks_ahead")
    passed_on = (*Root.passed_on, *settable, "output", "matrices", "projector", "compression",
                 "explained", "feedback_points", "learn_feedback", "learning", "anchors", "bank",
                 "planner")  # fmt: skip
    compression: nn.Parameter | None
    conversion: Conversion  # of a root that `convert` has made
    witness: Witness | None  # of its first backward passes, and None after these

    def __init__(
        self,
        module: nn.Module,
        feedback: Feedback | str | None = None,
        output: str | None = None,
        allow_bypass: bool = False,
        direct_gradients: bool = False,
        matrices: Tensor | Mapping[str, Tensor] | None = None,
        projector: Projector | None = None,
        cut: str | int | Sequence[str] = "all",
    ) -> None:
        rule = rules.make(feedback)
        super().__init__(module, rule.seed)
        _check_tap(module, output)
        _check_cut(module, cut)
        arguments.flag("allow_bypass", allow_bypass)
        arguments.flag("direct_gradients", direct_gradients)
        if projector is not None:
            arguments.function("projector", projector)
        if projector is not None and matrices is not None:
            raise ValueError("projector has a B of its own: expected no matrices beside it")
        if direct_gradients:
            warnings.warn(
                "direct_gradients is deprecated and without effect: leave it out",
                DeprecationWarning,
                stacklevel=2,
            )
        self.output = output
        self.allow_bypass = allow_bypass
        self.target: Tensor | None = None
        self.matrices = None if matrices is None else Matrices(matrices)
        self.bank = Bank(rule, self.matrices)
        self.learning: Learning | None = None
        self.register_parameter("compression", None)
        self.projector = projector
        self._cut = cut
        self.anchors: Anchors | None = None
        self._set_anchors(rule)
        self._reset()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the module's own output; its backward is that of DFA.

        Raises:
            TypeError, ValueError, RuntimeError: where the output or a point does not fit the
                contract, where a path leads round a cut, or inside another `DFA`.
        """
        if state.tape is not None or state.layer_rule is not None:
            raise RuntimeError("a DFA was called inside another root: wrap the outermost only")
        self.follow_modules()
        plain = not torch.is_grad_enabled() or exporting()
        if plain or any(self is root for root in state.true_gradients):
            return self.network(*args, **kwargs)
        if transformed():
            check_or_untrace()
        if state.instead and self in state.instead:
            return state.instead[self](args, kwargs)
        if self.anchors is not None and self._is_anchor(self.anchors):
            return self._anchored(self.anchors, args, kwargs)
        if len(args) == 1 and not kwargs and self._may_be_whole():
            found = self.planner.whole(self, *args)
            if found is not None:
                network, plan = found
                target = take_target(self)
                classes = plan.layout.classes
                sender = sender_of(self, plan.layout, args[0].device, classes, target)
                y = whole.forward(network, plan, *args, sender)
                return y if self.witness is None else self._watched(y, Readers((), ()))
        sharded = not traced() and sharding.watch_sharded_blocks(self.module)
        kind = TracedTape if torch.compiler.is_compiling() else Tape
        tape = kind(self, _inputs(args, kwargs), self.install_tap())
        # The weights of a sharded layer are there when it is called.
        tape.looks_ahead = self.looks_ahead and not sharded and self.projector is None
        return self.run(tape, args, kwargs)

    def _may_be_whole(self) -> bool:
        plain = self.learning is None and self.projector is None and self.output is None
        return plain and self.looks_ahead and not traced()

    @uncompiled
    def _is_anchor(self, anchors: Anchors) -> bool:
        """Counts a training pass, and returns whether it runs uncut; not traced, as it changes."""
        capture.refuse(
            "a CUDA graph was being captured when a DFA with anchored feedback was called, of "
            "which some passes run uncut: capture with model.feedback = replace(..., anchor=None)"
        )
        return anchors.due()

    @uncompiled
    def _anchored(self, anchors: Anchors, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = _inputs(args, kwargs)
        tape = AnchorTape(self, self.planner, anchors, inputs, self.install_tap())
        return self.run(tape, args, kwargs)

    def run(self, tape: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the module's output, of a forward pass that writes on this tape."""
        state.tape = tape
        try:
            y = self.network(*args, **kwargs)
        finally:
            state.tape = None
        if self.output is None:
            return tape.end(y)
        if tape.tapped is None:
            raise RuntimeError(
                f"output={self.output!r}: that submodule was not called in this forward pass, "
                "so there is no error to feed back"
            )
        return y

    # What a user asks for.

    @property
    def feedback(self) -> Feedback:
        """Returns the rule. A new one that has no `anchor` leaves B as it was fitted before."""
        return self.bank.rule

    @feedback.setter
    def feedback(self, feedback: Feedback | str | None) -> None:
        rule = rules.make(feedback)
        self._set_anchors(rule)
        self.bank.rule = rule

    def _set_anchors(self, rule: Feedback) -> None:
        """Makes what counts and fits, where a rule has anchors."""
        if rule.anchor is None:
            self.anchors = None
            return
        if self.learning is not None or self.projector is not None:
            other = "one that learns otherwise" if self.projector is None else "a projector's"
            raise ValueError(f"anchor fits B, and so cannot go with {other}; got {rule}")
        if self.matrices is None:
            self.matrices = self.bank.matrices = Matrices({})
        elif SHARED in self.matrices:
            raise ValueError(
                "anchor fits a B for each point: matrices must be a dict, got a tensor"
            )
        if self.anchors is None:
            self.anchors = Anchors(rule.anchor)
        self.anchors.every = rule.anchor

    @property
    def explained(self) -> dict[str, float]:
        """Returns, for every point that anchors have fitted, the share of the true gradient that
        its B can explain: 1 - |g - e B|^2 / |g|^2 over the passes so far. Where it is small,
        calibration does not help; `cut` may leave that point open."""
        return {} if self.anchors is None else self.anchors.explained(self.feedback_points)

    @property
    def cut(self) -> str | int | Sequence[str]:
        """Returns at which inputs the network is cut, as the argument says it."""
        return self._cut

    @cut.setter
    def cut(self, cut: str | int | Sequence[str]) -> None:
        _check_cut(self.module, cut)
        self._cut = cut
        self._find_names()

    @property
    def feedback_points(self) -> list[str]:
        """Returns the names of the points of the latest forward pass, from the input to the output.

        A point's name is that of the layer whose input it is; "#2" and so on are appended where
        the layer was called again.
        """
        layout = self.planner.layout
        return [] if layout is None else [point.name for point in layout.points]

    def feedback_matrix(self, name: str) -> Tensor:
        """Returns the scaled B_l [C, n_l] of a point of `feedback_points`.

        Raises:
            KeyError: if the latest forward pass had no such point.
            RuntimeError: where a projector has it.
        """
        if self.projector is not None:
            raise RuntimeError("feedback_matrix: B is the projector's")
        arguments.instance("name", name, str, "the name of a feedback point")
        matrix, layout = self._matrix(name), self.planner.layout
        if self.feedback.rank is None or layout is None:
            return matrix
        return self._low_as(layout, matrix) @ matrix

    def learn_feedback(
        self, rule: str | Rule = "kolen_pollack", compression: str | Compression | None = "oja"
    ) -> list[nn.Parameter]:
        """Makes the B_l of every point of the latest forward pass a parameter that learns.

        It starts as it is, whether generated or given, shared or not. From then on each backward
        pass adds to its `.grad` what the rule says, and an optimizer with these parameters updates
        it; give it the learning rate and weight decay of the weights for "kolen_pollack".

        A B = Q P of low rank (`Feedback(rank=r)`) learns after LDFA (arXiv 2502.20580): P_l [r,
        n_l] by the rule, from the compressed error e Q [M, r] in place of e; Q [C, r], which all
        points share, by another.

        Args:
            rule: a name of `fastdfa.matrices.LEARNING`, "kolen_pollack" (e^T h),
                "cross_correlation" (B - e^T h) or "local_classifier" ((softmax(h B^T) - t)^T h /
                M), or a function of (B_l [C, n_l], e [M, C], h [M, n_l]), h being what the point
                reads, that returns the gradient of B_l. A function with a parameter `target` is
                given the target t [M, C] by that name (see `DFA.target`), as "local_classifier"
                is. With "forward_gradient" the gradients come from `fastdfa.forward_gradient`
                alone.
            compression: of Q; "oja", by which Q follows the subspace of the error
                (`fastdfa.matrices.oja`), or a function of (Q [C, r], e [M, C]) that returns the
                gradient of Q; None leaves it as it is. Without effect where B has no rank.

        Returns:
            The parameters, in the order of `feedback_points`, and Q last where it learns.

        Raises:
            RuntimeError: before the first forward pass with a point, which tells the sizes.
            ValueError, TypeError: for a rule that is none, or with a signal of other columns than
                the error's or a projector; for a rule with a target where B is of low rank.
        """
        if self.anchors is not None:
            raise ValueError(f"learn_feedback needs a B without anchors, got {self.feedback}")
        chosen = learning_of(rule, compression, self.feedback.rank)
        layout = self.planner.layout
        if layout is None or not layout.points:
            raise RuntimeError(
                "learn_feedback needs the sizes of the points: call the model once before"
            )
        other = getattr(self.feedback.sends, "width", None) is not None
        if other or self.projector is not None:
            raise ValueError(
                "learn_feedback needs a B that is multiplied by the error or a signal of its "
                f"columns, got {self.feedback}{', and a projector' * (self.projector is not None)}"
            )
        made = {
            size.name: self._matrix(size.name).to(accumulation_dtype(size.dtype))
            for size in layout.points
        }
        moves = chosen.compression is not None  # whether Q does
        if self.feedback.rank is not None:
            low = self._low_as(layout, made[self.feedback_points[-1]])
            self.compression = nn.Parameter(low, moves)
        self.matrices = self.bank.matrices = Matrices(made)
        self.matrices.requires_grad_(True)
        self.learning = chosen if moves or chosen.rule is not None else None
        self._reset()
        self.planner.layout = layout
        self.bank.settle(self.read_seed(), layout)
        learnt = [self.matrices.of(name) for name in self.feedback_points]
        if moves and self.compression is not None:
            learnt.append(self.compression)
        return learnt

    def extra_repr(self) -> str:
        return repr(self.feedback)

    # The output and its backward.

    def finish(self, tape: Tape, y: Any) -> Any:
        """Returns y with the backward of DFA behind it; a tape calls it at its end."""
        y = finish(self, self.planner, tape, y)
        if traced() or self.witness is None or type(tape) is not Tape:
            return y
        return self._watched(y, Readers([point.layer for point in tape.in_order()], tape.unfed))

    def _watched(self, y: Tensor, readers: Readers) -> Tensor:
        """Returns y, whose backward pass is watched where it is one of the first."""
        if self.witness is not None and not self.witness.watch(self, y, readers):
            self.witness = None
        return y

    def columns(self, classes: int) -> int:
        """Returns the columns of what is projected, for an error of so many classes."""
        return self.feedback.sends.columns(index(classes))

    def _matrix(self, name: str) -> Tensor:
        """Returns the scaled B_l of a point, or P_l where B = Q P."""
        layout = self.planner.layout
        if layout is not None:
            for size in layout.points:
                if size.name == name:
                    return self.bank.matrix(self.read_seed(), layout, size)
        raise KeyError(f"no feedback point {name!r}; there are {self.feedback_points}")

    def _low_as(self, layout: Layout, matrix: Tensor) -> Tensor:
        """Returns Q for this P, of its dtype."""
        return low_of(self, layout.classes, matrix.device).to(matrix.dtype)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.anchors is not None and self.matrices is not None:  # which know no sizes yet
            _make_room(self, self.anchors, self.matrices, state, prefix)
        super()._load_from_state_dict(state, prefix, *args)

    # What is found in the modules, and found again where they have changed.

    def names_of_points(self, layers: Sequence[nn.Module]) -> list[str]:
        """Returns the names of the points that these layers read."""
        if any(layer not in self._names for layer in layers):  # made in this pass
            self._find_names()
        return names_of(layers, self._names)

    def holds(self, layer: nn.Module) -> bool:
        """Returns whether this layer is inside the network."""
        return layer in self._names

    def after(self, layer: nn.Module) -> nn.Module | None:
        """Returns the layer that most likely reads the output of this one."""
        return self._after.get(layer)

    def follows(self, layer: nn.Module, reader: nn.Module | None) -> None:
        """Notes that `reader` has read the output of `layer`, of several the first; or that none
        can be told ahead."""
        if reader is None:
            self._after[layer] = None
        else:
            self._after.setdefault(layer, reader)

    def _find_names(self) -> None:
        super()._find_names()
        self.bank.forget()
        self.planner.forget()
        self.cut_at = _cut_at(self.module, self._cut)
        self.witness = Witness()
        self._after: dict[nn.Module, nn.Module | None] = {}
        for module in self._names:
            if class_of(module) is nn.Sequential:
                inside = [m for m in module.children() if type(m) is not nn.Identity]
                self._after.update(pairwise(inside))

    def _reset(self) -> None:
        self.planner = Planner()
        self.handing = Handing(self, self.bank)
        self.bank.reset()
        super()._reset()
        self.install_tap()

    # The tap: a hook without a reference to this root, found by it when it runs.

    def install_tap(self) -> nn.Module | None:
        """Returns the submodule whose output is tapped, with the hook in place."""
        if self.output is None:
            return None
        tapped = self.module.get_submodule(self.output)
        if _tap not in tapped._forward_hooks.values():
            tapped.register_forward_hook(_tap)
        return tapped

    def give_up(self) -> None:
        tapped = self.install_tap()
        hooks = {} if tapped is None else tapped._forward_hooks
        for number in [number for number, hook in hooks.items() if hook is _tap]:
            del hooks[number]


@contextmanager
def backprop(model: nn.Module) -> Iterator[None]:
    """Lets forward passes of every `DFA` or `LayerFeedback` in `model` give true gradients, inside
    and in this thread.

    Raises:
        TypeError, ValueError: if there is none in `model`.
    """
    roots = tuple(roots_in(model, Root).values())
    before = state.true_gradients
    state.true_gradients = before + roots
    try:
        yield
    finally:
        state.true_gradients = before


def _tap(module: nn.Module, args: Any, output: Any) -> Any:
    """Ends the tape of this thread; the forward hook of the submodule named by `output`."""
    tape = state.tape
    if tape is None or tape.tap is not module:
        return None
    if tape.tapped is not None:
        raise RuntimeError(
            f"output={tape.root.output!r}: that submodule was called twice in one forward pass, "
            "so there are two errors. Call it once on the stacked inputs"
        )
    tape.tapped = tape.end(output)
    return tape.tapped


def _make_room(
    root: DFA, anchors: Anchors, matrices: Matrices, state: dict[str, Any], prefix: str
) -> None:
    """Makes what anchors fit, where a checkpoint has it and the root does not yet."""
    device = next((p.device for p in root.module.parameters()), None)
    begins = f"{prefix}matrices."
    for name, value in state.items():
        if name.startswith(begins):
            key = name.removeprefix(begins)
            if key not in matrices:
                matrices.add(key, torch.zeros_like(value, device=device))
            if f"{prefix}anchors.fits.{key}.second" in state:
                anchors.make_room(key, matrices.of(key))


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors among the arguments that require grad."""
    leaves = tree_leaves((args, kwargs))
    return [x for x in leaves if isinstance(x, Tensor) and wants_gradient(x)]


def _check_tap(module: nn.Module, output: str | None) -> None:
    if output is None:
        return
    names = [name for name, _ in module.named_modules() if name]
    if not isinstance(output, str):
        expected = "the name of one submodule"
        raise TypeError(f"{arguments.wrong_type('output', expected, output)}{ONE_ERROR}")
    if output not in names:
        raise arguments.wrong_value("output", arguments.one_of(names, "submodules"), output)


def _cut_at(module: nn.Module, cut: str | int | Sequence[str]) -> set[nn.Module] | None:
    """Returns the modules at whose inputs, or behind which, the network is cut; None for all."""
    if cut == "all":
        return None
    if isinstance(cut, int):
        return set(cut_modules(module)[cut - 1 :: cut])
    names = [cut] if isinstance(cut, str) else cut
    return {module.get_submodule(name.partition("#")[0]) for name in names}


def _check_cut(module: nn.Module, cut: object) -> None:
    names = (str, list, tuple, set, frozenset)
    if isinstance(cut, bool) or not isinstance(cut, (int, *names)):
        raise arguments.wrong_type("cut", "'all', names of points or a number", cut)
    if isinstance(cut, int):
        arguments.integer("cut", cut)
        return
    known = [name for name, inner in module.named_modules() if inner in cut_modules(module)]
    for name in [] if cut == "all" else [cut] if isinstance(cut, str) else cut:
        arguments.instance("cut", name, str, "'all', names of points or a number")
        if name.partition("#")[0] not in known:
            raise arguments.wrong_value("cut", arguments.one_of(known, "points"), name)
