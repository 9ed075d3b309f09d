"""Parts of :mod:`eve_ds.data.shard_writer`: options, excluded ids, one shard, and the output folder."""
