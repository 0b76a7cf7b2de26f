"""Alarm lines for a run that goes wrong: a loss that jumps, a codebook that falls out of use."""

import statistics
from collections import deque
from collections.abc import Mapping

_LINES = 20  # of the curves that a loss is compared with
_ENOUGH = 8  # of them
_JUMP = 0.5  # part of a loss's usual value that it must rise by, and 10 usual deviations
_FALL = 0.5  # of the largest part of the codebook that was in use
_LITTLE = 0.1  # of the codebook in use after a tenth of the run

_LOSS_REMEDY = (
    "look at the pictures and gradient_norm; if it stays, go back to the checkpoint before, with a "
    "lower optimizer.learning_rate, more optimizer.warmup_steps or a smaller optimizer.clip_norm"
)
_USAGE_REMEDY = (
    "codebook.revive_every brings unused codes back, codebook.init=kmeans and "
    "losses.entropy_weight keep them from falling out of use, and so does a lower "
    "optimizer.learning_rate"
)


class Alarms:
    """What a run's curves are watched for; each alarm sounds once until its cause is gone."""

    def __init__(self, total_steps: int):
        self._total_steps = total_steps
        self._losses: deque[float] = deque(maxlen=_LINES)
        self._largest: dict[str, float] = {}
        self._sounding: set[str] = set()

    def of(self, step: int, line: Mapping[str, float]) -> list[str]:
        """Return the alarms that a line of the curves sets off, with a remedy each."""
        if all(name.startswith("eval/") for name in line if name != "step"):
            return []  # held-out figures stand between the lines of training
        found = self._jump(line) | self._unused(step, line)
        new = [text for name, text in found.items() if name not in self._sounding]
        self._sounding = set(found)
        return [f"step {step}: {text}" for text in new]

    def _jump(self, line: Mapping[str, float]) -> dict[str, str]:
        loss, before = line.get("loss/total"), list(self._losses)
        if loss is None:
            return {}
        self._losses.append(loss)  # what stays is the usual one after some lines
        if len(before) < _ENOUGH:
            return {}
        usual = statistics.median(before)
        deviation = statistics.median(abs(x - usual) for x in before)
        if loss <= usual + max(_JUMP * abs(usual), 10 * deviation):
            return {}
        return {"loss": f"the loss jumped to {loss:.4g} from {usual:.4g}; {_LOSS_REMEDY}"}

    def _unused(self, step: int, line: Mapping[str, float]) -> dict[str, str]:
        found = {}
        for name, used in line.items():
            if not name.startswith("usage/") or not name.endswith("all"):
                continue
            largest = self._largest[name] = max(self._largest.get(name, 0.0), used)
            if used < _FALL * largest:
                what = f"fell from {largest:.1%} to {used:.1%}"
            elif used < _LITTLE and step >= self._total_steps / 10:
                what = f"is {used:.1%} after a tenth of the run"
            else:
                continue
            found[name] = f"the part of the codes in use ({name}) {what}: {_USAGE_REMEDY}"
        return found
