"""Tests of trainings under torchrun with faults: processes are killed, are stopped or hang, or a disk is full."""
