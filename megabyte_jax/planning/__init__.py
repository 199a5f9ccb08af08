"""What training a config on a slice of TPUs takes, found by compiling it where there are none."""
