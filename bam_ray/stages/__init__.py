"""The seven stages: corpus, seed, branch, control, upcycle, mix and evaluate. Each makes one artifact.

corpora ─▶ seeds ─▶ branches × N ─▶ upcycled ─▶ mixtures ─▶ reports
             └────▶ controls ─────────────────────────────────┘

task_run.py     `TaskRun`, the one value that every stage receives; imports no torch
run.py          `run_stage` and `run_rank`, which look up a task's stage and run it
corpus.py       corpora
token_counts.py the counts of tokens that a corpus contains
dense.py        seeds, branches and controls
upcycle.py      mixtures at step 0
mix.py          trained mixtures
absorb.py       adds branches that were committed after their mixture had started
evaluate.py     reports
compare.py      comparisons of the reports of several training seeds
training_job.py the data and settings that a stage hands to train.py
train.py        the training that seeds, branches, controls and mixtures share
publish.py      commits the trained model
"""
