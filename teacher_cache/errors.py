"""Errors a user can meet, grouped by what a caller would do about them.

    TeacherCacheError
    ├── UsageError (ValueError)          the request is wrong: change the command
    │   ├── UnknownNameError             no such teacher, preset, layer ...; the message lists the known ones
    │   └── MismatchError                something exists already and was made differently
    ├── BadInputError (ValueError)       the images or the weights are wrong: mend the files
    ├── NotAllowedError (OSError)        a file is there and this user may not read it: ask its owner, or be another user
    ├── ClaimLostError                   another process has taken the work over: leave it to that one
    ├── ShardsLeftError                  some shards failed again and again, all others are made: see what it lists
    ├── NoSpaceError (OSError)           the disk is too small: make room, or store less
    ├── CacheCorruptError (OSError)      bytes on disk are not those that were written: restore or redo
    └── NotInCacheError (KeyError)       the cache is sound but does not hold it: extract it
        └── CropNotCachedError           this row was never extracted

Libraries raise these; the command line turns them into one message and a non-zero exit.
"""


class TeacherCacheError(Exception):
    """Base of every error this package raises on purpose."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else ""


class UsageError(TeacherCacheError, ValueError):
    """The request cannot be carried out as it stands."""


class UnknownNameError(UsageError):
    """A name that nothing answers to."""


class MismatchError(UsageError):
    """What is on disk was made with other parameters than those given now."""


class BadInputError(TeacherCacheError, ValueError):
    """Images or weights that cannot be used."""


class NotAllowedError(TeacherCacheError, OSError):
    """A file or folder is there, but not for this user."""


class ClaimLostError(TeacherCacheError):
    """What this process was working on is no longer its own."""


class ShardsLeftError(TeacherCacheError):
    """Processes that share a store have given up some of its shards; the message says which, and what went wrong."""


class NoSpaceError(TeacherCacheError, OSError):
    """Not enough free bytes on the target disk."""


class CacheCorruptError(TeacherCacheError, OSError):
    """Bytes on disk differ from those that were written."""


class NotInCacheError(TeacherCacheError, KeyError):
    """The cache does not hold what was asked for."""


class CropNotCachedError(NotInCacheError):
    """A row whose targets were never extracted. Never answered with zeros."""
