"""Reading embeddings in shuffled order: our store against the official layout and its reader, in one run.

Writes the same synthetic rows as official parquet files (100 rows each), float16 store and int8 store into a temporary
folder; prints bytes per row and rows per CPU-second. The official reader cannot shuffle within a file: it reads files in
random order.

    python benchmarks/store_reading.py [--rows 10000] [--dimension 4096] [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lift.store import EmbeddingStore, StoreWriter

ROWS_PER_FILE = 100
"""Of the official layout."""
ROWS_PER_SHARD = 1000
BATCH = 4096
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        write(folder, arguments.rows, arguments.dimension)
        files = sorted((folder / "official").glob("*.parquet"))
        stores = {dtype: EmbeddingStore(folder / dtype) for dtype in ("float16", "int8")}
        official_bytes = sum(file.stat().st_size for file in files) / arguments.rows
        readers: list[tuple[str, float, Callable[[np.random.Generator], int]]] = [
            ("official parquet, iterrows", official_bytes, lambda rng: read_official(files, rng))
        ]
        for dtype, store in stores.items():
            for wanted in (np.float16, np.float32):
                label = f"{dtype} store, read as {np.dtype(wanted).name}"
                readers.append((label, store.manifest["bytes_per_caption"], reader(store, wanted)))
        machine = f"{platform.machine()}, {os.cpu_count()} CPUs, numpy {np.__version__}"
        print(f"{arguments.rows} rows of {arguments.dimension}; {machine}")
        print(f"{'':36} {'bytes/row':>9} {'rows/CPU-s':>10} {'ratio':>6}")
        base = 0.0
        for label, size, read in readers:
            speed = max(rows_per_cpu_second(read, seed) for seed in range(REPEATS))
            base = base or speed
            print(f"{label:36} {size:9.0f} {speed:10.0f} {speed / base:6.1f}")
        for store in stores.values():
            print(store.summary())


def write(folder: Path, rows: int, dimension: int) -> None:
    """Rows with outlier dimensions, in the three forms."""
    (folder / "official").mkdir()
    rng = np.random.default_rng(0)
    scale = np.where(rng.random(dimension) < 0.01, 6, 1)
    writers = {
        "float16": StoreWriter(folder / "float16", {"kind": "benchmark"}, dimension),
        "int8": StoreWriter(folder / "int8", {"kind": "benchmark"}, dimension, "int8"),
    }
    shards = []
    for start in range(0, rows, ROWS_PER_SHARD):
        keys = [f"{i:012d}" for i in range(start, min(rows, start + ROWS_PER_SHARD))]
        values = (rng.normal(size=(len(keys), dimension)) * scale).astype(np.float32)
        shards.append(f"shard-{start:09d}")
        for writer in writers.values():
            writer.write_shard(shards[-1], keys, [""] * len(keys), values)
        for first in range(0, len(keys), ROWS_PER_FILE):
            part = slice(first, first + ROWS_PER_FILE)
            embedding = pa.array(list(values[part]), pa.list_(pa.float32()))
            table = pa.table({"key": pa.array([f"{key}.jpg" for key in keys[part]]), "embedding": embedding})
            pq.write_table(table, folder / "official" / f"{start + first:09d}.parquet")
    for writer in writers.values():
        writer.finish(shards)


def read_official(files: list[Path], rng: np.random.Generator) -> int:
    """As the official loader iterates: batches of 100 to pandas, row by row; a row is its key and a float32 array."""
    count = 0
    for number in rng.permutation(len(files)):
        for batch in pq.ParquetFile(files[number]).iter_batches(ROWS_PER_FILE):
            for _, row in batch.to_pandas().iterrows():
                np.asarray(row["embedding"])
                count += bool(row["key"])
    return count


def reader(store: EmbeddingStore, dtype: type[np.floating]) -> Callable[[np.random.Generator], int]:
    def read(rng: np.random.Generator) -> int:
        order = rng.permutation(len(store))
        return sum(len(store.rows(order[start : start + BATCH], dtype)) for start in range(0, len(order), BATCH))

    return read


def rows_per_cpu_second(read: Callable[[np.random.Generator], int], seed: int) -> float:
    rng = np.random.default_rng(seed)
    start = time.process_time()
    rows = read(rng)
    return rows / (time.process_time() - start)


if __name__ == "__main__":
    main()
