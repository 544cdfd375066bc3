"""The model: found, loaded, and asked for logits."""
