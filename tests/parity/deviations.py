"""Where our engine differs from Lightning on purpose. Each entry says how, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from recording import equal


@dataclass(frozen=True)
class Deviation:
    """One intended difference; patterns are searched in the trace as one text, `^` and `$` match at lines.

    Attributes:
        reason: What is different, and why.
        ours: What only our trace has.
        theirs: What only Lightning's trace has.
        moved: What both have, at different places.
        values: Numbers differ from some point on: only names of hooks, and their order, are compared.
        unseen: Calls that may see another step or epoch.
        observed: Observations that are not compared.
    """

    reason: str
    ours: str = ""
    theirs: str = ""
    moved: str = ""
    values: bool = False
    unseen: str = ""
    observed: tuple[str, ...] = ()

    def apply(self, ours: Any, theirs: Any) -> bool:
        """Take the difference out of both runs; returns whether there was any."""
        found = False
        for side, pattern in ((ours, self.ours), (theirs, self.theirs)):
            if pattern:
                found |= bool(_take_out(side, pattern))
        if self.moved:
            before = (list(ours.trace), list(theirs.trace))
            assert sorted(_take_out(ours, self.moved)) == sorted(_take_out(theirs, self.moved)), self.reason
            found |= before[0] != before[1]
        found |= self.values and ours.trace != theirs.trace
        for lines in (ours.trace, theirs.trace):
            kept = [line.split("(")[0] if self.values else line for line in lines]
            if self.unseen:
                kept = [line.split("  |")[0] if re.match(self.unseen, line) else line for line in kept]
                found |= kept != lines
            lines[:] = kept
        for name in self.observed:
            found |= not equal(ours.observed.pop(name), theirs.observed.pop(name))
        return found


def _take_out(side: Any, pattern: str) -> list[str]:
    text = "".join(f"{line}\n" for line in side.trace)
    taken = [match[0] for match in re.finditer(pattern, text, re.MULTILINE)]
    side.trace[:] = re.sub(pattern, "", text, flags=re.MULTILINE).splitlines()
    return taken


NUMBERS = ("weights", "log", "callback_metrics", "logged_metrics", "progress_bar_metrics")

STATE_BEFORE_VALIDATION = Deviation(
    "a checkpoint that is saved during a validation holds the states from before it, so that a resume repeats it whole",
    ours=r"^\w+\.state_dict\(\).*\n(?=(?:\w+\.state_dict\(\).*\n)*M\.on_validation_model_zero_grad)",
)

# Taken out of every comparison; one scenario each holds that they occur.
EVERYWHERE = (STATE_BEFORE_VALIDATION,)
WITHIN_EPOCH = Deviation(
    "a run that max_steps ends within an epoch stays within it, so that it can go on there",
    unseen=r"(\w+\.(on_train_end|on_fit_end|teardown)|L\.)",
    observed=("current_epoch",),
)
PARTIAL_WINDOW = Deviation(
    "a partial window of accumulated gradients is divided by its own length: the gradient's size is right",
    values=True,
    observed=NUMBERS,
)
FINAL_VALIDATION = Deviation(
    "max_steps that ends within an epoch is followed by a validation, so that the last checkpoint has metrics",
    ours=r"^M\.on_validation_model_zero_grad[\s\S]*M\.on_validation_end.*\n",
    observed=NUMBERS[1:],
)
TEARDOWN_AFTER_ERROR = Deviation(
    "teardown runs after an error, too: what setup has opened is released",
    ours=r"^[CKMD]\w*\.teardown\(.*\n",
)
KEYBOARD_INTERRUPT = Deviation(
    "Ctrl-C is raised to the caller rather than turned into exit code 1, so that notebooks and tests live on",
    observed=("error",),
)
REFUSED = Deviation(
    "a return value that cannot be trained on is refused with the same kind of error, in one line that says what to do",
    observed=("error",),
)
FREQUENCY_IN_STEPS = Deviation(
    "the frequency of a scheduler by steps counts optimizer steps, as its name says, rather than batches",
    values=True,
    observed=NUMBERS,
)
PLATEAU_BEFORE_CHECKPOINT = Deviation(
    "plateau schedulers step before the checkpoint of the epoch is saved, so that a resume is exact",
    moved=r"^M\.lr_scheduler_step\(.*\n",
)
MONITORING_LAST = Deviation(
    "callbacks that monitor see the end of a batch after the module has, and after its values were logged",
    moved=r"^K\.on_train_batch_end\(.*\n",
)
LOGGED_BEFORE_PLATEAU = Deviation(
    "the values of an epoch reach the loggers before a plateau scheduler looks at them",
    ours=r"^L\.log_metrics\(.*train_loss_epoch.*\n(?=C\.on_exception)",
)
POSITION_RESTORED = Deviation(
    "a resume within an epoch goes on with the samples that are left, where Lightning begins with the first again",
    values=True,
    observed=NUMBERS,
)
LAST_IS_NEWEST = Deviation(
    "last.ckpt is written at every trigger, not only when the same trigger has kept a file by score",
    observed=("last_model_path",),
)
MISSING_MONITOR = Deviation(
    "a monitored name that was never logged ends the run with the names that exist",
    observed=("error",),
)
