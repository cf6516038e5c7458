"""The `convert` command: any CLIP checkpoint to safetensors with its configuration."""

from __future__ import annotations

import os

from clip_index.console import note, suggest


def convert(checkpoint: str, output: str, *, image_size: int | None = None, context_length: int | None = None) -> None:
    """Convert any CLIP checkpoint to a folder of safetensors and configuration.

    Reads OpenAI's archives, open_clip's and Hugging Face's files and folders, and training checkpoints; no code in
    them is run. The folder loads with --model FOLDER, and in open_clip as local-dir:FOLDER. Embeddings stay the same,
    and so does the model's fingerprint.

    Examples:
        clip-index convert ViT-B-32.pt vit-b-32
        clip-index convert ViT-B-32-quickgelu/epoch_10.pt tuned
        clip-index convert ViT-L-14/openai large --image_size 336

    Args:
        checkpoint: a file or a folder, ARCHITECTURE/FILE to say what its tensors cannot, or the name of a model
        output: folder to write
        image_size: another side of the pictures, in pixels; position tables are stretched
        context_length: another length of texts, in tokens; position tables are stretched
    """
    from clip_index.clip.config import architecture_name
    from clip_index.clip.loading import load_model, save_checkpoint
    from clip_index.types import UsageError

    if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise UsageError(f"{output} is there already: name a new or an empty folder")
    for flag, value in (("--image_size", image_size), ("--context_length", context_length)):
        if value is not None and value < 2:
            raise UsageError(f"{flag} {value}: expected 2 or more")
    model, preprocess = load_model(checkpoint, image_size=image_size, context_length=context_length)
    save_checkpoint(model, preprocess, output)
    config = model.config
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    sizes = f"{config.vision.image_size} pixels, {config.text.context_length} tokens"
    name = architecture_name(config) or "its own architecture"
    note(f"{output}: {name}, {config.activation}, {millions:.1f}M parameters, {sizes}")
    suggest("embed", "photos", "embeddings", "--model", output)
