"""What a run will do: the dry run prints it, the run carries it out."""

from __future__ import annotations

from dataclasses import dataclass

from sgclassify.pipeline.inventory import Inventory
from sgclassify.pipeline.record.receipts import TileReceipt
from sgclassify.stages.tiling import Tile


@dataclass(frozen=True)
class Plan:
    """What a run will do if all goes well, from what is known of its exposures now.

    Attributes
    ----------
    new : list of str
        Exposures to prepare of which nothing is known yet.
    again : list of str
        Known exposures to prepare once more: what is to do needs their prepared files, which are gone. A complete run
        removes them.
    tiles : dict of Tile to TileReceipt or None
        All tiles, in the order of the work; None for those to compute.
    join : list of str
        Exposures whose catalogue is to be joined.
    complete : list of str
        Exposures with which nothing is to do.
    """

    new: list[str]
    again: list[str]
    tiles: dict[Tile, TileReceipt | None]
    join: list[str]
    complete: list[str]

    @property
    def is_done(self) -> bool:
        """Whether nothing is to do on a worker."""
        return not (self.new or self.again or self.todo or self.join)

    @property
    def todo(self) -> list[Tile]:
        """The tiles to compute."""
        return [tile for tile, receipt in self.tiles.items() if receipt is None]


def make_plan(inventory: Inventory) -> Plan:
    """Plan the run of an inventory that was read; `NothingToDoError` if none of its exposures can be used."""
    tiles = {tile: inventory.published(tile) for tile in inventory.tiles()}
    touched = {name for tile, receipt in tiles.items() if receipt is None for name in tile.exposures}
    expected: dict[str, dict[int, str]] = {name: {} for name in inventory.headers}
    for tile, receipt in tiles.items():
        # "": of a tile with new exposures, which no product has been made of yet
        computed = inventory.key_of(tile) if receipt is None and inventory.is_known(tile) else ""
        for name in tile.exposures:
            expected[name][tile.pixel] = computed if receipt is None else receipt.key
    joined = {name for name in inventory.good if inventory.is_joined(name, expected[name])}
    complete = joined - touched
    new = set(inventory.new())
    # an exposure whose product is missing is joined again even if no tile of it is computed
    again = {
        name
        for name, receipt in inventory.good.items()
        if name not in complete and not inventory.receipts.is_prepared(receipt)
    }
    join = new | again | (inventory.good.keys() - joined)
    return Plan(sorted(new), sorted(again), tiles, sorted(join), sorted(complete))


def describe(plan: Plan, inventory: Inventory) -> str:
    """The plan as text: a line per exposure, a line per tile, and the counts."""
    new, again, join, lines = set(plan.new), set(plan.again), set(plan.join), []
    for exposure in inventory.record.exposures:
        if exposure.fault:
            state = f"{exposure.outcome.replace('_', ' ')}: {exposure.fault}"
        elif exposure.id in new:
            state = "to be prepared"
        elif exposure.id in again:
            state = "known, to be prepared and joined again"
        else:
            state = "known, to be joined" if exposure.id in join else "known"
        lines.append(f"exposure {exposure.id}: {state}")
    for tile, receipt in plan.tiles.items():
        state = "to be computed" if receipt is None else "complete"
        lines.append(f"{tile}: {len(tile.exposures)} exposures, {state}")
    todo, prepare = len(plan.todo), len(new) + len(again)
    lines.append(
        f"{len(inventory.headers)} exposures can be used, {len(inventory.good)} of them are known already; "
        f"{len(plan.tiles)} tiles, {len(plan.tiles) - todo} of them are complete; to do: "
        f"{prepare} exposures to prepare, {todo} tiles to compute, {len(join)} catalogues to join"
    )
    return "\n".join(lines)
