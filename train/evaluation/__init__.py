"""Error rates, predictions, features, and nearest neighbors of a trained network."""
