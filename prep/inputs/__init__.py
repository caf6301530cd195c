"""Input formats: class folders, flat folders with label files, tar and zip archives, Parquet files, Caffe's LMDBs."""
