"""Format of a store on disk: manifest, records in LMDB shards, and log of inputs."""
