"""Repeat the experiment of a 2019 post and test its claims: pretrain, fine-tune in several ways, and write a report.

- `arms`: the list of arms, as data
- `images`: the images of a folder, and which of them can't be used
- `data`: digits, pets and imagewoof, or two folders of pictures
- `train`: train one arm and record it
- `progress`: one progress bar for all runs, in whichever process
- `jobs`, `dask`: many runs, in processes or on a cluster
- `results`: where a run lies on disk, and how to read it
- `merge`: results without recordings, copied and merged
- `lock`: one command at a time in a folder
- `runner`: the whole study; the command bnstats-study
- `readings`: each run as a few numbers, and whether it diverged
- `claims`: the claims, as data; `verdicts`: seed by seed, in numbers and words
- `captions`: sentences with numbers, for the figures
- `figures`: the table of figures, fig1 to fig9
- `sweep`: which learning rate suits each arm; `sensitivity`: does a verdict depend on one seed?
- `report_headline`, `report_text`, `report_tables`, `report_landscape`, `report_words`: the content of the report
- `report_blocks` and `templates/`: how it becomes HTML and Markdown
- `report`: draw, judge, write; the command bnstats-report"""
from .arms import ARMS, CONTROLS, GRID, POST_ARMS, PRETRAIN, Arm, Phase
from .data import TransferData, digits, image_folders, pets_imagewoof, seed_batches
from .train import new_learner, new_model, train_arm
from .results import load_run, load_runs, load_study
from .claims import AA, CHECKS, CLAIMS, GRID_CLAIMS, LANDSCAPE_CLAIMS
from .verdicts import aa_table, judge, judge_study, study_table
from .figures import fig1, fig1g, fig1o, fig2, fig3, fig3g, fig3o, fig3r, fig4, fig5, fig6, fig7, fig8, fig9
from .report import write_report
from .runner import run_study
