"""Break the source by hand, in one place at a time, and see whether a test notices.

    python -m tests.stress.breakages                   all of them: some minutes
    python -m tests.stress.breakages --only model      those of the files whose path contains this
    python -m tests.stress.breakages --list

Each breakage is applied to a copy of the tree, where the tests that ought to notice run until the
first of them fails. Ends with status 1 where one is missed, and where its text is no longer found:
then the table below has to follow the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = Path("src/ultrathink")
COPIED = ("src", "tests", "benchmarks", "examples", "docs", "pyproject.toml", "README.md")
TIMEOUT_S = 1800.0
TESTS_PASSED, TESTS_FAILED = 0, 1  # pytest's exit statuses; all others are no answer


@dataclass(frozen=True)
class Breakage:
    """What to break: the only place of ``file`` that reads ``old`` is to read ``new``."""

    name: str
    file: str  # below src/ultrathink
    old: str
    new: str
    tests: tuple[str, ...]  # below tests/; one of them has to fail

    def apply(self, tree: Path) -> None:
        """Break ``tree``; ValueError where the text is not there exactly once."""
        path = tree / SOURCE / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} times {self.old!r}, not once")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


BREAKAGES = (
    Breakage(
        "a change of type discards what was overridden before it",
        "config/overrides.py",
        'if not self._is_override(f"{key}.{name}"):',
        "if True:",
        ("unit/config",),
    ),
    Breakage(
        "a length in tokens is rounded down",
        "core/durations.py",
        "return math.ceil(self.value / tokens_per_step)",
        "return math.floor(self.value / tokens_per_step)",
        ("unit/core/test_durations.py",),
    ),
    Breakage(
        "positions do not restart with a document",
        "data/packing.py",
        "values[2, rows] = steps - first",
        "values[2, rows] = steps",
        ("unit/data/test_packing.py",),
    ),
    Breakage(
        "samples that are skipped are drawn all the same",
        "data/order.py",
        "raw = last.raw_start + (change.index - last.start) + change.skip",
        "raw = last.raw_start + (change.index - last.start)",
        ("unit/data/test_sample_order.py",),
    ),
    Breakage(
        "what workers read ahead outlives a change of the order",
        "data/loader.py",
        "self._num_outdated = 0 if self._pool is None else self._pool.num_pending",
        "self._num_outdated = 0",
        ("unit/data/test_train_loader.py", "unit/data/test_data_workers.py"),
    ),
    Breakage(
        "a saved tokenizer does not look up whole words first",
        "data/tokenizers/bpe.py",
        'model["ignore_merges"] = True',
        'model["ignore_merges"] = False',
        ("unit/data/test_tokenizers.py",),
    ),
    Breakage(
        "large vocabularies are stored in 16 bits",
        "data/cache.py",
        "np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32",
        "np.uint16 if tokenizer.vocab_size <= 2**24 else np.uint32",
        ("unit/data/test_token_cache.py",),
    ),
    Breakage(
        "a document sees the ones before it",
        "model/attention_mask.py",
        "same = document_ids[:, None, :, None] == document_ids[:, None, None, :]",
        "same = document_ids[:, None, :, None] >= document_ids[:, None, None, :]",
        ("unit/model/test_causality.py", "unit/model/test_attention_backends.py"),
    ),
    Breakage(
        "yarn stretches the fast dimensions in place of the slow",
        "model/rope.py",
        "return inverse / scaling.factor * stretched + inverse * (1 - stretched)",
        "return inverse / scaling.factor * (1 - stretched) + inverse * stretched",
        ("unit/model/test_rope.py", "numerics/test_llama_parity.py"),
    ),
    Breakage(
        "the z-loss is scaled by the gradient of the cross-entropy",
        "model/loss.py",
        "scale = grad_outputs[1]",
        "scale = grad_outputs[0]",
        ("unit/model/test_head_loss.py",),
    ),
    Breakage(
        "the bias moves towards the experts that are full",
        "model/experts/balance.py",
        "(mean - load).sign()",
        "(load - mean).sign()",
        ("unit/model/experts/test_balance_losses.py", "unit/training/test_expert_steps.py"),
    ),
    Breakage(
        "padding takes the places of trained tokens in a full expert",
        "model/experts/router.py",
        "rank = torch.where(sequences.counted.bool(), rank, -1.0)",
        "rank = torch.where(sequences.counted.bool(), rank, rank)",
        ("unit/model/experts",),
    ),
    Breakage(
        "micro-batches count equally, however many tokens they hold",
        "training/stepping.py",
        "term.sum / (counts[term.per] or 1.0)",
        "term.sum / max(1.0, self.objective.counts(micro_batch)[term.per]) / len(micro_batches)",
        ("unit/training/test_stepping.py",),
    ),
    Breakage(
        "norms and biases are decayed",
        "training/optimizers.py",
        '{"params": vectors, "weight_decay": 0.0, "decayed": False}',
        '{"params": vectors, "weight_decay": config.weight_decay, "decayed": True}',
        ("unit/training/test_optimizers.py",),
    ),
    Breakage(
        "Muon takes no look-ahead",
        "training/muon.py",
        "return parameter.grad.lerp(buffer, momentum)",
        "return buffer",
        ("unit/training/test_muon.py",),
    ),
    Breakage(
        "another schedule may raise the rate again",
        "training/schedules.py",
        "return min(ceiling, schedule(step))",
        "return ceiling",
        ("unit/training/test_schedules.py", "unit/recipes/test_resume_with_changes.py"),
    ),
    Breakage(
        "validations cost no time when minutes are made into steps",
        "training/budget.py",
        "per_step = speed.step_s + (speed.validation_s / eval_every if eval_every else 0.0)",
        "per_step = speed.step_s",
        ("unit/training/test_budget.py",),
    ),
    Breakage(
        "an average of weights is divided by one too few",
        "training/model_state.py",
        "parameter.div_(len(others) + 1)",
        "parameter.div_(len(others))",
        ("unit/training/test_control.py",),
    ),
    Breakage(
        "a state changes while it is written",
        "training/saving.py",
        "return copied_to_host(own_shards(state))",
        "return own_shards(state)",
        ("unit/training/test_saving.py",),
    ),
    Breakage(
        "a newer state that is written drops the best one, which still waits",
        "training/saving.py",
        'if other.step > request.step or (kind == "best" and not request.is_best)',
        "if other.step > request.step",
        ("unit/training/test_saving.py",),
    ),
    Breakage(
        "a step that is repeated in smaller micro-batches draws other numbers",
        "training/stepping.py",
        "set_torch_random_state(random_state)",
        "pass",
        ("unit/training/test_out_of_memory.py",),
    ),
    Breakage(
        "damage within the tensors of a checkpoint is not noticed",
        "checkpoint/format.py",
        "        if differs:",
        "        if differs and name == STATE_FILE:",
        ("unit/checkpoint/test_damaged_checkpoint.py",),
    ),
    Breakage(
        "an abandoned save is reported",
        "checkpoint/saver.py",
        "if not isinstance(error, SaveAbandonedError):",
        "if True:",
        ("unit/checkpoint/test_checkpoint_saver.py",),
    ),
    Breakage(
        "a snapshot of a history that was undone is linked into new checkpoints",
        "checkpoint/snapshots.py",
        "return (folder / CHECKSUM_FILE).read_bytes() == sums and has_its_sizes(folder)",
        "return has_its_sizes(folder)",
        ("unit/checkpoint/test_snapshots.py",),
    ),
    Breakage(
        "a damaged checkpoint counts among those that are kept",
        "runs/folder.py",
        "[path for path in found if has_its_sizes(path)][-keep:]",
        "found[-keep:]",
        ("unit/runs", "unit/checkpoint"),
    ),
    Breakage(
        "a forked child that ends releases the lock of its parent",
        "runs/lock.py",
        "if os.getpid() != pid:",
        "if False:",
        ("unit/runs/test_run_lock.py",),
    ),
    Breakage(
        "repeated steps that no rollback explains pass the check",
        "runs/metrics_check.py",
        "return any(source >= before and target < step for source, target in rollbacks)",
        "return any(source >= before for source, target in rollbacks)",
        ("unit/runs/test_metrics_check.py", "unit/runs/test_checking.py"),
    ),
    Breakage(
        "gradients are averaged over processes as well as divided by all tokens",
        "parallel/sharding.py",
        "sharded.set_gradient_divide_factor(1.0)",
        "sharded.set_gradient_divide_factor(2.0)",
        ("distributed/test_parity.py",),
    ),
    Breakage(
        "an entry is glued to the torn one before it",
        "monitoring/appending.py",
        "entry = self._end + entry",
        "pass",
        ("unit/monitoring/test_appending.py", "unit/monitoring/test_jsonl_sink.py"),
    ),
    Breakage(
        "TensorBoard shows what a resume has undone",
        "monitoring/tensorboard.py",
        "_session_start(info.start_step + 1)",
        "_session_start(info.start_step + 1000)",
        ("unit/monitoring/test_tensorboard_sink.py",),
    ),
    Breakage(
        "the Gini coefficient is not divided by the number of experts",
        "monitoring/experts.py",
        '"gini": _ratio(spread, N * load.sum(-1))',
        '"gini": _ratio(spread, load.sum(-1))',
        ("unit/monitoring/test_experts.py",),
    ),
    Breakage(
        "a failure that comes and goes is reported every time",
        "monitoring/health.py",
        "if kind in self._reported or now - self._reported_at.get(kind, -math.inf) < REPEAT_S:",
        "if kind in self._reported:",
        ("unit/monitoring/test_health.py",),
    ),
    Breakage(
        "a reader that sleeps silences the console for good",
        "monitoring/terminal.py",
        "if isinstance(error, BlockingIOError):",
        "if False:",
        ("unit/monitoring/test_terminal.py",),
    ),
    Breakage(
        "the logarithm of a negative loss is taken",
        "orchestrator/detectors/loss.py",
        "if loss < 0 and self.judged.is_log:",
        "if False:",
        ("unit/orchestrator/test_loss_detectors.py", "unit/orchestrator/test_watcher.py"),
    ),
    Breakage(
        "the level before a divergence still counts after it",
        "orchestrator/detectors/loss.py",
        "self.baseline.restart()",
        "pass",
        ("unit/orchestrator/test_loss_detectors.py",),
    ),
    Breakage(
        "one rollback more than the limit",
        "orchestrator/steering/policy.py",
        "self.num_rollbacks >= self.limits.rollbacks",
        "self.num_rollbacks > self.limits.rollbacks",
        ("unit/orchestrator/steering/test_policy.py",),
    ),
    Breakage(
        "the guard may skip every step",
        "orchestrator/steering/outliers.py",
        "skip = is_far and self._share() < self.most",
        "skip = is_far",
        ("unit/orchestrator/steering/test_outliers.py",),
    ),
    Breakage(
        "snapshots of an undone history are kept",
        "orchestrator/steering/snapshots.py",
        "self._kept = [one for one in self._kept if one.is_before(kept)]",
        "self._kept = list(self._kept)",
        ("unit/orchestrator/steering/test_snapshots.py",),
    ),
    Breakage(
        "milliseconds in a log are read as seconds",
        "insight/logs/names.py",
        '_TIMES |= {"ms": 1e-3',
        '_TIMES |= {"ms": 1.0',
        ("unit/insight",),
    ),
    Breakage(
        "the loss of a run's end is a mean over all of it",
        "insight/comparison.py",
        "begin = 0.9 * train[-1].step",
        "begin = 0.0 * train[-1].step",
        ("unit/insight/test_comparison.py", "unit/cli/test_cli_compare.py"),
    ),
    Breakage(
        "a step that a log has twice was not undone",
        "insight/logs/order.py",
        'step < last or (step == last and kind != "other")',
        "step < last",
        ("unit/insight/test_growing_logs.py",),
    ),
    Breakage(
        "text of a run becomes markup of its report",
        "insight/report/markup.py",
        "autoescape=True",
        "autoescape=False",
        ("unit/insight/test_report_page.py",),
    ),
    Breakage(
        "the doctor forgets the quota of a control group",
        "insight/doctor/machine.py",
        "return max(1, min(self.shared_cores, math.floor(self.quota)))",
        "return self.shared_cores",
        ("unit/insight/test_diagnosis.py",),
    ),
    Breakage(
        "top-p leaves out the token that reaches the mass",
        "inference/sampling.py",
        "before = probabilities.cumsum(-1) - probabilities",
        "before = probabilities.cumsum(-1)",
        ("unit/inference/test_sampling.py",),
    ),
    Breakage(
        "gate and up projections change places",
        "interop/weights.py",
        'yield RowSlice(f"{theirs}gate_proj.weight", gate_up, 0, width, (hidden,))\n'
        '    yield RowSlice(f"{theirs}up_proj.weight", gate_up, width, 2 * width, (hidden,))',
        'yield RowSlice(f"{theirs}up_proj.weight", gate_up, 0, width, (hidden,))\n'
        '    yield RowSlice(f"{theirs}gate_proj.weight", gate_up, width, 2 * width, (hidden,))',
        ("numerics/test_interop.py", "numerics/test_llama_parity.py"),
    ),
    Breakage(
        "a start that died before its first checkpoint loses its changes",
        "recipes/parts/resume_plan.py",
        "if not segments or segments[-1].from_step != step:",
        "if True:",
        ("unit/recipes/test_resume_with_changes.py",),
    ),
    Breakage(
        "a process applies what the others have not heard of",
        "training/control.py",
        "if self._is_shared:",
        "if False:",
        ("unit/training/test_control.py",),
    ),
    Breakage(
        "a reader that went away looks like a fault of the system",
        "cli/main.py",
        "return READER_GONE",
        "return SYSTEM_ERROR",
        ("unit/cli/test_cli_main.py",),
    ),
)


def run_tests(tree: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run ``tests`` of ``tree`` on its own source until the first fails."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=line"),
            *("-p", "no:cacheprovider", "-p", "no:randomly", "-n0", "-m", "not compiled"),
            *(f"tests/{name}" for name in tests),
        ],
        cwd=tree,
        env={
            **os.environ,
            "PYTHONPATH": str(tree / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",  # it would outlive the change of a source
            "ULTRATHINK_TEST_DATA": os.environ.get(
                "ULTRATHINK_TEST_DATA", str(ROOT.parent / "shared" / "data")
            ),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def copy_tree(to: Path) -> None:
    """The part of this repository that tests need."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".mypy_cache")
            shutil.copytree(ROOT / name, to / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, to / name)


