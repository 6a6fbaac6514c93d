"""Statistics and verdicts from run folders alone; starts no run and draws nothing."""
