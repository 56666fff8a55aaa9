"""Pictures of recordings: heat maps, losses, changes of variance, differences, and comparisons over several seeds."""
from .panels import plot_hist, plot_hist_diff, plot_hists, plot_losses, plot_rms, plot_var_change, shown_layers
from .forest import plot_bands, plot_forest
from .interactive import HeatMap, heat_assets, heat_html
