"""The One Billion Word recipe in a process of its own, killed where one says."""

import json
import os
import signal
import sys

from transformers import TrainerCallback

from recipes.common.checkpoints import CheckpointedTrainer
from recipes.one_billion_word.options import parse_options
from recipes.one_billion_word.train import run


class KilledAfter(TrainerCallback):
    """SIGKILL once a step has been taken."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run_and_count(arguments, file):
    """The recipe; how many calls of functions each saving made is left in the file."""
    counts = []
    _while_saving(lambda calls: None, counts)
    run(*parse_options(arguments))
    file.write_text(json.dumps(counts))


def run_killed_after(arguments, step):
    """The recipe, killed once the step has been taken, before it is saved."""
    run(*parse_options(arguments), callbacks=[KilledAfter(step)])


def run_killed_while_saving(arguments, call):
    """The recipe, killed in its second saving, at a call of a function by number."""
    counts = []

    def kill(calls):
        if len(counts) == 1 and calls == call:
            os.kill(os.getpid(), signal.SIGKILL)

    _while_saving(kill, counts)
    run(*parse_options(arguments))


def _while_saving(on_call, counts):
    saving = CheckpointedTrainer._save_checkpoint

    def save(*args):
        calls = 0

        def count(frame, event, arg):
            nonlocal calls
            if event in ("call", "c_call"):
                calls += 1
                on_call(calls)

        sys.setprofile(count)
        try:
            saving(*args)
        finally:
            sys.setprofile(None)
        counts.append(calls)

    CheckpointedTrainer._save_checkpoint = save


if __name__ == "__main__":
    lost, step, *rest = sys.argv[1:]
    run(*parse_options(rest), callbacks=[KilledAfter(int(step))] if os.environ["RANK"] == lost else [])
