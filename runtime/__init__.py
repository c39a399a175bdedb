"""What keeps a run alive: ranks, checkpoints, resuming, guards, log, device, errors, files, command line."""
