"""CLIP itself: its model, its tokenizer, every layout of its checkpoints."""
