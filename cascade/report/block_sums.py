"""What each block of held-out text adds to the metrics of a run's rows, so that two runs can be compared in pairs."""

import json
from pathlib import Path
from typing import Any

BLOCK_SUMS = "heldout_blocks.json"
"""In an evaluation's folder: its `BlockSums`; in the run directory: row's name -> its `BlockSums`."""

BlockSums = dict[str, Any]
"""text (a sha256 of the blocks), and of each block: tokens (that count), loss, kl_to_teacher and top1_agreement (sums
over them, in nats)"""


def load_block_sums(run_folder: Path) -> dict[str, BlockSums]:
    """What a run wrote; nothing in the runs of older versions."""
    path = run_folder / BLOCK_SUMS
    sums: dict[str, BlockSums] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return sums
