"""Lightning callbacks; used as ``lightning_mixcn.callbacks``."""

if __name__ != "lightning_mixcn.callbacks":
    raise ImportError(
        f"this package is lightning_mixcn.callbacks, but was imported as {__name__!r}. "
        "Install the project (`pip install -e .`) and import lightning_mixcn.callbacks"
    )

from .adapter_average import AdapterAverage
from .adapter_checkpoint import AdapterCheckpoint
from .checkpoints import PreemptionCheckpoint, StepCheckpoint
from .clocks import StepProgressBar
from .compared_run import ByteBudget, RunFacts
from .data_monitor import DataMonitor
from .epoch_budget import EpochBudget
from .evaluation.benchmark_eval import BenchmarkEval
from .evaluation.few_shot import FewShotProbe
from .evaluation.long_context import LongContextEval
from .evaluation.samples import SampleAnswers, SampleText
from .expert_load.monitor import ExpertLoadMonitor
from .parameter_summary import ParameterSummary
from .reports import EvaluationReport, FitSummary, PredictionWriter
from .throughput_logger import ThroughputLogger
from .trainability_check import TrainabilityCheck

__all__ = [
    "AdapterAverage",
    "AdapterCheckpoint",
    "BenchmarkEval",
    "ByteBudget",
    "DataMonitor",
    "EpochBudget",
    "EvaluationReport",
    "ExpertLoadMonitor",
    "FewShotProbe",
    "FitSummary",
    "LongContextEval",
    "ParameterSummary",
    "PredictionWriter",
    "PreemptionCheckpoint",
    "RunFacts",
    "SampleAnswers",
    "SampleText",
    "StepCheckpoint",
    "StepProgressBar",
    "ThroughputLogger",
    "TrainabilityCheck",
]
