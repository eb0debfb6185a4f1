"""The words of `vlm-batch diff`."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.option import option


@dataclass(kw_only=True, slots=True)
class DiffOptions:
    """The words that only `vlm-batch diff` knows."""

    a: str | None = option(None, "folder of the run that is compared with; or Parquet: a file, a folder or a glob")
    b: str | None = option(None, "the same for the other run; the same folder where two prompts of a run are compared")
    a_prompt: str | None = option(None, "of a, only the answers to this prompt (prompt_name); null = all")
    b_prompt: str | None = option(None, "of b, only the answers to this prompt; null = all")
    a_response: str | None = option(None, "column of a with the text to compare; null = the answers")
    b_response: str | None = option(None, "column of b with the text to compare; null = the answers")
    key: str | None = option(
        None, "column that names a row in both, for example row_index; null = id. Prompt and sample belong to it"
    )
    by: list[str] = option(doc="columns by whose values the records are counted and scored, too", factory=list)
    reference: str | None = option(
        None, "column with the right answer, or a list of them; or a file, with reference_column"
    )
    reference_column: str | None = option(None, "column of the right answers in the file that reference names")
    reference_id_column: str = option("id", "column of the ids in that file, by which it is joined")
    options_column: str | None = option(None, "metric=choice: column with the list of options")
    metric: list[str] = option(doc="metrics of vlm-batch score by which both are scored", factory=list)
    min_same: float | None = option(
        None, "exit code 1 where a smaller share of the records has the same answer; null = never", least=0, most=1
    )
    diff_output: str | None = option(None, "file of the counts as JSON; null = diff.json in the folder of b")
    changed_rows: str | None = option(None, "Parquet file of every record that is not the same in both; null = none")
    html: str | None = option(None, "the page of changed records side by side; null = diff.html in the folder of b")
    html_rows: int = option(300, "records on the page at most; 0 = no page", least=0)
    root: str | None = option(None, "folder or URL that the pictures lie in now; null = where the runs found them")
    seed: int = option(42, "of the bootstrap, and of what is drawn for the page")
