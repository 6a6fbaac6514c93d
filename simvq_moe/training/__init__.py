"""The loop of a run, from its start to its last step; calls of DeepSpeed are the engine's."""
