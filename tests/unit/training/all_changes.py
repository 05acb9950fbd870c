"""One example of each change of the table."""

from ultrathink.training import changes
from ultrathink.training.change import Change
from ultrathink.training.snapshots import Snapshot


def one_of_each(*snapshots: Snapshot, expert: int = 2) -> list[Change]:
    """Every change there is, those that end or undo a run last."""
    found = [
        changes.SetLearningRateFactor(0.5, over_steps=7),
        changes.ScaleLearningRate(0.7),
        changes.CorrectLearningRate(1.3),
        changes.RestartSchedule(),
        changes.SetOptimizerOption("betas", [0.8, 0.9]),
        changes.SetWeightDecay(0.2),
        changes.SetClip(0.7),
        changes.SetMicroBatchSize(2),
        changes.SetActivationCheckpointing("full"),
        changes.ClearMemory(),
        changes.Pause(0.01),
        changes.SetMixtureWeights([3.0, 1.0]),
        changes.SkipSamples(8),
        changes.SetEvaluation(1000),
        changes.SaveCheckpoint(),
        changes.SetRouting("temperature", 1.2),
        changes.ReviveExperts([{"layer": 1, "group": "a", "expert": expert}]),
        changes.AverageSnapshots(snapshots),
        changes.AddExpert("all", "a"),
        changes.PruneExpert(1, "a", expert=0, how="merge"),
        changes.AddExpert(0, "a", how="copy"),
        changes.AddExpert(1, "a", source=1),  # depth routing may leave the layer without tokens
        changes.ReleaseExperts("all", "a"),
        changes.AdjustModCapacity(0.25),  # after the others, which need tokens in every layer
        changes.Rollback(snapshots[0]),
        changes.Stop(),
    ]
    assert {type(one) for one in found} == set(changes.CHANGES)
    return found
