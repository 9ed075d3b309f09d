"""Shards at addresses (https://, s3://, gs://): range reads with retries, and a cache of blocks on the local disk.

RemoteStorage.open(address) -> RemoteBytes.read_at -> BlockCache -> Retries -> HttpObject or StoredObject
"""
