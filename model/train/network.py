"""The multi-modal fusion network: a ResNet-50 over the seven-band stamps, a BiLSTM over the catalogue sequence.

Follows the architecture of arXiv:2604.10086. That paper does not give stamp size, stem, features and fusion head; these
are this project's own choice (docs/retrain.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from sgclassify.stages.bands import BANDS
from sgclassify.stages.features import FEATURES
from sgclassify.stages.measure import PSF_ERROR

N_BANDS = len(BANDS)
HEADS: Final = ("fused", "image", "sequence")
"""Heads of the network: on both modalities, or on one of them alone."""

WIDTH: Final = 192
"""Width of the features of each modality."""

LSTM_WIDTH: Final = 96
"""Width of the LSTM in each direction."""

CHANNELS: Final = 5
"""Channels per band that the image encoder sees."""

BAND_SIDE: Final = 16
"""Side (pixels) of the middle of a stamp that `BandEncoder` looks at."""


class StampNormalizer(nn.Module):
    """Turn stamps in nanomaggies into network channels.

    Five channels per band:

    - asinh of the signal-to-noise ratio, which shows faint structure,
    - the stamp over its own core flux, which shows the profile at any brightness,
    - the validity mask,
    - the residual after the best-fitting PSF, in units of the noise: noise for a star, more for a galaxy,
    - the PSF.

    The last two are 0 where the PSF is unknown. Smaller stamps are the middle of a full one.
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
        fitted = (known * significance).sum(dim=(2, 3), keepdim=True) / torch.where(usable, norm, torch.ones_like(norm))
        model = torch.where(usable, fitted, torch.zeros_like(fitted)) * known
        # the empirical PSF is good to a few per cent
        residual = (significance - model) / torch.sqrt(1.0 + (self.psf_error * model) ** 2)
        residual = torch.where(usable, residual, torch.zeros_like(residual)) * mask
        return torch.cat([asinh(0.5 * significance) * 0.5, profile, mask, asinh(0.5 * residual), 10.0 * known], dim=1)


def asinh(x: Tensor) -> Tensor:
    """Inverse hyperbolic sine to 1e-7, which torch.asinh takes ten times as long for on a CPU."""
    size = x.abs().clamp(max=1e18)
    return torch.copysign(torch.log(size + torch.sqrt(size * size + 1.0)), x)


def not_finite(channels: Tensor) -> Tensor:
    """0 for an object, or NaN where one of its channels is not finite, shape (n, 1).

    A convolution that is joined with the ReLU after it makes NaN 0, and the object would get an answer.
    """
    return 0.0 * channels.flatten(1).sum(dim=1, keepdim=True)


class ImageEncoder(nn.Module):
    """ResNet-50 with a stem for small stamps.

    Two 3x3 convolutions of stride 2 take the place of the 7x7 convolution and the max-pooling: the sub-pixel
    differences that tell stars from galaxies survive in the channels, at the same cost.
    """

    def __init__(self, stamp_size: int, width: int) -> None:
        super().__init__()
        self.side = stamp_size
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
        return out + not_finite(channels)


class _Step(nn.Module):
    """Convolutions with a shortcut; where the width changes, the first convolution halves the side of the maps."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(before, after, 1))
        self.layers = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = functional.relu(self.layers(maps) + self.shortcut(maps))
        return out


class _Attention(nn.Module):
    """One block of a transformer over the bands, which looks only at those that are present."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.inputs = nn.Linear(width, 3 * width)
        self.outputs = nn.Linear(width, width)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        n, bands, width = tokens.shape
        three = self.inputs(self.before(tokens)).reshape(n, bands, 3, self.heads, width // self.heads)
        query, key, value = three.permute(2, 0, 3, 1, 4).unbind(0)
        # an object without any band looks everywhere: there is nothing, but it is finite
        seen = present | ~present.any(dim=1, keepdim=True)
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None, :])
        tokens = tokens + self.outputs(found.transpose(1, 2).reshape(n, bands, width))
        out: Tensor = tokens + self.mix(tokens)
        return out


