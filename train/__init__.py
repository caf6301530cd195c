"""Training, evaluation and export of the two-column AlexNet (Krizhevsky, Sutskever and Hinton 2012), in PyTorch."""
