"""Training: the loop and its listeners, checkpoints, losses, and the `Engine` protocol with its plain torch engine."""
