"""Which step of a denoising run a forward is, and when another run begins."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Trajectory:
    """Counts the steps of each guidance branch of one transformer, from its calls alone.

    A run begins where the step index does not rise or, where a pipeline gives none, where the
    timestep does not fall. Calls without a branch may be several a step (guidance): there an equal
    timestep is the same step.
    """

    _step: dict[str | None, int] = field(default_factory=dict)
    _timestep: dict[str | None, float] = field(default_factory=dict)

    def by_index(self, branch: str | None, index: int) -> tuple[int, bool]:
        """Return the step, and whether it is the branch's first in this run."""
        is_first = branch not in self._step or index <= self._step[branch]
        self._step[branch] = index
        return index, is_first

    def by_timestep(self, branch: str | None, timestep: Tensor) -> tuple[int, bool]:
        """Return the same from the timestep, [B] or [B, S]; it waits for the GPU."""
        now, last = float(timestep.max()), self._timestep.get(branch)
        self._timestep[branch] = now
        if last is None or now > last or (now == last and branch is not None):
            self._step[branch] = 0
        elif now < last:
            self._step[branch] += 1
        return self._step[branch], self._step[branch] == 0
