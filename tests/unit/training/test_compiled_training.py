import pytest
import torch
from torch._dynamo.utils import counters

from tests.unit.training.conftest import MakeTrainer
from tests.unit.training.observers import At, asks, final_state, records, without_time
from ultrathink.recipes.resume import resume_trainer
from ultrathink.training.changes import Stop
from ultrathink.training.compiling import has_cpp_compiler

# torch's own compiler uses parts of the standard library that are on their way out.
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler to compile with"),
]


def test_a_compiled_run_resumes_bit_for_bit_and_follows_the_eager_one(
    make_trainer: MakeTrainer,
) -> None:
    common = (
        "model.num_layers=1",
        "training.max_steps=6",
        "training.precision=bf16",
        "training.optimizer.type=muon",
        "training.checkpoint={every_steps: 3, keep: 9}",
    )
    compiled = (*common, "training.compile=true", "model.attention.backend=blocks")
    counters.clear()
    whole = make_trainer(*compiled)
    whole.fit()
    assert counters["stats"]["unique_graphs"] == 1  # compiled, in one piece, once
    stopped = make_trainer(*compiled, controllers=[At(step3=asks(Stop()))])
    assert stopped.fit().name == "stopped"
    resumed = resume_trainer(stopped.run)
    assert resumed.fit().name == "finished"
    assert without_time(records(resumed.run)) == without_time(records(whole.run))
    one, other = final_state(whole.run), final_state(resumed.run)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert not any("_orig_mod" in name for name in one)  # no trace of the compiler

    eager = make_trainer(*common, "training.compile=false")
    eager.fit()
    pairs = zip(records(eager.run), records(whole.run), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=0.02) for a, b in pairs)
