"""The two-column AlexNet of Krizhevsky, Sutskever and Hinton (2012) and its training, in PyTorch."""
