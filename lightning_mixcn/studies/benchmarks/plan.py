"""Measure benchmarks and probes of one model, or of a base beside its adapted self, part by part."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from tqdm.auto import tqdm

from lightning_mixcn.errors import ExistingFileError, UserError
from lightning_mixcn.files.atomic import unfinished_path, write_text
from lightning_mixcn.model.find import find_model
from lightning_mixcn.model.inference.prefill import default_chunk
from lightning_mixcn.model.options import ModelOptions
from lightning_mixcn.model.sharding import is_sharded, shard_model
from lightning_mixcn.studies.models import (
    AdapterChoice,
    EvaluatedModel,
    LoadedModels,
    evaluated_models,
    model_fingerprint,
)
from lightning_mixcn.studies.parts import StudyParts, check_settings, forget_parts
from lightning_mixcn.studies.processes import Processes, is_first, joined_processes
from lightning_mixcn.studies.task_files import BenchmarkFiles
from lightning_mixcn.studies.task_scores import run_task
from lightning_mixcn.studies.tasks import (
    Benchmarks,
    check_limit,
    load_benchmarks,
    require_harness,
    split_names,
)
from lightning_mixcn.text import DocumentSet, TextTokenizer

from .ceval import hidden_test_benchmarks, predict_subject, subject_of
from .eos_probe import (
    compare_probes,
    probe_eos,
    probe_table,
    probed_documents,
)
from .few_shot_probe import FewShotOptions, compare_few_shot, few_shot_table, make_prompts, probe_few_shot
from .options import EvaluationOptions
from .report import (
    parse_languages,
    score_table,
    shown_rows,
    task_rows,
)


@dataclass
class EvaluationPlan:
    """What is measured, part by part; a part that is kept is not measured again."""

    models: list[EvaluatedModel]
    benchmarks: Benchmarks
    hidden: Benchmarks | None
    probed: list[DocumentSet]
    few_shot: list[DocumentSet]
    options: EvaluationOptions
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
                tokenizer = model.tokenizer()
                with loaded.use(model) as module:
                    lm = self._harness(module, tokenizer)
                    for kind, name in work[model.name]:
                        if kind in ("eos", "few_shot"):
                            made: Any = self._probe(module, tokenizer, kind, name, processes)
                        else:
                            made = self._measure(lm, kind, name)
                        if is_first():
                            content = json.dumps(made, ensure_ascii=False, default=str).encode()
                            self.parts.save(_part(model, kind, name), {"json": np.frombuffer(content, dtype=np.uint8)})
                        progress.update()

    def report(self, settings: dict[str, Any], languages: dict[str, str]) -> tuple[str, str]:
        """Return the JSON file and the table."""
        scores = {
            model.name: {task: self._load(model, "task", task) for task in self.benchmarks.tasks}
            for model in self.models
        }
        rows = task_rows(self.benchmarks, scores, languages)
        names = [model.name for model in self.models]
        report: dict[str, Any] = {
            "settings": settings,
            "rows": rows,
            "tasks": {
                name: {task: {k: v for k, v in part.items() if k != "documents"} for task, part in of_model.items()}
                for name, of_model in scores.items()
            },
        }
        tables = [score_table(shown_rows(self.benchmarks, rows), names)] if rows else []
        if self.few_shot:
            report["few_shot_probe"], table = self._report_few_shot(names)
            tables.append(table)
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

    def _report_few_shot(self, names: list[str]) -> tuple[dict[str, Any], str]:
        figures = {
            model.name: {part.name: self._load(model, "few_shot", part.name) for part in self.few_shot}
            for model in self.models
        }
        report: dict[str, Any] = {"models": figures}
        if len(names) > 1:
            first, second = (figures[name] for name in names)
            report["comparison"] = {
                source: {kind: test._asdict() for kind, test in compare_few_shot(first[source], second[source]).items()}
                for source in first
            }
        return report, few_shot_table(figures)

    def answers(self) -> str:
        """Return C-Eval's submission, of the adapted model where there are two."""
        assert self.hidden is not None
        model, hidden = self.models[-1], self.hidden
        subjects = {subject_of(hidden, name): self._load(model, "hidden", name) for name in hidden.tasks}
        return json.dumps(subjects, ensure_ascii=False, indent=1) + "\n"

    def _missing(self, model: EvaluatedModel) -> list[tuple[str, str]]:
        hidden = self.hidden.tasks if self.hidden and model is self.models[-1] else ()
        wanted = [("task", name) for name in self.benchmarks.tasks] + [("hidden", name) for name in hidden]
        wanted += [("eos", part.name) for part in self.probed] + [("few_shot", part.name) for part in self.few_shot]
        return [(kind, name) for kind, name in wanted if _part(model, kind, name) not in self.parts]

    def _harness(self, module: nn.Module, tokenizer: TextTokenizer) -> Any:
        if not (self.benchmarks.tasks or self.hidden):
            return None
        from lightning_mixcn.studies.harness import HarnessModel, HarnessReplicas

        wrapper = HarnessModel if is_sharded(module) else HarnessReplicas
        return wrapper(module, tokenizer, self.options.batch_size)

    def _probe(self, module: nn.Module, tokenizer: TextTokenizer, kind: str, name: str, processes: Processes) -> Any:
        documents = next(part for part in (self.probed if kind == "eos" else self.few_shot) if part.name == name)
        if kind == "eos":
            return probe_eos(module, tokenizer, documents, self.options.eos_probe_tokens)
        make, tokens = few_shot_options(self.options), default_chunk(processes.device)
        return probe_few_shot(
            module, tokenizer, documents, make, tokens, rank=processes.rank, num_ranks=processes.count
        )

    def _measure(self, lm: Any, kind: str, name: str) -> Any:
        options: dict[str, Any] = {
            "limit": self.options.limit,
            "apply_chat_template": self.options.apply_chat_template,
        }
        if kind == "task":
            return run_task(lm, self.benchmarks, name, **options)[0]
        assert self.hidden is not None
        return predict_subject(lm, self.hidden, name, **options)

    def _load(self, model: EvaluatedModel, kind: str, name: str) -> Any:
        return json.loads(self.parts.load(_part(model, kind, name))["json"].tobytes())


