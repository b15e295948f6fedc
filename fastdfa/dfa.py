"""The root: `DFA` collects the points of a forward pass and broadcasts the error to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import feedback as feedback_rules
from . import fsdp, graph, network, ops, plan
from .broadcast import Broadcast, BroadcastInTurn, Group, Send, Target, announce
from .feedback import DenseCache, Feedback, Source
from .ops.reference import accumulation_dtype
from .root import Root, names_in
from .tape import Chain, Point, Receiver, Tape, state


class Layout(NamedTuple):
    """The sizes of a forward pass: classes C, and (name, n_l, dtype, device) of every point."""

    classes: int
    points: tuple[tuple[str, int, torch.dtype, torch.device], ...]

    @property
    def widest(self) -> int:
        return max(features for _, features, _, _ in self.points)


class Settled(NamedTuple):
    """What settles the B of a point: its name, n_l, the scale of the entries, and the stream."""

    name: str
    features: int
    scale: float
    stream: int


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
        direct_gradients: where `module` is an nn.Sequential of fastdfa.Linear, backward writes
            `.grad` itself, round autograd's accumulation, which takes 3 us a parameter. Then
            `torch.autograd.grad` finds no parameter, `backward(inputs=...)` cannot leave any out,
            and several processes (DistributedDataParallel, FSDP) are refused; on CUDA, call
            backward on the stream of the forward pass. A network with hooks on gradients of
            parameters trains as without this option.

    Buffers: `seed`, int64: the one source of randomness of B. It is in the checkpoint, B is not.
        The host reads it only after it was written. DistributedDataParallel writes it in every
        forward pass, and on a GPU each such read waits for the work before it. To avoid that, give
        `Feedback` a seed and DDP `broadcast_buffers=False`, which then leaves out the broadcast at
        construction too; or `forward_sync_buffers=False` (PyTorch 2.13), which does not.

    Raises:
        TypeError, ValueError: for arguments that are not so, or a `DFA` inside `module`.
    """

    looks_ahead = True  # whether layers may be computed ahead of their calls, or without them
    made_again = (
        *Root.made_again, "_layout", "_scales", "_streams", "_cache", "_plan", "_network",
        "_in_vain", "_names", "_in_sequentials",
    )  # fmt: skip

    def __init__(
        self,
        module: nn.Module,
        feedback: Feedback | str | None = None,
        output: str | None = None,
        allow_bypass: bool = False,
        direct_gradients: bool = False,
    ) -> None:
        rule = feedback_rules.make(feedback)
        super().__init__(module, rule.seed)
        _check_tap(module, output)
        self.feedback = rule
        self.output = output
        self.allow_bypass = allow_bypass
        self.direct_gradients = direct_gradients
        self._reset()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output; its backward is that of DFA.

        Raises:
            TypeError, ValueError, RuntimeError: where the output or a point does not fit the
                contract, where a path leads round a cut, or inside another `DFA`.
        """
        if state.tape is not None or state.layer_feedback is not None:
            raise RuntimeError("a DFA was called inside another root: wrap the outermost only")
        # An exported program has no backward.
        plain = not torch.is_grad_enabled() or torch.compiler.is_exporting()
        if plain or any(self is root for root in state.true_gradients):
            return self.module(*args, **kwargs)
        if state.instead and self in state.instead:
            return state.instead[self](args, kwargs)
        whole = network.find(self, args, kwargs)
        if whole is not None and self._network is not None and self._network.key == whole.key:
            return network.forward(whole, self._network, *args)
        sharded = not torch.compiler.is_compiling() and fsdp.watch_sharded_blocks(self.module)
        inputs = [x for x in tree_leaves((args, kwargs)) if _requires_grad(x)]
        tape = Tape(self, inputs, self._install_tap())
        # The weights of a sharded layer are there when it is called.
        tape.looks_ahead = self.looks_ahead and not sharded
        y = self._run(tape, args, kwargs)
        if whole is not None:
            self._network = network.planned(whole, self._plan)
        return y

    def _run(self, tape: Tape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output, of a forward pass that writes on this tape."""
        state.tape = tape
        try:
            y = self.module(*args, **kwargs)
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

    @property
    def feedback_points(self) -> list[str]:
        """Names of the points of the latest forward pass, from the input to the output.

        A point's name is that of the layer whose input it is; "#2" and so on are appended where
        the layer was called again.
        """
        return [] if self._layout is None else [name for name, *_ in self._layout.points]

    def feedback_matrix(self, name: str) -> Tensor:
        """The scaled B_l [C, n_l] of a point of `feedback_points`.

        Raises:
            KeyError: if the latest forward pass had no such point.
        """
        for point, features, dtype, device in self._layout.points if self._layout else ():
            if point != name:
                continue
            matrix = ops.feedback(
                self._layout.classes,
                features,
                seed=self.read_seed(),
                stream=self.feedback.stream(name),
                distribution=self.feedback.distribution,
                dtype=accumulation_dtype(dtype),
                device=device,
            )
            widest = self._layout.widest
            return matrix * self.feedback.deviation(self._layout.classes, features, widest)
        raise KeyError(f"no feedback point {name!r}; there are {self.feedback_points}")

    def extra_repr(self) -> str:
        return repr(self.feedback)

    # The output and its backward.

    def _broadcast(self, tape: Tape, y: Any) -> Any:
        """Returns y with the backward of DFA behind it."""
        check_output(y, self.output)
        units = tape.in_order()
        for unit in units:
            if isinstance(unit, Chain) and unit.called < len(unit.layers):
                self._in_vain.update(unit.layers)
        seed = self.read_seed()
        if torch.compiler.is_compiling():  # a traced plan is part of the graph
            made = self._planned(tape, units, y, None, seed)
        else:
            made = self._plan_of(tape, units, y, seed)
        y = self._fed(made.nodes, plan.receivers(units, made.chains), y)
        if not made.chains:
            return y
        chains = [(node, units[node.unit]) for node in made.chains]
        return announce(y, [(chain, node.group, node.dense) for node, chain in chains])

    def _plan_of(self, tape: Tape, units: list[Point | Chain], y: Tensor, seed: int) -> plan.Plan:
        """The plan of the pass before, where that serves this one as well."""
        key = plan.key(units, y)
        if key is not None:
            settings = (self.feedback, ops.allow_tf32(y.device, torch.float32))
            key = (*key, tape.in_turn, seed, *settings)
        made = self._plan
        if key is None or made is None or made.key != key:
            made = self._planned(tape, units, y, key, seed)
            self._plan = None if key is None else made
        elif any(unit.modified for unit in units):
            points = plan.expanded(units)
            plan.check_unmodified(points, self._name(points))
        return made

    def _planned(
        self, tape: Tape, units: list[Point | Chain], y: Tensor, key: Any, seed: int
    ) -> plan.Plan:
        """Checks a forward pass and plans its backward."""
        every = plan.expanded(units)
        places = plan.fed(every)
        points = [every[place] for place in places]
        eager = not torch.compiler.is_compiling()
        names = self._name(points)
        layout = self._lay_out(points, names, y)
        if eager and layout != self._layout:
            graph.check(self, tape, points, names, y)
        if not points:
            return plan.Plan(key, [], [])
        settled, classes, widest = self._settled(layout), layout.classes, layout.widest
        feeds = self._feeds(points, places, settled, y, widest)
        whole = plan.whole_chains(units, dict(zip(places, feeds, strict=True)), y.device)
        chains = []
        for unit, its in whole.items():
            kind = (units[unit].saved[0].dtype, y.device)
            node = self._node(plan.Batch(*kind, its, [], False), seed, classes, widest)
            chains.append(plan.ChainNode(node.group, node.dense, unit))
        in_chains = {feed.place for its in whole.values() for feed in its}
        left = [k for k, feed in enumerate(feeds) if feed.place not in in_chains]
        points, feeds = [points[k] for k in left], [feeds[k] for k in left]
        in_turn = eager and tape.in_turn
        return plan.Plan(key, self._nodes(points, feeds, seed, classes, widest, in_turn), chains)

    def _lay_out(self, points: list[Point], names: list[str], y: Tensor) -> Layout:
        """The sizes of a pass; an error where the rows of a point are not those of y."""
        sizes = tuple(
            (name, plan.features_of(point, name, y), point.tensor.dtype, point.tensor.device)
            for point, name in zip(points, names, strict=True)
        )
        return Layout(index(y.shape[-1]), sizes)

    def _settled(self, layout: Layout) -> list[Settled]:
        """Of every point, what settles its B; an error where a size is not as before."""
        scales, streams = self._settle(*layout)
        return [
            Settled(name, features, scale, stream)
            for (name, features, _, _), scale, stream in zip(
                layout.points, scales, streams, strict=True
            )
        ]

    def _feeds(
        self,
        points: list[Point],
        places: list[int],
        settled: list[Settled],
        y: Tensor,
        widest: int,
    ) -> list[plan.Feed]:
        """The products for points, which stand at these places among the receivers."""
        if not torch.compiler.is_compiling():
            plan.check_unmodified(points, [each.name for each in settled])
        classes = index(y.shape[-1])
        return [
            plan.feed_of(point, place, y, *each[1:], self._keeps_dense(classes, widest, point))
            for point, place, each in zip(points, places, settled, strict=True)
        ]

    def _nodes(
        self,
        points: list[Point],
        feeds: list[plan.Feed],
        seed: int,
        classes: int,
        widest: int,
        in_turn: bool,
    ) -> list[plan.Node]:
        """The nodes that feed points, from the input up: the top group is the first in backward."""
        batches = plan.batches(points, feeds, in_turn) if points else []
        return [self._node(batch, seed, classes, widest) for batch in reversed(batches)]

    def _feed(
        self, points: list[Point], settled: list[Settled], widest: int, y: Tensor, in_turn: bool
    ) -> Tensor:
        """Returns y, in the backward of which the error is fed to these points of a layout."""
        feeds = self._feeds(points, list(range(len(points))), settled, y, widest)
        seed, classes = self.read_seed(), index(y.shape[-1])
        nodes = self._nodes(points, feeds, seed, classes, widest, in_turn)
        return self._fed(nodes, [point.receiver for point in points], y)

    def _fed(self, nodes: list[plan.Node], receivers: list[Receiver], y: Tensor) -> Tensor:
        """y behind all the nodes."""
        # What passes through the nodes of each device: y itself, or what stands for it there.
        passing = {y.device: y}
        for node in nodes:
            device, tensors = node.group.device, node.tensors(receivers)
            if torch.compiler.is_compiling():
                tensors = plan.without_repeats(tensors)
            if device not in passing:
                passing[device] = y.new_empty((), device=device).expand(y.shape)
            if node.gate is None:
                passing[device] = Broadcast.apply(node.group, passing[device], *tensors)
            else:
                pairs = zip(node.tokens, node.gate, strict=True)
                fed = [receivers[place][5] if gate else None for place, gate in pairs]
                passing[device] = BroadcastInTurn.apply(node.group, fed, passing[device], *tensors)
        y = passing.pop(y.device)
        for there in passing.values():
            y = Send.apply(y, there)
        return y

    def _node(self, batch: plan.Batch, seed: int, classes: int, widest: int) -> plan.Node:
        rule = self.feedback
        projections: list[Target] = []
        for feed in batch.tokens:
            if feed.target not in projections:
                projections.append(feed.target)
        fused = tuple(feed.target for feed in batch.fused)
        dense = self._dense_matrices([*fused, *projections], seed, classes, widest, batch)
        group = Group(
            fused=fused,
            affine=tuple(feed.affine for feed in batch.fused),
            projections=tuple(projections),
            token_projection=tuple(projections.index(feed.target) for feed in batch.tokens),
            dtype=batch.dtype,
            device=batch.device,
            seed=seed,
            distribution=rule.distribution,
            shared=rule.shared,
            sum_error=rule.error == "sum",
            allow_tf32=ops.allow_tf32(batch.device, batch.dtype),
            dense=len(dense),
        )
        return plan.Node(
            group,
            dense,
            [feed.place for feed in batch.fused],
            [feed.place for feed in batch.tokens],
            [feed.fused for feed in batch.tokens] if batch.in_turn else None,
        )

    def _dense_matrices(
        self, targets: list[Target], seed: int, classes: int, widest: int, batch: plan.Batch
    ) -> list[Tensor]:
        """One B for all targets or one for each; none where one is too large to be kept."""
        dtype = ops.feedback_dtype(batch.device, batch.dtype, classes)
        sizes = [
            (t.stream, widest if self.feedback.shared else t.features, t.channels_last)
            for t in targets
        ]
        if self.feedback.shared and not any(order for *_, order in sizes):
            sizes = sizes[:1]
        rule = self.feedback
        if not all(feedback_rules.fits_dense(rule, classes, n, dtype) for _, n, _ in sizes):
            return []
        matrices: list[Tensor] = []
        for stream, features, order in sizes:
            matrices += self._dense(seed, stream, classes, features, order, dtype, batch.device)
        return matrices

    def _keeps_dense(self, classes: int, widest: int, point: Point) -> bool:
        dtype = accumulation_dtype(point.tensor.dtype)
        return feedback_rules.fits_dense(self.feedback, classes, widest, dtype)

    # What is settled once, outside the traced graph: a compiled step sees constants, guarded by
    # the arguments.

    @torch.compiler.assume_constant_result
    def _settle(
        self, classes: int, sizes: tuple[tuple[str, int, torch.dtype, torch.device], ...]
    ) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Scale and stream of every point; remembers the sizes, which may not change."""
        layout = Layout(classes, sizes)
        if layout != self._layout:
            _check_same_features(self._layout, layout)
            self._layout = layout
            self._scales = tuple(
                self.feedback.deviation(classes, features, layout.widest)
                for _, features, _, _ in sizes
            )
            self._streams = tuple(self.feedback.stream(name) for name, *_ in sizes)
        return self._scales, self._streams

    @torch.compiler.assume_constant_result
    def _dense(
        self,
        seed: int,
        stream: int,
        classes: int,
        columns: int,
        channels_last: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor]:
        # In a tuple, as Dynamo takes a bare tensor from one place of the code only once.
        source = Source(seed, stream, self.feedback.distribution, dtype, device)
        return (self._cache.get(source, classes, columns, channels_last),)

    # Names.

    def _name(self, points: list[Point]) -> list[str]:
        """The layers' names, with "#2" and so on for the second call of one."""
        names: list[str] = []
        for point in points:
            if point.layer not in self._names:
                self._find_names()
            name = self._names.get(point.layer, type(point.layer).__name__)
            calls = 1
            while (name if calls == 1 else f"{name}#{calls}") in names:
                calls += 1
            names.append(name if calls == 1 else f"{name}#{calls}")
        return names

    def place(self, layer: nn.Module) -> tuple[nn.Sequential | None, int]:
        """In which `nn.Sequential` a layer stands, and where; unless in an earlier pass it was
        computed ahead among layers whose calls did not come."""
        return (None, 0) if layer in self._in_vain else self._in_sequentials.get(layer, (None, 0))

    def _find_names(self) -> None:
        self._names = names_in(self.module)
        self._in_sequentials: dict[nn.Module, tuple[nn.Sequential, int]] = {}
        for module in self._names:
            if type(module) is nn.Sequential:
                self._in_sequentials |= {layer: (module, i) for i, layer in enumerate(module)}

    # The tap: a hook without a reference to this root, found by it when it runs.

    def _install_tap(self) -> nn.Module | None:
        """Returns the submodule whose output is tapped, with the hook in place."""
        if self.output is None:
            return None
        tapped = self.module.get_submodule(self.output)
        if _tap not in tapped._forward_hooks.values():
            tapped.register_forward_hook(_tap)
        return tapped

    def _reset(self) -> None:
        super()._reset()
        self._layout: Layout | None = None
        self._scales: tuple[float, ...] = ()
        self._streams: tuple[int, ...] = ()
        self._cache = DenseCache()
        self._plan: plan.Plan | None = None
        self._network: network.Planned | None = None
        self._in_vain: set[nn.Module] = set()
        self._find_names()
        self._install_tap()


