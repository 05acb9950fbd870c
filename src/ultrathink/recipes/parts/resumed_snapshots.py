"""Loads the snapshots of a steered run from the checkpoint that it resumes from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ultrathink.checkpoint.format import DamagedCheckpointError, load_checkpoint
from ultrathink.checkpoint.snapshots import embedded_steps, snapshot_path
from ultrathink.config.orchestrator import OrchestratorConfig
from ultrathink.core.errors import UltrathinkError
from ultrathink.recipes.parts.steering import room_for_snapshots
from ultrathink.runs.segments import ConfigChange
from ultrathink.training.control import ControlQueue
from ultrathink.training.model_state import placed_state, region_needed
from ultrathink.training.parts import Parts


def bring_back_snapshots(
    parts: Parts,
    control: ControlQueue,
    config: OrchestratorConfig,
    checkpoint: Path,
    plain: dict[str, Any],
    changes: Sequence[ConfigChange],
    reset: Collection[str],
) -> list[str]:
    """Load the snapshots embedded in ``checkpoint``; returns a sentence on each missing one.

    All processes call it. ``plain`` is the checkpoint's state without tensors.
    """
    steps = embedded_steps(plain)
    if not steps or config.mode != "act" or not config.snapshots.in_checkpoints:
        return []
    if reset or any(change.felt for change in changes):
        return [
            f"the run resumes with changes, so it cannot roll back to before step "
            f"{plain['progress']['step']}: the snapshots of the checkpoint are not loaded"
        ]
    remarks = []
    most = room_for_snapshots(parts, config.snapshots, len(steps))
    room = int(parts.world.of_main(most))
    if room < len(steps):
        remarks.append(
            f"there is memory for {room} of the {len(steps)} snapshots of the checkpoint: the run "
            f"can roll back only to those (orchestrator.snapshots.max_gib)"
        )
    lost: list[tuple[int, str]] = []
    for step in steps[len(steps) - room :]:
        problem = _bring_back(parts, control, snapshot_path(checkpoint, step), step)
        if problem is not None:
            lost.append((step, problem))
    if lost:
        numbers = ", ".join(str(step) for step, _ in lost)
        remarks.append(
            f"the run cannot roll back to the snapshot{'s' * (len(lost) > 1)} of step {numbers}, "
            f"damaged or missing in {checkpoint.name} ({lost[0][1]})"
        )
    return remarks


def _bring_back(parts: Parts, control: ControlQueue, folder: Path, step: int) -> str | None:
    """Read one snapshot, each process its part; returns the problem, if any."""
    problem = None
    try:
        state: dict[str, Any] = load_checkpoint(folder, region=partial(region_needed, parts.models))
        state["settings"]["eval_every"] = parts.settings.eval_every  # as configured now
        state = placed_state(state, parts.models, parts.stepper.host_names)
    except DamagedCheckpointError as error:
        problem = error.problem if folder.is_dir() else f"{folder.name} is missing"
    except (UltrathinkError, OSError) as error:
        problem = str(error)
    problems = [one for one in parts.world.gathered(problem) if one is not None]
    if problems:
        return str(problems[0])
    snapshot = control.bring_back(step)
    parts.snapshots.keep(snapshot.key, state, in_checkpoints=True)
    parts.saving.note_snapshot(snapshot.key, folder)
    return None
