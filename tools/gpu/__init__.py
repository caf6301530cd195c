"""What tools.gpu_check is made of: the plan and the machine, the checks, the timings."""
