"""Which step of a denoising run a forward is, and when another run begins."""

from dataclasses import dataclass, field


@dataclass
class Trajectory:
    """Counts the steps of each guidance branch of one transformer, from its calls alone.

    A run begins where the noise level (timestep or sigma) rises, or the step index does not. Where
    a pipeline gives no index, each call is a step, also at the level of the last one (Heun), unless
    that is where the run began. Calls without a branch may be several a step (guidance): there an
    equal timestep is the same step.
    """

    _step: dict[str | None, int] = field(default_factory=dict)
    _level: dict[str | None, float] = field(default_factory=dict)
    _highest: dict[str | None, float] = field(default_factory=dict)  # where the run began

    def by_index(self, branch: str | None, index: int, level: float) -> tuple[int, bool]:
        """Return the step, and whether it is the branch's first in this run."""
        is_first = (
            branch not in self._step or index <= self._step[branch] or level > self._level[branch]
        )
        self._step[branch], self._level[branch] = index, level
        return index, is_first

    def by_level(self, branch: str | None, level: float) -> tuple[int, bool]:
        """Return the same from the noise level alone."""
        last = self._level.get(branch)
        self._level[branch] = level
        is_again = branch is not None and level == last
        if last is None or level > last or (is_again and level == self._highest[branch]):
            self._step[branch], self._highest[branch] = 0, level
        elif level < last or is_again:
            self._step[branch] += 1
        return self._step[branch], self._step[branch] == 0
