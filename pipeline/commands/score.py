"""vlm-batch score: answers held against references."""

from __future__ import annotations

from pipeline.commands.base import Call
from pipeline.score.options import ScoreOptions
from pipeline.shown import shown

Options = ScoreOptions


def execute(call: Call) -> int:
    from pipeline.score.output import write_scores
    from pipeline.score.scoring import score
    from pipeline.score.table import score_lines

    scores = score(call.options)
    files = write_scores(scores, call.options)
    print(shown("\n".join(score_lines(scores, call.options, files))))
    return 0
