"""The networks of train.py: one architecture each, of torch's modules for backprop, cut for DFA.

Both methods draw the same initial weights from the same seed, as a cut has no parameters.
"""

import math
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import nn

import fastdfa
from fastdfa.activations import MODULES


def build(config, data, dfa):
    """Builds the network of `config.model` for samples like those of `data`, cut for DFA or not."""
    torch.manual_seed(config.seed)
    return MODELS[config.model](config, data, dfa)


def last_parts(model, number):
    """Returns the last layers and blocks of a network that have parameters."""
    children = (c if isinstance(c, nn.ModuleList) else [c] for c in model.children())
    parts = [part for part in chain.from_iterable(children) if list(part.parameters())]
    return nn.ModuleList(parts[-number:])


def activated(dfa, activation, n_in, n_out, norm="none"):
    """Lists a linear layer of torch or fastdfa with its activation; "batch": as one module, with a
    norm between them."""
    if norm == "batch":
        layer = (fastdfa if dfa else nn).Linear(n_in, n_out)
        return [nn.Sequential(layer, nn.BatchNorm1d(n_out), MODULES[activation]())]
    if dfa:
        return [fastdfa.Linear(n_in, n_out, activation=activation)]
    return [nn.Linear(n_in, n_out), MODULES[activation]()]


def head(dfa, features, classes):
    """Makes the last layer. Its input is the last feedback point; it learns by its true
    gradient."""
    return (fastdfa if dfa else nn).Linear(features, classes)


def point(dfa, features=None):
    return fastdfa.FeedbackPoint(features=features) if dfa else nn.Identity()


def dropout(rate):
    return [nn.Dropout(rate)] if rate else []


def mlp(config, data, dfa):
    """Builds `depth` hidden layers of `width` units."""
    widths = [math.prod(data.shape)] + [config.width] * config.depth
    layers = [nn.Flatten(), *dropout(config.input_dropout)]
    for n_in, n_out in pairwise(widths):
        layers += activated(dfa, config.activation, n_in, n_out, config.norm)
        layers += dropout(config.dropout)
    return nn.Sequential(*layers, head(dfa, config.width, data.classes))


