"""Scale on paper: what the whole survey costs at the measured rates, and which part breaks first.

Every part is taken to grow in proportion to what it works on. The facts of the survey are those of the CSST main survey
as it is planned; change them with `Survey`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from performance.figures import Results, shown

STAGES = "stages"
FIELD = "f2560"
"""Group and case of the figures that are scaled."""

PIXELS = 2560 * 2560
"""Pixels of an exposure of that field."""

YEARS = 10
HOURS_PER_YEAR = 8766


@dataclass(frozen=True)
class Survey:
    """What is to be classified, and on what.

    Attributes
    ----------
    area_deg2 : float
    visits : tuple of int
        Exposures of a place of the sky in NUV, u, g, r, i, z, y: two, or four where the camera has four detectors.
    objects : float
    detector : tuple of int
        Pixels along x and y.
    pixel_arcsec : float
    bytes_per_pixel : int
        Of IMG, WHT and FLG together.
    tile_order : int
        HEALPix order of the tiles.
    cores : int
        Cores that work at the same time.
    read_gb_s : float
        What the storage delivers to all of them together.
    """

    area_deg2: float = 17_500.0
    visits: tuple[int, ...] = (4, 2, 2, 2, 2, 2, 4)
    objects: float = 1e9
    detector: tuple[int, int] = (9216, 9232)
    pixel_arcsec: float = 0.074
    bytes_per_pixel: int = 10
    tile_order: int = 10
    cores: int = 1000
    read_gb_s: float = 10.0

    @property
    def pixels(self) -> int:
        """Pixels of an exposure of one detector."""
        return self.detector[0] * self.detector[1]

    @property
    def exposures(self) -> float:
        """Exposures of single detectors."""
        return self.area_deg2 / (self.pixels * (self.pixel_arcsec / 3600) ** 2) * sum(self.visits)

    @property
    def tiles(self) -> float:
        """Tiles of the sky."""
        return self.area_deg2 / (41_252.96 / (12.0 * 4.0**self.tile_order))

    @property
    def rows(self) -> float:
        """Catalogue rows, if every exposure of a place sees the object."""
        return self.objects * sum(self.visits)

    @property
    def bytes_read(self) -> float:
        """Bytes of images, weights and flags."""
        return self.exposures * self.pixels * self.bytes_per_pixel


@dataclass(frozen=True)
class Cost:
    """One part of the work: CPU or GPU hours in all, and whether these cannot be shared among the cores."""

    name: str
    hours: float
    basis: str
    serial: bool = False
    gpu: bool = False


def costs(results: Results, survey: Survey) -> list[Cost]:
    """Hours of every part that was measured."""
    looks = sum(survey.visits) / len(survey.visits)
    found: list[Cost] = []

    def enter(name: str, rate: float | None, count: float, basis: str, serial: bool = False, gpu: bool = False) -> None:
        if rate is not None:
            found.append(Cost(name, rate * count / 3600, basis, serial, gpu))

    def stage(name: str) -> float | None:
        return results.value(STAGES, f"{name} ({FIELD})", "CPU ms per item")

    def ms(value: float | None) -> float | None:
        return None if value is None else value / 1000

    enter("headers", ms(stage("headers")), survey.exposures, "per exposure", serial=True)
    prepare = ms(stage("prepare"))
    per_pixel = None if prepare is None else prepare / PIXELS
    enter("prepare", per_pixel, survey.exposures * survey.pixels, "per pixel of an exposure")
    enter("extract", ms(stage("extract")), survey.objects * looks, f"per object, {looks:.1f} exposures a band")
    enter("network", ms(stage("network")), survey.objects, "per object")
    enter("network --exact", ms(stage("network --exact")), survey.objects, "per object, instead of the line above")
    rates = [f.value for f in results.figures if f.group == "gpu" and f.quantity == "stamps/s" and f.each]
    enter("network on a GPU", 1 / max(rates) if rates else None, survey.objects, "per object", gpu=True)
    enter("publish", ms(stage("publish")), survey.objects, "per object")
    enter("join", ms(stage("join")), survey.rows, "per row")
    scheduler = results.value("scheduler", "tiles without content", "driver CPU ms per tile")
    enter("scheduler", ms(scheduler), survey.tiles, "per tile, one process", serial=True)
    enter("finish", ms(stage("finish")), survey.tiles, "per tile, one process", serial=True)
    return found


INSTEAD = ("network --exact", "network on a GPU")
"""Costs that take the place of another one."""


def bottlenecks(results: Results, survey: Survey) -> list[tuple[str, float]]:
    """Hours that each resource needs for the survey, the scarcest first: what comes first breaks first."""
    parts = costs(results, survey)
    shared = sum(one.hours for one in parts if not one.serial and not one.gpu and one.name not in INSTEAD)
    hours = [(f"{survey.cores:,} cores", shared / survey.cores)]
    hours.append(
        (f"storage that delivers {survey.read_gb_s:g} GB/s", survey.bytes_read / survey.read_gb_s / 1e9 / 3600)
    )
    hours += [(f"{one.name}, in one process", one.hours) for one in parts if one.serial]
    return sorted(hours, key=lambda pair: -pair[1])


def report(results: Results, survey: Survey) -> str:
    """The survey's cost as Markdown."""
    parts = costs(results, survey)
    total = sum(one.hours for one in parts if not one.gpu and one.name not in INSTEAD)
    facts = [
        ("exposures of one detector", shown(survey.exposures, "")),
        ("tiles", shown(survey.tiles, "")),
        ("objects", shown(survey.objects, "")),
        ("catalogue rows", shown(survey.rows, "")),
        ("read", shown(survey.bytes_read / 1e15, "PB")),
    ]
    written = results.value(STAGES, f"written ({FIELD})", "bytes per object")
    if written is not None:
        # measured with one exposure a band: detections grow with the exposures, most of the bytes are theirs
        looks = sum(survey.visits) / len(survey.visits)
        facts.append(("written, at most", shown(written * survey.objects * looks / 1e12, "TB")))
    lines = _rows(("survey", ""), facts)
    costs_of = [(one.name, shown(one.hours, "GPU h" if one.gpu else "CPU h"), one.basis) for one in parts]
    costs_of.append(
        ("**all on CPUs**", shown(total, "CPU h"), f"{total / HOURS_PER_YEAR / YEARS:,.1f} cores for ten years")
    )
    lines += ["", *_rows(("part", "cost", "scaled"), costs_of)]
    scarce = bottlenecks(results, survey)
    lines += ["", *_rows(("resource", "time for the whole survey"), [(n, shown(h, "h")) for n, h in scarce])]
    lines += ["", f"Breaks first: {scarce[0][0]}."]
    memory = results.value("plan", "headers only", "driver KiB per exposure")
    if memory is not None:
        whole = memory * survey.exposures / 2**20
        lines.append(f"A single list of the whole survey would need {shown(whole, 'GiB')} in the driver.")
    return "\n".join(lines)


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cell: Callable[[tuple[str, ...]], str] = lambda row: "| " + " | ".join(row) + " |"  # noqa: E731
    return [cell(head), "|" + "---|" * len(head), *(cell(row) for row in rows)]
