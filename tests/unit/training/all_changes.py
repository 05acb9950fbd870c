"""One example of each change of the table."""

from ultrathink.training.change import Change
from ultrathink.training.changes import (
    CHANGES,
    AverageSnapshots,
    ClearMemory,
    CorrectLearningRate,
    Pause,
    RestartSchedule,
    ReviveExperts,
    Rollback,
    SaveCheckpoint,
    ScaleLearningRate,
    SetActivationCheckpointing,
    SetClip,
    SetEvaluation,
    SetLearningRateFactor,
    SetMicroBatchSize,
    SetMixtureWeights,
    SetOptimizerOption,
    SetRouting,
    SetWeightDecay,
    SkipSamples,
    Stop,
)
from ultrathink.training.snapshots import Snapshot


def one_of_each(*snapshots: Snapshot, expert: int = 2) -> list[Change]:
    """Every change there is, those that end or undo a run last."""
    found = [
        SetLearningRateFactor(0.5, over_steps=7),
        ScaleLearningRate(0.7),
        CorrectLearningRate(1.3),
        RestartSchedule(),
        SetOptimizerOption("betas", [0.8, 0.9]),
        SetWeightDecay(0.2),
        SetClip(0.7),
        SetMicroBatchSize(2),
        SetActivationCheckpointing("full"),
        ClearMemory(),
        Pause(0.01),
        SetMixtureWeights([3.0, 1.0]),
        SkipSamples(8),
        SetEvaluation(1000),
        SaveCheckpoint(),
        SetRouting("temperature", 1.2),
        ReviveExperts([{"layer": 1, "group": "a", "expert": expert}]),
        AverageSnapshots(snapshots),
        Rollback(snapshots[0]),
        Stop(),
    ]
    assert {type(one) for one in found} == set(CHANGES)
    return found
