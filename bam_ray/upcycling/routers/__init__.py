"""Initial weights of routers: drawn at random, or fitted to text of the domains without training."""
