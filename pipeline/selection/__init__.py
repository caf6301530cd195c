"""Selection of the records and fields that a loader serves; random access to single records."""
