"""What an evaluation measures, part by part, and what is made of the parts."""

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import numpy as np
from tqdm.auto import tqdm

from lightning_mixcn.model.sharding import is_sharded
from lightning_mixcn.text import DocumentSet

from .benchmark_report import score_rows, score_table, shown_rows
from .benchmark_scores import run_task
from .benchmark_tasks import Benchmarks
from .ceval_submission import predict_subject, subject_of
from .eos_probe import compare_probes, probe_eos, probe_table
from .evaluated_models import EvaluatedModel, LoadedModels
from .processes import Processes, is_first
from .study_parts import StudyParts


@dataclass
class EvaluationPlan:
    """What is measured, part by part; a part that is kept is not measured again."""

    models: list[EvaluatedModel]
    benchmarks: Benchmarks
    hidden: Benchmarks | None
    probed: list[DocumentSet]
    probe_tokens: int
    limit: float | None
    apply_chat_template: bool
    batch_size: int | str
    parts: StudyParts
    _total: int = field(init=False, default=0)

    def run(self, loaded: LoadedModels, processes: Processes) -> None:
        """Measure what is missing, on all processes; rank 0 keeps the parts."""
        work = processes.from_first(lambda: {model.name: self._missing(model) for model in self.models})
        total = sum(map(len, work.values()))
        with tqdm(total=total, desc="tasks", unit="task", disable=not is_first()) as progress:
            for model in self.models:
                if not work[model.name]:
                    continue
                from .harness_model import HarnessModel
                from .harness_replicas import HarnessReplicas

                tokenizer = model.tokenizer()
                with loaded.use(model) as module:
                    wrapper = HarnessModel if is_sharded(module) else HarnessReplicas
                    lm = wrapper(module, tokenizer, self.batch_size)
                    for kind, name in work[model.name]:
                        if kind == "eos":
                            documents = next(part for part in self.probed if part.name == name)
                            made: Any = probe_eos(module, tokenizer, documents, self.probe_tokens)
                        else:
                            made = self._measure(lm, kind, name)
                        if is_first():
                            content = json.dumps(made, ensure_ascii=False, default=str).encode()
                            self.parts.save(_part(model, kind, name), {"json": np.frombuffer(content, dtype=np.uint8)})
                        progress.update()

    def report(self, settings: dict[str, Any], languages: dict[str, str]) -> tuple[str, str]:
        """The JSON file and the table."""
        scores = {
            model.name: {task: self._load(model, "task", task) for task in self.benchmarks.tasks}
            for model in self.models
        }
        rows = score_rows(self.benchmarks, scores, languages)
        names = [model.name for model in self.models]
        report: dict[str, Any] = {
            "settings": settings,
            "rows": rows,
            "tasks": {
                name: {task: {k: v for k, v in part.items() if k != "documents"} for task, part in of_model.items()}
                for name, of_model in scores.items()
            },
        }
        tables = [score_table(shown_rows(self.benchmarks, rows), names)]
        if self.probed:
            probes = {
                model.name: {part.name: self._load(model, "eos", part.name) for part in self.probed}
                for model in self.models
            }
            report["eos_probe"] = {"models": probes}
            if len(names) > 1:
                first, second = (probes[name] for name in names)
                report["eos_probe"]["comparison"] = {
                    source: compare_probes(first[source], second[source]) for source in first
                }
            tables.append(probe_table(probes))
        report["table"] = "\n\n".join(tables)
        return json.dumps(report, ensure_ascii=False, indent=1) + "\n", report["table"]

    def answers(self) -> str:
        """C-Eval's submission, of the adapted model where there are two."""
        assert self.hidden is not None
        model, hidden = self.models[-1], self.hidden
        subjects = {subject_of(hidden, name): self._load(model, "hidden", name) for name in hidden.tasks}
        return json.dumps(subjects, ensure_ascii=False, indent=1) + "\n"

    def _missing(self, model: EvaluatedModel) -> list[tuple[str, str]]:
        hidden = self.hidden.tasks if self.hidden and model is self.models[-1] else ()
        wanted = [("task", name) for name in self.benchmarks.tasks] + [("hidden", name) for name in hidden]
        wanted += [("eos", part.name) for part in self.probed]
        return [(kind, name) for kind, name in wanted if _part(model, kind, name) not in self.parts]

    def _measure(self, lm: Any, kind: str, name: str) -> Any:
        options: dict[str, Any] = {"limit": self.limit, "apply_chat_template": self.apply_chat_template}
        if kind == "task":
            return run_task(lm, self.benchmarks, name, **options)[0]
        assert self.hidden is not None
        return predict_subject(lm, self.hidden, name, **options)

    def _load(self, model: EvaluatedModel, kind: str, name: str) -> Any:
        return json.loads(self.parts.load(_part(model, kind, name))["json"].tobytes())


def _part(model: EvaluatedModel, kind: str, name: str) -> str:
    return f"{model.name}.{kind}.{quote(name, safe='')}"
