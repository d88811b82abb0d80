"""Keep secrets, and what a terminal would obey, out of everything that is written or printed.

A presigned URL, a password in a URL or a logger's key comes in with a configuration. Files of a run are shared, and
error messages are pasted into issues, so every exit passes what it writes through `without_secrets` or `mask_secrets`.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "<masked>"
_END = r"\s'\"`<>"
# `container@account` of Azure's URLs is a place; a name before another host, or with a password, is not.
_USER = re.compile(
    rf"(?<=://)(?:[^/{_END}@]*:[^/{_END}]*|(?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://)[^/{_END}]+)@"
)
# In other addresses than the web's a question mark is a glob's, unless a key and its value follow.
_WEB_QUERY = re.compile(rf"(?i)(https?://(?:{MASK}@)?[^?#{_END}]*)[?#][^{_END}]+")
_QUERY = re.compile(rf"(?i)((?<![a-z0-9+.-])[a-z0-9+.-]+://(?:{MASK}@)?[^?{_END}]*)\?[\w.~%+-]+=[^{_END}]*")
_KEY = (
    r"[\w.-]*(?:password|passwd|secret|api[_-]?key|access[_-]?key(?:[_-]?id)?|(?:account|private|secret)[_-]?key"
    r"|signature|credentials?|connection[_-]?string|(?:auth|api|access|hf|sas|security|session|refresh|bearer)[_-]?token)"
)
_SECRET_KEY = re.compile(rf"{_KEY}|token", re.IGNORECASE)
_PAIR = re.compile(
    rf"(?i)((?:(?<![\w.-]){_KEY}[\"']?\s*[=:]|[?&](?:token|sig)=)\s*[\"']?)(?!{MASK}|null\b|None\b)[^&,;)}}\]{_END}]+"
)
_KNOWN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b")
_VARIABLE = re.compile(r".*(?:TOKEN|PASSWORD|PASSWD|SECRET|_KEY|CREDENTIALS?)(?:_ID)?", re.IGNORECASE)
_SHORTEST = 8  # characters of a secret in the environment: shorter ones are words of any text
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def mask_secrets(text: str) -> str:
    """Replace what is secret in a text by `MASK`.

    That is what stands before the host of a URL, its query and fragment, values of keys such as ``api_key`` or
    ``X-Amz-Signature``, tokens of known form, and the values of environment variables with such names.

    >>> mask_secrets("https://user:pw@host/x.jsonl?X-Amz-Signature=ab cannot be read")
    'https://<masked>@host/x.jsonl?<masked> cannot be read'
    """
    text = _QUERY.sub(rf"\1?{MASK}", _WEB_QUERY.sub(rf"\1?{MASK}", text))
    text = _USER.sub(f"{MASK}@", text)
    text = _KNOWN.sub(MASK, _PAIR.sub(rf"\1{MASK}", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and not os.path.isabs(value) and _VARIABLE.fullmatch(name):
            text = text.replace(value, MASK)
    return text


def without_secrets(value: Any) -> Any:
    """Copy settings with their secrets masked.

    Args:
        value: Mappings, lists and plain values; texts under a secret's key are masked as a whole.
    """
    if isinstance(value, Mapping):
        return {
            key: MASK if isinstance(entry, str) and _SECRET_KEY.fullmatch(str(key)) else without_secrets(entry)
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(map(without_secrets, value)) if type(value) in (list, tuple) else value
    return mask_secrets(value) if isinstance(value, str) else value


def visible(text: str) -> str:
    """Replace control characters, with which a text could move the cursor of a terminal or rename its window."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r", ""))
