"""What a call of a folder asks for: which images, which part of them, and where the predictions go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FolderCall:
    """What is asked for, in the words of nnU-Net's ``predict_from_files``.

    Attributes:
        source: folder of the images.
        output: folder of the predictions.
        save_probabilities: also write ``.npz`` and ``.pkl``.
        overwrite: ``False`` leaves out what is there already.
        num_parts: only every so many-th case is predicted,
        part_id: from this one on.
        verbose: tell of each case where its time went.
        previous_stage: folder of the labels of a cascade's first stage; ``None`` leaves them to the server.
    """

    source: str
    output: str
    save_probabilities: bool = False
    overwrite: bool = True
    num_parts: int = 1
    part_id: int = 0
    verbose: bool = False
    previous_stage: str | None = None

    @property
    def failed_file(self) -> Path:
        """Where the failures of this part are listed."""
        name = "failed.json" if self.num_parts == 1 else f"failed_{self.part_id}_of_{self.num_parts}.json"
        return Path(self.output, name)

    def arguments(self, processes: tuple[int, int]) -> dict[str, object]:
        """As nnU-Net writes them beside its predictions.

        Args:
            processes: for preprocessing and for export; they mean nothing here.
        """
        return {
            "list_of_lists_or_source_folder": self.source,
            "output_folder_or_list_of_truncated_output_files": self.output,
            "save_probabilities": self.save_probabilities,
            "overwrite": self.overwrite,
            "num_processes_preprocessing": processes[0],
            "num_processes_segmentation_export": processes[1],
            "folder_with_segs_from_prev_stage": self.previous_stage,
            "num_parts": self.num_parts,
            "part_id": self.part_id,
        }
