"""Small embeddings with a learnable relation, and a network that trains on them in milliseconds."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip3o_fast.models.config import BLIP3oConfig

PICTURES, TOKENS, CONDITION, TARGET = 48, 16, 12, 6


def make_embeddings(pictures: int = PICTURES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Conditions [n, 16, 12], targets [n, 16, 6]: targets are a linear map of the conditions plus noise."""
    generator = torch.Generator().manual_seed(seed)
    condition = torch.randn(pictures, 1, CONDITION, generator=generator)
    condition = condition + 0.5 * torch.randn(pictures, TOKENS, CONDITION, generator=generator)
    weight = torch.randn(CONDITION, TARGET, generator=torch.Generator().manual_seed(7)) / CONDITION**0.5
    return condition, condition @ weight + 0.1 * torch.randn(pictures, TOKENS, TARGET, generator=generator)


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards as `blip3o-fast extract` writes them."""
    from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter

    folder = tmp_path_factory.mktemp("embeddings")
    meta = Meta(EncoderInfo("condition-net", CONDITION), EncoderInfo("target-net", TARGET), tokens=TOKENS)
    condition, target = make_embeddings()
    names = [f"picture_{i}" for i in range(PICTURES)]
    ShardWriter(folder, meta).write(0, condition, target, names, names, "made up")
    return folder


class StandIn(nn.Module):
    """Token-wise MLP over (x_t, time, condition): everything the Trainer needs of a network."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(TARGET + CONDITION + 1, 32), nn.SiLU(), nn.Linear(32, TARGET))
        self.config = BLIP3oConfig.preset(
            "tiny", in_channels=TARGET, cross_attention_dim=CONDITION, sample_size=4, hidden_size=64
        )
        self.normalizer = None
        self.dtypes: list[torch.dtype] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        time = (timestep / 1000)[:, None, None].expand(-1, hidden_states.shape[1], 1).to(hidden_states)
        out = self.net(torch.cat([hidden_states, encoder_hidden_states, time], -1))
        self.dtypes.append(out.dtype)
        return out


def trainer_for(output: Path, model: nn.Module | None = None, **changes: Any) -> Any:
    """A BLIP3oTrainer on `make_embeddings` with all callbacks, and its StopRequest as `trainer.stop`."""
    from transformers import PrinterCallback

    from blip3o_fast.flow.loss import FlowMatchingLoss
    from blip3o_fast.training.arguments import TrainSettings
    from blip3o_fast.training.callbacks import MetricsFile, StepCallback, StopRequest
    from blip3o_fast.training.trainer import BLIP3oTrainer
    from blip3o_fast.training.trainer_args import training_arguments
    from blip3o_fast.training.validation import Validation

    model = StandIn() if model is None else model
    loss_function = changes.pop("loss_function", None) or FlowMatchingLoss.from_config(model.config)
    conditions, targets = make_embeddings()
    steps = changes.pop("max_steps", 8)
    changes = {"batch_size": 4, "learning_rate": 1e-2, "save_steps": 4, "logging_steps": 2, "eval_steps": 4} | changes
    changes = {"warmup_steps": 2} | changes
    settings = TrainSettings("unused", output, max_steps=steps, **changes)
    args = training_arguments(settings, total_steps=steps, on_cpu=True, evaluates=True)
    trainer = BLIP3oTrainer(
        model,
        args,
        conditions=conditions[:40],
        targets=targets[:40],
        loss_function=loss_function,
        validation=Validation(conditions[40:], targets[40:], model.config),
        ema_decay=settings.ema_decay,
        linear_loss=1.0,
        init_optimizer=settings.init_optimizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.stop = StopRequest()
    trainer.add_callback(StepCallback(trainer, trainer.stop, settings.save_total_limit))
    trainer.add_callback(MetricsFile(output / "metrics.jsonl"))
    return trainer


# ---- diffusers' own network, the oracle ------------------------------------------------------------------------------

STOCK_SIZES = {"sample_size": 4, "in_channels": 6, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2,
         "multiple_of": 8, "cross_attention_dim": 12}  # fmt: skip


def stock_network() -> nn.Module:
    """diffusers' LuminaNextDiT2DModel with `STOCK_SIZES`, its gates open."""
    from diffusers import LuminaNextDiT2DModel

    network = LuminaNextDiT2DModel(**STOCK_SIZES, patch_size=1, num_kv_heads=2, learn_sigma=False)
    with torch.no_grad():
        network.pad_token.zero_()  # stock leaves uninitialised memory
        for name, parameter in network.named_parameters():
            if name.endswith("gate"):
                parameter.add_(0.3)  # zero hides half of the network
    return network


class AsSequence(nn.Module):
    """Stock's network called as ours: [B, T, C] in and out."""

    def __init__(self, network: nn.Module) -> None:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        super().__init__()
        self.network = network
        self.rope = get_2d_rotary_pos_embed_lumina(8, 384, 384)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        image = x.transpose(1, 2).reshape(batch, channels, 4, 4)
        mask = torch.ones(context.shape[:2], dtype=torch.bool)
        out = self.network(image, timestep, context, mask, self.rope, {}).sample
        return out.reshape(batch, channels, tokens).transpose(1, 2)


@pytest.fixture
def stock() -> SimpleNamespace:
    """network(): diffusers' own; as_sequence(network): called as ours; sizes; data: conditions and targets."""
    return SimpleNamespace(network=stock_network, as_sequence=AsSequence, sizes=STOCK_SIZES, data=make_embeddings())


@pytest.fixture
def make_trainer() -> Any:
    return trainer_for


@pytest.fixture
def stand_in() -> type[StandIn]:
    return StandIn
