"""The command ``simulate``: make simulated exposures with truth."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sgclassify.simulation.config import SimulationConfig
from sgclassify.simulation.filters import PSF_FAMILIES
from sgclassify.stages.bands import REAL_SHAPE

log = logging.getLogger(__name__)

DEFAULT = SimulationConfig()


# Options are named after the fields of SimulationConfig, and those in ``chosen`` go into it as they are.
@click.command(name="simulate", context_settings={"show_default": True})
@click.option(
    "--output", "-o", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Folder for the fields and exposures.txt. Finished fields in it are kept.",
)  # fmt: skip
@click.option("--fields", "n_fields", type=click.IntRange(min=1), default=DEFAULT.n_fields, help="Number of fields.")
@click.option("--seed", type=click.IntRange(min=0), default=DEFAULT.seed, help="Seed of all random draws.")
@click.option(
    "--size", type=(int, int), default=DEFAULT.detector_shape[::-1], metavar="NX NY",
    help="Size of a detector, pixels.",
)  # fmt: skip
@click.option("--real-size", is_flag=True, help="Detectors of 9216 x 9232 pixels, the camera's own size.")
@click.option("--bands", default=",".join(DEFAULT.bands), help="Bands to observe, separated by commas.")
@click.option(
    "--exposures-per-band", type=click.IntRange(min=1), default=DEFAULT.exposures_per_band,
    help="Exposures per band and field.",
)  # fmt: skip
@click.option(
    "--star-fraction", type=(float, float), default=DEFAULT.star_fraction, metavar="LOW HIGH",
    help="Range of the share of stars among sources brighter than i = 25.5.",
)  # fmt: skip
@click.option(
    "--mag-limit", "mag_limit_i", type=click.FloatRange(18.0, 27.0), default=DEFAULT.mag_limit_i,
    help="Faintest source, AB mag in i.",
)  # fmt: skip
@click.option(
    "--psf", "psf_families", type=click.Choice(PSF_FAMILIES), multiple=True,
    help="Kind of PSF; repeat for several [all].",
)  # fmt: skip
@click.option(
    "--compressed-share", type=click.FloatRange(0, 1), default=DEFAULT.compressed_share,
    help="Share of .fits.fz exposures.",
)  # fmt: skip
@click.option(
    "--variant-share", type=click.FloatRange(0, 1), default=DEFAULT.variant_share,
    help="Share of exposures with the older names and keywords.",
)  # fmt: skip
@click.option("--catalogs/--no-catalogs", default=DEFAULT.catalogs, help="Write CAT files.")
@click.option("--processes", "-j", type=click.IntRange(min=1), default=1, help="Processes at the same time.")
def simulate(
    output: Path, size: tuple[int, int], real_size: bool, bands: str, psf_families: tuple[str, ...],
    processes: int, **chosen: Any,
) -> None:  # fmt: skip
    """Make simulated exposures of CSST-like fields, with truth tables."""
    try:
        from sgclassify.simulation.simulate import FieldResult
        from sgclassify.simulation.simulate import simulate as run
    except ImportError as error:
        raise click.ClickException(f"{error}: install sgclassify[simulate]") from error
    try:
        config = SimulationConfig(
            detector_shape=REAL_SHAPE if real_size else (size[1], size[0]),
            bands=tuple(name.strip() for name in bands.split(",") if name.strip()),
            psf_families=psf_families or DEFAULT.psf_families,
            **chosen,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("fields", total=config.n_fields)

        def advance(result: FieldResult) -> None:
            bar.advance(task)
            if not console.is_terminal:
                verb = "made" if result.made else "kept"
                log.info("%s field %d: %d sources", verb, result.index, result.n_sources)

        try:
            results = run(config, output, processes, advance)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error
    made = sum(result.made for result in results)
    exposures = sum(len(result.images) for result in results)
    click.echo(
        f"{made} fields made, {len(results) - made} kept, {exposures} exposures in {output}, "
        f"{time.monotonic() - started:.0f} s"
    )
    click.echo(str(output / "exposures.txt"))
