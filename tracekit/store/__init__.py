"""The store: Parquet files under one manifest, and DuckDB views over them."""

from tracekit.store.compaction import compact
from tracekit.store.manifest import Segment, TraceInfo
from tracekit.store.reader import Block, Columns, Store
from tracekit.store.writer import ingest, write_trace

__all__ = ["Block", "Columns", "Segment", "Store", "TraceInfo", "compact", "ingest", "write_trace"]
