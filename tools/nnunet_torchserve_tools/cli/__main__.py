"""``python -m nnunet_torchserve_tools.cli``, where the console script is not installed."""

from . import app

if __name__ == "__main__":
    app()