def cnn(config, data, dfa):
    """`depth` convolutions of `width` channels, the first 5x5 of stride 2, the others 3x3; each is
    pooled to half the size and normalised; then a hidden layer of 4 `width`. All are cut."""
    convolution, activation = (fastdfa if dfa else nn).Conv2d, MODULES[config.activation]
    channels = [data.shape[0]] + [config.width] * config.depth
    layers, size = dropout(config.input_dropout), data.shape[1]
    for i, (n_in, n_out) in enumerate(pairwise(channels)):
        kernel, stride = (3, 1) if i else (5, 2)
        layers.append(convolution(n_in, n_out, kernel, stride, padding=kernel // 2))
        layers += [nn.MaxPool2d(2, ceil_mode=True), nn.BatchNorm2d(n_out), activation()]
        size = -(-size // (2 * stride))
    layers += [nn.Flatten(), *dropout(config.dropout)]
    hidden = 4 * config.width
    layers += activated(dfa, config.activation, config.width * size**2, hidden)
    return nn.Sequential(*layers, *dropout(config.dropout), head(dfa, hidden, data.classes))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip (He et al. 2015, option A), trained inside by backprop."""

    def __init__(self, n_in, n_out, stride, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.activation = MODULES[activation]()
        self.stride, self.more_channels = stride, n_out - n_in

    def forward(self, x):
        h = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        skip = x[..., :: self.stride, :: self.stride]
        return self.activation(h + F.pad(skip, (0, 0, 0, 0, 0, self.more_channels)))


def resnet20(config, data, dfa):
    """Builds ResNet-20 of `width`, 2 and 4 `width` channels, cut after every block.

    The head reads averages over positions, so a channel has one feedback for all of its positions.
    """
    width, activation = config.width, config.activation
    stem = nn.Conv2d(data.shape[0], width, 3, padding=1, bias=False)
    layers = [stem, nn.BatchNorm2d(width), MODULES[activation](), point(dfa, features=1)]
    channels = [width] * 4 + [2 * width] * 3 + [4 * width] * 3
    for n_in, n_out in pairwise(channels):
        stride = 1 if n_in == n_out else 2
        layers += [ResidualBlock(n_in, n_out, stride, activation), point(dfa, features=1)]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *pooled, nn.Linear(4 * width, data.classes))


class Transformer(nn.Module):
    """A causal transformer over characters, cut after every block (arXiv 2006.12878).

    The normalisation is after the add, so it is the last of a block before its cut; and the
    embedding starts small, that the blocks are not lost beside it. On held-out text, after an epoch
    of the recipe, DFA's loss is 2.06 so; 2.35 with torch's embedding of deviation 1; with that and
    the normalisation first 2.69 (learning rate 3e-3).
    """

    def __init__(self, config, data, dfa):
        super().__init__()
        self.token = nn.Embedding(data.classes, config.width)
        nn.init.normal_(self.token.weight, std=0.1)
        self.position = nn.Parameter(0.02 * torch.randn(data.shape[0], config.width))
        self.blocks, self.points = nn.ModuleList(), nn.ModuleList()
        for _ in range(config.depth):
            self.blocks.append(
                nn.TransformerEncoderLayer(
                    config.width,
                    nhead=max(config.width // 32, 1),
                    dim_feedforward=4 * config.width,
                    dropout=config.dropout,
                    activation=MODULES[config.activation](),
                    batch_first=True,
                )
            )
            self.points.append(point(dfa))
        self.head = nn.Linear(config.width, data.classes)

    def forward(self, x):  # [N, T] characters -> [N, T, classes]
        h = self.token(x) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        for block, cut in zip(self.blocks, self.points, strict=True):
            h = cut(block(h, src_mask=mask.to(h.dtype), is_causal=True))
        return self.head(h)


class GCN(nn.Module):
    """Graph convolutions f(A h W) of Kipf and Welling 2017, over one graph; each is cut.

    After the first, A comes before the layer and its cut, so that the feedback of a labelled node
    reaches its neighbours, as its gradient does. Cut before A, it would stay at that node.
    """

    def __init__(self, config, data, dfa):
        super().__init__()
        linear = (fastdfa if dfa else nn).Linear
        widths = [data.shape[-1]] + [config.width] * (config.depth - 1) + [data.classes]
        self.layers = nn.ModuleList(linear(n_in, n_out) for n_in, n_out in pairwise(widths))
        self.activation = MODULES[config.activation]()
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("adjacency", data.adjacency, persistent=False)

    def spread(self, h):
        return torch.sparse.mm(self.adjacency.to(h.dtype), h.squeeze(0)).unsqueeze(0)

    def forward(self, x):  # [1, nodes, features] -> [1, nodes, classes]
        h = self.spread(self.layers[0](self.input_dropout(x)))
        for layer in self.layers[1:]:
            h = layer(self.spread(self.dropout(self.activation(h))))
        return h


STEPS = 10  # of time, in the spiking network
LEAK = 0.9  # what a membrane keeps of its potential in a step
SHARPNESS = 2.0  # of the gate round the threshold


def spike(v):
    return v > 0


def spike_gate(v):
    """Is the derivative of a fast sigmoid, in the place of a step's (arXiv 1705.11146)."""
    return (1 + SHARPNESS * v.abs()) ** -2


class LeakyIntegrateAndFire(nn.Module):
    """u_t = LEAK u_{t-1} + a_t, and a spike where u_t > 1, which takes 1 off u_t.

    [N, STEPS, n] currents a -> spikes of 0 and 1; of [N, n], constant in time. Gradients go back
    through time along the leak alone, as a reset has none (arXiv 1901.09948).
    """

    def __init__(self):
        super().__init__()
        self.spike = fastdfa.Surrogate(spike, spike_gate)

    def forward(self, current):
        if current.dim() == 2:
            current = current.unsqueeze(1).expand(-1, STEPS, -1)
        u, spikes = 0, []
        for a in current.unbind(1):
            u = LEAK * u + a
            spikes.append(self.spike(u - 1))
            u = u - spikes[-1].detach()
        return torch.stack(spikes, 1)


class Rate(nn.Module):
    """Takes spikes [N, STEPS, n] to how many a step, [N, n]."""

    def forward(self, spikes):
        return spikes.mean(1)


def spiking(config, data, dfa):
    """Builds `depth` layers of `width` spiking neurons, of which the head reads the rates.

    Cut between the layers, each trained inside through time. For DFA that is augmented DFA
    (arXiv 2204.13991), for backprop, backprop through time with the same surrogate gradient.
    """
    widths = [math.prod(data.shape)] + [config.width] * config.depth
    layers = [nn.Flatten(), *dropout(config.input_dropout)]
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), LeakyIntegrateAndFire(), point(dfa, features=-1)]
    layers[-1] = Rate()
    return nn.Sequential(*layers, head(dfa, config.width, data.classes))


MODELS = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet20": resnet20,
    "transformer": Transformer,
    "gcn": GCN,
    "spiking": spiking,
}
