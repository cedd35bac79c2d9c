"""Training: the loop, the schedule, losses, and the `Engine` protocol with its plain torch implementation."""
