"""The multi-modal fusion network: a ResNet-50 over the seven-band stamps, a BiLSTM over the catalogue sequence.

Follows the architecture of arXiv:2604.10086; stamp size, stem, features and fusion head, which are not known from
there, are this project's own choice (docs/model.md).
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

from sgclassify.stages.bands import BANDS
from sgclassify.stages.measure import FEATURES

N_BANDS = len(BANDS)


class StampNormalizer(nn.Module):
    """Turn stamps in nanomaggies into network channels.

    Three channels a band: asinh of the signal-to-noise ratio, which shows faint structure; the stamp over its own
    core flux, which shows the profile whatever the brightness; and the validity mask.
    """

    def __init__(self, stamp_size: int) -> None:
        super().__init__()
        axis = torch.arange(stamp_size, dtype=torch.float32) - (stamp_size - 1) / 2
        core = torch.exp(-0.5 * (axis[:, None] ** 2 + axis[None, :] ** 2) / 2.0**2)
        self.register_buffer("core", core, persistent=True)

    def forward(self, image: Tensor, valid: Tensor, sigma: Tensor) -> Tensor:
        mask = valid.to(image.dtype)
        data = torch.where(valid, image, torch.zeros_like(image))
        noise = sigma.clamp(min=1e-12)[:, :, None, None]
        significance = data / noise
        flux = (significance * self.core).sum(dim=(2, 3), keepdim=True).clamp(min=20.0)  # type: ignore[operator]
        profile = (10.0 * significance / flux).clamp(-1.0, 5.0)
        return torch.cat([torch.asinh(0.5 * significance) * 0.5, profile, mask], dim=1)


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
            nn.Conv2d(3 * N_BANDS, 64, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False),
        )
        backbone.maxpool = nn.Identity()
        backbone.fc = nn.Linear(2048, width)
        self.backbone = backbone

    def forward(self, image: Tensor, valid: Tensor, sigma: Tensor) -> Tensor:
        out: Tensor = self.backbone(
            self.normalizer(image, valid, sigma).contiguous(memory_format=torch.channels_last)
        )
        return out


class SequenceEncoder(nn.Module):
    """Bidirectional LSTM over the bands in order of wavelength.

    Each step holds a band's standardised features (0 where missing) and which of them are missing.
    """

    def __init__(self, n_features: int, hidden: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(N_BANDS, n_features))
        self.register_buffer("std", torch.ones(N_BANDS, n_features))
        self.embed = nn.Sequential(nn.Linear(2 * n_features, hidden), nn.LayerNorm(hidden), nn.GELU())
        self.position = nn.Parameter(torch.zeros(N_BANDS, hidden))
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.project = nn.Linear(6 * hidden, width)

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        missing = torch.isnan(features)
        z = ((torch.nan_to_num(features) - self.mean) / self.std).clamp(-8.0, 8.0)  # type: ignore[operator]
        z = torch.where(missing, torch.zeros_like(z), z)
        step = self.embed(torch.cat([z, missing.to(z.dtype)], dim=2)) + self.position
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
        self, image: Tensor, valid: Tensor, sigma: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, 2) in class order star, galaxy: of the fusion, of the image alone, of the sequence alone."""
        present = valid.flatten(2).any(dim=2)
        from_image = self.image_encoder(image, valid, sigma)
        from_sequence = self.sequence_encoder(features, present)
        fused = self.head(torch.cat([from_image, from_sequence], dim=1))
        return fused, self.image_head(from_image), self.sequence_head(from_sequence)


class CalibratedNetwork(nn.Module):
    """The network as it is shipped: calibrated probabilities of the fusion head."""

    def __init__(self, network: FusionNetwork, temperature: float) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, image: Tensor, valid: Tensor, sigma: Tensor, features: Tensor) -> Tensor:
        """Probabilities (n, 2) in class order star, galaxy."""
        logits = self.network(image, valid, sigma, features)[0]
        return torch.softmax(logits / self.temperature, dim=1)
