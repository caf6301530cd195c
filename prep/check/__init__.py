"""Verifies a finished store, describes it, exports its images, and plots its colours."""
