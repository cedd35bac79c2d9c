"""Operations of the command line on model folders and finished runs. They need no cluster and no recipe."""
