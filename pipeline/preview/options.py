"""The words that only `vlm-batch preview` knows."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.option import option


@dataclass(kw_only=True, slots=True)
class PreviewOptions:
    """What is shown. None of it is part of a run's settings."""

    rows: list[int] | None = option(None, "positions of the rows to show, e.g. 5 or [0,5], from 0; null = the first 3")
    show_prompt: bool = option(False, "print the exact text that the model reads, special tokens and image tokens too")
    render_only: bool = option(
        False,
        "load no weights; print one JSON object per prompt: id, prompt_name, text, num_prompt_tokens, num_image_tokens",
    )
    chat: bool = option(False, "converse: each line of standard input is a turn; /image PATH, /reset, /quit")
    image: list[str] = option(doc="chat: image to begin with; image=a.jpg image=b.jpg for several", factory=list)

    def check(self) -> None:
        """Refuse words that contradict each other.

        Raises:
            UsageError: naming them.
        """
        if self.image and not self.chat:
            raise UsageError(f"image={self.image[0]} is for a conversation: add chat=true, or choose rows with rows=.")
        if self.chat and (self.rows is not None or self.render_only):
            named = "render_only=true" if self.render_only else f"rows={self.rows}"
            raise UsageError(f"chat=true and {named} cannot go together: a conversation has no rows of a dataset.")
        if self.render_only and self.show_prompt:
            raise UsageError("render_only=true prints JSON alone; show_prompt=true is for answers. Choose one.")
        if self.rows is not None and (not self.rows or min(self.rows) < 0):
            raise UsageError(f"rows={self.rows}: expected positions such as 5 or [0,5], counted from 0.")
