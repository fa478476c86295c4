"""The store: Parquet files under one manifest, and DuckDB views over them."""

from tracekit.store.manifest import Segment, TraceInfo
from tracekit.store.reader import Block, Store
from tracekit.store.writer import ingest, write_trace

__all__ = ["Block", "Segment", "Store", "TraceInfo", "ingest", "write_trace"]
