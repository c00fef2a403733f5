"""The handful of errors a run can end in, each with its exit code.

Every error keeps its values as attributes and survives pickling, since most are raised on a Dask worker and
reported by the driver.
"""

from __future__ import annotations

from pathlib import Path


class SgClassifyError(Exception):
    """Base of all errors raised on purpose.

    Attributes
    ----------
    exit_code : int
        Exit status of ``sgclassify run`` when this error ends the run (FORMATS: exit codes).
    """

    exit_code: int = 1


class UsageError(SgClassifyError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class UnusableInputError(SgClassifyError, ValueError):
    """One input file can never be used; the rest of the list can.

    Parameters
    ----------
    path : str or Path
        The file at fault.
    fault : str
        What is wrong with it, in a few words.
    advice : str
        What the operator can do about it.
    """

    exit_code = 3

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

    exit_code = 4


class ModelError(SgClassifyError):
    """The model archive cannot be used: missing, damaged, or not what its contract says."""

    exit_code = 5


class ClusterError(SgClassifyError):
    """The cluster cannot do the work: no such worker, or the scheduler is lost."""

    exit_code = 6
