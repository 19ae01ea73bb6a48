"""Errors a user can meet, grouped by what a caller would do about them.

    StudentError
    ├── ConfigError (ValueError)              the request is wrong: change the configuration
    ├── RunError (ValueError)                 a run's files or its data are damaged or unfit: restore them, or start anew
    │   └── RunMismatchError                  the directory belongs to another run, trainer or use: choose another
    ├── PeerFailedError (RuntimeError)        another process of this run failed: its message says why
    └── NonFiniteLossError (ArithmeticError)  the training itself broke: look at the rows it names

Libraries raise these; the command line turns them into one message and a non-zero exit.
"""

from __future__ import annotations


class StudentError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(StudentError, ValueError):
    """A configuration that cannot be trained, by itself or with this teacher."""


class RunError(StudentError, ValueError):
    """What lies on disk or comes from the data source is damaged, or does not fit what it is to be used for."""


class RunMismatchError(RunError):
    """A sound directory that this run may not use: it holds another run or other files, or somebody is training in it."""


class PeerFailedError(StudentError, RuntimeError):
    """Another process of the run has failed, and this one stops with it.

    rank: its number among them, from 0.  text: its error.
    """

    def __init__(self, rank: int, text: str):
        super().__init__(f"Process {rank} of this run failed: {text}")
        self.rank = rank
        self.text = text


class NonFiniteLossError(StudentError, ArithmeticError):
    """The loss or its gradient became infinite or not a number; the weights are still those of the step before.

    step: number of the step that failed, counted from 1.  rows: of the micro-batch whose loss it was; of the whole step where
    the losses are finite and their gradient is not.
    """

    def __init__(self, message: str, step: int, rows: tuple[int, ...]):
        super().__init__(message)
        self.step = step
        self.rows = rows