def few_shot_options(options: EvaluationOptions) -> FewShotOptions:
    """Return the make of the few-shot probe's prompts."""
    return FewShotOptions(
        options.few_shot_prompts, options.few_shot_labels, options.few_shot_shots, options.few_shot_characters
    )


def _part(model: EvaluatedModel, kind: str, name: str) -> str:
    return f"{model.name}.{kind}.{quote(name, safe='')}"


def run_evaluation(
    src: str,
    target: Path,
    options: EvaluationOptions,
    adapter: AdapterChoice | None,
    languages: Sequence[str],
    answers: Path | None,
    loading: ModelOptions,
    shard: bool,
) -> None:
    """Measure what is missing and write the outputs; arguments as in the command ``evaluate``."""
    benchmarked = bool(options.tasks or answers or not (options.eos_probe or options.few_shot_probe))
    if benchmarked:
        require_harness()
    check_limit(options.limit)
    more_languages, names = parse_languages(languages), split_names(options.tasks) if benchmarked else []
    found = find_model(src)
    models = evaluated_models(src, found, adapter)
    if options.apply_chat_template:
        _check_template(models)
    with joined_processes(loading.torch_device()) as processes:
        _check_processes(processes, shard, options.batch_size)
        settings: dict[str, Any] = {
            "src": src, **model_fingerprint(found), "tasks": names, "models": [model.name for model in models],
            "num_fewshot": options.num_fewshot, "limit": options.limit,
            "apply_chat_template": options.apply_chat_template, "data_dir": options.data_dir,
            "submission": answers is not None, "eos_probe": list(options.eos_probe),
            "eos_probe_tokens": options.eos_probe_tokens, "quantization": loading.quantization, "dtype": loading.dtype,
            "device": processes.device.type, "shard": shard, "lm_eval": version("lm_eval") if benchmarked else None,
        }  # fmt: skip
        if options.few_shot_probe:
            settings |= {"few_shot_probe": list(options.few_shot_probe)}
            settings |= {f"few_shot_{name}": value for name, value in asdict(few_shot_options(options)).items()}
        if processes.from_first(lambda: _is_finished(target, settings, answers)):
            return
        files = BenchmarkFiles(options.data_dir) if options.data_dir else None
        with processes.first_before_others():
            probed = probed_documents(options.eos_probe)
            hidden = hidden_test_benchmarks(options.num_fewshot, files) if answers else None
            few_shot = probed_documents(options.few_shot_probe, "few_shot_probe")
            for documents in few_shot:  # before a model is loaded for them
                make_prompts(documents, few_shot_options(options))
            benchmarks = Benchmarks((), {}, {})
            if benchmarked:
                benchmarks = load_benchmarks(names, num_fewshot=options.num_fewshot, files=files)
        plan = EvaluationPlan(models, benchmarks, hidden, probed, few_shot, options, StudyParts(target, settings))
        _say(f"{len(plan.benchmarks.tasks)} tasks on {' and '.join(model.name for model in models)}")
        plan.run(LoadedModels(loading, processes.device, _sharding(processes) if shard else None), processes)
        if processes.rank == 0:
            _finish(plan, settings, more_languages, target, answers)


def _sharding(processes: Processes) -> Callable[[nn.Module], None]:
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    return lambda model: shard_model(model, mesh)


def _finish(
    plan: EvaluationPlan, settings: dict[str, Any], languages: dict[str, str], target: Path, answers: Path | None
) -> None:
    """Write the outputs, and show the table."""
    report, table = plan.report(settings, languages)
    if answers is not None:
        write_text(answers, plan.answers())
    write_text(target, report)
    plan.parts.delete()
    print(table)


def _check_processes(processes: Processes, shard: bool, batch_size: int | str) -> None:
    if shard and processes.count == 1:
        raise UserError("`shard` shares the weights of several processes. Start them with torchrun, or leave it out")
    if batch_size == "auto" and processes.count > 1:
        raise UserError("`batch_size=auto` is for one process: each would find another size. Give a number")


def _check_template(models: Sequence[EvaluatedModel]) -> None:
    for model in models:
        if model.tokenizer().hf.chat_template is None:
            raise UserError(
                f"`apply_chat_template`, but the tokenizer in {str(model.found.tokenizer)!r} has no chat template. Put "
                "a chat_template.jinja there, or leave the option out"
            )


def _is_finished(target: Path, settings: dict[str, Any], answers: Path | None) -> bool:
    """Tell whether this very evaluation is there; its table is printed again."""
    if not target.exists():
        # One that was written just before a kill goes with parts that are still there.
        resumed = unfinished_path(target).exists()
        if answers is not None and answers.exists() and not resumed:
            raise ExistingFileError(f"`submission={str(answers)!r}` exists. Delete it or choose another")
        return False
    try:
        report = json.loads(target.read_text(encoding="utf-8"))
        there, table = report["settings"], report["table"]
    except (ValueError, LookupError, TypeError) as error:
        raise ExistingFileError(f"`out={str(target)!r}` exists and is no evaluation. Choose another") from error
    check_settings(there, settings, target)
    forget_parts(target)
    print(table)
    _say(f"{target} was finished before.")
    return True


def _say(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr, flush=True)
