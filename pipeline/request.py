"""What a run is asked to do, checked without torch, Dask and astropy.

Nothing here may import them: that takes seconds, and wrong usage is refused at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgclassify.model.serve.archive import Archive, verified
from sgclassify.model.serve.loaded import ModelRef
from sgclassify.pipeline.config import RunConfig, load_config
from sgclassify.pipeline.record.output import OutputFolder
from sgclassify.stages.errors import UsageError
from sgclassify.stages.prior import Prior
from sgclassify.stages.program import code_digest
from sgclassify.stages.read.exposure_list import ExposureList, parse_list
from sgclassify.stages.read.prior import read_prior

if TYPE_CHECKING:
    from sgclassify.model.serve.contract import ModelContract


@dataclass(frozen=True)
class Options:
    """The options of ``sgclassify run``, whose help explains them; `command` is the command line, for the record.

    Without `scheduler` and `scheduler_file`, the cluster is one of this machine. None, and False for `tta` and `exact`,
    leave the value to the configuration, or for `model` to the package.
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
    exact: bool = False
    overwrite: bool = False
    keep_work: bool = False
    verify_inputs: bool = False
    metrics_file: Path | None = None
    command: tuple[str, ...] = ()

    @property
    def own_cluster(self) -> bool:
        """Whether the run starts a cluster of this machine."""
        return self.scheduler is None and self.scheduler_file is None


@dataclass(frozen=True)
class Request:
    """What a run is asked to do, checked.

    Attributes
    ----------
    options : Options
    config : RunConfig
        The options of the command line are taken over.
    prior : Prior or None
        Share of stars to assume; None for the model's own.
    listed : ExposureList
    model : Archive
        Not loaded yet.
    settings : dict
        What decides about the products beside the inputs.
    """

    options: Options
    config: RunConfig
    prior: Prior | None
    listed: ExposureList
    model: Archive
    settings: dict[str, Any]

    def folder(self) -> OutputFolder:
        """The output folder of the run, not entered yet."""
        return OutputFolder(self.options.output, self.settings, self.options.overwrite)

    def model_ref(self, contract: ModelContract) -> ModelRef:
        """What the workers load; `contract` is that of `model`."""
        path = self.options.model
        return ModelRef(
            path=path.absolute() if path is not None else None,
            sha256=self.model.sha256,
            batch_size=self.config.batch_size,
            threads=self.config.torch_threads,
            tta=self.config.tta,
            exact=self.config.exact,
            own_prior=contract.prior_star_fraction,
            prior=self.prior,
        )

    def is_exact(self, contract: ModelContract) -> bool:
        """Whether the whole model is asked about every object; `contract` is that of `model`."""
        return self.config.exact or self.config.tta or contract.cascade is None

    def metadata(self, contract: ModelContract) -> dict[str, str]:
        """What every Parquet file says of the model; nothing that differs between two equal runs."""
        own = repr(contract.prior_star_fraction)
        return {
            "model_id": contract.model_id,
            "model_sha256": self.model.sha256,
            "prior_star_fraction": own if self.prior is None else self.prior.as_text(),
            "model_prior_star_fraction": own,
            "tta": str(self.config.tta).lower(),
            "exact": str(self.is_exact(contract)).lower(),
        }


def check(options: Options, *, dry: bool = False) -> Request:
    """Read configuration, prior and list, and check model archive and output folder; nothing is written.

    In a `dry` run nothing will be written later either: another run may then be at work in the output folder.

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
        config,
        tta=config.tta or options.tta,
        exact=config.exact or options.exact,
        device=options.device or config.device,
    )
    prior = prior_of(config)
    listed = parse_list(options.exposure_list)
    model = verified(options.model)
    request = Request(options, config, prior, listed, model, settings_of(model.sha256, config, prior))
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
        raise UsageError("the prior share of stars is empty; give a number between 0 and 1, or a table's path")
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
        **{name: getattr(config, name) for name in ("tile_order", "batch_size", "torch_threads", "tta", "exact")},
        **{f"stage.{name}": value for name, value in dataclasses.asdict(config.stage).items()},
    }
