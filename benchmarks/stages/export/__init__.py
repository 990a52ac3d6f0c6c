"""From logits to labels: nnU-Net's own export beside ours."""
