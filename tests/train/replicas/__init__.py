"""Tests of train.replicas: processes of torchrun that train one network together."""
