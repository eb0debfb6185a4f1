"""vlm-batch status watch=true: look at a run until it is done, or nobody has been at work for long."""

from __future__ import annotations

from pipeline.errors import RunFailed
from pipeline.meter import duration
from pipeline.shown import shown
from pipeline.status import status_lines
from pipeline.watch.observer import Observer
from pipeline.watch.views import Lines, view_of
from pipeline.worker_stats import heartbeat_seconds
from pipeline.write.file import Place


def watch(output_dir: Place, idle_seconds: float) -> None:
    """Show the run as often as its workers are heard of; returns once it is done, or at q or Ctrl-C.

    idle_seconds: so long nobody may be at work.

    Raises:
        UsageError: there is no run in this folder.
        RunFailed: nobody was at work for so long.
    """
    observer = Observer(output_dir)
    look = observer.look()
    view = view_of(output_dir, idle_seconds)
    try:
        with view:
            view.show(look, observer.status)
            while look.at_work or (not look.ended and look.idle_seconds < idle_seconds):
                if not view.wait(heartbeat_seconds(output_dir)):
                    return
                look = observer.look_again(look)
                view.show(look, observer.status)
    except KeyboardInterrupt:
        return
    if not isinstance(view, Lines):  # which have said so
        print(shown("\n".join(status_lines(output_dir, observer.status))))
    if not look.ended:
        raise RunFailed(
            f"nobody has been at work for {duration(idle_seconds)} (idle_seconds), and the run is not done. The same "
            "command goes on where it stopped."
        )
