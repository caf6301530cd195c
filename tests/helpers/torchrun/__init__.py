"""Commands under torchrun in tests: a program that starts them quickly, and their jobs."""
