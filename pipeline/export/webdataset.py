"""format=webdataset: tar files of samples. A record is KEY.jpg (or what its image is), KEY.json and, answered, KEY.txt.

KEY is the row's number in nine digits, so that no id can break it; the id is in the JSON. Of several images the members
are KEY.0.jpg, KEY.1.jpg ...; of several records of one row the keys are NUMBER-PROMPT-SAMPLE, counted from 0. Bytes are
the same whenever they are written: members have no date and no owner.
"""

from __future__ import annotations

import re
import tarfile
from contextlib import ExitStack
from io import BytesIO
from types import TracebackType

from pipeline.errors import UsageError
from pipeline.export.destination import FOLDER, new_file, refuse_own_files, refuse_sidecar_words
from pipeline.export.jsonl import line
from pipeline.export.options import COMMON, Errors, Exists, ExportOptions
from pipeline.export.pictures import Lost, Picture, Pictures
from pipeline.export.selection import Selection
from pipeline.write.file import Place, matching, place

OBEYED = COMMON | {"to", "root", "errors", "columns", "tar_samples", "tar_bytes"}
ERRORS = Errors.skip
_OURS = ("id", "prompt_name", "sample_index", "status", "response")


def export(selection: Selection, options: ExportOptions, output_dir: Place) -> str:
    """Write the tars; where they are, as a phrase.

    Raises:
        UsageError: there are such tars already, or a column is not there.
        RunFailed: one cannot be written, or the source cannot be opened.
    """
    folder = output_dir / FOLDER / "webdataset" if options.to is None else place(options.to)
    if options.to is not None:
        refuse_own_files(output_dir, folder)
    columns = selection.columns(with_bytes=False)
    pictures = Pictures(selection, options, output_dir)
    _clear(folder, options.exists)
    asked = list(dict.fromkeys([*columns.values(), *Pictures.COLUMNS, *_OURS]))
    prompts = {name: number for number, name in enumerate(selection.plan.prompt_names)}
    with _Tars(folder, options) as tars:
        for table in selection.tables(asked):
            shown = table.select(list(columns.values())).rename_columns(list(columns)).to_pylist()
            ours = table.select(["row_index", *_OURS]).to_pylist()
            for row, values, found in zip(ours, shown, pictures.of(table), strict=True):
                if isinstance(found, Lost):
                    if row["status"] == "ok":
                        selection.fail(found.kind, f"{row['id']}: {found.message}")
                        continue
                    found = []  # often the very error that the record tells of
                key = f"{row['row_index']:09d}"
                if selection.records_per_row > 1:
                    key += f"-{prompts[row['prompt_name']]}-{row['sample_index']}"
                members = _images(key, found) | {f"{key}.json": line(values)}
                if row["response"] is not None:
                    members[f"{key}.txt"] = row["response"].encode()
                tars.add(members)
                selection.num_written += 1
    return f"in {tars.num_tars:,} tars in {folder}"


def _images(key: str, pictures: list[Picture]) -> dict[str, bytes]:
    if len(pictures) == 1:
        return {f"{key}.{pictures[0].extension}": pictures[0].data}
    return {f"{key}.{number}.{picture.extension}": picture.data for number, picture in enumerate(pictures)}


def _clear(folder: Place, exists: Exists | None) -> None:
    """Take away the tars of an earlier export, or refuse: with those of this one they would be one dataset."""
    refuse_sidecar_words(exists)
    there = [path for path in matching(folder, "answers-*.tar") if re.fullmatch(r"answers-\d{6,}\.tar", path.name)]
    if there and exists is None:
        raise UsageError(
            f"{there[0]} is there already. exists=overwrite removes the tars of that export first; to=... writes "
            "elsewhere."
        )
    for path in there:
        path.unlink(missing_ok=True)


class _Tars:
    """Tars of limited size, each of which has its name once it is whole."""

    def __init__(self, folder: Place, options: ExportOptions) -> None:
        self._folder, self._options = folder, options
        self._open = ExitStack()
        self._tar: tarfile.TarFile | None = None
        self._num_samples = self._num_bytes = 0  # of the open one
        self.num_tars = 0

    def __enter__(self) -> _Tars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, problem, trace)

    def add(self, members: dict[str, bytes]) -> None:
        """Write a sample.

        Raises:
            RunFailed: the tar cannot be written.
        """
        if self._num_samples >= self._options.tar_samples or self._num_bytes >= self._options.tar_bytes:
            self._open.close()
            self._tar = None
        if self._tar is None:
            file = self._open.enter_context(new_file(self._folder / f"answers-{self.num_tars:06d}.tar"))
            tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
            self._tar = self._open.enter_context(tar)
            self._num_samples = self._num_bytes = 0
            self.num_tars += 1
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            self._tar.addfile(header, BytesIO(data))
            self._num_bytes += len(data)
        self._num_samples += 1
