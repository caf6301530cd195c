"""Extra fields of a build: values from CSV files, and the columns of a split."""