class BandEncoder(nn.Module):
    """One small residual network for every band, and attention over the bands.

    The alternative to the paper's ResNet-50. A star or a galaxy looks the same in each band except for its noise and
    PSF, and the network sees both. So all bands share the weights, at the full resolution of the camera. The network
    sees only the middle of the stamp, where compact galaxies differ from stars; the features hold the light around it.
    """

    def __init__(self, stamp_size: int, width: int, maps: tuple[int, int, int] = (24, 48, 96)) -> None:
        super().__init__()
        self.side = min(BAND_SIDE, stamp_size)
        self.normalizer = StampNormalizer(self.side)
        self.middle = min(4, self.side // 4)
        self.convolutions = nn.Sequential(
            nn.Conv2d(CHANNELS, maps[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(maps[0]),
            nn.ReLU(inplace=True),
            _Step(maps[0], maps[1]),
            _Step(maps[1], maps[1]),
            _Step(maps[1], maps[2]),
        )
        # the middle keeps its spatial order; the mean of the whole map goes with it
        self.token = nn.Linear((self.middle**2 + 1) * maps[2], width)
        self.position = nn.Parameter(torch.zeros(N_BANDS, width))
        self.first = _Attention(width, 4)
        self.second = _Attention(width, 4)
        self.project = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, width))

    def forward(self, image: Tensor, valid: Tensor, sigma: Tensor, psf: Tensor) -> Tensor:
        present = present_bands(valid)
        n, bands, side = image.shape[0], image.shape[1], self.side
        cut = (image.shape[2] - side) // 2
        image = image[:, :, cut : cut + side, cut : cut + side]
        valid = valid[:, :, cut : cut + side, cut : cut + side]
        psf = psf[:, :, cut : cut + side, cut : cut + side]
        channels = self.normalizer(image, valid, sigma, psf)
        # [object, channel, band, y, x] to a stack of bands. Training leaves absent bands out of it, and so out of the
        # statistics of its norms. In a run its length must not depend on its content, or sums would be rounded
        # differently.
        stack = channels.reshape(n, -1, bands, side, side).transpose(1, 2).flatten(0, 1)
        every = torch.ones_like(present)
        index = torch.nonzero((present if self.training else every).flatten())[:, 0]
        maps = self.convolutions(stack[index].contiguous(memory_format=torch.channels_last))
        first = (maps.shape[2] - self.middle) // 2
        middle = maps[:, :, first : first + self.middle, first : first + self.middle]
        one = self.token(torch.cat([middle.flatten(1), maps.mean(dim=(2, 3))], dim=1))
        tokens = torch.zeros(n * bands, one.shape[1], dtype=one.dtype, device=one.device)
        tokens = tokens.index_copy(0, index, one).reshape(n, bands, -1) + self.position
        tokens = self.second(self.first(tokens, present), present)
        weight = present.to(tokens.dtype)[:, :, None]
        mean = (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
        most = torch.where(present[:, :, None], tokens, torch.full_like(tokens, -10.0)).amax(dim=1)
        out: Tensor = self.project(torch.cat([mean, most], dim=1))
        return out + not_finite(channels)


ENCODERS: Final = {"resnet50": ImageEncoder, "bands": BandEncoder}
"""Image encoders by name: the paper's, and the alternative to it."""


class SequenceEncoder(nn.Module):
    """Bidirectional LSTM over the bands in order of wavelength.

    Each step holds a band's standardised features (0 where missing), a mask of the missing ones, and the band's colour.
    The colour is its PSF flux on the asinh scale less the mean over the bands, weighted by signal-to-noise ratio.
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
        trust = seen.to(z.dtype) * (1e-3 + torch.sigmoid(2.0 * torch.nan_to_num(features[:, :, self.snr]) - 5.0))
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
    """Image encoder (one of `ENCODERS`), sequence encoder, and a head over both, for stamps of a size in pixels."""

    def __init__(self, stamp_size: int, architecture: str = "resnet50") -> None:
        super().__init__()
        width = WIDTH
        self.architecture = architecture
        self.image_encoder = ENCODERS[architecture](stamp_size, width)
        self.sequence_encoder = SequenceEncoder(len(FEATURES), LSTM_WIDTH, width)
        self.head = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.GELU(), nn.Dropout(0.2), nn.Linear(width, 2)
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

    @torch.jit.export
    def from_sequence(self, features: Tensor, present: Tensor) -> Tensor:
        """Logits (n, 2) of the sequence alone, without the stamps; `present`, shape (n, 7), are `present_bands`."""
        out: Tensor = self.sequence_head(self.sequence_encoder(features, present))
        return out

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def sequence_parameters(self) -> list[nn.Parameter]:
        """Parameters of the sequence encoder and of its head."""
        return [*self.sequence_encoder.parameters(), *self.sequence_head.parameters()]


def present_bands(valid: Tensor) -> Tensor:
    """Bands that have a valid pixel, shape (n, 7)."""
    return valid.flatten(2).any(dim=2)


def weighted(logits: Tensor, weights: Tensor) -> Tensor:
    """Sum of the logits (m, n, 2) of the heads with their weights (m,)."""
    return (logits * weights[:, None, None]).sum(dim=0)


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


class Answer(nn.Module):
    """Calibrated probabilities from the logits of some heads.

    Parameters
    ----------
    weights : Tensor of float32, shape (number of heads,)
        Weight of the logits of each head.
    """

    def __init__(self, weights: Tensor, calibration: Calibration) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.calibration = calibration
        self.snr = FEATURES.index("snr")

    def forward(self, heads: Tensor, features: Tensor) -> Tensor:
        """Probabilities (n, 2) in class order star, galaxy, from the logits of the heads, shape (m, n, 2)."""
        logits = weighted(heads, self.weights)  # type: ignore[arg-type]
        # as in Calibration.brightness, which TorchScript cannot call
        brightness = torch.nan_to_num(features[:, :, self.snr]).amax(dim=1).clamp(0.0, 7.0) - 3.0
        return torch.softmax(self.calibration(logits, brightness), dim=1)


class CalibratedNetwork(nn.Module):
    """The networks as they are shipped, with calibrated probabilities from their weighted heads.

    Parameters
    ----------
    answers : sequence of Answer
        The last one answers from the heads (`HEADS`) of one network after the other. The others are the early stages of
        a cascade (`sgclassify.model.train.cascade`), if there is one.
    """

    def __init__(self, networks: Sequence[FusionNetwork], answers: Sequence[Answer]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.early = nn.ModuleList(answers[:-1])
        self.whole = answers[-1]

    def forward(self, image: Tensor, valid: Tensor, sigma: Tensor, features: Tensor, psf: Tensor) -> Tensor:
        """Probabilities (n, 2) in class order star, galaxy, by all heads."""
        heads = []
        for network in self.networks:
            fused, from_image, from_sequence = network(image, valid, sigma, features, psf)
            heads += [fused, from_image, from_sequence]
        out: Tensor = self.whole(torch.stack(heads), features)
        return out
