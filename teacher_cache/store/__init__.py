"""One teacher's targets on disk: manifest, commits, shards, writer and reader."""
