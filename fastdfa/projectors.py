"""Projects by something else than this library's kernels: `DFA(projector=)`.

A projector is any callable that takes a signal [M, C] and returns its product [M, n] with a fixed
random matrix of its own, or a future of it. `OpticalProcessor` simulates one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from . import arguments, ops

_MOST_BITS = 64  # of a camera; with 1024 the number of its levels would be no float

Projector = Callable[[Tensor], "Tensor | Future[Tensor]"]


class Projected:
    """Holds what a projector returned, [rows, >= columns], and waits for it when it is read."""

    def __init__(self, projector: Projector, signal: Tensor, columns: int) -> None:
        self._made = projector(signal)
        self._like, self._columns = signal, columns

    def tensor(self) -> Tensor:
        if not isinstance(self._made, Tensor) and hasattr(self._made, "result"):
            self._made = self._made.result()
        made, rows = self._made, len(self._like)
        if not isinstance(made, Tensor):
            raise TypeError(f"projector must return a tensor, got {type(made).__name__}")
        if made.dim() != 2 or len(made) != rows or made.shape[1] < self._columns:
            raise ValueError(
                f"projector must return shape [{rows}, >= {self._columns}], got {tuple(made.shape)}"
            )
        return made[:, : self._columns].to(self._like)


class OpticalProcessor:
    """Simulates an optical processor, light through a scattering medium, as a projector.

    Each row of the signal is rounded to -1, 0 and 1 times its largest entry, as a mirror device
    displays it, and multiplied by a complex Gaussian matrix; a camera sees that field's real part
    (by holography, arXiv 2409.12965) or its intensity |.|^2, about its mean, as a few levels, with
    noise. Entries of the product have the variance of the row's squared length, as those of a
    matrix of unit variance have. For `Feedback(signal="ternary")`, which it displays as it is.

    Args:
        features: n, the pixels that are read: of the widest point at least.
        output: "linear" or "intensity", which does not tell a signal from its negative.
        bits: of the camera; None for a perfect one.
        noise: the deviation of additive Gaussian noise, relative to that of the output.
        noise_bits: the effective resolution b of noisy hardware: a deviation of 2^-b of the range
            of the output (for microring resonators: arXiv 2111.06862, from 3.3 to 6.7 bits).
        seed: of the matrix. The noise is torch's own randomness.

    Raises:
        TypeError, ValueError: for an argument that is not so.
    """

    def __init__(
        self,
        features: int,
        output: str = "linear",
        bits: int | None = 8,
        noise: float = 0.0,
        noise_bits: float | None = None,
        seed: int = 0,
    ) -> None:
        arguments.choice("output", output, ("linear", "intensity"))
        self.output = output
        self.features: int = arguments.integer("features", features)
        self.bits: int | None = arguments.integer("bits", bits, high=_MOST_BITS, optional=True)
        self.noise: float = arguments.number("noise", noise, "at least 0", lambda n: n >= 0)
        self.noise_bits: float | None = arguments.number(
            "noise_bits", noise_bits, "positive", lambda b: b > 0, optional=True
        )
        self.seed: int = arguments.seed("seed", seed)

    def __call__(self, signal: Tensor) -> Tensor:
        """Returns the product [M, features] of a signal [M, C].

        Raises:
            TypeError, ValueError: for a signal that is no floating matrix.
        """
        ops.checks.check_matrix("signal", signal)
        largest = signal.abs().amax(1, keepdim=True)
        displayed = (signal / largest.where(largest > 0, 1)).round()
        real, imaginary = (displayed @ self._matrix(signal, stream) for stream in (0, 1))
        seen = real
        if self.output == "intensity":
            # Of mean |x|^2 per pixel, and of that deviation: half the sum of two squares.
            energy = displayed.square().sum(1, keepdim=True)
            seen = ((real.square() + imaginary.square()) / 2 - energy) / energy.clamp(min=1).sqrt()
        return self._camera(self._noisy(seen)) * largest

    def _matrix(self, signal: Tensor, stream: int) -> Tensor:
        return ops.feedback(
            signal.shape[1], self.features, seed=self.seed, stream=stream, dtype=signal.dtype,
            device=signal.device,
        )  # fmt: skip

    def _noisy(self, seen: Tensor) -> Tensor:
        deviation: float | Tensor = self.noise * seen.std() if self.noise else 0.0
        if self.noise_bits is not None:
            extent = seen.max() - seen.min()
            deviation = deviation + extent * 2**-self.noise_bits
        return seen + deviation * torch.randn_like(seen)

    def _camera(self, seen: Tensor) -> Tensor:
        if self.bits is None or not seen.numel():
            return seen
        low, high = seen.min(), seen.max()
        step: Tensor = (high - low) / (2**self.bits - 1)
        step = step.clamp(min=torch.finfo(seen.dtype).tiny)
        level: Tensor = (seen - low) / step
        return level.round() * step + low
