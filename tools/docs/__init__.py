"""Programs that generate pages of the documentation, draw the network, and check the documentation site."""
