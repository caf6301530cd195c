"""The update rule of the paper, and the learning-rate schedules."""
