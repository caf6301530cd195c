"""Programs that train other networks than AlexNet on the stream. docs/examples.md describes the programs."""
