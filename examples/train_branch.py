"""Train one branch of a recipe in this process, without a cluster.

    python examples/train_branch.py --recipe examples/small.yaml --domain code branch.training.tokens=100000

The corpus and the seed are made first. Every artifact is kept in the recipe's store: if the script is interrupted, the
same command resumes, and `bam run` on a cluster continues with what exists.
"""

import argparse

import bam_ray


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train one branch without a cluster.")
    parser.add_argument("--recipe", default="examples/small.yaml", help="the recipe, a YAML file")
    parser.add_argument("--domain", default="code", help="the domain of the branch")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the recipe")
    arguments = parser.parse_args()

    recipe = bam_ray.load_recipe(arguments.recipe, arguments.overrides)
    folder = bam_ray.train_branch(
        recipe,
        arguments.domain,
        on_progress=lambda progress: print(
            f"step {progress.step}/{progress.total_steps}",
            progress.note if progress.loss is None else f"loss {progress.loss:.3f}",
        ),
    )
    print(f"branch {arguments.domain}: {folder}")


if __name__ == "__main__":
    main()
