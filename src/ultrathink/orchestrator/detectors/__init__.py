"""Detectors of problems in training, one small class each; all observe the same signals."""

from __future__ import annotations

from ultrathink.orchestrator.detectors.base import Detector
from ultrathink.orchestrator.detectors.depth import Depth
from ultrathink.orchestrator.detectors.experts import Experts
from ultrathink.orchestrator.detectors.gradient import GradientNorm, GradientTrend, LayerGradients
from ultrathink.orchestrator.detectors.loss import (
    AboveStart,
    Divergence,
    LossSpike,
    NonFinite,
    ZeroLoss,
)
from ultrathink.orchestrator.detectors.precision import LossScale, SkippedSteps
from ultrathink.orchestrator.detectors.resources import Memory, Throughput
from ultrathink.orchestrator.detectors.trend import OffSchedule, Oscillation, Plateau, RateLoss
from ultrathink.orchestrator.detectors.validation import AccuracyDrop, Forgetting, Overfitting

DETECTORS: tuple[type[Detector], ...] = (
    NonFinite,
    ZeroLoss,
    LossSpike,
    AboveStart,
    Divergence,
    GradientNorm,
    GradientTrend,
    LayerGradients,
    Plateau,
    RateLoss,
    Oscillation,
    Overfitting,
    Forgetting,
    AccuracyDrop,
    OffSchedule,
    LossScale,
    SkippedSteps,
    Experts,
    Depth,
    Memory,
    Throughput,
)