@contextmanager
def backprop(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes of every `DFA` or `LayerFeedback` in `model` give true gradients (in
    this thread).

    Raises:
        ValueError: if there is none in `model`.
    """
    roots = tuple(module for module in model.modules() if isinstance(module, Root))
    if not roots:
        raise ValueError(f"model must hold a fastdfa.DFA, got {type(model).__name__} without one")
    before = state.true_gradients
    state.true_gradients = before + roots
    try:
        yield
    finally:
        state.true_gradients = before


def _tap(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of the submodule named by `output`: there the tape of this thread ends."""
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


_ONE_ERROR = (
    ". Several heads have one error where a submodule returns torch.cat(outputs, -1), and what is "
    "behind it splits them"
)


def _requires_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _check_tap(module: nn.Module, output: str | None) -> None:
    if output is None:
        return
    if not isinstance(output, str):
        raise TypeError(
            f"output must be the name of one submodule, got {type(output).__name__}{_ONE_ERROR}"
        )
    names = [name for name, _ in module.named_modules() if name]
    if output not in names:
        raise ValueError(f"output must be one of {', '.join(names)}, got {output!r}")


def check_output(y: Any, tap: str | None) -> None:
    where = "the output of the module" if tap is None else f"the output of {tap!r}"
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{where} must be a tensor, got {type(y).__name__}; "
            f"DFA(module, output=name) takes the error at a submodule's output{_ONE_ERROR}"
        )
    if not y.is_floating_point():
        raise TypeError(f"{where} must be of a floating dtype, got {y.dtype}")
    if y.dim() == 0:
        raise ValueError(
            f"{where} must have shape [*rows, C], got a scalar; if it is the loss, "
            "DFA(module, output=name) takes the error at a submodule's output"
        )


def _check_same_features(before: Layout | None, now: Layout) -> None:
    if before is None:
        return
    widths = {name: features for name, features, _, _ in before.points}
    for name, features, _, _ in now.points:
        if widths.get(name, features) != features:
            raise ValueError(
                f"feedback point {name!r}: expected {widths[name]} features as in earlier "
                f"forward passes, got {features}; B has a fixed size"
            )
    if before.classes != now.classes:
        raise ValueError(
            f"the error has {now.classes} features, expected {before.classes} as in earlier "
            "forward passes; B has a fixed size"
        )
