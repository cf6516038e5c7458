"""State dicts of CLIP models, from every layout to the native one, which is OpenAI's.

The steps: find the weights in what a file held -> strip the prefixes of wrappers -> recognise the layout by its keys ->
rename and transpose -> read the architecture from the shapes -> stretch position tables to the size that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_index.clip.config import HEAD_WIDTHS, CLIPConfig, TextConfig, VisionConfig
from clip_index.types import ClipIndexError

State = dict[str, Tensor]
METADATA = "clip_index"
"""Where `state_dict()` of a model of ours says how the model works: a key of PyTorch's own module metadata."""

_OPENAI_ANCHOR = "visual.conv1.weight"
_HF_ANCHOR = "vision_model.embeddings.patch_embedding.weight"
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net")
_IGNORED = re.compile(
    r"input_resolution|context_length|vocab_size|attn_mask|.*\.position_ids|.*num_batches_tracked"
    r"|(visual\.)?(head|classifier|fc)\..*"
)
_HF_BLOCK = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HF_ROOT = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "logit_scale": "logit_scale",
}
_HF_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def find_weights(held: Any, where: str) -> tuple[State, dict[str, Any]]:
    """The tensors in what a file held, without the prefixes of wrappers (`module.`, `model.`, `_orig_mod.`).

    With them what a model of ours wrote beside them, `module_metadata`. Raises ClipIndexError where there is no CLIP
    model, with what there is.
    """
    while isinstance(held, Mapping) and (inner := next((key for key in _CONTAINERS if _is_mapping(held, key)), None)):
        held = held[inner]
    state = {key: value for key, value in held.items() if isinstance(value, Tensor)} if _is_mapping(held) else {}
    for anchor in (_HF_ANCHOR, _OPENAI_ANCHOR):
        prefix = next((key[: -len(anchor)] for key in state if key.endswith(anchor)), None)
        if prefix is not None:
            told = getattr(held, "_metadata", {}).get(prefix.rstrip("."), {}).get(METADATA, {})
            return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}, told
    if any(".trunk." in key for key in state):
        raise ClipIndexError(f"{where} has an image tower of timm: load it with open_clip:PATH")
    found = f"{len(state)} tensors ({', '.join([*state][:3])}, ...)" if state else f"{type(held).__name__}, no tensors"
    raise ClipIndexError(f"{where} is no CLIP checkpoint: expected {_OPENAI_ANCHOR} or {_HF_ANCHOR}, found {found}")


def _is_mapping(held: Any, key: str | None = None) -> bool:
    return isinstance(held if key is None else held.get(key), Mapping)


def to_native(state: State, where: str) -> State:
    """The state dict under OpenAI's names, whatever layout it was in; keys that hold no weights are left out."""
    if _HF_ANCHOR in state:
        state = _from_hugging_face(state)
    elif "text.token_embedding.weight" in state:
        state = {key.removeprefix("text."): value for key, value in state.items()}
    if "positional_embedding_res" in state:
        state = _from_long_clip(state)
    state = {key: value for key, value in state.items() if not _IGNORED.fullmatch(key)}
    if state.get("logit_scale", torch.empty(())).ndim:
        state["logit_scale"] = state["logit_scale"].reshape(())
    return state


def _from_hugging_face(state: State) -> State:
    native: State = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        stem, _, kind = key.rpartition(".")
        if layer := _HF_LAYER.fullmatch(key):
            tower, number, name, kind = layer.groups()
            block = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}"
            if name[-6:] in ("q_proj", "k_proj", "v_proj"):
                joined.setdefault(f"{block}.attn.in_proj_{kind}", {})[name[-6]] = value
            else:
                native[f"{block}.{_HF_BLOCK.get(name, name)}.{kind}"] = value
        elif key in _HF_ROOT:
            projection = key in ("visual_projection.weight", "text_projection.weight")
            native[_HF_ROOT[key]] = value.t() if projection else value
        else:
            native[f"{_HF_ROOT.get(stem, stem)}.{kind}"] = value
    for key, parts in joined.items():
        native[key] = torch.cat([parts[name] for name in "qkv" if name in parts])
    return native


def _from_long_clip(state: State) -> State:
    """Long-CLIP trains the positions after the first 20 alone, in a second table (arXiv 2403.15378)."""
    state = dict(state)
    rest = state.pop("positional_embedding_res")
    state["positional_embedding"] = torch.cat([state["positional_embedding"][:20], rest[20:]])
    return state


def stated_activation(state: State) -> str | None:
    """The activation, where the keys alone tell it: OpenAI's own files, Long-CLIP and the Mixers have QuickGELU."""
    openai = "input_resolution" in state and "vocab_size" in state
    mixer = "transformer.mixBlocks.0.layerNorm1.weight" in state
    return "quickgelu" if openai or mixer or "positional_embedding_res" in state else None


