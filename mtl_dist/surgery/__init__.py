"""Gradient surgery: from each task's gradient to the one that is applied, for any model, loop and engine.

Imports torch, numpy and pydantic, and of the package its config alone.
"""

from mtl_dist.surgery.combiners import (
    DWA,
    FAMO,
    IMTLG,
    MGDA,
    AlignedMTL,
    Balanced,
    CAGrad,
    GradVac,
    Mean,
    NashMTL,
    PCGrad,
    Random,
    Sum,
    Uncertainty,
    UPGrad,
)
from mtl_dist.surgery.conflict import Conflict
from mtl_dist.surgery.surgery import Surgery, SurgeryConfig
from mtl_dist.surgery.zero import split_groups

__all__ = [
    "DWA",
    "FAMO",
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "Balanced",
    "CAGrad",
    "Conflict",
    "GradVac",
    "Mean",
    "NashMTL",
    "PCGrad",
    "Random",
    "Sum",
    "Surgery",
    "SurgeryConfig",
    "UPGrad",
    "Uncertainty",
    "split_groups",
]
