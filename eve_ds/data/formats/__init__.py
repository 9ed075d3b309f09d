"""Published annotation formats, one module each; readers yield neutral records and know no task and no shard.

Importers turn the records into candidates for shards (:mod:`eve_ds.data.importers`), tasks turn them into examples.
"""
