"""The format of a store on disk: manifest, records in LMDB shards, and the log of inputs; no image processing here."""
