"""The formats of the files that `alextrain` reads: what each file may hold, checked before memory is allocated."""
