"""The format of a store on disk: manifest, records in LMDB shards, log of inputs. prep.images processes images."""
