"""The multi-modal fusion network: a ResNet-50 over the seven-band stamps, a BiLSTM over the catalogue sequence.

Follows the architecture of arXiv:2604.10086; stamp size, stem, features and fusion head, which are not known from
there, are this project's own choice (docs/model.md).
"""

from __future__ import annotations

from typing import Final

import torch
import torchvision
from torch import Tensor, nn

from sgclassify.stages.bands import BANDS
from sgclassify.stages.measure import FEATURES, PSF_ERROR

N_BANDS = len(BANDS)
HEADS: Final = ("fused", "image", "sequence")
"""What the network answers from: both modalities, or one of them alone."""

CHANNELS: Final = 5
"""Channels a band that the image encoder sees."""


class StampNormalizer(nn.Module):
    """Turn stamps in nanomaggies into network channels.

    Five channels a band: asinh of the signal-to-noise ratio, which shows faint structure; the stamp over its own
    core flux, which shows the profile whatever the brightness; the validity mask; what is left of the stamp after
    the best-fitting PSF is taken away, in units of its noise, which is noise for a star and not for a galaxy; and
    the PSF. The last two are 0 where the PSF is unknown. Stamps smaller than the full size are taken as its middle.
    """

    def __init__(self, stamp_size: int) -> None:
        super().__init__()
        # TorchScript reads attributes, not the constants of a module
        self.stamp_size = stamp_size
        self.psf_error = PSF_ERROR
        axis = torch.arange(stamp_size, dtype=torch.float32) - (stamp_size - 1) / 2
        core = torch.exp(-0.5 * (axis[:, None] ** 2 + axis[None, :] ** 2) / 2.0**2)
        self.register_buffer("core", core, persistent=True)

    def forward(self, image: Tensor, valid: Tensor, sigma: Tensor, psf: Tensor) -> Tensor:
        first = (self.stamp_size - image.shape[2]) // 2
        core = self.core[first : first + image.shape[2], first : first + image.shape[3]]  # type: ignore[index]
        mask = valid.to(image.dtype)
        data = torch.where(valid, image, torch.zeros_like(image))
        noise = sigma.clamp(min=1e-12)[:, :, None, None]
        significance = data / noise
        flux = (significance * core).sum(dim=(2, 3), keepdim=True).clamp(min=20.0)
        profile = (10.0 * significance / flux).clamp(-1.0, 5.0)
        known = psf * mask
        norm = (known * known).sum(dim=(2, 3), keepdim=True)
        # a PSF that hardly falls on valid pixels fits nothing
        usable = norm > 1e-3
        fitted = (known * significance).sum(dim=(2, 3), keepdim=True) / torch.where(
            usable, norm, torch.ones_like(norm)
        )
        model = torch.where(usable, fitted, torch.zeros_like(fitted)) * known
        # the empirical PSF is good to a few per cent
        residual = (significance - model) / torch.sqrt(1.0 + (self.psf_error * model) ** 2)
        residual = torch.where(usable, residual, torch.zeros_like(residual)) * mask
        return torch.cat(
            [
                torch.asinh(0.5 * significance) * 0.5,
                profile,
                mask,
                torch.asinh(0.5 * residual),
                10.0 * known,
            ],
            dim=1,
        )


class ImageEncoder(nn.Module):
    """ResNet-50 with a stem for small stamps.

    Two 3x3 convolutions of stride 2 take the place of the 7x7 convolution and the max-pooling: the sub-pixel
    differences that tell stars from galaxies survive in the channels, at the same cost.
    """

    def __init__(self, stamp_size: int, width: int) -> None:
        super().__init__()
        self.normalizer = StampNormalizer(stamp_size)
        backbone = torchvision.models.resnet50(weights=None)
        backbone.conv1 = nn.Sequential(
            nn.Conv2d(CHANNELS * N_BANDS, 64, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False),
        )
        backbone.maxpool = nn.Identity()
        backbone.fc = nn.Linear(2048, width)
        self.backbone = backbone

    def forward(self, image: Tensor, valid: Tensor, sigma: Tensor, psf: Tensor) -> Tensor:
        channels = self.normalizer(image, valid, sigma, psf)
        out: Tensor = self.backbone(channels.contiguous(memory_format=torch.channels_last))
        return out


