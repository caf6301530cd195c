"""Code that tests of several modules share."""
