"""Copies stores to and from object storage."""
