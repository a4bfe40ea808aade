"""Where our engine differs from Lightning on purpose. Each entry says how, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from recording import differences


@dataclass(frozen=True)
class Deviation:
    """One intended difference; patterns are searched in the trace as one text, `^` and `$` match at lines.

    Attributes:
        reason: What is different, and why.
        ours: What only our trace has, or has in another order.
        becomes: What stands there in Lightning's trace.
        theirs: What only Lightning's trace has.
        moved: What both have, at different places.
        values: Numbers differ from some point on: only names of hooks, and their order, are compared.
        unseen: Calls that may see another step or epoch.
        observed: Observations that are not compared.
    """

    reason: str
    ours: str = ""
    becomes: str = ""
    theirs: str = ""
    moved: str = ""
    values: bool = False
    unseen: str = ""
    observed: tuple[str, ...] = ()

    def apply(self, ours: Any, theirs: Any) -> bool:
        """Take the difference out of both runs; returns whether there was any."""
        found = False
        for side, pattern, becomes in ((ours, self.ours, self.becomes), (theirs, self.theirs, "")):
            if pattern:
                found |= bool(_take_out(side, pattern, becomes))
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
            found |= bool(differences(ours.observed.pop(name, None), theirs.observed.pop(name, None)))
        return found


def _take_out(side: Any, pattern: str, becomes: str = "") -> list[str]:
    text = "".join(f"{line}\n" for line in side.trace)
    taken = [match[0] for match in re.finditer(pattern, text, re.MULTILINE)]
    side.trace[:] = re.sub(pattern, becomes, text, flags=re.MULTILINE).splitlines()
    return taken


# What is called when a checkpoint is saved.
SAVING = r"\w+\.(?:state_dict|on_save_checkpoint)\(.*\n|L\.after_save_checkpoint\(.*\n|K\.on_train_\w+_end\(.*\n"
NUMBERS = ("weights", "log", "callback_metrics", "logged_metrics", "progress_bar_metrics")

STATE_BEFORE_VALIDATION = Deviation(
    "a checkpoint that is saved during a validation holds the states from before it, so that a resume repeats it whole",
    ours=r"^\w+\.state_dict\(\).*\n(?=(?:\w+\.state_dict\(\).*\n)*M\.on_validation_model_zero_grad)",
)

WITHIN_EPOCH = Deviation(
    "a run that max_steps ends within an epoch stays within it, so that it can go on there",
    unseen=r"(\w+\.(on_train_end|on_fit_end|teardown)|L\.)",
    observed=("current_epoch",),
)
EPOCH_AFTER_RESUME = Deviation(
    "a run that goes on knows its epoch from the start, where Lightning counts it on after the sanity check",
    unseen=r".*\bsanity\b|L\.|\w+\.(train|val)_dataloader",
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
TEARDOWN_GOES_ON = Deviation(
    "an error in one teardown does not keep the others from running",
    ours=r"^M\.teardown\(.*\n(?=\w+\.on_exception)",
)
REFUSED_AT_ONCE = Deviation(
    "what is wrong before anything was set up is raised at once, without on_exception",
    theirs=r"^\w+\.on_exception\(.*\n|^L\.finalize\(failed.*\n",
)
METRICS_RESTORED = Deviation(
    "a resume knows the values that were logged before it",
    observed=("callback_metrics", "logged_metrics", "progress_bar_metrics"),
)
ASKED_BEFORE_RESUME = Deviation(
    "a resume asks for the train loader before the sanity check, to see that it is the one the run was using",
    moved=r"^[MD]\.train_dataloader\(.*\n",
)
KEYBOARD_INTERRUPT = Deviation(
    "Ctrl-C is raised to the caller rather than turned into exit code 1, so that notebooks and tests live on",
    observed=("error",),
)
REFUSED = Deviation(
    "wrong use raises MisconfigurationException with one line that says what to do, where Lightning raises others",
    observed=("error", "kind"),
)
FREQUENCY_IN_STEPS = Deviation(
    "the frequency of a scheduler by steps counts optimizer steps, as its name says, rather than batches",
    ours=r"^M\.lr_scheduler_step\(.*\n",
    theirs=r"^M\.lr_scheduler_step\(.*\n",
    values=True,
    observed=NUMBERS,
)
PLATEAU_BEFORE_CHECKPOINT = Deviation(
    "plateau schedulers step before the checkpoint of the epoch is saved, so that a resume is exact",
    moved=r"^M\.lr_scheduler_step\(.*\n",
    unseen=r"K\.",
)
MONITORING_LAST = Deviation(
    "callbacks that monitor see the end of a batch after the module has, and after its values were logged",
    ours=rf"^((?:(?:M\.on_train_batch_end|L\.log_metrics)\(.*\n)+)((?:{SAVING})+)",
    becomes=r"\2\1",
)
LOGGED_BEFORE_SAVING = Deviation(
    "the values of an epoch are logged before callbacks that monitor run: files are never ahead of the logs",
    ours=rf"^(L\.log_metrics\(.*\n)((?:{SAVING})+)",
    becomes=r"\2\1",
)
SAVED_ONCE = Deviation(
    "a file and last.ckpt, saved at one moment, have the same content: hooks are asked for it once",
    theirs=rf"^((?:{SAVING})+)(?=\1)",
)
LOGGED_BEFORE_PLATEAU = Deviation(
    "the values of an epoch reach the loggers before a plateau scheduler looks at them",
    ours=r"^(L\.log_metrics\(.*_epoch\b.*\n)((?:M\.lr_scheduler_step\(.*\n)+)",
    becomes=r"\2\1",
)
LOGGED_BEFORE_ERROR = Deviation(
    "the values of an epoch reach the loggers also if what monitors them then fails",
    ours=r"^L\.log_metrics\(.*_epoch\b.*\n(?=\w+\.on_exception)",
    observed=("log",),
)
POSITION_RESTORED = Deviation(
    "a resume within an epoch goes on with the samples that are left, where Lightning begins with the first again",
    values=True,
    observed=NUMBERS,
)
LAST_IS_NEWEST = Deviation(
    "last.ckpt is written at every trigger, not only when the same trigger has kept a file by score",
    ours=rf"^(?:{SAVING})",
    theirs=rf"^(?:{SAVING})",
    observed=("last_step",),
)
LOSS_IS_CHECKED = Deviation(
    "a loss without gradient is refused when training_step returns it, not by torch in the middle of the backward pass",
    theirs=r"^(\w+\.on_before_zero_grad|M\.optimizer_zero_grad|\w+\.on_before_backward|M\.backward)\(.*\n",
)
NUMBERS_ON_LOG_STEPS = Deviation(
    "logged_metrics and progress_bar_metrics hold what the last log step has read: no other waits for the device",
    observed=("logged_metrics", "progress_bar_metrics"),
)
NAMED_SETS = Deviation(
    "validation sets that are given by name are logged by name, not by number, and so is their mean",
    ours=r"^L\.log_metrics\(.*val_loss/night.*\n",
    theirs=r"^L\.log_metrics\(.*val_loss/dataloader_idx_0.*\n",
    observed=NUMBERS[1:],
)

# Taken out of every comparison; one scenario each holds that they occur.
EVERYWHERE = (STATE_BEFORE_VALIDATION, SAVED_ONCE, LOGGED_BEFORE_SAVING, LOGGED_BEFORE_PLATEAU)
