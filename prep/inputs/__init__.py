"""Input formats: class folders, images with label files, tar and zip archives, Parquet files, Caffe's LMDBs."""
