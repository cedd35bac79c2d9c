"""Functions that the rank processes of distributed tests run, and the models that they train."""
