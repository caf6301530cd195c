"""Which records a loader serves, in which order, and with which fields; random access to single records."""
