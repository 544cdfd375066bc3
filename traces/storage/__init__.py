"""The stored objects below a trace: arrays, shards, files that are there whole or not at all."""
