"""What computes logits of patches: :mod:`.interface` is all that the engine knows of it."""
