"""CryoGEM's networks, optimisers and one training step (eq. 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from models.cryogem.losses import (
    QueryPlaces,
    discriminator_loss,
    generator_loss,
    has_both_labels,
    mask_nce_loss,
    sample_anywhere,
    sample_places,
)
from models.cryogem.networks import FeatureHeads, PatchDiscriminator, UnetGenerator, initialise
from models.cryogem.pairs import Purpose, TrainingPair, random_stream, torch_stream
from models.cryogem.settings import CryogemSettings
from models.workers import Workers

_NETWORKS = ("generator", "discriminator", "heads")


class CryogemTrainer:
    """Networks, optimisers and one step; `state` and `restore` carry everything that a later step depends on.

    Several workers each bring a pair to a step, whose gradients are averaged: a batch of as many pairs.
    """

    def __init__(self, settings: CryogemSettings, workers: Workers | None = None) -> None:
        self.settings = settings
        self.workers = Workers() if workers is None else workers
        self.device = self.workers.device if self.workers.size > 1 else _device(settings.training.device)
        networks = settings.networks
        self.generator = UnetGenerator(networks)
        self.discriminator = PatchDiscriminator(networks)
        self.heads = FeatureHeads(networks)
        weights = torch_stream(random_stream(settings.training.seed, Purpose.WEIGHTS))
        layout = torch.channels_last if settings.training.is_channels_last else torch.contiguous_format
        for network in self._networks().values():
            if isinstance(network, UnetGenerator):
                network.initialise(weights)
            else:
                initialise(network, weights)
            network.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        betas = (settings.training.beta1, settings.training.beta2)
        self.optimisers = {
            name: torch.optim.Adam(
                network.parameters(), lr=settings.training.learning_rate, betas=betas, fused=True
            )
            for name, network in self._networks().items()
        }

    def step(self, pair: TrainingPair, places: QueryPlaces | None) -> dict[str, float]:
        """Take one step and return its losses, means over workers; without places the contrastive term is left out (nan)."""
        training, workers = self.settings.training, self.workers
        n_with_places = round(workers.sum([float(places is not None)])[0])
        source, real = pair.source.to(self.device), pair.real.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            features = self.generator.encode(source, self.settings.networks.depth - 1)
            fake = self.generator.decode(features, source)
            judged_real, judged_fake = self.discriminator(real), self.discriminator(fake.detach())
        d_loss = discriminator_loss(judged_real.float(), judged_fake.float(), training.gan_form)
        self._update(d_loss, ("discriminator",))
        self.discriminator.requires_grad_(requires_grad=False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            judged = self.discriminator(fake)
            n_levels = max(self.settings.networks.nce_levels)
            vectors = None
            if places is not None:
                where = torch.cat((places.particle, places.background)).to(self.device)
                encoded = (features, self.generator.encode(fake, n_levels))
                vectors = [self.heads(levels, where) for levels in encoded]
        g_loss = generator_loss(judged.float(), training.gan_form)
        nce = torch.full((), torch.nan)
        total = g_loss
        if vectors is not None and places is not None:
            nce = mask_nce_loss(
                vectors[0],
                vectors[1],
                len(places.particle),
                temperature=training.temperature,
                form=training.nce_form,
            )
            total = g_loss + training.nce_weight * nce
        self._update(total, ("generator", "heads") if n_with_places else ("generator",))
        self.discriminator.requires_grad_(requires_grad=True)
        own_nce = float(nce.detach())
        sums = workers.sum(
            [float(d_loss.detach()), float(g_loss.detach()), 0.0 if places is None else own_nce]
        )
        return {
            "discriminator": sums[0] / workers.size,
            "generator": sums[1] / workers.size,
            "nce": sums[2] / n_with_places if n_with_places else math.nan,
            "n_without_labels": float(workers.size - n_with_places),
        }

    def draw_places(self, mask: Bool[Tensor, "c c"], step: int) -> QueryPlaces | None:
        """Draw a step's queries, or None where the mask lacks one label."""
        training = self.settings.training
        generator = torch_stream(random_stream(training.seed, Purpose.QUERIES, step))
        if training.nce_form == "unguided":
            return sample_anywhere((int(mask.shape[0]), int(mask.shape[1])), training.n_queries, generator)
        if not has_both_labels(mask):
            return None
        return sample_places(mask, training.n_queries, generator)

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of every optimiser."""
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = rate

    def state(self) -> dict[str, Tensor]:
        """Return weights and Adam's moments by name."""
        tensors: dict[str, Tensor] = {}
        for name, network in self._networks().items():
            tensors |= {f"{name}/{key}": value for key, value in network.state_dict().items()}
            for index, moments in self.optimisers[name].state_dict()["state"].items():
                tensors |= {f"adam/{name}/{index}/{key}": value for key, value in moments.items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, network in self._networks().items():
            own = f"{name}/"
            network.load_state_dict(
                {k[len(own) :]: v for k, v in tensors.items() if k.startswith(own)}, strict=True
            )
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"adam/{name}/"):
                    _, _, index, kind = key.split("/")
                    moments.setdefault(int(index), {})[kind] = value
            optimiser = self.optimisers[name]
            optimiser.load_state_dict(
                {"state": moments, "param_groups": optimiser.state_dict()["param_groups"]}
            )

    def _networks(self) -> dict[str, torch.nn.Module]:
        return dict(zip(_NETWORKS, (self.generator, self.discriminator, self.heads), strict=True))

    def _update(self, loss: Tensor, names: tuple[str, ...]) -> None:
        for name in names:
            self.optimisers[name].zero_grad(set_to_none=True)
        loss.backward()
        networks = self._networks()
        self.workers.average_gradients(p for name in names for p in networks[name].parameters())
        for name in names:
            self.optimisers[name].step()


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
