"""Pictures of recordings: heat maps, losses, changes of variance, differences, and comparisons over several seeds."""
from .style import shown_layers
from .heatmaps import plot_hist, plot_hist_diff, plot_hists
from .curves import plot_losses, plot_rms, plot_var_change
from .forest import plot_bands, plot_forest
from .interactive import HeatMap, heat_assets, heat_html
