"""Errors a user can meet, grouped by what a caller would do about them.

    StudentError
    ├── ConfigError (ValueError)              the request is wrong: change the configuration
    ├── RunError (ValueError)                 a run's directory, checkpoint or data does not fit: restore or start anew
    └── NonFiniteLossError (ArithmeticError)  the training itself broke: look at the rows it names

Libraries raise these; the command line turns them into one message and a non-zero exit.
"""

from __future__ import annotations


class StudentError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(StudentError, ValueError):
    """A configuration that cannot be trained, by itself or with this teacher."""


class RunError(StudentError, ValueError):
    """What lies on disk or comes from the data source does not belong to this run, or is damaged."""


class NonFiniteLossError(StudentError, ArithmeticError):
    """The loss became infinite or not a number; the weights are still those of the step before.

    step: number of the step that failed, counted from 1.  rows: rows of the micro-batch whose loss it was.
    """

    def __init__(self, message: str, step: int, rows: tuple[int, ...]):
        super().__init__(message)
        self.step = step
        self.rows = rows
