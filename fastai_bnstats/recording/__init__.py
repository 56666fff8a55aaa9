"""What was measured at each step of a training, as a table: select, subtract, save and load it. Needs neither torch nor fastai.

- `names`: select layers by name or glob
- `file_format`: one `.npz` file, and folders of numbered chunks
- `checks`: what must hold for the arrays of a recording
- `parts`: join the chunks of one recording
- `recording`: `Recording` and `RecordingDiff`
- `summary`: what a recording says of itself
- `landscape`: loss and gradient around the weights
- `containers`: a recording for xarray, pandas and Zarr"""
from .names import counted, describe_difference, is_shortcut, match_names
from .file_format import CHUNKS, FORMAT, UNFINISHED, chunk_name, chunk_number, write_atomically
from .parts import concat, fill_unknown_edges
from .recording import (DIMS, NORMS, Recording, RecordingDiff, common_rows, empty_recording, full_counts, gaps, load_folder, phases_of,
                        shares, total_variation)
from .landscape import ARRAYS, MEASURES, Landscape
from .summary import BUFFERS, cost_text, has_all_parameters # summary also adds the text and the table of a Recording
from . import containers # adds other containers
