"""The service: workers on the nodes of a Ray cluster decode and crop batches for the loaders of training programs.

The module `coordinator` describes how the parts of a service work together. docs/service.md is the page for users.
"""