def verdict_of(breakage: Breakage) -> tuple[str, str]:
    """``caught``, ``MISSED`` or ``ERROR``, and by what or why."""
    with tempfile.TemporaryDirectory(prefix="ultrathink-breakage-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        try:
            breakage.apply(tree)
        except ValueError as error:
            return "ERROR", str(error)
        done = run_tests(tree, breakage.tests)
    if done.returncode == TESTS_FAILED:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return "caught", failed[0].partition(" - ")[0].split(maxsplit=1)[-1] if failed else ""
    if done.returncode == TESTS_PASSED:
        return "MISSED", f"by {', '.join(breakage.tests)}"
    return "ERROR", f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr}"


def main() -> int:
    """Say of each breakage whether a test noticed; 1 where one was not, or could not be tried."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="those whose file contains this")
    parser.add_argument("--jobs", type=int, default=1, help="how many are tried at a time")
    parser.add_argument("--list", action="store_true", help="say what would be broken")
    args = parser.parse_args()
    chosen = [one for one in BREAKAGES if args.only in one.file]
    if args.list:
        for one in chosen:
            print(f"{one.file:<36}  {one.name}")
        return 0

    def attempt(one: Breakage) -> str:
        began = time.monotonic()
        verdict, why = verdict_of(one)
        print(f"{verdict:<6}  {time.monotonic() - began:5.0f} s  {one.file}: {one.name}")
        print(f"                 {why}", flush=True)
        return verdict

    with ThreadPoolExecutor(args.jobs) as pool:
        verdicts = list(pool.map(attempt, chosen))
    caught = verdicts.count("caught")
    print(f"{caught} of {len(chosen)} caught")
    return 0 if caught == len(chosen) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