class SequenceEncoder(nn.Module):
    """Bidirectional LSTM over the bands in order of wavelength.

    Each step holds a band's standardised features (0 where missing), which of them are missing, and the band's colour:
    its PSF flux on the asinh scale less the mean over the bands, weighted by their signal-to-noise ratios.
    """

    def __init__(self, n_features: int, hidden: int, width: int) -> None:
        super().__init__()
        self.flux = FEATURES.index("psf_flux")
        self.snr = FEATURES.index("psf_snr")
        self.register_buffer("mean", torch.zeros(N_BANDS, n_features))
        self.register_buffer("std", torch.ones(N_BANDS, n_features))
        self.embed = nn.Sequential(nn.Linear(2 * n_features + 1, hidden), nn.LayerNorm(hidden), nn.GELU())
        self.position = nn.Parameter(torch.zeros(N_BANDS, hidden))
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.project = nn.Linear(6 * hidden, width)

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        missing = torch.isnan(features)
        z = ((torch.nan_to_num(features) - self.mean) / self.std).clamp(-8.0, 8.0)  # type: ignore[operator]
        z = torch.where(missing, torch.zeros_like(z), z)
        flux = torch.nan_to_num(features[:, :, self.flux])
        seen = present & ~missing[:, :, self.flux]
        # between 0 for noise and 1 for a bright source; never all 0
        trust = seen.to(z.dtype) * (
            1e-3 + torch.sigmoid(2.0 * torch.nan_to_num(features[:, :, self.snr]) - 5.0)
        )
        mean_flux = (trust * flux).sum(dim=1, keepdim=True) / trust.sum(dim=1, keepdim=True).clamp(min=1e-3)
        color = torch.where(seen, (flux - mean_flux).clamp(-6.0, 6.0), torch.zeros_like(flux))
        step = self.embed(torch.cat([z, missing.to(z.dtype), color[:, :, None]], dim=2)) + self.position
        out, (last, _) = self.lstm(step)
        weight = present.to(out.dtype)[:, :, None]
        mean = (out * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
        most = torch.where(present[:, :, None], out, torch.full_like(out, -1.0)).amax(dim=1)
        summary: Tensor = self.project(torch.cat([mean, most, last[-2], last[-1]], dim=1))
        return summary


class FusionNetwork(nn.Module):
    """Image encoder, sequence encoder, and a head over both.

    Parameters
    ----------
    stamp_size : int
        Side of the stamps, pixels.
    hidden : int
        Width of the LSTM in each direction.
    width : int
        Width of the features of each modality.
    dropout : float
        Dropout in the fusion head.
    """

    def __init__(self, stamp_size: int, hidden: int = 96, width: int = 192, dropout: float = 0.2) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(stamp_size, width)
        self.sequence_encoder = SequenceEncoder(len(FEATURES), hidden, width)
        self.head = nn.Sequential(
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, 2),
        )
        self.image_head = nn.Sequential(nn.GELU(), nn.Linear(width, 2))
        self.sequence_head = nn.Sequential(nn.GELU(), nn.Linear(width, 2))

    def forward(
        self, image: Tensor, valid: Tensor, sigma: Tensor, features: Tensor, psf: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, 2) in class order star, galaxy: of the fusion, of the image alone, of the sequence alone."""
        from_image = self.image_encoder(image, valid, sigma, psf)
        from_sequence = self.sequence_encoder(features, present_bands(valid))
        fused = self.head(torch.cat([from_image, from_sequence], dim=1))
        return fused, self.image_head(from_image), self.sequence_head(from_sequence)

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def sequence_logits(self, valid: Tensor, features: Tensor) -> Tensor:
        """Logits of the sequence alone, without the cost of the image."""
        out: Tensor = self.sequence_head(self.sequence_encoder(features, present_bands(valid)))
        return out

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def sequence_parameters(self) -> list[nn.Parameter]:
        """Parameters of the sequence encoder and of its head."""
        return [*self.sequence_encoder.parameters(), *self.sequence_head.parameters()]


def present_bands(valid: Tensor) -> Tensor:
    """Bands that have a valid pixel, shape (n, 7)."""
    return valid.flatten(2).any(dim=2)


class Calibration(nn.Module):
    """Temperature and offset of the logits, both linear in the brightness of the object.

    The brightness is asinh of the largest signal-to-noise ratio over the bands, less 3 (a ratio of 10). With all
    parameters 0 it changes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(2))
        self.offset = nn.Parameter(torch.zeros(2))

    @staticmethod
    def brightness(features: Tensor) -> Tensor:
        """Brightness of each object from its features, shape (n,)."""
        snr = torch.nan_to_num(features[:, :, FEATURES.index("snr")].float()).amax(dim=1)
        return snr.clamp(0.0, 7.0) - 3.0

    def forward(self, logits: Tensor, brightness: Tensor) -> Tensor:
        temperature = torch.exp(self.log_temperature[0] + self.log_temperature[1] * brightness)
        shift = self.offset[0] + self.offset[1] * brightness
        return torch.stack([logits[:, 0] + shift, logits[:, 1]], dim=1) / temperature[:, None]


class CalibratedNetwork(nn.Module):
    """The network as it is shipped: calibrated probabilities of one head."""

    def __init__(self, network: FusionNetwork, calibration: Calibration, head: str = "fused") -> None:
        super().__init__()
        self.network = network
        self.calibration = calibration
        self.head = HEADS.index(head)
        self.snr = FEATURES.index("snr")

    def forward(self, image: Tensor, valid: Tensor, sigma: Tensor, features: Tensor, psf: Tensor) -> Tensor:
        """Probabilities (n, 2) in class order star, galaxy."""
        logits = torch.stack(self.network(image, valid, sigma, features, psf))[self.head]
        # as in Calibration.brightness, which TorchScript cannot call
        brightness = torch.nan_to_num(features[:, :, self.snr]).amax(dim=1).clamp(0.0, 7.0) - 3.0
        return torch.softmax(self.calibration(logits, brightness), dim=1)
