"""Multi-task recommendation on TorchRec: parquet logs in; a CTR, CVR and dwell model, its metrics and retrieval vectors out.

The folders beside this file import as `triptych.datasets`, `triptych.embeddings`, `triptych.mmoe` and `triptych.launch`.
They are not top-level packages because `datasets` and `launch` would overwrite other people's packages in site-packages.
"""

from pathlib import Path

__version__ = "0.1.0"
__path__ = [str(Path(__file__).parent)]
