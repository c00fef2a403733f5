"""The command ``simulate``: make simulated exposures with truth."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sgclassify.simulation.filters import PSF_FAMILIES
from sgclassify.stages.bands import BANDS

log = logging.getLogger(__name__)


@click.command(name="simulate", context_settings={"show_default": True})
@click.option(
    "--output", "-o", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Folder for the fields and exposures.txt; finished fields in it are kept.",
)  # fmt: skip
@click.option("--fields", type=click.IntRange(min=1), default=1, help="Number of fields.")
@click.option("--seed", type=click.IntRange(min=0), default=1, help="Seed of everything.")
@click.option("--size", type=(int, int), default=(1024, 1024), metavar="NX NY", help="Detector size, pixels.")
@click.option("--real-size", is_flag=True, help="Detectors of 9216 x 9232 pixels, as the camera has.")
@click.option("--bands", default=",".join(BANDS), help="Bands observed, with commas between.")
@click.option(
    "--exposures-per-band", type=click.IntRange(min=1), default=1, help="Exposures a band and field."
)
@click.option(
    "--star-fraction", type=(float, float), default=(0.05, 0.5), metavar="LOW HIGH",
    help="Range of the share of stars among sources brighter than i = 25.5.",
)  # fmt: skip
@click.option(
    "--mag-limit", type=click.FloatRange(18.0, 27.0), default=27.0, help="Faintest source, AB mag in i."
)
@click.option(
    "--psf", type=click.Choice(PSF_FAMILIES), multiple=True, help="Kind of PSF; repeat for several [all]."
)
@click.option(
    "--compressed-share", type=click.FloatRange(0, 1), default=0.0, help="Share of .fits.fz exposures."
)
@click.option(
    "--variant-share", type=click.FloatRange(0, 1), default=0.0,
    help="Share of exposures with the older names and keywords.",
)  # fmt: skip
@click.option("--catalogs/--no-catalogs", default=True, help="Write CAT files.")
@click.option("--processes", "-j", type=click.IntRange(min=1), default=1, help="Processes at the same time.")
def simulate(
    output: Path, fields: int, seed: int, size: tuple[int, int], real_size: bool, bands: str,
    exposures_per_band: int, star_fraction: tuple[float, float], mag_limit: float, psf: tuple[str, ...],
    compressed_share: float, variant_share: float, catalogs: bool, processes: int,
) -> None:  # fmt: skip
    """Make simulated exposures of CSST-like fields, with truth tables."""
    try:
        from sgclassify.simulation.camera import REAL_SHAPE
        from sgclassify.simulation.simulate import FieldResult, SimulationConfig
        from sgclassify.simulation.simulate import simulate as run
    except ImportError as error:
        raise click.ClickException(f"{error}: install sgclassify[simulate]") from error
    try:
        config = SimulationConfig(
            seed=seed, n_fields=fields, detector_shape=REAL_SHAPE if real_size else (size[1], size[0]),
            bands=tuple(name.strip() for name in bands.split(",") if name.strip()),
            exposures_per_band=exposures_per_band, star_fraction=star_fraction, mag_limit_i=mag_limit,
            psf_families=psf or PSF_FAMILIES, compressed_share=compressed_share, variant_share=variant_share,
            catalogs=catalogs,
        )  # fmt: skip
    except ValueError as error:
        raise click.UsageError(str(error)) from error

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("fields", total=fields)

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
