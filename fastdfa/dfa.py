"""The root: `DFA` collects the points of a forward pass and broadcasts the error to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import ops, signals
from .engine import bypass, network, plan
from .engine import sharding as fsdp
from .engine.broadcast import (
    Broadcast,
    BroadcastInTurn,
    Group,
    Pending,
    Send,
    Sender,
    Target,
    announce,
)
from .engine.fused import LINEAR
from .engine.root import Root, exporting
from .engine.tape import Chain, Point, Receiver, Tape, state
from .feedback import rule as feedback_rules
from .feedback.rule import LOW_RANK_STREAM, DenseCache, Feedback, Source
from .matrices import Compression, Learning, Matrices, Rule, learning_of, learnt
from .ops.reference import accumulation_dtype
from .projectors import Projector


class Layout(NamedTuple):
    """The sizes of a forward pass: what is projected has C columns, as the error has, unless the
    signal has others; and (name, n_l, dtype, device) of every point."""

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
        direct_gradients: where `module` is an nn.Sequential of fastdfa.Linear, norms and
            activations, backward writes `.grad` itself, round autograd's accumulation, which takes
            3 us a parameter. Then `torch.autograd.grad` finds no parameter,
            `backward(inputs=...)` cannot leave any out, and several processes
            (DistributedDataParallel, FSDP) are refused; on CUDA, call backward on the stream of
            the forward pass. A network with hooks on gradients of parameters trains as without
            this option.
        matrices: the B to use in place of generated ones, already scaled: one [C, >= n_max] for
            all points, of which each takes its first n_l columns, or a dict of B_l [C, n_l] by the
            names of points, in the dtype of the network. They are parameters that do not require
            grad, and in the checkpoint. Of the rule, distribution, scale, density, `shared` and
            `dense` are without effect then.
        projector: what makes e B in place of this library, such as an optical processor
            (`fastdfa.projectors`): it takes the signal [M, C] in float32 or float64, and returns
            its product with a B of its own, [M, >= n_max], or a future of it, for which the first
            point that is fed waits. A point takes the first n_l columns of it, times `scale`.

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
    made_again = (
        *Root.made_again, "_layout", "_sizes", "_checked", "_cache", "_plan", "_network",
        "_in_vain", "_in_sequentials",
    )  # fmt: skip

    def __init__(
        self,
        module: nn.Module,
        feedback: Feedback | str | None = None,
        output: str | None = None,
        allow_bypass: bool = False,
        direct_gradients: bool = False,
        matrices: Tensor | Mapping[str, Tensor] | None = None,
        projector: Projector | None = None,
    ) -> None:
        rule = feedback_rules.make(feedback)
        super().__init__(module, rule.seed)
        _check_tap(module, output)
        self.feedback = rule
        self.output = output
        self.allow_bypass = allow_bypass
        self.direct_gradients = direct_gradients
        self.target: Tensor | None = None
        self.matrices = None if matrices is None else Matrices(matrices)
        self.learning: Learning | None = None
        self.register_parameter("compression", None)
        if projector is not None and not callable(projector):
            raise TypeError(f"projector must be callable, got {type(projector).__name__}")
        if projector is not None and matrices is not None:
            raise ValueError("projector has a B of its own: expected no matrices beside it")
        self.projector = projector
        self._reset()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own output; its backward is that of DFA.

        Raises:
            TypeError, ValueError, RuntimeError: where the output or a point does not fit the
                contract, where a path leads round a cut, or inside another `DFA`.
        """
        if state.tape is not None or state.layer_feedback is not None:
            raise RuntimeError("a DFA was called inside another root: wrap the outermost only")
        self.follow_modules()
        plain = not torch.is_grad_enabled() or exporting()
        if plain or any(self is root for root in state.true_gradients):
            return self.module(*args, **kwargs)
        if state.instead and self in state.instead:
            return state.instead[self](args, kwargs)
        whole = network.find(self, args, kwargs)
        planned = None if whole is None else self._plan_of_network(whole, *args)
        if planned is not None:
            sender = self._sender(args[0].device, planned.layout.classes, self._take_target())
            return network.forward(whole, planned, *args, sender)
        sharded = not torch.compiler.is_compiling() and fsdp.watch_sharded_blocks(self.module)
        inputs = [x for x in tree_leaves((args, kwargs)) if _requires_grad(x)]
        tape = Tape(self, inputs, self._install_tap())
        # The weights of a sharded layer are there when it is called.
        tape.looks_ahead = self.looks_ahead and not sharded and self.projector is None
        return self._run(tape, args, kwargs)

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
            RuntimeError: where a projector has it.
        """
        if self.projector is not None:
            raise RuntimeError("feedback_matrix: B is the projector's")
        matrix = self._matrix(name)
        return matrix if self.feedback.rank is None else self._low_as(matrix) @ matrix

    def _matrix(self, name: str) -> Tensor:
        """The scaled B_l of a point, or P_l where B = Q P."""
        for point, features, dtype, device in self._layout.points if self._layout else ():
            if point != name:
                continue
            if self.matrices is not None:
                return self.matrices.of(name).detach()[:, :features]
            rule, classes, dtype = self.feedback, self._layout.classes, accumulation_dtype(dtype)
            settings = (rule.stream(name), rule.distribution, rule.density)
            source = Source(self.read_seed(), *settings, dtype, device)
            matrix = source.matrix(rule.rows(classes), features)
            return matrix * rule.deviation(classes, features, self._layout.widest)
        raise KeyError(f"no feedback point {name!r}; there are {self.feedback_points}")

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
        chosen = learning_of(rule, compression, self.feedback.rank)
        if not self.feedback_points:
            raise RuntimeError(
                "learn_feedback needs the sizes of the points: call the model once before"
            )
        other = getattr(self.feedback.sends, "width", None) is not None
        if other or self.projector is not None:
            raise ValueError(
                "learn_feedback needs a B that is multiplied by the error or a signal of its "
                f"columns, got {self.feedback}{', and a projector' * (self.projector is not None)}"
            )
        dtypes = {name: dtype for name, _, dtype, _ in self._layout.points}
        made = {
            name: self._matrix(name).to(accumulation_dtype(dtype)) for name, dtype in dtypes.items()
        }
        moves = chosen.compression is not None  # whether Q does
        if self.feedback.rank is not None:
            self.compression = nn.Parameter(self._low_as(made[self.feedback_points[-1]]), moves)
        self.matrices = Matrices(made)
        self.matrices.requires_grad_(True)
        self.learning = chosen if moves or chosen.rule is not None else None
        layout = self._layout
        self._reset()
        self._settle(*layout)
        return [*self.matrices.values(), *[self.compression] * moves]

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
        target = self._take_target()
        sender = self._sender(y.device, self._columns(y), target)
        if sender is None or not units:
            y = self._sent(units, made, y)
        else:
            waits = self.projector is not None and all(node.gate for node in made.nodes)
            sender = sender.checked(y)._replace(pending=Pending() if waits else None)
            y = sender.joined(y, self._sent(units, made, sender.carrier(y), sender.pending))
        return y if self.learning is None else self._learnt(units, y, target)

    def _learnt(self, units: list[Point | Chain], y: Tensor, target: Tensor | None) -> Tensor:
        """y, with the gradients of B behind it."""
        every = plan.expanded(units)
        points = [every[place] for place in plan.fed(every)]
        matrices = [self.matrices.of(name) for name in self._name(points)]
        return learnt(self.learning, y, target, self.compression, points, matrices)

    def _sent(
        self,
        units: list[Point | Chain],
        made: plan.Plan,
        y: Tensor,
        pending: Pending | None = None,
    ) -> Tensor:
        """y, or a carrier, behind all that feeds the points."""
        y = self._fed(made.nodes, plan.receivers(units, made.chains), y, pending)
        if not made.chains:
            return y
        chains = [(node, units[node.unit]) for node in made.chains]
        return announce(y, [(chain, node.group, node.dense) for node, chain in chains])

    def _columns(self, y: Tensor) -> int:
        """Of what is projected."""
        return self.feedback.sends.columns(index(y.shape[-1]))

    def _take_target(self) -> Tensor | None:
        """What was set for this pass, and serves no other."""
        target = self.target
        if target is not None:
            self.target = None
        return target

    def _sender(self, device: torch.device, columns: int, target: Tensor | None) -> Sender | None:
        """What makes the signal [M, columns] of this pass; None where it is the error itself."""
        signal = self.feedback.sends
        plain = isinstance(signal, signals.Error) and self.feedback.rank is None
        if plain and self.projector is None:
            return None
        widest = self._layout.widest if self._layout is not None and self._layout.points else 0
        return Sender(signal, self._low(columns, device), target, self.projector, widest)

    def _low(self, columns: int, device: torch.device) -> Tensor | None:
        """Q [columns, rank], whose entries have the variance 1 / rank."""
        rank = self.feedback.rank
        if rank is None:
            return None
        if self.compression is not None:
            return self.compression.detach()
        seed, place = self.read_seed(), (torch.float32, device)
        (made,) = self._dense(seed, LOW_RANK_STREAM, columns, rank, (), *place)
        return made * rank**-0.5

    def _low_as(self, matrix: Tensor) -> Tensor:
        """Q for this P, of its dtype."""
        return self._low(self._layout.classes, matrix.device).to(matrix.dtype)

    def _plan_of(self, tape: Tape, units: list[Point | Chain], y: Tensor, seed: int) -> plan.Plan:
        """The plan of the pass before, where that serves this one as well."""
        key = plan.key(units, y)
        if key is not None:
            settings = (self.feedback, ops.allow_tf32(y.device, torch.float32))
            key = (*key, tape.in_turn, seed, *settings, self._given())
        made = self._plan
        if key is None or made is None or made.key != key:
            made = self._planned(tape, units, y, key, seed)
            self._plan = None if key is None else made
            return made
        self._layout = made.layout
        if any(unit.modified for unit in units):
            points = plan.expanded(units)
            plan.check_unmodified(points, self._name(points))
        return made

    def _given(self) -> tuple[Any, ...]:
        return () if self.matrices is None else self.matrices.version()

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
        if eager and layout != self._checked:
            bypass.check(self, tape, points, names, y)
            self._checked = layout
        if not points:
            if eager:
                self._layout = layout
            return plan.Plan(key, [], [], layout)
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
        nodes = self._nodes(points, feeds, seed, classes, widest, in_turn)
        return plan.Plan(key, nodes, chains, layout)

    def _lay_out(self, points: list[Point], names: list[str], y: Tensor) -> Layout:
        """The sizes of a pass; an error where the rows of a point are not those of y."""
        sizes = tuple(
            (name, plan.features_of(point, name, y), point.tensor.dtype, point.tensor.device)
            for point, name in zip(points, names, strict=True)
        )
        return Layout(self._columns(y), sizes)

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
        classes = self._columns(y)
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
        if not points:
            return []
        batches = plan.batches(points, feeds, in_turn, self.projector is not None)
        return [self._node(batch, seed, classes, widest) for batch in reversed(batches)]

    def _signal(self, error: Tensor, output: Tensor, target: Tensor | None) -> Tensor:
        """What is projected: the error, or [M, columns] made of it."""
        sender = self._sender(error.device, self._columns(error), target)
        return error if sender is None else sender.checked(output).of(error, output.detach())

    def _feed(
        self,
        points: list[Point],
        settled: list[Settled],
        widest: int,
        y: Tensor,
        carrier: Tensor,
        in_turn: bool,
    ) -> Tensor:
        """Returns a carrier, in the backward of which its gradient is fed to these points.

        y, an output or a blank like it, tells the rows.
        """
        feeds = self._feeds(points, list(range(len(points))), settled, y, widest)
        seed, classes = self.read_seed(), self._columns(y)
        nodes = self._nodes(points, feeds, seed, classes, widest, in_turn)
        return self._fed(nodes, [point.receiver for point in points], carrier)

    def _fed(
        self,
        nodes: list[plan.Node],
        receivers: list[Receiver],
        y: Tensor,
        pending: Pending | None = None,
    ) -> Tensor:
        """y, or a carrier, behind all the nodes."""
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
                passing[device] = BroadcastInTurn.apply(
                    node.group, fed, pending, passing[device], *tensors
                )
        y = passing.pop(y.device)
        for there in passing.values():
            y = Send.apply(y, there)
        return y

    def _plan_of_network(self, whole: network.Network, x: Tensor) -> network.Planned | None:
        """The feedback of a network, whose hidden layers are the points; None where it has none."""
        made = self._network
        if made is not None and made.key == whole.key:
            self._layout = made.layout
            return made
        memory = network.memory(whole, x)
        if memory is None:
            return None
        names = self._name_readers(whole.layers[1:])
        sizes = [len(stage.layer.weight) for stage in whole.stages]
        points = tuple((*pair, *memory) for pair in zip(names, sizes, strict=True))
        layout = Layout(self.feedback.sends.columns(len(whole.head.weight)), points)
        feeds = [
            plan.Feed(Target(*stage.gate, each.scale, each.stream, each.features), place, LINEAR)
            for place, (stage, each) in enumerate(
                zip(whole.stages, self._settled(layout), strict=True)
            )
        ]
        batch = plan.Batch(*memory, feeds, [], False)
        node = self._node(batch, self.read_seed(), layout.classes, layout.widest)
        made = self._network = network.Planned(whole.key, node.group, node.dense, layout)
        return made

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
            projected=self.projector is not None,
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
        if self.projector is not None:
            return []
        if self.matrices is not None:
            return [self.matrices.of_stream(target.stream) for target in targets]
        rule, rows = self.feedback, self.feedback.rows(classes)
        dtype = ops.feedback_dtype(batch.device, batch.dtype, rows)
        sizes = [
            (t.stream, widest if self.feedback.shared else t.features, t.channels_last)
            for t in targets
        ]
        if self.feedback.shared and not any(order for *_, order in sizes):
            sizes = sizes[:1]
        if not all(feedback_rules.fits_dense(rule, rows, n, dtype) for _, n, _ in sizes):
            return []
        matrices: list[Tensor] = []
        for stream, features, order in sizes:
            place = (dtype, batch.device)
            matrices += self._dense(seed, stream, rows, features, order, *place)
        return matrices

    def _keeps_dense(self, classes: int, widest: int, point: Point) -> bool:
        if self.matrices is not None or self.projector is not None:
            return False  # the columns are in logical order
        dtype = accumulation_dtype(point.tensor.dtype)
        rule = self.feedback
        return feedback_rules.fits_dense(rule, rule.rows(classes), widest, dtype)

    # What is settled once, outside the traced graph: a compiled step sees constants, guarded by
    # the arguments.

    @torch.compiler.assume_constant_result
    def _settle(
        self, classes: int, sizes: tuple[tuple[str, int, torch.dtype, torch.device], ...]
    ) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Scale and stream of every point; remembers the sizes, which may not change."""
        layout, rule = Layout(classes, sizes), self.feedback
        if layout != self._sizes:
            _check_same_features(self._sizes, layout)
            if self.matrices is not None:
                self.matrices.check(rule.rows(classes), sizes)
        self._layout = self._sizes = layout
        names = [name for name, *_ in sizes]
        if self.matrices is not None:
            return (1.0,) * len(sizes), tuple(map(self.matrices.stream, names))
        scales = [rule.deviation(classes, features, layout.widest) for _, features, _, _ in sizes]
        return tuple(scales), tuple(map(rule.stream, names))

    @torch.compiler.assume_constant_result
    def _dense(
        self,
        seed: int,
        stream: int,
        rows: int,
        columns: int,
        channels_last: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Tensor]:
        # In a tuple, as Dynamo takes a bare tensor from one place of the code only once.
        density = 1.0 if stream == LOW_RANK_STREAM else self.feedback.density
        source = Source(seed, stream, self.feedback.distribution, density, dtype, device)
        return (self._cache.get(source, rows, columns, channels_last),)

    # Names.

    def _name(self, points: list[Point]) -> list[str]:
        return self._name_readers([point.layer for point in points])

    def _name_readers(self, layers: list[nn.Module]) -> list[str]:
        """The layers' names, with "#2" and so on for the second call of one."""
        names: list[str] = []
        for layer in layers:
            if layer not in self._names:  # made in this pass
                self._find_names()
            name = self._names.get(layer, type(layer).__name__)
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
        """And lets go of what was found of the modules that were there before."""
        super()._find_names()
        self._sizes: Layout | None = None  # which may not change
        self._checked: Layout | None = None  # that of a pass without a way round a cut
        self._plan: plan.Plan | None = None
        self._network: network.Planned | None = None
        self._in_vain: set[nn.Module] = set()
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
        self._cache = DenseCache()
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
