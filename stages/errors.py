"""The exit codes, and the errors that a run can end in, each with its code.

Every error keeps its values as attributes and survives pickling, since most are raised on a Dask worker and
reported by the driver.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Self


class ExitCode(enum.IntEnum):
    """Exit status of ``sgclassify run``: the meaning in a few words, the cases, and what to do."""

    meaning: str
    cases: str
    advice: str

    def __new__(cls, value: int, meaning: str, cases: str, advice: str) -> Self:
        """One code."""
        code = int.__new__(cls, value)
        code._value_ = value
        code.meaning, code.cases, code.advice = meaning, cases, advice
        return code

    DONE = 0, "all done", "", "nothing"
    DEFECT = (
        1,
        "a defect in the program",
        "",
        "keep the log and report it; the same command goes on from what is complete",
    )
    USAGE = (
        2,
        "usage or configuration",
        "an unknown option or setting; an output folder that cannot be written or holds other work",
        "read the message: it names the option, setting or folder",
    )
    SET_ASIDE = (
        3,
        "finished, but some exposures or tiles were set aside",
        "the rest is written",
        "see what `sgclassify status` names, correct it, run the same command again",
    )
    NO_INPUT = (
        4,
        "no usable input",
        "the list is empty, or every exposure was set aside",
        "read the messages: they name each file",
    )
    NO_MODEL = (
        5,
        "the model cannot be used",
        "it is missing or damaged, or has another checksum or other features",
        "give the right archive with `--model`",
    )
    NO_CLUSTER = (
        6,
        "the cluster cannot do the work",
        "no worker can, the scheduler is lost, or the disk is full",
        "look up the message under the symptoms in operations.md",
    )


class SgClassifyError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is the exit status when one ends ``sgclassify run``."""

    exit_code: int = ExitCode.DEFECT


class UsageError(SgClassifyError):
    """The command line or the configuration is wrong."""

    exit_code = ExitCode.USAGE


class UnusableInputError(SgClassifyError, ValueError):
    """One input file can never be used; the rest of the list can.

    ``fault`` says in a few words what is wrong with the file, ``advice`` what the operator can do about it.
    """

    exit_code = ExitCode.SET_ASIDE

    def __init__(self, path: str | Path, fault: str, advice: str = "") -> None:
        super().__init__(str(path), fault, advice)
        self.path = str(path)
        self.fault = fault
        self.advice = advice

    def __str__(self) -> str:
        text = f"{self.path}: {self.fault}"
        return f"{text}; {self.advice}" if self.advice else text


class SlitlessExposureError(UnusableInputError):
    """The exposure is a slitless spectrum, which shows nothing to classify: skipped, no fault of the file."""


class NothingToDoError(SgClassifyError):
    """No usable input is left."""

    exit_code = ExitCode.NO_INPUT


class ModelError(SgClassifyError):
    """The model archive cannot be used: missing, damaged, or not what its contract says."""

    exit_code = ExitCode.NO_MODEL


class ClusterError(SgClassifyError):
    """The cluster cannot do the work: no such worker, or the scheduler is lost."""

    exit_code = ExitCode.NO_CLUSTER


class LongChainError(ValueError):
    """Detections near a tile form a chain that leads out of what is known of its surroundings."""
