"""What a store is on disk: manifest, LMDB shards of Caffe Datums, and the log of inputs."""
