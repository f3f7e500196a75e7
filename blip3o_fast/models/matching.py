"""The names of a checkpoint's tensors: which network they are of, and what of it is missing, unexpected, mis-shaped."""

from collections.abc import Iterable, Mapping

from torch import Tensor

# One of these names every network that can be loaded has, also a partial file's; what stands before it is the prefix.
_ANCHORS = ("patch_embedder.proj.weight", "layers.0.gate", "norm1_context.weight")
BLIP3O_PREFIX = "model.dit.model."
PREFIXES = ("", "model.", BLIP3O_PREFIX, "dit_model.", "module.", "_orig_mod.")
SUPPORTED = (
    "Supported are BLIP3-o's NextDiTCrossAttn (also inside a whole BLIP3-o checkpoint) and diffusers' "
    "LuminaNextDiT2DModel."
)
# Names of a network that has been called BLIP3-o's DiT and is another one.
_OTHER_DIT = ("token_embedder.pos_embed", "eva_proj.weight", "eva_proj.bias")
# Never read by the network; stock's files have it, others may not.
UNUSED = "pad_token"

# What other networks are recognised by, the most particular first.
_STRANGERS = (
    ("a LoRA adapter, not a network: load the network, then the adapter into it", (".lora_A.", ".lora_down.")),
    ("quantised weights of bitsandbytes, not plain ones", (".quant_state", ".absmax")),
    ("a Lumina2Transformer2DModel or a relative of it", ("noise_refiner.0.", "context_refiner.0.")),
    ("a SanaTransformer2DModel (the DiT of BLIP3o-NEXT)", (".ff.conv_inverted.",)),
    ("a Lumina-Next network by the names of Alpha-VLLM's own code", (".attention.wq.", "cap_embedder.")),
    ("a Flux network", ("single_transformer_blocks.0.",)),
    ("a U-Net or an autoencoder", ("down_blocks.0.", "up_blocks.0.")),
    ("a CLIP model", ("text_model.embeddings.", "vision_model.embeddings.", "visual.class_embedding")),
    ("a vision transformer", ("embeddings.cls_token", "blocks.0.attn.qkv.", "class_token")),
    ("a DiT of another architecture", ("transformer_blocks.0.",)),
    ("a language model without a diffusion transformer", ("embed_tokens.weight", "lm_head.weight")),
)


def refuse_strangers(names: Iterable[str], where: str) -> None:
    """ValueError for the names of another network than ours, saying which one where it is known."""
    names = list(names)
    other = sorted(name for name in names if name.endswith(_OTHER_DIT))
    if other:
        raise ValueError(
            f"{where} is of another network (it has {', '.join(other[:3])}): the DiT of the training scripts that this "
            "project began with, whose self-attention mixes channels instead of tokens because of a wrong view of its "
            "tensors. Its weights have no meaning in a BLIP3-o or Lumina network and cannot be converted, so train "
            "anew: the embeddings that it was trained on can stay, `blip3o-fast train --embeddings_path FILE.pkl "
            "--output_dir FOLDER` reads the same file."
        )
    if any(name.endswith(_ANCHORS) for name in names):
        return
    for what, signs in _STRANGERS:
        if any(sign in name for sign in signs for name in names):
            raise ValueError(f"{where} is {what}. {SUPPORTED}")
    if not any(name.startswith(("layers.", "norm_out.")) for name in names):
        shown = f"its first names are {', '.join(names[:3])}" if names else "it holds no tensors"
        raise ValueError(f"{where} is of an unknown network ({shown}). {SUPPORTED}")


def prefix_of(names: Iterable[str]) -> str:
    """What stands before the network's names. ValueError where there is no telling which tensors are meant."""
    names = list(names)
    found: set[str] = set()
    for anchor in _ANCHORS[:2]:
        found = found or {name[: -len(anchor)] for name in names if name.endswith(anchor)}
    if len(found) > 1:
        raise ValueError(f"the checkpoint holds more than one network, under the prefixes {sorted(found)}")
    prefix = found.pop() if found else ""
    if prefix not in PREFIXES and not any(prefix == a + b for a in PREFIXES for b in PREFIXES):
        raise ValueError(f"unknown prefix {prefix!r} before {_ANCHORS[0]}; known are {', '.join(map(repr, PREFIXES))}")
    return prefix


def strip_prefix(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The network's own tensors by our names. Where the checkpoint holds more than the network, only the network's."""
    refuse_strangers(tensors, where)
    prefix = prefix_of(tensors)
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def compare_names(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str = "the model"
) -> tuple[list[str], list[str], list[str]]:
    """(missing, unexpected, mis-shaped), the last with both shapes. where: what the expected tensors are of."""
    missing = [name for name in expected if name not in given and name != UNUSED]
    unexpected = [name for name in given if name not in expected and name != UNUSED]
    misshaped = [
        f"{name}: {tuple(given[name].shape)} in the checkpoint, {tuple(tensor.shape)} in {where}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    return missing, unexpected, misshaped


def report(missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    """All names, grouped, with what the usual causes look like."""
    lines = []
    for title, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)):
        if names:
            lines += [f"{title} ({len(names)}):", *(f"  {name}" for name in names)]
    if any(name.startswith("caption_projection") for name in missing):
        lines.append("The checkpoint has no context projection: a stock network has context_projection=False.")
    if any(name.startswith("caption_projection") for name in unexpected):
        lines.append("The checkpoint has a context projection: BLIP3-o's network has context_projection=True.")
    if any("feed_forward" in name for name in misshaped):
        lines.append(
            "If only the feed-forward width differs: ffn_dim_multiplier (1.5 gives 7168 at width 1792, which some "
            "BLIP3-o builds have) or multiple_of."
        )
    return "\n".join(lines)
