"""What can go wrong with a question: permanently, for now, or because the engine died under it."""

from __future__ import annotations


class PermanentError(Exception):
    """A question that will never work. `reason` is its class; the message names the file and the fix."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class TransientError(Exception):
    """Something that may work later: the question is tried again."""


class EngineDiedError(Exception):
    """The engine's process ended, or was ended because it hung, while it computed a batch."""


class BatchFailedError(Exception):
    """The engine raised an exception on a batch, and lives."""

    def __init__(self, summary: str, child_traceback: str, *, out_of_memory: bool = False) -> None:
        super().__init__(summary)
        if child_traceback:
            self.add_note(f"In the engine's process:\n{child_traceback}")  # so that every traceback shows it
        self.child_traceback = child_traceback
        self.out_of_memory = out_of_memory


class EngineStartError(Exception):
    """The engine cannot load its model; the worker cannot do anything."""


class RunRefusedError(Exception):
    """This worker cannot compute this run: another checkpoint, or settings that the model cannot satisfy."""


class MessageRefusedError(Exception):
    """A message that is not as we write them, or is of a run that is gone: it is dropped."""


class NotThereYetError(Exception):
    """What a message names is not there, or not there yet: over NFS a worker sees a file a minute later than its writer."""


class WorkerEndsError(Exception):
    """The worker was asked to end while a question waited: the question goes back into the queue."""


class RunWaitsError(Exception):
    """A run cannot be read or written now: its message is dropped, and feeding brings the question back."""


def in_a_line(error: BaseException) -> str:
    """Return an exception's class and the first line of what it says, for a message of one line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:300]}"
