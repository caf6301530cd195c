"""Tests of trainings under torchrun that are disturbed: processes are killed, stopped or hang, disks are full."""
