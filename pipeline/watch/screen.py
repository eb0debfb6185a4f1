"""The live screen: a look at a run, laid out for a terminal of any size.

What stands at the top is always there; errors by class, workers and the newest errors share the lines that are left.
Text of rows and hosts is made printable and is never read as markup.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from pipeline.meter import duration
from pipeline.shown import shown
from pipeline.status import phases
from pipeline.watch.observer import Look
from pipeline.worker_stats import WorkerStats

_Line = list[Segment]

_LABEL_WIDTH = 8
_MOST_KINDS = 6
_COLORS = {"done": "green", "lost": "bold red", "failed": "bold red", "stopped": "yellow", "slow": "yellow"}
# Of a worker's line, what is left out on a narrow terminal, with the width below which it is.
_NARROW = {"rows": 76, "waiting": 66}
_HELP = "q or Ctrl-C ends this look, not the run"


class Screen:
    """What rich draws: the latest look, with times that go on while nobody looks."""

    def __init__(self, look: Look, idle_seconds: float) -> None:
        self.look = look
        self._idle_seconds = idle_seconds

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or options.size.height
        options = options.update(height=None)

        def lines(thing: RenderableType) -> list[_Line]:
            return console.render_lines(thing, options, pad=False)

        look = self.look
        top = [*lines(self._title(width)), *lines(_bar(look)), *lines(_facts(look))]
        kinds, workers, newest = _kinds(look), _rows(look), _newest(look)
        # A blank line and a heading for each of the last two, and the names of the columns.
        room = [len(kinds), len(workers) + 3 * bool(workers), len(newest) + 2 * bool(newest)]
        shares = _shares(height - len(top) - 1, room)
        below: list[_Line] = []
        for kind in kinds[: shares[0]]:
            below += lines(kind)
        if shares[1] > 3:
            table = _table(look, workers[: shares[1] - 3], width)
            below += [[], *lines(_heading(look, len(workers), shares[1] - 3)), *lines(table)]
        if shares[2] > 2:
            below += [[], *lines(Text("newest errors", style="bold"))]
            for error in newest[: shares[2] - 2]:
                below += lines(error)
        body = (top + below)[: height - 1]
        for line in body + [[]] * (height - 1 - len(body)):
            yield from line
            yield Segment.line()
        yield Text(_HELP, style="dim", no_wrap=True, overflow="ellipsis", end="")

    def _title(self, width: int) -> RenderableType:
        """The folder, of a long one its end, and at the right what the run is at."""
        state, folder = self._state(), _one_line(self.look.output_dir)
        room = max(8, width - state.cell_len - 1)
        if cell_len(folder) > room:
            folder = "..." + folder[3 - room :]
        title = Table.grid(expand=True, padding=(0, 1))
        title.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        title.add_column(justify="right", no_wrap=True)
        title.add_row(Text(folder, style="bold"), state)
        return title

    def _state(self) -> Text:
        look = self.look
        if look.ended:
            return Text("done", style="green")
        if not look.at_work:
            left = duration(max(0.0, self._idle_seconds - look.idle_seconds))
            return Text(f"nobody is at work; ends in {left}", style="bold red")
        since = duration(max(0.0, time.time() - min(worker["started"] for worker in look.at_work)))
        if all(worker["state"] == "loading" for worker in look.at_work):
            return Text(f"loading the model, {since}", style="yellow")
        return Text(f"running, {since}", style="green")


def _bar(look: Look) -> RenderableType:
    """The share that is done, as a bar and a number."""
    num_done, num_records = look.num_done, look.num_records
    bar = Table.grid(expand=True, padding=(0, 1))
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    share = num_done / num_records if num_records else 1.0
    bar.add_row(ProgressBar(total=max(1, num_records), completed=num_done if num_records else 1), f"{share:.1%}")
    return bar


def _facts(look: Look) -> RenderableType:
    facts = Table.grid(padding=(0, 1))
    facts.add_column(width=_LABEL_WIDTH, no_wrap=True)
    facts.add_column()
    for label, text in _said(look):
        facts.add_row(Text(label, style="bold"), text)
    return facts


def _said(look: Look) -> Iterator[tuple[str, Text]]:
    at_work = look.at_work
    yield "rows", Text(f"{look.num_done:,} of {look.num_records:,} done")
    loaded = [worker for worker in at_work if worker["state"] == "running"]
    if loaded:
        yield "rate", Text(_rate(look, loaded))
        yield "left", Text(_left(look))
    elif at_work:
        yield "left", Text("unknown until a model is loaded")
    elif not look.complete:
        yield "left", Text("the same command goes on where it stopped")
    yield "shards", Text(f"{look.num_shards_done:,} of {look.num_shards:,} published")
    if loaded:
        shares = [f"{name} {share:.0%}" for name, share in phases(loaded).items()]
        yield "time", Text(", ".join(shares))
    if look.problem:
        yield "problem", Text(f"{_one_line(look.problem)}; trying again", style="bold red")
    num_errors = sum(look.errors.values())
    share = f" ({num_errors / look.num_done:.1%} of the rows done)" if num_errors and look.num_done else ""
    yield "errors", Text(f"{num_errors:,}{share}", style="yellow" if num_errors else "")


def _rate(look: Look, loaded: Sequence[WorkerStats]) -> str:
    since_start = sum(worker["rows_per_second"] for worker in loaded)
    tokens = f"{sum(worker.get('tokens_per_second', 0.0) for worker in loaded):,.0f} tokens/s"
    if not look.window_seconds:
        return f"{since_start:.1f} rows/s, {tokens}"
    window = duration(look.window_seconds)
    return f"{look.rate:.1f} rows/s over the last {window}, {since_start:.1f} since the start; {tokens}"


def _left(look: Look) -> str:
    if look.complete:
        return "error rows are asked again, or the workers are ending"
    left = look.seconds_left
    if left is None:
        anything = any(worker.get("num_answered") for worker in look.at_work)
        return "unknown: no row was done lately" if anything else "unknown: no row is done yet"
    ends = time.localtime(time.time() + min(left, 1e9))
    return f"{duration(left)}, until about {time.strftime('%H:%M' if left < 86400 else '%a %d %b %H:%M', ends)}"


def _kinds(look: Look) -> list[Text]:
    kinds = list(look.errors.items())
    told = [f"{number:,} x {_one_line(kind)}" for kind, number in kinds[:_MOST_KINDS]]
    if len(kinds) > _MOST_KINDS:
        rest = kinds[_MOST_KINDS - 1 :]
        told[-1] = f"{sum(number for _, number in rest):,} of {len(rest)} further kinds"
    return [Text(" " * (_LABEL_WIDTH + 3) + line, no_wrap=True, overflow="ellipsis") for line in told]


def _heading(look: Look, num_workers: int, num_told: int) -> Text:
    states = Counter(_state_of(look, worker) for worker in (*look.at_work, *look.gone))
    text = f"{len(look.at_work):,} at work" + "".join(
        f", {states[state]:,} {state}" for state in ("slow", "loading", "lost", "failed", "stopped") if states[state]
    )
    if num_told < num_workers:
        text += f"; shown: the {num_told} worst of {num_workers:,}"
    return Text.assemble(("workers  ", "bold"), text, no_wrap=True, overflow="ellipsis")


def _rows(look: Look) -> list[WorkerStats]:
    """The workers, those that need care first: gone, slow, the slowest."""
    order = {"lost": 0, "failed": 0, "stopped": 1, "slow": 2, "running": 3, "loading": 4, "done": 5}

    def urgency(worker: WorkerStats) -> tuple[int, float, str]:
        state = _state_of(look, worker)
        return order.get(state, 0), look.rates.get(worker["name"], 0.0), f"{worker.get('rank')!s:>9}"

    return sorted((*look.at_work, *look.gone), key=urgency)


def _state_of(look: Look, worker: WorkerStats) -> str:
    state = str(worker["state"])
    if worker["name"] in look.slow:
        return "slow"
    if worker["name"] in look.rates:
        return state
    return {"loading": "lost", "running": "lost", "interrupted": "stopped"}.get(state, state)


def _table(look: Look, workers: Sequence[WorkerStats], width: int) -> Table:
    hosts = {str(worker["host"]) for worker in workers}
    names = ["rank", "host", "state", "rows/s", "rows", "waiting", "heard of"]
    names = [name for name in names if width >= _NARROW.get(name, 0) and (name != "host" or len(hosts) > 1)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in names:
        table.add_column(
            name,
            justify="left" if name in ("host", "state") else "right",
            no_wrap=True,
            overflow="ellipsis",
            max_width=20 if name == "host" else None,
        )
    for worker in workers:
        cells = _cells(look, worker)
        table.add_row(*(cells[name] for name in names))
    return table


def _cells(look: Look, worker: WorkerStats) -> dict[str, Text]:
    state = _state_of(look, worker)
    at_work = worker["name"] in look.rates
    seconds = worker.get("seconds", 0.0) - worker.get("loading_seconds", 0.0)
    waiting = worker.get("waiting_for_input_seconds", 0.0) / seconds if seconds > 0 else 0.0
    answers = worker["state"] == "running" and at_work
    heard = duration(max(0.0, time.time() - worker["updated"]))
    cells = {
        "rank": str(worker.get("rank", "?")),
        "host": str(worker["host"]),
        "rows/s": f"{look.rates[worker['name']]:.1f}" if at_work else "-",
        "rows": f"{worker.get('num_answered', 0):,}",
        "waiting": f"{waiting:.0%}" if answers else "-",
        "heard of": f"{heard} ago",
    }
    return {name: Text(_one_line(text)) for name, text in cells.items()} | {
        "state": Text(_one_line(state), style=_COLORS.get(state, ""))
    }


def _newest(look: Look) -> list[Text]:
    told = []
    for error in look.newest_errors:
        ago = duration(max(0.0, time.time() - error.time))
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f"{ago + ' ago':>16}  ", style="dim").append(_one_line(f"{error.kind}  {error.example}"))
        told.append(text)
    return told


def _one_line(text: str) -> str:
    """Text of anybody as one line that steers nothing."""
    return shown(text).replace("\n", "\\n").replace("\t", " ")


def _shares(room: int, wanted: Sequence[int]) -> list[int]:
    """Lines for each part: as many as it wants, or as many as the others get."""
    shares = [0] * len(wanted)
    while room > 0 and any(share < want for share, want in zip(shares, wanted, strict=True)):
        for part, want in enumerate(wanted):
            if room > 0 and shares[part] < want:
                shares[part] += 1
                room -= 1
    return shares
