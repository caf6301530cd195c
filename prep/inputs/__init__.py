"""Where photographs come from: folders, tar archives, Caffe LMDBs, and label files."""
