"""What a run is asked to do, checked as far as it can be without torch, Dask and astropy.

Those take seconds to import, and wrong usage should be refused at once: nothing here may import them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgclassify.model.serve.archive import verified
from sgclassify.pipeline.config import RunConfig, load_config
from sgclassify.pipeline.record.output import OutputFolder
from sgclassify.stages.errors import UsageError
from sgclassify.stages.prior import Prior
from sgclassify.stages.program import code_digest
from sgclassify.stages.read.exposure_list import ExposureList, parse_list
from sgclassify.stages.read.prior import read_prior


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes
    ----------
    exposure_list, output : Path
    model : Path or None
        Model archive; None for the shipped one.
    scheduler : str or None
        Address of an existing scheduler.
    scheduler_file : Path or None
        File that a scheduler wrote its address into. Without either, the cluster is an embedded one.
    device : str or None
        ``"auto"``, ``"cpu"`` or ``"gpu"``; None for what the configuration says.
    workers : int or None
        Worker processes.
    config : Path or None
        Configuration file.
    prior : str or None
        Share of stars to assume, or a table of it by magnitude; None for what the configuration says.
    tta : bool
        Average over the eight symmetries of the square; also if the configuration says so.
    overwrite, keep_work : bool
    verify_inputs : bool
        Compare the checksums of inputs that an earlier run has read.
    metrics_file : Path or None
        File for Prometheus' textfile collector.
    command : tuple of str
        The command line, for the record.
    """

    exposure_list: Path
    output: Path
    model: Path | None = None
    scheduler: str | None = None
    scheduler_file: Path | None = None
    device: str | None = None
    workers: int | None = None
    config: Path | None = None
    prior: str | None = None
    tta: bool = False
    overwrite: bool = False
    keep_work: bool = False
    verify_inputs: bool = False
    metrics_file: Path | None = None
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What a run is asked to do, read and found sound.

    Attributes
    ----------
    options : Options
    config : RunConfig
        With what the command line says of it.
    prior : Prior or None
        Share of stars to assume; None for the model's own.
    listed : ExposureList
    model_sha256 : str
        Checksum of the model archive.
    settings : dict
        What decides about the products beside the inputs.
    """

    options: Options
    config: RunConfig
    prior: Prior | None
    listed: ExposureList
    model_sha256: str
    settings: dict[str, Any]

    def folder(self) -> OutputFolder:
        """The output folder of the run, not entered yet."""
        return OutputFolder(self.options.output, self.settings, self.options.overwrite)


def check(options: Options, *, dry: bool = False) -> Request:
    """Read configuration, prior and list, and check model archive and output folder; nothing is written.

    Parameters
    ----------
    options : Options
    dry : bool
        Whether nothing will be written: another run may then be at work in the output folder.

    Returns
    -------
    Request

    Raises
    ------
    UsageError, NothingToDoError, ModelError
        In this order: wrong options, configuration or prior; a list that cannot be read or names nothing; a model
        archive that is missing or another one; an output folder that cannot be used.
    """
    if options.scheduler is not None and options.scheduler_file is not None:
        raise UsageError("--scheduler and --scheduler-file exclude each other")
    config = with_prior(load_config(options.config), options.prior)
    config = dataclasses.replace(
        config, tta=config.tta or options.tta, device=options.device or config.device
    )
    prior = prior_of(config)
    listed = parse_list(options.exposure_list)
    _, sha256 = verified(options.model)
    request = Request(options, config, prior, listed, sha256, settings_of(sha256, config, prior))
    folder = request.folder()
    folder.inspect()
    if not dry:
        folder.check_free()
    return request


def with_prior(config: RunConfig, value: str | None) -> RunConfig:
    """The configuration with the prior of the command line, a number or the path of a table, if there is one."""
    if value is None:
        return config
    if not value.strip():
        raise UsageError(
            "the prior share of stars is empty; give a number between 0 and 1, or a table's path"
        )
    try:
        share = float(value)
    except ValueError:
        return dataclasses.replace(config, prior_star_fraction=0.0, prior_table=value)
    if not 0.0 < share < 1.0:
        raise UsageError(f"the prior share of stars is {value}, it must lie between 0 and 1")
    return dataclasses.replace(config, prior_star_fraction=share, prior_table="")


def prior_of(config: RunConfig) -> Prior | None:
    """The prior that a configuration asks for; None for the model's own."""
    if config.prior_table:
        return read_prior(Path(config.prior_table))
    return Prior((config.prior_star_fraction,)) if config.prior_star_fraction else None


def settings_of(model_sha256: str, config: RunConfig, prior: Prior | None) -> dict[str, Any]:
    """What decides about the products beside the inputs; how the work is shared out does not."""
    return {
        "code": code_digest(),
        "model sha256": model_sha256,
        "prior": None if prior is None else prior.describe(),
        **{name: getattr(config, name) for name in ("tile_order", "batch_size", "torch_threads", "tta")},
        **{f"stage.{name}": value for name, value in dataclasses.asdict(config.stage).items()},
    }
