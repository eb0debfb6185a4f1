"""The words that only `vlm-batch score` knows."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.option import option
from pipeline.score.registry import METRICS

# By these a value of reference= is seen to be a file, not a column.
FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(kw_only=True, slots=True)
class ScoreOptions:
    """What is scored, against what, by what."""

    predictions: str | None = option(None, "a run's folder, or a file: .parquet, .jsonl, .json, .csv, .tsv")
    response_column: str | None = option(None, "column of the answers; null = the run's answers, or `response`")
    id_column: str = option("id", "column of the ids where the predictions are no run")
    reference: str | None = option(
        None, "column of the predictions with the right answer, or a list of them; or a file, with reference_column"
    )
    reference_column: str | None = option(None, "column of the right answers in the file that reference names")
    reference_id_column: str = option("id", "column of the ids in that file, by which it is joined")
    options_column: str | None = option(
        None, "metric=choice: column with the list of options, of the predictions or else of the reference file"
    )
    metric: list[str] = option(doc=f"one or more of {', '.join(METRICS)}; none = exact_match", factory=list)
    by: str | None = option(None, "column whose values are scored by themselves, too, such as prompt_name")
    score_output: str | None = option(
        None, "file for the scores as JSON; null = score.json in the run's folder, or NAME.score.json beside the file"
    )
    score_rows: str | None = option(
        None,
        "Parquet file for the scores of each record; null = score_rows.parquet beside score.json of a run, else none",
    )
    seed: int = option(42, "seed of the bootstrap", least=0)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics: metric=[bleu,chrf], metric=bleu,chrf or both given one after the other."""
        return [name.strip() for names in self.metric for name in names.split(",")] or ["exact_match"]

    def check(self) -> None:
        """Refuse words that are missing or contradict each other.

        Raises:
            UsageError: naming them.
        """
        if not self.predictions:
            raise UsageError("predictions= is not set: the folder of a run, or a file with answers.")
        if not self.reference:
            raise UsageError("reference= is not set: a column of the predictions, or a file and its reference_column=.")
        if self.reference_column is None and self.reference.lower().endswith(FILE_ENDINGS):
            raise UsageError(
                f"reference={self.reference} looks like a file: say with reference_column= which of its columns has "
                "the right answers."
            )
        if self.options_column is not None and "choice" not in self.metrics:
            raise UsageError(f"options_column={self.options_column} is for metric=choice.")
