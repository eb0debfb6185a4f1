"""anls: how much of the answer's spelling is right, for text that is read off a picture.

Average normalized Levenshtein similarity, Biten et al., "Scene Text Visual Question Answering" (2019), as the DocVQA
challenge counts it: 1 less the edits by the length of the longer text, 0 where that is under a half, the best of the
references; without case, and with one blank between words.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.score.extra import rapidfuzz_distance
from pipeline.score.metric import Metric, References

_LEAST = 0.5


class Anls(Metric):
    name = "anls"
    doc = "likeness of the spelling (DocVQA, ST-VQA, InfographicVQA), 0 where less than half is right"

    def score(self, response: str, references: References, options: Sequence[str]) -> float:
        similarity = rapidfuzz_distance().Levenshtein.normalized_similarity
        answer = _plain(response)
        return float(max(similarity(answer, _plain(text), score_cutoff=_LEAST) for text in references))

    def settings(self) -> dict[str, str]:
        return {"threshold": str(_LEAST)}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
