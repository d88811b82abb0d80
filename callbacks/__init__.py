"""Lightning callbacks; used as ``lightning_mixcn.callbacks``."""

if __name__ != "lightning_mixcn.callbacks":
    raise ImportError(
        f"this package is lightning_mixcn.callbacks, but was imported as {__name__!r}. "
        "Install the project (`pip install -e .`) and import lightning_mixcn.callbacks"
    )

from .adapter_checkpoint import AdapterCheckpoint
from .data_monitor import DataMonitor
from .evaluation_report import EvaluationReport
from .prediction_writer import PredictionWriter
from .sample_text import SampleText
from .step_checkpoint import StepCheckpoint
from .step_progress_bar import StepProgressBar

__all__ = [
    "AdapterCheckpoint",
    "DataMonitor",
    "EvaluationReport",
    "PredictionWriter",
    "SampleText",
    "StepCheckpoint",
    "StepProgressBar",
]
