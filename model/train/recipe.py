"""How a model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PAPER_SHARE: Final = 0.257
"""Share of stars in the sample of arXiv:2604.10086: 32,371 of 125,896."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the defaults are for two CPU cores.

    Attributes
    ----------
    sequence_epochs : int
        Epochs of the first stage, of the sequence encoder alone.
    small_epochs, small_stamp : int
        First epochs of the second stage, on the central `small_stamp` pixels only. Only for the ResNet, which takes
        stamps of any size.
    epochs : int
        Epochs on whole stamps after that.
    batch_size, sequence_batch_size : int
        Of either stage, for each process.
    learning_rate, sequence_learning_rate : float
        Peaks of the one-cycle schedules of the second and of the first stage.
    pretrained_rate : float
        Factor of the learning rate of the sequence encoder in the second stage. With 0 it stays as the first stage
        trained it. On 64,620 objects the sequence alone overfits after ten epochs. With 0.3 its validation loss rose
        from 0.074 to 0.090 in the second stage, and that of the fusion with it, while the image still got better.
    weight_decay : float
    band_dropout : float
        Share of objects that lose a random subset of their bands, so that the network learns about missing bands.
    augmentation : bool
        Whether stamps are turned, and the settings below, down to `mask_rate`, have an effect.
    psf_dropout : float
        Share of objects, and of bands, whose PSF is hidden, as in exposures without stars.
    header_dropout : float
        Share of objects without the header's FWHM.
    feature_dropout : float
        Share of objects that lose any other group of features.
    shift_rate : float
        Share of objects whose stamp is moved by a pixel.
    noise : float
        Largest added noise, in units of the noise that is there.
    background : float
        Largest offset of the sky, in units of the noise.
    mask_rate : float
        Share of bands with a masked column or blob.
    prior_star_fraction : float
        Share of stars that the calibrated probabilities assume. Training uses the sample as it is; afterwards this
        share replaces the sample's in the logits.
    class_balance : bool
        Weigh both classes alike in training.
    architecture : str
        Image encoder, one of `sgclassify.model.train.network.ENCODERS`.
    modality : str
        Head to train: ``"fused"``, or for ablations ``"image"`` or ``"sequence"``.
    auxiliary_weight : float
        Weight of the losses of the image alone and of the sequence alone beside the fused one.
    ema_decay : float
        Decay of the exponential moving average of the weights, per step; less in the first steps.
    patience : int
        Epochs without a better validation loss after which a stage ends.
    precision : str
        ``"fp32"``, ``"bf16"``, or ``"auto"``: bf16 on a GPU. A CPU that cannot train in bf16 trains in fp32, with a
        warning.
    seed : int
    """

    sequence_epochs: int = 12
    small_epochs: int = 10
    epochs: int = 25
    small_stamp: int = 16
    batch_size: int = 128
    sequence_batch_size: int = 512
    learning_rate: float = 1.5e-3
    sequence_learning_rate: float = 3e-3
    pretrained_rate: float = 0.0
    weight_decay: float = 0.02
    band_dropout: float = 0.4
    augmentation: bool = True
    psf_dropout: float = 0.05
    header_dropout: float = 0.2
    feature_dropout: float = 0.03
    shift_rate: float = 0.3
    noise: float = 0.3
    background: float = 0.1
    mask_rate: float = 0.05
    prior_star_fraction: float = PAPER_SHARE
    class_balance: bool = False
    architecture: str = "bands"
    modality: str = "fused"
    auxiliary_weight: float = 0.3
    ema_decay: float = 0.998
    patience: int = 10
    precision: str = "auto"
    seed: int = 1
