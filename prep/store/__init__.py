"""The format of a store on disk: manifest, records in LMDB shards, and the log of inputs. Images are not processed."""
