"""Input formats: class folders, flat folders with label files, tar archives, and LMDBs of Caffe."""
