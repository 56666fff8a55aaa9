"""Pictures of recordings: heat maps, losses, changes of variance, differences, and comparisons over several seeds.

- `style`: colours, panels, titles and ticks that all figures share
- `columns`: more minibatches than pixels
- `heatmaps`: histograms over time, and their differences
- `curves`: losses, changes of variance, sizes by depth
- `overview`: the first picture of a recording, also during training
- `forest`: paired seeds with their intervals
- `landscape`: the smoothness of the loss over a training
- `runs`: one layer of several runs
- `ratio`: update and weight of each layer
- `findings`: what `diagnose` found
- `drift`: running statistics of batch norm against some data
- `interactive`: the heat map to point at, with its CSS and JavaScript files
- `page_data`: one training as plain numbers, for the script of a page
- `page`: one training as one HTML page"""
from .style import new_figure, shown_layers
from .heatmaps import plot_hist, plot_hist_diff, plot_hists
from .curves import plot_losses, plot_rms, plot_var_change
from .overview import LivePicture, plot_overview
from .forest import plot_bands, plot_forest, plot_sweep
from .landscape import plot_landscape
from .runs import plot_mean, plot_ridge
from .ratio import plot_update_ratio
from .findings import plot_finding
from .drift import plot_drift
from .interactive import HeatMap, heat_assets, heat_html
from .page import page_html, write_page
