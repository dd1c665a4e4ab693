"""What was shown before, and the way back to it."""

from typing import Generic, TypeVar

_State = TypeVar("_State")


class History(Generic[_State]):
    """Steps that can be undone and done again.

    `now` is what is shown, which becomes a step once it is remembered; steps that were undone are then forgotten.
    """

    def __init__(self, first: _State) -> None:
        self._steps, self._shown = [first], 0

    def can_undo(self, now: _State) -> bool:
        """Whether there is anything before what is shown."""
        return self._shown > 0 or now != self._steps[0]

    @property
    def can_redo(self) -> bool:
        """Whether anything was undone."""
        return self._shown < len(self._steps) - 1

    def remember(self, now: _State) -> None:
        """Make what is shown a step to come back to."""
        if self._steps[self._shown] != now:
            self._shown += 1
            self._steps[self._shown :] = [now]

    def go(self, by: int, now: _State) -> _State:
        """The state `by` steps on, as far as there are any."""
        self.remember(now)
        self._shown = min(max(self._shown + by, 0), len(self._steps) - 1)
        return self._steps[self._shown]
