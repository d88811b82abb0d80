"""Lightning callbacks; used as ``lightning_mixcn.callbacks``."""

if __name__ != "lightning_mixcn.callbacks":
    raise ImportError(
        f"this package is lightning_mixcn.callbacks, but was imported as {__name__!r}. "
        "Install the project (`pip install -e .`) and import lightning_mixcn.callbacks"
    )

from .adapter_checkpoint import AdapterCheckpoint
from .benchmark_eval import BenchmarkEval
from .byte_budget import ByteBudget
from .data_monitor import DataMonitor
from .epoch_budget import EpochBudget
from .evaluation_report import EvaluationReport
from .expert_load_monitor import ExpertLoadMonitor
from .fit_summary import FitSummary
from .long_context_eval import LongContextEval
from .prediction_writer import PredictionWriter
from .preemption_checkpoint import PreemptionCheckpoint
from .rank_watch import RankWatch
from .run_facts import RunFacts
from .sample_answers import SampleAnswers
from .sample_text import SampleText
from .step_checkpoint import StepCheckpoint
from .step_progress_bar import StepProgressBar
from .throughput_logger import ThroughputLogger
from .trainability_check import TrainabilityCheck

__all__ = [
    "AdapterCheckpoint",
    "BenchmarkEval",
    "ByteBudget",
    "DataMonitor",
    "EpochBudget",
    "EvaluationReport",
    "ExpertLoadMonitor",
    "FitSummary",
    "LongContextEval",
    "PredictionWriter",
    "PreemptionCheckpoint",
    "RankWatch",
    "RunFacts",
    "SampleAnswers",
    "SampleText",
    "StepCheckpoint",
    "StepProgressBar",
    "ThroughputLogger",
    "TrainabilityCheck",
]
