"""The share that each held-out block has in a row's metrics, so that two runs can be compared block by block."""

from pathlib import Path
from typing import Any

from cascade.runtime.files import read_json

BLOCK_SUMS = "heldout_blocks.json"
"""The file's name. An evaluation's folder has its `BlockSums`; the run directory has those of each row, by its name."""

BlockSums = dict[str, Any]
"""`text`: sha256 of the blocks. A list entry per block for each of: `tokens`, those that count; `loss`,
`kl_to_teacher` and `top1_agreement`, sums over these tokens, losses in nats."""


def load_block_sums(run_folder: Path) -> dict[str, BlockSums]:
    """The block sums of a run's rows, by the row's name; empty for the runs of older versions."""
    path = run_folder / BLOCK_SUMS
    sums: dict[str, BlockSums] = read_json(path) if path.is_file() else {}
    return sums
