"""Operations of the command line on model folders and on the store of a run. They need no cluster and no recipe.

folders.py           upcycle, edit, measure and export model folders
recipe_template.py   write a recipe for a user's own seed and text
step_export.py       copy a training checkpoint out of a run
token_rows.py        tokenize text that the user gives
topics.py            find the topics of text that the user gives
"""
