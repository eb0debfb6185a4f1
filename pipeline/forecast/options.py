"""The words that only `vlm-batch plan` knows."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.option import option


@dataclass(kw_only=True, slots=True)
class PlanOptions:
    """How closely is looked, and what is made of it. None of it is part of a run's settings."""

    model: bool = option(True, "load the model and answer some rows; false = look at the data alone")
    tokens: bool | None = option(
        None, "count the tokens of prompts, for which the model's processor is needed; null = as model="
    )
    sample_rows: int = option(200, "rows to look at, spread over the whole source", least=1)
    seconds: float = option(
        60.0, "time to answer rows in, in seconds, loading aside; what is begun by then is finished", least=1
    )
    price_per_hour: float | None = option(
        None, "price of one accelerator for an hour (of a worker, on a CPU), in a currency of your own", least=0
    )
    json: bool = option(False, "print one JSON object in place of the table")

    @property
    def counts_tokens(self) -> bool:
        return self.model if self.tokens is None else self.tokens

    def check(self) -> None:
        """Refuse words that contradict each other.

        Raises:
            UsageError: naming them.
        """
        if self.model and self.tokens is False:
            raise UsageError("tokens=false and model=true cannot go together: the model reads tokens.")
