"""Which language a benchmark task is in, told from its name; the table can be extended."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

OTHER = "other"

# The first pattern that fits decides, so exceptions stand before the families that they belong to.
LANGUAGES: dict[str, str] = {
    "*_zh": "zh",
    "*_zh_*": "zh",
    "*_zho_*": "zh",
    "*_cmn_*": "zh",
    "*-zh": "zh",
    "ceval*": "zh",
    "cmmlu*": "zh",
    "aclue*": "zh",
    "agieval_gaokao_english": "en",
    "agieval_gaokao*": "zh",
    "agieval_cn": "zh",
    "agieval_jec*": "zh",
    "tmmluplus*": "zh",
    "tmlu*": "zh",
    "zhoblimp*": "zh",
    "longbench_dureader*": "zh",
    "longbench_lsht*": "zh",
    "longbench_vcsum*": "zh",
    "*_en": "en",
    "*_en_*": "en",
    "*-en": "en",
    "mmlu_prox*": OTHER,
    "mmlu*": "en",
    "hellaswag": "en",
    "arc_challenge": "en",
    "arc_easy": "en",
    "ai2_arc": "en",
    "winogrande": "en",
    "truthfulqa_mc*": "en",
    "truthfulqa_gen": "en",
    "truthfulqa": "en",
    "gsm8k*": "en",
    "piqa": "en",
    "openbookqa": "en",
    "boolq": "en",
    "sciq": "en",
    "lambada*": "en",
    "bbh*": "en",
    "triviaqa": "en",
    "nq_open": "en",
    "race": "en",
    "agieval*": "en",
    "longbench_*": "en",
    "leaderboard*": "en",
    "ifeval": "en",
    "wikitext": "en",
    "drop": "en",
}


def parse_languages(entries: Sequence[str]) -> dict[str, str]:
    """Read ``pattern=language`` entries.

    Args:
        entries: E.g. ``xnli_vi=vi`` or ``thai_*=th``; ``*`` stands for anything.

    Raises:
        ValueError: an entry without a pattern or a language.
    """
    found = {}
    for entry in entries:
        pattern, _, language = entry.partition("=")
        if not (pattern and language):
            raise ValueError(f"`languages` has {entry!r}: expected pattern=language, e.g. xnli_vi=vi")
        found[pattern] = language
    return found


def language_of(task: str, more: Mapping[str, str] | None = None) -> str:
    """The language of a task.

    Args:
        task: Name of a task or group.
        more: Patterns that come before those of this file.

    Returns:
        A short name such as ``zh``, or ``other``.
    """
    for pattern, language in {**(more or {}), **LANGUAGES}.items():
        if fnmatchcase(task, pattern):
            return language
    return OTHER
