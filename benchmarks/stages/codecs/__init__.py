"""Volumes in and label maps out: our codecs beside nnU-Net's reader, nibabel and NumPy."""
