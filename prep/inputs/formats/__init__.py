"""Layouts of other tools: class tars, zip archives, Tiny ImageNet, WebDataset, Parquet, CSV lists."""

# Values of --layout. prep/inputs/formats/layouts.py describes these layouts.
LAYOUTS = ("folders", "tar", "class-tars", "zip", "tiny-imagenet", "kaggle", "webdataset", "parquet", "csv")
