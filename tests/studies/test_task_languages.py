"""Languages of tasks by their names."""

import pytest

from lightning_mixcn.studies.benchmarks.report import language_of, parse_languages


@pytest.mark.parametrize(
    ("task", "language"),
    [
        ("ceval-valid", "zh"),
        ("ceval-valid_law", "zh"),
        ("cmmlu_agronomy", "zh"),
        ("xcopa_zh", "zh"),
        ("mmlu_anatomy", "en"),
        ("mmlu_prox_zh", "zh"),
        ("mmlu_prox_de", "other"),
        ("global_mmlu_full_zh", "zh"),
        ("belebele_zho_Hans", "zh"),
        ("hellaswag", "en"),
        ("arc_challenge", "en"),
        ("gsm8k_cot", "en"),
        ("winogrande", "en"),
        ("truthfulqa_mc2", "en"),
        ("longbench_multifieldqa_zh", "zh"),
        ("longbench_dureader", "zh"),
        ("longbench_gov_report", "en"),
        ("agieval_gaokao_physics", "zh"),
        ("agieval_gaokao_english", "en"),
        ("thai_exam", "other"),
    ],
)
def test_families(task: str, language: str) -> None:
    assert language_of(task) == language


def test_the_table_can_be_extended_and_overruled() -> None:
    more = parse_languages(["thai_*=th", "gsm8k=maths"])
    assert [language_of(task, more) for task in ("thai_exam", "gsm8k", "mmlu")] == ["th", "maths", "en"]


@pytest.mark.parametrize("entry", ["thai_*", "=th", "thai_*="])
def test_bad_entries_are_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="pattern=language"):
        parse_languages([entry])
