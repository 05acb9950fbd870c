"""The expert groups that the tokens of a batch belong to, by their source.

Shapes: B sequences, T tokens, S sources of ``data.train``, G expert groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ultrathink.config.experts import MoeConfig
from ultrathink.data.batch import Batch


class GroupTargets:
    """Looks up the groups of each token, ``data.train[].groups`` of its source.

    ``source_groups`` has the names of the groups of each source. Without any, nothing is taught.
    """

    def __init__(
        self, source_groups: Sequence[Sequence[str]], moe: MoeConfig | None, device: torch.device
    ) -> None:
        self._of_source: Tensor | None = None  # boolean [S, G]
        if moe is not None and any(source_groups):
            names = [group.name for group in moe.groups]
            rows = [[name in groups for name in names] for groups in source_groups]
            self._of_source = torch.tensor(rows, device=device)

    def options(self, batch: Batch) -> dict[str, Tensor]:
        """What a pass over ``batch`` is given beside its tokens: ``group_targets`` ``[B, T, G]``,
        or nothing."""
        if self._of_source is None:
            return {}
        (source_ids,) = batch.on(self._of_source.device, "source_ids")
        return {"group_targets": self._of_source[source_ids]}
