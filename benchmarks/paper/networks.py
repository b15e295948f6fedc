"""The networks of the paper's experiments, from a `table.Config`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdfa
from benchmarks.paper.table import Config
from fastdfa.activations import MODULES

CLASSES = 10


def build(config: Config, seed: int) -> nn.Module:
    """Builds the network for images [N, 3, 32, 32], flat for "fc"; all methods start from the same
    weights."""
    torch.manual_seed(seed)
    network = _cnn(config) if config.network == "cnn" else _fc(config)
    if config.method == "top":
        network.requires_grad_(False)
        network.head.requires_grad_(True)
    if config.method != "dfa":
        return network
    rule = fastdfa.Feedback(scale=config.scale, shared=config.shared, error=config.error, seed=seed)
    return fastdfa.DFA(network, feedback=rule)


def hidden_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns what the output of a hidden layer comes from, by its number, "1" to "3"."""
    network = model.module if isinstance(model, fastdfa.DFA) else model
    return {name[4:]: module for name, module in network.named_children() if "last" in name}


def _activation(config: Config) -> nn.Module:
    if config.slope is not None:
        return nn.LeakyReLU(config.slope)
    return MODULES[config.activation]()


def _behind(config: Config, layer: nn.Module, norm: nn.Module, dropout: nn.Module) -> list:
    """Returns a layer, dropout, activation, normalisation, in the order of the published code, or
    normalised first; the activation is the layer's own where nothing is between them."""
    between = [norm] if config.batch_norm == "before" else []
    if config.dropout[1]:
        between.append(dropout)
    after = [norm] if config.batch_norm == "after" else []
    if config.method == "dfa" and not between and hasattr(layer, "activation"):
        layer.activation = _activation(config)
        return [layer, *after]
    return [layer, *between, _activation(config), *after]


def _linear(config: Config, n: int, m: int, cut: bool = True) -> nn.Linear:
    return (fastdfa if config.method == "dfa" and cut else nn).Linear(n, m)


def _fc(config: Config) -> nn.Sequential:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    if config.dropout[0]:
        modules["drop"] = nn.Dropout(config.dropout[0])
    for i, (n, m) in enumerate(pairwise([3072] + 3 * [config.width]), 1):
        layer = _linear(config, n, m, cut=not (config.published_cuts and i == 2))
        if i == 2 and config.bottleneck not in (None, config.width):
            with torch.random.fork_rng(devices=[]):  # the layers above start as without it
                mask(layer, config.bottleneck / config.width, config)
        parts = _behind(config, layer, nn.BatchNorm1d(m), nn.Dropout(config.dropout[1]))
        _add(modules, i, parts)
    modules["head"] = _linear(config, config.width, CLASSES)
    return nn.Sequential(modules)


def _cnn(config: Config) -> nn.Sequential:
    """Builds 32C5-64C5-64C5-128, each convolution pooled 3x3 with stride 2."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    if config.dropout[0]:
        modules["drop"] = nn.Dropout2d(config.dropout[0])
    convolution = (fastdfa if config.method == "dfa" else nn).Conv2d
    undropped = replace(config, dropout=(0.0, 0.0))  # as published, of convolutions nothing
    for i, (n, m) in enumerate(pairwise([3, 32, 64, 64]), 1):
        layer = convolution(n, m, 5, padding=2)
        parts = _behind(undropped, layer, nn.BatchNorm2d(m), nn.Identity())
        _add(modules, i, [*parts, nn.MaxPool2d(3, 2)])
    modules["flat"] = nn.Flatten()
    layer = _linear(config, 576, 128)
    _add(modules, 4, _behind(config, layer, nn.BatchNorm1d(128), nn.Dropout(config.dropout[1])))
    modules["head"] = _linear(config, 128, CLASSES, cut=not config.published_cuts)
    return nn.Sequential(modules)


def _add(modules: OrderedDict[str, nn.Module], i: int, parts: list[nn.Module]) -> None:
    for k, part in enumerate(parts):
        name = f"last{i}" if part is parts[-1] else f"part{i}_{k}"
        modules[name] = part


# The bottleneck


def mask(layer: nn.Linear, share: float, config: Config) -> None:
    """Trains a fixed random share of a layer's weights and biases. The masks move with the layer.

    Where the cut is missing, the published code masks the gradient that goes on to the layer below
    in the same way, by one mask of a whole batch; not in evaluations, as these measure.
    """

    def masked(name: str, shape: torch.Size | tuple[int, int]) -> Callable[[Tensor], Tensor]:
        layer.register_buffer(name, torch.rand(shape) < share, persistent=False)
        return lambda gradient: gradient * getattr(layer, name)[: len(gradient)]

    for name, parameter in list(layer.named_parameters()):
        parameter.register_hook(masked(f"kept_{name}", parameter.shape))
    if not config.published_cuts:
        return
    mask_gradient = masked("kept_input", (config.batch, layer.in_features))

    def mask_input(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if module.training and inputs[0].requires_grad:
            inputs[0].register_hook(mask_gradient)

    layer.register_forward_pre_hook(mask_input)


# Pre-alignment


def prealign(model: fastdfa.DFA, config: Config, x: Tensor, y: Tensor) -> None:
    """Sets every weight but the first to W^T = (B e) pinv(delta), of Frobenius norm 1, from the
    head down, delta being the true gradient behind the layer, with those above set already."""
    model(x)  # so that the points have their names
    matrices = [model.feedback_matrix(name).double() for name in model.feedback_points]
    linears = [layer for layer in model.module if isinstance(layer, nn.Linear)]
    activation = _activation(config)
    for k in range(len(linears) - 1, 0, -1):
        outputs, h = [], x.flatten(1).double()
        for layer in linears:
            outputs.append(F.linear(h, layer.weight.double(), layer.bias.double()))
            h = activation(outputs[-1])
        loss = F.cross_entropy(outputs[-1], y)
        error, delta = torch.autograd.grad(loss, [outputs[-1], outputs[k]], allow_unused=False)
        weight = torch.linalg.pinv(delta) @ (error @ matrices[k - 1])
        with torch.no_grad():
            linears[k].weight.copy_(weight / weight.norm())
