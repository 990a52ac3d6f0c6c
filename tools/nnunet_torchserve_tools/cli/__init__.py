"""``nnunet-torchserve``: the verbs, wired.

A verb is registered when its module is loaded; ``--help`` lists them in that order.
"""

from . import archives, servers, clients, training  # isort: skip
from .command_line import app

__all__ = ["app", "archives", "clients", "servers", "training"]
