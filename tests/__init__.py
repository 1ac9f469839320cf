"""Numbers are compared as a CPU computes them, also on a machine with a GPU, which is hidden."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
