"""Text without secrets: what may be written to disk, said in an error or logged.

A secret is the user and password of an address (scheme://user:password@host), the value of a parameter such as
?X-Amz-Signature=... or &token=..., and the value of an environment variable such as HF_TOKEN or AWS_SECRET_ACCESS_KEY.
What a dataset holds in columns that are kept is data: it is written as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
_MIN_CHARACTERS = 12  # a shorter value of a variable is found in texts that have nothing to do with it
# Lengths are bounded, since whoever wrote a text may want the search to take for ever.
# The second form is a password with a slash in it, as many keys of S3 have; host:8080/a@b is none.
_USERINFO = re.compile(r"(?<=://)(?:[^/\s]{0,512}|[^/\s:@]{1,512}:(?![:/]|\d*(?:/|$))[^\s@]{0,512})@")
# As libraries quote an address that they have taken apart: bucket 'KEY:SECRET@name' not found.
_BARE_USERINFO = re.compile(r"(?<=[/'\"\s(])[^\s/:@'\"]{1,128}:(?![:/]|\d*(?:/|$))[^\s@'\"]{1,512}@(?=[\w\[])")
_WORDS = r"(?:token|secret|signature|password|passwd|credential|api[-_]?key|access[-_]?key)"
_PARAMETER = re.compile(
    rf"([?&;](?:[\w.-]{{0,40}}{_WORDS}[\w.-]{{0,40}}|sig|key|auth|code|pwd|key-pair-id|policy)=)[^&;\s'\"]+",
    re.IGNORECASE,
)
_VARIABLE = re.compile(
    r"(?:.*_)?(?:TOKEN|SECRET|\w*PASSWORD|PASSWD|(?<=_)PWD|(?:API|ACCESS|SECRET|STORAGE)_?KEY|CONNECTION_STRING)(?:_\w+)?",
    re.IGNORECASE,
)
_NO_SECRET = ("_PATH", "_FILE", "_DIR", "_URL", "_URI", "_ID", "_NAME")
# Keys of dictionaries, where any name goes. Not every name with "token" in it: image_token and pad_token are none.
_KEY = re.compile(
    r"token|(?:\w+[-_])?(?:(?:auth|access|hf|hub|api|bearer)[-_]?token|secret|password|passwd"
    r"|(?:api|access|secret)[-_]?key)",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """A message without secrets of any kind."""
    for value in secret_variables().values():
        text = text.replace(value, HIDDEN)
    return _PARAMETER.sub(rf"\1{HIDDEN}", _BARE_USERINFO.sub(f"{HIDDEN}@", without_credentials(text)))


def without_credentials(address: str) -> str:
    """An address without what is secret in it; the same wherever it is asked. Paths stay as they are."""
    if "://" not in address:
        return address
    return _PARAMETER.sub(rf"\1{HIDDEN}", _USERINFO.sub(f"{HIDDEN}@", address))


def with_credentials(address: str, source: str) -> str:
    """An address that was written without its user and password, with those of the address that it was made from."""
    given = source.split("::")
    links = address.split("::")
    for number, link in enumerate(links):
        if f"://{HIDDEN}@" in link and number < len(given) and (found := _USERINFO.search(given[number])):
            links[number] = link.replace(f"{HIDDEN}@", found[0], 1)
    return "::".join(links)


def secret_parameter(address: str) -> str | None:
    """The name of a parameter of an address whose value is secret; None where there is none."""
    found = _PARAMETER.search(address) if "://" in address else None
    return found[1].strip("?&;=") if found else None


def is_secret_key(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    return _KEY.fullmatch(name) is not None


def secret_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of the environment that hold secrets, and their values; longer values first."""
    found = {
        name: value
        for name, value in environment.items()
        if len(value) >= _MIN_CHARACTERS and _VARIABLE.fullmatch(name) and not name.upper().endswith(_NO_SECRET)
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