def infer_config(state: State, activation: str, where: str) -> CLIPConfig:
    """The architecture of a native state dict, from its shapes. Heads are 64 wide, but for ViT-H, g and bigG."""
    try:
        width = state["visual.conv1.weight"].shape[0]
        if "visual.layer1.0.conv1.weight" in state:
            blocks = tuple(_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
            positions = state["visual.attnpool.positional_embedding"].shape[0]
            width = state["visual.layer1.0.conv1.weight"].shape[0]
            vision = VisionConfig(32 * _side(positions - 1, where), blocks, width, patch_size=None)
            embed_dim = state["visual.attnpool.c_proj.weight"].shape[0]
        else:
            mixer = "visual.transformer.mixBlocks.0.layerNorm1.weight" in state
            kind = "visual.transformer.mixBlocks" if mixer else "visual.transformer.resblocks"
            positions = state[f"{kind}.0.token_mix_seq.lin1.weight" if mixer else "visual.positional_embedding"]
            patch = state["visual.conv1.weight"].shape[-1]
            size = patch * _side(positions.shape[mixer] - 1, where)
            hidden = _mlp_width(state, kind, width)
            layers = _count(state, rf"{kind}\.(\d+)\.")
            vision = VisionConfig(size, layers, width, patch, HEAD_WIDTHS.get(width, 64), hidden, mixer)
            embed_dim = state["visual.proj"].shape[1]
        vocab_size, width = state["token_embedding.weight"].shape
        mixer = "transformer.mixBlocks.0.layerNorm1.weight" in state
        kind = "transformer.mixBlocks" if mixer else "transformer.resblocks"
        positions = state[f"{kind}.0.token_mix_seq.lin1.weight" if mixer else "positional_embedding"]
        layers, hidden = _count(state, rf"{kind}\.(\d+)\."), _mlp_width(state, kind, width)
        text = TextConfig(positions.shape[int(mixer)], vocab_size, width, width // 64, layers, hidden, mixer)
    except KeyError as error:
        raise ClipIndexError(f"{where} lacks {error.args[0]}, one of {len(state)} tensors: is it whole?") from error
    return CLIPConfig(embed_dim, vision, text, activation)


def _count(state: State, pattern: str) -> int:
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _mlp_width(state: State, kind: str, width: int) -> int | None:
    hidden = state[f"{kind}.0.{'channel_mix_seq.lin3' if kind.endswith('mixBlocks') else 'mlp.c_fc'}.bias"].shape[0]
    return None if hidden == 4 * width else hidden


def _side(positions: int, where: str) -> int:
    side = round(positions**0.5)
    if side * side != positions:
        raise ClipIndexError(f"{where}: {positions} image positions are no square: native CLIP takes square pictures")
    return side


def resize_positions(state: State, config: CLIPConfig, where: str) -> State:
    """The state dict with its position tables stretched to the sizes in the configuration.

    As open_clip does it: bicubic with antialiasing for images, the class position kept; linear for texts. A Mixer's
    sizes are those of its weights: ClipIndexError.
    """
    found = infer_config(state, config.activation, where)
    other_grid = found.vision.grid != config.vision.grid
    other_length = found.text.context_length != config.text.context_length
    if not other_grid and not other_length:
        return state
    if (other_grid and found.vision.mixer) or (other_length and found.text.mixer):
        sizes = f"pictures of {found.vision.image_size}, texts of {found.text.context_length} tokens"
        raise ClipIndexError(f"{where}: a Mixer keeps the sizes of its training: {sizes}")
    state = dict(state)
    key = "visual.attnpool.positional_embedding"
    key = key if key in state else "visual.positional_embedding"
    if other_grid:
        table, old, new = state[key].float(), found.vision.grid, config.vision.grid
        grid = table[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
        state[key] = torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(new * new, -1)])
    if other_length:
        table = state["positional_embedding"].float().t()[None]
        table = F.interpolate(table, size=config.text.context_length, mode="linear", align_corners=False)
        state["positional_embedding"] = table[0].t()
    return state


def check_complete(state: State, expected: Mapping[str, torch.Size], where: str) -> None:
    """Raises ClipIndexError where a state dict does not fill a model, naming what is missing, unknown or misshapen."""
    missing = sorted(set(expected) - set(state))
    unknown = sorted(set(state) - set(expected))
    misshapen = [
        f"{key} {list(state[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    for what, keys in (("lacks", missing), ("has, beyond native CLIP,", unknown), ("has another shape of", misshapen)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ClipIndexError(f"{where} {what} {'; '.join(keys[:3])}{more} ({len(expected)} tensors expected)")
