"""Plans for preprocessing without a trained model, and what stock's preprocessor makes of a case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_torchserve.member import Member
from nnunet_torchserve.volume import Geometry, Volume

Array = npt.NDArray[np.float32]
Spacing = tuple[float, float, float]

ISOTROPIC: Spacing = (1.0, 1.0, 1.0)
AS_STOCK_PLANS_IT = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


@dataclass(frozen=True)
class Plan:
    """What a plan says of preprocessing."""

    spacing: Sequence[float] = ISOTROPIC
    transpose: Sequence[int] = (0, 1, 2)
    schemes: Sequence[str] = ("ZScoreNormalization",)
    use_mask: Sequence[bool] = (False,)
    preprocessor: str = "DefaultPreprocessor"
    resampling: dict[str, Any] = field(default_factory=lambda: AS_STOCK_PLANS_IT)

    @property
    def member(self) -> Member:
        """A member that has nothing but this plan."""
        return PlanOnly(self)


class PlanOnly(Member):
    """A member of no archive."""

    def __init__(self, plan: Plan) -> None:
        intensities = {"mean": 110.0, "std": 57.0, "percentile_00_5": 13.0, "percentile_99_5": 201.0}
        self.dataset = {}
        self.plans = PlansManager(
            {
                "transpose_forward": list(plan.transpose),
                "transpose_backward": [list(plan.transpose).index(axis) for axis in range(3)],
                "foreground_intensity_properties_per_channel": {str(k): intensities for k in range(len(plan.schemes))},
            }
        )
        as_labels = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
        self.configuration = ConfigurationManager(
            {
                "architecture": {},
                "preprocessor_name": plan.preprocessor,
                "spacing": list(plan.spacing),
                "normalization_schemes": list(plan.schemes),
                "use_mask_for_norm": list(plan.use_mask),
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": plan.resampling,
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_seg_kwargs": as_labels,
            }
        )


def volume_of(array: Array, spacing: Spacing) -> Volume:
    """A case without a place in the patient; ``spacing`` is (z, y, x)."""
    depth, height, width = array.shape[1:]
    return Volume(array, Geometry((depth, height, width), spacing, spacing[::-1], (0, 0, 0), np.eye(3), 3))


def stock(member: Member, array: Array, spacing: Spacing) -> tuple[Array, dict[str, Any]]:
    """``DefaultPreprocessor.run_case_npy`` of a copy."""
    data, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        array.copy(order="K"), None, {"spacing": list(spacing)}, member.plans, member.configuration, member.dataset
    )
    preprocessed: Array = data
    return preprocessed, properties
