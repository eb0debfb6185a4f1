"""The errors of the program, and what each one means to the person who started it.

VlmBatchError
|-- UsageError            exit 2   wrong command line, key, value or template: nothing was touched
|   `-- SettingsChanged   exit 2   the output folder was planned with other settings
|-- RunFailed             exit 1   the run cannot go on (unwritable output, missing model, damaged file)
|   `-- ErrorBudgetExceeded        more than max_error_rate of the rows failed
`-- Interrupted           exit 75  stopped by a signal: run the same command again

RowFault                  never ends a run: it becomes the error record of one row
"""

from pipeline.records import Stage
from pipeline.redaction import redacted


class VlmBatchError(Exception):
    """Anything this program reports to its user as a sentence instead of a traceback; secrets are left out of it."""

    exit_code = 1

    def __str__(self) -> str:
        return redacted(super().__str__())


class UsageError(VlmBatchError):
    """The command line, a configuration key or a template is wrong."""

    exit_code = 2


class SettingsChanged(UsageError):
    """The output folder belongs to a plan with other settings."""


class RunFailed(VlmBatchError):
    """The run cannot go on; what was finished stays finished."""


class ErrorBudgetExceeded(RunFailed):
    """More rows failed than max_error_rate allows."""


class Interrupted(VlmBatchError):
    """A signal stopped the run in good order."""

    exit_code = 75


class RowFault(Exception):
    """One row cannot be answered: `stage` is where, `kind` a short class name, the message says why.

    Raised where a row is read, opened, rendered or encoded; caught where rows are iterated; never seen by the user as
    an exception. The message is written to the output: secrets are left out of it.
    """

    def __init__(self, stage: Stage, kind: str, message: str) -> None:
        message = redacted(message)
        super().__init__(message)
        self.stage = stage
        self.kind = kind
        self.message = message

    def __reduce__(self) -> tuple[type["RowFault"], tuple[Stage, str, str]]:
        return (RowFault, (self.stage, self.kind, self.message))
