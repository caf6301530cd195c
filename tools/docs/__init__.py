"""Programs that write or check parts of the documentation: generated pages, the drawing of the network, the site."""
