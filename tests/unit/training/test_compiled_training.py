import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.limited_memory import LimitedMemory, assert_same_gradients, keep_gradients
from tests.unit.training.observers import At, Recorder, final_state, records, without_time
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.callbacks import StepReport
from ultrathink.training.changes import SetActivationCheckpointing
from ultrathink.training.compiling import compiler_problem
from ultrathink.training.control import TrainerControl

# torch's own compiler uses parts of the standard library that are on their way out.
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(compiler_problem() is not None, reason="no C++ compiler to compile with"),
]

WORDS = (
    "model.num_layers=1",
    "model.attention.backend=blocks",
    "training.max_steps=4",
    "training.precision=fp32",
    "training.optimizer.type=muon",
    "training.micro_batch_size=4",
    "training.eval.every_steps=null",
    "training.checkpoint={every_steps: 2, keep: 9}",
)


class Graphs(Recorder):
    """Also counts the graphs that were compiled up to each step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def on_step(self, report: StepReport) -> None:
        super().on_step(report)
        self.counts.append(counters["stats"]["unique_graphs"])


def change(control: TrainerControl) -> None:
    for mode in ("selective", "full"):
        control.request(SetActivationCheckpointing(mode), reason="test")


def test_a_compiled_run_follows_the_eager_one_in_all_that_happens_to_it(
    make_trainer: MakeTrainer,
) -> None:
    """A batch that does not fit, a change that is refused, one that compiles again, a resume."""
    counters.clear()
    seen, gradients = Graphs(), dict[str, Tensor]()
    compiled = make_trainer(
        *WORDS, "training.compile=true", callbacks=[seen], controllers=[At(step2=change)]
    )
    memory = LimitedMemory(compiled, fits=2, where="backward")
    keep_gradients(compiled, gradients)
    compiled.fit()
    assert memory.tried == [4, *[2] * 8]
    assert seen.counts == [2, 2, 3, 3]  # each in one piece: of four, of two, and checkpointed
    [refused] = [text for text in seen.messages if "activation_checkpointing" in text]
    assert "'selective'" in refused
    assert "use full, none, or training.compile=false" in refused
    assert [(one.setting, one.before, one.after) for one in seen.changes] == [
        ("micro_batch_size", 4, 2),
        ("activation_checkpointing", "none", "full"),
    ]

    plain, expected = Recorder(), dict[str, Tensor]()
    eager = make_trainer(*WORDS, "training.compile=false", callbacks=[plain])
    keep_gradients(eager, expected)
    eager.fit()
    assert_same_gradients(expected, gradients)
    losses = [report.loss for report in plain.steps]
    assert [report.loss for report in seen.steps] == pytest.approx(losses, rel=1e-4)

    rows, state = records(compiled.run), final_state(compiled.run)
    assert not any("_orig_mod" in name for name in state)  # no trace of the compiler
    resumed = resume_trainer(compiled.run, "2")
    assert resumed.fit().name == "finished"
    assert without_time(records(resumed.run)) == without_time(rows)
    other = final_state(resumed.run)
    assert [name for name in state if not torch.equal(state[name], other[name])] == []
