"""The embedding store: captions' embeddings on disk, one Arrow file per shard and a manifest.

`StoreWriter` writes shards and, when all are there, the manifest; `EmbeddingStore` reads rows in any order from memory-maps
and matches captions to rows. Nothing here holds a whole column, or all keys, in memory for longer than a sort.
"""

from lift.store.reader import EmbeddingStore
from lift.store.shard_file import StoreDtype, storable, text_hash, text_hashes
from lift.store.writer import StoreWriter

__all__ = ["EmbeddingStore", "StoreDtype", "StoreWriter", "storable", "text_hash", "text_hashes"]
