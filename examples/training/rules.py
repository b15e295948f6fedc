"""The rules that train.py compares (`--rules all`): each as what it changes of plain DFA."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastdfa
from fastdfa import signals
from fastdfa.projectors import OpticalProcessor


@dataclass(frozen=True)
class Rule:
    """Holds a rule by its name in the table, and where it was published.

    Attributes:
        feedback: fields of `Feedback` over those of the run.
        learns: how B learns; "" where it does not.
        rate: of plain SGD for B; None: B is trained with the weights.
        projected: by a simulated optical processor.
        by_layers: a rule of `LayerFeedback`, in place of a DFA.
    """

    label: str
    source: str
    feedback: dict[str, Any] = field(default_factory=dict)
    learns: str = ""
    rate: float | None = None
    projected: bool = False
    by_layers: str = ""
    published: str = ""  # test error on MNIST, of a fully connected network


RULES: dict[str, Rule] = {
    "anchored": Rule("DFA, anchored B", "", {"anchor": 100}),
    "separate": Rule("a B of its own for every layer", "1609.01596", {"shared": False}),
    "sign": Rule("sign of the error", "1909.01311", {"signal": "sign"}),
    "centred-sign": Rule("the same, centred", "", {"signal": signals.Sign(centred=True)}),
    "ternary": Rule("ternary error", "2006.01475", {"signal": "ternary"}),
    "quantized": Rule("error of 4 bits", "", {"signal": signals.Quantized(bits=4)}),
    "target": Rule("target, DRTP", "1909.01311", {"signal": "target"}),
    "sparse": Rule("B of density 0.1", "1903.02083", {"density": 0.1}),
    "low-rank": Rule("B = QP of rank 4", "2502.20580", {"rank": 4}),
    "optical": Rule(
        "optical processor, simulated", "2409.12965",
        {"signal": signals.Ternary(centred=True)}, projected=True,
    ),
    "kolen-pollack": Rule("B by Kolen-Pollack", "1904.05391", learns="kolen_pollack"),
    "cross-correlation": Rule(
        "B by cross-correlation", "2504.11558", learns="cross_correlation", rate=0.001
    ),
    "forward-gradient": Rule(
        "B by forward gradients", "2212.07282", learns="forward_gradient", rate=0.05
    ),
    "low-rank-learning": Rule(
        "B = QP of rank 4, both learn", "2502.20580", {"rank": 4}, learns="kolen_pollack"
    ),
    "local-classifier": Rule(
        "B of local classifiers", "1711.06756", learns="local_classifier"
    ),
    "fa": Rule("FA, layer by layer", "1411.0247", by_layers="fa", published="1.7%"),
    "usf": Rule("uSF, layer by layer", "1510.05067", by_layers="usf", published="0.94%"),
    "frsf": Rule("frSF, layer by layer", "1510.05067", by_layers="frsf", published="0.97%"),
    "brsf": Rule("brSF, layer by layer", "1510.05067", by_layers="brsf", published="0.91%"),
}  # fmt: skip


class Learning:
    """Trains a network by a rule: does what a step has besides forward, backward and update."""

    def __init__(self, rule: Rule, network: nn.Module, feedback: fastdfa.Feedback, x: Tensor):
        """Takes a batch `x` to know the sizes."""
        self.rule = rule
        self.optimizer: torch.optim.Optimizer | None = None
        if rule.by_layers:
            self.model = fastdfa.LayerFeedback(network, rule.by_layers, seed=feedback.seed)
            return
        projector = OpticalProcessor(widest(network, x), noise=0.1) if rule.projected else None
        feedback = replace(feedback, **rule.feedback)
        self.model = fastdfa.DFA(network, feedback, projector=projector)
        if rule.learns:
            self.model(x)
            learnt = self.model.learn_feedback(rule.learns)
            if rule.rate is not None:
                self.optimizer = torch.optim.SGD(learnt, rule.rate)

    def trained(self) -> list[nn.Parameter]:
        """Returns what the run's optimizer updates."""
        with_weights = self.rule.learns and self.rule.rate is None
        module = self.model if with_weights else self.model.module
        return list(module.parameters())

    def give(self, y: Tensor) -> None:
        """Gives a DFA the target of the pass that follows, whether it reads it or not."""
        if not self.rule.by_layers:
            self.model.target = y

    def update(self, x: Tensor) -> None:
        """Updates B after a backward pass, where it is not trained with the weights."""
        if self.optimizer is None:
            return
        if self.rule.learns == "forward_gradient":
            fastdfa.forward_gradient(self.model, x)
        self.optimizer.step()
        self.optimizer.zero_grad()


def widest(network: nn.Module, x: Tensor) -> int:
    """Counts the most units that a feedback point has."""
    plain = fastdfa.DFA(network)
    plain(x)
    return max(plain.feedback_matrix(name).shape[1] for name in plain.feedback_points)


def chosen(text: str) -> list[str]:
    """Returns the names of "all" or of a list with commas.

    Raises:
        ValueError: for a name that is none.
    """
    names = list(RULES) if text == "all" else text.split(",")
    for name in names:
        if name not in RULES:
            raise ValueError(f"{name!r} is none of all, {', '.join(RULES)}")
    return list(dict.fromkeys(names))
