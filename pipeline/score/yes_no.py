"""yes_no: questions that are answered by yes or no, with precision and recall of yes.

The figures are those of POPE (Li et al. 2023). Unlike its script, which takes everything without a "no" for a yes, an
answer that says neither is unparsed: wrong, and counted.
"""

from __future__ import annotations

import re

import numpy as np

from pipeline.score.metric import Array, Cases, Metric, UnusableCase, ratio

_FIRST = re.compile(r"\W*(yes|no)\b(?!\s+(?:idea|one|doubt))", re.IGNORECASE)
_SAID = re.compile(r"\banswer\b[^.:\n]{0,80}?(?:\bis|:)[\s*_\"'`(]*(yes|no)\b", re.IGNORECASE)
_THERE_IS_NO = re.compile(r"\W*there\s+(?:is|are)\s+(?:no|not)\b", re.IGNORECASE)
_WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_RIGHT, _TRUE_YES, _SAID_YES, _IS_YES, _UNPARSED = range(5)


class YesNo(Metric):
    name = "yes_no"
    doc = "share of right answers to yes-no questions, with precision, recall and f1 of yes (POPE)"

    def rows(self, cases: Cases) -> Array:
        found = np.zeros((len(cases), 5))
        for position, (response, references, _) in enumerate(cases):
            meant = {_WORDS.get(reference.strip().strip(".").lower()) for reference in references}
            is_yes = meant.pop()
            if is_yes is None or meant:
                message = f"yes_no: expected yes or no (true, false, 1, 0) as reference, came {list(references)}."
                raise UnusableCase(message, position)
            said = None if response is None else says_yes(response)
            found[position, _RIGHT] = said is is_yes
            found[position, _TRUE_YES] = is_yes and said is True
            found[position, _SAID_YES] = said is True
            found[position, _IS_YES] = is_yes
            found[position, _UNPARSED] = response is not None and said is None
        return found

    def parts(self, sums_BS: Array, num_rows_B: Array) -> dict[str, Array]:
        true_yes, said_yes, is_yes = (sums_BS[..., column] for column in (_TRUE_YES, _SAID_YES, _IS_YES))
        return {
            "precision": ratio(true_yes, said_yes),
            "recall": ratio(true_yes, is_yes),
            "f1": ratio(2 * true_yes, said_yes + is_yes),
            "yes_share": ratio(said_yes, num_rows_B),
        }

    def counts(self, sums_S: Array) -> dict[str, int]:
        return {"num_unparsed": int(sums_S[_UNPARSED])}


def says_yes(response: str) -> bool | None:
    """Whether an answer says yes; None where it says neither."""
    if match := _FIRST.match(response):
        return match[1].lower() == "yes"
    if said := _SAID.findall(response):
        return bool(said[-1].lower() == "yes")
    return False if _THERE_IS_NO.match(response) else None
