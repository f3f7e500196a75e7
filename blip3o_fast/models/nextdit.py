"""BLIP3oDiT: the BLIP3-o diffusion transformer (a Lumina NextDiT over 64 tokens) as a standard nn.Module."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip3o_fast.models import card, checkpoints, inputs
from blip3o_fast.models import forward as fused
from blip3o_fast.models.checkpointing import Checkpointing
from blip3o_fast.models.condition import PreparedCondition, prepare
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.initialise import initialise
from blip3o_fast.models.layout import lay_out
from blip3o_fast.models.memory import memory_bytes
from blip3o_fast.models.modules import Head, NextDiTBlock, PatchEmbedder, TimeContextEmbedding, TwoLinear
from blip3o_fast.models.packed import PackedBlock, run_blocks
from blip3o_fast.models.patches import from_tokens, to_image, to_patches
from blip3o_fast.models.rope import kept_rope_table, rope_from_complex
from blip3o_fast.models.step_modulations import StepModulations, make_modulations


class BLIP3oDiT(nn.Module, Checkpointing, PyTorchModelHubMixin, library_name="blip3o_fast"):
    """The diffusion transformer: from x_t, a time and a context to the velocity (or noise) at x_t.

    config: a `BLIP3oConfig`, a dict that `BLIP3oConfig.from_dict` reads, or None for the defaults.
    generator: draws the initial weights (None: torch's global generator); the distributions, and with the same seed
        the very weights, of stock diffusers.

    Parameters have the names, shapes and order of diffusers' `LuminaNextDiT2DModel` (context_projection=False) or of
    BLIP3-o's `NextDiTCrossAttn` without its prefix (True). Built under `torch.device("meta")` it has no values:
    `to_empty(device=...)`, then `reset_parameters()` or `load_state_dict`.

    normalizer: a `FeatureNormalizers` or None; how the features were normalised for training. It belongs to the data,
    so it is not in the state dict; `save_pretrained` and `from_pretrained` keep it beside the weights.
    """

    _no_split_modules = ("NextDiTBlock",)

    def __init__(
        self, config: BLIP3oConfig | Mapping[str, Any] | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if config is None:
            config = BLIP3oConfig()
        if isinstance(config, Mapping):
            config = BLIP3oConfig.from_dict(config)
        if not isinstance(config, BLIP3oConfig):
            raise ValueError(f"config must be a BLIP3oConfig or a dict of its fields, got {type(config).__name__}")
        self.config = config
        self.normalizer: Any = None
        # Where the weights came from; only the model card asks.
        self.loaded_from: Path | None = None
        self.gradient_checkpointing_disable()

        if config.context_projection:
            self.caption_projection = TwoLinear(config.cross_attention_dim, config.hidden_size)
        else:
            # Stock has it and never reads it. It is kept for the files' and the optimizers' sake and takes no
            # gradient, so that DistributedDataParallel does not wait for one.
            self.pad_token = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)
        self.patch_embedder = PatchEmbedder(config)
        self.time_caption_embed = TimeContextEmbedding(config)
        self.layers = nn.ModuleList([NextDiTBlock(config) for _ in range(config.num_layers)])
        self.norm_out = Head(config)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as at construction."""
        initialise(self, generator)

    # ---- forward ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | PreparedCondition,
        encoder_mask: Tensor | None = None,
        *,
        base_sequence_length: int | None = None,
        image_rotary_emb: Tensor | None = None,
        modulations: StepModulations | None = None,
    ) -> Tensor:
        """The network's prediction at x_t, in the form of hidden_states.

        hidden_states: x_t, [B, N, C] (tokens of the default grid, row by row) or [B, C, H, W] (any grid).
        timestep: [B] or 0-d, what the network is trained on, never scaled here: 1000 * sigma for the "blip3o" time
            convention, 1 - sigma for "lumina".
        encoder_hidden_states: the context [B, L, E], L >= 1; or what `prepare_condition` made of it, with its mask.
        encoder_mask: bool [B, L], True = attend; None attends to all. A row that is all False means no context:
            cross-attention adds zero and the pooled context is zero (stock gives NaN).
        base_sequence_length: proportional attention: the self-attention's softmax scale is multiplied by
            sqrt(log T / log base_sequence_length).
        image_rotary_emb: complex64 [>= H, >= W, d / 2], to replace the rotary table (diffusers'
            `get_2d_rotary_pos_embed_lumina` with its ntk and linear factors).
        modulations: what `prepare_modulations` made of this timestep and this condition, used in their place.

        Returns [B, N, out_channels] or [B, out_channels, H, W]. Raises ValueError where a shape or dtype does not fit.
        """
        return self._predict(
            hidden_states,
            timestep,
            encoder_hidden_states,
            encoder_mask,
            base_sequence_length=base_sequence_length,
            image_rotary_emb=image_rotary_emb,
            modulations=modulations,
        )

    def _predict(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | PreparedCondition,
        encoder_mask: Tensor | None = None,
        *,
        base_sequence_length: int | None = None,
        image_rotary_emb: Tensor | None = None,
        modulations: StepModulations | None = None,
        packed: Sequence[PackedBlock | None] | None = None,
    ) -> Tensor:
        """`forward`. packed: the blocks with their weights packed, None for one that runs by itself; no gradients."""
        config = self.config
        inputs.check_tensors(hidden_states=hidden_states, timestep=timestep)
        image, as_tokens = to_image(hidden_states, config)
        batch = image.shape[0]
        inputs.check_time(self, image, timestep)
        if isinstance(encoder_hidden_states, PreparedCondition):
            made = encoder_hidden_states
            if encoder_mask is not None:
                raise ValueError("encoder_mask must be None with a prepared condition, which has its own")
            if made.context.shape[0] != batch:
                raise ValueError(
                    f"encoder_hidden_states was prepared for {made.context.shape[0]} samples, hidden_states has {batch}"
                )
            context, pooled, mask, keys_values = made.context, made.pooled, made.mask, made.keys_values
        else:
            inputs.check_condition(self, batch, encoder_hidden_states, encoder_mask)
            mask = None if encoder_mask is None else encoder_mask.bool()
            context = fused.project_context(self, encoder_hidden_states)
            pooled, keys_values = fused.pool_context(context, encoder_mask), None
        rows, columns = image.shape[2] // config.patch_size, image.shape[3] // config.patch_size
        if image_rotary_emb is None:
            rope = kept_rope_table(rows, columns, config.head_dim, image.device)
        else:
            rope = rope_from_complex(image_rotary_emb, rows, columns, image.device)
        if base_sequence_length is not None and base_sequence_length < 2:
            raise ValueError(f"base_sequence_length must be at least 2, got {base_sequence_length}")

        h = self.patch_embedder.proj(to_patches(image, config.patch_size))
        if modulations is None:
            y = fused.embed_condition(self, timestep.expand(batch), pooled)
            conditioning, made_before, scale = nn.functional.silu(y), None, None
        else:
            inputs.check_modulations(batch, modulations)
            y, conditioning, scale = modulations.y, modulations.conditioning, modulations.head
            made_before = modulations.layers
        grid = fused.Grid(rope, mask, base_sequence_length)
        if packed is not None and any(packed):
            h = run_blocks(self.layers, packed, h, y, context, grid, conditioning, keys_values, made_before)
        else:
            h = self._run_blocks(h, y, context, grid, conditioning, keys_values, made_before)
        return from_tokens(fused.head(self, h, conditioning, scale), config, rows, columns, as_tokens=as_tokens)

    def prepare_condition(self, encoder_hidden_states: Tensor, encoder_mask: Tensor | None = None) -> PreparedCondition:
        """Everything that depends on the condition alone, for many calls with the same one (a sampling run).

        encoder_hidden_states [B, L, E] and encoder_mask as in `forward`, which takes the result in their place and
        returns the same numbers. Raises ValueError where a shape or dtype does not fit.
        """
        inputs.check_tensors(encoder_hidden_states=encoder_hidden_states)
        batch = encoder_hidden_states.shape[0] if encoder_hidden_states.dim() else 0
        inputs.check_condition(self, batch, encoder_hidden_states, encoder_mask)
        return prepare(self, encoder_hidden_states, encoder_mask)

    def prepare_modulations(self, condition: PreparedCondition, timesteps: Tensor) -> list[StepModulations] | None:
        """What the time and the condition alone decide, for each of timesteps [S]: to be given to `forward` with them.

        condition: of `prepare_condition`. None where a hooked module must be called at every step.
        """
        return make_modulations(self, condition, timesteps)

    def _run_blocks(
        self,
        h: Tensor,
        y: Tensor,
        context: Tensor,
        grid: fused.Grid,
        conditioning: Tensor,
        keys_values: tuple[tuple[Tensor, Tensor] | None, ...] | None = None,
        modulations: tuple[Tensor | None, ...] | None = None,
    ) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            for layer in self.layers:
                h = checkpoint(layer, h, y, context, grid, conditioning, use_reentrant=False, **self._checkpoint_kwargs)
            return h
        layers = self.layers
        open_to_carry = [fused.carries(layer, NextDiTBlock) for layer in layers]
        chunks = [None if made is None else made.chunk(4, dim=1) for made in modulations or [None] * len(layers)]
        normed = modulation = None
        for i, layer in enumerate(layers):
            made: dict[str, Any] = {} if keys_values is None else {"key_value": keys_values[i]}
            modulation = chunks[i] if modulation is None else modulation
            if i + 1 < len(layers) and open_to_carry[i] and open_to_carry[i + 1]:
                made |= {"following": layers[i + 1], "following_modulation": chunks[i + 1]}
                h, normed, modulation = layer(h, y, context, grid, conditioning, normed, modulation, **made)
            else:
                h = layer(h, y, context, grid, conditioning, normed, modulation, **made)
                normed = modulation = None
        return h

    # ---- size ------------------------------------------------------------------------------------------------------

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters. exclude_embeddings is transformers' argument; there are no token embeddings here."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def memory(self, batch: int, *, training: bool = False, dtype: torch.dtype | str | None = None) -> int:
        """Bytes that a run with this batch size needs: see `models.memory`. dtype None: that of the weights."""
        return memory_bytes(self, batch, training=training, dtype=dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedder.proj.weight.device

    # ---- saving and loading ----------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; weights that are assigned are laid side by side again."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        for layer in self.layers:
            lay_out(layer)
        return result

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write weights, config.json, normalizer.safetensors and a model card; a card that was edited is left alone.

        kwargs: as of `huggingface_hub.ModelHubMixin`; of these model_card_kwargs (here and in `push_to_hub`) holds
            arguments of `models.card.build`: training, metrics, license, datasets, ...
        """
        folder = Path(save_directory)
        card.forget(folder)
        more = {"folder": folder} | (kwargs.pop("model_card_kwargs", None) or {})
        return super().save_pretrained(folder, model_card_kwargs=more, **kwargs)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        return card.build(self, *args, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoints.save(self, Path(save_directory))

    @classmethod
    def from_stock(cls, network: Any) -> "BLIP3oDiT":
        """A model over the layers of another network, which stays as it is; the weights are the same objects, and
        stay so through the network's `load_state_dict`, with assign=True too.

        network: diffusers' `LuminaNextDiT2DModel`, a pipeline with one, or BLIP3-o's `NextDiTCrossAttn`; fused or not.
        Raises ValueError for another model, and for one that is hooked, compiled, sharded or changed, with the part.
        """
        from blip3o_fast.models.adopt import from_stock

        return from_stock(cls, network)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: BLIP3oConfig | Mapping[str, Any] | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        strict: bool = True,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "BLIP3oDiT":
        """A model in eval mode from a folder, a file or a hub repository that we, diffusers or BLIP3-o wrote.

        config: instead of config.json (a BLIP3oConfig, a dict or a preset's name). Where a BLIP3-o checkpoint has none,
            or one that describes its language model, the sizes are told by the shapes.
        torch_dtype: of the weights; None or "auto" keeps what the file has, of several dtypes the one that holds all.
        strict: False leaves missing weights at their initial values and ignores unexpected ones, with a warning.
        Raises ValueError with every missing, unexpected and mis-shaped name, grouped; FileNotFoundError where there
        are no weights. No pickle is executed: a `.bin` is read by `torch.load(weights_only=True)`.
        """
        return checkpoints.load(
            cls,
            pretrained_model_name_or_path,
            config=config,
            torch_dtype=torch_dtype,
            device=device,
            strict=strict,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
