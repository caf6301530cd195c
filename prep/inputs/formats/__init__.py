"""Layouts of other tools: class tars, zip archives, Tiny ImageNet, WebDataset, Parquet, CSV lists."""
