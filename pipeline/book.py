"""What became of the tiles of a run."""

from __future__ import annotations

from sgclassify.pipeline.inventory import Inventory
from sgclassify.pipeline.plan import Plan
from sgclassify.pipeline.record.receipts import TileReceipt
from sgclassify.pipeline.record.record import DONE, TileRecord
from sgclassify.pipeline.record.sample import SkySample
from sgclassify.stages.tiling import Tile


class TileBook:
    """What became of the planned tiles: for the record, the report, and the join.

    `sample` has objects of the published tiles, `keys` their keys; `published` has, by good exposure, these by pixel.
    """

    def __init__(self, plan: Plan, inventory: Inventory) -> None:
        self.records = {tile: TileRecord(tile.order, tile.pixel, list(tile.exposures)) for tile in plan.tiles}
        self.sample = SkySample()
        self.keys: dict[Tile, str] = {}
        self.published: dict[str, dict[int, str]] = {name: {} for name in inventory.good}
        for tile, receipt in plan.tiles.items():
            if receipt is not None:
                self.take(tile, receipt, 0)

    def take(self, tile: Tile, receipt: TileReceipt, attempts: int) -> None:
        """Enter a published tile."""
        one = self.records[tile]
        one.outcome, one.attempts = DONE, attempts
        for name in (
            "n_objects", "n_stars", "n_galaxies", "n_not_scored", "seconds", "worker", "device", "peak_mib",
        ):  # fmt: skip
            setattr(one, name, getattr(receipt, name))
        self.sample.add(receipt)
        self.keys[tile] = receipt.key
        for name in tile.exposures:
            self.published[name][tile.pixel] = receipt.key
