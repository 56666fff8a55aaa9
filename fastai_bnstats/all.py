"""Everything that a notebook needs: `from fastai_bnstats.all import *`"""
from .recording import Recording, RecordingDiff
from .select import select_modules, select_tensors
from .callback import WeightHistCallback
from .siblings import ActivationHistCallback, GradHistCallback, UpdateHistCallback
from .norm import count_bn, is_bn, remove_bn
from .split import bn_splitter, find_head
from .freeze import KeepFrozen
from .audit import LedgerCallback, LedgerError, bn_doctor
from .plot import plot_hist, plot_hists, plot_hist_diff, plot_losses, plot_rms, plot_var_change
from .figures import fig1, fig2, fig3, fig4, fig5, fig6, fig7, fig8, fig9, fig1g, fig1o, fig3g, fig3o, fig3r
from .heat import HeatMap, heat_html
from .compare import angle, change_size, displacement, grad_depth, grad_rms, log_var_change, loss_variability, over_layers, path_length, roughness
from .paired import Paired, bootstrap_band, detectable, holm, paired_test, sign_flip, tost, verdict
from .pairs import plot_bands, plot_pairs
from .results import load_run, load_runs, load_study
from .claims import AA, CLAIMS, GRID_CLAIMS, aa_table, judge, study_table
from .data import digits, image_folders, pets_imagewoof, seed_batches
from .report import write_report
from .runner import run_study

__all__ = [n for n in dir() if not n.startswith('_') and n not in ('stats','device','recording','timeline','select','callback','siblings','norm','split','freeze','audit','plot','figures','heat','compare','paired','pairs',
                                                                   'results','claims','captions','text','data','report','study','jobs','runner','kernel')]
