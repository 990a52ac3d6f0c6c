"""Trainers for nnU-Net v2: region-based training whose loader ships packed targets, and training by a teacher.

nnU-Net finds them through ``nnUNet_extTrainer``, which must name the folder ``external`` beside this file
(``nnunet-torchserve trainers --path`` prints it). It imports each file of such a folder as a top-level module, and
forgets it afterwards; so the files there only name what lies in this package, which processes of the loader and of DDP
can import. A trainer of one's own inherits from a mixin::

    from nnunet_torchserve_trainers.region_targets import RegionLabelmapMixin

    class nnUNetTrainerMineLabelmap(RegionLabelmapMixin, nnUNetTrainerMine):
        pass
"""
