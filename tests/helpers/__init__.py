"""Code that the tests of several modules use."""
