"""One shard that is open: reads a row, checked as far as parquet can."""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.train.data.quarantine import BadData
from gossamer.train.data.shards import Shard, schema

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


class OpenShard:
    """Reads the row group of a row, or has all in memory; BadData where it cannot be read."""

    def __init__(self, path: Path, shard: Shard) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._table: Any = None
        try:
            # no memory map: a file that shrinks is then an error and not the end of the process
            self._file = pq.ParquetFile(path, memory_map=False, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise BadData(f"{type(error).__name__}: {error}") from error
        _check_schema(self._file, shard)
        groups = range(self._file.num_row_groups)
        rows = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._ends = list(accumulate(rows))
        self._last: tuple[int, Any] = (-1, None)

    def read_all(self) -> None:
        """Keep all rows in memory."""
        self._table = self._checked(self._file.read)

    def row(self, row: int) -> dict[str, Any]:
        """Return the columns of a row."""
        if self._table is not None:
            return self._table.slice(row, 1).to_pylist()[0]
        group = bisect_right(self._ends, row)
        if self._last[0] != group:
            self._last = group, self._checked(self._file.read_row_group, group)
        table = self._last[1]
        return table.slice(row - (self._ends[group] - len(table)), 1).to_pylist()[0]

    def _checked(self, read: Any, *arguments: int) -> "pa.Table":
        import pyarrow as pa

        try:
            return read(*arguments, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise BadData(f"{type(error).__name__}: {error}", one_clip=True) from error


def _check_schema(file: "pq.ParquetFile", shard: Shard) -> None:
    found = {field.name: field.type for field in file.schema_arrow}
    for field in schema():
        if found.get(field.name) != field.type:
            raise BadData(f"column {field.name} is {found.get(field.name)}, not {field.type}")
    if file.metadata.num_rows != shard.rows:
        raise BadData(f"{file.metadata.num_rows} rows instead of {shard.rows}")
