"""Repeat the experiment of a 2019 post and test its claims: pretrain, fine-tune in several ways, and write a report."""
from .arms import ARMS, GRID, POST_ARMS, PRETRAIN, Arm, Phase
from .data import TransferData, digits, image_folders, pets_imagewoof, seed_batches
from .train import new_learner, new_model, train_arm
from .results import load_run, load_runs, load_study
from .claims import AA, CLAIMS, GRID_CLAIMS, aa_table, judge, study_table
from .figures import fig1, fig1g, fig1o, fig2, fig3, fig3g, fig3o, fig3r, fig4, fig5, fig6, fig7, fig8, fig9
from .report import write_report
from .runner import run_study
