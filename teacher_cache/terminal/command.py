"""How commands end: results on stdout, everything else on stderr, one sentence for an error, an exit code with a meaning.

Exit codes: 0 done; 1 the data or the machine is at fault; 2 the command is; 75 stopped by SIGTERM (EX_TEMPFAIL: run it again);
130 interrupted (128 + SIGINT).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from ..errors import TeacherCacheError, UsageError
from ..files.durable import allowed_by
from .extras import what_is_missing
from .image_warnings import named
from .signals import INTERRUPTED, STOPPED, Stopped, signals_raise


def say(*lines: str) -> None:
    """Print to stderr, so that stdout stays clean for --json."""
    for line in lines:
        click.echo(line, err=True)


@contextmanager
def one_line_errors(resume: str | Callable[[], str], usage: tuple = (), others: tuple = (), as_json: bool = False
                    ) -> Iterator[None]:  # fmt: skip
    """Turn this project's errors, disk errors, packages that are not installed, Ctrl-C and SIGTERM into one message and an exit
    code.

    resume: what to say about work that was interrupted. usage, others: further exception classes that carry a user's message;
    the former mean that the command is at fault. as_json: print {"error": message} on stdout too.
    """
    try:
        with signals_raise(), named(say):
            yield
    except KeyboardInterrupt as stop:
        how, code = ("Stopped by SIGTERM", STOPPED) if isinstance(stop, Stopped) else ("Interrupted", INTERRUPTED)
        click.echo(f"\n{how}. {resume() if callable(resume) else resume}".rstrip(), err=True)
        sys.exit(code)
    except (TeacherCacheError, *usage, *others) as error:
        _say_error(str(error), as_json)
        sys.exit(2 if isinstance(error, (UsageError, *usage)) else 1)
    except ModuleNotFoundError as error:
        missing = what_is_missing(error)
        if missing is None:
            raise
        _say_error(missing, as_json)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left; say nothing more
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        advice = "Take smaller batches (--batch-size, or --micro-batch of student-train) or another --device."
        _say_error(f"The GPU's memory is full. {advice}", as_json)
        sys.exit(1)
    except PermissionError as error:
        _say_error(allowed_by(error), as_json)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say_error(f"{where}{error.strerror or error}", as_json)
        sys.exit(1)


def _say_error(message: str, as_json: bool) -> None:
    say(f"Error: {message}")
    if as_json:
        click.echo(json.dumps({"error": message}))
