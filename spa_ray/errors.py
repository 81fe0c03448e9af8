"""The ways in which a command ends badly.

`InputError` is the user's to mend (exit status 2), `RunError` is a run that failed in the middle
(exit status 1), `LateError` one of its kinds. They carry one line; nobody prints a traceback for them.
"""

from __future__ import annotations


class InputError(Exception):
    """The input or the config is wrong: what, where, how to mend it, in one line."""


class RunError(Exception):
    """The run failed: which stage, which actor, and where its log is, in one line."""


class LateError(RunError):
    """Something did not end in its time and cannot be ended: it goes on in a thread until the process ends."""
