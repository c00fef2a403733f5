"""What a model archive says of itself: the agreement between training and the night run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from sgclassify.stages.bands import BANDS, PIXEL_SCALE
from sgclassify.stages.cascade import Certainty, Stage
from sgclassify.stages.columns import CLASSES
from sgclassify.stages.errors import ModelError
from sgclassify.stages.features import FEATURES

CONTRACT_VERSION = 3
SERVED_VERSIONS = (2, CONTRACT_VERSION)
"""Version 2 knows no cascade."""

INPUTS = ("image", "valid", "sigma", "features", "psf")
"""Inputs of the network, in order."""


@dataclass(frozen=True)
class CascadeContract:
    """How a model answers in stages.

    Attributes
    ----------
    network : int
        Number of the network whose sequence is the first stage. If there are others, it is the second stage as a whole.
    certain : dict of str to Certainty
        When each early `Stage`, by its name, is certain.
    figures : dict
        What it did on the objects that it was fitted to; for people.
    """

    network: int
    certain: dict[str, Certainty]
    figures: dict[str, object] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> CascadeContract:
        """From its form in JSON."""
        certain = {name: Certainty(**values) for name, values in raw["certain"].items()}
        return cls(int(raw["network"]), certain, raw["figures"])

    @property
    def stages(self) -> list[tuple[Stage, Certainty]]:
        """The early stages in their order."""
        return [(stage, self.certain[stage.name]) for stage in Stage if stage.name in self.certain]


@dataclass(frozen=True)
class ModelContract:
    """Contract of a TorchScript archive, stored in it as ``contract.json``.

    Attributes
    ----------
    model_id : str
        Name of the model, unique by its training; written into every product.
    stamp_size : int
        Side of the stamps, native pixels.
    head : str
        What answers: ``fused``, or for ablations ``image`` or ``sequence``.
    temperature : float
        Temperature of an object of signal-to-noise ratio 10, fitted on the calibration fields. It is applied inside
        the graph, with its dependence on brightness.
    calibration : dict
        All that was fitted there, for people.
    prior_star_fraction : float
        Share of stars (stars / (stars + galaxies)) that the probabilities assume.
    training_set_id : str
        Checksum of the manifest of the training data.
    n_parameters : int
        Trained numbers of the network.
    training : dict
        How it was trained: recipe, sample sizes, validation figures; for people.
    inputs, bands, features, class_order : tuple of str
        Order of the inputs and of the band, feature and class axes.
    pixel_scale : float
        Pixel scale that the model was trained for, arcsec per pixel.
    flux_unit : str
        Unit of stamps and noise.
    reference_tolerance : float
        Largest difference of a probability from the archive's reference output, on any device.
    cascade : CascadeContract or None
        How the model answers in stages; None if it can only be asked as a whole.
    """

    model_id: str
    stamp_size: int
    head: str
    temperature: float
    prior_star_fraction: float
    training_set_id: str
    calibration: dict[str, object] = dataclasses.field(default_factory=dict)
    n_parameters: int = 0
    training: dict[str, object] = dataclasses.field(default_factory=dict)
    inputs: tuple[str, ...] = INPUTS
    bands: tuple[str, ...] = BANDS
    features: tuple[str, ...] = FEATURES
    class_order: tuple[str, ...] = CLASSES
    pixel_scale: float = PIXEL_SCALE
    flux_unit: str = "nanomaggy"
    reference_tolerance: float = 2e-3
    cascade: CascadeContract | None = None
    contract_version: int = CONTRACT_VERSION

    def to_json(self) -> str:
        """The contract as deterministic JSON text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> ModelContract:
        """Read and check a contract; `ModelError` if it is none that this version of the stages can serve."""
        try:
            raw = json.loads(text)
            # first, as other versions have other fields
            if raw["contract_version"] not in SERVED_VERSIONS:
                raise ModelError(
                    f"the model's contract has version {raw['contract_version']}, this software serves"
                    f" {' and '.join(map(str, SERVED_VERSIONS))}; export the model again with this version"
                )
            for name in ("inputs", "bands", "features", "class_order"):
                raw[name] = tuple(raw[name])
            if raw.get("cascade") is not None:
                raw["cascade"] = CascadeContract.from_dict(raw["cascade"])
            contract = cls(**raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"the model's contract cannot be read: {error}") from error
        contract.check()
        return contract

    def check(self) -> None:
        """Raise `ModelError` unless the stages can serve this contract."""
        for name, have, want in (
            ("inputs", self.inputs, INPUTS),
            ("bands", self.bands, BANDS),
            ("features", self.features, FEATURES),
            ("class_order", self.class_order, CLASSES),
            ("flux_unit", self.flux_unit, "nanomaggy"),
        ):
            if have != want:
                raise ModelError(f"the model was trained with other {name} ({have}) than this version measures")
        if not 8 <= self.stamp_size <= 512:
            raise ModelError(f"the model's stamp size {self.stamp_size} is outside 8..512 pixels")
        if not (0.0 < self.temperature < 100.0 and 0.0 < self.prior_star_fraction < 1.0):
            raise ModelError("the model's temperature or prior is not a positive number in range")
        if self.cascade is not None and Stage.SEQUENCE.name not in self.cascade.certain:
            raise ModelError("the model's cascade lacks its first stage")
