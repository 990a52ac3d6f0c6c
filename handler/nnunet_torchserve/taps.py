"""Which inputs an output takes along one axis, and with what weights: nnU-Net's resampling, to the last bit.

Linear interpolation by ``skimage.transform.resize``, which is ``scipy.ndimage.zoom``, is separable; so is the nearest
slice that nnU-Net takes across anisotropic ones. So one axis at a time is described by its *taps*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates
from skimage.transform import resize


@dataclass(frozen=True, slots=True)
class Taps:
    """Linear interpolation along one axis.

    Output ``j`` is ``lower_weight[j] * input[lower[j]] + upper_weight[j] * input[upper[j]]``.

    Attributes:
        size: inputs.
        lower, upper: int64, one for each output; ``upper`` is the next input, or ``lower`` at
            either end.
        lower_weight, upper_weight: float64; 1 and 0 where the output falls on an input.
    """

    size: int
    lower: npt.NDArray[np.int64]
    upper: npt.NDArray[np.int64]
    lower_weight: npt.NDArray[np.float64]
    upper_weight: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.lower)

    def __getitem__(self, part: slice) -> Taps:
        """Of some outputs."""
        return Taps(self.size, self.lower[part], self.upper[part], self.lower_weight[part], self.upper_weight[part])

    @property
    def ends(self) -> tuple[npt.NDArray[np.int64], ...]:
        """The inputs that count: lower and upper, or lower alone where nothing is interpolated."""
        return (self.lower, self.upper) if self.interpolates else (self.lower,)

    @property
    def weights(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Lower and upper."""
        return self.lower_weight, self.upper_weight

    @property
    def sides(self) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
        """The inputs that count, each with its weights."""
        return list(zip(self.ends, self.weights, strict=False))

    def shifted(self, start: int) -> Taps:
        """Of inputs that are counted from ``start``."""
        return replace(self, lower=self.lower - start, upper=self.upper - start)

    @property
    def interpolates(self) -> bool:
        """Whether any output lies between two inputs."""
        return bool(self.upper_weight.any())

    @property
    def is_identity(self) -> bool:
        """Whether outputs and inputs are the same."""
        return not self.interpolates and np.array_equal(self.lower, np.arange(self.size))


def linear_taps(inputs: int, outputs: int) -> Taps:
    """What ``scipy.ndimage.zoom(order=1, mode="nearest", grid_mode=True)`` does along an axis.

    Beyond the centre of the first or last input, scipy weighs that input twice, by weights that add up to one but for
    rounding; so do these taps.
    """
    position = (np.arange(outputs) + 0.5) * np.divide(inputs, outputs) - 0.5
    below = np.floor(position)
    weight = position - below
    lower = below.astype(np.int64)
    last = inputs - 1
    return Taps(inputs, lower.clip(0, last), (lower + 1).clip(0, last), 1.0 - weight, weight)


def nearest_taps(inputs: int, outputs: int) -> Taps:
    """The slices that ``resample_data_or_seg`` takes, where it takes the nearest."""
    chosen = nearest_slices(inputs, outputs)
    ones = np.ones(outputs)
    return Taps(inputs, chosen, chosen, ones, np.zeros_like(ones))


def nearest_inputs(inputs: int, outputs: int) -> npt.NDArray[np.int64]:
    """The input that ``resize(order=0, mode="edge")`` takes for each output."""
    places = np.arange(float(inputs))
    return np.asarray(resize(places, (outputs,), 0, mode="edge", anti_aliasing=False), np.int64)  # type: ignore[no-untyped-call]


def nearest_slices(before: int, after: int) -> npt.NDArray[np.int64]:
    """The slice that ``resample_data_or_seg`` takes for each new one (``map_coordinates`` of order 0)."""
    if before == after:
        return np.arange(before)
    coordinates = float(before) / after * (np.arange(after) + 0.5) - 0.5
    nearest = map_coordinates(np.arange(float(before)), [coordinates], order=0, mode="nearest")
    return np.asarray(nearest, np.int64)
