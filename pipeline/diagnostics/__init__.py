"""What a stream delivers and how fast: benchmark, preview sheet, and shuffle quality."""
